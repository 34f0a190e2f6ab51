// Entry points of attention_kl: arguments, outputs, and the shares that threads take. The
// arithmetic is in attention_kl.isa.cpp, the contract in kdfast/ops/attention_kl.py.

#include "attention_kl.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "entry.h"

namespace {

using namespace attention_kl;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Mask = std::optional<Tensor>;

struct Masks {
    const Mask &attention, &query, &cu_seqlens;
    bool causal;
    std::optional<int64_t> window;
};

// The rows that take part and the keys they see, per batch element.
class Visibility {
  public:
    std::vector<Visible> visible;  // [batch]
    int64_t rows = 0;              // of the whole batch

    Visibility(int64_t batch, int64_t queries, int64_t keys, const Masks& masks) {
        const bool alike = !masks.attention && !masks.query;  // one description serves all
        const int64_t different = alike ? std::min<int64_t>(batch, 1) : batch;
        data_.resize(different * (3 * queries + keys));
        visible.resize(batch);
        const std::vector<int64_t> ends = boundaries(masks.cu_seqlens);
        for (int64_t b = 0; b < batch; b++) {
            visible[b] = b < different ? of(b, queries, keys, masks, ends) : visible[0];
            rows += visible[b].rows;
        }
    }

  private:
    std::vector<int32_t> data_;

    static std::vector<int64_t> boundaries(const Mask& cu_seqlens) {
        std::vector<int64_t> ends;
        if (!cu_seqlens) return ends;
        const int64_t step = cu_seqlens->stride(0);
        const bool wide = cu_seqlens->element_size() == 8;
        for (int64_t i = 0; i < cu_seqlens->size(0); i++) {
            ends.push_back(wide ? static_cast<const int64_t*>(cu_seqlens->data_ptr())[i * step]
                                : static_cast<const int32_t*>(cu_seqlens->data_ptr())[i * step]);
        }
        return ends;
    }

    Visible of(int64_t b, int64_t queries, int64_t keys, const Masks& masks,
               const std::vector<int64_t>& ends) {
        int32_t* row = data_.data() + b * (3 * queries + keys);
        int32_t *first = row + queries, *last = first + queries, *key = last + queries;
        const auto valid = [b](const Mask& mask, int64_t i) {
            if (!mask) return true;
            const bool* values = static_cast<const bool*>(mask->data_ptr());
            return values[b * mask->stride(0) + i * mask->stride(1)];
        };
        std::vector<int32_t> valid_before(keys + 1, 0);  // keys that are no padding
        for (int64_t j = 0; j < keys; j++) {
            valid_before[j + 1] = valid_before[j] + (valid(masks.attention, j) ? 1 : 0);
        }
        int32_t found = 0;
        std::vector<int32_t> change(keys + 1, 0);  // of the number of rows that see a key
        std::size_t sequence = 0;
        for (int64_t i = 0; i < queries; i++) {
            const int64_t position = i + keys - queries;
            int64_t begin = 0, end = keys;
            if (masks.causal) end = std::min(end, position + 1);
            if (masks.window) {
                const int64_t window = std::min(*masks.window, queries + keys);
                begin = std::max(begin, position - window);
                end = std::min(end, position + window + 1);
            }
            if (masks.cu_seqlens) {
                while (sequence + 1 < ends.size() && ends[sequence + 1] <= i) sequence++;
                if (sequence + 1 >= ends.size()) break;  // padding after the last boundary
                begin = std::max(begin, ends[sequence]);
                end = std::min(end, ends[sequence + 1]);
            }
            if (end <= begin || valid_before[begin] == valid_before[end]) continue;
            if (!valid(masks.query, i)) continue;
            row[found] = int32_t(i);
            first[found] = int32_t(begin);
            last[found] = int32_t(end);
            found++;
            change[begin]++;
            change[end]--;
        }
        std::vector<int32_t> seen_before(keys + 1, 0);
        int32_t kept = 0, rows_that_see = 0;
        for (int64_t j = 0; j < keys; j++) {
            seen_before[j] = kept;
            rows_that_see += change[j];
            const bool valid_key = valid_before[j] < valid_before[j + 1];
            if (rows_that_see > 0 && valid_key) key[kept++] = int32_t(j);
        }
        seen_before[keys] = kept;
        for (int32_t i = 0; i < found; i++) {
            first[i] = seen_before[first[i]];
            last[i] = seen_before[last[i]];
        }
        return {found, kept, row, first, last, key};
    }
};

Side side_of(const Tensor& query, const Tensor& key, double scale) {
    Side side{};
    side.query = static_cast<const char*>(query.data_ptr());
    side.key = static_cast<const char*>(key.data_ptr());
    side.storage = kdfast::storage_of(query);
    for (int i = 0; i < 3; i++) {
        side.query_stride[i] = query.stride(i);
        side.key_stride[i] = key.stride(i);
    }
    side.heads = query.size(1);
    side.key_heads = key.size(1);
    side.width = query.size(3);
    side.scale = scale;
    return side;
}

// A problem, and what its pointers point to.
struct Call {
    Visibility visibility;
    std::vector<Pair> pairs;
    Problem problem{};

