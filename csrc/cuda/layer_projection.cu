// Layer projection: checks, launches, registration.

#include "layer_projection_kernels.cuh"
#include "entry.h"

#include <algorithm>
#include <climits>
#include <vector>

namespace kdfast::projection {
namespace {

constexpr int MOST_THREADS = 256;

template <typename B>
__global__ void __launch_bounds__(MOST_THREADS, 2) project(const __grid_constant__ Call call) {
  extern __shared__ __align__(128) char raw[];
  project_block<B>(call, raw);
}

template <typename B>
__global__ void __launch_bounds__(MOST_THREADS, 2)
    project_backward(const __grid_constant__ Call call) {
  extern __shared__ __align__(128) char raw[];
  project_backward_block<B>(call, raw);
}

template <typename B>
__global__ void __launch_bounds__(MOST_THREADS, 2)
    compare_states(const __grid_constant__ Call call) {
  extern __shared__ __align__(128) char raw[];
  loss_block<B, false>(call, raw);
}

template <typename B>
__global__ void __launch_bounds__(MOST_THREADS, 1)
    compare_states_backward(const __grid_constant__ Call call) {
  extern __shared__ __align__(128) char raw[];
  loss_backward_block<B>(call, raw);
}

template <typename B>
__global__ void __launch_bounds__(MOST_THREADS, 2)
    compare_layers(const __grid_constant__ Call call) {
  extern __shared__ __align__(128) char raw[];
  loss_block<B, true>(call, raw);
}

template <typename B>
__global__ void __launch_bounds__(MOST_THREADS, 2)
    compare_layers_backward(const __grid_constant__ Call call) {
  extern __shared__ __align__(128) char raw[];
  losses_backward_block<B>(call, raw);
}

template <int D, bool BACKWARD>
__global__ void __launch_bounds__(128, 3)
    compare_narrow(const __grid_constant__ Call call, Kind kind, bool losses) {
  extern __shared__ __align__(128) char raw[];
  narrow_block<D, BACKWARD>(call, kind, losses, raw);
}

// The host

#define KDFAST_CHECK(condition, ...) \
  STD_TORCH_CHECK(condition, "layer_projection (cuda): ", __VA_ARGS__)

using Tensors = std::vector<Tensor>;
using Maybe = std::optional<Tensor>;
using Indices = std::vector<int64_t>;

struct Launch {
  Call call{};
  ScalarType dtype;
  int size;  // bytes of a number
  int processors = 0, shared = 0, shared_of_block = 0;
  cudaStream_t stream;
  Tensors made;
};

void add_layers(Launch& launch, const Tensors& layers, const Tensor& first) {
  Call& call = launch.call;
  for (const Tensor& x : layers) {
    KDFAST_CHECK(x.is_cuda() && x.dim() == 3 && x.scalar_type() == launch.dtype &&
                     x.size(0) == first.size(0) && x.size(1) == first.size(1) &&
                     x.size(2) == first.size(2) && x.get_device_index() == first.get_device_index(),
                 "layers should be [A, B, d] on one GPU, of one shape and dtype");
    KDFAST_CHECK(x.stride(2) == 1 || x.size(2) == 1, "the last dimension should be dense");
    call.layers[call.rows++] = {x.data_ptr(), x.stride(0), x.stride(1)};
    const int per = 16 / launch.size;
    call.aligned &= reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && call.d % per == 0 &&
                    (x.size(0) <= 1 || x.stride(0) % per == 0) &&
                    (x.size(1) <= 1 || x.stride(1) % per == 0);
  }
}

Launch describe(const Tensors& layers_s, const Tensors& layers_t, const Maybe& mask,
                double scale) {
  KDFAST_CHECK(!layers_s.empty() && layers_s.size() <= MOST_LAYERS && !layers_t.empty() &&
                   layers_t.size() <= MOST_LAYERS,
               layers_s.size(), " and ", layers_t.size(), " layers");
  const Tensor& first = layers_s[0];
  Launch launch;
  launch.dtype = first.scalar_type();
  KDFAST_CHECK(launch.dtype == ScalarType::Float || launch.dtype == ScalarType::BFloat16 ||
                   launch.dtype == ScalarType::Half,
               "layers should be float32, bfloat16 or float16");
  KDFAST_CHECK(first.dim() == 3 && first.size(2) >= 1 && first.size(2) <= (1 << 24),
               "layers should be [A, B, d]");
  const int device = first.get_device_index();
  int major = 0, processors = 0, shared = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  KDFAST_CHECK(major >= 8, "the GPU has compute capability ", major, ".x, should be 8.0 or later");
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  launch.processors = processors;
  launch.shared = shared;
  launch.shared_of_block = launch.shared - 1024;
  launch.size = launch.dtype == ScalarType::Float ? 4 : 2;
  launch.stream = current_stream(first);

  Call& call = launch.call;
  call.inner = first.size(1);
  call.tokens = first.size(0) * first.size(1);
  call.d = int(first.size(2));
  call.many_s = int(layers_s.size());
  call.many_t = int(layers_t.size());
  call.scale = float(scale);
  call.aligned = true;
  call.aligned_out = call.d % (16 / launch.size) == 0;
  if (mask) {
    KDFAST_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 &&
                     mask->size(0) == first.size(0) && mask->size(1) == first.size(1),
                 "mask should be bool [A, B]");
    call.mask = static_cast<const uint8_t*>(mask->data_ptr());
    call.mask_a = mask->stride(0);
    call.mask_b = mask->stride(1);
  }
  return launch;
}

void set_options(Call& call, const std::string& objective, double temperature) {
  KDFAST_CHECK(objective == "mse" || objective == "cosine" || objective == "kl", "objective '",
               objective, "' is not served");
  Options& options = call.options;
  options.objective = objective == "mse" ? MSE : objective == "cosine" ? COSINE : KL;
  options.per_column = float(1.0 / call.d);
  options.cold = float(1.0 / temperature);
  options.exponent = float(1.4426950408889634 / temperature);
}

// The gradients of the layers `wanted`, in its order.
void add_gradients(Launch& launch, const Tensor& like, const Indices& wanted) {
  Call& call = launch.call;
  for (int64_t i : wanted) {
    KDFAST_CHECK(i >= 0 && i < call.many_s + call.many_t && !call.out[i], "there is no layer ", i,
                 ", or it is wanted twice");
    launch.made.push_back(torch::stable::new_empty(like, like.sizes()));
    call.out[i] = launch.made.back().data_ptr();
    (i < call.many_s ? call.wanted_s : call.wanted_t) = true;
  }
}

enum Task { PROJECT, PROJECT_BACKWARD, STATES, STATES_BACKWARD, LAYERS, LAYERS_BACKWARD };

// Where a block of `warps` has what, with `chunk` columns at a time; how many bytes that is.
int64_t lay_out(Call& call, Task task, bool tensors, int size, int warps, int chunk) {
  const bool backward = task == PROJECT_BACKWARD || task == STATES_BACKWARD;
  const int64_t students = round_up(call.many_s, 8), teachers = round_up(call.many_t, 16);
  const int64_t table = students * teachers * 4;
  call.chunk = chunk;
  call.chunks = (call.d + chunk - 1) / chunk;
  call.pitch = pitch_of(tensors ? chunk * size : round_up(std::min(chunk, call.d), 4) * size);
  int64_t end = 16;
  auto take = [&](int& at, bool needed, int64_t bytes) {
    at = int(end);
    if (needed) end += (bytes + 15) / 16 * 16;
  };
  int tile;
  take(tile, true, int64_t(call.rows) * call.pitch);
  take(call.at_staging, tensors && task != STATES, warps * 640);
  take(call.at_alpha, true, table);
  take(call.at_other, task != PROJECT && task != STATES, table);
  take(call.at_packed, tensors, table);
  take(call.at_packed_other, tensors && backward, table);
  take(call.at_packed_teacher, tensors && backward && call.wanted_t, 2 * table);
  take(call.at_units, tensors && backward, students * 4);
  take(call.at_students, task == STATES || task == STATES_BACKWARD, students * 44);
  take(call.at_sums, task == STATES || task == STATES_BACKWARD, warps * students * 12);
  take(call.at_rows, task == LAYERS || task == LAYERS_BACKWARD,
       (call.many_s + call.many_t) * 8);
  const bool derivatives = !tensors && task == STATES_BACKWARD;
  take(call.at_u, derivatives || task == LAYERS_BACKWARD,
       derivatives ? int64_t(call.many_s) * pitch_of(chunk * 4)
                   : int64_t(call.many_s) * call.many_t * int(sizeof(Comparison)));
  return end;
}

struct Shape {
  int warps, bytes;
};

// Of few teachers, whose coefficients a warp keeps, and of many.
using Few = TensorCores<1, 2>;
using Many = TensorCores<MOST_LAYERS / 16, 1>;

Shape shape_of(Launch& launch, Task task, int columns, bool tensors) {
  Call& call = launch.call;
  auto warps_for = [&](int64_t bytes, int chunk) {
    int warps = 1;  // one for every 16 KiB, which all have some columns
    while (warps < 8 && warps * int64_t(16 << 10) < bytes && warps * columns < chunk) warps *= 2;
    return warps;
  };
  int chunk = round_up(call.d, columns);
  int64_t bytes = int64_t(call.rows) * chunk * launch.size;
  int warps = warps_for(bytes, chunk);
  if (bytes > launch.shared_of_block ||
      lay_out(call, task, tensors, launch.size, warps, chunk) > launch.shared_of_block) {
    // Two blocks of chunks a multiprocessor, or one where the tables alone are large.
    warps = 8;
    for (int share = 2; share >= 1; --share) {
      chunk = round_up(call.d, columns);
      do {
        chunk = round_up(chunk / 2, 64);
      } while (chunk > 64 && lay_out(call, task, tensors, launch.size, warps, chunk) >
                                 launch.shared / share - 1024);
      if (chunk >= 256) break;
    }
  }
  bytes = lay_out(call, task, tensors, launch.size, warps, chunk);
  KDFAST_CHECK(bytes <= launch.shared_of_block, "the GPU has too little shared memory");
  return {warps, int(bytes)};
}

// Blocks take one token after the other: as many blocks as there is room for.
template <typename Kernel>
void start(const Launch& launch, Shape shape, Kernel kernel) {
  const int threads = 32 * shape.warps;
  int residents = 0;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      shape.bytes));
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&residents, kernel, threads,
                                                               size_t(shape.bytes)));
  KDFAST_CHECK(residents > 0, "the GPU has no room for a block");
  const int64_t room = int64_t(residents) * launch.processors;
  const unsigned blocks = unsigned(std::min(launch.call.tokens, room));
  kernel<<<blocks, threads, shape.bytes, launch.stream>>>(launch.call);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename B>
