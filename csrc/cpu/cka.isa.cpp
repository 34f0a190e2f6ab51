// Inner products of centred Gram matrices, and their gradients.
//
// With X_c the centred valid rows of a layer and unit = |X_c|^2, G = X_c X_c^T / unit:
//
//     gram      <G_i, G_j> = sum of G_i o G_j;   dX_i = 2 / unit_i  (sum_j c_ij G_j) X_i
//     feature   C_ij = X_i^T X_j / root(unit_i unit_j), <G_i, G_j> = |C_ij|^2;
//               dX_i = 2 / root(unit_i)  sum_j c_ij (X_j / root(unit_j)) C_ji
//     tiles     as gram, one tile of G at a time, made again for the gradient. For rbf kernels
//               G = (exp(-D / 2 sigma^2) - c) / unit, and with M the gradient with respect to G and
//               W = M o exp(-D / 2 sigma^2), dX = 2 / (sigma^2 unit)  (W - diag(W 1)) X_c
//
// c_ij are the upstream gradients of the pairs, doubled for a layer with itself. Features are centred
// where they are packed: nothing holds a centred copy.

#include "cka.h"
#include "product.h"

namespace KDFAST_ISA {

using namespace cka;

namespace {

constexpr int64_t GROUP = 192;  // columns that are packed at once: whole panels of every width

// More of them where rows are few, so that memory is read in longer pieces.
static int64_t group_of(int64_t rows) {
    return rows <= 32 ? 4 * GROUP : rows <= 64 ? 2 * GROUP : GROUP;
}

template <class Real>
struct Memory {
    char* start;
    int64_t size = 0;

    Real* take(int64_t n) {
        Real* found = reinterpret_cast<Real*>(start + size);
        size += round_up(n * int64_t(sizeof(Real)), 64);
        return found;
    }
};

template <class Real>
static Real* of_problem(void* all, int64_t problem, int64_t size) {
    return static_cast<Real*>(all) + problem * size;
}

// Columns from `begin` on of a row: as they lie, or in `copy`.
template <class Real>
static inline const Real* segment(const Problem& problem, const Layer& layer, int64_t index,
                                  int64_t row, int64_t begin, int64_t columns, Real* copy) {
    const int64_t size = size_of(layer.storage);
    const char* at = layer.x + (index * layer.stride[0] + row * layer.stride[1] + begin) * size;
    if (size == int64_t(sizeof(Real))) return reinterpret_cast<const Real*>(at);
    read<Real>(layer.storage, at, columns, Real(1), copy);
    return copy;
}

// Some columns of a layer in one problem. A row is centred by taking the first valid row from it and
// then the mean of what is left, which keeps the digits of features far from zero and makes equal
// rows exactly zero.
template <class Real>
struct Columns {
    const Problem& problem;
    const Layer& layer;
    int64_t index, begin, columns;
    Real factor;
    const Real* mean;
    Real *first, *copy;

    // `buffer`: of buffer_size(columns).
    Columns(const Problem& problem, int64_t l, int64_t index, int64_t begin, int64_t columns,
            Real factor, Real* buffer)
        : problem(problem), layer(problem.layer[l]), index(index), begin(begin), columns(columns),
          factor(factor), mean(of_problem<Real>(layer.means, index, layer.width) + begin),
          first(buffer), copy(buffer + round_up(columns, 64)) {
        const Real* row = segment<Real>(problem, layer, index, problem.rows[index].index[0], begin,
                                        columns, copy);
        for (int64_t c = 0; c < columns; c++) first[c] = row[c];
    }

    static int64_t buffer_size(int64_t columns) { return 2 * round_up(columns, 64); }

    // The number-th valid row, zero from `columns` to `stride`.
    void row(int64_t number, int64_t stride, Real* out) const {
        const Real* x = segment<Real>(problem, layer, index, problem.rows[index].index[number],
                                      begin, columns, copy);
        for (int64_t c = 0; c < columns; c++) out[c] = ((x[c] - first[c]) - mean[c]) * factor;
        for (int64_t c = columns; c < stride; c++) out[c] = 0;
    }

    // Rows from `from` on, `padded` of them, zero from `count` on.
    void rows(int64_t from, int64_t count, int64_t padded, int64_t stride, Real* out) const {
        for (int64_t r = 0; r < count; r++) row(from + r, stride, out + r * stride);
        memset(out + count * stride, 0, (padded - count) * stride * sizeof(Real));
    }

    Vec<Real> vector(const Real* x, int64_t c) const {
        return ((load<Real>(x + c) - load<Real>(first + c)) - load<Real>(mean + c)) * factor;
    }

