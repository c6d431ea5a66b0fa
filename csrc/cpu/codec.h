// The record codec of the teacher cache, row by row: docs/cache-format.md is the specification, and
// kdfast/cache/codec_python.py is the same in plain Python.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace kdfast {
namespace codec {

enum Status : int {
    kOk = 0,
    kTruncated = 1,    // a section ends before its last code
    kBadCode = 2,      // a code no writer produces
    kBadId = 3,        // ids that do not rise, or one outside the vocabulary
    kBadCount = 4,     // more entries than k
    kBadTail = 5,      // a tail code that contradicts the number of entries
    kTrailing = 6,     // bytes after the last code
    kBadDraws = 7,     // draws that contradict the kind of the cache
    kBadHeader = 8,    // record: flags or widths no writer produces, or another length than the index says
    kBadChecksum = 9,  // record: not the bytes that were written
    kNoMemory = 10,    // there is no memory to work in
    kInputId = 16,     // encode: an id outside [-1, V)
    kInputTwice = 17,  // encode: an id listed twice
    kInputValue = 18,  // encode: NaN, or a log-probability above 0
    kInputMass = 19,   // encode: entries and tail do not sum to 1
    kInputDraws = 20,  // encode: draws that contradict the kind of the cache
    kMore = 32,        // the rest has to be put where kSlack bytes may be read after it
};

// A status and the token it belongs to.
struct Result {
    Status status = kOk;
    std::int64_t token = 0;
};

// What is the same for every record of a cache. The temperature 1 is at column `one`.
struct Layout {
    std::int64_t k;
    std::int64_t vocab;
    int n_t;
    int one;
    const double* temperatures;
    int samples;        // draws a row; 0: every entry is exact
    bool mixed;         // some entries are exact beside the draws
    int sample_column;  // temperature the draws were made at
};

// Rows [tokens, k] and [tokens, n_t]; weights only where the layout has samples.
struct RowsOut {
    std::int32_t* ids;
    float* logprobs;
    float* log_z;
    float* log_tail;
    float* weights;
};
struct RowsIn {
    const std::int32_t* ids;
    const float* logprobs;
    const float* log_z;
    const float* log_tail;
    const std::int32_t* draws;  // 0 for an exact entry; only where the layout has samples
};

// Rows somewhere in `data`: where each begins behind its count, and its count. Behind `size` kSlack bytes may be read.
struct Indexed {
    const std::uint8_t* data;
    std::size_t size;
    const std::int64_t* offsets;
    const std::int32_t* counts;
};

struct Cursor {
    const std::uint8_t* data;
    std::size_t size;
    std::size_t pos;
    bool slack;  // kSlack bytes after `size` may be read
};

// What became of a row: its KL(exact || decoded), the worst over the temperatures, and whether it was stored exactly.
struct Coded {
    float kl;
    bool exact;
};

struct EncodeOptions {
    double max_kl;    // of every row
    int values_bits;  // in its place; 0: none
    unsigned count_width;
};

constexpr int kVersion = 2;  // of the format; older ones are read too
constexpr std::uint32_t kMaxLevel = 65535;
constexpr int kBlock = 64;              // entries that share a width
constexpr int kPlaceBits = 6;           // bits of a place in a block
constexpr unsigned kMaxPatches = 63;
constexpr unsigned kTailNone = 0;       // nothing is left over
constexpr unsigned kTailAll = 65535;    // no entries: everything is left over; with entries: the row is exact
constexpr int kTailLeast = -96;         // log2 of the smallest odds of a tail
constexpr int kTailMantissa = 9;
constexpr std::size_t kSlack = 64;

// Bytes of `count` packed numbers of `width` bits, and how many low bits of an id are packed where a row has `count` of them.
// Static: the linker must not give one instruction set's to the others.
static inline std::size_t packed_bytes(std::size_t count, unsigned width) { return (count * width + 7) / 8; }
// Bytes of the values of an exact row: log-probabilities, log_z and log_tail.
static inline std::size_t exact_bytes(std::size_t count, int n_t) { return 4 * (count + 2 * static_cast<std::size_t>(n_t)); }
static inline unsigned low_width(std::int64_t vocab, std::int64_t count) {
    return 31 - static_cast<unsigned>(__builtin_clz(static_cast<unsigned>(vocab / count)));
}

// Bytes a row of n entries can claim without being refused, and 32-bit words of scratch a call needs (aligned to 64 bytes).
constexpr std::size_t row_bytes(std::size_t n, int n_t) { return 4 + 10 * static_cast<std::size_t>(n_t) + 12 * n + 512; }
constexpr std::size_t scratch_words(std::size_t k, int n_t) { return (16 + 3 * static_cast<std::size_t>(n_t)) * (k + 128); }

}  // namespace codec

// Decodes `tokens` rows from the cursor. Nothing outside data and rows is touched, whatever the bytes are.
// The same for rows that an index finds; a row that the other would refuse is NaN, with ids 0.
// Encodes one row to `out` and moves it on.
KDFAST_PER_ISA(codec::Result codec_decode(const codec::Layout& layout, codec::Cursor& in, unsigned count_width,
                                          std::int64_t tokens, const codec::RowsOut& out, std::uint32_t* scratch);
               void codec_decode_indexed(const codec::Layout& layout, const codec::Indexed& in, std::int64_t tokens,
                                         const codec::RowsOut& out, std::uint32_t* scratch);
               codec::Status codec_encode(const codec::Layout& layout, const codec::RowsIn& row,
                                          const codec::EncodeOptions& options, std::uint8_t*& out, codec::Coded& coded,
                                          std::uint32_t* scratch);)

}  // namespace kdfast
