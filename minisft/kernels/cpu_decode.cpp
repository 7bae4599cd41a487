// One token more for each of a few rows: the whole decoder in one call, x -> layers -> logits.
//
// The reference is CausalLM in minisft/model.py, in the same order: norm, q k v, their norms, RoPE, KV cache, attention, output; norm,
// gate and up, SwiGLU, down; final norm, head. Weights and cache are read as they are stored; everything is multiplied and summed in
// fp32, and only what enters the cache is rounded to its dtype. With R rows, D model, H heads, K kv heads, E head dim:
//
//     x (R, D)  qkv (R, (H + 2 K) E)  attended (R, H E)  gate, up (R, I)
//
// All threads walk through the layers together. A loop marked `omp for` shares its iterations among them; where the next step reads
// what other threads wrote there is a barrier. What is cheap (norms) each thread computes for itself instead of waiting for it.
// Python checks every size, dtype and layout before it calls: nothing is checked here.

#include "cpu_elementwise.h"
#include "cpu_products.h"
#include "cpu_tiles.h"

namespace {

enum Kind : int32_t { FP32, BF16, NF4, EIGHT_BIT, TWELVE_BIT, FOUR_BIT };  // FOUR_BIT: a Weight whose x is not split
// Rows, by kind, from which on tiles multiply. Fewer take less time by vectors, or in bf16 up to a fifth more (LOG.md, by the widths
// of SmolLM2-135M), and each has the bits that it has alone. There are no tiles for FP32 and FOUR_BIT.
constexpr int64_t MIN_TILED[] = {INT64_MAX, 6, 10, 10, 9, INT64_MAX};

struct EightBit {
    const int8_t* codes;
    const float* scales;
    int64_t block;
};

// y = x W^T + b + scaling * (x A^T) B^T. kernels/cpu_decode.py declares the same structs.
struct Linear {
    const void* weight;  // (out, in): numbers, a Weight, an EightBit or a TwelveBit
    const float* bias;   // (out,) or null
    const void *A, *B;   // (rank, in) and (out, rank), null where there is no adapter
    int64_t in, out, rank;
    float scaling;
    int32_t kind, factor_kind;  // of A and B: FP32 or BF16
};

struct Layer {
    Linear q, k, v, o, gate, up, down;
    const float *attention_norm, *q_norm, *k_norm, *mlp_norm;  // q_norm and k_norm are null where q and k have no norm
};

struct Step {
    const Layer* layers;
    const void* embedding;  // (vocabulary, D)
    const float* final_norm;
    const float *cos, *sin;  // (positions, E / 2)
    const int64_t *ids, *positions, *slots;  // (R,): token, its position, and the row's place in the cache
    void *keys, *values;  // (layers, slots, K, positions, E) with the strides below, in numbers
    float *shared, *own;  // memory for all threads, and own_size numbers for each
    float* logits;        // (R, out of the head)
    Linear head;
    int64_t num_layers, rows, D, H, K, E, I, max_rank, window, own_size;  // window: 0 for none
    int64_t layer_stride, slot_stride, head_stride, position_stride;
    float eps;
    int32_t embedding_kind, cache_kind, threads, use_tiles;
};

inline void store(float x, float* out) { *out = x; }
inline void store(float x, uint16_t* out) {
    uint16_t lanes[LANES];
    put(lanes, splat(x));
    *out = lanes[0];
}

// ---- one thread's way through the decoder -----------------------------------------------------------------------------------

struct Worker {
    const Step& s;
    float *x, *qkv, *attended, *gate, *up, *low;  // shared by all threads; low (R, 3 max_rank): x A^T of up to three adapters
    float *normed, *halves, *scratch;             // this thread's own: (R, max in) twice, and what attention needs
    uint16_t* packed;                             // and that input as tiles read it
    const Tiles config;

    explicit Worker(const Step& step) : s(step), config(step.use_tiles && step.rows >= MIN_TILED[BF16]) {
        const int64_t widest = s.I > s.H * s.E ? s.I : s.H * s.E, in = widest > s.D ? widest : s.D;
        float* at = s.shared;
        for (auto [place, size] : {Part{&x, s.D}, Part{&qkv, (s.H + 2 * s.K) * s.E}, Part{&attended, s.H * s.E},
                                   Part{&gate, s.I}, Part{&up, s.I}, Part{&low, 3 * s.max_rank}}) {
            *place = at;
            at += s.rows * size;
        }
        float* own = s.own + omp_get_thread_num() * s.own_size;
        packed = reinterpret_cast<uint16_t*>(own);
        normed = own + (s.use_tiles ? TILE_FLOATS * in : 0);
        halves = normed + s.rows * in;
        scratch = halves + s.rows * in;
    }

