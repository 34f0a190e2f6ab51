// Runs the kernels of csrc/cuda/attention_kl_kernels.cuh in a simulation, and compares with the
// formula in float64. Prints one line per case; the exit status tells whether all are right.

#include "simulation.h"

#include "cuda/attention_kl_kernels.cuh"

#include <cmath>
#include <random>
#include <string>

namespace {

using namespace kdfast::attention;

struct Case {
  std::string name;
  int batches = 1, heads = 1, key_heads = 1, key_heads_t = 1, queries = 64, keys = 64;
  int width_s = 64, width_t = 64;
  bool causal = false;
  int window = -1;
  bool key_mask = false, query_mask = false, reverse = false, half = false, equal = false;
  bool strided = false, nothing = false, infinite = false;
  int nan_side = -1, nan_token = 0;  // query_s, key_s, query_t, key_t
  int pairs = 1, forward_warpgroups = 2, backward_warpgroups = 1;
  float spread = 1.f, scale_s = 0.13f, scale_t = 0.11f;
};

uint16_t encode(float x, bool half) {
  uint16_t bits;
  if (half) {
    const __half h = __float2half_rn(x);
    std::memcpy(&bits, &h, 2);
  } else {
    const __nv_bfloat16 b = __float2bfloat16_rn(x);
    std::memcpy(&bits, &b, 2);
  }
  return bits;
}

float decode(uint16_t bits, bool half) { return simulation::low_or_high(bits, false, half); }

// [B, H, N, d], or [B, N, H, d] in memory when strided.
struct Array {
  int heads, tokens, width;
  bool strided, half;
  std::vector<uint16_t> storage;
  uint16_t* data;

  Array(int batches, int heads, int tokens, int width, bool strided, bool half)
      : heads(heads), tokens(tokens), width(width), strided(strided), half(half),
        storage(size_t(batches) * heads * tokens * width + 8) {
    data = storage.data();
    while (reinterpret_cast<uintptr_t>(data) % 16) ++data;
  }
  int64_t batch_stride() const { return int64_t(heads) * tokens * width; }
  int64_t head_stride() const { return strided ? width : int64_t(tokens) * width; }
  int64_t row_stride() const { return strided ? int64_t(heads) * width : width; }
  uint16_t& at(int b, int h, int n, int k) {
    return data[b * batch_stride() + h * head_stride() + n * row_stride() + k];
  }
  double value(int b, int h, int n, int k) { return decode(at(b, h, n, k), half); }
  Operand operand(int query_heads) {
    return {data, batch_stride(), head_stride(), row_stride(), width, query_heads / heads};
  }
};

template <typename Kernel>
void launch(Problem problem, bool key_heads, int batches, int warpgroups, int stages, int rows,
            int moving, Kernel kernel) {
  int heads = 0;
  for (int p = 0; p < problem.count; ++p) {
    Pair& pair = problem.pairs[p];
    pair.start = heads;
    heads += key_heads ? pair.heads / pair.key_s.group : pair.heads;
  }
  const size_t bytes = Memory::bytes(warpgroups, stages, problem.pairs[0].query_s.panels(),
                                     problem.pairs[0].query_t.panels(), moving);
  gridDim = {unsigned(rows + warpgroups * ROWS - 1) / (warpgroups * ROWS), unsigned(heads),
             unsigned(batches)};
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
        simulation::run_block(warpgroups * THREADS, bytes,
                              [&] { kernel(problem, simulation::shared.data()); });
}

template <typename T>
void run_backward(const Problem& problem, const Case& c) {
  auto side = [&](auto panels, auto keys) {
    launch(problem, keys, c.batches, c.backward_warpgroups, STAGES_BACKWARD,
           keys ? c.keys : c.queries, keys ? c.queries : c.keys,
           backward_block<T, panels, keys>);
  };
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  if (c.width_s <= 64) side(One(), std::false_type()), side(One(), std::true_type());
  else side(Two(), std::false_type()), side(Two(), std::true_type());
}

// The largest error of `mine`, over the largest true value; infinite where one of them is not a
// number and the other is.
struct Error {
  double error = 0, scale = 0;
  bool exact_zeros = true;

