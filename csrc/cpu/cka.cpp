// Entry points of cka. The arithmetic is in cka.isa.cpp, the contract in kdfast/ops/cka.py.

#include "cka.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "entry.h"

namespace {

using namespace cka;
using kdfast::for_each_item;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

enum Side { GRAM, FEATURE, TILES };

Side side_of(const std::string& name) {
    if (name == "gram") return GRAM;
    if (name == "feature") return FEATURE;
    if (name == "tiles") return TILES;
    throw std::runtime_error("kdfast: side is '" + name + "', should be gram, feature or tiles");
}

int64_t up(int64_t n, int64_t by) {
    return (n + by - 1) / by;
}

// A problem, the memory behind it, and its steps.
struct Call {
    Problem problem{};
    Side side;
    std::vector<Layer> layers;
    std::vector<Pair> pairs;
    std::vector<Rows> rows;
    std::vector<int32_t> valid;
    std::vector<double> total, coefficient;
    std::vector<int64_t> busy;  // problems with enough valid rows
    Tensor like;
    torch::headeronly::ScalarType dtype;
    int64_t size, made;  // bytes of a Real; layers whose features are read
    int64_t threads = int64_t(torch::stable::get_num_threads());
    std::vector<Tensor> owned;

    Call(const Tensors& features, const std::optional<Tensor>& grams,
         const std::optional<Tensor>& mask, const std::vector<int64_t>& indices,
         const std::vector<double>& bandwidths, const std::string& side_name, bool unbiased)
        : side(side_of(side_name)), like(features.at(0)),
          dtype(kdfast::statistics_of(features[0])) {
        size = dtype == torch::headeronly::ScalarType::Double ? 8 : 4;
        problem.f64 = size == 8;
        problem.rbf = !bandwidths.empty();
        problem.unbiased = unbiased;
        problem.problems = like.size(0);
        problem.n = like.size(1);
        problem.layers = int64_t(features.size());
        problem.pairs = int64_t(indices.size() / 2);
        made = problem.layers - (grams ? grams->size(0) : 0);
        for (int64_t l = 0; l < problem.layers; l++) {
            const Tensor& x = features[l];
            Layer layer{};
            layer.x = static_cast<const char*>(x.data_ptr());
            layer.storage = kdfast::storage_of(x);
            layer.width = x.size(2);
            layer.stride[0] = x.stride(0);
            layer.stride[1] = x.stride(1);
            if (problem.rbf) layer.sigma = bandwidths.at(l);
            if (l >= made) {
                if (grams->scalar_type() != dtype || !grams->is_contiguous() ||
                    grams->numel() != grams->size(0) * problem.problems * problem.n * problem.n) {
                    throw std::runtime_error("kdfast: grams are of another call");
                }
                const int64_t matrix = problem.problems * problem.n * problem.n;
                layer.gram = static_cast<char*>(grams->data_ptr()) + (l - made) * matrix * size;
            }
            layers.push_back(layer);
        }
        for (int64_t k = 0; k < problem.pairs; k++) {
            pairs.push_back({int32_t(indices[2 * k]), int32_t(indices[2 * k + 1]), nullptr});
        }
        find_rows(mask);
        total.resize(problem.problems * problem.layers, 0.0);
        problem.layer = layers.data();
        problem.pair = pairs.data();
        problem.rows = rows.data();
        problem.total = total.data();
    }

    void find_rows(const std::optional<Tensor>& mask) {
        const int64_t n = problem.n, least = problem.unbiased ? 4 : 2;
        valid.resize(mask ? problem.problems * n : n);
        rows.resize(problem.problems);
        if (!mask) std::iota(valid.begin(), valid.end(), 0);
        for (int64_t p = 0; p < problem.problems; p++) {
            int32_t* index = valid.data() + (mask ? p * n : 0);
            int64_t count = mask ? 0 : n;
            for (int64_t r = 0; mask && r < n; r++) {
                const bool* row = static_cast<const bool*>(mask->data_ptr());
                if (row[p * mask->stride(0) + r * mask->stride(1)]) index[count++] = int32_t(r);
            }
            rows[p] = {count, index};
            if (count >= least) busy.push_back(p);
        }
    }

