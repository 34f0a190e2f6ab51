// The kernels of layer_projection.
//
// Bytes are the limit. A block takes one token after the other: its layers, rows of d numbers, come
// into shared memory by copies that run by themselves, and what backward sweeps over several times
// is read once. Blocks are small, so that a multiprocessor holds several, and the rows of some are
// on the way while others are at work. Rows that do not fit come in chunks of columns, again for
// every sweep.
//
// Half precision multiplies on tensor cores, coefficients as a high and a low half; float32 by
// ordinary arithmetic, as do losses of single layers (attend="losses"). Both make a mixture of
// layers, eight students or four at a time, as fragments [I][K] of a lane: I students, K columns.

#pragma once

#include "ampere.cuh"
#include "layer_projection.cuh"
#include "numbers.cuh"

namespace kdfast::projection {

constexpr int MOST_LAYERS = 64;  // of a side

struct Layer {
  const void* data;
  int64_t a, b;  // strides, in elements
};

struct Call {
  int64_t tokens, inner;  // N = A B, B
  int d, many_s, many_t;
  // Rows in shared memory: [0, many_s) students, or the gradients of their projections; teachers;
  // then, for the latter, students if they are needed.
  int rows;
  bool aligned, aligned_out;    // layers; what is written
  bool wanted_s, wanted_t;      // gradients of any student, of any teacher
  int chunk, chunks, pitch;     // columns, and bytes from row to row
  int at_staging, at_alpha, at_other, at_packed, at_packed_other, at_packed_teacher, at_students,
      at_sums, at_rows, at_u, at_units;  // bytes
  float scale;
  Options options;
  const uint8_t* mask;
  int64_t mask_a, mask_b;
  const float* upstream;  // of rows
  int64_t upstream_a, upstream_b, upstream_i;
  float* losses;         // [N, L_s]
  float* weights;        // [N, L_s, L_t], written or read
  const float* upstream_weights;
  int64_t weights_a, weights_b, weights_i, weights_j;
  void* out[2 * MOST_LAYERS];  // projected states or gradients, [N, d]; null where none is wanted
  Layer layers[3 * MOST_LAYERS];
};

// 16-byte units of a row, an odd number: eight rows' units of equal number lie in different banks.
KDFAST_INLINE constexpr int pitch_of(int bytes) { return ((bytes + 15) / 16 | 1) * 16; }
KDFAST_INLINE constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

template <typename T>
__device__ float2 unpack(uint32_t both) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&both));
  } else {
    return {std::bit_cast<float>(both << 16), std::bit_cast<float>(both & 0xffff0000u)};
  }
}

// low and high numbers as halves, and what their rounding left.
template <typename T>
__device__ void split(float low, float high, uint32_t& rounded, uint32_t& rest) {
  rounded = hopper::pack<T>(low, high);
  const float2 its = unpack<T>(rounded);
  rest = hopper::pack<T>(low - its.x, high - its.y);
}

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ float operator()(float a, float b) const { return max_or_nan(a, b); }
};

// Over lanes that differ in the bits from FIRST to below LAST; the same bits in all of them.
template <int FIRST, int LAST, typename Operation>
__device__ float over_lanes(float x, Operation operation) {
#pragma unroll
  for (int offset = LAST / 2; offset >= FIRST; offset /= 2)
    x = operation(x, __shfl_xor_sync(0xffffffff, x, offset));
  return x;
}

// How a warp holds a fragment of a mixture. Tensor cores: 8 students (or teachers) by 32 columns,
// GROUPS times; up to 16 TEACHERS_ teachers, whose coefficients stay in registers if that is 1.
template <int TEACHERS_, int GROUPS_>
struct TensorCores {
  static constexpr bool TENSOR = true;
  static constexpr int TEACHERS = TEACHERS_, GROUPS = GROUPS_;
  static constexpr int TILE = 8, COLUMNS = 32 * GROUPS, I = 2, K = 4 * GROUPS;
  static constexpr int SPREAD = 4;  // lanes of different students
  static __device__ int student(int lane, int i) { return lane % 4 * 2 + i; }
  static __device__ int column(int lane, int k) { return lane / 4 + 8 * k; }
};

struct PlainCores {
  static constexpr bool TENSOR = false;
  static constexpr int TEACHERS = 4, GROUPS = 1;
  static constexpr int TILE = 4, COLUMNS = 128, I = 4, K = 4, SPREAD = 1;
  static __device__ int student(int, int i) { return i; }
  static __device__ int column(int lane, int k) { return lane * 4 + k; }
};

template <typename T_, typename P>
struct Block {
  using T = T_;
  static constexpr bool TENSOR = P::TENSOR;
  static constexpr int I = P::I, K = P::K, TILE = P::TILE, GROUPS = P::GROUPS;
  static constexpr int TEACHERS = P::TEACHERS;
  using Fragment = float[I][K];

  const Call& call;
  char* raw;
  hopper::Arrivals arrivals;
  int lane, warp, warps;
  int many_s, many_t, wide_t;  // wide_t: teachers rounded up, the width of tables
  int64_t token = 0, a = 0, b = 0;
  int begin = 0, width = 0;  // columns that are in shared memory
  bool here = false;

  __device__ Block(const Call& call, char* raw)
      : call(call), raw(raw), arrivals(hopper::shared_address(raw)), lane(threadIdx.x % 32),
        warp(threadIdx.x / 32), warps(blockDim.x / 32), many_s(call.many_s), many_t(call.many_t),
        wide_t(round_up(call.many_t, 16)) {
    __syncthreads();
  }

  __device__ float* floats(int at) const { return reinterpret_cast<float*>(raw + at); }
  __device__ uint4* packed(int at) const { return reinterpret_cast<uint4*>(raw + at); }
  __device__ float* alpha() const { return floats(call.at_alpha); }
  __device__ float* other() const { return floats(call.at_other); }
  __device__ const T* row(int r) const {
    return reinterpret_cast<const T*>(raw + 16 + r * call.pitch);
  }
  __device__ int tiles_s() const { return (many_s + 7) / 8; }
  __device__ int tiles_t() const { return TEACHERS == 1 ? 1 : wide_t / 16; }

  // Whether the token takes part.
  __device__ bool find(int64_t n) {
    token = n;
    a = n / call.inner;
    b = n - a * call.inner;
    here = false;
    return !call.mask || call.mask[a * call.mask_a + b * call.mask_b];
  }
  __device__ float upstream(int i) const {
    return call.upstream[a * call.upstream_a + b * call.upstream_b + i * call.upstream_i];
  }

  // Copies

  // After a barrier; ends with one.
  __device__ void load(int chunk) {
    begin = chunk * call.chunk;
    width = min(call.chunk, call.d - begin);
    const int bytes = width * int(sizeof(T)), threads = blockDim.x;
    const bool bulk = call.aligned && hopper::BULK_COPIES;
    if (bulk) arrivals.announce(bytes * call.rows);
    auto start = [&](int r) {
      const Layer& layer = call.layers[r];
      return static_cast<const T*>(layer.data) + a * layer.a + b * layer.b + begin;
    };
    if (bulk) {
      for (int r = threadIdx.x; r < call.rows; r += threads)
        arrivals.copy(hopper::shared_address(row(r)), start(r), bytes);
    } else {
      for (int r = warp; r < call.rows; r += warps) {
        const T* source = start(r);
        T* target = const_cast<T*>(row(r));
        if (call.aligned) {
          for (int unit = lane; unit < bytes / 16; unit += 32)
            hopper::copy_16(hopper::shared_address(target) + unit * 16,
                            reinterpret_cast<const char*>(source) + unit * 16, true);
        } else {
#pragma unroll 4
          for (int k = lane; k < width; k += 32) target[k] = source[k];
        }
      }
    }
    const int padded = round_up(width, TENSOR ? P::COLUMNS : 4) - width;
    for (int k = threadIdx.x; k < padded * call.rows; k += threads)
      const_cast<T*>(row(k / padded))[width + k % padded] = from_float<T>(0.f);
    if (bulk) {
      arrivals.wait();
    } else {
      hopper::end_of_copies();
      ampere::copies_wait<0>();
    }
    __syncthreads();
  }

