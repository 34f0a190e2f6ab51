// The divergence of rows of scores, and its gradient. With m the maximum of a row's scores s,
// e = exp(s - m) and l = sum_j e, so that p = e / l, and with h = (p_s - p_t) / (p_s + p_t):
//
//     forward   sum_j p_t [(s_t - m_t) - (s_s - m_s)] + log(l_s / l_t)
//     reverse   sum_j p_s [(s_s - m_s) - (s_t - m_t)] + log(l_t / l_s)
//     js        sum_j (p_s log(1 + h) + p_t log(1 - h)) / 2
//
//     forward   dS = p_s - p_t
//     reverse   dS = p_s (log(p_s / p_t) - KL(s || t))
//     js        dS = p_s (log(1 + h) - KL(s || m)) / 2
//
// Everything is exactly zero for equal maps, whichever way the compiler contracts it: p_s - p_t,
// say, is ((l_t / l_s) e_s - e_t) / l_t.

#pragma once

#include "types.h"
#include "vector.h"

namespace KDFAST_ISA {

using namespace kdfast;

// One row a lane, the entries of each one below the other; or, ACROSS, one row over all lanes,
// whose numbers stand here in every lane.
template <class Real>
struct Rows {
    Vec<Real> max_s, max_t, sum_s, sum_t, value, inner;
};

constexpr int CHUNK = 64;  // entries summed before they join the total: shorter sums round less

template <class Real>
static inline Vec<Real> zero_where(Ints<Real> condition, Vec<Real> x) {
    return with_bits<Real>((Ints<Real>)x & ~condition);
}

template <class Real, bool ACROSS>
static inline Vec<Real> total(Vec<Real> x) {
    return ACROSS ? splat<Real>(sum<Real>(x)) : x;
}

// Below this the sums above cancel to their last digits. Written as
//
//     KL(t || s) = sum_j (p_s - p_t - p_t log(p_s / p_t))
//
// the terms are positive, of second order, and p_s may be off by a factor near 1.
template <class Real>
constexpr Real CLOSE = Real(1) / 16;

template <class Real, bool ACROSS>
static NOINLINE Vec<Real> close_forward(const Real* e_s, const Real* e_t, int64_t n, int64_t step,
                                        const Rows<Real>& rows) {
    const Vec<Real> align = rows.sum_t / rows.sum_s, most = splat<Real>(Real(1e30));
    Vec<Real> sum = {};
    for (int64_t j = 0; j < n; j++) {
        const Vec<Real> s = load<Real>(e_s + j * step), t = load<Real>(e_t + j * step);
        const Vec<Real> difference = s * align - t, ratio = s * align / t;
        const Vec<Real> log_ratio = logarithm<Real>(ratio > most ? most : ratio, difference / t);
        sum += difference - t * zero_where<Real>(t == Real(0), log_ratio);
    }
    return total<Real, ACROSS>(sum) / rows.sum_t;
}

// `ratio` is (s_s - m_s) - (s_t - m_t), `shift` log(l_t / l_s).
template <class Real, bool ACROSS>
static NOINLINE Vec<Real> close_reverse(const Real* e_s, const Real* ratio, int64_t n, int64_t step,
                                        Vec<Real> sum_s, Vec<Real> shift) {
    const Vec<Real> most = splat<Real>(-Types<Real>::LEAST_EXP);
    Vec<Real> sum = {};
    for (int64_t j = 0; j < n; j++) {
        const Vec<Real> s = load<Real>(e_s + j * step);
        const Vec<Real> x = -(load<Real>(ratio + j * step) + shift);  // log p_t - log p_s
        // e^x - 1 - x = x^2 / 2 (1 + x / 3 (1 + x / 4 (1 + ...)))
        Vec<Real> series = splat<Real>(1);
#pragma GCC unroll 16
        for (int i = sizeof(Real) == 8 ? 15 : 9; i >= 3; i--) {
            series = series * x * (Real(1) / i) + Real(1);
        }
        Vec<Real> terms = x * x / Real(2) * series;
        const Ints<Real> near = (x < Real(0.5)) & (x > Real(-0.5));
        if (any<Real>(~near)) {
            Ints<Real> none;
            const Vec<Real> far = exponential<Real>(x > most ? most : x, none) - Real(1) - x;
            terms = near ? terms : far;
        }
        sum += s * zero_where<Real>(s == Real(0), terms);
    }
    return total<Real, ACROSS>(sum) / sum_s;
}

// From n vectors of scores, `step` apart, to the rows' divergence; rows.max_* are given. What
// `differential` needs replaces the scores:
//
//     forward   e_s            e_t
//     reverse   e_s            (s_s - m_s) - (s_t - m_t)
//     js        e_s            log(1 + h)
//
// `lanes` are those whose value matters.
template <class Real, int D, bool ACROSS>
static NOINLINE void divergence(Real* s, const Real* scores_t, Real* t, int64_t n, int64_t step,
                                Rows<Real>& rows, Ints<Real> lanes) {
    const Vec<Real> max_s = rows.max_s, max_t = rows.max_t;
    Vec<Real> sum_s = {}, sum_t = {}, sum = {};
    Ints<Real> lost = {};  // where the teacher has something but e_s is zero
    for (int64_t start = 0; start < n; start += CHUNK) {
        Vec<Real> part_s = {}, part_t = {}, part = {};
        const int64_t stop = start + CHUNK < n ? start + CHUNK : n;
        for (int64_t at = start * step; at < stop * step; at += step) {
            const Vec<Real> x_s = load<Real>(s + at) - max_s;
            const Vec<Real> x_t = load<Real>(scores_t + at) - max_t;
            Ints<Real> none_s, none_t;
            const Vec<Real> e_s = exponential<Real>(x_s, none_s);
            const Vec<Real> e_t = exponential<Real>(x_t, none_t);
            lost |= none_s & ~none_t;
            part_s += e_s;
            part_t += e_t;
            store<Real>(s + at, e_s);
            if (D == REVERSE) {
                const Vec<Real> ratio = zero_where<Real>(none_s, x_s - x_t);
                part += e_s * ratio;
                store<Real>(t + at, ratio);
            } else {
                if (D == FORWARD) part += e_t * zero_where<Real>(none_t, x_t - x_s);
                store<Real>(t + at, e_t);
            }
        }
        sum_s += part_s;
        sum_t += part_t;
        sum += part;
    }
    sum_s = total<Real, ACROSS>(sum_s);
    sum_t = total<Real, ACROSS>(sum_t);
    sum = total<Real, ACROSS>(sum);
    rows.sum_s = sum_s;
    rows.sum_t = sum_t;
    if (D == JS) {
        const Vec<Real> align = sum_t / sum_s;
        Vec<Real> from_s = {}, from_t = {};
        for (int64_t at = 0; at < n * step; at += step) {
            const Vec<Real> e_s = load<Real>(s + at), e_t = load<Real>(t + at);
            const Vec<Real> both = e_s * align + e_t, h = (e_s * align - e_t) / both;
            Vec<Real> log_s = logarithm<Real>(e_s * align * Real(2) / both, h);
            const Vec<Real> log_t = logarithm<Real>(e_t * Real(2) / both, -h);
            log_s = zero_where<Real>(e_s == Real(0), log_s);
            from_s += e_s * log_s;
            from_t += e_t * zero_where<Real>(e_t == Real(0), log_t);
            store<Real>(t + at, log_s);
        }
        rows.inner = total<Real, ACROSS>(from_s) / sum_s;
        rows.value = (rows.inner + total<Real, ACROSS>(from_t) / sum_t) / Real(2);
        return;
    }
    rows.inner = Vec<Real>{};
    Vec<Real> shift = {};
    if (D == FORWARD) {
        rows.value = sum / sum_t + logarithm<Real>(sum_s / sum_t, (sum_s - sum_t) / sum_t);
    } else {
        shift = logarithm<Real>(sum_t / sum_s, (sum_t - sum_s) / sum_s);
        rows.value = sum / sum_s + shift;
    }
    if (ACROSS && any<Real>(lost)) return;
    const Ints<Real> close = (rows.value < CLOSE<Real>)&lanes & ~lost;
    if (!any<Real>(close)) return;
    const Vec<Real> better = D == FORWARD ? close_forward<Real, ACROSS>(s, t, n, step, rows)
                                          : close_reverse<Real, ACROSS>(s, t, n, step, sum_s,
                                                                        shift);
    rows.value = close ? better : rows.value;
}

// s becomes dS times the rows' upstream gradient, for n vectors.
template <class Real, int D>
static NOINLINE void differential(Real* s, const Real* t, int64_t n, int64_t step,
                                  const Rows<Real>& rows, Vec<Real> upstream) {
    const Vec<Real> sum_s = rows.sum_s, sum_t = rows.sum_t;
    Vec<Real> shift, factor;
    if (D == FORWARD) {
        shift = sum_t / sum_s;
        factor = upstream / sum_t;
    } else if (D == REVERSE) {
        shift = logarithm<Real>(sum_t / sum_s, (sum_t - sum_s) / sum_s) - rows.value;
        factor = upstream / sum_s;
    } else {
        shift = -rows.inner;
        factor = upstream / (sum_s * Real(2));
    }
    for (int64_t at = 0; at < n * step; at += step) {
        const Vec<Real> e_s = load<Real>(s + at), other = load<Real>(t + at);
        Vec<Real> d;
        if (D == FORWARD) {
            d = (e_s * shift - other) * factor;
        } else {
            d = zero_where<Real>(e_s == Real(0), e_s * (other + shift) * factor);
        }
        store<Real>(s + at, d);
    }
}

template <class Real, bool ACROSS>
static void divergence(Direction direction, Real* s, const Real* scores_t, Real* t, int64_t n,
                       int64_t step, Rows<Real>& rows, Ints<Real> lanes) {
    if (direction == FORWARD) {
        divergence<Real, FORWARD, ACROSS>(s, scores_t, t, n, step, rows, lanes);
    } else if (direction == REVERSE) {
        divergence<Real, REVERSE, ACROSS>(s, scores_t, t, n, step, rows, lanes);
    } else {
        divergence<Real, JS, ACROSS>(s, scores_t, t, n, step, rows, lanes);
    }
}

template <class Real>
static void differential(Direction direction, Real* s, const Real* t, int64_t n, int64_t step,
                         const Rows<Real>& rows, Vec<Real> upstream) {
    if (direction == FORWARD) differential<Real, FORWARD>(s, t, n, step, rows, upstream);
    if (direction == REVERSE) differential<Real, REVERSE>(s, t, n, step, rows, upstream);
    if (direction == JS) differential<Real, JS>(s, t, n, step, rows, upstream);
}

}  // namespace KDFAST_ISA
