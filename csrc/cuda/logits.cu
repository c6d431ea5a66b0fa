// A cluster of blocks walks rows. Each block keeps its share of a row in chunks of shared memory:
//
//   pass 1   as chunks arrive: maxima and sums; the blocks tell each other theirs
//   pass 2   value and gradient, from shared memory; a chunk that is done with takes in the cluster's next row
//
// So copies are in flight during the whole of pass 2, and there is one cluster barrier a row: what a block added up in pass 2
// travels to block 0 ahead of the next row's barrier and is written out after it. I/O a row: student and teacher in, gradient
// out, nothing twice but the edge (see plan.h).
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>

#include "logits.h"
#include "plan.h"
#include "ptx.h"
#include "row.h"

namespace kdfast {
namespace cluster {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
static_assert(kWarps == 16 && kMaxBlocks == 16, "half a warp adds up the warps of a block and the blocks of a cluster");

// Of the label's column.
struct Logits {
    float student, teacher;
};

// What pass 1 leaves for whoever writes the row's loss, one row later.
struct Pending {
    int64_t row;
    Outline outline;
};

struct Shared {
    uint64_t arrived[kMaxChunks];
    RowSums warp_sums[kWarps];
    Totals warp_totals[kWarps];
    // Written by other blocks, hence two of each: a block may be a row ahead.
    RowSums sums[2][kMaxBlocks];
    Totals totals[2][kMaxBlocks];  // block 0 only
    Logits label[2];               // block 0 only
    Pending pending;               // block 0 only
};

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
        totals.best_s = lanes_min<kLanes>(totals.best_s);
        totals.best_t = lanes_min<kLanes>(totals.best_t);
    }
}

template <typename S, typename T, AtOne A, bool P>
struct Walk {
    static constexpr int kPairBytes = sizeof(S) + sizeof(T);
    // Columns a thread takes at a time: 16 bytes, with parts half of it where their sums would spill.
    static constexpr int N = sizeof(S) > 2 || sizeof(T) > 2 || P ? 4 : 8;
    static constexpr AtOne kTeacherAt1 = P && A == AtOne::own ? AtOne::own : AtOne::none;

    const LogitsArgs& args;
    const Scalars& o;
    Shared& shared;
    unsigned char* ring;
    const int chunks, rank, blocks;

    __device__ __forceinline__ int width() const { return int(args.student.columns); }
    __device__ __forceinline__ int common() const { return min(width(), int(args.teacher.columns)); }
    __device__ __forceinline__ bool has_extra() const { return args.student.columns > args.teacher.columns; }
    __device__ __forceinline__ const S* student(int64_t row) const {
        return static_cast<const S*>(args.student.data) + row * args.student.stride;
    }
    __device__ __forceinline__ const T* teacher(int64_t row) const {
        return static_cast<const T*>(args.teacher.data) + row * args.teacher.stride;
    }
    __device__ __forceinline__ S* grad(int64_t row) const { return static_cast<S*>(args.grad.data) + row * args.grad.stride; }
    __device__ __forceinline__ S* ring_student(int chunk) const {
        return reinterpret_cast<S*>(ring + chunk * (kChunk * kPairBytes));
    }
    __device__ __forceinline__ T* ring_teacher(int chunk) const { return reinterpret_cast<T*>(ring_student(chunk) + kChunk); }
    __device__ __forceinline__ int first_edge() const { return rank * kThreads + int(threadIdx.x); }
    __device__ __forceinline__ int edge_step() const { return blocks * kThreads; }

    __device__ __forceinline__ Layout layout(int64_t row) const {
        const auto finest = sizeof(S) <= sizeof(T) ? uintptr_t(student(row)) : uintptr_t(teacher(row));
        return layout_of(finest, sizeof(S) <= sizeof(T) ? sizeof(S) : sizeof(T), common(), width());
    }

