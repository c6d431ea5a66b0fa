// Who holds which columns of a row: the blocks of a cluster share them out, each keeps its share in chunks of shared memory.
//
// A row may start anywhere. What lies between two 16-byte boundaries of every tensor, whole units of 8 columns, is copied to
// shared memory in bulk; the few columns before and after it, and those that only the student has, are the row's edge and are
// read where they are needed.
#pragma once

#include "element.h"

namespace kdfast {
namespace cluster {

constexpr int kUnit = 8;      // columns: 16 bytes of a two-byte type
constexpr int kChunk = 4096;  // columns that arrive together
// Of a block: what is done once a row and thread, beside at best a hundred columns of it, wants few of them.
constexpr int kThreads = 256;
constexpr int kMaxBlocks = 16, kMaxChunks = 16;

struct Layout {
    int head;   // columns before the first unit
    int units;  // whole units among the columns that both sides have
    int width;  // columns of the student

    KDFAST_HD int bulk_end() const { return head + kUnit * units; }
    KDFAST_HD int edges() const { return width - kUnit * units; }
    KDFAST_HD int edge_column(int i) const { return i < head ? i : i + kUnit * units; }
};

// `finest` is the address of the row in the tensor whose elements are smallest: every other is aligned where that one is.
KDFAST_HD Layout layout_of(uintptr_t finest, int element_bytes, int common, int width) {
    const int head = int((16 - finest % 16) % 16) / element_bytes;
    return head < common ? Layout{head, (common - head) / kUnit, width} : Layout{common, 0, width};
}

// The share of one block.
struct Slice {
    int begin;    // its first column
    int columns;  // whole units; 0 for a block that is not needed

    KDFAST_HD int chunk_columns(int chunk) const {
        const int left = columns - chunk * kChunk;
        return left < 0 ? 0 : left < kChunk ? left : kChunk;
    }
};

KDFAST_HD int units_per_block(int units, int blocks) { return (units + blocks - 1) / blocks; }

KDFAST_HD Slice slice_of(const Layout& layout, int rank, int blocks) {
    const int each = units_per_block(layout.units, blocks);
    const int first = rank * each < layout.units ? rank * each : layout.units;
    const int last = first + each < layout.units ? first + each : layout.units;
    return {layout.head + kUnit * first, kUnit * (last - first)};
}

// Chunks a block needs room for, wherever the row starts.
KDFAST_HD int chunks_for(int common, int blocks) {
    return (kUnit * units_per_block(common / kUnit, blocks) + kChunk - 1) / kChunk;
}

KDFAST_HD int ring_bytes(int common, int blocks, int pair_bytes) { return chunks_for(common, blocks) * kChunk * pair_bytes; }

// What a block may take so that two share a multiprocessor, and so that one has it to itself (227 KiB on sm_90 and sm_100,
// less what a block uses beside its ring).
constexpr int kHalf = 110 << 10, kWhole = 220 << 10;

// Blocks of a cluster that holds a row of `common` columns, `pair_bytes` for a student's and a teacher's value; 0: none does.
// Half a multiprocessor a block first: a block that computes hides another one's wait. 16 blocks are not portable, hence last.
KDFAST_HD int blocks_for(int common, int pair_bytes) {
    for (int blocks = 1; blocks <= 8; blocks *= 2) {
        if (ring_bytes(common, blocks, pair_bytes) <= kHalf) return blocks;
    }
    for (int blocks = 8; blocks <= kMaxBlocks; blocks *= 2) {
        if (ring_bytes(common, blocks, pair_bytes) <= kWhole) return blocks;
    }
    return 0;
}

}  // namespace cluster
}  // namespace kdfast
