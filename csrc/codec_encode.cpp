// Encoder of the record codec: picks for every token the coarsest levels that keep the KL error within max_kl.
#include "codec_common.h"

#include <algorithm>
#include <cstring>

namespace kdfast::codec {
namespace {

constexpr double kQuarterPowers[4] = {1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429};
constexpr int kSteps = 64;           // levels = 2^(step / 4), up to 2^16
constexpr double kMassSlack = 1e-2;  // how far entries and tail may be from 1: half-precision teachers, not mistakes

constexpr double kMaxLogMass = 50.0;  // keeps a nonsensical log_z from overflowing before it is refused

class BitWriter {
  public:
    void put(std::uint64_t value, unsigned bits) {  // bits <= 32
        word_ |= value << used_;
        used_ += bits;
        while (used_ >= 8) {
            bytes.push_back(static_cast<std::uint8_t>(word_));
            word_ >>= 8;
            used_ -= 8;
        }
    }
    void flush() {
        if (used_) put(0, 8 - used_);
    }
    std::vector<std::uint8_t> bytes;

  private:
    std::uint64_t word_ = 0;
    unsigned used_ = 0;
};

unsigned bit_length(std::uint32_t x) { return x ? 32 - static_cast<unsigned>(__builtin_clz(x)) : 0; }

void put_gap(BitWriter& out, std::uint32_t gap, unsigned rice) {
    const std::uint32_t n = gap >> rice;
    if (n >= kEscape) {
        out.put(0, kEscape);
        out.put(gap, kRawBits);
        return;
    }
    out.put(1ull << n, n + 1);
    out.put(gap & ((1u << rice) - 1), rice);
}

unsigned gap_bits(std::uint32_t gap, unsigned rice) {
    const std::uint32_t n = gap >> rice;
    return n >= kEscape ? kEscape + kRawBits : n + 1 + rice;
}

unsigned value_bits(std::uint32_t v, unsigned order) { return 2 * bit_length((v >> order) + 1) - 1 + order; }

void put_value(BitWriter& out, std::uint32_t v, unsigned order) {
    const unsigned n = bit_length((v >> order) + 1) - 1;
    out.put(1ull << n, n + 1);
    out.put(v - (((1u << n) - 1) << order), n + order);
}

template <typename Cost>
unsigned cheapest(unsigned from, unsigned to, const std::vector<std::uint32_t>& values, Cost cost) {
    unsigned best = from;
    std::uint64_t least = ~0ull;
    for (unsigned m = from; m <= to; ++m) {
        std::uint64_t bits = 0;
        for (std::uint32_t v : values) bits += cost(v, m);
        if (bits < least) {
            least = bits;
            best = m;
        }
    }
    return best;
}

// One token on its way: entries in id order, what the teacher said at every temperature, and the levels tried.
class Row {
  public:
    explicit Row(const Layout& layout)
        : layout_(layout), levels_(layout.temperatures), one_(column_of_one(layout.temperatures)),
          n_t_(layout.temperatures.size()), self_(n_t_), mass_(n_t_), codes_(n_t_) {}

    Status load(const std::int32_t* ids, const float* logprobs, const float* log_z, const float* log_tail);
    double quantise(double max_kl, int values_bits);
    std::uint8_t write(BitWriter& id_out, BitWriter& value_out);
    std::uint32_t count() const { return static_cast<std::uint32_t>(entries_.size()); }
    const std::vector<std::uint16_t>& codes() const { return codes_; }

  private:
    double kl_at(double levels_per_unit, std::uint32_t cap);

