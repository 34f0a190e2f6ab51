// KL divergence between two attentions, one tile of queries at a time.
//
// A tile holds the scores of up to three vectors of queries for all their keys, transposed: one row
// of memory is one key. Sums over keys are then vertical (divergence.h), and one sweep makes
// gradients as well, with dQ = scale dS K and dK = scale dS^T Q.

#include "attention_kl.h"
#include "divergence.h"

namespace KDFAST_ISA {

using namespace attention_kl;

namespace {

constexpr int PAD = 12;    // rows by which the products may overrun
constexpr int BLOCK = 48;  // keys whose dS stays in the first cache; a multiple of every `rows_of`

// How many rows of `vectors` accumulators fit in the registers.
constexpr int rows_of(int vectors) {
    const int accumulators = REGISTERS == 32 ? 24 : 12;
    return vectors == 1 ? 12 : accumulators / vectors;
}

template <class Real>
constexpr int TILE = 3 * LANES<Real>;

// A tile's rows, and the keys they see, counted among those of Visible.
template <class Real>
struct Tile {
    int vectors;
    int64_t row, rows;
    int64_t begin, end;          // keys that some row sees
    int64_t all_begin, all_end;  // keys that every row sees
    Ints<Real> first[3], last[3];

    Ints<Real> sees(int64_t key, int vector) const {
        const auto j = typename Types<Real>::Int(key);
        return (first[vector] <= j) & (j < last[vector]);
    }
};

static int64_t tiles_of(int64_t rows, int lanes) {
    const int64_t vectors = (rows + lanes - 1) / lanes;
    return (vectors + 2) / 3;
}

// Tiles are three vectors wide, the last ones two where that leaves less over.
template <class Real>
static Tile<Real> tile_of(const Visible& visible, int64_t index) {
    constexpr int lanes = LANES<Real>;
    const int64_t vectors = (visible.rows + lanes - 1) / lanes, tiles = (vectors + 2) / 3;
    const int64_t wide = tiles - (3 * tiles - vectors);
    const int64_t begin = index < wide ? 3 * index : 3 * wide + 2 * (index - wide);
    Tile<Real> tile;
    tile.vectors = int(least(index < wide ? 3 : 2, vectors - begin));
    if (wide < 0) tile.vectors = 1;  // one vector in all
    tile.row = (wide < 0 ? 0 : begin) * lanes;
    tile.rows = least(tile.vectors * lanes, visible.rows - tile.row);
    for (int i = 0; i < tile.vectors * lanes; i++) {
        const int64_t row = tile.row + least(i, tile.rows - 1);
        tile.first[i / lanes][i % lanes] = visible.first[row];
        tile.last[i / lanes][i % lanes] = visible.last[row];
    }
    tile.begin = visible.first[tile.row];
    tile.end = visible.last[tile.row + tile.rows - 1];
    tile.all_begin = visible.first[tile.row + tile.rows - 1];
    tile.all_end = visible.last[tile.row];
    return tile;
}

// Brings the queries and keys of the next item into the cache while this one computes: the rows of
// a head lie apart, and where they are few, the core would wait for them longer than it needs them.
struct Ahead {
    static constexpr int64_t MOST_BYTES = 160 << 10, LINE = 64;
    struct Rows {
        const char* row;
        int64_t bytes, step, left;
    };
    Rows rows[4] = {};
    int current = 4;

    Ahead(const Problem& problem, const Item* next) {
        if (next == nullptr || problem.mean_heads) return;
        const Pair& pair = problem.pairs[next->pair];
        const int64_t bytes_a_line =
            pair.s.width * size_of(pair.s.storage) + pair.t.width * size_of(pair.t.storage);
        const int64_t total = (problem.queries + problem.keys) * bytes_a_line;
        if (next->parts > 1 || total > MOST_BYTES) return;
        const int64_t head = next->key_head * (pair.s.heads / pair.s.key_heads);
        const Side* sides[2] = {&pair.t, &pair.s};
        for (int i = 0; i < 2; i++) {
            const Side& side = *sides[i];
            const int64_t key_head = head / (side.heads / side.key_heads);
            const int64_t size = size_of(side.storage), bytes = side.width * size;
            const auto of = [&](const char* start, const int64_t* stride, int64_t h, int64_t n) {
                const int64_t offset = next->batch * stride[0] + h * stride[1];
                return Rows{start + offset * size, bytes, stride[2] * size, n};
            };
            rows[2 * i] = of(side.key, side.key_stride, key_head, problem.keys);
            rows[2 * i + 1] = of(side.query, side.query_stride, head, problem.queries);
        }
        current = 0;
    }

