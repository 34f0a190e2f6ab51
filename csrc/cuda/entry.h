// What the entry points ask of their tensors.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace kdfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Whether every row of a four-dimensional tensor starts at a multiple of 16 bytes.
inline bool rows_aligned(const Tensor& x) {
  bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int i = 0; i < 3; ++i)
    aligned &= x.size(i) <= 1 || x.stride(i) * int64_t(x.element_size()) % 16 == 0;
  return aligned;
}

inline float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

}  // namespace kdfast
