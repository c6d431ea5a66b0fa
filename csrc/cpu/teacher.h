// The teacher of a row: one row of logits, or several that are mixed block by block into one.
#pragma once

#include "rows.h"

namespace kdfast {
namespace KDFAST_ISA {

// A weighted mean of logits reads like logits. A weighted mean of probabilities at T reads as T * log p, whose log-sum-exp
// at T is 0; it must be told the members' log-sum-exps first.
class Teacher {
  public:
    std::vector<Source> members;
    const float* weights = nullptr;
    bool mean_of_probs = false;

    bool one() const { return members.size() == 1; }
    bool mixes_probs() const { return !one() && mean_of_probs; }

    // The rest of what mixing probabilities at T needs.
    void know(float inverse_t, const double* lse) {
        inverse_t_ = inverse_t;
        softmax_.clear();
        for (size_t i = 0; i < members.size(); ++i) {
            softmax_.push_back(Softmax::from_lse(lse[i], inverse_t));
            softmax_[i].log_sum -= std::log(weights[i]);
        }
    }

    const float* block(int64_t begin, int64_t n, Buffer& buffer) const {
        if (one()) return members[0].block(begin, n, buffer);
        Buffer room;
        for (size_t i = 0; i < members.size(); ++i) {
            const float* z = members[i].block(begin, n, room);
            mean_of_probs ? add_probs(i, z, n, buffer.data) : add_logits(i, z, n, buffer.data);
        }
        if (mean_of_probs) {
            for (int64_t j = 0; j < padded(n); j += W) {
                const vec log_p = load(buffer.data + j);
                store(buffer.data + j, log_p < set(0.9f * kLowest) ? set(-kInf) : log_p / inverse_t_);
            }
        }
        return buffer.data;
    }

    float at(int64_t i) const {
        if (one()) return members[0].at(i);
        double sum = 0;
        for (size_t m = 0; m < members.size(); ++m) {
            const double z = members[m].at(i);
            sum += mean_of_probs ? std::exp((z - softmax_[m].anchor) * inverse_t_ - softmax_[m].log_sum) : weights[m] * z;
        }
        return float(mean_of_probs ? std::log(sum) / inverse_t_ : sum);
    }

    bool excludes(int64_t i) const {
        for (const Source& member : members) {
            const bool none = member.at(i) == -kInf;
            if (none != mean_of_probs) return none;  // a mean of logits is -inf with one of them, of probabilities 0 with all
        }
        return mean_of_probs;
    }

  private:
    float inverse_t_ = 1;
    std::vector<Softmax> softmax_;  // log_sum less the log of the weight

    void add_logits(size_t i, const float* z, int64_t n, float* sum) const {
        for (int64_t j = 0; j < padded(n); j += W) {
            const vec term = weights[i] * load(z + j);
            store(sum + j, i == 0 ? term : load(sum + j) + term);
        }
    }

    // sum = log(exp(sum) + weight * p)
    void add_probs(size_t i, const float* z, int64_t n, float* sum) const {
        const Softmax& p = softmax_[i];
        for (int64_t j = 0; j < padded(n); j += W) {
            const vec log_p = p.shifted(load(z + j)) - p.log_sum;
            if (i == 0) {
                store(sum + j, log_p);
                continue;
            }
            const vec before = load(sum + j), high = max(before, log_p);
            store(sum + j, high + log1p(exp(max(set(-100.0f), -abs(before - log_p)))));
        }
    }
};

}  // namespace KDFAST_ISA
}  // namespace kdfast
