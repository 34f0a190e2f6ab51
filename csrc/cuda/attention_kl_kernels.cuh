// The kernels of attention_kl for Hopper: both maps' scores by tensor cores, tile by tile, never in
// memory.
//
// A block holds 64 rows of one side ("still") per warpgroup and walks over tiles of 64 rows of the
// other ("moving"); tiles of both models come by cp.async into a ring of stages in shared memory,
// two tiles ahead. Registers suffice for four warpgroups on a multiprocessor forward and three
// backward, which go at their own pace: while some evaluate exponentials, the tensor cores make the
// scores of others. Backward makes one exponential in four by arithmetic (a forward block has too
// many other instructions for that to pay).
//
//   forward         still queries, moving keys; each thread keeps the sums of its part of two rows
//   backward, dQ    still queries, moving keys; dQ += dS K from dS in registers
//   backward, dK    still keys, moving queries; the scores are made transposed, so that dS^T is
//                   again where wgmma wants its operand; the heads of a group are walked in turn
//
// No atomics, hence the same bits every time. Scores are made again in backward from the saved
// log-sum-exps, for dQ and for dK.

#pragma once

#include "attention_kl.cuh"
#include "hopper.cuh"

namespace kdfast::attention {

using namespace hopper;

constexpr int PAIRS = 16;  // in one launch; the table travels by value
constexpr int STAGES_FORWARD = 3, STAGES_BACKWARD = 4;
constexpr int WARPGROUPS_FORWARD = 4;  // at most, in a block
constexpr int warpgroups_backward(int panels_s) { return panels_s == 1 ? 3 : 2; }
constexpr int STATISTICS = 4;          // numbers per query, for dK
constexpr int BLOCKS = 65535;          // of a grid's second and third dimension
// A block keeps one bit for each token of the moving side in shared memory.
constexpr int TOKENS = 200'000, SHARED_BYTES = 227 * 1024;

struct Operand {
  const void* data;
  int64_t batch, head, row;  // strides, in elements
  int width;
  int group;  // query heads per head of this operand

  __host__ __device__ int panels() const { return (width + PANEL - 1) / PANEL; }
};

struct Pair {
  Operand query_s, key_s, query_t, key_t;
  float scale_s, c_s, c_t;
  int heads;       // of the queries
  int start;       // heads of the pairs before it in this launch
  int first_head;  // and in the statistics
  void *grad_query, *grad_key;
  const float* upstream;
};

struct Strides {
  int64_t batch, head, row;
};

struct Problem {
  Pair pairs[PAIRS];
  int count;
  Band band;
  bool banded, reverse, tokens_first;
  const uint8_t *key_mask, *query_mask;  // or null
  int64_t key_mask_batch, key_mask_row, query_mask_batch, query_mask_row;
  int heads;  // of all pairs, in the statistics
  float *rows, *lse_s, *lse_t;
  Strides upstream;
};
static_assert(sizeof(Problem) <= 4096, "kernel arguments");

// Where things lie in shared memory, from a base aligned to the swizzle pattern.
struct Memory {
  uint32_t base, still_s, still_t, ring_s, ring_t, stage, statistics, turns;
  uint32_t still_stride;  // panels of the still side: one tile per warpgroup between them
  uint32_t *bits, *row_bits;
  uint8_t* before;

  // A short moving side needs no more stages than it has tiles.
  __host__ __device__ static constexpr int used(int stages, int moving) {
    const int tiles = (moving + COLUMNS - 1) / COLUMNS;
    return tiles < stages ? tiles : stages;
  }
  // Bytes of everything, for the host.
  static constexpr size_t bytes(int warpgroups, int stages, int panels_s, int panels_t,
                                int moving) {
    const size_t panels = panels_s + panels_t;
    stages = used(stages, moving);
    return 1024 + (warpgroups + stages) * panels * TILE_BYTES +
           stages * STATISTICS * COLUMNS * sizeof(float) + bits_bytes(moving) + 512;
  }
  __host__ __device__ static constexpr size_t bits_bytes(int moving) {
    return (moving + 63) / 64 * 8;
  }

