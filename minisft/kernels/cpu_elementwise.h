// What stands between the products, of one row: RMSNorm, SwiGLU and RoPE, for a training step and for the decoder.

#pragma once
#include "cpu_lanes.h"

namespace {

// LANES numbers, and what is left of a row: so that a loop's body is written once for both.
struct Whole {
    Floats load(const float* from) const { return ::load<Floats>(from); }
    void store(float* to, Floats v) const { put(to, v); }
};
struct Rest {
    int64_t bytes;
    Floats load(const float* from) const { return load_some<Floats>(from, bytes); }
    void store(float* to, Floats v) const { memcpy(to, &v, bytes); }
};

// Calls each(k, lanes) for k = 0, LANES, ... < length.
template <class Each>
inline void vectors(int64_t length, Each each) {
    int64_t k = 0;
    for (; k + LANES <= length; k += LANES) each(k, Whole{});
    if (k < length) each(k, Rest{4 * (length - k)});
}

// y = weight * (x rstd) with rstd = 1 / sqrt(mean(x^2) + eps), which it returns; y may be x.
inline float norm_row(const float* x, const float* weight, int64_t size, float eps, float* y) {
    Floats squares = {};
    vectors(size, [&](int64_t k, auto lanes) {
        const Floats numbers = lanes.load(x + k);
        squares = multiply_add(numbers, numbers, squares);
    });
    const float rstd = 1.0f / __builtin_sqrtf(sum(squares) / float(size) + eps);
    vectors(size, [&](int64_t k, auto lanes) { lanes.store(y + k, lanes.load(weight + k) * (lanes.load(x + k) * rstd)); });
    return rstd;
}

// y = silu(gate) up; y may be either.
inline void gate_row(const float* gate, const float* up, int64_t length, float* y) {
    vectors(length, [&](int64_t k, auto lanes) {
        const Floats g = lanes.load(gate + k);
        lanes.store(y + k, g / (exponential(-g) + 1.0f) * lanes.load(up + k));
    });
}

// y: each pair (x_i, x_{i + half}) turned by its angle; turn is 1, or -1 to turn back. y may be x.
inline void turn_row(const float* x, const float* cos, const float* sin, int64_t half, float turn, float* y) {
    vectors(half, [&](int64_t i, auto lanes) {
        const Floats a = lanes.load(x + i), b = lanes.load(x + half + i);
        const Floats c = lanes.load(cos + i), s = lanes.load(sin + i) * turn;
        lanes.store(y + i, a * c - b * s);
        lanes.store(y + half + i, b * c + a * s);
    });
}

}  // namespace
