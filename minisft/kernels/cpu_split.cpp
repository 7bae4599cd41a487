// y = x W^T or y = x W for many rows of x and a W in fp32 that holds bf16 numbers, as a checkpoint in bf16 does, by AMX.
//
// Where the lower 16 bits of every weight are zero the upper ones are the weight. x is split without a remainder into three numbers
// of bf16, and three products of bf16 are summed in fp32: three times the work of one, and AMX does seven times as much of it as
// vectors do in fp32. The call that multiplies by the weights looks at all of them, and keeps nothing of them. Where one is no bf16
// number there is no result: then the BLAS multiplies.
//
//     for as many rows of x as fit into the cores' caches, for a part of the inner size: pack x, all threads together
//         for 32 columns of y: pack W, multiply
//
// A tile of x is 16 rows x 16 pairs along the inner size, one of W 16 such pairs x 16 columns. A pair is the numbers k and k + 16
// of each 32: two vectors become one without a permutation. A row of y has the same bits whatever rows there are beside it and
// however many threads.

#include "cpu_tiles.h"

namespace {

// kernels/cpu_split.py declares the same struct.
struct Product {
    const float *x, *weight;  // (rows, inner); (columns, inner) where it is transposed, else (inner, columns)
    float* y;                 // (rows, columns)
    void* memory;
    int64_t rows, inner, columns;
    int32_t transposed, threads;
};

#ifdef TILES

constexpr int64_t BLOCK = 2 * TILE_ROWS, PANEL = TILE_OUTPUTS;  // rows and columns of y that are computed at once
constexpr int64_t MAX_INNER = 576, MAX_X = 640 << 10;  // packed at once: of the inner size; numbers of x for each thread
constexpr int64_t MIN_BLOCKS = 8, MIN_TASKS = 4;       // for each thread
constexpr int64_t MAX_GROUPS = 64;                     // of blocks
constexpr int64_t SPARED = 4;                          // panels of a group that others leave to its own threads

// Packed numbers of 32 along the inner size: of a block, the three parts of 16 rows and those of the next; of a panel.
constexpr int64_t BLOCK_SIZE = 2 * SPLITS * TILE_SIZE, PANEL_SIZE = 2 * TILE_SIZE;

inline int64_t evenly(int64_t size, int64_t most, int64_t unit) { return pieces(pieces(size, pieces(size, most)), unit) * unit; }

// How much is packed at once.
struct Cut {
    const int64_t inner, rows;

    explicit Cut(const Product& p)
        : inner(evenly(p.inner, MAX_INNER, TILE_NUMBERS)),
          rows(evenly(p.rows, p.threads * (MAX_X / (SPLITS * inner) / BLOCK * BLOCK), BLOCK)) {}

    int64_t x_size() const { return SPLITS * rows * inner; }
    int64_t panel_size() const { return PANEL * inner; }
};

// The upper halves of 16 numbers each of two vectors, a's in the lower halves: no numbers change their lanes for it.
inline ALWAYS_INLINE __m512i upper_halves(__m512i a, __m512i b) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
}

// Those of weights; `seen` collects the bits that this loses.
inline ALWAYS_INLINE __m512i weights_of(const float* a, const float* b, __m512i& seen) {
    const __m512i first = _mm512_loadu_si512(a), second = _mm512_loadu_si512(b);
    seen = _mm512_or_si512(_mm512_or_si512(first, second), seen);
    return upper_halves(first, second);
}

// 32 numbers of 32 rows of W (columns, inner).
inline void pack_transposed(const float* weight, int64_t stride, uint16_t* out, __m512i& seen) {
    for (int tile = 0; tile < 2; ++tile) {
        __m512i lines[TILE_ROWS];
        for (int i = 0; i < TILE_ROWS; ++i) {
            const float* from = weight + (tile * TILE_ROWS + i) * stride;
            lines[i] = weights_of(from, from + TILE_ROWS, seen);
        }
        transpose(lines);
        memcpy(out + tile * TILE_SIZE, lines, sizeof lines);
    }
}

// 32 numbers of 32 columns of W (inner, columns).
inline void pack_straight(const float* weight, int64_t stride, uint16_t* out, __m512i& seen) {
    for (int pair = 0; pair < TILE_ROWS; ++pair, weight += stride)
        for (int tile = 0; tile < 2; ++tile) {
            const float* from = weight + tile * TILE_ROWS;
            const __m512i both = weights_of(from, from + TILE_ROWS * stride, seen);
            _mm512_store_si512(out + tile * TILE_SIZE + pair * TILE_NUMBERS, both);
        }
}

