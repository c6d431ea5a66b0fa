// What the record codec computes with: packed integers, and exp and log whose every float32 operation is fixed by
// docs/cache-format.md, so that all processors and languages decode the same floats.
#pragma once

// A fused multiply-add rounds once where the specification rounds twice.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "codec.h"
#include "simd.h"

namespace kdfast {
namespace KDFAST_ISA {

inline ivec lane_numbers() {
    ivec x;
    for (int i = 0; i < W; ++i) x[i] = i;
    return x;
}

template <typename T>
inline ivec load_words(const T* p) {
    static_assert(sizeof(T) == 4, "words of 32 bits");
    ivec x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}
template <typename T>
inline void store_words(T* p, ivec x) {
    static_assert(sizeof(T) == 4, "words of 32 bits");
    std::memcpy(p, &x, sizeof(x));
}

inline vec sqrt(vec x) {
#if defined(__AVX512F__)
    return (vec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (vec)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < W; ++i) x[i] = std::sqrt(x[i]);
    return x;
#endif
}

// x moved up by one lane, its first lane the last of `previous`.
inline ivec after(ivec previous, ivec x) {
#if defined(__AVX512F__)
    return (ivec)_mm512_alignr_epi32((__m512i)x, (__m512i)previous, 15);
#elif defined(__AVX2__)
    const __m256i joined = _mm256_blend_epi32((__m256i)x, (__m256i)previous, 0x80);
    return (ivec)_mm256_permutevar8x32_epi32(joined, _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6));
#else
    ivec y;
    y[0] = previous[W - 1];
    for (int i = 1; i < W; ++i) y[i] = x[i - 1];
    return y;
#endif
}

// counts, one more in the lanes where x > y.
inline ivec plus_greater(ivec counts, ivec x, ivec y) {
#if defined(__AVX512F__)
    const __m512i one = _mm512_set1_epi32(1);
    return (ivec)_mm512_mask_add_epi32((__m512i)counts, _mm512_cmpgt_epi32_mask((__m512i)x, (__m512i)y), (__m512i)counts, one);
#else
    return counts - (x > y);
#endif
}

// The words of x where `kept` is all ones, to `out`; returns how many. Writes up to a vector.
inline int keep_where(ivec kept, ivec x, std::uint32_t* out) {
#if defined(__AVX512F__)
    const __mmask16 mask = _mm512_test_epi32_mask((__m512i)kept, (__m512i)kept);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, (__m512i)x));
    return __builtin_popcount(mask);
#else
    int n = 0;
    for (int i = 0; i < W; ++i) {
        out[n] = static_cast<std::uint32_t>(x[i]);
        n += kept[i] != 0;
    }
    return n;
#endif
}

using codec::low_width;
using codec::packed_bytes;

// `count` numbers of `width` <= 24 bits, lowest bit first, to `out`, rounded up to a whole vector. Reads up to kSlack bytes
// too many.
inline void unpack(const std::uint8_t* data, unsigned width, std::int64_t count, std::uint32_t* out) {
#if defined(__AVX2__) || defined(__AVX512F__)
    const ivec bit = lane_numbers() * static_cast<int>(width), word = bit >> 5, shift = bit & 31;
    const ivec mask = ivec{} + static_cast<int>((1u << width) - 1);
    for (std::int64_t i = 0; i < count; i += W, data += W / 8 * width) {
        uvec x;
        std::memcpy(&x, data, sizeof(x));
#if defined(__AVX512F__)
        const __m512i low = _mm512_permutexvar_epi32((__m512i)word, (__m512i)x);
        const __m512i high = _mm512_permutexvar_epi32((__m512i)(word + 1), (__m512i)x);
        const __m512i joined = _mm512_or_si512(_mm512_srlv_epi32(low, (__m512i)shift),
                                               _mm512_sllv_epi32(high, (__m512i)(32 - shift)));
#else
        const __m256i low = _mm256_permutevar8x32_epi32((__m256i)x, (__m256i)word);
        const __m256i high = _mm256_permutevar8x32_epi32((__m256i)x, (__m256i)(word + 1));
        const __m256i joined = _mm256_or_si256(_mm256_srlv_epi32(low, (__m256i)shift),
                                               _mm256_sllv_epi32(high, (__m256i)(32 - shift)));
#endif
        store_words(out + i, (ivec)joined & mask);
    }
#else
    const std::uint32_t mask = (1u << width) - 1;
    for (std::int64_t i = 0; i < count; ++i) {
        const std::uint64_t bit = static_cast<std::uint64_t>(i) * width;
        std::uint64_t x;
        std::memcpy(&x, data + (bit >> 3), 8);
        out[i] = static_cast<std::uint32_t>(x >> (bit & 7)) & mask;
    }
    for (std::int64_t i = count; i % W; ++i) out[i] = 0;
#endif
}

