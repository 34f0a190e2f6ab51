// Matrix products of operands that are prepared by whoever needs them.
//
// The right operand lies in panels of up to three vectors of columns, [depth][columns] each, the left
// one anyhow. Left operands and outputs have room for `padded` rows, outputs for whole panels.

#pragma once

#include "vector.h"

namespace KDFAST_ISA {

namespace {

// How many rows of `vectors` accumulators fill the registers.
template <class Real>
constexpr int rows_of(int vectors) {
    return (LANES<Real> == 2 ? 6 : VECTOR_BYTES == 64 ? 24 : 12) / vectors;
}

// Columns of a panel of three vectors: a multiple of every number of rows.
template <class Real>
constexpr int64_t WIDEST = 3 * LANES<Real>;

static inline int64_t padded(int64_t rows) {
    return round_up(rows, 48);
}

constexpr int64_t DEPTH = 256;  // of a panel that stays in the first cache

// Where the left operand's numbers lie.
template <class Real>
struct Left {
    const Real* start;
    int64_t block, row, step;  // from WIDEST rows to the next, from row to row, along the depth

    // A matrix [rows][stride].
    static Left by_rows(const Real* start, int64_t stride) {
        return {start, WIDEST<Real> * stride, stride, 1};
    }
    // Panels, all of them three vectors wide.
    static Left by_panels(const Real* start, int64_t depth) {
        return {start, WIDEST<Real> * depth, 1, WIDEST<Real>};
    }
    const Real* at(int64_t r, int64_t k) const {
        return start + r / WIDEST<Real> * block + r % WIDEST<Real> * row + k * step;
    }
};

// Panels are three vectors wide, the last ones two where that leaves less over.
template <class Real>
struct Panels {
    int64_t vectors, count, wide;

    explicit Panels(int64_t columns) {
        vectors = (columns + LANES<Real> - 1) / LANES<Real>;
        count = (vectors + 2) / 3;
        wide = count - (3 * count - vectors);
    }

    int64_t columns() const { return vectors * LANES<Real>; }
    int width_in_vectors(int64_t panel) const {
        return wide < 0 ? 1 : panel < wide ? 3 : 2;  // wide < 0: one vector in all
    }
    int64_t begin(int64_t panel) const {
        return LANES<Real> * (panel < wide ? 3 * panel : 2 * panel + most(wide, 0));
    }
    int64_t width(int64_t panel) const { return LANES<Real> * width_in_vectors(panel); }
};

// Brings rows of memory into the cache while something else is computed.
struct Ahead {
    static constexpr int64_t LINE = 64;
    const char* start = nullptr;
    int64_t stride = 0, bytes = 0, rows = 0;
    const int32_t* index = nullptr;  // of the rows
    int64_t row = 0, at = 0, step = 0;

    // In so many calls of `fetch`.
    void within(int64_t calls) {
        step = ((bytes + LINE - 1) / LINE * (rows - row) + calls - 1) / most(calls, 1);
    }

    void fetch() {
        for (int64_t i = 0; i < step && row < rows; i++) {
            __builtin_prefetch(start + index[row] * stride + at, 0, 2);
            at += LINE;
            if (at >= bytes) at = 0, row++;
        }
    }
};

// c [rows_of<Real>(V)][V vectors] += a x b, or =; a(r, k) = a[r * a_r + k * a_k].
template <class Real, int V>
static NOINLINE void multiply_panel(const Real* a, int64_t a_r, int64_t a_k, const Real* b,
                                    int64_t depth, Real* c, int64_t stride, bool first) {
    constexpr int lanes = LANES<Real>, R = rows_of<Real>(V);
    Vec<Real> sum[R][V] = {};
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; k++, a += a_k, b += V * lanes) {
        Vec<Real> row[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            row[v] = load<Real>(b + v * lanes);
            hold(row[v]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const Vec<Real> factor = splat<Real>(a[r * a_r]);
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) sum[r][v] += factor * row[v];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            Real* to = c + r * stride + v * lanes;
            store<Real>(to, first ? sum[r][v] : sum[r][v] + load<Real>(to));
        }
    }
}

// c [rows, padded][stride] += a x b, or = where `first`; b in panels of `depth`. Where `upper`, what
// lies below the diagonal is not needed (and only partly made).
template <class Real>
static void multiply(const Left<Real>& a, int64_t rows, const Real* b, const Panels<Real>& panels,
                     int64_t depth, Real* c, int64_t stride, bool first, bool upper = false,
                     Ahead* ahead = nullptr) {
    if (ahead != nullptr) {
        const int64_t tiles = rows * panels.columns() / (12 * LANES<Real>) / (upper ? 2 : 1);
        ahead->within(tiles * ((depth + DEPTH - 1) / DEPTH));
    }
    for (int64_t k = 0; k < depth; k += DEPTH) {
        const int64_t now = least(DEPTH, depth - k);
        for (int64_t p = 0; p < panels.count; p++) {
            const int64_t begin = panels.begin(p), width = panels.width(p);
            const int vectors = panels.width_in_vectors(p);
            const Real* panel = b + begin * depth + k * width;
            const int64_t end = upper ? least(rows, begin + width) : rows;
            const auto function = vectors == 3   ? multiply_panel<Real, 3>
                                  : vectors == 2 ? multiply_panel<Real, 2>
                                                 : multiply_panel<Real, 1>;
            for (int64_t r = 0; r < end; r += rows_of<Real>(vectors)) {
                if (ahead != nullptr) ahead->fetch();
                function(a.at(r, k), a.row, a.step, panel, now, c + r * stride + begin, stride,
                         first && k == 0);
            }
        }
    }
}

// Panels [depth][columns] of `rows`, a matrix [depth][stride] that is padded with zeros to whole
// vectors.
template <class Real>
static void pack(const Real* rows, int64_t stride, int64_t depth, const Panels<Real>& panels,
                 Real* out) {
    for (int64_t p = 0; p < panels.count; p++) {
        const int64_t begin = panels.begin(p), vectors = panels.width_in_vectors(p);
        Real* to = out + begin * depth;
        for (int64_t k = 0; k < depth; k++) {
            for (int64_t v = 0; v < vectors; v++, to += LANES<Real>) {
                store<Real>(to, load<Real>(rows + k * stride + begin + v * LANES<Real>));
            }
        }
    }
}

// The same of the transposed matrix [columns, padded with zero rows to whole vectors][stride], whose
// `depth` is a whole number of vectors.
template <class Real>
static void pack_transposed(const Real* rows, int64_t stride, int64_t depth,
                            const Panels<Real>& panels, Real* out) {
    for (int64_t p = 0; p < panels.count; p++) {
        const int64_t begin = panels.begin(p), width = panels.width(p);
        for (int64_t v = 0; v < width; v += LANES<Real>) {
            transpose<Real>(rows + (begin + v) * stride, stride, depth, out + begin * depth + v,
                            width);
        }
    }
}

}  // namespace

}  // namespace KDFAST_ISA
