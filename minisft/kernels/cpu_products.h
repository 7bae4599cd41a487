// y = x W^T for a few rows of x, where reading W is most of the work: each weight is read once, in the order in which it lies.
//
// All kinds of weight are read the same way, PARTS * LANES numbers of an output's row at a time: enter(k) when those from k on begin,
// then read(k, part). What a sum adds up, and in which order, depends on the weight alone: a row of x gives the same bits by itself
// and beside others.

#pragma once
#include "cpu_lanes.h"

namespace {

constexpr int ROWS_AT_ONCE = 8;     // rows of x whose sums stay in registers
constexpr int COLUMNS_AT_ONCE = 4;  // outputs that one iteration of a loop over threads computes

// (out, in) in fp32 or bf16; in is a multiple of LANES.
template <class Number>
struct DenseMatrix {
    static constexpr int PARTS = 1;
    const Number* numbers;
    int64_t in;

    struct Column {
        const Number* numbers;
        void enter(const DenseMatrix&, int64_t) {}
        Floats read(int64_t k, int) const { return widened(numbers + k); }
    };
    Column column(int64_t j) const { return {numbers + j * in}; }
};

// (out, in) in 4 bits; in is a multiple of 2 LANES, and so is the block size. x is laid out as split() does.
struct PackedMatrix {
    static constexpr int PARTS = 2;
    const Weight& weight;
    int64_t in;
    Table levels;

    PackedMatrix(const Weight& weight, int64_t in) : weight(weight), in(in), levels(load<Table>(weight.levels)) {}

    struct Column {
        int64_t start;
        Table table;  // of the block that is read
        Ints bytes;

        void enter(const PackedMatrix& m, int64_t k) {
            const int64_t at = start + k, shift = m.weight.block_shift;
            if (k == 0 || at >> shift << shift == at) table = m.levels * m.weight.scale(at >> shift);
            bytes = bytes_at(m.weight.packed + (at >> 1));
        }
        Floats read(int64_t, int part) const { return look_up(table, part == 0 ? bytes >> 4 : bytes); }
    };
    Column column(int64_t j) const { return {j * in, levels, Ints{}}; }
};

// x for PackedMatrix: of each 2 LANES numbers the even ones first, which are the high nibbles, then the odd ones.
inline void split(const float* x, int64_t length, float* out) {
    for (int64_t k = 0; k < length; k += 2 * LANES)
        for (int i = 0; i < LANES; ++i) {
            out[k + i] = x[k + 2 * i];
            out[k + LANES + i] = x[k + 2 * i + 1];
        }
}

// y (rows, COLUMNS_AT_ONCE): COLUMNS outputs from `column` on, of ROWS rows of x.
template <int ROWS, int COLUMNS, class Matrix>
inline void tile(const Matrix& matrix, const float* x, int64_t column, float* y) {
    Floats sums[ROWS][COLUMNS] = {};
    typename Matrix::Column columns[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) columns[c] = matrix.column(column + c);
    for (int64_t k = 0; k < matrix.in; k += Matrix::PARTS * LANES)
        for (int c = 0; c < COLUMNS; ++c) {
            columns[c].enter(matrix, k);
            for (int part = 0; part < Matrix::PARTS; ++part) {
                const Floats weights = columns[c].read(k, part);
                const float* at = x + k + part * LANES;
                for (int row = 0; row < ROWS; ++row)
                    sums[row][c] = multiply_add(weights, load<Floats>(at + row * matrix.in), sums[row][c]);
            }
        }
    for (int row = 0; row < ROWS; ++row)
        for (int c = 0; c < COLUMNS; ++c) y[row * COLUMNS_AT_ONCE + c] = sum(sums[row][c]);
}

// `count` outputs of at most ROWS rows. Few rows leave registers for the sums of several outputs.
template <int ROWS, class Matrix>
inline void tiles(const Matrix& matrix, const float* x, int64_t rows, int64_t column, int count, float* y) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return tiles<ROWS - 1>(matrix, x, rows, column, count, y);
    constexpr int AT_ONCE = ROWS <= 2 ? COLUMNS_AT_ONCE : ROWS <= 4 ? 2 : 1;
    int c = 0;
    for (; c + AT_ONCE <= count; c += AT_ONCE) tile<ROWS, AT_ONCE>(matrix, x, column + c, y + c);
    if constexpr (AT_ONCE > 1)
        for (; c < count; ++c) tile<ROWS, 1>(matrix, x, column + c, y + c);
}

// y (rows, COLUMNS_AT_ONCE): `count` outputs from `column` on, COLUMNS_AT_ONCE at most, of all rows of x (rows, in).
template <class Matrix>
__attribute__((noinline)) void outputs(const Matrix& matrix, const float* x, int64_t rows, int64_t column, int count, float* y) {
    for (; rows > 0; rows -= ROWS_AT_ONCE, x += ROWS_AT_ONCE * matrix.in, y += ROWS_AT_ONCE * COLUMNS_AT_ONCE)
        tiles<ROWS_AT_ONCE>(matrix, x, rows, column, count, y);
}

template <class Number>
inline float dot(const float* a, const Number* b, int64_t length) {
    Floats sums = {};
    int64_t k = 0;
    for (; k + LANES <= length; k += LANES) sums = multiply_add(load<Floats>(a + k), widened(b + k), sums);
    float total = sum(sums);
    for (; k < length; ++k) total += a[k] * number(b[k]);
    return total;
}

}  // namespace
