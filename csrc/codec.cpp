// Python bindings of the record codec: addresses as integers, the GIL released, a status instead of an exception.
#include <pybind11/stl.h>

#include "binding.h"
#include "checksum.h"
#include "codec_record.h"

namespace py = pybind11;

namespace kdfast {
namespace {

using codec::Layout;

// k, vocab, temperatures, samples, mixed, column of the temperature that was drawn at
using LayoutArguments = std::tuple<std::int64_t, std::int64_t, std::vector<double>, int, bool, int>;

Layout layout_of(const LayoutArguments& a) {
    const auto& temperatures = std::get<2>(a);
    int one = 0;
    while (one + 1 < static_cast<int>(temperatures.size()) && temperatures[static_cast<std::size_t>(one)] != 1.0) ++one;
    return {std::get<0>(a), std::get<1>(a), static_cast<int>(temperatures.size()), one, temperatures.data(),
            std::get<3>(a), std::get<4>(a), std::get<5>(a)};
}

codec::RowsOut rows_out(const std::vector<std::uintptr_t>& a) {
    return {pointer<std::int32_t>(a.at(0)), pointer<float>(a.at(1)), pointer<float>(a.at(2)), pointer<float>(a.at(3)),
            pointer<float>(a.at(4))};
}

codec::BatchOut batch_out(const codec::RowsOut& rows, const std::vector<std::uintptr_t>& rest, std::int64_t context_room) {
    return {rows,
            pointer<std::int64_t>(rest.at(0)),
            pointer<std::int64_t>(rest.at(1)),
            pointer<std::uint8_t>(rest.at(2)),
            pointer<std::uint8_t>(rest.at(3)),
            pointer<std::int64_t>(rest.at(4)),
            pointer<std::uint8_t>(rest.at(5)),
            context_room};
}

bool has_gaps(const std::int32_t* ids, const float* logprobs, std::int64_t n) {
    bool gap = false;
    for (std::int64_t i = 0; i < n; ++i) gap |= (ids[i] < 0) | !(logprobs[i] >= -3e38f);
    return gap;
}

// Rows on their way to bytes. A row that is refused and does not count becomes an empty one.
class Encoder {
  public:
    Encoder(const Layout& layout, const std::vector<std::uintptr_t>& rows, const codec::EncodeOptions& options)
        : layout_(layout), options_(options), ids_(pointer<const std::int32_t>(rows.at(0))),
          logprobs_(pointer<const float>(rows.at(1))), log_z_(pointer<const float>(rows.at(2))),
          log_tail_(pointer<const float>(rows.at(3))), draws_(pointer<const std::int32_t>(rows.at(4))),
          counted_(pointer<const std::uint8_t>(rows.at(5))), scratch_(codec::scratch_for(layout)),
          row_(codec::row_bytes(static_cast<std::size_t>(layout.k), layout.n_t)),  // a row may claim far more than it takes
          no_ids_(static_cast<std::size_t>(layout.k), -1), zeros_(static_cast<std::size_t>(layout.k + layout.n_t)) {}

    codec::Result run(std::int64_t tokens, float* kl) {
        if (has_gaps(ids_, logprobs_, tokens * layout_.k)) options_.count_width = codec::count_width_for(layout_.k);
        bytes.reserve(static_cast<std::size_t>(tokens) * (3 * static_cast<std::size_t>(layout_.k) + 16));
        for (std::int64_t t = 0; t < tokens; ++t) {
            codec::Status status = add(row_at(t), kl[t]);
            if (status != codec::kOk && counted_ && !counted_[t]) {
                if (!options_.count_width) {  // the rows so far have no counts
                    options_.count_width = codec::count_width_for(layout_.k);
                    bytes.clear();
                    exact = 0;
                    t = -1;
                    continue;
                }
                status = add(empty(), kl[t]);
            }
            if (status != codec::kOk) return {status, t};
        }
        return {};
    }

    bool has_counts() const { return options_.count_width != 0; }
    std::vector<std::uint8_t> bytes;
    std::int64_t exact = 0;  // rows that were stored exactly

  private:
    codec::RowsIn row_at(std::int64_t t) const {
        return {ids_ + t * layout_.k, logprobs_ + t * layout_.k, log_z_ + t * layout_.n_t, log_tail_ + t * layout_.n_t,
                layout_.samples ? draws_ + t * layout_.k : nullptr};
    }
    codec::RowsIn empty() const { return {no_ids_.data(), zeros_.data(), zeros_.data(), zeros_.data(), no_ids_.data()}; }

    codec::Status add(const codec::RowsIn& row, float& kl) {
        std::uint8_t* out = row_.data();
        codec::Coded coded{};
        const codec::Status status = KDFAST_CALL(codec_encode, layout_, row, options_, out, coded, codec::aligned(scratch_));
        if (status != codec::kOk) return status;
        bytes.insert(bytes.end(), row_.data(), out);
        kl = coded.kl;
        exact += coded.exact;
        return status;
    }

