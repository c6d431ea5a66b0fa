// Binds the logits kernels.
#include "cpu/logits.h"

#include "binding.h"

namespace py = pybind11;

namespace kdfast {

void bind_logits(py::module_& m) {
    m.def(
        "logits",
        [](bool forward, int64_t rows, const py::tuple& student, const py::tuple& teacher, const py::tuple& grad,
           std::uintptr_t labels, std::uintptr_t scale, std::uintptr_t loss, std::uintptr_t stats, std::uintptr_t parts,
           float temperature, float soft_scale, float hard_weight, int threads) {
            const LogitsArgs args{rows,
                                  matrix(student),
                                  matrix(teacher),
                                  matrix(grad),
                                  pointer<const int64_t>(labels),
                                  pointer<const float>(scale),
                                  pointer<float>(loss),
                                  pointer<double>(stats),
                                  pointer<float>(parts),
                                  {temperature, soft_scale, hard_weight},
                                  safe_threads(threads)};
            py::gil_scoped_release release;
            forward ? KDFAST_CALL(logits_forward, args) : KDFAST_CALL(logits_backward, args);
        },
        "A matrix is (address, row stride, columns, dtype code); kdfast.backends says what each must hold.",
        py::arg("forward"), py::arg("rows"), py::arg("student"), py::arg("teacher"), py::arg("grad"), py::arg("labels"),
        py::arg("scale"), py::arg("loss"), py::arg("stats"), py::arg("parts"), py::arg("temperature"),
        py::arg("soft_scale"), py::arg("hard_weight"), py::arg("threads"));
}

}  // namespace kdfast
