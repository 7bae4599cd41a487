// What backward of an adapter needs beside G W: H = s G B, and the gradients of A and B, for all layers that read one x.
//
//     H = s G B        grad_A = H^T x        grad_B = s G^T (x A^T)
//
// One side of each product is the rank, so each reads far more than it computes, and to read once is what counts: here G is read
// once for two products, and x once for all layers. A block of rows is taken piece by piece into the first cache, in fp32 and
// with rows of one length, so that the compiler knows where every number lies. Each thread has sums of its own, which are added
// in their order at the end: the bits depend on the number of threads. Python checks sizes and dtypes: nothing is checked here.

#include "cpu_lanes.h"

namespace {

// kernels/cpu_adapter.py declares the same structs.
struct Layer {
    const void* grad;                   // (rows, out)
    const float *lora_B, *low;          // (out, rank); x A^T (rows, rank)
    float *low_grad, *grad_A, *grad_B;  // H (rows, rank), a part of rows of `ranks`; (rank, in), (out, rank)
    int64_t out, rank;
    float scaling;
};
struct Gradients {
    const Layer* layers;
    const void* x;  // (rows, in)
    float* memory;
    int64_t num_layers, rows, in, ranks;  // ranks: of all layers together
    int32_t bf16, threads;  // grad and x are bf16, not fp32
};

constexpr int64_t SUMS = LANES == 16 ? 24 : 12;  // rows summed at once: registers hold these and two vectors
constexpr int64_t ROWS = 2 * SUMS;               // of a block
constexpr int64_t PIECE = 4 * LANES;             // columns at once: with what is added to, they fit into a first cache
constexpr int64_t LOW = ROWS * LANES;            // numbers of a block for LANES ranks

inline int64_t padded(int64_t size) { return pieces(size, LANES) * LANES; }

// A block's numbers of some columns, in fp32.
struct Piece {
    alignas(64) float numbers[ROWS][PIECE];

    // Zeros beside them: in rows that there are not, and up to a whole vector.
    template <class T>
    void take(const T* from, int64_t stride, int64_t rows, int64_t count) {
        const int64_t whole = count / LANES * LANES;
        for (int64_t row = 0; row < rows; ++row, from += stride) {
            for (int64_t k = 0; k < whole; k += LANES) put(numbers[row] + k, widened(from + k));
            if (whole < count) put(numbers[row] + whole, load_first(from + whole, count - whole));
        }
        for (int64_t row = rows; row < ROWS; ++row) memset(numbers[row], 0, sizeof numbers[row]);
    }

    // low (ROWS, LANES) += numbers (ROWS, count) factor (count, ranks); rows of the factor are `rank` apart.
    template <bool WHOLE>
    void add_low(const float* factor, int64_t rank, int64_t ranks, int64_t count, float* low) const {
        for (int64_t row = 0; row < ROWS; row += SUMS, low += SUMS * LANES) {
            Floats sums[SUMS];
            each<SUMS>([&](int i) ALWAYS_INLINE { sums[i] = load<Floats>(low + i * LANES); });
            for (int64_t k = 0; k < count; ++k) {
                const Floats line = WHOLE ? load<Floats>(factor + k * rank) : load_first(factor + k * rank, ranks);
                each<SUMS>([&](int i) ALWAYS_INLINE { sums[i] = multiply_add(splat(numbers[row + i][k]), line, sums[i]); });
            }
            each<SUMS>([&](int i) ALWAYS_INLINE { put(low + i * LANES, sums[i]); });
        }
    }

    // outer (count / LANES, LANES ranks, LANES columns) += low (ROWS, LANES)^T numbers (ROWS, count); asks for what is taken next.
    template <class T>
    void add_outer(const float* low, int64_t count, float* outer, const T* next, int64_t stride) const {
        for (int64_t k = 0; k < count; k += LANES, outer += LANES * LANES) {
            Floats sums[LANES];
            each<LANES>([&](int rank) ALWAYS_INLINE { sums[rank] = load<Floats>(outer + rank * LANES); });
            for (int64_t row = 0; row < ROWS; ++row) {
                const Floats line = load<Floats>(numbers[row] + k);
                const float* factors = low + row * LANES;
                __builtin_prefetch(next + row * stride + k);
                each<LANES>([&](int rank) ALWAYS_INLINE { sums[rank] = multiply_add(splat(factors[rank]), line, sums[rank]); });
            }
            each<LANES>([&](int rank) ALWAYS_INLINE { put(outer + rank * LANES, sums[rank]); });
        }
    }
};

// LANES ranks of a layer, or what is left of them, and a thread's own memory for them.
struct Part {
    const Layer& layer;
    int64_t first, ranks;
    float *low, *low_grad;  // of a block: (ROWS, LANES)
    float *sums_A, *sums_B;
};

// Numbers of memory that each thread needs, and how many threads have a block to work on.
inline int64_t own_size(const Gradients& p) {
    int64_t size = 0;
    for (const Layer* layer = p.layers; layer < p.layers + p.num_layers; ++layer)
        size += pieces(layer->rank, LANES) * (2 * LOW + (padded(p.in) + padded(layer->out)) * LANES);
    return size;
}
inline int64_t team_size(const Gradients& p) { return least(p.threads, pieces(p.rows, ROWS)); }

// What all threads run together.
template <class T>
struct Team {
    const Gradients& p;
    const int64_t own;  // own_size

