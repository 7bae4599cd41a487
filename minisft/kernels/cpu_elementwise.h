// What stands between the products, of one row: RMSNorm, softmax, SwiGLU and RoPE, for a training step and for the decoder.

#pragma once
#include "cpu_lanes.h"

namespace {

// A row's numbers are T, fp32 or bf16. They are computed with in fp32, and `rounded` where PyTorch's operators store them.

// LANES numbers, and what is left of a row: so that a loop's body is written once for both.
struct Whole {
    template <class T>
    Floats load(const T* from) const {
        return widened(from);
    }
    template <class T>
    void store(T* to, Floats v) const {
        put(to, v);
    }
    Floats only(Floats v) const { return v; }
};
struct Rest {
    int64_t count;
    template <class T>
    Floats load(const T* from) const {
        return load_first(from, count);
    }
    template <class T>
    void store(T* to, Floats v) const {
        put_first(to, v, count);
    }
    Floats only(Floats v) const { return first_of(v, count); }  // zeros beside them
};

// Calls each(k, lanes) for k = 0, LANES, ... < length.
template <class Each>
inline void vectors(int64_t length, Each each) {
    int64_t k = 0;
    for (; k + LANES <= length; k += LANES) each(k, Whole{});
    if (k < length) each(k, Rest{length - k});
}

// y = weight * (x rstd) with rstd = 1 / sqrt(mean(x^2) + eps), which it returns; y may be x.
template <class T>
inline float norm_row(const T* x, const T* weight, int64_t size, float eps, T* y) {
    Floats squares = {};
    vectors(size, [&](int64_t k, auto lanes) {
        const Floats numbers = lanes.load(x + k);
        squares = multiply_add(numbers, numbers, squares);
    });
    const float rstd = 1.0f / __builtin_sqrtf(sum(squares) / float(size) + eps);
    vectors(size, [&](int64_t k, auto lanes) {
        lanes.store(y + k, lanes.load(weight + k) * rounded<T>(lanes.load(x + k) * rstd));
    });
    return rstd;
}

inline float largest(const float* numbers, int64_t length) {
    if (length < LANES) {
        float most = numbers[0];
        for (int64_t k = 1; k < length; ++k) most = numbers[k] > most ? numbers[k] : most;
        return most;
    }
    Floats most = load<Floats>(numbers);
    for (int64_t k = LANES; k < length; k += LANES) {
        const Floats next = load<Floats>(numbers + least(k, length - LANES));  // at the end some for the second time
        most = next > most ? next : most;
    }
    return largest(most);
}

// scores = exp(scores - max); returns their sum, which softmax divides by.
inline float softmax(float* scores, int64_t length) {
    const float most = largest(scores, length);
    Floats total = {};
    vectors(length, [&](int64_t k, auto lanes) {
        const Floats weights = exponential(lanes.load(scores + k) - most);
        lanes.store(scores + k, weights);
        total += lanes.only(weights);
    });
    return sum(total);
}

// y = silu(gate) up; y may be either.
template <class T>
inline void gate_row(const T* gate, const T* up, int64_t length, T* y) {
    vectors(length, [&](int64_t k, auto lanes) {
        const Floats g = lanes.load(gate + k);
        lanes.store(y + k, rounded<T>(g / (exponential(-g) + 1.0f)) * lanes.load(up + k));
    });
}

// y: each pair (x_i, x_{i + half}) turned by its angle; turn is 1, or -1 to turn back. y may be x.
template <class T>
inline void turn_row(const T* x, const T* cos, const T* sin, int64_t half, float turn, T* y) {
    vectors(half, [&](int64_t i, auto lanes) {
        const Floats a = lanes.load(x + i), b = lanes.load(x + half + i);
        const Floats c = lanes.load(cos + i), s = lanes.load(sin + i) * turn;
        lanes.store(y + i, rounded<T>(a * c) - b * s);
        lanes.store(y + half + i, rounded<T>(b * c) + a * s);
    });
}

}  // namespace
