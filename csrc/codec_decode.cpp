// Decoder of the record codec. Every read is bounded by `size`, every write by tokens * k; see docs/cache-format.md.
#include "codec_common.h"

#include <cstring>

namespace kdfast::codec {
namespace {

class BitReader {
  public:
    // `data` holds `bytes` bytes of this stream; `readable` bytes of memory follow `data` in all.
    BitReader(const std::uint8_t* data, std::size_t bytes, std::size_t readable)
        : data_(data), limit_(8 * static_cast<std::uint64_t>(bytes)), readable_(readable) {}

    // At least 57 bits from the current position, zeros beyond the memory's end.
    std::uint64_t window() const {
        const std::uint64_t byte = pos_ >> 3;
        std::uint64_t w = 0;
        if (byte + 8 <= readable_) {
            std::memcpy(&w, data_ + byte, 8);
        } else if (byte < readable_) {
            std::memcpy(&w, data_ + byte, readable_ - byte);
        }
        return w >> (pos_ & 7);
    }
    void skip(unsigned bits) { pos_ += bits; }
    bool overrun() const { return pos_ > limit_; }
    bool at_end() const { return (pos_ + 7) / 8 * 8 == limit_; }

  private:
    const std::uint8_t* data_;
    std::uint64_t pos_ = 0;
    std::uint64_t limit_;
    std::uint64_t readable_;
};

inline unsigned zeros(std::uint64_t w) { return static_cast<unsigned>(__builtin_ctzll(w | (1ull << 63))); }

inline std::uint32_t read_gap(BitReader& in, unsigned rice) {
    const std::uint64_t w = in.window();
    const unsigned n = zeros(w);
    if (__builtin_expect(n >= kEscape, 0)) {
        in.skip(kEscape + kRawBits);
        return static_cast<std::uint32_t>((w >> kEscape) & ((1u << kRawBits) - 1));
    }
    in.skip(n + 1 + rice);
    return (n << rice) + static_cast<std::uint32_t>((w >> (n + 1)) & ((1u << rice) - 1));
}

// A value, or more than kMaxLevel when the prefix is too long.
inline std::uint32_t read_value(BitReader& in, unsigned order) {
    const std::uint64_t w = in.window();
    const unsigned n = zeros(w);
    if (__builtin_expect(n > kMaxPrefix, 0)) return kMaxLevel + 1;
    in.skip(2 * n + 1 + order);
    const auto rest = static_cast<std::uint32_t>((w >> (n + 1)) & ((1ull << (n + order)) - 1));
    return (((1u << n) - 1) << order) + rest;
}

struct Sections {
    const std::uint8_t* heads;
    const std::uint8_t* counts;
    const std::uint8_t* tails;
};

// One row: ids to `ids`, quantised values to `q`.
Status read_row(BitReader& id_in, BitReader& value_in, std::uint8_t head, std::int64_t count, std::int64_t vocab,
                std::int32_t* ids, std::uint32_t* q) {
    const unsigned rice = head & 31, order = head >> 5;
    if (rice > kRawBits) return kBadCode;
    const std::uint32_t base = read_value(value_in, 0);
    if (base > kMaxLevel) return kBadCode;
    std::int64_t next = 0;
    std::uint32_t worst = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        next += read_gap(id_in, rice);
        const std::uint32_t v = read_value(value_in, order);
        // An id beyond the vocabulary only grows from here, so one look at the last is enough; `next` cannot overflow.
        ids[i] = static_cast<std::int32_t>(next);
        ++next;
        worst |= v > kMaxLevel - base;
        q[i] = base + v;
    }
    if (id_in.overrun() || value_in.overrun()) return kTruncated;
    if (next > vocab) return kBadId;
    return worst ? kBadValue : kOk;
}

}  // namespace

Result decode(const Layout& layout, std::int64_t tokens, const std::uint8_t* data, std::size_t size, std::uint32_t id_bytes,
              bool has_counts, std::int32_t* ids, float* logprobs, float* log_z, float* log_tail) {
    const std::size_t n_t = layout.temperatures.size(), per_token = 1 + (has_counts ? 4 : 0) + 2 * n_t;
    if (tokens < 0 || static_cast<std::uint64_t>(tokens) > size / per_token) return {kTruncated, 0};
    const std::size_t fixed = static_cast<std::size_t>(tokens) * per_token;
    if (id_bytes > size - fixed) return {kTruncated, 0};
    const Sections at{data, data + tokens, data + tokens * (has_counts ? 5 : 1)};
    BitReader id_in(data + fixed, id_bytes, size - fixed);
    BitReader value_in(data + fixed + id_bytes, size - fixed - id_bytes, size - fixed - id_bytes);
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
            const Status status = read_row(id_in, value_in, at.heads[t], count, layout.vocab, ids, q.data());
            if (status != kOk) return {status, t};
        }
        const double scale = count ? tails[one].log_rest - levels.log_sum(one, q.data(), count) : 0.0;
        for (std::uint32_t i = 0; i < count; ++i) logprobs[i] = static_cast<float>(2.0 * levels.log_level(q[i]) + scale);
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
    if (!id_in.at_end() || !value_in.at_end()) return {kTrailing, tokens};
    return {};
}

}  // namespace kdfast::codec
