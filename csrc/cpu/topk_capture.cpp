// Capture of top-k targets: a threshold filter keeps the k largest in one read; a second look at the cached row sums
// everything else.
#include <vector>

#include "rows.h"
#include "topk.h"

namespace kdfast {
namespace KDFAST_ISA {
namespace {

struct Entry {
    float value;
    int32_t id;
};

// Larger values first, ties to the lower id.
inline bool before(const Entry& a, const Entry& b) { return a.value > b.value || (a.value == b.value && a.id < b.id); }

// The k largest of what has been offered, in ascending order of id.
class Largest {
  public:
    explicit Largest(int64_t k) : k_(size_t(k)), room_(size_t(std::max<int64_t>(2 * k, k + 512))) {
        entries_.reserve(room_ + W);
    }

    void clear() {
        entries_.clear();
        threshold_ = -kInf;
        full_ = has_nan_ = false;
    }

    bool has_nan() const { return has_nan_; }

    // The first k are taken whatever they are; after that only what beats the k-th, since ties go to the lower id.
    void offer(const float* z, int64_t begin, int64_t n) {
        int64_t i = 0;
        for (; i < n && entries_.size() < k_ && !full_; ++i) push(z[i], begin + i);
        if (!full_ && entries_.size() == k_) {
            full_ = true;
            threshold_ = std::min_element(entries_.begin(), entries_.end(), [](auto a, auto b) { return a.value < b.value; })->value;
        }
        for (; i < n && i % W != 0; ++i) {
            if (z[i] > threshold_) push(z[i], begin + i);
        }
        for (; i < n; i += W) {
            const ivec above = load(z + i) > set(threshold_);
            if (!any(above)) continue;
            for (int lane = 0; lane < W; ++lane) {
                if (above[lane]) push(z[i + lane], begin + i + lane);
            }
            if (entries_.size() >= room_) trim();
        }
    }

    std::vector<Entry>& finish() {
        trim();
        std::sort(entries_.begin(), entries_.end(), before);
        return entries_;
    }

  private:
    // A NaN would break the order: it becomes the least value, and the row is marked.
    void push(float value, int64_t id) {
        has_nan_ |= value != value;
        entries_.push_back({value == value ? value : -kInf, int32_t(id)});
    }

    void trim() {
        if (entries_.size() <= k_) return;
        std::nth_element(entries_.begin(), entries_.begin() + std::ptrdiff_t(k_) - 1, entries_.end(), before);
        entries_.resize(k_);
        threshold_ = entries_.back().value;
    }

    size_t k_, room_;
    std::vector<Entry> entries_;
    float threshold_ = -kInf;
    bool full_ = false, has_nan_ = false;
};

// Log-sum-exp of a short list at T.
double lse_of(const float* z, int64_t n, double temperature) {
    OnlineSum<false, 0> sum(float(1 / temperature));
    for (int64_t begin = 0; begin < n; begin += kBlock) sum.add(z + begin, begin, std::min(kBlock, n - begin));
    return sum.lse();
}

struct CaptureRoom {
    Largest largest;
    std::vector<int32_t> ids;
    std::vector<float> values;
    std::vector<OnlineSum<false, 0>> sums;
    Buffer buffer;

    explicit CaptureRoom(int64_t k) : largest(k), ids(size_t(k)), values(size_t(padded(k))) {}
};

void capture_row(const CaptureArgs& a, int64_t r, CaptureRoom& room) {
    const Source row{a.logits.row(r), a.logits.dtype};
    const int64_t vocab = a.logits.columns;
    room.largest.clear();
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        const int64_t n = std::min(kBlock, vocab - begin);
        room.largest.offer(row.block(begin, n, room.buffer), begin, n);
    }
    const std::vector<Entry>& entries = room.largest.finish();
    std::fill(room.values.begin(), room.values.end(), -kInf);
    for (size_t i = 0; i < entries.size(); ++i) {
        room.ids[i] = entries[i].id;
        room.values[i] = entries[i].value;
    }
    std::sort(room.ids.begin(), room.ids.end());

    // T = 1 is always needed; at T = 2 its exponential is a square root away.
    OnlineSum<true, 2> at_2(0.5f);
    room.sums.clear();
    for (int64_t j = 0; j < a.n_temperatures; ++j) room.sums.emplace_back(float(1 / a.temperatures[j]));
    size_t next = 0;
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        const int64_t n = std::min(kBlock, vocab - begin);
        const float* z = without(row.block(begin, n, room.buffer), begin, n, room.ids, next, room.buffer);
        at_2.add(z, begin, n);
        for (int64_t j = 0; j < a.n_temperatures; ++j) {
            if (a.temperatures[j] != 1 && a.temperatures[j] != 2) room.sums[size_t(j)].add(z, begin, n);
        }
    }
    const double lse_1 = log_add(lse_of(room.values.data(), a.k, 1), at_2.lse_at_1());
    const bool valid = std::isfinite(lse_1) && !room.largest.has_nan();
    for (int64_t i = 0; i < a.k; ++i) {
        a.ids[r * a.k + i] = entries[size_t(i)].id;
        a.logprobs[r * a.k + i] = valid ? float(entries[size_t(i)].value - lse_1) : kNan;
    }
    for (int64_t j = 0; j < a.n_temperatures; ++j) {
        const double t = a.temperatures[j];
        const double unselected = t == 1 ? at_2.lse_at_1() : t == 2 ? at_2.lse() : room.sums[size_t(j)].lse();
        const double lse = log_add(lse_of(room.values.data(), a.k, t), unselected);
        // The sums were taken at the float nearest to 1/T: the same factor here, or a logit of 640 leaves its rounding behind.
        a.log_z[r * a.n_temperatures + j] = float(lse - lse_1 * double(float(1 / t)));
        a.log_tail[r * a.n_temperatures + j] = float(unselected - lse);
    }
}

}  // namespace

void topk_capture(const CaptureArgs& a) {
#pragma omp parallel num_threads(a.threads)
    {
        CaptureRoom room(a.k);
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = 0; r < a.rows; ++r) capture_row(a, r, room);
    }
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
