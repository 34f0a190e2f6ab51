// attention_kl on Hopper: checks, launches, registration.

#include "attention_kl_kernels.cuh"
#include "entry.h"

#include <algorithm>
#include <climits>
#include <vector>

namespace kdfast::attention {
namespace {

// Code for other architectures is left empty, and the host refuses to launch it. Only setup.py can
// tell the host: nvcc shows it 900 for sm_90 and sm_90a alike.
#ifdef KDFAST_SM_90A
constexpr bool COMPILED = true;
#else
constexpr bool COMPILED = false;
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#define KDFAST_HOPPER
#endif

template <typename T>
__global__ void __launch_bounds__(WARPGROUPS_FORWARD * THREADS, 1)
    forward(const __grid_constant__ Problem problem) {
#ifdef KDFAST_HOPPER
  extern __shared__ char raw[];
  forward_block<T>(problem, raw);
#endif
}

template <typename T, int PANELS_S, bool KEYS>
__global__ void __launch_bounds__(warpgroups_backward(PANELS_S) * THREADS, 1)
    backward(const __grid_constant__ Problem problem) {
#ifdef KDFAST_HOPPER
  extern __shared__ char raw[];
  backward_block<T, PANELS_S, KEYS>(problem, raw);
#endif
}

// The host

constexpr const char* OP = "attention_kl (cuda): ";

#define KDFAST_CHECK(condition, ...) STD_TORCH_CHECK(condition, OP, __VA_ARGS__)

struct Inputs {
  const std::vector<Tensor>&query_s, &key_s, &query_t, &key_t;
  const std::optional<Tensor>&attention_mask, &query_mask;
  const std::vector<double>&scale_s, &scale_t;
};

// A call: the table of all its pairs, and what they share.
struct Call {
  Problem problem{};
  std::vector<Pair> pairs;
  std::vector<Tensor> copies;  // of tensors that were not aligned
  int64_t batches;
  bool half;
  cudaStream_t stream;

  bool empty() const { return batches == 0; }
};

Operand describe(Tensor x, int64_t query_heads, std::vector<Tensor>& copies) {
  KDFAST_CHECK(x.is_cuda() && x.dim() == 4, "inputs should be [B, H, N, d] on a GPU");
  const int64_t width = x.size(3);
  KDFAST_CHECK(width % 8 == 0 && width <= 128, "head width is ", width,
               ", should be a multiple of 8 up to 128");
  KDFAST_CHECK(x.stride(3) == 1, "the last dimension should be dense");
  KDFAST_CHECK(x.size(1) > 0 && query_heads % x.size(1) == 0,
               "query heads should be a multiple of key heads");
  if (!rows_aligned(x)) copies.push_back(x = torch::stable::clone(x));  // new memory is dense
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), int(width),
          int(query_heads / x.size(1))};
}

const uint8_t* describe(const std::optional<Tensor>& mask, int64_t batches, int64_t tokens,
                        int64_t& batch, int64_t& row) {
  if (!mask) return nullptr;
  KDFAST_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 &&
                   mask->size(0) == batches && mask->size(1) == tokens,
               "masks should be bool [B, N]");
  batch = mask->stride(0);
  row = mask->stride(1);
  return static_cast<const uint8_t*>(mask->data_ptr());
}

