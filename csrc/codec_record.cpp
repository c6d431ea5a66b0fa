#include "codec_record.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "checksum.h"

namespace kdfast::codec {
namespace {

constexpr std::int64_t kIgnore = -100;
constexpr unsigned kMask = 1, kLabels = 2, kContext = 4, kCounts = 8;
constexpr std::size_t kHeader = 12;

struct Record {
    std::int64_t tokens, contexts;
    unsigned id_width, label_width, context_width;
    const std::uint8_t *ids, *mask, *labels, *context, *rows;  // null where absent
    std::size_t row_bytes;
    bool counts;
};

// Every section lies inside the record, or false.
bool parse(const Job& job, Record& out) {
    const auto* data = reinterpret_cast<const std::uint8_t*>(static_cast<std::uintptr_t>(job.address));
    const auto size = static_cast<std::uint64_t>(job.size);
    if (job.size < static_cast<std::int64_t>(kHeader)) return false;
    const unsigned flags = data[0];
    std::uint32_t tokens, contexts;
    std::memcpy(&tokens, data + 4, 4);
    std::memcpy(&contexts, data + 8, 4);
    out.tokens = tokens;
    out.contexts = contexts;
    out.id_width = data[1];
    out.label_width = data[2];
    out.context_width = data[3];
    const auto fits = [](bool there, unsigned width) { return there ? width >= 1 && width <= 4 : width == 0; };
    if (flags > 15 || !fits(true, data[1]) || !fits(flags & kLabels, data[2]) || !fits(flags & kContext, data[3])) return false;
    if (out.tokens != job.tokens || out.contexts != job.contexts || (contexts && !(flags & kContext))) return false;
    std::uint64_t at = kHeader;
    const auto section = [&](bool there, std::uint64_t bytes) -> const std::uint8_t* {
        const std::uint8_t* p = there ? data + std::min(at, size) : nullptr;
        at += there ? bytes : 0;
        return p;
    };
    out.ids = section(true, std::uint64_t{tokens} * out.id_width);
    out.mask = section(flags & kMask, (std::uint64_t{tokens} + 7) / 8);
    out.labels = section(flags & kLabels, std::uint64_t{tokens} * out.label_width);
    out.context = section(flags & kContext, std::uint64_t{contexts} * out.context_width);
    if (at > size) return false;
    out.rows = data + at;
    out.row_bytes = static_cast<std::size_t>(size - at);
    out.counts = flags & kCounts;
    return true;
}

inline std::int64_t number(const std::uint8_t* data, std::int64_t i, unsigned width) {
    std::uint32_t x = 0;
    std::memcpy(&x, data + i * width, width);
    return x;
}

template <unsigned width>
void widen(const std::uint8_t* data, std::int64_t n, std::int64_t* out) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = number(data, i, width);
}

void widen(const std::uint8_t* data, std::int64_t n, unsigned width, std::int64_t* out) {
    if (width == 1) return widen<1>(data, n, out);
    if (width == 2) return widen<2>(data, n, out);
    if (width == 3) return widen<3>(data, n, out);
    widen<4>(data, n, out);
}

// Input ids, labels and masks of one record; what lies outside the document does not count.
void supervise(const Record& record, const Job& job, bool next, const BatchOut& out) {
    const std::int64_t n = std::min(job.tokens, job.room);
    std::int64_t *ids = out.input_ids + job.at, *labels = out.labels + job.at;
    std::uint8_t *loss = out.loss_mask + job.at, *attention = out.attention_mask + job.at;
    widen(record.ids, n, record.id_width, ids);
    std::memset(attention, 1, static_cast<std::size_t>(n));
    for (std::int64_t t = 0; t < n; ++t) {
        std::int64_t label = kIgnore;
        if (record.labels) {
            const std::int64_t stored = number(record.labels, t, record.label_width);
            label = stored ? stored - 1 : kIgnore;
        } else if (next && t + 1 < job.tokens) {
            label = t + 1 < n ? ids[t + 1] : number(record.ids, t + 1, record.id_width);
        }
        const bool marked = record.mask ? record.mask[t / 8] >> (t % 8) & 1 : label != kIgnore;
        loss[t] = marked && (record.labels || label != kIgnore);
        labels[t] = loss[t] ? label : kIgnore;
    }
    const std::int64_t rest = job.room - n;
    std::fill_n(ids + n, rest, 0);
    std::fill_n(labels + n, rest, kIgnore);
    std::memset(loss + n, 0, static_cast<std::size_t>(rest));
    std::memset(attention + n, 0, static_cast<std::size_t>(rest));
    if (!out.context_ids) return;
    std::int64_t* context = out.context_ids + job.context_at;
    std::uint8_t* there = out.context_mask + job.context_at;
    const std::int64_t c = std::min(record.contexts, out.context_room);
    if (c) widen(record.context, c, record.context_width, context);
    std::fill_n(context + c, out.context_room - c, 0);
    std::memset(there, 1, static_cast<std::size_t>(c));
    std::memset(there + c, 0, static_cast<std::size_t>(out.context_room - c));
}

RowsOut rows_at(const Layout& layout, const RowsOut& rows, std::int64_t at) {
    return {rows.ids + at * layout.k, rows.logprobs + at * layout.k, rows.log_z + at * layout.n_t,
            rows.log_tail + at * layout.n_t, layout.samples ? rows.weights + at * layout.k : nullptr};
}

void pad_rows(const Layout& layout, const RowsOut& rows, std::int64_t count) {
    std::fill_n(rows.ids, count * layout.k, -1);
    std::fill_n(rows.logprobs, count * layout.k, -std::numeric_limits<float>::infinity());
    std::fill_n(rows.log_z, count * layout.n_t, 0.0f);
    std::fill_n(rows.log_tail, count * layout.n_t, 0.0f);
    if (layout.samples) std::fill_n(rows.weights, count * layout.k, 0.0f);
}

Status open(const Job& job, Record& record) {
    const auto* data = reinterpret_cast<const std::uint8_t*>(static_cast<std::uintptr_t>(job.address));
    if (xxh64(data, static_cast<std::size_t>(job.size)) != static_cast<std::uint64_t>(job.checksum)) return kBadChecksum;
    return parse(job, record) ? kOk : kBadHeader;
}

Result decode_job(const Layout& layout, const Job& job, bool next, const BatchOut& out, std::vector<std::uint32_t>& scratch) {
    Record record;
    const Status opened = open(job, record);
    if (opened != kOk) return {opened, 0};
    const std::int64_t n = std::min(job.tokens, job.room);
    const unsigned width = record.counts ? count_width_for(layout.k) : 0;
    const Result result = decode_rows(layout, record.rows, record.row_bytes, width, n, rows_at(layout, out.rows, job.at),
                                      n == job.tokens, scratch);
    if (result.status != kOk) return result;
    supervise(record, job, next, out);
    pad_rows(layout, rows_at(layout, out.rows, job.at + n), job.room - n);
    return {};
}

// The rows of a record at `start` of the index's data, zeros in what is left of the record's size.
Result index_job(const Layout& layout, const Job& job, bool next, const BatchOut& out, const IndexOut& index,
                 std::int64_t start) {
    Record record;
    const Status opened = open(job, record);
    if (opened != kOk) return {opened, 0};
    const std::int64_t n = std::min(job.tokens, job.room);
    const unsigned width = record.counts ? count_width_for(layout.k) : 0;
    std::int64_t* offsets = index.offsets + job.at;
    std::int32_t* counts = index.counts + job.at;
    std::size_t used = 0;
    const Result result = index_rows(layout, record.rows, record.row_bytes, width, n, n == job.tokens, start, offsets, counts,
                                     used);
    if (result.status != kOk) return result;
    std::memcpy(index.data + start, record.rows, used);
    std::memset(index.data + start + used, 0, static_cast<std::size_t>(job.size) - used);
    supervise(record, job, next, out);
    std::fill_n(offsets + n, job.room - n, 0);
    std::fill_n(counts + n, job.room - n, 0);
    return {};
}

// work(i) for i = 0 .. count - 1 on `threads` threads, each with a function of its own from `worker()`. No thread outlives it.
template <typename Worker>
void share(std::int64_t count, int threads, const Worker& worker) {
    std::atomic<std::int64_t> taken{0};
    const auto run = [&] {
        auto work = worker();
        for (std::int64_t i; (i = taken.fetch_add(1)) < count;) work(i);
    };
    std::vector<std::thread> others;
    const std::int64_t wanted = std::min<std::int64_t>(threads, count) - 1;
    try {
        for (std::int64_t i = 0; i < wanted; ++i) others.emplace_back(run);
    } catch (const std::system_error&) {
        // The system has no more threads to give: those there are do the work.
    }
    run();
    for (auto& other : others) other.join();
}

// What went wrong in the first of the jobs in which something did.
class Worst {
  public:
    void add(std::int64_t job, const Result& result) {
        if (result.status == kOk) return;
        const std::lock_guard<std::mutex> lock(mutex_);
        if (found_.status == kOk || job < found_.job) found_ = {result.status, job, result.token};
    }
    BatchResult found() const { return found_; }

