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

#include "walk.h"

namespace kdfast {
namespace cluster {
namespace {

template <typename S, typename T, AtOne A, bool P>
__global__ void __launch_bounds__(kThreads, 2)
    forward_kernel(const __grid_constant__ LogitsArgs args, const __grid_constant__ Scalars scalars, int chunks) {
    extern __shared__ __align__(128) unsigned char ring[];
    __shared__ __align__(16) unsigned char room[sizeof(Shared)];  // bytes: Shared has constructors, which nobody is to run
    Shared& shared = *reinterpret_cast<Shared*>(room);
    Walk<S, T, A, P>{args, scalars, shared, ring, chunks, cluster_rank(), cluster_blocks()}.run();
}

void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    throw std::runtime_error(std::string("kdfast cuda: ") + what + ": " + cudaGetErrorString(status));
}

using Function = void (*)(LogitsArgs, Scalars, int);

template <typename S, typename T>
Function choose(AtOne at_one, bool parts) {
    if (parts && at_one == AtOne::same) return &forward_kernel<S, T, AtOne::same, true>;
    if (parts) return &forward_kernel<S, T, AtOne::own, true>;
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
    // The limit of every size, since it belongs to the kernel; and not a byte of L1 that a second block could use.
    check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, kWhole), "shared memory");
    constexpr int kShared = cudaSharedmemCarveoutMaxShared;
    check(cudaFuncSetAttribute(entry, cudaFuncAttributePreferredSharedMemoryCarveout, kShared), "carveout");
    if (blocks > 8) check(cudaFuncSetAttribute(entry, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster size");
    int clusters = 0;
    check(cudaOccupancyMaxActiveClusters(&clusters, entry, &config), "clusters on this device");
    return known[{function, config.dynamicSmemBytes, blocks, device}] = clusters;
}

}  // namespace

bool takes(Dtype student, Dtype teacher) { return function_for(student, teacher, AtOne::none, false) != nullptr; }

bool logits_forward(const LogitsArgs& args, int blocks, int device, void* stream) {
    if (args.rows == 0) return true;
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
    if (clusters == 0) return false;
    config.gridDim = unsigned(blocks * std::min(args.rows, clusters));
    check(cudaLaunchKernelEx(&config, function, args, scalars, chunks_for(common, blocks)), "launch");
    return true;
}

int driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int build_version() { return CUDART_VERSION; }

}  // namespace cluster
}  // namespace kdfast