  // visit() for each chunk of columns, with barriers before and after.
  template <typename Visit>
  __device__ void sweep(Visit visit) {
    for (int chunk = 0; chunk < call.chunks; ++chunk) {
      if (!here) load(chunk);
      here = call.chunks == 1;
      visit();
      __syncthreads();
    }
  }

  // visit(first column) for this warp's parts of the chunk.
  template <typename Visit>
  __device__ void each_part(Visit visit) const {
    for (int c = warp * P::COLUMNS; c < width; c += warps * P::COLUMNS) visit(c);
  }

  // Fragments

  __device__ int student(int tile, int i) const { return tile * TILE + P::student(lane, i); }
  __device__ int tiles() const { return (many_s + TILE - 1) / TILE; }  // of students
  __device__ bool inside(int column) const { return column < width; }

  __device__ uint32_t at(int row, int column) const {
    return hopper::shared_address(raw) + 16 + row * call.pitch + column * int(sizeof(T));
  }

  // Pairs of rows, downwards, at this lane's columns.
  __device__ void read_pairs(uint32_t (&x)[K], int first, int last, int c) const {
    const uint32_t from = at(min(first + lane % 8, last), c + lane / 8 * 8);
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      uint32_t four[4];
      ampere::load_transposed(four, from + group * 32 * int(sizeof(T)));
#pragma unroll
      for (int k = 0; k < 4; ++k) x[group * 4 + k] = four[k];
    }
  }

  // Four numbers of a row of floats or halves.
  __device__ void read_four(float (&x)[4], const T* from) const {
    if constexpr (std::is_same_v<T, float>) {
      const float4 all = *reinterpret_cast<const float4*>(from);
      x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
    } else {
      const uint2 all = *reinterpret_cast<const uint2*>(from);
      const float2 low = unpack<T>(all.x), high = unpack<T>(all.y);
      x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
    }
  }

  // h[i][k] of rows first + TILE tile + .., those past `last` like it.
  __device__ void read(Fragment& h, int tile, int first, int last, int c) const {
    if constexpr (TENSOR) {
      uint32_t pairs[K];
      read_pairs(pairs, first + tile * TILE, last, c);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const float2 both = unpack<T>(pairs[k]);
        h[0][k] = both.x, h[1][k] = both.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < I; ++i) {
        const bool valid = inside(c + lane * 4);
        if (valid) read_four(h[i], row(min(first + tile * TILE + i, last)) + c + lane * 4);
#pragma unroll
        for (int k = 0; k < K; ++k) h[i][k] = valid ? h[i][k] : 0.f;
      }
    }
  }
  __device__ void read_students(Fragment& h, int tile, int c) const {
    read(h, tile, 0, many_s - 1, c);
  }

  // Coefficients of a tile of students: packed for tensor cores, or a table's rows.
  struct Coefficients {
    const uint4* packed;
    uint4 kept;
    const float* table;
  };
  __device__ Coefficients coefficients(int tile, int at_table, int at_packed) const {
    Coefficients made{};
    if constexpr (TENSOR) {
      made.packed = packed(at_packed) + tile * tiles_t() * 32 + lane;
      if constexpr (TEACHERS == 1) made.kept = *made.packed;
    } else {
      made.table = floats(at_table) + tile * TILE * wide_t;
    }
    return made;
  }
  __device__ Coefficients weights_of(int tile) const {
    return coefficients(tile, call.at_alpha, call.at_packed);
  }
  __device__ Coefficients scores_of(int tile) const {
    return coefficients(tile, call.at_other, call.at_packed_other);
  }

  // made[m][i][k] = sum_j coefficients[m][i][j] g_j
  template <int MIXTURES>
  __device__ void mix(Fragment (&made)[MIXTURES], const Coefficients (&with)[MIXTURES],
                      int c) const {
#pragma unroll
    for (int m = 0; m < MIXTURES; ++m) {
#pragma unroll
      for (int i = 0; i < I; ++i) {
#pragma unroll
        for (int k = 0; k < K; ++k) made[m][i][k] = 0.f;
      }
    }
    if constexpr (TENSOR) {
      float z[MIXTURES][2 * GROUPS][4] = {};  // 16 columns each
      auto add = [&](int t, const uint4(&b)[MIXTURES]) {
        const int teacher = many_s + min(t * 16 + lane / 16 * 8 + lane % 8, many_t - 1);
        const uint32_t from = at(teacher, c + lane / 8 % 2 * 8);
#pragma unroll
        for (int n = 0; n < 2 * GROUPS; ++n) {
          uint32_t g[4];
          ampere::load_transposed(g, from + n * 16 * int(sizeof(T)));
#pragma unroll
          for (int m = 0; m < MIXTURES; ++m) {
            ampere::multiply_add<T>(z[m][n], g, b[m].x, b[m].y);
            ampere::multiply_add<T>(z[m][n], g, b[m].z, b[m].w);
          }
        }
      };
      uint4 b[MIXTURES];
      if constexpr (TEACHERS == 1) {
#pragma unroll
        for (int m = 0; m < MIXTURES; ++m) b[m] = with[m].kept;
        add(0, b);
      } else {
#pragma unroll 1
        for (int t = 0; t < tiles_t(); ++t) {
#pragma unroll
          for (int m = 0; m < MIXTURES; ++m) b[m] = with[m].packed[t * 32];
          add(t, b);
        }
      }
#pragma unroll
      for (int m = 0; m < MIXTURES; ++m) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
          for (int i = 0; i < I; ++i) made[m][i][k] = z[m][k / 2][k % 2 * 2 + i];
        }
      }
    } else {
      if (!inside(c + lane * 4)) return;
#pragma unroll 2
      for (int j = 0; j < many_t; ++j) {
        float g[4];
        read_four(g, row(many_s + j) + c + lane * 4);
#pragma unroll
        for (int m = 0; m < MIXTURES; ++m) {
#pragma unroll
          for (int i = 0; i < I; ++i) {
            const float coefficient = with[m].table[i * wide_t + j];
#pragma unroll
            for (int k = 0; k < K; ++k)
              made[m][i][k] = fmaf(coefficient, g[k], made[m][i][k]);
          }
        }
      }
    }
  }
  __device__ void mix(Fragment& made, const Coefficients& with, int c) const {
    Fragment all[1];
    const Coefficients one[1] = {with};
    mix<1>(all, one, c);
#pragma unroll
    for (int i = 0; i < I; ++i) {
#pragma unroll
      for (int k = 0; k < K; ++k) made[i][k] = all[0][i][k];
    }
  }

  // Writes rows first .. of `out`, up to `last`, at this part's columns.
  __device__ void write(const Fragment& x, int tile, int first, int last, int c) const {
    const int64_t from = token * call.d + begin + c;
    if constexpr (TENSOR) {
      // Rows of 32 columns, by way of shared memory.
      constexpr int PITCH = 80;
      char* staging = raw + call.at_staging + warp * 8 * PITCH;
      const int r = first + tile * TILE + lane / 4, column = lane % 4 * 8;
      T* target = r <= last ? static_cast<T*>(call.out[r]) : nullptr;
      if (target) target += from + column;
      const char* mine = staging + lane / 4 * PITCH + column * 2;
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) {
        __syncwarp();
#pragma unroll
        for (int k = 0; k < 4; ++k)
          *reinterpret_cast<uint32_t*>(staging + lane / 4 * PITCH + k * 16 + lane % 4 * 4) =
              ampere::transpose(hopper::pack<T>(x[0][group * 4 + k], x[1][group * 4 + k]));
        __syncwarp();
        const int begin = c + column + group * 32;
        if (!target || !inside(begin)) continue;
        if (call.aligned_out) {
          *reinterpret_cast<uint4*>(target + group * 32) = *reinterpret_cast<const uint4*>(mine);
        } else {
          for (int k = 0; k < 8 && inside(begin + k); ++k)
            target[group * 32 + k] = reinterpret_cast<const T*>(mine)[k];
        }
      }
    } else {
      const int column = lane * 4;
#pragma unroll
      for (int i = 0; i < I; ++i) {
        const int r = first + tile * TILE + i;
        if (r > last || !call.out[r] || !inside(c + column)) continue;
        T* target = static_cast<T*>(call.out[r]) + from + column;
        if (std::is_same_v<T, float> && call.aligned_out) {
          *reinterpret_cast<float4*>(target) = make_float4(x[i][0], x[i][1], x[i][2], x[i][3]);
        } else {
#pragma unroll
          for (int k = 0; k < K; ++k)
            if (inside(c + column + k)) target[k] = from_float<T>(x[i][k]);
        }
      }
    }
  }

  // Zeros for the token in all that is written of layers.
  __device__ void write_zeros(int first, int last) const {
    for (int r = first; r < last; ++r) {
      if (!call.out[r]) continue;
      T* target = static_cast<T*>(call.out[r]) + token * call.d;
      if (call.aligned_out) {
        for (int k = threadIdx.x * (16 / sizeof(T)); k < call.d;
             k += blockDim.x * (16 / sizeof(T)))
          *reinterpret_cast<uint4*>(target + k) = make_uint4(0, 0, 0, 0);
      } else {
        for (int k = threadIdx.x; k < call.d; k += blockDim.x) target[k] = from_float<T>(0.f);
      }
    }
  }

  // Inner products: tables [L_s, wide_t], what a chunk adds to them

  __device__ void clear(float* table) const {
    for (int k = threadIdx.x; k < tiles_s() * 8 * wide_t; k += blockDim.x) table[k] = 0.f;
    __syncthreads();
  }

  // table += the products of eight students, whose columns operand(b, c) gives, with the teachers.
  // By all warps.
  template <typename Operand>
  __device__ void multiply(float* table, int tile, Operand operand) const {
    // With few teachers there are registers for sums that need not wait for each other.
    constexpr int CHAINS = TEACHERS == 1 ? 2 : 1;
    float z[TEACHERS][CHAINS][4] = {};
    each_part([&](int c) {
      uint32_t b[K];
      operand(b, c);
#pragma unroll
      for (int t = 0; t < TEACHERS; ++t) {
        if (t >= tiles_t()) break;
        const int teacher = many_s + min(t * 16 + lane % 16, many_t - 1);
        const uint32_t from = at(teacher, c + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < 2 * GROUPS; ++n) {
          uint32_t g[4];
          ampere::load_matrices(g, from + n * 16 * int(sizeof(T)));
          ampere::multiply_add<T>(z[t][n % CHAINS], g, b[2 * n], b[2 * n + 1]);
        }
      }
    });
    for (int turn = 0; turn < warps; ++turn) {
      if (turn == warp) {
#pragma unroll
        for (int t = 0; t < TEACHERS; ++t) {
          if (t >= tiles_t()) break;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float sum = z[t][0][i];
            if constexpr (CHAINS == 2) sum += z[t][1][i];
            table[(tile * 8 + lane % 4 * 2 + i % 2) * wide_t + t * 16 + lane / 4 + i / 2 * 8] +=
                sum;
          }
        }
      }
      __syncthreads();
    }
  }

  // The same without tensor cores, for all students, 4 x 4 pairs a warp at a time: left(x, i, c)
  // reads four columns, pair(z, j, x, k, y, i0, teacher) adds those of one teacher's column.
  template <typename Read, typename Pair>
  __device__ void multiply_pairs(float* table, Read left, Pair pair) const {
    const int across = (many_t + 3) / 4, count = (many_s + 3) / 4 * across;
    for (int tile = warp; tile < count; tile += warps) {
      const int i0 = tile / across * 4, j0 = tile % across * 4;
      float z[16] = {};
      for (int c = lane * 4; c < width; c += 128) {
        float x[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) left(x[i], min(i0 + i, many_s - 1), c);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int teacher = min(j0 + j, many_t - 1);
          float y[4];
          read_four(y, row(many_s + teacher) + c);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            if (c + k >= width) break;
            pair(z, j, x, k, y[k], i0, teacher);
          }
        }
      }
      // Each exchange leaves a lane with half as many sums, of twice as many lanes.
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int left = 8 >> step, offset = 16 >> step;
        const bool up = lane & offset;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          if (k >= left) break;
          const float sent = up ? z[k] : z[k + left], kept = up ? z[k + left] : z[k];
          z[k] = kept + __shfl_xor_sync(0xffffffff, sent, offset);
        }
      }
      z[0] += __shfl_xor_sync(0xffffffff, z[0], 1);
      const int i = i0 + lane / 2 / 4, j = j0 + lane / 2 % 4;
      if (lane % 2 == 0 && i < many_s && j < many_t) table[i * wide_t + j] += z[0];
    }
  }

  __device__ void multiply_dots(float* table, const char* left, int pitch, bool of_layers) const {
    multiply_pairs(
        table,
        [&](float(&x)[4], int i, int c) {
          if (of_layers) {
            read_four(x, row(i) + c);
          } else {
            const float4 all =
                *reinterpret_cast<const float4*>(left + i * pitch + c * int(sizeof(float)));
            x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
          }
        },
        [&](float(&z)[16], int j, const float(&x)[4][4], int k, float y, int, int) {
#pragma unroll
          for (int i = 0; i < 4; ++i) z[i * 4 + j] = fmaf(x[i][k], y, z[i * 4 + j]);
        });
  }

  // table = <rows [0, L_s), teachers>
  __device__ void multiply_rows(float* table) {
    clear(table);
    sweep([&] {
      if constexpr (TENSOR) {
        for (int tile = 0; tile < tiles(); ++tile)
          multiply(table, tile, [&](uint32_t(&b)[K], int c) {
            const uint32_t from = at(min(tile * 8 + lane % 8, many_s - 1), c + lane / 8 * 8);
#pragma unroll
            for (int group = 0; group < GROUPS; ++group) {
              uint32_t four[4];
              ampere::load_matrices(four, from + group * 32 * int(sizeof(T)));
#pragma unroll
              for (int k = 0; k < 4; ++k) b[group * 4 + k] = four[k];
            }
          });
      } else {
        multiply_dots(table, nullptr, 0, true);
      }
    });
  }

  // Tables with four lanes a student, as operands of mma.sync want it

  // visit(student, tile of eight); four lanes have the same student.
  template <typename Visit>
  __device__ void each_student(Visit visit) const {
    for (int tile = warp; tile < tiles_s(); tile += warps) visit(tile * 8 + lane / 4, tile);
  }
  // visit(teacher) for a quarter of the teachers.
  template <typename Visit>
  __device__ void each_teacher(Visit visit) const {
    for (int j0 = lane % 4 * 2; j0 < wide_t; j0 += 8) {
      visit(j0);
      visit(j0 + 1);
    }
  }

  // Packs factor times the table's row of this lane's student.
  __device__ void pack_row(const float* table, int at_packed, int i, int tile, float factor) const {
    if constexpr (TENSOR) {
      for (int t = 0; t < tiles_t(); ++t) {
        const float* from = table + i * wide_t + t * 16 + lane % 4 * 2;
        uint4 b;
        split<T>(from[0] * factor, from[1] * factor, b.x, b.z);
        split<T>(from[8] * factor, from[9] * factor, b.y, b.w);
        packed(at_packed)[(tile * tiles_t() + t) * 32 + lane] = b;
      }
    }
  }

  // alpha: the softmax of the scores that it holds.
  __device__ void attend() {
    each_student([&](int i, int tile) {
      float* mine = alpha() + i * wide_t;
      float largest = -HUGE_VALF, sum = 0.f;
      each_teacher([&](int j) {
        const float score = j < many_t ? mine[j] * call.scale : -HUGE_VALF;
        mine[j] = score;
        largest = max_or_nan(largest, score);
      });
      largest = over_lanes<1, 4>(largest, Max());
      each_teacher([&](int j) {
        const float e = j < many_t ? exp2_fast((mine[j] - largest) * LOG2_E) : 0.f;
        mine[j] = e;
        sum += e;
      });
      sum = over_lanes<1, 4>(sum, Add());
      const float inverse = 1.f / sum;
      each_teacher([&](int j) { mine[j] *= inverse; });
      pack(i, tile);
    });
    __syncthreads();
  }
  __device__ void pack(int i, int tile) const {
    __syncwarp();
    pack_row(alpha(), call.at_packed, i, tile, i < many_s ? 1.f : 0.f);
  }

  __device__ void make_weights() {
    multiply_rows(alpha());
    attend();
  }

  // Comparisons with mixtures

  struct Student {
    Comparison made;
    Row h, c;
    float upstream;
  };
  __device__ Student* students() const {
    return reinterpret_cast<Student*>(raw + call.at_students);
  }

  // Rows that fill up the last tile have numbers, too.
  __device__ void clear_students() const {
    for (int i = threadIdx.x; i < tiles_s() * 8; i += blockDim.x) students()[i] = Student{};
    __syncthreads();
  }

  // terms(h, c, student, sums) over all columns, or also over those of zeros that fill up the last
  // part; then finish(student, sums) by one thread each.
  template <bool EXACT, typename Operation, typename Terms, typename Finish>
  __device__ void over_columns(float zero, Operation operation, Terms terms, Finish finish) {
    float* sums = floats(call.at_sums);  // [warp][student][3]
    const int count = tiles_s() * 8 * 3;
    for (int k = threadIdx.x; k < warps * count; k += blockDim.x) sums[k] = zero;
    __syncthreads();
    sweep([&] {
      for (int tile = 0; tile < tiles(); ++tile) {
        float mine[I][3];
#pragma unroll
        for (int i = 0; i < I; ++i) mine[i][0] = mine[i][1] = mine[i][2] = zero;
        const Coefficients weights = weights_of(tile);
        each_part([&](int c) {
          Fragment h, target;
          read_students(h, tile, c);
          mix(target, weights, c);
#pragma unroll
          for (int i = 0; i < I; ++i) {
            const Student& student = students()[this->student(tile, i)];
#pragma unroll
            for (int k = 0; k < K; ++k)
              if (!EXACT || inside(c + P::column(lane, k)))
                terms(h[i][k], target[i][k], student, mine[i]);
          }
        });
#pragma unroll
        for (int i = 0; i < I; ++i) {
#pragma unroll
          for (int x = 0; x < 3; ++x) {
            const float all = over_lanes<P::SPREAD, 32>(mine[i][x], operation);
            float* sum = sums + warp * count + student(tile, i) * 3 + x;
            if (lane < P::SPREAD) *sum = operation(*sum, all);
          }
        }
      }
    });
    for (int i = threadIdx.x; i < many_s; i += blockDim.x) {
      float all[3] = {zero, zero, zero};
      for (int w = 0; w < warps; ++w)
        for (int x = 0; x < 3; ++x) all[x] = operation(all[x], sums[w * count + i * 3 + x]);
      finish(i, all);
    }
    __syncthreads();
  }

  __device__ void compare_students() {
    const Options& options = call.options;
    if (options.objective == KL) {
      over_columns<true>(
          -HUGE_VALF, Max(),
          [](float h, float c, const Student&, float(&sums)[3]) {
            sums[0] = max_or_nan(sums[0], h);
            sums[1] = max_or_nan(sums[1], c);
          },
          [&](int i, const float(&sums)[3]) {
            students()[i].h.first = sums[0];
            students()[i].c.first = sums[1];
          });
      over_columns<true>(
          0.f, Add(),
          [&](float h, float c, const Student& student, float(&sums)[3]) {
            const float u_h = exponent_of(options, h, student.h.first);
            const float u_c = exponent_of(options, c, student.c.first);
            const float e_c = exp2_fast(u_c);
            sums[0] += exp2_fast(u_h);
            sums[1] += e_c;
            sums[2] += e_c == 0.f ? 0.f : e_c * (u_c - u_h);
          },
          [&](int i, const float(&sums)[3]) {
            Student& student = students()[i];
            student.h.second = sums[0];
            student.c.second = sums[1];
            student.made = compare(options, student.h, student.c, sums[2]);
          });
      return;
    }
    auto finish = [&](int i, const float(&sums)[3]) {
      Student& student = students()[i];
      student.h.first = sums[1];
      student.c.first = sums[2];
      student.made = compare(options, student.h, student.c, sums[0]);
    };
    if (options.objective == MSE) {
      over_columns<false>(
          0.f, Add(),
          [](float h, float c, const Student&, float(&sums)[3]) {
            sums[0] = fmaf(c - h, c - h, sums[0]);
          },
          finish);
    } else {
      over_columns<false>(
          0.f, Add(),
          [](float h, float c, const Student&, float(&sums)[3]) {
            sums[0] = fmaf(h, c, sums[0]);
            sums[1] = fmaf(h, h, sums[1]);
            sums[2] = fmaf(c, c, sums[2]);
          },
          finish);
    }
  }

  // Comparisons of pairs (attend="losses")

  __device__ Row* rows() const { return reinterpret_cast<Row*>(raw + call.at_rows); }

  // What `compare` wants of every row, and in `other` the sums over both.
  __device__ void compare_pairs() {
    const Options& options = call.options;
    const int count = many_s + many_t;
    for (int r = threadIdx.x; r < count; r += blockDim.x)
      rows()[r] = {options.objective == KL ? -HUGE_VALF : 0.f, 0.f};
    clear(other());
    auto each_row = [&](float zero, auto operation, auto term, auto result) {
      sweep([&] {
        for (int r = warp; r < count; r += warps) {
          float x = zero;
          const Row its = rows()[r];
          for (int c = lane; c < width; c += 32) x = operation(x, term(to_float(row(r)[c]), its));
          x = over_lanes<1, 32>(x, operation);
          __syncwarp();
          if (lane == 0) result(rows()[r]) = operation(result(rows()[r]), x);
        }
      });
    };
    auto first = [](Row& x) -> float& { return x.first; };
    auto second = [](Row& x) -> float& { return x.second; };
    if (options.objective == KL) {
      each_row(-HUGE_VALF, Max(), [](float x, Row) { return x; }, first);
      each_row(
          0.f, Add(),
          [&](float x, Row its) { return exp2_fast(exponent_of(options, x, its.first)); }, second);
    } else if (options.objective == COSINE) {
      each_row(0.f, Add(), [](float x, Row) { return x * x; }, first);
    }
    sweep([&] {
      with_objective(options.objective, [&](auto of) {
        multiply_pairs(
            other(), [&](float(&x)[4], int i, int c) { read_four(x, row(i) + c); },
            [&](float(&z)[16], int j, const float(&x)[4][4], int k, float y, int i0,
                int teacher) {
#pragma unroll
              for (int i = 0; i < 4; ++i)
                z[i * 4 + j] += crossing<decltype(of)::OBJECTIVE>(
                    options, x[i][k], y, rows()[min(i0 + i, many_s - 1)],
                    rows()[many_s + teacher]);
            });
      });
    });
  }
  __device__ Comparison compare_pair(int i, int j) const {
    return compare(call.options, rows()[i], rows()[many_s + j], other()[i * wide_t + j]);
  }

  // Gradients

  // u of students, as fragments of mixtures: the derivative by what they are compared with.
  __device__ void differentiate(Fragment& u, const Fragment& h, const Fragment& target, int tile,
                                int c) const {
    with_objective(call.options.objective, [&](auto of) {
      constexpr Objective O = decltype(of)::OBJECTIVE;
#pragma unroll
      for (int i = 0; i < I; ++i) {
        const Student& its = students()[student(tile, i)];
#pragma unroll
        for (int k = 0; k < K; ++k) {
          u[i][k] = by_target<O>(call.options, its.made, h[i][k], target[i][k], its.h, its.c);
          if (O == KL && (student(tile, i) >= many_s || !inside(c + P::column(lane, k))))
            u[i][k] = 0.f;
        }
      }
    });
  }

  // other = <u_i, g_j>, but for the factor of u.
  __device__ void multiply_derivatives() {
    clear(other());
    sweep([&] {
      if constexpr (TENSOR) {
        for (int tile = 0; tile < tiles(); ++tile)
          multiply(other(), tile, [&, weights = weights_of(tile)](uint32_t(&b)[K], int c) {
            Fragment h, target, u;
            read_students(h, tile, c);
            mix(target, weights, c);
            differentiate(u, h, target, tile, c);
#pragma unroll
            for (int k = 0; k < K; ++k)
              b[k] = ampere::transpose(hopper::pack<T>(u[0][k], u[1][k]));
          });
      } else {
        char* kept = raw + call.at_u;
        const int pitch = pitch_of(call.chunk * int(sizeof(float)));
        for (int tile = 0; tile < tiles(); ++tile) {
          each_part([&](int c) {
            Fragment h, target, u;
            read_students(h, tile, c);
            mix(target, weights_of(tile), c);
            differentiate(u, h, target, tile, c);
            if (!inside(c + lane * 4)) return;
#pragma unroll
            for (int i = 0; i < I; ++i)
              if (student(tile, i) < many_s)
                *reinterpret_cast<float4*>(kept + student(tile, i) * pitch + (c + lane * 4) * 4) =
                    make_float4(u[i][0], u[i][1], u[i][2], u[i][3]);
          });
        }
        __syncthreads();
        multiply_dots(other(), kept, pitch, false);
      }
    });
  }

  // `other` becomes dS, from the derivatives by alpha that it holds, factor(i) of them.
  template <typename Factor>
  __device__ void make_scores_gradient(Factor factor) {
    each_student([&](int i, int tile) {
      const float* weights = alpha() + i * wide_t;
      float* mine = other() + i * wide_t;
      float mean = 0.f, largest = 0.f;
      each_teacher([&](int j) { mean += j < many_t ? weights[j] * mine[j] : 0.f; });
      mean = over_lanes<1, 4>(mean, Add());
      const float times = i < many_s ? factor(i) * call.scale : 0.f;
      each_teacher([&](int j) {
        mine[j] = i < many_s && j < many_t ? times * weights[j] * (mine[j] - mean) : 0.f;
        largest = fmaxf(largest, fabsf(mine[j]));
      });
      if constexpr (TENSOR) {  // in units of the largest, which halves can hold
        largest = over_lanes<1, 4>(largest, Max());
        const float unit = largest > 1e-30f ? largest : 0.f;
        if (lane % 4 == 0) floats(call.at_units)[i] = unit;
        __syncwarp();
        pack_row(other(), call.at_packed_other, i, tile, unit > 0.f ? 1.f / unit : 0.f);
      }
    });
    __syncthreads();
  }

  // For gradients of teachers on tensor cores: operands of [alpha u | dS h] in units of the largest
  // entry, which is returned. times(i): what u lacks.
  template <typename Factor>
  __device__ float pack_teachers(Factor times) {
    float largest = 0.f;
    for (int i = 0; i < many_s; ++i)
      largest = fmaxf(largest, fmaxf(floats(call.at_units)[i], fabsf(times(i))));
    const float unit = largest > 1e-30f ? largest : 1.f, inverse = 1.f / unit;
    const int tiles = wide_t / 8;
    for (int k = warp; k < tiles_s() * tiles; k += warps) {
      const int i = k / tiles * 8 + lane % 4 * 2, j = k % tiles * 8 + lane / 4;
      auto weight = [&](int i) {
        return i < many_s ? alpha()[i * wide_t + j] * times(i) * inverse : 0.f;
      };
      auto score = [&](int i) { return other()[i * wide_t + j] * inverse; };
      uint4 b;
      split<T>(weight(i), weight(i + 1), b.x, b.z);
      split<T>(score(i), score(i + 1), b.y, b.w);
      packed(call.at_packed_teacher)[k * 32 + lane] = b;
    }
    __syncthreads();
    return unit;
  }

  // The gradients of a chunk of teachers on tensor cores. states(u, h pairs, tile, c) gives what
  // alpha and dS are multiplied with.
  template <typename States>
  __device__ void write_teachers(int c, float unit, States states) const {
    uint32_t u[2][K], h[K];  // of the last tile
    int made = -1;
    for (int t = 0; t < wide_t / 8; ++t) {
      float z[2 * GROUPS][4] = {};
      for (int tile = 0; tile < tiles(); ++tile) {
        if (made != tile) states(u, h, tile, c);
        made = tile;
        const uint4 b = packed(call.at_packed_teacher)[(tile * (wide_t / 8) + t) * 32 + lane];
#pragma unroll
        for (int n = 0; n < 2 * GROUPS; ++n) {
          const uint32_t both[4] = {u[0][2 * n], u[0][2 * n + 1], h[2 * n], h[2 * n + 1]};
          const uint32_t rest[4] = {u[1][2 * n], u[1][2 * n + 1], 0, 0};
          ampere::multiply_add<T>(z[n], both, b.x, b.y);
          ampere::multiply_add<T>(z[n], both, b.z, b.w);
          ampere::multiply_add<T>(z[n], rest, b.x, b.y);
        }
      }
      Fragment gradient;
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int i = 0; i < I; ++i) gradient[i][k] = z[k / 2][k % 2 * 2 + i] * unit;
      }
      write(gradient, t, many_s, many_s + many_t - 1, c);
    }
  }

  // The same without: add(gradient, g, student, tile) adds what one student gives.
  template <typename Add>
  __device__ void write_teachers_plainly(int c, Add add) const {
    for (int tile = 0; tile < (many_t + TILE - 1) / TILE; ++tile) {
      Fragment g, gradient = {};
      read(g, tile, many_s, many_s + many_t - 1, c);
      for (int i = 0; i < many_s; ++i) add(gradient, g, i, tile);
      write(gradient, tile, many_s, many_s + many_t - 1, c);
    }
  }

  __device__ void times_unit(Fragment& x, int tile) const {
    if constexpr (TENSOR) {
#pragma unroll
      for (int i = 0; i < I; ++i) {
        const float unit = floats(call.at_units)[student(tile, i)];
#pragma unroll
        for (int k = 0; k < K; ++k) x[i][k] *= unit;
      }
    }
  }
};