// exp(x), x clamped to [-87, 88]; exactly 1 at 0.
inline vec exp_fixed(vec x) {
    x = min(max(x, set(-87.0f)), set(88.0f));
    const vec magic = set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vec n = (x * 1.44269504f + magic) - magic;
    const vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    vec y = set(0.0013950476422905922f);
    y = y * r + 0.00836888886988163f;
    y = y * r + 0.04166620597243309f;
    y = y * r + 0.166665181517601f;
    y = y * r + 0.5f;
    y = (y * (r * r) + r) + 1.0f;
    const ivec e = __builtin_convertvector(n, ivec);
    return y * bits_as<vec>((e + 127) << 23);
}

// log(x) for normal x > 0.
inline vec log_fixed(vec x) {
    const uvec shifted = bits_as<uvec>(x) - 0x3f3504f3u;  // mantissa in [sqrt(1/2), sqrt(2))
    const vec n = __builtin_convertvector(bits_as<ivec>(shifted) >> 23, vec);
    const vec f = bits_as<vec>((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    vec y = set(-0.07634081691503525f);
    y = y * f + 0.1276140958070755f;
    y = y * f + -0.13160260021686554f;
    y = y * f + 0.14201785624027252f;
    y = y * f + -0.16623352468013763f;
    y = y * f + 0.20001225173473358f;
    y = y * f + -0.250008225440979f;
    y = y * f + 0.3333333134651184f;
    const vec f2 = f * f;
    const vec log_mantissa = (y * f) * f2 - f2 * 0.5f + f;
    return n * 0.693145752f + (n * 1.42860677e-6f + log_mantissa);
}

inline float log_fixed(float x) { return log_fixed(set(x))[0]; }

// Sixteen partial sums in float64, entry i to sum i mod 16, added up as a tree.
class Sum16 {
  public:
    void add(const float* x) {  // sixteen of them
        for (int j = 0; j < 16; ++j) sums_[j] += static_cast<double>(x[j]);
    }
    double total() const {
        double s[16];
        std::memcpy(s, sums_, sizeof(s));
        for (int half = 8; half; half /= 2)
            for (int j = 0; j < half; ++j) s[j] += s[j + half];
        return s[0];
    }

  private:
    double sums_[16] = {};
};

// The masses that a tail code stands for, exact in float64 up to one division: odds = tail / rest.
struct TailMass {
    double tail, rest;
};

inline TailMass tail_mass(unsigned code) {
    if (code == codec::kTailNone) return {0.0, 1.0};
    if (code == codec::kTailAll) return {1.0, 0.0};
    const std::uint64_t bits = (static_cast<std::uint64_t>(code) << (52 - codec::kTailMantissa)) +
                               (static_cast<std::uint64_t>(1023 + codec::kTailLeast) << 52);
    const double odds = bits_as<double>(bits);
    return {odds / (1.0 + odds), 1.0 / (1.0 + odds)};
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
