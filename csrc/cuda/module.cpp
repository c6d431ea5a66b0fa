// The Python module of the CUDA kernels. It needs no CUDA at run time to be imported: the runtime is inside, the driver is
// looked for at the first call.
#include "binding.h"
#include "cuda/logits.h"
#include "cuda/plan.h"

namespace py = pybind11;

namespace kdfast {
namespace cluster {
namespace {

int blocks_for_row(int common, int student_dtype, int teacher_dtype) {
    const auto student = static_cast<Dtype>(student_dtype), teacher = static_cast<Dtype>(teacher_dtype);
    return takes(student, teacher) ? blocks_for(common, int(bytes_of(student) + bytes_of(teacher))) : 0;
}

bool forward(
    int64_t rows, const py::tuple& student, const py::tuple& teacher, const py::tuple& grad, std::uintptr_t labels,
    std::uintptr_t scale, std::uintptr_t loss, std::uintptr_t stats, std::uintptr_t parts, float temperature, float soft_scale,
    float hard_weight, float z_loss, int blocks, int device, std::uintptr_t stream
) {
    const LogitsArgs args{rows,
                          matrix(student),
                          matrix(teacher),
                          matrix(grad),
                          pointer<const int64_t>(labels),
                          pointer<const float>(scale),
                          pointer<float>(loss),
                          pointer<double>(stats),
                          pointer<float>(parts),
                          temperature,
                          soft_scale,
                          hard_weight,
                          z_loss};
    return logits_forward(args, blocks, device, pointer<void>(stream));
}

}  // namespace
}  // namespace cluster
}  // namespace kdfast

PYBIND11_MODULE(_cuda, m) {
    using namespace kdfast::cluster;
    m.doc() = "kdfast CUDA kernels: plain device pointers, sizes, strides and a stream handle; no torch inside.";
    m.attr("parts") = kdfast::part_names();
    m.def("driver_version", &driver_version, "CUDA of the driver, 1000 * major + 10 * minor; 0 where there is no driver.");
    m.def("build_version", &build_version, "CUDA this was built with, 1000 * major + 10 * minor.");
    m.def("blocks_for", &blocks_for_row, "Blocks of the cluster that holds a row in shared memory; 0 when none does.",
          py::arg("common"), py::arg("student_dtype"), py::arg("teacher_dtype"));
    m.def("logits", &forward,
          "A matrix is (address, row stride, columns, dtype code); kdfast.backends says what each must hold. False where the "
          "device has no room for the cluster.",
          py::arg("rows"), py::arg("student"), py::arg("teacher"), py::arg("grad"), py::arg("labels"), py::arg("scale"),
          py::arg("loss"), py::arg("stats"), py::arg("parts"), py::arg("temperature"), py::arg("soft_scale"),
          py::arg("hard_weight"), py::arg("z_loss"), py::arg("blocks"), py::arg("device"), py::arg("stream"));
}
