// Sparse teacher targets: capture, and the loss from them. kdfast/backends/__init__.py says what each argument holds.
#pragma once

#include <vector>

#include "isa.h"
#include "logits.h"
#include "matrix.h"

namespace kdfast {

struct CaptureArgs {
    int64_t rows;
    Matrix logits;
    Head head;
    int64_t k;
    const double* temperatures;
    int64_t n_temperatures;
    const double* draws;  // [rows, n_draws] in [0, 1): which ids beside the k are drawn; null when none are
    int64_t n_draws;
    double sample_temperature;
    int32_t* ids;       // [rows, k + n_draws], -1 in empty slots
    float* logprobs;    // [rows, k + n_draws]
    float* log_z;       // [rows, n_temperatures]
    float* log_tail;    // [rows, n_temperatures]
    float* weights;     // [rows, k + n_draws]; null without draws
    int threads;

    int64_t slots() const { return k + n_draws; }
};

constexpr int kTopKStats = 4;

struct TopKArgs {
    int64_t rows;
    Matrix student, grad;
    const int32_t* ids;     // [rows, k]
    const float* log_p;     // [rows, sets, k]
    const float* log_tail;  // [rows, sets]
    const float* mass;      // [rows, sets]
    int64_t k, vocab;       // ids >= vocab take no part in the soft term
    bool spread;            // the tail lies evenly on the ids that are no entries, or else as the student's own does
    std::vector<float> weights;  // one for each set
    const int64_t* labels;       // null when there are none
    const float* scale;
    float* loss;
    double* stats;  // log-sum-exps of student/T over the ids in no slot, over all ids < vocab, of student over all; sum of the slope
    float* parts;   // null when not asked for
    LogitsOptions options;
    int threads;

    int64_t sets() const { return int64_t(weights.size()); }
    bool hard() const { return options.hard_weight != 0 || options.z_loss != 0 || parts; }
};

KDFAST_PER_ISA(void topk_capture(const CaptureArgs& args); void topk_forward(const TopKArgs& args);
               void topk_backward(const TopKArgs& args);)

}  // namespace kdfast
