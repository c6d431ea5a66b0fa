// Binds the logits kernels.
#include "cpu/logits.h"

#include <pybind11/stl.h>

#include "binding.h"

namespace py = pybind11;

namespace kdfast {

void bind_logits(py::module_& m) {
    m.attr("parts") = part_names();
    py::class_<LogitsOptions>(m, "LogitsOptions", "Row options in the kernels' terms.")
        .def(py::init([](int kind, float first, float second, float temperature, float soft_scale, float hard_weight,
                         float label_smoothing, float z_loss, float student_softcap, float student_scale,
                         float teacher_softcap, float teacher_scale, bool mix_probs) {
                 return LogitsOptions{static_cast<Kind>(kind), first, second, temperature, soft_scale, hard_weight, label_smoothing,
                                      z_loss, {student_softcap, student_scale}, {teacher_softcap, teacher_scale}, mix_probs};
             }),
             py::arg("kind"), py::arg("first"), py::arg("second"), py::arg("temperature"), py::arg("soft_scale"),
             py::arg("hard_weight"), py::arg("label_smoothing"), py::arg("z_loss"), py::arg("student_softcap"),
             py::arg("student_scale"), py::arg("teacher_softcap"), py::arg("teacher_scale"), py::arg("mix_probs"));
    m.def(
        "logits",
        [](bool forward, int64_t rows, const py::tuple& student, const std::vector<py::tuple>& teachers,
           const std::vector<float>& teacher_weights, const py::tuple& grad, std::uintptr_t labels, std::uintptr_t scale,
           std::uintptr_t loss, std::uintptr_t stats, std::uintptr_t parts, const LogitsOptions& options, int threads) {
            std::vector<Matrix> teacher_matrices;
            for (const py::tuple& t : teachers) teacher_matrices.push_back(matrix(t));
            const LogitsArgs args{rows,
                                  matrix(student),
                                  teacher_matrices,
                                  teacher_weights,
                                  matrix(grad),
                                  pointer<const int64_t>(labels),
                                  pointer<const float>(scale),
                                  pointer<float>(loss),
                                  pointer<double>(stats),
                                  pointer<float>(parts),
                                  options,
                                  safe_threads(threads)};
            py::gil_scoped_release release;
            forward ? KDFAST_CALL(logits_forward, args) : KDFAST_CALL(logits_backward, args);
        },
        "A matrix is (address, row stride, columns, dtype code); kdfast.backends says what each must hold.",
        py::arg("forward"), py::arg("rows"), py::arg("student"), py::arg("teachers"), py::arg("teacher_weights"), py::arg("grad"),
        py::arg("labels"), py::arg("scale"), py::arg("loss"), py::arg("stats"), py::arg("parts"), py::arg("options"),
        py::arg("threads"));
}

}  // namespace kdfast
