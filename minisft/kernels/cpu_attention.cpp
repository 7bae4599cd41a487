// Causal attention within segments of a batch, forward and backward: softmax(q k^T / sqrt(E)) v.
//
// The reference is minisft/attention.py in PyTorch's operators. Segments lie where they lie: nothing is padded, moved to a grid or
// repeated for the query heads that share a key, and what the mask hides is hardly multiplied. One thread computes a kv head of a
// segment with all its query heads, some queries at a time against all their keys; so the order of a sum depends on neither the
// number of threads nor the other segments, but for the gradient of a prefix. Numbers are fp32 or bf16; everything is multiplied and
// summed in fp32, and rounded where it is stored. Python checks every size, dtype and layout before it calls: nothing is checked here.

#include "cpu_elementwise.h"

namespace {

constexpr int TALL = 6, WIDE = LANES == 16 ? 4 : 2;  // rows, and vectors of each, whose sums stay in registers
constexpr int64_t QUERIES = 24;                      // that are worked on together

inline int64_t rounded_up(int64_t size) { return (size + 15) / 16 * 16; }

// ---- products of small matrices ----------------------------------------------------------------------------------------------

// A matrix of fp32 numbers, element (i, k) at i * across + k * along.
struct View {
    const float* at;
    int64_t across, along;
};

// c (ROWS, VECTORS * LANES) = a b, or += with add; rows of b and of c lie ldb and ldc apart.
template <int ROWS, int VECTORS>
inline void tile(View a, int64_t inner, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
    Floats sums[ROWS * VECTORS] = {};
    const auto place = [&](int i) ALWAYS_INLINE { return c + i / VECTORS * ldc + i % VECTORS * LANES; };
    if (add) each<ROWS * VECTORS>([&](int i) ALWAYS_INLINE { sums[i] = load<Floats>(place(i)); });
    for (int64_t k = 0; k < inner; ++k) {
        Floats row[VECTORS];
        each<VECTORS>([&](int v) ALWAYS_INLINE { row[v] = load<Floats>(b + k * ldb + v * LANES); });
        each<ROWS>([&](int i) ALWAYS_INLINE {
            const Floats number = splat(a.at[i * a.across + k * a.along]);
            each<VECTORS>([&](int v) ALWAYS_INLINE {
                sums[i * VECTORS + v] = multiply_add(number, row[v], sums[i * VECTORS + v]);
            });
        });
    }
    each<ROWS * VECTORS>([&](int i) ALWAYS_INLINE { put(place(i), sums[i]); });
}

template <int VECTORS, int ROWS = TALL>
inline void rows_left(View a, int64_t rows, int64_t inner, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return rows_left<VECTORS, ROWS - 1>(a, rows, inner, b, ldb, c, ldc, add);
    tile<ROWS, VECTORS>(a, inner, b, ldb, c, ldc, add);
}

template <int VECTORS = WIDE>
inline void columns_left(View a, int64_t rows, int64_t inner, const float* b, int64_t ldb, int64_t columns, float* c, int64_t ldc,
                         bool add) {
    if constexpr (VECTORS > 1)
        if (columns < VECTORS * LANES) return columns_left<VECTORS - 1>(a, rows, inner, b, ldb, columns, c, ldc, add);
    for (int64_t i = 0; i < rows; i += TALL)
        rows_left<VECTORS>({a.at + i * a.across, a.across, a.along}, rows - i, inner, b, ldb, c + i * ldc, ldc, add);
}

// c (rows, columns) = a b, or += with add; columns is a multiple of LANES.
__attribute__((noinline)) void multiply(View a, int64_t rows, int64_t inner, const float* b, int64_t ldb, int64_t columns, float* c,
                                        int64_t ldc, bool add = false) {
    for (int64_t j = 0; j < columns; j += WIDE * LANES) columns_left(a, rows, inner, b + j, ldb, columns - j, c + j, ldc, add);
}

// to (16, 16) = x (16, 16) transposed.
inline void transpose_16(const float* x, int64_t stride, float* to, int64_t to_stride) {
#if LANES == 16 && !defined(NF4_PORTABLE)
    __m512i lines[16];
    for (int64_t i = 0; i < 16; ++i) lines[i] = _mm512_loadu_si512(x + i * stride);
    transpose(lines);
    for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, lines[i]);
#else
    for (int64_t i = 0; i < 16; ++i)
        for (int64_t j = 0; j < 16; ++j) to[i * to_stride + j] = x[j * stride + i];
#endif
}

