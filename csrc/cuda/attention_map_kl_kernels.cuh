// The kernels of attention_map_kl: KL divergence between attention maps that exist, [B, H, Nq, Nk].
//
// Bytes are the limit: each map is read once, by 16-byte loads, and a row stays in the registers of
// a group of lanes (part of a warp, a warp, or a block) until it is done with; only rows of more
// than 4096 entries are read again for every sweep. Backward finds a row's maxima and sums anew,
// as it holds the row anyway: exp(x - lse) would lose |x| 2^-24 where exp(x - max) / sum does not.

#pragma once

#include "attention_map_kl.cuh"
#include "numbers.cuh"

namespace kdfast::map {

struct Map {
  const void* data;
  int64_t batch, head, row;  // strides, in elements
};

struct Problem {
  Map s, t;
  const uint8_t* mask;  // [B, Nk], or null
  int64_t mask_batch, mask_key;
  int heads, queries, keys;
  int heads_of_all;  // batch times heads
  bool scores, aligned, mask_aligned;
  Direction direction;
  float *rows, *inner, *lse_s, *lse_t;  // [B, H, Nq]: written by forward, read by backward
  const float* upstream;                // backward: the rows' gradients
  int64_t upstream_batch, upstream_head, upstream_row;
  void* gradient;
};

// Sixteen bytes of each map.
template <typename T>
struct alignas(16) Vector {
  static constexpr int SIZE = 16 / sizeof(T);
  T at[SIZE];
};

template <typename T>
struct Chunk {
  Vector<T> s, t;

  // Makes the compiler convert half precision anew for every sweep: to keep the floats as well
  // would take the registers of other rows.
  __device__ void forget_floats() {
#ifdef __CUDA_ARCH__
    uint32_t(&words)[8] = reinterpret_cast<uint32_t(&)[8]>(*this);
#pragma unroll
    for (uint32_t& word : words) asm volatile("" : "+r"(word));
#endif
  }
};

template <typename T>
struct Row {
  const T *s, *t;
  const uint8_t* mask;
  int64_t index;  // of its statistics
  int batch, head, query;
  bool exists, idle;

  __device__ Row(const Problem& problem, int of_head, int query) : query(query) {
    batch = unsigned(of_head) / unsigned(problem.heads);
    head = of_head - batch * problem.heads;
    exists = query < problem.queries;
    index = int64_t(of_head) * problem.queries + query;
    s = start(problem.s);
    t = start(problem.t);
    mask = problem.mask ? problem.mask + batch * problem.mask_batch : nullptr;
    // With Nq = Nk, the padding takes out queries as well.
    idle = !exists || (mask && problem.queries == problem.keys && !mask[query * problem.mask_key]);
  }

  __device__ const T* start(const Map& map) const {
    return static_cast<const T*>(map.data) + batch * map.batch + head * map.head + query * map.row;
  }

  // The entries from `first` on; those that do not exist or are hidden have no mass on either side.
  __device__ Chunk<T> load(const Problem& problem, int first) const {
    constexpr int SIZE = Vector<T>::SIZE;
    const T absent = from_float<T>(problem.scores ? -infinity() : 0.f);
    Chunk<T> chunk;
    if (!idle && problem.aligned && first + SIZE <= problem.keys) {
      *reinterpret_cast<uint4*>(&chunk.s) = __ldcs(reinterpret_cast<const uint4*>(s + first));
      *reinterpret_cast<uint4*>(&chunk.t) = __ldcs(reinterpret_cast<const uint4*>(t + first));
    } else {
#pragma unroll
      for (int i = 0; i < SIZE; ++i) {
        const bool inside = !idle && first + i < problem.keys;
        chunk.s.at[i] = inside ? s[first + i] : absent;
        chunk.t.at[i] = inside ? t[first + i] : absent;
      }
    }
    if (mask && !idle && first < problem.keys) {
      uint64_t tokens = 0;  // one byte per entry
      if (problem.mask_aligned && first + SIZE <= problem.keys) {
        using Bytes = std::conditional_t<SIZE == 8, uint64_t, uint32_t>;
        tokens = *reinterpret_cast<const Bytes*>(mask + first);
      } else {
        for (int i = 0; i < SIZE && first + i < problem.keys; ++i)
          tokens |= uint64_t(mask[(first + i) * problem.mask_key]) << (8 * i);
      }
#pragma unroll
      for (int i = 0; i < SIZE; ++i) {
        if (tokens >> (8 * i) & 255) continue;
        chunk.s.at[i] = chunk.t.at[i] = absent;
      }
    }
    return chunk;
  }
};

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};