    // Rows from `from` on as panels.
    void packed(int64_t from, int64_t count, const Panels<Real>& panels, Real* line,
                Real* out) const {
        const bool whole = panels.columns() == columns;
        for (int64_t r = 0; r < count; r++) {
            const Real* x = segment<Real>(problem, layer, index,
                                          problem.rows[index].index[from + r], begin, columns, copy);
            if (!whole) row(from + r, panels.columns(), line);
            for (int64_t p = 0; p < panels.count; p++) {
                const int64_t at = panels.begin(p), width = panels.width(p);
                Real* to = out + at * count + r * width;
                if (whole && width == WIDEST<Real>) {
#pragma GCC unroll 3
                    for (int64_t c = 0; c < WIDEST<Real>; c += LANES<Real>) {
                        store<Real>(to + c, vector(x, at + c));
                    }
                    continue;
                }
                for (int64_t c = 0; c < width; c += LANES<Real>) {
                    store<Real>(to + c, whole ? vector(x, at + c) : load<Real>(line + at + c));
                }
            }
        }
    }
};

// Sum over a range of columns of (x - first) and of its square, of all valid rows.
template <class Real>
static double means(const Problem& problem, int64_t l, int64_t index, int64_t begin, int64_t end,
                    char* scratch) {
    const Layer& layer = problem.layer[l];
    const Rows& rows = problem.rows[index];
    const int64_t columns = end - begin;
    Memory<Real> memory{scratch};
    Real *first = memory.take(columns), *copy = memory.take(columns);
    Real *sum = memory.take(columns), *square = memory.take(columns);
    double* total = reinterpret_cast<double*>(memory.take(4 * columns));
    double* total_square = total + columns;
    const Real* row = segment<Real>(problem, layer, index, rows.index[0], begin, columns, copy);
    for (int64_t c = 0; c < columns; c++) first[c] = row[c];
    for (int64_t c = 0; c < 2 * columns; c++) total[c] = 0;
    for (int64_t done = 0; done < rows.count; done += DEPTH) {
        for (int64_t c = 0; c < columns; c++) sum[c] = square[c] = 0;
        for (int64_t r = done; r < least(done + DEPTH, rows.count); r++) {
            const Real* x =
                segment<Real>(problem, layer, index, rows.index[r], begin, columns, copy);
            for (int64_t c = 0; c < columns; c++) {
                const Real shifted = x[c] - first[c];
                sum[c] += shifted;
                square[c] += shifted * shifted;
            }
        }
        for (int64_t c = 0; c < columns; c++) {
            total[c] += sum[c];
            total_square[c] += square[c];
        }
    }
    Real* mean = of_problem<Real>(layer.means, index, layer.width) + begin;
    double squares = 0;
    for (int64_t c = 0; c < columns; c++) {
        mean[c] = Real(total[c] / double(rows.count));
        const double around = total_square[c] - total[c] * (total[c] / double(rows.count));
        squares += around < 0 ? 0 : around;
    }
    return squares;
}

// The means of some columns over all valid rows, without the squares.
template <class Real>
static void mean_of(const Problem& problem, int64_t l, int64_t index, int64_t begin, int64_t columns,
                    char* scratch) {
    const Layer& layer = problem.layer[l];
    const Rows& rows = problem.rows[index];
    Memory<Real> memory{scratch};
    Real* first = memory.take(columns);
    Real* copy = memory.take(columns);
    Real* mean = of_problem<Real>(layer.means, index, layer.width) + begin;
    const Real* row = segment<Real>(problem, layer, index, rows.index[0], begin, columns, copy);
    for (int64_t c = 0; c < columns; c++) first[c] = row[c];
    for (int64_t c = 0; c < columns; c++) mean[c] = 0;
    int64_t r = 1;
    if (size_of(layer.storage) == int64_t(sizeof(Real))) {
        for (; r + 4 <= rows.count; r += 4) {  // one pass over the sums for four rows
            const Real* x[4];
            for (int i = 0; i < 4; i++) {
                x[i] = segment<Real>(problem, layer, index, rows.index[r + i], begin, columns, copy);
            }
            for (int64_t c = 0; c < columns; c++) {
                mean[c] += ((x[0][c] - first[c]) + (x[1][c] - first[c])) +
                           ((x[2][c] - first[c]) + (x[3][c] - first[c]));
            }
        }
    }
    for (; r < rows.count; r++) {
        const Real* x = segment<Real>(problem, layer, index, rows.index[r], begin, columns, copy);
        for (int64_t c = 0; c < columns; c++) mean[c] += x[c] - first[c];
    }
    for (int64_t c = 0; c < columns; c++) mean[c] /= Real(rows.count);
}

// What the features are multiplied by, so that products of theirs are in units.
template <class Real>
static Real root_factor(const Problem& problem, int64_t l, int64_t index) {
    if (problem.rbf) return 1;
    return Real(1 / __builtin_sqrt(double(static_cast<Real*>(problem.layer[l].unit)[index])));
}

template <class Real>
static double inner_product(const Real* x, const Real* y, int64_t n) {
    double total = 0;
    int64_t c = 0;
    while (c + 4 * LANES<Real> <= n) {  // shorter sums round less
        const int64_t end = least(c + 4096, n);
        Vec<Real> part[4] = {};
        for (; c + 4 * LANES<Real> <= end; c += 4 * LANES<Real>) {
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) {
                part[v] += load<Real>(x + c + v * LANES<Real>) * load<Real>(y + c + v * LANES<Real>);
            }
        }
        total += double(sum<Real>((part[0] + part[1]) + (part[2] + part[3])));
    }
    for (; c < n; c++) total += double(x[c]) * double(y[c]);
    return total;
}

// Gram side

// Columns that are packed at once: few enough to stay in the second cache.
constexpr int64_t CHUNK_BYTES = int64_t(96) << 10, LONGEST_CHUNK = 1024;

template <class Real>
static int64_t chunk_of(int64_t rows) {
    const int64_t fitting = CHUNK_BYTES / int64_t(sizeof(Real)) / most(rows, 1);
    return least(most(fitting / 64 * 64, 64), LONGEST_CHUNK);
}

template <class Real>
static int64_t gram_part_scratch(const Problem& problem) {
    // Fewer valid rows have longer chunks.
    const int64_t largest = most(padded(problem.n) * chunk_of<Real>(problem.n),
                                 CHUNK_BYTES / int64_t(sizeof(Real)) + 48 * LONGEST_CHUNK);
    Memory<Real> memory{nullptr};
    memory.take(largest), memory.take(largest);
    memory.take(Columns<Real>::buffer_size(LONGEST_CHUNK)), memory.take(2 * LONGEST_CHUNK);
    return memory.size;
}

// Some columns of all valid rows, to be fetched ahead.
static Ahead ahead_of(const Problem& problem, int64_t l, int64_t index, int64_t begin,
                      int64_t columns) {
    const Layer& layer = problem.layer[l];
    const int64_t size = size_of(layer.storage);
    Ahead ahead;
    ahead.start = layer.x + (index * layer.stride[0] + begin) * size;
    ahead.stride = layer.stride[1] * size;
    ahead.bytes = columns * size;
    ahead.rows = problem.rows[index].count;
    ahead.index = problem.rows[index].index;
    return ahead;
}

// sum [padded rows][columns of panels] = X_c X_c^T over some columns, whose means are taken here.
template <class Real>
static void gram_part(const Problem& problem, const Part& part, const Part& next, Real* sum,
                      char* scratch) {
    const int64_t l = part.layer, index = part.problem, begin = part.begin, end = part.end;
    const int64_t n = problem.rows[index].count, chunk = chunk_of<Real>(n);
    const Panels<Real> panels(n);
    const int64_t stride = panels.columns();
    Memory<Real> memory{scratch};
    Real *rows = memory.take(padded(n) * chunk), *packed = memory.take(padded(n) * chunk);
    Real* buffer = memory.take(Columns<Real>::buffer_size(chunk));
    for (int64_t column = begin; column < end; column += chunk) {
        const int64_t columns = least(chunk, end - column), depth = round_up(columns, LANES<Real>);
        mean_of<Real>(problem, l, index, column, columns, scratch + memory.size);
        const Columns<Real> x(problem, l, index, column, columns, Real(1), buffer);
        x.rows(0, n, padded(n), depth, rows);
        pack_transposed<Real>(rows, depth, depth, panels, packed);
        Ahead ahead;
        if (column + chunk < end) {
            ahead = ahead_of(problem, l, index, column + chunk, least(chunk, end - column - chunk));
        } else if (next.layer >= 0) {
            const int64_t length = chunk_of<Real>(problem.rows[next.problem].count);
            ahead = ahead_of(problem, next.layer, next.problem, next.begin,
                             least(length, next.end - next.begin));
        }
        multiply<Real>(Left<Real>::by_rows(rows, depth), n, packed, panels, depth, sum, stride, column == begin, true,
                       &ahead);
    }
}

// The lower triangle of a symmetric matrix [n][stride] from the upper one, by blocks where they are
// whole.
template <class Real>
static void mirror(Real* matrix, int64_t n, int64_t stride) {
    constexpr int64_t lanes = LANES<Real>;
    for (int64_t r = 0; r < n; r += lanes) {
        const int64_t beside = r + lanes, whole = beside < n ? (n - beside) / lanes * lanes : 0;
        if (whole > 0) {
            transpose<Real>(matrix + r * stride + beside, stride, whole,
                            matrix + beside * stride + r, stride);
        }
        for (int64_t i = r; i < least(beside, n); i++) {
            for (int64_t c = i + 1; c < least(beside, n); c++) {
                matrix[c * stride + i] = matrix[i * stride + c];
            }
            for (int64_t c = beside + whole; c < n; c++) {
                matrix[c * stride + i] = matrix[i * stride + c];
            }
        }
    }
}

template <class Real>
static void gram_finish(const Problem& problem, int64_t l, int64_t index, Real* sums,
                        int64_t parts) {
    const Layer& layer = problem.layer[l];
    const int64_t n = problem.rows[index].count, stride = problem.n;
    // Parts lie as far apart as those of a problem without dropped rows.
    const int64_t step = padded(problem.n) * Panels<Real>(problem.n).columns();
    const int64_t width = Panels<Real>(n).columns();
    for (int64_t part = 1; part < parts; part++) {
        for (int64_t i = 0; i < padded(n) * width; i++) sums[i] += sums[part * step + i];
    }
    double trace = 0;
    for (int64_t r = 0; r < n; r++) trace += double(sums[r * width + r]);
    const Real unit = trace == 0 ? Real(1) : Real(trace), factor = Real(1) / unit;
    static_cast<Real*>(layer.unit)[index] = unit;
    Real* gram = of_problem<Real>(layer.gram, index, stride * stride);
    for (int64_t r = 0; r < n; r++) {
        for (int64_t c = r; c < n; c++) gram[r * stride + c] = sums[r * width + c] * factor;
    }
    mirror<Real>(gram, n, stride);
    for (int64_t r = 0; r < stride && n < stride; r++) {
        const int64_t from = r < n ? n : 0;
        memset(gram + r * stride + from, 0, (stride - from) * sizeof(Real));
    }
}

// Centring of a matrix G of rows as the estimator asks: G_ab + p_a + p_b + q, with a zero diagonal
// where that is unbiased.
template <class Real>
struct Centring {
    Real* p;  // [n], or null where there is nothing to add
    Real q = 0;

