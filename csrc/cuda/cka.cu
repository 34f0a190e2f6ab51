// CKA: checks, launches, registration.

#include "cka_kernels.cuh"
#include "entry.h"

#include <algorithm>
#include <climits>
#include <vector>

namespace kdfast::cka {
namespace {

template <typename L>
__global__ void __launch_bounds__(L::THREADS, L::RESIDENTS)
    compare(const __grid_constant__ Comparisons comparisons) {
  extern __shared__ __align__(128) char raw[];
  compare_block<L>(comparisons, raw);
}

template <typename L>
__global__ void __launch_bounds__(L::THREADS, L::RESIDENTS)
    compare_backward(const __grid_constant__ Comparisons comparisons) {
  extern __shared__ __align__(128) char raw[];
  compare_backward_block<L>(comparisons, raw);
}

template <typename L>
__global__ void __launch_bounds__(L::THREADS, L::RESIDENTS)
    accumulate(const __grid_constant__ Accumulations call) {
  extern __shared__ __align__(128) char raw[];
  accumulate_block<L>(call, raw);
}

template <typename L>
__global__ void __launch_bounds__(L::THREADS, L::RESIDENTS)
    apply(const __grid_constant__ Gradients call) {
  extern __shared__ __align__(128) char raw[];
  apply_block<L>(call, raw);
}

constexpr int ADD_THREADS = 128;

__global__ void __launch_bounds__(ADD_THREADS)
    add_up(float* parts, int count, int64_t part, int n) {
  add_up_thread(parts, count, part, n);
}

__global__ void __launch_bounds__(FINISH_THREADS)
    finish(Rows rows, const float* sum, float* grams, float* unit, float scale) {
  extern __shared__ __align__(128) char raw[];
  finish_block(rows, sum, grams, unit, scale, raw);
}

__global__ void __launch_bounds__(PAIR_THREADS)
    pair_up(const __grid_constant__ Pairs pairs, int count) {
  extern __shared__ __align__(128) char raw[];
  pair_up_block(pairs, count, raw);
}

// The host

#define KDFAST_CHECK(condition, ...) STD_TORCH_CHECK(condition, "cka (cuda): ", __VA_ARGS__)

using Tensors = std::vector<Tensor>;
using Maybe = std::optional<Tensor>;
using Indices = std::vector<int64_t>;

struct Call {
  Rows rows{};
  std::vector<Layer> layers;
  int made;  // the first so many of them; the others' Gram matrices are known
  const float* known = nullptr;
  bool half, tiles;
  cudaStream_t stream;

  bool empty() const { return rows.problems == 0; }
};

Layer describe(const Tensor& x, const Tensor& like) {
  KDFAST_CHECK(x.is_cuda() && x.dim() == 3, "layers should be [P, n, d] on a GPU");
  KDFAST_CHECK(x.scalar_type() == like.scalar_type() && x.size(0) == like.size(0) &&
                   x.size(1) == like.size(1) && x.get_device_index() == like.get_device_index(),
               "layers differ in dtype, device, problems or rows");
  KDFAST_CHECK(x.stride(2) == 1 || x.size(2) == 1, "the last dimension should be dense");
  KDFAST_CHECK(x.size(2) >= 1 && x.size(2) < (1 << 29), "a layer has ", x.size(2), " columns");
  const bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 &&
                       (x.size(0) <= 1 || x.stride(0) % 8 == 0) && x.stride(1) % 8 == 0 &&
                       x.size(2) % 8 == 0;
  return {x.data_ptr(), x.stride(0), x.stride(1), nullptr, int(x.size(2)), aligned};
}

Call describe(const Tensors& layers, const Maybe& grams, const Maybe& mask, const Indices& pairs,
              const std::vector<double>& bandwidths, const std::string& side, bool unbiased) {
  KDFAST_CHECK(!layers.empty() && layers.size() < 32768 && pairs.size() < 65536,
               layers.size(), " layers, ", pairs.size() / 2, " pairs");
  const Tensor& first = layers[0];
  const ScalarType dtype = first.scalar_type();
  KDFAST_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
               "features should be bfloat16 or float16");
  KDFAST_CHECK(bandwidths.empty(), "kernel='rbf' is not served");
  KDFAST_CHECK(side == "gram" || side == "tiles", "side '", side, "' is not served");
  KDFAST_CHECK(first.dim() == 3 && first.size(1) >= 1 && first.size(1) <= MOST_ROWS,
               "features have n = ", first.dim() == 3 ? first.size(1) : 0,
               " rows, should have up to ", MOST_ROWS);
  KDFAST_CHECK(first.size(0) <= INT_MAX, "more than 2^31 problems");
  int major = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor,
                                        first.get_device_index()));
  KDFAST_CHECK(major >= 8, "the GPU has compute capability ", major, ".x, should be 8.0 or later");

  Call call;
  call.half = dtype == ScalarType::Half;
  call.tiles = side == "tiles";
  call.stream = current_stream(first);
  call.rows.problems = int(first.size(0));
  call.rows.n = int(first.size(1));
  call.rows.unbiased = unbiased;
  for (const Tensor& x : layers) call.layers.push_back(describe(x, first));
  call.made = int(layers.size());
  if (grams) {
    KDFAST_CHECK(!call.tiles && grams->scalar_type() == ScalarType::Float &&
                     grams->is_contiguous() && grams->dim() == 4 &&
                     grams->size(0) <= call.made && grams->size(1) == first.size(0) &&
                     grams->size(2) == first.size(1) && grams->size(3) == first.size(1),
                 "grams should be float32 [layers, P, n, n], contiguous, and side 'gram'");
    call.made -= int(grams->size(0));
    call.known = floats(*grams);
  }
  if (mask) {
    KDFAST_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 &&
                     mask->size(0) == first.size(0) && mask->size(1) == first.size(1),
                 "mask should be bool [P, n]");
    call.rows.mask = static_cast<const uint8_t*>(mask->data_ptr());
    call.rows.mask_problem = mask->stride(0);
    call.rows.mask_row = mask->stride(1);
  }
  for (int64_t i : pairs)
    KDFAST_CHECK(i >= 0 && i < int64_t(layers.size()), "there is no layer ", i);
  return call;
}

