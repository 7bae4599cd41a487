// Vectors of fp32 numbers, and the look-up of 4-bit codes in them: what the C++ files of this folder share.
//
// Vectors are GCC's and Clang's own (vector_size), so any CPU with either compiler will do. What they do not express in one
// instruction names it, beside a form for every CPU: the look-up, widening, the fused multiply-add, parts of a vector. One idea does
// most of the work: the 16 levels of a code fit in one or two vector registers, so they are multiplied by the scale once a block,
// and a permutation then looks up 8 or 16 weights at a time.

#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>
#if defined(_OPENMP)
#include <omp.h>
#else
static inline int omp_get_thread_num() { return 0; }
static inline int omp_get_num_threads() { return 1; }
#endif
// NF4_PORTABLE and NF4_AVX2 ask for less than the CPU has: so do tests.
#if defined(__AVX512F__) && !defined(NF4_PORTABLE) && !defined(NF4_AVX2)
#include <immintrin.h>
#define INSTRUCTIONS "AVX-512"
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && !defined(NF4_PORTABLE)
#include <immintrin.h>
#define INSTRUCTIONS "AVX2"
#define LANES 8
#else
#define INSTRUCTIONS "portable"
#define NF4_PORTABLE
#ifndef LANES
#define LANES 8
#endif
#endif

namespace {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint64_t Pairs __attribute__((vector_size(4 * LANES)));  // two neighbouring lanes as one number, the first one low
typedef float Quad __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t PairBytes __attribute__((vector_size(LANES / 2)));
typedef int8_t SignedBytes __attribute__((vector_size(LANES)));

// One 4-bit weight; cpu_nf4.py declares the same struct. map is null where absmax holds fp32 scales, not 8-bit codes. least is null
// but for weights of a GGUF file (gguf_copy.py): what is added to the levels times a block's scale, by PackedMatrix alone.
// NESTED_BLOCK_SIZE is nf4.py's: cpu_build.py hands it to the compiler.
struct Weight {
    const uint8_t* packed;
    const void* absmax;
    const float *map, *absmax2, *offset, *levels, *least;
    int64_t length, block_shift;

    float scale(int64_t block) const {
        if (!map) return static_cast<const float*>(absmax)[block];
        return map[static_cast<const uint8_t*>(absmax)[block]] * absmax2[uint64_t(block) / NESTED_BLOCK_SIZE] + *offset;
    }
};

struct Table {
    Floats part[16 / LANES];
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t pieces(int64_t size, int64_t most) { return (size + most - 1) / most; }

// A small function that must not stay a call, and neither must a lambda: `[&](int i) ALWAYS_INLINE { ... }`.
#define ALWAYS_INLINE __attribute__((always_inline))

// visit(0), ..., visit(N - 1), written out before the compiler looks at loops: an array that is indexed so stays in registers.
template <int N, class Visit>
inline ALWAYS_INLINE void each(Visit visit) {
    if constexpr (N > 1) each<N - 1>(visit);
    visit(N - 1);
}

template <class V>
inline V load(const void* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}

template <class V>
inline V load_some(const void* from, int64_t bytes) {  // the rest is zero
    V v = {};
    memcpy(&v, from, bytes);
    return v;
}

inline Table operator*(Table table, float scale) {
    for (Floats& part : table.part) part = part * scale + 0.0f;  // + 0: no weight is -0, see nf4.dequantize
    return table;
}

// table[code & 15] in each lane.
inline Floats look_up(const Table& table, Ints codes) {
#if defined(NF4_PORTABLE)
    float values[16];
    memcpy(values, &table, sizeof values);
    Floats found;
    for (int lane = 0; lane < LANES; ++lane) found[lane] = values[codes[lane] & 15];
    return found;
#elif LANES == 16
    return _mm512_permutexvar_ps((__m512i)codes, table.part[0]);
#else
    const Floats low = _mm256_permutevar8x32_ps(table.part[0], (__m256i)codes);
    const Floats high = _mm256_permutevar8x32_ps(table.part[1], (__m256i)codes);
    return _mm256_blendv_ps(low, high, (__m256)(codes << 28));  // by bit 3
#endif
}

// LANES codes in order, each in the low four bits of its lane; above them there may be others.
inline Ints codes_at(const uint8_t* packed) {
#if LANES == 16
#if defined(NF4_PORTABLE)
    const Pairs bytes = __builtin_convertvector(load<PairBytes>(packed), Pairs);
#else
    const Pairs bytes = (Pairs)_mm512_cvtepu8_epi64(_mm_cvtsi64_si128(load<int64_t>(packed)));
#endif
    return (Ints)(bytes >> 4 | bytes << 32);
#else
    return (Ints)((Words{} + load<uint32_t>(packed)) >> Words{4, 0, 12, 8, 20, 16, 28, 24});
#endif
}

// LANES bytes, one in each lane: the second code of a byte in the low four bits, the first one above them.
inline Ints bytes_at(const uint8_t* packed) {
#if defined(NF4_PORTABLE)
    return __builtin_convertvector(load<Bytes>(packed), Ints);
#elif LANES == 16
    return (Ints)_mm512_cvtepu8_epi32(load<__m128i>(packed));
#else
    const int64_t bytes = load<int64_t>(packed);
    return (Ints)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes));
#endif
}

