// What the encoder and the decoder of the record codec share: constants, tables and the law of reconstruction.
#pragma once

// The Python codec rounds after every operation; where multiply-add is one instruction the compiler must not fuse them.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__FP_FAST_FMA)
#pragma GCC optimize("fp-contract=off")
#endif

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "codec.h"
#include "cpu/codec.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the cache codec reads its streams as little-endian words");

namespace kdfast::codec {

constexpr std::uint16_t kTailNone = 0;      // nothing is left over
constexpr std::uint16_t kTailAll = 65535;   // no entries: everything is left over
constexpr double kTailScale = 1024.0;       // codes per unit of log(tail / (1 - tail))
constexpr int kTailZero = 32768;
constexpr std::uint32_t kTable = 4096;

constexpr double kInf = std::numeric_limits<double>::infinity();

// exp(2 log(2q + 1) / T) for q < kTable, built once per process and temperature (1: log(2q + 1) is at `log_table`).
const double* log_table();
const double* power_table(double temperature);

// log(2q + 1) and its tempered powers. A value q stands for a probability in proportion to (2q + 1)^2.
class Levels {
  public:
    explicit Levels(const std::vector<double>& temperatures) : temperatures_(temperatures), log_(log_table()) {
        for (double t : temperatures) power_.push_back(t == 1.0 ? nullptr : power_table(t));
    }
    double log_level(std::uint32_t q) const { return q < kTable ? log_[q] : std::log(2.0 * q + 1.0); }

    // log of the sum over entries of (2q + 1)^(2/T).
    double log_sum(std::size_t temperature, const std::uint32_t* q, std::int64_t count) const {
        const double t = temperatures_[temperature];
        if (t == 1.0) return std::log(static_cast<double>(KDFAST_CALL(codec_square_sum, q, count)));
        const double* power = power_[temperature];
        double sum = 0;
        for (std::int64_t i = 0; i < count; ++i)
            sum += q[i] < kTable ? power[q[i]] : std::exp(2.0 * std::log(2.0 * q[i] + 1.0) / t);
        return std::log(sum);
    }

  private:
    const std::vector<double>& temperatures_;
    const double* log_;
    std::vector<const double*> power_;
};

// A decoded tail: log of its mass, and log of what it leaves to the entries.
struct Tail {
    double log_tail;
    double log_rest;
};

inline Tail tail_of(std::uint16_t code) {
    if (code == kTailNone) return {-kInf, 0.0};
    if (code == kTailAll) return {0.0, -kInf};
    const double x = (static_cast<int>(code) - kTailZero) / kTailScale;
    const double log_rest = -std::log(1.0 + std::exp(x));
    return {x + log_rest, log_rest};
}

inline std::size_t column_of_one(const std::vector<double>& temperatures) {
    std::size_t c = 0;
    while (c + 1 < temperatures.size() && temperatures[c] != 1.0) ++c;
    return c;
}

}  // namespace kdfast::codec
