// The kernels of CKA for linear kernels and up to 128 rows of half precision.
//
// All rows of a problem are in a block's tile, so features are read once: a ring of chunks of 64
// columns is filled by cp.async, each chunk is centred in float32 where it lies, rounded again, and
// multiplied with its own transpose by tensor cores. Bytes are the limit.
//
// A block has two slots of W warps, with a tile each.
//
//   compare           two layers of a problem, one in each slot: their inner products and norms
//   compare_backward  the same, then dX = 2 / |X_c|^2 M X_c in a second walk over the columns, half
//                     of them in each slot; a block for each layer that wants a gradient
//   accumulate        a range of columns of one layer of a problem, half of them in each slot: a
//                     part of its Gram matrix; `add_up` adds the parts in order, `finish` centres
//                     the sum and divides it by |X_c|^2
//   pair_up           inner products of Gram matrices that exist
//   apply             dX from Gram matrices that exist
//
// No atomics, hence the same bits every time; and the same arithmetic for every layer, hence the
// same bits for equal ones.

#pragma once

#include "ampere.cuh"
#include "cka.cuh"

#include <type_traits>

namespace kdfast::cka {

using namespace hopper;
using namespace ampere;

constexpr float LEAST = 1e-37f;  // with a finite reciprocal
constexpr int STAGES_FORWARD = 3, STAGES_BACKWARD = 2;

// W warps a slot, for up to 32 W rows.
template <typename T_, int W_>
struct Layout {
  using T = T_;
  static constexpr int W = W_, ROWS = 32 * W, SLOT = 32 * W, THREADS = 2 * SLOT;
  static constexpr int BLOCKS = Blocks<W>::COUNT;
  static constexpr int RESIDENTS = 8 / W;  // blocks of a multiprocessor; this bounds registers
  static constexpr int TILE = ROWS * ROW_BYTES, STAGE = 2 * TILE;
  static constexpr int SMALL = 2048;
  static constexpr int BYTES_FORWARD = STAGES_FORWARD * STAGE + SMALL;
  static constexpr int BYTES_BACKWARD = (STAGES_BACKWARD + 1) * STAGE + SMALL;
  // Centred features of float16 may be twice as large as their largest number.
  static constexpr float SCALE = std::is_same_v<T, __half> ? 0.5f : 1.f;
  // A Gram matrix passes from one slot to the other where the ring has been.
  static_assert(SLOT * BLOCKS * 8 * 4 <= STAGES_BACKWARD * STAGE);
};

struct Layer {
  const void* data;      // null: there is none
  int64_t problem, row;  // strides, in elements
  float* means;          // [P, d], or null
  int width;
  bool aligned;  // every row starts at a multiple of 16 bytes, and so does its end
};

struct Rows {
  const uint8_t* mask;  // [P, n], or null
  int64_t mask_problem, mask_row;
  int problems, n;
  bool unbiased;
};

struct Upstream {
  const float* data;
  int64_t pair, problem;  // strides
};

struct Comparison {
  Layer layers[2];
  int layer[2];       // their numbers
  int cross, own[2];  // pairs, or -1
  void* gradient;     // backward: of the first
};

constexpr int COMPARISONS = 24;  // in one launch; the table travels by value
struct Comparisons {
  Comparison at[COMPARISONS];
  Rows rows;
  float *inner, *unit, *diagonals;  // the last may be null
  Upstream upstream;
};
static_assert(sizeof(Comparisons) <= 4096, "kernel arguments");

constexpr int LAYERS = 48;
struct Accumulations {
  Layer layers[LAYERS];
  Rows rows;
  int blocks;     // of one Gram matrix, a part each
  int64_t first;  // Gram matrices before these
  int64_t part;   // floats of a part of all Gram matrices
  float* parts;
};
static_assert(sizeof(Accumulations) <= 4096, "kernel arguments");

// Gram matrices [layers, P, n, n]; the last layers may have theirs elsewhere.
struct Grams {
  const float *made, *known;
  int count;  // of layers made

  __device__ const float* at(int layer, int problem, const Rows& rows) const {
    const float* from = layer < count ? made : known;
    const int64_t index = int64_t(layer < count ? layer : layer - count) * rows.problems + problem;
    return from + index * rows.n * rows.n;
  }
};

constexpr int PAIRS = 400;
struct Pairs {
  Grams grams;
  Rows rows;
  float* inner;  // of the first of these pairs
  int16_t layer[PAIRS][2];
};
static_assert(sizeof(Pairs) <= 4096, "kernel arguments");

constexpr int GRADIENTS = 24, MOST_TERMS = 250;
struct Gradients {
  struct {
    Layer layer;
    void* gradient;
    const float* unit;  // [P]
    int begin, end;     // terms
  } at[GRADIENTS];
  struct {
    int16_t layer, pair;
    float factor;
  } terms[MOST_TERMS];
  Grams grams;
  Rows rows;
  Upstream upstream;
  int blocks;  // of one layer of one problem
};
static_assert(sizeof(Gradients) <= 4096, "kernel arguments");

// Rows that take part.
struct Valid {
  const uint32_t* bits;
  int count, first;