    struct Part {
        float** place;
        int64_t size;
    };

    // -- products --

    // Calls store(row, column, value) for this thread's share of the outputs; nobody waits for the others.
    template <class Matrix, class Store>
    void multiply(const Matrix& matrix, const float* in, int64_t out, const Added& added, Store store) {
#pragma omp for schedule(static) nowait
        for (int64_t column = 0; column < out; column += COLUMNS_AT_ONCE) {
            const int count = out - column < COLUMNS_AT_ONCE ? out - column : COLUMNS_AT_ONCE;
            outputs(matrix, in, s.rows, column, count, added, store);
        }
    }

    bool is_tiled(const Linear& l) const {
        const bool is_bf16 = l.kind == TWELVE_BIT && static_cast<const TwelveBit*>(l.weight)->whole;
        if (!s.use_tiles || s.rows < MIN_TILED[is_bf16 ? BF16 : l.kind]) return false;
        if (l.in % TILE_NUMBERS || l.out < TILE_OUTPUTS) return false;
        int64_t block = l.in;  // of one scale: whole ones in a row, whole tiles in a block
        if (l.kind == EIGHT_BIT) block = static_cast<const EightBit*>(l.weight)->block;
        if (l.kind == NF4) block = int64_t(1) << static_cast<const Weight*>(l.weight)->block_shift;
        return l.in % block == 0 && block % TILE_NUMBERS == 0;
    }

    // 32 outputs from `first` on.
    void outputs_by_tiles(const Linear& l, int64_t first, float* y) const {
        const int64_t at = first * l.in;
        if (l.kind == BF16) return tile_outputs(static_cast<const uint16_t*>(l.weight) + at, l.in, packed, y);
        if (l.kind == NF4) return tile_outputs(*static_cast<const Weight*>(l.weight), first, l.in, packed, y);
        if (l.kind == TWELVE_BIT) {
            const auto& w = *static_cast<const TwelveBit*>(l.weight);
            return w.whole ? tile_outputs(w.whole + at, l.in, packed, y) : tile_outputs(w, first, l.in, packed, y);
        }
        const auto& w = *static_cast<const EightBit*>(l.weight);
        tile_outputs(w.codes + at, w.scales + at / w.block, w.block, l.in, packed, y);
    }

    // The same by tiles, of what `packed` holds. The last outputs are computed with some before them, which are there already.
    template <class Store>
    void multiply_by_tiles(const Linear& l, const Added& added, Store store) {
#pragma omp for schedule(static) nowait
        for (int64_t column = 0; column < l.out; column += TILE_OUTPUTS) {
            const int64_t first = column + TILE_OUTPUTS <= l.out ? column : l.out - TILE_OUTPUTS;
            alignas(64) float y[TILE_OUTPUTS * TILE_ROWS];
            outputs_by_tiles(l, first, y);
            if (!added.B) {
                for (int64_t row = 0; row < s.rows; ++row)
                    for (int64_t j = column; j < first + TILE_OUTPUTS; ++j) store(row, j, y[(j - first) * TILE_ROWS + row]);
                continue;
            }
            const auto add = [&](int64_t row, int64_t j, float value) { store(row, j, value + y[(j - first) * TILE_ROWS + row]); };
            for (int64_t j = column; j < first + TILE_OUTPUTS; j += COLUMNS_AT_ONCE) {
                const int64_t rest = first + TILE_OUTPUTS - j;
                outputs(NoMatrix{}, nullptr, s.rows, j, rest < COLUMNS_AT_ONCE ? rest : COLUMNS_AT_ONCE, added, add);
            }
        }
    }