  private:
    std::mutex mutex_;
    BatchResult found_;
};

}  // namespace

std::vector<std::uint32_t> scratch_for(const Layout& layout) {
    return std::vector<std::uint32_t>(scratch_words(static_cast<std::size_t>(layout.k), layout.n_t) + 16);
}

std::uint32_t* aligned(std::vector<std::uint32_t>& scratch) {
    return scratch.data() + (64 - reinterpret_cast<std::uintptr_t>(scratch.data()) % 64) % 64 / 4;
}

unsigned count_width_for(std::int64_t k) { return k < 256 ? 1 : k < 65536 ? 2 : 4; }

Result decode_rows(const Layout& layout, const std::uint8_t* data, std::size_t size, unsigned count_width, std::int64_t tokens,
                   const RowsOut& rows, bool whole, std::vector<std::uint32_t>& scratch) {
    Cursor in{data, size, 0, false};
    Result result = KDFAST_CALL(codec_decode, layout, in, count_width, tokens, rows, aligned(scratch));
    if (result.status == kMore) {
        const std::int64_t done = result.token;
        std::vector<std::uint8_t> end(in.size - in.pos + kSlack);
        std::memcpy(end.data(), data + in.pos, in.size - in.pos);
        in = {end.data(), in.size - in.pos, 0, true};
        const RowsOut rest = rows_at(layout, rows, done);
        result = KDFAST_CALL(codec_decode, layout, in, count_width, tokens - done, rest, aligned(scratch));
        result.token += done;
    }
    if (result.status == kOk && whole && in.pos != in.size) return {kTrailing, tokens};
    return result;
}