    Centring(const Problem& problem, int64_t l, int64_t index, Real* buffer) : p(nullptr) {
        const Layer& layer = problem.layer[l];
        const int64_t n = problem.rows[index].count;
        if (!problem.rbf && !problem.unbiased) return;
        p = buffer;
        double total = 0;
        // The sums of the rows of G, less its diagonal where that does not take part.
        for (int64_t a = 0; a < n; a++) {
            double sum;
            if (layer.sums != nullptr) {
                sum = double(of_problem<Real>(layer.sums, index, problem.n)[a]);
            } else {  // centred rows add up to 0, with the diagonal
                sum = -double(of_problem<Real>(layer.norms, index, problem.n)[a]);
            }
            total += sum;
            p[a] = Real(-sum / double(problem.unbiased ? n - 2 : n));
        }
        q = Real(total / (problem.unbiased ? double(n - 1) * double(n - 2) : double(n) * double(n)));
    }
};

// The sums of the rows of G without its diagonal.
template <class Real>
static void gram_sums(const Problem& problem, int64_t l, int64_t index) {
    const int64_t n = problem.rows[index].count, stride = problem.n;
    const Real* gram = of_problem<Real>(problem.layer[l].gram, index, stride * stride);
    Real* sums = of_problem<Real>(problem.layer[l].sums, index, stride);
    for (int64_t a = 0; a < n; a++) {
        double sum = 0;
        for (int64_t b = 0; b < n; b++) sum += b == a ? 0 : double(gram[a * stride + b]);
        sums[a] = Real(sum);
    }
}

template <class Real>
static int64_t gram_inner_scratch(const Problem& problem) {
    Memory<Real> memory{nullptr};
    for (int64_t l = 0; l < problem.layers; l++) memory.take(problem.n), memory.take(problem.n);
    return memory.size + problem.layers * int64_t(sizeof(Centring<Real>) + sizeof(Real*)) + 256;
}

template <class Real>
static void gram_inner(const Problem& problem, int64_t index, int64_t begin, int64_t end,
                       double* inner, char* scratch) {
    const int64_t n = problem.rows[index].count, stride = problem.n;
    Memory<Real> memory{scratch};
    Centring<Real>* centring = reinterpret_cast<Centring<Real>*>(
        memory.take(problem.layers * int64_t(sizeof(Centring<Real>)) / int64_t(sizeof(Real)) + 1));
    Real** line = reinterpret_cast<Real**>(
        memory.take(problem.layers * int64_t(sizeof(Real*)) / int64_t(sizeof(Real)) + 1));
    for (int64_t l = 0; l < problem.layers; l++) {
        centring[l] = Centring<Real>(problem, l, index, memory.take(stride));
        line[l] = memory.take(stride);
    }
    for (int64_t k = 0; k < 2 * problem.pairs; k++) inner[k] = 0;
    for (int64_t a = begin; a < end; a++) {
        const auto row = [&](int64_t l) {
            return of_problem<Real>(problem.layer[l].gram, index, stride * stride) + a * stride;
        };
        // Both triangles are alike: the upper one twice, and the diagonal.
        const int64_t beside = a + 1, left = n - beside;
        for (int64_t k = 0; k < problem.pairs; k++) {
            const Pair& pair = problem.pair[k];
            if (problem.unbiased && pair.i != pair.j) continue;
            const Real *x = row(pair.i), *y = row(pair.j);
            inner[2 * k + 1] += 2 * inner_product<Real>(x + beside, y + beside, left);
            if (!problem.unbiased) inner[2 * k + 1] += double(x[a]) * double(y[a]);
        }
        if (!problem.unbiased) continue;
        for (int64_t l = 0; l < problem.layers; l++) {
            const Real *x = row(l), *p = centring[l].p, shift = p[a] + centring[l].q;
            for (int64_t b = beside; b < n; b++) line[l][b] = x[b] + (p[b] + shift);
        }
        for (int64_t k = 0; k < problem.pairs; k++) {
            const Real *x = line[problem.pair[k].i], *y = line[problem.pair[k].j];
            inner[2 * k] += 2 * inner_product<Real>(x + beside, y + beside, left);
        }
    }
    for (int64_t k = 0; k < problem.pairs && !problem.unbiased; k++) inner[2 * k] = inner[2 * k + 1];
}

// M = sum_j c_ij (G_j, centred) of rows `begin` to `end`; the p and q of all j together.
template <class Real>
struct Gradient {
    const double* coefficient;  // [layers]
    Real *p, q = 0;
    bool centred;

