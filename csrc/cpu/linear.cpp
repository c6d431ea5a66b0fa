// c = a b for large operands of any strides: packed into panels, float32 or pairs of bfloat16, register tiles over them.
//
// A block of a and one of b, some slices of kDepth units along k, are packed by all threads together; tasks of
// kTaskRows x kTaskColumns then run over them: a panel of a stays in the first-level cache while the columns of b that a
// task needs stay in the second. Every element of c has one thread and one order of additions, whatever the threads.
#include "linear.h"

#include <algorithm>
#include <memory>

#include "gemm.h"
#include "simd.h"

namespace kdfast {
namespace KDFAST_ISA {
namespace {

constexpr int kRows = kTileRows, kColumns = 2 * W;
constexpr int64_t kDepth = 512;  // units along k: 24 KiB of a panel of a
constexpr int64_t kTaskRows = 8 * kRows, kTaskColumns = 8 * kColumns;
constexpr int64_t kBlockRows = 16 * kTaskRows, kBlockColumns = 16 * kTaskColumns;

constexpr int64_t up(int64_t n, int64_t d) { return (n + d - 1) / d; }

// What a panel is made of: one float32, or two bfloat16 that follow each other along k.
struct Single {
    using Unit = float;
    static constexpr int64_t kValues = 1;

    template <int M, int N>
    static void tile(const float* a, const float* b, float* c, int64_t c_row, int64_t units, bool add) {
        register_tile<M, N>(a, 1, M, b, N * W, c, c_row, units, add);
    }
};

#if defined(__AVX512F__)
struct Pair {
    using Unit = uint32_t;
    static constexpr int64_t kValues = 2;

    // Spelled in assembly so that the file needs no instruction set beyond AVX-512F; the caller has asked the processor.
    static void dot(vec& sum, vec a, vec b) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

    template <int M, int N>
    static void tile(const uint32_t* a, const uint32_t* b, float* c, int64_t c_row, int64_t units, bool add) {
        vec sum[M][N];
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) sum[i][j] = add ? load(c + i * c_row + j * W) : vec{};
        }
        const float *left = reinterpret_cast<const float*>(a), *right = reinterpret_cast<const float*>(b);
        for (int64_t p = 0; p < units; ++p) {
            const vec b0 = load(right + p * N * W), b1 = load(right + p * N * W + (N - 1) * W);
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) {
                const vec both = splat(left[p * M + i]);
                dot(sum[i][0], both, b0);
                if (N == 2) dot(sum[i][N - 1], both, b1);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) store(c + i * c_row + j * W, sum[i][j]);
        }
    }
};
#endif

inline void unit_of(const float* first, const float*, float& out) { out = *first; }
template <typename T>
inline void unit_of(const T* first, const T*, float& out) {
    out = to_float(*first);
}
inline void unit_of(const bf16* first, const bf16* second, uint32_t& out) {
    out = first->bits | uint32_t(second ? second->bits : 0) << 16;
}

