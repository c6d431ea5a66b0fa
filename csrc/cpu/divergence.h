// Divergences between tempered teacher p and student q: the terms of a row's value, and the derivative of the value with
// respect to the student's tempered logits.
//
// `value` is a term of the sum, never negative, so that the sum does not cancel where student and teacher agree. `slope` is
// h = q * df/dq of the summand f (plus a constant times q, which changes nothing); the derivative is h - q * sum(h).
// kSumsToZero: sum(h) is 0 and needs no pass. `student_must`, `teacher_must`: an id of probability 0 on that side makes the
// value infinite if the other side gives it any; `slope_too`: then the sum of h is infinite as well.
#pragma once

#include "elementary.h"

namespace kdfast {
namespace KDFAST_ISA {

// p, q and d = log p - log q of W ids. Where both exclude an id, p = q = d = 0.
struct Pair {
    vec p, q, d, log_p, log_q;
};

// RowOptions.coefficients.
struct Coefficients {
    float first, second;
};

// p * (d + expm1(-d)) with d = log p - log q, which is p * d + (q - p). For small d the bracket is a series,
// d^2/2 - d^3/6 + ..., cut at 4e-7 of itself.
inline vec kl_term(vec p, vec q, vec d) {
    vec series = fma(d, set(1.0f / 720), set(-1.0f / 120));
    series = fma(series, d, set(1.0f / 24));
    series = fma(series, d, set(-1.0f / 6));
    series = fma(series, d, set(0.5f));
    const vec near = p * d * d * series;
    const vec far = fma(p, d, q - p);
    return d * d < set(0.0625f) ? near : far;
}

// KL(p || q).
struct ForwardKl {
    static constexpr bool kSumsToZero = true;
    static bool student_must(Coefficients) { return true; }
    static bool teacher_must(Coefficients) { return false; }
    static bool slope_too(Coefficients) { return false; }
    static inline vec value(const Pair& x, Coefficients) { return kl_term(x.p, x.q, x.d); }
    static inline vec slope(const Pair& x, Coefficients) { return x.q - x.p; }
};

// KL(q || p).
struct ReverseKl {
    static constexpr bool kSumsToZero = false;
    static bool student_must(Coefficients) { return false; }
    static bool teacher_must(Coefficients) { return true; }
    static bool slope_too(Coefficients) { return true; }
    static inline vec value(const Pair& x, Coefficients) { return kl_term(x.q, x.p, -x.d); }
    static inline vec slope(const Pair& x, Coefficients) { return -x.q * x.d; }
};

// p and q against m = w*p + (1-w)*q, from the smaller over the larger of both.
struct Mixture {
    vec m, log_p, log_q, p_excess, q_excess;  // log(p/m), log(q/m), p/m - 1, q/m - 1