    int64_t width(int64_t l) const { return layers[l].width; }

    Tensor make(int64_t elements) {
        return torch::stable::new_empty(like, {elements}, dtype);
    }

    // Memory of this call.
    char* work(int64_t elements) {
        owned.push_back(make(elements));
        return static_cast<char*>(owned.back().data_ptr());
    }

    int64_t means_size() const {
        int64_t all = 0;
        for (int64_t l = 0; l < made; l++) all += problem.problems * width(l);
        return all;
    }

    int64_t kept_size() const {
        if (side == GRAM) return made * problem.problems * problem.n * problem.n;
        if (side == TILES) return made * problem.problems * problem.n;
        int64_t all = 0;
        for (const Pair& pair : pairs) all += problem.problems * width(pair.i) * width(pair.j);
        return all;
    }

    // Where means, units and what is kept lie.
    void place(char* means, char* unit, char* kept) {
        const int64_t problems = problem.problems, n = problem.n;
        for (int64_t l = 0; l < made; l++) {
            layers[l].means = means;
            means += problems * width(l) * size;
            layers[l].unit = unit;
            unit += problems * size;
            if (side == GRAM) {
                layers[l].gram = kept;
                kept += problems * n * n * size;
            }
            if (side == TILES) {
                (problem.rbf ? layers[l].sums : layers[l].norms) = kept;
                kept += problems * n * size;
            }
        }
        for (Pair& pair : pairs) {
            if (side != FEATURE) break;
            pair.product = kept;
            kept += problems * width(pair.i) * width(pair.j) * size;
        }
    }

    double real(const void* of, int64_t at) const {
        return size == 8 ? static_cast<const double*>(of)[at] : static_cast<const float*>(of)[at];
    }
    void put(void* to, int64_t at, double value) const {
        if (size == 8) {
            static_cast<double*>(to)[at] = value;
        } else {
            static_cast<float*>(to)[at] = float(value);
        }
    }

    bool needs_norms() const {
        return side != GRAM && (problem.unbiased || (side == TILES && problem.rbf));
    }

    // Means, and the units of linear kernels.
    void find_means() {
        struct Item {
            int64_t layer, problem, begin;
            double squares;
        };
        std::vector<Item> items;
        constexpr int64_t COLUMNS = 512;
        for (int64_t l = 0; l < made; l++) {
            for (int64_t p : busy) {
                for (int64_t c = 0; c < width(l); c += COLUMNS) items.push_back({l, p, c, 0});
            }
        }
        each(items, ROWS_OF_COLUMNS, [&](Item& item, char* scratch) {
            item.squares =
                KDFAST_CALL(cka_means, problem, item.layer, item.problem, item.begin,
                            std::min(item.begin + COLUMNS, width(item.layer)), scratch);
        });
        if (problem.rbf) return;
        std::vector<double> units(problem.layers * problem.problems, 0.0);
        for (const Item& item : items) {
            units[item.layer * problem.problems + item.problem] += item.squares;
        }
        for (int64_t l = 0; l < made; l++) {
            for (int64_t p : busy) {
                const double unit = units[l * problem.problems + p];
                put(layers[l].unit, p, unit == 0 ? 1 : unit);
            }
        }
    }

