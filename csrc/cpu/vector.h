// Vectors of the instruction set a file is compiled for, and the functions of them that operators
// need. Everything is static and inside namespace KDFAST_ISA: a symbol that objects of two
// instruction sets shared would be taken from either of them.

#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <utility>

#include "types.h"

#define NOINLINE __attribute__((noinline))

namespace KDFAST_ISA {

static inline int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static inline int64_t most(int64_t a, int64_t b) {
    return a > b ? a : b;
}
static inline int64_t round_up(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}

// KDFAST_VECTOR_BYTES: to test one size of vector on a processor that has another.
#if defined(KDFAST_VECTOR_BYTES)
constexpr int VECTOR_BYTES = KDFAST_VECTOR_BYTES;
#elif defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
#if defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = VECTOR_BYTES == 64 ? 32 : 16;
#endif

template <class Real>
struct Types;

template <>
struct Types<float> {
    using Int = int32_t;
    typedef float Vec __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
    typedef float Loose __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
    static constexpr int MANTISSA = 23;
    static constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    static constexpr float LEAST_EXP = -87.33f;  // below, exp is subnormal: taken as 0
    static constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
    static constexpr float SMALLEST = 1.17549435e-38f, LIFT = 0x1p25f;  // of normal numbers
    static constexpr int LIFTED = 25;
    static constexpr Int ROOT_HALF = 0x3f3504f3;
    // Least maximum of |relative error| of 1 + r P(r) as e^r on |r| <= ln 2 / 2: 2e-9.
    static constexpr float EXP[] = {1.0f,          0.499999942f,   0.166664303f,
                                    0.0416680074f, 0.00837423590f, 0.00138435600f};
    static constexpr int LOG_TERMS = 5;
};

template <>
struct Types<double> {
    using Int = int64_t;
    typedef double Vec __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t Ints __attribute__((vector_size(VECTOR_BYTES)));
    typedef double Loose __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
    static constexpr int MANTISSA = 52;
    static constexpr double MAGIC = 6755399441055744.0;
    static constexpr double LEAST_EXP = -708.39;
    static constexpr double LN2_HIGH = 6.93147180369123816490e-01;
    static constexpr double LN2_LOW = 1.90821492927058770002e-10;
    static constexpr double SMALLEST = 2.2250738585072014e-308, LIFT = 0x1p54;
    static constexpr int LIFTED = 54;
    static constexpr Int ROOT_HALF = 0x3fe6a09e667f3bcd;
    // As above; the error is 4e-18.
    static constexpr double EXP[] = {
        0x1.0000000000000p+0,  0x1.000000000000bp-1,  0x1.55555555554b2p-3,  0x1.55555555500e1p-5,
        0x1.111111112fc33p-7,  0x1.6c16c1858343dp-10, 0x1.a01a0110ec401p-13, 0x1.a01996eaec52bp-16,
        0x1.71df49e752e28p-19, 0x1.28b002f60dc22p-22, 0x1.ad58e56a3d7d4p-26};
    static constexpr int LOG_TERMS = 11;
};

template <class Real>
using Vec = typename Types<Real>::Vec;
template <class Real>
using Ints = typename Types<Real>::Ints;
template <class Real>
constexpr int LANES = VECTOR_BYTES / int(sizeof(Real));

template <class Real>
static inline Vec<Real> load(const Real* p) {
    return *reinterpret_cast<const typename Types<Real>::Loose*>(p);
}

template <class Real>
static inline void store(Real* p, Vec<Real> x) {
    *reinterpret_cast<typename Types<Real>::Loose*>(p) = x;
}

// Past the caches, to a multiple of VECTOR_BYTES; `streams_end` comes before others read it.
template <class Real>
static inline void stream(Real* p, Vec<Real> x) {
#if defined(__clang__)
    __builtin_nontemporal_store(x, reinterpret_cast<Vec<Real>*>(p));
#elif defined(__AVX512F__) && !defined(KDFAST_VECTOR_BYTES)
    _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)x);
#elif defined(__AVX__) && !defined(KDFAST_VECTOR_BYTES)
    _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)x);
#else
    store<Real>(p, x);
#endif
}

static inline void streams_end() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

template <class Real>
static inline Vec<Real> splat(Real x) {
    return x - Vec<Real>{};  // x itself, -0 too
}

// Holds x in a register. g++ would otherwise load it again for each use, or turn a mask into a
// blend, and so spend what the multiplications need; clang does better left alone.
template <class V>
static inline void hold(V& x) {
#if defined(__clang__)
#elif defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(__x86_64__) && !defined(KDFAST_VECTOR_BYTES)
    asm("" : "+x"(x));
#endif
}