// ---- a kv head of a segment -------------------------------------------------------------------------------------------------

// The keys of a segment are those of the past, of its prefix and its own, in this order. cpu_attention.py declares the same struct.
struct Attention {
    const void *q, *k, *v;                  // (N, H, E), (N, K, E), (N, K, E)
    const void *past_k, *past_v;            // (past, K, E), before all segments
    const void* grad;                       // (N, H, E), for backward
    void *out, *grad_q, *grad_k, *grad_v;   // out, or the gradients, shaped as what they belong to; only segments are written
    const int64_t *first, *length, *owner;  // (S,): first token, number of tokens (1 at least), which prefix is before it, or -1
    float* memory;                          // attention_memory() numbers
    int64_t S, H, K, E, past, prefixes, prefix_length;  // the last segments are the prefixes
    int64_t window, longest;                            // how many keys a query sees, 0 for all; the keys of the longest segment
    int32_t threads;
};

// A thread's own memory.
struct Memory {
    int64_t padded, keys;  // E, and space for the keys of a segment: whole vectors may be read from any key on
    float *kt, *vt, *k, *v, *q, *grad, *p, *dp, *result, *grad_k, *grad_v;
    float* prefix_grad;  // (2, prefixes, K, prefix_length, padded): keys, then values
    int64_t size;        // of all of it

    // Without a place it only says how large it is.
    Memory(const Attention& a, float* at) : padded(rounded_up(a.E)), keys(rounded_up(a.longest) + 16) {
        size = 0;
        for (auto [place, count] : {Part{&kt, padded * keys}, Part{&vt, padded * keys}, Part{&k, keys * padded},
                                    Part{&v, keys * padded}, Part{&q, QUERIES * padded}, Part{&grad, QUERIES * padded},
                                    Part{&p, QUERIES * keys}, Part{&dp, QUERIES * keys}, Part{&result, QUERIES * padded},
                                    Part{&grad_k, keys * padded}, Part{&grad_v, keys * padded},
                                    Part{&prefix_grad, a.grad ? 2 * prefix_size(a) : 0}}) {
            *place = at ? at + size : nullptr;
            size += count;
        }
    }

    struct Part {
        float** place;
        int64_t count;
    };

    int64_t prefix_size(const Attention& a) const { return a.prefixes * a.K * a.prefix_length * padded; }
    int64_t prefix_at(const Attention& a, int64_t prefix, int64_t kv) const {
        return (prefix * a.K + kv) * a.prefix_length * padded;
    }
};

template <class T>
struct Head {
    const Attention& a;
    const Memory& m;
    int64_t first, length, owner, prefix, kv, before;  // prefix: which one it is or continues, or -1; before: past and prefix
    float scale;

    Head(const Attention& a, const Memory& m, int64_t segment, int64_t kv)
        : a(a), m(m), first(a.first[segment]), length(a.length[segment]), owner(a.owner[segment]),
          prefix(segment < a.S - a.prefixes ? owner : segment - (a.S - a.prefixes)), kv(kv),
          before(a.past + (owner < 0 ? 0 : a.prefix_length)), scale(1.0f / __builtin_sqrtf(float(a.E))) {}

    // to (count, padded) = factor times a head of some tokens of x (tokens, heads, E), zeros beyond E.
    void take(const void* x, int64_t heads, int64_t token, int64_t count, int64_t head, float factor, float* to) const {
        const T* from = static_cast<const T*>(x) + (token * heads + head) * a.E;
        for (int64_t i = 0; i < count; ++i, to += m.padded, from += heads * a.E) {
            for (int64_t e = a.E / 16 * 16; e < m.padded; ++e) to[e] = 0.0f;
            vectors(a.E, [&](int64_t e, auto lanes) { lanes.store(to + e, lanes.load(from + e) * factor); });
        }
    }

    void give(const float* from, float factor, void* x, int64_t heads, int64_t token, int64_t count, int64_t head) const {
        T* to = static_cast<T*>(x) + (token * heads + head) * a.E;
        for (int64_t i = 0; i < count; ++i, from += m.padded, to += heads * a.E)
            vectors(a.E, [&](int64_t e, auto lanes) { lanes.store(to + e, lanes.load(from + e) * factor); });
    }

