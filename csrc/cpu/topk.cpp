// The ghost-bucket loss: the unselected ids are summed as a bucket of their own, so that its mass is never 1 minus something.
#include "topk.h"

#include <vector>

#include "divergence.h"
#include "rows.h"

namespace kdfast {
namespace KDFAST_ISA {
namespace {

struct Target {
    float logprob;
    int32_t id;
};

// The entries of one row: valid ones in ascending order of id, padded to whole vectors.
struct Entries {
    std::vector<int32_t> ids;
    std::vector<float> z, log_p, p, q;
    std::vector<Target> order;
    float best = -kInf;
    int32_t best_id = -1;
    bool outside = false;

    explicit Entries(int64_t k) : z(size_t(padded(k))), log_p(z), p(z), q(z) {
        ids.reserve(size_t(k));
        order.reserve(size_t(k));
    }

    void read(const TopKArgs& a, int64_t r, Source row) {
        order.clear();
        ids.clear();
        best = -kInf;
        best_id = -1;
        outside = false;
        for (int64_t i = 0; i < a.k; ++i) {
            const int32_t id = a.ids[r * a.k + i];
            if (id < 0) continue;
            const float logprob = a.logprobs[r * a.k + i];
            if (id >= a.vocab) {
                outside = true;
                continue;
            }
            order.push_back({logprob, id});
            if (logprob > best) best = logprob, best_id = id;
        }
        std::sort(order.begin(), order.end(), [](auto x, auto y) { return x.id < y.id; });
        std::fill(z.begin(), z.end(), -kInf);
        std::fill(log_p.begin(), log_p.end(), -kInf);
        const float inverse_t = 1.0f / a.weights.temperature;
        for (size_t i = 0; i < order.size(); ++i) {
            ids.push_back(order[i].id);
            z[i] = row.at(order[i].id);
            log_p[i] = order[i].logprob * inverse_t - a.log_z[r];
        }
    }

    int64_t size() const { return int64_t(ids.size()); }
};

struct TailBucket {
    double log_p, log_q;

    double value() const {
        const double p = std::exp(log_p), q = std::exp(log_q), d = log_p - log_q;
        if (p == 0) return q;
        return std::abs(d) < 1 ? p * (d + std::expm1(-d)) : p * d + (q - p);
    }
    double derivative() const { return std::exp(log_q) - std::exp(log_p); }
};

// Divergence over the entries; leaves p and q behind for the gradient.
double entries_value(Entries& e, const Softmax& q) {
    vec total{};
    bool infinite = false;
    for (int64_t i = 0; i < padded(e.size()); i += W) {
        const vec up = max(set(kLowest), load(&e.log_p[size_t(i)])), uq = q.shifted(load(&e.z[size_t(i)])) - q.log_sum;
        const vec p = exp(up), qv = exp(uq);
        store(&e.p[size_t(i)], p);
        store(&e.q[size_t(i)], qv);
        total += kl_term(p, qv, up - uq);
    }
    for (int64_t i = 0; i < e.size(); ++i) infinite |= e.z[size_t(i)] == -kInf && e.p[size_t(i)] > 0;
    return infinite ? double(kInf) : double(reduce_add(total));
}

template <bool kHard, int kPower>
void gradient(const TopKArgs& a, Source s, Sink g, const Entries& e, double lse_tail, float anchor, double lse_1,
              double tail_derivative, float soft_grad, float hard_grad, int64_t label, Buffer* buffers) {
    const int64_t vs = a.student.columns;
    const float inverse_t = 1.0f / a.weights.temperature;
    const bool no_tail = !std::isfinite(lse_tail);
    const Softmax tail(no_tail ? 0 : anchor, inverse_t, no_tail ? 0 : lse_tail);
    const float in_tail = no_tail ? 0 : soft_grad * float(tail_derivative) * tail.factor;
    const float anchor_hard = kPower == 0 || no_tail ? float(lse_1) : anchor;
    const float hard = kHard ? hard_grad * Softmax(anchor_hard, 1, lse_1).factor : 0;
    const float at_label = label >= 0 ? s.at(label) : 0;
    for (int64_t begin = 0; begin < a.vocab; begin += kBlock) {
        const int64_t n = std::min(kBlock, a.vocab - begin);
        const float* z = s.block(begin, n, buffers[0]);
        float* out = g.block(begin, n, buffers[1]);
        for (int64_t i = 0; i < padded(n); i += W) {
            const vec x = load(z + i);
            const vec ex = exp(tail.shifted(x));
            vec grad = in_tail * ex;
            if (kHard) grad += hard * (no_tail ? exp_at_1<0>(ex, x, anchor_hard) : exp_at_1<kPower>(ex, x, anchor_hard));
            store(out + i, grad);
        }
        g.commit(begin, n, out);
    }
    if (vs > a.vocab) hard_only_pass(s, g, a.vocab, vs, lse_1, kHard ? hard_grad : 0, 0, buffers[0], buffers[2]);
    const auto hard_at = [&](float z, int64_t id) {
        return !kHard ? 0 : hard_grad * (id == label ? std::expm1(z - lse_1) : std::exp(z - lse_1));
    };
    if (kHard && label >= 0) {
        const double soft = label < a.vocab && !no_tail
                                ? soft_grad * tail_derivative * std::exp(double(at_label) * inverse_t - lse_tail)
                                : 0;
        g.set(label, float(soft + hard_at(at_label, label)));
    }
    for (size_t i = 0; i < e.ids.size();) {
        const int32_t id = e.ids[i];
        const double q = e.q[i];
        double p = 0;
        const float z = e.z[i];
        for (; i < e.ids.size() && e.ids[i] == id; ++i) p += e.p[i];
        g.set(id, float(soft_grad * (q - p) + hard_at(z, id)));
    }
}

struct LossRoom {
    Entries entries;
    Buffer buffers[3];

