// c = a b for large operands of any strides: packed into panels, float32 or pairs of bfloat16, register tiles over them, or the
// tiles of a unit of its own (amx.h).
//
// A block of a and one of b, some slices of kDepth units along k, are packed by all threads together; tasks of
// kTaskRows x kTaskColumns then run over them: a panel of a stays in the first-level cache while the columns of b that a
// task needs stay in the second. Every element of c has one thread and one order of additions, whatever the threads.
#include "linear.h"

#include <algorithm>
#include <memory>

#include "amx.h"
#include "gemm.h"
#include "simd.h"

namespace kdfast {
namespace KDFAST_ISA {
namespace {

constexpr int64_t up(int64_t n, int64_t d) { return (n + d - 1) / d; }

inline void unit_of(const float* first, const float*, float& out) { out = *first; }
template <typename T>
inline void unit_of(const T* first, const T*, float& out) {
    out = to_float(*first);
}
inline void unit_of(const bf16* first, const bf16* second, uint32_t& out) {
    out = first->bits | uint32_t(second ? second->bits : 0) << 16;
}

// Panel of `kLanes` rows (of a) or columns (of b), units of `kStep` values: out[unit][lane]; lanes beyond `lanes` and a missing
// half are zero.
template <int kStep, int kLanes, typename T, typename Unit>
void pack_panel(const T* from, int64_t lane_stride, int64_t k_stride, int64_t lanes, int64_t values, Unit* out) {
    const int64_t whole = values / kStep, units = up(values, kStep);
    if (lanes < kLanes) std::fill_n(out, units * kLanes, Unit(0));
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

// What panels are made of, and what multiplies them. A panel of a holds kRows rows, one of b kColumns columns, of k's values in
// units of kValues, as many as pad to a multiple of kStep: tile() adds a product of two such panels to c, or writes it there.
struct Plain {
    static constexpr int64_t kRows = kTileRows, kColumns = 2 * W, kStep = 1;
    static constexpr int64_t kDepth = 512;  // units along k: 24 KiB of a panel of a
    static constexpr int64_t kTasks = 16;   // across a block

    // What a thread has to hold while it multiplies.
    struct Held {};
};

struct Single : Plain {
    using Unit = float;
    static constexpr int64_t kValues = 1;

    static void tile(const float* a, const float* b, float* c, int64_t c_row, int64_t units, bool add) {
        register_tile<kRows, 2>(a, 1, kRows, b, kColumns, c, c_row, units, add);
    }
    template <int kLanes, bool>
    static void pack(const Operand& x, int64_t at, int64_t lane_stride, int64_t k_stride, int64_t lanes, int64_t values,
                     float* out) {
        if (x.dtype == Dtype::float32) {
            pack_panel<1, kLanes>(static_cast<const float*>(x.data) + at, lane_stride, k_stride, lanes, values, out);
        } else if (x.dtype == Dtype::bfloat16) {
            pack_panel<1, kLanes>(static_cast<const bf16*>(x.data) + at, lane_stride, k_stride, lanes, values, out);
        } else {
            pack_panel<1, kLanes>(static_cast<const f16*>(x.data) + at, lane_stride, k_stride, lanes, values, out);
        }
    }
};

#if defined(__AVX512F__)
struct Pair : Plain {
    using Unit = uint32_t;
    static constexpr int64_t kValues = 2;

    // Spelled in assembly so that the file needs no instruction set beyond AVX-512F; the caller has asked the processor.
    static void dot(vec& sum, vec a, vec b) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

    static void tile(const uint32_t* a, const uint32_t* b, float* c, int64_t c_row, int64_t units, bool add) {
        vec sum[kRows][2];
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) sum[i][j] = add ? load(c + i * c_row + j * W) : vec{};
        }
        const float *left = reinterpret_cast<const float*>(a), *right = reinterpret_cast<const float*>(b);
        for (int64_t p = 0; p < units; ++p) {
            const vec b0 = load(right + p * kColumns), b1 = load(right + p * kColumns + W);
#pragma GCC unroll 16
            for (int i = 0; i < kRows; ++i) {
                const vec both = splat(left[p * kRows + i]);
                dot(sum[i][0], both, b0);
                dot(sum[i][1], both, b1);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) store(c + i * c_row + j * W, sum[i][j]);
        }
    }
    template <int kLanes, bool>
    static void pack(const Operand& x, int64_t at, int64_t lane_stride, int64_t k_stride, int64_t lanes, int64_t values,
                     uint32_t* out) {
        pack_panel<2, kLanes>(static_cast<const bf16*>(x.data) + at, lane_stride, k_stride, lanes, values, out);
    }
};
#endif

#if KDFAST_AMX && defined(__AVX512BW__)
struct Tiled {
    using Unit = uint32_t;
    static constexpr int64_t kValues = 2, kRows = 32, kColumns = 32, kStep = 16;
    static constexpr int64_t kDepth = 256;  // 32 KiB of a panel of a
    static constexpr int64_t kTasks = 4;    // what is packed of b stays in the second-level cache