    // Starts the copy of a chunk of `row`; one thread. A chunk the row does not need arrives at once.
    __device__ __forceinline__ void fetch(int64_t row, const Slice& slice, int chunk, uint64_t policy) const {
        const int columns = slice.chunk_columns(chunk), begin = slice.begin + chunk * kChunk;
        barrier_expect(&shared.arrived[chunk], columns * kPairBytes);
        if (columns == 0) return;
        bulk_copy(ring_student(chunk), student(row) + begin, columns * sizeof(S), &shared.arrived[chunk], policy);
        bulk_copy(ring_teacher(chunk), teacher(row) + begin, columns * sizeof(T), &shared.arrived[chunk], policy);
    }

    __device__ __forceinline__ RowSums first_pass(int64_t row, const Layout& layout, const Slice& slice, uint32_t parity) const {
        RowSums sums;
        for (int chunk = 0; chunk < chunks; ++chunk) {
            barrier_wait(&shared.arrived[chunk], parity);
            for (int at = threadIdx.x * N; at < slice.chunk_columns(chunk); at += kThreads * N) {
                float s[N], t[N];
                Pack<S, N>::load(ring_student(chunk) + at).values(s);
                Pack<T, N>::load(ring_teacher(chunk) + at).values(t);
                add<A>(sums.student, s, o.c);
                add<kTeacherAt1>(sums.teacher, t, o.c);
            }
        }
        settle<A>(sums.student, o.c);
        settle<kTeacherAt1>(sums.teacher, o.c);
        for (int i = first_edge(); i < layout.edges(); i += edge_step()) {
            const int column = layout.edge_column(i);
            const float s = one(student(row) + column);
            if (column < common()) {
                add_one<A>(sums.student, s, o.c);
                add_one<kTeacherAt1>(sums.teacher, one(teacher(row) + column), o.c);
            } else {
                add_one<AtOne::own>(sums.extra, s, kLog2e);
            }
        }
        return sums;
    }