  __device__ Memory(char* raw, int stages, int panels_s, int panels_t, int moving) {
    const int warpgroups = blockDim.x / THREADS;
    stages = used(stages, moving);
    base = (shared_address(raw) + 1023) & ~1023u;
    still_stride = warpgroups * TILE_BYTES;
    still_s = base;
    still_t = still_s + panels_s * still_stride;
    ring_s = still_t + panels_t * still_stride;
    ring_t = ring_s + panels_s * TILE_BYTES;
    stage = (panels_s + panels_t) * TILE_BYTES;
    statistics = ring_s + stages * stage;
    char* after = raw + (statistics - shared_address(raw)) +
                  stages * STATISTICS * COLUMNS * sizeof(float);
    bits = reinterpret_cast<uint32_t*>(after);
    row_bits = reinterpret_cast<uint32_t*>(after + bits_bytes(moving));
    before = reinterpret_cast<uint8_t*>(row_bits + 8);
    turns = shared_address(row_bits + 120);
  }
};

static_assert(Memory::bytes(3, STAGES_FORWARD, 2, 2, TOKENS) <= SHARED_BYTES, "forward");
static_assert(Memory::bytes(warpgroups_backward(1), STAGES_BACKWARD, 1, 2, TOKENS) <= SHARED_BYTES,
              "backward, a narrow student");
static_assert(Memory::bytes(warpgroups_backward(2), STAGES_BACKWARD, 2, 2, TOKENS) <= SHARED_BYTES,
              "backward");

// One bit for each of `count` indices, zeros up to a multiple of 64.
template <typename Chosen>
__device__ void write_bits(uint32_t* bits, int count, Chosen chosen) {
  const int words = (count + 63) / 64 * 2;
  for (int word = threadIdx.x / 32; word < words; word += blockDim.x / 32) {
    const int index = word * 32 + threadIdx.x % 32;
    const uint32_t ballot = __ballot_sync(0xffffffff, index < count && chosen(index));
    if (threadIdx.x % 32 == 0) bits[word] = ballot;
  }
}

// Rows [first, first + 64) of `data`, which is of operand x, into a tile; those not `wanted` become
// zeros, and what is missing from the width as well.
template <typename Wanted>
__device__ void load_rows(uint32_t tile, uint32_t panel_stride, const Operand& x, const void* data,
                          int first, Wanted wanted) {
  const int chunk = threadIdx.x % 8, panels = x.panels();
  for (int row = threadIdx.x / 8; row < ROWS; row += blockDim.x / 8) {
    const bool valid = wanted(first + row);
    const char* source =
        static_cast<const char*>(data) + (valid ? (first + row) * x.row * 2 : 0);
    const uint32_t target = tile + swizzled(row, chunk);
    for (int panel = 0; panel < panels; ++panel) {
      const int byte = panel * ROW_BYTES + chunk * 16;
      const bool inside = byte < x.width * 2;
      copy_16(target + panel * panel_stride, source + (inside ? byte : 0), valid && inside);
    }
  }
}

// z = X Y^T of two tiles, of one panel or two.
template <typename T>
__device__ void scores(float (&z)[PER_THREAD], uint32_t x, uint32_t x_stride, uint32_t y,
                       bool wide) {
  products_begin();
#pragma unroll
  for (int step = 0; step < PANEL / 16; ++step)
    multiply<T>(z, descriptor(x + along_rows(step)), descriptor(y + along_rows(step)), step > 0);
  if (!wide) return;
  products_begin();
#pragma unroll
  for (int step = 0; step < PANEL / 16; ++step)
    multiply<T>(z, descriptor(x + x_stride + along_rows(step)),
                descriptor(y + TILE_BYTES + along_rows(step)), 1);
}

__device__ const void* start(const Operand& x, int batch, int head) {
  return static_cast<const char*>(x.data) +
         (batch * x.batch + head / x.group * x.head) * int64_t(2);
}

__device__ const Pair& find_pair(const Problem& problem, int head) {
  int p = 0;
  while (p + 1 < problem.count && head >= problem.pairs[p + 1].start) ++p;
  return problem.pairs[p];
}

// Walks over the tiles of the moving side that have a bit set.
struct Tiles {
  const uint32_t* bits;
  int end;

