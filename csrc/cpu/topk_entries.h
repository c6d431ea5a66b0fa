// The ids of a row that are told one by one, and the soft term's value and slope there and in the bucket of all others.
//
// Forward KL, reverse KL and JSD are sums of f(p, q) with f(a p, a q) = a f(p, q). So where the teacher's tail has the shape of
// the student's, all the ids in it weigh together as one bucket (p_tail, q_tail) and share its slope in proportion to q.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "divergence.h"
#include "rows.h"
#include "topk.h"

namespace kdfast {
namespace KDFAST_ISA {
namespace {

// What the soft term comes to: its value, the sum of its slope, and the slope of all ids beside the entries together.
struct Soft {
    double value = 0, slope = 0, rest = 0;
    bool infinite = false;
};

// A tail that lies evenly on the ids: the log-probability of each, and what the target's term is multiplied by.
struct Even {
    float log_p, weight;
};

inline Pair pair_of(vec up, vec uq) {
    const ivec both = (up <= set(kLowest)) & (uq <= set(kLowest));
    return {exp(up), exp(uq), both ? vec{} : up - uq, up, uq};
}

// How far a target's probabilities, tail included, may be from 1 together; kdfast.options.MASS_ERROR.
constexpr double kMassError = 0.01;

// The distinct ids of a row's slots, ascending, and the label's, so that no gradient is q - 1 with q rounded.
// An id of log-probability -inf is not an entry of that target: it belongs to the target's tail.
struct Entries {
    std::vector<int32_t> ids;
    std::vector<float> z, q, slope;   // the student's logit and probability at T; the soft term's slope, then its gradient
    std::vector<float> log_p, log_q;  // log_p: [sets, stride]
    std::vector<int64_t> listed;      // entries of each target
    std::vector<Even> even;
    int64_t stride;
    int32_t best_id = -1;             // of the largest target probability
    bool outside = false, no_distribution = false;

    Entries(int64_t k, int64_t sets)
        : z(size_t(padded(k + 1))), q(z), slope(z), log_p(z.size() * size_t(sets)), log_q(z), listed(size_t(sets)),
          stride(padded(k + 1)) {
        slots_.reserve(size_t(k + 1));
        ids.reserve(size_t(k + 1));
    }

    int64_t size() const { return int64_t(ids.size()); }

    void read(const TopKArgs& a, int64_t r, Source row, int64_t label) {
        slots_.clear();
        ids.clear();
        outside = no_distribution = false;
        for (int64_t i = 0; i < a.k; ++i) {
            const int32_t id = a.ids[r * a.k + i];
            if (id < 0) continue;
            outside |= id >= a.vocab;
            if (id < a.vocab) slots_.emplace_back(id, i);
        }
        if (label >= 0 && label < a.vocab) slots_.emplace_back(int32_t(label), a.k);
        std::sort(slots_.begin(), slots_.end());
        std::fill(z.begin(), z.end(), -kInf);
        std::fill(log_p.begin(), log_p.end(), -kInf);
        std::fill(slope.begin(), slope.end(), 0.0f);
        for (const auto& [id, slot] : slots_) {
            if (ids.empty() || ids.back() != id) {
                z[ids.size()] = row.at(id);
                ids.push_back(id);
            }
            for (int64_t m = 0; slot < a.k && m < a.sets(); ++m) {
                float& sum = log_p[size_t(m * stride) + ids.size() - 1];
                const float more = a.log_p[(r * a.sets() + m) * a.k + slot];
                sum = sum == -kInf ? more : float(log_add(sum, more));
            }
        }
        find_best(a);
        even.clear();
        for (int64_t m = 0; m < a.sets(); ++m) {
            const float* from = &log_p[size_t(m * stride)];
            listed[size_t(m)] = size() - std::count(from, from + size(), -kInf);
            const double others = double(a.vocab - listed[size_t(m)]), log_tail = a.log_tail[r * a.sets() + m];
            const float each = others == 0 ? -kInf : float(log_tail - std::log(others)), mass = a.mass[r * a.sets() + m];
            even.push_back({each, a.weights[size_t(m)] * mass});
            double total = std::exp(log_tail);
            for (int64_t j = 0; j < size(); ++j) total += std::exp(double(from[j]));
            // Not the other way round: a NaN is no distribution either.
            no_distribution |= mass != 0 && !(std::abs(total - 1) <= kMassError);
        }
    }

  private:
    std::vector<std::pair<int32_t, int64_t>> slots_;

