// One row of an attention map: its loss, and in the place of the difference its gradient.
//
// A row comes as student - teacher, formed without cancellation where head sizes allow, and the teacher; so that a student close
// to its teacher is q - p = p * expm1(log q - log p), not a difference of two exponentials.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "divergence.h"
#include "rows.h"

namespace kdfast {
namespace KDFAST_ISA {

typedef uint8_t bytes __attribute__((vector_size(W)));

// A row whose scores all differ by less is close: its series are good to a rounding up to twice this.
constexpr float kClose = 0.25f;

inline vec get(const float* p, int64_t i, int64_t n, float fill) {
    return i + W <= n ? load(p + i) : load_tail(p + i, n - i, fill);
}

inline void put(float* p, int64_t i, int64_t n, vec x) { i + W <= n ? store(p + i, x) : store_tail(p + i, n - i, x); }

inline ivec counted(const uint8_t* mask, int64_t i, int64_t n) {
    bytes b{};
    std::memcpy(&b, mask + i, size_t(std::min<int64_t>(W, n - i)));
    return __builtin_convertvector(b, ivec) != 0;
}

inline vec absolute(vec x) { return max(x, -x); }

// exp(x) - 1 for |x| <= 1/2.
inline vec expm1_small(vec x) {
    vec y = fma(x, set(1.0f / 40320), set(1.0f / 5040));
    y = fma(y, x, set(1.0f / 720));
    y = fma(y, x, set(1.0f / 120));
    y = fma(y, x, set(1.0f / 24));
    y = fma(y, x, set(1.0f / 6));
    y = fma(y, x, set(0.5f));
    return fma(y * x, x, x);
}

inline vec exp_below(vec x, float top) { return exp(max(set(kLowest), x - top)); }

// A row's two softmaxes. `difference` is left as scaled scores, 0 at keys that do not count; `teacher` holds exp(u_t - top_t)
// and, unless the row is close, `student` exp(u_s - top_s).
struct RowSoftmax {
    bool empty, close;
    float p_factor, q_factor;  // 1 / sum of the exponentials
    float shift;               // log-sum-exp of the student less the teacher's: log q - log p = difference - shift
};

inline RowSoftmax row_softmax(float* difference, float* teacher, float* student, int64_t n, const uint8_t* keys, float factor_s,
                       float factor_t) {
    const float lowest_t = factor_t < 0 ? kInf : -kInf;
    vec top_t = set(-kInf), top_s = set(-kInf), largest{};
    for (int64_t i = 0; i < n; i += W) {
        vec d = get(difference, i, n, 0) * factor_s, t = get(teacher, i, n, lowest_t) * factor_t;
        if (keys) {
            const ivec on = counted(keys, i, n);
            d = on ? d : set(0);
            t = on ? t : set(-kInf);
        }
        top_t = max(top_t, t);
        top_s = max(top_s, t + d);
        largest = max(largest, absolute(d));
        put(difference, i, n, d);
        put(teacher, i, n, t);
    }
    RowSoftmax row{};
    const float highest_t = reduce_max(top_t), highest_s = reduce_max(top_s);
    row.empty = highest_t == -kInf;
    row.close = reduce_max(largest) <= kClose;
    vec sum_t{}, sum_s{};
    for (int64_t i = 0; i < n; i += W) {
        const vec d = get(difference, i, n, 0), t = get(teacher, i, n, -kInf);
        const vec p = exp_below(t, highest_t);
        sum_t += p;
        if (row.close) {
            sum_s += p * expm1_small(d);
        } else {
            const vec q = exp_below(t + d, highest_s);
            sum_s += q;
            put(student, i, n, q);
        }
        put(teacher, i, n, p);
    }
    const double total_t = reduce_add(sum_t), total_s = reduce_add(sum_s);
    row.p_factor = float(1 / total_t);
    if (row.close) {
        row.shift = float(std::log1p(total_s / total_t));
    } else {
        row.q_factor = float(1 / total_s);
        row.shift = float(double(highest_s) - double(highest_t) + std::log(total_s / total_t));
    }
    return row;
}

// sum KL(p || q); the gradient q - p with respect to the student's scores, times `weight`, over `difference`.
inline double kl_row(const RowSoftmax& row, float* difference, const float* teacher, const float* student, int64_t n, float weight) {
    vec loss{};
    for (int64_t i = 0; i < n; i += W) {
        const vec v = get(difference, i, n, row.shift) - row.shift, p = get(teacher, i, n, 0) * row.p_factor;
        const vec apart = row.close ? p * expm1_small(v) : get(student, i, n, 0) * row.q_factor - p;
        loss += kl_term(p, p + apart, -v);
        put(difference, i, n, weight * apart);
    }
    return reduce_add(loss);
}

// sum (q - p)^2; its gradient 2 q (e - <e, q>), e = q - p, times `weight`, over `difference`.
inline double probs_row(const RowSoftmax& row, float* difference, float* teacher, const float* student, int64_t n, float weight) {
    vec loss{}, along{};
    for (int64_t i = 0; i < n; i += W) {
        const vec v = get(difference, i, n, row.shift) - row.shift, p = get(teacher, i, n, 0) * row.p_factor;
        const vec apart = row.close ? p * expm1_small(v) : get(student, i, n, 0) * row.q_factor - p;
        const vec q = p + apart;
        loss += apart * apart;
        along += apart * q;
        put(difference, i, n, apart);
        put(teacher, i, n, q);
    }
    const float mean = reduce_add(along);
    for (int64_t i = 0; i < n; i += W) {
        put(difference, i, n, (2 * weight) * get(teacher, i, n, 0) * (get(difference, i, n, 0) - mean));
    }
    return reduce_add(loss);
}

inline double scores_row(float* difference, int64_t n, float factor, float weight) {
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
        const int64_t end = std::min(n, begin + kBlock);
        vec loss{};
        for (int64_t i = begin; i < end; i += W) {
            const vec d = get(difference, i, end, 0) * factor;
            loss += d * d;
            put(difference, i, end, (2 * weight) * d);
        }
        total += reduce_add(loss);
    }
    return total;
}

inline double attention_row(AttentionKind kind, float* difference, float* teacher, float* student, int64_t n, const uint8_t* keys,
                            float factor_s, float factor_t, float scale) {
    const float weight = scale * factor_s;
    if (kind == AttentionKind::scores) return scores_row(difference, n, factor_s, weight);
    const RowSoftmax row = row_softmax(difference, teacher, student, n, keys, factor_s, factor_t);
    if (row.empty) {
        std::fill(difference, difference + n, 0.0f);
        return 0;
    }
    return kind == AttentionKind::kl ? kl_row(row, difference, teacher, student, n, weight)
                                     : probs_row(row, difference, teacher, student, n, weight);
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
