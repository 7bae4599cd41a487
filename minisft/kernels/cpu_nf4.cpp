// NF4 on the CPU: dequantize, quantize, products of a few rows with weights in 4 bits, bfloat16 or fp32; and the sums of
// a merge report.
//
// The format and its reference in PyTorch are in minisft/nf4.py: weight = levels[code] * absmax[block], the first element of a byte
// in its high nibble. dequantize and quantize give the reference's bits, so nothing here may be reordered or fused behind our back:
// compile with -ffp-contract=off and without -ffast-math. Little-endian machines. Python checks every size before it calls:
// nothing is checked here.

#include "cpu_products.h"

namespace {

typedef double Doubles __attribute__((vector_size(4 * LANES)));  // half as many lanes
typedef int64_t Longs __attribute__((vector_size(4 * LANES)));
typedef float HalfFloats __attribute__((vector_size(2 * LANES)));

// MAX_RECIPROCAL is nf4.py's: cpu_build.py hands it to the compiler.
constexpr int64_t WORTH_A_THREAD = 1 << 16;  // multiplications; fewer are done before another thread has woken

// ---- dequantize ----------------------------------------------------------------------------------------------------------

template <class Out>
void dequantize(const Weight& w, Out* out, int threads) {
    const int64_t size = int64_t(1) << w.block_shift, blocks = (w.length + size - 1) >> w.block_shift;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        const Table table = load<Table>(w.levels) * w.scale(block);
        int64_t i = block * size;
        const int64_t end = i + size < w.length ? i + size : w.length;
        for (; i + LANES <= end; i += LANES) put(out + i, look_up(table, codes_at(w.packed + (i >> 1))));
        if (i < end) {
            uint8_t bytes[LANES / 2] = {};
            memcpy(bytes, w.packed + (i >> 1), (end - i + 1) >> 1);
            Out rest[LANES];
            put(rest, look_up(table, codes_at(bytes)));
            memcpy(out + i, rest, (end - i) * sizeof(Out));
        }
    }
}

// ---- quantize ------------------------------------------------------------------------------------------------------------

// The largest magnitude; as integers, so that infinity is larger than any number, and NaN than infinity.
inline float largest_magnitude(const float* x, int64_t length) {
    Ints most = {};
    for (int64_t i = 0; i < length; i += LANES) {
        const Ints bits = i + LANES <= length ? load<Ints>(x + i) : load_some<Ints>(x + i, (length - i) * 4);
        const Ints magnitude = bits & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    int32_t best = 0;
    for (int lane = 0; lane < LANES; ++lane) best = most[lane] > best ? most[lane] : best;
    return load<float>(&best);
}

// Two codes a byte for LANES numbers in [-1, 1]: a code's rank is how many midpoints lie below the number.
inline PairBytes encode(Floats x, const float* midpoints, const Table& codes_by_rank) {
    Ints rank = {};
    for (int j = 0; j < 15; ++j) rank -= (Ints)(x > midpoints[j]);
    const Pairs pairs = (Pairs)look_up(codes_by_rank, rank);
    return __builtin_convertvector(pairs << 4 | pairs >> 32, PairBytes);
}

void quantize_block(const float* x, int64_t length, float absmax, const float* midpoints, const Table& codes, uint8_t* out) {
    const float inverse = 1.0f / absmax, reciprocal = inverse > MAX_RECIPROCAL ? MAX_RECIPROCAL : inverse;
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES) {
        const PairBytes bytes = encode(load<Floats>(x + i) * reciprocal, midpoints, codes);
        memcpy(out + (i >> 1), &bytes, sizeof bytes);
    }
    if (i < length) {
        const PairBytes bytes = encode(load_first(x + i, length - i) * reciprocal, midpoints, codes);
        memcpy(out + (i >> 1), &bytes, (length - i + 1) >> 1);
    }
}

// ---- products of a few rows ----------------------------------------------------------------------------------------------

// y = x W^T + b, and what a low-rank adapter adds to it: scaling * (x A^T) B^T. cpu_matmul.py declares the same struct.
struct Product {
    const float *x, *bias;  // (rows, in) and (out,); bias may be null
    float* y;               // (rows, out)
    const void* weight;     // (out, in): a Weight, or numbers in bf16 or fp32
    const float *A, *B;     // (rank, in) and (out, rank); A is null where there is no adapter
    float* down;            // (rows, rank): x A^T, for backward
    float* fp32;            // null where x and y are fp32; where they are bf16, memory for both in fp32
    float* halves;          // (rows, in), for a Weight: x as split() lays it out
    int64_t rows, in, out, rank;
    float scaling;
    int32_t threads;
};

template <class Matrix>
void product(const Product& p, const Matrix& matrix, const float* x) {
    const Added added{p.A ? p.B : nullptr, p.down, p.rank, p.scaling, false};
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t column = 0; column < p.out; column += COLUMNS_AT_ONCE) {
        const int count = p.out - column < COLUMNS_AT_ONCE ? int(p.out - column) : COLUMNS_AT_ONCE;
        outputs(matrix, x, p.rows, column, count, added, [&](int64_t row, int64_t j, float value) {
            p.y[row * p.out + j] = value + (p.bias ? p.bias[j] : 0.0f);
        });
    }
}

void multiply(const Product& p, const float* weight) { product(p, DenseMatrix<float>{weight, p.in}, p.x); }
void multiply(const Product& p, const uint16_t* weight) { product(p, DenseMatrix<uint16_t>{weight, p.in}, p.x); }
void multiply(const Product& p, const Weight* weight) {
    if (p.in % (2 * LANES)) return product(p, OrderedMatrix{*weight, p.in}, p.x);
    split(p.x, p.rows * p.in, p.halves);
    product(p, PackedMatrix(*weight, p.in), p.halves);
}