    Gradient(const Problem& problem, int64_t l, int64_t index, Real* p, Real* buffer)
        : coefficient(problem.coefficient + (index * problem.layers + l) * problem.layers), p(p) {
        const int64_t n = problem.rows[index].count;
        centred = problem.rbf || problem.unbiased;
        for (int64_t a = 0; a < n && centred; a++) p[a] = 0;
        for (int64_t j = 0; j < problem.layers && centred; j++) {
            if (coefficient[j] == 0) continue;
            const Centring<Real> other(problem, j, index, buffer);
            const Real c = Real(coefficient[j]);
            for (int64_t a = 0; a < n; a++) p[a] += c * other.p[a];
            q += c * other.q;
        }
    }

    // out [columns] = a row of M from column `begin` on, given those of all G.
    template <class Row>
    void row(const Problem& problem, int64_t a, int64_t begin, int64_t columns, const Row& gram,
             Real* out) const {
        const Real shift = centred ? p[a] + q : Real(0);
        for (int64_t b = 0; b < columns; b++) out[b] = centred ? p[begin + b] + shift : Real(0);
        for (int64_t j = 0; j < problem.layers; j++) {
            if (coefficient[j] == 0) continue;
            const Real *x = gram(j), c = Real(coefficient[j]);
            for (int64_t b = 0; b < columns; b++) out[b] += c * x[b];
        }
        if (problem.unbiased && a >= begin && a < begin + columns) out[a - begin] = 0;
    }
};

// The gradient of the number-th valid row, and zero in the rows beside it that are dropped.
static void put_row(const Problem& problem, int64_t l, int64_t index, int64_t number,
                    int64_t column, int64_t columns, const char* row, double factor) {
    const Layer& layer = problem.layer[l];
    const int64_t size = size_of(layer.storage);
    const int64_t at = (index * problem.n + problem.rows[index].index[number]) * layer.width;
    char* out = layer.grad + (at + column) * size;
    if (problem.f64) {
        write<double>(F64, reinterpret_cast<const double*>(row), columns, factor, out);
    } else {
        write<float>(layer.storage, reinterpret_cast<const float*>(row), columns, float(factor),
                     out);
    }
}

template <class Real>
static int64_t gram_gradient_scratch(const Problem& problem) {
    const int64_t n = problem.n, widest = 4 * GROUP;
    Memory<Real> memory{nullptr};
    memory.take(n), memory.take(n);
    memory.take(padded(GRAM_ROWS) * n);
    memory.take(Columns<Real>::buffer_size(widest)), memory.take(widest);
    memory.take(most(64 * widest, GROUP * least(n, DEPTH)));
    memory.take(most(padded(64) * widest, padded(GRAM_ROWS) * GROUP));
    return memory.size;
}

template <class Real>
static void gram_gradient(const Problem& problem, const Part& part, const Part& next,
                          char* scratch) {
    const int64_t l = part.layer, index = part.problem;
    const Layer& layer = problem.layer[l];
    const int64_t n = problem.rows[index].count, rows = least(GRAM_ROWS, n - part.row);
    const int64_t group = group_of(n);
    Memory<Real> memory{scratch};
    Real* p = memory.take(n);
    const Gradient<Real> gradient(problem, l, index, p, memory.take(n));
    Real* m = memory.take(padded(rows) * n);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t a = part.row + r;
        const auto gram = [&](int64_t j) {
            return of_problem<Real>(problem.layer[j].gram, index, problem.n * problem.n) +
                   a * problem.n;
        };
        gradient.row(problem, a, 0, n, gram, m + r * n);
    }
    memset(m + rows * n, 0, (padded(rows) - rows) * n * sizeof(Real));
    Real *buffer = memory.take(Columns<Real>::buffer_size(group)), *line = memory.take(group);
    Real *packed = memory.take(group * least(n, DEPTH)), *sum = memory.take(padded(rows) * group);
    const double factor = 2 / double(static_cast<Real*>(layer.unit)[index]);
    for (int64_t column = part.begin; column < part.end; column += group) {
        const int64_t columns = least(group, part.end - column);
        const Panels<Real> panels(columns);
        const Columns<Real> x(problem, l, index, column, columns, Real(1), buffer);
        for (int64_t k = 0; k < n; k += DEPTH) {
            const int64_t depth = least(DEPTH, n - k);
            x.packed(k, depth, panels, line, packed);
            Ahead ahead;
            if (k + DEPTH >= n && column + group < part.end) {
                ahead = ahead_of(problem, l, index, column + group,
                                 least(group, part.end - column - group));
            } else if (k + DEPTH >= n && next.layer >= 0) {
                ahead = ahead_of(problem, next.layer, next.problem, next.begin,
                                 least(group, next.end - next.begin));
            }
            multiply<Real>(Left<Real>::by_rows(m + k, n), rows, packed, panels, depth, sum,
                           panels.columns(), k == 0, false, &ahead);
        }
        for (int64_t r = 0; r < rows; r++) {
            put_row(problem, l, index, part.row + r, column, columns,
                    reinterpret_cast<const char*>(sum + r * panels.columns()), factor);
        }
    }
}

// Feature side

constexpr int64_t SLICE = 128;  // rows of all layers that are packed at once

template <class Real>
static int64_t wide(int64_t columns) {
    return round_up(columns, WIDEST<Real>);
}

// Numbers of a product, padded.
template <class Real>
static int64_t product_size(const Problem& problem, const Pair& pair) {
    return padded(problem.layer[pair.i].width) * wide<Real>(problem.layer[pair.j].width);
}

template <class Real>
static int64_t feature_bytes(const Problem& problem) {
    int64_t size = 0;
    for (int64_t k = 0; k < problem.pairs; k++) size += product_size<Real>(problem, problem.pair[k]);
    return size * int64_t(sizeof(Real));
}

template <class Real>
static int64_t feature_part_scratch(const Problem& problem) {
    Memory<Real> memory{nullptr};
    for (int64_t l = 0; l < problem.layers; l++) {
        const int64_t width = wide<Real>(problem.layer[l].width);
        memory.take(Columns<Real>::buffer_size(width));
        memory.take(SLICE * wide<Real>(padded(width)));
        memory.take(width);
    }
    return memory.size;
}

// sums = the products of all pairs over some rows, padded, one after the other.
template <class Real>
static void feature_part(const Problem& problem, int64_t index, int64_t begin, int64_t end,
                         Real* sums, char* scratch) {
    for (int64_t a = begin; a < end; a += SLICE) {
        const int64_t depth = least(SLICE, end - a);
        // Each layer is packed once, and serves as either operand.
        Memory<Real> memory{scratch};
        const auto packed = [&](int64_t l) {
            int64_t before = 0;
            for (int64_t i = 0; i < l; i++) {
                before += SLICE * wide<Real>(padded(wide<Real>(problem.layer[i].width)));
            }
            return reinterpret_cast<Real*>(scratch) + before;
        };
        memory.size = (packed(problem.layers) - packed(0)) * int64_t(sizeof(Real));
        const int64_t rest = memory.size;
        for (int64_t l = 0; l < problem.layers; l++) {
            memory.size = rest;
            const int64_t width = problem.layer[l].width;
            Real* buffer = memory.take(Columns<Real>::buffer_size(width));
            const Columns<Real> x(problem, l, index, 0, width,
                                  root_factor<Real>(problem, l, index), buffer);
            x.packed(a, depth, Panels<Real>(wide<Real>(width)), memory.take(wide<Real>(width)),
                     packed(l));
        }
        Real* sum = sums;
        for (int64_t k = 0; k < problem.pairs; k++) {
            const Pair& pair = problem.pair[k];
            const int64_t columns = wide<Real>(problem.layer[pair.j].width);
            multiply<Real>(Left<Real>::by_panels(packed(pair.i), depth),
                           problem.layer[pair.i].width, packed(pair.j), Panels<Real>(columns),
                           depth, sum, columns, a == begin, pair.i == pair.j);
            sum += product_size<Real>(problem, pair);
        }
    }
}