    // Squared norms of rows, and the units of rbf kernels.
    void find_norms(bool units) {
        if (!needs_norms()) return;
        struct Item {
            int64_t layer, problem, begin;
        };
        std::vector<Item> items;
        constexpr int64_t ROWS = 256;
        for (int64_t l = 0; l < made; l++) {
            if (layers[l].norms == nullptr) layers[l].norms = work(problem.problems * problem.n);
            for (int64_t p : busy) {
                for (int64_t r = 0; r < rows[p].count; r += ROWS) items.push_back({l, p, r});
            }
        }
        each(items, ROWS_OF_COLUMNS, [&](const Item& item, char* scratch) {
            KDFAST_CALL(cka_norms, problem, item.layer, item.problem, item.begin,
                        std::min(item.begin + ROWS, rows[item.problem].count), scratch);
        });
        for (int64_t l = 0; l < made; l++) {
            for (int64_t p : busy) {
                double sum = 0;
                for (int64_t r = 0; r < rows[p].count; r++) {
                    sum += real(layers[l].norms, p * problem.n + r);
                }
                total[p * problem.layers + l] = sum;
                if (!problem.rbf || !units) continue;
                const double mean = 2 * sum / double(rows[p].count - 1);
                double variance = layers[l].sigma * layers[l].sigma;
                if (layers[l].sigma == 0) variance = mean == 0 ? 1 : mean;
                double unit = -std::expm1(-0.5 * mean / variance);
                if (problem.unbiased) unit *= std::max(std::exp(-0.25 * mean / variance), 1e-15);
                put(layers[l].unit, p, unit);
                if (real(layers[l].unit, p) == 0) put(layers[l].unit, p, 1);
            }
        }
    }

    template <class Item, class Function>
    void each(std::vector<Item>& items, Work work, const Function& function) {
        for_each_item(int64_t(items.size()), KDFAST_CALL(cka_scratch, problem, work),
                      [&](int64_t i, char* scratch) { function(items[i], scratch); });
    }

    // Columns of a share, and shares, of one of `many` pieces of work of a certain width: several
    // where there are too few pieces for all threads.
    std::pair<int64_t, int64_t> shared(int64_t many, int64_t width) const {
        const int64_t wanted = many >= 4 * threads || many == 0 ? 1 : up(4 * threads, many);
        const int64_t shares = std::min(wanted, std::max<int64_t>(1, width / 512));
        const int64_t columns = up(up(width, shares), 64) * 64;
        return {columns, up(width, columns)};
    }

    // What the thread that does the i-th part probably does next.
    Part after(const std::vector<Part>& parts, int64_t i) const {
        i += threads;
        return i < int64_t(parts.size()) ? parts[i] : Part{-1, 0, 0, 0, 0};
    }

    // The forward pass of each side: inner products [pairs][2] of each problem, as the estimator
    // asks and biased.

    void gram_inner(std::vector<double>& inner) {
        // Problems are divided by columns where there are too few for all threads.
        const int64_t bytes = KDFAST_CALL(cka_gram_bytes, problem);
        std::vector<Part> items;
        std::vector<char*> sums;
        for (int64_t l = 0; l < made; l++) {
            const auto [columns, shares] = shared(made * int64_t(busy.size()), width(l));
            for (int64_t p : busy) {
                char* sum = shares == 1 ? nullptr : work(shares * bytes / size);
                for (int64_t s = 0; s < shares; s++) {
                    items.push_back({l, p, s * columns, std::min((s + 1) * columns, width(l)), 0});
                    sums.push_back(sum == nullptr ? nullptr : sum + s * bytes);
                }
            }
        }
        const int64_t scratch_bytes = KDFAST_CALL(cka_scratch, problem, GRAM_PART);
        for_each_item(int64_t(items.size()), scratch_bytes + bytes, [&](int64_t i, char* scratch) {
            const Part& part = items[i];
            char* sum = sums[i] == nullptr ? scratch + scratch_bytes : sums[i];
            KDFAST_CALL(cka_gram_part, problem, part, after(items, i), sum, scratch);
            if (sums[i] == nullptr) {
                KDFAST_CALL(cka_gram_finish, problem, part.layer, part.problem, sum, 1);
            }
        });
        for_each_item(int64_t(items.size()), 0, [&](int64_t i, char*) {
            const Part& part = items[i];
            if (sums[i] == nullptr || part.begin > 0) return;
            KDFAST_CALL(cka_gram_finish, problem, part.layer, part.problem, sums[i],
                        up(width(part.layer), part.end));
        });

        gram_sums();
        struct Chunk {
            int64_t problem, begin, end;
            std::vector<double> inner;
        };
        std::vector<Chunk> chunks;
        const bool enough = int64_t(busy.size()) >= 4 * threads;
        for (int64_t p : busy) {
            const int64_t step = enough ? rows[p].count : 64;
            for (int64_t r = 0; r < rows[p].count; r += step) {
                chunks.push_back({p, r, std::min(r + step, rows[p].count),
                                  std::vector<double>(2 * problem.pairs)});
            }
        }
        each(chunks, GRAM_INNER, [&](Chunk& chunk, char* scratch) {
            KDFAST_CALL(cka_gram_inner, problem, chunk.problem, chunk.begin, chunk.end,
                        chunk.inner.data(), scratch);
        });
        for (const Chunk& chunk : chunks) {
            double* to = inner.data() + chunk.problem * 2 * problem.pairs;
            for (int64_t k = 0; k < 2 * problem.pairs; k++) to[k] += chunk.inner[k];
        }
    }