template <class Real>
static inline Vec<Real> with_bits(Ints<Real> bits) {
    return (Vec<Real>)bits;
}

template <class Real>
static inline Real sum(Vec<Real> x) {
    Real total = 0;
    for (int i = 0; i < LANES<Real>; i++) total += x[i];
    return total;
}

template <class Real>
static inline bool any(Ints<Real> x) {
    typedef int64_t Wide __attribute__((vector_size(VECTOR_BYTES)));
    const Wide wide = (Wide)x;
    int64_t all = 0;
    for (int i = 0; i < VECTOR_BYTES / 8; i++) all |= wide[i];
    return all != 0;
}

// e^x for x <= -LEAST_EXP, exactly 0 from LEAST_EXP downwards, where `none` is set. NaN gives NaN.
template <class Real>
static inline Vec<Real> exponential(Vec<Real> x, Ints<Real>& none) {
    using T = Types<Real>;
    constexpr Real log2_e = Real(1.44269504088896340736);
    const Vec<Real> shifted = x * log2_e + T::MAGIC, n = shifted - T::MAGIC;
#if defined(__FMA__)
    const Vec<Real> r = x - n * Real(0.69314718055994530942);  // the product is not rounded
#else
    const Vec<Real> r = (x - n * T::LN2_HIGH) - n * T::LN2_LOW;
#endif
    // Pairs of terms, for the short chain: what waits here is the whole vector unit.
    const Vec<Real> r2 = r * r;
    constexpr int terms = int(sizeof(T::EXP) / sizeof(Real));
    constexpr int last = terms - 2 + terms % 2;
    Vec<Real> p = terms % 2 ? splat<Real>(T::EXP[last]) : r * T::EXP[last + 1] + T::EXP[last];
#pragma GCC unroll 16
    for (int i = last - 2; i >= 0; i -= 2) p = p * r2 + (r * T::EXP[i + 1] + T::EXP[i]);
    p = p * r + Real(1);
    none = x < T::LEAST_EXP;
    hold(none);
    // n is in the low bits of `shifted`: from there it is added to the exponent of p. NaN has bits
    // of its own there, which could make a number of it.
    const Ints<Real> power = (Ints<Real>)shifted << T::MANTISSA;
    return with_bits<Real>((((Ints<Real>)p + power) & ~none) | (x != x));
}

// log x of normal x, less that of 2^LIFTED in lanes `lifted`, where `delta` = x - 1 is
// known better than from x (as a difference over a sum, say).
template <class Real>
static inline Vec<Real> logarithm_of_normal(Vec<Real> x, Vec<Real> delta, Ints<Real> lifted) {
    using T = Types<Real>;
    // x = 2^k (1 + f) with 1 + f in [root 1/2, root 2)
    const Ints<Real> bits = (Ints<Real>)x;
    const Ints<Real> k = (bits - T::ROOT_HALF) >> T::MANTISSA;
    const Vec<Real> mantissa = with_bits<Real>(bits - (k << T::MANTISSA));
    const Vec<Real> f = (k == 0) & ~lifted ? delta : mantissa - Real(1);
    const Vec<Real> s = f / (f + Real(2)), z = s * s;
    Vec<Real> series = splat<Real>(Real(2) / (2 * T::LOG_TERMS + 1));
#pragma GCC unroll 16
    for (int i = T::LOG_TERMS - 1; i >= 1; i--) series = series * z + Real(2) / (2 * i + 1);
    const Vec<Real> fraction = s * Real(2) + s * (z * series);
    const Vec<Real> exponent = __builtin_convertvector(k - (lifted & T::LIFTED), Vec<Real>);
    return exponent * T::LN2_HIGH + (exponent * T::LN2_LOW + fraction);
}

template <class Real>
static inline Vec<Real> logarithm(Vec<Real> x, Vec<Real> delta) {
    using T = Types<Real>;
    const Ints<Real> small = (x < T::SMALLEST) & (x > Real(0));
    Vec<Real> y = logarithm_of_normal<Real>(small ? x * T::LIFT : x, delta, small);
    const Real infinity = Real(__builtin_inf());
    y = x == infinity ? x : y;
    y = x == Real(0) ? splat<Real>(-infinity) : y;
    return ((x < Real(0)) | (x != x)) ? splat<Real>(Real(__builtin_nan(""))) : y;
}