    using Held = Tiles;

    static void tile(const uint32_t* a, const uint32_t* b, float* c, int64_t c_row, int64_t units, bool add) {
        tiles_32x32(a, b, c, c_row, units / kStep, add);
    }
    // Of each step a panel of a lies as [row][pair], one of b as [pair][column].
    template <int kLanes, bool kOfA>
    static void pack(const Operand& x, int64_t at, int64_t lane_stride, int64_t k_stride, int64_t lanes, int64_t values,
                     uint32_t* out) {
        const bf16* from = static_cast<const bf16*>(x.data) + at;
        for (int64_t k = 0; k < values; k += 2 * kStep, out += kLanes * kStep) {
            for (int64_t lane = 0; lane < kLanes; lane += 16) {
                pack_16x16(from + lane * lane_stride + k * k_stride, lane_stride, k_stride,
                           std::clamp<int64_t>(lanes - lane, 0, 16), values - k, kOfA, out + lane * (kOfA ? 16 : 1),
                           kOfA ? 16 : kLanes);
            }
        }
    }
};
#endif

// A tile that c has no room for goes through a buffer.
template <typename U>
void edge_tile(const typename U::Unit* a, const typename U::Unit* b, float* c, int64_t c_row, int64_t units, bool add,
               int64_t rows, int64_t columns) {
    alignas(64) float room[U::kRows * U::kColumns];
    U::tile(a, b, room, U::kColumns, units, false);
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) c[i * c_row + j] = (add ? c[i * c_row + j] : 0.0f) + room[i * U::kColumns + j];
    }
}

template <typename U>
constexpr int64_t units(int64_t values) {
    return up(values, U::kValues * U::kStep) * U::kStep;
}

// Blocks of a and b whose product is added to one block of c, packed in slices of `depth` units along k.
template <typename U>
struct Block {
    using Unit = typename U::Unit;
    static constexpr int64_t kRows = U::kRows, kColumns = U::kColumns;
    static constexpr int64_t kTaskRows = 8 * kRows, kTaskColumns = 8 * kColumns;

    const MatmulArgs& args;
    int64_t row, column, k, rows, columns, values, depth;
    Unit *a, *b;

    int64_t slices() const { return up(values, depth * U::kValues); }
    int64_t values_of(int64_t slice) const { return std::min(depth * U::kValues, values - slice * depth * U::kValues); }
    int64_t units_of(int64_t slice) const { return units<U>(values_of(slice)); }
    Unit* a_of(int64_t slice) const { return a + slice * depth * up(rows, kRows) * kRows; }
    Unit* b_of(int64_t slice) const { return b + slice * depth * up(columns, kColumns) * kColumns; }

