// The arithmetic of a row: online sums, what follows from them, value and gradient of forward KL and cross-entropy.
//
// While a thread adds up whole units it keeps its sums relative to the float32 product of the maximum and c = log2(e) / T, so
// that a term is one fused multiply-add and one exp2; `settle` then makes them relative to the maximum itself, which is what
// everybody else sees. What the product rounds away must stay a small power of 2: a row whose largest logit is below -2^26 has
// no distribution, and one with a logit above 2^30 is NaN.
#pragma once

#include "element.h"

namespace kdfast {
namespace cluster {

// How the student's softmax at T = 1 comes about: not needed, that at T, the square of that at T = 2, or on its own.
enum class AtOne { none, same, square, own };

// Where a maximum starts; a power of 2, whose product with c is exact.
constexpr float kLowest = -0x1p26f;
constexpr int kNoColumn = 0x7fffffff;

struct Sum {
    float m = kLowest;         // largest so far
    float at_t = 0, at_1 = 0;  // sums of exp2((x - m) * c), and of the same at T = 1
};

// Adds N values of a unit. A NaN passes the maximum by but not the sums; +inf makes them inf - inf.
template <AtOne A, int N>
KDFAST_HD void add(Sum& sum, const float (&x)[N], float c) {
    float m = sum.m;
    KDFAST_UNROLL
    for (int i = 0; i < N; ++i) m = fmaxf(m, x[i]);
    const float r = product(m, c), moved = exp2(product(sum.m, c) - r);
    sum.at_t *= moved;
    if (A == AtOne::square) sum.at_1 *= moved * moved;
    KDFAST_UNROLL
    for (int i = 0; i < N; ++i) {
        const float e = exp2(fmaf(x[i], c, -r));
        sum.at_t += e;
        if (A == AtOne::square) sum.at_1 = fmaf(e, e, sum.at_1);
    }
    if (A == AtOne::own) {
        const float r_1 = product(m, kLog2e);
        sum.at_1 *= exp2(product(sum.m, kLog2e) - r_1);
        KDFAST_UNROLL
        for (int i = 0; i < N; ++i) sum.at_1 += exp2(fmaf(x[i], kLog2e, -r_1));
    }
    sum.m = m;
}

// From relative to the rounded product to relative to the maximum.
template <AtOne A>
KDFAST_HD void settle(Sum& sum, float c) {
    sum.at_t *= exp2(fmaf(-sum.m, c, product(sum.m, c)));
    if (A == AtOne::square || A == AtOne::own) sum.at_1 *= exp2(fmaf(-sum.m, kLog2e, product(sum.m, kLog2e)));
}

// A sum that has moved to a maximum `to`.
KDFAST_HD float raised(float total, float from, float to, float c) { return total * exp2((from - to) * c); }

// Adds one value to a settled sum; a row of one column ends with exactly 1.
template <AtOne A>
KDFAST_HD void add_one(Sum& sum, float x, float c) {
    const float m = fmaxf(sum.m, x);
    sum.at_t = raised(sum.at_t, sum.m, m, c) + exp2((x - m) * c);
    if (A == AtOne::square || A == AtOne::own) sum.at_1 = raised(sum.at_1, sum.m, m, kLog2e) + exp2((x - m) * kLog2e);
    sum.m = m;
}

// The sums of a row: student and teacher over the columns both have, and the student at T = 1 over those only it has.
struct RowSums {
    Sum student, teacher, extra;
};

struct Scalars {
    float c, inverse_t;  // log2(e) / T and 1 / T
    float soft_scale, hard_weight, z_loss;
};

// What the second pass has to know of a row. l are log2 of sums relative to the maxima m.
struct Row {
    float m_s, l_s, m_t, l_t;  // at T
    float l_s1, l_t1;          // at 1 over the common columns (l_t1 with parts only)
    float m_1, l_1;            // student at 1 over its whole vocabulary
    float shift;               // d = ((t - m_t) - (s - m_s)) / T + shift
    float of_soft, of_q1, of_label;  // weights of the gradient's terms
    float of_q;  // turns q, or its square, into the term at T = 1

