// Attention of every student layer over all teacher layers, a group of tokens at a time.
//
// A group is one token, whose states lie across the lanes of vectors (ACROSS), or, for few
// features, a token a lane. Either way a state is a column of vectors, a number of a token a vector
// (the same in every lane, ACROSS), and all that is done to states are inner products, mixtures
//
//     out_r = f_r own_r + sum_s w_rs source_s
//     out_r = own_r - sum_s w_rs source_s
//     out_r = sum_s w_rs (own_r - source_s)
//
// and what the kl objective adds. Formulas of the gradients are in kdfast/ops/layer_projection.py.
// A group's states are read once from memory, and then as often as needed from the caches.

#include "divergence.h"
#include "layer_projection.h"

namespace KDFAST_ISA {

using namespace layer_projection;

namespace {

constexpr int64_t CHUNK_VECTORS = 30;  // of each state, that pass through the first cache together
constexpr int MOST = MOST_LAYERS;

// Up to four rows at a time, as even as can be: 6 = 3 + 3.
static inline int tile_of(int64_t rows, int64_t done, int most) {
    const int64_t left = rows - done, tiles = (left + most - 1) / most;
    return int((left + tiles - 1) / tiles);
}

// What is done with the numbers of two states. What is AHEAD, the states of the token that comes
// next, is brought to the caches meanwhile: the first half here, the second when states are mixed.
enum Pairing { INNER, INNER_AHEAD, SQUARES };

// out[r * stride + c] += sum_v a_r[v] b_c[v], lane by lane; of (a_r - b_c)^2 for SQUARES. The next
// state of b_c lies ahead[c] numbers further.
template <class Real, int R, int C, Pairing PAIRING>
static NOINLINE void products_tile(const Real* const* a, const Real* const* b,
                                   const int64_t* ahead, int64_t begin, int64_t end,
                                   Vec<Real>* out, int64_t stride) {
    Vec<Real> sum[R][C] = {};
    for (int64_t at = begin; at < end; at += LANES<Real>) {
        if (PAIRING == INNER_AHEAD) {
#pragma GCC unroll 16
            for (int c = 0; c < C; c++) __builtin_prefetch(b[c] + ahead[c] + at / 2);
        }
        Vec<Real> y[C];
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) {
            y[c] = load<Real>(b[c] + at);
            hold(y[c]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            Vec<Real> x = load<Real>(a[r] + at);
            hold(x);
#pragma GCC unroll 16
            for (int c = 0; c < C; c++) {
                if (PAIRING == SQUARES) {
                    const Vec<Real> difference = x - y[c];
                    sum[r][c] += difference * difference;
                } else {
                    sum[r][c] += x * y[c];
                }
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) out[r * stride + c] += sum[r][c];
    }
}

template <class Real, Pairing PAIRING, int R>
static void products_rows(const Real* const* a, const Real* const* b, int64_t many,
                          const int64_t* ahead, int64_t begin, int64_t end, Vec<Real>* out) {
    for (int64_t c = 0; c < many;) {
        const int width = tile_of(many, c, 3);
        const auto function = width == 3   ? products_tile<Real, R, 3, PAIRING>
                              : width == 2 ? products_tile<Real, R, 2, PAIRING>
                                           : products_tile<Real, R, 1, PAIRING>;
        function(a, b + c, ahead == nullptr ? ahead : ahead + c, begin, end, out + c, many);
        c += width;
    }
}

// out [many_a][many_b]
template <class Real, Pairing PAIRING>
static void products(const Real* const* a, int64_t many_a, const Real* const* b, int64_t many_b,
                     int64_t begin, int64_t end, Vec<Real>* out, const int64_t* ahead = nullptr) {
    for (int64_t r = 0; r < many_a;) {
        const int height = tile_of(many_a, r, 4);
        const auto function = height == 4   ? products_rows<Real, PAIRING, 4>
                              : height == 3 ? products_rows<Real, PAIRING, 3>
                              : height == 2 ? products_rows<Real, PAIRING, 2>
                                            : products_rows<Real, PAIRING, 1>;
        function(a + r, b, many_b, ahead, begin, end, out + r * many_b);
        r += height;
    }
}

// Mixtures of `many` sources; the weight of source s in output r is at r * by_out + s * by_source.
template <class Real>
struct Mixture {
    const Real* const* sources;
    int64_t many;
    const Vec<Real>* weights;
    int64_t by_out, by_source;
    const int64_t* ahead = nullptr;  // how much further the next states lie
    int64_t half = 0;
};

template <class Real>
struct Output {
    Real* out;
    const Real* own;  // null: nothing
    Vec<Real> factor;
    int64_t row;  // of the weights
};

// The second of the above for DIFFERENCE, the third for DIFFERENCES; else the first, past the
// caches for STREAM.
enum Kind { PLAIN, DIFFERENCE, DIFFERENCES, STREAM };

template <class Real, Kind KIND, int R, int V>
static inline void mix_vectors(const Mixture<Real>& m, const Output<Real>* outputs, int64_t at) {
    constexpr int lanes = LANES<Real>;
    Vec<Real> sum[R][V] = {};
    const Vec<Real>* weights[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) weights[r] = m.weights + outputs[r].row * m.by_out;
    for (int64_t s = 0, w = 0; s < m.many; s++, w += m.by_source) {
        const Real* source = m.sources[s] + at;
        if (KIND != STREAM && m.ahead != nullptr)
            __builtin_prefetch(m.sources[s] + m.ahead[s] + m.half + at / 2);
        Vec<Real> y[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            y[v] = load<Real>(source + v * lanes);
            hold(y[v]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            Vec<Real> factor = weights[r][w];
            hold(factor);
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) {
                if (KIND == DIFFERENCES) {
                    sum[r][v] += factor * (load<Real>(outputs[r].own + at + v * lanes) - y[v]);
                } else {
                    sum[r][v] += factor * y[v];
                }
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        const Output<Real>& o = outputs[r];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            Vec<Real> x = sum[r][v];
            if (KIND == DIFFERENCE) {
                x = load<Real>(o.own + at + v * lanes) - x;
            } else if (KIND != DIFFERENCES && o.own != nullptr) {
                x += o.factor * load<Real>(o.own + at + v * lanes);
            }
            if (KIND == STREAM) {
                stream<Real>(o.out + at + v * lanes, x);
            } else {
                store<Real>(o.out + at + v * lanes, x);
            }
        }
    }
}

template <class Real, Kind KIND, int R>
static NOINLINE void mix_rows(const Mixture<Real>& m, const Output<Real>* outputs, int64_t begin,
                              int64_t end) {
    // What streams past the caches leaves in whole lines.
    constexpr int lanes = LANES<Real>, width = KIND == STREAM ? 2 : 3;
    int64_t at = begin;
    for (; at + width * lanes <= end; at += width * lanes)
        mix_vectors<Real, KIND, R, width>(m, outputs, at);
    for (; at < end; at += lanes) mix_vectors<Real, KIND, R, 1>(m, outputs, at);
}

template <class Real, Kind KIND = PLAIN>
static void mix(const Mixture<Real>& m, const Output<Real>* outputs, int64_t count, int64_t begin,
                int64_t end) {
    for (int64_t r = 0; r < count;) {
        const int height = tile_of(count, r, 4);
        const auto function = height == 4   ? mix_rows<Real, KIND, 4>
                              : height == 3 ? mix_rows<Real, KIND, 3>
                              : height == 2 ? mix_rows<Real, KIND, 2>
                                            : mix_rows<Real, KIND, 1>;
        function(m, outputs + r, begin, end);
        r += height;
    }
}

template <class Real>
static NOINLINE Vec<Real> inner(const Real* a, const Real* b, int64_t begin, int64_t end) {
    constexpr int lanes = LANES<Real>;
    Vec<Real> sum[4] = {};
    int64_t at = begin;
    for (; at + 4 * lanes <= end; at += 4 * lanes) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            sum[i] += load<Real>(a + at + i * lanes) * load<Real>(b + at + i * lanes);
    }
    for (; at < end; at += lanes) sum[0] += load<Real>(a + at) * load<Real>(b + at);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Sums over the lanes of each of `count` vectors, which have room for a whole number of LANES.
template <class Real, bool ACROSS>
static NOINLINE void totals(Vec<Real>* x, int64_t count) {
    if constexpr (ACROSS) {
        constexpr int lanes = LANES<Real>;
        for (int64_t i = 0; i < count; i += lanes) {
            exchange_all<1, Real>(x + i);
            Vec<Real> sum = x[i];
#pragma GCC unroll 16
            for (int k = 1; k < lanes; k++) sum += x[i + k];
            Real each[lanes];
            store<Real>(each, sum);
#pragma GCC unroll 16
            for (int k = 0; k < lanes; k++) x[i + k] = splat<Real>(each[k]);
        }
    }
}

template <class Real>
static inline Vec<Real> root(Vec<Real> x) {
    Vec<Real> y;
    for (int i = 0; i < LANES<Real>; i++) {
        if constexpr (sizeof(Real) == 8) y[i] = __builtin_sqrt(x[i]);
        else y[i] = __builtin_sqrtf(x[i]);
    }
    return y;
}

template <class Real, bool ACROSS>
static Vec<Real> largest(const Real* x, int64_t end) {
    constexpr int lanes = LANES<Real>;
    Vec<Real> most = load<Real>(x);
    for (int64_t at = lanes; at < end; at += lanes) {
        const Vec<Real> y = load<Real>(x + at);
        most = y > most ? y : most;
    }
    if constexpr (!ACROSS) return most;
    Real result = most[0];
    for (int i = 1; i < lanes; i++) result = most[i] > result ? most[i] : result;
    return splat<Real>(result);
}

// Softmax of a row of numbers. They are multiplied by `scale` once: a product that is not rounded,
// less the largest one that is, may be above zero, and beyond all numbers when it is exponentiated.
template <class Real>
static NOINLINE void softmax(const Vec<Real>* scores, int64_t count, Real scale,
                             Vec<Real>* weights) {
    Vec<Real> most = scores[0] * scale;
    for (int64_t j = 0; j < count; j++) {
        const Vec<Real> x = scores[j] * scale;
        most = x > most ? x : most;
        weights[j] = x;
    }
    Vec<Real> sum = {};
    for (int64_t j = 0; j < count; j++) {
        Ints<Real> none;
        weights[j] = exponential<Real>(weights[j] - most, none);
        sum += weights[j];
    }
    for (int64_t j = 0; j < count; j++) weights[j] /= sum;
}

// Sums of exponentials, the logarithm of their quotient t / s, and the divergence.
template <class Real>
struct Logits {
    Vec<Real> sum_s, sum_t, shift, value;
};

// KL(p || q), p and q the softmax of s and t. Leaves exponentials e_s and e_t, and the ratio
// (s - max s) - (t - max t); absent entries are -inf in both.
template <class Real, bool ACROSS>
static NOINLINE void divergence_of_logits(Real* s, Real* t, Real* ratio, int64_t end,
                                          Logits<Real>& rows, Ints<Real> lanes) {
    constexpr int step = LANES<Real>;
    const Vec<Real> max_s = largest<Real, ACROSS>(s, end), max_t = largest<Real, ACROSS>(t, end);
    Vec<Real> sum_s = {}, sum_t = {}, sum = {};
    Ints<Real> lost = {};  // q has something where p is exactly zero
    for (int64_t start = 0; start < end; start += CHUNK * step) {
        Vec<Real> part_s = {}, part_t = {}, part = {};
        for (int64_t at = start; at < least(start + CHUNK * step, end); at += step) {
            const Vec<Real> x_s = load<Real>(s + at) - max_s;
            const Vec<Real> x_t = load<Real>(t + at) - max_t;
            Ints<Real> none_s, none_t;
            const Vec<Real> e_s = exponential<Real>(x_s, none_s);
            const Vec<Real> e_t = exponential<Real>(x_t, none_t);
            const Vec<Real> log_ratio = zero_where<Real>(none_s, x_s - x_t);
            lost |= none_s & ~none_t;
            part_s += e_s;
            part_t += e_t;
            part += e_s * log_ratio;
            store<Real>(s + at, e_s);
            store<Real>(t + at, e_t);
            store<Real>(ratio + at, log_ratio);
        }
        sum_s += part_s;
        sum_t += part_t;
        sum += part;
    }
    rows.sum_s = total<Real, ACROSS>(sum_s);
    rows.sum_t = total<Real, ACROSS>(sum_t);
    sum = total<Real, ACROSS>(sum);
    rows.shift = logarithm<Real>(rows.sum_t / rows.sum_s, (rows.sum_t - rows.sum_s) / rows.sum_s);
    rows.value = sum / rows.sum_s + rows.shift;
    if (ACROSS && any<Real>(lost)) return;
    const Ints<Real> close = (rows.value < CLOSE<Real>)&lanes & ~lost;
    if (!any<Real>(close)) return;
    const Vec<Real> better =
        close_reverse<Real, ACROSS>(s, ratio, end / step, step, rows.sum_s, rows.shift);
    rows.value = close ? better : rows.value;
}

// What one group of tokens is worked on in.
template <class Real, bool ACROSS>
struct Group {
    static constexpr int lanes = LANES<Real>;

    const Problem& problem;
    int64_t many_s, many_t, end;  // numbers of a column: vectors times lanes
    Ints<Real> valid;             // lanes that hold a token which takes part
    int64_t token, tokens;        // of this group

    // Groups of few features are read several at a time: layers that lie a multiple of 4096 bytes
    // apart would chase each other's lines, half read, from the caches.
    static constexpr int64_t MOST_GROUPS = ACROSS ? 1 : 16;
    int64_t groups;                            // that are read together
    int64_t first, group;                      // token of those; the one that is worked on
    bool whole;                                // every lane holds a token that takes part
    int64_t place_of[MOST_GROUPS * lanes][2];  // of their tokens, in [A, B]
    Ints<Real> valid_of[MOST_GROUPS];

    // States of all layers, upstream gradients of projected ones; outputs.
    const Real *states[2 * MOST] = {}, *upstream_states[MOST] = {};
    Real* columns;  // where states are copied to
    int64_t ahead[2 * MOST];  // from where a state lies to the next token's
    // Mixtures, or h - C; own parts of student gradients; outputs; what kl needs of one row.
    Real *mixed[MOST], *own[MOST], *output[4], *s, *t, *ratio;
    // For a mixture of losses of kl: q and p of all layers, and their logarithms.
    Real *normal[2 * MOST], *logarithms[2 * MOST];
    // [L_s][L_t]
    Vec<Real> *scores, *weights, *gradients, *values, *student;
    Vec<Real>* teacher;  // [2 L_s][L_t]
    // [L_s], [L_t]
    Vec<Real> *upstream, *rows, *norm_s, *norm_t, *sums, *factor;

    Group(const Problem& problem, char* scratch)
        : problem(problem), many_s(problem.many_s), many_t(problem.many_t),
          end(ACROSS ? round_up(problem.width, lanes) : problem.width * lanes),
          groups(least(MOST_GROUPS, most(1, 32 / problem.width))) {
        place(scratch);
    }

    // An odd number of lines: columns read side by side lie in different sets of the caches.
    int64_t column_bytes() const {
        return round_up(end * int64_t(sizeof(Real)) + 64, 128) + 64;
    }

    // Lays everything out; bytes.
    int64_t place(char* scratch) {
        char* next = scratch;
        const auto column = [&] {
            Real* x = reinterpret_cast<Real*>(next);
            next += column_bytes();
            return x;
        };
        const auto numbers = [&](int64_t count) {
            Vec<Real>* x = reinterpret_cast<Vec<Real>*>(next);
            next += round_up(count, lanes) * int64_t(sizeof(Vec<Real>));
            return x;
        };
        const int64_t pairs = many_s * many_t, most = many_s > many_t ? many_s : many_t;
        scores = numbers(pairs);
        weights = numbers(pairs);
        gradients = numbers(pairs);
        values = numbers(pairs);
        student = numbers(pairs);
        teacher = numbers(2 * pairs);
        for (Vec<Real>** x : {&upstream, &rows, &norm_s, &norm_t, &sums, &factor})
            *x = numbers(3 * most);
        for (int64_t i = 0; i < many_s; i++) mixed[i] = column();
        for (int64_t i = 0; i < 4; i++) output[i] = column();
        if (problem.objective == KL) {
            s = column();
            t = column();
            ratio = column();
            for (int64_t i = 0; i < many_s; i++) own[i] = column();
            for (int64_t l = 0; problem.losses && l < many_s + many_t; l++) {
                normal[l] = column();
                logarithms[l] = column();
            }
        }
        columns = reinterpret_cast<Real*>(next);
        if (copies()) {
            for (int64_t l = 0; l < (2 * many_s + many_t) * groups; l++) column();
        }
        return next - scratch;
    }

    static bool is_real(Storage storage) { return storage == F32 || storage == F64; }

    // Whether a layer's states are copied before they are read, or any layer's.
    bool copies(const Layer& layer) const {
        return !ACROSS || !is_real(layer.storage) || problem.width % lanes != 0;
    }
    bool copies() const {
        return copies(problem.layers[0]) || copies(problem.layers[many_s]);
    }

    // The columns of a layer, of all groups that are read together, one after the other.
    NOINLINE const Real* read_columns(const Layer& layer, Real* to) const {
        const int64_t size = size_of(layer.storage), width = problem.width;
        const auto from = [&](int64_t k) { return layer.start + at(layer.stride, k) * size; };
        if constexpr (ACROSS) {
            if (!copies(layer)) return reinterpret_cast<const Real*>(from(0));
            read<Real>(layer.storage, from(0), width, Real(1), to);
            for (int64_t c = width; c < end; c++) to[c] = 0;
            return to;
        }
        const bool same = is_real(layer.storage);
        const bool one_row = problem.tokens == problem.inner ||
                             layer.stride[0] == problem.inner * layer.stride[1];
        if (same && whole && one_row && layer.stride[1] == width) {
            const Real* x = reinterpret_cast<const Real*>(from(0));
            const char* next = reinterpret_cast<const char*>(x + groups * end);
            for (int64_t i = 0; i < groups * end * int64_t(sizeof(Real)); i += 64)
                __builtin_prefetch(next + i);
            if (width == 2) return apart<2>(x, to);
            if (width == 3) return apart<3>(x, to);
            if (width == 4) return apart<4>(x, to);
        }
        for (int64_t g = 0; g < groups; g++) {
            const Ints<Real> part = valid_of[g];
            for (int64_t k = 0; k < lanes; k++) {
                Real* column = to + g * end + k;
                if (!part[k]) {
                    for (int64_t c = 0; c < width; c++) column[c * lanes] = 0;
                } else if (same) {
                    const Real* x = reinterpret_cast<const Real*>(from(g * lanes + k));
                    for (int64_t c = 0; c < width; c++) column[c * lanes] = x[c];
                } else {
                    const char* x = from(g * lanes + k);
                    for (int64_t c = 0; c < width; c++)
                        read<Real>(layer.storage, x + c * size, 1, Real(1), column + c * lanes);
                }
            }
        }
        return to;
    }

    // Of groups that lie one behind the other, without a loop over features.
    template <int WIDTH>
    NOINLINE const Real* apart(const Real* x, Real* to) const {
        for (int64_t g = 0; g < groups; g++, x += WIDTH * lanes, to += WIDTH * lanes) {
#pragma GCC unroll 16
            for (int k = 0; k < lanes; k++) {
#pragma GCC unroll 16
                for (int c = 0; c < WIDTH; c++) to[c * lanes + k] = x[k * WIDTH + c];
            }
        }
        return to - groups * WIDTH * lanes;
    }
    template <int WIDTH>
    static NOINLINE void together(const Real* column, Real* x) {
#pragma GCC unroll 16
        for (int k = 0; k < lanes; k++) {
#pragma GCC unroll 16
            for (int c = 0; c < WIDTH; c++) x[k * WIDTH + c] = column[c * lanes + k];
        }
    }

    NOINLINE void write_column(const Real* column, Storage storage, char* out) const {
        const int64_t width = problem.width, size = size_of(storage);
        char* to = out + token * width * size;
        if constexpr (ACROSS) {
            write<Real>(storage, column, width, Real(1), to);
        } else if (is_real(storage)) {
            Real* numbers = reinterpret_cast<Real*>(to);
            if (tokens == lanes && width == 2) return together<2>(column, numbers);
            if (tokens == lanes && width == 3) return together<3>(column, numbers);
            if (tokens == lanes && width == 4) return together<4>(column, numbers);
            for (int64_t k = 0; k < tokens; k++)
                for (int64_t c = 0; c < width; c++) numbers[k * width + c] = column[c * lanes + k];
        } else {
            for (int64_t k = 0; k < tokens; k++) {
                for (int64_t c = 0; c < width; c++, to += size)
                    write<Real>(storage, column + c * lanes + k, 1, Real(1), to);
            }
        }
    }

    // Numbers of the tokens, `count` each in memory.
    NOINLINE void write_numbers(const Vec<Real>* x, int64_t count, char* out) const {
        Real* to = reinterpret_cast<Real*>(out) + token * count;
        for (int64_t k = 0; k < tokens; k++)
            for (int64_t i = 0; i < count; i++) to[k * count + i] = valid[k] ? x[i][k] : Real(0);
    }
    void read_numbers(const char* in, int64_t count, Vec<Real>* x) const {
        const Real* from = reinterpret_cast<const Real*>(in) + token * count;
        for (int64_t i = 0; i < count; i++) {
            if constexpr (ACROSS) {
                x[i] = splat<Real>(from[i]);
            } else {
                for (int64_t k = 0; k < lanes; k++)
                    x[i][k] = valid[k] ? from[k * count + i] : Real(0);
            }
        }
    }

    NOINLINE void clear(Vec<Real>* x, int64_t count) const {
        for (int64_t i = 0; i < round_up(count, lanes); i++) x[i] = Vec<Real>{};
    }

    // Where the k-th of the tokens that are read together lies in [A, B, ...] of these strides.
    int64_t at(const int64_t* stride, int64_t k) const {
        return place_of[k][0] * stride[0] + place_of[k][1] * stride[1];
    }

    // Tokens from `first` on, as many as the groups hold, up to `last`.
    NOINLINE void read_groups(int64_t from, int64_t last) {
        first = from;
        group = 0;
        const int64_t count = least(ACROSS ? 1 : groups * lanes, last - first);
        int64_t a = first / problem.inner, b = first % problem.inner;
        bool any_valid = false;
        whole = count == groups * lanes;
        for (int64_t g = 0; g < groups; g++) valid_of[g] = Ints<Real>{};
        for (int64_t k = 0; k < count; k++) {
            place_of[k][0] = a;
            place_of[k][1] = b++;
            if (b == problem.inner) a++, b = 0;
            if (problem.mask != nullptr && !problem.mask[at(problem.mask_stride, k)]) {
                whole = false;
                continue;
            }
            any_valid = true;
            if (ACROSS) valid_of[0] = ~Ints<Real>{};
            if (!ACROSS) valid_of[k / lanes][k % lanes] = -1;
        }
        if (any_valid) read_states();
    }

    // The next token of the same row of [A, B], or, at its end, none.
    void look_ahead() {
        const bool last = place_of[0][1] + 1 == problem.inner;
        for (int64_t l = 0; l < many_s + many_t; l++)
            ahead[l] = last ? 0 : problem.layers[l].stride[1];
    }

    void read_states() {
        Real* to = columns;
        if (ACROSS) look_ahead();
        const int64_t step = column_bytes() * groups / int64_t(sizeof(Real));
        const bool teacher_wanted = wants(many_s, many_t);
        for (int64_t l = 0; l < many_s + many_t; l++, to += step) {
            const bool unread = problem.pass == PROJECT_BACKWARD && !teacher_wanted && l < many_s;
            states[l] = unread ? nullptr : read_columns(problem.layers[l], to);
        }
        if (problem.pass != PROJECT_BACKWARD) return;
        for (int64_t i = 0; i < many_s; i++, to += step)
            upstream_states[i] = read_columns(problem.grad_projected[i], to);
    }

    // Goes to the next group; whether there is one.
    bool next(int64_t last) {
        if (group > 0) {
            for (int64_t l = 0; l < many_s + many_t; l++) {
                if (states[l] != nullptr) states[l] += end;
            }
            for (int64_t i = 0; problem.pass == PROJECT_BACKWARD && i < many_s; i++)
                upstream_states[i] += end;
        }
        token = first + group * lanes;
        if (group == groups || token >= last) return false;
        tokens = ACROSS ? 1 : least(lanes, last - token);
        valid = valid_of[group++];
        return true;
    }

    NOINLINE void read_upstream() {
        const Real* from = reinterpret_cast<const Real*>(problem.grad_rows);
        for (int64_t i = 0; i < many_s; i++) {
            upstream[i] = Vec<Real>{};
            for (int64_t k = 0; k < tokens; k++) {
                const Real x = from[at(problem.grad_rows_stride, token - first + k) +
                                    i * problem.grad_rows_stride[2]];
                if (ACROSS) upstream[i] = splat<Real>(x);
                if (!ACROSS) upstream[i][k] = valid[k] ? x : Real(0);
            }
        }
    }

    const Real* const* teachers() const { return states + many_s; }

    NOINLINE void find_weights() {
        const int64_t pairs = many_s * many_t;
        clear(scores, pairs);
        if (ACROSS && !copies(problem.layers[many_s])) {
            products<Real, INNER_AHEAD>(states, many_s, teachers(), many_t, 0, end, scores,
                                        ahead + many_s);
        } else {
            products<Real, INNER>(states, many_s, teachers(), many_t, 0, end, scores);
        }
        totals<Real, ACROSS>(scores, pairs);
        for (int64_t i = 0; i < many_s; i++)
            softmax<Real>(scores + i * many_t, many_t, Real(problem.scale), weights + i * many_t);
    }

    // dS_ij = scale alpha_ij (g_ij - sum_k alpha_ik g_ik), in the place of g = `gradients`. The
    // mean is taken off twice: weights do not add up to 1 to the last digit, and what is left of a large
    // one would be all that is seen.
    NOINLINE void differentiate_weights() {
        for (int64_t i = 0; i < many_s; i++) {
            Vec<Real>*g = gradients + i * many_t, *a = weights + i * many_t;
            Vec<Real> mean = {}, rest = {};
            for (int64_t j = 0; j < many_t; j++) mean += a[j] * g[j];
            for (int64_t j = 0; j < many_t; j++) {
                g[j] -= mean;
                rest += a[j] * g[j];
            }
            for (int64_t j = 0; j < many_t; j++) g[j] = a[j] * (g[j] - rest) * Real(problem.scale);
        }
    }

    Mixture<Real> of_teachers(const Vec<Real>* by) const {
        return {teachers(), many_t, by, many_t, 1};
    }

    // mixed = C, or h - C
    template <Kind KIND>
    void mix_states(int64_t from, int64_t to) {
        Output<Real> outputs[MOST];
        for (int64_t i = 0; i < many_s; i++)
            outputs[i] = {mixed[i], KIND == PLAIN ? nullptr : states[i], Vec<Real>{}, i};
        Mixture<Real> m = of_teachers(weights);
        if (ACROSS && !copies(problem.layers[many_s])) {
            m.ahead = ahead + many_s;
            m.half = end / 2;
        }
        if (ACROSS && !copies(problem.layers[0])) {
            for (int64_t i = 0; i < many_s; i++) {
                for (int64_t at = from; at < to; at += 64 / int64_t(sizeof(Real)))
                    __builtin_prefetch(states[i] + ahead[i] + at);
            }
        }
        mix<Real, KIND>(m, outputs, many_s, from, to);
    }

    // The wanted outputs from `first` on, of `count`, each f own + a mixture.
    template <class Own>
    void write_mixtures(const Mixture<Real>& m, int64_t first, int64_t count, const Own& own_of) {
        const Storage storage = problem.storage_out[first >= many_s];
        const bool direct = ACROSS && problem.width % lanes == 0 && is_real(storage);
        Output<Real> outputs[MOST];
        char* to[MOST];
        int64_t wanted = 0;
        for (int64_t i = 0; i < count; i++) {
            char* out = problem.out[first + i];
            if (out == nullptr) continue;
            const auto [own, f] = own_of(i);
            Real* memory = reinterpret_cast<Real*>(out) + token * problem.width;
            outputs[wanted] = {direct ? memory : nullptr, own, f, i};
            to[wanted++] = out;
        }
        bool aligned = problem.stream;
        for (int64_t r = 0; r < wanted; r++)
            aligned &= reinterpret_cast<uintptr_t>(outputs[r].out) % VECTOR_BYTES == 0;
        if (direct && aligned) return mix<Real, STREAM>(m, outputs, wanted, 0, end);
        if (direct) return mix<Real>(m, outputs, wanted, 0, end);
        for (int64_t r = 0; r < wanted; r += 4) {
            const int64_t now = least(4, wanted - r);
            for (int64_t k = 0; k < now; k++) outputs[r + k].out = output[k];
            mix<Real>(m, outputs + r, now, 0, end);
            for (int64_t k = 0; k < now; k++) write_column(output[k], storage, to[r + k]);
        }
    }

    bool wants(int64_t first, int64_t count) const {
        for (int64_t i = first; i < first + count; i++) {
            if (problem.out[i] != nullptr) return true;
        }
        return false;
    }

    using Own = std::pair<const Real*, Vec<Real>>;

    // The projection

    void project() {
        find_weights();
        write_numbers(weights, many_s * many_t, problem.weights);
        for (int64_t j = 0; j < many_s * many_t; j++) weights[j] = valid ? weights[j] : Vec<Real>{};
        write_mixtures(of_teachers(weights), 0, many_s,
                       [](int64_t) { return Own{nullptr, Vec<Real>{}}; });
    }

    void project_backward() {
        const int64_t pairs = many_s * many_t;
        read_numbers(problem.weights, pairs, weights);
        read_numbers(problem.grad_weights, pairs, values);
        clear(gradients, pairs);
        products<Real, INNER>(upstream_states, many_s, teachers(), many_t, 0, end, gradients);
        totals<Real, ACROSS>(gradients, pairs);
        for (int64_t j = 0; j < pairs; j++) gradients[j] += values[j];
        differentiate_weights();
        const auto nothing = [](int64_t) { return Own{nullptr, Vec<Real>{}}; };
        if (wants(0, many_s)) write_mixtures(of_teachers(gradients), 0, many_s, nothing);
        if (!wants(many_s, many_t)) return;
        const Real* sources[2 * MOST];
        for (int64_t i = 0; i < many_s; i++) {
            sources[i] = states[i];
            sources[many_s + i] = upstream_states[i];
        }
        for (int64_t j = 0; j < pairs; j++) {
            teacher[j] = gradients[j];
            teacher[pairs + j] = weights[j];
        }
        write_mixtures({sources, 2 * many_s, teacher, 1, many_t}, many_s, many_t, nothing);
    }

    // The loss of mixed states. Each leaves what the gradient needs: `mixed`, the second source of
    // the teacher's mixtures; `teacher`, its weights there; `gradients`, dS; `student`, the weights
    // of the student's mixtures; `own` and `factor`, its own part.

    void loss_of_states(bool gradient) {
        find_weights();
        if (problem.objective == MSE) {
            mse_of_states(gradient);
        } else if (problem.objective == COSINE) {
            cosine_of_states(gradient);
        } else {
            kl_of_states(gradient);
        }
        if (!gradient) return;
        if (wants(0, many_s)) {
            write_mixtures(of_teachers(student), 0, many_s, [&](int64_t i) {
                const Real* from = problem.objective == MSE      ? mixed[i]
                                   : problem.objective == COSINE ? states[i]
                                                                 : own[i];
                return Own{from, factor[i]};
            });
        }
        if (!wants(many_s, many_t)) return;
        const Real* sources[2 * MOST];
        for (int64_t i = 0; i < many_s; i++) {
            sources[i] = states[i];
            sources[many_s + i] = mixed[i];
        }
        write_mixtures({sources, 2 * many_s, teacher, 1, many_t}, many_s, many_t,
                       [](int64_t) { return Own{nullptr, Vec<Real>{}}; });
    }

    // With e = h - C: l = |e|^2 / d, u = -k e, D = k e, k = 2 / d times the upstream gradient.
    void mse_of_states(bool gradient) {
        const int64_t pairs = many_s * many_t;
        clear(gradients, pairs);
        clear(sums, many_s);
        for (int64_t from = 0; from < end; from += CHUNK_VECTORS * lanes) {
            const int64_t to = least(from + CHUNK_VECTORS * lanes, end);
            mix_states<DIFFERENCE>(from, to);
            for (int64_t i = 0; i < many_s; i++)
                sums[i] += inner<Real>(mixed[i], mixed[i], from, to);
            if (gradient)
                products<Real, INNER>(mixed, many_s, teachers(), many_t, from, to, gradients);
        }
        totals<Real, ACROSS>(sums, many_s);
        for (int64_t i = 0; i < many_s; i++) rows[i] = sums[i] / Real(problem.width);
        if (!gradient) return;
        totals<Real, ACROSS>(gradients, pairs);
        for (int64_t i = 0; i < many_s; i++) {
            factor[i] = upstream[i] * (Real(2) / Real(problem.width));
            for (int64_t j = i * many_t; j < (i + 1) * many_t; j++) gradients[j] *= -factor[i];
        }
        differentiate_weights();
        for (int64_t i = 0; i < many_s; i++) {
            for (int64_t j = i * many_t; j < (i + 1) * many_t; j++) {
                student[j] = teacher[j] = gradients[j];
                teacher[pairs + j] = -factor[i] * weights[j];
            }
        }
    }

    // u = p h + q C, D = a h + p C, with p = -1 / |h| |C|, q = cos / |C|^2, a = cos / |h|^2.
    void cosine_of_states(bool gradient) {
        const int64_t pairs = many_s * many_t;
        clear(gradients, pairs);
        clear(sums, 3 * many_s);
        Vec<Real>*of_s = sums, *of_c = sums + many_s, *both = sums + 2 * many_s;
        for (int64_t from = 0; from < end; from += CHUNK_VECTORS * lanes) {
            const int64_t to = least(from + CHUNK_VECTORS * lanes, end);
            mix_states<PLAIN>(from, to);
            for (int64_t i = 0; i < many_s; i++) {
                of_s[i] += inner<Real>(states[i], states[i], from, to);
                of_c[i] += inner<Real>(mixed[i], mixed[i], from, to);
                both[i] += inner<Real>(states[i], mixed[i], from, to);
            }
            if (gradient)
                products<Real, INNER>(mixed, many_s, teachers(), many_t, from, to, gradients);
        }
        totals<Real, ACROSS>(sums, 3 * many_s);
        if (gradient) totals<Real, ACROSS>(gradients, pairs);
        for (int64_t i = 0; i < many_s; i++) {
            const Vec<Real> share_s = share_of(of_s[i]), share_c = share_of(of_c[i]);
            const Vec<Real> cosine = both[i] * share_s * share_c;
            rows[i] = Real(1) - cosine;
            if (!gradient) continue;
            const Vec<Real> p = -upstream[i] * share_s * share_c;
            const Vec<Real> q = moves(of_c[i], upstream[i] * cosine * share_c * share_c);
            norm_s[i] = p;
            norm_t[i] = q;
            factor[i] = moves(of_s[i], upstream[i] * cosine * share_s * share_s);
            for (int64_t j = i * many_t; j < (i + 1) * many_t; j++)
                gradients[j] = p * scores[j] + q * gradients[j];
        }
        if (!gradient) return;
        differentiate_weights();
        for (int64_t i = 0; i < many_s; i++) {
            for (int64_t j = i * many_t; j < (i + 1) * many_t; j++) {
                student[j] = teacher[j] = gradients[j] + norm_s[i] * weights[j];
                teacher[pairs + j] = norm_t[i] * weights[j];
            }
        }
    }

    // Of a square, 1 / norm; the norm is at least 1e-8, and what depends on it does not move there.
    Vec<Real> share_of(Vec<Real> square) const {
        const Vec<Real> norm = root<Real>(square);
        return Real(1) / (norm < Real(1e-8) ? splat<Real>(Real(1e-8)) : norm);
    }
    Vec<Real> moves(Vec<Real> square, Vec<Real> x) const {
        return zero_where<Real>(root<Real>(square) < Real(1e-8), x);
    }

    // to = from / T, absent where there are no features.
    NOINLINE void over_temperature(const Real* from, Real* to) const {
        const Real factor = Real(1 / problem.temperature);
        for (int64_t at = 0; at < end; at += lanes)
            store<Real>(to + at, load<Real>(from + at) * factor);
        if (ACROSS) {
            for (int64_t c = problem.width; c < end; c++) to[c] = -Real(__builtin_inf());
        }
    }

    // u = p (log p / q - l) / T, in the place of C, and D = (q - p) / T.
    NOINLINE void kl_of_states(bool gradient) {
        const int64_t pairs = many_s * many_t;
        mix_states<PLAIN>(0, end);
        for (int64_t i = 0; i < many_s; i++) {
            Logits<Real> r;
            over_temperature(mixed[i], s);
            over_temperature(states[i], t);
            divergence_of_logits<Real, ACROSS>(s, t, ratio, end, r, valid);
            rows[i] = r.value;
            if (!gradient) continue;
            const Vec<Real> shift = r.shift - r.value;
            const Vec<Real> align = r.sum_s / r.sum_t;
            const Vec<Real> share = upstream[i] / (r.sum_s * Real(problem.temperature));
            for (int64_t at = 0; at < end; at += lanes) {
                const Vec<Real> e_s = load<Real>(s + at), e_t = load<Real>(t + at);
                const Vec<Real> u = e_s * (load<Real>(ratio + at) + shift) * share;
                store<Real>(mixed[i] + at, zero_where<Real>(e_s == Real(0), u));
                store<Real>(own[i] + at, (e_t * align - e_s) * share);
            }
            factor[i] = splat<Real>(Real(1));
        }
        if (!gradient) return;
        clear(gradients, pairs);
        products<Real, INNER>(mixed, many_s, teachers(), many_t, 0, end, gradients);
        totals<Real, ACROSS>(gradients, pairs);
        differentiate_weights();
        for (int64_t j = 0; j < pairs; j++) {
            student[j] = teacher[j] = gradients[j];
            teacher[pairs + j] = weights[j];
        }
    }

    // The mixture of losses. `values` are those of all pairs.

    void mixture_of_losses(bool gradient) {
        find_weights();
        if (problem.objective == MSE) {
            mse_of_pairs();
        } else if (problem.objective == COSINE) {
            cosine_of_pairs();
        } else {
            kl_of_pairs();
        }
        const int64_t pairs = many_s * many_t;
        for (int64_t i = 0; i < many_s; i++) {
            rows[i] = Vec<Real>{};
            for (int64_t j = 0; j < many_t; j++)
                rows[i] += weights[i * many_t + j] * values[i * many_t + j];
            for (int64_t j = i * many_t; gradient && j < (i + 1) * many_t; j++)
                gradients[j] = upstream[i] * values[j];
        }
        if (!gradient) return;
        differentiate_weights();
        for (int64_t j = 0; j < pairs; j++) student[j] = teacher[j] = gradients[j];
        if (problem.objective == COSINE) {
            cosine_gradients();
        } else {
            difference_gradients();
        }
    }

    void mse_of_pairs() {
        const int64_t pairs = many_s * many_t;
        clear(values, pairs);
        products<Real, SQUARES>(states, many_s, teachers(), many_t, 0, end, values);
        totals<Real, ACROSS>(values, pairs);
        for (int64_t j = 0; j < pairs; j++) values[j] /= Real(problem.width);
    }

    void cosine_of_pairs() {
        for (int64_t i = 0; i < many_s; i++) norm_s[i] = inner<Real>(states[i], states[i], 0, end);
        for (int64_t j = 0; j < many_t; j++)
            norm_t[j] = inner<Real>(teachers()[j], teachers()[j], 0, end);
        for (int64_t i = many_s; i < round_up(many_s, lanes); i++) norm_s[i] = Vec<Real>{};
        for (int64_t j = many_t; j < round_up(many_t, lanes); j++) norm_t[j] = Vec<Real>{};
        totals<Real, ACROSS>(norm_s, many_s);
        totals<Real, ACROSS>(norm_t, many_t);
        for (int64_t i = 0; i < many_s; i++) {
            for (int64_t j = 0; j < many_t; j++)
                values[i * many_t + j] =
                    Real(1) - scores[i * many_t + j] * share_of(norm_s[i]) * share_of(norm_t[j]);
        }
    }

    // Both sides get -1 / |h| |g| of the other, and cos / norm^2 of themselves.
    void cosine_gradients() {
        Vec<Real> *of_s = factor, *of_t = sums;
        for (int64_t j = 0; j < many_t; j++) of_t[j] = Vec<Real>{};
        for (int64_t i = 0; i < many_s; i++) {
            of_s[i] = Vec<Real>{};
            for (int64_t j = 0; j < many_t; j++) {
                const int64_t at = i * many_t + j;
                const Vec<Real> share_s = share_of(norm_s[i]), share_t = share_of(norm_t[j]);
                const Vec<Real> weight = upstream[i] * weights[at];
                const Vec<Real> cosine = Real(1) - values[at];
                of_s[i] += moves(norm_s[i], weight * cosine * share_s * share_s);
                of_t[j] += moves(norm_t[j], weight * cosine * share_t * share_t);
                student[at] -= weight * share_s * share_t;
                teacher[at] -= weight * share_s * share_t;
            }
        }
        if (wants(0, many_s)) {
            write_mixtures(of_teachers(student), 0, many_s,
                           [&](int64_t i) { return Own{states[i], of_s[i]}; });
        }
        if (wants(many_s, many_t)) {
            write_mixtures({states, many_s, teacher, 1, many_t}, many_s, many_t,
                           [&](int64_t j) { return Own{teachers()[j], of_t[j]}; });
        }
    }

    void kl_of_pairs() {
        for (int64_t l = 0; l < many_s + many_t; l++) {
            over_temperature(states[l], logarithms[l]);
            Real* x = logarithms[l];
            const Vec<Real> most = largest<Real, ACROSS>(x, end);
            Vec<Real> sum = {};
            for (int64_t at = 0; at < end; at += lanes) {
                Ints<Real> none;
                const Vec<Real> y = load<Real>(x + at) - most;
                const Vec<Real> e = exponential<Real>(y, none);
                sum += e;
                store<Real>(x + at, y);
                store<Real>(normal[l] + at, e);
            }
            sum = total<Real, ACROSS>(sum);
            const Vec<Real> shift = logarithm<Real>(sum);
            for (int64_t at = 0; at < end; at += lanes) {
                store<Real>(x + at, load<Real>(x + at) - shift);
                store<Real>(normal[l] + at, load<Real>(normal[l] + at) / sum);
            }
        }
        for (int64_t i = 0; i < many_s; i++) {
            for (int64_t j = 0; j < many_t; j++) values[i * many_t + j] = kl_of_pair(i, many_s + j);
        }
        // Where there are no features the logarithms are -inf, and would be mixed to NaN.
        for (int64_t l = 0; ACROSS && l < many_s + many_t; l++) {
            for (int64_t c = problem.width; c < end; c++) logarithms[l][c] = 0;
        }
    }

    Vec<Real> kl_of_pair(int64_t i, int64_t l) {
        const Real *p = normal[l], *q = normal[i];
        Vec<Real> sum = {};
        Ints<Real> lost = {};
        for (int64_t at = 0; at < end; at += lanes) {
            const Vec<Real> weight = load<Real>(p + at);
            const Ints<Real> zero = weight == Real(0);
            const Vec<Real> log_ratio = zero_where<Real>(
                zero, load<Real>(logarithms[l] + at) - load<Real>(logarithms[i] + at));
            lost |= zero & (load<Real>(q + at) > Real(0));
            sum += weight * log_ratio;
            store<Real>(ratio + at, log_ratio);
        }
        Vec<Real> value = total<Real, ACROSS>(sum);
        if (ACROSS && any<Real>(lost)) return value;
        const Ints<Real> close = (value < CLOSE<Real>)&valid & ~lost;
        if (!any<Real>(close)) return value;
        const Vec<Real> better = close_reverse<Real, ACROSS>(
            p, ratio, end / lanes, lanes, splat<Real>(Real(1)), Vec<Real>{});
        return close ? better : value;
    }

    // mse and kl, whose gradients are of differences: of states, or of q and p. With k_i the
    // upstream gradient times 2 / d or 1 / T,
    //
    //     D_i = k_i sum_j alpha_ij (h_i - g_j)           or of (q_i - p_j)
    //
    // and for the teacher
    //
    //     sum_i k_i alpha_ij (g_j - h_i)                 or p_j (log p_j - log q_i - m_ij)
    void difference_gradients() {
        const bool kl = problem.objective == KL;
        const Real unit = kl ? Real(1 / problem.temperature) : Real(2) / Real(problem.width);
        for (int64_t i = 0; i < many_s; i++) factor[i] = upstream[i] * unit;
        if (wants(0, many_s)) {
            const Real* const* from = kl ? const_cast<const Real* const*>(normal) : states;
            Output<Real> outputs[MOST];
            for (int64_t i = 0; i < many_s; i++) outputs[i] = {mixed[i], from[i], Vec<Real>{}, i};
            const Mixture<Real> of_them = {from + many_s, many_t, weights, many_t, 1};
            mix<Real, DIFFERENCES>(of_them, outputs, many_s, 0, end);
            write_mixtures(of_teachers(student), 0, many_s,
                           [&](int64_t i) { return Own{mixed[i], factor[i]}; });
        }
        if (!wants(many_s, many_t)) return;
        const Real* const* from = kl ? const_cast<const Real* const*>(logarithms) : states;
        for (int64_t j = 0; j < many_t; j++) {
            if (problem.out[many_s + j] == nullptr) continue;
            Vec<Real>* weight = sums;
            Vec<Real> value = {};
            for (int64_t i = 0; i < many_s; i++) {
                weight[i] = factor[i] * weights[i * many_t + j];
                value += weight[i] * values[i * many_t + j];
            }
            Output<Real> difference = {mixed[0], from[many_s + j], Vec<Real>{}, 0};
            mix<Real, DIFFERENCES>({from, many_s, weight, 0, 1}, &difference, 1, 0, end);
            for (int64_t at = 0; kl && at < end; at += lanes) {
                const Vec<Real> p = load<Real>(normal[many_s + j] + at);
                const Vec<Real> x = p * (load<Real>(mixed[0] + at) - value);
                store<Real>(mixed[0] + at, zero_where<Real>(p == Real(0), x));
            }
            const Mixture<Real> of_students = {states, many_s, teacher + j, 0, many_t};
            write_mixtures(of_students, many_s + j, 1,
                           [&](int64_t) { return Own{mixed[0], splat<Real>(Real(1))}; });
        }
    }

    void zero() {
        for (int64_t l = 0; l < many_s + many_t; l++) {
            const int64_t bytes = problem.width * size_of(problem.storage_out[l >= many_s]);
            if (problem.out[l] != nullptr)
                memset(problem.out[l] + token * bytes, 0, std::size_t(tokens * bytes));
        }
        if (problem.pass == PROJECT) write_numbers(weights, many_s * many_t, problem.weights);
        if (problem.rows != nullptr) write_numbers(rows, many_s, problem.rows);
    }

    void run() {
        const bool gradient = problem.pass == LOSS_BACKWARD;
        if (problem.pass == PROJECT) {
            project();
        } else if (problem.pass == PROJECT_BACKWARD) {
            project_backward();
        } else {
            if (gradient) read_upstream();
            if (problem.losses) {
                mixture_of_losses(gradient);
            } else {
                loss_of_states(gradient);
            }
            if (problem.rows != nullptr) write_numbers(rows, many_s, problem.rows);
        }
    }
};

// Fewer features than this lie below each other, a token a lane.
template <class Real>
static bool across(const Problem& problem) {
    return problem.width >= 4 * LANES<Real>;
}

template <class Real, bool ACROSS>
static void tokens(const Problem& problem, int64_t begin, int64_t end, char* scratch) {
    Group<Real, ACROSS> group(problem, scratch);
    for (int64_t token = begin; token < end; token += group.groups * (ACROSS ? 1 : LANES<Real>)) {
        group.read_groups(token, end);
        while (group.next(end)) {
            if (any<Real>(group.valid)) {
                group.run();
            } else {
                group.zero();
            }
        }
    }
    streams_end();
}

template <class Real>
static void tokens(const Problem& problem, int64_t begin, int64_t end, char* scratch) {
    if (across<Real>(problem)) {
        tokens<Real, true>(problem, begin, end, scratch);
    } else {
        tokens<Real, false>(problem, begin, end, scratch);
    }
}

template <class Real>
static int64_t scratch_of(const Problem& problem) {
    if (across<Real>(problem)) return Group<Real, true>(problem, nullptr).place(nullptr);
    return Group<Real, false>(problem, nullptr).place(nullptr);
}

}  // namespace

int64_t layer_projection_scratch(const Problem& problem) {
    return problem.f64 ? scratch_of<double>(problem) : scratch_of<float>(problem);
}

void layer_projection_tokens(const Problem& problem, int64_t begin, int64_t end, char* scratch) {
    if (problem.f64) {
        tokens<double>(problem, begin, end, scratch);
    } else {
        tokens<float>(problem, begin, end, scratch);
    }
}

}  // namespace KDFAST_ISA
