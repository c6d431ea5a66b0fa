// Whole records of the teacher cache, straight into the buffers of a batch.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/codec.h"

namespace kdfast::codec {

// One record, and where it goes: rows and ids to `at` and on, padded to `room` of them; a record of more tokens is cut.
// As 64-bit integers, so that Python hands over an array.
struct Job {
    std::int64_t address, size, tokens, contexts, checksum, at, room, context_at;
};

struct BatchOut {
    RowsOut rows;
    std::int64_t* input_ids;   // 0 in the padding
    std::int64_t* labels;      // -100 where a row does not count
    std::uint8_t* loss_mask;
    std::uint8_t* attention_mask;
    std::int64_t* context_ids;  // room for `context_room` of them a record; null: not wanted
    std::uint8_t* context_mask;
    std::int64_t context_room;
};

struct BatchResult {
    Status status = kOk;
    std::int64_t job = 0, token = 0;
};

// Where the coded rows of a batch go instead: as many bytes as all records have, and kSlack more; and the index of every row.
struct IndexOut {
    std::uint8_t* data;
    std::int64_t* offsets;
    std::int32_t* counts;
};

// A layout and the memory its rows are worked on in.
std::vector<std::uint32_t> scratch_for(const Layout& layout);
std::uint32_t* aligned(std::vector<std::uint32_t>& scratch);
unsigned count_width_for(std::int64_t k);

// Rows that fill `size` bytes exactly (or, unless `whole`, lie in them). No parallel region; safe after a fork.
Result decode_rows(const Layout& layout, const std::uint8_t* data, std::size_t size, unsigned count_width, std::int64_t tokens,
                   const RowsOut& rows, bool whole, std::vector<std::uint32_t>& scratch);

// Checks and decodes every job, with `threads` threads of its own. `next`: a row's label is the next input id.
BatchResult decode_batch(const Layout& layout, const Job* jobs, std::int64_t count, bool next, const BatchOut& out,
                         int threads);

// Checks every job as far as that goes without decoding, copies the bytes of its rows and notes where each row lies: offset
// behind its count, and count; 0 and 0 in the padding. `out.rows` is left alone. What is left to whoever decodes: ids, patches
// and draws that contradict themselves.
BatchResult index_batch(const Layout& layout, const Job* jobs, std::int64_t count, bool next, const BatchOut& out,
                        const IndexOut& index, int threads);

// Walks over rows in `data`; `at` is added to their offsets, `used` receives the bytes they take.
Result index_rows(const Layout& layout, const std::uint8_t* data, std::size_t size, unsigned count_width, std::int64_t tokens,
                  bool whole, std::int64_t at, std::int64_t* offsets, std::int32_t* counts, std::size_t& used);

// Decodes rows that an index finds; false: there is no memory to work in.
bool decode_indexed(const Layout& layout, const Indexed& in, std::int64_t tokens, const RowsOut& rows, int threads);

}  // namespace kdfast::codec
