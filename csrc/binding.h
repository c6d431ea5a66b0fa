// Addresses come from Python as integers: the extension knows nothing of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/matrix.h"

namespace kdfast {

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// A matrix arrives as (address, elements between rows, columns, dtype code).
inline Matrix matrix(const pybind11::tuple& t) {
    return {pointer<void>(t[0].cast<std::uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
            static_cast<Dtype>(t[3].cast<int>())};
}

// The columns of the per-row metrics, by which Python knows an extension that was built from other sources.
inline pybind11::tuple part_names() {
    pybind11::tuple names(kParts);
    for (int i = 0; i < kParts; ++i) names[i] = kPartNames[i];
    return names;
}

void bind_runtime(pybind11::module_& m);
void bind_logits(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_topk(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_hidden(pybind11::module_& m);
void bind_codec(pybind11::module_& m);

}  // namespace kdfast