// Both halves of an update together are little work for most layers: then one thread does it.
int threads_of_update(const Product& p) { return p.rows * p.rank * (p.in + p.out) < WORTH_A_THREAD ? 1 : p.threads; }

// down = x A^T.
void multiply_down(const Product& p) {
    Product down = p;
    down.y = p.down;
    down.A = down.bias = nullptr;
    down.out = p.rank;
    down.threads = threads_of_update(p);
    multiply(down, p.A);
}

// y += scaling * (x A^T) B^T.
void add_update(const Product& p) {
    multiply_down(p);
#pragma omp parallel for num_threads(threads_of_update(p)) schedule(static)
    for (int64_t column = 0; column < p.out; ++column)
        for (int64_t row = 0; row < p.rows; ++row)
            p.y[row * p.out + column] += p.scaling * dot(p.B + column * p.rank, p.down + row * p.rank, p.rank);
}

template <class Numbers>
void matmul(const Product& p) {
    if (!p.fp32) {
        if (p.A) multiply_down(p);
        multiply(p, static_cast<const Numbers*>(p.weight));
        return;
    }
    Product fp32 = p;
    fp32.x = p.fp32;
    fp32.y = p.fp32 + p.rows * p.in;
    fp32.fp32 = nullptr;
    const uint16_t* x = reinterpret_cast<const uint16_t*>(p.x);
    for (int64_t i = 0; i < p.rows * p.in; i += LANES) put(p.fp32 + i, widened(x + i));
    matmul<Numbers>(fp32);
    uint16_t* y = reinterpret_cast<uint16_t*>(p.y);
    const int64_t size = p.rows * p.out;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) put(y + i, load<Floats>(fp32.y + i));
    put_first(y + i, load_first(fp32.y + i, size - i), size - i);
}

// ---- merge report -------------------------------------------------------------------------------------------------------

// With E = W' - W as stored and D as trained; cpu_nf4.py declares the same struct.
struct EffectSums {
    double base, delta, error, dot;  // sums of W^2, D^2, (E - D)^2 and E D
    int64_t num_nonzero, num_changed;          // how many entries of D are not zero, and how many of those changed W
};

struct LaneSums {
    Doubles base = {}, delta = {}, error = {}, dot = {};
    Longs num_nonzero = {}, num_changed = {};

    void add(HalfFloats base_, HalfFloats delta_, HalfFloats stored_) {
        const Doubles w = __builtin_convertvector(base_, Doubles), d = __builtin_convertvector(delta_, Doubles);
        const Doubles effect = __builtin_convertvector(stored_, Doubles) - w;
        base += w * w;
        delta += d * d;
        error += (effect - d) * (effect - d);
        dot += effect * d;
        num_nonzero -= (Longs)(d != 0);
        num_changed -= (Longs)(d != 0) & (Longs)(effect != 0);
    }
};

template <class Number, class Lanes>
inline Number sum_of(Lanes lanes) {
    Number total = 0;
    for (int lane = 0; lane < LANES / 2; ++lane) total += lanes[lane];
    return total;
}

EffectSums effect_sums(const float* base, const float* delta, const float* stored, int64_t length) {
    constexpr int64_t STEP = LANES / 2;
    LaneSums s;
    int64_t i = 0;
    for (; i + STEP <= length; i += STEP)
        s.add(load<HalfFloats>(base + i), load<HalfFloats>(delta + i), load<HalfFloats>(stored + i));
    const int64_t rest = 4 * (length - i);  // zeros change no sum
    s.add(load_some<HalfFloats>(base + i, rest), load_some<HalfFloats>(delta + i, rest), load_some<HalfFloats>(stored + i, rest));
    return {sum_of<double>(s.base), sum_of<double>(s.delta), sum_of<double>(s.error), sum_of<double>(s.dot),
            sum_of<int64_t>(s.num_nonzero), sum_of<int64_t>(s.num_changed)};
}

}  // namespace

extern "C" {

const char* nf4_instructions() { return INSTRUCTIONS; }

void nf4_dequantize_float32(const Weight* w, float* out, int threads) { dequantize(*w, out, threads); }
void nf4_dequantize_bfloat16(const Weight* w, uint16_t* out, int threads) { dequantize(*w, out, threads); }

// codes: 16 numbers of 32 bits, the code of each rank.
void nf4_quantize(const float* x, int64_t length, int64_t block_size, const float* midpoints, const int32_t* codes,
                  uint8_t* packed, float* absmax, int threads) {
    const int64_t blocks = (length + block_size - 1) / block_size;
    const Table table = load<Table>(codes);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = block * block_size, size = begin + block_size < length ? block_size : length - begin;
        absmax[block] = largest_magnitude(x + begin, size);
        quantize_block(x + begin, size, absmax[block], midpoints, table, packed + (begin >> 1));
    }
}

void nf4_matmul(const Product* p) { matmul<Weight>(*p); }
void fp32_matmul(const Product* p) { matmul<float>(*p); }
void bf16_matmul(const Product* p) { matmul<uint16_t>(*p); }
void lora_update(const Product* p) { add_update(*p); }

void merge_effect(const float* base, const float* delta, const float* stored, int64_t length, EffectSums* out) {
    *out = effect_sums(base, delta, stored, length);
}

}