// A product from several sums, which lie `step` numbers apart.
template <class Real>
static void feature_finish(const Problem& problem, int64_t k, int64_t index, Real* sums,
                           int64_t parts, int64_t step) {
    const Pair& pair = problem.pair[k];
    for (int64_t before = 0; before < k; before++) {
        sums += product_size<Real>(problem, problem.pair[before]);
    }
    const int64_t rows = problem.layer[pair.i].width, columns = problem.layer[pair.j].width;
    const int64_t stride = wide<Real>(columns);
    for (int64_t part = 1; part < parts; part++) {
        for (int64_t i = 0; i < rows * stride; i++) sums[i] += sums[part * step + i];
    }
    Real* product = of_problem<Real>(pair.product, index, rows * columns);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t from = pair.i == pair.j ? r : 0;
        for (int64_t c = from; c < columns; c++) product[r * columns + c] = sums[r * stride + c];
    }
    if (pair.i == pair.j) mirror<Real>(product, rows, columns);
}

// B = c_ij X_j^T X_i [width of j, padded][panels of the width of i], over the roots of the units.
template <class Real>
static void feature_pack(const Problem& problem, int64_t l, int64_t other, int64_t index,
                         Real* packed, char* scratch) {
    const int64_t rows = problem.layer[other].width, columns = problem.layer[l].width;
    const int64_t depth = round_up(rows, LANES<Real>);
    const Real c =
        Real(problem.coefficient[(index * problem.layers + l) * problem.layers + other]);
    const Panels<Real> panels(columns);
    int64_t k = 0;
    while (!((problem.pair[k].i == l && problem.pair[k].j == other) ||
             (problem.pair[k].i == other && problem.pair[k].j == l))) {
        k++;
    }
    const bool transposed = problem.pair[k].i == l;  // product [columns][rows]; of l itself either
    const Real* product = of_problem<Real>(problem.pair[k].product, index, rows * columns);
    Real* line = reinterpret_cast<Real*>(scratch);
    for (int64_t p = 0; p < panels.count; p++) {
        const int64_t begin = panels.begin(p), width = panels.width(p);
        Real* to = packed + begin * depth;
        if (transposed) {
            for (int64_t v = 0; v < width; v += LANES<Real>) {
                for (int64_t i = 0; i < LANES<Real>; i++) {
                    const int64_t column = begin + v + i, n = column < columns ? rows : 0;
                    Real* out = line + i * depth;
                    for (int64_t r = 0; r < n; r++) out[r] = c * product[column * rows + r];
                    for (int64_t r = n; r < depth; r++) out[r] = 0;
                }
                transpose<Real>(line, depth, depth, to + v, width);
            }
            continue;
        }
        const int64_t inside = least(width, columns - begin);
        for (int64_t r = 0; r < depth; r++, to += width) {
            const int64_t n = r < rows ? inside : 0;
            for (int64_t i = 0; i < n; i++) to[i] = c * product[r * columns + begin + i];
            for (int64_t i = n; i < width; i++) to[i] = 0;
        }
    }
}

// What centring adds to every row of the gradient for the unbiased estimator:
// sum_j c_ij delta_j^T X_i / (n - 2), delta_j being the squared norms of the rows of j.
template <class Real>
static void feature_shift(const Problem& problem, int64_t l, int64_t index, Real* shift,
                          char* scratch) {
    const int64_t width = problem.layer[l].width, n = problem.rows[index].count;
    const double* c = problem.coefficient + (index * problem.layers + l) * problem.layers;
    Memory<Real> memory{scratch};
    Real *buffer = memory.take(Columns<Real>::buffer_size(width)), *line = memory.take(width);
    const Columns<Real> x(problem, l, index, 0, width, root_factor<Real>(problem, l, index), buffer);
    for (int64_t i = 0; i < width; i++) shift[i] = 0;
    for (int64_t a = 0; a < n; a++) {
        double weight = 0;
        for (int64_t j = 0; j < problem.layers; j++) {
            if (c[j] == 0) continue;
            weight += c[j] * double(of_problem<Real>(problem.layer[j].norms, index, problem.n)[a]);
        }
        x.row(a, width, line);
        const Real factor = Real(weight / double(n - 2));
        for (int64_t i = 0; i < width; i++) shift[i] += factor * line[i];
    }
}

template <class Real>
static int64_t feature_gradient_scratch(const Problem& problem) {
    int64_t widest = 0;
    for (int64_t l = 0; l < problem.layers; l++) widest = most(widest, problem.layer[l].width);
    widest = Panels<Real>(widest).columns();
    Memory<Real> memory{nullptr};
    memory.take(Columns<Real>::buffer_size(widest)), memory.take(widest);
    memory.take(ROWS_A_SHARE * widest), memory.take(ROWS_A_SHARE * widest);
    return memory.size;
}

