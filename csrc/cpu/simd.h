// Vectors of float32 for one instruction set, in GCC/Clang vector extensions with intrinsics where those fall short.
// Included only by files that are compiled per instruction set with -DKDFAST_ISA=name.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace kdfast {
namespace KDFAST_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vec __attribute__((vector_size(W * 4)));
typedef int32_t ivec __attribute__((vector_size(W * 4)));
typedef uint32_t uvec __attribute__((vector_size(W * 4)));
typedef uint16_t hvec __attribute__((vector_size(W * 2)));

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

inline vec set(float x) { return vec{} + x; }

template <typename To, typename From>
inline To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To y;
    std::memcpy(&y, &x, sizeof(y));
    return y;
}

// NaN in `b` survives, NaN in `a` does not: put the constant first.
inline vec max(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

inline vec min(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

inline vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// Whether any lane of a comparison holds.
inline bool any(ivec mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    int32_t joined = 0;
    for (int i = 0; i < W; ++i) joined |= mask[i];
    return joined != 0;
#endif
}

inline float reduce_add(vec x) {
    float sum = 0;
    for (int i = 0; i < W; ++i) sum += x[i];
    return sum;
}

inline float reduce_max(vec x) {
    float best = x[0];
    for (int i = 1; i < W; ++i) best = x[i] > best ? x[i] : best;
    return best;
}

inline float reduce_min(vec x) { return -reduce_max(-x); }

constexpr float kLog2e = 1.44269504088896341f;

// The nearest integer to t, |t| < 4e6 without AVX-512. NaN stays NaN.
inline vec nearest(vec t) {
#if defined(__AVX512F__)
    return (vec)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const vec magic = set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    return (t + magic) - magic;
#endif
}

// 2^(n + r) for an integer n and |r| <= 1/2.
inline vec power_of_2(vec n, vec r) {
    // Minimax in relative error of 2^r on [-1/2, 1/2], 2e-9 before rounding.
    vec y = set(1.5353361818e-4f);
    y = fma(y, r, set(1.3398874446e-3f));
    y = fma(y, r, set(9.6184373583e-3f));
    y = fma(y, r, set(5.5503324710e-2f));
    y = fma(y, r, set(2.4022647914e-1f));
    y = fma(y, r, set(6.9314720286e-1f));
    y = fma(y, r, set(1.0f));
#if defined(__AVX512F__)
    return (vec)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
    const ivec e = __builtin_convertvector(max(set(-127.0f), n), ivec);
    return y * bits_as<vec>((e + 127) << 23);
#endif
}

// 2^t for t <= 127, relative error below 2e-7; 0 below about -126. NaN stays NaN. t must be above -4e6.
inline vec exp2(vec t) {
    const vec n = nearest(t);
    return power_of_2(n, t - n);
}

// exp(x) for x <= 88, relative error below 2e-7; 0 below about -87. NaN stays NaN. x must be above -2.7e6.
inline vec exp(vec x) {
    const vec n = nearest(x * kLog2e);
#if defined(__FMA__) || defined(__AVX512F__)
    return power_of_2(n, fma(x, set(kLog2e), -n));
#else
    // Without a fused product the reduction is done in two steps, or x * log2e would lose its last bits.
    return power_of_2(n, ((x - n * 0.693359375f) - n * -2.12194440e-4f) * kLog2e);
#endif
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
    const uint32_t em = uint32_t(x.bits & 0x7fff) << 13;
    float y = bits_as<float>(em) * bits_as<float>(uint32_t(0x77800000));  // 2^112 moves the exponent, denormals too
    if (em >= 0x0f800000u) y = bits_as<float>(em | 0x7f800000u);
    return bits_as<float>(bits_as<uint32_t>(y) | uint32_t(x.bits & 0x8000) << 16);
}

inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, bf16& out) {
    const uint32_t b = bits_as<uint32_t>(x);
    out.bits = x != x ? 0x7fc0 : uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
inline void from_float(float x, f16& out) {
    const uint32_t b = bits_as<uint32_t>(x);
    const uint16_t sign = uint16_t((b >> 16) & 0x8000);
    const float a = std::fabs(x);
    if (x != x) {
        out.bits = 0x7e00;
    } else if (a >= 65520.0f) {
        out.bits = sign | 0x7c00;
    } else if (a < 6.103515625e-5f) {
        // Denormal: adding 2^-1 * 2^-14 * 2^11 rounds to a multiple of 2^-24 in the low bits.
        out.bits = sign | uint16_t(bits_as<uint32_t>(a + 0.5f) - bits_as<uint32_t>(0.5f));
    } else {
        const uint32_t m = bits_as<uint32_t>(a);
        out.bits = sign | uint16_t((m - 0x38000000 + 0xfff + ((m >> 13) & 1)) >> 13);
    }
}

inline vec load(const float* p) {
    vec x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}

inline vec load(const bf16* p) {
    hvec h;
    std::memcpy(&h, p, sizeof(h));
    return bits_as<vec>(__builtin_convertvector(h, uvec) << 16);
}

inline vec load(const f16* p) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    vec x;
    for (int i = 0; i < W; ++i) x[i] = to_float(p[i]);
    return x;
#endif
}

inline void store(float* p, vec x) { std::memcpy(p, &x, sizeof(x)); }

inline void store(bf16* p, vec x) {
    const uvec b = bits_as<uvec>(x);
    uvec rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    rounded = (x != x) ? (uvec{} + 0x7fc0) : rounded;
    const hvec h = __builtin_convertvector(rounded, hvec);
    std::memcpy(p, &h, sizeof(h));
}

inline void store(f16* p, vec x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < W; ++i) from_float(x[i], p[i]);
#endif
}

// Past the caches: for outputs larger than they are. `p` is aligned to the vector.
inline void stream(float* p, vec x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)x);
#else
    store(p, x);
#endif
}
// Streamed stores are visible to other threads only after this.
inline void stream_fence() {
#if defined(__AVX2__) || defined(__AVX512F__)
    _mm_sfence();
#endif
}

// The last n < W elements, the rest filled.
template <typename T>
inline vec load_tail(const T* p, int64_t n, float fill) {
    vec x = set(fill);
    for (int i = 0; i < n; ++i) x[i] = to_float(p[i]);
    return x;
}

template <typename T>
inline void store_tail(T* p, int64_t n, vec x) {
    for (int i = 0; i < n; ++i) from_float(x[i], p[i]);
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
