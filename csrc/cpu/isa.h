// The same kernel source is compiled once per instruction set, each in a namespace of its own; KDFAST_CALL picks the
// best one the processor has at run time.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define KDFAST_X86 1
#else
#define KDFAST_X86 0
#endif

namespace kdfast {

enum class Isa { baseline, avx2, avx512 };

// Best instruction set of this processor; KDFAST_ISA=baseline|avx2|avx512 lowers it (avx512: no tile unit, `tiles_of_bf16`).
// Read once.
Isa isa();

// `wanted`, or 1 after a fork: the parent's OpenMP threads do not exist in the child, and waiting for them would hang.
int safe_threads(int wanted);

}  // namespace kdfast

#if KDFAST_X86
#define KDFAST_PER_ISA(declaration) \
    namespace baseline {            \
    declaration                     \
    }                               \
    namespace avx2 {                \
    declaration                     \
    }                               \
    namespace avx512 {              \
    declaration                     \
    }
#define KDFAST_CALL(function, ...)                             \
    (kdfast::isa() == kdfast::Isa::avx512                      \
         ? kdfast::avx512::function(__VA_ARGS__)               \
         : kdfast::isa() == kdfast::Isa::avx2 ? kdfast::avx2::function(__VA_ARGS__) : kdfast::baseline::function(__VA_ARGS__))
#else
#define KDFAST_PER_ISA(declaration) \
    namespace baseline {            \
    declaration                     \
    }
#define KDFAST_CALL(function, ...) kdfast::baseline::function(__VA_ARGS__)
#endif