    void gram_sums() {
        if (!problem.unbiased) return;
        struct Item {
            int64_t layer, problem;
        };
        std::vector<Item> items;
        for (int64_t l = 0; l < problem.layers; l++) {
            layers[l].sums = work(problem.problems * problem.n);
            for (int64_t p : busy) items.push_back({l, p});
        }
        for_each_item(int64_t(items.size()), 0, [&](int64_t i, char*) {
            KDFAST_CALL(cka_gram_sums, problem, items[i].layer, items[i].problem);
        });
    }

    // What |X_i^T X_j|^2 lacks of the unbiased inner product; see kdfast/reference/cka.py.
    double feature_correction(const Layer& i, const Layer& j, int64_t p, double total_i,
                              double total_j) const {
        const double n = double(rows[p].count);
        double sum = 0;
        for (int64_t r = 0; r < rows[p].count; r++) {
            sum += real(i.norms, p * problem.n + r) * real(j.norms, p * problem.n + r);
        }
        return -n / (n - 2) * sum + total_i * total_j / ((n - 1) * (n - 2));
    }

    void feature_inner(std::vector<double>& inner) {
        find_means();
        find_norms(true);
        // A problem is divided by rows where there are too few for all threads.
        const int64_t many = int64_t(busy.size());
        const int64_t parts = many >= 4 * threads || many == 0 ? 1
                              : up(many < threads ? threads : 2 * threads, many);
        struct Share {
            int64_t problem, begin, end;
            char* sums;
        };
        std::vector<Share> items;
        std::vector<std::pair<char*, int64_t>> sums(problem.problems);
        const int64_t bytes = KDFAST_CALL(cka_feature_bytes, problem);
        for (int64_t p : busy) {
            const int64_t step = up(up(rows[p].count, parts), 128) * 128;
            sums[p] = {work(up(rows[p].count, step) * bytes / size), up(rows[p].count, step)};
            for (int64_t r = 0; r < rows[p].count; r += step) {
                items.push_back({p, r, std::min(r + step, rows[p].count),
                                 sums[p].first + r / step * bytes});
            }
        }
        each(items, FEATURE_PART, [&](const Share& part, char* scratch) {
            KDFAST_CALL(cka_feature_part, problem, part.problem, part.begin, part.end, part.sums,
                        scratch);
        });
        for_each_item(many * problem.pairs, 0, [&](int64_t item, char*) {
            const int64_t p = busy[item / problem.pairs], k = item % problem.pairs;
            KDFAST_CALL(cka_feature_finish, problem, k, p, sums[p].first, sums[p].second);
            const Pair& pair = pairs[k];
            double* to = inner.data() + 2 * (p * problem.pairs + k);
            to[0] = to[1] = KDFAST_CALL(cka_feature_inner, problem, k, p);
            if (!problem.unbiased) return;
            const double* sums = total.data() + p * problem.layers;
            to[0] +=
                feature_correction(layers[pair.i], layers[pair.j], p, sums[pair.i], sums[pair.j]);
        });
    }