Call describe(const Inputs& inputs, const std::optional<Tensor>& cu_seqlens, bool causal,
              std::optional<int64_t> window, bool mean_heads, const std::string& direction) {
  const Tensor& query = inputs.query_s[0];
  const Tensor& key = inputs.key_s[0];
  const int device = query.get_device_index();
  int major = 0, minor = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  KDFAST_CHECK(major == 9 && minor == 0, "the GPU has compute capability ", major, ".", minor,
               ", should be 9.0 (Hopper)");
  KDFAST_CHECK(COMPILED, "this build has no code for sm_90a; add 9.0a to TORCH_CUDA_ARCH_LIST");
  KDFAST_CHECK(!cu_seqlens, "cu_seqlens is not served");
  KDFAST_CHECK(!mean_heads, "match_heads='mean' is not served");
  KDFAST_CHECK(direction == "forward" || direction == "reverse", "direction is '", direction,
               "', should be 'forward' or 'reverse'");
  const ScalarType dtype = query.scalar_type();
  KDFAST_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
               "inputs should be bfloat16 or float16");

  Call call;
  Problem& problem = call.problem;
  call.batches = query.size(0);
  call.half = dtype == ScalarType::Half;
  call.stream = current_stream(query);
  const int64_t queries = query.size(2), keys = key.size(2);
  KDFAST_CHECK(call.batches <= BLOCKS, "a batch of more than ", BLOCKS);
  KDFAST_CHECK(queries <= TOKENS && keys <= TOKENS, "more than ", TOKENS, " tokens");
  problem.band = Band(int(queries), int(keys), causal,
                      window ? int(std::min<int64_t>(*window, INT_MAX)) : -1);
  problem.banded = causal || window;
  problem.reverse = direction == "reverse";
  problem.key_mask = describe(inputs.attention_mask, call.batches, keys, problem.key_mask_batch,
                              problem.key_mask_row);
  problem.query_mask = describe(inputs.query_mask, call.batches, queries,
                                problem.query_mask_batch, problem.query_mask_row);
  for (size_t i = 0; i < inputs.query_s.size(); ++i) {
    const Tensor* sides[] = {&inputs.query_s[i], &inputs.key_s[i], &inputs.query_t[i],
                             &inputs.key_t[i]};
    const int64_t heads = sides[0]->size(1);
    KDFAST_CHECK(heads <= BLOCKS, "more than ", BLOCKS, " heads");
    KDFAST_CHECK(sides[2]->size(1) == heads, "student and teacher differ in heads");
    for (int side = 0; side < 4; ++side) {
      const Tensor& x = *sides[side];
      KDFAST_CHECK(x.scalar_type() == dtype && x.get_device_index() == device &&
                       x.size(0) == call.batches && x.size(2) == (side % 2 ? keys : queries),
                   "inputs differ in dtype, device, batch or length");
    }
    Pair pair{};
    pair.query_s = describe(*sides[0], heads, call.copies);
    pair.key_s = describe(*sides[1], heads, call.copies);
    pair.query_t = describe(*sides[2], heads, call.copies);
    pair.key_t = describe(*sides[3], heads, call.copies);
    KDFAST_CHECK(pair.query_s.width == pair.key_s.width && pair.query_s.group == 1 &&
                     pair.query_t.width == pair.key_t.width,
                 "queries and keys differ in width");
    for (double scale : {inputs.scale_s[i], inputs.scale_t[i]})
      KDFAST_CHECK(scale >= LEAST_SCALE && scale <= LARGEST_SCALE, "scale / temperature is ",
                   scale, ", should be from ", LEAST_SCALE, " to ", LARGEST_SCALE);
    pair.scale_s = float(inputs.scale_s[i]);
    pair.c_s = float(inputs.scale_s[i] * 1.4426950408889634);
    pair.c_t = float(inputs.scale_t[i] * 1.4426950408889634);
    pair.heads = int(heads);
    pair.first_head = problem.heads;
    problem.heads += int(heads);
    call.pairs.push_back(pair);
  }
  return call;
}

// launch(problem) for runs of pairs of equal widths, as many as a table and a grid hold.
template <typename Launch>
void in_runs(const Call& call, Launch launch) {
  for (size_t first = 0; first < call.pairs.size();) {
    Problem problem = call.problem;
    const Pair& like = call.pairs[first];
    size_t end = first;
    while (end < call.pairs.size() && end - first < PAIRS &&
           call.pairs[end].first_head + call.pairs[end].heads - like.first_head <= BLOCKS &&
           call.pairs[end].query_s.panels() == like.query_s.panels() &&
           call.pairs[end].query_t.panels() == like.query_t.panels()) {
      problem.pairs[end - first] = call.pairs[end];
      ++end;
    }
    problem.count = int(end - first);
    launch(problem);
    first = end;
  }
}

