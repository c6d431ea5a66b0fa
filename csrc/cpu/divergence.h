// Divergences between tempered teacher p and student q: the value of one element, and the derivative of the row's
// value with respect to the student's tempered logit.
#pragma once

#include "simd.h"

namespace kdfast {
namespace KDFAST_ISA {

// KL(p || q) = sum p * (log p - log q).
struct ForwardKl {
    // p * (d + expm1(-d)) with d = log p - log q, which is p * d + (q - p): >= 0, so that the row's sum does not cancel
    // when student and teacher agree. For small d the bracket is a series, d^2/2 - d^3/6 + ..., cut at 4e-7 of itself.
    static inline vec value(vec p, vec q, vec d) {
        vec series = fma(d, set(1.0f / 720), set(-1.0f / 120));
        series = fma(series, d, set(1.0f / 24));
        series = fma(series, d, set(-1.0f / 6));
        series = fma(series, d, set(0.5f));
        const vec near = p * d * d * series;
        const vec far = fma(p, d, q - p);
        return d * d < set(0.0625f) ? near : far;
    }

    // d value / d (student logit / T).
    static inline vec derivative(vec p, vec q) { return q - p; }
};

}  // namespace KDFAST_ISA
}  // namespace kdfast