    // Both, or what is not there from the block before.
    void pack(bool with_a, bool with_b) const {
        const int64_t of_a = with_a ? up(rows, kRows) : 0, of_b = with_b ? up(columns, kColumns) : 0;
#pragma omp for schedule(dynamic, 4)
        for (int64_t panel = 0; panel < slices() * (of_a + of_b); ++panel) {
            const int64_t slice = panel / (of_a + of_b), at = panel % (of_a + of_b);
            const int64_t from = k + slice * depth * U::kValues, n = values_of(slice), units = units_of(slice);
            if (at < of_a) {
                const int64_t lane = at * kRows;
                U::template pack<kRows, true>(args.a, (row + lane) * args.a.row + from * args.a.column, args.a.row, args.a.column,
                                              std::min(kRows, rows - lane), n, a_of(slice) + lane * units);
            } else {
                const int64_t lane = (at - of_a) * kColumns;
                U::template pack<kColumns, false>(args.b, from * args.b.row + (column + lane) * args.b.column, args.b.column,
                                                  args.b.row, std::min(kColumns, columns - lane), n, b_of(slice) + lane * units);
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
                const int64_t height = std::min(kRows, i_end - i), width = std::min(kColumns, j_end - j);
                if (first && args.bias) {
                    for (int64_t r = 0; r < height; ++r) std::copy_n(args.bias + column + j, width, c + r * args.c_row);
                }
                if (height == kRows && width == kColumns) {
                    U::tile(left, right, c, args.c_row, units, add);
                } else {
                    edge_tile<U>(left, right, c, args.c_row, units, add, height, width);
                }
            }
        }
    }
};

// A sum of no products: the bias, or zeros.
void no_product(const MatmulArgs& args) {
    for (int64_t row = 0; row < args.m && !args.add; ++row) {
        float* c = args.c + row * args.c_row;
        if (args.bias) {
            std::copy_n(args.bias, args.n, c);
        } else {
            std::fill_n(c, args.n, 0.0f);
        }
    }
}

template <typename U>
void product(const MatmulArgs& args) {
    using Unit = typename U::Unit;
    constexpr int64_t kRows = U::kRows, kColumns = U::kColumns, kTaskRows = Block<U>::kTaskRows;
    constexpr int64_t kBlockRows = 16 * kTaskRows, kBlockColumns = U::kTasks * Block<U>::kTaskColumns;
    const int64_t depth = std::min(U::kDepth, units<U>(args.k));
    // Where c has few columns its blocks get more rows, and where it is small as a whole several slices of k: the threads
    // then wait for each other less often.
    const int64_t b_lanes = up(std::min(args.n, kBlockColumns), kColumns) * kColumns;
    const int64_t block_rows = kBlockRows + (kBlockColumns - b_lanes) / kTaskRows * kTaskRows;
    const int64_t a_lanes = up(std::min(args.m, block_rows), kRows) * kRows;
    const int64_t most = std::max<int64_t>(1, (kBlockRows + kBlockColumns) / (a_lanes + b_lanes));
    const int64_t stride = std::min(most, up(args.k, depth * U::kValues)) * depth;
    const std::unique_ptr<Unit[]> a(new Unit[size_t(a_lanes * stride)]), b(new Unit[size_t(b_lanes * stride)]);
#pragma omp parallel num_threads(args.threads)
    {
        [[maybe_unused]] const typename U::Held held;
        for (int64_t column = 0; column < args.n; column += kBlockColumns) {
            for (int64_t row = 0; row < args.m; row += block_rows) {
                for (int64_t k = 0; k < args.k; k += stride * U::kValues) {
                    const int64_t rows = std::min(block_rows, args.m - row), columns = std::min(kBlockColumns, args.n - column);
                    const int64_t values = std::min(stride * U::kValues, args.k - k);
                    const Block<U> block{args, row, column, k, rows, columns, values, depth, a.get(), b.get()};
                    const bool whole = values == args.k;
                    block.pack(!whole || rows < args.m || column == 0, !whole || row == 0);
                    block.multiply();
                }
            }
        }
    }
}

}  // namespace

void matmul(const MatmulArgs& args) {
    if (args.k == 0) return no_product(args);
    [[maybe_unused]] const bool halves = args.a.dtype == Dtype::bfloat16 && args.b.dtype == Dtype::bfloat16;
#if KDFAST_AMX && defined(__AVX512BW__)
    if (halves && tiles_of_bf16()) return product<Tiled>(args);
#endif
#if defined(__AVX512F__)
    if (halves && pairs_of_bf16()) return product<Pair>(args);
#endif
    product<Single>(args);
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