    // Of many rows' memory a core can wait for a few at a time only: two now and then.
    void fetch_two() {
        for (int i = 0; i < 2 && current < 4; i++) {
            Rows& from = rows[current];
            for (int64_t at = 0; at < from.bytes; at += LINE) __builtin_prefetch(from.row + at);
            from.row += from.step;
            if (--from.left == 0) current++;
        }
    }
};

// out [keys][queries] = keys [.., width] x queries [width][queries], -inf where a row sees no key.
template <class Real, int V>
static NOINLINE void tile_scores(const Real* queries, const Real* keys, int64_t stride,
                                 int64_t width, const Tile<Real>& tile, Real* out,
                                 Vec<Real>* maximum, Ahead& ahead) {
    constexpr int lanes = LANES<Real>, R = rows_of(V);
    const int64_t n = tile.end - tile.begin;
    const Vec<Real> hidden = splat<Real>(Real(-__builtin_inf()));
    keys += tile.begin * stride;
    for (int v = 0; v < V; v++) maximum[v] = hidden;
    for (int64_t j = 0; j < n; j += R) {
        ahead.fetch_two();
        const Real* key[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) key[r] = keys + least(j + r, n - 1) * stride;
        Vec<Real> sum[R][V] = {};
#pragma GCC unroll 4
        for (int64_t c = 0; c < width; c++) {
            Vec<Real> query[V];
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) query[v] = load<Real>(queries + (c * V + v) * lanes);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
#pragma GCC unroll 16
                for (int v = 0; v < V; v++) sum[r][v] += query[v] * key[r][c];
            }
        }
        if (tile.begin + j < tile.all_begin || tile.begin + j + R > tile.all_end) {
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                const int64_t position = tile.begin + least(j + r, n - 1);
#pragma GCC unroll 16
                for (int v = 0; v < V; v++) {
                    sum[r][v] = tile.sees(position, v) ? sum[r][v] : hidden;
                }
            }
        }
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            Vec<Real> most = maximum[v];
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                most = sum[r][v] > most ? sum[r][v] : most;
                store<Real>(out + ((j + r) * V + v) * lanes, sum[r][v]);
            }
            maximum[v] = most;
        }
    }
}

// c [rows][W vectors] += a x b with a(k, r) = a[k * a_k + r * a_r], b [n][W vectors]; = where
// `first`.
template <class Real, int W>
static NOINLINE void product(const Real* a, int64_t a_k, int64_t a_r, const Real* b, int64_t n,
                             Real* c, int64_t stride, int64_t rows, bool first) {
    constexpr int lanes = LANES<Real>, R = rows_of(W);
    for (int64_t r0 = 0; r0 < rows; r0 += R) {
        Vec<Real> sum[R][W] = {};  // joins c at the end: shorter sums round less
        const Real *from = a + r0 * a_r, *with = b;
#pragma GCC unroll 4
        for (int64_t k = 0; k < n; k++, from += a_k, with += stride) {
            Vec<Real> factor[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) factor[r] = splat<Real>(from[r * a_r]);
#pragma GCC unroll 16
            for (int w = 0; w < W; w++) {
                Vec<Real> row = load<Real>(with + w * lanes);
                hold(row);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) sum[r][w] += factor[r] * row;
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 16
            for (int w = 0; w < W; w++) {
                Real* to = c + (r0 + r) * stride + w * lanes;
                store<Real>(to, first ? sum[r][w] : sum[r][w] + load<Real>(to));
            }
        }
    }
}

