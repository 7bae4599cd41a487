// y = x W^T for a few rows of x, where reading W is most of the work: each weight is read once, in the order in which it lies.
//
// A matrix says how it is read: walk<COLUMNS>(column, visit) calls visit(c, k, weights) for each of COLUMNS rows of W (columns of y)
// from `column` on and each LANES numbers of it; the same numbers of x, load(x + k), belong to them. What a sum adds up, and in which
// order, depends on the weight alone: a row of x gives the same bits by itself and beside others, whatever tile it falls into.

#pragma once
#include "cpu_lanes.h"
#include "cpu_twelve_bit.h"

namespace {

constexpr int ROWS_AT_ONCE = 8;     // those whose sums stay in registers
constexpr int COLUMNS_AT_ONCE = 4;  // outputs that one iteration of a loop over threads computes
// Bytes before a weight is read it is asked for, where so many outputs are computed at once: the hardware sees too late what comes.
constexpr int64_t ahead(int columns) { return 2048 * columns; }

// (out, in) in fp32 or bf16; in is a multiple of LANES.
template <class Number>
struct DenseMatrix {
    const Number* numbers;
    int64_t in;

    template <int COLUMNS, class Visit>
    inline ALWAYS_INLINE void walk(int64_t column, Visit visit) const {
        const Number* rows = numbers + column * in;
        for (int64_t k = 0; k < in; k += LANES)
            each<COLUMNS>([&](int c) ALWAYS_INLINE {
                const Number* at = rows + c * in + k;
                __builtin_prefetch(reinterpret_cast<const char*>(at) + ahead(COLUMNS));
                visit(c, k, widened(at));
            });
    }
};

// (out, in) in 8 bits: each code times the scale of its block, see eight_bit.py. in is a multiple of block, and that of LANES.
struct EightBitMatrix {
    const int8_t* codes;
    const float* scales;  // (out, in / block)
    int64_t in, block;

    template <int COLUMNS, class Visit>
    inline ALWAYS_INLINE void walk(int64_t column, Visit visit) const {
        const int8_t* rows = codes + column * in;
        const int64_t blocks = in / block;
        for (int64_t b = 0; b < blocks; ++b) {
            float scale[COLUMNS];
            each<COLUMNS>([&](int c) ALWAYS_INLINE {
                scale[c] = scales[(column + c) * blocks + b];
                __builtin_prefetch(rows + c * in + b * block + ahead(COLUMNS));
            });
            for (int64_t k = b * block, end = k + block; k < end; k += LANES)
                each<COLUMNS>([&](int c) ALWAYS_INLINE { visit(c, k, widened(rows + c * in + k) * scale[c]); });
        }
    }
};

// (out, in) in 12 bits; in is a multiple of 64.
struct TwelveBitMatrix {
    const TwelveBit& weight;
    int64_t in;

    template <int COLUMNS, class Visit>
    inline ALWAYS_INLINE void walk(int64_t column, Visit visit) const {
        TwelveBitRow rows[COLUMNS];
        UpperBytes tables[COLUMNS];
        each<COLUMNS>([&](int c) ALWAYS_INLINE {
            rows[c] = TwelveBitRow(weight, column + c, in);
            tables[c] = upper_bytes(rows[c]);
        });
        for (int64_t block = 0; block < in / BLOCK_NUMBERS; ++block)
            each<COLUMNS>([&](int c) ALWAYS_INLINE {
                const int64_t k = block * BLOCK_NUMBERS;
                const uint8_t* bytes = rows[c].bytes(block);
                prefetch_block(bytes + ahead(COLUMNS));
                if (!rows[c].is_apart(block))
                    return numbers_of(bytes, tables[c], [&](int64_t i, Floats weights) ALWAYS_INLINE { visit(c, k + i, weights); });
                each<BLOCK_NUMBERS / LANES>([&](int i) ALWAYS_INLINE {
                    visit(c, k + i * LANES, widened(rows[c].numbers + i * LANES));
                });
                rows[c].take_next();
            });
    }
};

// (out, in) in 4 bits; in is a multiple of 2 LANES, and so is the block size. x is laid out as split() does, or codes are: of each
// 2 LANES of them the first ones in the high nibbles, and x as it is.
struct PackedMatrix {
    const Weight& weight;
    int64_t in;
    Table levels;