    Call(const Tensors& query_s, const Tensors& key_s, const Tensors& query_t, const Tensors& key_t,
         const Masks& masks, const std::vector<double>& scale_s, const std::vector<double>& scale_t,
         bool mean_heads, const std::string& direction)
        : visibility(query_s[0].size(0), query_s[0].size(2), key_s[0].size(2), masks) {
        problem.direction = kdfast::direction_of(direction);
        problem.f64 = kdfast::storage_of(query_s[0]) == F64;
        problem.mean_heads = mean_heads;
        problem.batch = query_s[0].size(0);
        problem.queries = query_s[0].size(2);
        problem.keys = key_s[0].size(2);
        for (std::size_t i = 0; i < query_s.size(); i++) {
            Pair pair{};
            pair.s = side_of(query_s[i], key_s[i], scale_s[i]);
            pair.t = side_of(query_t[i], key_t[i], scale_t[i]);
            pair.first_head_s = problem.heads_s;
            pair.first_head_t = problem.heads_t;
            pair.factor = 1;
            problem.heads_s += pair.s.heads;
            problem.heads_t += pair.t.heads;
            pairs.push_back(pair);
        }
        problem.pairs = pairs.data();
        problem.visible = visibility.visible.data();
    }

    // Gradients of all pairs, one after the other in one flat tensor a side.
    std::tuple<Tensor, Tensor> new_gradients(const Tensor& like,
                                             torch::headeronly::ScalarType dtype) {
        int64_t elements[2] = {0, 0};
        for (const Pair& pair : pairs) {
            elements[0] += problem.batch * pair.s.heads * problem.queries * pair.s.width;
            elements[1] += problem.batch * pair.s.key_heads * problem.keys * pair.s.width;
        }
        Tensor grad_query = torch::stable::new_empty(like, {elements[0]}, dtype);
        Tensor grad_key = torch::stable::new_empty(like, {elements[1]}, dtype);
        problem.gradients = true;
        problem.gradient_storage = kdfast::storage_of(grad_query);
        const int64_t size = int64_t(grad_query.element_size());
        char* query = static_cast<char*>(grad_query.data_ptr());
        char* key = static_cast<char*>(grad_key.data_ptr());
        kdfast::use_large_pages(query, elements[0] * size);
        kdfast::use_large_pages(key, elements[1] * size);
        for (Pair& pair : pairs) {
            pair.grad_query = query;
            pair.grad_key = key;
            query += problem.batch * pair.s.heads * problem.queries * pair.s.width * size;
            key += problem.batch * pair.s.key_heads * problem.keys * pair.s.width * size;
        }
        return {grad_query, grad_key};
    }

