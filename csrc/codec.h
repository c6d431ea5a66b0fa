// The record codec of the teacher cache: k ids and their probabilities per token as two bit streams.
// The format is specified in docs/cache-format.md; kdfast/cache/codec_python.py is the same in plain Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kdfast::codec {

enum Status : int {
    kOk = 0,
    kTruncated = 1,   // a section or stream ends before its last code
    kBadCode = 2,     // a prefix no writer produces
    kBadId = 3,       // an id outside the vocabulary
    kBadValue = 4,    // a value above kMaxLevel
    kBadCount = 5,    // more entries than k
    kBadTail = 6,     // a tail code that contradicts the number of entries
    kTrailing = 7,    // bytes after the last code
    kInputId = 16,    // encode: an id outside [-1, V)
    kInputTwice = 17, // encode: an id listed twice
    kInputValue = 18, // encode: NaN, or a log-probability above 0
    kInputMass = 19,  // encode: entries and tail do not sum to 1
};

// A status and the token it belongs to.
struct Result {
    Status status = kOk;
    std::int64_t token = 0;
};

// What is the same for every record of a cache.
struct Layout {
    std::int64_t k;
    std::int64_t vocab;
    std::vector<double> temperatures;  // one of them is 1
};

// Writes heads, counts (when some row has empty slots), tails, id stream and value stream to `out`, and the KL error
// of every token (the worst over the temperatures) to `kl`. values_bits 0: as many levels as max_kl asks for.
struct Encoded {
    std::vector<std::uint8_t> bytes;
    std::uint32_t id_bytes = 0;
    bool has_counts = false;
};
Result encode(const Layout& layout, std::int64_t tokens, const std::int32_t* ids, const float* logprobs, const float* log_z,
              const float* log_tail, double max_kl, int values_bits, Encoded& out, float* kl);

// Reads `size` bytes and writes tokens rows; nothing outside either is touched, whatever the bytes are.
Result decode(const Layout& layout, std::int64_t tokens, const std::uint8_t* data, std::size_t size, std::uint32_t id_bytes,
              bool has_counts, std::int32_t* ids, float* logprobs, float* log_z, float* log_tail);

}  // namespace kdfast::codec
