// Knowledge distillation on logits, row by row: kdfast/backends/__init__.py says what each argument must hold.
#pragma once

#include <vector>

#include "isa.h"
#include "matrix.h"

namespace kdfast {

// In the order of kdfast.options.DIVERGENCES.
enum class Kind : int { forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl, tvd, alpha_beta };

struct LogitsOptions {
    Kind kind;
    float first, second;  // RowOptions.coefficients
    float temperature;
    float soft_scale;  // weight of the divergence at T, T^2 included
    float hard_weight, label_smoothing, z_loss;
    Head student_head, teacher_head;
    bool mix_probs;  // several teachers: the mean of their probabilities, or else of their logits
};

struct LogitsArgs {
    int64_t rows;
    Matrix student;
    std::vector<Matrix> teachers;
    std::vector<float> teacher_weights;  // one each, summing to 1
    Matrix grad;
    const int64_t* labels;  // null when there are none
    const float* scale;
    float* loss;
    double* stats;  // rows of n_stats(): see Stats in logits_rows.h
    float* parts;   // null when not asked for
    LogitsOptions options;
    int threads;

    int64_t n_stats() const { return 3 + int64_t(teachers.size()); }
};

KDFAST_PER_ISA(void logits_forward(const LogitsArgs& args); void logits_backward(const LogitsArgs& args);
               void logits_forward_kl(const LogitsArgs& args, bool forward);
               void logits_other(const LogitsArgs& args, bool forward);)

}  // namespace kdfast
