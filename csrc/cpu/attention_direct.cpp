// Attention maps, one group of heads a thread at a time: scores, rows and gradients of some queries without leaving the second-level
// cache, and one parallel region where separate GEMMs would be five.
#include <vector>

#include "attention.h"
#include "attention_rows.h"
#include "gemm.h"

namespace kdfast {
namespace KDFAST_ISA {
namespace {

// Queries whose scores are worked on at a time: a multiple of the register tile.
constexpr int64_t kRows = 48;

struct Workspace {
    int64_t keys;  // padded to two vectors
    std::vector<float> k_s, k_difference, k_t, q_difference, difference, teacher, student;

    explicit Workspace(const AttentionDirect& a)
        : keys((a.keys + 2 * W - 1) / (2 * W) * (2 * W)),
          k_s(size_t(a.size * keys)),
          k_difference(size_t(a.size * keys)),
          k_t(a.kind == AttentionKind::scores ? 0 : size_t(a.size * keys)),
          q_difference(size_t(kRows * a.size)),
          difference(size_t(kRows * keys)),
          teacher(a.kind == AttentionKind::scores ? 0 : size_t(kRows * keys)),
          student(a.kind == AttentionKind::scores ? 0 : size_t(keys)) {}
};

// Keys as columns, so that scores come out along a vector; the padding stays 0.
void transpose_keys(const AttentionDirect& a, int64_t group, Workspace& w) {
    const float *k_s = a.k_s + group * a.keys * a.size, *k_t = a.k_t + group * a.keys * a.size;
    constexpr int64_t block = 16;
    for (int64_t first = 0; first < a.keys; first += block) {
        const int64_t last = std::min(a.keys, first + block);
        for (int64_t d = 0; d < a.size; ++d) {
            for (int64_t j = first; j < last; ++j) {
                const float s = k_s[j * a.size + d], t = k_t[j * a.size + d];
                w.k_s[d * w.keys + j] = s;
                w.k_difference[d * w.keys + j] = a.ratio * (s - t);
                if (!w.k_t.empty()) w.k_t[d * w.keys + j] = t;
            }
        }
    }
}

void subtract_queries(const float* q_s, const float* q_t, float ratio, int64_t n, float* out) {
    if (ratio == 1) {
        for (int64_t i = 0; i < n; ++i) out[i] = q_s[i] - q_t[i];
        return;
    }
    // Rounding the product first would cost what the difference is for.
    for (int64_t i = 0; i < n; ++i) out[i] = float(double(q_s[i]) - double(ratio) * double(q_t[i]));
}

// Rows [row, row + rows) of one head.
void some_rows(const AttentionDirect& a, int64_t group, int64_t row, int64_t rows, bool first, Workspace& w) {
    const int64_t batch = group / a.groups_per_batch, query = row % a.queries;
    const int64_t keys = a.causal ? std::min(a.keys, query + rows) : a.keys, wide = (keys + W - 1) / W * W;
    const int64_t at = group * a.heads * a.queries + row;
    const float *q_s = a.q_s + at * a.size, *q_t = a.q_t + at * a.size;
    const float scale = a.scale[group * a.heads + row / a.queries];
    subtract_queries(q_s, q_t, a.ratio, rows * a.size, w.q_difference.data());
    gemm(w.q_difference.data(), a.size, 1, w.k_s.data(), w.keys, w.difference.data(), w.keys, rows, wide, a.size, false);
    gemm(q_t, a.size, 1, w.k_difference.data(), w.keys, w.difference.data(), w.keys, rows, wide, a.size, true);
    if (!w.k_t.empty()) gemm(q_t, a.size, 1, w.k_t.data(), w.keys, w.teacher.data(), w.keys, rows, wide, a.size, false);
    for (int64_t r = 0; r < rows; ++r) {
        float* difference = w.difference.data() + r * w.keys;
        const int64_t n = a.causal ? std::min(keys, query + r + 1) : keys;
        double loss = 0;
        if (scale == 0 || (a.query_mask && !a.query_mask[batch * a.queries + query + r])) {
            std::fill(difference, difference + keys, 0.0f);
        } else {
            const uint8_t* mask = a.key_mask ? a.key_mask + batch * a.keys : nullptr;
            loss = scale * attention_row(a.kind, difference, w.teacher.data() + (w.teacher.empty() ? 0 : r * w.keys),
                                         w.student.data(), n, mask, a.scale_s, a.ratio * a.scale_s, scale);
            std::fill(difference + n, difference + keys, 0.0f);
        }
        a.loss[at + r] = loss;
    }
    if (!a.grad_q) return;
    const float* k_s = a.k_s + group * a.keys * a.size;
    float* grad_k = a.grad_k + group * a.keys * a.size;
    gemm(w.difference.data(), w.keys, 1, k_s, a.size, a.grad_q + at * a.size, a.size, rows, a.size, keys, false);
    if (first && keys < a.keys) std::fill(grad_k + keys * a.size, grad_k + a.keys * a.size, 0.0f);
    gemm(w.difference.data(), 1, w.keys, q_s, a.size, grad_k, a.size, keys, a.size, rows, !first);
}

}  // namespace

void attention_direct(const AttentionDirect& a) {
#pragma omp parallel num_threads(a.threads)
    {
        Workspace workspace(a);
#pragma omp for schedule(dynamic, 1)
        for (int64_t group = 0; group < a.groups; ++group) {
            transpose_keys(a, group, workspace);
            for (int64_t head = 0; head < a.heads; ++head) {
                for (int64_t query = 0; query < a.queries; query += kRows) {
                    const int64_t rows = std::min(kRows, a.queries - query);
                    some_rows(a, group, head * a.queries + query, rows, head == 0 && query == 0, workspace);
                }
            }
        }
    }
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
