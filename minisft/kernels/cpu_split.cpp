// y = x W^T or y = x W for many rows in fp32, by AMX, which multiplies bf16 about ten times as fast as vectors multiply fp32.
//
// An fp32 number is three numbers of bf16, x = x1 + x2 + x3 and W = W1 + W2 + W3, each about 2^-8 of the one before, and products
// of bf16 are exact in fp32, in which they are summed. Weights that are bf16 numbers, as those of a checkpoint in bf16 are, need
// three products, x1 W1 + x2 W1 + x3 W1; those of 16 bits, as fp16's and SmolLM2's file of 4 bits, x1 W2 + x2 W2 as well; all
// others also x1 W3. What is left out, x3 W2 + x2 W3 + x3 W3, is below 2^-22 |x| |W|, and its sign is random. Numbers below 2^-126
// count as zero, and so do products of parts that are. All weights of 32 columns are looked at while they are packed, each time.
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
    float* y;                 // (rows, columns); with onto the product is added to what it holds
    void* memory;
    int64_t rows, inner, columns;
    int32_t transposed, onto, threads;
};

#ifdef TILES

constexpr int64_t BLOCK = 2 * TILE_ROWS, PANEL = TILE_OUTPUTS;  // rows and columns of y that are computed at once
constexpr int64_t MAX_INNER = 576, MAX_X = 640 << 10;  // packed at once: of the inner size; numbers of x for each thread
constexpr int64_t MIN_BLOCKS = 8, MIN_TASKS = 4;       // for each thread
constexpr int64_t MAX_GROUPS = 64;                     // of blocks
constexpr int64_t SPARED = 4;                          // panels of a group that others leave to its own threads

// Packed numbers of 32 along the inner size: of a block, the three parts of 16 rows and those of the next; of a panel, each part.
constexpr int64_t BLOCK_SIZE = 2 * SPLITS * TILE_SIZE, PANEL_SIZE = 2 * TILE_SIZE;

inline int64_t evenly(int64_t size, int64_t most, int64_t unit) { return pieces(pieces(size, pieces(size, most)), unit) * unit; }

// How much is packed at once.
struct Cut {
    const int64_t inner, rows;

    explicit Cut(const Product& p)
        : inner(evenly(p.inner, MAX_INNER, TILE_NUMBERS)),
          rows(evenly(p.rows, p.threads * (MAX_X / (SPLITS * inner) / BLOCK * BLOCK), BLOCK)) {}

