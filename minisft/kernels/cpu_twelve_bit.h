// Weights that are bf16 numbers, in 12 bits each without a loss; twelve_bit.py says how. A row is read block by block.
//
// The two bytes of a number are its upper one, the sign and seven bits of the exponent, and its lower one. A block has 64 lower
// bytes as they are and 64 codes of 4 bits, the sign and three bits: a table of the row gives code -> upper byte. Unpacking the
// bytes of both puts them beside each other, in this order, which vectors of 16, 32 and 64 bytes share (they unpack by 16):
//
//     number 16 j + l stands at byte 16 (l / 4) + 8 (j / 2) + 2 (l % 4) + j % 2,  and its code in the byte mod 32, the first 32 low
//
// Ref: exponents of trained weights are few: Zhang et al. 2025, arXiv:2504.11651, section 2, which codes them by Huffman.

#pragma once
#include "cpu_lanes.h"

namespace {

constexpr int64_t BLOCK_NUMBERS = 64, BLOCK_BYTES = 96;
constexpr int NUM_CODES = 8;  // and the sign

// (out, in); kernels/cpu_decode.py declares the same struct. A block that codes cannot hold stands apart, as it is.
struct TwelveBit {
    const uint8_t *packed, *base;  // (out, in / 64, 96); (out,)
    const int32_t* first;          // (out + 1,): how many such blocks stand before a row
    const int64_t* at;             // which ones, counted through all rows, and after the last one a number that no block has
    const uint16_t* apart;         // their numbers, 64 each
    const uint16_t* whole;         // the weight in bf16 where there is one, for tiles, which read it as it lies; else null
};

inline constexpr int64_t byte_of(int64_t number) {
    const int64_t j = number / 16, l = number % 16;
    return 16 * (l / 4) + 8 * (j / 2) + 2 * (l % 4) + j % 2;
}

// What a code stands for in a row: the upper byte without the sign is base + code, but with bit 7 of base code 0 stands for 0.
struct Codes {
    const int base;
    const bool has_zero;

    explicit Codes(uint8_t stored) : base(stored & 127), has_zero(stored & 128) {}
    int upper(int code) const { return code || !has_zero ? base + code : 0; }
    bool hold(uint8_t upper) const {
        return (has_zero & !upper) | (uint8_t(upper - (base + has_zero)) < uint8_t(NUM_CODES - has_zero));
    }
    int of(int upper) const { return upper || !has_zero ? upper - base : 0; }
};

// One row, read from its first block on.
struct TwelveBitRow {
    const uint8_t* packed;
    const int64_t* at;        // the next block that stands apart,
    int64_t next;             // which one that is of this row's, and
    const uint16_t* numbers;  // its numbers
    uint8_t upper[16];        // by code

    TwelveBitRow() = default;
    TwelveBitRow(const TwelveBit& w, int64_t row, int64_t in) {
        const int64_t start = row * (in / BLOCK_NUMBERS);
        packed = w.packed + start * BLOCK_BYTES;
        at = w.at + w.first[row];
        next = *at - start;
        numbers = w.apart + w.first[row] * BLOCK_NUMBERS;
        const Codes codes(w.base[row]);
        for (int code = 0; code < 16; ++code) upper[code] = (code & 8) << 4 | codes.upper(code & 7);
    }

    const uint8_t* bytes(int64_t block) const { return packed + block * BLOCK_BYTES; }
    bool is_apart(int64_t block) const { return __builtin_expect(next == block, 0); }
    void take_next() {
        next += at[1] - at[0];
        ++at, numbers += BLOCK_NUMBERS;
    }
};

inline void prefetch_block(const uint8_t* bytes) {
    __builtin_prefetch(bytes);
    __builtin_prefetch(bytes + 64);
}

#if LANES == 16 && defined(__AVX512BW__) && !defined(NF4_PORTABLE)

typedef __m512i UpperBytes;  // a row's table
inline UpperBytes upper_bytes(const TwelveBitRow& row) { return _mm512_broadcast_i32x4(load<__m128i>(row.upper)); }

struct Unpacked {
    __m512i part[2];  // dword l of part i: numbers 32 i + l (lower half) and 32 i + 16 + l
};

inline Unpacked unpack(const uint8_t* bytes, UpperBytes table) {
    const __m512i lower = load<__m512i>(bytes), twice = _mm512_broadcast_i64x4(load<__m256i>(bytes + 64));
    const __m512i codes = _mm512_srlv_epi64(twice, _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0)) & _mm512_set1_epi8(15);
    const __m512i upper = _mm512_shuffle_epi8(table, codes);
    return {_mm512_unpacklo_epi8(lower, upper), _mm512_unpackhi_epi8(lower, upper)};
}

// visit(0, first 16 numbers), ..., visit(48, last ones)
template <class Visit>
inline ALWAYS_INLINE void numbers_of(const uint8_t* bytes, UpperBytes table, Visit visit) {
    const Unpacked found = unpack(bytes, table);
    each<2>([&](int i) ALWAYS_INLINE {
        visit(32 * i, (Floats)_mm512_slli_epi32(found.part[i], 16));
        visit(32 * i + 16, (Floats)(found.part[i] & _mm512_set1_epi32(0xffff0000)));
    });
}

#elif LANES == 8 && !defined(NF4_PORTABLE)

typedef __m256i UpperBytes;
inline UpperBytes upper_bytes(const TwelveBitRow& row) { return _mm256_broadcastsi128_si256(load<__m128i>(row.upper)); }

template <class Visit>
inline ALWAYS_INLINE void numbers_of(const uint8_t* bytes, UpperBytes table, Visit visit) {
    const __m256i codes = load<__m256i>(bytes + 64), low = _mm256_set1_epi8(15);
    __m256i part[2][2];  // of the lower and upper eight in each 16 numbers: dwords as above
    each<2>([&](int half) ALWAYS_INLINE {
        const __m256i lower = load<__m256i>(bytes + 32 * half);
        const __m256i upper = _mm256_shuffle_epi8(table, (half ? _mm256_srli_epi16(codes, 4) : codes) & low);
        part[half][0] = _mm256_unpacklo_epi8(lower, upper), part[half][1] = _mm256_unpackhi_epi8(lower, upper);
    });
    each<2>([&](int i) ALWAYS_INLINE {
        each<2>([&](int half) ALWAYS_INLINE { visit(32 * i + 8 * half, (Floats)_mm256_slli_epi32(part[half][i], 16)); });
        each<2>([&](int half) ALWAYS_INLINE {
            visit(32 * i + 16 + 8 * half, (Floats)(part[half][i] & _mm256_set1_epi32(0xffff0000)));
        });
    });
}

#else

typedef const uint8_t* UpperBytes;
inline UpperBytes upper_bytes(const TwelveBitRow& row) { return row.upper; }

// Slower than reading 16 bits: exact_copy.py does not ask for it, but for the rare AVX-512 without instructions for bytes.
template <class Visit>
inline ALWAYS_INLINE void numbers_of(const uint8_t* bytes, UpperBytes table, Visit visit) {
    uint16_t numbers[BLOCK_NUMBERS];
    for (int64_t i = 0; i < BLOCK_NUMBERS; ++i) {
        const int64_t at = byte_of(i);
        const int code = bytes[64 + at % 32] >> at / 32 * 4 & 15;
        numbers[i] = table[code] << 8 | bytes[at];
    }
    for (int64_t k = 0; k < BLOCK_NUMBERS; k += LANES) visit(k, widened(numbers + k));
}

#endif

}  // namespace