// The same for rows of `stride` elements, a whole number of vectors.
template <class Real>
static void product(const Real* a, int64_t a_k, int64_t a_r, const Real* b, int64_t n, Real* c,
                    int64_t stride, int64_t rows, bool first) {
    for (int64_t done = 0, left = stride / LANES<Real>; left > 0;) {
        const int64_t now = left == 5 ? 3 : least(left, 4);
        const Real* from = b + done * LANES<Real>;
        Real* to = c + done * LANES<Real>;
        if (now == 4) product<Real, 4>(a, a_k, a_r, from, n, to, stride, rows, first);
        if (now == 3) product<Real, 3>(a, a_k, a_r, from, n, to, stride, rows, first);
        if (now == 2) product<Real, 2>(a, a_k, a_r, from, n, to, stride, rows, first);
        if (now == 1) product<Real, 1>(a, a_k, a_r, from, n, to, stride, rows, first);
        done += now, left -= now;
    }
}

// The memory of one thread.
template <class Real>
struct Scratch {
    Real *s, *t;                 // scores [keys][queries]
    Real *mean, *weight;         // of the average map [keys][queries]
    Real *query_s, *query_t;     // [stride][queries]
    Real *rows_s, *rows_t;       // [queries][stride]
    Real* grad_query;            // [queries][stride]
    Real *key_s, *key_t;         // [key heads][keys][stride]
    Real* grad_key;              // [key heads][keys][stride]
    int64_t stride_s, stride_t;  // a width rounded up to vectors
    int64_t size = 0;

    Scratch(const Problem& problem, const Pair& pair, char* memory) {
        const auto take = [&](int64_t n) {
            Real* start = reinterpret_cast<Real*>(memory + size);
            size += round_up(n * int64_t(sizeof(Real)), 64);
            return start;
        };
        const bool mean_heads = problem.mean_heads;
        const int64_t map = (problem.keys + PAD) * TILE<Real>;
        const int64_t key_heads_s = mean_heads ? pair.s.key_heads : 1;
        const int64_t key_heads_t = mean_heads ? pair.t.key_heads : 1;
        stride_s = round_up(pair.s.width, LANES<Real>);
        stride_t = round_up(pair.t.width, LANES<Real>);
        s = take(map);
        t = take(map);
        mean = take(mean_heads ? map : 0);
        weight = take(mean_heads ? map : 0);
        query_s = take(stride_s * TILE<Real>);
        query_t = take(stride_t * TILE<Real>);
        rows_s = take(TILE<Real> * stride_s);
        rows_t = take(TILE<Real> * stride_t);
        grad_query = take((TILE<Real> + PAD) * stride_s);
        key_s = take(key_heads_s * problem.keys * stride_s);
        key_t = take(key_heads_t * problem.keys * stride_t);
        grad_key = take(problem.gradients ? key_heads_s * (problem.keys + PAD) * stride_s : 0);
    }
};

// The keys of one head that some row sees, in rows of whole vectors: as they lie, or in `copy`,
// which is made where `fill` is set.
template <class Real>
static const Real* keys_of(const Problem& problem, const Side& side, const Visible& visible,
                           int64_t batch, int64_t head, Real* copy, bool fill) {
    const int64_t size = size_of(side.storage);
    const char* start = side.key + (batch * side.key_stride[0] + head * side.key_stride[1]) * size;
    const int64_t stride = round_up(side.width, LANES<Real>);
    const bool dense = side.key_stride[2] == side.width || problem.keys == 1;
    const bool whole = side.width == stride && visible.keys == problem.keys;
    if (size == int64_t(sizeof(Real)) && dense && whole) {
        return reinterpret_cast<const Real*>(start);
    }
    for (int64_t j = 0; fill && j < visible.keys; j++) {
        Real* row = copy + j * stride;
        read<Real>(side.storage, start + visible.key[j] * side.key_stride[2] * size, side.width,
                   Real(1), row);
        for (int64_t c = side.width; c < stride; c++) row[c] = 0;
    }
    return copy;
}

// The scaled queries of a tile, by row and by column; rows beyond the last are zero.
template <class Real>
static NOINLINE void queries_of(const Problem& problem, const Side& side, const Visible& visible,
                                const Tile<Real>& tile, int64_t batch, int64_t head, Real* rows,
                                Real* columns) {
    const int64_t queries = tile.vectors * LANES<Real>, stride = round_up(side.width, LANES<Real>);
    for (int64_t i = 0; i < queries; i++) {
        Real* row = rows + i * stride;
        if (i < tile.rows) {
            const int64_t at = batch * side.query_stride[0] + head * side.query_stride[1] +
                               visible.row[tile.row + i] * side.query_stride[2];
            read<Real>(side.storage, side.query + at * size_of(side.storage), side.width,
                       Real(side.scale), row);
        }
        for (int64_t c = i < tile.rows ? side.width : 0; c < stride; c++) row[c] = 0;
    }
    for (int64_t i = 0; i < queries; i += LANES<Real>) {
        transpose<Real>(rows + i * stride, stride, stride, columns + i, queries);
    }
}

