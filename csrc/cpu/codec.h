// The hot loops of the record decoder: one row of codes to ids and levels, and levels to log-probabilities.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace kdfast {

// A stream of bits: `readable` bytes of memory start at `data`; `pos` is the next bit.
struct BitCursor {
    const std::uint8_t* data;
    std::uint64_t readable;
    std::uint64_t pos;
};

struct RowCodes {
    unsigned rice, order;
    std::uint32_t base;  // lowest level of the row
    std::int64_t count;
};

struct RowEnd {
    std::int64_t past_last_id;
    bool levels_fit;  // every level is at most kMaxLevel
};

namespace codec {
constexpr std::uint32_t kMaxLevel = 65535;  // largest quantised value
constexpr unsigned kEscape = 20;            // a gap quotient of this and more is written raw
constexpr unsigned kRawBits = 24;           // bits of a raw gap; vocabularies reach 2^24
constexpr unsigned kMaxPrefix = 16;         // longest prefix of a value
}  // namespace codec

// `rows.count` ids and levels from the two streams. Memory outside them is not read; where a stream ends too early, zeros
// are read and `pos` runs past its end, which the caller has to look at.
KDFAST_PER_ISA(RowEnd codec_read_row(BitCursor& id_in, BitCursor& value_in, const RowCodes& row, std::int32_t* ids,
                                     std::uint32_t* levels);
               std::uint32_t codec_read_value(BitCursor& in, unsigned order);
               void codec_logprobs(const std::uint32_t* levels, std::int64_t count, const double* log_table,
                                   std::uint32_t table_size, double scale, float* logprobs);
               std::uint64_t codec_square_sum(const std::uint32_t* levels, std::int64_t count);)

}  // namespace kdfast