    // Asks for a head of some tokens of x; TO_WRITE says what for.
    template <bool TO_WRITE>
    void ask_for(const void* x, int64_t token, int64_t count, int64_t head) const {
        const T* from = static_cast<const T*>(x) + (token * a.H + head) * a.E;
        for (int64_t i = 0; i < count; ++i, from += a.H * a.E)
            for (int64_t e = 0; e < a.E; e += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + e, TO_WRITE);
    }

    // to (before + length, padded): all keys, or all values.
    void take_keys(const void* past, const void* x, float* to) const {
        if (a.past) take(past, a.K, 0, a.past, kv, 1.0f, to);
        if (owner >= 0) take(x, a.K, a.first[a.S - a.prefixes + owner], a.prefix_length, kv, 1.0f, to + a.past * m.padded);
        take(x, a.K, first, length, kv, 1.0f, to + before * m.padded);
    }

    // xt (E, keys) = x (before + length, padded) transposed. Garbage stands to the right: it reaches only scores that nobody reads.
    void turn(const float* x, float* xt) const {
        for (int64_t e = 0; e < a.E; e += 16)
            for (int64_t i = 0; i < before + length; i += 16)
                transpose_16(x + i * m.padded + e, m.padded, xt + e * m.keys + i, m.keys);
    }

    // Some queries of a head, and the keys that any of them sees.
    struct Block {
        int64_t query, count, key, keys, width, left;  // width: keys in whole vectors; left: queries of the next block
    };

    // The first key that a query sees; the last one is before + query.
    int64_t first_key(int64_t query) const { return a.window && before + query >= a.window ? before + query - a.window + 1 : 0; }

    template <class Each>
    void blocks(Each each) const {
        for (int64_t query = 0; query < length; query += QUERIES) {
            const int64_t count = least(QUERIES, length - query), key = first_key(query), keys = before + query + count - key;
            each(Block{query, count, key, keys, (keys + LANES - 1) / LANES * LANES, least(QUERIES, length - query - count)});
        }
    }

    // p (count, keys) = the weights of a block, from q, which holds its queries over sqrt(E).
    void weights(const Block& b) const {
        multiply({m.q, m.padded, 1}, b.count, a.E, m.kt + b.key, m.keys, b.width, m.p, m.keys);
        for (int64_t i = 0; i < b.count; ++i) {
            float* scores = m.p + i * m.keys;
            const int64_t begin = first_key(b.query + i) - b.key, end = before + b.query + i + 1 - b.key;
            for (int64_t key = 0; key < begin; ++key) scores[key] = 0.0f;
            const float inverse = 1.0f / softmax(scores + begin, end - begin);
            vectors(end - begin, [&](int64_t k, auto lanes) {
                lanes.store(scores + begin + k, lanes.load(scores + begin + k) * inverse);
            });
            for (int64_t key = end; key < b.keys; ++key) scores[key] = 0.0f;
        }
    }

    template <class Each>
    void heads(Each each) const {
        for (int64_t head = kv * (a.H / a.K); head < (kv + 1) * (a.H / a.K); ++head) each(head);
    }

    void forward() const {
        take_keys(a.past_k, a.k, m.k);
        take_keys(a.past_v, a.v, m.v);
        turn(m.k, m.kt);
        heads([&](int64_t head) {
            blocks([&](const Block& b) {
                take(a.q, a.H, first + b.query, b.count, head, scale, m.q);
                ask_for<true>(a.out, first + b.query, b.count, head);
                ask_for<false>(a.q, first + b.query + b.count, b.left, head);
                weights(b);
                multiply({m.p, m.keys, 1}, b.count, b.keys, m.v + b.key * m.padded, m.padded, m.padded, m.result, m.padded);
                give(m.result, 1.0f, a.out, a.H, first + b.query, b.count, head);
            });
        });
    }

