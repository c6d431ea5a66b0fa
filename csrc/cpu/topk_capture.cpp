// Capture of sparse targets: a threshold filter keeps the k largest in one read; a second look at the cached row draws ids from
// the others, if any are to be drawn; a last one sums what was not selected.
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
        if (k_ == 0) return;
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

struct Drawn {
    int32_t id;
    float z;
    double log_weight;  // of (draws of this id / all draws) / its probability of being drawn
};

// Draws from softmax(z / T) over the ids that are not taken yet, by inversion: sorted uniform numbers against the running sum.
class Draws {
  public:
    const std::vector<Drawn>& from(const CaptureArgs& a, int64_t r, const Source& row, const std::vector<int32_t>& taken, Buffer& buffer) {
        found_.clear();
        inverse_t_ = float(1 / a.sample_temperature);
        points_.assign(a.draws + r * a.n_draws, a.draws + (r + 1) * a.n_draws);
        std::sort(points_.begin(), points_.end());
        sum_blocks(a, row, taken, buffer);
        if (!(total_ > 0) || !std::isfinite(total_)) return found_;
        double before = 0;
        size_t next = 0, point = 0, last = blocks_.size();
        while (last > 0 && blocks_[last - 1].mass == 0) --last;  // rounding must not push the last draw past the row's end
        for (size_t b = 0; b < last && point < points_.size(); ++b) {
            const int64_t begin = int64_t(b) * kBlock, n = std::min(kBlock, a.logits.columns - begin);
            const size_t first = point;
            while (point < points_.size() && (points_[point] * total_ < before + blocks_[b].mass || b + 1 == last)) ++point;
            while (next < taken.size() && taken[next] < begin) ++next;
            if (point > first) scan(row, begin, n, taken, next, before, blocks_[b], first, point, buffer);
            before += blocks_[b].mass;
        }
        return found_;
    }

  private:
    struct Block {
        float top;
        double mass;
    };
    std::vector<double> points_;
    std::vector<Block> blocks_;
    std::vector<Drawn> found_;
    float inverse_t_ = 1, anchor_ = 0;
    double total_ = 0;

    // e = exp((z - top) / T), in place of z where that is the buffer; their sum.
    double exps(const float* z, int64_t n, float top, Buffer& buffer) const {
        vec sum{};
        for (int64_t i = 0; i < padded(n); i += W) {
            const vec e = exp(max(set(kLowest), (load(z + i) - top) * inverse_t_));
            store(buffer.data + i, e);
            sum += e;
        }
        return reduce_add(sum);
    }

    void sum_blocks(const CaptureArgs& a, const Source& row, const std::vector<int32_t>& taken, Buffer& buffer) {
        blocks_.clear();
        anchor_ = -kInf;
        size_t next = 0;
        for (int64_t begin = 0; begin < a.logits.columns; begin += kBlock) {
            const int64_t n = std::min(kBlock, a.logits.columns - begin);
            const float* z = without(row.block(begin, n, buffer), begin, n, taken, next, buffer);
            vec high = set(-kInf);
            for (int64_t i = 0; i < padded(n); i += W) high = max(high, load(z + i));
            const float top = reduce_max(high);
            blocks_.push_back({top, top == -kInf ? 0 : exps(z, n, top, buffer)});
            anchor_ = std::max(anchor_, top);
        }
        total_ = 0;
        for (Block& b : blocks_) {
            if (b.mass != 0) b.mass *= std::exp((double(b.top) - anchor_) * inverse_t_);
            total_ += b.mass;
        }
    }

    // Finds the ids of points first to last, all in one block.
    void scan(const Source& row, int64_t begin, int64_t n, const std::vector<int32_t>& taken, size_t next, double before, const Block& block,
              size_t first, size_t last, Buffer& buffer) {
        const float* z = without(row.block(begin, n, buffer), begin, n, taken, next, buffer);
        exps(z, n, block.top, buffer);
        const double factor = std::exp((double(block.top) - anchor_) * inverse_t_);
        int64_t end = n;
        while (buffer.data[end - 1] == 0) --end;
        for (int64_t i = 0; i < end && first < last; i += W) {
            const double mass = factor * reduce_add(load(buffer.data + i));
            const bool final = i + W >= end;
            const size_t start = first;
            while (first < last && (final || points_[first] * total_ < before + mass)) ++first;
            if (first > start) scan_vector(row, begin, i, std::min(i + W, end), before, factor, start, first, buffer);
            before += mass;
        }
    }

    // The same in one vector of a block, [i, end) of it.
    void scan_vector(const Source& row, int64_t begin, int64_t i, int64_t end, double before, double factor, size_t first, size_t last,
                     const Buffer& buffer) {
        while (buffer.data[end - 1] == 0) --end;
        for (; i < end && first < last; ++i) {
            before += factor * buffer.data[i];
            const size_t start = first;
            while (first < last && (points_[first] * total_ < before || i + 1 == end)) ++first;
            if (first == start) continue;
            const float logit = row.at(begin + i);
            const double log_r = (double(logit) - anchor_) * inverse_t_ - std::log(total_);
            found_.push_back({int32_t(begin + i), logit, std::log(double(first - start) / double(points_.size())) - log_r});
        }
    }
};

