// The one Python module of the extension. Each op binds its own functions in csrc/<op>.cpp.
#include "binding.h"

PYBIND11_MODULE(_C, m) {
    m.doc() = "kdfast C++ kernels: plain pointers, sizes, strides and a thread count; no torch inside.";
    kdfast::bind_runtime(m);
    kdfast::bind_logits(m);
    kdfast::bind_linear(m);
    kdfast::bind_topk(m);
    kdfast::bind_attention(m);
    kdfast::bind_hidden(m);
    kdfast::bind_codec(m);
}
