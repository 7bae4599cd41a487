// Packs weights for cpu_twelve_bit.h: once to see which blocks 4-bit codes hold, and once to write.
//
// Python checks sizes, dtypes and layouts before it calls.

#include "cpu_twelve_bit.h"

namespace {

inline uint16_t bf16_of(uint16_t bf16) { return bf16; }
inline uint16_t bf16_of(float fp32) { return load<uint32_t>(&fp32) >> 16; }
inline uint32_t lost_of(uint16_t) { return 0; }
inline uint32_t lost_of(float fp32) { return load<uint32_t>(&fp32) & 0xffff; }
inline uint8_t upper_of(uint16_t bf16) { return bf16 >> 8 & 127; }  // without the sign

template <class Number>
bool fits(const Number* block, Codes codes) {
    uint8_t upper[BLOCK_NUMBERS], all = 1;
    for (int64_t i = 0; i < BLOCK_NUMBERS; ++i) upper[i] = upper_of(bf16_of(block[i]));
    for (int64_t i = 0; i < BLOCK_NUMBERS; ++i) all &= codes.hold(upper[i]);
    return all;
}

template <class Number>
int32_t num_apart(const Number* row, int64_t in, uint8_t base) {
    int32_t count = 0;
    for (int64_t k = 0; k < in; k += BLOCK_NUMBERS) count += !fits(row + k, Codes(base));
    return count;
}

// Fills base (out,), and apart (out,) with how many blocks of a row its codes cannot hold. False: a number is no bf16 number.
template <class Number>
bool look_at(const Number* numbers, int64_t out, int64_t in, uint8_t* base, int32_t* apart, int threads) {
    int lost = 0;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < out; ++row) {
        int seen;
#pragma omp atomic read
        seen = lost;
        if (seen) continue;
        const Number* from = numbers + row * in;
        uint32_t rest = 0;
        int most = 0;
        for (int64_t k = 0; k < in; ++k) {
            const int upper = upper_of(bf16_of(from[k]));
            rest |= lost_of(from[k]);
            most = upper > most && upper < 127 ? upper : most;  // 127: infinities, NaN and numbers from 2^127 on do not count
        }
        if (rest) {
#pragma omp atomic write
            lost = 1;
            continue;
        }
        base[row] = most < NUM_CODES ? 0 : most - NUM_CODES + 1;
        apart[row] = num_apart(from, in, base[row]);
        if (!apart[row]) continue;
        const int32_t with_zero = num_apart(from, in, base[row] | 128);
        if (with_zero < apart[row]) apart[row] = with_zero, base[row] |= 128;
    }
    return !lost;
}

template <class Number>
void write(const Number* numbers, int64_t out, int64_t in, const uint8_t* base, const int32_t* first, uint8_t* packed, int64_t* at,
           uint16_t* apart, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < out; ++row) {
        const Codes codes(base[row]);
        int64_t next = first[row];
        for (int64_t k = 0; k < in; k += BLOCK_NUMBERS) {
            const Number* from = numbers + row * in + k;
            const int64_t block = (row * in + k) / BLOCK_NUMBERS;
            uint8_t* to = packed + block * BLOCK_BYTES;
            if (!fits(from, codes)) {
                memset(to, 0, BLOCK_BYTES);
                at[next] = block;
                for (int64_t i = 0; i < BLOCK_NUMBERS; ++i) apart[next * BLOCK_NUMBERS + i] = bf16_of(from[i]);
                ++next;
                continue;
            }
            uint8_t code[BLOCK_NUMBERS], ordered[BLOCK_NUMBERS];
            uint16_t words[BLOCK_NUMBERS];
            for (int64_t i = 0; i < BLOCK_NUMBERS; ++i) words[i] = bf16_of(from[i]);
            for (int64_t i = 0; i < BLOCK_NUMBERS; ++i) code[i] = words[i] >> 15 << 3 | codes.of(upper_of(words[i]));
            each<BLOCK_NUMBERS>([&](int i) ALWAYS_INLINE { to[byte_of(i)] = words[i], ordered[byte_of(i)] = code[i]; });
            for (int64_t i = 0; i < 32; ++i) to[BLOCK_NUMBERS + i] = ordered[i] | ordered[32 + i] << 4;
        }
    }
}

}  // namespace

// is_fp32: of what numbers are, else bf16.
extern "C" int32_t look_at_12_bits(const void* numbers, int32_t is_fp32, int64_t out, int64_t in, uint8_t* base, int32_t* apart,
                                   int32_t threads) {
    if (is_fp32) return look_at(static_cast<const float*>(numbers), out, in, base, apart, threads);
    return look_at(static_cast<const uint16_t*>(numbers), out, in, base, apart, threads);
}

extern "C" void write_12_bits(const void* numbers, int32_t is_fp32, int64_t out, int64_t in, const uint8_t* base,
                              const int32_t* first, uint8_t* packed, int64_t* at, uint16_t* apart, int32_t threads) {
    if (is_fp32) write(static_cast<const float*>(numbers), out, in, base, first, packed, at, apart, threads);
    else write(static_cast<const uint16_t*>(numbers), out, in, base, first, packed, at, apart, threads);
}
