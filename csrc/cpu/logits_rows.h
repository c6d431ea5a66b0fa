// Two passes over a row: log-sum-exps from memory, then value and gradient from the caches the first pass filled. Where the
// gradient needs the row's mean slope, value and slope come in a pass of their own before it.
#pragma once

#include "divergence.h"
#include "logits.h"
#include "teacher.h"

namespace kdfast {
namespace KDFAST_ISA {
namespace {

// Row statistics forward leaves for backward: log-sum-exp of the student at T over the common ids and at 1 over all its ids,
// sum of the slope, then the log-sum-exp at T of every teacher (of the one they make when their logits are mixed).
enum Stats { kLse = 0, kLse1 = 1, kSlope = 2, kTeachers = 3 };

struct Room {
    Buffer student, teacher, teacher_1, grad;
    Teacher at_t, at_1;
    std::vector<double> lse, lse_1;
};

// What the passes after the first have to know of a row.
struct RowSums {
    float anchor_s = 0, anchor_t = 0;
    double lse_s = 0, lse_t = 0;      // at T, over the common ids
    double lse_1 = 0;                 // student at T = 1 over its whole vocabulary
    double lse_s1 = 0, lse_t1 = 0;    // at T = 1 over the common ids; parts only
    double student_sum = 0;           // of its logits, for label smoothing
    float lowest_s = 0, lowest_t = 0;
    int64_t best_t = 0;               // first id of the largest teacher logit; parts only
    bool agree = false, bad = false;
};

struct Values {
    double soft = 0, slope = 0, kl_at_1 = 0, entropy = 0, student_entropy = 0;
};

// Gradient of a row: soft * (slope - q * mean_slope) + hard * q_1 - constant, and -label at the label.
struct Factors {
    float soft = 0, hard = 0, constant = 0, label = 0, mean_slope = 0;
};

template <typename Row>
int64_t first_highest(const Row& row, int64_t columns, Buffer& buffer) {
    float best = -kInf;
    int64_t at = 0;
    for (int64_t begin = 0; begin < columns; begin += kBlock) {
        const int64_t n = std::min(kBlock, columns - begin);
        const float* z = row.block(begin, n, buffer);
        const float* high = std::max_element(z, z + n);
        if (*high > best) best = *high, at = begin + (high - z);
    }
    return at;
}

template <bool kWithParts, int kPower>
void teacher_sums(Room& room, int64_t common, float inverse_t, RowSums& sums) {
    const Teacher& t = room.at_t;
    if (!t.mixes_probs()) {
        OnlineSum<kWithParts, kPower> teacher(inverse_t);
        for (int64_t begin = 0; begin < common; begin += kBlock) {
            const int64_t n = std::min(kBlock, common - begin);
            teacher.add(t.block(begin, n, room.teacher), begin, n, &t.members[0]);
        }
        sums.anchor_t = teacher.anchor();
        sums.lse_t = room.lse[0] = teacher.lse();
        sums.lse_t1 = kWithParts ? teacher.lse_at_1() : 0;
        sums.lowest_t = teacher.lowest();
        if (kWithParts) sums.best_t = teacher.argmax(t, common, room.teacher);
        return;
    }
    sums.lowest_t = kInf;
    for (size_t i = 0; i < t.members.size(); ++i) {
        OnlineSum<true, 0> member(inverse_t);
        for (int64_t begin = 0; begin < common; begin += kBlock) {
            const int64_t n = std::min(kBlock, common - begin);
            member.add(t.members[i].block(begin, n, room.teacher), begin, n, &t.members[i]);
        }
        room.lse[i] = member.lse();
        room.lse_1[i] = member.lse_at_1();
        sums.bad |= !std::isfinite(room.lse[i]);
        sums.lowest_t = std::min(sums.lowest_t, member.lowest());
    }
    room.at_t.know(inverse_t, room.lse.data());
    room.at_1.know(1, room.lse_1.data());
    if (kWithParts) sums.best_t = first_highest(room.at_1, common, room.teacher);
}

template <bool kHard, bool kWithParts, int kPower>
RowSums first_pass(Source s, Room& room, int64_t common, int64_t vs, const LogitsOptions& options) {
    const float inverse_t = 1.0f / options.temperature;
    OnlineSum<kHard, kPower> student(inverse_t);
    RowSums sums;
    for (int64_t begin = 0; begin < common; begin += kBlock) {
        const int64_t n = std::min(kBlock, common - begin);
        const float* z = s.block(begin, n, room.student);
        student.add(z, begin, n, &s);
        if (options.label_smoothing != 0) sums.student_sum += sum_of(z, n);
    }
    sums.anchor_s = student.anchor();
    sums.lse_s = student.lse();
    sums.lowest_s = student.lowest();
    teacher_sums<kWithParts, kPower>(room, common, inverse_t, sums);
    sums.bad |= !std::isfinite(sums.lse_s) || !std::isfinite(sums.lse_t);
    if (kHard) {
        sums.lse_1 = sums.lse_s1 = student.lse_at_1();
        if (vs > common) {
            OnlineSum<false, 0> extra(1.0f);
            for (int64_t begin = common; begin < vs; begin += kBlock) {
                const int64_t n = std::min(kBlock, vs - begin);
                const float* z = s.block(begin, n, room.student);
                extra.add(z, begin, n);
                if (options.label_smoothing != 0) sums.student_sum += sum_of(z, n);
            }
            sums.bad |= std::isnan(extra.lse());
            sums.lse_1 = log_add(sums.lse_1, extra.lse());
        }
    }
    if (kWithParts) {
        sums.agree = !sums.bad && student.argmax(s, common, room.student) == sums.best_t;
    }
    return sums;
}

// p, q and what the divergence needs of them, from shifted tempered logits in powers of 2.
struct Tempered {
    Softmax q, p;
    float log_ratio;