// Kernels, by a block

template <typename B>
__device__ void project_block(const Call& call, char* raw) {
  B block(call, raw);
  const int many_s = call.many_s, many_t = call.many_t;
  for (int64_t n = blockIdx.x; n < call.tokens; n += gridDim.x) {
    const bool valid = block.find(n);
    float* weights = call.weights + n * many_s * many_t;
    if (!valid) {
      block.write_zeros(0, many_s);
      for (int k = threadIdx.x; k < many_s * many_t; k += blockDim.x) weights[k] = 0.f;
      continue;
    }
    block.make_weights();
    for (int k = threadIdx.x; k < many_s * many_t; k += blockDim.x)
      weights[k] = block.alpha()[k / many_t * block.wide_t + k % many_t];
    block.sweep([&] {
      for (int tile = 0; tile < block.tiles(); ++tile) {
        const auto weights = block.weights_of(tile);
        block.each_part([&](int c) {
          typename B::Fragment projected;
          block.mix(projected, weights, c);
          block.write(projected, tile, 0, many_s - 1, c);
        });
      }
    });
  }
}

template <typename B>
__device__ void project_backward_block(const Call& call, char* raw) {
  B block(call, raw);
  const int many_s = call.many_s, many_t = call.many_t, wide_t = block.wide_t;
  for (int64_t n = blockIdx.x; n < call.tokens; n += gridDim.x) {
    if (!block.find(n)) {
      block.write_zeros(0, many_s + many_t);
      continue;
    }
    const float* weights = call.weights + n * many_s * many_t;
    const float* upstream = call.upstream_weights + block.a * call.weights_a +
                            block.b * call.weights_b;
    block.multiply_rows(block.other());
    block.clear(block.alpha());
    for (int k = threadIdx.x; k < many_s * many_t; k += blockDim.x) {
      const int i = k / many_t, j = k % many_t;
      block.alpha()[i * wide_t + j] = weights[k];
      block.other()[i * wide_t + j] += upstream[i * call.weights_i + j * call.weights_j];
    }
    __syncthreads();
    block.make_scores_gradient([](int) { return 1.f; });
    float unit = 1.f;
    if constexpr (B::TENSOR) {
      if (call.wanted_t) unit = block.pack_teachers([](int) { return 1.f; });
    }
    block.sweep([&] {
      for (int tile = 0; call.wanted_s && tile < block.tiles(); ++tile) {
        const auto scores = block.scores_of(tile);
        block.each_part([&](int c) {
          typename B::Fragment gradient;
          block.mix(gradient, scores, c);
          block.times_unit(gradient, tile);
          block.write(gradient, tile, 0, many_s - 1, c);
        });
      }
      if (!call.wanted_t) return;
      block.each_part([&](int c) {
        const int first = many_s + many_t, last = first + many_s - 1;  // the states
        if constexpr (B::TENSOR) {
          block.write_teachers(
              c, unit, [&](uint32_t(&u)[2][B::K], uint32_t(&h)[B::K], int tile, int c) {
                block.read_pairs(u[0], tile * 8, many_s - 1, c);
                block.read_pairs(h, first + tile * 8, last, c);
#pragma unroll
                for (uint32_t& rest : u[1]) rest = 0;
              });
        } else {
          if (!block.inside(c + block.lane * 4)) return;
          block.write_teachers_plainly(
              c, [&](auto& gradient, const auto&, int i, int tile) {
                float u[4], h[4];
                block.read_four(u, block.row(i) + c + block.lane * 4);
                block.read_four(h, block.row(first + i) + c + block.lane * 4);
#pragma unroll
                for (int t = 0; t < B::I; ++t) {
                  const int at = i * wide_t + min(tile * B::TILE + t, many_t - 1);
#pragma unroll
                  for (int k = 0; k < B::K; ++k)
                    gradient[t][k] +=
                        block.alpha()[at] * u[k] + block.other()[at] * h[k];
                }
              });
        }
      });
    });
  }
}