    // The sums of the whole row, in every thread of the cluster.
    __device__ __forceinline__ RowSums exchanged(RowSums sums, int turn) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, half = lane % 16;
        lanes_total<32, A, P>(sums, has_extra(), o.c);
        if (lane == 0) shared.warp_sums[warp] = sums;
        __syncthreads();
        if (warp == 0) {
            sums = shared.warp_sums[half];
            lanes_total<16, A, P>(sums, has_extra(), o.c);
            if (lane < blocks) put_in(&shared.sums[turn % 2][rank], lane, sums);
        }
        cluster_barrier();
        sums = half < blocks ? shared.sums[turn % 2][half] : RowSums();
        lanes_total<16, A, P>(sums, has_extra(), o.c);
        return sums;
    }

    // Takes the label's own term off the gradient and sends its logits to block 0.
    template <int kCount>
    __device__ __forceinline__ void at_label(
        int at, const Row& row, const float (&s)[kCount], const float (&t)[kCount], float (&g)[kCount], int turn
    ) const {
        Logits label{s[0], t[0]};
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if (i == at) {
                g[i] -= row.of_label;
                label = {s[i], t[i]};
            }
        }
        put_in(&shared.label[turn % 2], 0, label);
    }

    __device__ __forceinline__ Totals second_pass_edge(
        int64_t at, const Layout& layout, const Row& row, int label, int turn
    ) const {
        Totals totals;
        for (int i = first_edge(); i < layout.edges(); i += edge_step()) {
            const int column = layout.edge_column(i);
            const float s[1] = {one(student(at) + column)};
            float t[1] = {-INFINITY}, g[1];
            if (column < common()) {
                t[0] = one(teacher(at) + column);
                column_terms<A, P>(row, o, s, t, column, totals, g);
            } else {
                g[0] = extra_gradient<A>(row, s[0]);
            }
            if (column == label) at_label(0, row, s, t, g, turn);
            if (args.grad.data) put(grad(at) + column, g[0]);
        }
        return totals;
    }

    // Value and gradient of row `at`; the chunks then take in row `next`, where there is one.
    __device__ __forceinline__ Totals second_pass(
        int64_t at, int64_t next, const Layout& layout, const Slice& slice, const Row& row, int label, int turn
    ) const {
        Totals totals = second_pass_edge(at, layout, row, label, turn);
        Slice coming{};
        uint64_t policy = 0;
        if (threadIdx.x == 0 && next < args.rows) {
            coming = slice_of(this->layout(next), rank, blocks);
            policy = read_once();
        }
        for (int chunk = 0; chunk < chunks; ++chunk) {
            for (int i = threadIdx.x * N; i < slice.chunk_columns(chunk); i += kThreads * N) {
                const int column = slice.begin + chunk * kChunk + i;
                float s[N], t[N], g[N];
                Pack<S, N>::load(ring_student(chunk) + i).values(s);
                Pack<T, N>::load(ring_teacher(chunk) + i).values(t);
                column_terms<A, P>(row, o, s, t, column, totals, g);
                if (unsigned(label - column) < unsigned(N)) at_label(label - column, row, s, t, g, turn);
                if (args.grad.data) Pack<S, N>::of(g).store(grad(at) + column);
            }
            __syncthreads();
            if (threadIdx.x == 0 && next < args.rows) fetch(next, coming, chunk, policy);
        }
        return totals;
    }

    // Block 0 hears what this block's pass 2 added up, at the latest with the next cluster barrier.
    __device__ __forceinline__ void send(Totals totals, int turn) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        lanes_total<32, P>(totals);
        if (lane == 0) shared.warp_totals[warp] = totals;
        __syncthreads();
        if (warp == 0) {
            totals = shared.warp_totals[lane % 16];
            lanes_total<16, P>(totals);
            if (lane == 0) put_in(&shared.totals[turn % 2][rank], 0, totals);
        }
    }

    // One thread of block 0: what is known of a row after pass 1.
    __device__ __forceinline__ void note(int64_t at, const Row& row, float scale, int label) const {
        double* stats = args.stats + 4 * at;
        const double ln2 = 0.6931471805599453;
        stats[0] = double(row.m_s) / args.temperature + row.l_s * ln2;
        stats[1] = A == AtOne::none ? double(NAN) : row.m_1 + row.l_1 * ln2;
        stats[2] = 0;
        stats[3] = double(row.m_t) / args.temperature + row.l_t * ln2;
        const bool labels = args.labels != nullptr;
        const bool valid = row.l_s > -INFINITY && row.l_t > -INFINITY;
        const Outline outline{row.lse_1(), row.m_1,    row.l_1,    row.m_t, row.l_t1, scale,
                              labels,      label >= 0, label >= 0 && label < common(), valid};
        shared.pending = {at, outline};
    }

    // Warp 0 of block 0: loss and parts of the row whose pass 2 every block has finished.
    __device__ __forceinline__ void finish(int turn) const {
        const int lane = threadIdx.x % 32, half = lane % 16;
        Totals totals = half < blocks ? shared.totals[turn % 2][half] : Totals();
        lanes_total<16, P>(totals);
        if (lane != 0) return;
        const Pending& pending = shared.pending;
        const Outline& row = pending.outline;
        const Logits label = shared.label[turn % 2];
        args.loss[pending.row] = loss_of<A>(row, o, totals.soft, label.student);
        if (!P) return;
        float* parts = args.parts + 7 * pending.row;
        const float soft = row.valid ? totals.soft : NAN;
        parts[0] = soft;
        parts[1] = !row.has_labels ? 0.0f : row.label_counts ? row.nll(label.student) : NAN;
        parts[2] = row.lse_1 * row.lse_1;
        parts[3] = A == AtOne::own ? totals.kl_at_1 : soft;
        parts[4] = !row.has_labels ? 0.0f : row.label_common ? (row.m_t - label.teacher) + kLn2 * row.l_t1 : INFINITY;
        parts[5] = totals.entropy;
        parts[6] = totals.best_s == totals.best_t ? 1.0f : 0.0f;
    }

    // The label's column; -1 where there is none inside the vocabulary.
    __device__ __forceinline__ int label_of(int64_t row) const {
        if (!args.labels) return -1;
        const int64_t label = args.labels[row];
        return label >= 0 && label < width() ? int(label) : -1;
    }

    // The first row from `row` on that counts, in steps of the clusters.
    __device__ __forceinline__ int64_t counted(int64_t row) const {
        while (row < args.rows && args.scale[row] == 0) row += cluster_count();
        return row;
    }

    __device__ __forceinline__ void clear(int64_t row, int64_t end) const {
        for (; row < end && row < args.rows; row += cluster_count()) {
            if (rank == 0 && threadIdx.x < 7) {
                if (threadIdx.x == 0) args.loss[row] = 0;
                if (threadIdx.x < 4) args.stats[4 * row + threadIdx.x] = 0;
                if (P) args.parts[7 * row + threadIdx.x] = 0;
            }
            if (!args.grad.data) continue;
            const Layout layout = this->layout(row);
            const Slice slice = slice_of(layout, rank, blocks);
            const float zeros[N] = {};
            for (int i = first_edge(); i < layout.edges(); i += edge_step()) put(grad(row) + layout.edge_column(i), 0.0f);
            for (int i = threadIdx.x * N; i < slice.columns; i += kThreads * N) {
                Pack<S, N>::of(zeros).store(grad(row) + slice.begin + i);
            }
        }
    }
};

