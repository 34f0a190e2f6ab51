// A block of threads on the CPU, for running the kernels of csrc/cuda without a GPU.
//
// Threads are fibers that change places at barriers. Copies and products, which a GPU runs by
// itself, happen as early as they may or as late (when they are waited for): copies early and
// products late show a tile that is overwritten too soon, the other way round one that is used too
// soon. Descriptors of wgmma are read as the PTX manual defines them, on
// its own and not with the functions of the kernels.

#pragma once

#define KDFAST_HOPPER_CUH
#define KDFAST_AMPERE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

using std::max;
using std::min;

#undef __shared__
#define __shared__ static  // one block runs at a time

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace simulation {

inline bool EARLY_COPIES = true, EARLY_PRODUCTS = true;
inline bool BULK_COPIES = true;  // of the architecture that is simulated

struct Copy {
  uint32_t target;
  const void* source;
  int bytes;
  bool valid;
};

struct Product {
  float* out;
  uint64_t x, y;
  bool accumulate, across;
  const std::vector<uint32_t>* operands;  // of the warp, for `across`
};

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  std::vector<std::vector<Copy>> groups{1};
  std::vector<Product> products;
  std::vector<std::vector<Product>> product_groups;
  int warp_operations = 0;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline ucontext_t scheduler;
inline int current;
inline bool progress;
inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;
inline std::vector<std::vector<uint64_t>> slots;  // of the lanes of each warp
inline int any, any_of_last;
inline std::vector<std::vector<std::unique_ptr<std::vector<uint32_t>>>> operands;  // of each warp
// What the lanes of a warp put down for one operation: six registers, or an address.
using Registers = uint32_t[32][6];
struct Exchange {
  Registers of[2];  // of operations of even and of odd number
};
inline std::vector<Exchange> exchanges;  // of each warp
inline std::vector<char> shared;
constexpr uint32_t SHARED_BASE = 4112;  // not a multiple of 1024
inline std::function<void()> body;
inline bool is_half;

inline void fail(const char* message) {
  std::printf("simulation: %s\n", message);
  std::exit(1);
}

// The barrier of a block's bulk copies: bytes that are expected and have not come, and, where they
// land late, the copies themselves.
struct {
  int announced, completed;
  int64_t pending;
  std::vector<Copy> copies;
} inline arrivals;

struct {
  int warps, arrived, phase;
} inline turns;

inline void yield() {
  const int me = current;
  swapcontext(&fibers[me]->context, &scheduler);
}

inline void wait(Barrier& barrier, int count) {
  progress = true;
  const int generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline void run_fiber() {
  body();
  fibers[current]->done = true;
  progress = true;
  swapcontext(&fibers[current]->context, &scheduler);
}

// Runs a block; `shared_bytes` of shared memory hold garbage at first.
inline void run_block(int threads, size_t shared_bytes, std::function<void()> kernel) {
  body = std::move(kernel);
  shared.assign(shared_bytes, char(0xff));
  blockDim.x = threads;
  block_barrier = Barrier();
  warp_barriers.assign(threads / 32, Barrier());
  slots.assign(threads / 32, std::vector<uint64_t>(32));
  operands.clear();
  operands.resize(threads / 32);
  exchanges.assign(threads / 32, Exchange());
  any = 0;
  while (int(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.done = false;
    fiber.groups.assign(1, {});
    fiber.products.clear();
    fiber.product_groups.clear();
    fiber.warp_operations = 0;
    fiber.stack.resize(256 << 10);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  // One warpgroup runs as far as it can before the next gets its turn, to show what depends on all
  // keeping the same pace.
  const int groups = (threads + 127) / 128;
  for (int left = threads; left > 0;) {
    bool some = false;
    for (int g = 0; g < groups; ++g) {
      const int first = (EARLY_COPIES ? g : groups - 1 - g) * 128;
      do {
        progress = false;
        for (int i = first; i < min(first + 128, threads); ++i) {
          if (fibers[i]->done) continue;
          current = i;
          threadIdx.x = i;
          swapcontext(&scheduler, &fibers[i]->context);
          left -= fibers[i]->done;
        }
        some |= progress;
      } while (progress);
    }
    if (left > 0 && !some) fail("deadlock: a barrier that some threads never reach");
  }
}

inline Barrier& warp_barrier() { return warp_barriers[current / 32]; }

// The registers of all lanes, once all have put down theirs. A lane is at most one operation ahead
// of another, so that those of two operations suffice.
inline const Registers& exchange(std::initializer_list<uint32_t> mine) {
  Registers& all = exchanges[current / 32].of[fibers[current]->warp_operations++ % 2];
  std::copy(mine.begin(), mine.end(), all[current % 32]);
  wait(warp_barrier(), 32);
  return all;
}

inline float number(uint32_t address, bool half) {
  // The pattern of the 128-byte swizzle, on the address as a whole.
  address ^= (address >> 7 & 7) << 4;
  uint16_t bits;
  std::memcpy(&bits, shared.data() + (address - SHARED_BASE), 2);
  if (!half) {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
  __half h;
  std::memcpy(&h, &bits, 2);
  return __half2float(h);
}

inline float low_or_high(uint32_t pair, bool high, bool half) {
  const uint16_t bits = high ? pair >> 16 : pair & 0xffff;
  if (half) {
    __half h;
    std::memcpy(&h, &bits, 2);
    return __half2float(h);
  }
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// Number (row, k) of an operand whose k runs along rows; (k, n) when across.
inline float operand(uint64_t descriptor, int row, int k, bool across, bool half) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("not the 128-byte swizzle");
  const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  if (across) return number(start + k / 8 * stride + k % 8 * 128 + row * 2, half);
  return number(start + row / 8 * stride + row % 8 * 128 + k * 2, half);
}

inline void execute(const Product& product) {
  const int thread = current % 128, lane = thread % 32;
  for (int i = 0; i < 32; ++i) {
    // Figure "WGMMA .m64nNk16 register fragment layout for accumulator matrix D".
    const int row_of_warp = lane / 4 + (i % 4 >= 2 ? 8 : 0);
    const int column = (i / 4) * 8 + (lane % 4) * 2 + (i & 1);
    const int row = thread / 32 * 16 + row_of_warp;
    float sum = product.accumulate ? product.out[i] : 0.f;
    for (int k = 0; k < 16; ++k) {
      float a;
      if (product.across) {
        // The same for the operand in registers: a0 (row, k), a1 (row + 8), a2 (k + 8), a3 (both).
        const int holder = row_of_warp % 8 * 4 + k % 8 / 2;
        const int index = (row_of_warp >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0);
        a = low_or_high((*product.operands)[holder * 4 + index], k & 1, is_half);
      } else {
        a = operand(product.x, row, k, false, is_half);
      }
      sum += a * operand(product.y, column, k, product.across, is_half);
    }
    product.out[i] = sum;
  }
}

}  // namespace simulation

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  using namespace simulation;
  const int warp = current / 32, lane = current % 32;
  std::memcpy(&slots[warp][lane], &value, sizeof(T));
  wait(warp_barriers[warp], 32);
  T result;
  std::memcpy(&result, &slots[warp][lane ^ mask], sizeof(T));
  wait(warp_barriers[warp], 32);
  return result;
}

inline unsigned __ballot_sync(unsigned, bool value) {
  using namespace simulation;
  const int warp = current / 32;
  slots[warp][current % 32] = value;
  wait(warp_barriers[warp], 32);
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= unsigned(slots[warp][lane]) << lane;
  wait(warp_barriers[warp], 32);
  return ballot;
}

inline void __syncwarp() { simulation::wait(simulation::warp_barrier(), 32); }
inline void __syncthreads() { simulation::wait(simulation::block_barrier, blockDim.x); }
inline int __syncthreads_or(int value) {
  using namespace simulation;
  any |= value != 0;
  __syncthreads();
  const int result = any;
  __syncthreads();
  any = 0;
  __syncthreads();
  return result;
}
template <typename T>
T __ldcs(const T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T)) simulation::fail("a load is not aligned");
  return *pointer;
}
template <typename T>
void __stcs(T* pointer, T value) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T)) simulation::fail("a store is not aligned");
  *pointer = value;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }

namespace kdfast::hopper {

constexpr int ACCUMULATOR = 32;

inline uint32_t shared_address(const void* pointer) {
  return uint32_t(static_cast<const char*>(pointer) - simulation::shared.data()) +
         simulation::SHARED_BASE;
}
inline char* shared_pointer(uint32_t address) {
  return simulation::shared.data() + (address - simulation::SHARED_BASE);
}

inline void run_copy(const simulation::Copy& copy) {
  if (copy.target % copy.bytes || reinterpret_cast<uintptr_t>(copy.source) % copy.bytes)
    simulation::fail("a copy is not aligned");
  if (copy.valid) std::memcpy(shared_pointer(copy.target), copy.source, copy.bytes);
  else std::memset(shared_pointer(copy.target), 0, copy.bytes);
}
inline void copy(const simulation::Copy& copy) {
  if (copy.target - simulation::SHARED_BASE + copy.bytes > simulation::shared.size())
    simulation::fail("a copy past the end of shared memory");
  if (simulation::EARLY_COPIES) run_copy(copy);
  else simulation::fibers[simulation::current]->groups.back().push_back(copy);
}
inline void copy_16(uint32_t target, const void* source, bool valid) {
  copy({target, source, 16, valid});
}
inline void copy_4(uint32_t target, const void* source, bool valid) {
  copy({target, source, 4, valid});
}
inline void end_of_copies() {
  simulation::fibers[simulation::current]->groups.push_back({});
}
template <int PENDING>
void land() {
  auto& groups = simulation::fibers[simulation::current]->groups;
  // Of the committed groups (all but the open last one), all but PENDING.
  for (size_t i = 0; i + 1 + PENDING < groups.size(); ++i) {
    for (const auto& copy : groups[i]) run_copy(copy);
    groups[i].clear();
  }
}
struct Turns {
  int arrivals = 0;

