// What the bindings and the kernels of every instruction set share: plain pointers, sizes and strides.
#pragma once

#include <cstdint>

namespace kdfast {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

struct Matrix {
    void* data;      // null when absent
    int64_t stride;  // elements between rows
    int64_t columns;
    Dtype dtype;

    char* row(int64_t r) const { return static_cast<char*>(data) + r * stride * bytes_of(dtype); }
};

// What a model does between its linear head and its softmax: z = softcap * tanh(scale * x / softcap); softcap 0 is no cap.
struct Head {
    float softcap = 0, scale = 1;

    bool trivial() const { return softcap == 0 && scale == 1; }
};

// kdfast.options.PARTS; Python compares them when it loads the extension.
constexpr const char* kPartNames[] = {"soft",        "hard",            "z",              "kl_at_1",
                                      "teacher_nll", "teacher_entropy", "top1_agreement", "student_entropy"};
constexpr int kParts = sizeof(kPartNames) / sizeof(kPartNames[0]);

}  // namespace kdfast