    // Sum of the rows of each pair.
    std::vector<double> run() {
        const int64_t threads = int64_t(torch::stable::get_num_threads());
        int64_t groups = 0;
        for (const Pair& pair : pairs) {
            groups += problem.batch * (problem.mean_heads ? 1 : pair.s.key_heads);
        }
        // Heads are shared out whole where there are enough of them for every thread to get
        // several; otherwise their query tiles are, and gradients of the keys summed afterwards.
        const bool enough = threads == 1 || groups == 0 || groups >= 4 * threads;
        const int64_t parts = enough ? 1 : (4 * threads + groups - 1) / groups;
        std::vector<Item> items;
        std::vector<std::size_t> divided;  // the first share of each group that has several
        for (std::size_t p = 0; p < pairs.size(); p++) {
            const int64_t key_heads = problem.mean_heads ? 1 : pairs[p].s.key_heads;
            const int64_t group = problem.mean_heads ? 1 : pairs[p].s.heads / key_heads;
            for (int64_t b = 0; b < problem.batch; b++) {
                const int64_t most =
                    std::max<int64_t>(1, group * (visibility.visible[b].rows / 32));
                const int32_t shares = int32_t(std::min(parts, most));
                for (int64_t head = 0; head < key_heads; head++) {
                    if (shares > 1) divided.push_back(items.size());
                    for (int32_t part = 0; part < shares; part++) {
                        items.push_back(
                            {int32_t(p), int32_t(b), int32_t(head), part, shares, nullptr, 0});
                    }
                }
            }
        }
        std::vector<char> sums;
        if (problem.gradients && !divided.empty()) {
            std::vector<int64_t> offsets;
            int64_t total = 0;
            for (const Item& item : items) {
                offsets.push_back(total);
                if (item.parts > 1) total += KDFAST_CALL(attention_kl_grad_key, problem, item) + 64;
            }
            sums.resize(total + 64);
            for (std::size_t i = 0; i < items.size(); i++) {
                if (items[i].parts == 1) continue;
                const auto at = reinterpret_cast<uintptr_t>(sums.data() + offsets[i]);
                items[i].grad_key = reinterpret_cast<char*>((at + 63) & ~uintptr_t(63));
            }
        }
        const int64_t scratch = KDFAST_CALL(attention_kl_scratch, problem, int64_t(pairs.size()));
        kdfast::for_each_item(int64_t(items.size()), scratch, [&](int64_t i, char* memory) {
            const std::size_t next = std::size_t(i + threads);
            KDFAST_CALL(attention_kl_item, problem, items[i],
                        next < items.size() ? &items[next] : nullptr, memory);
        });
        if (problem.gradients) {
            kdfast::for_each_item(int64_t(divided.size()), 0, [&](int64_t i, char*) {
                KDFAST_CALL(attention_kl_finish, problem, &items[divided[i]]);
            });
        }
        std::vector<double> sum(pairs.size(), 0.0);
        for (const Item& item : items) sum[item.pair] += item.loss;
        return sum;
    }
};

template <class Real>
void fill(Tensor& x, double value) {
    Real* data = static_cast<Real*>(x.data_ptr());
    std::fill(data, data + x.numel(), Real(value));
}

void fill(Tensor& x, double value) {
    if (x.element_size() == 8) {
        fill<double>(x, value);
    } else {
        fill<float>(x, value);
    }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensors& query_s, const Tensors& key_s, const Tensors& query_t, const Tensors& key_t,
    const Mask& attention_mask, const Mask& query_mask, const Mask& cu_seqlens,
    const std::vector<double>& scale_s, const std::vector<double>& scale_t, bool causal,
    std::optional<int64_t> window, bool mean_heads, const std::string& direction) {
    Call call(query_s, key_s, query_t, key_t,
              {attention_mask, query_mask, cu_seqlens, causal, window}, scale_s, scale_t,
              mean_heads, direction);
    Problem& problem = call.problem;
    const auto dtype = kdfast::statistics_of(query_s[0]);
    const auto rows_of = [&](int64_t heads) {
        return torch::stable::new_empty(query_s[0], {problem.batch, heads, problem.queries}, dtype);
    };
    Tensor rows = rows_of(problem.heads_s), lse_s = rows_of(problem.heads_s);
    Tensor lse_t = rows_of(problem.heads_t);
    Tensor inner = problem.direction == JS ? rows_of(problem.heads_s)
                                           : torch::stable::new_empty(query_s[0], {0}, dtype);
    if (call.visibility.rows < problem.batch * problem.queries) {
        const double infinity = std::numeric_limits<double>::infinity();
        fill(rows, 0);
        fill(inner, 0);
        fill(lse_s, infinity);
        fill(lse_t, infinity);
    }
    problem.rows = static_cast<char*>(rows.data_ptr());
    problem.inner = static_cast<char*>(inner.data_ptr());
    problem.lse_s = static_cast<char*>(lse_s.data_ptr());
    problem.lse_t = static_cast<char*>(lse_t.data_ptr());
    call.run();
    return {rows, inner, lse_s, lse_t};
}

// The statistics of forward are made again rather than read: their log-sum-exp is rounded to the
// size of the scores, which the gradient of near-equal maps would feel.
std::tuple<Tensor, Tensor> backward(const Tensor& grad_rows, const Tensor&, const Tensor&,
                                    const Tensor&, const Tensor&, const Tensors& query_s,
                                    const Tensors& key_s, const Tensors& query_t,
                                    const Tensors& key_t, const Mask& attention_mask,
                                    const Mask& query_mask, const Mask& cu_seqlens,
                                    const std::vector<double>& scale_s,
                                    const std::vector<double>& scale_t, bool causal,
                                    std::optional<int64_t> window, bool mean_heads,
                                    const std::string& direction, bool tokens_first) {
    Call call(query_s, key_s, query_t, key_t,
              {attention_mask, query_mask, cu_seqlens, causal, window}, scale_s, scale_t,
              mean_heads, direction);
    Problem& problem = call.problem;
    problem.tokens_first = tokens_first;
    problem.grad_rows = static_cast<const char*>(grad_rows.data_ptr());
    for (int i = 0; i < 3; i++) problem.grad_rows_stride[i] = grad_rows.stride(i);
    auto gradients = call.new_gradients(query_s[0], query_s[0].scalar_type());
    call.run();
    return gradients;
}

std::tuple<Tensor, Tensor, Tensor> fused(const Tensors& query_s, const Tensors& key_s,
                                         const Tensors& query_t, const Tensors& key_t,
                                         const Mask& attention_mask, const Mask& query_mask,
                                         const Mask& cu_seqlens, const std::vector<double>& scale_s,
                                         const std::vector<double>& scale_t, bool causal,
                                         std::optional<int64_t> window, bool mean_heads,
                                         const std::string& direction, const std::string& reduction,
                                         bool tokens_first) {
    Call call(query_s, key_s, query_t, key_t,
              {attention_mask, query_mask, cu_seqlens, causal, window}, scale_s, scale_t,
              mean_heads, direction);
    call.problem.tokens_first = tokens_first;
    const auto dtype = kdfast::statistics_of(query_s[0]);
    auto [grad_query, grad_key] = call.new_gradients(query_s[0], dtype);
    if (reduction == "mean") {
        for (Pair& pair : call.pairs) {
            pair.factor = 1.0 / double(std::max<int64_t>(1, call.visibility.rows * pair.s.heads));
        }
    }
    const std::vector<double> sums = call.run();
    Tensor losses = torch::stable::new_empty(query_s[0], {int64_t(sums.size())}, dtype);
    for (std::size_t i = 0; i < sums.size(); i++) {
        const double loss = sums[i] * call.pairs[i].factor;
        if (losses.element_size() == 8) {
            static_cast<double*>(losses.data_ptr())[i] = loss;
        } else {
            static_cast<float*>(losses.data_ptr())[i] = float(loss);
        }
    }
    return {losses, grad_query, grad_key};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
    m.impl("attention_kl_forward_cpp", TORCH_BOX(&forward));
    m.impl("attention_kl_backward_cpp", TORCH_BOX(&backward));
    m.impl("attention_kl_fused_cpp", TORCH_BOX(&fused));
}
