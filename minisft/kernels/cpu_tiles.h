// y = x W^T for up to 16 rows of x, by AMX: 32 outputs of all rows at once. cpu_split.cpp has its own way for more rows.
//
// A tile register holds 16 rows of 64 bytes. Tiles of a W in bf16 are read as they lie, 16 outputs and 32 numbers of each; for
// one in 12 bits they are made, and for one in 4 or 8, where a block's sum is multiplied by its scale as well. x is fp32 and is
// split without a remainder into three numbers of bf16, x = high + middle + low (8 bits each), and so are the levels of 4 bits,
// so nothing is lost that fp32 would keep; the order of sums is another than DenseMatrix's. Numbers below 2^-126 count as zero,
// parts of x among them, and infinities become NaN. For so few rows splitting a W in fp32 as well takes longer than multiplying it by vectors.
// Linux lets only a process that asked use these registers (arch_prctl).
//
// Ref: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS, LDTILECFG.

#pragma once
#include "cpu_lanes.h"
#include "cpu_twelve_bit.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && LANES == 16 && !defined(NF4_PORTABLE)
#define TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t TILE_ROWS = 16, TILE_OUTPUTS = 32, TILE_NUMBERS = 32, SPLITS = 3;
constexpr int64_t TILE_SIZE = TILE_ROWS * TILE_NUMBERS;  // numbers of bf16; of fp32 half as many
constexpr int64_t TILE_AHEAD = 256;                      // bytes of a row before a weight is read it is asked for
constexpr int64_t TILE_FLOATS = SPLITS * TILE_ROWS / 2;  // memory of packed x, in floats for each number of a row

#ifdef TILES

// Asks for them, once for the process and all its threads.
inline bool tiles_allowed() {
    constexpr long REQUEST = 0x1023, DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, DATA) == 0;
}

// What was stored must be in memory before tiles are loaded: GCC does not know that _tile_loadd reads.
inline void written() { asm volatile("" : : : "memory"); }

// All eight tiles are 16 x 64 bytes as long as it lives. Calls may change tiles and their configuration, so nobody has any to save.
class Tiles {
    const bool used;

   public:
    explicit Tiles(bool wanted) : used(wanted) {
        if (!used) return;
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // of a row
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        // Not by _tile_loadconfig: GCC 12 takes it to read eight bytes and leaves the others out.
        asm volatile("ldtilecfg %0" : : "m"(config));
    }
    ~Tiles() {
        if (used) asm volatile("tilerelease");
    }
};

// 32 fp32 numbers as three parts of bf16, `apart` from one another.
inline ALWAYS_INLINE void split_numbers(const float* from, int64_t apart, void* to) {
    __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
    each<SPLITS>([&](int part) ALWAYS_INLINE {
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
        _mm512_storeu_si512(static_cast<char*>(to) + part * apart, both);
        a -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16);
        b -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16);
    });
}

// x (rows, in) for tiles: for each 32 numbers the three parts, each 16 pairs of numbers x 16 rows; missing rows are zero.
inline void pack(const float* x, int64_t rows, int64_t in, uint16_t* out) {
    for (int64_t k = 0; k < in; k += TILE_NUMBERS, out += SPLITS * TILE_SIZE) {
        __m512i parts[SPLITS][TILE_ROWS] = {};
        for (int64_t row = 0; row < rows; ++row) split_numbers(x + row * in + k, sizeof parts[0], &parts[0][row]);
        for (int part = 0; part < SPLITS; ++part) {
            transpose(parts[part]);
            memcpy(out + part * TILE_SIZE, parts[part], sizeof parts[part]);
        }
    }
}

// How many bytes further on stands what is asked for when a byte of a row is read: later in the row, or where the row 32 outputs
// on begins.
inline int64_t tile_ahead(int64_t byte, int64_t row_bytes) {
    return TILE_AHEAD + (byte + TILE_AHEAD < row_bytes ? 0 : (TILE_OUTPUTS - 1) * row_bytes);
}

// Tiles 0 and 1 are sums of 2 x 16 outputs, 2 and 3 their weights, 4 to 6 the parts of x.
inline ALWAYS_INLINE void load_parts(const uint16_t* packed) {
    written();
    _tile_loadd(4, packed, 64);
    _tile_loadd(5, packed + TILE_SIZE, 64);
    _tile_loadd(6, packed + 2 * TILE_SIZE, 64);
}

