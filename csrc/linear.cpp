// Binds the products of linear heads.
#include "cpu/linear.h"

#include "binding.h"

namespace py = pybind11;

namespace kdfast {
namespace {

// An operand arrives as (address, elements between rows, elements between columns, dtype code).
Operand operand(const py::tuple& t) {
    return {pointer<const void>(t[0].cast<std::uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
            static_cast<Dtype>(t[3].cast<int>())};
}

}  // namespace

void bind_linear(py::module_& m) {
    m.def(
        "matmul",
        [](int64_t rows, int64_t columns, int64_t depth, const py::tuple& a, const py::tuple& b, std::uintptr_t out,
           int64_t out_row, std::uintptr_t bias, bool add, int threads) {
            const MatmulArgs args{rows, columns, depth, operand(a), operand(b), pointer<float>(out), out_row,
                                  pointer<const float>(bias), add, safe_threads(threads)};
            py::gil_scoped_release release;
            KDFAST_CALL(matmul, args);
        },
        "out = a b + bias, or out += a b, in float32. An operand is (address, row stride, column stride, dtype code).",
        py::arg("rows"), py::arg("columns"), py::arg("depth"), py::arg("a"), py::arg("b"), py::arg("out"), py::arg("out_row"),
        py::arg("bias"), py::arg("add"), py::arg("threads"));
    m.def("pairs_of_bf16", &pairs_of_bf16, "Whether bfloat16 products run at twice the rate of float32.");
    m.def("tiles_of_bf16", &tiles_of_bf16, "Whether bfloat16 products run on the processor's tile unit.");
}

}  // namespace kdfast
