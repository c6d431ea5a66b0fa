// What the lanes of a warp, or of each half of one, have together; every lane gets the result.
#pragma once

#include "row.h"

namespace kdfast {
namespace cluster {

template <int kLanes>
__device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
    for (int lane = kLanes / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}

template <int kLanes>
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
    for (int lane = kLanes / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

template <int kLanes>
__device__ __forceinline__ int lanes_min(int x) {
#pragma unroll
    for (int lane = kLanes / 2; lane > 0; lane /= 2) x = min(x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}

template <int kLanes, bool kAtT, bool kAt1>
__device__ __forceinline__ void lanes_total(Sum& sum, float c) {
    const float m = lanes_max<kLanes>(sum.m);
    if (kAtT) sum.at_t = lanes_sum<kLanes>(raised(sum.at_t, sum.m, m, c));
    if (kAt1) sum.at_1 = lanes_sum<kLanes>(raised(sum.at_1, sum.m, m, kLog2e));
    sum.m = m;
}

template <int kLanes, AtOne A, bool P>
__device__ __forceinline__ void lanes_total(RowSums& sums, bool has_extra, float c) {
    lanes_total<kLanes, true, A == AtOne::square || A == AtOne::own>(sums.student, c);
    lanes_total<kLanes, true, P && A == AtOne::own>(sums.teacher, c);
    if (has_extra) lanes_total<kLanes, false, true>(sums.extra, c);
}

template <int kLanes, bool P>
__device__ __forceinline__ void lanes_total(Totals& totals) {
    totals.soft = lanes_sum<kLanes>(totals.soft);
    if (P) {
        totals.kl_at_1 = lanes_sum<kLanes>(totals.kl_at_1);
        totals.entropy = lanes_sum<kLanes>(totals.entropy);
        totals.student_entropy = lanes_sum<kLanes>(totals.student_entropy);
        totals.best_s = lanes_min<kLanes>(totals.best_s);
        totals.best_t = lanes_min<kLanes>(totals.best_t);
    }
}

}  // namespace cluster
}  // namespace kdfast
