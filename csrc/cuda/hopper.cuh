// What Hopper adds: products of tiles in shared memory (wgmma), and copies that run by themselves.
//
// A warpgroup (128 threads) multiplies tiles of 64 rows. Tiles have rows of 128 bytes and the
// 128-byte swizzle. Other architectures get declarations without bodies.

#ifndef KDFAST_HOPPER_CUH  // tests/csrc defines it, and gives simulated ones
#define KDFAST_HOPPER_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace kdfast::hopper {

constexpr int ACCUMULATOR = 32;  // registers of a thread: 64 x 64 numbers by 128 threads

// The address of shared memory, and back.
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ inline char* shared_pointer(uint32_t address) {
  return static_cast<char*>(__cvta_shared_to_generic(address));
}

// Zeros when not valid; `source` is then not read.
__device__ inline void copy_16(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void copy_4(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(source),
               "r"(valid ? 4 : 0)
               : "memory");
}
__device__ inline void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// A barrier in two parts. A warp arrives when its copies, all but the last PENDING groups of them,
// are in shared memory, and is done with what it has multiplied so far; and waits, later, for all
// others to have arrived as often as it has. In between the warpgroups go at their own pace.
struct Turns {
  uint32_t barrier;
  int arrivals = 0;

  // By all threads, before a __syncthreads.
  __device__ Turns(uint32_t barrier, int warps) : barrier(barrier) {
    if (threadIdx.x == 0)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(warps) : "memory");
  }
  template <int PENDING>
  __device__ void arrive() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // shows the copies to wgmma
    __syncwarp();
    if (threadIdx.x % 32 == 0)
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
    ++arrivals;
  }
  __device__ void wait() const {
    asm volatile(
        "{ .reg .pred done;\n"
        "again%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again%=; }" ::"r"(barrier),
        "r"((arrivals - 1) & 1)
        : "memory");
    __syncwarp();  // products are made by whole warps
  }
};

// Copies of whole rows that run by themselves, one round after the other: each is announced with
// its bytes, and all threads wait for the last of them. Addresses and bytes are multiples of 16.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool BULK_COPIES = true;
#else
constexpr bool BULK_COPIES = false;
#endif

struct Arrivals {
  uint32_t barrier;
  int rounds = 0;

  // By all threads, before a __syncthreads.
  __device__ explicit Arrivals(uint32_t barrier) : barrier(barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
#endif
  }
  // By all threads, once none uses what is overwritten.
  __device__ void announce(int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (threadIdx.x == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                   "r"(bytes)
                   : "memory");
#endif
    ++rounds;
  }
  // By any thread; it may run ahead of the one that announces.
  __device__ void copy(uint32_t target, const void* source, int bytes) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(target),
        "l"(source), "r"(bytes), "r"(barrier)
        : "memory");
#endif
  }
  __device__ void wait() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred done;\n"
        "again%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again%=; }" ::"r"(barrier),
        "r"((rounds - 1) & 1)
        : "memory");
#endif
  }
};

// Lets nothing land later.
__device__ inline void all_copies_done() {
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncthreads();
}

// Products

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_end() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>
__device__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving accesses to registers that wgmma reads or writes.
template <typename R, int COUNT>
__device__ void hold(R (&registers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if constexpr (std::is_same_v<R, float>) asm volatile("" : "+f"(registers[i])::"memory");
    else asm volatile("" : "+r"(registers[i])::"memory");
  }
}

#define KDFAST_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define KDFAST_16(d, i) \
  KDFAST_4(d, i), KDFAST_4(d, i + 4), KDFAST_4(d, i + 8), KDFAST_4(d, i + 12)
#define KDFAST_REGISTERS                                                                    \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "

// z = (accumulate ? z : 0) + X Y^T over 16 columns of both; both lie along their rows.
template <typename T>
__device__ void multiply(float (&z)[ACCUMULATOR], uint64_t x, uint64_t y, int accumulate) {
#define KDFAST_MULTIPLY(TYPE)                                                             \
  asm volatile(                                                                           \
      "{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"                                          \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " KDFAST_REGISTERS    \
      "%32, %33, p, 1, 1, 0, 0; }"                                                        \
      : KDFAST_16(z, 0), KDFAST_16(z, 16)                                                 \
      : "l"(x), "l"(y), "r"(accumulate))
  if constexpr (std::is_same_v<T, __half>) KDFAST_MULTIPLY("f16");
  else KDFAST_MULTIPLY("bf16");
#undef KDFAST_MULTIPLY
}

// out += A Y over 16 rows of Y, which lie across its panel; A is in registers.
template <typename T>
__device__ void multiply_across(float (&out)[ACCUMULATOR], const uint32_t* a, uint64_t y) {
#define KDFAST_MULTIPLY(TYPE)                                                                \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " "               \
               KDFAST_REGISTERS "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                     \
               : KDFAST_16(out, 0), KDFAST_16(out, 16)                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(y))
  if constexpr (std::is_same_v<T, __half>) KDFAST_MULTIPLY("f16");
  else KDFAST_MULTIPLY("bf16");
#undef KDFAST_MULTIPLY
}

template <typename T>
__device__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  } else {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
}

}  // namespace kdfast::hopper

#endif  // KDFAST_HOPPER_CUH