// Panel of `kLanes` rows (of a) or columns (of b): out[unit][lane]; lanes beyond `lanes` and a missing half are zero.
template <typename U, int kLanes, typename T>
void pack_panel(const T* from, int64_t lane_stride, int64_t k_stride, int64_t lanes, int64_t values, typename U::Unit* out) {
    constexpr int64_t kStep = U::kValues;
    const int64_t whole = values / kStep, units = up(values, kStep);
    if (lanes < kLanes) std::fill_n(out, units * kLanes, typename U::Unit(0));
    if (lane_stride == 1 && lanes == kLanes) {
        for (int64_t p = 0; p < whole; ++p) {
            const T* at = from + p * kStep * k_stride;
            for (int lane = 0; lane < kLanes; ++lane) unit_of(at + lane, at + k_stride + lane, out[p * kLanes + lane]);
        }
    } else if (k_stride == 1) {
        // A line of each lane at a time: lanes that are a multiple of a page apart would throw each other out of the cache.
        constexpr int64_t kRun = 16;
        for (int64_t begin = 0; begin < whole; begin += kRun) {
            const int64_t end = std::min(begin + kRun, whole);
            for (int64_t lane = 0; lane < lanes; ++lane) {
                const T* at = from + lane * lane_stride;
                for (int64_t p = begin; p < end; ++p) {
                    unit_of(at + p * kStep, at + p * kStep + 1, out[p * kLanes + lane]);
                }
            }
        }
    } else {
        for (int64_t p = 0; p < whole; ++p) {
            for (int64_t lane = 0; lane < lanes; ++lane) {
                const T* at = from + lane * lane_stride + p * kStep * k_stride;
                unit_of(at, at + k_stride, out[p * kLanes + lane]);
            }
        }
    }
    const T* nothing = nullptr;
    for (int64_t lane = 0; whole < units && lane < lanes; ++lane) {
        unit_of(from + lane * lane_stride + whole * kStep * k_stride, nothing, out[whole * kLanes + lane]);
    }
}

template <typename U, int kLanes>
void pack(const Operand& x, int64_t lane_stride, int64_t k_stride, int64_t lane, int64_t k, int64_t lanes, int64_t values,
          typename U::Unit* out) {
    const int64_t at = lane * lane_stride + k * k_stride;
    if constexpr (U::kValues == 2) {
        pack_panel<U, kLanes>(static_cast<const bf16*>(x.data) + at, lane_stride, k_stride, lanes, values, out);
    } else if (x.dtype == Dtype::float32) {
        pack_panel<U, kLanes>(static_cast<const float*>(x.data) + at, lane_stride, k_stride, lanes, values, out);
    } else if (x.dtype == Dtype::bfloat16) {
        pack_panel<U, kLanes>(static_cast<const bf16*>(x.data) + at, lane_stride, k_stride, lanes, values, out);
    } else {
        pack_panel<U, kLanes>(static_cast<const f16*>(x.data) + at, lane_stride, k_stride, lanes, values, out);
    }
}

// A tile that c has no room for goes through a buffer.
template <typename U>
void edge_tile(const typename U::Unit* a, const typename U::Unit* b, float* c, int64_t c_row, int64_t units, bool add,
               int64_t rows, int64_t columns) {
    alignas(64) float room[kRows * kColumns];
    U::template tile<kRows, 2>(a, b, room, kColumns, units, false);
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) c[i * c_row + j] = (add ? c[i * c_row + j] : 0.0f) + room[i * kColumns + j];
    }
}

// Blocks of a and b whose product is added to one block of c, packed in slices of `depth` units along k.
template <typename U>
struct Block {
    using Unit = typename U::Unit;

    const MatmulArgs& args;
    int64_t row, column, k, rows, columns, values, depth;
    Unit *a, *b;

    int64_t slices() const { return up(values, depth * U::kValues); }
    int64_t values_of(int64_t slice) const { return std::min(depth * U::kValues, values - slice * depth * U::kValues); }
    int64_t units_of(int64_t slice) const { return up(values_of(slice), U::kValues); }
    Unit* a_of(int64_t slice) const { return a + slice * depth * up(rows, kRows) * kRows; }
    Unit* b_of(int64_t slice) const { return b + slice * depth * up(columns, kColumns) * kColumns; }

    void pack_both() const {
        const int64_t of_a = up(rows, kRows), of_b = up(columns, kColumns);
#pragma omp for schedule(dynamic, 4)
        for (int64_t panel = 0; panel < slices() * (of_a + of_b); ++panel) {
            const int64_t slice = panel / (of_a + of_b), at = panel % (of_a + of_b);
            const int64_t from = k + slice * depth * U::kValues, n = values_of(slice), units = units_of(slice);
            if (at < of_a) {
                const int64_t lane = at * kRows;
                pack<U, kRows>(args.a, args.a.row, args.a.column, row + lane, from, std::min<int64_t>(kRows, rows - lane), n,
                               a_of(slice) + lane * units);
            } else {
                const int64_t lane = (at - of_a) * kColumns;
                pack<U, kColumns>(args.b, args.b.column, args.b.row, column + lane, from,
                                  std::min<int64_t>(kColumns, columns - lane), n, b_of(slice) + lane * units);
            }
        }
    }