  // `idle`: truly 0, to the bit.
  void add(double truth, double mine, bool idle = false) {
    if (idle && mine != 0) exact_zeros = false;
    if (std::isnan(truth) || std::isnan(mine) || std::isinf(truth) || std::isinf(mine)) {
      if (!(std::isnan(truth) && std::isnan(mine)) && truth != mine) error = HUGE_VAL;
      return;
    }
    error = std::max(error, std::fabs(truth - mine));
    scale = std::max(scale, std::fabs(truth));
  }
  double relative() const { return scale > 0 ? error / scale : error; }
};

bool run(const Case& c) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  std::vector<uint8_t> key_mask(c.batches * c.keys, 1), query_mask(c.batches * c.queries, 1);
  if (c.key_mask)
    for (auto& x : key_mask) x = uniform(random) < 0.7f;
  if (c.query_mask)
    for (auto& x : query_mask) x = uniform(random) < 0.7f;
  if (c.nothing) std::fill(key_mask.begin(), key_mask.begin() + c.keys, 0);
  const Band band(c.queries, c.keys, c.causal, c.window);
  auto plainly_sees = [&](int b, int i, int j) {
    const int distance = i + c.keys - c.queries - j;
    return key_mask[b * c.keys + j] && !(c.causal && distance < 0) &&
           !(c.window >= 0 && std::abs(distance) > c.window);
  };
  auto takes_part = [&](int b, int i) {
    bool some = false;
    for (int j = 0; j < c.keys; ++j) some |= plainly_sees(b, i, j);
    return some && query_mask[b * c.queries + i];
  };

  auto is_used = [&](int b, int j) {
    bool used = false;
    for (int i = 0; i < c.queries && !used; ++i) used = plainly_sees(b, i, j) && takes_part(b, i);
    return used;
  };

  Problem problem{};
  problem.band = band;
  problem.banded = c.causal || c.window >= 0;
  problem.reverse = c.reverse;
  problem.tokens_first = c.strided;
  if (c.key_mask || c.nothing) problem.key_mask = key_mask.data();
  problem.key_mask_batch = c.keys;
  if (c.query_mask) problem.query_mask = query_mask.data();
  problem.query_mask_batch = c.queries;
  problem.key_mask_row = problem.query_mask_row = 1;
  problem.count = c.pairs;
  std::vector<std::unique_ptr<Array>> arrays;
  std::vector<std::vector<float>> gradients;
  const float scale_s = c.scale_s, scale_t = c.scale_t;
  for (int p = 0; p < c.pairs; ++p) {
    const int heads[] = {c.heads, c.key_heads, c.heads, c.key_heads_t};
    const int tokens[] = {c.queries, c.keys, c.queries, c.keys};
    for (int side = 0; side < 4; ++side) {
      arrays.push_back(std::make_unique<Array>(c.batches, heads[side], tokens[side],
                                               side < 2 ? c.width_s : c.width_t, c.strided,
                                               c.half));
      Array& x = *arrays.back();
      for (int b = 0; b < c.batches; ++b)
        for (int h = 0; h < x.heads; ++h)
          for (int n = 0; n < x.tokens; ++n) {
            // What nobody counts on holds NaN.
            const bool used = side % 2 == 0 ? takes_part(b, n) : is_used(b, n);
            for (int k = 0; k < x.width; ++k) {
              float value = normal(random) * c.spread;
              if (c.equal && side >= 2)
                value = arrays[arrays.size() - 3]->value(b, h, n, k);
              // A key whose scores are all -inf, for both models.
              if (c.infinite && k == 0) value = side % 2 == 0 ? 1.f : n == 5 ? -HUGE_VALF : 0.f;
              if (side == c.nan_side && n == c.nan_token) value = NAN;
              x.at(b, h, n, k) = encode(used ? value : NAN, c.half);
            }
          }
    }
    Pair& pair = problem.pairs[p];
    pair.query_s = arrays[4 * p]->operand(c.heads);
    pair.key_s = arrays[4 * p + 1]->operand(c.heads);
    pair.query_t = arrays[4 * p + 2]->operand(c.heads);
    pair.key_t = arrays[4 * p + 3]->operand(c.heads);
    pair.scale_s = scale_s;
    pair.c_s = scale_s * kdfast::LOG2_E;
    pair.c_t = (c.equal ? scale_s : scale_t) * kdfast::LOG2_E;
    pair.heads = c.heads;
    pair.first_head = problem.heads;
    problem.heads += c.heads;
    for (int side = 0; side < 2; ++side)
      gradients.emplace_back(
          (size_t(c.batches) * (side ? c.key_heads * c.keys : c.heads * c.queries) * c.width_s + 4),
          NAN);
    pair.grad_query = gradients[2 * p].data();
    pair.grad_key = gradients[2 * p + 1].data();
  }
  const size_t statistics = size_t(c.batches) * problem.heads * c.queries;
  std::vector<float> rows(statistics, NAN), lse_s(statistics, NAN), lse_t(statistics, NAN);
  std::vector<float> upstream(statistics);
  for (float& g : upstream) g = normal(random) * 1e-3f;
  problem.rows = rows.data();
  problem.lse_s = lse_s.data();
  problem.lse_t = lse_t.data();
  problem.upstream = {int64_t(problem.heads) * c.queries, c.queries, 1};
  for (int p = 0; p < c.pairs; ++p)
    problem.pairs[p].upstream = upstream.data() + problem.pairs[p].first_head * c.queries;

