// Entry points of layer_projection. The arithmetic is in layer_projection.isa.cpp, the contract in
// kdfast/ops/layer_projection.py.

#include "layer_projection.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "entry.h"

namespace {

using namespace layer_projection;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Mask = std::optional<Tensor>;

// Of one output: as much stays in no cache until it is read again, with its like of other layers.
constexpr int64_t CACHES = int64_t(4) << 20;

Layer layer_of(const Tensor& x) {
    return {static_cast<const char*>(x.data_ptr()), {x.stride(0), x.stride(1)},
            kdfast::storage_of(x)};
}

// A problem, and the tensors that are made for it.
struct Call {
    std::unique_ptr<Problem> owned = std::make_unique<Problem>();
    Problem& problem = *owned;
    const Tensor &like, &teacher;
    Tensors made;

    Call(Pass pass, const Tensors& layers_s, const Tensors& layers_t, const Mask& mask,
         double scale)
        : like(layers_s.at(0)), teacher(layers_t.at(0)) {
        problem.pass = pass;
        problem.scale = scale;
        problem.f64 = kdfast::storage_of(like) == F64;
        problem.storage_out[0] = kdfast::storage_of(like);
        problem.storage_out[1] = kdfast::storage_of(teacher);
        problem.many_s = int64_t(layers_s.size());
        problem.many_t = int64_t(layers_t.size());
        if (problem.many_s > MOST_LAYERS || problem.many_t > MOST_LAYERS)
            throw std::runtime_error("kdfast: layer_projection takes at most 64 layers a side");
        problem.tokens = like.size(0) * like.size(1);
        problem.inner = like.size(1);
        problem.width = like.size(2);
        int64_t i = 0;
        for (const Tensors* layers : {&layers_s, &layers_t})
            for (const Tensor& layer : *layers) problem.layers[i++] = layer_of(layer);
        if (mask) {
            problem.mask = static_cast<const bool*>(mask->data_ptr());
            for (int k = 0; k < 2; k++) problem.mask_stride[k] = mask->stride(k);
        }
    }

    void set_loss(const std::string& objective, bool losses, double temperature) {
        problem.objective = objective == "mse" ? MSE : objective == "cosine" ? COSINE : KL;
        problem.losses = losses;
        problem.temperature = temperature;
    }

    char* statistics(std::vector<int64_t> beyond) {
        std::vector<int64_t> shape = {like.size(0), like.size(1)};
        shape.insert(shape.end(), beyond.begin(), beyond.end());
        made.push_back(torch::stable::new_empty(like, shape, kdfast::statistics_of(like)));
        return static_cast<char*>(made.back().data_ptr());
    }

    void set_upstream(const Tensor& grad_rows) {
        problem.grad_rows = static_cast<const char*>(grad_rows.data_ptr());
        for (int k = 0; k < 3; k++) problem.grad_rows_stride[k] = grad_rows.stride(k);
    }

    // Tensors like the layers, for those of `which`.
    void make(const std::vector<int64_t>& which) {
        for (int64_t i : which) {
            const Tensor& of_side = i < problem.many_s ? like : teacher;
            made.push_back(
                torch::stable::new_empty(like, {like.size(0), like.size(1), like.size(2)},
                                         of_side.scalar_type()));
            problem.out[i] = static_cast<char*>(made.back().data_ptr());
            kdfast::use_large_pages(problem.out[i],
                                    made.back().numel() * int64_t(made.back().element_size()));
        }
    }

    void run() {
        const int64_t layers = problem.many_s + problem.many_t;
        const int64_t rows[2] = {problem.width * int64_t(like.element_size()),
                                 problem.width * int64_t(teacher.element_size())};
        const int64_t longest = std::max(rows[0], rows[1]);
        const int64_t most = (int64_t(2) << 20) / (layers * longest) + 1;  // 2 MB at a time
        const int64_t share = std::max<int64_t>(1, std::min(most, problem.tokens / 32) / 16) * 16;
        problem.stream = problem.tokens * longest > CACHES;
        const bool fresh = problem.tokens * longest > kdfast::MALLOC_KEEPS;
        kdfast::for_each_item(
            (problem.tokens + share - 1) / share, KDFAST_CALL(layer_projection_scratch, problem),
            [&](int64_t i, char* scratch) {
                const int64_t begin = i * share, end = std::min(begin + share, problem.tokens);
                for (int64_t j = 0; fresh && j < layers; j++) {
                    const int64_t row = rows[j >= problem.many_s];
                    if (problem.out[j] != nullptr)
                        kdfast::touch_pages(problem.out[j] + begin * row, (end - begin) * row);
                }
                KDFAST_CALL(layer_projection_tokens, problem, begin, end, scratch);
            });
    }
};

std::vector<int64_t> first(size_t many) {
    std::vector<int64_t> which(many);
    for (size_t i = 0; i < many; i++) which[i] = int64_t(i);
    return which;
}

Tensors project(const Tensors& layers_s, const Tensors& layers_t, const Mask& mask, double scale) {
    Call call(PROJECT, layers_s, layers_t, mask, scale);
    call.make(first(layers_s.size()));
    call.problem.weights = call.statistics({call.problem.many_s, call.problem.many_t});
    call.run();
    return call.made;
}

Tensors project_backward(const Tensors& grad_projected, const Tensor& grad_weights,
                         const Tensor& weights, const Tensors& layers_s, const Tensors& layers_t,
                         const Mask& mask, double scale, std::vector<int64_t> wanted) {
    Call call(PROJECT_BACKWARD, layers_s, layers_t, mask, scale);
    for (size_t i = 0; i < grad_projected.size(); i++)
        call.problem.grad_projected[i] = layer_of(grad_projected[i]);
    const Tensor dense = torch::stable::contiguous(grad_weights);
    const Tensor known = torch::stable::contiguous(weights);
    call.problem.grad_weights = static_cast<const char*>(dense.data_ptr());
    call.problem.weights = static_cast<char*>(known.data_ptr());
    call.make(wanted);
    call.run();
    return call.made;
}

Tensor loss_forward(const Tensors& layers_s, const Tensors& layers_t, const Mask& mask,
                    const std::string& objective, bool losses, double scale, double temperature) {
    Call call(LOSS, layers_s, layers_t, mask, scale);
    call.set_loss(objective, losses, temperature);
    call.problem.rows = call.statistics({call.problem.many_s});
    call.run();
    return call.made[0];
}

template <bool ROWS>
Tensors loss_gradients(const Tensor& grad_rows, const Tensors& layers_s, const Tensors& layers_t,
                       const Mask& mask, const std::string& objective, bool losses, double scale,
                       double temperature, std::vector<int64_t> wanted) {
    Call call(LOSS_BACKWARD, layers_s, layers_t, mask, scale);
    call.set_loss(objective, losses, temperature);
    call.set_upstream(grad_rows);
    if (ROWS) call.problem.rows = call.statistics({call.problem.many_s});
    call.make(wanted);
    call.run();
    return call.made;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
    m.impl("layer_projection_forward_cpp", TORCH_BOX(&project));
    m.impl("layer_projection_backward_cpp", TORCH_BOX(&project_backward));
    m.impl("layer_projection_loss_forward_cpp", TORCH_BOX(&loss_forward));
    m.impl("layer_projection_loss_backward_cpp", TORCH_BOX(&loss_gradients<false>));
    m.impl("layer_projection_loss_fused_cpp", TORCH_BOX(&loss_gradients<true>));
}
