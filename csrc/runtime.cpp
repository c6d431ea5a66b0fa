// What is asked of the machine: instruction set, and threads after a fork.
#include <cstdlib>
#include <cstring>

#include "binding.h"
#include "cpu/isa.h"
#include "cpu/linear.h"

#if KDFAST_X86
#include <cpuid.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <unistd.h>
#endif
#if KDFAST_AMX
#include <sys/syscall.h>
#endif

namespace kdfast {
namespace {

bool forked = false;

Isa best_isa() {
#if KDFAST_X86
    __builtin_cpu_init();
    const char* lowered = std::getenv("KDFAST_ISA");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (lowered && !std::strcmp(lowered, "baseline")) return Isa::baseline;
    if (avx512 && !(lowered && !std::strcmp(lowered, "avx2"))) return Isa::avx512;
    if (avx2) return Isa::avx2;
#endif
    return Isa::baseline;
}

bool is_intel() {
#if KDFAST_X86
    __builtin_cpu_init();
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

const char* isa_name() {
    switch (isa()) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        default: return "baseline";
    }
}

}  // namespace

Isa isa() {
    static const Isa found = best_isa();
    return found;
}

bool pairs_of_bf16() {
#if KDFAST_X86
    unsigned a = 0, b = 0, c = 0, d = 0;
    // Leaf 7, subleaf 1, EAX bit 5: AVX512_BF16, which older compilers have no name for.
    static const bool found = isa() == Isa::avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
    return found;
#else
    return false;
#endif
}

bool tiles_of_bf16() {
#if KDFAST_AMX
    static const bool found = [] {
        const char* lowered = std::getenv("KDFAST_ISA");
        unsigned a = 0, b = 0, c = 0, d = 0;
        // Leaf 7, EDX: AMX_BF16 and AMX_TILE. Linux lets a process have the tiles' state (component 18) once it asks for it.
        constexpr unsigned kWanted = 1u << 22 | 1u << 24;
        constexpr long kAsk = 0x1023, kTiles = 18;
        return pairs_of_bf16() && !(lowered && !std::strcmp(lowered, "avx512")) && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
               (d & kWanted) == kWanted && syscall(SYS_arch_prctl, kAsk, kTiles) == 0;
    }();
    return found;
#else
    return false;
#endif
}

int safe_threads(int wanted) { return forked || wanted < 1 ? 1 : wanted; }

void bind_runtime(pybind11::module_& m) {
    namespace py = pybind11;
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
    m.def("isa", &isa_name, "Instruction set the kernels use on this processor: avx512, avx2 or baseline.");
    m.def("is_intel", &is_intel, "Whether this processor is Intel's, which MKL knows best.");
    m.def("safe_threads", &safe_threads, py::arg("wanted"), "Threads a kernel will use: 1 in a forked child.");
}

}  // namespace kdfast
