// What the entry points of attention_map_kl tell its arithmetic. Plain data only: this header is
// compiled for several instruction sets.

#pragma once

#include <stdint.h>

#include "instruction_set.h"
#include "types.h"

namespace attention_map_kl {

using namespace kdfast;

// Maps [B, H, Nq, Nk] whose last dimension is dense; strides of the others, in elements.
struct Problem {
    Direction direction;
    Storage storage;
    bool scores;
    int64_t heads, queries, keys;
    const char *map_s, *map_t;
    int64_t stride_s[3], stride_t[3];
    const bool* mask;  // [B, Nk], or null
    int64_t mask_stride[2];
    char *rows, *inner, *lse_s, *lse_t;  // null for a gradient
    char* grad;                          // null for statistics
    const char* grad_rows;
    int64_t grad_rows_stride[3];
};

}  // namespace attention_map_kl

KDFAST_DECLARE(
    // Bytes that `attention_map_kl_rows` works in.
    int64_t attention_map_kl_scratch(const attention_map_kl::Problem&);
    // The rows from `begin` to `end`, counted through batch and heads.
    void attention_map_kl_rows(const attention_map_kl::Problem&, int64_t begin, int64_t end,
                               char* scratch))