    int64_t x_size() const { return SPLITS * rows * inner; }
    int64_t panel_size() const { return SPLITS * PANEL * inner; }
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
inline void pack_rows(const float* weight, int64_t stride, uint16_t* out, __m512i& seen) {
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

// Calls visit(a, b, out): pairs of 32 numbers of 32 columns of W (inner, columns).
template <class Visit>
inline ALWAYS_INLINE void pairs_of_columns(const float* weight, int64_t stride, uint16_t* out, Visit visit) {
    for (int pair = 0; pair < TILE_ROWS; ++pair, weight += stride, out += TILE_NUMBERS)
        for (int tile = 0; tile < 2; ++tile) {
            const float* from = weight + tile * TILE_ROWS;
            visit(from, from + TILE_ROWS * stride, out + tile * TILE_SIZE);
        }
}

inline void pack_columns(const float* weight, int64_t stride, uint16_t* out, __m512i& seen) {
    pairs_of_columns(weight, stride, out, [&](const float* a, const float* b, uint16_t* to) ALWAYS_INLINE {
        _mm512_store_si512(to, weights_of(a, b, seen));
    });
}

// Pairs of numbers as some parts, `apart` from one another: each the upper half of what those before it leave; three lose nothing.
// Of weights all but the last one are rounded, or signs of what is left out would not be random; the last one needs none, and
// rounding could make a NaN zero. Returns its bits. split_numbers takes longer: it keeps neighbours beside each other, for weights
// that are read as they lie.
template <bool ROUND, int PARTS = SPLITS>
inline ALWAYS_INLINE __m512i split_pairs(__m512i a, __m512i b, int64_t apart, uint16_t* to) {
    const __m512i upper = _mm512_set1_epi32(0xffff0000), half = _mm512_set1_epi32(0x8000);
    __m512i last = {};
    each<PARTS>([&](int part) ALWAYS_INLINE {
        const bool is_last = part + 1 == PARTS, rounded = ROUND && !is_last;
        if (is_last) last = _mm512_or_si512(a, b);
        const __m512i first = rounded ? _mm512_add_epi32(a, half) : a, second = rounded ? _mm512_add_epi32(b, half) : b;
        _mm512_store_si512(to + part * apart, upper_halves(first, second));
        a = (__m512i)((__m512)a - (__m512)(first & upper));
        b = (__m512i)((__m512)b - (__m512)(second & upper));
    });
    return last;
}

// The same as pack_rows and pack_columns, in PARTS parts; `seen` collects the last ones.
template <int PARTS>
inline void split_rows(const float* weight, int64_t stride, uint16_t* out, __m512i& seen) {
    for (int tile = 0; tile < 2; ++tile, weight += TILE_ROWS * stride, out += TILE_SIZE) {
        __m512i halves[2][TILE_ROWS];
        for (int half = 0; half < 2; ++half) {
            for (int i = 0; i < TILE_ROWS; ++i) halves[half][i] = _mm512_loadu_si512(weight + i * stride + half * TILE_ROWS);
            transpose(halves[half]);
        }
        for (int pair = 0; pair < TILE_ROWS; ++pair)
            seen |= split_pairs<true, PARTS>(halves[0][pair], halves[1][pair], PANEL_SIZE, out + pair * TILE_NUMBERS);
    }
}

template <int PARTS>
inline void split_columns(const float* weight, int64_t stride, uint16_t* out, __m512i& seen) {
    pairs_of_columns(weight, stride, out, [&](const float* a, const float* b, uint16_t* to) ALWAYS_INLINE {
        seen |= split_pairs<true, PARTS>(_mm512_loadu_si512(a), _mm512_loadu_si512(b), PANEL_SIZE, to);
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
        for (int64_t row = 0; row < rows; ++row) {
            const float* const from = x + row * stride;
            uint16_t* const to = out + row / TILE_ROWS * SPLITS * TILE_SIZE + row % TILE_ROWS * TILE_NUMBERS;
            split_pairs<false>(_mm512_loadu_si512(from), _mm512_loadu_si512(from + TILE_ROWS), TILE_SIZE, to);
        }
    }
}

// y (16 or, with TWO, 32 rows; 32 columns) = or, with add, += x W by the first PARTS parts of W. Tiles 0 to 3 are sums, 4 and 5
// rows of x, 6 and 7 weights.
template <bool TWO, int PARTS>
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
    for (int64_t k = 0; k < inner; k += TILE_NUMBERS, x += BLOCK_SIZE, weight += PARTS * PANEL_SIZE) {
        const auto load_weights = [&](int part) ALWAYS_INLINE {
            _tile_loadd(6, weight + part * PANEL_SIZE, 64);
            _tile_loadd(7, weight + part * PANEL_SIZE + TILE_SIZE, 64);
        };
        const auto load_x = [&](int part) ALWAYS_INLINE {
            _tile_loadd(4, x + part * TILE_SIZE, 64);
            if constexpr (TWO) _tile_loadd(5, x + (SPLITS + part) * TILE_SIZE, 64);
        };
        const auto add_product = [&]() ALWAYS_INLINE {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if constexpr (TWO) {
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        };
        // In this order no weight, and no number of x, loses a bit where it is alone in its sum.
        load_weights(0);
        load_x(2), add_product();
        load_x(0), add_product();
        load_x(1), add_product();
        if constexpr (PARTS > 1) {
            load_weights(1), add_product();
            load_x(0), add_product();
        }
        if constexpr (PARTS > 2) load_weights(2), add_product();
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
template <int PARTS>
inline void multiply_rows(const uint16_t* x, const uint16_t* weight, int64_t inner, bool add, float* y, int64_t stride,
                          int64_t count) {
    if (count == BLOCK) return multiply<true, PARTS>(x, weight, inner, add, y, stride);
    alignas(64) float whole[BLOCK * PANEL];
    for (int64_t row = 0; add && row < count; ++row) memcpy(whole + row * PANEL, y + row * stride, 4 * PANEL);
    if (count > TILE_ROWS) multiply<true, PARTS>(x, weight, inner, add, whole, PANEL);
    else multiply<false, PARTS>(x, weight, inner, add, whole, PANEL);
    for (int64_t row = 0; row < count; ++row) memcpy(y + row * stride, whole + row * PANEL, 4 * PANEL);
}

// What all threads run together.
struct Team {
    const Product& p;
    const Cut cut;
    int64_t taken[MAX_GROUPS];  // how many panels of a group of blocks have somebody who multiplies them

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
    void multiply_panel(int64_t row, int64_t k, int64_t inner, int64_t column, int64_t from, int64_t to) const {
        uint16_t* const weight = static_cast<uint16_t*>(p.memory) + cut.x_size() + omp_get_thread_num() * cut.panel_size();
        const int parts = pack_panel(column, k, inner, weight);
        const auto multiply = parts == 1 ? multiply_rows<1> : parts == 2 ? multiply_rows<2> : multiply_rows<3>;
        for (int64_t block = from; block < to; ++block) {
            const int64_t first = row + block * BLOCK, rows = least(BLOCK, p.rows - first);
            float* const y = p.y + first * p.columns + column;
            ask_for<true>(y, p.columns, rows);  // where nothing is added, it comes while tiles multiply
            multiply(packed_block(block, inner), weight, inner, k > 0 || p.onto, y, p.columns, rows);
        }
    }

    // How many parts the weights have, one, two or three; `out` has no more.
    int pack_panel(int64_t column, int64_t k, int64_t inner, uint16_t* out) const {
        if (pack_parts<1>(column, k, inner, out)) return 1;
        if (pack_parts<2>(column, k, inner, out)) return 2;
        pack_parts<3>(column, k, inner, out);
        return 3;
    }

    // Whether so many parts are enough; if not, some weights are not packed.
    template <int PARTS>
    bool pack_parts(int64_t column, int64_t k, int64_t inner, uint16_t* out) const {
        const int64_t stride = p.transposed ? p.inner : p.columns, step = p.transposed ? TILE_NUMBERS : TILE_NUMBERS * stride;
        const float* from = p.weight + (p.transposed ? column * stride + k : k * stride + column);
        __m512i lost = {};
        for (int64_t end = inner / TILE_NUMBERS; end > 0; --end, from += step, out += PARTS * PANEL_SIZE) {
            ask_for<false>(from + step, stride, PANEL);
            if constexpr (PARTS == 1) p.transposed ? pack_rows(from, stride, out, lost) : pack_columns(from, stride, out, lost);
            else p.transposed ? split_rows<PARTS>(from, stride, out, lost) : split_columns<PARTS>(from, stride, out, lost);
            if (PARTS < SPLITS && _mm512_test_epi32_mask(lost, _mm512_set1_epi32(0xffff))) return false;
        }
        return true;
    }
};

// Whether the first weight of every row is a bf16 number: then most panels should take three products, and few rows are enough.
inline bool may_be_bf16(const Product& p) {
    const int64_t length = p.transposed ? p.inner : p.columns;
    uint32_t seen = 0;
    for (int64_t i = 0; i < p.inner * p.columns && !(seen & 0xffff); i += length) seen |= load<uint32_t>(p.weight + i);
    return (seen & 0xffff) == 0;
}

#endif

}  // namespace

// Memory for a product in bytes; 0 where vectors are faster: for fewer rows than min_rows if a look at some weights finds one that
// is no bf16 number.
extern "C" int64_t split_product_bytes(const Product* p, int64_t min_rows) {
#ifdef TILES
    if (p->rows < min_rows && !may_be_bf16(*p)) return 0;
    const Cut cut(*p);
    return 2 * (cut.x_size() + p->threads * cut.panel_size());
#else
    return 0;
#endif
}

// inner and columns are multiples of 32, memory begins at one of 64. There must be tiles.
extern "C" void split_product(const Product* p) {
#ifdef TILES
    Team team{*p, Cut(*p), {}};
#pragma omp parallel num_threads(p->threads)
    team.run();
#endif
}
