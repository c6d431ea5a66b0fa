// The loss from sparse targets. What k entries and a tail say of a row is constant, or proportional to the student's softmax,
// on all other ids: one pass over the student for the sums, one that writes the gradient, and the entries by themselves.
#include "topk_entries.h"

namespace kdfast {
namespace KDFAST_ISA {
namespace {

struct RowSums {
    float anchor_out = 0;               // the largest logit among the ids in no slot
    double lse_out = 0, lse = 0, lse_1 = 0;
    double entropy = 0;                 // of the student at T = 1 over the targets' vocabulary; parts only
    double student_sum = 0;             // of its logits, for label smoothing
    bool bad = false;
};

// Gradient of a row: soft * that of the soft term + hard * q_1 - constant, and -label at the label.
struct Factors {
    float soft, hard, constant, label;
};

struct Room {
    Entries entries;
    Buffer student, grad;

    Room(int64_t k, int64_t sets) : entries(k, sets) {}
};

template <bool kHard, int kPower, bool kWithParts>
RowSums first_pass(const TopKArgs& a, Source s, Room& room) {
    const float inverse_t = 1.0f / a.options.temperature;
    const Entries& e = room.entries;
    const bool smooth = a.options.label_smoothing != 0;
    RowSums sums;
    OnlineSum<kHard, kPower, kWithParts> out(inverse_t), in(inverse_t);
    OnlineSum<false, 0> extra(1.0f);
    size_t next = 0;
    for (int64_t begin = 0; begin < a.vocab; begin += kBlock) {
        const int64_t n = std::min(kBlock, a.vocab - begin);
        const float* z = s.block(begin, n, room.student);
        if (smooth) sums.student_sum += sum_of(z, n);
        out.add(without(z, begin, n, e.ids, next, room.student), begin, n, &s);
    }
    for (int64_t begin = 0; begin < e.size(); begin += kBlock) {
        in.add(&e.z[size_t(begin)], begin, std::min(kBlock, e.size() - begin));
    }
    sums.anchor_out = out.anchor();
    sums.lse_out = out.lse();
    sums.lse = log_add(sums.lse_out, in.lse());
    sums.bad = e.outside || !std::isfinite(sums.lse) || std::isnan(sums.lse_out);
    if (!kHard) return sums;
    sums.lse_1 = log_add(out.lse_at_1(), in.lse_at_1());
    if (kWithParts) sums.entropy = out.entropy_at_1(sums.lse_1) + in.entropy_at_1(sums.lse_1);
    for (int64_t begin = a.vocab; begin < a.student.columns; begin += kBlock) {
        const int64_t n = std::min(kBlock, a.student.columns - begin);
        const float* z = s.block(begin, n, room.student);
        if (smooth) sums.student_sum += sum_of(z, n);
        extra.add(z, begin, n);
    }
    if (a.student.columns > a.vocab) sums.lse_1 = log_add(sums.lse_1, extra.lse());
    sums.bad |= std::isnan(sums.lse_1);
    return sums;
}

// Gradient where the ids beside the entries share one slope in proportion to the student's softmax; what it leaves at the
// entries is overwritten.
template <bool kHard, int kPower>
void rest_pass(const TopKArgs& a, Source s, Sink g, const RowSums& sums, const Soft& soft, const Factors& f, Room& room) {
    const bool none_out = !std::isfinite(sums.lse_out);
    const Softmax out_t(none_out ? 0 : sums.anchor_out, 1.0f / a.options.temperature, none_out ? 0 : sums.lse_out);
    const double of_all = soft.slope == 0 ? 0 : soft.slope * std::exp(sums.lse_out - sums.lse);
    float of_rest = none_out ? 0 : f.soft * float(soft.rest - of_all) * out_t.factor;
    if (!std::isfinite(soft.slope)) of_rest = kNan;
    const float anchor_hard = kPower == 0 || none_out ? float(sums.lse_1) : sums.anchor_out;
    const float hard = kHard ? f.hard * Softmax(anchor_hard, 1, sums.lse_1).factor : 0;
    for (int64_t begin = 0; begin < a.vocab; begin += kBlock) {
        const int64_t n = std::min(kBlock, a.vocab - begin);
        const float* z = s.block(begin, n, room.student);
        float* out = g.block(begin, n, room.grad);
        for (int64_t i = 0; i < padded(n); i += W) {
            const vec x = load(z + i), e = exp(out_t.shifted(x));
            vec grad = of_rest * e;
            if (kHard) grad += hard * (none_out ? exp_at_1<0>(e, x, anchor_hard) : exp_at_1<kPower>(e, x, anchor_hard)) - f.constant;
            store(out + i, grad);
        }
        if (!s.head.trivial()) back_through_head(s.head, n, z, out);
        g.commit(begin, n, out);
    }
}

// Even tails: every id beside the entries has terms of its own, which are added to `soft`; with kGrad the gradient is written.
template <class D, bool kGrad>
void even_pass(const TopKArgs& a, Source s, Sink g, const RowSums& sums, Soft& soft, const Factors& f, Room& room) {
    const Coefficients c{a.options.first, a.options.second};
    const Softmax at_t = Softmax::from_lse(sums.lse, 1.0f / a.options.temperature);
    const float lse_1 = float(sums.lse_1), hard = f.hard == 0 ? 0 : f.hard * Softmax(lse_1, 1, sums.lse_1).factor;
    const float mean_slope = float(soft.slope);
    size_t next = 0;
    double count = 0;
    for (int64_t begin = 0; begin < a.vocab; begin += kBlock) {
        const int64_t n = std::min(kBlock, a.vocab - begin);
        const float* z = without(s.block(begin, n, room.student), begin, n, room.entries.ids, next, room.student);
        float* out = kGrad ? g.block(begin, n, room.grad) : nullptr;
        vec value{}, slope{}, here{};
        for (int64_t i = 0; i < padded(n); i += W) {
            const vec x = load(z + i), uq = at_t.shifted(x) - at_t.log_sum;
            const ivec counts = x > set(-kInf);
            vec h{};
            here += counts ? set(1.0f) : vec{};
            for (const Even& even : room.entries.even) {
                const Pair pair = pair_of(max(set(kLowest), set(even.log_p)), uq);
                if (!kGrad || D::kSumsToZero) value += counts ? even.weight * D::value(pair, c) : vec{};
                // At an id that the student excludes too: that of forward KL is -p there, the others' 0.
                h += even.weight * D::slope(pair, c);
            }
            slope += h;
            if (!kGrad) continue;
            if (!D::kSumsToZero) h -= mean_slope * exp(uq);
            vec grad = f.soft * h;
            if (f.hard != 0 || f.constant != 0) grad += hard * exp(max(set(kLowest), x - lse_1)) - f.constant;
            store(out + i, grad);
        }
        if (kGrad && !s.head.trivial()) back_through_head(s.head, n, z, out);
        if (kGrad) g.commit(begin, n, out);
        if (!kGrad || D::kSumsToZero) {
            soft.value += reduce_add(value);
            soft.slope += D::kSumsToZero ? 0 : reduce_add(slope);
        }
        count += reduce_add(here);
    }
    const double others = double(a.vocab - room.entries.size());
    for (const Even& even : room.entries.even) {
        // Ids that the student gives no probability are passed over like the entries above; the teacher has its share there.
        // -1e4 for -inf: its exponential is 0 too, and 0 times it is not NaN.
        if ((!kGrad || D::kSumsToZero) && count < others && !D::student_must(c)) {
            const vec there = D::value(pair_of(max(set(kLowest), set(even.log_p)), set(-1e4f)), c);
            soft.value += (others - count) * even.weight * reduce_add(there) / W;
        }
        soft.infinite |= even.log_p == -kInf ? D::teacher_must(c) && count > 0 : D::student_must(c) && count < others;
    }
}

// The entries and the label, formed from z read before an in-place gradient took its place.
void set_told(const TopKArgs& a, Sink g, const RowSums& sums, const Soft& soft, const Factors& f, int64_t label, float z_label,
              const Entries& e) {
    const Head head = a.options.student_head;
    const auto put = [&](int64_t id, float z, double grad) {
        const double q1_less_1 = std::expm1(double(z) - sums.lse_1);
        if (id == label) {
            grad += f.label * q1_less_1 + (f.hard - f.label) * (q1_less_1 + 1) - f.constant;
        } else if (f.hard != 0 || f.constant != 0) {
            grad += f.hard * (q1_less_1 + 1) - f.constant;
        }
        const double t = head.softcap == 0 ? 0 : z / head.softcap;
        g.set(id, float(grad * head.scale * (1 - t * t)));
    };
    for (size_t j = 0; j < e.ids.size(); ++j) put(e.ids[j], e.z[j], f.soft * (e.slope[j] - e.q[j] * soft.slope));
    if (label >= a.vocab) put(label, z_label, 0);
}

// Whether the student's best id below `vocab` is that of the targets.
bool agrees(const TopKArgs& a, Source s, const Entries& e, float highest_out) {
    const float highest_in = *std::max_element(e.z.begin(), e.z.end());
    if (highest_in < highest_out) return false;
    for (int64_t i = 0; i < a.vocab; ++i) {
        if (s.at(i) == highest_in) return i == e.best_id;
    }
    return false;
}

template <class D, bool kHard, int kPower, bool kForward>
Soft soft_and_gradient(const TopKArgs& a, int64_t r, Source s, Sink g, const RowSums& sums, const Factors& f, int64_t label,
                       Room& room) {
    const float z_label = label >= 0 ? s.at(label) : 0;
    const Coefficients c{a.options.first, a.options.second};
    Soft soft = soft_of<D>(a, r, room.entries, sums.lse_out, sums.lse);
    if (kForward && a.spread && (!D::kSumsToZero || !g.data)) even_pass<D, false>(a, s, g, sums, soft, f, room);
    if (kForward && soft.infinite && a.options.soft_scale != 0) soft.slope = slope_where_infinite<D>(soft.slope, c);
    if (!kForward) soft.slope = a.stats[r * kTopKStats + 3];
    if (D::kSumsToZero) soft.slope = 0;
    if (!g.data) return soft;
    if (a.spread) {
        even_pass<D, true>(a, s, g, sums, soft, f, room);
    } else {
        rest_pass<kHard, kPower>(a, s, g, sums, soft, f, room);
    }
    if (a.student.columns > a.vocab) {
        hard_only_pass(s, g, a.vocab, a.student.columns, sums.lse_1, f.hard, f.constant, room.student, room.grad);
    }
    set_told(a, g, sums, soft, f, label, z_label, room.entries);
    return soft;
}

template <bool kHard, int kPower, bool kForward, typename... Args>
Soft by_kind(const TopKArgs& a, Args&&... args) {
    switch (a.options.kind) {
        case Kind::reverse_kl: return soft_and_gradient<ReverseKl, kHard, kPower, kForward>(a, args...);
        case Kind::jsd: return soft_and_gradient<Jsd, kHard, kPower, kForward>(a, args...);
        default: return soft_and_gradient<ForwardKl, kHard, kPower, kForward>(a, args...);
    }
}

template <bool kHard, int kPower, bool kForward>
void one_row(const TopKArgs& a, int64_t r, Room& room) {
    const LogitsOptions& o = a.options;
    const int64_t vs = a.student.columns;
    const float scale = a.scale[r];
    const Source s{a.student.row(r), a.student.dtype, o.student_head};
    const Sink g{a.grad.data ? a.grad.row(r) : nullptr, a.grad.dtype};
    double* stats = a.stats + r * kTopKStats;
    if (scale == 0) {
        if (g.data) g.clear(vs);
        if (kForward) clear_row(r, kTopKStats, a.loss, a.stats, a.parts);
        return;
    }
    const int64_t given = a.labels ? a.labels[r] : -1, label = given < vs ? given : -1;
    const float z_label = label >= 0 ? s.at(label) : 0;
    Entries& e = room.entries;
    e.read(a, r, s, kHard ? label : -1);
    RowSums sums;
    if (kForward) {
        sums = kHard && a.parts ? first_pass<kHard, kPower, kHard>(a, s, room) : first_pass<kHard, kPower, false>(a, s, room);
    } else {
        sums.lse_out = stats[0], sums.lse = stats[1], sums.lse_1 = stats[2];
        sums.anchor_out = float(sums.lse_out * o.temperature);
    }
    const bool agree = kForward && a.parts && agrees(a, s, e, sums.anchor_out);
    Factors f;
    f.soft = scale * o.soft_scale / o.temperature;
    f.hard = kHard ? scale * (o.hard_weight + 2 * o.z_loss * float(sums.lse_1)) : 0;
    f.constant = scale * o.hard_weight * o.label_smoothing / float(vs);
    f.label = scale * o.hard_weight * (1 - o.label_smoothing);
    const Soft found = by_kind<kHard, kForward ? kPower : 0, kForward>(a, r, s, g, sums, f, kHard ? label : -1, room);
    if (!kForward) return;
    stats[0] = sums.lse_out, stats[1] = sums.lse, stats[2] = sums.lse_1, stats[3] = found.slope;
    const float soft = found.infinite ? kInf : float(found.value);
    const float nll = kHard && label >= 0 ? float(sums.lse_1 - z_label) : 0;
    float hard = nll;
    if (kHard && label >= 0 && o.label_smoothing != 0) {
        hard = (1 - o.label_smoothing) * nll + o.label_smoothing * float(sums.lse_1 - sums.student_sum / double(vs));
    }
    const float z = kHard ? float(sums.lse_1 * sums.lse_1) : 0;
    const float loss = scale * (weighted(o.soft_scale, soft) + weighted(o.hard_weight, hard) + weighted(o.z_loss, z));
    a.loss[r] = sums.bad || e.no_distribution || (a.labels && label < 0) ? kNan : loss;
    if (a.parts) {
        const bool is_kl_at_1 = o.temperature == 1 && o.kind == Kind::forward_kl;
        const float parts[kParts] = {soft, nll, z, is_kl_at_1 ? soft : kNan, 0, 0, agree ? 1.0f : 0.0f, float(sums.entropy)};
        std::copy_n(parts, kParts, a.parts + r * kParts);
    }
}

template <bool kHard, int kPower, bool kForward>
void all_rows(const TopKArgs& a) {
#pragma omp parallel num_threads(a.threads)
    {
        Room room(a.k, a.sets());
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = 0; r < a.rows; ++r) one_row<kHard, kPower, kForward>(a, r, room);
    }
}

}  // namespace

void topk_forward(const TopKArgs& a) {
    with_power(a.options.temperature, [&](auto power) {
        constexpr int kPower = decltype(power)::value;
        a.hard() ? all_rows<true, kPower, true>(a) : all_rows<false, kPower, true>(a);
    });
}

void topk_backward(const TopKArgs& a) { a.hard() ? all_rows<true, 0, false>(a) : all_rows<false, 0, false>(a); }

}  // namespace KDFAST_ISA
}  // namespace kdfast