  __device__ bool operator()(int row) const { return bits[row / 32] >> row % 32 & 1; }
};

// Keeps the compiler from reading ahead, for which there are no registers. By whole warps.
__device__ inline void no_further() { __syncwarp(); }

// x, of which the compiler then knows nothing: what follows from it is made anew rather than kept.
template <typename X>
__device__ X anew(X x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// By all threads, of which there are at least 32 `words`.
__device__ inline Valid find_valid(const Rows& rows, int problem, int words, uint32_t* bits) {
  const int row = threadIdx.x;
  if (row < 32 * words) {
    const bool valid =
        row < rows.n &&
        (!rows.mask || rows.mask[problem * rows.mask_problem + row * rows.mask_row]);
    const uint32_t ballot = __ballot_sync(0xffffffff, valid);
    if (row % 32 == 0) bits[row / 32] = ballot;
  }
  __syncthreads();
  Valid valid{bits, 0, 0};
  for (int word = 0; word < words; ++word) {
    const uint32_t x = bits[word];
    if (valid.count == 0 && x != 0) valid.first = 32 * word + __popc((x & (0u - x)) - 1);
    valid.count += __popc(x);
  }
  return valid;
}

// The same bits in all lanes.
__device__ inline float sum_of_warp(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
  return x;
}

__device__ inline float max_of_warp(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    x = max_or_nan(x, __shfl_xor_sync(0xffffffff, x, offset));
  return x;
}

// Shared memory of a block.
template <typename L>
struct Memory {
  char *ring, *panels;  // the second after the stages of backward alone
  float *diagonal, *sums;
  uint32_t* bits;

  __device__ Memory(char* raw, int bytes) : ring(raw) {
    panels = raw + STAGES_BACKWARD * L::STAGE;
    diagonal = reinterpret_cast<float*>(raw + bytes - L::SMALL);  // [slot][row]
    sums = diagonal + 2 * MOST_ROWS;
    bits = reinterpret_cast<uint32_t*>(sums + 64);
  }
};

// Columns of a problem's features that a slot walks over.
template <typename T>
struct Columns {
  const T* data = nullptr;
  int64_t row = 0;
  float* means = nullptr;
  int begin = 0, end = 0;
  bool aligned = true;

  __device__ Columns(const Layer& layer, int problem, int begin, int end)
      : data(static_cast<const T*>(layer.data) + problem * layer.problem), row(layer.row),
        means(layer.means ? layer.means + int64_t(problem) * layer.width : nullptr),
        begin(begin), end(min(end, layer.width)), aligned(layer.aligned) {}
  __device__ bool has(int chunk) const { return begin + chunk * CHUNK < end; }
};

template <typename T>
__device__ float2 unpack(uint32_t both) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&both));
  } else {
    return {std::bit_cast<float>(both << 16), std::bit_cast<float>(both & 0xffff0000u)};
  }
}

// What a thread of a slot centres: a warp has 64 / W columns to itself, a lane two of them in 32
// rows, W lanes together all rows. The 32 words that a warp touches at a time lie in different
// banks.
template <int W>
struct Part {
  static constexpr int PER = 8 / W;  // rows out of every eight
  int group, pair;

  __device__ Part(unsigned thread)
      : group(thread % 32 / (32 / W)), pair(thread / 32 * (64 / W) + thread % (32 / W) * 2) {}
  __device__ int row(int i) const { return i / PER * 8 + group * PER + i % PER; }
  __device__ bool counts(const Valid& valid, int i) const {
    const int row = i / PER * 8 + i % PER;
    return valid.bits[row / 32] >> group * PER >> row % 32 & 1;
  }
  __device__ uint32_t* word(char* tile, int row) const {
    return reinterpret_cast<uint32_t*>(tile + swizzled(row, pair / 8) + pair % 8 * 2);
  }
};

