// Where the rows of a record lie: a walk over their sections that decodes none of them.
#include <algorithm>
#include <cstring>

#include "codec_record.h"

namespace kdfast::codec {
namespace {

class Walk {
  public:
    Walk(const Layout& layout, const std::uint8_t* data, std::size_t size) : layout_(layout), data_(data), size_(size) {}

    // Past one row; `at` and `count` are where it begins behind its count, and its count.
    Status row(unsigned count_width, std::size_t& at, std::int64_t& count) {
        count = layout_.k;
        if (count_width) {
            if (lacks(count_width)) return kTruncated;
            std::uint32_t stored = 0;
            std::memcpy(&stored, data_ + pos_, count_width);
            if (stored > layout_.k) return kBadCount;
            count = stored;
            pos_ += count_width;
        }
        at = pos_;
        bool exact = false;
        Status status = tails(count == 0, exact);
        if (status != kOk || !count) return status;
        const std::size_t bytes = id_bytes(count);
        if (lacks(bytes)) return kTruncated;
        pos_ += bytes;
        if ((status = exact ? values(count) : blocks(count)) != kOk) return status;
        return layout_.samples ? blocks(count) : kOk;
    }

    std::size_t pos() const { return pos_; }

  private:
    bool lacks(std::size_t bytes) const { return bytes > size_ - pos_; }

    Status tails(bool empty, bool& exact) {
        if (lacks(2 * static_cast<std::size_t>(layout_.n_t))) return kTruncated;
        int all = 0;
        for (int j = 0; j < layout_.n_t; ++j, pos_ += 2) {
            std::uint16_t code;
            std::memcpy(&code, data_ + pos_, 2);
            all += code == kTailAll;
        }
        exact = all && !empty;
        return all == layout_.n_t || (!all && !empty) ? kOk : kBadTail;
    }

    Status values(std::int64_t count) {
        const std::size_t bytes = exact_bytes(static_cast<std::size_t>(count), layout_.n_t);
        if (lacks(bytes)) return kTruncated;
        pos_ += bytes;
        return kOk;
    }

    std::size_t id_bytes(std::int64_t count) {
        if (count != last_count_) {  // most rows have as many as the one before, and a division takes its time
            const unsigned l = low_width(layout_.vocab, count);
            last_count_ = count;
            id_bytes_ = packed_bytes(static_cast<std::size_t>(count), l) +
                        packed_bytes(static_cast<std::size_t>(count + ((layout_.vocab - 1) >> l)), 1);
        }
        return id_bytes_;
    }

    Status blocks(std::int64_t count) {
        for (std::int64_t i = 0; i < count; i += kBlock) {
            if (lacks(2)) return kTruncated;
            std::uint16_t head;
            std::memcpy(&head, data_ + pos_, 2);
            const unsigned width = head & 31, more = head >> 5 & 31, patches = head >> 10;
            if (width + more > 16 || !patches != !more) return kBadCode;
            const auto n = static_cast<std::size_t>(std::min<std::int64_t>(kBlock, count - i));
            const std::size_t bytes = 2 + packed_bytes(n, width) + packed_bytes(patches, more + kPlaceBits);
            if (lacks(bytes)) return kTruncated;
            pos_ += bytes;
        }
        return kOk;
    }

    const Layout& layout_;
    const std::uint8_t* data_;
    std::size_t size_, pos_ = 0, id_bytes_ = 0;
    std::int64_t last_count_ = 0;
};

}  // namespace

Result index_rows(const Layout& layout, const std::uint8_t* data, std::size_t size, unsigned count_width, std::int64_t tokens,
                  bool whole, std::int64_t at, std::int64_t* offsets, std::int32_t* counts, std::size_t& used) {
    Walk walk(layout, data, size);
    for (std::int64_t t = 0; t < tokens; ++t) {
        std::size_t begin = 0;
        std::int64_t count = 0;
        const Status status = walk.row(count_width, begin, count);
        if (status != kOk) return {status, t};
        offsets[t] = at + static_cast<std::int64_t>(begin);
        counts[t] = static_cast<std::int32_t>(count);
    }
    used = walk.pos();
    if (whole && used != size) return {kTrailing, tokens};
    return {};
}

}  // namespace kdfast::codec
