// What the arithmetic of divergences and softmaxes begins with: exponents are to base 2.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define KDFAST_INLINE __host__ __device__ __forceinline__
#else
#define KDFAST_INLINE inline
#endif

namespace kdfast {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// One instruction, which takes results below 2^-126 to zero.
KDFAST_INLINE float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// Unlike fmaxf, NaN where either is; the host makes the GPU's, whose bits are all ones.
KDFAST_INLINE float max_or_nan(float a, float b) {
#ifdef __CUDA_ARCH__
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return std::isnan(a) || std::isnan(b) ? std::bit_cast<float>(0x7fffffff) : std::fmax(a, b);
#endif
}

}  // namespace kdfast