template <typename B, bool LOSSES>
__device__ void loss_block(const Call& call, char* raw) {
  B block(call, raw);
  if constexpr (!LOSSES) block.clear_students();
  const int many_s = call.many_s;
  for (int64_t n = blockIdx.x; n < call.tokens; n += gridDim.x) {
    const bool valid = block.find(n);
    float* losses = call.losses + n * many_s;
    if (!valid) {
      for (int i = threadIdx.x; i < many_s; i += blockDim.x) losses[i] = 0.f;
      continue;
    }
    block.make_weights();
    if constexpr (LOSSES) {
      block.compare_pairs();
      block.each_student([&](int i, int) {
        float loss = 0.f;
        block.each_teacher([&](int j) {
          if (i < many_s && j < call.many_t)
            loss += block.alpha()[i * block.wide_t + j] * block.compare_pair(i, j).loss;
        });
        loss = over_lanes<1, 4>(loss, Add());
        if (i < many_s && block.lane % 4 == 0) losses[i] = loss;
      });
      __syncthreads();
    } else {
      block.compare_students();
      for (int i = threadIdx.x; i < many_s; i += blockDim.x)
        losses[i] = block.students()[i].made.loss;
    }
  }
}

// With mixtures: the students are compared with C_i.
template <typename B>
__device__ void loss_backward_block(const Call& call, char* raw) {
  using Fragment = typename B::Fragment;
  B block(call, raw);
  block.clear_students();
  const int many_s = call.many_s, many_t = call.many_t, wide_t = block.wide_t;
  for (int64_t n = blockIdx.x; n < call.tokens; n += gridDim.x) {
    if (!block.find(n)) {
      block.write_zeros(0, many_s + many_t);
      continue;
    }
    block.make_weights();
    if (call.options.objective != MSE) block.compare_students();
    for (int i = threadIdx.x; i < many_s; i += blockDim.x) {
      auto& its = block.students()[i];
      its.upstream = block.upstream(i);
      if (call.options.objective == MSE) its.made = compare(call.options, {}, {}, 0.f);
    }
    __syncthreads();
    auto times = [&](int i) {
      return block.students()[i].upstream * block.students()[i].made.target;
    };
    block.multiply_derivatives();
    block.make_scores_gradient(times);
    float unit = 1.f;
    if constexpr (B::TENSOR) {
      if (call.wanted_t) unit = block.pack_teachers(times);
    }
    block.sweep([&] {
      for (int tile = 0; call.wanted_s && tile < block.tiles(); ++tile) {
        const typename B::Coefficients both[2] = {block.weights_of(tile), block.scores_of(tile)};
        block.each_part([&](int c) {
          Fragment h, made[2];
          block.read_students(h, tile, c);
          block.mix(made, both, c);
          auto& [target, gradient] = made;
          block.times_unit(gradient, tile);
          with_objective(call.options.objective, [&](auto of) {
#pragma unroll
            for (int i = 0; i < B::I; ++i) {
              const auto& its = block.students()[block.student(tile, i)];
#pragma unroll
              for (int k = 0; k < B::K; ++k)
                gradient[i][k] += its.upstream *
                                  by_state<decltype(of)::OBJECTIVE>(call.options, its.made, h[i][k],
                                                                    target[i][k], its.h, its.c);
            }
          });
          block.write(gradient, tile, 0, many_s - 1, c);
        });
      }
      if (!call.wanted_t) return;
      block.each_part([&](int c) {
        if constexpr (B::TENSOR) {
          block.write_teachers(
              c, unit, [&](uint32_t(&pairs)[2][B::K], uint32_t(&states)[B::K], int tile, int c) {
                Fragment h, target, u;
                block.read_pairs(states, tile * 8, many_s - 1, c);
                block.read_students(h, tile, c);
                block.mix(target, block.weights_of(tile), c);
                block.differentiate(u, h, target, tile, c);
#pragma unroll
                for (int k = 0; k < B::K; ++k)
                  split<typename B::T>(u[0][k], u[1][k], pairs[0][k], pairs[1][k]);
              });
        } else {
          for (int tile = 0; tile < (many_t + B::TILE - 1) / B::TILE; ++tile) {
            Fragment gradient = {};
            for (int of = 0; of < block.tiles(); ++of) {
              Fragment h, target, u;
              block.read_students(h, of, c);
              block.mix(target, block.weights_of(of), c);
              block.differentiate(u, h, target, of, c);
#pragma unroll
              for (int i = 0; i < B::I; ++i) {
                const int student = block.student(of, i);
                if (student >= many_s) break;
                const float factor = times(student);
#pragma unroll
                for (int t = 0; t < B::I; ++t) {
                  const int at = student * wide_t + min(tile * B::TILE + t, many_t - 1);
                  const float weight = block.alpha()[at] * factor, score = block.other()[at];
#pragma unroll
                  for (int k = 0; k < B::K; ++k)
                    gradient[t][k] += weight * u[i][k] + score * h[i][k];
                }
              }
            }
            block.write(gradient, tile, many_s, many_s + many_t - 1, c);
          }
        }
      });
    });
  }
}