BatchResult decode_batch(const Layout& layout, const Job* jobs, std::int64_t count, bool next, const BatchOut& out,
                         int threads) {
    Worst worst;
    share(count, threads, [&] {
        return [&, scratch = std::vector<std::uint32_t>()](std::int64_t i) mutable {
            try {
                if (scratch.empty()) scratch = scratch_for(layout);
                worst.add(i, decode_job(layout, jobs[i], next, out, scratch));
            } catch (const std::bad_alloc&) {  // must not leave a thread
                worst.add(i, {kNoMemory, 0});
            }
        };
    });
    return worst.found();
}

BatchResult index_batch(const Layout& layout, const Job* jobs, std::int64_t count, bool next, const BatchOut& out,
                        const IndexOut& index, int threads) {
    std::vector<std::int64_t> starts(static_cast<std::size_t>(count) + 1);
    for (std::size_t i = 0; i + 1 < starts.size(); ++i) starts[i + 1] = starts[i] + jobs[i].size;
    std::memset(index.data + starts.back(), 0, kSlack);
    Worst worst;
    share(count, threads, [&] {
        return [&](std::int64_t i) {
            worst.add(i, index_job(layout, jobs[i], next, out, index, starts[static_cast<std::size_t>(i)]));
        };
    });
    return worst.found();
}

bool decode_indexed(const Layout& layout, const Indexed& in, std::int64_t tokens, const RowsOut& rows, int threads) {
    constexpr std::int64_t together = 64;
    std::atomic<bool> enough{true};
    share((tokens + together - 1) / together, threads, [&] {
        return [&, scratch = std::vector<std::uint32_t>()](std::int64_t i) mutable {
            try {
                if (scratch.empty()) scratch = scratch_for(layout);
            } catch (const std::bad_alloc&) {
                enough = false;
                return;
            }
            const std::int64_t at = i * together;
            const Indexed here{in.data, in.size, in.offsets + at, in.counts + at};
            KDFAST_CALL(codec_decode_indexed, layout, here, std::min(together, tokens - at), rows_at(layout, rows, at),
                        aligned(scratch));
        };
    });
    return enough;
}

}  // namespace kdfast::codec
