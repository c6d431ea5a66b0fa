// Binds the kernels of hidden states.
#include "cpu/hidden.h"

#include "binding.h"

namespace py = pybind11;

namespace kdfast {

void bind_hidden(py::module_& m) {
    m.def(
        "hidden",
        [](bool cosine, int64_t rows, const py::tuple& student, const py::tuple& teacher, const py::tuple& grad,
           std::uintptr_t bias, std::uintptr_t scale, std::uintptr_t loss, int threads) {
            const HiddenArgs args{rows,
                                  matrix(student),
                                  matrix(teacher),
                                  matrix(grad),
                                  pointer<const float>(bias),
                                  pointer<const float>(scale),
                                  pointer<float>(loss),
                                  safe_threads(threads)};
            py::gil_scoped_release release;
            cosine ? KDFAST_CALL(hidden_cosine, args) : KDFAST_CALL(hidden_mse, args);
        },
        py::arg("cosine"), py::arg("rows"), py::arg("student"), py::arg("teacher"), py::arg("grad"), py::arg("bias"),
        py::arg("scale"), py::arg("loss"), py::arg("threads"));
}

}  // namespace kdfast
