// Large products with a float32 result: kdfast/backends/compiled/linear.py says where they replace torch's.
#pragma once

#include "isa.h"
#include "matrix.h"

namespace kdfast {

// An operand of any strides, in elements.
struct Operand {
    const void* data;
    int64_t row, column;
    Dtype dtype;
};

// c[m, n] = a[m, k] b[k, n] + bias[n], or c += a b. c is float32 with unit stride along columns.
struct MatmulArgs {
    int64_t m, n, k;
    Operand a, b;
    float* c;
    int64_t c_row;
    const float* bias;  // null when absent; only without add
    bool add;
    int threads;
};

KDFAST_PER_ISA(void matmul(const MatmulArgs& args);)

// Whether products of two bfloat16 operands run on pairs (AVX512_BF16 and the avx512 kernels), at twice the rate of float32.
bool pairs_of_bf16();

// Whether they run on tiles (AMX_BF16), faster again, where the build has them and Linux lets the process (not after a thread
// with a signal stack too small for their 8 KiB). KDFAST_ISA=avx512 turns that off.
bool tiles_of_bf16();

}  // namespace kdfast
