// The one Python module of the extension. Each op binds its own functions.
#include <pybind11/pybind11.h>

#include "cpu/runtime.h"

namespace kdfast {
void bind_logits(pybind11::module_& m);
}  // namespace kdfast

PYBIND11_MODULE(_C, m) {
    m.doc() = "kdfast C++ kernels: plain pointers, sizes, strides and a thread count; no torch inside.";
    kdfast::bind_runtime(m);
    kdfast::bind_logits(m);
}