// One thread at one item.
template <class Real>
struct Worker {
    static constexpr int lanes = LANES<Real>;
    const Problem& problem;
    const Pair& pair;
    const Visible& visible;
    const int64_t batch;
    Scratch<Real> scratch;
    Real* grad_key;
    Ahead ahead;
    double loss = 0;

    // Query heads that share one student key head, each with a teacher head of its own.
    void grouped(int64_t key_head, int64_t part, int64_t parts) {
        const int64_t group = pair.s.heads / pair.s.key_heads;
        const int64_t tiles = tiles_of(visible.rows, lanes), units = group * tiles;
        const Real* keys_s =
            keys_of<Real>(problem, pair.s, visible, batch, key_head, scratch.key_s, true);
        const Real* keys_t = nullptr;
        int64_t key_head_t = -1;
        for (int64_t unit = units * part / parts; unit < units * (part + 1) / parts; unit++) {
            const int64_t head = key_head * group + unit / tiles;
            const int64_t wanted = head / (pair.t.heads / pair.t.key_heads);
            if (wanted != key_head_t) {
                keys_t =
                    keys_of<Real>(problem, pair.t, visible, batch, wanted, scratch.key_t, true);
                key_head_t = wanted;
            }
            const Tile<Real> tile = tile_of<Real>(visible, unit % tiles);
            Rows<Real> rows[3];
            teacher_scores(tile, head, keys_t, rows);
            student_tile(tile, head, keys_s, scratch.t, rows, grad_key);
            if (problem.lse_t != nullptr) put_lse_t(tile, head, rows);
        }
    }

    // Every student head against the average of the teacher's maps.
    void averaged(int64_t part, int64_t parts) {
        const int64_t tiles = tiles_of(visible.rows, lanes);
        const int64_t begin = tiles * part / parts, end = tiles * (part + 1) / parts;
        for (int64_t index = begin; index < end; index++) {
            const Tile<Real> tile = tile_of<Real>(visible, index);
            Rows<Real> rows[3];
            for (int64_t head = 0; head < pair.t.heads; head++) {
                const int64_t key_head = head / (pair.t.heads / pair.t.key_heads);
                Real* copy = scratch.key_t + key_head * problem.keys * scratch.stride_t;
                const Real* keys =
                    keys_of<Real>(problem, pair.t, visible, batch, key_head, copy, index == begin);
                teacher_scores(tile, head, keys, rows);
                add_to_mean(tile, head, rows);
                if (problem.lse_t != nullptr) put_lse_t(tile, head, rows);
            }
            finish_mean(tile, rows);
            for (int64_t head = 0; head < pair.s.heads; head++) {
                const int64_t key_head = head / (pair.s.heads / pair.s.key_heads);
                Real* copy = scratch.key_s + key_head * problem.keys * scratch.stride_s;
                const Real* keys =
                    keys_of<Real>(problem, pair.s, visible, batch, key_head, copy, index == begin);
                student_tile(tile, head, keys, scratch.mean, rows,
                             grad_key + key_head * (visible.keys + PAD) * scratch.stride_s);
            }
        }
    }

    // log of the sum of maps so far = mean + log(weight), where mean is the largest log p.
    void add_to_mean(const Tile<Real>& tile, int64_t head, Rows<Real>* rows) {
        const int64_t n = tile.end - tile.begin, step = tile.vectors * lanes;
        for (int v = 0; v < tile.vectors; v++) {
            const Vec<Real> max = rows[v].max_t;
            Vec<Real> sum = {};
            Ints<Real> none;
            for (int64_t at = v * lanes; at < n * step; at += step) {
                sum += exponential<Real>(load<Real>(scratch.t + at) - max, none);
            }
            rows[v].sum_t = sum;
            const Vec<Real> log_sum = logarithm<Real>(sum);
            for (int64_t at = v * lanes; at < n * step; at += step) {
                const Vec<Real> log_p = (load<Real>(scratch.t + at) - max) - log_sum;
                Vec<Real> most = log_p, weight = splat<Real>(1);
                if (head > 0) {
                    const Vec<Real> before = load<Real>(scratch.mean + at);
                    const Vec<Real> gap = log_p == before ? Vec<Real>{} : log_p - before;
                    const Vec<Real> e = exponential<Real>(gap > Real(0) ? -gap : gap, none);
                    weight = load<Real>(scratch.weight + at);
                    weight = gap > Real(0) ? weight * e + Real(1) : weight + e;
                    most = gap > Real(0) ? log_p : before;
                }
                store<Real>(scratch.mean + at, most);
                store<Real>(scratch.weight + at, weight);
            }
        }
    }

