// Logits in memory and in registers, the same on the device and, for tests without one, on the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define KDFAST_HD __host__ __device__ __forceinline__
#define KDFAST_UNROLL _Pragma("unroll")
#else
#define KDFAST_HD inline
#define KDFAST_UNROLL
#endif

namespace kdfast {
namespace cluster {

struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

KDFAST_HD float as_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
#endif
}

KDFAST_HD uint32_t as_bits(float x) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(x);
#else
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
#endif
}

KDFAST_HD float exp2(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return std::exp2(x);
#endif
}

// A product that no compiler may fuse into the sum around it.
KDFAST_HD float product(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    const volatile float rounded = a * b;
    return rounded;
#endif
}

// x < y ? a : b without a branch, which the compiler would rather have; neighbours in a warp would take both sides.
KDFAST_HD float if_less(float x, float y, float a, float b) {
#ifdef __CUDA_ARCH__
    float chosen;
    asm("{\n.reg .pred less;\nsetp.lt.f32 less, %1, %2;\nselp.f32 %0, %3, %4, less;\n}"
        : "=f"(chosen)
        : "f"(x), "f"(y), "f"(a), "f"(b));
    return chosen;
#else
    return x < y ? a : b;
#endif
}

// One stored value as float32: the lower or the upper half of a word for the two-byte types.
template <typename E>
KDFAST_HD float widened(uint32_t word, int half);

template <>
KDFAST_HD float widened<float>(uint32_t word, int) {
    return as_float(word);
}

template <>
KDFAST_HD float widened<Bf16>(uint32_t word, int half) {
    return as_float(half ? word & 0xffff0000u : word << 16);
}

template <>
KDFAST_HD float widened<Fp16>(uint32_t word, int half) {
    const uint16_t bits = uint16_t(half ? word >> 16 : word);
#ifdef __CUDA_ARCH__
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#else
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
    if (rest >= 0x7c00) return as_float(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    const float size = std::ldexp(float(rest < 0x400 ? rest : (rest & 0x3ff) | 0x400), int(rest < 0x400 ? 1 : rest >> 10) - 25);
    return sign ? -size : size;
#endif
}

// Two values in one word, rounded to nearest; for float32 the first alone.
template <typename E>
KDFAST_HD uint32_t narrowed(float low, float high);

template <>
KDFAST_HD uint32_t narrowed<float>(float low, float) {
    return as_bits(low);
}

template <>
KDFAST_HD uint32_t narrowed<Bf16>(float low, float high) {
#ifdef __CUDA_ARCH__
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    const auto half = [](float x) {
        const uint32_t bits = as_bits(x);
        return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    };
    return half(low) | half(high) << 16;
#endif
}

template <>
KDFAST_HD uint32_t narrowed<Fp16>(float low, float high) {
#ifdef __CUDA_ARCH__
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    const auto half = [](float x) -> uint32_t {
        const uint32_t sign = as_bits(x) >> 16 & 0x8000;
        const float size = std::fabs(x);
        if (x != x) return 0x7fff;
        if (size >= 65520.0f) return sign | 0x7c00;
        if (size < 0x1p-14f) return sign | uint32_t(std::nearbyint(std::ldexp(size, 24)));
        int exponent;
        std::frexp(size, &exponent);  // size = f * 2^exponent with f in [1/2, 1)
        const uint32_t steps = uint32_t(std::nearbyint(std::ldexp(size, 11 - exponent)));
        return sign | ((uint32_t(exponent + 14) << 10) + (steps - 0x400));
    };
    return half(low) | half(high) << 16;
#endif
}

template <typename E>
KDFAST_HD float one(const E* at) {
    uint32_t word = 0;
#ifdef __CUDA_ARCH__
    word = sizeof(E) == 4 ? *reinterpret_cast<const uint32_t*>(at) : *reinterpret_cast<const uint16_t*>(at);
#else
    std::memcpy(&word, at, sizeof(E));
#endif
    return widened<E>(word, 0);
}

template <typename E>
KDFAST_HD void put(E* at, float x) {
    const uint32_t word = narrowed<E>(x, 0.0f);
#ifdef __CUDA_ARCH__
    if (sizeof(E) == 4) *reinterpret_cast<uint32_t*>(at) = word;
    else *reinterpret_cast<uint16_t*>(at) = uint16_t(word);
#else
    std::memcpy(at, &word, sizeof(E));
#endif
}

// N neighbouring values in one load or store: 16 bytes of the wider of the two sides.
template <typename E, int N>
struct alignas(N * sizeof(E)) Pack {
    static constexpr int kWords = N * int(sizeof(E)) / 4, kPerWord = 4 / int(sizeof(E));
    uint32_t word[kWords];

    static KDFAST_HD Pack load(const E* at) { return *reinterpret_cast<const Pack*>(at); }

    KDFAST_HD void values(float (&x)[N]) const {
        KDFAST_UNROLL
        for (int i = 0; i < N; ++i) x[i] = widened<E>(word[i / kPerWord], i % kPerWord);
    }

    static KDFAST_HD Pack of(const float (&x)[N]) {
        Pack pack;
        KDFAST_UNROLL
        for (int i = 0; i < kWords; ++i) pack.word[i] = narrowed<E>(x[i * kPerWord], x[i * kPerWord + kPerWord - 1]);
        return pack;
    }

    // Nothing on the device reads a gradient again soon.
    KDFAST_HD void store(E* at) const {
#ifdef __CUDA_ARCH__
        if constexpr (kWords == 4) {
            asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(word[0]), "r"(word[1]), "r"(word[2]),
                         "r"(word[3]) : "memory");
        } else {
            asm volatile("st.global.cs.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(word[0]), "r"(word[1]) : "memory");
        }
#else
        *reinterpret_cast<Pack*>(at) = *this;
#endif
    }
};

}  // namespace cluster
}  // namespace kdfast