inline Floats splat(float number) { return number - Floats{}; }  // x + 0 is not x where x is -0, and takes an instruction

inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(NF4_PORTABLE)
    return a * b + c;
#elif LANES == 16
    return _mm512_fmadd_ps(a, b, c);
#else
    return _mm256_fmadd_ps(a, b, c);
#endif
}

// e^x = 2^n e^r with |r| <= ln 2 / 2, e^r by its series to r^7 / 7!: off by less than 2^-22 of itself. A NaN stays one.
inline Floats exponential(Floats x) {
    x = x < -87.0f ? splat(-87.0f) : x;
    x = x > 88.0f ? splat(88.0f) : x;
    const float round = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction, and stands in its low bits
    const Floats shifted = x * 1.44269504f + round, n = shifted - round;
    const Floats r = multiply_add(n, splat(-1.42860677e-6f), multiply_add(n, splat(-0.693145752f), x));
    Floats series = splat(1.0f / 5040);
    for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        series = multiply_add(series, r, splat(factor));
    const Ints power = ((Ints)shifted - 0x4b400000 + 127) << 23;
    return series * (Floats)power;
}

#if LANES == 16 && !defined(NF4_PORTABLE)
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
#endif

// By halves: lanes i and i + 4 n first, so that no addition waits for more than four others.
inline float sum(Floats v) {
    Quad quads[LANES / 4];
    memcpy(quads, &v, sizeof v);
    for (int step = LANES / 8; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) quads[i] += quads[i + step];
    return (quads[0][0] + quads[0][2]) + (quads[0][1] + quads[0][3]);
}

inline float largest(Floats v) {
    Quad quads[LANES / 4];
    memcpy(quads, &v, sizeof v);
    const auto larger = [](Quad a, Quad b) ALWAYS_INLINE { return b > a ? b : a; };
    for (int step = LANES / 8; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) quads[i] = larger(quads[i], quads[i + step]);
    const Quad pair = larger(quads[0], Quad{quads[0][2], quads[0][3], quads[0][0], quads[0][1]});
    return pair[1] > pair[0] ? pair[1] : pair[0];
}

inline float number(float fp32) { return fp32; }
inline float number(uint16_t bf16) {
    const uint32_t bits = uint32_t(bf16) << 16;
    return load<float>(&bits);
}

inline Floats widened(const float* fp32) { return load<Floats>(fp32); }
inline Floats widened(const uint16_t* bf16) {
#if defined(NF4_PORTABLE)
    return (Floats)(__builtin_convertvector(load<Halves>(bf16), Words) << 16);
#elif LANES == 16
    return (Floats)((Words)_mm512_cvtepu16_epi32(load<__m256i>(bf16)) << 16);
#else
    return (Floats)((Words)_mm256_cvtepu16_epi32(load<__m128i>(bf16)) << 16);
#endif
}
inline Floats widened(const int8_t* codes) {
#if defined(NF4_PORTABLE)
    return __builtin_convertvector(load<SignedBytes>(codes), Floats);
#elif LANES == 16
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(codes)));
#else
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load<int64_t>(codes))));
#endif
}

inline void put(float* out, Floats v) { memcpy(out, &v, sizeof v); }

// bfloat16 in the upper halves: to nearest, ties to even; a NaN becomes PyTorch's. The lower halves hold anything.
inline Words bf16_words(Floats v) {
    const Words bits = (Words)v;
    return v == v ? bits + 0x7fff + (bits >> 16 & 1) : Words{} + 0x7fc00000;
}

inline void put(uint16_t* out, Floats v) {
    const Halves halves = __builtin_convertvector(bf16_words(v) >> 16, Halves);
    memcpy(out, &halves, sizeof halves);
}

// The first `count` numbers, fewer than LANES, and zeros.
template <class T>
inline Floats load_first(const T* from, int64_t count) {
#if LANES == 16 && !defined(NF4_PORTABLE)
    if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps((1u << count) - 1, from);
#endif
    T whole[LANES] = {};
    memcpy(whole, from, sizeof(T) * count);
    return widened(whole);
}

// The first `count` lanes, fewer than all.
template <class T>
inline void put_first(T* to, Floats v, int64_t count) {
#if LANES == 16 && !defined(NF4_PORTABLE)
    if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(to, (1u << count) - 1, v);
#endif
    T whole[LANES];
    put(whole, v);
    memcpy(to, whole, sizeof(T) * count);
}

// v with zeros beyond the first `count` lanes.
inline Floats first_of(Floats v, int64_t count) {
#if LANES == 16 && !defined(NF4_PORTABLE)
    return _mm512_maskz_mov_ps((1u << count) - 1, v);
#else
    for (int64_t lane = count; lane < LANES; ++lane) v[lane] = 0.0f;
    return v;
#endif
}

// What is left of v where it is stored as T and read again.
template <class T>
inline Floats rounded(Floats v);
template <>
inline Floats rounded<float>(Floats v) {
    return v;
}
template <>
inline Floats rounded<uint16_t>(Floats v) {
    return (Floats)(bf16_words(v) & 0xffff0000);
}

}  // namespace