// Walks over the columns of each slot: visit(chunk, stage) when the chunk of both slots is in the
// tiles at `stage`, centred, in units of 1 / SCALE. Rows that do not take part hold anything
// finite. Ends with a barrier.
template <typename L, int STAGES, typename Visit>
__device__ void walk(const Columns<typename L::T>& x, int chunks, const Valid& valid, char* ring,
                     Visit visit) {
  using T = typename L::T;
  constexpr int W = L::W;
  const int slot = threadIdx.x / L::SLOT, thread = int(anew(threadIdx.x) % L::SLOT);

  // Loads: eight threads a row.
  constexpr int LOADS = 8, STEP = 4 * W;
  const int load_row = thread / 8, load_unit = thread % 8;
  const bool all = valid.count == L::ROWS;
  auto load = [&](int chunk) {
    const int column = x.begin + chunk * CHUNK + load_unit * 8;
    if (chunk < chunks && x.has(chunk)) {
      char* tile = ring + chunk % STAGES * L::STAGE + slot * L::TILE;
      const T* source = x.data + load_row * x.row + column;
      if (x.aligned) {
#pragma unroll 2
        for (int i = 0; i < LOADS; ++i, source += STEP * x.row) {
          const bool inside = (all || valid(load_row + i * STEP)) && column < x.end;
          copy_16(shared_address(tile + swizzled(load_row + i * STEP, load_unit)), source, inside);
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < LOADS; ++i, source += STEP * x.row) {
          uint16_t* target = reinterpret_cast<uint16_t*>(
              tile + swizzled(load_row + i * STEP, load_unit));
#pragma unroll 1
          for (int k = 0; k < 8; ++k) {
            const bool inside = valid(load_row + i * STEP) && column + k < x.end;
            target[k] = inside ? reinterpret_cast<const uint16_t*>(source)[k] : 0;
          }
        }
      }
    }
    end_of_copies();
  };

  auto centre = [&](int chunk, char* tile) {
    const Part<W> part(anew(threadIdx.x) % L::SLOT);
    const uint32_t first = *part.word(tile, valid.first);
    const float2 shift = unpack<T>(first);
    // The last numbers are kept, the others read again: registers are short beside a Gram matrix.
    constexpr int KEPT = W < 2 ? 16 : W < 4 ? 8 : 4, REREAD = 32 - KEPT;
    uint32_t kept[KEPT];
    float sum0 = 0.f, sum1 = 0.f;
#pragma unroll
    for (int i0 = 0; i0 < 32; i0 += KEPT) {
      no_further();
#pragma unroll
      for (int i = 0; i < KEPT; ++i) kept[i] = *part.word(tile, part.row(i0 + i));
      if (!all) {  // rows that do not take part become the first, which adds nothing to the sums
#pragma unroll
        for (int i = 0; i < KEPT; ++i) kept[i] = part.counts(valid, i0 + i) ? kept[i] : first;
      }
#pragma unroll
      for (int i = 0; i < KEPT; ++i) {
        const float2 both = unpack<T>(kept[i]);
        sum0 += both.x - shift.x;
        sum1 += both.y - shift.y;
      }
    }
#pragma unroll
    for (int offset = 32 / W; offset < 32; offset *= 2) {
      sum0 += __shfl_xor_sync(0xffffffff, sum0, offset);
      sum1 += __shfl_xor_sync(0xffffffff, sum1, offset);
    }
    __syncwarp();  // all lanes have read the first row
    const float per_row = inverse(max(valid.count, 1));
    const float mean0 = fmaf(sum0, per_row, shift.x), mean1 = fmaf(sum1, per_row, shift.y);
    auto centred = [&](uint32_t number) {
      const float2 both = unpack<T>(number);
      return pack<T>((both.x - mean0) * L::SCALE, (both.y - mean1) * L::SCALE);
    };
#pragma unroll
    for (int i = 0; i < KEPT; ++i) *part.word(tile, part.row(REREAD + i)) = centred(kept[i]);
#pragma unroll
    for (int i = 0; i < REREAD; ++i) {
      if (i % KEPT == 0) no_further();
      uint32_t* word = part.word(tile, part.row(i));
      *word = centred(all || part.counts(valid, i) ? *word : first);
    }
    if (x.means && part.group == 0) {
      const int column = x.begin + chunk * CHUNK + part.pair;
      if (column < x.end) x.means[column] = mean0;
      if (column + 1 < x.end) x.means[column + 1] = mean1;
    }
  };

#pragma unroll 1
  for (int chunk = 0; chunk < STAGES - 1; ++chunk) load(chunk);
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copies_wait<STAGES - 2>();
    __syncthreads();  // this chunk is here, and the one before it has been used
    load(chunk + STAGES - 1);
    char* stage = ring + chunk % STAGES * L::STAGE;
    if (x.has(chunk)) centre(chunk, stage + slot * L::TILE);
    __syncthreads();
    visit(chunk, stage);
  }
  copies_wait<0>();
  __syncthreads();
}