    template <class Visit>
    void parts(int64_t thread, Visit visit) const {
        float* memory = p.memory + thread * own;
        for (const Layer* layer = p.layers; layer < p.layers + p.num_layers; ++layer)
            for (int64_t first = 0; first < layer->rank; first += LANES) {
                float *const sums_A = memory + 2 * LOW, *const sums_B = sums_A + padded(p.in) * LANES;
                visit(Part{*layer, first, least(LANES, layer->rank - first), memory, memory + LOW, sums_A, sums_B});
                memory = sums_B + padded(layer->out) * LANES;
            }
    }

    void run() const {
        const int64_t thread = omp_get_thread_num();
        memset(p.memory + thread * own, 0, 4 * own);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < p.rows; row += ROWS) add_block(row, least(ROWS, p.rows - row), thread);
        parts(0, [&](const Part& part) { finish(part); });
    }

    void add_block(int64_t row, int64_t rows, int64_t thread) const {
        Piece piece;
        parts(thread, [&](const Part& part) {
            const int64_t out = part.layer.out, rank = part.layer.rank;
            const T* const grad = static_cast<const T*>(part.layer.grad) + row * out;
            memset(part.low, 0, 2 * 4 * LOW);  // and low_grad
            for (int64_t i = 0; i < rows; ++i)
                memcpy(part.low + i * LANES, part.layer.low + (row + i) * rank + part.first, 4 * part.ranks);
            for (int64_t k = 0; k < out; k += PIECE) {
                const int64_t count = least(PIECE, out - k);
                const float* const factor = part.layer.lora_B + k * rank + part.first;
                piece.take(grad + k, out, rows, count);
                if (part.ranks == LANES) piece.add_low<true>(factor, rank, LANES, count, part.low_grad);
                else piece.add_low<false>(factor, rank, part.ranks, count, part.low_grad);
                piece.add_outer(part.low, count, part.sums_B + k * LANES, grad + k + PIECE, out);
            }
            for (int64_t i = 0; i < rows; ++i) {
                float* const line = part.low_grad + i * LANES;
                put(line, load<Floats>(line) * part.layer.scaling);
                memcpy(part.layer.low_grad + (row + i) * p.ranks + part.first, line, 4 * part.ranks);
            }
        });
        const T* const x = static_cast<const T*>(p.x) + row * p.in;
        for (int64_t k = 0; k < p.in; k += PIECE) {
            const int64_t count = least(PIECE, p.in - k);
            piece.take(x + k, p.in, rows, count);
            parts(thread, [&](const Part& part) {
                piece.add_outer(part.low_grad, count, part.sums_A + k * LANES, x + k + PIECE, p.in);
            });
        }
    }

    // What stands there in each thread's memory, added in their order.
    Floats total(const float* first) const {
        Floats sum = {};
        for (int64_t thread = 0; thread < omp_get_num_threads(); ++thread) sum += load<Floats>(first + thread * own);
        return sum;
    }

    void finish(const Part& part) const {
        const int64_t out = part.layer.out, rank = part.layer.rank;
#pragma omp for schedule(static) nowait
        for (int64_t k = 0; k < out; k += LANES)
            for (int64_t r = 0; r < part.ranks; ++r) {
                const Floats sum = total(part.sums_B + (k + r) * LANES) * part.layer.scaling;
                for (int64_t i = 0; i < least(LANES, out - k); ++i) part.layer.grad_B[(k + i) * rank + part.first + r] = sum[i];
            }
#pragma omp for schedule(static) nowait
        for (int64_t k = 0; k < p.in; k += LANES)
            for (int64_t r = 0; r < part.ranks; ++r) {
                const Floats sum = total(part.sums_A + (k + r) * LANES);
                memcpy(part.layer.grad_A + (part.first + r) * p.in + k, &sum, 4 * least(LANES, p.in - k));
            }
    }
};

template <class T>
void run(const Gradients& p) {
    const Team<T> team{p, own_size(p)};
#pragma omp parallel num_threads(team_size(p))
    team.run();
}

}  // namespace

// Memory that adapter_gradients needs, in fp32 numbers; its `memory` begins at a multiple of 64 bytes.
extern "C" int64_t adapter_gradients_floats(const Gradients* p) { return team_size(*p) * own_size(*p); }

extern "C" void adapter_gradients(const Gradients* p) { p->bf16 ? run<uint16_t>(*p) : run<float>(*p); }
