// Two passes over a row: log-sum-exps from memory, then value and gradient from the caches the first pass filled.
#include "logits.h"

#include "divergence.h"
#include "rows.h"

namespace kdfast {
namespace KDFAST_ISA {
namespace {

// What the second pass has to know of a row.
struct RowSums {
    float anchor_s = 0, anchor_t = 0;
    double lse_s = 0, lse_t = 0;      // at T, over the common ids
    double lse_1 = 0;                 // student at T = 1 over its whole vocabulary
    double lse_s1 = 0, lse_t1 = 0;    // at T = 1 over the common ids; parts only
    float lowest_s = 0;
    bool agree = false, bad = false;
};

struct Values {
    double soft = 0, kl_at_1 = 0, entropy = 0;
};

template <bool kHard, bool kWithParts, int kPower>
RowSums first_pass(Source s, Source t, int64_t common, int64_t vs, float inverse_t, Buffer* buffers) {
    OnlineSum<kHard, kPower> student(inverse_t);
    OnlineSum<kWithParts, kPower> teacher(inverse_t);
    for (int64_t begin = 0; begin < common; begin += kBlock) {
        const int64_t n = std::min(kBlock, common - begin);
        student.add(s.block(begin, n, buffers[0]), begin, n);
        teacher.add(t.block(begin, n, buffers[1]), begin, n);
    }
    RowSums sums;
    sums.anchor_s = student.anchor();
    sums.anchor_t = teacher.anchor();
    sums.lse_s = student.lse();
    sums.lse_t = teacher.lse();
    sums.lowest_s = student.lowest();
    sums.bad = !std::isfinite(sums.lse_s) || !std::isfinite(sums.lse_t);
    if (kHard) {
        sums.lse_1 = sums.lse_s1 = student.lse_at_1();
        if (vs > common) {
            OnlineSum<false, 0> extra(1.0f);
            for (int64_t begin = common; begin < vs; begin += kBlock) {
                const int64_t n = std::min(kBlock, vs - begin);
                extra.add(s.block(begin, n, buffers[0]), begin, n);
            }
            sums.bad |= std::isnan(extra.lse());
            sums.lse_1 = log_add(sums.lse_1, extra.lse());
        }
    }
    if (kWithParts) {
        sums.lse_t1 = teacher.lse_at_1();
        sums.agree = !sums.bad && student.argmax(s, common, buffers[0]) == teacher.argmax(t, common, buffers[1]);
    }
    return sums;
}

// Value and gradient over the common ids. soft_grad and hard_grad are the factors of dD/du and of q at T = 1.
template <bool kHard, bool kWithParts, int kPower, bool kValue, bool kGrad, bool kStream>
Values second_pass(Source s, Source t, Sink g, int64_t common, const RowSums& sums, float inverse_t, float soft_grad,
                   float hard_grad, Buffer* buffers) {
    const Softmax q(sums.anchor_s, inverse_t, sums.lse_s), p(sums.anchor_t, inverse_t, sums.lse_t);
    const Softmax q1(sums.anchor_s, 1, sums.lse_s1), p1(sums.anchor_t, 1, sums.lse_t1);
    const float log_ratio = q.log_sum - p.log_sum, log_ratio_1 = q1.log_sum - p1.log_sum;
    // In backward the anchor comes from T and may lie far from the row's maximum at 1: hard gets an anchor of its own.
    const float anchor_hard = kPower == 0 ? float(sums.lse_1) : sums.anchor_s;
    const float hard = kHard ? hard_grad * Softmax(anchor_hard, 1, sums.lse_1).factor : 0;
    Values total;
    for (int64_t begin = 0; begin < common; begin += kBlock) {
        const int64_t n = std::min(kBlock, common - begin);
        const float* zs = s.block(begin, n, buffers[0]);
        const float* zt = t.block(begin, n, buffers[1]);
        float* out = kGrad ? g.block(begin, n, buffers[2]) : nullptr;
        vec soft{}, kl{}, entropy{};
        for (int64_t i = 0; i < padded(n); i += W) {
            const vec x = load(zs + i), y = load(zt + i);
            const vec us = q.shifted(x), ut = p.shifted(y);
            const vec es = exp(us), et = exp(ut);
            const vec qv = es * q.factor, pv = et * p.factor;
            if (kValue) soft += ForwardKl::value(pv, qv, (ut - us) + log_ratio);
            if (kWithParts) {
                const vec us1 = q1.shifted(x), ut1 = p1.shifted(y);
                const vec qv1 = exp_at_1<kPower>(es, x, q1.anchor) * q1.factor;
                const vec pv1 = exp_at_1<kPower>(et, y, p1.anchor) * p1.factor;
                kl += ForwardKl::value(pv1, qv1, (ut1 - us1) + log_ratio_1);
                entropy += pv1 * (p1.log_sum - ut1);
            }
            if (kGrad) {
                vec grad = soft_grad * ForwardKl::derivative(pv, qv);
                if (kHard) grad += hard * exp_at_1<kPower>(es, x, anchor_hard);
                kStream ? stream(out + i, grad) : store(out + i, grad);
            }
        }
        if (kGrad) g.commit(begin, n, out);
        total.soft += reduce_add(soft);
        total.kl_at_1 += reduce_add(kl);
        total.entropy += reduce_add(entropy);
    }
    return total;
}

// A student that gives -inf to an id the teacher may say has infinite KL; the vector loop only knows kLowest.
bool impossible(Source s, Source t, int64_t common) {
    for (int64_t i = 0; i < common; ++i) {
        if (s.at(i) == -kInf && t.at(i) != -kInf) return true;
    }
    return false;
}

template <bool kHard, bool kWithParts, int kPower, bool kForward>
void one_row(const LogitsArgs& a, int64_t r, Buffer* buffers) {
    const int64_t vs = a.student.columns, common = std::min(vs, a.teacher.columns);
    const float inverse_t = 1.0f / a.weights.temperature, scale = a.scale[r];
    const Source s{a.student.row(r), a.student.dtype}, t{a.teacher.row(r), a.teacher.dtype};
    const Sink g{a.grad.data ? a.grad.row(r) : nullptr, a.grad.dtype};
    double* stats = a.stats + r * kStats;
    if (scale == 0) {
        if (g.data) g.clear(vs);
        if (kForward) clear_row(r, a.loss, a.stats, a.parts);
        return;
    }
    RowSums sums;
    if (kForward) {
        sums = first_pass<kHard, kWithParts, kPower>(s, t, common, vs, inverse_t, buffers);
    } else {
        sums.lse_s = stats[0];
        sums.lse_t = stats[1];
        sums.lse_1 = stats[2];
        sums.anchor_s = float(sums.lse_s / inverse_t);
        sums.anchor_t = float(sums.lse_t / inverse_t);
    }
    const bool labelled = a.labels != nullptr;
    const int64_t label = labelled ? a.labels[r] : -1;
    const bool label_ok = label >= 0 && label < vs;
    // Read before an in-place gradient takes their place.
    const float student_label = label_ok ? s.at(label) : 0;
    const float teacher_label = label_ok && label < common ? t.at(label) : -kInf;
    const bool infinite = kForward && sums.lowest_s == -kInf && impossible(s, t, common);
    const float soft_grad = scale * a.weights.soft_scale * inverse_t, hard_grad = scale * a.weights.hard_weight;
    const bool past_caches = g.data && g.data != s.data && g.dtype == Dtype::float32 &&
                             a.rows * vs * 4 >= kStreamBytes && reinterpret_cast<uintptr_t>(g.data) % sizeof(vec) == 0 &&
                             common % W == 0;
    Values values;
    if (!g.data) {
        values = second_pass<kHard, kWithParts, kPower, true, false, false>(s, t, g, common, sums, inverse_t, 0, 0, buffers);
    } else if (past_caches) {
        values = second_pass<kHard, kWithParts, kPower, kForward, true, true>(s, t, g, common, sums, inverse_t, soft_grad,
                                                                              hard_grad, buffers);
    } else {
        values = second_pass<kHard, kWithParts, kPower, kForward, true, false>(s, t, g, common, sums, inverse_t, soft_grad,
                                                                               hard_grad, buffers);
    }
    if (g.data && vs > common) hard_only_pass(s, g, common, vs, sums.lse_1, kHard ? hard_grad : 0, buffers);
    if (g.data && kHard && label_ok && a.weights.hard_weight != 0) {
        // Formed again rather than subtracted: a half-precision gradient would be rounded twice.
        double grad = hard_grad * std::expm1(double(student_label) - sums.lse_1);
        if (label < common) {
            grad += soft_grad * (std::exp(double(student_label) * inverse_t - sums.lse_s) -
                                 std::exp(double(teacher_label) * inverse_t - sums.lse_t));
        }
        g.set(label, float(grad));
    }
    if (!kForward) return;
    stats[0] = sums.lse_s;
    stats[1] = sums.lse_t;
    stats[2] = sums.lse_1;
    const float soft = infinite ? kInf : float(values.soft);
    const float hard = kHard && labelled ? float(sums.lse_1 - student_label) : 0;
    const float loss = scale * (weighted(a.weights.soft_scale, soft) + weighted(a.weights.hard_weight, hard));
    a.loss[r] = sums.bad || (labelled && !label_ok) ? kNan : loss;
    if (kWithParts) {
        float* parts = a.parts + r * kParts;
        parts[0] = soft;
        parts[1] = hard;
        parts[2] = infinite ? kInf : float(values.kl_at_1);
        parts[3] = labelled ? float(sums.lse_t1 - teacher_label) : 0;
        parts[4] = float(values.entropy);
        parts[5] = sums.agree ? 1.0f : 0.0f;
    }
}

template <bool kHard, bool kWithParts, int kPower, bool kForward>
void all_rows(const LogitsArgs& a) {
#pragma omp parallel num_threads(a.threads)
    {
        Buffer buffers[3];
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = 0; r < a.rows; ++r) one_row<kHard, kWithParts, kPower, kForward>(a, r, buffers);
        stream_fence();
    }
}

}  // namespace

void logits_forward(const LogitsArgs& a) {
    with_power(a.weights.temperature, [&](auto power) {
        constexpr int kPower = decltype(power)::value;
        if (a.parts) {
            all_rows<true, true, kPower, true>(a);
        } else if (a.weights.hard_weight != 0) {
            all_rows<true, false, kPower, true>(a);
        } else {
            all_rows<false, false, kPower, true>(a);
        }
    });
}

void logits_backward(const LogitsArgs& a) {
    a.weights.hard_weight != 0 ? all_rows<true, false, 0, false>(a) : all_rows<false, false, 0, false>(a);
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
