// Binds the top-k kernels.
#include "cpu/topk.h"

#include <pybind11/stl.h>

#include "binding.h"

namespace py = pybind11;

namespace kdfast {

void bind_topk(py::module_& m) {
    m.def(
        "topk_capture",
        [](int64_t rows, const py::tuple& logits, float softcap, float scale, int64_t k, std::uintptr_t temperatures,
           int64_t n_temperatures, std::uintptr_t draws, int64_t n_draws, double sample_temperature, std::uintptr_t ids,
           std::uintptr_t logprobs, std::uintptr_t log_z, std::uintptr_t log_tail, std::uintptr_t weights, int threads) {
            const CaptureArgs args{rows,
                                   matrix(logits),
                                   {softcap, scale},
                                   k,
                                   pointer<const double>(temperatures),
                                   n_temperatures,
                                   pointer<const double>(draws),
                                   n_draws,
                                   sample_temperature,
                                   pointer<int32_t>(ids),
                                   pointer<float>(logprobs),
                                   pointer<float>(log_z),
                                   pointer<float>(log_tail),
                                   pointer<float>(weights),
                                   safe_threads(threads)};
            py::gil_scoped_release release;
            KDFAST_CALL(topk_capture, args);
        },
        py::arg("rows"), py::arg("logits"), py::arg("softcap"), py::arg("scale"), py::arg("k"), py::arg("temperatures"),
        py::arg("n_temperatures"), py::arg("draws"), py::arg("n_draws"), py::arg("sample_temperature"), py::arg("ids"),
        py::arg("logprobs"), py::arg("log_z"), py::arg("log_tail"), py::arg("weights"), py::arg("threads"));
    m.def(
        "topk",
        [](bool forward, int64_t rows, const py::tuple& student, const py::tuple& grad, std::uintptr_t ids,
           std::uintptr_t log_p, std::uintptr_t log_tail, std::uintptr_t mass, int64_t k, int64_t vocab, bool spread,
           const std::vector<float>& weights, std::uintptr_t labels, std::uintptr_t scale, std::uintptr_t loss,
           std::uintptr_t stats, std::uintptr_t parts, const LogitsOptions& options, int threads) {
            const TopKArgs args{rows,
                                matrix(student),
                                matrix(grad),
                                pointer<const int32_t>(ids),
                                pointer<const float>(log_p),
                                pointer<const float>(log_tail),
                                pointer<const float>(mass),
                                k,
                                vocab,
                                spread,
                                weights,
                                pointer<const int64_t>(labels),
                                pointer<const float>(scale),
                                pointer<float>(loss),
                                pointer<double>(stats),
                                pointer<float>(parts),
                                options,
                                safe_threads(threads)};
            py::gil_scoped_release release;
            forward ? KDFAST_CALL(topk_forward, args) : KDFAST_CALL(topk_backward, args);
        },
        py::arg("forward"), py::arg("rows"), py::arg("student"), py::arg("grad"), py::arg("ids"), py::arg("log_p"),
        py::arg("log_tail"), py::arg("mass"), py::arg("k"), py::arg("vocab"), py::arg("spread"), py::arg("weights"),
        py::arg("labels"), py::arg("scale"), py::arg("loss"), py::arg("stats"), py::arg("parts"), py::arg("options"),
        py::arg("threads"));
}

}  // namespace kdfast