  Turns(uint32_t barrier, int warps) {
    if (barrier % 8) simulation::fail("a barrier is not aligned");
    simulation::turns = {warps, 0, 0};
  }
  template <int PENDING>
  void arrive() {
    auto& turns = simulation::turns;
    land<PENDING>();
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      simulation::progress = true;
      if (++turns.arrived == turns.warps) ++turns.phase, turns.arrived = 0;
    }
    ++arrivals;
  }
  void wait() const {
    // Only the parity of a phase is known to the hardware.
    while (simulation::turns.phase % 2 == (arrivals - 1) % 2) simulation::yield();
    if (simulation::turns.phase != arrivals) simulation::fail("a turn was missed");
  }
};

inline bool& BULK_COPIES = simulation::BULK_COPIES;

struct Arrivals {
  int rounds = 0;

  explicit Arrivals(uint32_t barrier) {
    if (barrier % 8) simulation::fail("a barrier is not aligned");
    simulation::arrivals = {};
  }
  void announce(int bytes) {
    ++rounds;
    if (threadIdx.x > 0) return;
    if (bytes >= 1 << 20) simulation::fail("more bytes than a barrier can count");
    simulation::arrivals.pending += bytes;
    ++simulation::arrivals.announced;
    complete();
  }
  void copy(uint32_t target, const void* source, int bytes) {
    if (target % 16 || reinterpret_cast<uintptr_t>(source) % 16 || bytes % 16)
      simulation::fail("a bulk copy is not aligned");
    if (target - simulation::SHARED_BASE + bytes > simulation::shared.size())
      simulation::fail("a bulk copy past the end of shared memory");
    simulation::arrivals.copies.push_back({target, source, bytes, true});
    if (simulation::EARLY_COPIES) land_all();
  }
  void wait() {
    auto& arrivals = simulation::arrivals;
    simulation::progress = true;
    while (arrivals.completed % 2 == (rounds - 1) % 2) {  // only its parity is known
      const auto waited = arrivals.pending;
      land_all();
      if (arrivals.pending != waited) simulation::progress = true;
      else simulation::yield();
    }
    if (arrivals.completed != rounds) simulation::fail("a round of copies was missed");
  }

 private:
  static void land_all() {
    auto& arrivals = simulation::arrivals;
    for (const auto& copy : arrivals.copies) {
      std::memcpy(shared_pointer(copy.target), copy.source, copy.bytes);
      arrivals.pending -= copy.bytes;
    }
    arrivals.copies.clear();
    complete();
  }
  static void complete() {
    auto& arrivals = simulation::arrivals;
    if (arrivals.announced == arrivals.completed || arrivals.pending != 0) return;
    arrivals.completed = arrivals.announced;
    simulation::progress = true;
  }
};

inline void all_copies_done() {
  land<0>();
  __syncthreads();
}

inline void products_begin() {}
inline void products_end() {
  auto& fiber = *simulation::fibers[simulation::current];
  fiber.product_groups.push_back(std::move(fiber.products));
  fiber.products.clear();
}
template <int PENDING>
void products_wait() {
  auto& groups = simulation::fibers[simulation::current]->product_groups;
  __syncwarp();
  while (int(groups.size()) > PENDING) {
    for (const auto& product : groups.front()) simulation::execute(product);
    groups.erase(groups.begin());
  }
  __syncwarp();
}
template <typename R, int COUNT>
void hold(R (&)[COUNT]) {}