  Problem exchanged = problem;
  if (c.reverse) {
    std::swap(exchanged.lse_s, exchanged.lse_t);
    for (Pair& pair : exchanged.pairs) {
      std::swap(pair.query_s, pair.query_t);
      std::swap(pair.key_s, pair.key_t);
      std::swap(pair.c_s, pair.c_t);
    }
  }
  launch(exchanged, false, c.batches, c.forward_warpgroups, STAGES_FORWARD, c.queries, c.keys,
         c.half ? forward_block<__half> : forward_block<__nv_bfloat16>);
  if (c.half) run_backward<__half>(problem, c);
  else run_backward<__nv_bfloat16>(problem, c);

  Error of_rows, of_lse, of_query, of_key;
  for (int p = 0; p < c.pairs; ++p) {
    auto side = [&](int i) -> Array& { return *arrays[4 * p + i]; };
    for (int b = 0; b < c.batches; ++b) {
      std::vector<double> grad_key(size_t(c.key_heads) * c.keys * c.width_s);
      for (int h = 0; h < c.heads; ++h) {
        for (int i = 0; i < c.queries; ++i) {
          const size_t at =
              (size_t(b) * problem.heads + p * c.heads + h) * c.queries + i;
          std::vector<double> grad_query(c.width_s);
          const int hk = h / (c.heads / c.key_heads), hk_t = h / (c.heads / c.key_heads_t);
          if (!takes_part(b, i)) {
            of_rows.add(0, rows[at], true);
            of_lse.add(HUGE_VAL, lse_s[at]);
          } else {
            std::vector<double> s(c.keys), t(c.keys);
            double lse[2] = {0, 0};
            for (int j = 0; j < c.keys; ++j) {
              if (!plainly_sees(b, i, j)) continue;
              for (int k = 0; k < c.width_s; ++k)
                s[j] += scale_s * side(0).value(b, h, i, k) * side(1).value(b, hk, j, k);
              for (int k = 0; k < c.width_t; ++k)
                t[j] += (c.equal ? scale_s : scale_t) * side(2).value(b, h, i, k) *
                        side(3).value(b, hk_t, j, k);
              lse[0] += std::exp(s[j]);
              lse[1] += std::exp(t[j]);
            }
            double kl = 0;
            auto log_ratio = [&](int j) {
              return s[j] - std::log(lse[0]) - t[j] + std::log(lse[1]);
            };
            for (int j = 0; j < c.keys; ++j) {
              if (!plainly_sees(b, i, j) || s[j] == -HUGE_VAL) continue;
              kl += c.reverse ? std::exp(s[j]) / lse[0] * log_ratio(j)
                              : -std::exp(t[j]) / lse[1] * log_ratio(j);
            }
            of_rows.add(kl, rows[at]);
            of_lse.add(std::log(lse[0]), lse_s[at]);
            of_lse.add(std::log(lse[1]), lse_t[at]);
            for (int j = 0; j < c.keys; ++j) {
              if (!plainly_sees(b, i, j)) continue;
              const double p_s = std::exp(s[j]) / lse[0], p_t = std::exp(t[j]) / lse[1];
              const double ds = upstream[at] * scale_s *
                                (c.reverse ? p_s * (log_ratio(j) - kl) : p_s - p_t);
              for (int k = 0; k < c.width_s; ++k) {
                grad_query[k] += ds * side(1).value(b, hk, j, k);
                grad_key[(size_t(hk) * c.keys + j) * c.width_s + k] +=
                    ds * side(0).value(b, h, i, k);
              }
            }
          }
          auto made = [&](std::vector<float>& values, int heads, int tokens, int head, int token,
                          int k) -> double {
            const size_t index =
                c.strided ? ((size_t(b) * tokens + token) * heads + head) * c.width_s + k
                          : ((size_t(b) * heads + head) * tokens + token) * c.width_s + k;
            return decode(reinterpret_cast<uint16_t*>(values.data())[index], c.half);
          };
          for (int k = 0; k < c.width_s; ++k)
            of_query.add(grad_query[k], made(gradients[2 * p], c.heads, c.queries, h, i, k),
                         !takes_part(b, i));
          if (h == c.heads - 1 && i == c.queries - 1)
            for (int hk2 = 0; hk2 < c.key_heads; ++hk2)
              for (int j = 0; j < c.keys; ++j)
                for (int k = 0; k < c.width_s; ++k)
                  of_key.add(grad_key[(size_t(hk2) * c.keys + j) * c.width_s + k],
                             made(gradients[2 * p + 1], c.key_heads, c.keys, hk2, j, k),
                             !is_used(b, j));
        }
      }
    }
  }
  const double bound = c.half ? 2e-3 : 8e-3;
  bool right = of_rows.relative() < 2e-5 && of_lse.relative() < 2e-6 && of_rows.exact_zeros &&
               of_query.relative() < bound && of_key.relative() < bound &&
               of_query.exact_zeros && of_key.exact_zeros;
  if (c.infinite) right = of_rows.relative() < 2e-5;  // 0 times infinity is in the gradients
  if (c.equal) {
    right = true;
    for (float x : rows) right &= x == 0;
    for (const Error* x : {&of_query, &of_key}) right &= x->scale < 1e-6 && x->error < 1e-15;
    for (auto& values : gradients)
      for (size_t i = 0; i + 4 < values.size(); ++i)
        right &= decode(reinterpret_cast<uint16_t*>(values.data())[i], c.half) == 0;
  }
  std::printf("%s %-44s rows %.1e  lse %.1e  dQ %.1e  dK %.1e\n", right ? "right" : "WRONG",
              c.name.c_str(), of_rows.relative(), of_lse.relative(), of_query.relative(),
              of_key.relative());
  std::fflush(stdout);
  return right;
}