    void tile_inner(std::vector<double>& inner) {
        find_means();
        find_norms(true);
        struct Item {
            int64_t problem, i, j;
            std::vector<double> inner;
        };
        const int64_t tiles = up(problem.n, TILE), n = problem.n;
        std::vector<Item> items;
        for (int64_t p : busy) {
            const int64_t own = up(rows[p].count, TILE);
            for (int64_t i = 0; i < own; i++) {
                for (int64_t j = i; j < own; j++) {
                    items.push_back({p, i, j, std::vector<double>(problem.pairs)});
                }
            }
        }
        const int64_t slots = problem.rbf ? problem.layers * tiles * n : 0;
        char* row_sums = work(problem.problems * slots);
        each(items, TILE_INNER, [&](Item& item, char* scratch) {
            KDFAST_CALL(cka_tile, problem, item.problem, item.i, item.j, item.inner.data(),
                        row_sums + item.problem * slots * size, scratch);
        });
        for (const Item& item : items) {
            double* to = inner.data() + 2 * item.problem * problem.pairs;
            for (int64_t k = 0; k < problem.pairs; k++) to[2 * k] += item.inner[k];
        }
        // Sums of rows, in double: what centring takes away is of the size of what is left.
        for_each_item(int64_t(busy.size()), 0, [&](int64_t number, char*) {
            const int64_t p = busy[number], count = rows[p].count;
            std::vector<double> sums(problem.layers * count), all(problem.layers, 0.0);
            for (int64_t l = 0; l < problem.layers; l++) {
                for (int64_t a = 0; a < count; a++) {
                    double sum = 0;
                    if (problem.rbf) {
                        for (int64_t j = 0; j < up(count, TILE); j++) {
                            sum += real(row_sums, (p * problem.layers * tiles + l * tiles + j) * n + a);
                        }
                        put(layers[l].sums, p * n + a, sum);
                    } else if (problem.unbiased) {
                        sum = -real(layers[l].norms, p * n + a);
                    }
                    sums[l * count + a] = sum;
                    all[l] += sum;
                }
            }
            const double rows_less = double(problem.unbiased ? count - 2 : count);
            const double total_by = problem.unbiased ? double(count - 1) * rows_less
                                                     : double(count) * double(count);
            for (int64_t k = 0; k < problem.pairs; k++) {
                const auto [i, j, product] = pairs[k];
                double* to = inner.data() + 2 * (p * problem.pairs + k);
                double cross = 0;
                for (int64_t a = 0; a < count; a++) {
                    cross += sums[i * count + a] * sums[j * count + a];
                }
                to[1] = to[0];
                to[0] += -2 / rows_less * cross + all[i] * all[j] / total_by;
            }
        });
    }