template <class Real>
static void feature_gradient(const Problem& problem, int64_t l, int64_t index, int64_t begin,
                             int64_t end, const char* const* packed, const Real* shift,
                             char* scratch) {
    const Layer& layer = problem.layer[l];
    const int64_t rows = end - begin;
    const int64_t n = problem.rows[index].count;
    const double* c = problem.coefficient + (index * problem.layers + l) * problem.layers;
    const Panels<Real> panels(layer.width);
    int64_t widest = 0;
    for (int64_t j = 0; j < problem.layers; j++) widest = most(widest, problem.layer[j].width);
    widest = Panels<Real>(widest).columns();
    Memory<Real> memory{scratch};
    Real *buffer = memory.take(Columns<Real>::buffer_size(widest)), *line = memory.take(widest);
    Real *x = memory.take(ROWS_A_SHARE * widest), *sum = memory.take(ROWS_A_SHARE * widest);
    bool first = true;
    for (int64_t j = 0; j < problem.layers; j++) {
        if (packed[j] == nullptr) continue;
        const int64_t width = problem.layer[j].width, depth = round_up(width, LANES<Real>);
        const Columns<Real> columns(problem, j, index, 0, width,
                                    root_factor<Real>(problem, j, index), buffer);
        columns.rows(begin, rows, padded(rows), depth, x);
        multiply<Real>(Left<Real>::by_rows(x, depth), rows, reinterpret_cast<const Real*>(packed[j]), panels, depth,
                       sum, panels.columns(), first);
        first = false;
    }
    if (first) memset(sum, 0, rows * panels.columns() * sizeof(Real));
    const Real root = root_factor<Real>(problem, l, index);
    if (problem.unbiased && !first) {
        const Columns<Real> own(problem, l, index, 0, layer.width, root, buffer);
        for (int64_t r = 0; r < rows; r++) {
            double weight = 0;
            for (int64_t j = 0; j < problem.layers; j++) {
                if (c[j] == 0) continue;
                const Real* norms = of_problem<Real>(problem.layer[j].norms, index, problem.n);
                const double total = problem.total[index * problem.layers + j];
                weight += c[j] * (total / (double(n - 1) * double(n - 2)) -
                                  double(n) / double(n - 2) * double(norms[begin + r]));
            }
            own.row(begin + r, panels.columns(), line);
            Real* to = sum + r * panels.columns();
            for (int64_t i = 0; i < layer.width; i++) to[i] += Real(weight) * line[i] + shift[i];
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        put_row(problem, l, index, begin + r, 0, layer.width,
                reinterpret_cast<const char*>(sum + r * panels.columns()), 2 * double(root));
    }
}

// Tiles

// exp(-D / 2 sigma^2) = G unit + c
template <class Real>
struct Rbf {
    Real level = 0, half = 0, unit = 1;  // c, 1 / (2 sigma^2)
    Real middle = 0;                     // mean squared distance of two different rows
    double slope = 0;                    // 2 / (sigma^2 unit)

    Rbf(const Problem& problem, int64_t l, int64_t index) {
        const Layer& layer = problem.layer[l];
        const int64_t n = problem.rows[index].count;
        const double mean = 2 * problem.total[index * problem.layers + l] / double(n - 1);
        double variance = layer.sigma * layer.sigma;
        if (layer.sigma == 0) variance = mean == 0 ? 1 : mean;
        middle = Real(mean);
        half = Real(0.5 / variance < 1e37 ? 0.5 / variance : 1e37);
        level = Real(__builtin_exp(-0.5 * mean / variance));
        unit = static_cast<Real*>(layer.unit)[index];
        slope = 2 / (variance * double(unit));
    }

    Vec<Real> of(Vec<Real> distance) const {
        // exp(x) - c, by a series where the two are close: a bandwidth much larger than the
        // distances makes all entries nearly equal, and the digits that differ are all that counts.
        using T = Types<Real>;
        const Vec<Real> r = (middle - distance) * half;
        constexpr int terms = int(sizeof(T::EXP) / sizeof(Real));
        Vec<Real> series = splat<Real>(T::EXP[terms - 1]);
#pragma GCC unroll 16
        for (int i = terms - 2; i >= 0; i--) series = series * r + T::EXP[i];
        Ints<Real> none;
        const Vec<Real> whole = exponential<Real>(-distance * half, none) - level;
        const Ints<Real> close = (r < Real(0.34)) & (r > Real(-0.34));
        return (close ? r * series * level : whole) / unit;
    }
};

constexpr int64_t SQUARE = (TILE + 47) / 48 * 48 * TILE;  // numbers of a tile, with its padding
constexpr int64_t ACROSS = 256;  // columns of the features that are multiplied at once

template <class Real>
static int64_t tile_buffers(const Problem&) {
    Memory<Real> memory{nullptr};
    memory.take(Columns<Real>::buffer_size(ACROSS));
    for (int i = 0; i < 3; i++) memory.take(padded(TILE) * ACROSS);
    return memory.size;
}

// G [padded(TILE)][TILE] of rows from i0 and columns from j0 on.
template <class Real>
static void tile_of(const Problem& problem, int64_t l, int64_t index, int64_t i0, int64_t ni,
                    int64_t j0, int64_t nj, Real* out, char* scratch) {
    const Layer& layer = problem.layer[l];
    const Panels<Real> panels(nj);
    Memory<Real> memory{scratch};
    Real* buffer = memory.take(Columns<Real>::buffer_size(ACROSS));
    Real *left = memory.take(padded(TILE) * ACROSS), *right = memory.take(padded(TILE) * ACROSS);
    Real* packed = memory.take(padded(TILE) * ACROSS);
    const Real factor = root_factor<Real>(problem, l, index);
    for (int64_t column = 0; column < layer.width; column += ACROSS) {
        const int64_t columns = least(ACROSS, layer.width - column);
        const int64_t depth = round_up(columns, LANES<Real>);
        const Columns<Real> x(problem, l, index, column, columns, factor, buffer);
        x.rows(i0, ni, padded(ni), depth, left);
        if (i0 != j0) x.rows(j0, nj, padded(nj), depth, right);
        pack_transposed<Real>(i0 == j0 ? left : right, depth, depth, panels, packed);
        multiply<Real>(Left<Real>::by_rows(left, depth), ni, packed, panels, depth, out, TILE, column == 0);
    }
    if (!problem.rbf) return;
    const Rbf<Real> kernel(problem, l, index);
    const Real* norms = of_problem<Real>(layer.norms, index, problem.n);
    const Vec<Real> same = kernel.of(Vec<Real>{});
    Real* beside = packed;
    for (int64_t b = 0; b < panels.columns(); b++) beside[b] = b < nj ? norms[j0 + b] : Real(0);
    for (int64_t a = 0; a < ni; a++) {
        for (int64_t b = 0; b < panels.columns(); b += LANES<Real>) {
            Real* at = out + a * TILE + b;
            const Vec<Real> inner = load<Real>(at);
            const Vec<Real> squared = norms[i0 + a] + load<Real>(beside + b) - (inner + inner);
            store<Real>(at, kernel.of(squared < Real(0) ? Vec<Real>{} : squared));
        }
        // A row is exactly no distance away from itself; NaN stays.
        if (i0 == j0) out[a * TILE + a] = same[0] + Real(0) * norms[i0 + a];
    }
}

template <class Real>
static int64_t tile_scratch(const Problem& problem) {
    return tile_buffers<Real>(problem) + problem.layers * SQUARE * int64_t(sizeof(Real)) + 64;
}

template <class Real>
static void tile(const Problem& problem, int64_t index, int64_t i, int64_t j, double* inner,
                 Real* row_sums, char* scratch) {
    const int64_t n = problem.rows[index].count, i0 = i * TILE, j0 = j * TILE;
    const int64_t ni = least(TILE, n - i0), nj = least(TILE, n - j0);
    Memory<Real> memory{scratch};
    Real* grams = memory.take(problem.layers * SQUARE);
    const int64_t tiles = (problem.n + TILE - 1) / TILE;
    for (int64_t l = 0; l < problem.layers; l++) {
        Real* gram = grams + l * SQUARE;
        tile_of<Real>(problem, l, index, i0, ni, j0, nj, gram, scratch + memory.size);
        for (int64_t a = 0; a < ni && i == j && problem.unbiased; a++) gram[a * TILE + a] = 0;
        if (!problem.rbf) continue;
        // Sums over this tile's columns, and, of the tile that lies opposite, over its rows.
        Real* slots = row_sums + l * tiles * problem.n;
        double down[TILE] = {};
        for (int64_t a = 0; a < ni; a++) {
            double across = 0;
            for (int64_t b = 0; b < nj; b++) {
                across += double(gram[a * TILE + b]);
                down[b] += double(gram[a * TILE + b]);
            }
            slots[j * problem.n + i0 + a] = Real(across);
        }
        for (int64_t b = 0; b < nj && i != j; b++) slots[i * problem.n + j0 + b] = Real(down[b]);
    }
    const double weight = i == j ? 1 : 2;
    for (int64_t k = 0; k < problem.pairs; k++) {
        const Real* x = grams + problem.pair[k].i * SQUARE;
        const Real* y = grams + problem.pair[k].j * SQUARE;
        double sum = 0;
        for (int64_t a = 0; a < ni; a++) {
            sum += inner_product<Real>(x + a * TILE, y + a * TILE, nj);
        }
        inner[k] = weight * sum;
    }
}

template <class Real>
static int64_t tile_gradient_scratch(const Problem& problem) {
    Memory<Real> memory{nullptr};
    int64_t wanted = 0;
    for (int64_t l = 0; l < problem.layers; l++) {
        if (problem.layer[l].grad == nullptr) continue;
        wanted++;
        memory.take(problem.n), memory.take(TILE);
        memory.take(padded(TILE) * Panels<Real>(problem.layer[l].width).columns());
    }
    memory.take(problem.n);
    memory.take(problem.layers * SQUARE), memory.take(SQUARE);
    memory.take(Columns<Real>::buffer_size(GROUP)), memory.take(GROUP), memory.take(GROUP * TILE);
    return memory.size + wanted * int64_t(sizeof(Gradient<Real>)) +
           3 * wanted * int64_t(sizeof(void*)) + 256 + tile_buffers<Real>(problem);
}

template <class Real>
static void tile_gradient(const Problem& problem, int64_t index, int64_t i, char* scratch) {
    const int64_t n = problem.rows[index].count, i0 = i * TILE, ni = least(TILE, n - i0);
    const auto count = [&](int64_t bytes) { return bytes / int64_t(sizeof(Real)) + 1; };
    struct Wanted {
        int64_t layer;
        Gradient<Real> gradient;
        Real *sum, *weight;  // of M X_c [TILE][width], of the rows of W
    };
    Memory<Real> memory{scratch};
    Real* buffer = memory.take(problem.n);
    int64_t many = 0;
    for (int64_t l = 0; l < problem.layers; l++) many += problem.layer[l].grad != nullptr;
    Wanted* wanted = reinterpret_cast<Wanted*>(memory.take(count(many * int64_t(sizeof(Wanted)))));
    many = 0;
    for (int64_t l = 0; l < problem.layers; l++) {
        if (problem.layer[l].grad == nullptr) continue;
        const int64_t size = padded(TILE) * Panels<Real>(problem.layer[l].width).columns();
        Real* p = memory.take(problem.n);
        wanted[many++] = Wanted{l, Gradient<Real>(problem, l, index, p, buffer), memory.take(size),
                                memory.take(TILE)};
    }
    Real *grams = memory.take(problem.layers * SQUARE), *m = memory.take(SQUARE);
    Real *around = memory.take(Columns<Real>::buffer_size(GROUP)), *line = memory.take(GROUP);
    Real* packed = memory.take(GROUP * TILE);
    for (int64_t w = 0; w < many; w++) memset(wanted[w].weight, 0, TILE * sizeof(Real));
    for (int64_t j0 = 0; j0 < n; j0 += TILE) {
        const int64_t nj = least(TILE, n - j0);
        for (int64_t l = 0; l < problem.layers; l++) {
            bool needed = problem.rbf && problem.layer[l].grad != nullptr;
            for (int64_t w = 0; w < many; w++) needed |= wanted[w].gradient.coefficient[l] != 0;
            if (!needed) continue;
            tile_of<Real>(problem, l, index, i0, ni, j0, nj, grams + l * SQUARE,
                          scratch + memory.size);
        }
        for (int64_t w = 0; w < many; w++) {
            const int64_t l = wanted[w].layer, width = problem.layer[l].width;
            const int64_t stride = Panels<Real>(width).columns();
            const Rbf<Real> kernel(problem, l, index);
            for (int64_t a = 0; a < ni; a++) {
                Real* row = m + a * TILE;
                const auto gram = [&](int64_t k) { return grams + k * SQUARE + a * TILE; };
                wanted[w].gradient.row(problem, i0 + a, j0, nj, gram, row);
                if (!problem.rbf) continue;
                Real sum = 0;
                for (int64_t b = 0; b < nj; b++) {
                    row[b] *= gram(l)[b] * kernel.unit + kernel.level;
                    sum += row[b];
                }
                wanted[w].weight[a] += sum;
            }
            for (int64_t a = ni; a < padded(ni); a++) {
                memset(m + a * TILE, 0, TILE * sizeof(Real));
            }
            for (int64_t column = 0; column < width; column += GROUP) {
                const int64_t columns = least(GROUP, width - column);
                const Panels<Real> panels(columns);
                const Columns<Real> x(problem, l, index, column, columns, Real(1), around);
                x.packed(j0, nj, panels, line, packed);
                multiply<Real>(Left<Real>::by_rows(m, TILE), ni, packed, panels, nj, wanted[w].sum + column, stride,
                               j0 == 0);
            }
        }
    }
    for (int64_t w = 0; w < many; w++) {
        const int64_t l = wanted[w].layer, width = problem.layer[l].width;
        const int64_t stride = Panels<Real>(width).columns();
        double factor = 2 / double(static_cast<Real*>(problem.layer[l].unit)[index]);
        if (problem.rbf) factor = Rbf<Real>(problem, l, index).slope;
        for (int64_t column = 0; column < width; column += GROUP) {
            const int64_t columns = least(GROUP, width - column);
            const Columns<Real> x(problem, l, index, column, columns, Real(1), around);
            for (int64_t a = 0; a < ni; a++) {
                Real* sum = wanted[w].sum + a * stride + column;
                if (problem.rbf) {
                    x.row(i0 + a, columns, line);
                    for (int64_t c = 0; c < columns; c++) sum[c] -= wanted[w].weight[a] * line[c];
                }
                put_row(problem, l, index, i0 + a, column, columns,
                        reinterpret_cast<const char*>(sum), factor);
            }
        }
    }
}

template <class Real>
static void norms(const Problem& problem, int64_t l, int64_t index, int64_t begin, int64_t end,
                  char* scratch) {
    const Layer& layer = problem.layer[l];
    Memory<Real> memory{scratch};
    Real* buffer = memory.take(Columns<Real>::buffer_size(layer.width));
    Real* line = memory.take(layer.width);
    const Columns<Real> x(problem, l, index, 0, layer.width, root_factor<Real>(problem, l, index),
                          buffer);
    Real* out = of_problem<Real>(layer.norms, index, problem.n);
    for (int64_t a = begin; a < end; a++) {
        x.row(a, layer.width, line);
        out[a] = Real(inner_product<Real>(line, line, layer.width));
    }
}

}  // namespace

