// The tile unit of Intel's processors (AMX): 16 x 16 sums of float32 += 16 rows of 16 pairs of bfloat16 times 16 pairs of 16
// columns, in one instruction. Spelled in assembly, which the build asked the assembler for (KDFAST_AMX): the compiler needs to
// know no instruction set beyond those of avx512, and the caller has asked the processor (`tiles_of_bf16`).
#pragma once

#include "simd.h"

#if KDFAST_AMX && defined(__AVX512BW__)

namespace kdfast {
namespace KDFAST_ISA {

// Tiles of 16 rows of 64 bytes, while it lives; afterwards the unit is configured as it was found, its tiles zero.
class Tiles {
   public:
    Tiles() {
        Config config{};
        config.palette = 1;
        for (int tile = 0; tile < 8; ++tile) config.bytes[tile] = 64, config.rows[tile] = 16;
        asm volatile("sttilecfg %0" : "=m"(before_));
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~Tiles() { asm volatile("ldtilecfg %0" ::"m"(before_)); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

   private:
    struct Config {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    };
    Config before_;
};

// c[32, 32] (+)= a b, c's rows `c_row` apart. Of each `step` of 16 pairs along k: a[step][row][pair], b[step][pair][column].
inline void tiles_32x32(const uint32_t* a, const uint32_t* b, float* c, int64_t c_row, int64_t steps, bool add) {
    const int64_t line = c_row * 4;
    float* low = c + 16 * c_row;
    if (add) {
        asm volatile(
            "tileloadd (%0, %2), %%tmm0\n\ttileloadd 64(%0, %2), %%tmm1\n\t"
            "tileloadd (%1, %2), %%tmm2\n\ttileloadd 64(%1, %2), %%tmm3" ::"r"(c), "r"(low), "r"(line) : "memory");
    } else {
        asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::: "memory");
    }
    for (int64_t step = 0; step < steps; ++step, a += 32 * 16, b += 16 * 32) {
        asm volatile(
            "tileloadd (%0, %2), %%tmm4\n\ttileloadd (%1, %3), %%tmm6\n\ttdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\t"
            "tileloadd 64(%1, %3), %%tmm7\n\ttdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
            "tileloadd 1024(%0, %2), %%tmm5\n\ttdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\ttdpbf16ps %%tmm7, %%tmm5, %%tmm3"
            ::"r"(a), "r"(b), "r"(int64_t(64)), "r"(int64_t(128)) : "memory");
    }
    asm volatile(
        "tilestored %%tmm0, (%0, %2)\n\ttilestored %%tmm1, 64(%0, %2)\n\t"
        "tilestored %%tmm2, (%1, %2)\n\ttilestored %%tmm3, 64(%1, %2)" ::"r"(c), "r"(low), "r"(line) : "memory");
}

// Sixteen vectors of sixteen, rows to columns: pairs of rows, of pairs, then of quarters of vectors.
inline void transpose(__m512i* x) {
    __m512i y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // columns i, i + 4, i + 8, i + 12
        const __m512i even_low = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        const __m512i even = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
        y[i] = _mm512_shuffle_i32x4(even_low, even, 0x88);
        y[i + 4] = _mm512_shuffle_i32x4(odd_low, odd, 0x88);
        y[i + 8] = _mm512_shuffle_i32x4(even_low, even, 0xdd);
        y[i + 12] = _mm512_shuffle_i32x4(odd_low, odd, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// Sixteen lanes (rows of a, columns of b) of sixteen pairs along k; lanes and values that are not there are zero.
// out[lane][pair] where `lanes_first`, else out[pair][lane], lines of 16 `out_line` apart. `values` may be all that are left, of
// which the first 32 are packed.
inline void pack_16x16(const bf16* from, int64_t lane_stride, int64_t k_stride, int64_t lanes, int64_t values, bool lanes_first,
                       uint32_t* out, int64_t out_line) {
    alignas(64) __m512i x[16];
    const bool along_k = k_stride == 1, along_lanes = !along_k && lane_stride == 1;
    if (along_k) {
        const __mmask32 there = values >= 32 ? ~__mmask32(0) : (__mmask32(1) << values) - 1;
        for (int64_t lane = 0; lane < 16; ++lane)
            x[lane] = lane < lanes ? _mm512_maskz_loadu_epi16(there, from + lane * lane_stride) : _mm512_setzero_si512();
    } else if (along_lanes) {
        const __mmask16 there = lanes >= 16 ? ~__mmask16(0) : (__mmask16(1) << lanes) - 1;
        const auto load = [&](int64_t value) {
            const bf16* at = from + value * k_stride;
            return _mm512_cvtepu16_epi32(value < values ? _mm256_maskz_loadu_epi16(there, at) : _mm256_setzero_si256());
        };
        for (int64_t pair = 0; pair < 16; ++pair)
            x[pair] = _mm512_or_si512(load(2 * pair), _mm512_slli_epi32(load(2 * pair + 1), 16));
    } else {
        uint16_t apart[16][32] = {};
        for (int64_t lane = 0; lane < lanes; ++lane) {
            for (int64_t value = 0; value < values && value < 32; ++value)
                apart[lane][value] = from[lane * lane_stride + value * k_stride].bits;
        }
        std::memcpy(x, apart, sizeof(x));
    }
    if (along_lanes == lanes_first) transpose(x);
    for (int64_t line = 0; line < 16; ++line) _mm512_storeu_si512(out + line * out_line, x[line]);
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
#endif