    KDFAST_HD float lse_1() const { return fmaf(kLn2, l_1, m_1); }
};

template <AtOne A, bool P>
KDFAST_HD Row row_of(const RowSums& sums, bool has_extra, const Scalars& o, float scale, bool has_label) {
    const Sum &s = sums.student, &t = sums.teacher;
    Row row;
    row.m_s = s.m;
    row.m_t = t.m;
    row.l_s = row.l_s1 = log2f(s.at_t);
    row.l_t = row.l_t1 = log2f(t.at_t);
    if (A == AtOne::square || A == AtOne::own) row.l_s1 = log2f(s.at_1);
    if (P && A == AtOne::own) row.l_t1 = log2f(t.at_1);
    row.m_1 = row.m_s;
    row.l_1 = row.l_s1;
    if (has_extra) {
        // Each side moves to the common maximum by itself: the smaller one may vanish, the larger one must not.
        row.m_1 = fmaxf(s.m, sums.extra.m);
        const float there = exp2(log2f(sums.extra.at_1) + (sums.extra.m - row.m_1) * kLog2e);
        row.l_1 = log2f(exp2(row.l_s1 + (s.m - row.m_1) * kLog2e) + there);
    }
    row.shift = kLn2 * (row.l_s - row.l_t);
    row.of_soft = scale * o.soft_scale * o.inverse_t;
    row.of_label = has_label ? scale * o.hard_weight : 0.0f;
    row.of_q1 = row.of_label + scale * 2 * o.z_loss * row.lse_1();
    const float power = A == AtOne::square ? 2.0f : 1.0f;
    row.of_q = row.of_q1 * exp2((row.m_s - row.m_1) * kLog2e + (power * row.l_s - row.l_1));
    return row;
}

struct Totals {
    float soft = 0, kl_at_1 = 0, entropy = 0, student_entropy = 0;
    int best_s = kNoColumn, best_t = kNoColumn;  // first column of the largest logit
};

// Term p*(d + expm1(-d)) of KL(p || q), and q - p. Terms are >= 0; p*d alone cancels to noise near agreement.
KDFAST_HD void forward_kl(float p, float q, float d, float& term, float& difference) {
    // Taylor series of d + expm1(-d); below 1/4 what it leaves out is 4e-7 of it.
    const float series = fmaf(d, fmaf(d, fmaf(d, fmaf(d, 1.0f / 720, -1.0f / 120), 1.0f / 24), -1.0f / 6), 0.5f);
    const float close = p * (d * d * series), apart = q - p, size = fabsf(d);
    // p = 0 beside an infinite d, or inf - inf where both logits are -inf, leaves q.
    const float far = if_less(0.0f, p, fmaf(p, d, apart), q);
    term = if_less(size, 0.25f, close, far);
    difference = if_less(size, 0.25f, fmaf(-p, d, close), apart);
}

KDFAST_HD float q_at_1(const Row& row, float s) { return exp2(fmaf(s - row.m_1, kLog2e, -row.l_1)); }

// Adds the terms of N columns from `column` on and leaves their gradient, the label's own term aside.
template <AtOne A, bool P, int N>
KDFAST_HD void column_terms(
    const Row& row, const Scalars& o, const float (&s)[N], const float (&t)[N], int column, Totals& totals, float (&g)[N]
) {
    KDFAST_UNROLL
    for (int i = 0; i < N; ++i) {
        const float x = s[i] - row.m_s, y = t[i] - row.m_t;
        const float log2_p = fmaf(y, o.c, -row.l_t);
        const float p = exp2(log2_p), q = exp2(fmaf(x, o.c, -row.l_s));
        float term, difference;
        forward_kl(p, q, fmaf(y - x, o.inverse_t, row.shift), term, difference);
        totals.soft += term;
        g[i] = row.of_soft * difference;
        if (A == AtOne::same) g[i] = fmaf(row.of_q, q, g[i]);
        if (A == AtOne::square) g[i] = fmaf(row.of_q * q, q, g[i]);
        if (A == AtOne::own) g[i] = fmaf(row.of_q1, q_at_1(row, s[i]), g[i]);
        if (P) {
            float p_1 = p, log2_p1 = log2_p, q_1 = q, log2_q1 = fmaf(x, o.c, -row.l_s);
            if (A == AtOne::own) {
                log2_p1 = fmaf(y, kLog2e, -row.l_t1);
                p_1 = exp2(log2_p1);
                log2_q1 = fmaf(x, kLog2e, -row.l_s1);
                q_1 = exp2(log2_q1);
                float unused;
                const float d = (y - x) + kLn2 * (row.l_s1 - row.l_t1);
                forward_kl(p_1, q_1, d, term, unused);
                totals.kl_at_1 += term;
            }
            totals.entropy -= p_1 == 0 ? 0.0f : kLn2 * p_1 * log2_p1;
            totals.student_entropy -= q_1 == 0 ? 0.0f : kLn2 * q_1 * log2_q1;
            if (s[i] == row.m_s && column + i < totals.best_s) totals.best_s = column + i;
            if (t[i] == row.m_t && column + i < totals.best_t) totals.best_t = column + i;
        }
    }
}

// The gradient of a column that only the student has.
template <AtOne A>
KDFAST_HD float extra_gradient(const Row& row, float s) {
    return A == AtOne::none ? 0.0f : row.of_q1 * q_at_1(row, s);
}

// Of the label's column.
struct Logits {
    float student, teacher;
};

// What is known of a row's loss before its second pass.
struct Outline {
    float lse_1, m_1, l_1;  // student at T = 1
    float m_t, l_t1;        // teacher at T = 1
    float scale;
    bool has_labels, label_counts, label_common;  // there are labels; this one is in the vocabulary; and in the teacher's
    bool valid;                                   // both sides have a distribution

