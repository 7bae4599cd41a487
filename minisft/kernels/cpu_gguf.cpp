// Weights as GGUF files store them, made fp32: blocks of 32 or 256 small integers that share a scale.
//
// The reference is the gguf package's dequantize. The numbers are its bits: the same operations in the same order, none of them
// fused, so compile as cpu_build.py says. A block is decoded by itself; loops over its numbers are the compiler's to vectorize.
// Little-endian machines. Python checks every size before it calls: nothing is checked here.
//
// Ref: ggml, ggml-common.h (layouts) and ggml-quants.c (dequantize_row_*).

#include "cpu_lanes.h"

namespace {

inline float from_half(const uint8_t* at) {  // by integers: a subnormal stays a number where such are flushed
    const uint16_t half = load<uint16_t>(at);
    const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ff;
    if (exponent == 0) {
        const float magnitude = float(int(fraction)) * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    const uint32_t bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    return load<float>(&bits);
}

inline Floats number_of(Ints codes) { return __builtin_convertvector(codes, Floats); }

// Blocks of 32: numbers 0 to 15 are the low nibbles of 16 bytes, 16 to 31 the high ones. put_numbers(i, codes): LANES codes from number i on.
template <class Put>
inline void each_nibble(const uint8_t* codes, Put put_numbers) {
    for (int i = 0; i < 16; i += LANES) {
        const Ints bytes = bytes_at(codes + i);
        put_numbers(i, bytes & 15);
        put_numbers(16 + i, bytes >> 4);
    }
}

// The fifth bits of codes i to i + LANES - 1, as 0 or 16; bit j of four bytes belongs to code j.
inline Ints fifth_bits(const uint8_t* bits, int i) {
    Words place;
    for (int lane = 0; lane < LANES; ++lane) place[lane] = uint32_t(lane);
    return (Ints)((Words{} + load<uint32_t>(bits)) >> (place + uint32_t(i)) & 1) << 4;
}

struct Q4_0 {
    static constexpr int ITEMS = 32, BYTES = 18;
    static void decode(const uint8_t* block, float* out) {
        const float d = from_half(block);
        each_nibble(block + 2, [&](int i, Ints codes) { put(out + i, d * number_of(codes - 8)); });
    }
};

struct Q4_1 {
    static constexpr int ITEMS = 32, BYTES = 20;
    static void decode(const uint8_t* block, float* out) {
        const float d = from_half(block), least = from_half(block + 2);
        each_nibble(block + 4, [&](int i, Ints codes) { put(out + i, d * number_of(codes) + least); });
    }
};

struct Q5_0 {
    static constexpr int ITEMS = 32, BYTES = 22;
    static void decode(const uint8_t* block, float* out) {
        const float d = from_half(block);
        each_nibble(block + 6, [&](int i, Ints codes) { put(out + i, d * number_of((codes | fifth_bits(block + 2, i)) - 16)); });
    }
};

struct Q5_1 {
    static constexpr int ITEMS = 32, BYTES = 24;
    static void decode(const uint8_t* block, float* out) {
        const float d = from_half(block), least = from_half(block + 2);
        each_nibble(block + 8, [&](int i, Ints codes) {
            put(out + i, d * number_of(codes | fifth_bits(block + 4, i)) + least);
        });
    }
};

struct Q8_0 {
    static constexpr int ITEMS = 32, BYTES = 34;
    static void decode(const uint8_t* block, float* out) {
        const float d = from_half(block);
        for (int i = 0; i < 32; ++i) out[i] = float(int8_t(block[2 + i])) * d;
    }
};

// Scale and offset of each 32 numbers of Q4_K and Q5_K: 6 bits each, the last four with their upper bits in the first eight bytes.
inline void scale_and_least(const uint8_t* packed, int group, float d, float d_least, float& scale, float& least) {
    const uint8_t low = packed[group % 4], high = packed[4 + group % 4], both = packed[8 + group % 4];
    scale = d * float(group < 4 ? low & 63 : (both & 15) | (low >> 2 & 48));
    least = d_least * float(group < 4 ? high & 63 : both >> 4 | (high >> 2 & 48));
}

struct Q4_K {
    static constexpr int ITEMS = 256, BYTES = 144;
    static void decode(const uint8_t* block, float* out) {
        const float d = from_half(block), d_least = from_half(block + 2);
        for (int group = 0; group < 8; ++group) {
            float scale, least;
            scale_and_least(block + 4, group, d, d_least, scale, least);
            const uint8_t* codes = block + 16 + group / 2 * 32;
            const int shift = group % 2 * 4;
            for (int i = 0; i < 32; ++i) out[group * 32 + i] = scale * float(codes[i] >> shift & 15) - least;
        }
    }
};

struct Q5_K {
    static constexpr int ITEMS = 256, BYTES = 176;
    static void decode(const uint8_t* block, float* out) {
        const float d = from_half(block), d_least = from_half(block + 2);
        const uint8_t* high = block + 16;
        for (int group = 0; group < 8; ++group) {
            float scale, least;
            scale_and_least(block + 4, group, d, d_least, scale, least);
            const uint8_t* codes = block + 48 + group / 2 * 32;
            const int shift = group % 2 * 4;
            for (int i = 0; i < 32; ++i)
                out[group * 32 + i] = scale * float((codes[i] >> shift & 15) | (high[i] >> group & 1) << 4) - least;
        }
    }
};

struct Q6_K {
    static constexpr int ITEMS = 256, BYTES = 210;
    static void decode(const uint8_t* block, float* out) {
        const float d = from_half(block + 208);
        for (int group = 0; group < 8; ++group) {
            const int side = group / 4, part = group % 4, shift = part / 2 * 4;
            const uint8_t *low = block + side * 64 + part % 2 * 32, *high = block + 128 + side * 32;
            for (int first = 0; first < 32; first += 16) {
                const float scale = d * float(int8_t(block[192 + group * 2 + first / 16]));
                for (int i = first; i < first + 16; ++i) {
                    const int code = (low[i] >> shift & 15) | (high[i] >> 2 * part & 3) << 4;
                    out[group * 32 + i] = scale * float(code - 32);
                }
            }
        }
    }
};

template <class Type>
void decode_blocks(const uint8_t* stored, float* out, int64_t blocks, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; ++block) Type::decode(stored + block * Type::BYTES, out + block * Type::ITEMS);
}

}  // namespace

extern "C" {

#define DECODER(Type)                                                                                    \
    void gguf_##Type(const uint8_t* stored, float* out, int64_t blocks, int threads) {                   \
        decode_blocks<Type>(stored, out, blocks, threads);                                               \
    }
DECODER(Q4_0)
DECODER(Q4_1)
DECODER(Q5_0)
DECODER(Q5_1)
DECODER(Q8_0)
DECODER(Q4_K)
DECODER(Q5_K)
DECODER(Q6_K)

}
