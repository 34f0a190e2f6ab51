// attention_map_kl: checks, launches, registration.

#include "attention_map_kl_kernels.cuh"
#include "entry.h"

#include <climits>

namespace kdfast::map {
namespace {

template <typename L>
__global__ void __launch_bounds__(L::THREADS, L::RESIDENTS)
    forward(const __grid_constant__ Problem problem) {
  with_row<L>(problem, [&](const auto& row, auto& entries, int lane) {
    forward_row<L>(problem, row, entries, lane);
  });
}

template <typename L>
__global__ void __launch_bounds__(L::THREADS, L::RESIDENTS)
    backward(const __grid_constant__ Problem problem) {
  with_row<L>(problem, [&](const auto& row, auto& entries, int lane) {
    backward_row<L>(problem, row, entries, lane);
  });
}

template <typename T>
void launch_for(const Problem& problem, bool gradient, cudaStream_t stream) {
  with_layout<T>(problem.keys, [&](auto layout) {
    using L = decltype(layout);
    const auto [x, y, z] = L::blocks(problem);
    if (gradient) backward<L><<<dim3(x, y, z), L::THREADS, 0, stream>>>(problem);
    else forward<L><<<dim3(x, y, z), L::THREADS, 0, stream>>>(problem);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void launch_for(const Problem& problem, const Tensor& map, bool gradient) {
  if (problem.heads_of_all == 0 || problem.queries == 0) return;
  const cudaStream_t on = current_stream(map);
  switch (map.scalar_type()) {
    case ScalarType::Float:
      return launch_for<float>(problem, gradient, on);
    case ScalarType::BFloat16:
      return launch_for<__nv_bfloat16>(problem, gradient, on);
    case ScalarType::Half:
      return launch_for<__half>(problem, gradient, on);
    default:
      STD_TORCH_CHECK(false, "attention_map_kl: maps should be float32, bfloat16 or float16");
  }
}

Map describe(const Tensor& map) {
  return {map.data_ptr(), map.stride(0), map.stride(1), map.stride(2)};
}

Problem describe(const Tensor& map_s, const Tensor& map_t, const std::optional<Tensor>& mask,
                 bool scores, const std::string& direction) {
  for (const Tensor& map : {map_s, map_t}) {
    STD_TORCH_CHECK(map.is_cuda() && map.dim() == 4, "attention_map_kl: maps should be four-"
                    "dimensional, on a GPU");
    STD_TORCH_CHECK(map.stride(3) == 1 || map.size(3) == 1,
                    "attention_map_kl: the last dimension of a map should be dense");
    STD_TORCH_CHECK(map.size(2) <= INT_MAX - 65536 && map.size(3) <= INT_MAX - 65536,
                    "attention_map_kl: a map has more than 2^31 rows or columns");
    for (int i = 0; i < 4; ++i)
      STD_TORCH_CHECK(map.size(i) == map_s.size(i), "attention_map_kl: the maps differ in shape");
  }
  STD_TORCH_CHECK(map_s.scalar_type() == map_t.scalar_type(),
                  "attention_map_kl: the maps differ in dtype");
  Problem problem{};
  problem.s = describe(map_s);
  problem.t = describe(map_t);
  STD_TORCH_CHECK(map_s.size(0) * map_s.size(1) <= INT_MAX,
                  "attention_map_kl: more than 2^31 heads, over the whole batch");
  problem.heads = int(map_s.size(1));
  problem.heads_of_all = int(map_s.size(0) * map_s.size(1));
  problem.queries = int(map_s.size(2));
  problem.keys = int(map_s.size(3));
  problem.scores = scores;
  problem.aligned = rows_aligned(map_s) && rows_aligned(map_t);
  STD_TORCH_CHECK(direction == "forward" || direction == "reverse" || direction == "js",
                  "attention_map_kl: direction is unknown: ", direction);
  problem.direction = direction == "forward" ? FORWARD : direction == "reverse" ? REVERSE : JS;
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 &&
                        mask->size(0) == map_s.size(0) && mask->size(1) == map_s.size(3),
                    "attention_map_kl: attention_mask should be bool [B, Nk]");
    problem.mask = static_cast<const uint8_t*>(mask->data_ptr());
    problem.mask_batch = mask->stride(0);
    problem.mask_key = mask->stride(1);
    problem.mask_aligned = problem.mask_key == 1 &&
                           reinterpret_cast<uintptr_t>(problem.mask) % 8 == 0 &&
                           (mask->size(0) <= 1 || problem.mask_batch % 8 == 0);
  }
  return problem;
}

Tensor statistics(const Tensor& map, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(map, shape, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cuda(Tensor map_s, Tensor map_t,
                                                        std::optional<Tensor> attention_mask,
                                                        bool scores, std::string direction) {
  Problem problem = describe(map_s, map_t, attention_mask, scores, direction);
  const torch::stable::accelerator::DeviceGuard guard(map_s.get_device_index());
  const std::initializer_list<int64_t> shape = {map_s.size(0), map_s.size(1), map_s.size(2)};
  Tensor rows = statistics(map_s, shape), lse_s = statistics(map_s, shape);
  Tensor lse_t = statistics(map_s, shape);
  const bool js = problem.direction == JS;
  Tensor inner = js ? statistics(map_s, shape) : statistics(map_s, {0});
  problem.rows = floats(rows);
  problem.inner = floats(inner);
  problem.lse_s = floats(lse_s);
  problem.lse_t = floats(lse_t);
  if (problem.direction == REVERSE) {  // KL(s || t) is KL(t || s) with the maps exchanged
    std::swap(problem.s, problem.t);
    std::swap(problem.lse_s, problem.lse_t);
  }
  launch_for(problem, map_s, false);
  return {rows, inner, lse_s, lse_t};
}

Tensor backward_cuda(Tensor grad_rows, Tensor rows, Tensor inner, Tensor lse_s, Tensor lse_t,
                     Tensor map_s, Tensor map_t, std::optional<Tensor> attention_mask, bool scores,
                     std::string direction) {
  Problem problem = describe(map_s, map_t, attention_mask, scores, direction);
  const torch::stable::accelerator::DeviceGuard guard(map_s.get_device_index());
  STD_TORCH_CHECK(rows.is_contiguous() && inner.is_contiguous() && lse_s.is_contiguous(),
                  "attention_map_kl: the statistics of forward should be contiguous");
  STD_TORCH_CHECK(grad_rows.scalar_type() == ScalarType::Float && grad_rows.dim() == 3,
                  "attention_map_kl: grad_rows should be float32 [B, H, Nq]");
  problem.rows = floats(rows);
  problem.inner = floats(inner);
  problem.lse_s = floats(lse_s);
  problem.upstream = floats(grad_rows);
  problem.upstream_batch = grad_rows.stride(0);
  problem.upstream_head = grad_rows.stride(1);
  problem.upstream_row = grad_rows.stride(2);
  Tensor gradient = torch::stable::new_empty(map_s, map_s.sizes());
  problem.gradient = gradient.data_ptr();
  launch_for(problem, map_s, true);
  return gradient;
}

}  // namespace
}  // namespace kdfast::map

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) {
  m.impl("attention_map_kl_forward_cuda", TORCH_BOX(&kdfast::map::forward_cuda));
  m.impl("attention_map_kl_backward_cuda", TORCH_BOX(&kdfast::map::backward_cuda));
}
