// What the entry points of cka tell its arithmetic. Plain data only: this header is compiled for
// several instruction sets. "Real" numbers are float, double for F64.

#pragma once

#include <stdint.h>

#include "instruction_set.h"
#include "types.h"

namespace cka {

using namespace kdfast;

// Features [problems, n, width] whose last dimension is dense; strides of the others, in elements.
struct Layer {
    const char* x;
    Storage storage;
    int64_t width, stride[2];
    double sigma;  // rbf: 0 for the default
    void* means;   // Real [problems][width]: of the valid rows, less the first of them
    void* unit;    // Real [problems]
    void* norms;   // Real [problems][n]: squared norms of the centred rows; linear: over the unit
    void* gram;    // Real [problems][n][n], or null
    void* sums;    // Real [problems][n]: of the rows of G, less its diagonal if unbiased; or null
    char* grad;    // [problems][n][width], or null
};

struct Pair {
    int32_t i, j;
    void* product;  // Real [problems][width of i][width of j]: X_i^T X_j over the roots of the units
};

// The rows that take part. Matrices of rows hold these alone, one after the other, from the top left
// corner on.
struct Rows {
    int64_t count;
    const int32_t* index;
};

struct Problem {
    bool f64, rbf, unbiased;  // f64: computed in double, and then every layer is stored so
    int64_t problems, n;
    int64_t layers, pairs;
    const Layer* layer;
    const Pair* pair;
    const Rows* rows;           // [problems]
    const double* total;        // [problems][layers]: sums of the norms
    const double* coefficient;  // backward: [problems][layers][layers], symmetric
};

// Some columns of a layer in one problem, and for gradients up to GRAM_ROWS of the valid rows.
// layer < 0: none.
struct Part {
    int64_t layer, problem, begin, end, row;
};

constexpr int64_t TILE = 128;         // rows and columns of a Gram matrix that are made at once
constexpr int64_t GRAM_ROWS = 128;    // rows whose gradient is made at once on the Gram side
constexpr int64_t ROWS_A_SHARE = 96;  // and on the feature side

// What memory is asked for.
enum Work {
    GRAM_PART,
    GRAM_INNER,
    GRAM_GRADIENT,
    FEATURE_PART,
    FEATURE_GRADIENT,
    TILE_INNER,
    TILE_GRADIENT,
    ROWS_OF_COLUMNS,  // means, norms, packing, shifts
};

}  // namespace cka

// In the order in which they are called. Problems have as many valid rows as the estimator needs.
KDFAST_DECLARE(
    // Bytes that some work takes place in.
    int64_t cka_scratch(const cka::Problem&, cka::Work);

    // Means of the columns from `begin` to `end`; returns the sum of squares around them.
    double cka_means(const cka::Problem&, int64_t layer, int64_t problem, int64_t begin, int64_t end,
                     char* scratch);
    // Squared norms of the centred rows from `begin` to `end`; needs units and means.
    void cka_norms(const cka::Problem&, int64_t layer, int64_t problem, int64_t begin, int64_t end,
                   char* scratch);

    // Gram side. Bytes of a sum; the sum over the columns of a part, with their means; unit and G
    // from all sums. The next part's memory is fetched meanwhile.
    int64_t cka_gram_bytes(const cka::Problem&);
    void cka_gram_part(const cka::Problem&, const cka::Part&, const cka::Part& next, char* sum,
                       char* scratch);
    void cka_gram_finish(const cka::Problem&, int64_t layer, int64_t problem, char* sums,
                         int64_t parts);
    // The sums of the rows of G without its diagonal, for the unbiased estimator.
    void cka_gram_sums(const cka::Problem&, int64_t layer, int64_t problem);
    // Over the rows from `begin` to `end`, [pairs][2]: inner products as the estimator asks, and
    // biased ones.
    void cka_gram_inner(const cka::Problem&, int64_t problem, int64_t begin, int64_t end,
                        double* inner, char* scratch);
    void cka_gram_gradient(const cka::Problem&, const cka::Part&, const cka::Part& next,
                           char* scratch);

    // Feature side; needs means and units. Bytes of the sums of all pairs; sums over the rows from
    // `begin` to `end`; a product from all sums, which lie one after the other; its squared norm.
    int64_t cka_feature_bytes(const cka::Problem&);
    void cka_feature_part(const cka::Problem&, int64_t problem, int64_t begin, int64_t end,
                          char* sums, char* scratch);
    void cka_feature_finish(const cka::Problem&, int64_t pair, int64_t problem, char* sums,
                            int64_t parts);
    double cka_feature_inner(const cka::Problem&, int64_t pair, int64_t problem);
    // The gradient of a layer, of the products with each other one (or null), packed; and of what
    // the unbiased estimator adds to every row.
    int64_t cka_feature_packed_bytes(const cka::Problem&, int64_t layer, int64_t other);
    void cka_feature_pack(const cka::Problem&, int64_t layer, int64_t other, int64_t problem,
                          char* packed, char* scratch);
    void cka_feature_shift(const cka::Problem&, int64_t layer, int64_t problem, char* shift,
                           char* scratch);
    void cka_feature_gradient(const cka::Problem&, int64_t layer, int64_t problem, int64_t begin,
                              int64_t end, const char* const* packed, const char* shift,
                              char* scratch);

    // Tiles; needs means, units, and norms for rbf or unbiased. Of rows I and columns J >= I:
    // their part of the inner products [pairs], without the diagonal where unbiased, and for rbf
    // the sums of the rows of G, Real [layers][tiles of columns][n].
    void cka_tile(const cka::Problem&, int64_t problem, int64_t i, int64_t j, double* inner,
                  char* row_sums, char* scratch);
    // The gradients of all layers for the rows of a tile.
    void cka_tile_gradient(const cka::Problem&, int64_t problem, int64_t i, char* scratch))