    template <class Store>
    void multiply(const Linear& l, const float* in, const float* down, Store store) {
        const Added added{l.A ? l.B : nullptr, down, l.rank, 1.0f, l.factor_kind == BF16};
        const int64_t out = l.out;
        if (is_tiled(l)) return multiply_by_tiles(l, added, store);
        if (l.kind == FP32) return multiply(DenseMatrix<float>{static_cast<const float*>(l.weight), l.in}, in, out, added, store);
        if (l.kind == BF16) return multiply(DenseMatrix<uint16_t>{static_cast<const uint16_t*>(l.weight), l.in}, in, out, added, store);
        if (l.kind == EIGHT_BIT) {
            const auto& w = *static_cast<const EightBit*>(l.weight);
            return multiply(EightBitMatrix{w.codes, w.scales, l.in, w.block}, in, out, added, store);
        }
        if (l.kind == TWELVE_BIT)
            return multiply(TwelveBitMatrix{*static_cast<const TwelveBit*>(l.weight), l.in}, in, out, added, store);
        multiply(PackedMatrix(*static_cast<const Weight*>(l.weight), l.in), l.kind == NF4 ? halves : in, out, added, store);
    }

    struct Output {
        const Linear& linear;
        float* y;
        int64_t stride;
    };

    // y = (or, with add, +=) the linears of one input (R, in).
    template <int COUNT>
    void linears(const float* in, const Output (&outputs)[COUNT], bool add = false) {
        bool adapted = false, quantized = false, tiled = false;
        for (int i = 0; i < COUNT; ++i) {
            const Linear& l = outputs[i].linear;
            tiled |= is_tiled(l);
            quantized |= l.kind == NF4 && !is_tiled(l);
            adapted |= l.A != nullptr;
            float* down = low + i * s.rows * s.max_rank;
            if (!l.A) continue;
            const auto store = [&](int64_t row, int64_t r, float value) { down[row * l.rank + r] = l.scaling * value; };
            if (l.factor_kind == BF16)
                multiply(DenseMatrix<uint16_t>{static_cast<const uint16_t*>(l.A), l.in}, in, l.rank, Added{}, store);
            else multiply(DenseMatrix<float>{static_cast<const float*>(l.A), l.in}, in, l.rank, Added{}, store);
        }
        if (tiled) pack(in, s.rows, outputs[0].linear.in, packed);
        if (quantized) split(in, s.rows * outputs[0].linear.in, halves);
        if (adapted) {
#pragma omp barrier
        }
        for (int i = 0; i < COUNT; ++i) {
            const auto& [l, y, stride] = outputs[i];
            const float* down = low + i * s.rows * s.max_rank;
            multiply(l, in, down, [&, y = y, stride = stride](int64_t row, int64_t j, float value) {
                if (l.bias) value += l.bias[j];
                float& place = y[row * stride + j];
                place = add ? place + value : value;
            });
        }
    }

    // (R, D) of every row, for this thread alone.
    void norm(const float* weight) {
        for (int64_t row = 0; row < s.rows; ++row) norm_row(x + row * s.D, weight, s.D, s.eps, normed + row * s.D);
    }

    // -- attention --

    // A head of q or k: its norm if there is one, and RoPE.
    void prepare(const float* head, const float* weight, int64_t position, float* out) {
        if (weight) norm_row(head, weight, s.E, s.eps, out);
        else memcpy(out, head, 4 * s.E);
        turn_row(out, s.cos + position * (s.E / 2), s.sin + position * (s.E / 2), s.E / 2, 1.0f, out);
    }

    // softmax(q k^T / sqrt(E)) v of one head of one row. The first head of each group writes the new key and value; the others of
    // the group compute their own copy, so that no head waits for another.
    template <class Number>
    void attend(const Layer& layer, int64_t index, int64_t row, int64_t head) {
        const int64_t E = s.E, kv = head / (s.H / s.K), position = s.positions[row];
        const int64_t at = index * s.layer_stride + s.slots[row] * s.slot_stride + kv * s.head_stride;
        Number *keys = static_cast<Number*>(s.keys) + at, *values = static_cast<Number*>(s.values) + at;
        const float* new_value = qkv + (row * (s.H + 2 * s.K) + s.H + s.K + kv) * E;
        float *q = scratch, *k = q + E, *scores = k + 3 * E;
        Number *key = reinterpret_cast<Number*>(k + E), *value = reinterpret_cast<Number*>(k + 2 * E);  // as the cache rounds them
        prepare(qkv + (row * (s.H + 2 * s.K) + head) * E, layer.q_norm, position, q);
        prepare(qkv + (row * (s.H + 2 * s.K) + s.H + kv) * E, layer.k_norm, position, k);
        for (int64_t e = 0; e < E; ++e) store(k[e], key + e), store(new_value[e], value + e);
        const int64_t first = s.window && position >= s.window ? position - s.window + 1 : 0, count = position - first + 1;
        keys += first * s.position_stride, values += first * s.position_stride;
        if (head % (s.H / s.K) == 0) {
            memcpy(keys + (count - 1) * s.position_stride, key, E * sizeof(Number));
            memcpy(values + (count - 1) * s.position_stride, value, E * sizeof(Number));
        }
        const float scale = 1.0f / __builtin_sqrtf(float(E));
        for (int64_t c = 0; c + 1 < count; ++c) scores[c] = scale * dot(q, keys + c * s.position_stride, E);
        scores[count - 1] = scale * dot(q, key, E);
        const float inverse = 1.0f / softmax(scores, count);
        weighted_sum(scores, values, value, count, inverse, attended + (row * s.H + head) * E);
    }

