// The instructions of sm_90 that C++ has no words for: bulk copies, barriers that count their bytes, clusters.
// Where there is no device compiler, tests/cluster_device.h stands in for them.
#pragma once

#ifdef __CUDACC__

#include <cstdint>

namespace kdfast {
namespace cluster {

__device__ __forceinline__ uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

__device__ __forceinline__ int cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
}

__device__ __forceinline__ int cluster_blocks() {
    uint32_t blocks;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    return int(blocks);
}

__device__ __forceinline__ int64_t cluster_index() {
    uint32_t index;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
    return index;
}

__device__ __forceinline__ int64_t cluster_count() {
    uint32_t count;
    asm("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
    return count;
}

// Every thread of every block. What a thread that passes on its writes wrote before, other blocks' shared memory included, is
// seen by all after it; so is what other threads of its block wrote before a __syncthreads that it took part in. One warp of a
// block suffices: it waits for all it has on its way to memory, gradients too.
__device__ __forceinline__ void cluster_barrier(bool passes_on_writes) {
    if (passes_on_writes) {
        asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    } else {
        asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
    }
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// The place in block `rank` that corresponds to `at` here.
__device__ __forceinline__ uint32_t place_in(const void* at, int rank) {
    uint32_t place;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(place) : "r"(shared_address(at)), "r"(rank));
    return place;
}

// Writes a value into the shared memory of block `rank`, at its counterpart of `at`.
template <typename Value>
__device__ __forceinline__ void put_in(Value* at, int rank, const Value& value) {
    static_assert(sizeof(Value) % 4 == 0, "whole words");
    uint32_t words[sizeof(Value) / 4];
    memcpy(words, &value, sizeof(Value));
    const uint32_t place = place_in(at, rank);
#pragma unroll
    for (uint32_t i = 0; i < sizeof(Value) / 4; ++i) {
        asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(place + 4 * i), "r"(words[i]) : "memory");
    }
}

// A barrier that one thread arrives at, and that opens once the bytes announced to it have landed.
__device__ __forceinline__ void barrier_start(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// After this every engine, that of the bulk copies included, sees the barriers as started.
__device__ __forceinline__ void barriers_started() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    const uint32_t at = shared_address(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t open = 0;
    while (!open) {
        asm volatile(
            "{\n"
            ".reg .pred opened;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 opened, [%1], %2;\n"
            "selp.u32 %0, 1, 0, opened;\n"
            "}"
            : "=r"(open)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    }
}

// Reads are for one use only: the L2 may drop them first.
__device__ __forceinline__ uint64_t read_once() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// `bytes`, a multiple of 16 between 16-byte boundaries, from global to this block's shared memory.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
        : "memory");
}

}  // namespace cluster
}  // namespace kdfast

#endif