// With the first PARTS parts of x.
template <int PARTS>
inline ALWAYS_INLINE void multiply_parts() {
    _tile_dpbf16ps(0, 2, 4);
    _tile_dpbf16ps(1, 3, 4);
    if constexpr (PARTS > 1) {
        _tile_dpbf16ps(0, 2, 5);
        _tile_dpbf16ps(1, 3, 5);
    }
    if constexpr (PARTS > 2) {
        _tile_dpbf16ps(0, 2, 6);
        _tile_dpbf16ps(1, 3, 6);
    }
}

inline ALWAYS_INLINE void store_sums(float* y) {
    _tile_stored(0, y, 64);
    _tile_stored(1, y + TILE_SIZE / 2, 64);
}

// y (32, 16): 32 outputs of packed rows, from a weight (32, in) in bf16 on.
inline void tile_outputs(const uint16_t* weight, int64_t in, const uint16_t* packed, float* y) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < in; k += TILE_NUMBERS, packed += SPLITS * TILE_SIZE) {
        const char* next = reinterpret_cast<const char*>(weight + k) + tile_ahead(2 * k, 2 * in);
        for (int64_t i = 0; i < TILE_OUTPUTS; ++i) __builtin_prefetch(next + 2 * i * in);
        load_parts(packed);
        _tile_loadd(2, weight + k, 2 * in);
        _tile_loadd(3, weight + 16 * in + k, 2 * in);
        multiply_parts<3>();
    }
    store_sums(y);
}

// The same from the row `first` of a weight in 12 bits on: tiles are made of the numbers in their order, so sums keep their bits.
inline void tile_outputs(const TwelveBit& weight, int64_t first, int64_t in, const uint16_t* packed, float* y) {
    alignas(64) uint16_t made[2][2][2][TILE_SIZE];  // by turns, by halves of a block, and 16 outputs each
    alignas(64) uint16_t order[TILE_NUMBERS];
    for (int64_t i = 0; i < TILE_NUMBERS; ++i) order[i] = i % 16 * 2 + i / 16;
    const __m512i in_order = _mm512_load_si512(order);
    TwelveBitRow rows[TILE_OUTPUTS];
    for (int64_t i = 0; i < TILE_OUTPUTS; ++i) rows[i] = TwelveBitRow(weight, first + i, in);
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t block = 0; block < in / BLOCK_NUMBERS; ++block) {
        auto& tiles = made[block % 2];
        const int64_t ahead = tile_ahead(block * BLOCK_BYTES, in / BLOCK_NUMBERS * BLOCK_BYTES);
        for (int64_t i = 0; i < TILE_OUTPUTS; ++i) {
            TwelveBitRow& row = rows[i];
            const uint8_t* bytes = row.bytes(block);
            prefetch_block(bytes + ahead);
            const Unpacked found = unpack(bytes, upper_bytes(row));
            const auto put_half = [&](int half, __m512i numbers) ALWAYS_INLINE {
                _mm512_store_si512(tiles[half][i / 16] + i % 16 * TILE_NUMBERS, numbers);
            };
            each<2>([&](int half) ALWAYS_INLINE { put_half(half, _mm512_permutexvar_epi16(in_order, found.part[half])); });
            if (!row.is_apart(block)) continue;
            for (int half = 0; half < 2; ++half) put_half(half, load<__m512i>(row.numbers + TILE_NUMBERS * half));
            row.take_next();
        }
        for (int half = 0; half < 2; ++half, packed += SPLITS * TILE_SIZE) {
            load_parts(packed);
            _tile_loadd(2, tiles[half][0], 64);
            _tile_loadd(3, tiles[half][1], 64);
            multiply_parts<3>();
        }
    }
    store_sums(y);
}