// Sizes and functions by the dtype that is computed in.
#define BY_DTYPE(function, ...) \
    (problem.f64 ? function<double>(__VA_ARGS__) : function<float>(__VA_ARGS__))
#define TYPED(Real, x) reinterpret_cast<Real*>(x)

int64_t cka_scratch(const Problem& problem, Work work) {
    int64_t widest = 0;
    for (int64_t l = 0; l < problem.layers; l++) widest = most(widest, problem.layer[l].width);
    switch (work) {
        case GRAM_PART:
            return BY_DTYPE(gram_part_scratch, problem);
        case GRAM_INNER:
            return BY_DTYPE(gram_inner_scratch, problem);
        case GRAM_GRADIENT:
            return BY_DTYPE(gram_gradient_scratch, problem);
        case FEATURE_PART:
            return BY_DTYPE(feature_part_scratch, problem);
        case FEATURE_GRADIENT:
            return BY_DTYPE(feature_gradient_scratch, problem);
        case TILE_INNER:
            return BY_DTYPE(tile_scratch, problem);
        case TILE_GRADIENT:
            return BY_DTYPE(tile_gradient_scratch, problem);
        case ROWS_OF_COLUMNS:  // of means, norms, packing and shifts
            return 24 * 8 * round_up(widest, 64);
    }
    return 0;
}