// The band's intervals are those of its definition.
bool check_band() {
  for (int queries : {1, 5, 9})
    for (int keys : {1, 5, 9})
      for (bool causal : {false, true})
        for (int window : {-1, 0, 2, 100}) {
          const Band band(queries, keys, causal, window);
          for (int i = 0; i < queries; ++i)
            for (int j = 0; j < keys; ++j) {
              const int distance = i + keys - queries - j;
              const bool sees = !(causal && distance < 0) &&
                                !(window >= 0 && std::abs(distance) > window);
              const bool by_key = band.first_key(i) <= j && j < band.end_key(i);
              const bool by_query = band.first_query(j) <= i && i < band.end_query(j);
              if (sees != band.sees(i, j) || sees != by_key || sees != by_query) return false;
              for (int i2 = i + 1; i2 <= queries; ++i2)
                for (int j2 = j + 1; j2 <= keys; ++j2) {
                  bool all = true;
                  for (int a = i; a < i2; ++a)
                    for (int b = j; b < j2; ++b) all &= band.sees(a, b);
                  if (all != band.all(i, i2, j, j2)) return false;
                }
            }
        }
  return true;
}

// Exponentials by arithmetic are those of the definition, and NaN of NaN.
bool check_polynomial() {
  for (float x = -140.f; x < 1.f; x += 0.0371f) {
    const double truth = std::exp2(std::max(x, -126.f));
    if (std::fabs(exp2_polynomial(x) - truth) > 3e-7 * truth) return false;
  }
  return exp2_polynomial(0.f) == 1.f && std::isnan(exp2_polynomial(NAN));
}

