// What the entry points of attention_kl tell its arithmetic. Plain data only: this header is
// compiled for several instruction sets.

#pragma once

#include <stdint.h>

#include "instruction_set.h"
#include "types.h"

namespace attention_kl {

using namespace kdfast;

// One model's half of a layer pair: queries [B, H, Nq, d] and keys [B, H_kv, Nk, d].
struct Side {
    const char *query, *key;
    Storage storage;
    int64_t query_stride[3], key_stride[3];  // of batch, head, token, in elements
    int64_t heads, key_heads, width;
    double scale;
};

struct Pair {
    Side s, t;
    int64_t first_head_s, first_head_t;  // among the heads of all pairs
    char *grad_query, *grad_key;
    double factor;  // of the gradients
};

// What one batch element shows: the rows that take part, the keys that at least one of them sees,
// and each row's interval of those keys. Both ends of the intervals never decrease.
struct Visible {
    int64_t rows, keys;
    const int32_t *row, *first, *last;  // [rows]
    const int32_t* key;                 // [keys]
};

// A share of the query tiles of one student key head, or of all of them with `mean_heads`.
struct Item {
    int32_t pair, batch, key_head, part, parts;
    char* grad_key;  // the share's own sum where there are several, [key heads, keys, width]
    double loss;
};

struct Problem {
    Direction direction;
    Storage gradient_storage;
    bool f64;  // computed in double, and then both sides are stored so
    bool mean_heads, gradients, tokens_first;
    int64_t batch, queries, keys, heads_s, heads_t;  // heads of all pairs
    const Pair* pairs;
    const Visible* visible;  // [batch]
    char *rows, *inner, *lse_s, *lse_t;
    const char* grad_rows;  // null: 1
    int64_t grad_rows_stride[3];
};

}  // namespace attention_kl

KDFAST_DECLARE(
    // Bytes that `attention_kl_item` works in, and those of one share's gradient of the keys.
    int64_t attention_kl_scratch(const attention_kl::Problem&, int64_t pairs);
    int64_t attention_kl_grad_key(const attention_kl::Problem&, const attention_kl::Item&);
    // `next` is what the thread will probably do afterwards, or null.
    void attention_kl_item(const attention_kl::Problem&, attention_kl::Item&,
                           const attention_kl::Item* next, char* scratch);
    // Adds up the shares of a key head, in their order, and writes them where they belong.
    void attention_kl_finish(const attention_kl::Problem&, const attention_kl::Item* shares))