// attend="losses", without tensor cores: the students are compared with every teacher.
template <typename B>
__device__ void losses_backward_block(const Call& call, char* raw) {
  using Fragment = typename B::Fragment;
  B block(call, raw);
  const int many_s = call.many_s, many_t = call.many_t, wide_t = block.wide_t;
  const Options& options = call.options;
  for (int64_t n = blockIdx.x; n < call.tokens; n += gridDim.x) {
    if (!block.find(n)) {
      block.write_zeros(0, many_s + many_t);
      continue;
    }
    block.make_weights();
    block.compare_pairs();
    // Comparisons want the sums again after `other` has become dS.
    Comparison* made = reinterpret_cast<Comparison*>(raw + call.at_u);
    for (int k = threadIdx.x; k < many_s * many_t; k += blockDim.x)
      made[k] = block.compare_pair(k / many_t, k % many_t);
    __syncthreads();
    for (int k = threadIdx.x; k < many_s * many_t; k += blockDim.x)
      block.other()[k / many_t * wide_t + k % many_t] = made[k].loss;
    __syncthreads();
    block.make_scores_gradient([&](int i) { return block.upstream(i); });
    block.sweep([&] {
      block.each_part([&](int c) {
        // Of students, then of teachers: a tile of one side against every layer of the other.
        for (int side = 0; side < 2; ++side) {
          if (!(side == 0 ? call.wanted_s : call.wanted_t)) continue;
          const int first = side == 0 ? 0 : many_s, count = side == 0 ? many_s : many_t;
          for (int tile = 0; tile < (count + B::TILE - 1) / B::TILE; ++tile) {
            Fragment mine, gradient = {};
            block.read(mine, tile, first, first + count - 1, c);
            for (int r = 0; r < many_s + many_t - count; ++r) {
              float its[4] = {};
              if (block.inside(c + block.lane * 4))
                block.read_four(its, block.row(many_s - first + r) + c + block.lane * 4);
#pragma unroll
              for (int t = 0; t < B::I; ++t) {
                const int own = min(tile * B::TILE + t, count - 1);
                const int i = side == 0 ? own : r, j = side == 0 ? r : own;
                const Comparison& pair = made[i * many_t + j];
                const float score = block.other()[i * wide_t + j];
                const float weight = block.alpha()[i * wide_t + j] * block.upstream(i) *
                                     (side == 0 ? 1.f : pair.target);
                const Row h = block.rows()[i], g = block.rows()[many_s + j];
                with_objective(options.objective, [&](auto of) {
                  constexpr Objective O = decltype(of)::OBJECTIVE;
#pragma unroll
                  for (int k = 0; k < B::K; ++k) {
                    const float derivative =
                        side == 0 ? by_state<O>(options, pair, mine[t][k], its[k], h, g)
                                  : by_target<O>(options, pair, its[k], mine[t][k], h, g);
                    gradient[t][k] += weight * derivative + score * its[k];
                  }
                });
              }
            }
            block.write(gradient, tile, first, first + count - 1, c);
          }
        }
      });
    });
  }
}

