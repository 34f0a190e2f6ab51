// What Ampere adds: products of small matrices by a warp (mma.sync), whose operands come from
// shared memory by ldmatrix. Lane 4 g + t of a warp holds, of operand A (16 x 16), the pairs that
// begin at (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8); of B (16 x 8) those that begin,
// downwards, at (2 t, g), (2 t + 8, g); of the result (16 x 8) (g, 2 t), (g, 2 t + 1), (g + 8,
// ..), ...

#ifndef KDFAST_AMPERE_CUH  // tests/csrc defines it, and gives simulated ones
#define KDFAST_AMPERE_CUH

#include "hopper.cuh"

namespace kdfast::ampere {

// All groups of copies but the last PENDING are in shared memory, for this thread.
template <int PENDING>
__device__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four matrices of 8 x 8; lane i names row i % 8 of matrix i / 8, and gets the pair (g, 2 t) of
// each.
__device__ inline void load_matrices(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}
// The same of their transposes: the pair that begins, downwards, at (2 t, g).
__device__ inline void load_transposed(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

// Of one matrix of 8 x 8 in registers: the pair (g, 2 t) of its transpose, from that of itself.
__device__ inline uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// z += A B; z points to four registers.
template <typename T>
__device__ void multiply_add(float* z, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define KDFAST_MULTIPLY(TYPE)                                                              \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "                       \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                    \
      : "+f"(z[0]), "+f"(z[1]), "+f"(z[2]), "+f"(z[3])                                     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, __half>) KDFAST_MULTIPLY("f16");
  else KDFAST_MULTIPLY("bf16");
#undef KDFAST_MULTIPLY
}

}  // namespace kdfast::ampere

#endif  // KDFAST_AMPERE_CUH