template <typename S, typename T, AtOne A, bool P>
__global__ void __launch_bounds__(kThreads, 2)
    forward_kernel(const __grid_constant__ LogitsArgs args, const __grid_constant__ Scalars scalars, int chunks) {
    extern __shared__ __align__(128) unsigned char ring[];
    __shared__ Shared shared;
    const Walk<S, T, A, P> walk{args, scalars, shared, ring, chunks, cluster_rank(), cluster_blocks()};
    int64_t row = walk.counted(cluster_index());
    if (threadIdx.x == 0) {
        for (int chunk = 0; chunk < chunks; ++chunk) barrier_start(&shared.arrived[chunk]);
        barriers_started();
        if (row < args.rows) {
            const Slice slice = slice_of(walk.layout(row), walk.rank, walk.blocks);
            for (int chunk = 0; chunk < chunks; ++chunk) walk.fetch(row, slice, chunk, read_once());
        }
    }
    walk.clear(cluster_index(), row);
    cluster_barrier();  // every block has started: its shared memory may be written, its barriers waited for
    int turn = 0;
    for (; row < args.rows; ++turn) {
        const Layout layout = walk.layout(row);
        const Slice slice = slice_of(layout, walk.rank, walk.blocks);
        const float scale = args.scale[row];
        const int label = walk.label_of(row);
        // Asked for now, looked at after pass 1.
        const int64_t after = row + cluster_count();
        const float scale_after = after < args.rows ? args.scale[after] : 1.0f;
        const RowSums sums = walk.exchanged(walk.first_pass(row, layout, slice, turn % 2), turn);
        if (turn > 0 && walk.rank == 0 && threadIdx.x < 32) walk.finish(turn - 1);
        const Row constants = row_of<A, P>(sums, walk.has_extra(), scalars, scale, args.labels != nullptr);
        if (walk.rank == 0 && threadIdx.x == 0) walk.note(row, constants, scale, label);
        const int64_t next = scale_after != 0 ? after : walk.counted(after + cluster_count());
        walk.send(walk.second_pass(row, next, layout, slice, constants, label, turn), turn);
        walk.clear(after, next);
        row = next;
    }
    cluster_barrier();  // also: no block leaves while another writes to it
    if (turn > 0 && walk.rank == 0 && threadIdx.x < 32) walk.finish(turn - 1);
}

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string("kdfast cuda: ") + what + ": " + cudaGetErrorString(status));
}

using Function = void (*)(LogitsArgs, Scalars, int);

