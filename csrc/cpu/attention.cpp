// Attention maps: tiles between two GEMMs of somebody else's, and maps that exist already.
#include "attention.h"

#include <vector>

#include "attention_rows.h"

namespace kdfast {
namespace KDFAST_ISA {
namespace {

template <typename S, typename T>
double map_row(const S* s, const T* t, S* grad, const uint8_t* mask, int64_t mask_stride, int64_t n, float scale) {
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
        const int64_t end = std::min(n, begin + kBlock);
        vec loss{};
        for (int64_t i = begin; i < end; i += W) {
            const bool whole = i + W <= end;
            vec d = whole ? load(s + i) - load(t + i) : load_tail(s + i, end - i, 0) - load_tail(t + i, end - i, 0);
            if (mask) d = (mask_stride ? counted(mask, i, end) : ivec{} + (*mask ? -1 : 0)) ? d : set(0);
            loss += d * d;
            if (!grad) continue;
            const vec g = (2 * scale) * d;
            whole ? store(grad + i, g) : store_tail(grad + i, end - i, g);
        }
        total += reduce_add(loss);
    }
    return total;
}

template <typename S, typename T>
void all_maps(const AttentionMaps& a) {
    const int64_t heads = a.sizes[1], queries = a.sizes[2], keys = a.sizes[3];
#pragma omp parallel for num_threads(a.threads) schedule(static)
    for (int64_t r = 0; r < a.sizes[0] * heads * queries; ++r) {
        const int64_t at[3] = {r / (heads * queries), r / queries % heads, r % queries};
        int64_t from_s = 0, from_t = 0, from_m = 0;
        for (int d = 0; d < 3; ++d) {
            from_s += at[d] * a.student_strides[d];
            from_t += at[d] * a.teacher_strides[d];
            from_m += at[d] * a.mask_strides[d];
        }
        S* grad = a.grad ? reinterpret_cast<S*>(a.grad) + r * keys : nullptr;
        const float scale = a.scale[r / queries];
        if (scale == 0) {
            a.loss[r] = 0;
            if (grad) std::memset(grad, 0, size_t(keys) * sizeof(S));
            continue;
        }
        a.loss[r] = scale * map_row(reinterpret_cast<const S*>(a.student) + from_s, reinterpret_cast<const T*>(a.teacher) + from_t,
                                    grad, a.mask ? a.mask + from_m : nullptr, a.mask_strides[3], keys, scale);
    }
}

template <typename S>
void maps_of(const AttentionMaps& a) {
    switch (a.teacher_dtype) {
        case Dtype::float32: return all_maps<S, float>(a);
        case Dtype::bfloat16: return all_maps<S, bf16>(a);
        case Dtype::float16: return all_maps<S, f16>(a);
    }
}

}  // namespace

void attention_tile(const AttentionTile& t) {
#pragma omp parallel num_threads(t.threads)
    {
        std::vector<float> student(t.kind == AttentionKind::scores ? 0 : size_t(t.keys));
#pragma omp for schedule(static)
        for (int64_t r = 0; r < t.groups * t.rows; ++r) {
            const int64_t group = t.first_group + r / t.rows, row = t.first_row + r % t.rows;
            const int64_t batch = group / t.groups_per_batch, query = row % t.queries;
            const float scale = t.scale[group * t.heads + row / t.queries];
            float* difference = t.difference + r * t.keys;
            const int64_t n = t.causal ? std::min(t.keys, query + 1) : t.keys;
            double loss = 0;
            if (scale == 0 || (t.query_mask && !t.query_mask[batch * t.queries + query])) {
                std::fill(difference, difference + t.keys, 0.0f);
            } else {
                const uint8_t* keys = t.key_mask ? t.key_mask + batch * t.mask_keys : nullptr;
                float* teacher = t.teacher ? t.teacher + r * t.keys : nullptr;
                loss = scale * attention_row(t.kind, difference, teacher, student.data(), n, keys, t.factor_s, t.factor_t, scale);
                std::fill(difference + n, difference + t.keys, 0.0f);
            }
            t.loss[group * t.heads * t.queries + row] = loss;
        }
    }
}

void attention_maps(const AttentionMaps& a) {
    switch (a.student_dtype) {
        case Dtype::float32: return maps_of<float>(a);
        case Dtype::bfloat16: return maps_of<bf16>(a);
        case Dtype::float16: return maps_of<f16>(a);
    }
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