// gram += X X^T of a tile, the blocks of the strips S and 2 W - 1 - S. Operand A of a strip is
// operand B of its columns.
template <typename L, int S>
__device__ void multiply_strips(float (&gram)[L::BLOCKS][8], uint32_t tile) {
  using T = typename L::T;
  constexpr int W = L::W, OTHER = 2 * W - 1 - S;
  const int lane = int(anew(threadIdx.x) % 32);
#pragma unroll
  for (int k = 0; k < CHUNK / 16; ++k) {
    uint32_t strip[4], other[4];
#pragma unroll
    for (int j = S; j < 2 * W; ++j) {
      uint32_t columns[4];
      load_matrices(columns, tile + swizzled(16 * j + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (j == S) strip[i] = columns[i];
        if (j == OTHER) other[i] = columns[i];
      }
      multiply_add<T>(gram[j - S], strip, columns[0], columns[2]);
      multiply_add<T>(gram[j - S] + 4, strip, columns[1], columns[3]);
      if (j < OTHER) continue;
      float* block = gram[4 * W - 1 - S - j];
      multiply_add<T>(block, other, columns[0], columns[2]);
      multiply_add<T>(block + 4, other, columns[1], columns[3]);
    }
  }
}

template <typename L>
__device__ void multiply_own(float (&gram)[L::BLOCKS][8], uint32_t tile, int strip) {
  if (strip == 0) multiply_strips<L, 0>(gram, tile);
  if constexpr (L::W > 1) {
    if (strip == 1) multiply_strips<L, 1>(gram, tile);
  }
  if constexpr (L::W > 2) {
    if (strip == 2) multiply_strips<L, 2>(gram, tile);
    if (strip == 3) multiply_strips<L, 3>(gram, tile);
  }
}

// visit(value, row, column, register) for the entries that a thread holds.
template <typename L, typename Visit>
__device__ void each_entry(float (&gram)[L::BLOCKS][8], int strip, Visit visit) {
  const int lane = threadIdx.x % 32;
  strip = anew(strip);
#pragma unroll
  for (int b = 0; b < L::BLOCKS; ++b) {
    no_further();
#pragma unroll
    for (int i = 0; i < 8; ++i)
      visit(gram[b][i], Blocks<L::W>::row(strip, b) + entry_row(lane, i),
            Blocks<L::W>::column(strip, b) + entry_column(lane, i), 8 * b + i);
  }
}

// The Gram matrix of each slot's columns, 0 in rows and columns that do not take part.
template <typename L, int STAGES>
__device__ void make_gram(float (&gram)[L::BLOCKS][8], const Columns<typename L::T>& x, int chunks,
                          const Valid& valid, char* ring) {
  const int slot = threadIdx.x / L::SLOT, strip = threadIdx.x % L::SLOT / 32;
#pragma unroll
  for (int b = 0; b < L::BLOCKS; ++b) {
#pragma unroll
    for (int i = 0; i < 8; ++i) gram[b][i] = 0.f;
  }
  walk<L, STAGES>(x, chunks, valid, ring, [&](int chunk, char* stage) {
    if (x.has(chunk)) multiply_own<L>(gram, shared_address(stage + slot * L::TILE), strip);
  });
  if (valid.count == L::ROWS) return;
  each_entry<L>(gram, strip, [&](float& value, int row, int column, int) {
    if (!valid(row) || !valid(column)) value = 0.f;
  });
}

// Makes both layers' Gram matrices and normalises them. Returns |X_c|^2, or 1, of this slot's
// layer. The diagonals are then in shared memory, and the matrix of the second slot, as it lies in
// registers, where the ring was.
template <typename L, int STAGES>
__device__ float make_both(float (&gram)[L::BLOCKS][8], const Comparison& comparison, int problem,
                           const Valid& valid, const Memory<L>& memory) {
  const int slot = threadIdx.x / L::SLOT, thread = threadIdx.x % L::SLOT;
  Columns<typename L::T> x(comparison.layers[slot], problem, 0, 1 << 30);
  if (STAGES == STAGES_BACKWARD) x.means = nullptr;  // forward has written them
  const int width = max(comparison.layers[0].width, comparison.layers[1].width);
  make_gram<L, STAGES>(gram, x, (width + CHUNK - 1) / CHUNK, valid, memory.ring);

  float* diagonal = memory.diagonal + slot * MOST_ROWS;
  each_entry<L>(gram, thread / 32, [&](float& value, int row, int column, int) {
    if (row == column) diagonal[row] = value;
  });
  __syncthreads();
  float trace = 0.f;
#pragma unroll
  for (int i = 0; i < L::W; ++i) trace += diagonal[thread % 32 + 32 * i];
  trace = sum_of_warp(trace);
  const float unit = trace == 0.f ? 1.f : trace, inverse = 1.f / unit;
  __syncthreads();  // all have read the diagonal
  float* passed = reinterpret_cast<float*>(memory.ring);
  each_entry<L>(gram, thread / 32, [&](float& value, int row, int column, int i) {
    value *= inverse;
    if (row == column) diagonal[row] = value;
    if (slot == 1) passed[i * L::SLOT + thread] = value;
  });
  __syncthreads();
  return trace == 0.f ? 1.f : trace / (L::SCALE * L::SCALE);
}

// What the entries of a layer's normalised diagonal add up to.
template <typename L>
__device__ float trace_of(const float* diagonal) {
  float trace = 0.f;
#pragma unroll
  for (int i = 0; i < L::W; ++i) trace += diagonal[threadIdx.x % 32 + 32 * i];
  return sum_of_warp(trace);
}

template <typename L>
__device__ void compare_block(const Comparisons& comparisons, char* raw) {
  const Comparison& comparison = comparisons.at[blockIdx.y];
  const Rows& rows = comparisons.rows;
  const int problem = blockIdx.x, slot = threadIdx.x / L::SLOT, thread = threadIdx.x % L::SLOT;
  const int warp = thread / 32;
  const Memory<L> memory(raw, L::BYTES_FORWARD);
  const Valid valid = find_valid(rows, problem, L::W, memory.bits);
  float gram[L::BLOCKS][8];
  const float unit = make_both<L, STAGES_FORWARD>(gram, comparison, problem, valid, memory);

  // Sums over the entries above the diagonal count twice.
  const float* passed = reinterpret_cast<const float*>(memory.ring);
  Sums own, cross;
  auto add = [&](bool with_other) {
    float once = 0.f, twice = 0.f, on_diagonal = 0.f;
    each_entry<L>(gram, warp, [&](float& value, int row, int column, int i) {
      const float other = with_other ? passed[i * L::SLOT + thread] : value;
      if (!Blocks<L::W>::diagonal(i / 8)) twice = fmaf(value, other, twice);
      else if (row != column) once = fmaf(value, other, once);
      else on_diagonal = fmaf(value, other, on_diagonal);
    });
    return Sums{sum_of_warp(fmaf(2.f, twice, once)), sum_of_warp(on_diagonal)};
  };
  own = add(false);
  if (slot == 0) cross = add(true);
  if (thread % 32 == 0) {
    memory.sums[4 * (slot * L::W + warp)] = own.apart;
    memory.sums[4 * (slot * L::W + warp) + 1] = own.diagonal;
    if (slot == 0) {
      memory.sums[4 * warp + 2] = cross.apart;
      memory.sums[4 * warp + 3] = cross.diagonal;
    }
  }
  const float trace = trace_of<L>(memory.diagonal + slot * MOST_ROWS);
  const float trace1 = trace_of<L>(memory.diagonal + MOST_ROWS);
  __syncthreads();

  auto write = [&](int pair, int slot, int which, float trace, float other_trace) {
    if (pair < 0) return;
    Sums sums;
    for (int w = 0; w < L::W; ++w) {
      sums.apart += memory.sums[4 * (slot * L::W + w) + which];
      sums.diagonal += memory.sums[4 * (slot * L::W + w) + which + 1];
    }
    comparisons.inner[int64_t(pair) * rows.problems + problem] =
        sums.inner(trace, other_trace, valid.count, rows.unbiased, which == 0);
  };
  if (slot == 1 && !comparison.layers[1].data) return;
  const int64_t index = int64_t(comparison.layer[slot]) * rows.problems + problem;
  if (thread == 0) {
    write(comparison.own[slot], slot, 0, trace, trace);
    if (slot == 0) write(comparison.cross, 0, 2, trace, trace1);
    comparisons.unit[index] = unit;
  }
  if (comparisons.diagonals) {
    for (int row = thread; row < rows.n; row += L::SLOT)
      comparisons.diagonals[index * rows.n + row] =
          valid(row) ? memory.diagonal[slot * MOST_ROWS + row] : 0.f;
  }
}

// dX = factor M X_c of a layer, columns [begin, end), half of them in each slot. Warp w has the
// rows 16 w of M as operand A; they are staged in rows of its own, for whole lines.
template <typename L>
__device__ void multiply_features(const uint32_t (&m)[2 * L::W][4], float factor,
                                  const Layer& layer, void* gradient, int n, int problem,
                                  int begin, int end, const Valid& valid, bool enough,
                                  const Memory<L>& memory) {
  using T = typename L::T;
  const int slot = threadIdx.x / L::SLOT;
  end = min(end, layer.width);
  const int chunks = (end - begin + 2 * CHUNK - 1) / (2 * CHUNK), half = begin + chunks * CHUNK;
  Columns<T> x(layer, problem, slot ? half : begin, slot ? end : half);
  x.means = nullptr;
  T* out = static_cast<T*>(gradient) + int64_t(problem) * n * layer.width;
  const bool whole = layer.width % 8 == 0;
  walk<L, STAGES_BACKWARD>(x, chunks, valid, memory.ring, [&](int chunk, char* stage) {
#pragma unroll 1
    for (int s = 0; s < 2; ++s) {
      const unsigned thread = anew(threadIdx.x);
      const int warp = thread / 32, lane = thread % 32;
      const int column0 = (s ? half : begin) + chunk * CHUNK;
      if (column0 >= (s ? end : min(half, end))) continue;
      float product[CHUNK / 8][4];
#pragma unroll
      for (int j = 0; j < CHUNK / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) product[j][i] = 0.f;
      }
      const uint32_t tile = shared_address(stage + s * L::TILE);
#pragma unroll
      for (int k = 0; k < 2 * L::W; ++k) {
#pragma unroll
        for (int j = 0; j < CHUNK / 8; j += 2) {
          uint32_t b[4];
          load_transposed(b, tile + swizzled(16 * k + lane % 16, j + lane / 16));
          multiply_add<T>(product[j], m[k], b[0], b[1]);
          multiply_add<T>(product[j + 1], m[k], b[2], b[3]);
        }
      }
      char* staged = memory.panels;
#pragma unroll
      for (int j = 0; j < CHUNK / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const int row = 16 * warp + entry_row(lane, i);
          const bool counts = enough && valid(row);
          *reinterpret_cast<uint32_t*>(staged + swizzled(row, j) + lane % 4 * 4) =
              pack<T>(counts ? product[j][i] * factor : 0.f,
                      counts ? product[j][i + 1] * factor : 0.f);
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        const int row = 16 * warp + i + lane / 8, column = column0 + lane % 8 * 8;
        if (row < n && column < end) {
          const uint4 numbers =
              *reinterpret_cast<const uint4*>(staged + swizzled(row, lane % 8));
          T* target = out + int64_t(row) * layer.width + column;
          if (whole) {
            *reinterpret_cast<uint4*>(target) = numbers;
          } else {
            const T* each = reinterpret_cast<const T*>(&numbers);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
              if (column + e < end) target[e] = each[e];
            }
          }
        }
      }
      __syncwarp();
    }
  });
}