// One launch of KERNEL over all heads of a run; rows and moving are the lengths of both sides.
template <auto KERNEL>
void launch(const Call& call, Problem& problem, bool key_heads, int warpgroups, int stages,
            int rows, int moving) {
  int heads = 0;
  for (int i = 0; i < problem.count; ++i) {
    Pair& pair = problem.pairs[i];
    pair.start = heads;
    heads += key_heads ? pair.heads / pair.key_s.group : pair.heads;
  }
  const size_t bytes = Memory::bytes(warpgroups, stages, problem.pairs[0].query_s.panels(),
                                     problem.pairs[0].query_t.panels(), moving);
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  const int block_rows = warpgroups * ROWS;
  const dim3 grid((rows + block_rows - 1) / block_rows, heads, call.batches);
  KERNEL<<<grid, warpgroups * THREADS, bytes, call.stream>>>(problem);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// run(T(), panels of the student as a type)
template <typename Run>
void with_types(const Call& call, const Problem& problem, Run run) {
  auto with = [&](auto type) {
    if (problem.pairs[0].query_s.panels() == 2) run(type, std::integral_constant<int, 2>());
    else run(type, std::integral_constant<int, 1>());
  };
  if (call.half) with(__half());
  else with(__nv_bfloat16());
}

void run_forward(const Call& call) {
  if (call.empty()) return;
  in_runs(call, [&](Problem& problem) {
    if (problem.reverse) {  // KL(s || t) is KL(t || s) with the sides exchanged
      std::swap(problem.lse_s, problem.lse_t);
      for (Pair& pair : problem.pairs) {
        std::swap(pair.query_s, pair.query_t);
        std::swap(pair.key_s, pair.key_t);
        std::swap(pair.c_s, pair.c_t);
      }
    }
    const int rows = problem.band.queries;
    const int panels = problem.pairs[0].query_s.panels() + problem.pairs[0].query_t.panels();
    // Two blocks of two warpgroups on a multiprocessor, where shared memory has room for them.
    const int warpgroups = rows <= ROWS ? 1 : rows <= 2 * ROWS || panels < 4 ? 2 : 3;
    with_types(call, problem, [&](auto type, auto) {
      launch<forward<decltype(type)>>(
          call, problem, false, warpgroups, STAGES_FORWARD, rows, problem.band.keys);
    });
  });
}

void run_backward(const Call& call) {
  if (call.empty()) return;
  in_runs(call, [&](Problem& problem) {
    with_types(call, problem, [&](auto type, auto panels_s) {
      auto side = [&](auto keys) {
        const int rows = keys ? problem.band.keys : problem.band.queries;
        const int moving = keys ? problem.band.queries : problem.band.keys;
        // Short sequences: small blocks, several on a multiprocessor.
        const int most = warpgroups_backward(panels_s);
        const int warpgroups = rows <= 4 * ROWS ? 1 : most;
        launch<backward<decltype(type), panels_s, keys>>(
            call, problem, keys, warpgroups, STAGES_BACKWARD, rows, moving);
      };
      side(std::false_type());
      side(std::true_type());
    });
  });
}

// The gradients of all queries and of all keys of the students, one after the other.
std::tuple<Tensor, Tensor> make_gradients(Call& call, const Inputs& inputs) {
  int64_t queries = 0, keys = 0;
  for (const Tensor& x : inputs.query_s) queries += x.numel();
  for (const Tensor& x : inputs.key_s) keys += x.numel();
  Tensor grad_query = torch::stable::new_empty(inputs.query_s[0], {queries});
  Tensor grad_key = torch::stable::new_empty(inputs.query_s[0], {keys});
  char* at_query = static_cast<char*>(grad_query.data_ptr());
  char* at_key = static_cast<char*>(grad_key.data_ptr());
  for (size_t i = 0; i < call.pairs.size(); ++i) {
    call.pairs[i].grad_query = at_query;
    call.pairs[i].grad_key = at_key;
    at_query += inputs.query_s[i].numel() * grad_query.element_size();
    at_key += inputs.key_s[i].numel() * grad_key.element_size();
  }
  return {grad_query, grad_key};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> make_statistics(Call& call, const Tensor& like) {
  auto make = [&](int64_t heads) {
    return torch::stable::new_empty(like, {call.batches, heads, call.problem.band.queries},
                                    ScalarType::Float);
  };
  Tensor rows = make(call.problem.heads), lse_s = make(call.problem.heads);
  Tensor lse_t = make(call.problem.heads);
  Tensor inner = torch::stable::new_empty(like, {0}, ScalarType::Float);
  call.problem.rows = floats(rows);
  call.problem.lse_s = floats(lse_s);
  call.problem.lse_t = floats(lse_t);
  return {rows, inner, lse_s, lse_t};
}

using Tensors = std::vector<Tensor>;
using Scales = std::vector<double>;
using Mask = std::optional<Tensor>;
using Window = std::optional<int64_t>;

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cuda(
    Tensors query_s, Tensors key_s, Tensors query_t, Tensors key_t, Mask attention_mask,
    Mask query_mask, Mask cu_seqlens, Scales scale_s, Scales scale_t, bool causal, Window window,
    bool mean_heads, std::string direction) {
  const torch::stable::accelerator::DeviceGuard guard(query_s[0].get_device_index());
  const Inputs inputs{query_s, key_s, query_t, key_t, attention_mask, query_mask, scale_s, scale_t};
  Call call = describe(inputs, cu_seqlens, causal, window, mean_heads, direction);
  auto statistics = make_statistics(call, query_s[0]);
  run_forward(call);
  return statistics;
}

std::tuple<Tensor, Tensor> backward_cuda(
    Tensor grad_rows, Tensor rows, Tensor inner, Tensor lse_s, Tensor lse_t, Tensors query_s,
    Tensors key_s, Tensors query_t, Tensors key_t, Mask attention_mask, Mask query_mask,
    Mask cu_seqlens, Scales scale_s, Scales scale_t, bool causal, Window window, bool mean_heads,
    std::string direction, bool tokens_first) {
  const torch::stable::accelerator::DeviceGuard guard(query_s[0].get_device_index());
  const Inputs inputs{query_s, key_s, query_t, key_t, attention_mask, query_mask, scale_s, scale_t};
  Call call = describe(inputs, cu_seqlens, causal, window, mean_heads, direction);
  for (const Tensor* x : {&rows, &lse_s, &lse_t})
    KDFAST_CHECK(x->is_contiguous() && x->scalar_type() == ScalarType::Float,
                 "the statistics of forward should be contiguous float32");
  KDFAST_CHECK(grad_rows.scalar_type() == ScalarType::Float && grad_rows.dim() == 3,
               "grad_rows should be float32 [B, H, Nq]");
  call.problem.rows = floats(rows);
  call.problem.lse_s = floats(lse_s);
  call.problem.lse_t = floats(lse_t);
  call.problem.tokens_first = tokens_first;
  call.problem.upstream = {grad_rows.stride(0), grad_rows.stride(1), grad_rows.stride(2)};
  for (Pair& pair : call.pairs)
    pair.upstream = floats(grad_rows) + pair.first_head * grad_rows.stride(1);
  auto gradients = make_gradients(call, inputs);
  run_backward(call);
  return gradients;
}

}  // namespace
}  // namespace kdfast::attention

// For Python: whether the kernels were compiled.
extern "C" __attribute__((visibility("default"))) int kdfast_cuda_has_sm_90a() {
  return kdfast::attention::COMPILED;
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) {
  m.impl("attention_kl_forward_cuda", TORCH_BOX(&kdfast::attention::forward_cuda));
  m.impl("attention_kl_backward_cuda", TORCH_BOX(&kdfast::attention::backward_cuda));
}