    PackedMatrix(const Weight& weight, int64_t in) : weight(weight), in(in), levels(load<Table>(weight.levels)) {}

    // A sum begins at +0 and so never sees whether a weight of zero is -0: no "+ 0" as in dequantize.
    inline ALWAYS_INLINE Table table_of(int64_t block) const {
        Table table = levels;
        const float scale = weight.scale(block);
        each<16 / LANES>([&](int part) ALWAYS_INLINE { table.part[part] *= scale; });
        if (weight.least) each<16 / LANES>([&](int part) ALWAYS_INLINE { table.part[part] += weight.least[block]; });
        return table;
    }

    template <class Visit>
    inline ALWAYS_INLINE void step(const Table& table, int64_t at, int c, int64_t k, Visit visit) const {
        const Ints bytes = bytes_at(weight.packed + (at >> 1));
        visit(c, k, look_up(table, bytes >> 4));
        visit(c, k + LANES, look_up(table, bytes));
    }

    template <int COLUMNS, class Visit>
    inline ALWAYS_INLINE void walk(int64_t column, Visit visit) const {
        const int64_t start = column * in, size = int64_t(1) << weight.block_shift, blocks = in >> weight.block_shift;
        Table tables[COLUMNS];
        if (blocks << weight.block_shift != in) {  // a block may go on in the next row
            for (int64_t k = 0; k < in; k += 2 * LANES)
                each<COLUMNS>([&](int c) ALWAYS_INLINE {
                    const int64_t at = start + c * in + k;
                    if (k == 0 || at % size == 0) tables[c] = table_of(at >> weight.block_shift);
                    step(tables[c], at, c, k, visit);
                });
            return;
        }
        for (int64_t block = 0; block < blocks; ++block) {
            each<COLUMNS>([&](int c) ALWAYS_INLINE {
                tables[c] = table_of((column + c) * blocks + block);
                __builtin_prefetch(weight.packed + ((start + c * in + block * size) >> 1) + ahead(COLUMNS));
            });
            for (int64_t k = block * size, end = k + size; k < end; k += 2 * LANES)
                each<COLUMNS>([&](int c) ALWAYS_INLINE { step(tables[c], start + c * in + k, c, k, visit); });
        }
    }
};

// The same with an x as it is, for rows that are no multiple of 2 LANES.
struct OrderedMatrix {
    const Weight& weight;
    int64_t in;

    template <int COLUMNS, class Visit>
    inline ALWAYS_INLINE void walk(int64_t column, Visit visit) const {
        const PackedMatrix packed(weight, in);
        const int64_t size = int64_t(1) << weight.block_shift;
        Table tables[COLUMNS];
        for (int64_t k = 0; k < in; k += LANES)
            each<COLUMNS>([&](int c) ALWAYS_INLINE {
                const int64_t at = (column + c) * in + k;
                if (k == 0 || at % size == 0) tables[c] = packed.table_of(at >> weight.block_shift);
                visit(c, k, look_up(tables[c], codes_at(weight.packed + (at >> 1))));
            });
    }
};

// No matrix: of a product only what an adapter adds.
struct NoMatrix {
    static constexpr int64_t in = 0;