    explicit LossRoom(int64_t k) : entries(k) {}
};

bool student_agrees(const TopKArgs& a, Source s, const Entries& e, float highest_unselected) {
    const float highest_selected = *std::max_element(e.z.begin(), e.z.end());
    if (highest_selected < highest_unselected) return false;
    for (int64_t i = 0; i < a.vocab; ++i) {
        if (s.at(i) == highest_selected) return i == e.best_id;
    }
    return false;
}

template <bool kHard, int kPower, bool kForward>
void one_row(const TopKArgs& a, int64_t r, LossRoom& room) {
    const int64_t vs = a.student.columns;
    const float temperature = a.weights.temperature, inverse_t = 1.0f / temperature, scale = a.scale[r];
    const Source s{a.student.row(r), a.student.dtype};
    const Sink g{a.grad.data ? a.grad.row(r) : nullptr, a.grad.dtype};
    double* stats = a.stats + r * kStats;
    if (scale == 0) {
        if (g.data) g.clear(vs);
        if (kForward) clear_row(r, kStats, a.loss, a.stats, a.parts);
        return;
    }
    Entries& e = room.entries;
    e.read(a, r, s);
    float anchor_tail = float(stats[0] / inverse_t);
    bool bad = e.outside;
    if (kForward) {
        OnlineSum<kHard, kPower> unselected(inverse_t), selected(inverse_t), extra(1.0f);
        size_t next = 0;
        for (int64_t begin = 0; begin < a.vocab; begin += kBlock) {
            const int64_t n = std::min(kBlock, a.vocab - begin);
            unselected.add(without(s.block(begin, n, room.buffers[0]), begin, n, e.ids, next, room.buffers[0]), begin, n);
        }
        // Duplicates count once in the student's mass.
        for (size_t i = 0; i < e.ids.size(); ++i) e.q[i] = i && e.ids[i] == e.ids[i - 1] ? -kInf : e.z[i];
        std::fill(e.q.begin() + std::ptrdiff_t(e.ids.size()), e.q.end(), -kInf);
        for (int64_t begin = 0; begin < e.size(); begin += kBlock) {
            selected.add(&e.q[size_t(begin)], begin, std::min(kBlock, e.size() - begin));
        }
        stats[0] = unselected.lse();
        stats[1] = log_add(stats[0], selected.lse());
        stats[2] = kHard ? log_add(unselected.lse_at_1(), selected.lse_at_1()) : 0;
        if (kHard && vs > a.vocab) {
            for (int64_t begin = a.vocab; begin < vs; begin += kBlock) {
                const int64_t n = std::min(kBlock, vs - begin);
                extra.add(s.block(begin, n, room.buffers[0]), begin, n);
            }
            stats[2] = log_add(stats[2], extra.lse());
        }
        anchor_tail = unselected.anchor();
        bad |= !std::isfinite(stats[1]) || std::isnan(stats[0]) || std::isnan(stats[2]);
    }
    const bool labelled = a.labels != nullptr;
    const int64_t label = labelled ? a.labels[r] : -1;
    const bool label_ok = label >= 0 && label < vs;
    const TailBucket bucket{double(a.log_tail[r]), stats[0] - stats[1]};
    const double soft = entries_value(e, Softmax::from_lse(stats[1], inverse_t)) + bucket.value();
    const float hard = kHard && label_ok ? float(stats[2] - s.at(label)) : 0;
    if (kForward) {
        const float loss = scale * (weighted(a.weights.soft_scale, float(soft)) + weighted(a.weights.hard_weight, hard));
        a.loss[r] = bad || (labelled && !label_ok) ? kNan : loss;
        if (a.parts) {
            const float agree = student_agrees(a, s, e, anchor_tail) ? 1.0f : 0.0f;
            const float parts[kParts] = {float(soft), hard, float(stats[2] * stats[2]), temperature == 1 ? float(soft) : kNan, 0, 0, agree};
            std::copy_n(parts, kParts, a.parts + r * kParts);
        }
    }
    if (g.data) {
        gradient<kHard, kForward ? kPower : 0>(a, s, g, e, stats[0], anchor_tail, stats[2], bucket.derivative(),
                                               scale * a.weights.soft_scale * inverse_t, scale * a.weights.hard_weight,
                                               label_ok ? label : -1, room.buffers);
    }
}

template <bool kHard, int kPower, bool kForward>
void all_rows(const TopKArgs& a) {
#pragma omp parallel num_threads(a.threads)
    {
        LossRoom room(a.k);
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = 0; r < a.rows; ++r) one_row<kHard, kPower, kForward>(a, r, room);
    }
}

}  // namespace

void topk_forward(const TopKArgs& a) {
    with_power(a.weights.temperature, [&](auto power) {
        constexpr int kPower = decltype(power)::value;
        const bool hard = a.weights.hard_weight != 0 || a.parts;
        hard ? all_rows<true, kPower, true>(a) : all_rows<false, kPower, true>(a);
    });
}

void topk_backward(const TopKArgs& a) {
    a.weights.hard_weight != 0 ? all_rows<true, 0, false>(a) : all_rows<false, 0, false>(a);
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
