// Python bindings of the record codec: addresses as integers, the GIL released, a status instead of an exception.
#include "codec.h"

#include <pybind11/stl.h>

#include <map>
#include <mutex>

#include "binding.h"
#include "codec_common.h"

namespace py = pybind11;

namespace kdfast {
namespace codec {

const double* log_table() {
    static const std::vector<double> table = [] {
        std::vector<double> t(kTable);
        for (std::uint32_t q = 0; q < kTable; ++q) t[q] = std::log(2.0 * q + 1.0);
        return t;
    }();
    return table.data();
}

const double* power_table(double temperature) {
    static std::mutex mutex;
    static std::map<double, std::vector<double>> tables;
    const std::lock_guard<std::mutex> lock(mutex);
    auto& table = tables[temperature];
    if (table.empty()) {
        const double* logs = log_table();
        table.resize(kTable);
        for (std::uint32_t q = 0; q < kTable; ++q) table[q] = std::exp(2.0 * logs[q] / temperature);
    }
    return table.data();
}

}  // namespace codec

namespace {

py::tuple encode(std::int64_t k, std::int64_t vocab, const std::vector<double>& temperatures, std::int64_t tokens,
                 std::uintptr_t ids, std::uintptr_t logprobs, std::uintptr_t log_z, std::uintptr_t log_tail, double max_kl,
                 int values_bits, std::uintptr_t kl) {
    const codec::Layout layout{k, vocab, temperatures};
    codec::Encoded out;
    codec::Result result;
    {
        const py::gil_scoped_release release;
        result = codec::encode(layout, tokens, pointer<const std::int32_t>(ids), pointer<const float>(logprobs),
                               pointer<const float>(log_z), pointer<const float>(log_tail), max_kl, values_bits, out,
                               pointer<float>(kl));
    }
    const auto* bytes = reinterpret_cast<const char*>(out.bytes.data());
    return py::make_tuple(static_cast<int>(result.status), result.token, py::bytes(bytes, out.bytes.size()), out.id_bytes,
                          out.has_counts);
}

py::tuple decode(std::int64_t k, std::int64_t vocab, const std::vector<double>& temperatures, std::int64_t tokens,
                 std::uintptr_t data, std::size_t size, std::uint32_t id_bytes, bool has_counts, std::uintptr_t ids,
                 std::uintptr_t logprobs, std::uintptr_t log_z, std::uintptr_t log_tail) {
    const codec::Layout layout{k, vocab, temperatures};
    codec::Result result;
    {
        const py::gil_scoped_release release;
        result = codec::decode(layout, tokens, pointer<const std::uint8_t>(data), size, id_bytes, has_counts,
                               pointer<std::int32_t>(ids), pointer<float>(logprobs), pointer<float>(log_z),
                               pointer<float>(log_tail));
    }
    return py::make_tuple(static_cast<int>(result.status), result.token);
}

}  // namespace

void bind_codec(py::module_& m) {
    m.def("codec_encode", &encode, py::arg("k"), py::arg("vocab"), py::arg("temperatures"), py::arg("tokens"), py::arg("ids"),
          py::arg("logprobs"), py::arg("log_z"), py::arg("log_tail"), py::arg("max_kl"), py::arg("values_bits"), py::arg("kl"),
          "Rows at the given addresses as (status, token, bytes, id_bytes, has_counts); `kl` receives one float32 a token.");
    m.def("codec_decode", &decode, py::arg("k"), py::arg("vocab"), py::arg("temperatures"), py::arg("tokens"), py::arg("data"),
          py::arg("size"), py::arg("id_bytes"), py::arg("has_counts"), py::arg("ids"), py::arg("logprobs"), py::arg("log_z"),
          py::arg("log_tail"), "Writes `tokens` rows to the given addresses and returns (status, token).");
}

}  // namespace kdfast
