// The arithmetic of layer_projection's objectives, for the kernels and for the host.
//
// A state h is compared with a target c, which is the mixture C_i of the teacher's states or one of
// them. What that needs of a whole row is a Row of either and one sum over both:
//
//     mse                                    sum (h - c)^2
//     cosine   first = sum of squares        sum h c
//     kl       first = max, second = l       sum e_c (u_c - u_h)
//
// with u = (x - max) log2(e) / temperature, e = 2^u and l = sum e. Then
//
//     mse  sum / d      cosine  1 - sum / |h||c|      kl  ln 2 (sum / l_c + log2(l_h / l_c))
//
// and the derivatives, as a factor and something of moderate size that half precision can hold:
//
//     by c     mse     4/d              times  (c - h) / 2
//              cosine  1/|c|            times  cos c/|c| - h/|h|
//              kl      (1 + loss) / T   times  p_c (log p_c/p_h - loss) / (1 + loss)
//     by h     mse     2/d (h - c)
//              cosine  (cos h/|h| - c/|c|) / |h|
//              kl      (p_h - p_c) / T

#pragma once

#include "exponential.cuh"

namespace kdfast::projection {

enum Objective : int { MSE, COSINE, KL };

struct Row {
  float first, second;
};

struct Options {
  Objective objective;
  float per_column;   // 1 / d
  float cold;         // 1 / temperature
  float exponent;     // log2(e) / temperature
};

// A state and its target, compared; six numbers whose meaning is the objective's.
struct Comparison {
  float loss, target;  // target: the factor of the derivative by c
  float k0, k1, k2, k3;
};

KDFAST_INLINE Comparison compare(const Options& options, Row h, Row c, float sum) {
  Comparison made{};
  if (options.objective == MSE) {
    made.loss = sum * options.per_column;
    made.target = 4.f * options.per_column;
    made.k0 = 2.f * options.per_column;
  } else if (options.objective == COSINE) {
    // sqrt and not the norm decides, so that NaN comes through.
    const float root_h = sqrtf(h.first), root_c = sqrtf(c.first);
    const float h_of = root_h < 1e-8f ? 1e-8f : root_h, c_of = root_c < 1e-8f ? 1e-8f : root_c;
    const float per_h = 1.f / h_of, per_c = 1.f / c_of, cosine = sum / (h_of * c_of);
    made.loss = 1.f - cosine;
    made.target = per_c;
    made.k0 = root_c < 1e-8f ? 0.f : cosine * per_c;
    made.k1 = per_h;
    made.k2 = root_h < 1e-8f ? 0.f : cosine * per_h * per_h;
    made.k3 = per_h * per_c;
  } else {
    const float log_ratio = log2f(h.second / c.second);
    made.loss = LN_2 * (sum / c.second + log_ratio);
    made.target = (1.f + made.loss) * options.cold;
    made.k0 = 1.f / h.second;
    made.k1 = 1.f / c.second;
    made.k2 = log_ratio;
    made.k3 = 1.f / (1.f + made.loss);
  }
  return made;
}

KDFAST_INLINE float exponent_of(const Options& options, float x, float largest) {
  return (x - largest) * options.exponent;
}

// What a column adds to the sum of `compare`.
template <Objective O>
KDFAST_INLINE float crossing(const Options& options, float h, float c, Row of_h, Row of_c) {
  if (O == MSE) return (c - h) * (c - h);
  if (O == COSINE) return h * c;
  const float u_h = exponent_of(options, h, of_h.first);
  const float u_c = exponent_of(options, c, of_c.first);
  const float e_c = exp2_fast(u_c);
  return e_c == 0.f ? 0.f : e_c * (u_c - u_h);
}

// The derivative by c, but for the factor `target`.
template <Objective O>
KDFAST_INLINE float by_target(const Options& options, const Comparison& x, float h, float c,
                              Row of_h, Row of_c) {
  if (O == MSE) return 0.5f * (c - h);
  if (O == COSINE) return x.k0 * c - x.k1 * h;
  const float u_h = exponent_of(options, h, of_h.first);
  const float u_c = exponent_of(options, c, of_c.first);
  const float p_c = exp2_fast(u_c) * x.k1;
  const float log_ratio = p_c == 0.f ? 0.f : (u_c - u_h + x.k2) * LN_2;
  return p_c * ((log_ratio - x.loss) * x.k3);
}

template <Objective O>
KDFAST_INLINE float by_state(const Options& options, const Comparison& x, float h, float c,
                             Row of_h, Row of_c) {
  if (O == MSE) return x.k0 * (h - c);
  if (O == COSINE) return x.k2 * h - x.k3 * c;
  const float p_h = exp2_fast(exponent_of(options, h, of_h.first)) * x.k0;
  const float p_c = exp2_fast(exponent_of(options, c, of_c.first)) * x.k1;
  return (p_h - p_c) * options.cold;
}

template <Objective O>
struct Of {
  static constexpr Objective OBJECTIVE = O;
};

// run(of), so that loops inside know the objective.
template <typename Run>
KDFAST_INLINE void with_objective(Objective objective, Run run) {
  if (objective == MSE) run(Of<MSE>());
  else if (objective == COSINE) run(Of<COSINE>());
  else run(Of<KL>());
}

}  // namespace kdfast::projection