// Narrow layers (pseudo logits): a thread has a token, all of whose arithmetic is in registers. The
// rows of a block's tokens come and go through shared memory, as floats, where those of 32 tokens
// lie in different banks.

constexpr int NARROW = 16;  // columns at most

enum class Kind : int { FLOAT, HALF, BFLOAT16 };

__device__ inline float number_at(const void* data, int64_t i, Kind kind) {
  if (kind == Kind::FLOAT) return static_cast<const float*>(data)[i];
  if (kind == Kind::HALF) return to_float(static_cast<const __half*>(data)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
}
__device__ inline void write_at(void* data, int64_t i, float x, Kind kind) {
  if (kind == Kind::FLOAT) static_cast<float*>(data)[i] = x;
  else if (kind == Kind::HALF) static_cast<__half*>(data)[i] = from_float<__half>(x);
  else static_cast<__nv_bfloat16*>(data)[i] = from_float<__nv_bfloat16>(x);
}

KDFAST_INLINE constexpr int narrow_pitch(int d) { return d | 1; }

// D: registers of a row, d of them used.
template <int D>
struct Token {
  using State = float[D];

  const Call& call;
  float* memory;  // [row][token][pitch]
  int d, pitch;

  __device__ float* at(int row) const {
    return memory + (row * int(blockDim.x) + int(threadIdx.x)) * pitch;
  }
  __device__ void read(State& x, int row) const {
    const float* from = at(row);
#pragma unroll
    for (int k = 0; k < D; ++k) x[k] = k < d ? from[k] : 0.f;
  }
  __device__ float dot(const State& x, const State& y) const {
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < D; ++k) sum = fmaf(x[k], y[k], sum);
    return sum;
  }
  __device__ float score(const State& h, const State& g) const { return dot(h, g) * call.scale; }

  // What all scores of a student become weights by.
  struct Softmax {
    float largest, inverse;
    __device__ float operator()(float score) const {
      // A score that is made again may be contracted otherwise, and so be above the largest.
      const float below = score - largest;
      return exp2_fast((below > 0.f ? 0.f : below) * LOG2_E) * inverse;
    }
  };
  __device__ Softmax attend(const State& h) const {
    State g;
    Softmax softmax{-HUGE_VALF, 1.f};
    for (int j = 0; j < call.many_t; ++j) {
      read(g, call.many_s + j);
      softmax.largest = max_or_nan(softmax.largest, score(h, g));
    }
    float sum = 0.f;
    for (int j = 0; j < call.many_t; ++j) {
      read(g, call.many_s + j);
      sum += softmax(score(h, g));
    }
    softmax.inverse = 1.f / sum;
    return softmax;
  }

  __device__ Row row_of(const State& x) const {
    if (call.options.objective == MSE) return {};
    if (call.options.objective == COSINE) return {dot(x, x), 0.f};
    Row row{-HUGE_VALF, 0.f};
#pragma unroll
    for (int k = 0; k < D; ++k)
      if (k < d) row.first = max_or_nan(row.first, x[k]);
#pragma unroll
    for (int k = 0; k < D; ++k)
      if (k < d) row.second += exp2_fast(exponent_of(call.options, x[k], row.first));
    return row;
  }
  __device__ Comparison compare_with(const State& h, const State& c, Row of_h, Row of_c) const {
    float sum = 0.f;
    with_objective(call.options.objective, [&](auto of) {
#pragma unroll
      for (int k = 0; k < D; ++k)
        if (k < d) sum += crossing<decltype(of)::OBJECTIVE>(call.options, h[k], c[k], of_h, of_c);
    });
    return compare(call.options, of_h, of_c, sum);
  }
};

