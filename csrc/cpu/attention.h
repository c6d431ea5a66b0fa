// Tiles of attention maps: the row work between the GEMMs, and maps that exist already. kdfast/backends says the rest.
#pragma once

#include "isa.h"
#include "matrix.h"

namespace kdfast {

enum class AttentionKind : int { scores = 0, probs = 1, kl = 2 };

// Rows `first_row` and on of `groups` groups from `first_group` on. A group has heads * queries rows; heads of a batch are
// groups_per_batch * heads.
struct AttentionTile {
    AttentionKind kind;
    float* difference;  // [groups, rows, keys] student - teacher products; becomes the gradient of the student's
    float* teacher;     // the same shape, overwritten; null for scores
    int64_t groups, rows, keys;
    int64_t first_group, first_row, groups_per_batch, heads, queries;
    const uint8_t* query_mask;  // [B, queries] or null
    const uint8_t* key_mask;    // [B, mask_keys] or null
    int64_t mask_keys;
    const float* scale;  // [all groups, heads]
    double* loss;        // [all groups, heads * queries]
    float factor_s, factor_t;  // what makes scores of the differences and of the teacher's products
    bool causal;
    int threads;
};

// Whole maps of contiguous float32 [groups, heads * queries, size] and [groups, keys, size], one group a thread at a time; both sides
// have the same head size, a multiple of 16.
struct AttentionDirect {
    AttentionKind kind;
    const float *q_s, *k_s, *q_t, *k_t;
    float *grad_q, *grad_k;  // null when not wanted
    int64_t groups, groups_per_batch, heads, queries, keys, size;
    const uint8_t* query_mask;  // [B, queries] or null
    const uint8_t* key_mask;    // [B, keys] or null
    const float* scale;         // [groups, heads]
    double* loss;               // [groups, heads * queries]
    float scale_s, ratio;       // ratio = scale_t / scale_s
    bool causal;
    int threads;
};

// One [Lq, Lk] map per batch and head, with unit stride along keys and any other strides.
struct AttentionMaps {
    const char *student, *teacher;
    char* grad;  // contiguous [B, H, Lq, Lk], null when not wanted
    const uint8_t* mask;
    Dtype student_dtype, teacher_dtype;
    int64_t sizes[4], student_strides[3], teacher_strides[3], mask_strides[4];
    const float* scale;  // [B, H]
    double* loss;        // [B, H, Lq]
    int threads;
};

KDFAST_PER_ISA(void attention_tile(const AttentionTile& tile); void attention_direct(const AttentionDirect& maps);
               void attention_maps(const AttentionMaps& maps);)

}  // namespace kdfast