    // out = inverse * sum of scores[c] v[c]; the last v stands apart.
    template <class Number>
    void weighted_sum(const float* scores, const Number* values, const Number* last, int64_t count, float inverse, float* out) {
        int64_t e = 0;
        for (; e + LANES <= s.E; e += LANES) {
            Floats sums[4] = {};  // an addition need not wait for the one before
            int64_t c = 0;
            for (; c + 4 < count; c += 4)
                for (int i = 0; i < 4; ++i)
                    sums[i] = multiply_add(widened(values + (c + i) * s.position_stride + e), splat(scores[c + i]), sums[i]);
            for (; c + 1 < count; ++c)
                sums[0] = multiply_add(widened(values + c * s.position_stride + e), splat(scores[c]), sums[0]);
            sums[1] = multiply_add(widened(last + e), splat(scores[c]), sums[1]);
            put(out + e, ((sums[0] + sums[1]) + (sums[2] + sums[3])) * inverse);
        }
        for (; e < s.E; ++e) {
            float total = scores[count - 1] * number(last[e]);
            for (int64_t c = 0; c + 1 < count; ++c) total += scores[c] * number(values[c * s.position_stride + e]);
            out[e] = total * inverse;
        }
    }

    // -- the decoder --

    void embed() {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < s.rows; ++row)
            for (int64_t d = 0; d < s.D; ++d) {
                const int64_t at = s.ids[row] * s.D + d;
                x[row * s.D + d] = s.embedding_kind == FP32 ? number(static_cast<const float*>(s.embedding)[at])
                                                            : number(static_cast<const uint16_t*>(s.embedding)[at]);
            }
    }

    void attention(const Layer& layer, int64_t index) {
        const int64_t heads = s.H + 2 * s.K, stride = heads * s.E;
        norm(layer.attention_norm);
        linears(normed, {Output{layer.q, qkv, stride}, Output{layer.k, qkv + s.H * s.E, stride},
                         Output{layer.v, qkv + (s.H + s.K) * s.E, stride}});
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s.rows * s.H; ++task) {
            if (s.cache_kind == FP32) attend<float>(layer, index, task / s.H, task % s.H);
            else attend<uint16_t>(layer, index, task / s.H, task % s.H);
        }
        linears(attended, {Output{layer.o, x, s.D}}, true);
#pragma omp barrier
    }

    void mlp(const Layer& layer) {
        norm(layer.mlp_norm);
        linears(normed, {Output{layer.gate, gate, s.I}, Output{layer.up, up, s.I}});
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t column = 0; column < s.rows * s.I; column += COLUMNS_PER_TASK) {
            const int64_t rest = s.rows * s.I - column;
            gate_row(gate + column, up + column, rest < COLUMNS_PER_TASK ? rest : COLUMNS_PER_TASK, gate + column);
        }
        linears(gate, {Output{layer.down, x, s.D}}, true);
#pragma omp barrier
    }

    static constexpr int64_t COLUMNS_PER_TASK = 256;

    void run() {
        embed();
        for (int64_t index = 0; index < s.num_layers; ++index) {
            attention(s.layers[index], index);
            mlp(s.layers[index]);
        }
        norm(s.final_norm);
        linears(normed, {Output{s.head, s.logits, s.head.out}});
    }
};

}  // namespace

extern "C" void decode_step(const Step* step) {
#pragma omp parallel num_threads(step->threads)
    Worker(*step).run();
}

// How many numbers a vector holds.
extern "C" int64_t lanes() { return LANES; }

// Memory that tiles need of a thread's own, for each number of a row; 0 where there are none.
extern "C" int64_t tile_floats() { return tiles_allowed() ? TILE_FLOATS : 0; }
