// Binds the top-k kernels.
#include "cpu/topk.h"

#include "binding.h"

namespace py = pybind11;

namespace kdfast {

void bind_topk(py::module_& m) {
    m.def(
        "topk_capture",
        [](int64_t rows, const py::tuple& logits, int64_t k, std::uintptr_t temperatures, int64_t n_temperatures,
           std::uintptr_t ids, std::uintptr_t logprobs, std::uintptr_t log_z, std::uintptr_t log_tail, int threads) {
            const CaptureArgs args{rows,
                                   matrix(logits),
                                   k,
                                   pointer<const double>(temperatures),
                                   n_temperatures,
                                   pointer<int32_t>(ids),
                                   pointer<float>(logprobs),
                                   pointer<float>(log_z),
                                   pointer<float>(log_tail),
                                   safe_threads(threads)};
            py::gil_scoped_release release;
            KDFAST_CALL(topk_capture, args);
        },
        py::arg("rows"), py::arg("logits"), py::arg("k"), py::arg("temperatures"), py::arg("n_temperatures"),
        py::arg("ids"), py::arg("logprobs"), py::arg("log_z"), py::arg("log_tail"), py::arg("threads"));
    m.def(
        "topk",
        [](bool forward, int64_t rows, const py::tuple& student, const py::tuple& grad, std::uintptr_t ids,
           std::uintptr_t logprobs, std::uintptr_t log_z, std::uintptr_t log_tail, int64_t k, int64_t vocab,
           std::uintptr_t labels, std::uintptr_t scale, std::uintptr_t loss, std::uintptr_t stats, std::uintptr_t parts,
           float temperature, float soft_scale, float hard_weight, int threads) {
            const TopKArgs args{rows,
                                matrix(student),
                                matrix(grad),
                                pointer<const int32_t>(ids),
                                pointer<const float>(logprobs),
                                pointer<const float>(log_z),
                                pointer<const float>(log_tail),
                                k,
                                vocab,
                                pointer<const int64_t>(labels),
                                pointer<const float>(scale),
                                pointer<float>(loss),
                                pointer<double>(stats),
                                pointer<float>(parts),
                                {temperature, soft_scale, hard_weight},
                                safe_threads(threads)};
            py::gil_scoped_release release;
            forward ? KDFAST_CALL(topk_forward, args) : KDFAST_CALL(topk_backward, args);
        },
        py::arg("forward"), py::arg("rows"), py::arg("student"), py::arg("grad"), py::arg("ids"), py::arg("logprobs"),
        py::arg("log_z"), py::arg("log_tail"), py::arg("k"), py::arg("vocab"), py::arg("labels"), py::arg("scale"),
        py::arg("loss"), py::arg("stats"), py::arg("parts"), py::arg("temperature"), py::arg("soft_scale"),
        py::arg("hard_weight"), py::arg("threads"));
}

}  // namespace kdfast