// run(layout) with the one for n rows.
template <typename Run>
void with_layout(const Call& call, Run run) {
  auto with = [&](auto type) {
    using T = decltype(type);
    if (call.rows.n <= 32) run(Layout<T, 1>());
    else if (call.rows.n <= 64) run(Layout<T, 2>());
    else run(Layout<T, 4>());
  };
  if (call.half) with(__half());
  else with(__nv_bfloat16());
}

unsigned grid(int64_t blocks) {
  KDFAST_CHECK(blocks <= INT_MAX, "more than 2^31 blocks");
  return unsigned(blocks);
}

template <typename Kernel>
void allow(Kernel kernel, int bytes) {
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// Side "tiles": who is compared with whom. Layers that meet nobody are compared with nothing.
std::vector<Comparison> comparisons_of(const Call& call, const Indices& pairs) {
  const int count = int(call.layers.size());
  std::vector<int> partner(count, -1), cross(count, -1), own(count, -1);
  for (size_t p = 0; p < pairs.size() / 2; ++p) {
    const int i = int(pairs[2 * p]), j = int(pairs[2 * p + 1]);
    if (i == j) {
      KDFAST_CHECK(own[i] < 0, "layer ", i, " occurs twice with itself");
      own[i] = int(p);
      continue;
    }
    KDFAST_CHECK(partner[i] < 0 && partner[j] < 0,
                 "side 'tiles' serves layers that occur in one pair only");
    partner[i] = j;
    partner[j] = i;
    cross[i] = cross[j] = int(p);
  }
  std::vector<Comparison> comparisons;
  for (int i = 0; i < count; ++i) {
    Comparison comparison{};
    comparison.layers[0] = call.layers[i];
    comparison.layer[0] = comparison.layer[1] = i;
    comparison.cross = cross[i];
    comparison.own[0] = own[i];
    comparison.own[1] = -1;
    if (const int j = partner[i]; j >= 0) {
      comparison.layers[1] = call.layers[j];
      comparison.layer[1] = j;
      comparison.own[1] = own[j];
    }
    comparisons.push_back(comparison);
  }
  return comparisons;
}

template <typename Launch>
void in_runs(const Comparisons& all, const std::vector<Comparison>& list, Launch launch) {
  for (size_t first = 0; first < list.size(); first += COMPARISONS) {
    Comparisons run = all;
    const size_t count = std::min<size_t>(list.size() - first, COMPARISONS);
    std::copy_n(list.begin() + first, count, run.at);
    launch(run, unsigned(count));
  }
}

void run_compare(const Call& call, const Indices& pairs, const Comparisons& all) {
  std::vector<Comparison> once;
  for (const Comparison& comparison : comparisons_of(call, pairs)) {
    if (comparison.layer[0] <= comparison.layer[1]) once.push_back(comparison);
  }
  with_layout(call, [&](auto layout) {
    using L = decltype(layout);
    allow(compare<L>, L::BYTES_FORWARD);
    in_runs(all, once, [&](const Comparisons& run, unsigned count) {
      const dim3 blocks(call.rows.problems, count);
      compare<L><<<blocks, L::THREADS, L::BYTES_FORWARD, call.stream>>>(run);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
}

void run_compare_backward(const Call& call, const Indices& pairs, const Comparisons& all,
                          const Indices& wanted, const Tensors& gradients) {
  const std::vector<Comparison> each = comparisons_of(call, pairs);
  std::vector<Comparison> chosen;
  for (size_t i = 0; i < wanted.size(); ++i) {
    chosen.push_back(each[wanted[i]]);
    chosen.back().gradient = gradients[i].data_ptr();
  }
  with_layout(call, [&](auto layout) {
    using L = decltype(layout);
    allow(compare_backward<L>, L::BYTES_BACKWARD);
    in_runs(all, chosen, [&](const Comparisons& run, unsigned count) {
      const dim3 blocks(call.rows.problems, count);
      compare_backward<L><<<blocks, L::THREADS, L::BYTES_BACKWARD, call.stream>>>(run);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
}

// Side "gram"

// Blocks of one matrix: about as many in all as an H200 holds at a time, of at least 8 chunks.
int blocks_of_matrix(const Call& call, int64_t matrices, int residents) {
  constexpr int MULTIPROCESSORS = 132;
  int widest = 0;
  for (const Layer& layer : call.layers) widest = std::max(widest, layer.width);
  const int64_t chunks = (widest + CHUNK - 1) / CHUNK;
  const int64_t room = MULTIPROCESSORS * residents / std::max<int64_t>(matrices, 1);
  return int(std::max<int64_t>(1, std::min(room, chunks / 8)));
}

void run_grams(const Call& call, const Tensor& like, float* grams, float* unit) {
  const Rows& rows = call.rows;
  const int64_t matrices = int64_t(call.made) * rows.problems;
  const int64_t part = matrices * rows.n * rows.n;
  with_layout(call, [&](auto layout) {
    using L = decltype(layout);
    const int blocks = blocks_of_matrix(call, matrices, L::RESIDENTS);
    Tensor workspace =
        torch::stable::new_empty(like, {blocks > 1 ? blocks * part : 0}, ScalarType::Float);
    Accumulations all{};
    all.rows = rows;
    all.blocks = blocks;
    all.part = part;
    all.parts = blocks > 1 ? floats(workspace) : grams;
    allow(accumulate<L>, L::BYTES_FORWARD);
    for (int first = 0; first < call.made; first += LAYERS) {
      const int count = std::min(call.made - first, LAYERS);
      std::copy_n(call.layers.begin() + first, count, all.layers);
      all.first = int64_t(first) * rows.problems;
      const unsigned many = grid(int64_t(count) * rows.problems * blocks);
      accumulate<L><<<many, L::THREADS, L::BYTES_FORWARD, call.stream>>>(all);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    if (blocks > 1) {
      const unsigned many = grid((part + ADD_THREADS - 1) / ADD_THREADS);
      add_up<<<many, ADD_THREADS, 0, call.stream>>>(all.parts, blocks, part, rows.n);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    allow(finish, FINISH_BYTES);
    const unsigned many = grid(matrices);
    finish<<<many, FINISH_THREADS, FINISH_BYTES, call.stream>>>(rows, all.parts, grams, unit,
                                                                 L::SCALE);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void run_pairs(const Call& call, const Indices& pairs, const float* grams, float* inner) {
  Pairs all{};
  all.grams = {grams, call.known, call.made};
  all.rows = call.rows;
  const int many = int(pairs.size() / 2);
  for (int first = 0; first < many; first += PAIRS) {
    const int count = std::min(many - first, PAIRS);
    for (int p = 0; p < 2 * count; ++p) all.layer[p / 2][p % 2] = int16_t(pairs[2 * first + p]);
    all.inner = inner + int64_t(first) * call.rows.problems;
    const unsigned blocks = grid(int64_t(count) * call.rows.problems);
    pair_up<<<blocks, PAIR_THREADS, 256, call.stream>>>(all, count);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

void run_apply(const Call& call, const Indices& pairs, const Upstream& upstream,
               const float* grams, const float* unit, const Indices& wanted,
               const Tensors& gradients) {
  Gradients none{};
  none.grams = {grams, call.known, call.made};
  none.rows = call.rows;
  none.upstream = upstream;
  with_layout(call, [&](auto layout) {
    using L = decltype(layout);
    allow(apply<L>, L::BYTES_BACKWARD);
    none.blocks =
        blocks_of_matrix(call, int64_t(wanted.size()) * call.rows.problems, L::RESIDENTS);
    Gradients run = none;
    unsigned count = 0;
    int terms = 0;
    auto launch = [&] {
      if (count == 0) return;
      const dim3 blocks(grid(int64_t(call.rows.problems) * run.blocks), count);
      apply<L><<<blocks, L::THREADS, L::BYTES_BACKWARD, call.stream>>>(run);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      run = none;
      count = 0;
      terms = 0;
    };
    for (size_t w = 0; w < wanted.size(); ++w) {
      const int64_t i = wanted[w];
      std::vector<std::pair<int, float>> of_layer;  // pairs, and how often they count
      for (size_t p = 0; p < pairs.size() / 2; ++p) {
        const bool left = pairs[2 * p] == i, right = pairs[2 * p + 1] == i;
        if (left || right) of_layer.push_back({int(p), left && right ? 2.f : 1.f});
      }
      KDFAST_CHECK(of_layer.size() <= MOST_TERMS, "layer ", i, " is in more than ", MOST_TERMS,
                   " pairs");
      if (count == GRADIENTS || terms + of_layer.size() > MOST_TERMS) launch();
      auto& at = run.at[count++];
      at.layer = call.layers[i];
      at.gradient = gradients[w].data_ptr();
      at.unit = unit + i * call.rows.problems;
      at.begin = terms;
      for (auto [p, factor] : of_layer) {
        const int64_t other = pairs[2 * p] == i ? pairs[2 * p + 1] : pairs[2 * p];
        run.terms[terms++] = {int16_t(other), int16_t(p), factor};
      }
      at.end = terms;
    }
    launch();
  });
}

// The entry points

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cuda(Tensors layers, Maybe grams, Maybe mask,
                                                        Indices pairs,
                                                        std::vector<double> bandwidths,
                                                        std::string side, bool unbiased,
                                                        bool keep) {
  Call call = describe(layers, grams, mask, pairs, bandwidths, side, unbiased);
  const torch::stable::accelerator::DeviceGuard guard(layers[0].get_device_index());
  const int64_t problems = call.rows.problems, n = call.rows.n;
  const int64_t kept_of_problem = call.made * (call.tiles ? n : n * n);
  int64_t widths = 0;
  for (int i = 0; i < call.made; ++i) widths += call.layers[i].width;
  auto make = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(layers[0], shape, ScalarType::Float);
  };
  Tensor inner = make({int64_t(pairs.size() / 2), problems}), unit = make({call.made, problems});
  Tensor means = make({keep ? problems * widths : 0});
  Tensor kept = make({keep ? problems * kept_of_problem : 0});
  if (call.empty()) return {inner, unit, means, kept};
  if (keep) {
    float* at = floats(means);
    for (int i = 0; i < call.made; ++i) {
      call.layers[i].means = at;
      at += problems * call.layers[i].width;
    }
  }
  if (call.tiles) {
    Comparisons all{};
    all.rows = call.rows;
    all.inner = floats(inner);
    all.unit = floats(unit);
    all.diagonals = keep ? floats(kept) : nullptr;
    run_compare(call, pairs, all);
  } else {
    Tensor matrices = keep ? kept : make({problems * kept_of_problem});
    if (call.made > 0) run_grams(call, layers[0], floats(matrices), floats(unit));
    run_pairs(call, pairs, floats(matrices), floats(inner));
  }
  return {inner, unit, means, kept};
}

Tensors backward_cuda(Tensor grad_inner, Tensor unit, Tensor means, Tensor kept, Tensors layers,
                      Maybe grams, Maybe mask, Indices pairs, std::vector<double> bandwidths,
                      std::string side, bool unbiased, Indices wanted) {
  Call call = describe(layers, grams, mask, pairs, bandwidths, side, unbiased);
  const torch::stable::accelerator::DeviceGuard guard(layers[0].get_device_index());
  KDFAST_CHECK(grad_inner.scalar_type() == ScalarType::Float && grad_inner.dim() == 2 &&
                   grad_inner.size(0) == int64_t(pairs.size() / 2) &&
                   grad_inner.size(1) == call.rows.problems,
               "grad_inner should be float32 [pairs, P]");
  for (const Tensor* x : {&unit, &kept})
    KDFAST_CHECK(x->is_contiguous() && x->scalar_type() == ScalarType::Float,
                 "what forward kept should be contiguous float32");
  Tensors gradients;
  for (int64_t i : wanted) {
    KDFAST_CHECK(i >= 0 && i < call.made, "layer ", i, " has no gradient");
    gradients.push_back(torch::stable::new_empty(layers[i], layers[i].sizes()));
  }
  if (call.empty() || wanted.empty()) return gradients;
  const Upstream upstream{floats(grad_inner), grad_inner.stride(0), grad_inner.stride(1)};
  if (call.tiles) {
    Comparisons all{};
    all.rows = call.rows;
    all.upstream = upstream;
    run_compare_backward(call, pairs, all, wanted, gradients);
  } else {
    run_apply(call, pairs, upstream, floats(kept), floats(unit), wanted, gradients);
  }
  return gradients;
}

}  // namespace
}  // namespace kdfast::cka

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) {
  m.impl("cka_forward_cuda", TORCH_BOX(&kdfast::cka::forward_cuda));
  m.impl("cka_backward_cuda", TORCH_BOX(&kdfast::cka::backward_cuda));
}