template <typename L>
__device__ void compare_backward_block(const Comparisons& comparisons, char* raw) {
  using T = typename L::T;
  const Comparison& comparison = comparisons.at[blockIdx.y];
  const Rows& rows = comparisons.rows;
  const int problem = blockIdx.x, slot = threadIdx.x / L::SLOT, thread = threadIdx.x % L::SLOT;
  const int warp = thread / 32, lane = thread % 32;
  const Memory<L> memory(raw, L::BYTES_BACKWARD);
  const Valid valid = find_valid(rows, problem, L::W, memory.bits);
  float gram[L::BLOCKS][8];
  const float unit = make_both<L, STAGES_BACKWARD>(gram, comparison, problem, valid, memory);
  if (threadIdx.x == 0) memory.sums[L::W] = unit;

  // M = g_cross H' + 2 g_own G', in units of its largest entry, as float16 reaches only so far.
  auto upstream = [&](int pair) {
    const Upstream& from = comparisons.upstream;
    return pair < 0 ? 0.f : from.data[pair * from.pair + problem * from.problem];
  };
  float largest = 0.f;
  if (slot == 0) {
    // value <- g value', and then + g H' of the other layer
    auto scale = [&](float g, const float* diagonal, auto entry) {
      if (!rows.unbiased) {
        each_entry<L>(gram, warp, [&](float& value, int, int, int i) { entry(value, g, i, 0.f); });
        return;
      }
      const Centring centring(trace_of<L>(diagonal), valid.count);
      each_entry<L>(gram, warp, [&](float& value, int row, int column, int i) {
        const bool apart = row != column && valid(row) && valid(column);
        entry(value, apart ? g : 0.f, i, centring(diagonal[row], diagonal[column]));
      });
    };
    scale(2.f * upstream(comparison.own[0]), memory.diagonal,
          [&](float& value, float g, int, float more) { value = g * (value + more); });
    if (comparison.cross >= 0) {
      const float* passed = reinterpret_cast<const float*>(memory.ring) + thread;
      scale(upstream(comparison.cross), memory.diagonal + MOST_ROWS,
            [&](float& value, float g, int i, float more) {
              value = fmaf(g, passed[i * L::SLOT] + more, value);
            });
    }
    each_entry<L>(gram, warp, [&](float& value, int, int, int) {
      largest = max_or_nan(largest, fabsf(value));
    });
    largest = max_of_warp(largest);
    if (lane == 0) memory.sums[warp] = largest;
  }
  __syncthreads();
  largest = memory.sums[0];
#pragma unroll
  for (int w = 1; w < L::W; ++w) largest = max_or_nan(largest, memory.sums[w]);
  if (largest < LEAST) largest = 1.f;
  const float inverse = 1.f / largest;
  if (slot == 0) {
    each_entry<L>(gram, warp, [&](float& value, int row, int column, int i) {
      const uint16_t m = uint16_t(pack<T>(value * inverse, 0.f));
      auto put = [&](int row, int column) {
        *reinterpret_cast<uint16_t*>(memory.panels + column / CHUNK * L::TILE +
                                     swizzled(row, column % CHUNK / 8) + column % 8 * 2) = m;
      };
      put(row, column);
      if (!Blocks<L::W>::diagonal(i / 8)) put(column, row);
    });
  }
  __syncthreads();
  uint32_t m[2 * L::W][4];
#pragma unroll
  for (int k = 0; k < 2 * L::W; ++k) {
    const int row = threadIdx.x / 32 * 16 + lane % 16, column = 16 * k;
    load_matrices(m[k], shared_address(memory.panels + column / CHUNK * L::TILE) +
                            swizzled(row, column % CHUNK / 8 + lane / 16));
  }
  const float factor = 2.f / (L::SCALE * memory.sums[L::W]) * largest;
  __syncthreads();
  const Layer& layer = comparison.layers[0];
  multiply_features<L>(m, factor, layer, comparison.gradient, rows.n, problem, 0, layer.width,
                       valid, valid.count >= (rows.unbiased ? 4 : 2), memory);
}