inline void product(const simulation::Product& product) {
  if (simulation::EARLY_PRODUCTS) {
    simulation::execute(product);
    return;
  }
  if (!product.accumulate) std::fill_n(product.out, 32, NAN);  // not to be read before the wait
  simulation::fibers[simulation::current]->products.push_back(product);
}
template <typename T>
void multiply(float (&z)[ACCUMULATOR], uint64_t x, uint64_t y, int accumulate) {
  simulation::is_half = std::is_same_v<T, __half>;
  product({z, x, y, accumulate != 0, false, nullptr});
}
template <typename T>
void multiply_across(float (&out)[ACCUMULATOR], const uint32_t* a, uint64_t y) {
  using namespace simulation;
  is_half = std::is_same_v<T, __half>;
  // All lanes of a warp put down their parts of the operand under the number of the operation.
  const int warp = current / 32, lane = current % 32;
  const int operation = fibers[current]->warp_operations++;
  auto& of_warp = simulation::operands[warp];
  while (int(of_warp.size()) <= operation)
    of_warp.push_back(std::make_unique<std::vector<uint32_t>>(128));
  std::copy(a, a + 4, of_warp[operation]->begin() + lane * 4);
  if (EARLY_PRODUCTS) wait(warp_barriers[warp], 32);
  product({out, 0, y, true, true, of_warp[operation].get()});
}
template <typename T>
uint32_t pack(float low, float high) {
  uint16_t bits[2];
  if constexpr (std::is_same_v<T, __half>) {
    const __half both[] = {__float2half_rn(low), __float2half_rn(high)};
    std::memcpy(bits, both, 4);
  } else {
    const __nv_bfloat16 both[] = {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
    std::memcpy(bits, both, 4);
  }
  return bits[0] | uint32_t(bits[1]) << 16;
}

}  // namespace kdfast::hopper

namespace kdfast::ampere {

template <int PENDING>
void copies_wait() {
  hopper::land<PENDING>();
}

// Figure "ldmatrix fragment layout": row r of matrix m is at the address of lane 8 m + r; lane l
// gets numbers 2 (l % 4) and the next of row l / 4, of the transpose if asked for.
inline void load(uint32_t (&x)[4], uint32_t row, bool transposed) {
  using namespace simulation;
  if (row % 16) fail("a row of a matrix is not aligned");
  if (row - SHARED_BASE + 16 > shared.size()) fail("a matrix past the end of shared memory");
  const Registers& rows = exchange({row});
  const int lane = current % 32;
  for (int m = 0; m < 4; ++m) {
    uint16_t both[2];
    for (int i = 0; i < 2; ++i) {
      const int r = lane / 4, c = lane % 4 * 2 + i;
      const uint32_t from = rows[8 * m + (transposed ? c : r)][0] + (transposed ? r : c) * 2;
      std::memcpy(&both[i], shared.data() + (from - SHARED_BASE), 2);
    }
    x[m] = both[0] | uint32_t(both[1]) << 16;
  }
}
inline uint32_t transpose(uint32_t x) {
  const simulation::Registers& all = simulation::exchange({x});
  const int lane = simulation::current % 32;
  uint32_t both = 0;
  for (int i = 0; i < 2; ++i) {
    const int row = lane % 4 * 2 + i, column = lane / 4;
    both |= (all[row * 4 + column / 2][0] >> 16 * (column % 2) & 0xffff) << 16 * i;
  }
  return both;
}
inline void load_matrices(uint32_t (&x)[4], uint32_t row) { load(x, row, false); }
inline void load_transposed(uint32_t (&x)[4], uint32_t row) { load(x, row, true); }

// Figures "m16n8k16 fragment layout" of A, B and C for .f16 and .bf16.
template <typename T>
void multiply_add(float* z, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace simulation;
  constexpr bool HALF = std::is_same_v<T, __half>;
  const Registers& all = exchange({a[0], a[1], a[2], a[3], b0, b1});
  const int group = current % 32 / 4, within = current % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + (i >= 2 ? 8 : 0), column = within * 2 + (i & 1);
    float sum = 0.f;
    for (int k = 0; k < 16; ++k) {
      const int register_a = (row >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0), register_b = k >= 8 ? 5 : 4;
      const int holder = k % 8 / 2;
      sum += low_or_high(all[row % 8 * 4 + holder][register_a], k & 1, HALF) *
             low_or_high(all[column * 4 + holder][register_b], k & 1, HALF);
    }
    z[i] += sum;
  }
}

}  // namespace kdfast::ampere
