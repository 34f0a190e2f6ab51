// Runs the kernels of csrc/cuda/attention_map_kl_kernels.cuh in a simulation, and compares with the
// formula in float64. Prints one line per case; the exit status tells whether all are right.

#include "simulation.h"

#include "cuda/attention_map_kl_kernels.cuh"

#include <random>

namespace {

using namespace kdfast::map;
using kdfast::from_float;
using kdfast::to_float;

constexpr float INF = HUGE_VALF;

struct Truth {
  double rows = 0, inner = 0;
  bool idle = true;
  std::vector<double> gradient;  // for an upstream gradient of 1
};

double times(double p, double value) { return p == 0 ? 0 : p * value; }

// One row by its definition; `s` and `t` hold probabilities or scores, hidden entries included.
Truth by_definition(std::vector<double> s, std::vector<double> t, const std::vector<bool>& keys,
                    bool row_takes_part, bool scores, Direction direction) {
  const size_t n = s.size();
  Truth truth;
  truth.gradient.assign(n, 0);
  const double absent = scores ? -INF : 0;
  for (size_t j = 0; j < n; ++j) {
    if (!keys[j]) s[j] = t[j] = absent;
    truth.idle &= s[j] == absent && t[j] == absent;
  }
  truth.idle |= !row_takes_part;
  if (truth.idle) return truth;
  std::vector<double> p_s = s, p_t = t, log_s(n), log_t(n);
  auto normalise = [&](std::vector<double>& p, std::vector<double>& logs) {
    double largest = -INF, sum = 0;
    for (double x : p) largest = std::isnan(x) || x > largest ? x : largest;
    for (double x : p) sum += std::exp(x - largest);
    for (size_t j = 0; j < n; ++j) {
      logs[j] = scores ? p[j] - largest - std::log(sum) : std::log(p[j]);
      if (scores) p[j] = std::exp(logs[j]);
    }
  };
  normalise(p_s, log_s);
  normalise(p_t, log_t);
  double kl_t = 0, kl_s = 0;
  std::vector<double> log_m(n);
  for (size_t j = 0; j < n; ++j) {
    log_m[j] = std::log((p_s[j] + p_t[j]) / 2);
    kl_t += times(p_t[j], log_t[j] - (direction == JS ? log_m[j] : log_s[j]));
    kl_s += times(p_s[j], log_s[j] - (direction == JS ? log_m[j] : log_t[j]));
  }
  truth.rows = direction == FORWARD ? kl_t : direction == REVERSE ? kl_s : (kl_t + kl_s) / 2;
  truth.inner = kl_s;
  for (size_t j = 0; j < n; ++j) {
    if (s[j] == absent && t[j] == absent) continue;
    double& out = truth.gradient[j];
    if (scores) {
      if (direction == FORWARD) out = p_s[j] - p_t[j];
      else if (direction == REVERSE) out = times(p_s[j], log_s[j] - log_t[j] - kl_s);
      else out = times(p_s[j], log_s[j] - log_m[j] - kl_s) / 2;
    } else if (direction == FORWARD) {
      out = p_t[j] == 0 ? 0 : -p_t[j] / p_s[j];
    } else if (p_s[j] != 0) {
      out = direction == REVERSE ? log_s[j] - log_t[j] + 1 : (log_s[j] - log_m[j]) / 2;
    }
  }
  return truth;
}

template <typename T>
T convert(float x) {
  return from_float<T>(x);
}

// The smallest positive number.
template <typename T>
float least() {
  return std::is_same_v<T, float> ? 0x1p-149f : std::is_same_v<T, __half> ? 0x1p-24f : 0x1p-133f;
}

// Whether all is as in the truth: errors relative to the largest, NaN and infinities in place.
struct Comparison {
  double error = 0, scale = 1e-30;
  bool right = true;

