// Entry points of attention_map_kl. The arithmetic is in attention_map_kl.isa.cpp, the contract in
// kdfast/ops/attention_map_kl.py.

#include "attention_map_kl.h"

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "entry.h"

namespace {

using namespace attention_map_kl;
using torch::stable::Tensor;
using Mask = std::optional<Tensor>;

Problem problem_of(const Tensor& map_s, const Tensor& map_t, const Mask& mask, bool scores,
                   const std::string& direction) {
    Problem problem{};
    problem.direction = kdfast::direction_of(direction);
    problem.storage = kdfast::storage_of(map_s);
    problem.scores = scores;
    problem.heads = map_s.size(1);
    problem.queries = map_s.size(2);
    problem.keys = map_s.size(3);
    problem.map_s = static_cast<const char*>(map_s.data_ptr());
    problem.map_t = static_cast<const char*>(map_t.data_ptr());
    for (int i = 0; i < 3; i++) {
        problem.stride_s[i] = map_s.stride(i);
        problem.stride_t[i] = map_t.stride(i);
    }
    if (mask) {
        problem.mask = static_cast<const bool*>(mask->data_ptr());
        for (int i = 0; i < 2; i++) problem.mask_stride[i] = mask->stride(i);
    }
    return problem;
}

void run(const Problem& problem, int64_t batch, int64_t size) {
    const int64_t rows = batch * problem.heads * problem.queries;
    const int64_t share = std::max<int64_t>(1, 65536 / problem.keys);
    kdfast::for_each_item((rows + share - 1) / share,
                          KDFAST_CALL(attention_map_kl_scratch, problem),
                          [&](int64_t i, char* scratch) {
                              const int64_t bytes = problem.keys * size;
                              if (problem.grad != nullptr && rows * bytes > kdfast::MALLOC_KEEPS) {
                                  kdfast::touch_pages(problem.grad + i * share * bytes,
                                                      std::min(share, rows - i * share) * bytes);
                              }
                              KDFAST_CALL(attention_map_kl_rows, problem, i * share,
                                          std::min((i + 1) * share, rows), scratch);
                          });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& map_s, const Tensor& map_t,
                                                   const Mask& attention_mask, bool scores,
                                                   const std::string& direction) {
    Problem problem = problem_of(map_s, map_t, attention_mask, scores, direction);
    const auto dtype = kdfast::statistics_of(map_s);
    const int64_t batch = map_s.size(0);
    const auto rows_of = [&] {
        return torch::stable::new_empty(map_s, {batch, problem.heads, problem.queries}, dtype);
    };
    Tensor rows = rows_of(), lse_s = rows_of(), lse_t = rows_of();
    Tensor inner =
        problem.direction == JS ? rows_of() : torch::stable::new_empty(map_s, {0}, dtype);
    problem.rows = static_cast<char*>(rows.data_ptr());
    problem.inner = static_cast<char*>(inner.data_ptr());
    problem.lse_s = static_cast<char*>(lse_s.data_ptr());
    problem.lse_t = static_cast<char*>(lse_t.data_ptr());
    run(problem, batch, int64_t(map_s.element_size()));
    return {rows, inner, lse_s, lse_t};
}

Tensor backward(const Tensor& grad_rows, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                const Tensor& map_s, const Tensor& map_t, const Mask& attention_mask, bool scores,
                const std::string& direction) {
    Problem problem = problem_of(map_s, map_t, attention_mask, scores, direction);
    problem.grad_rows = static_cast<const char*>(grad_rows.data_ptr());
    for (int i = 0; i < 3; i++) problem.grad_rows_stride[i] = grad_rows.stride(i);
    Tensor grad = torch::stable::new_empty(
        map_s, {map_s.size(0), problem.heads, problem.queries, problem.keys}, map_s.scalar_type());
    problem.grad = static_cast<char*>(grad.data_ptr());
    kdfast::use_large_pages(problem.grad, grad.numel() * int64_t(grad.element_size()));
    run(problem, map_s.size(0), int64_t(map_s.element_size()));
    return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
    m.impl("attention_map_kl_forward_cpp", TORCH_BOX(&forward));
    m.impl("attention_map_kl_backward_cpp", TORCH_BOX(&backward));
}