    template <int COLUMNS, class Visit>
    inline ALWAYS_INLINE void walk(int64_t, Visit) const {}
};

// x for PackedMatrix: of each 2 LANES numbers the even ones first, which are the high nibbles, then the odd ones.
inline void split(const float* x, int64_t length, float* out) {
    for (int64_t k = 0; k < length; k += 2 * LANES)
        for (int i = 0; i < LANES; ++i) {
            out[k + i] = x[k + 2 * i];
            out[k + LANES + i] = x[k + 2 * i + 1];
        }
}

// What a low-rank adapter adds to a product, scaling * down B^T with down = x A^T: its sums begin with it, which costs a
// multiply-add an output instead of a sum of its own.
struct Added {
    const void* B;      // (out, rank) in fp32 or bf16, null for nothing
    const float* down;  // (rows, rank)
    int64_t rank;
    float scaling;
    bool is_bf16;  // B
};

// Not by vectors(): its lambda is not inlined for certain, and then the sums leave the registers (8 rows: a third more time).
template <int ROWS, int COLUMNS>
inline void begin(const Added& added, int64_t column, Floats* sums) {
    const auto some_ranks = [&](const auto* B, int64_t r, auto numbers_at) ALWAYS_INLINE {
        Floats up[COLUMNS];
        each<COLUMNS>([&](int c) ALWAYS_INLINE { up[c] = numbers_at(B + (column + c) * added.rank + r); });
        each<ROWS>([&](int row) ALWAYS_INLINE {
            const Floats down = numbers_at(added.down + row * added.rank + r) * added.scaling;
            each<COLUMNS>([&](int c) ALWAYS_INLINE {
                sums[row * COLUMNS + c] = multiply_add(up[c], down, sums[row * COLUMNS + c]);
            });
        });
    };
    const auto all_ranks = [&](const auto* B) ALWAYS_INLINE {
        int64_t r = 0;
        for (; r + LANES <= added.rank; r += LANES) some_ranks(B, r, [](const auto* at) ALWAYS_INLINE { return widened(at); });
        if (const int64_t rest = added.rank - r)
            some_ranks(B, r, [=](const auto* at) ALWAYS_INLINE { return load_first(at, rest); });
    };
    added.is_bf16 ? all_ranks(static_cast<const uint16_t*>(added.B)) : all_ranks(static_cast<const float*>(added.B));
}

// y (rows, COLUMNS_AT_ONCE): COLUMNS outputs from `column` on, of ROWS rows of x.
template <int ROWS, int COLUMNS, class Matrix>
inline void tile(const Matrix& matrix, const float* x, int64_t column, const Added& added, float* y) {
    Floats sums[ROWS * COLUMNS] = {};
    if (added.B) begin<ROWS, COLUMNS>(added, column, sums);
    matrix.template walk<COLUMNS>(column, [&](int c, int64_t k, Floats weights) ALWAYS_INLINE {
        each<ROWS>([&](int row) ALWAYS_INLINE {
            Floats& total = sums[row * COLUMNS + c];
            total = multiply_add(weights, load<Floats>(x + row * matrix.in + k), total);
        });
    });
    each<ROWS * COLUMNS>([&](int i) ALWAYS_INLINE { y[i / COLUMNS * COLUMNS_AT_ONCE + i % COLUMNS] = sum(sums[i]); });
}

// `count` outputs of at most ROWS rows. Few rows leave registers for the sums of several outputs.
template <int ROWS, class Matrix>
inline void tiles(const Matrix& matrix, const float* x, int64_t rows, int64_t column, int count, const Added& added, float* y) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return tiles<ROWS - 1>(matrix, x, rows, column, count, added, y);
    constexpr int AT_ONCE = ROWS <= 2 ? COLUMNS_AT_ONCE : 2;
    int c = 0;
    for (; c + AT_ONCE <= count; c += AT_ONCE) tile<ROWS, AT_ONCE>(matrix, x, column + c, added, y + c);
    for (; c < count; ++c) tile<ROWS, 1>(matrix, x, column + c, added, y + c);
}

// y (rows, COLUMNS_AT_ONCE): `count` outputs from `column` on, COLUMNS_AT_ONCE at most, of at most ROWS_AT_ONCE rows of x.
template <class Matrix>
__attribute__((noinline)) void some_rows(const Matrix& matrix, const float* x, int64_t rows, int64_t column, int count,
                                         const Added& added, float* y) {
    tiles<ROWS_AT_ONCE>(matrix, x, rows, column, count, added, y);
}

// Calls store(row, column, value) for these outputs of all rows of x (rows, in).
template <class Matrix, class Store>
inline void outputs(const Matrix& matrix, const float* x, int64_t rows, int64_t column, int count, Added added, Store store) {
    for (int64_t first = 0; first < rows; first += ROWS_AT_ONCE) {
        const int64_t some = rows - first < ROWS_AT_ONCE ? rows - first : ROWS_AT_ONCE;
        float y[ROWS_AT_ONCE * COLUMNS_AT_ONCE];
        some_rows(matrix, x + first * matrix.in, some, column, count, added, y);
        added.down += some * added.rank;
        for (int64_t row = 0; row < some; ++row)
            for (int c = 0; c < count; ++c) store(first + row, column + c, y[row * COLUMNS_AT_ONCE + c]);
    }
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
