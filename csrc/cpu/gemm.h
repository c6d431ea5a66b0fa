// A small product for operands that stay in the caches; anything larger is left to the machine's own GEMM.
#pragma once

#include <cstdint>

#include "simd.h"

namespace kdfast {
namespace KDFAST_ISA {

inline vec splat(float x) {
#if defined(__AVX512F__)
    return (vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (vec)_mm256_set1_ps(x);
#else
    return vec{x, x, x, x};
#endif
}

// Rows of the register tile: accumulators, two vectors of b and one of a fill the registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif

// c[M, N * W] (+)= a[M, k] b[k, N * W]; a has any strides, b and c unit stride along columns.
template <int M, int N>
inline void register_tile(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c, int64_t c_row,
                          int64_t k, bool add) {
    vec sum[M][N];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sum[i][j] = add ? load(c + i * c_row + j * W) : vec{};
    }
    for (int64_t p = 0; p < k; ++p) {
        vec right[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) right[j] = load(b + p * b_row + j * W);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const vec left = splat(a[i * a_row + p * a_column]);
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) sum[i][j] = fma(left, right[j], sum[i][j]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) store(c + i * c_row + j * W, sum[i][j]);
    }
}

template <int N>
inline void column_panel(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c, int64_t c_row,
                         int64_t m, int64_t k, bool add) {
    int64_t i = 0;
    for (; i + kTileRows <= m; i += kTileRows)
        register_tile<kTileRows, N>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, k, add);
    for (; i + 4 <= m; i += 4) register_tile<4, N>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, k, add);
    for (; i < m; ++i) register_tile<1, N>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, k, add);
}

// c[m, n] = a[m, k] b[k, n], or c += it; n is a multiple of the vector.
inline void gemm(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c, int64_t c_row,
                 int64_t m, int64_t n, int64_t k, bool add) {
    int64_t j = 0;
    for (; j + 2 * W <= n; j += 2 * W) column_panel<2>(a, a_row, a_column, b + j, b_row, c + j, c_row, m, k, add);
    for (; j + W <= n; j += W) column_panel<1>(a, a_row, a_column, b + j, b_row, c + j, c_row, m, k, add);
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