// Parts of the columns of a layer, in whole chunks.
__device__ inline int columns_of_part(int width, int parts) {
  const int chunks = (width + CHUNK - 1) / CHUNK;
  return (chunks + parts - 1) / parts * CHUNK;
}

template <typename L>
__device__ void accumulate_block(const Accumulations& call, char* raw) {
  const Rows& rows = call.rows;
  const int slot = threadIdx.x / L::SLOT, strip = threadIdx.x % L::SLOT / 32;
  const unsigned matrix = blockIdx.x / unsigned(call.blocks);
  const int layer = matrix / rows.problems, problem = matrix % rows.problems;
  const Memory<L> memory(raw, L::BYTES_FORWARD);
  const Valid valid = find_valid(rows, problem, L::W, memory.bits);
  const Layer& of = call.layers[layer];
  const int part = blockIdx.x % unsigned(call.blocks);
  const int columns = columns_of_part(of.width, 2 * call.blocks);
  const int begin = (2 * part + slot) * columns;
  const Columns<typename L::T> x(of, problem, begin, begin + columns);
  float gram[L::BLOCKS][8];
  make_gram<L, STAGES_FORWARD>(gram, x, columns / CHUNK, valid, memory.ring);
  float* passed = reinterpret_cast<float*>(memory.ring) + threadIdx.x % L::SLOT;
  if (slot == 1) {
    each_entry<L>(gram, strip, [&](float& value, int, int, int i) {
      passed[i * L::SLOT] = value;
    });
  }
  __syncthreads();
  if (slot == 1) return;
  const unsigned block = anew(blockIdx.x);
  float* out = call.parts + block % unsigned(call.blocks) * call.part +
               (call.first + block / unsigned(call.blocks)) * rows.n * rows.n;
  each_entry<L>(gram, strip, [&](float& value, int row, int column, int i) {
    if (row < rows.n && column < rows.n) out[row * rows.n + column] = value + passed[i * L::SLOT];
  });
}

