// The cluster kernel's arithmetic and indices on a CPU: what csrc/cuda/{element,plan,row}.h say, in the order of the threads.
// Shared memory, barriers and copies are the device's own; here a chunk is "copied" by checking that it may be.
#include <algorithm>
#include <vector>

#include "cuda/plan.h"
#include "cuda/row.h"

namespace {

using namespace kdfast::cluster;

constexpr int kThreads = 512;

template <typename S, typename T, AtOne A, bool P>
struct Emulation {
    static constexpr int N = sizeof(S) > 2 || sizeof(T) > 2 || P ? 4 : 8;
    static constexpr AtOne kTeacherAt1 = P && A == AtOne::own ? AtOne::own : AtOne::none;
    const S* student;
    const T* teacher;
    S* grad;
    int width, common, blocks;
    Scalars o;
    std::vector<unsigned char> ring;

    Layout layout() const {
        return sizeof(S) <= sizeof(T) ? layout_of(uintptr_t(student), sizeof(S), common, width)
                                      : layout_of(uintptr_t(teacher), sizeof(T), common, width);
    }

    // A chunk in what stands for shared memory; false when the device could not copy it in bulk.
    bool fetch(const Slice& slice, int chunk, const S*& s, const T*& t) {
        const int columns = slice.chunk_columns(chunk), begin = slice.begin + chunk * kChunk;
        unsigned char* place = ring.data() + (64 - uintptr_t(ring.data()) % 64) % 64;
        s = reinterpret_cast<const S*>(place);
        t = reinterpret_cast<const T*>(place + kChunk * sizeof(S));
        if (columns == 0) return true;
        const auto aligned = [](const void* at) { return uintptr_t(at) % 16 == 0; };
        if (!aligned(student + begin) || !aligned(teacher + begin) || !aligned(grad + begin)) return false;
        if (columns * sizeof(S) % 16 || columns * sizeof(T) % 16 || begin + columns > common) return false;
        std::memcpy(place, student + begin, columns * sizeof(S));
        std::memcpy(place + kChunk * sizeof(S), teacher + begin, columns * sizeof(T));
        return true;
    }

    static Sum merged(const Sum& a, const Sum& b, float c) {
        Sum sum;
        sum.m = std::fmax(a.m, b.m);
        sum.at_t = raised(a.at_t, a.m, sum.m, c) + raised(b.at_t, b.m, sum.m, c);
        sum.at_1 = raised(a.at_1, a.m, sum.m, kLog2e) + raised(b.at_1, b.m, sum.m, kLog2e);
        return sum;
    }

    RowSums merged(const RowSums& a, const RowSums& b) const {
        return {merged(a.student, b.student, o.c), merged(a.teacher, b.teacher, o.c), merged(a.extra, b.extra, o.c)};
    }

    Totals merged(const Totals& a, const Totals& b) const {
        return {a.soft + b.soft, a.kl_at_1 + b.kl_at_1, a.entropy + b.entropy, std::min(a.best_s, b.best_s), std::min(a.best_t, b.best_t)};
    }

    // What the threads of all blocks have, two by two as lanes, warps and blocks do.
    template <typename Part>
    Part tree(std::vector<Part> parts) const {
        for (size_t n = parts.size(); n > 1; n /= 2) {
            for (size_t i = 0; i < n / 2; ++i) parts[i] = merged(parts[2 * i], parts[2 * i + 1]);
        }
        return parts[0];
    }

    bool first_pass(RowSums& row, std::vector<int>& seen) {
        const Layout layout = this->layout();
        std::vector<RowSums> all(blocks * kThreads);
        for (int rank = 0; rank < blocks; ++rank) {
            const Slice slice = slice_of(layout, rank, blocks);
            if (slice.columns > chunks_for(common, blocks) * kChunk) return false;
            for (int chunk = 0; chunk < chunks_for(common, blocks); ++chunk) {
                const S* s_at;
                const T* t_at;
                if (!fetch(slice, chunk, s_at, t_at)) return false;
                for (int at = 0; at < slice.chunk_columns(chunk); at += N) {
                    RowSums& sums = all[rank * kThreads + at / N % kThreads];
                    float s[N], t[N];
                    Pack<S, N>::load(s_at + at).values(s);
                    Pack<T, N>::load(t_at + at).values(t);
                    for (int i = 0; i < N; ++i) ++seen[slice.begin + chunk * kChunk + at + i];
                    add<A>(sums.student, s, o.c);
                    add<kTeacherAt1>(sums.teacher, t, o.c);
                }
            }
        }
        for (RowSums& sums : all) settle<A>(sums.student, o.c), settle<kTeacherAt1>(sums.teacher, o.c);
        for (int i = 0; i < layout.edges(); ++i) {
            RowSums& sums = all[i % (blocks * kThreads)];
            const int column = layout.edge_column(i);
            const float s = one(student + column);
            ++seen[column];
            if (column < common) {
                add_one<A>(sums.student, s, o.c);
                add_one<kTeacherAt1>(sums.teacher, one(teacher + column), o.c);
            } else {
                add_one<AtOne::own>(sums.extra, s, kLog2e);
            }
        }
        row = tree(all);
        return true;
    }

