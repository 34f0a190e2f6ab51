// The arithmetic of attention_map_kl, for the kernels and for tests on the host.
//
// Logarithms are to base 2 inside. With u = (x - max) log2(e) of each side's scores x, e = 2^u and
// l = sum e, one sweep gives a = sum_j e_t (u_t - u_s) and
//
//     KL(t || s) = ln 2 (a / l_t + log2(l_s / l_t)).
//
// EXACT chooses accurate logarithms, for float32 maps; for half precision maps those of the special
// function unit are as good as the maps.

#pragma once

#include "exponential.cuh"

namespace kdfast::map {

enum Direction : int { FORWARD, REVERSE, JS };

KDFAST_INLINE float infinity() { return HUGE_VALF; }

// To one unit in the last place.
KDFAST_INLINE float inverse(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.f / x;
#endif
}

template <bool EXACT>
KDFAST_INLINE float log_of(float x) {
#ifdef __CUDA_ARCH__
  return EXACT ? logf(x) : __logf(x);
#else
  return std::log(x);
#endif
}

// p value, with 0 (anything) = 0.
KDFAST_INLINE float expectation(float p, float value) { return p == 0.f ? 0.f : p * value; }

// log((1 + e^-|x|) / 2), the even part of the log-ratios to the middle; exactly 0 at 0.
template <bool EXACT>
KDFAST_INLINE float even_part(float x) {
  if (EXACT) return log1pf(0.5f * expm1f(-fabsf(x)));
  return log_of<false>(0.5f + 0.5f * exp2_fast(-fabsf(x) * LOG2_E));
}

// log p - log((p + q) / 2) for x = log q - log p. NaN of x is in `even`.
KDFAST_INLINE float log_ratio_to_middle(float x, float even) { return -(fmaxf(x, 0.f) + even); }

// Sums over a row of probabilities.
struct Terms {
  float divergence = 0.f;  // KL(t || s); for js KL(t || m)
  float inner = 0.f;       // for js KL(s || m)
};

// Logarithms of everything doubled: the middle would be 0 where the sum is the smallest float.
template <bool EXACT>
KDFAST_INLINE void add_probabilities(Terms& terms, float p_s, float p_t, bool js) {
  float log_s = log_of<EXACT>(2.f * p_s), log_t = log_of<EXACT>(2.f * p_t);
  if (!js) {
    terms.divergence += expectation(p_t, log_t - log_s);
    return;
  }
  float log_m = log_of<EXACT>(p_s + p_t);
  terms.divergence += expectation(p_t, log_t - log_m);
  terms.inner += expectation(p_s, log_s - log_m);
}

// The gradient with respect to p_s, for an upstream gradient of 1.
template <bool EXACT>
KDFAST_INLINE float gradient_of_probability(float p_s, float p_t, Direction direction) {
  if (direction == FORWARD) return p_t == 0.f ? 0.f : -p_t / p_s;
  if (p_s == 0.f) return 0.f;
  float log_s = log_of<EXACT>(2.f * p_s);
  if (direction == REVERSE) return log_s - log_of<EXACT>(2.f * p_t) + 1.f;
  return 0.5f * (log_s - log_of<EXACT>(p_s + p_t));
}

// The exponent u of a score: exactly 0 for the largest.
KDFAST_INLINE float shifted(float x, float largest) { return (x - largest) * LOG2_E; }

// The terms of one entry for js.
template <bool EXACT>
KDFAST_INLINE void add_scores_js(Terms& terms, float u_s, float u_t, float p_s, float p_t,
                                 float log2_ratio_l) {
  float x = (u_s - u_t - log2_ratio_l) * LN_2;  // log p_s - log p_t
  float even = even_part<EXACT>(x);
  terms.divergence += expectation(p_t, log_ratio_to_middle(x, even));
  terms.inner += expectation(p_s, log_ratio_to_middle(-x, even));
}

// The gradient with respect to a student's score, for an upstream gradient of 1. `divergence` is
// the row's KL for reverse, KL(s || m) for js.
template <bool EXACT>
KDFAST_INLINE float gradient_of_score(float u_s, float u_t, float p_s, float p_t,
                                      float log2_ratio_l, float divergence, Direction direction) {
  if (direction == FORWARD) return p_s - p_t;
  float x = (u_s - u_t - log2_ratio_l) * LN_2;
  float log_ratio = direction == REVERSE ? x : log_ratio_to_middle(-x, even_part<EXACT>(x));
  // Where p_s = 0 the divergence still counts: it may be NaN.
  float value = p_s * ((p_s == 0.f ? 0.f : log_ratio) - divergence);
  return direction == REVERSE ? value : 0.5f * value;
}

}  // namespace kdfast::map