// The rows of a block's tokens, zeros for those that are masked.
__device__ inline void load_narrow(const Call& call, Kind kind, int64_t first, int pitch,
                                   const bool* valid, const int64_t* a, const int64_t* b,
                                   float* memory) {
  constexpr int BATCH = 8;  // loads on the way
  const int threads = blockDim.x, d = call.d, per_token = (65536 + d - 1) / d;
  for (int e = threadIdx.x; e < threads * d; e += threads) {
    const int token = e * per_token >> 16, column = e - token * d;
    for (int r0 = 0; r0 < call.rows; r0 += BATCH) {
      float x[BATCH];
#pragma unroll
      for (int r = 0; r < BATCH; ++r) {
        if (r0 + r >= call.rows) break;
        const Layer& layer = call.layers[r0 + r];
        x[r] = valid[token]
                   ? number_at(layer.data, a[token] * layer.a + b[token] * layer.b + column, kind)
                   : 0.f;
      }
#pragma unroll
      for (int r = 0; r < BATCH; ++r)
        if (r0 + r < call.rows) memory[((r0 + r) * threads + token) * pitch + column] = x[r];
    }
  }
  __syncthreads();
}

template <int D, bool BACKWARD>
__device__ void narrow_block(const Call& call, Kind kind, bool losses, char* raw) {
  const int threads = blockDim.x, me = threadIdx.x, many_s = call.many_s, many_t = call.many_t;
  int64_t* a = reinterpret_cast<int64_t*>(raw);
  int64_t* b = a + threads;
  bool* valid = reinterpret_cast<bool*>(b + threads);
  float* memory = reinterpret_cast<float*>(raw + threads * 24);
  const Token<D> token{call, memory, call.d, narrow_pitch(call.d)};
  const int d = call.d, pitch = token.pitch;

  const int64_t first = int64_t(blockIdx.x) * threads, mine = first + me;
  const bool exists = mine < call.tokens;
  a[me] = mine / call.inner;
  b[me] = mine - a[me] * call.inner;
  const bool counts =
      exists && (!call.mask || call.mask[a[me] * call.mask_a + b[me] * call.mask_b]);
  valid[me] = counts;
  const bool teachers = BACKWARD && call.wanted_t;
  if (teachers) {  // their gradients begin at zero, after all rows
    for (int k = me; k < many_t * threads * pitch; k += threads)
      memory[call.rows * threads * pitch + k] = 0.f;
  }
  __syncthreads();
  load_narrow(call, kind, first, pitch, valid, a, b, memory);

  const Options& options = call.options;
  for (int i = 0; i < many_s; ++i) {
    typename Token<D>::State h, g, c = {};
    token.read(h, i);
    const auto softmax = token.attend(h);
    const Row of_h = token.row_of(h);
    Row of_c{};
    Comparison made{};
    float loss = 0.f;
    for (int j = 0; j < many_t; ++j) {
      token.read(g, many_s + j);
      const float weight = softmax(token.score(h, g));
      if (losses) {
        loss += weight * token.compare_with(h, g, of_h, token.row_of(g)).loss;
      } else {
#pragma unroll
        for (int k = 0; k < D; ++k) c[k] = fmaf(weight, g[k], c[k]);
      }
    }
    if (!losses) {
      of_c = token.row_of(c);
      made = token.compare_with(h, c, of_h, of_c);
      loss = made.loss;
    }
    if constexpr (!BACKWARD) {
      if (exists) call.losses[mine * many_s + i] = counts ? loss : 0.f;
    } else {
      const float upstream = counts ? call.upstream[a[me] * call.upstream_a +
                                                    b[me] * call.upstream_b + i * call.upstream_i]
                                    : 0.f;
      with_objective(options.objective, [&](auto of) {
        constexpr Objective O = decltype(of)::OBJECTIVE;
        typename Token<D>::State u, gradient;
#pragma unroll
        for (int k = 0; k < D; ++k) {
          u[k] = losses || k >= d
                     ? 0.f
                     : upstream * made.target * by_target<O>(options, made, h[k], c[k], of_h, of_c);
          gradient[k] = losses || k >= d
                            ? 0.f
                            : upstream * by_state<O>(options, made, h[k], c[k], of_h, of_c);
        }
        for (int j = 0; j < many_t; ++j) {
          token.read(g, many_s + j);
          const float weight = softmax(token.score(h, g));
          float by_weight = 0.f;
          if (losses) {
            const Row of_g = token.row_of(g);
            const Comparison pair = token.compare_with(h, g, of_h, of_g);
            by_weight = upstream * (pair.loss - loss);
#pragma unroll
            for (int k = 0; k < D; ++k) {
              if (k >= d) break;
              gradient[k] +=
                  weight * upstream * by_state<O>(options, pair, h[k], g[k], of_h, of_g);
              u[k] = upstream * pair.target * by_target<O>(options, pair, h[k], g[k], of_h, of_g);
            }
          } else {
            // sum_k alpha_k <u, g_k> is <u, C>
#pragma unroll
            for (int k = 0; k < D; ++k) by_weight = fmaf(u[k], g[k] - c[k], by_weight);
          }
          const float score = call.scale * weight * by_weight;
#pragma unroll
          for (int k = 0; k < D; ++k) gradient[k] = fmaf(score, g[k], gradient[k]);
          if (teachers) {
            float* its = token.at(call.rows + j);
#pragma unroll
            for (int k = 0; k < D; ++k)
              if (k < d) its[k] += weight * u[k] + score * h[k];
          }
        }
        float* own = token.at(i);  // h has been used
#pragma unroll
        for (int k = 0; k < D; ++k)
          if (k < d) own[k] = counts ? gradient[k] : 0.f;
      });
    }
  }
  if constexpr (BACKWARD) {
    __syncthreads();
    const int per_token = (65536 + d - 1) / d;
    for (int r = 0; r < many_s + many_t; ++r) {
      if (!call.out[r]) continue;
      const int from = r < many_s ? r : call.rows + r - many_s;
      for (int e = me; e < threads * d; e += threads) {
        const int token = e * per_token >> 16, column = e - token * d;
        if (first + token < call.tokens)
          write_at(call.out[r], first * d + e, memory[(from * threads + token) * pitch + column],
                   kind);
      }
    }
  }
}

}  // namespace kdfast::projection