  __device__ int from(int tile) const {
    while (tile < end && (bits[2 * tile] | bits[2 * tile + 1]) == 0) ++tile;
    return tile;
  }
  __device__ bool full(int tile) const { return (bits[2 * tile] & bits[2 * tile + 1]) == ~0u; }
};

template <typename T>
__device__ void forward_block(const Problem& problem, char* raw) {
  const Pair& pair = find_pair(problem, blockIdx.y);
  const Band& band = problem.band;
  const int head = blockIdx.y - pair.start, batch = blockIdx.z;
  const int thread = threadIdx.x % THREADS, warpgroup = threadIdx.x / THREADS;
  const int panels_s = pair.query_s.panels(), panels_t = pair.query_t.panels();
  const Memory memory(raw, STAGES_FORWARD, panels_s, panels_t, band.keys);
  // The last rows see the most keys under a causal mask: they go first.
  const int block_rows = blockDim.x / THREADS * ROWS;
  const int first = (gridDim.x - 1 - blockIdx.x) * block_rows;
  const int end = min(first + block_rows, band.queries), row0 = first + warpgroup * ROWS;

  bool active[2], seen[2] = {false, false};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = row0 + accumulator_row(thread, half * 2);
    active[half] = query < band.queries &&
                   (!problem.query_mask || problem.query_mask[batch * problem.query_mask_batch +
                                                              query * problem.query_mask_row]);
  }
  write_bits(memory.bits, band.keys, [&](int key) {
    return !problem.key_mask ||
           problem.key_mask[batch * problem.key_mask_batch + key * problem.key_mask_row];
  });
  Turns turns(memory.turns, blockDim.x / 32);
  const bool any = __syncthreads_or(active[0] || active[1]);

  Row rows[2];
  if (any) {
    const Tiles tiles{memory.bits, (band.end_key(end - 1) + COLUMNS - 1) / COLUMNS};
    const void* query_s = start(pair.query_s, batch, head);
    const void* query_t = start(pair.query_t, batch, head);
    const void* key_s = start(pair.key_s, batch, head);
    const void* key_t = start(pair.key_t, batch, head);
    auto load = [&](int tile, int stage) {
      auto wanted = [&](int key) { return memory.bits[key / 32] >> key % 32 & 1; };
      if (tile < tiles.end) {
        load_rows(memory.ring_s + stage * memory.stage, TILE_BYTES, pair.key_s, key_s,
                  tile * COLUMNS, wanted);
        load_rows(memory.ring_t + stage * memory.stage, TILE_BYTES, pair.key_t, key_t,
                  tile * COLUMNS, wanted);
      }
      end_of_copies();
    };
    for (int w = 0; w < blockDim.x / THREADS; ++w) {
      auto inside = [&](int query) { return query < band.queries; };
      load_rows(memory.still_s + w * TILE_BYTES, memory.still_stride, pair.query_s, query_s,
                first + w * ROWS, inside);
      load_rows(memory.still_t + w * TILE_BYTES, memory.still_stride, pair.query_t, query_t,
                first + w * ROWS, inside);
    }

    const uint32_t mine_s = memory.still_s + warpgroup * TILE_BYTES;
    const uint32_t mine_t = memory.still_t + warpgroup * TILE_BYTES;
    auto sweep = [&](auto guarded) {
      int tile = tiles.from(band.first_key(first) / COLUMNS), stage = 0;
      int next = tiles.from(tile + 1);
      load(tile, 0);
      load(next, 1);
      turns.arrive<1>();
#pragma unroll 1
      while (tile < tiles.end) {
        turns.wait();  // the tile is here, and the one before it has been multiplied
        const int after = tiles.from(next + 1);
        load(after, stage == 0 ? 2 : stage - 1);
        const uint32_t here = stage * memory.stage;
        stage = stage + 1 == STAGES_FORWARD ? 0 : stage + 1;

        float z_s[PER_THREAD], z_t[PER_THREAD];
        hold(z_s);
        hold(z_t);
        scores<T>(z_s, mine_s, memory.still_stride, memory.ring_s + here, panels_s == 2);
        scores<T>(z_t, mine_t, memory.still_stride, memory.ring_t + here, panels_t == 2);
        products_end();
        products_wait<0>();
        hold(z_s);
        hold(z_t);
        turns.arrive<1>();

        const int key0 = tile * COLUMNS;
        if (tiles.full(tile) && band.all(row0, row0 + ROWS, key0, key0 + COLUMNS)) {
          seen[0] = seen[1] = true;
        } else {
          const uint32_t bits[2] = {memory.bits[2 * tile], memory.bits[2 * tile + 1]};
#pragma unroll
          for (int i = 0; i < PER_THREAD; ++i) {
            const int column = accumulator_column(thread, i);
            const bool visible = (bits[i / 16] >> column % 32 & 1) &&
                                 band.sees(row0 + accumulator_row(thread, i), key0 + column);
            seen[i / 2 % 2] |= visible;
            z_s[i] = visible ? z_s[i] : HIDDEN;
            z_t[i] = visible ? z_t[i] : HIDDEN;
          }
        }
        take<decltype(guarded)::value>(rows, z_s, z_t, pair.c_s, pair.c_t);
        tile = next;
        next = after;
      }
      all_copies_done();
    };
    sweep(std::false_type());
    // Scores of -inf are rare, so what they need is asked for afterwards.
    if (__syncthreads_or((active[0] && std::isnan(rows[0].a)) ||
                         (active[1] && std::isnan(rows[1].a)))) {
      rows[0] = rows[1] = Row();
      sweep(std::true_type());
    }
  }