    void finish_mean(const Tile<Real>& tile, Rows<Real>* rows) {
        const int64_t n = (tile.end - tile.begin) * tile.vectors * lanes;
        if (pair.t.heads == 1) {  // its scores, so that an equal student is exactly equal
            memcpy(scratch.mean, scratch.t, n * sizeof(Real));
            return;
        }
        const Vec<Real> log_heads = logarithm<Real>(splat<Real>(Real(pair.t.heads)));
        for (int64_t at = 0; at < n; at += lanes) {
            const Vec<Real> log_weight = logarithm<Real>(load<Real>(scratch.weight + at));
            store<Real>(scratch.mean + at,
                        load<Real>(scratch.mean + at) + (log_weight - log_heads));
        }
        for (int v = 0; v < tile.vectors; v++) rows[v].max_t = Vec<Real>{};
    }

    void teacher_scores(const Tile<Real>& tile, int64_t head, const Real* keys, Rows<Real>* rows) {
        Vec<Real> maximum[3];
        queries_of<Real>(problem, pair.t, visible, tile, batch, head, scratch.rows_t,
                         scratch.query_t);
        scores(scratch.query_t, keys, scratch.stride_t, pair.t.width, tile, scratch.t, maximum);
        for (int v = 0; v < tile.vectors; v++) rows[v].max_t = maximum[v];
    }

    // Everything of a tile once the teacher's scores and their maxima are known.
    void student_tile(const Tile<Real>& tile, int64_t head, const Real* keys, const Real* scores_t,
                      Rows<Real>* rows, Real* grad_key_of_head) {
        Vec<Real> maximum[3];
        queries_of<Real>(problem, pair.s, visible, tile, batch, head, scratch.rows_s,
                         scratch.query_s);
        scores(scratch.query_s, keys, scratch.stride_s, pair.s.width, tile, scratch.s, maximum);
        const int64_t n = tile.end - tile.begin, step = tile.vectors * lanes;
        for (int v = 0; v < tile.vectors; v++) {
            Ints<Real> real{};  // lanes that hold a row
            for (int i = 0; i < lanes; i++) real[i] = v * lanes + i < tile.rows ? -1 : 0;
            rows[v].max_s = maximum[v];
            divergence<Real, false>(problem.direction, scratch.s + v * lanes, scores_t + v * lanes,
                                    scratch.t + v * lanes, n, step, rows[v], real);
        }
        for (int64_t i = 0; i < tile.rows; i++) loss += double(rows[i / lanes].value[i % lanes]);
        if (problem.rows != nullptr) put_rows(tile, head, rows);
        if (problem.gradients) gradients(tile, head, rows, keys, grad_key_of_head);
    }