    void find_best(const TopKArgs& a) {
        double best = -1;
        best_id = -1;
        for (size_t j = 0; a.parts && j < ids.size(); ++j) {
            double p = 0;
            for (int64_t m = 0; m < a.sets(); ++m) p += a.weights[size_t(m)] * std::exp(double(log_p[size_t(m * stride) + j]));
            if (p > best) best = p, best_id = ids[j];
        }
    }
};

// One target's part of the soft term: its entries, and its bucket unless the tail is even.
template <class D>
class Term {
  public:
    Term(const TopKArgs& a, int64_t r, int64_t m, Entries& e, double log_q_out)
        : e_(e), c_{a.options.first, a.options.second}, spread_(a.spread), log_p_(&e.log_p[size_t(m * e.stride)]),
          even_(e.even[size_t(m)]), log_tail_(a.log_tail[r * a.sets() + m]), log_q_out_(log_q_out), log_q_rest_(log_q_out),
          unlisted_(e.size() - e.listed[size_t(m)]) {}

    void add_to(Soft& soft) {
        entries(soft);
        if (!spread_) bucket(soft);
    }

  private:
    Entries& e_;
    Coefficients c_;
    bool spread_;
    float* log_p_;
    Even even_;
    double log_tail_, log_q_out_, log_q_rest_;
    int64_t unlisted_;

    void entries(Soft& soft) {
        const size_t n = size_t(e_.size());
        if (spread_) std::replace(log_p_, log_p_ + n, -kInf, even_.log_p);
        vec value{}, slope{};
        for (int64_t i = 0; i < padded(e_.size()); i += W) {
            const vec log_p = load(log_p_ + i);
            const Pair x = pair_of(max(set(kLowest), log_p), load(&e_.log_q[size_t(i)]));
            const ivec listed = spread_ ? set(0.0f) == set(0.0f) : log_p != set(-kInf);
            const vec h = listed ? D::slope(x, c_) : vec{};
            value += listed ? D::value(x, c_) : vec{};
            slope += h;
            store(&e_.slope[size_t(i)], load(&e_.slope[size_t(i)]) + even_.weight * h);
        }
        soft.value += double(even_.weight) * reduce_add(value);
        soft.slope += double(even_.weight) * reduce_add(slope);
        for (size_t i = 0; i < n; ++i) {
            const bool none_s = e_.z[i] == -kInf, none_t = log_p_[i] == -kInf;
            soft.infinite |= D::student_must(c_) && none_s && !none_t;
            soft.infinite |= spread_ && D::teacher_must(c_) && none_t && !none_s;
        }
    }

    void bucket(Soft& soft) {
        for (int64_t i = 0; unlisted_ > 0 && i < e_.size(); ++i) {
            if (log_p_[i] == -kInf && e_.z[size_t(i)] > -kInf) log_q_rest_ = log_add(log_q_rest_, e_.log_q[size_t(i)]);
        }
        const bool none_s = log_q_rest_ == -kInf, none_t = log_tail_ == -kInf;
        soft.infinite |= (D::student_must(c_) && none_s && !none_t) || (D::teacher_must(c_) && none_t && !none_s);
        if (none_s) return;
        const double up = std::max(double(kLowest), log_tail_), uq = std::max(double(kLowest), log_q_rest_);
        const Pair x{set(float(std::exp(up))), set(float(std::exp(uq))), set(float(up - uq)), set(float(up)), set(float(uq))};
        const double h = double(even_.weight) * D::slope(x, c_)[0];
        soft.value += double(even_.weight) * D::value(x, c_)[0];
        soft.slope += h;
        soft.rest += h * std::exp(log_q_out_ - log_q_rest_);
        for (int64_t i = 0; unlisted_ > 0 && i < e_.size(); ++i) {
            if (log_p_[i] == -kInf) e_.slope[size_t(i)] += float(h * std::exp(double(e_.log_q[size_t(i)]) - log_q_rest_));
        }
    }
};

// The soft term of all targets but for even tails; q, log_q and slope of the entries are left in `e`.
template <class D>
Soft soft_of(const TopKArgs& a, int64_t r, Entries& e, double lse_out, double lse) {
    const Softmax at_t = Softmax::from_lse(lse, 1.0f / a.options.temperature);
    for (int64_t i = 0; i < padded(e.size()); i += W) {
        const vec uq = max(set(kLowest), at_t.shifted(load(&e.z[size_t(i)])) - at_t.log_sum);
        store(&e.log_q[size_t(i)], uq);
        store(&e.q[size_t(i)], exp(uq));
    }
    Soft soft;
    for (int64_t m = 0; m < a.sets(); ++m) {
        Term<D>(a, r, m, e, lse_out - lse).add_to(soft);
        const double mass = a.mass[r * a.sets() + m];
        if (mass > 0) soft.value += a.weights[size_t(m)] * mass * std::log(mass);
    }
    return soft;
}

}  // namespace
}  // namespace KDFAST_ISA
}  // namespace kdfast