// A student's score of -inf: +inf where the teacher has mass there, nothing where it has none.
bool check_minus_infinity() {
  for (bool mass : {false, true}) {
    Row row;
    float z_s[PER_THREAD] = {}, z_t[PER_THREAD] = {};
    z_s[4] = -HUGE_VALF;
    if (!mass) z_t[4] = -1e4f;
    Row rows[2];
    take<false>(rows, z_s, z_t, 1.f, 1.f);
    if (std::isnan(rows[0].a)) {
      rows[0] = rows[1] = Row();
      take<true>(rows, z_s, z_t, 1.f, 1.f);
    }
    const float divergence = rows[0].divergence();
    if (mass ? divergence != HUGE_VALF : std::fabs(divergence) > 1e-6f) return false;
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<Case> cases = {
      {.name = "one tile"},
      {.name = "ragged", .batches = 2, .heads = 2, .key_heads = 2, .key_heads_t = 2,
       .queries = 70, .keys = 131},
      {.name = "ragged, float16", .queries = 131, .keys = 70, .half = true},
      {.name = "one token", .queries = 1, .keys = 1},
      {.name = "three warpgroups", .queries = 200, .keys = 190, .forward_warpgroups = 3,
       .backward_warpgroups = 3},
      {.name = "widths 128 and 64, strided", .heads = 2, .key_heads = 2, .key_heads_t = 2,
       .queries = 100, .keys = 80, .width_s = 128, .strided = true, .backward_warpgroups = 2},
      {.name = "widths 64 and 128, reverse, float16", .queries = 90, .keys = 150, .width_t = 128,
       .reverse = true, .half = true, .backward_warpgroups = 2},
      {.name = "widths 128, reverse", .queries = 70, .keys = 70, .width_s = 128, .width_t = 128,
       .reverse = true},
      {.name = "narrow", .queries = 66, .keys = 66, .width_s = 24, .width_t = 80},
      {.name = "narrow, two panels", .heads = 2, .key_heads = 2, .key_heads_t = 2, .queries = 66,
       .keys = 40, .width_s = 72, .width_t = 8, .strided = true},
      {.name = "masks", .batches = 2, .queries = 130, .keys = 200, .key_mask = true,
       .query_mask = true, .backward_warpgroups = 2},
      {.name = "causal", .queries = 150, .keys = 150, .causal = true, .backward_warpgroups = 2},
      {.name = "causal, more keys, masks, float16", .queries = 90, .keys = 210, .causal = true,
       .key_mask = true, .query_mask = true, .half = true},
      {.name = "causal, fewer keys", .queries = 150, .keys = 70, .causal = true},
      // c times a hidden score, less the same rounded, is a large number of either sign.
      {.name = "causal, scales of widths 64 and 128", .queries = 150, .keys = 150, .causal = true,
       .scale_s = 0.125f, .scale_t = 0.08838835f},
      {.name = "window, scales of widths 32 and 24", .queries = 150, .keys = 150, .window = 20,
       .key_mask = true, .scale_s = 0.1767767f, .scale_t = 0.2041241f},
      {.name = "window, masks", .queries = 260, .keys = 260, .window = 17,
       .key_mask = true, .query_mask = true, .backward_warpgroups = 2},
      {.name = "causal window of one", .queries = 140, .keys = 140, .causal = true, .window = 1,
       .query_mask = true},
      {.name = "grouped heads, pairs", .heads = 4, .key_heads = 2, .key_heads_t = 1,
       .queries = 70, .keys = 90, .strided = true, .pairs = 2},
      {.name = "a sample of padding", .batches = 2, .queries = 70, .keys = 70, .nothing = true},
      {.name = "many tiles", .queries = 390, .keys = 700, .forward_warpgroups = 3,
       .backward_warpgroups = 3},
      {.name = "scores of minus infinity", .queries = 150, .keys = 200, .infinite = true},
      {.name = "peaked", .queries = 70, .keys = 140, .half = true, .spread = 6.f},
      {.name = "peaked, reverse", .queries = 70, .keys = 140, .reverse = true, .half = true,
       .spread = 6.f},
      {.name = "equal", .queries = 90, .keys = 130, .key_mask = true, .equal = true},
      {.name = "equal, reverse, float16", .queries = 90, .keys = 130, .causal = true,
       .reverse = true, .half = true, .equal = true},
      // Windows leave keys that no row of NaN sees: finite.
      {.name = "NaN in a teacher's query", .queries = 200, .keys = 200, .window = 30,
       .nan_side = 2, .nan_token = 101},
      {.name = "NaN in a teacher's query, reverse, peaked", .queries = 200, .keys = 200,
       .window = 30, .reverse = true, .nan_side = 2, .nan_token = 66, .spread = 6.f},
      {.name = "NaN in a teacher's key, masks, float16", .queries = 200, .keys = 200, .window = 20,
       .key_mask = true, .query_mask = true, .half = true, .nan_side = 3, .nan_token = 130},
      {.name = "NaN in a student's query", .queries = 70, .keys = 90, .nan_side = 0,
       .nan_token = 8},
      {.name = "NaN in a student's key", .queries = 70, .keys = 90, .nan_side = 1,
       .nan_token = 61},
  };
  bool right = check_band();
  std::printf("%s the band's intervals\n", right ? "right" : "WRONG");
  const bool infinity = check_minus_infinity();
  std::printf("%s scores of minus infinity\n", infinity ? "right" : "WRONG");
  right &= infinity;
  const bool polynomial = check_polynomial();
  std::printf("%s exponentials by arithmetic\n", polynomial ? "right" : "WRONG");
  right &= polynomial;
  for (bool copies : {true, false}) {
    simulation::EARLY_COPIES = copies;
    simulation::EARLY_PRODUCTS = !copies;
    std::printf("copies %s, products %s\n", copies ? "early" : "late", copies ? "late" : "early");
    for (const Case& c : cases) {
      if (count > 1 && c.name.find(arguments[1]) == std::string::npos) continue;
      right &= run(c);
    }
  }
  return right ? 0 : 1;
}
