// Knowledge distillation on logits, each read once: a row lies in the shared memory of a cluster of blocks.
#pragma once

#include "cpu/matrix.h"

namespace kdfast {
namespace cluster {

// Forward KL at T and cross-entropy at T = 1; kdfast.backends says what each must hold.
struct LogitsArgs {
    int64_t rows;
    Matrix student, teacher, grad;  // no data: absent
    const int64_t* labels;  // null when there are none
    const float* scale;
    float* loss;
    double* stats;
    float* parts;  // null when not asked for
    float temperature, soft_scale, hard_weight, z_loss;
};

// Whether there is a kernel for these dtypes.
bool takes(Dtype student, Dtype teacher);

// Enqueues the kernel on `stream` of `device`, `blocks` to a cluster (see `blocks_for`); false where the device has no room for
// such a cluster. Throws std::runtime_error with CUDA's words when it cannot start.
bool logits_forward(const LogitsArgs& args, int blocks, int device, void* stream);

// CUDA of the driver and of this build, as 1000 * major + 10 * minor; 0: no driver.
int driver_version();
int build_version();

}  // namespace cluster
}  // namespace kdfast