// The same for weights that are no bf16: fill(output, k, to) writes PARTS times 32 numbers of bf16, a tile apart, whose sum times
// scale(output, block) is the weight; of their products with the parts of x those below fp32's last bit are left out.
template <int PARTS, class Fill, class Scale>
inline void made_tile_outputs(int64_t in, int64_t block, const uint16_t* packed, Fill fill, Scale scale, float* y) {
    alignas(64) uint16_t made[2][2][PARTS * TILE_SIZE];  // two of each: one is filled while the other may still be read
    alignas(64) float sums[TILE_OUTPUTS * TILE_ROWS];
    memset(y, 0, sizeof sums);
    for (int64_t k = 0, b = 0; k < in; ++b) {
        _tile_zero(0);
        _tile_zero(1);
        for (const int64_t end = k + block; k < end; k += TILE_NUMBERS, packed += SPLITS * TILE_SIZE) {
            auto& tiles = made[k / TILE_NUMBERS % 2];
            for (int64_t i = 0; i < TILE_OUTPUTS; ++i) fill(i, k, tiles[i / 16] + i % 16 * TILE_NUMBERS);
            load_parts(packed);
            _tile_loadd(2, tiles[0], 64);
            _tile_loadd(3, tiles[1], 64);
            multiply_parts<3>();
            if constexpr (PARTS == 3) {
                _tile_loadd(2, tiles[0] + TILE_SIZE, 64);
                _tile_loadd(3, tiles[1] + TILE_SIZE, 64);
                multiply_parts<2>();
                _tile_loadd(2, tiles[0] + 2 * TILE_SIZE, 64);
                _tile_loadd(3, tiles[1] + 2 * TILE_SIZE, 64);
                multiply_parts<1>();
            }
        }
        store_sums(sums);
        for (int64_t i = 0; i < TILE_OUTPUTS; ++i) {
            const Floats more = load<Floats>(sums + 16 * i) * scale(i, b);
            put(y + 16 * i, load<Floats>(y + 16 * i) + more);
        }
    }
}

// Codes of 8 bits are numbers of bf16 as they are.
inline void tile_outputs(const int8_t* codes, const float* scales, int64_t block, int64_t in, const uint16_t* packed, float* y) {
    const auto fill = [=](int64_t i, int64_t k, uint16_t* to) ALWAYS_INLINE {
        const int8_t* from = codes + i * in + k;
        __builtin_prefetch(from + tile_ahead(k, in));
        const __m512 low = (__m512)widened(from), high = (__m512)widened(from + 16);
        _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    };
    const auto scale = [=](int64_t i, int64_t b) ALWAYS_INLINE { return scales[i * (in / block) + b]; };
    made_tile_outputs<1>(in, block, packed, fill, scale, y);
}

// 4 bits from the row `first` on: a permutation looks up 32 levels at a time, in each of their three parts.
inline void tile_outputs(const Weight& weight, int64_t first, int64_t in, const uint16_t* packed, float* y) {
    alignas(64) float levels[32];
    for (int i = 0; i < 32; ++i) levels[i] = weight.levels[i % 16];  // twice: bit 4 of a second code's index is the first one's
    __m512i tables[SPLITS];
    split_numbers(levels, 64, tables);
    const int64_t block = int64_t(1) << weight.block_shift, blocks = in >> weight.block_shift;
    const auto fill = [&](int64_t i, int64_t k, uint16_t* to) ALWAYS_INLINE {
        const uint8_t* from = weight.packed + (((first + i) * in + k) >> 1);
        __builtin_prefetch(from + tile_ahead(k / 2, in / 2));
        const __m512i bytes = _mm512_cvtepu8_epi32(load<__m128i>(from));
        const __m512i codes = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
        each<SPLITS>([&](int part) ALWAYS_INLINE {
            _mm512_store_si512(to + part * TILE_SIZE, _mm512_permutexvar_epi16(codes, tables[part]));
        });
    };
    const auto scale = [&](int64_t i, int64_t b) ALWAYS_INLINE { return weight.scale((first + i) * blocks + b); };
    made_tile_outputs<SPLITS>(in, block, packed, fill, scale, y);
}

#else

inline bool tiles_allowed() { return false; }
struct Tiles {
    explicit Tiles(bool) {}
};
inline void pack(const float*, int64_t, int64_t, uint16_t*) {}
inline void tile_outputs(const uint16_t*, int64_t, const uint16_t*, float*) {}
inline void tile_outputs(const int8_t*, const float*, int64_t, int64_t, const uint16_t*, float*) {}
inline void tile_outputs(const TwelveBit&, int64_t, int64_t, const uint16_t*, float*) {}
inline void tile_outputs(const Weight&, int64_t, int64_t, const uint16_t*, float*) {}

#endif

}  // namespace