template <typename S, typename T>
Function choose(AtOne at_one, bool parts) {
    if (parts) return at_one == AtOne::same ? &forward_kernel<S, T, AtOne::same, true> : &forward_kernel<S, T, AtOne::own, true>;
    switch (at_one) {
        case AtOne::none: return &forward_kernel<S, T, AtOne::none, false>;
        case AtOne::same: return &forward_kernel<S, T, AtOne::same, false>;
        case AtOne::square: return &forward_kernel<S, T, AtOne::square, false>;
        default: return &forward_kernel<S, T, AtOne::own, false>;
    }
}

// null: there is no kernel for this pair.
Function function_for(Dtype student, Dtype teacher, AtOne at_one, bool parts) {
    switch (student) {
        case Dtype::bfloat16: return teacher == student ? choose<Bf16, Bf16>(at_one, parts) : nullptr;
        case Dtype::float16: return teacher == student ? choose<Fp16, Fp16>(at_one, parts) : nullptr;
        default: break;
    }
    switch (teacher) {
        case Dtype::bfloat16: return choose<float, Bf16>(at_one, parts);
        case Dtype::float16: return choose<float, Fp16>(at_one, parts);
        default: return choose<float, float>(at_one, parts);
    }
}

AtOne at_one(const LogitsArgs& args) {
    const bool needed = (args.labels && args.hard_weight != 0) || args.z_loss != 0 || args.parts;
    if (!needed) return AtOne::none;
    if (args.temperature == 1) return AtOne::same;
    return args.temperature == 2 && !args.parts ? AtOne::square : AtOne::own;
}

// Clusters the device holds at once; asked once for each kernel and size. The caller holds Python's lock.
int clusters_at_once(Function function, const cudaLaunchConfig_t& config, int blocks, int device) {
    static std::map<std::tuple<Function, size_t, int, int>, int> known;
    const auto found = known.find({function, config.dynamicSmemBytes, blocks, device});
    if (found != known.end()) return found->second;
    const auto entry = reinterpret_cast<const void*>(function);
    const int bytes = int(config.dynamicSmemBytes);
    check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
    if (blocks > 8) check(cudaFuncSetAttribute(entry, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster size");
    int clusters = 0;
    check(cudaOccupancyMaxActiveClusters(&clusters, entry, &config), "clusters on this device");
    if (clusters == 0) throw std::runtime_error("kdfast cuda: no cluster of " + std::to_string(blocks) + " blocks fits this device");
    return known[{function, config.dynamicSmemBytes, blocks, device}] = clusters;
}

}  // namespace

bool takes(Dtype student, Dtype teacher) { return function_for(student, teacher, AtOne::none, false) != nullptr; }

void logits_forward(const LogitsArgs& args, int blocks, int device, void* stream) {
    if (args.rows == 0) return;
    const Function function = function_for(args.student.dtype, args.teacher.dtype, at_one(args), args.parts != nullptr);
    if (!function) throw std::runtime_error("kdfast cuda: no kernel for these dtypes");
    const float inverse_t = 1 / args.temperature;
    const Scalars scalars{kLog2e * inverse_t, inverse_t, args.soft_scale, args.hard_weight, args.z_loss};
    const int pair_bytes = int(bytes_of(args.student.dtype) + bytes_of(args.teacher.dtype));
    const int common = int(std::min(args.student.columns, args.teacher.columns));

    cudaLaunchAttribute shape{};
    shape.id = cudaLaunchAttributeClusterDimension;
    shape.val.clusterDim = {unsigned(blocks), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = kThreads;
    config.dynamicSmemBytes = ring_bytes(common, blocks, pair_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &shape;
    config.numAttrs = 1;
    check(cudaSetDevice(device), "device");
    const int64_t clusters = clusters_at_once(function, config, blocks, device);
    config.gridDim = unsigned(blocks * std::min(args.rows, clusters));
    check(cudaLaunchKernelEx(&config, function, args, scalars, chunks_for(common, blocks)), "launch");
}

int driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int build_version() { return CUDART_VERSION; }

}  // namespace cluster
}  // namespace kdfast