    // A layer with itself: 0 where it vanishes up to the rounding of what it is a difference of.
    bool vanishes(const Pair& pair, int64_t p, const double* found) const {
        const double eps = size == 8 ? std::numeric_limits<double>::epsilon()
                                     : std::numeric_limits<float>::epsilon();
        return pair.i == pair.j && found[0] <= 2 * eps * double(rows[p].count) * found[1];
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensors& layers, const std::optional<Tensor>& grams, const std::optional<Tensor>& mask,
    const std::vector<int64_t>& pairs, const std::vector<double>& bandwidths,
    const std::string& side, bool unbiased, bool keep) {
    Call call(layers, grams, mask, pairs, bandwidths, side, unbiased);
    const Problem& problem = call.problem;
    const int64_t problems = problem.problems;
    Tensor inner = torch::stable::new_empty(call.like, {problem.pairs, problems}, call.dtype);
    Tensor unit = torch::stable::new_empty(call.like, {call.made, problems}, call.dtype);
    Tensor means = call.make(call.means_size()), kept = call.make(call.kept_size());
    const auto start = [](Tensor& x) { return static_cast<char*>(x.data_ptr()); };
    kdfast::use_large_pages(start(kept), kept.numel() * call.size);
    call.place(start(means), start(unit), start(kept));
    const bool partly = int64_t(call.busy.size()) < problems ||
                        (mask && call.side == TILES) || (call.side == TILES && !call.needs_norms());
    if (partly) {
        for (int64_t i = 0; i < call.made * problems; i++) call.put(unit.data_ptr(), i, 1);
        std::memset(start(means), 0, means.numel() * call.size);
        std::memset(start(kept), 0, kept.numel() * call.size);
    }
    std::vector<double> found(2 * problems * problem.pairs, 0.0);
    if (call.side == GRAM) call.gram_inner(found);
    if (call.side == FEATURE) call.feature_inner(found);
    if (call.side == TILES) call.tile_inner(found);
    for (int64_t p = 0; p < problems; p++) {
        for (int64_t k = 0; k < problem.pairs; k++) {
            const double* of = found.data() + 2 * (p * problem.pairs + k);
            call.put(inner.data_ptr(), k * problems + p,
                     call.vanishes(call.pairs[k], p, of) ? 0 : of[0]);
        }
    }
    if (!keep) means = call.make(0), kept = call.make(0);
    return {inner, unit, means, kept};
}

Tensors backward(const Tensor& grad_inner, const Tensor& unit, const Tensor& means,
                 const Tensor& kept, const Tensors& layers, const std::optional<Tensor>& grams,
                 const std::optional<Tensor>& mask, const std::vector<int64_t>& pairs,
                 const std::vector<double>& bandwidths, const std::string& side, bool unbiased,
                 const std::vector<int64_t>& wanted) {
    Call call(layers, grams, mask, pairs, bandwidths, side, unbiased);
    Problem& problem = call.problem;
    const int64_t problems = problem.problems, many = problem.layers, n = problem.n;
    const auto start = [](const Tensor& x) { return static_cast<char*>(x.data_ptr()); };
    call.place(start(means), start(unit), start(kept));
    call.coefficient.resize(problems * many * many, 0.0);
    problem.coefficient = call.coefficient.data();
    std::vector<char> related(many * many, 0);
    for (int64_t k = 0; k < problem.pairs; k++) {
        const auto [i, j, product] = call.pairs[k];
        related[i * many + j] = related[j * many + i] = 1;
        for (int64_t p = 0; p < problems; p++) {
            const double g = call.real(grad_inner.data_ptr(),
                                       k * grad_inner.stride(0) + p * grad_inner.stride(1));
            call.coefficient[(p * many + i) * many + j] += g;
            call.coefficient[(p * many + j) * many + i] += g;
        }
    }
    Tensors gradients;
    for (int64_t l : wanted) {
        gradients.push_back(torch::stable::new_empty(
            layers[l], {problems, n, call.width(l)}, layers[l].scalar_type()));
        Tensor& gradient = gradients.back();
        call.layers[l].grad = start(gradient);
        kdfast::use_large_pages(start(gradient),
                                gradient.numel() * int64_t(gradient.element_size()));
    }

    struct Item {
        int64_t layer, problem, begin, other;
    };
    std::vector<Item> items;
    const auto share = [&](int64_t step) {
        items.clear();
        for (int64_t p : call.busy) {
            for (int64_t l : wanted) {
                for (int64_t r = 0; r < call.rows[p].count; r += step) items.push_back({l, p, r, 0});
            }
        }
    };
    const auto end_of = [&](const Item& item, int64_t step) {
        return std::min(item.begin + step, call.rows[item.problem].count);
    };
    if (call.side == GRAM) {
        call.gram_sums();
        std::vector<Part> parts;
        int64_t many_parts = 0;
        for (int64_t p : call.busy) {
            many_parts += up(call.rows[p].count, GRAM_ROWS) * int64_t(wanted.size());
        }
        for (int64_t p : call.busy) {
            for (int64_t l : wanted) {
                const auto [columns, shares] = call.shared(many_parts, call.width(l));
                for (int64_t r = 0; r < call.rows[p].count; r += GRAM_ROWS) {
                    for (int64_t s = 0; s < shares; s++) {
                        const int64_t end = std::min((s + 1) * columns, call.width(l));
                        parts.push_back({l, p, s * columns, end, r});
                    }
                }
            }
        }
        const int64_t bytes = KDFAST_CALL(cka_scratch, problem, GRAM_GRADIENT);
        for_each_item(int64_t(parts.size()), bytes, [&](int64_t i, char* scratch) {
            const Part& part = parts[i];
            const int64_t row = call.width(part.layer) * int64_t(layers[part.layer].element_size());
            if (part.begin == 0 && part.row == 0 && problems * n * row > kdfast::MALLOC_KEEPS) {
                kdfast::touch_pages(call.layers[part.layer].grad + part.problem * n * row, n * row);
            }
            KDFAST_CALL(cka_gram_gradient, problem, part, call.after(parts, i), scratch);
        });
    } else if (call.side == FEATURE) {
        call.find_norms(false);
        std::vector<char*> packed(problems * many * many, nullptr), shift(problems * many, nullptr);
        for (int64_t p : call.busy) {
            for (int64_t l : wanted) {
                if (unbiased) shift[p * many + l] = call.work(call.width(l));
                for (int64_t j = 0; j < many; j++) {
                    if (!related[l * many + j]) continue;
                    const int64_t bytes = KDFAST_CALL(cka_feature_packed_bytes, problem, l, j);
                    packed[(p * many + l) * many + j] = call.work(bytes / call.size);
                    items.push_back({l, p, 0, j});
                }
            }
        }
        call.each(items, ROWS_OF_COLUMNS, [&](const Item& item, char* scratch) {
            const int64_t at = item.problem * many + item.layer;
            KDFAST_CALL(cka_feature_pack, problem, item.layer, item.other, item.problem,
                        packed[at * many + item.other], scratch);
        });
        share(std::numeric_limits<int64_t>::max() / 2);
        if (unbiased) {
            call.each(items, ROWS_OF_COLUMNS, [&](const Item& item, char* scratch) {
                KDFAST_CALL(cka_feature_shift, problem, item.layer, item.problem,
                            shift[item.problem * many + item.layer], scratch);
            });
        }
        share(ROWS_A_SHARE);
        call.each(items, FEATURE_GRADIENT, [&](const Item& item, char* scratch) {
            const int64_t at = item.problem * many + item.layer;
            KDFAST_CALL(cka_feature_gradient, problem, item.layer, item.problem, item.begin,
                        end_of(item, ROWS_A_SHARE), packed.data() + at * many, shift[at], scratch);
        });
    } else {
        call.find_norms(false);
        for (int64_t p : call.busy) {
            for (int64_t i = 0; i < up(call.rows[p].count, TILE); i++) items.push_back({0, p, i, 0});
        }
        call.each(items, TILE_GRADIENT, [&](const Item& item, char* scratch) {
            KDFAST_CALL(cka_tile_gradient, problem, item.problem, item.begin, scratch);
        });
    }

    // Rows that are dropped.
    std::vector<char> busy(problems, 0);
    for (int64_t p : call.busy) busy[p] = 1;
    for (int64_t l : wanted) {
        const int64_t bytes = call.width(l) * int64_t(layers[l].element_size());
        for (int64_t p = 0; p < problems; p++) {
            const Rows& rows = call.rows[p];
            char* gradient = call.layers[l].grad + p * n * bytes;
            if (!busy[p]) {
                std::memset(gradient, 0, n * bytes);
                continue;
            }
            for (int64_t r = 0, next = 0; r < n && rows.count < n; r++) {
                if (next < rows.count && rows.index[next] == r) {
                    next++;
                } else {
                    std::memset(gradient + r * bytes, 0, bytes);
                }
            }
        }
    }
    return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
    m.impl("cka_forward_cpp", TORCH_BOX(&forward));
    m.impl("cka_backward_cpp", TORCH_BOX(&backward));
}