// Entries of blocks on and above the diagonal are all there is of a part.
__device__ inline bool exists(int row, int column) { return row / 16 <= column / 16; }

// The first part becomes the sum of all.
__device__ inline void add_up_thread(float* parts, int count, int64_t part, int n) {
  const int64_t entry = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (entry >= part) return;
  const int within = entry % (n * n);
  if (!exists(within / n, within % n)) return;
  float sum = 0.f;
#pragma unroll 8
  for (int i = 0; i < count; ++i) sum += parts[i * part + entry];
  parts[entry] = sum;
}

constexpr int FINISH_THREADS = 256;
constexpr int FINISH_BYTES = (MOST_ROWS * MOST_ROWS + MOST_ROWS + 8) * 4;

// Double-centred over |X_c|^2.
__device__ inline void finish_block(const Rows& rows, const float* sum, float* grams, float* unit,
                                    float scale, char* raw) {
  const int64_t matrix = blockIdx.x;
  const int n = rows.n, entries = n * n;
  float* gram = reinterpret_cast<float*>(raw);
  float* sums = gram + MOST_ROWS * MOST_ROWS;
  uint32_t* bits = reinterpret_cast<uint32_t*>(sums + MOST_ROWS);
  const Valid valid = find_valid(rows, matrix % rows.problems, MOST_ROWS / 32, bits);
  for (int i = threadIdx.x; i < entries; i += blockDim.x) {
    const int row = i / n, column = i % n;
    if (!exists(row, column)) continue;
    const float value = sum[matrix * entries + i];
    gram[i] = value;
    if (row / 16 != column / 16) gram[column * n + row] = value;
  }
  __syncthreads();
  for (int column = threadIdx.x; column < n; column += blockDim.x) {
    float of_column = 0.f;
    for (int row = 0; row < n; ++row) of_column += gram[row * n + column];
    sums[column] = of_column;
  }
  __syncthreads();
  float trace = 0.f, total = 0.f;
  for (int row = 0; row < n; ++row) {
    trace += gram[row * n + row];
    total += sums[row];
  }
  const float per_row = 1.f / max(valid.count, 1), mean = total * per_row * per_row;
  const float size = trace == 0.f ? 1.f : trace, inverse = 1.f / size;
  for (int i = threadIdx.x; i < entries; i += blockDim.x) {
    const int row = i / n, column = i % n;
    const float centred = gram[i] - (sums[row] + sums[column]) * per_row + mean;
    grams[matrix * entries + i] = valid(row) && valid(column) ? centred * inverse : 0.f;
  }
  if (threadIdx.x == 0) unit[matrix] = trace == 0.f ? 1.f : trace / (scale * scale);
}