struct Max {
  __device__ float operator()(float a, float b) const { return max_or_nan(a, b); }
};

// The lanes that hold one row, and how they agree.
template <int LANES>
struct Group {
  template <int COUNT, typename Operation>
  static __device__ void reduce(float (&values)[COUNT], Operation operation) {
#pragma unroll
    for (int offset = (LANES < 32 ? LANES : 32) / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (float& value : values)
        value = operation(value, __shfl_xor_sync(0xffffffff, value, offset));
    }
    if constexpr (LANES > 32) {
      __shared__ float of_warps[COUNT][LANES / 32];
      __syncthreads();  // the last reduction has been read
      if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) of_warps[i][threadIdx.x / 32] = values[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        values[i] = of_warps[i][0];
        for (int warp = 1; warp < LANES / 32; ++warp)
          values[i] = operation(values[i], of_warps[i][warp]);
      }
    }
  }
};

struct Blocks {
  unsigned x, y, z;
};

// How the entries of a row lie in a group: LANES lanes of ELEMENTS each. Not RESIDENT: the lanes
// walk over a row of any length, ELEMENTS at a time.
template <typename T_, int LANES_, int ELEMENTS_, bool RESIDENT_>
struct Layout {
  using T = T_;
  static constexpr int LANES = LANES_, ELEMENTS = ELEMENTS_;
  static constexpr bool RESIDENT = RESIDENT_;
  static constexpr int THREADS = LANES > 128 ? LANES : 128;
  static constexpr int ROWS = THREADS / LANES;  // of a block
  // Blocks that a multiprocessor must hold to have enough bytes on the way; this bounds registers.
  static constexpr int RESIDENTS = 768 / THREADS;
  static constexpr int SIZE = Vector<T>::SIZE, CHUNKS = ELEMENTS / SIZE;
  static constexpr bool EXACT = std::is_same_v<T, float>;

  // Blocks (x, y, z): rows of a head, and heads over the other two.
  static Blocks blocks(const Problem& problem) {
    const unsigned heads = problem.heads_of_all, y = heads < 32768 ? heads : 32768;
    return {unsigned(problem.queries + ROWS - 1) / ROWS, y, (heads + y - 1) / y};
  }
};

// run(layout) with the one for rows of `keys` entries.
template <typename T, typename Run>
void with_layout(int keys, Run run) {
  if (keys <= 128) run(Layout<T, 8, 16, true>());
  else if (keys <= 256) run(Layout<T, 16, 16, true>());
  else if (keys <= 512) run(Layout<T, 32, 16, true>());
  else if (keys <= 2048) run(Layout<T, 128, 16, true>());
  else if (keys <= 4096) run(Layout<T, 256, 16, true>());
  else run(Layout<T, 256, 16, false>());  // sweeps after the first read from the cache
}

// A row in registers, or the promise to read it.
template <typename L>
struct Entries {
  using T = typename L::T;
  Chunk<T> held[L::RESIDENT ? L::CHUNKS : 1];

  __device__ static int first(int lane, int chunk) { return (chunk * L::LANES + lane) * L::SIZE; }

  __device__ void load(const Problem& problem, const Row<T>& row, int lane) {
    if constexpr (L::RESIDENT) {
#pragma unroll
      for (int c = 0; c < L::CHUNKS; ++c) held[c] = row.load(problem, first(lane, c));
    }
  }

