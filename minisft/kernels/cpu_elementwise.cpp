// What stands between the matrix products of a training step, each in one pass over memory: norms, SwiGLU and RoPE.
//
// The references are the formulas in PyTorch of minisft/elementwise.py. Between two large products a step is limited
// by memory: PyTorch reads and writes an activation once for each operator, this once for each function. Numbers are fp32 or bf16, rows
// lie one behind the other without gaps, and every row is computed by one thread in one order: the bits depend on neither the number
// of threads nor the other rows. Python checks every size, dtype and layout before it calls: nothing is checked here.

#include "cpu_elementwise.h"

namespace {

inline Floats sigmoid(Floats x) { return 1.0f / (exponential(-x) + 1.0f); }

constexpr int64_t SPAN = 4096;  // numbers that a thread takes at a time where there are no rows

// Calls each(begin, length) for one span after the other.
template <class Each>
inline void spans(int64_t length, int threads, Each each) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t begin = 0; begin < length; begin += SPAN) each(begin, length - begin < SPAN ? length - begin : SPAN);
}

// y = weight * (x rstd), rstd = 1 / sqrt(mean(x^2) + eps); rstd (rows,) is kept for backward.
template <class T>
void rms_norm(const T* x, const T* weight, T* y, float* rstd, int64_t rows, int64_t size, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) rstd[row] = norm_row(x + row * size, weight, size, eps, y + row * size);
}

// grad_x = rstd (g - n mean(g n)), with g = grad weight and n = x rstd.
template <class T>
void rms_norm_backward(const T* grad, const T* x, const T* weight, const float* rstd, T* grad_x, int64_t rows, int64_t size,
                       int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const T *g = grad + row * size, *from = x + row * size;
        const float r = rstd[row];
        T* to = grad_x + row * size;
        Floats products = {};
        vectors(size, [&](int64_t k, auto lanes) {
            products = multiply_add(lanes.load(g + k) * lanes.load(weight + k), lanes.load(from + k) * r, products);
        });
        const float mean = sum(products) / float(size);
        vectors(size, [&](int64_t k, auto lanes) {
            const Floats normed = lanes.load(from + k) * r;
            lanes.store(to + k, r * (lanes.load(g + k) * lanes.load(weight + k) - normed * mean));
        });
    }
}

// y = silu(gate) up
template <class T>
void swiglu(const T* gate, const T* up, T* y, int64_t length, int threads) {
    spans(length, threads, [=](int64_t begin, int64_t count) { gate_row(gate + begin, up + begin, count, y + begin); });
}

// grad_up = grad silu(gate); grad_gate = grad up silu'(gate), silu'(g) = s + g s (1 - s) with s = sigmoid(g).
template <class T>
void swiglu_backward(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t length, int threads) {
    spans(length, threads, [=](int64_t begin, int64_t count) {
        vectors(count, [=](int64_t i, auto lanes) {
            const int64_t k = begin + i;
            const Floats d = lanes.load(grad + k), g = lanes.load(gate + k), s = sigmoid(g), silu = g * s;
            lanes.store(grad_up + k, d * rounded<T>(silu));
            lanes.store(grad_gate + k, rounded<T>(d * lanes.load(up + k)) * multiply_add(silu, 1.0f - s, s));
        });
    });
}

// y: each pair (x_i, x_{i + half}) of a head turned by its token's angle; turn is 1, or -1 to turn back.
template <class T>
void rotate(const T* x, const T* cos, const T* sin, T* y, int64_t tokens, int64_t heads, int64_t half, float turn, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t token = 0; token < tokens; ++token)
        for (int64_t head = token * heads; head < (token + 1) * heads; ++head)
            turn_row(x + head * 2 * half, cos + token * half, sin + token * half, half, turn, y + head * 2 * half);
}

}  // namespace

// What Python calls: each function for fp32 and for bf16.
#define FOR(T, dtype)                                                                                                              \
    void rms_norm_##dtype(const T* x, const T* weight, T* y, float* rstd, int64_t rows, int64_t size, float eps, int threads) {   \
        rms_norm(x, weight, y, rstd, rows, size, eps, threads);                                                                    \
    }                                                                                                                              \
    void rms_norm_backward_##dtype(const T* grad, const T* x, const T* weight, const float* rstd, T* grad_x, int64_t rows,        \
                                   int64_t size, int threads) {                                                                    \
        rms_norm_backward(grad, x, weight, rstd, grad_x, rows, size, threads);                                                     \
    }                                                                                                                              \
    void swiglu_##dtype(const T* gate, const T* up, T* y, int64_t length, int threads) { swiglu(gate, up, y, length, threads); }  \
    void swiglu_backward_##dtype(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t length,             \
                                 int threads) {                                                                                    \
        swiglu_backward(grad, gate, up, grad_gate, grad_up, length, threads);                                                      \
    }                                                                                                                              \
    void rotate_##dtype(const T* x, const T* cos, const T* sin, T* y, int64_t tokens, int64_t heads, int64_t half, float turn,    \
                        int threads) {                                                                                             \
        rotate(x, cos, sin, y, tokens, heads, half, turn, threads);                                                                \
    }

extern "C" {
FOR(float, fp32)
FOR(uint16_t, bf16)
}
