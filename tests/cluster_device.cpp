// csrc/cuda/walk.h, compiled for the stand-in of a device.
#include "cluster_device.h"

#include "cuda/walk.h"

namespace {

using namespace kdfast;
using namespace kdfast::cluster;

template <typename S, typename T, AtOne A, bool P>
void run(const LogitsArgs& args, const Scalars& scalars, int blocks, int clusters, unsigned seed) {
    const int common = int(std::min(args.student.columns, args.teacher.columns)), chunks = chunks_for(common, blocks);
    const size_t ring_size = ring_bytes(common, blocks, sizeof(S) + sizeof(T));
    for (int index = 0; index < clusters; ++index) {
        const std::vector<unsigned char> fresh(sizeof(Shared) + ring_size + 256, 0xff);
        std::vector<std::vector<unsigned char>> memory(blocks, fresh);
        std::vector<void*> shared;
        for (auto& block : memory) shared.push_back(block.data() + (128 - uintptr_t(block.data()) % 128) % 128);
        const size_t ring_at = (sizeof(Shared) + 127) / 128 * 128;
        device::launch(index, clusters, kThreads, shared, seed, [&](device::Block& block) {
            unsigned char* room = static_cast<unsigned char*>(block.shared);
            Shared& own = *reinterpret_cast<Shared*>(room);
            Walk<S, T, A, P>{args, scalars, own, room + ring_at, chunks, cluster_rank(), cluster_blocks()}.run();
        });
    }
}

template <typename S, typename T>
void run_mode(const LogitsArgs& args, const Scalars& scalars, int blocks, int clusters, unsigned seed, AtOne at_one) {
    if (args.parts && at_one == AtOne::same) return run<S, T, AtOne::same, true>(args, scalars, blocks, clusters, seed);
    if (args.parts) return run<S, T, AtOne::own, true>(args, scalars, blocks, clusters, seed);
    switch (at_one) {
        case AtOne::none: return run<S, T, AtOne::none, false>(args, scalars, blocks, clusters, seed);
        case AtOne::same: return run<S, T, AtOne::same, false>(args, scalars, blocks, clusters, seed);
        case AtOne::square: return run<S, T, AtOne::square, false>(args, scalars, blocks, clusters, seed);
        default: return run<S, T, AtOne::own, false>(args, scalars, blocks, clusters, seed);
    }
}

}  // namespace

extern "C" {

// Matrices are (address, elements between rows, columns); `pair` counts fp32, fp32+bf16, fp32+fp16, bf16, fp16.
void walk(
    int pair, int64_t rows, const int64_t* student, const int64_t* teacher, const int64_t* grad, const int64_t* labels,
    const float* scale, float* loss, double* stats, float* parts, float temperature, float soft_scale, float hard_weight,
    float z_loss, int blocks, int clusters, unsigned seed, int at_one
) {
    const auto matrix = [](const int64_t* m) {
        return Matrix{reinterpret_cast<void*>(m[0]), m[1], m[2], Dtype::float32};
    };
    const LogitsArgs args{rows,        matrix(student), matrix(teacher), matrix(grad), labels, scale, loss, stats, parts,
                          temperature, soft_scale,      hard_weight,     z_loss};
    const Scalars o{kLog2e * (1 / temperature), 1 / temperature, soft_scale, hard_weight, z_loss};
    const AtOne mode = static_cast<AtOne>(at_one);
    switch (pair) {
        case 0: return run_mode<float, float>(args, o, blocks, clusters, seed, mode);
        case 1: return run_mode<float, Bf16>(args, o, blocks, clusters, seed, mode);
        case 2: return run_mode<float, Fp16>(args, o, blocks, clusters, seed, mode);
        case 3: return run_mode<Bf16, Bf16>(args, o, blocks, clusters, seed, mode);
        default: return run_mode<Fp16, Fp16>(args, o, blocks, clusters, seed, mode);
    }
}

// The codecs of the host side, which stand for the device's own conversions.
void widen_fp16(const uint16_t* bits, int n, float* out) {
    for (int i = 0; i < n; ++i) out[i] = widened<Fp16>(bits[i], 0);
}
void narrow(bool bf16, const float* x, int n, uint16_t* out) {
    for (int i = 0; i < n; ++i) out[i] = uint16_t(bf16 ? narrowed<Bf16>(x[i], 0) : narrowed<Fp16>(x[i], 0));
}
int blocks(int common, int pair_bytes) { return blocks_for(common, pair_bytes); }
}