    KDFAST_HD float nll(float s_label) const { return (m_1 - s_label) + kLn2 * l_1; }
};

// `label` is -1 where it is outside the vocabulary.
KDFAST_HD Outline outline_of(const Row& row, float scale, bool has_labels, int label, int common) {
    const bool valid = row.l_s > -INFINITY && row.l_t > -INFINITY, inside = label >= 0;
    return {row.lse_1(), row.m_1, row.l_1, row.m_t, row.l_t1, scale, has_labels, inside, inside && label < common, valid};
}

template <AtOne A>
KDFAST_HD float loss_of(const Outline& row, const Scalars& o, float soft, float s_label) {
    // No weight means no term even if it is infinite.
    float loss = !row.valid ? NAN : o.soft_scale == 0 ? 0.0f : o.soft_scale * soft;
    if (row.has_labels && !row.label_counts) loss = NAN;
    if (A != AtOne::none) {
        if (row.has_labels && o.hard_weight != 0) loss += o.hard_weight * row.nll(s_label);
        loss += o.z_loss * row.lse_1 * row.lse_1;
    }
    return row.scale * loss;
}

// In the order of kdfast.options.PARTS.
template <AtOne A>
KDFAST_HD void parts_of(const Outline& row, const Totals& totals, const Logits& label, float* parts) {
    parts[0] = row.valid ? totals.soft : NAN;
    parts[1] = !row.has_labels ? 0.0f : row.label_counts ? row.nll(label.student) : NAN;
    parts[2] = row.lse_1 * row.lse_1;
    parts[3] = A == AtOne::own ? totals.kl_at_1 : parts[0];
    parts[4] = !row.has_labels ? 0.0f : row.label_common ? (row.m_t - label.teacher) + kLn2 * row.l_t1 : INFINITY;
    parts[5] = totals.entropy;
    parts[6] = totals.best_s == totals.best_t ? 1.0f : 0.0f;
    parts[7] = totals.student_entropy;
}

}  // namespace cluster
}  // namespace kdfast
