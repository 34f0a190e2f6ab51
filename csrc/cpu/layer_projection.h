// What the entry points of layer_projection tell its arithmetic. Plain data only: this header is
// compiled for several instruction sets.

#pragma once

#include <stdint.h>

#include "instruction_set.h"
#include "types.h"

namespace layer_projection {

using namespace kdfast;

enum Pass { PROJECT, PROJECT_BACKWARD, LOSS, LOSS_BACKWARD };
enum Objective { MSE, COSINE, KL };

constexpr int MOST_LAYERS = 64;  // a side

// [A, B, d], whose last dimension is dense; strides of the others, in elements.
struct Layer {
    const char* start;
    int64_t stride[2];
    Storage storage;
};

struct Problem {
    Pass pass;
    Objective objective;
    bool losses;  // attend="losses"
    double scale, temperature;
    bool f64;                // computed in double, and then every layer is stored so
    Storage storage_out[2];  // of what is written for the student, and for the teacher
    int64_t tokens, inner, width, many_s, many_t;  // A B, B, d
    Layer layers[2 * MOST_LAYERS];                 // the student's, then the teacher's
    const bool* mask;                              // [A, B], or null
    int64_t mask_stride[2];
    const char* grad_rows;  // [A, B, L_s]
    int64_t grad_rows_stride[3];
    Layer grad_projected[MOST_LAYERS];
    const char* grad_weights;  // [A, B, L_s, L_t], contiguous
    bool stream;               // what is written is too large for the caches
    char *rows, *weights;      // null where not asked for
    char* out[2 * MOST_LAYERS];  // projected states, or gradients of layers; null where not wanted
};

}  // namespace layer_projection

KDFAST_DECLARE(
    // Bytes that `layer_projection_tokens` works in.
    int64_t layer_projection_scratch(const layer_projection::Problem&);
    // The tokens from `begin` to `end`.
    void layer_projection_tokens(const layer_projection::Problem&, int64_t begin, int64_t end,
                                 char* scratch))
