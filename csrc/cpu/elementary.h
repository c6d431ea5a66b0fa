// Elementary functions on vectors of float32, accurate in relative error where they vanish.
#pragma once

#include "simd.h"

namespace kdfast {
namespace KDFAST_ISA {

inline vec abs(vec x) { return bits_as<vec>(bits_as<uvec>(x) & 0x7fffffffu); }

// exp(x) - 1 for x <= 0.
inline vec expm1_negative(vec x) {
    vec series = set(1.0f / 40320);
    series = fma(series, x, set(1.0f / 5040));
    series = fma(series, x, set(1.0f / 720));
    series = fma(series, x, set(1.0f / 120));
    series = fma(series, x, set(1.0f / 24));
    series = fma(series, x, set(1.0f / 6));
    series = fma(series, x, set(0.5f));
    const vec near = fma(series * x, x, x);
    return x > set(-0.5f) ? near : exp(max(set(-100.0f), x)) - 1.0f;
}

// log(1 + x) for x > -1.
inline vec log1p(vec x) {
    const vec whole = x + 1.0f;
    const vec lost = x - (whole - 1.0f);  // what the sum rounded away
    // whole = mantissa * 2^exponent with the mantissa in [sqrt(1/2), sqrt(2))
    const uvec shifted = bits_as<uvec>(whole) - 0x3f3504f3u;
    const ivec exponent = bits_as<ivec>(shifted) >> 23;
    const vec mantissa = bits_as<vec>((shifted & 0x007fffffu) + 0x3f3504f3u);
    const vec f = mantissa - 1.0f, s = f / (f + 2.0f), s2 = s * s;
    vec series = set(2.0f / 9);
    series = fma(series, s2, set(2.0f / 7));
    series = fma(series, s2, set(2.0f / 5));
    series = fma(series, s2, set(2.0f / 3));
    const vec log_mantissa = fma(series * s2, s, s + s);
    const vec n = __builtin_convertvector(exponent, vec);
    return fma(n, set(6.93145752e-1f), fma(n, set(1.42860677e-6f), log_mantissa + lost / whole));
}

// +-1 beyond about 9; NaN stays NaN.
inline vec tanh(vec x) {
    const vec e = expm1_negative(-2.0f * abs(x)), y = e / (e + 2.0f);  // -tanh |x|
    return x < set(0.0f) ? y : -y;
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