    Totals second_pass(const Row& row, int label, float& s_label, float& t_label) {
        const Layout layout = this->layout();
        std::vector<Totals> all(blocks * kThreads);
        for (int i = 0; i < layout.edges(); ++i) {
            const int column = layout.edge_column(i);
            const float s[1] = {one(student + column)};
            float t[1] = {-INFINITY}, g[1];
            if (column < common) {
                t[0] = one(teacher + column);
                column_terms<A, P>(row, o, s, t, column, all[i % (blocks * kThreads)], g);
            } else {
                g[0] = extra_gradient<A>(row, s[0]);
            }
            if (column == label) g[0] -= row.of_label, s_label = s[0], t_label = t[0];
            put(grad + column, g[0]);
        }
        for (int rank = 0; rank < blocks; ++rank) {
            const Slice slice = slice_of(layout, rank, blocks);
            for (int chunk = 0; chunk < chunks_for(common, blocks); ++chunk) {
                const S* s_at;
                const T* t_at;
                fetch(slice, chunk, s_at, t_at);
                for (int at = 0; at < slice.chunk_columns(chunk); at += N) {
                    const int column = slice.begin + chunk * kChunk + at;
                    float s[N], t[N], g[N];
                    Pack<S, N>::load(s_at + at).values(s);
                    Pack<T, N>::load(t_at + at).values(t);
                    column_terms<A, P>(row, o, s, t, column, all[rank * kThreads + at / N % kThreads], g);
                    for (int i = 0; i < N; ++i) {
                        if (column + i == label) g[i] -= row.of_label, s_label = s[i], t_label = t[i];
                    }
                    Pack<S, N>::of(g).store(grad + column);
                }
            }
        }
        return tree(all);
    }

    // 0, or which check failed: 1 a copy, 2 a column not seen exactly once.
    int run(float scale, bool has_labels, int label, float* out) {
        ring.resize(kChunk * (sizeof(S) + sizeof(T)) + 64);
        std::vector<int> seen(width);
        RowSums sums;
        if (!first_pass(sums, seen)) return 1;
        for (int times : seen) {
            if (times != 1) return 2;
        }
        const Row row = row_of<A, P>(sums, width > common, o, scale, has_labels);
        float s_label = 0, t_label = 0;
        const Totals totals = second_pass(row, label, s_label, t_label);
        const bool valid = row.l_s > -INFINITY && row.l_t > -INFINITY;
        const Outline outline{row.lse_1(), row.m_1, row.l_1, row.m_t, row.l_t1, scale, has_labels, label >= 0, label >= 0 && label < common, valid};
        out[0] = loss_of<A>(outline, o, totals.soft, s_label);
        out[1] = totals.soft;
        out[2] = outline.nll(s_label);
        out[3] = A == AtOne::own ? totals.kl_at_1 : totals.soft;
        out[4] = (row.m_t - t_label) + kLn2 * row.l_t1;
        out[5] = totals.entropy;
        out[6] = totals.best_s == totals.best_t;
        return 0;
    }
};

struct Job {
    const void *student, *teacher;
    void* grad;
    int width, common, blocks, label;
    float temperature, soft_scale, hard_weight, z_loss, scale;
    bool has_labels;
    float* out;
};

template <typename S, typename T, AtOne A, bool P>
int run(const Job& j) {
    const float inverse_t = 1 / j.temperature;
    Emulation<S, T, A, P> emulation{static_cast<const S*>(j.student), static_cast<const T*>(j.teacher), static_cast<S*>(j.grad),
                                    j.width, j.common, j.blocks, {kLog2e * inverse_t, inverse_t, j.soft_scale, j.hard_weight, j.z_loss}, {}};
    return emulation.run(j.scale, j.has_labels, j.label, j.out);
}

template <typename S, typename T>
int run_mode(const Job& j, int at_one, bool parts) {
    if (parts) return at_one == int(AtOne::same) ? run<S, T, AtOne::same, true>(j) : run<S, T, AtOne::own, true>(j);
    switch (static_cast<AtOne>(at_one)) {
        case AtOne::none: return run<S, T, AtOne::none, false>(j);
        case AtOne::same: return run<S, T, AtOne::same, false>(j);
        case AtOne::square: return run<S, T, AtOne::square, false>(j);
        default: return run<S, T, AtOne::own, false>(j);
    }
}

}  // namespace

extern "C" {

// `pair` counts the kernel's pairs of dtypes: fp32, fp32+bf16, fp32+fp16, bf16, fp16.
int emulate(
    int pair, const void* student, const void* teacher, void* grad, int width, int common, int blocks, int label, bool has_labels,
    float temperature, float soft_scale, float hard_weight, float z_loss, float scale, int at_one, bool parts, float* out
) {
    const Job job{student, teacher, grad, width, common, blocks, label, temperature, soft_scale, hard_weight, z_loss, scale, has_labels, out};
    switch (pair) {
        case 0: return run_mode<float, float>(job, at_one, parts);
        case 1: return run_mode<float, Bf16>(job, at_one, parts);
        case 2: return run_mode<float, Fp16>(job, at_one, parts);
        case 3: return run_mode<Bf16, Bf16>(job, at_one, parts);
        default: return run_mode<Fp16, Fp16>(job, at_one, parts);
    }
}

// Every 16-bit pattern of fp16 to float32 and back.
void widen_fp16(const uint16_t* bits, int n, float* out) {
    for (int i = 0; i < n; ++i) out[i] = widened<Fp16>(bits[i], 0);
}
void narrow(bool bf16, const float* x, int n, uint16_t* out) {
    for (int i = 0; i < n; ++i) out[i] = uint16_t(bf16 ? narrowed<Bf16>(x[i], 0) : narrowed<Fp16>(x[i], 0));
}
int blocks(int common, int pair_bytes) { return blocks_for(common, pair_bytes); }
}