// 32 fp32 numbers as three parts, tiles apart: each the upper half of what those before it leave, so that nothing is rounded.
// split_numbers takes longer: it keeps neighbours beside each other, for weights that are read as they lie, and rounds, for
// products of which parts are left out.
inline ALWAYS_INLINE void split_in_pairs(const float* from, uint16_t* to) {
    const __m512i upper = _mm512_set1_epi32(0xffff0000);
    __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + TILE_ROWS);
    each<SPLITS>([&](int part) ALWAYS_INLINE {
        _mm512_store_si512(to + part * TILE_SIZE, upper_halves((__m512i)a, (__m512i)b));
        a -= (__m512)((__m512i)a & upper);
        b -= (__m512)((__m512i)b & upper);
    });
}

// Asks for the 32 numbers of each of some rows; TO_WRITE says what for.
template <bool TO_WRITE>
inline ALWAYS_INLINE void ask_for(const float* at, int64_t stride, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row, at += stride) {
        __builtin_prefetch(at, TO_WRITE);
        __builtin_prefetch(at + 16, TO_WRITE);
    }
}

// A block of x, of at most 32 rows; the packed one is written from front to back. What the others of a tile hold reaches no row
// but their own.
inline void pack_block(const float* x, int64_t stride, int64_t rows, int64_t inner, uint16_t* out) {
    for (int64_t k = 0; k < inner; k += TILE_NUMBERS, x += TILE_NUMBERS, out += BLOCK_SIZE) {
        ask_for<false>(x + 2 * TILE_NUMBERS, stride, rows);
        for (int64_t row = 0; row < rows; ++row)
            split_in_pairs(x + row * stride, out + row / TILE_ROWS * SPLITS * TILE_SIZE + row % TILE_ROWS * TILE_NUMBERS);
    }
}