  // Four lanes hold the parts of a row.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Row& row = rows[half];
    int sees = seen[half];
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
      Row other;
      other.m_s = __shfl_xor_sync(0xffffffff, row.m_s, offset);
      other.m_t = __shfl_xor_sync(0xffffffff, row.m_t, offset);
      other.l_s = __shfl_xor_sync(0xffffffff, row.l_s, offset);
      other.l_t = __shfl_xor_sync(0xffffffff, row.l_t, offset);
      other.a = __shfl_xor_sync(0xffffffff, row.a, offset);
      sees |= __shfl_xor_sync(0xffffffff, sees, offset);
      row.merge(other, pair.c_s, pair.c_t);
    }
    const int query = row0 + accumulator_row(thread, half * 2);
    if (thread % 4 != 0 || query >= band.queries) continue;
    const bool idle = !active[half] || !sees;
    const int64_t index =
        (int64_t(batch) * problem.heads + pair.first_head + head) * band.queries + query;
    problem.rows[index] = idle ? 0.f : row.divergence();
    problem.lse_s[index] = idle ? HUGE_VALF : row.lse_s(pair.c_s);
    problem.lse_t[index] = idle ? HUGE_VALF : row.lse_t(pair.c_t);
  }
}

// The gradient of 64 rows of queries, or of keys (KEYS), per warpgroup.
template <typename T, int PANELS_S, bool KEYS>
__device__ void backward_block(const Problem& problem, char* raw) {
  const Pair& pair = find_pair(problem, blockIdx.y);
  const Band& band = problem.band;
  const int batch = blockIdx.z, thread = threadIdx.x % THREADS;
  const int warpgroup = threadIdx.x / THREADS, warpgroups = blockDim.x / THREADS;
  const int count = KEYS ? band.keys : band.queries, moving = KEYS ? band.queries : band.keys;
  const int panels_t = pair.query_t.panels();
  const Memory memory(raw, STAGES_BACKWARD, PANELS_S, panels_t, moving);
  // Under a causal mask the last queries see most, and the first keys are seen by most.
  const int first = (KEYS ? blockIdx.x : gridDim.x - 1 - blockIdx.x) * warpgroups * ROWS;
  const int end = min(first + warpgroups * ROWS, count), row0 = first + warpgroup * ROWS;
  const int members = KEYS ? pair.key_s.group : 1;
  const int head0 = (blockIdx.y - pair.start) * members;

  const int64_t first_statistic =
      (int64_t(batch) * problem.heads + pair.first_head + head0) * band.queries;
  const float* upstream =
      pair.upstream + batch * problem.upstream.batch + head0 * problem.upstream.head;
  auto takes_part = [&](int query) { return problem.lse_s[first_statistic + query] != HUGE_VALF; };
  auto is_token = [&](int key) {
    return !problem.key_mask ||
           problem.key_mask[batch * problem.key_mask_batch + key * problem.key_mask_row];
  };
  write_bits(memory.bits, moving, [&](int i) { return KEYS ? takes_part(i) : is_token(i); });
  write_bits(memory.row_bits, warpgroups * ROWS, [&](int i) {
    return first + i < count && (KEYS ? is_token(first + i) : takes_part(first + i));
  });
  Turns turns(memory.turns, blockDim.x / 32);
  __syncthreads();
  const bool whole =
      (memory.row_bits[2 * warpgroup] & memory.row_bits[2 * warpgroup + 1]) == ~0u;
  bool chosen[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warpgroup * ROWS + accumulator_row(thread, half * 2);
    chosen[half] = memory.row_bits[row / 32] >> row % 32 & 1;
  }

  // float16 has few exponents: it holds dS times a factor that uses its range, as |dS / g| <= 1 and
  // in reverse <= 2 KL + 1. The factor passes over NaN, since dS has it and other rows need theirs.
  constexpr bool NARROW = std::is_same_v<T, __half>;
  constexpr float RANGE = 4096.f;
  float unit = 1.f;  // of all rows together, for dK
  if constexpr (KEYS && NARROW) {
    float largest = 0.f;
    for (int i = threadIdx.x; i < members * moving; i += blockDim.x) {
      const int member = i / moving, query = i % moving;
      if (!(memory.bits[query / 32] >> query % 32 & 1)) continue;
      const float g = upstream[member * problem.upstream.head + query * problem.upstream.row];
      const float divergence = problem.rows[first_statistic + i];
      largest = fmaxf(largest, fabsf(g) * (problem.reverse ? 2.f * divergence + 1.f : 1.f));
    }
    float* of_warps = reinterpret_cast<float*>(raw);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, offset));
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
    __syncthreads();
    for (int warp = 0; warp < blockDim.x / 32; ++warp) largest = fmaxf(largest, of_warps[warp]);
    __syncthreads();
    if (largest < HUGE_VALF) unit = RANGE / fmaxf(largest, 1e-30f);
  }

  // Of the two rows of this thread, for dQ.
  float lse_s[2], lse_t[2], divergence[2], weight[2], factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    lse_s[half] = lse_t[half] = divergence[half] = 0.f;
    weight[half] = 1.f;
    factor[half] = pair.scale_s / unit;
    if (KEYS) continue;
    factor[half] = 0.f;
    if (!chosen[half]) continue;
    const int query = row0 + accumulator_row(thread, half * 2);
    lse_s[half] = problem.lse_s[first_statistic + query] * LOG2_E;
    lse_t[half] = problem.lse_t[first_statistic + query] * LOG2_E;
    divergence[half] = problem.rows[first_statistic + query];
    if (NARROW) weight[half] = RANGE / (problem.reverse ? 2.f * divergence[half] + 1.f : 1.f);
    factor[half] = upstream[query * problem.upstream.row] * pair.scale_s / weight[half];
  }
  if (!KEYS && problem.banded) {
    // How many rows that take part come before each: which keys any of them sees.
    for (int row = threadIdx.x; row <= warpgroups * ROWS; row += blockDim.x) {
      int before = 0;
      for (int word = 0; word <= row / 32 && word < warpgroups * 2; ++word) {
        const uint32_t upto = word < row / 32 ? ~0u : (1u << row % 32) - 1;
        before += __popc(memory.row_bits[word] & upto);
      }
      memory.before[row] = before;
    }
    __syncthreads();
  }

  const int from_tile = (KEYS ? band.first_query(first) : band.first_key(first)) / COLUMNS;
  const int moving_end = KEYS ? band.end_query(end - 1) : band.end_key(end - 1);
  const Tiles tiles{memory.bits, (moving_end + COLUMNS - 1) / COLUMNS};
  const uint32_t mine_s = memory.still_s + warpgroup * TILE_BYTES;
  const uint32_t mine_t = memory.still_t + warpgroup * TILE_BYTES;
  float out[PANELS_S][PER_THREAD];