void start_states(const Launch& launch, Task task, Shape shape) {
  if (task == PROJECT) start(launch, shape, &project<B>);
  else if (task == PROJECT_BACKWARD) start(launch, shape, &project_backward<B>);
  else if (task == STATES) start(launch, shape, &compare_states<B>);
  else start(launch, shape, &compare_states_backward<B>);
}

template <typename T>
void start_layers(const Launch& launch, Task task, Shape shape) {
  using B = Block<T, PlainCores>;
  if (task == LAYERS) start(launch, shape, &compare_layers<B>);
  else start(launch, shape, &compare_layers_backward<B>);
}

template <typename Kernel>
void start_narrow(const Launch& launch, bool losses, int threads, int bytes, Kernel kernel) {
  const Kind kind = launch.dtype == ScalarType::Float  ? Kind::FLOAT
                    : launch.dtype == ScalarType::Half ? Kind::HALF
                                                       : Kind::BFLOAT16;
  const int64_t blocks = (launch.call.tokens + threads - 1) / threads;
  KDFAST_CHECK(blocks <= INT_MAX, "more than 2^31 blocks");
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<unsigned(blocks), threads, bytes, launch.stream>>>(launch.call, kind, losses);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Losses of narrow layers, if those of 32 tokens or more fit.
bool run_narrow(const Launch& launch, Task task) {
  const Call& call = launch.call;
  if (call.d > NARROW || task == PROJECT || task == PROJECT_BACKWARD) return false;
  const bool losses = task == LAYERS || task == LAYERS_BACKWARD;
  const bool backward = task == STATES_BACKWARD || task == LAYERS_BACKWARD;
  const int64_t of_token =
      24 + int64_t(call.rows + (call.wanted_t ? call.many_t : 0)) * narrow_pitch(call.d) * 4;
  int threads = 128;
  while (threads > 32 && threads * of_token > launch.shared / 3) threads /= 2;
  const int bytes = int(threads * of_token);
  if (bytes > launch.shared_of_block) return false;
  if (call.d <= 4) {
    if (backward) start_narrow(launch, losses, threads, bytes, &compare_narrow<4, true>);
    else start_narrow(launch, losses, threads, bytes, &compare_narrow<4, false>);
  } else {
    if (backward) start_narrow(launch, losses, threads, bytes, &compare_narrow<NARROW, true>);
    else start_narrow(launch, losses, threads, bytes, &compare_narrow<NARROW, false>);
  }
  return true;
}

void run(Launch& launch, Task task) {
  if (launch.call.tokens == 0 || run_narrow(launch, task)) return;
  const ScalarType dtype = launch.dtype;
  const bool of_layers = task == LAYERS || task == LAYERS_BACKWARD;
  const bool tensors = dtype != ScalarType::Float && !of_layers;
  const bool few = launch.call.many_t <= 16 && launch.call.d > Many::COLUMNS;
  const int columns = !tensors ? PlainCores::COLUMNS : few ? Few::COLUMNS : Many::COLUMNS;
  const Shape shape = shape_of(launch, task, columns, tensors);
  auto with = [&](auto type) {
    using T = decltype(type);
    if (of_layers) start_layers<T>(launch, task, shape);
    else if constexpr (std::is_same_v<T, float>)
      start_states<Block<T, PlainCores>>(launch, task, shape);
    else if (few) start_states<Block<T, Few>>(launch, task, shape);
    else start_states<Block<T, Many>>(launch, task, shape);
  };
  if (dtype == ScalarType::Float) with(0.f);
  else if (dtype == ScalarType::Half) with(__half());
  else with(__nv_bfloat16());
}

// The entry points

Tensors forward_cuda(Tensors layers_s, Tensors layers_t, Maybe mask, double scale) {
  Launch launch = describe(layers_s, layers_t, mask, scale);
  const Tensor& first = layers_s[0];
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  add_layers(launch, layers_s, first);
  add_layers(launch, layers_t, first);
  Call& call = launch.call;
  Tensors made;
  for (int i = 0; i < call.many_s; ++i) {
    made.push_back(torch::stable::new_empty(first, first.sizes()));
    call.out[i] = made.back().data_ptr();
  }
  made.push_back(torch::stable::new_empty(
      first, {first.size(0), first.size(1), call.many_s, call.many_t}, ScalarType::Float));
  call.weights = floats(made.back());
  run(launch, PROJECT);
  return made;
}

Tensors backward_cuda(Tensors grad_projected, Tensor grad_weights, Tensor weights,
                      Tensors layers_s, Tensors layers_t, Maybe mask, double scale,
                      Indices wanted) {
  Launch launch = describe(layers_s, layers_t, mask, scale);
  const Tensor& first = layers_s[0];
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  KDFAST_CHECK(grad_projected.size() == layers_s.size(), grad_projected.size(),
               " gradients of projected states, should be ", layers_s.size());
  add_layers(launch, grad_projected, first);
  add_layers(launch, layers_t, first);
  add_gradients(launch, first, wanted);
  Call& call = launch.call;
  if (call.wanted_t) add_layers(launch, layers_s, first);
  for (const Tensor* x : {&grad_weights, &weights})
    KDFAST_CHECK(x->scalar_type() == ScalarType::Float && x->dim() == 4 &&
                     x->size(0) == first.size(0) && x->size(1) == first.size(1) &&
                     x->size(2) == call.many_s && x->size(3) == call.many_t,
                 "weights and their gradient should be float32 [A, B, L_s, L_t]");
  KDFAST_CHECK(weights.is_contiguous(), "weights should be contiguous");
  call.weights = floats(weights);
  call.upstream_weights = floats(grad_weights);
  call.weights_a = grad_weights.stride(0);
  call.weights_b = grad_weights.stride(1);
  call.weights_i = grad_weights.stride(2);
  call.weights_j = grad_weights.stride(3);
  if (!wanted.empty()) run(launch, PROJECT_BACKWARD);
  return launch.made;
}

Tensor loss_forward_cuda(Tensors layers_s, Tensors layers_t, Maybe mask, std::string objective,
                         bool losses, double scale, double temperature) {
  Launch launch = describe(layers_s, layers_t, mask, scale);
  const Tensor& first = layers_s[0];
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  add_layers(launch, layers_s, first);
  add_layers(launch, layers_t, first);
  set_options(launch.call, objective, temperature);
  Tensor rows = torch::stable::new_empty(
      first, {first.size(0), first.size(1), launch.call.many_s}, ScalarType::Float);
  launch.call.losses = floats(rows);
  run(launch, losses ? LAYERS : STATES);
  return rows;
}

Tensors loss_backward_cuda(Tensor grad_rows, Tensors layers_s, Tensors layers_t, Maybe mask,
                           std::string objective, bool losses, double scale, double temperature,
                           Indices wanted) {
  Launch launch = describe(layers_s, layers_t, mask, scale);
  const Tensor& first = layers_s[0];
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  add_layers(launch, layers_s, first);
  add_layers(launch, layers_t, first);
  set_options(launch.call, objective, temperature);
  add_gradients(launch, first, wanted);
  Call& call = launch.call;
  KDFAST_CHECK(grad_rows.scalar_type() == ScalarType::Float && grad_rows.dim() == 3 &&
                   grad_rows.size(0) == first.size(0) && grad_rows.size(1) == first.size(1) &&
                   grad_rows.size(2) == call.many_s,
               "grad_rows should be float32 [A, B, L_s]");
  call.upstream = floats(grad_rows);
  call.upstream_a = grad_rows.stride(0);
  call.upstream_b = grad_rows.stride(1);
  call.upstream_i = grad_rows.stride(2);
  if (!wanted.empty()) run(launch, losses ? LAYERS_BACKWARD : STATES_BACKWARD);
  return launch.made;
}

}  // namespace
}  // namespace kdfast::projection

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) {
  m.impl("layer_projection_forward_cuda", TORCH_BOX(&kdfast::projection::forward_cuda));
  m.impl("layer_projection_backward_cuda", TORCH_BOX(&kdfast::projection::backward_cuda));
  m.impl("layer_projection_loss_forward_cuda", TORCH_BOX(&kdfast::projection::loss_forward_cuda));
  m.impl("layer_projection_loss_backward_cuda", TORCH_BOX(&kdfast::projection::loss_backward_cuda));
}