    const Layout& layout_;
    Levels levels_;
    std::size_t one_, n_t_;
    std::vector<std::pair<std::int32_t, double>> entries_;
    std::vector<double> root_, p_;       // sqrt(p) at T = 1; p at every T, [n_T, count]
    std::vector<double> self_, mass_;    // sum p log p and sum p over entries and tail, at every T
    std::vector<double> tail_p_;         // mass of the tail at every T
    std::vector<std::uint16_t> codes_;
    std::vector<std::uint32_t> q_, gaps_;
};

std::uint16_t tail_code(double log_tail, double log_rest, bool empty) {
    if (empty) return kTailAll;
    if (log_tail == -kInf) return kTailNone;
    const double code = std::floor((log_tail - log_rest) * kTailScale + 0.5) + kTailZero;
    return static_cast<std::uint16_t>(std::min(std::max(code, 1.0), 65534.0));
}

Status Row::load(const std::int32_t* ids, const float* logprobs, const float* log_z, const float* log_tail) {
    entries_.clear();
    for (std::int64_t i = 0; i < layout_.k; ++i) {
        if (ids[i] < -1 || ids[i] >= layout_.vocab) return kInputId;
        if (ids[i] < 0) continue;
        if (!(logprobs[i] <= 1e-3f)) return kInputValue;
        // An id that cannot happen says nothing that the tail does not: it becomes an empty slot.
        if (logprobs[i] > -std::numeric_limits<float>::infinity()) entries_.emplace_back(ids[i], logprobs[i]);
    }
    std::sort(entries_.begin(), entries_.end());
    for (std::size_t i = 1; i < entries_.size(); ++i)
        if (entries_[i].first == entries_[i - 1].first) return kInputTwice;
    const std::size_t n = entries_.size();
    root_.resize(n);
    p_.resize(n * n_t_);
    tail_p_.resize(n_t_);
    for (std::size_t i = 0; i < n; ++i) root_[i] = std::exp(0.5 * entries_[i].second);
    for (std::size_t j = 0; j < n_t_; ++j) {
        if (!std::isfinite(log_z[j]) || !(log_tail[j] <= 1e-3f)) return kInputValue;
        double rest = 0, self = 0;
        for (std::size_t i = 0; i < n; ++i) {
            const double log_p = std::min(entries_[i].second / layout_.temperatures[j] - log_z[j], kMaxLogMass);
            const double p = std::exp(log_p);
            p_[j * n + i] = p;
            rest += p;
            self += p * log_p;
        }
        tail_p_[j] = std::exp(static_cast<double>(log_tail[j]));
        mass_[j] = rest + tail_p_[j];
        if (!(std::fabs(mass_[j] - 1.0) <= kMassSlack) && n) return kInputMass;
        self_[j] = self + (tail_p_[j] > 0 ? tail_p_[j] * log_tail[j] : 0.0);
        codes_[j] = tail_code(log_tail[j], rest > 0 ? std::log(rest) : -kInf, n == 0);
    }
    return kOk;
}

// KL(exact || decoded) over entries and tail, the worst over the temperatures, with sum(p log p/r - p + r).
double Row::kl_at(double levels_per_unit, std::uint32_t cap) {
    const std::size_t n = entries_.size();
    q_.resize(n);
    for (std::size_t i = 0; i < n; ++i)
        q_[i] = static_cast<std::uint32_t>(std::min(root_[i] * levels_per_unit, static_cast<double>(cap)));
    const double scale = tail_of(codes_[one_]).log_rest - levels_.log_sum(one_, q_.data(), n);
    double worst = 0;
    for (std::size_t j = 0; j < n_t_; ++j) {
        const double temperature = layout_.temperatures[j];
        const Tail tail = tail_of(codes_[j]);
        const double log_z = j == one_ ? 0.0 : levels_.log_sum(j, q_.data(), n) + scale / temperature - tail.log_rest;
        double cross = tail_p_[j] > 0 ? tail_p_[j] * tail.log_tail : 0.0;
        for (std::size_t i = 0; i < n; ++i)
            cross += p_[j * n + i] * ((2.0 * levels_.log_level(q_[i]) + scale) / temperature - log_z);
        worst = std::max(worst, self_[j] - cross - mass_[j] + 1.0);
    }
    return worst;
}

double Row::quantise(double max_kl, int values_bits) {
    if (entries_.empty()) return 0.0;
    if (values_bits) {
        const double top = *std::max_element(root_.begin(), root_.end());
        return kl_at(std::ldexp(1.0, values_bits) / top, (1u << values_bits) - 1);
    }
    // A uniform error of one level in sqrt(p) costs about 1/(6 levels^2) per entry; start coarser, stop when it holds.
    const double guess = std::sqrt((static_cast<double>(entries_.size()) + 1) / (6 * max_kl));
    const int first = static_cast<int>(std::floor(4 * std::log2(std::max(guess, 1.0)))) - 8;
    double kl = 0;
    for (int step = std::min(std::max(first, 0), kSteps); step <= kSteps; ++step) {
        kl = kl_at(std::ldexp(kQuarterPowers[step & 3], step >> 2), kMaxLevel);
        if (kl <= max_kl) break;
    }
    return kl;
}

std::uint8_t Row::write(BitWriter& id_out, BitWriter& value_out) {
    const std::size_t n = entries_.size();
    if (!n) return 0;
    gaps_.resize(n);
    for (std::size_t i = 0; i < n; ++i)
        gaps_[i] = static_cast<std::uint32_t>(i ? entries_[i].first - entries_[i - 1].first - 1 : entries_[i].first);
    const std::uint32_t base = *std::min_element(q_.begin(), q_.end());
    for (auto& q : q_) q -= base;
    const unsigned mean = bit_length(static_cast<std::uint32_t>(entries_.back().first / n));
    const unsigned rice = cheapest(mean > 2 ? mean - 2 : 0, mean, gaps_, gap_bits);
    const unsigned order = cheapest(0, 7, q_, value_bits);
    for (std::uint32_t gap : gaps_) put_gap(id_out, gap, rice);
    put_value(value_out, base, 0);
    for (std::uint32_t q : q_) put_value(value_out, q, order);
    return static_cast<std::uint8_t>(rice | order << 5);
}

template <typename T>
void append(std::vector<std::uint8_t>& out, const std::vector<T>& values) {
    const auto* from = reinterpret_cast<const std::uint8_t*>(values.data());
    out.insert(out.end(), from, from + values.size() * sizeof(T));
}

}  // namespace

Result encode(const Layout& layout, std::int64_t tokens, const std::int32_t* ids, const float* logprobs, const float* log_z,
              const float* log_tail, double max_kl, int values_bits, Encoded& out, float* kl) {
    const std::size_t n_t = layout.temperatures.size();
    std::vector<std::uint8_t> heads;
    std::vector<std::uint32_t> counts;
    std::vector<std::uint16_t> tails;
    BitWriter id_out, value_out;
    Row row(layout);
    for (std::int64_t t = 0; t < tokens; ++t) {
        const Status status = row.load(ids + t * layout.k, logprobs + t * layout.k, log_z + t * n_t, log_tail + t * n_t);
        if (status != kOk) return {status, t};
        kl[t] = static_cast<float>(row.quantise(max_kl, values_bits));
        heads.push_back(row.write(id_out, value_out));
        counts.push_back(row.count());
        tails.insert(tails.end(), row.codes().begin(), row.codes().end());
        out.has_counts |= row.count() < layout.k;
    }
    id_out.flush();
    value_out.flush();
    append(out.bytes, heads);
    if (out.has_counts) append(out.bytes, counts);
    append(out.bytes, tails);
    append(out.bytes, id_out.bytes);
    append(out.bytes, value_out.bytes);
    out.id_bytes = static_cast<std::uint32_t>(id_out.bytes.size());
    return {};
}

}  // namespace kdfast::codec