#pragma unroll
  for (int panel = 0; panel < PANELS_S; ++panel) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) out[panel][i] = 0.f;
    hold(out[panel]);  // zeros set later, among the products, would make these wait for each other
  }

#pragma unroll 1
  for (int member = 0; member < members; ++member) {
    const int head = head0 + member;
    const Operand& still_s = KEYS ? pair.key_s : pair.query_s;
    const Operand& still_t = KEYS ? pair.key_t : pair.query_t;
    const Operand& moving_s = KEYS ? pair.query_s : pair.key_s;
    const Operand& moving_t = KEYS ? pair.query_t : pair.key_t;
    const void* tile_s = start(moving_s, batch, head);
    const void* tile_t = start(moving_t, batch, head);
    auto load = [&](int tile, int stage) {
      // What nobody sees may be NaN, and 0 NaN is no 0.
      auto wanted = [&](int index) {
        bool some = memory.bits[index / 32] >> index % 32 & 1;
        if (!KEYS && problem.banded) {
          const int low = max(band.first_query(index) - first, 0);
          const int high = min(band.end_query(index), end) - first;
          some = some && low < high && memory.before[low] != memory.before[high];
        }
        return some;
      };
      if (tile < tiles.end) {
        load_rows(memory.ring_s + stage * memory.stage, TILE_BYTES, moving_s, tile_s,
                  tile * COLUMNS, wanted);
        load_rows(memory.ring_t + stage * memory.stage, TILE_BYTES, moving_t, tile_t,
                  tile * COLUMNS, wanted);
        if constexpr (KEYS) {
          const int column = threadIdx.x % COLUMNS, query = tile * COLUMNS + column;
          const bool valid = query < moving;
          const int64_t at = first_statistic + int64_t(member) * moving + (valid ? query : 0);
          for (int which = threadIdx.x / COLUMNS; which < STATISTICS;
               which += blockDim.x / COLUMNS) {
            const float* source =
                which == 0   ? problem.lse_s + at
                : which == 1 ? problem.lse_t + at
                : which == 2 ? problem.rows + at
                             : upstream + member * problem.upstream.head +
                                   (valid ? query : 0) * problem.upstream.row;
            copy_4(memory.statistics + ((stage * STATISTICS + which) * COLUMNS + column) * 4,
                   source, valid);
          }
        }
      }
      end_of_copies();
    };
    for (int w = 0; w < warpgroups; ++w) {
      auto inside = [&](int row) { return row < count; };
      load_rows(memory.still_s + w * TILE_BYTES, memory.still_stride, still_s,
                start(still_s, batch, head), first + w * ROWS, inside);
      load_rows(memory.still_t + w * TILE_BYTES, memory.still_stride, still_t,
                start(still_t, batch, head), first + w * ROWS, inside);
    }

    int tile = tiles.from(from_tile), next = tiles.from(tile + 1), stage = 0;
    load(tile, 0);
    load(next, 1);
    turns.arrive<1>();
#pragma unroll 1
    while (tile < tiles.end) {
      turns.wait();  // the tile is here, and the last but one is no longer needed
      const int after = tiles.from(next + 1), here = stage;
      load(after, (stage + 2) % STAGES_BACKWARD);
      stage = (stage + 1) % STAGES_BACKWARD;
      const uint32_t ring_s = memory.ring_s + here * memory.stage;
      const uint32_t ring_t = memory.ring_t + here * memory.stage;

      float z_s[PER_THREAD], z_t[PER_THREAD];
      hold(z_s);
      hold(z_t);
      scores<T>(z_s, mine_s, memory.still_stride, ring_s, PANELS_S == 2);
      scores<T>(z_t, mine_t, memory.still_stride, ring_t, panels_t == 2);
      products_end();
      products_wait<0>();
      hold(z_s);
      hold(z_t);
      turns.arrive<1>();

      const int column0 = tile * COLUMNS;
      const bool full = whole && tiles.full(tile) &&
                        (KEYS ? band.all(column0, column0 + COLUMNS, row0, row0 + ROWS)
                              : band.all(row0, row0 + ROWS, column0, column0 + COLUMNS));
      const float* statistics =
          reinterpret_cast<const float*>(shared_pointer(memory.statistics)) +
          here * STATISTICS * COLUMNS;
      // dS over the student's scores
      auto differentiate = [&](auto all_seen, auto reverse) {
#pragma unroll
        for (int i0 = 0; i0 < PER_THREAD; i0 += 4) {
          const int column = accumulator_column(thread, i0);
          [[maybe_unused]] float2 of_columns[STATISTICS];
          if constexpr (KEYS) {
#pragma unroll
            for (int which = 0; which < STATISTICS; ++which)
              of_columns[which] =
                  *reinterpret_cast<const float2*>(statistics + which * COLUMNS + column);
          }
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int i = i0 + r, half = r / 2;
            const bool polynomial = r == 3;  // one in four
            float ds;
            if constexpr (KEYS) {
              auto pick = [&](int which) {
                return r % 2 ? of_columns[which].y : of_columns[which].x;
              };
              ds = gradient(z_s[i], z_t[i], pair.c_s, pair.c_t, pick(0) * LOG2_E,
                            pick(1) * LOG2_E, pick(2), decltype(reverse)::value, polynomial) *
                   (NARROW ? pick(3) * unit : pick(3));
            } else {
              ds = gradient(z_s[i], z_t[i], pair.c_s, pair.c_t, lse_s[half], lse_t[half],
                            divergence[half], decltype(reverse)::value, polynomial);
              if (NARROW) ds *= weight[half];
            }
            if constexpr (!decltype(all_seen)::value) {
              const int row = row0 + accumulator_row(thread, i), other = column + r % 2;
              const bool bit = memory.bits[2 * tile + other / 32] >> other % 32 & 1;
              const bool visible =
                  chosen[half] && bit &&
                  (KEYS ? band.sees(column0 + other, row) : band.sees(row, column0 + other));
              if (!visible) ds = 0.f;
            }
            z_s[i] = ds;
          }
        }
      };
      using Yes = std::true_type;
      using No = std::false_type;
      if (full) problem.reverse ? differentiate(Yes(), Yes()) : differentiate(Yes(), No());
      else problem.reverse ? differentiate(No(), Yes()) : differentiate(No(), No());

      uint32_t operand[PER_THREAD / 2];
#pragma unroll
      for (int i = 0; i < PER_THREAD / 2; ++i) {
        const int source = operand_source(i / 4, i % 4);
        operand[i] = pack<T>(z_s[source], z_s[source + 1]);
      }
      hold(operand);
      products_begin();
#pragma unroll
      for (int panel = 0; panel < PANELS_S; ++panel) {
#pragma unroll
        for (int step = 0; step < COLUMNS / 16; ++step)
          multiply_across<T>(out[panel], operand + 4 * step,
                             descriptor(ring_s + panel * TILE_BYTES + across_rows(step)));
      }
      products_end();  // they are waited for together with the next tile's scores
      tile = next;
      next = after;
    }
    products_wait<0>();
    all_copies_done();
  }

