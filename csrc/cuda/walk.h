// How one block of a cluster walks its rows: the steps of logits.cu.
#pragma once

#include "lanes.h"
#include "logits.h"
#include "plan.h"
#include "ptx.h"

namespace kdfast {
namespace cluster {

constexpr int kWarps = kThreads / 32;
static_assert(kWarps <= 16 && kMaxBlocks == 16, "half a warp adds up the warps of a block and the blocks of a cluster");

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

template <typename S, typename T, AtOne A, bool P>
struct Walk {
    static constexpr int kPairBytes = sizeof(S) + sizeof(T);
    static constexpr int N = sizeof(S) > 2 || sizeof(T) > 2 ? 4 : 8;  // columns a thread takes at a time
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

    __device__ __forceinline__ RowSums first_pass(int64_t row, const Layout& layout, const Slice& slice, int turn) const {
        RowSums sums;
        for (int chunk = 0; chunk < chunks; ++chunk) {
            barrier_wait(&shared.arrived[chunk], turn % 2);
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
            sums = half < kWarps ? shared.warp_sums[half] : RowSums();
            lanes_total<16, A, P>(sums, has_extra(), o.c);
            if (lane < blocks) put_in(&shared.sums[turn % 2][rank], lane, sums);
        }
        cluster_barrier(warp == 0);
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
        if (next < args.rows) {
            const Layout there = this->layout(next);
            coming = slice_of(there, rank, blocks);
            policy = read_once();
            if (first_edge() < there.edges()) {
                const int column = there.edge_column(first_edge());
                prefetch(student(next) + column);
                if (column < common()) prefetch(teacher(next) + column);
            }
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
            totals = lane % 16 < kWarps ? shared.warp_totals[lane % 16] : Totals();
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
        shared.pending = {at, outline_of(row, scale, args.labels != nullptr, label, common())};
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
        if (P) parts_of<A>(row, totals, label, args.parts + kParts * pending.row);
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
            if (rank == 0 && threadIdx.x < kParts) {
                if (threadIdx.x == 0) args.loss[row] = 0;
                if (threadIdx.x < 4) args.stats[4 * row + threadIdx.x] = 0;
                if (P) args.parts[kParts * row + threadIdx.x] = 0;
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

    __device__ __forceinline__ void run() const {
        int64_t row = counted(cluster_index());
        if (threadIdx.x == 0) {
            for (int chunk = 0; chunk < chunks; ++chunk) barrier_start(&shared.arrived[chunk]);
            barriers_started();
            if (row < args.rows) {
                const Slice slice = slice_of(layout(row), rank, blocks);
                for (int chunk = 0; chunk < chunks; ++chunk) fetch(row, slice, chunk, read_once());
            }
        }
        clear(cluster_index(), row);
        cluster_barrier(true);  // every block has started: its shared memory may be written, its barriers waited for
        int turn = 0;
        for (; row < args.rows; ++turn) {
            const Layout layout = this->layout(row);
            const Slice slice = slice_of(layout, rank, blocks);
            const float scale = args.scale[row];
            const int label = label_of(row);
            // Asked for now, looked at after pass 1.
            const int64_t after = row + cluster_count();
            const float scale_after = after < args.rows ? args.scale[after] : 1.0f;
            const RowSums sums = exchanged(first_pass(row, layout, slice, turn), turn);
            if (turn > 0 && rank == 0 && threadIdx.x < 32) finish(turn - 1);
            const Row constants = row_of<A, P>(sums, has_extra(), o, scale, args.labels != nullptr);
            if (rank == 0 && threadIdx.x == 0) note(row, constants, scale, label);
            const int64_t next = scale_after != 0 ? after : counted(after + cluster_count());
            send(second_pass(row, next, layout, slice, constants, label, turn), turn);
            clear(after, next);
            row = next;
        }
        cluster_barrier(threadIdx.x < 32);  // also: no block leaves while another writes to it
        if (turn > 0 && rank == 0 && threadIdx.x < 32) finish(turn - 1);
    }
};

}  // namespace cluster
}  // namespace kdfast
