// The arithmetic of CKA's kernels, and where each number lies.
//
// G = X_c X_c^T / |X_c|^2 is a layer's normalised Gram matrix over its n valid rows, d its
// diagonal. As the rows of G add up to nothing,
//
//     <G, H> (biased)   = sum_{a != b} G H + sum_a d e
//     <G, H> (unbiased) = sum_{a != b} G H - 2 / (n - 2) sum_a d e + (sum d)(sum e) / ((n-1)(n-2)),
//
// and the gradient of <G, H> with respect to X is 2 / |X_c|^2 H' X_c, where H' is H (biased), or
// H + (e_a + e_b) / (n - 2) - (sum e) / ((n-1)(n-2)) with a diagonal of 0 (unbiased).

#pragma once

#include "exponential.cuh"

namespace kdfast::cka {

constexpr int MOST_ROWS = 128;
constexpr int CHUNK = 64;           // columns that are in shared memory at a time
constexpr int ROW_BYTES = CHUNK * 2;  // of a row of a tile

// Byte of the 16-byte unit `unit` of row `row` of a tile. Eight rows' units of equal number lie in
// different banks, as do eight units of one row.
KDFAST_INLINE constexpr int swizzled(int row, int unit) {
  return row * ROW_BYTES + (unit ^ row % 8) * 16;
}

// A Gram matrix of 32 W rows is held by W warps, as blocks of 16 x 16 on and above the diagonal.
// Warp s has those of the strips s and 2 W - 1 - s, together 2 W + 1.
template <int W>
struct Blocks {
  static constexpr int COUNT = 2 * W + 1;

  KDFAST_INLINE static constexpr bool of_first_strip(int s, int block) { return block + s < 2 * W; }
  KDFAST_INLINE static constexpr int row(int s, int block) {
    return 16 * (of_first_strip(s, block) ? s : 2 * W - 1 - s);
  }
  KDFAST_INLINE static constexpr int column(int s, int block) {
    return 16 * (of_first_strip(s, block) ? s + block : 4 * W - 1 - s - block);
  }
  KDFAST_INLINE static constexpr bool diagonal(int block) { return block == 0 || block == 2 * W; }
};

// Entry of a block that register i of a lane holds: two results of mma.sync side by side.
KDFAST_INLINE constexpr int entry_row(int lane, int i) { return lane / 4 + (i & 2) * 4; }
KDFAST_INLINE constexpr int entry_column(int lane, int i) {
  return lane % 4 * 2 + (i & 4) * 2 + (i & 1);
}

// To one unit in the last place, without the registers of a division.
KDFAST_INLINE float inverse(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.f / x;
#endif
}

// What an inner product is made of.
struct Sums {
  float apart = 0.f, diagonal = 0.f;  // of products of entries, off and on the diagonal

  KDFAST_INLINE float inner(float trace, float other_trace, int n, bool unbiased, bool own) const {
    if (n < (unbiased ? 4 : 2)) return 0.f;
    if (!unbiased) return apart + diagonal;
    const float value = apart - 2.f / (n - 2) * diagonal +
                        trace * other_trace / (float(n - 1) * float(n - 2));
    constexpr float EPS = 1.1920928955078125e-7f;
    return own && value <= 2.f * EPS * n * apart ? 0.f : value;
  }
};

// What H' has more than H off its diagonal, in the unbiased case.
struct Centring {
  float per_row, constant;

  KDFAST_INLINE Centring(float trace, int n)
      : per_row(1.f / (n - 2)), constant(trace / (float(n - 1) * float(n - 2))) {}
  KDFAST_INLINE float operator()(float e_a, float e_b) const {
    return (e_a + e_b) * per_row - constant;
  }
};

}  // namespace kdfast::cka