#pragma unroll
  for (int panel = 0; panel < PANELS_S; ++panel) {
    hold(out[panel]);
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
      const int half = i / 2 % 2;
      out[panel][i] = KEYS || chosen[half] ? out[panel][i] * factor[half] : 0.f;
    }
  }
  const int width = pair.query_s.width, heads = pair.heads / members;
  const int head = blockIdx.y - pair.start;
  const int64_t row_stride = int64_t(problem.tokens_first ? heads : 1) * width;
  const int64_t at = int64_t(batch) * heads * count * width +
                     int64_t(head) * (problem.tokens_first ? 1 : count) * width;
  void* gradients = KEYS ? pair.grad_key : pair.grad_query;
  // Through shared memory, for whole lines; each warp has its own 16 rows.
  T* target = static_cast<T*>(gradients) + at;
#pragma unroll
  for (int panel = 0; panel < PANELS_S; ++panel) {
    char* staged = shared_pointer(mine_s + panel * memory.still_stride);
#pragma unroll
    for (int i = 0; i < PER_THREAD; i += 2) {
      const int chunk = accumulator_column(thread, i) / 8;
      *reinterpret_cast<uint32_t*>(staged + swizzled(accumulator_row(thread, i), chunk) +
                                   thread % 4 * 4) = pack<T>(out[panel][i], out[panel][i + 1]);
    }
    __syncwarp();
#pragma unroll
    for (int four = 0; four < 16; four += 4) {
      const int row = thread / 32 * 16 + four + thread % 32 / 8, chunk = thread % 8;
      const int column = panel * PANEL + chunk * 8;
      if (row0 + row >= count || column >= width) continue;
      *reinterpret_cast<uint4*>(target + (row0 + row) * row_stride + column) =
          *reinterpret_cast<const uint4*>(staged + swizzled(row, chunk));
    }
  }
}

}  // namespace kdfast::attention
