// A code ends where the next begins, so decoding waits for each in turn. Several codes out of one 57-bit window keep the
// memory out of that chain, and the two streams, taken in step, fill each other's gaps.
#include "codec.h"

#include <cmath>
#include <cstring>

namespace kdfast {
namespace KDFAST_ISA {
namespace {

using codec::kEscape;
using codec::kMaxLevel;
using codec::kMaxPrefix;
using codec::kRawBits;

constexpr unsigned kWindow = 57;  // bits a window is sure to hold
constexpr int kGroup = 2;         // codes taken from one window

inline unsigned zeros(std::uint64_t w) { return static_cast<unsigned>(__builtin_ctzll(w)); }

inline std::uint64_t near_window(const BitCursor& in, std::uint64_t pos) {
    std::uint64_t w = 0;
    const std::uint64_t byte = pos >> 3;
    if (byte < in.readable) std::memcpy(&w, in.data + byte, in.readable - byte < 8 ? in.readable - byte : 8);
    return w >> (pos & 7);
}

inline std::uint64_t inner_window(const std::uint8_t* data, std::uint64_t pos) {
    std::uint64_t w;
    std::memcpy(&w, data + (pos >> 3), 8);
    return w >> (pos & 7);
}

std::uint32_t read_gap(const BitCursor& in, std::uint64_t& pos, unsigned rice) {
    const std::uint64_t w = near_window(in, pos);
    const unsigned n = zeros(w | (1ull << kEscape));
    if (n == kEscape) {
        pos += kEscape + kRawBits;
        return static_cast<std::uint32_t>((w >> kEscape) & ((1u << kRawBits) - 1));
    }
    pos += n + 1 + rice;
    return (n << rice) + static_cast<std::uint32_t>((w >> (n + 1)) & ((1u << rice) - 1));
}

std::uint32_t read_value(const BitCursor& in, std::uint64_t& pos, unsigned order) {
    const std::uint64_t w = near_window(in, pos);
    const unsigned n = zeros(w | (1ull << (kMaxPrefix + 1)));
    if (n > kMaxPrefix) return kMaxLevel + 1;
    pos += 2 * n + 1 + order;
    return (((1u << n) - 1) << order) + static_cast<std::uint32_t>((w >> (n + 1)) & ((1u << (n + order)) - 1));
}

// In the groups below a bit on top of the window keeps every prefix below 64; shifts are taken modulo 64, so that a window
// that runs dry gives nonsense, not undefined behaviour, and is refused afterwards. With `slack` added, a prefix that is too
// long for its code sets bit 5 or 6.
constexpr std::uint64_t kTop = 1ull << 63;
constexpr unsigned kLong = 32 | 64;

// kGroup gaps from one window; false (and `pos` as it was) when one is escaped or they do not all fit.
inline bool group_of_gaps(const std::uint8_t* data, std::uint64_t& pos, unsigned rice, std::uint32_t* gaps) {
    constexpr unsigned slack = 32 - kEscape;
    std::uint64_t w = inner_window(data, pos) | kTop;
    unsigned used = kGroup * (rice + 1), length = 0;
    const std::uint32_t mask = (1u << rice) - 1;
    for (int j = 0; j < kGroup; ++j) {
        const unsigned n = zeros(w);
        gaps[j] = (n << rice) + (static_cast<std::uint32_t>(w >> n >> 1) & mask);
        w >>= (n + 1 + rice) & 63;
        w |= kTop;
        length |= n + slack;
        used += n;
    }
    if ((length & kLong) || used > kWindow) return false;
    pos += used;
    return true;
}

// kGroup values, each with 2^order on top, from one window; false (and `pos` as it was) when one is wrong or they do not
// all fit.
inline bool group_of_values(const std::uint8_t* data, std::uint64_t& pos, unsigned order, std::uint32_t* values) {
    constexpr unsigned slack = 31 - kMaxPrefix;
    std::uint64_t w = inner_window(data, pos) | kTop;
    unsigned used = kGroup * (order + 1), length = 0;
    for (int j = 0; j < kGroup; ++j) {
        const unsigned n = zeros(w);
        const std::uint64_t top = 1ull << ((n + order) & 63);
        values[j] = static_cast<std::uint32_t>((w >> n >> 1 & (top - 1)) + top);
        w >>= (2 * n + 1 + order) & 63;
        w |= kTop;
        length |= n + slack;
        used += 2 * n;
    }
    if ((length & kLong) || used > kWindow) return false;
    pos += used;
    return true;
}

}  // namespace

std::uint32_t codec_read_value(BitCursor& in, unsigned order) { return read_value(in, in.pos, order); }

RowEnd codec_read_row(BitCursor& id_in, BitCursor& value_in, const RowCodes& row, std::int32_t* ids, std::uint32_t* levels) {
    const unsigned rice = row.rice, order = row.order;
    const std::uint32_t top = 1u << order;
    auto* gaps = reinterpret_cast<std::uint32_t*>(ids);  // the signed type of the same size may alias
    std::uint64_t id_pos = id_in.pos, value_pos = value_in.pos;
    std::int64_t i = 0;
    for (; i + kGroup <= row.count; i += kGroup) {
        const bool inner = (id_pos >> 3) + 8 <= id_in.readable && (value_pos >> 3) + 8 <= value_in.readable;
        if (!inner || !group_of_gaps(id_in.data, id_pos, rice, gaps + i))
            for (int j = 0; j < kGroup; ++j) gaps[i + j] = read_gap(id_in, id_pos, rice);
        if (!inner || !group_of_values(value_in.data, value_pos, order, levels + i))
            for (int j = 0; j < kGroup; ++j) levels[i + j] = read_value(value_in, value_pos, order) + top;
    }
    for (; i < row.count; ++i) {
        gaps[i] = read_gap(id_in, id_pos, rice);
        levels[i] = read_value(value_in, value_pos, order) + top;
    }
    id_in.pos = id_pos;
    value_in.pos = value_pos;

    std::uint32_t worst = 0;
    for (i = 0; i < row.count; ++i) {
        worst = levels[i] > worst ? levels[i] : worst;
        levels[i] += row.base - top;
    }
    std::int64_t next = 0;
    for (i = 0; i < row.count; ++i) {
        next += gaps[i];
        ids[i] = static_cast<std::int32_t>(next);
        ++next;
    }
    return {next, row.count == 0 || worst - top <= kMaxLevel - row.base};
}

void codec_logprobs(const std::uint32_t* levels, std::int64_t count, const double* log_table, std::uint32_t table_size,
                    double scale, float* logprobs) {
    std::uint32_t top = 0;
    for (std::int64_t i = 0; i < count; ++i) top = levels[i] > top ? levels[i] : top;
    if (top < table_size) {
        for (std::int64_t i = 0; i < count; ++i) logprobs[i] = static_cast<float>(2.0 * log_table[levels[i]] + scale);
        return;
    }
    for (std::int64_t i = 0; i < count; ++i) {
        const double log_level = levels[i] < table_size ? log_table[levels[i]] : std::log(2.0 * levels[i] + 1.0);
        logprobs[i] = static_cast<float>(2.0 * log_level + scale);
    }
}

std::uint64_t codec_square_sum(const std::uint32_t* levels, std::int64_t count) {
    std::uint64_t sum = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        const std::uint64_t odd = 2ull * levels[i] + 1;
        sum += odd * odd;
    }
    return sum;
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