  // visit(first, chunk) for every chunk of this lane
  template <typename Visit>
  __device__ void each_chunk(const Problem& problem, const Row<T>& row, int lane, Visit visit) {
    if constexpr (L::RESIDENT) {
#pragma unroll
      for (int c = 0; c < L::CHUNKS; ++c) {
        if (!L::EXACT) held[c].forget_floats();
        visit(first(lane, c), held[c]);
      }
    } else {
#pragma unroll 1
      for (int c = 0; c * L::LANES * L::SIZE < problem.keys; ++c) {
        Chunk<T> chunk = row.load(problem, first(lane, c));
        visit(first(lane, c), chunk);
      }
    }
  }

  // visit(x_s, x_t) for every entry
  template <typename Visit>
  __device__ void each(const Problem& problem, const Row<T>& row, int lane, Visit visit) {
    each_chunk(problem, row, lane, [&](int, const Chunk<T>& chunk) {
#pragma unroll
      for (int i = 0; i < L::SIZE; ++i) visit(to_float(chunk.s.at[i]), to_float(chunk.t.at[i]));
    });
  }
};

template <typename L>
__device__ void forward_row(const Problem& problem, const Row<typename L::T>& row,
                            Entries<L>& entries, int lane) {
  using G = Group<L::LANES>;
  const bool js = problem.direction == JS;
  bool idle;
  float lse_s = 0.f, lse_t = 0.f, divergence, inner = 0.f;

  if (!problem.scores) {
    Terms terms;
    float present = 0.f;
    entries.each(problem, row, lane, [&](float p_s, float p_t) {
      present += p_s != 0.f || p_t != 0.f ? 1.f : 0.f;
      add_probabilities<L::EXACT>(terms, p_s, p_t, js);
    });
    float sums[] = {present, terms.divergence, terms.inner};
    G::reduce(sums, Add());
    idle = sums[0] == 0.f;
    divergence = sums[1];
    inner = sums[2];
  } else {
    float maxima[] = {-infinity(), -infinity()};
    entries.each(problem, row, lane, [&](float x_s, float x_t) {
      maxima[0] = max_or_nan(maxima[0], x_s);
      maxima[1] = max_or_nan(maxima[1], x_t);
    });
    G::reduce(maxima, Max());
    idle = maxima[0] == -infinity() && maxima[1] == -infinity();
    const float largest_s = maxima[0], largest_t = maxima[1];
    float sums[] = {0.f, 0.f, 0.f};
    entries.each(problem, row, lane, [&](float x_s, float x_t) {
      const float u_s = shifted(x_s, largest_s), u_t = shifted(x_t, largest_t);
      const float e_t = exp2_fast(u_t);
      sums[0] += exp2_fast(u_s);
      sums[1] += e_t;
      sums[2] += expectation(e_t, u_t - u_s);
    });
    G::reduce(sums, Add());
    const float l_s = sums[0], l_t = sums[1], log2_ratio = log2f(l_s / l_t);
    const float inverse_s = inverse(l_s), inverse_t = inverse(l_t);
    lse_s = largest_s + log_of<L::EXACT>(l_s);
    lse_t = largest_t + log_of<L::EXACT>(l_t);
    divergence = LN_2 * fmaf(sums[2], inverse_t, log2_ratio);
    if (js) {
      Terms terms;
      entries.each(problem, row, lane, [&](float x_s, float x_t) {
        const float u_s = shifted(x_s, largest_s), u_t = shifted(x_t, largest_t);
        add_scores_js<L::EXACT>(terms, u_s, u_t, exp2_fast(u_s) * inverse_s,
                                exp2_fast(u_t) * inverse_t, log2_ratio);
      });
      float both[] = {terms.divergence, terms.inner};
      G::reduce(both, Add());
      divergence = both[0];
      inner = both[1];
    }
  }

  if (lane != 0 || !row.exists) return;
  problem.rows[row.index] = idle ? 0.f : js ? 0.5f * (divergence + inner) : divergence;
  if (js) problem.inner[row.index] = idle ? 0.f : inner;
  problem.lse_s[row.index] = idle ? infinity() : lse_s;
  problem.lse_t[row.index] = idle ? infinity() : lse_t;
}