struct CaptureRoom {
    Largest largest;
    Draws draws;
    std::vector<int32_t> ids;  // ascending, of what is selected
    std::vector<float> values;
    std::vector<OnlineSum<false, 0>> sums;
    Buffer buffer;

    CaptureRoom(int64_t k, int64_t slots) : largest(k), values(size_t(padded(slots))) {}
};

// Log-sum-exps of the unselected ids: at 1, and into `unselected` at every temperature.
double sum_unselected(const CaptureArgs& a, const Source& row, CaptureRoom& room, std::vector<double>& unselected) {
    // T = 1 is always needed; at T = 2 its exponential is a square root away.
    OnlineSum<true, 2> at_2(0.5f);
    room.sums.clear();
    for (int64_t j = 0; j < a.n_temperatures; ++j) room.sums.emplace_back(float(1 / a.temperatures[j]));
    size_t next = 0;
    for (int64_t begin = 0; begin < a.logits.columns; begin += kBlock) {
        const int64_t n = std::min(kBlock, a.logits.columns - begin);
        const float* z = without(row.block(begin, n, room.buffer), begin, n, room.ids, next, room.buffer);
        at_2.add(z, begin, n);
        for (int64_t j = 0; j < a.n_temperatures; ++j) {
            if (a.temperatures[j] != 1 && a.temperatures[j] != 2) room.sums[size_t(j)].add(z, begin, n);
        }
    }
    unselected.clear();
    for (int64_t j = 0; j < a.n_temperatures; ++j) {
        const double t = a.temperatures[j];
        unselected.push_back(t == 1 ? at_2.lse_at_1() : t == 2 ? at_2.lse() : room.sums[size_t(j)].lse());
    }
    return at_2.lse_at_1();
}

void capture_row(const CaptureArgs& a, int64_t r, CaptureRoom& room, std::vector<double>& unselected) {
    const Source row{a.logits.row(r), a.logits.dtype, a.head};
    room.largest.clear();
    for (int64_t begin = 0; a.k > 0 && begin < a.logits.columns; begin += kBlock) {
        const int64_t n = std::min(kBlock, a.logits.columns - begin);
        room.largest.offer(row.block(begin, n, room.buffer), begin, n);
    }
    const std::vector<Entry>& entries = room.largest.finish();
    std::fill(room.values.begin(), room.values.end(), -kInf);
    room.ids.clear();
    for (const Entry& e : entries) {
        room.values[room.ids.size()] = e.value;
        room.ids.push_back(e.id);
    }
    std::sort(room.ids.begin(), room.ids.end());
    static const std::vector<Drawn> none;
    const std::vector<Drawn>& drawn = a.draws ? room.draws.from(a, r, row, room.ids, room.buffer) : none;
    for (const Drawn& d : drawn) {
        room.values[room.ids.size()] = d.z;
        room.ids.push_back(d.id);
    }
    std::sort(room.ids.begin(), room.ids.end());

    const double lse_1 = log_add(lse_of(room.values.data(), a.slots(), 1), sum_unselected(a, row, room, unselected));
    const bool valid = std::isfinite(lse_1) && !room.largest.has_nan();
    const auto put = [&](int64_t slot, int32_t id, double logprob, double weight) {
        a.ids[r * a.slots() + slot] = id;
        a.logprobs[r * a.slots() + slot] = valid ? float(logprob) : kNan;
        if (a.weights) a.weights[r * a.slots() + slot] = float(weight);
    };
    int64_t slot = 0;
    for (const Entry& e : entries) put(slot++, e.id, e.value - lse_1, a.weights ? std::exp(e.value - lse_1) : 0);
    for (const Drawn& d : drawn) put(slot++, d.id, d.z - lse_1, std::exp(d.log_weight + (d.z - lse_1)));
    while (slot < a.slots()) put(slot++, -1, -kInf, 0);
    for (int64_t j = 0; j < a.n_temperatures; ++j) {
        const double t = a.temperatures[j];
        const double lse = log_add(lse_of(room.values.data(), a.slots(), t), unselected[size_t(j)]);
        // The sums were taken at the float nearest to 1/T: the same factor here, or a logit of 640 leaves its rounding behind.
        a.log_z[r * a.n_temperatures + j] = valid ? float(lse - lse_1 * double(float(1 / t))) : kNan;
        a.log_tail[r * a.n_temperatures + j] = float(unselected[size_t(j)] - lse);
    }
}

}  // namespace

void topk_capture(const CaptureArgs& a) {
#pragma omp parallel num_threads(a.threads)
    {
        CaptureRoom room(a.k, a.slots());
        std::vector<double> unselected;
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = 0; r < a.rows; ++r) capture_row(a, r, room, unselected);
    }
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