  void add(double truth, double mine) {
    if (std::isfinite(truth) && std::isfinite(mine)) {
      error = std::max(error, std::fabs(truth - mine));
      scale = std::max(scale, std::fabs(truth));
    } else {
      right &= std::isnan(truth) ? std::isnan(mine) : truth == mine;
    }
  }
  double relative() const { return error / scale; }
};

template <typename T>
bool run(const char* type, int queries, int keys, bool scores, Direction direction, int pad,
         bool mask, const char* what = "") {
  const int batches = mask ? 2 : 1, heads = 2, row = keys + pad;
  const bool equal = what == std::string("equal"), edges = what == std::string("edges");
  std::mt19937 random(keys * 7 + queries);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  const size_t entries = size_t(batches) * heads * queries * row;
  std::vector<T> storage[2];
  T* maps[2];
  for (int side = 0; side < 2; ++side) {
    storage[side].assign(entries + 8, convert<T>(NAN));
    maps[side] = storage[side].data();
    while (reinterpret_cast<uintptr_t>(maps[side]) % 16) ++maps[side];
  }
  std::vector<uint8_t> tokens(batches * keys + 8, 1);
  uint8_t* token = tokens.data();
  while (reinterpret_cast<uintptr_t>(token) % 8) ++token;
  if (mask)
    for (int i = 0; i < batches * keys; ++i) token[i] = uniform(random) < 0.7f;
  auto at = [&](int b, int h, int i, int j) {
    return ((size_t(b) * heads + h) * queries + i) * row + j;
  };
  auto hidden = [&](int b, int i, int j) {
    return mask && (!token[b * keys + j] || (queries == keys && !token[b * keys + i]));
  };
  for (int b = 0; b < batches; ++b)
    for (int h = 0; h < heads; ++h)
      for (int i = 0; i < queries; ++i)
        for (int side = 0; side < 2; ++side) {
          std::vector<float> x(keys);
          float sum = 0;
          for (float& value : x) {
            value = normal(random) * 2 + (scores ? 30 : 0);
            if (!scores) sum += value = std::exp(value);
          }
          for (int j = 0; j < keys; ++j) {
            float value = scores ? x[j] : x[j] / sum;
            const float absent = scores ? -INF : 0.f;
            if (edges && i == 0) value = absent;
            if (edges && i == 1 && j == 0) value = side ? value : absent;
            if (edges && i == 2 && j == 0) value = side ? absent : value;
            if (edges && i == 3 && j % 2) value = absent;
            if (edges && i == 4 && j == 0) value = side ? value : NAN;
            if (edges && i == 5 && scores) value = j == 0 ? (side ? -1e4f : 1e4f) : 0.f;
            if (edges && i >= 6 && !scores) {  // next to nothing: on one side, on both
              if (j == 0) value = 1;
              else if (j == 1) value = (side ? i == 7 : 1) * least<T>();
              else if (j == 2) value = (side ? 1 : i == 7) * 3 * least<T>();
              else value = 0;
            }
            if (hidden(b, i, j)) value = NAN;
            if (equal && side) maps[1][at(b, h, i, j)] = maps[0][at(b, h, i, j)];
            else maps[side][at(b, h, i, j)] = convert<T>(value);
          }
        }

  const size_t statistics = size_t(batches) * heads * queries;
  std::vector<float> rows(statistics, NAN), inner(statistics, NAN), lse_s(statistics, NAN);
  std::vector<float> lse_t(statistics, NAN);
  std::vector<T> gradient_storage(statistics * keys + 8, convert<T>(NAN));
  T* gradient = gradient_storage.data();
  while (reinterpret_cast<uintptr_t>(gradient) % 16) ++gradient;
  const float upstream = 0.5f;
  Problem problem{};
  const int64_t head_stride = int64_t(queries) * row;
  problem.s = {maps[0], heads * head_stride, head_stride, row};
  problem.t = {maps[1], heads * head_stride, head_stride, row};
  if (mask) problem.mask = token;
  problem.mask_batch = keys;
  problem.mask_key = 1;
  problem.mask_aligned = keys % 8 == 0;
  problem.heads = heads;
  problem.heads_of_all = batches * heads;
  problem.queries = queries;
  problem.keys = keys;
  problem.scores = scores;
  problem.aligned = row % Vector<T>::SIZE == 0;
  problem.direction = direction;
  problem.rows = rows.data();
  problem.inner = inner.data();
  problem.lse_s = lse_s.data();
  problem.lse_t = lse_t.data();
  problem.upstream = &upstream;
  problem.gradient = gradient;

  with_layout<T>(keys, [&](auto layout) {
    using L = decltype(layout);
    const auto [x, y, z] = L::blocks(problem);
    gridDim = {x, y, z};
    Problem exchanged = problem;
    if (direction == REVERSE) {
      std::swap(exchanged.s, exchanged.t);
      std::swap(exchanged.lse_s, exchanged.lse_t);
    }
    blockIdx = {};
    for (bool forward : {true, false})
      for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
          simulation::run_block(L::THREADS, 0, [&] {
            with_row<L>(forward ? exchanged : problem,
                        [&](const auto& row, auto& entries, int lane) {
                          if (forward) forward_row<L>(exchanged, row, entries, lane);
                          else backward_row<L>(problem, row, entries, lane);
                        });
          });
  });

  Comparison of_rows, of_inner, of_gradient;
  bool right = true;
  for (int b = 0; b < batches; ++b)
    for (int h = 0; h < heads; ++h)
      for (int i = 0; i < queries; ++i) {
        std::vector<double> s(keys), t(keys);
        std::vector<bool> visible(keys);
        for (int j = 0; j < keys; ++j) {
          s[j] = to_float(maps[0][at(b, h, i, j)]);
          t[j] = to_float(maps[1][at(b, h, i, j)]);
          visible[j] = !mask || token[b * keys + j];
        }
        const bool takes_part = !mask || queries != keys || token[b * keys + i];
        const Truth truth = by_definition(s, t, visible, takes_part, scores, direction);
        const size_t index = (size_t(b) * heads + h) * queries + i;
        of_rows.add(truth.rows, rows[index]);
        if (direction == JS) of_inner.add(truth.inner, inner[index]);
        right &= (lse_s[index] == INF) == truth.idle && (lse_t[index] == INF) == truth.idle;
        if (!scores && !truth.idle) right &= lse_s[index] == 0 && lse_t[index] == 0;
        if (truth.idle) right &= rows[index] == 0;
        if (equal) right &= rows[index] == 0;
        // A loss that is not finite has no gradient worth comparing, but for what is absent.
        const bool finite = std::isfinite(truth.rows);
        for (int j = 0; j < keys; ++j) {
          const float mine = to_float(gradient[index * keys + j]);
          double expected = upstream * truth.gradient[j];
          if (std::is_same_v<T, __half> && std::fabs(expected) > 65504)  // past the last float16
            expected = std::copysign(INF, expected);
          if (finite) of_gradient.add(expected, mine);
          if (truth.idle || !visible[j]) right &= mine == 0;
          if (equal && (scores || direction == JS)) right &= mine == 0;
        }
      }
  const double bound = std::is_same_v<T, float> ? 2e-6 : std::is_same_v<T, __half> ? 6e-4 : 4.5e-3;
  right &= of_rows.right && of_inner.right && of_gradient.right;
  right &= equal || (of_rows.relative() < 2e-6 && of_inner.relative() < 2e-6);
  right &= of_gradient.relative() < bound || (equal && of_gradient.error < 1e-6);
  const char* names[] = {"forward", "reverse", "js"};
  std::printf("%s %-8s %-13s %-7s %3d x %5d %s%s%s  rows %.1e  gradient %.1e\n",
              right ? "right" : "WRONG", type, scores ? "scores" : "probabilities",
              names[direction], queries, keys, pad ? "unaligned " : "", mask ? "mask " : "", what,
              of_rows.relative(), of_gradient.relative());
  std::fflush(stdout);
  return right;
}

template <typename T>
bool run_all(const char* type) {
  bool right = true;
  for (bool scores : {false, true})
    for (Direction direction : {FORWARD, REVERSE, JS}) {
      right &= run<T>(type, 5, 1, scores, direction, 0, false);
      right &= run<T>(type, 37, 37, scores, direction, 0, true);
      right &= run<T>(type, 40, 128, scores, direction, 0, true);
      right &= run<T>(type, 9, 200, scores, direction, 3, false);
      right &= run<T>(type, 3, 480, scores, direction, 0, true);
      right &= run<T>(type, 2, 1032, scores, direction, 8, true);
      if (direction != REVERSE) right &= run<T>(type, 1, 3000, scores, direction, 0, false);
      if (direction != FORWARD) right &= run<T>(type, 1, 4100, scores, direction, 0, false);
      right &= run<T>(type, 8, 12, scores, direction, 0, false, "edges");
      right &= run<T>(type, 33, 33, scores, direction, 0, true, "equal");
    }
  return right;
}

}  // namespace

int main() {
  const bool right[] = {run_all<float>("float32"), run_all<__nv_bfloat16>("bfloat16"),
                        run_all<__half>("float16")};
  return right[0] && right[1] && right[2] ? 0 : 1;
}
