// Knowledge distillation on logits, row by row: kdfast/backends/__init__.py says what each argument must hold.
#pragma once

#include "isa.h"
#include "matrix.h"

namespace kdfast {

struct LogitsArgs {
    int64_t rows;
    Matrix student, teacher, grad;
    const int64_t* labels;  // null when there are none
    const float* scale;
    float* loss;
    double* stats;  // log-sum-exps of student/T, teacher/T (both over the common ids), student over all its ids
    float* parts;   // null when not asked for
    RowWeights weights;
    int threads;
};

KDFAST_PER_ISA(void logits_forward(const LogitsArgs& args); void logits_backward(const LogitsArgs& args);)

}  // namespace kdfast