// y (16 or, with TWO, 32 rows; 32 columns) = or, with add, += x W. Tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 weights.
template <bool TWO>
inline void multiply(const uint16_t* x, const uint16_t* weight, int64_t inner, bool add, float* y, int64_t stride) {
    float* const below = y + TILE_ROWS * stride;
    written();
    if (add) {
        _tile_loadd(0, y, 4 * stride);
        _tile_loadd(1, y + 16, 4 * stride);
        if constexpr (TWO) {
            _tile_loadd(2, below, 4 * stride);
            _tile_loadd(3, below + 16, 4 * stride);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < inner; k += TILE_NUMBERS, x += BLOCK_SIZE, weight += PANEL_SIZE) {
        _tile_loadd(6, weight, 64);
        _tile_loadd(7, weight + TILE_SIZE, 64);
        for (const uint16_t* part = x; part < x + SPLITS * TILE_SIZE; part += TILE_SIZE) {
            _tile_loadd(4, part, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if constexpr (TWO) {
                _tile_loadd(5, part + SPLITS * TILE_SIZE, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, y, 4 * stride);
    _tile_stored(1, y + 16, 4 * stride);
    if constexpr (TWO) {
        _tile_stored(2, below, 4 * stride);
        _tile_stored(3, below + 16, 4 * stride);
    }
    written();
}

// The same for `count` rows, at most 32.
inline void multiply_rows(const uint16_t* x, const uint16_t* weight, int64_t inner, bool add, float* y, int64_t stride,
                          int64_t count) {
    if (count == BLOCK) return multiply<true>(x, weight, inner, add, y, stride);
    alignas(64) float whole[BLOCK * PANEL];
    for (int64_t row = 0; add && row < count; ++row) memcpy(whole + row * PANEL, y + row * stride, 4 * PANEL);
    if (count > TILE_ROWS) multiply<true>(x, weight, inner, add, whole, PANEL);
    else multiply<false>(x, weight, inner, add, whole, PANEL);
    for (int64_t row = 0; row < count; ++row) memcpy(y + row * stride, whole + row * PANEL, 4 * PANEL);
}

// What all threads run together.
struct Team {
    const Product& p;
    const Cut cut;
    int64_t taken[MAX_GROUPS] = {};  // how many panels of a group of blocks have somebody who multiplies them
    int32_t lost = 0;                // a weight is no bf16 number

    void run() {
        const Tiles config(true);
        for (int64_t row = 0; row < p.rows; row += cut.rows)
            for (int64_t k = 0; k < p.inner; k += cut.inner) {
                const int64_t blocks = pieces(least(cut.rows, p.rows - row), BLOCK), inner = least(cut.inner, p.inner - k);
                for (int64_t i = omp_get_thread_num(); i < MAX_GROUPS; i += omp_get_num_threads()) taken[i] = 0;
#pragma omp for schedule(static)
                for (int64_t block = 0; block < blocks; ++block) {
                    const int64_t first = row + block * BLOCK, rows = least(BLOCK, p.rows - first);
                    pack_block(p.x + first * p.inner + k, p.inner, rows, inner, packed_block(block, inner));
                }
                multiply_all(row, k, blocks, inner);
#pragma omp barrier  // until now x is in use
            }
    }

    uint16_t* packed_block(int64_t block, int64_t inner) const {
        return static_cast<uint16_t*>(p.memory) + block * BLOCK * SPLITS * inner;
    }

    // With many blocks each thread has a group of its own, and they stay in its core's cache; then every thread packs all of W,
    // which takes little beside the multiplying. With few all share them and have panels of their own. Who is done helps others
    // that are far behind: at times one core's AMX has half of the other's speed. x comes from their cache, so the last panels
    // are done sooner by themselves.
    void multiply_all(int64_t row, int64_t k, int64_t blocks, int64_t inner) {
        const int64_t panels = p.columns / PANEL, threads = omp_get_num_threads(), self = omp_get_thread_num();
        const int64_t enough = blocks >= MIN_BLOCKS * threads ? threads : least(blocks, pieces(MIN_TASKS * threads, panels));
        const int64_t groups = least(enough, MAX_GROUPS);
        const auto multiply = [&](int64_t group, int64_t spared) {
            for (int64_t panel; (panel = next_panel(group, panels - spared)) < panels;)
                multiply_panel(row, k, inner, panel * PANEL, blocks * group / groups, blocks * (group + 1) / groups);
        };
        for (int64_t group = self % groups; group < groups; group += threads) multiply(group, 0);
        for (int64_t i = 1; i < groups; ++i) multiply((self + i) % groups, SPARED);
    }

    // One of a group that nobody has; beyond the last one if so many are taken.
    int64_t next_panel(int64_t group, int64_t most) {
        int64_t panel;
#pragma omp atomic read
        panel = taken[group];
        if (panel >= most) return INT64_MAX;
#pragma omp atomic capture
        panel = taken[group]++;
        return panel;
    }

    // 32 columns of the rows of blocks [from, to).
    void multiply_panel(int64_t row, int64_t k, int64_t inner, int64_t column, int64_t from, int64_t to) {
        uint16_t* const weight = static_cast<uint16_t*>(p.memory) + cut.x_size() + omp_get_thread_num() * cut.panel_size();
        if (!pack_panel(column, k, inner, weight)) return;
        for (int64_t block = from; block < to; ++block) {
            const int64_t first = row + block * BLOCK, rows = least(BLOCK, p.rows - first);
            float* const y = p.y + first * p.columns + column;
            ask_for<true>(y, p.columns, rows);  // where nothing is added, it comes while tiles multiply
            multiply_rows(packed_block(block, inner), weight, inner, k > 0, y, p.columns, rows);
        }
    }

    // False if a weight is no bf16 number, here or where another thread has looked.
    bool pack_panel(int64_t column, int64_t k, int64_t inner, uint16_t* out) {
        int32_t stop;
#pragma omp atomic read
        stop = lost;
        if (stop) return false;
        __m512i seen = {};
        for (int64_t i = k; i < k + inner; i += TILE_NUMBERS, out += PANEL_SIZE) {
            if (p.transposed) pack_transposed(p.weight + column * p.inner + i, p.inner, out, seen);
            else pack_straight(p.weight + i * p.columns + column, p.columns, out, seen);
        }
        if (!_mm512_test_epi32_mask(seen, _mm512_set1_epi32(0xffff))) return true;
#pragma omp atomic write
        lost = 1;
        return false;
    }
};

// Whether the first weight of every row is a bf16 number: a table of which training changed a few rows need not be packed to know.
inline bool may_be_bf16(const Product& p) {
    const int64_t length = p.transposed ? p.inner : p.columns;
    uint32_t seen = 0;
    for (int64_t i = 0; i < p.inner * p.columns && !(seen & 0xffff); i += length) seen |= load<uint32_t>(p.weight + i);
    return (seen & 0xffff) == 0;
}

#endif

}  // namespace

// Memory for a product in bytes; 0 where a look at some weights finds one that is no bf16 number.
extern "C" int64_t split_product_bytes(const Product* p) {
#ifdef TILES
    if (!may_be_bf16(*p)) return 0;
    const Cut cut(*p);
    return 2 * (cut.x_size() + p->threads * cut.panel_size());
#else
    return 0;
#endif
}

// Whether it was computed: not if a weight is no bf16 number. inner and columns are multiples of 32, memory begins at one of 64.
extern "C" int32_t split_product(const Product* p) {
#ifdef TILES
    Team team{*p, Cut(*p)};
#pragma omp parallel num_threads(p->threads)
    team.run();
    return !team.lost;
#else
    return 0;
#endif
}