    void gradients(const Tile<Real>& tile, int64_t head, const Rows<Real>* rows, const Real* keys,
                   Real* grad_key_of_head) {
        const int64_t stride = scratch.stride_s, queries = tile.vectors * lanes;
        const int64_t n = tile.end - tile.begin;
        Vec<Real> upstream[3] = {};
        for (int64_t i = 0; i < tile.rows; i++) {
            const int64_t* by = problem.grad_rows_stride;
            const int64_t at = batch * by[0] + (pair.first_head_s + head) * by[1] +
                               visible.row[tile.row + i] * by[2];
            upstream[i / lanes][i % lanes] =
                problem.grad_rows ? reinterpret_cast<const Real*>(problem.grad_rows)[at] : Real(1);
        }
        memset(scratch.s + n * queries, 0, PAD * queries * sizeof(Real));
        for (int64_t begin = 0; begin < n; begin += BLOCK) {
            const int64_t block = least(BLOCK, n - begin), first = tile.begin + begin;
            Real* d = scratch.s + begin * queries;
            for (int v = 0; v < tile.vectors; v++) {
                differential<Real>(problem.direction, d + v * lanes,
                                   scratch.t + begin * queries + v * lanes, block, queries, rows[v],
                                   upstream[v]);
            }
            hide(tile, first, first + block, d);
            product<Real>(d, queries, 1, keys + first * stride, block, scratch.grad_query, stride,
                          queries, begin == 0);
            product<Real>(d, 1, queries, scratch.rows_s, queries, grad_key_of_head + first * stride,
                          stride, block, false);
        }
        for (int64_t i = 0; i < tile.rows; i++) {
            write<Real>(problem.gradient_storage, scratch.grad_query + i * stride, pair.s.width,
                        Real(pair.s.scale * pair.factor),
                        grad_query_row(head, visible.row[tile.row + i]));
        }
    }

    // Where a row is NaN, the keys that it does not see are no part of it.
    static void hide(const Tile<Real>& tile, int64_t begin, int64_t end, Real* d) {
        if (begin >= tile.all_begin && end <= tile.all_end) return;
        for (int64_t key = begin; key < end; key++) {
            for (int v = 0; v < tile.vectors; v++, d += lanes) {
                store<Real>(d, zero_where<Real>(~tile.sees(key, v), load<Real>(d)));
            }
        }
    }

    void scores(const Real* queries, const Real* keys, int64_t stride, int64_t width,
                const Tile<Real>& tile, Real* out, Vec<Real>* maximum) {
        const auto function = tile.vectors == 3   ? tile_scores<Real, 3>
                              : tile.vectors == 2 ? tile_scores<Real, 2>
                                                  : tile_scores<Real, 1>;
        function(queries, keys, stride, width, tile, out, maximum, ahead);
    }

    char* grad_query_row(int64_t head, int64_t row) const {
        const int64_t heads = pair.s.heads, n = problem.queries;
        const int64_t token = problem.tokens_first ? (batch * n + row) * heads + head
                                                   : (batch * heads + head) * n + row;
        return pair.grad_query + token * pair.s.width * size_of(problem.gradient_storage);
    }

    void clear_idle_rows(int64_t head) const {
        const int64_t bytes = pair.s.width * size_of(problem.gradient_storage);
        for (int64_t row = 0, next = 0; row < problem.queries; row++) {
            if (next < visible.rows && visible.row[next] == row) {
                next++;
            } else {
                memset(grad_query_row(head, row), 0, bytes);
            }
        }
    }

    void put(char* out, const Tile<Real>& tile, int64_t head, int64_t heads, int64_t i,
             Real value) const {
        Real* row = reinterpret_cast<Real*>(out) + (batch * heads + head) * problem.queries;
        row[visible.row[tile.row + i]] = value;
    }

    void put_rows(const Tile<Real>& tile, int64_t head, const Rows<Real>* rows) const {
        const int64_t column = pair.first_head_s + head, heads = problem.heads_s;
        for (int v = 0; v < tile.vectors; v++) {
            const Vec<Real> lse = rows[v].max_s + logarithm<Real>(rows[v].sum_s);
            for (int64_t i = v * lanes; i < least(v * lanes + lanes, tile.rows); i++) {
                put(problem.rows, tile, column, heads, i, rows[v].value[i % lanes]);
                put(problem.lse_s, tile, column, heads, i, lse[i % lanes]);
                if (problem.direction == JS) {
                    put(problem.inner, tile, column, heads, i, rows[v].inner[i % lanes]);
                }
            }
        }
    }

    void put_lse_t(const Tile<Real>& tile, int64_t head, const Rows<Real>* rows) const {
        for (int v = 0; v < tile.vectors; v++) {
            const Vec<Real> lse = rows[v].max_t + logarithm<Real>(rows[v].sum_t);
            for (int64_t i = v * lanes; i < least(v * lanes + lanes, tile.rows); i++) {
                put(problem.lse_t, tile, pair.first_head_t + head, problem.heads_t, i,
                    lse[i % lanes]);
            }
        }
    }
};