// visit(row, entries, lane) for the row of this group, whose entries have been loaded.
template <typename L, typename Visit>
__device__ void with_row(const Problem& problem, Visit visit) {
  const int lane = threadIdx.x % L::LANES;
  const int of_head = blockIdx.z * gridDim.y + blockIdx.y;
  if (of_head >= problem.heads_of_all) return;
  const Row<typename L::T> row(problem, of_head, blockIdx.x * L::ROWS + threadIdx.x / L::LANES);
  Entries<L> entries;
  entries.load(problem, row, lane);
  visit(row, entries, lane);
}

template <typename L>
__device__ void backward_row(const Problem& problem, const Row<typename L::T>& row,
                             Entries<L>& entries, int lane) {
  using T = typename L::T;
  using G = Group<L::LANES>;
  const bool idle = row.idle || problem.lse_s[row.index] == infinity();
  float upstream = 0.f, divergence = 0.f;
  if (!idle) {
    upstream = problem.upstream[row.batch * problem.upstream_batch +
                                row.head * problem.upstream_head +
                                row.query * problem.upstream_row];
    divergence = problem.direction == JS ? problem.inner[row.index] : problem.rows[row.index];
  }
  float largest_s = 0.f, largest_t = 0.f, inverse_s = 1.f, inverse_t = 1.f, log2_ratio = 0.f;
  if (problem.scores) {
    float maxima[] = {-infinity(), -infinity()};
    entries.each(problem, row, lane, [&](float x_s, float x_t) {
      maxima[0] = max_or_nan(maxima[0], x_s);
      maxima[1] = max_or_nan(maxima[1], x_t);
    });
    G::reduce(maxima, Max());
    largest_s = maxima[0];
    largest_t = maxima[1];
    float sums[] = {0.f, 0.f};
    entries.each(problem, row, lane, [&](float x_s, float x_t) {
      sums[0] += exp2_fast(shifted(x_s, largest_s));
      sums[1] += exp2_fast(shifted(x_t, largest_t));
    });
    G::reduce(sums, Add());
    inverse_s = inverse(sums[0]);
    inverse_t = inverse(sums[1]);
    log2_ratio = log2f(sums[0] / sums[1]);
  }
  if (!row.exists) return;

  T* gradient = static_cast<T*>(problem.gradient) + row.index * problem.keys;
  const bool aligned = problem.keys % L::SIZE == 0;
  entries.each_chunk(problem, row, lane, [&](int first, const Chunk<T>& chunk) {
    if (first >= problem.keys) return;
    Vector<T> out;
#pragma unroll
    for (int i = 0; i < L::SIZE; ++i) {
      const float x_s = to_float(chunk.s.at[i]), x_t = to_float(chunk.t.at[i]);
      float value;
      bool absent = idle;
      if (!problem.scores) {
        value = gradient_of_probability<L::EXACT>(x_s, x_t, problem.direction);
      } else {
        const float u_s = shifted(x_s, largest_s), u_t = shifted(x_t, largest_t);
        value = gradient_of_score<L::EXACT>(u_s, u_t, exp2_fast(u_s) * inverse_s,
                                            exp2_fast(u_t) * inverse_t, log2_ratio, divergence,
                                            problem.direction);
        absent |= x_s == -infinity() && x_t == -infinity();
      }
      out.at[i] = from_float<T>(absent ? 0.f : upstream * value);
    }
    if (aligned) {
      __stcs(reinterpret_cast<uint4*>(gradient + first), *reinterpret_cast<uint4*>(&out));
    } else {
#pragma unroll
      for (int i = 0; i < L::SIZE; ++i) {
        if (first + i < problem.keys) gradient[first + i] = out.at[i];
      }
    }
  });
}

}  // namespace kdfast::map
