// Losses between hidden states, row by row: kdfast/backends/__init__.py says what each argument must hold.
#pragma once

#include "isa.h"
#include "matrix.h"

namespace kdfast {

struct HiddenArgs {
    int64_t rows;
    Matrix student, teacher;
    Matrix grad;        // dtype of the student, may be the student itself; absent when no gradient is wanted
    const float* bias;  // added to the student, null when there is none; mse only
    const float* scale;
    float* loss;
    int threads;
};

KDFAST_PER_ISA(void hidden_mse(const HiddenArgs& args); void hidden_cosine(const HiddenArgs& args);)

}  // namespace kdfast
