// Top-k teacher targets: capture, and the ghost-bucket loss. kdfast/backends/__init__.py says what each argument holds.
#pragma once

#include "isa.h"
#include "matrix.h"

namespace kdfast {

struct CaptureArgs {
    int64_t rows;
    Matrix logits;
    int64_t k;
    const double* temperatures;
    int64_t n_temperatures;
    int32_t* ids;       // [rows, k]
    float* logprobs;    // [rows, k]
    float* log_z;       // [rows, n_temperatures]
    float* log_tail;    // [rows, n_temperatures]
    int threads;
};

constexpr int kStats = 3;

struct TopKArgs {
    int64_t rows;
    Matrix student, grad;
    const int32_t* ids;     // [rows, k]
    const float* logprobs;  // [rows, k]
    const float* log_z;     // [rows]
    const float* log_tail;  // [rows]
    int64_t k, vocab;       // ids >= vocab take no part in the soft term
    const int64_t* labels;  // null when there are none
    const float* scale;
    float* loss;
    double* stats;  // log-sum-exps of student/T over the unselected ids, over all ids < vocab, of student over all its ids
    float* parts;   // null when not asked for
    RowWeights weights;
    int threads;
};

KDFAST_PER_ISA(void topk_capture(const CaptureArgs& args); void topk_forward(const TopKArgs& args);
               void topk_backward(const TopKArgs& args);)

}  // namespace kdfast