double cka_means(const Problem& problem, int64_t l, int64_t index, int64_t begin, int64_t end,
                 char* scratch) {
    return BY_DTYPE(means, problem, l, index, begin, end, scratch);
}

void cka_norms(const Problem& problem, int64_t l, int64_t index, int64_t begin, int64_t end,
               char* scratch) {
    BY_DTYPE(norms, problem, l, index, begin, end, scratch);
}

int64_t cka_gram_bytes(const Problem& problem) {
    return problem.f64 ? 8 * padded(problem.n) * Panels<double>(problem.n).columns()
                       : 4 * padded(problem.n) * Panels<float>(problem.n).columns();
}

void cka_gram_part(const Problem& problem, const Part& part, const Part& next, char* sum,
                   char* scratch) {
    if (problem.f64) {
        gram_part<double>(problem, part, next, TYPED(double, sum), scratch);
    } else {
        gram_part<float>(problem, part, next, TYPED(float, sum), scratch);
    }
}

void cka_gram_finish(const Problem& problem, int64_t l, int64_t index, char* sums, int64_t parts) {
    if (problem.f64) {
        gram_finish<double>(problem, l, index, TYPED(double, sums), parts);
    } else {
        gram_finish<float>(problem, l, index, TYPED(float, sums), parts);
    }
}

void cka_gram_sums(const Problem& problem, int64_t l, int64_t index) {
    BY_DTYPE(gram_sums, problem, l, index);
}

void cka_gram_inner(const Problem& problem, int64_t index, int64_t begin, int64_t end,
                    double* inner, char* scratch) {
    BY_DTYPE(gram_inner, problem, index, begin, end, inner, scratch);
}

void cka_gram_gradient(const Problem& problem, const Part& part, const Part& next, char* scratch) {
    BY_DTYPE(gram_gradient, problem, part, next, scratch);
}

int64_t cka_feature_bytes(const Problem& problem) {
    return BY_DTYPE(feature_bytes, problem);
}

void cka_feature_part(const Problem& problem, int64_t index, int64_t begin, int64_t end, char* sums,
                      char* scratch) {
    if (problem.f64) {
        feature_part<double>(problem, index, begin, end, TYPED(double, sums), scratch);
    } else {
        feature_part<float>(problem, index, begin, end, TYPED(float, sums), scratch);
    }
}

void cka_feature_finish(const Problem& problem, int64_t k, int64_t index, char* sums,
                        int64_t parts) {
    if (problem.f64) {
        feature_finish<double>(problem, k, index, TYPED(double, sums), parts,
                               feature_bytes<double>(problem) / 8);
    } else {
        feature_finish<float>(problem, k, index, TYPED(float, sums), parts,
                              feature_bytes<float>(problem) / 4);
    }
}

double cka_feature_inner(const Problem& problem, int64_t k, int64_t index) {
    const Pair& pair = problem.pair[k];
    const int64_t n = problem.layer[pair.i].width * problem.layer[pair.j].width;
    if (problem.f64) {
        const double* product = of_problem<double>(pair.product, index, n);
        return inner_product<double>(product, product, n);
    }
    const float* product = of_problem<float>(pair.product, index, n);
    return inner_product<float>(product, product, n);
}

int64_t cka_feature_packed_bytes(const Problem& problem, int64_t l, int64_t other) {
    const int64_t rows = problem.layer[other].width, columns = problem.layer[l].width;
    if (problem.f64) {
        return 8 * round_up(rows, LANES<double>) * Panels<double>(columns).columns();
    }
    return 4 * round_up(rows, LANES<float>) * Panels<float>(columns).columns();
}

void cka_feature_pack(const Problem& problem, int64_t l, int64_t other, int64_t index, char* packed,
                      char* scratch) {
    if (problem.f64) {
        feature_pack<double>(problem, l, other, index, TYPED(double, packed), scratch);
    } else {
        feature_pack<float>(problem, l, other, index, TYPED(float, packed), scratch);
    }
}

void cka_feature_shift(const Problem& problem, int64_t l, int64_t index, char* shift,
                       char* scratch) {
    if (problem.f64) {
        feature_shift<double>(problem, l, index, TYPED(double, shift), scratch);
    } else {
        feature_shift<float>(problem, l, index, TYPED(float, shift), scratch);
    }
}

void cka_feature_gradient(const Problem& problem, int64_t l, int64_t index, int64_t begin,
                          int64_t end, const char* const* packed, const char* shift,
                          char* scratch) {
    if (problem.f64) {
        feature_gradient<double>(problem, l, index, begin, end, packed, TYPED(const double, shift),
                                 scratch);
    } else {
        feature_gradient<float>(problem, l, index, begin, end, packed, TYPED(const float, shift),
                                scratch);
    }
}

void cka_tile(const Problem& problem, int64_t index, int64_t i, int64_t j, double* inner,
              char* row_sums, char* scratch) {
    if (problem.f64) {
        tile<double>(problem, index, i, j, inner, TYPED(double, row_sums), scratch);
    } else {
        tile<float>(problem, index, i, j, inner, TYPED(float, row_sums), scratch);
    }
}

void cka_tile_gradient(const Problem& problem, int64_t index, int64_t i, char* scratch) {
    BY_DTYPE(tile_gradient, problem, index, i, scratch);
}

}  // namespace KDFAST_ISA