template <class Real>
static void finish(const Problem& problem, const Item* shares) {
    const Pair& pair = problem.pairs[shares->pair];
    const Visible& visible = problem.visible[shares->batch];
    const int64_t width = pair.s.width, stride = round_up(width, LANES<Real>);
    const int64_t heads = pair.s.key_heads, n = problem.keys;
    const int64_t bytes = width * size_of(problem.gradient_storage);
    const int64_t first = problem.mean_heads ? 0 : shares->key_head;
    const int64_t last = problem.mean_heads ? heads : first + 1;
    for (int64_t head = first; head < last; head++) {
        int64_t at = (head - first) * (visible.keys + PAD) * stride;
        for (int64_t key = 0, next = 0; key < n; key++) {
            const int64_t token = problem.tokens_first ? (shares->batch * n + key) * heads + head
                                                       : (shares->batch * heads + head) * n + key;
            char* out = pair.grad_key + token * bytes;
            if (next == visible.keys || visible.key[next] != key) {
                memset(out, 0, bytes);
                continue;
            }
            Real* row = reinterpret_cast<Real*>(shares->grad_key) + at;
            for (int part = 1; part < shares->parts; part++) {
                const Real* more = reinterpret_cast<const Real*>(shares[part].grad_key) + at;
                for (int64_t c = 0; c < width; c++) row[c] += more[c];
            }
            write<Real>(problem.gradient_storage, row, width, Real(pair.factor), out);
            next++;
            at += stride;
        }
    }
}

template <class Real>
static int64_t grad_key_bytes(const Problem& problem, const Item& item) {
    const Pair& pair = problem.pairs[item.pair];
    const int64_t heads = problem.mean_heads ? pair.s.key_heads : 1;
    const int64_t rows = problem.visible[item.batch].keys + PAD;
    return heads * rows * round_up(pair.s.width, LANES<Real>) * int64_t(sizeof(Real));
}

template <class Real>
static void run(const Problem& problem, Item& item, const Item* next, char* memory) {
    const Pair& pair = problem.pairs[item.pair];
    const Visible& visible = problem.visible[item.batch];
    Worker<Real> worker{problem, pair, visible, item.batch, {problem, pair, memory}, nullptr,
                        {problem, next}};
    if (problem.gradients) {
        if (item.parts == 1) item.grad_key = reinterpret_cast<char*>(worker.scratch.grad_key);
        memset(item.grad_key, 0, grad_key_bytes<Real>(problem, item));
        worker.grad_key = reinterpret_cast<Real*>(item.grad_key);
        if (item.part == 0 && visible.rows < problem.queries) {
            const int64_t group = pair.s.heads / pair.s.key_heads;
            const int64_t first = problem.mean_heads ? 0 : item.key_head * group;
            const int64_t last = problem.mean_heads ? pair.s.heads : first + group;
            for (int64_t head = first; head < last; head++) worker.clear_idle_rows(head);
        }
    }
    if (problem.mean_heads) {
        worker.averaged(item.part, item.parts);
    } else {
        worker.grouped(item.key_head, item.part, item.parts);
    }
    item.loss = worker.loss;
    if (problem.gradients && item.parts == 1) finish<Real>(problem, &item);
}

}  // namespace

int64_t attention_kl_scratch(const Problem& problem, int64_t pairs) {
    int64_t most = 0;
    for (int64_t i = 0; i < pairs; i++) {
        const Pair& pair = problem.pairs[i];
        const int64_t size = problem.f64 ? Scratch<double>(problem, pair, nullptr).size
                                         : Scratch<float>(problem, pair, nullptr).size;
        most = size > most ? size : most;
    }
    return most;
}

int64_t attention_kl_grad_key(const Problem& problem, const Item& item) {
    return problem.f64 ? grad_key_bytes<double>(problem, item)
                       : grad_key_bytes<float>(problem, item);
}

void attention_kl_item(const Problem& problem, Item& item, const Item* next, char* scratch) {
    if (problem.f64) {
        run<double>(problem, item, next, scratch);
    } else {
        run<float>(problem, item, next, scratch);
    }
}

void attention_kl_finish(const Problem& problem, const Item* shares) {
    if (problem.f64) {
        finish<double>(problem, shares);
    } else {
        finish<float>(problem, shares);
    }
}

}  // namespace KDFAST_ISA