    Mixture(const Pair& x, float w) {
        const vec e = expm1_negative(-abs(x.d));
        const ivec teacher_larger = x.d >= set(0.0f);
        const vec change = (teacher_larger ? set(1 - w) : set(w)) * e;
        const vec log_larger = -log1p(change), excess = e / (change + 1.0f);  // excess = (smaller - larger) / m
        m = w * x.p + (1 - w) * x.q;
        log_p = teacher_larger ? log_larger : log_larger + x.d;
        log_q = teacher_larger ? log_larger - x.d : log_larger;
        p_excess = (1 - w) * (teacher_larger ? -excess : excess);
        q_excess = w * (teacher_larger ? excess : -excess);
    }
};

// first * KL(p || m) + second * KL(q || m), m = first * p + second * q.
struct Jsd {
    static constexpr bool kSumsToZero = false;
    static bool student_must(Coefficients) { return false; }
    static bool teacher_must(Coefficients) { return false; }
    static bool slope_too(Coefficients) { return false; }
    static inline vec value(const Pair& x, Coefficients c) {
        const Mixture mix(x, c.first);
        return c.first * kl_term(x.p, mix.m, mix.log_p) + c.second * kl_term(x.q, mix.m, mix.log_q);
    }
    static inline vec slope(const Pair& x, Coefficients c) { return c.second * x.q * Mixture(x, c.first).log_q; }
};

// KL(p || m), m = first * p + second * q.
struct SkewForwardKl {
    static constexpr bool kSumsToZero = false;
    static bool student_must(Coefficients) { return false; }
    static bool teacher_must(Coefficients) { return false; }
    static bool slope_too(Coefficients) { return false; }
    static inline vec value(const Pair& x, Coefficients c) {
        const Mixture mix(x, c.first);
        return kl_term(x.p, mix.m, mix.log_p);
    }
    static inline vec slope(const Pair& x, Coefficients c) { return -c.second * x.q * Mixture(x, c.first).p_excess; }
};

// KL(q || m), m = first * p + second * q.
struct SkewReverseKl {
    static constexpr bool kSumsToZero = false;
    static bool student_must(Coefficients) { return false; }
    static bool teacher_must(Coefficients) { return false; }
    static bool slope_too(Coefficients) { return false; }
    static inline vec value(const Pair& x, Coefficients c) {
        const Mixture mix(x, c.first);
        return kl_term(x.q, mix.m, mix.log_q);
    }
    static inline vec slope(const Pair& x, Coefficients c) {
        const Mixture mix(x, c.first);
        return x.q * (mix.log_q - c.second * mix.q_excess);
    }
};

// Half the L1 distance.
struct Tvd {
    static constexpr bool kSumsToZero = false;
    static bool student_must(Coefficients) { return false; }
    static bool teacher_must(Coefficients) { return false; }
    static bool slope_too(Coefficients) { return false; }
    static inline vec value(const Pair& x, Coefficients) { return -0.5f * max(x.p, x.q) * expm1_negative(-abs(x.d)); }
    static inline vec slope(const Pair& x, Coefficients) {
        const vec sign = x.d > set(0.0f) ? set(-0.5f) : set(0.5f);
        return x.q * (x.d == set(0.0f) ? vec{} : sign);
    }
};

// -(p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)) / (a b) and its limits, a = first, b = second.
struct AlphaBeta {
    static constexpr bool kSumsToZero = false;
    static bool student_must(Coefficients c) { return c.second == 0; }
    static bool teacher_must(Coefficients c) { return c.first == 0; }
    static bool slope_too(Coefficients c) { return c.first == 0; }

    static inline vec power(vec log_x, float exponent) {
        return exponent == 0 ? set(1.0f) : exp(max(set(-1e6f), log_x * exponent));
    }

    static inline vec value(const Pair& x, Coefficients c) {
        const float a = c.first, b = c.second, s = a + b;
        if (s == 0) return 0.5f * x.d * x.d;
        const vec p_s = power(x.log_p, s), q_s = power(x.log_q, s);
        // For small d, over q^s: sum over n >= 2 of (s^(n-1) - a^(n-1)) / (b n!) d^n; the quotient q_n is
        // q_(n+1) = s q_n + a^(n-1).
        float quotient = 1, a_power = 1, factor = 0.5f;
        vec series{}, d_power = x.d * x.d;
        for (int n = 2; n <= 8; ++n) {
            series = fma(d_power, set(quotient * factor), series);
            d_power *= x.d;
            a_power *= a;
            quotient = s * quotient + a_power;
            factor /= float(n + 1);
        }
        vec far;
        if (b == 0) {
            far = (p_s * (a * x.d) - p_s + q_s) / (a * a);
        } else if (a == 0) {
            far = (q_s * (-b * x.d) - q_s + p_s) / (b * b);
        } else {
            const vec cross = power(x.log_p, a) * power(x.log_q, b);
            far = (a / s * p_s + b / s * q_s - cross) / (a * b);
        }
        return s * abs(x.d) < set(0.125f) ? q_s * series : far;
    }

    static inline vec slope(const Pair& x, Coefficients c) {
        const float a = c.first, b = c.second;
        if (a == 0) return -power(x.log_q, b) * x.d;
        const vec q_s = power(x.log_q, a + b), e = expm1_negative(-a * abs(x.d));
        // expm1 of a positive number from that of its opposite.
        const vec near = -q_s * (x.d > set(0.0f) ? -e / (e + 1.0f) : e) / a;
        const vec far = (q_s - power(x.log_p, a) * power(x.log_q, b)) / a;
        return a * abs(x.d) < set(1.0f) ? near : far;
    }
};

// The sum of h of a row whose value is infinite: the vector loops know kLowest for -inf, so that their sum is a finite number
// that means nothing. An infinite one leaves no finite gradient, as the definition has none.
template <class D>
double slope_where_infinite(double slope, Coefficients c) {
    return D::slope_too(c) ? std::copysign(double(kInf), slope) : slope;
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
