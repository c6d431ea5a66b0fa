// Decoder of the record codec. Every read is bounded by `size`, every write by tokens * k; see docs/cache-format.md.
#include "codec_common.h"

#include <cstring>

namespace kdfast::codec {
namespace {

struct Sections {
    const std::uint8_t* heads;
    const std::uint8_t* counts;
    const std::uint8_t* tails;
};

bool overrun(const BitCursor& in, std::uint64_t bytes) { return in.pos > 8 * bytes; }
bool at_end(const BitCursor& in, std::uint64_t bytes) { return (in.pos + 7) / 8 == bytes; }

}  // namespace

Result decode(const Layout& layout, std::int64_t tokens, const std::uint8_t* data, std::size_t size, std::uint32_t id_bytes,
              bool has_counts, std::int32_t* ids, float* logprobs, float* log_z, float* log_tail) {
    const std::size_t n_t = layout.temperatures.size(), per_token = 1 + (has_counts ? 4 : 0) + 2 * n_t;
    if (tokens < 0 || static_cast<std::uint64_t>(tokens) > size / per_token) return {kTruncated, 0};
    const std::size_t fixed = static_cast<std::size_t>(tokens) * per_token;
    if (id_bytes > size - fixed) return {kTruncated, 0};
    const Sections at{data, data + tokens, data + tokens * (has_counts ? 5 : 1)};
    const std::uint64_t value_bytes = size - fixed - id_bytes;
    BitCursor id_in{data + fixed, size - fixed, 0}, value_in{data + fixed + id_bytes, value_bytes, 0};
    const Levels levels(layout.temperatures);
    const std::size_t one = column_of_one(layout.temperatures);
    std::vector<std::uint32_t> q(static_cast<std::size_t>(layout.k));
    std::vector<Tail> tails(n_t);

    for (std::int64_t t = 0; t < tokens; ++t, ids += layout.k, logprobs += layout.k, log_z += n_t, log_tail += n_t) {
        std::uint32_t count = static_cast<std::uint32_t>(layout.k);
        if (has_counts) std::memcpy(&count, at.counts + 4 * t, 4);
        if (count > layout.k) return {kBadCount, t};
        for (std::size_t j = 0; j < n_t; ++j) {
            std::uint16_t code;
            std::memcpy(&code, at.tails + 2 * (t * n_t + j), 2);
            if ((code == kTailAll) != (count == 0)) return {kBadTail, t};
            tails[j] = tail_of(code);
        }
        if (count) {
            const unsigned head = at.heads[t];
            const RowCodes row{head & 31, head >> 5, KDFAST_CALL(codec_read_value, value_in, 0), count};
            if (row.rice > kRawBits || row.base > kMaxLevel) return {kBadCode, t};
            const RowEnd end = KDFAST_CALL(codec_read_row, id_in, value_in, row, ids, q.data());
            if (overrun(id_in, id_bytes) || overrun(value_in, value_bytes)) return {kTruncated, t};
            if (end.past_last_id > layout.vocab) return {kBadId, t};
            if (!end.levels_fit) return {kBadValue, t};
        }
        const double scale = count ? tails[one].log_rest - levels.log_sum(one, q.data(), count) : 0.0;
        KDFAST_CALL(codec_logprobs, q.data(), count, log_table(), kTable, scale, logprobs);
        for (std::int64_t i = count; i < layout.k; ++i) {
            ids[i] = -1;
            logprobs[i] = -std::numeric_limits<float>::infinity();
        }
        for (std::size_t j = 0; j < n_t; ++j) {
            log_tail[j] = static_cast<float>(tails[j].log_tail);
            const double temperature = layout.temperatures[j];
            log_z[j] = j == one || !count ? 0.0f
                                          : static_cast<float>(levels.log_sum(j, q.data(), count) + scale / temperature -
                                                               tails[j].log_rest);
        }
    }
    if (!at_end(id_in, id_bytes) || !at_end(value_in, value_bytes)) return {kTrailing, tokens};
    return {};
}

}  // namespace kdfast::codec