constexpr int PAIR_THREADS = 128;

__device__ inline void pair_up_block(const Pairs& pairs, int count, char* raw) {
  const Rows& rows = pairs.rows;
  const int problem = blockIdx.x / unsigned(count), pair = blockIdx.x % unsigned(count);
  const int n = rows.n, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int i = pairs.layer[pair][0], j = pairs.layer[pair][1];
  float* sums = reinterpret_cast<float*>(raw);
  uint32_t* bits = reinterpret_cast<uint32_t*>(sums + 4 * PAIR_THREADS / 32);
  const Valid valid = find_valid(rows, problem, MOST_ROWS / 32, bits);
  const float *x = pairs.grams.at(i, problem, rows), *y = pairs.grams.at(j, problem, rows);
  float parts[4] = {};  // off the diagonal, on it, both traces
  for (int at = threadIdx.x; at < n * n; at += PAIR_THREADS) {
    const float a = x[at], b = y[at];
    if (at % (n + 1) != 0) {
      parts[0] = fmaf(a, b, parts[0]);
    } else {
      parts[1] = fmaf(a, b, parts[1]);
      parts[2] += a;
      parts[3] += b;
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    parts[k] = sum_of_warp(parts[k]);
    if (lane == 0) sums[4 * warp + k] = parts[k];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < PAIR_THREADS / 32; ++w) {
    for (int k = 0; k < 4; ++k) parts[k] += sums[4 * w + k];
  }
  const Sums both{parts[0], parts[1]};
  pairs.inner[int64_t(pair) * rows.problems + problem] =
      both.inner(parts[2], parts[3], valid.count, rows.unbiased, i == j);
}

template <typename L>
__device__ void apply_block(const Gradients& call, char* raw) {
  using T = typename L::T;
  const Rows& rows = call.rows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n = rows.n;
  const int problem = blockIdx.x / unsigned(call.blocks);
  const int part = blockIdx.x % unsigned(call.blocks);
  const auto& of = call.at[blockIdx.y];
  const Memory<L> memory(raw, L::BYTES_BACKWARD);
  const Valid valid = find_valid(rows, problem, L::W, memory.bits);

  // M = sum of c G', where this warp's operand has its entries, in units of the largest of all.
  float m[2 * L::W][8];
#pragma unroll
  for (int k = 0; k < 2 * L::W; ++k) {
#pragma unroll
    for (int i = 0; i < 8; ++i) m[k][i] = 0.f;
  }
  for (int term = of.begin; term < of.end; ++term) {
    const auto [layer, pair, factor] = call.terms[term];
    const float* gram = call.grams.at(layer, problem, rows);
    const float upstream =
        factor * call.upstream.data[pair * call.upstream.pair + problem * call.upstream.problem];
    float* diagonal = memory.diagonal;
    if (rows.unbiased) {
      __syncthreads();  // the one before has been read
      for (int row = threadIdx.x; row < L::ROWS; row += L::THREADS)
        diagonal[row] = row < n ? gram[row * (n + 1)] : 0.f;
      __syncthreads();
    }
    const Centring centring(rows.unbiased ? trace_of<L>(diagonal) : 0.f, valid.count);
#pragma unroll
    for (int k = 0; k < 2 * L::W; ++k) {
      no_further();
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = 16 * warp + entry_row(lane, i), column = 16 * k + entry_column(lane, i);
        if (row >= n || column >= n || !valid(row) || !valid(column)) continue;
        float value = gram[row * n + column];
        if (rows.unbiased)
          value = row == column ? 0.f : value + centring(diagonal[row], diagonal[column]);
        m[k][i] = fmaf(upstream, value, m[k][i]);
      }
    }
  }
  float largest = 0.f;
#pragma unroll
  for (int k = 0; k < 2 * L::W; ++k) {
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = max_or_nan(largest, fabsf(m[k][i]));
  }
  largest = max_of_warp(largest);
  if (lane == 0) memory.sums[warp] = largest;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < 2 * L::W; ++w) largest = max_or_nan(largest, memory.sums[w]);
  if (largest < LEAST) largest = 1.f;
  const float inverse = 1.f / largest;
  uint32_t operand[2 * L::W][4];
#pragma unroll
  for (int k = 0; k < 2 * L::W; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i)  // entries (2 i, 2 i + 1) of m are operand i
      operand[k][i] = pack<T>(m[k][2 * i] * inverse, m[k][2 * i + 1] * inverse);
  }
  const float factor = 2.f / (L::SCALE * of.unit[problem]) * largest;
  const int columns = columns_of_part(of.layer.width, call.blocks);
  multiply_features<L>(operand, factor, of.layer, of.gradient, n, problem, part * columns,
                       (part + 1) * columns, valid, valid.count >= (rows.unbiased ? 4 : 2), memory);
}

}  // namespace kdfast::cka