    const Layout& layout_;
    codec::EncodeOptions options_;
    const std::int32_t* ids_;
    const float *logprobs_, *log_z_, *log_tail_;
    const std::int32_t* draws_;
    const std::uint8_t* counted_;
    std::vector<std::uint32_t> scratch_;
    std::vector<std::uint8_t> row_;
    std::vector<std::int32_t> no_ids_;
    std::vector<float> zeros_;
};

py::tuple encode(const LayoutArguments& arguments, std::int64_t tokens, const std::vector<std::uintptr_t>& rows, double max_kl,
                 int values_bits, std::uintptr_t kl) {
    const Layout layout = layout_of(arguments);
    Encoder encoder(layout, rows, {max_kl, values_bits, 0});
    codec::Result result;
    {
        const py::gil_scoped_release release;
        result = encoder.run(tokens, pointer<float>(kl));
    }
    const auto& bytes = encoder.bytes;
    const py::bytes data(reinterpret_cast<const char*>(bytes.data()), result.status == codec::kOk ? bytes.size() : 0);
    return py::make_tuple(static_cast<int>(result.status), result.token, data, encoder.has_counts(), encoder.exact);
}

py::tuple decode(const LayoutArguments& arguments, std::int64_t tokens, std::uintptr_t data, std::size_t size, bool has_counts,
                 const std::vector<std::uintptr_t>& rows) {
    const Layout layout = layout_of(arguments);
    codec::Result result;
    {
        const py::gil_scoped_release release;
        auto scratch = codec::scratch_for(layout);
        result = codec::decode_rows(layout, pointer<const std::uint8_t>(data), size,
                                    has_counts ? codec::count_width_for(layout.k) : 0, tokens, rows_out(rows), true, scratch);
    }
    return py::make_tuple(static_cast<int>(result.status), result.token);
}

py::tuple decode_batch(const LayoutArguments& arguments, std::uintptr_t jobs, std::int64_t count, bool next,
                       const std::vector<std::uintptr_t>& rows, const std::vector<std::uintptr_t>& rest,
                       std::int64_t context_room, int threads) {
    const Layout layout = layout_of(arguments);
    codec::BatchResult result;
    {
        const py::gil_scoped_release release;
        result = codec::decode_batch(layout, pointer<const codec::Job>(jobs), count, next, batch_out(rows_out(rows), rest, context_room),
                                     threads);
    }
    return py::make_tuple(static_cast<int>(result.status), result.job, result.token);
}

py::tuple index_batch(const LayoutArguments& arguments, std::uintptr_t jobs, std::int64_t count, bool next,
                      const std::vector<std::uintptr_t>& index, const std::vector<std::uintptr_t>& rest,
                      std::int64_t context_room, int threads) {
    const Layout layout = layout_of(arguments);
    const codec::IndexOut to{pointer<std::uint8_t>(index.at(0)), pointer<std::int64_t>(index.at(1)),
                             pointer<std::int32_t>(index.at(2))};
    codec::BatchResult result;
    {
        const py::gil_scoped_release release;
        result = codec::index_batch(layout, pointer<const codec::Job>(jobs), count, next, batch_out({}, rest, context_room), to,
                                    threads);
    }
    return py::make_tuple(static_cast<int>(result.status), result.job, result.token);
}

void decode_indexed(const LayoutArguments& arguments, std::uintptr_t data, std::size_t size, std::uintptr_t offsets,
                    std::uintptr_t counts, std::int64_t tokens, const std::vector<std::uintptr_t>& rows, int threads) {
    const Layout layout = layout_of(arguments);
    const codec::Indexed in{pointer<const std::uint8_t>(data), size, pointer<const std::int64_t>(offsets),
                            pointer<const std::int32_t>(counts)};
    const py::gil_scoped_release release;
    if (!codec::decode_indexed(layout, in, tokens, rows_out(rows), threads)) throw std::bad_alloc();
}

}  // namespace

void bind_codec(py::module_& m) {
    m.def("codec_encode", &encode, py::arg("layout"), py::arg("tokens"), py::arg("rows"), py::arg("max_kl"),
          py::arg("values_bits"), py::arg("kl"),
          "Rows at the given addresses as (status, token, bytes, has_counts, exact rows); `kl` receives one float32 a token.");
    m.attr("codec_version") = codec::kVersion;
    m.def("codec_decode", &decode, py::arg("layout"), py::arg("tokens"), py::arg("data"), py::arg("size"),
          py::arg("has_counts"), py::arg("rows"), "Writes `tokens` rows to the given addresses and returns (status, token).");
    m.def("codec_decode_batch", &decode_batch, py::arg("layout"), py::arg("jobs"), py::arg("count"), py::arg("next"),
          py::arg("rows"), py::arg("rest"), py::arg("context_room"), py::arg("threads"),
          "Checks and decodes whole records to the buffers of a batch and returns (status, job, token).");
    m.def("codec_index_batch", &index_batch, py::arg("layout"), py::arg("jobs"), py::arg("count"), py::arg("next"),
          py::arg("index"), py::arg("rest"), py::arg("context_room"), py::arg("threads"),
          "Checks whole records, copies their coded rows to a batch with an index of them; returns (status, job, token).");
    m.def("codec_decode_indexed", &decode_indexed, py::arg("layout"), py::arg("data"), py::arg("size"), py::arg("offsets"),
          py::arg("counts"), py::arg("tokens"), py::arg("rows"), py::arg("threads"),
          "Decodes rows that an index finds to the given addresses; 64 bytes behind `size` may be read.");
    m.def("codec_checksum", [](std::uintptr_t data, std::size_t size) {
        const py::gil_scoped_release release;
        return xxh64(pointer<const std::uint8_t>(data), size);
    }, py::arg("data"), py::arg("size"), "XXH64 with seed 0.");
}

}  // namespace kdfast
