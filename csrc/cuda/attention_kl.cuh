// What the kernels of attention_kl compute, and where each number lies.
//
// Exponents are to base 2. With c = scale log2(e) of each side, z a raw score (a product of query
// and key), m the largest so far and u = c (z - m), a row keeps
//
//     l_s = sum 2^u_s,  l_t = sum 2^u_t,  a = sum 2^u_t (u_t - u_s),
//
// and KL(t || s) = ln 2 (a / l_t + log2(l_s / l_t)). When the maxima move by v_t and v_s (in units
// of u, <= 0), with w = 2^v:  a <- w_t (a + l_t (v_t - v_s)),  l <- w l. The sum is shifted, since
// sum p_t (z_t - z_s) loses the digits of a large common offset.

#pragma once

#include "exponential.cuh"

namespace kdfast::attention {

// Tiles. A warpgroup (128 threads) holds 64 rows of scores, and meets 64 columns at a time.
constexpr int ROWS = 64, COLUMNS = 64;
constexpr int THREADS = 128;
constexpr int PER_THREAD = ROWS * COLUMNS / THREADS;  // scores in a thread's registers
// Widths are cut into panels of 64 numbers, 128 bytes: what one swizzle pattern spans.
constexpr int PANEL = 64;
constexpr int ROW_BYTES = PANEL * 2;
constexpr int TILE_BYTES = ROWS * ROW_BYTES;  // one panel of one tile

// Accumulator of wgmma m64n64: register i of thread t holds the score (row, column).
KDFAST_INLINE constexpr int accumulator_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
KDFAST_INLINE constexpr int accumulator_column(int thread, int i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

// Operand A of wgmma m64k16 in registers: register i (0..3) of a step of 16 columns holds the pair
// that begins with this accumulator register. Thus scores become an operand where they lie.
KDFAST_INLINE constexpr int operand_source(int step, int i) { return step * 8 + i * 2; }

// Byte of the 16-byte chunk `chunk` of row `row` within a panel of a tile: 128-byte swizzle.
KDFAST_INLINE constexpr int swizzled(int row, int chunk) {
  return row * ROW_BYTES + (chunk ^ row % 8) * 16;
}

// Descriptor of an operand in shared memory: 128-byte swizzle, eight rows of 128 bytes a pattern,
// patterns 1024 bytes apart. It is the same whether products run along the rows (scores: the 16
// numbers of a step are 32 bytes of each row) or across them (gradients: a step is 16 rows); the
// leading offset has no meaning in either case, as no operand here is wider than a panel.
KDFAST_INLINE constexpr uint64_t descriptor(uint32_t address) {
  constexpr uint64_t stride = 1024 >> 4, leading = 1, swizzle_128 = 1;
  return (address >> 4 & 0x3fff) | leading << 16 | stride << 32 | swizzle_128 << 62;
}
KDFAST_INLINE constexpr uint32_t along_rows(int step) { return step * 32; }
KDFAST_INLINE constexpr uint32_t across_rows(int step) { return step * 16 * ROW_BYTES; }

// Which keys a query sees, without masks: query i sees key j when first <= i + shift - j <= last,
// with shift = Nk - Nq (aligned at the bottom right).
struct Band {
  int queries, keys, shift, first, last;

  Band() = default;
  KDFAST_INLINE Band(int queries, int keys, bool causal, int window)  // window < 0: none
      : queries(queries), keys(keys), shift(keys - queries) {
    const int far = queries + keys;
    last = window < 0 || window > far ? far : window;
    first = causal ? 0 : -last;
  }
  KDFAST_INLINE bool sees(int query, int key) const {
    const int distance = query + shift - key;
    return first <= distance && distance <= last;
  }
  // Queries [from, to) see keys [first_key(from), end_key(to - 1)) between them, and the reverse.
  KDFAST_INLINE int first_key(int query) const { return clip(query + shift - last, keys); }
  KDFAST_INLINE int end_key(int query) const { return clip(query + shift - first + 1, keys); }
  KDFAST_INLINE int first_query(int key) const { return clip(key - shift + first, queries); }
  KDFAST_INLINE int end_query(int key) const { return clip(key - shift + last + 1, queries); }
  // Whether every query of [query, query_end) sees every key of [key, key_end).
  KDFAST_INLINE bool all(int query, int query_end, int key, int key_end) const {
    return query_end <= queries && key_end <= keys && sees(query, key_end - 1) &&
           sees(query_end - 1, key);
  }

 private:
  KDFAST_INLINE static int clip(int x, int size) { return x < 0 ? 0 : x > size ? size : x; }
};

// The same by arithmetic, to 2e-7; at least 2^-126. The special function unit gives 16 results a
// cycle, so that some are better made elsewhere.
KDFAST_INLINE float exp2_polynomial(float x) {
  // What is added to 1.5 2^23 is rounded to an integer; its last bits, with 127 more, are those of
  // the exponent of a float.
  constexpr float ROUND = 12582912.f + 127.f;
  x = max_or_nan(x, -126.f);
  const float whole = x + ROUND;
  const float f = x - (whole - ROUND);
  float p = fmaf(0.001326472731307149f, f, 0.009671512991189957f);
  p = fmaf(p, f, 0.05550733581185341f);
  p = fmaf(p, f, 0.24022242426872253f);
  p = fmaf(p, f, 0.6931470036506653f);
  p = fmaf(p, f, 1.f);
  // A product: to add to the exponent of p would make a number of NaN.
#ifdef __CUDA_ARCH__
  return p * __int_as_float(__float_as_int(whole) << 23);
#else
  return p * std::bit_cast<float>(std::bit_cast<uint32_t>(whole) << 23);
#endif
}

// A hidden score: so low that its exponential is exactly 0 beside any real one, yet finite, so that
// 0 (u_t - u_s) is 0. It is taken times c, hence the limits on scales.
constexpr float HIDDEN = -1e25f;
// What maxima start at: above HIDDEN, since c HIDDEN less its own rounded value may be large.
constexpr float LOWEST = HIDDEN / 2;
constexpr double LEAST_SCALE = 1e-6, LARGEST_SCALE = 1e6;

// A row of two maps as one thread has seen it.
struct Row {
  float m_s = LOWEST, m_t = LOWEST, l_s = 0.f, l_t = 0.f, a = 0.f;

  // Moves the maxima to at least those given. NaN is passed over, as it is the sums that keep it.
  KDFAST_INLINE void raise(float to_s, float to_t, float c_s, float c_t) {
    if (!(to_s > m_s) && !(to_t > m_t)) return;
    const float new_s = fmaxf(m_s, to_s), new_t = fmaxf(m_t, to_t);
    const float v_s = (m_s - new_s) * c_s, v_t = (m_t - new_t) * c_t;
    const float w_t = exp2_fast(v_t);
    a = w_t * (a + l_t * (v_t - v_s));
    l_t *= w_t;
    l_s *= exp2_fast(v_s);
    m_s = new_s;
    m_t = new_t;
  }

  // One pair of scores; shift = c m of each side. Where a student's score is -inf and the teacher's
  // exponential 0, the sum becomes NaN; it is then to be made again GUARDED.
  template <bool GUARDED>
  KDFAST_INLINE void add(float z_s, float z_t, float c_s, float c_t, float shift_s,
                         float shift_t) {
    const float u_s = fmaf(z_s, c_s, -shift_s), u_t = fmaf(z_t, c_t, -shift_t);
    const float e_t = exp2_fast(u_t);
    l_s += exp2_fast(u_s);
    l_t += e_t;
    const float difference = u_t - u_s;
    a = fmaf(e_t, GUARDED && e_t == 0.f ? 0.f : difference, a);
  }

  // The union of two parts of a row.
  KDFAST_INLINE void merge(Row other, float c_s, float c_t) {
    raise(other.m_s, other.m_t, c_s, c_t);
    other.raise(m_s, m_t, c_s, c_t);
    l_s += other.l_s;
    l_t += other.l_t;
    a += other.a;
  }

  KDFAST_INLINE float divergence() const { return LN_2 * (a / l_t + log2f(l_s / l_t)); }
  KDFAST_INLINE float lse_s(float c_s) const { return LN_2 * fmaf(m_s, c_s, log2f(l_s)); }
  KDFAST_INLINE float lse_t(float c_t) const { return LN_2 * fmaf(m_t, c_t, log2f(l_t)); }
};

// The registers of an accumulator that belong to one of a thread's two rows.
template <typename Visit>
KDFAST_INLINE void each_of_row(int half, Visit visit) {
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    if (i / 2 % 2 == half) visit(i);
  }
}

// Takes the scores of a tile into the two rows of a thread.
template <bool GUARDED>
KDFAST_INLINE void take(Row (&rows)[2], const float (&z_s)[PER_THREAD],
                        const float (&z_t)[PER_THREAD], float c_s, float c_t) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Row& row = rows[half];
    float largest_s = LOWEST, largest_t = LOWEST;
    each_of_row(half, [&](int i) {
      largest_s = fmaxf(largest_s, z_s[i]);
      largest_t = fmaxf(largest_t, z_t[i]);
    });
    row.raise(largest_s, largest_t, c_s, c_t);
    const float shift_s = row.m_s * c_s, shift_t = row.m_t * c_t;
    each_of_row(half, [&](int i) {
      row.add<GUARDED>(z_s[i], z_t[i], c_s, c_t, shift_s, shift_t);
    });
  }
}

// dS / g of one pair of scores; lse in units of the exponent.
KDFAST_INLINE float gradient(float z_s, float z_t, float c_s, float c_t, float lse_s, float lse_t,
                             float divergence, bool reverse, bool polynomial) {
  const float u_s = fmaf(z_s, c_s, -lse_s), u_t = fmaf(z_t, c_t, -lse_t);
  if (!reverse && polynomial) return exp2_polynomial(u_s) - exp2_polynomial(u_t);
  const float p_s = exp2_fast(u_s);
  if (!reverse) return p_s - exp2_fast(u_t);
  // Where p_s = 0 the divergence still counts: it may be NaN.
  return p_s * (LN_2 * (p_s == 0.f ? 0.f : u_s - u_t) - divergence);
}

}  // namespace kdfast::attention
