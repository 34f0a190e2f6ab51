// KL divergence between attention maps that exist, one row at a time: a row of each map is copied
// to a cache-resident line (padded to whole vectors with entries that are absent), and read there
// as often as needed.

#include "attention_map_kl.h"
#include "divergence.h"

namespace KDFAST_ISA {

using namespace attention_map_kl;

namespace {

// One row of both maps [n], n a whole number of vectors.
template <class Real>
struct Row {
    Real *s, *t;
    int64_t n;
    Real value, inner, lse_s, lse_t;
};

template <class Real>
static Real largest(const Real* x, int64_t n) {
    Vec<Real> most = splat<Real>(Real(-__builtin_inf()));
    for (int64_t j = 0; j < n; j += LANES<Real>) {
        const Vec<Real> y = load<Real>(x + j);
        most = y > most ? y : most;
    }
    Real result = most[0];
    for (int i = 1; i < LANES<Real>; i++) result = most[i] > result ? most[i] : result;
    return result;
}

// Of scores; with `gradient`, s becomes g dS.
template <class Real>
static void row_of_scores(Direction direction, Row<Real>& row, bool gradient, Real g) {
    Rows<Real> rows;
    rows.max_s = splat<Real>(largest<Real>(row.s, row.n));
    rows.max_t = splat<Real>(largest<Real>(row.t, row.n));
    const int64_t n = row.n / LANES<Real>;
    divergence<Real, true>(direction, row.s, row.t, row.t, n, LANES<Real>, rows, ~Ints<Real>{});
    row.value = rows.value[0];
    row.inner = rows.inner[0];
    row.lse_s = (rows.max_s + logarithm<Real>(rows.sum_s))[0];
    row.lse_t = (rows.max_t + logarithm<Real>(rows.sum_t))[0];
    if (gradient) {
        differential<Real>(direction, row.s, row.t, n, LANES<Real>, rows, splat<Real>(g));
    }
}

// log(p / q), where p is not zero: of the quotient, or apart where it is no normal number.
template <class Real>
static inline Vec<Real> log_ratio(Vec<Real> p, Vec<Real> q) {
    const Real least = Types<Real>::SMALLEST;
    const Vec<Real> ratio = p / q;
    const Ints<Real> normal = (ratio > least) & (ratio < 1 / least);
    if (any<Real>(~(normal | (p == Real(0))))) return logarithm<Real>(p) - logarithm<Real>(q);
    return logarithm_of_normal<Real>(ratio, ratio - Real(1), Ints<Real>{});
}

template <class Real, int D>
static void divergence_of_probabilities(Row<Real>& row) {
    Vec<Real> from_s = {}, from_t = {};
    for (int64_t j = 0; j < row.n; j += LANES<Real>) {
        const Vec<Real> p_s = load<Real>(row.s + j), p_t = load<Real>(row.t + j);
        const Ints<Real> zero_s = p_s == Real(0), zero_t = p_t == Real(0);
        if (D == JS) {
            const Vec<Real> both = p_s + p_t, h = (p_s - p_t) / both;  // half of it may be no number
            const Vec<Real> log_s = logarithm<Real>(p_s * Real(2) / both, h);
            const Vec<Real> log_t = logarithm<Real>(p_t * Real(2) / both, -h);
            from_s += zero_where<Real>(zero_s, p_s * log_s);
            from_t += zero_where<Real>(zero_t, p_t * log_t);
        } else {
            if (D == FORWARD) from_t += zero_where<Real>(zero_t, p_t * log_ratio<Real>(p_t, p_s));
            if (D == REVERSE) from_s += zero_where<Real>(zero_s, p_s * log_ratio<Real>(p_s, p_t));
        }
    }
    row.inner = sum<Real>(from_s);
    row.value = row.inner + sum<Real>(from_t);
    if (D == JS) row.value /= 2;
    row.lse_s = row.lse_t = 0;
}

// s becomes g d/dp_s.
template <class Real, int D>
static void differential_of_probabilities(Row<Real>& row, Real g) {
    for (int64_t j = 0; j < row.n; j += LANES<Real>) {
        const Vec<Real> p_s = load<Real>(row.s + j), p_t = load<Real>(row.t + j);
        const Ints<Real> zero_s = p_s == Real(0);
        Vec<Real> d;
        if (D == FORWARD) {
            d = zero_where<Real>(p_t == Real(0), p_t / p_s * -g);
        } else if (D == REVERSE) {
            d = zero_where<Real>(zero_s, (log_ratio<Real>(p_s, p_t) + Real(1)) * g);
        } else {
            const Vec<Real> both = p_s + p_t, h = (p_s - p_t) / both;
            d = zero_where<Real>(zero_s, logarithm<Real>(p_s * Real(2) / both, h) * (g / 2));
        }
        store<Real>(row.s + j, d);
    }
}

template <class Real, int D>
static void row_of_probabilities(Row<Real>& row, bool gradient, Real g) {
    if (gradient) {
        differential_of_probabilities<Real, D>(row, g);
    } else {
        divergence_of_probabilities<Real, D>(row);
    }
}

// Whether either map has anything on a valid key; the rest is made absent in both.
template <class Real>
static bool hide(Row<Real>& row, const bool* mask, int64_t step, int64_t keys, Real absent) {
    if (mask != nullptr) {
        for (int64_t j = 0; j < keys; j++) {
            row.s[j] = mask[j * step] ? row.s[j] : absent;
            row.t[j] = mask[j * step] ? row.t[j] : absent;
        }
    }
    Ints<Real> present = {};
    for (int64_t j = 0; j < row.n; j += LANES<Real>) {
        present |= (load<Real>(row.s + j) != absent) | (load<Real>(row.t + j) != absent);
    }
    return any<Real>(present);
}

template <class Real>
static void rows(const Problem& problem, int64_t begin, int64_t end, char* scratch) {
    const Storage storage = problem.storage;
    const Real infinity = Real(__builtin_inf());
    const Real absent = problem.scores ? -infinity : Real(0);
    Row<Real> row{};
    row.n = round_up(problem.keys, LANES<Real>);
    row.s = reinterpret_cast<Real*>(scratch);
    row.t = row.s + row.n;
    const bool gradient = problem.grad != nullptr;
    for (int64_t index = begin; index < end; index++) {
        const int64_t i = index % problem.queries, head = index / problem.queries % problem.heads;
        const int64_t batch = index / problem.queries / problem.heads;
        const auto at = [&](const int64_t* by) { return batch * by[0] + head * by[1] + i * by[2]; };
        const bool* mask = problem.mask ? problem.mask + batch * problem.mask_stride[0] : nullptr;
        const int64_t step = problem.mask_stride[1];
        bool takes_part = mask == nullptr || problem.queries != problem.keys || mask[i * step];
        if (takes_part) {
            const int64_t from_s = at(problem.stride_s), from_t = at(problem.stride_t);
            read<Real>(storage, problem.map_s + from_s * size_of(storage), problem.keys, Real(1),
                       row.s);
            read<Real>(storage, problem.map_t + from_t * size_of(storage), problem.keys, Real(1),
                       row.t);
            for (int64_t j = problem.keys; j < row.n; j++) row.s[j] = row.t[j] = absent;
            takes_part = hide<Real>(row, mask, step, problem.keys, absent);
        }
        char* grad = problem.grad + index * problem.keys * size_of(storage);
        if (takes_part) {
            const Real g =
                gradient
                    ? reinterpret_cast<const Real*>(problem.grad_rows)[at(problem.grad_rows_stride)]
                    : Real(0);
            const Direction direction = problem.direction;
            if (problem.scores) {
                row_of_scores<Real>(direction, row, gradient, g);
            } else if (direction == FORWARD) {
                row_of_probabilities<Real, FORWARD>(row, gradient, g);
            } else if (direction == REVERSE) {
                row_of_probabilities<Real, REVERSE>(row, gradient, g);
            } else {
                row_of_probabilities<Real, JS>(row, gradient, g);
            }
            if (gradient) write<Real>(storage, row.s, problem.keys, Real(1), grad);
        } else {
            row.value = row.inner = 0;
            row.lse_s = row.lse_t = infinity;
            if (gradient) memset(grad, 0, problem.keys * size_of(storage));
        }
        if (gradient) continue;
        reinterpret_cast<Real*>(problem.rows)[index] = row.value;
        reinterpret_cast<Real*>(problem.lse_s)[index] = row.lse_s;
        reinterpret_cast<Real*>(problem.lse_t)[index] = row.lse_t;
        if (problem.direction == JS) reinterpret_cast<Real*>(problem.inner)[index] = row.inner;
    }
}

}  // namespace

int64_t attention_map_kl_scratch(const Problem& problem) {
    return problem.storage == F64 ? 2 * 8 * round_up(problem.keys, LANES<double>)
                                  : 2 * 4 * round_up(problem.keys, LANES<float>);
}

void attention_map_kl_rows(const Problem& problem, int64_t begin, int64_t end, char* scratch) {
    if (problem.storage == F64) {
        rows<double>(problem, begin, end, scratch);
    } else {
        rows<float>(problem, begin, end, scratch);
    }
}

}  // namespace KDFAST_ISA
