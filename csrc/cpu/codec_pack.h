// Numbers to packed bits: what the encoder of rows writes with.
#pragma once

#include "codec_math.h"

namespace kdfast {
namespace KDFAST_ISA {

typedef std::uint8_t* Bytes;

template <typename T>
inline void put(Bytes& out, T value) {
    std::memcpy(out, &value, sizeof(value));
    out += sizeof(value);
}

inline unsigned bit_length(std::uint32_t x) { return x ? 32 - static_cast<unsigned>(__builtin_clz(x)) : 0; }

// Bits to bytes, lowest first; whole words are stored, so that up to 8 bytes behind the last one are touched.
class BitWriter {
  public:
    explicit BitWriter(Bytes& out) : out_(out) {}
    void add(std::uint64_t bits, unsigned width) {  // width <= 56, nothing above it
        word_ |= bits << used_;
        std::memcpy(out_, &word_, sizeof(word_));
        used_ += width;
        out_ += used_ >> 3;
        word_ >>= used_ & ~7u;
        used_ &= 7;
    }
    void close() { out_ += used_ != 0; }

  private:
    Bytes& out_;
    std::uint64_t word_ = 0;
    unsigned used_ = 0;
};

// Numbers of `width` <= 24 bits, lowest bit first, the last byte filled with zeros.
inline void pack(const std::uint32_t* values, std::int64_t count, unsigned width, Bytes& out) {
    const std::uint64_t mask = (1u << width) - 1;
    BitWriter writer(out);
    std::int64_t i = 0;
    for (; width <= 14 && i + 4 <= count; i += 4) {
        const std::uint64_t low = (values[i] & mask) | (values[i + 1] & mask) << width;
        const std::uint64_t high = (values[i + 2] & mask) | (values[i + 3] & mask) << width;
        writer.add(low | high << 2 * width, 4 * width);
    }
    for (; i < count; ++i) writer.add(values[i] & mask, width);
    writer.close();
}

// Of n values below 2^16, how many take more bits than 0 to 15; returns the bits of the longest.
inline unsigned count_lengths(const std::uint32_t* values, std::int64_t n, std::int32_t* longer_than) {
    std::uint32_t all = 0;
    for (int w = 0; w < 16; w += W) {
        const ivec largest = ((ivec{} + 1) << (lane_numbers() + w)) - 1;  // of w bits
        ivec counts = {};
        for (std::int64_t i = 0; i < n; ++i) counts = plus_greater(counts, ivec{} + static_cast<int>(values[i]), largest);
        store_words(longer_than + w, counts);
    }
    for (std::int64_t i = 0; i < n; ++i) all |= values[i];
    return bit_length(all);
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