    // With P the weights and G = grad: dV = P^T G, dP = G V^T, dS = P (dP - rowsum(P dP)); dQ = dS K and dK = dS^T Q, over sqrt(E).
    void backward() const {
        take_keys(a.past_k, a.k, m.k);
        take_keys(a.past_v, a.v, m.v);
        turn(m.k, m.kt);
        turn(m.v, m.vt);
        memset(m.grad_k, 0, 4 * (before + length) * m.padded);
        memset(m.grad_v, 0, 4 * (before + length) * m.padded);
        heads([&](int64_t head) {
            blocks([&](const Block& b) {
                take(a.q, a.H, first + b.query, b.count, head, scale, m.q);
                take(a.grad, a.H, first + b.query, b.count, head, 1.0f, m.grad);
                ask_for<true>(a.grad_q, first + b.query, b.count, head);
                for (const void* x : {a.q, a.grad}) ask_for<false>(x, first + b.query + b.count, b.left, head);
                weights(b);
                const int64_t key = b.key * m.padded;
                multiply({m.p, 1, m.keys}, b.keys, b.count, m.grad, m.padded, m.padded, m.grad_v + key, m.padded, true);
                multiply({m.grad, m.padded, 1}, b.count, a.E, m.vt + b.key, m.keys, b.width, m.dp, m.keys);
                for (int64_t i = 0; i < b.count; ++i) scores_gradient(m.p + i * m.keys, m.dp + i * m.keys, b.keys);
                multiply({m.dp, m.keys, 1}, b.count, b.keys, m.k + key, m.padded, m.padded, m.result, m.padded);
                give(m.result, scale, a.grad_q, a.H, first + b.query, b.count, head);
                multiply({m.dp, 1, m.keys}, b.keys, b.count, m.q, m.padded, m.padded, m.grad_k + key, m.padded, true);
            });
        });
        give_keys(m.grad_k, a.grad_k, m.prefix_grad);
        give_keys(m.grad_v, a.grad_v, m.prefix_grad + m.prefix_size(a));
    }

    // The gradient of all keys, or of all values. That of a prefix is a sum over segments: first within each thread.
    void give_keys(const float* grad, void* out, float* sums) const {
        if (prefix >= 0) {
            const float* from = grad + a.past * m.padded;
            float* to = sums + m.prefix_at(a, prefix, kv);
            for (int64_t i = 0; i < a.prefix_length * m.padded; ++i) to[i] += from[i];
        }
        if (prefix < 0 || owner >= 0) give(grad + before * m.padded, 1.0f, out, a.K, first, length, kv);
    }

    static void scores_gradient(const float* p, float* dp, int64_t count) {
        Floats products = {};
        vectors(count, [&](int64_t k, auto lanes) { products = multiply_add(lanes.load(p + k), lanes.load(dp + k), products); });
        const float mean = sum(products);
        vectors(count, [&](int64_t k, auto lanes) { lanes.store(dp + k, lanes.load(p + k) * (lanes.load(dp + k) - mean)); });
    }
};

template <class T>
void attend(const Attention& a) {
    int64_t team = 1;
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp single
        team = omp_get_num_threads();
        const Memory memory(a, a.memory + omp_get_thread_num() * Memory(a, a.memory).size);
        if (a.grad) memset(memory.prefix_grad, 0, 4 * 2 * memory.prefix_size(a));
        const auto compute = [&](int64_t task) {
            const Head<T> head(a, memory, task / a.K, task % a.K);
            if (a.grad) head.backward();
            else head.forward();
        };
        if (a.grad && a.prefixes) {  // whose sums are each thread's own: who computes what must not change from run to run
#pragma omp for schedule(static, 1)
            for (int64_t task = 0; task < a.S * a.K; ++task) compute(task);
        } else {
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < a.S * a.K; ++task) compute(task);
        }
        if (a.grad && a.prefixes) {
#pragma omp for schedule(static)
            for (int64_t task = 0; task < a.prefixes * a.K; ++task) {
                const Memory first(a, a.memory);
                const Head<T> head(a, first, a.S - a.prefixes + task / a.K, task % a.K);
                float* const at = first.prefix_grad + first.prefix_at(a, task / a.K, task % a.K);
                for (void* out : {a.grad_k, a.grad_v}) {
                    float* const sums = at + (out == a.grad_k ? 0 : first.prefix_size(a));
                    for (int64_t thread = 1; thread < team; ++thread)
                        for (int64_t i = 0; i < a.prefix_length * first.padded; ++i) sums[i] += sums[thread * first.size + i];
                    head.give(sums, 1.0f, out, a.K, head.first, head.length, head.kv);
                }
            }
        }
    }
}

}  // namespace

extern "C" {
int64_t attention_memory(const Attention* a) { return Memory(*a, nullptr).size * a->threads; }
void attention_fp32(const Attention* a) { attend<float>(*a); }
void attention_bf16(const Attention* a) { attend<uint16_t>(*a); }
}