    Tempered(const RowSums& sums, float inverse_t)
        : q(sums.anchor_s, inverse_t, sums.lse_s),
          p(sums.anchor_t, inverse_t, sums.lse_t),
          log_ratio(float((sums.lse_s - double(sums.anchor_s) * inverse_t) - (sums.lse_t - double(sums.anchor_t) * inverse_t))) {}

    Pair pair(vec us, vec ut, vec es, vec et) const {
        const vec ln2 = set(0.693147180559945309f);
        const vec d = fma(ut - us, ln2, set(log_ratio));
        const ivec both = (us <= set(kLowest)) & (ut <= set(kLowest));
        return {et * p.factor, es * q.factor, both ? vec{} : d, fma(ut, ln2, set(-p.log_sum)), fma(us, ln2, set(-q.log_sum))};
    }
    Pair pair(vec x, vec y) const {
        const vec us = q.shifted_2(x), ut = p.shifted_2(y);
        return pair(us, ut, exp2(us), exp2(ut));
    }
};

template <class D>
inline vec soft_gradient(const Pair& x, Coefficients c, const Factors& f) {
    return f.soft * (D::kSumsToZero ? D::slope(x, c) : D::slope(x, c) - x.q * f.mean_slope);
}

// Over the common ids. kPower 1 or 2: exp at T = 1 follows from exp at T, on both sides.
template <class D, bool kHard, bool kWithParts, int kPower, bool kValue, bool kGrad, bool kStream>
Values next_pass(Source s, Room& room, Sink g, int64_t common, const RowSums& sums, const LogitsOptions& options, const Factors& f) {
    const Coefficients c{options.first, options.second};
    const float inverse_t = 1.0f / options.temperature;
    const Tempered at_t(sums, inverse_t);
    const Softmax &q = at_t.q, &p = at_t.p;
    const Softmax q1(sums.anchor_s, 1, sums.lse_s1), p1(room.at_1.mixes_probs() ? 0 : sums.anchor_t, 1, sums.lse_t1);
    const float log_ratio_1 = q1.log_sum - p1.log_sum;
    // In backward the anchor comes from T and may lie far from the row's maximum at 1: hard gets an anchor of its own.
    const float anchor_hard = kPower == 0 ? float(sums.lse_1) : sums.anchor_s;
    const float hard = kHard ? f.hard * Softmax(anchor_hard, 1, sums.lse_1).factor : 0;
    Values total;
    for (int64_t begin = 0; begin < common; begin += kBlock) {
        const int64_t n = std::min(kBlock, common - begin);
        const float* zs = s.block(begin, n, room.student);
        const float* zt = room.at_t.block(begin, n, room.teacher);
        const float* zt1 = kWithParts && room.at_1.mixes_probs() ? room.at_1.block(begin, n, room.teacher_1) : zt;
        float* out = kGrad ? g.block(begin, n, room.grad) : nullptr;
        vec soft{}, slope{}, kl{}, entropy{}, student_entropy{};
        for (int64_t i = 0; i < padded(n); i += W) {
            const vec x = load(zs + i), y = load(zt + i);
            const vec us = q.shifted_2(x), ut = p.shifted_2(y);
            const vec es = exp2(us), et = exp2(ut);
            const Pair pair = at_t.pair(us, ut, es, et);
            if (kValue) {
                soft += D::value(pair, c);
                if (!D::kSumsToZero) slope += D::slope(pair, c);
            }
            if (kWithParts && kValue) {
                const vec y1 = load(zt1 + i);
                const vec us1 = q1.shifted(x), ut1 = p1.shifted(y1);
                const vec qv1 = exp_at_1<kPower>(es, x, q1.anchor) * q1.factor;
                const vec pv1 = exp_at_1<kPower>(et, y1, p1.anchor) * p1.factor;
                kl += kl_term(pv1, qv1, (ut1 - us1) + log_ratio_1);
                entropy += pv1 * (p1.log_sum - ut1);
                student_entropy += qv1 * (q1.log_sum - us1);
            }
            if (kGrad) {
                vec grad = soft_gradient<D>(pair, c, f);
                if (kHard) grad += hard * exp_at_1<kPower>(es, x, anchor_hard) - f.constant;
                kStream ? stream(out + i, grad) : store(out + i, grad);
            }
        }
        if (kGrad && !s.head.trivial()) back_through_head(s.head, n, zs, out);
        if (kGrad) g.commit(begin, n, out);
        total.soft += reduce_add(soft);
        total.slope += reduce_add(slope);
        total.kl_at_1 += reduce_add(kl);
        total.entropy += reduce_add(entropy);
        total.student_entropy += reduce_add(student_entropy);
    }
    return total;
}

// An id that one side excludes and the other does not, where that makes the divergence infinite; the vector loop only
// knows kLowest.
template <class D>
bool impossible(Source s, const Teacher& t, int64_t common, const RowSums& sums, Coefficients c) {
    const bool look_s = D::student_must(c) && sums.lowest_s == -kInf, look_t = D::teacher_must(c) && sums.lowest_t == -kInf;
    if (!look_s && !look_t) return false;
    for (int64_t i = 0; i < common; ++i) {
        const bool none_s = s.at(i) == -kInf, none_t = t.excludes(i);
        if ((look_s && none_s && !none_t) || (look_t && none_t && !none_s)) return true;
    }
    return false;
}

RowSums sums_from_stats(const double* stats, Room& room, float inverse_t) {
    RowSums sums;
    sums.lse_s = stats[kLse];
    sums.lse_1 = stats[kLse1];
    sums.anchor_s = float(sums.lse_s / inverse_t);
    if (room.at_t.mixes_probs()) {
        room.at_t.know(inverse_t, stats + kTeachers);
    } else {
        sums.lse_t = stats[kTeachers];
        sums.anchor_t = float(sums.lse_t / inverse_t);
    }
    return sums;
}

// The label's logits, read before an in-place gradient takes the student's place.
struct Label {
    int64_t id = -1;
    float student = 0, raw = 0, teacher = 0, teacher_1 = 0;
    bool common = false;
};

template <class D, bool kHard, bool kWithParts, int kPower, bool kForward>
void one_row(const LogitsArgs& a, int64_t r, Room& room) {
    const LogitsOptions& o = a.options;
    const Coefficients c{o.first, o.second};
    int64_t vs = a.student.columns, common = vs;
    for (const Matrix& t : a.teachers) common = std::min(common, t.columns);
    const float inverse_t = 1.0f / o.temperature, scale = a.scale[r];
    const Source s{a.student.row(r), a.student.dtype, o.student_head};
    const Sink g{a.grad.data ? a.grad.row(r) : nullptr, a.grad.dtype};
    double* stats = a.stats + r * a.n_stats();
    if (scale == 0) {
        if (g.data) g.clear(vs);
        if (kForward) clear_row(r, a.n_stats(), a.loss, a.stats, a.parts);
        return;
    }
    for (size_t i = 0; i < a.teachers.size(); ++i) {
        room.at_t.members[i] = room.at_1.members[i] = {a.teachers[i].row(r), a.teachers[i].dtype, o.teacher_head};
    }
    RowSums sums = kForward ? first_pass<kHard, kWithParts, kPower>(s, room, common, vs, o) : sums_from_stats(stats, room, inverse_t);
    const bool labelled = a.labels != nullptr;
    Label label;
    if (labelled && a.labels[r] >= 0 && a.labels[r] < vs) {
        label.id = a.labels[r];
        label.student = s.at(label.id);
        label.common = label.id < common;
        label.teacher = label.common ? room.at_t.at(label.id) : -kInf;
        label.teacher_1 = kWithParts && label.common ? room.at_1.at(label.id) : -kInf;
    }
    const bool infinite = kForward && impossible<D>(s, room.at_t, common, sums, c);

    Factors f;
    f.soft = scale * o.soft_scale * inverse_t;
    f.hard = kHard ? scale * (o.hard_weight + 2 * o.z_loss * float(sums.lse_1)) : 0;
    f.constant = scale * o.hard_weight * o.label_smoothing / float(vs);
    f.label = scale * o.hard_weight * (1 - o.label_smoothing);
    Values values;
    constexpr bool kOnePass = D::kSumsToZero;
    if (kForward && (!kOnePass || !g.data)) {
        values = next_pass<D, kHard, kWithParts, kPower, true, false, false>(s, room, g, common, sums, o, f);
    }
    if (infinite && o.soft_scale != 0) values.slope = slope_where_infinite<D>(values.slope, c);
    f.mean_slope = float(kForward ? values.slope : stats[kSlope]);
    const bool past_caches = g.data && g.data != s.data && g.dtype == Dtype::float32 && s.head.trivial() &&
                             a.rows * vs * 4 >= kStreamBytes && reinterpret_cast<uintptr_t>(g.data) % sizeof(vec) == 0 &&
                             common % W == 0;
    if (g.data) {
        constexpr bool kValue = kForward && kOnePass, kParts = kWithParts && kValue;
        const Values found = past_caches ? next_pass<D, kHard, kParts, kPower, kValue, true, true>(s, room, g, common, sums, o, f)
                                         : next_pass<D, kHard, kParts, kPower, kValue, true, false>(s, room, g, common, sums, o, f);
        if (kValue) values = found;
        if (vs > common) hard_only_pass(s, g, common, vs, sums.lse_1, f.hard, f.constant, room.student, room.grad);
        if (kHard && label.id >= 0 && f.label != 0) {
            // Formed again rather than subtracted: q - 1 would lose its digits, and a half-precision gradient be rounded twice.
            const double q1_less_1 = std::expm1(double(label.student) - sums.lse_1);
            double grad = f.label * q1_less_1 + (f.hard - f.label) * (q1_less_1 + 1) - f.constant;
            if (label.common) {
                const Pair pair = Tempered(sums, inverse_t).pair(set(label.student), set(label.teacher));
                grad += soft_gradient<D>(pair, c, f)[0];
            }
            const double t = o.student_head.softcap == 0 ? 0 : label.student / o.student_head.softcap;
            g.set(label.id, float(grad * o.student_head.scale * (1 - t * t)));
        }
    }
    if (!kForward) return;
    stats[kLse] = sums.lse_s;
    stats[kLse1] = sums.lse_1;
    stats[kSlope] = values.slope;
    std::copy(room.lse.begin(), room.lse.end(), stats + kTeachers);
    const float soft = infinite ? kInf : float(values.soft);
    const float nll = kHard && labelled ? float(sums.lse_1 - label.student) : 0;
    float hard = nll;
    if (kHard && labelled && o.label_smoothing != 0) {
        hard = (1 - o.label_smoothing) * nll + o.label_smoothing * float(sums.lse_1 - sums.student_sum / double(vs));
    }
    const float z = kHard ? float(sums.lse_1 * sums.lse_1) : 0;
    const float loss = scale * (weighted(o.soft_scale, soft) + weighted(o.hard_weight, hard) + weighted(o.z_loss, z));
    a.loss[r] = sums.bad || (labelled && label.id < 0) ? kNan : loss;
    if (kWithParts) {
        const float kl = infinite && o.kind == Kind::forward_kl ? kInf : float(values.kl_at_1);
        const float teacher_nll = labelled ? float(sums.lse_t1 - label.teacher_1) : 0;
        const float parts[kParts] = {
            soft, nll, z, kl, teacher_nll, float(values.entropy), sums.agree ? 1.0f : 0.0f, float(values.student_entropy)};
        std::copy_n(parts, kParts, a.parts + r * kParts);
    }
}

template <class D, bool kHard, bool kWithParts, int kPower, bool kForward>
void all_rows(const LogitsArgs& a) {
#pragma omp parallel num_threads(a.threads)
    {
        Room room;
        for (Teacher* t : {&room.at_t, &room.at_1}) {
            t->members.resize(a.teachers.size());
            t->weights = a.teacher_weights.data();
            t->mean_of_probs = a.options.mix_probs;
        }
        room.lse.resize(a.teachers.size());
        room.lse_1.resize(a.teachers.size());
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = 0; r < a.rows; ++r) one_row<D, kHard, kWithParts, kPower, kForward>(a, r, room);
        stream_fence();
    }
}

// Any temperature, mixture and head, with the hard loss's exponential computed even if its weight is 0.
template <class D>
void any_rows(const LogitsArgs& a, bool forward) {
    if (!forward) {
        all_rows<D, true, false, 0, false>(a);
    } else if (a.parts) {
        all_rows<D, true, true, 0, true>(a);
    } else {
        all_rows<D, true, false, 0, true>(a);
    }
}

}  // namespace
}  // namespace KDFAST_ISA
}  // namespace kdfast
