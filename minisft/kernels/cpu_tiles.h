// y = x W^T for 6 to 16 rows of x and a W in bf16, by AMX: 32 outputs of all rows at once, at the speed at which W is read.
//
// A tile register holds 16 rows of 64 bytes. Tiles of W are read as they lie: 16 outputs and 32 numbers of each. x is fp32 and is
// split without a remainder into three numbers of bf16, x = high + middle + low (8 bits each), so the products are those of fp32
// and only the order of their sums differs from DenseMatrix's. Numbers below 2^-126 count as zero, the parts of x among them.
// The kernel saves these registers only for who asked for them (arch_prctl), and oneDNN uses them in the same threads: whoever
// computes here puts back the configuration that was there.
//
// Ref: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS, LDTILECFG.

#pragma once
#include "cpu_lanes.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && LANES == 16 && !defined(NF4_PORTABLE)
#define TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t MIN_ROWS = 6;  // fewer take less time by DenseMatrix
constexpr int64_t TILE_ROWS = 16, TILE_OUTPUTS = 32, TILE_NUMBERS = 32, SPLITS = 3;
constexpr int64_t TILE_AHEAD = 1024;         // numbers before a weight is read it is asked for
constexpr int64_t TILE_FLOATS = SPLITS * 8;  // memory for packed rows of x, in fp32 numbers for each number of a row

#ifdef TILES

// Asks for them, once for the process and all its threads.
inline bool tiles_allowed() {
    constexpr long REQUEST = 0x1023, DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, DATA) == 0;
}

struct TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];  // of a row
    uint8_t rows[16];

    // Not by _tile_loadconfig: GCC 12 takes it to read eight bytes and leaves the others out.
    void use() const {
        if (palette) asm volatile("ldtilecfg %0" : : "m"(*this));
        else asm volatile("tilerelease");
    }
};

// All eight tiles 16 x 64 bytes as long as it lives; then what was there before, without the numbers.
class Tiles {
    TileConfig before;
    const bool used;

   public:
    explicit Tiles(bool allowed) : used(allowed) {
        if (!used) return;
        asm volatile("sttilecfg %0" : "=m"(before));
        TileConfig config = {};
        config.palette = 1;
        for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
        config.use();
    }
    ~Tiles() {
        if (used) before.use();
    }
    explicit operator bool() const { return used; }
};

// Of 16 vectors, vector i has dword j of vector j's dword i: rows and columns change places.
inline void transpose(__m512i* v) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j) {
            v[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
            v[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
        }
    for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 16; half += 8) {
            t[half + i] = _mm512_shuffle_i32x4(v[half + i], v[half + 4 + i], 0x88);
            t[half + 4 + i] = _mm512_shuffle_i32x4(v[half + i], v[half + 4 + i], 0xdd);
        }
    for (int i = 0; i < 8; ++i) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    }
}

// x (rows, in) for tiles: for each 32 numbers the three parts, each 16 pairs of numbers x 16 rows; missing rows are zero.
inline void pack(const float* x, int64_t rows, int64_t in, uint16_t* out) {
    for (int64_t k = 0; k < in; k += TILE_NUMBERS, out += SPLITS * 512) {
        __m512i parts[SPLITS][TILE_ROWS] = {};
        for (int64_t row = 0; row < rows; ++row) {
            __m512 a = _mm512_loadu_ps(x + row * in + k), b = _mm512_loadu_ps(x + row * in + k + 16);
            for (int part = 0; part < SPLITS; ++part) {
                const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
                parts[part][row] = both;
                a -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16);
                b -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16);
            }
        }
        for (int part = 0; part < SPLITS; ++part) {
            transpose(parts[part]);
            memcpy(out + part * 512, parts[part], sizeof parts[part]);
        }
    }
}

// y (32, 16): outputs from weight on, which is (32, in), of packed rows.
inline void tile_outputs(const uint16_t* weight, int64_t in, const uint16_t* packed, float* y) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < in; k += TILE_NUMBERS, packed += SPLITS * 512) {
        for (int64_t i = 0; i < TILE_OUTPUTS; ++i) __builtin_prefetch(weight + i * in + k + TILE_AHEAD);
        _tile_loadd(2, weight + k, 2 * in);
        _tile_loadd(3, weight + 16 * in + k, 2 * in);
        _tile_loadd(4, packed, 64);
        _tile_loadd(5, packed + 512, 64);
        _tile_loadd(6, packed + 1024, 64);
        _tile_dpbf16ps(0, 2, 4);
        _tile_dpbf16ps(1, 3, 4);
        _tile_dpbf16ps(0, 2, 5);
        _tile_dpbf16ps(1, 3, 5);
        _tile_dpbf16ps(0, 2, 6);
        _tile_dpbf16ps(1, 3, 6);
    }
    _tile_stored(0, y, 64);
    _tile_stored(1, y + 256, 64);
}

#else

inline bool tiles_allowed() { return false; }
struct Tiles {
    explicit Tiles(bool) {}
    explicit operator bool() const { return false; }
};
inline void pack(const float*, int64_t, int64_t, uint16_t*) {}
inline void tile_outputs(const uint16_t*, int64_t, const uint16_t*, float*) {}

#endif

}  // namespace