template <class Real>
static inline Vec<Real> logarithm(Vec<Real> x) {
    return logarithm<Real>(x, x - Real(1));
}

// Exchanges the off-diagonal S x S blocks of each pair of rows that lie S apart.
template <int S, class Real, int... I>
static inline void exchange(Vec<Real>& a, Vec<Real>& b, std::integer_sequence<int, I...>) {
    constexpr int L = LANES<Real>;
#if __has_builtin(__builtin_shufflevector)
    const Vec<Real> upper = __builtin_shufflevector(a, b, (I & S ? L + I - S : I)...);
    b = __builtin_shufflevector(a, b, (I & S ? L + I : I + S)...);
#else
    const Vec<Real> upper = __builtin_shuffle(a, b, Ints<Real>{(I & S ? L + I - S : I)...});
    b = __builtin_shuffle(a, b, Ints<Real>{(I & S ? L + I : I + S)...});
#endif
    a = upper;
}

template <int S, class Real>
static inline void exchange_all(Vec<Real>* rows) {
    if constexpr (S < LANES<Real>) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES<Real>; i++) {
            if ((i & S) == 0) {
                exchange<S, Real>(rows[i], rows[i + S],
                                  std::make_integer_sequence<int, LANES<Real>>{});
            }
        }
        exchange_all<2 * S, Real>(rows);
    }
}

// out [columns][LANES] = in [LANES][columns], columns a whole number of vectors.
template <class Real>
static inline void transpose(const Real* in, int64_t stride_in, int64_t columns, Real* out,
                             int64_t stride_out) {
    constexpr int lanes = LANES<Real>;
    for (int64_t c = 0; c < columns; c += lanes) {
        Vec<Real> rows[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; i++) rows[i] = load<Real>(in + i * stride_in + c);
        exchange_all<1, Real>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; i++) store<Real>(out + (c + i) * stride_out, rows[i]);
    }
}

// Numbers as they are stored.

using namespace kdfast;

static inline float from_half(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = uint32_t(half & 0x7fff) << 13;
    uint32_t bits;
    if ((half & 0x7c00) == 0x7c00) {
        bits = rest | 0x7f800000;
    } else {
        // Read with the exponent of float and put right by a power of two, subnormals included.
        float x;
        memcpy(&x, &rest, 4);
        x *= 0x1p112f;
        memcpy(&bits, &x, 4);
    }
    bits |= sign;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint16_t to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t sign = uint16_t(bits >> 16) & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
    if (bits < 0x38800000) {                       // subnormal: the addition rounds
        float y;
        memcpy(&y, &bits, 4);
        y += 0.5f;
        memcpy(&bits, &y, 4);
        return sign | uint16_t(bits - 0x3f000000);
    }
    bits += 0xfff + ((bits >> 13) & 1);
    return sign | uint16_t((bits - 0x38000000) >> 13);
}

static inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// out = factor * in
template <class Real>
static inline void read(Storage storage, const void* in, int64_t n, Real factor, Real* out) {
    if (storage == F32 || storage == F64) {
        const Real* x = static_cast<const Real*>(in);
        for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor;
    } else if (storage == BF16) {
        const uint16_t* x = static_cast<const uint16_t*>(in);
        for (int64_t i = 0; i < n; i++) {
            const uint32_t bits = uint32_t(x[i]) << 16;
            float value;
            memcpy(&value, &bits, 4);
            out[i] = Real(value) * factor;
        }
    } else {
        const uint16_t* x = static_cast<const uint16_t*>(in);
        for (int64_t i = 0; i < n; i++) out[i] = Real(from_half(x[i])) * factor;
    }
}

template <class Real>
static inline void write(Storage storage, const Real* in, int64_t n, Real factor, void* out) {
    if (storage == F32 || storage == F64) {
        Real* x = static_cast<Real*>(out);
        for (int64_t i = 0; i < n; i++) x[i] = in[i] * factor;
    } else if (storage == BF16) {
        uint16_t* x = static_cast<uint16_t*>(out);
        for (int64_t i = 0; i < n; i++) x[i] = to_bfloat16(float(in[i] * factor));
    } else {
        uint16_t* x = static_cast<uint16_t*>(out);
        for (int64_t i = 0; i < n; i++) x[i] = to_half(float(in[i] * factor));
    }
}

static inline int64_t size_of(Storage storage) {
    return storage == F64 ? 8 : storage == F32 ? 4 : 2;
}

}  // namespace KDFAST_ISA