    void multiply() const {
        const int64_t down = up(rows, kTaskRows), across = up(columns, kTaskColumns);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < down * across; ++task) {
            const int64_t i = task % down * kTaskRows, j = task / down * kTaskColumns;
            for (int64_t slice = 0; slice < slices(); ++slice) {
                run(slice, i, std::min(i + kTaskRows, rows), j, std::min(j + kTaskColumns, columns));
            }
        }
    }

    void run(int64_t slice, int64_t i_begin, int64_t i_end, int64_t j_begin, int64_t j_end) const {
        const bool first = k == 0 && slice == 0 && !args.add, add = !first || args.bias != nullptr;
        const int64_t units = units_of(slice);
        for (int64_t i = i_begin; i < i_end; i += kRows) {
            for (int64_t j = j_begin; j < j_end; j += kColumns) {
                const Unit *left = a_of(slice) + i * units, *right = b_of(slice) + j * units;
                float* c = args.c + (row + i) * args.c_row + column + j;
                const int64_t height = std::min<int64_t>(kRows, i_end - i), width = std::min<int64_t>(kColumns, j_end - j);
                if (first && args.bias) {
                    for (int64_t r = 0; r < height; ++r) std::copy_n(args.bias + column + j, width, c + r * args.c_row);
                }
                if (height == kRows && width == kColumns) {
                    U::template tile<kRows, 2>(left, right, c, args.c_row, units, add);
                } else {
                    edge_tile<U>(left, right, c, args.c_row, units, add, height, width);
                }
            }
        }
    }
};

template <typename U>
void product(const MatmulArgs& args) {
    using Unit = typename U::Unit;
    const int64_t depth = std::min(kDepth, up(args.k, U::kValues));
    // Where c has few columns its blocks get more rows, and where it is small as a whole several slices of k: the threads
    // then wait for each other less often.
    const int64_t b_lanes = up(std::min(args.n, kBlockColumns), kColumns) * kColumns;
    const int64_t block_rows = kBlockRows + (kBlockColumns - b_lanes) / kTaskRows * kTaskRows;
    const int64_t a_lanes = up(std::min(args.m, block_rows), kRows) * kRows;
    const int64_t most = std::max<int64_t>(1, (kBlockRows + kBlockColumns) / (a_lanes + b_lanes));
    const int64_t stride = std::min(most, up(args.k, depth * U::kValues)) * depth;
    const std::unique_ptr<Unit[]> a(new Unit[size_t(a_lanes * stride)]), b(new Unit[size_t(b_lanes * stride)]);
#pragma omp parallel num_threads(args.threads)
    for (int64_t column = 0; column < args.n; column += kBlockColumns) {
        for (int64_t row = 0; row < args.m; row += block_rows) {
            for (int64_t k = 0; k < args.k; k += stride * U::kValues) {
                const int64_t rows = std::min(block_rows, args.m - row), columns = std::min(kBlockColumns, args.n - column);
                const int64_t values = std::min(stride * U::kValues, args.k - k);
                const Block<U> block{args, row, column, k, rows, columns, values, depth, a.get(), b.get()};
                block.pack_both();
                block.multiply();
            }
        }
    }
}

}  // namespace

void matmul(const MatmulArgs& args) {
#if defined(__AVX512F__)
    if (args.a.dtype == Dtype::bfloat16 && args.b.dtype == Dtype::bfloat16 && pairs_of_bf16()) return product<Pair>(args);
#endif
    product<Single>(args);
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
