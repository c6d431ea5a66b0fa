// Picks for every token the coarsest levels that keep the KL error within max_kl, and packs them.
#include "codec_pack.h"

namespace kdfast {
namespace KDFAST_ISA {
namespace {

using codec::Layout;
using codec::RowsIn;
using codec::Status;

constexpr double kMassSlack = 1e-2;  // how far entries and tail may be from 1: half-precision teachers, not mistakes
constexpr int kTrials = 4;           // steps of the search that aim at max_kl; the ones after it only refine
constexpr double kDrawnLevel = 8;    // level of the least likely drawn entry, at least, where its p matters
constexpr std::int64_t kSortByRank = 160;

// What float32 adds to a KL of `kl` between what is measured here and what a reader computes: log-probabilities at T are as
// large as log_z is, each is off by e, and a KL is a quadratic form in what it is off by.
double rounding(double kl, double largest_log_z) {
    const double e = std::ldexp(20 + largest_log_z, -21);
    return e * (std::sqrt(2 * kl) + e);
}

unsigned tail_code(double tail, double rest, bool empty) {
    if (empty) return codec::kTailAll;
    if (!(tail > 0)) return codec::kTailNone;
    const std::uint64_t one = 1ull << (52 - codec::kTailMantissa);
    const std::uint64_t least = static_cast<std::uint64_t>(1023 + codec::kTailLeast) << codec::kTailMantissa;
    const std::uint64_t bits = (bits_as<std::uint64_t>(tail / rest) + one / 2) / one;  // rest 0: infinity, the largest code
    const std::uint64_t code = bits > least ? bits - least : 1;
    return static_cast<unsigned>(code < codec::kTailAll ? code : codec::kTailAll - 1);
}

// What p says more than q of one outcome, p (log p/q - 1 + q/p) / p, from y = q / p.
inline vec surprise(vec y) { return (y - 1.0f) - log_fixed(y); }

class RowEncoder {
  public:
    RowEncoder(const Layout& layout, std::uint32_t* scratch)
        : layout_(layout), words_(static_cast<std::size_t>(layout.k) + 128), next_(scratch) {
        tail_kl_ = take<double>(static_cast<std::size_t>(layout.n_t));  // first: aligned to 8 bytes
        raw_ids_ = take<std::int32_t>();
        ids_ = take<std::int32_t>();
        raw_draws_ = take<std::uint32_t>();
        draws_ = take<std::uint32_t>();
        rank_ = take<std::uint32_t>();
        levels_ = take<std::uint32_t>();
        patches_ = take<std::uint32_t>();
        raw_logp_ = take<float>();
        logp_ = take<float>();
        root_ = take<float>();
        trial_ = take<float>();
        p_ = take<float>(static_cast<std::size_t>(layout.n_t));
        inverse_p_ = take<float>(static_cast<std::size_t>(layout.n_t));
    }

    Status read(const RowsIn& row);
    // KL(exact || decoded). With values_bits there is no limit to keep; else a row that no level keeps it for becomes exact.
    float quantise(double max_kl, int values_bits);
    void write(Bytes& out, unsigned count_width) const;
    bool exact() const { return exact_; }

  private:
    template <typename T>
    T* take(std::size_t arrays = 1) {
        T* p = reinterpret_cast<T*>(next_);
        next_ += arrays * words_;
        return p;
    }
    Status gather(const RowsIn& row);
    bool all_good(const RowsIn& row) const;
    template <int vectors>
    void rank(std::int64_t start);
    void sort();
    Status masses(const RowsIn& row);
    double entry_kl(int column, float unit) const;
    double coarsest() const;
    bool search(double limit, double& kl);
    double kl_at(float levels_per_unit, float cap);
    std::uint16_t* codes() const { return reinterpret_cast<std::uint16_t*>(rank_); }  // the ranks are no longer needed
    void write_ids(Bytes& out) const;
    void write_exact(Bytes& out) const;
    void write_blocks(Bytes& out, const std::uint32_t* values) const;
    float* p(int column) const { return p_ + static_cast<std::size_t>(column) * words_; }
    float* inverse_p(int column) const { return inverse_p_ + static_cast<std::size_t>(column) * words_; }

    const Layout& layout_;
    std::size_t words_;
    std::uint32_t* next_;
    std::int64_t n_ = 0;
    bool exact_ = false;
    const float *log_z_ = nullptr, *log_tail_ = nullptr;
    double largest_log_z_ = 0;
    double* tail_kl_;
    std::int32_t *raw_ids_, *ids_;
    std::uint32_t *raw_draws_, *draws_, *rank_, *levels_, *patches_;
    float *raw_logp_, *logp_, *root_, *trial_, *p_, *inverse_p_;
};

// The entries there are, in their order.
Status RowEncoder::gather(const RowsIn& row) {
    if (all_good(row)) {
        n_ = layout_.k;
        std::memcpy(raw_ids_, row.ids, static_cast<std::size_t>(n_) * 4);
        std::memcpy(raw_logp_, row.logprobs, static_cast<std::size_t>(n_) * 4);
        if (layout_.samples) std::memcpy(raw_draws_, row.draws, static_cast<std::size_t>(n_) * 4);
        return codec::kOk;
    }
    n_ = 0;
    for (std::int64_t i = 0; i < layout_.k; ++i) {
        const std::int32_t id = row.ids[i];
        if (id < -1 || id >= layout_.vocab) return codec::kInputId;
        if (id < 0) continue;
        if (!(row.logprobs[i] <= 1e-3f)) return codec::kInputValue;
        // An id that cannot happen says nothing that the tail does not: it becomes an empty slot.
        if (row.logprobs[i] == -kInf) continue;
        raw_ids_[n_] = id;
        raw_logp_[n_] = row.logprobs[i];
        if (layout_.samples) raw_draws_[n_] = static_cast<std::uint32_t>(row.draws[i]);
        ++n_;
    }
    return codec::kOk;
}

// Whether every slot holds an entry that can happen.
bool RowEncoder::all_good(const RowsIn& row) const {
    const auto vocab = static_cast<std::uint32_t>(layout_.vocab);
    std::int64_t i = 0;
    ivec wrong = {};
    for (; i + W <= layout_.k; i += W) {
        const vec logp = load(row.logprobs + i);
        wrong |= ~((uvec)load_words(row.ids + i) < vocab) | ~(logp <= 1e-3f) | ~(logp > -kInf);
    }
    bool good = !any(wrong);
    for (; i < layout_.k; ++i)
        good &= static_cast<std::uint32_t>(row.ids[i]) < vocab && row.logprobs[i] <= 1e-3f && row.logprobs[i] > -kInf;
    return good;
}

// rank_ of `vectors` vectors of ids: how many are smaller.
template <int vectors>
void RowEncoder::rank(std::int64_t start) {
    ivec x[vectors], smaller[vectors] = {};
    for (int v = 0; v < vectors; ++v) x[v] = load_words(raw_ids_ + start + v * W);
    for (std::int64_t j = 0; j < n_; ++j)
        for (int v = 0; v < vectors; ++v) smaller[v] = plus_greater(smaller[v], x[v], ivec{} + raw_ids_[j]);
    for (int v = 0; v < vectors; ++v) store_words(rank_ + start + v * W, smaller[v]);
}

void RowEncoder::sort() {
    if (n_ <= kSortByRank) {
        std::int64_t i = 0;
        for (; i + 3 * W < n_; i += 4 * W) rank<4>(i);
        for (; i < n_; i += W) rank<1>(i);
    } else {
        for (std::int64_t i = 0; i < n_; ++i) ids_[i] = static_cast<std::int32_t>(i);
        const std::int32_t* raw = raw_ids_;
        std::int32_t *spare = reinterpret_cast<std::int32_t*>(trial_), *from = ids_, *to = spare;
        for (int shift = 0; shift < 24; shift += 8) {
            std::uint32_t at[257] = {};
            for (std::int64_t i = 0; i < n_; ++i) ++at[(raw[i] >> shift & 255) + 1];
            for (int b = 0; b < 256; ++b) at[b + 1] += at[b];
            for (std::int64_t i = 0; i < n_; ++i) to[at[raw[from[i]] >> shift & 255]++] = from[i];
            std::int32_t* const other = from;
            from = to;
            to = other;
        }
        for (std::int64_t i = 0; i < n_; ++i) rank_[from[i]] = static_cast<std::uint32_t>(i);
    }
    for (std::int64_t i = 0; i < n_; ++i) ids_[i] = -1;  // an id that is listed twice leaves a hole
    for (std::int64_t i = 0; i < n_; ++i) {
        ids_[rank_[i]] = raw_ids_[i];
        logp_[rank_[i]] = raw_logp_[i];
    }
    for (std::int64_t i = 0; layout_.samples && i < n_; ++i) draws_[rank_[i]] = raw_draws_[i];
}

// Probabilities at every temperature and the tails' codes.
Status RowEncoder::masses(const RowsIn& row) {
    for (std::int64_t i = n_; i % 16; ++i) logp_[i] = 0;
    log_z_ = row.log_z;
    log_tail_ = row.log_tail;
    for (int j = 0; j < layout_.n_t; ++j) {
        if (!(std::fabs(row.log_z[j]) < kInf) || !(row.log_tail[j] <= 1e-3f)) return codec::kInputValue;
        const vec inverse = set(static_cast<float>(1.0 / layout_.temperatures[j]));
        Sum16 sum;
        for (std::int64_t i = 0; i < n_; i += 16) {
            float kept[16];
            for (int l = 0; l < 16; l += W) {
                const vec mass = exp_fixed(load(logp_ + i + l) * inverse - row.log_z[j]);
                store(p(j) + i + l, mass);
                store(inverse_p(j) + i + l, 1.0f / mass);
                store(kept + l, lane_numbers() + static_cast<int>(i) + l < static_cast<int>(n_) ? mass : vec{});
            }
            sum.add(kept);
        }
        const double rest = sum.total(), tail = row.log_tail[j] == -kInf ? 0.0 : std::exp(static_cast<double>(row.log_tail[j]));
        if (!(std::fabs(rest + tail - 1.0) <= kMassSlack)) return codec::kInputMass;
        largest_log_z_ = std::fmax(largest_log_z_, std::fabs(static_cast<double>(row.log_z[j])));
        codes()[j] = static_cast<std::uint16_t>(tail_code(tail, rest, n_ == 0));
        const double coded = tail_mass(codes()[j]).tail;
        tail_kl_[j] = tail > 0 ? tail * std::log(tail / coded) - tail + coded : 0.0;
    }
    for (std::int64_t i = 0; i < n_; i += W) {
        store(root_ + i, sqrt(load(p(layout_.one) + i)));
    }
    return codec::kOk;
}

Status RowEncoder::read(const RowsIn& row) {
    const Status status = gather(row);
    if (status != codec::kOk) return status;
    sort();
    ivec previous = ivec{} - 1, wrong = {};
    for (std::int64_t i = 0; i < n_; i += W) {
        const ivec id = load_words(ids_ + i);
        wrong |= (id <= after(previous, id)) & (lane_numbers() + static_cast<int>(i) < static_cast<int>(n_));
        previous = id;
    }
    if (any(wrong)) return codec::kInputTwice;
    if (layout_.samples && n_) {
        std::uint64_t draws = 0;
        bool exact = false;
        for (std::int64_t i = 0; i < n_; ++i) {
            draws += draws_[i];
            exact |= draws_[i] == 0;
        }
        if (draws != static_cast<std::uint64_t>(layout_.samples) || (exact && !layout_.mixed)) return codec::kInputDraws;
    }
    return masses(row);
}

// sum p (log p/q - 1 + q/p) over the entries; unit: mass of an entry of level 0.
double RowEncoder::entry_kl(int column, float unit) const {
    const bool tempered = column != layout_.one;
    const vec inverse = set(static_cast<float>(1.0 / layout_.temperatures[column]));
    vec scale = set(unit), sum = {};
    float top = -kInf;
    if (tempered) {
        vec powers = {};
        for (std::int64_t i = 0; i < n_; ++i) top = trial_[i] > top ? trial_[i] : top;
        for (std::int64_t i = 0; i < n_; i += W) {
            const vec power = exp_fixed((load(trial_ + i) - top) * inverse);
            powers += lane_numbers() + static_cast<int>(i) < static_cast<int>(n_) ? power : vec{};
        }
        scale = set(static_cast<float>(tail_mass(codes()[column]).rest) / reduce_add(powers));
    }
    for (std::int64_t i = 0; i < n_; i += W) {
        const vec odd = __builtin_convertvector(load_words(levels_ + i) * 2 + 1, vec);
        const vec q = tempered ? exp_fixed((load(trial_ + i) - top) * inverse) * scale : odd * odd * scale;
        const vec term = load(p(column) + i) * surprise(q * load(inverse_p(column) + i));
        sum += lane_numbers() + static_cast<int>(i) < static_cast<int>(n_) ? term : vec{};
    }
    return reduce_add(sum);
}

// KL(exact || decoded) over entries and tail, the worst over the temperatures.
double RowEncoder::kl_at(float levels_per_unit, float cap) {
    vec squares = {};
    for (std::int64_t i = 0; i < n_; i += W) {
        const ivec level = __builtin_convertvector(min(load(root_ + i) * levels_per_unit, set(cap)), ivec);
        store_words(levels_ + i, level);
        const vec odd = __builtin_convertvector(level * 2 + 1, vec);
        squares += lane_numbers() + static_cast<int>(i) < static_cast<int>(n_) ? odd * odd : vec{};
    }
    const float unit = static_cast<float>(tail_mass(codes()[layout_.one]).rest) / reduce_add(squares);
    if (layout_.n_t > 1) {
        for (std::int64_t i = 0; i < n_; i += W) {
            const vec odd = __builtin_convertvector(load_words(levels_ + i) * 2 + 1, vec);
            store(trial_ + i, log_fixed(odd * odd * unit));
        }
    }
    double worst = 0;
    for (int j = 0; j < layout_.n_t; ++j) {
        const double kl = entry_kl(j, unit) + tail_kl_[j];
        worst = kl > worst ? kl : worst;
    }
    return worst;
}

// At a temperature other than that of the draws a drawn entry's target is a power of its p, which takes a relative precision
// whatever p is. Drawn at 1 and used at 1, p cancels from its weight.
double RowEncoder::coarsest() const {
    if (!layout_.samples || layout_.n_t == 1) return 1;
    double rarest = 1;
    for (std::int64_t i = 0; i < n_; ++i)
        if (draws_[i] && root_[i] < rarest) rarest = root_[i];
    return kDrawnLevel / rarest;
}

float RowEncoder::quantise(double max_kl, int values_bits) {
    if (!n_) return 0.0f;
    double kl = 0;
    if (values_bits) {
        float top = 0;
        for (std::int64_t i = 0; i < n_; ++i) top = root_[i] > top ? root_[i] : top;
        const auto levels = static_cast<float>(1 << values_bits);
        kl = kl_at(levels / top, levels - 1);
    } else {
        exact_ = !search(max_kl - rounding(max_kl, largest_log_z_), kl);
    }
    return exact_ || !(kl > 0) ? 0.0f : static_cast<float>(kl);
}

// The coarsest levels with a KL of at most `limit` at every temperature; false when there are none.
bool RowEncoder::search(double limit, double& kl) {
    constexpr double most = codec::kMaxLevel + 1;
    const double least = coarsest();
    double tails = 0;  // no levels mend a tail
    for (int j = 0; j < layout_.n_t; ++j) tails = std::fmax(tails, tail_kl_[j]);
    if (!(tails <= limit) || !(least < most)) return false;
    // A uniform error of one level in sqrt(p) costs about 1 / (6 levels^2) an entry: KL falls as levels^-2, with noise.
    double levels = std::sqrt((static_cast<double>(n_) + 1) / (6 * limit)), good = most;
    for (int trial = 0; trial < kTrials; ++trial) {
        levels = levels < least ? least : levels < most ? levels : most;
        kl = kl_at(static_cast<float>(levels), static_cast<float>(codec::kMaxLevel));
        if (kl <= limit && levels <= good) good = levels;
        if (kl <= limit && (kl >= 0.85 * limit || levels == least)) return true;
        const double step = std::sqrt(kl / (0.95 * limit));
        levels *= step < 0.5 ? 0.5 : step < 8 ? step : 8;
    }
    for (levels = good < most ? good : levels;; levels = levels * 1.09 < most ? levels * 1.09 : most) {
        kl = kl_at(static_cast<float>(levels), static_cast<float>(codec::kMaxLevel));
        if (kl <= limit) return true;
        if (!(levels < most)) return false;
    }
}

void RowEncoder::write_ids(Bytes& out) const {
    const unsigned l = low_width(layout_.vocab, n_);
    pack(reinterpret_cast<const std::uint32_t*>(ids_), n_, l, out);
    const std::size_t bytes = packed_bytes(static_cast<std::size_t>(n_ + ((layout_.vocab - 1) >> l)), 1);
    std::memset(out, 0, bytes + 8);
    std::uint64_t word = 0;  // of the 64 places at 64 * `at`; places rise
    std::int64_t at = 0;
    for (std::int64_t i = 0; i < n_; ++i) {
        const std::int64_t place = (ids_[i] >> l) + i;
        if (place >> 6 != at) {
            std::memcpy(out + 8 * at, &word, sizeof(word));
            word = 0;
            at = place >> 6;
        }
        word |= 1ull << (place & 63);
    }
    std::memcpy(out + 8 * at, &word, sizeof(word));
    out += bytes;
}

void RowEncoder::write_blocks(Bytes& out, const std::uint32_t* values) const {
    for (std::int64_t start = 0; start < n_; start += codec::kBlock, values += codec::kBlock) {
        const std::int64_t n = n_ - start < codec::kBlock ? n_ - start : codec::kBlock;
        std::int32_t longer_than[16] = {};  // how many values take more bits than the index
        const unsigned longest = count_lengths(values, n, longer_than);
        unsigned width = longest, patches = 0;
        std::size_t least = packed_bytes(static_cast<std::size_t>(n), longest);
        for (unsigned w = longest; w-- > 0;) {
            const auto longer = static_cast<unsigned>(longer_than[w]);
            if (longer > codec::kMaxPatches) break;
            const std::size_t patch_bytes = packed_bytes(longer, longest - w + codec::kPlaceBits);
            const std::size_t bytes = packed_bytes(static_cast<std::size_t>(n), w) + patch_bytes;
            if (bytes < least) {
                least = bytes;
                width = w;
                patches = longer;
            }
        }
        const unsigned more = patches ? longest - width : 0;
        put(out, static_cast<std::uint16_t>(width | more << 5 | patches << 10));
        pack(values, n, width, out);
        std::uint32_t* patch = patches_;
        for (std::int64_t i = 0; patches && i < n; i += W) {
            const ivec place = lane_numbers() + static_cast<int>(i), value = load_words(values + i);
            const ivec high = (ivec)((uvec)value >> width);
            patch += keep_where((high != 0) & (place < static_cast<int>(n)), place | high << codec::kPlaceBits, patch);
        }
        pack(patches_, patches, more + codec::kPlaceBits, out);
    }
}

void RowEncoder::write_exact(Bytes& out) const {
    const auto n = static_cast<std::size_t>(n_), n_t = static_cast<std::size_t>(layout_.n_t);
    std::memcpy(out, logp_, n * 4);
    std::memcpy(out + n * 4, log_z_, n_t * 4);
    std::memcpy(out + (n + n_t) * 4, log_tail_, n_t * 4);
    out += (n + 2 * n_t) * 4;
}

void RowEncoder::write(Bytes& out, unsigned count_width) const {
    const std::uint32_t count = static_cast<std::uint32_t>(n_);
    std::memcpy(out, &count, 4);
    out += count_width;
    for (int j = 0; j < layout_.n_t; ++j) put(out, exact_ ? static_cast<std::uint16_t>(codec::kTailAll) : codes()[j]);
    if (!n_) return;
    write_ids(out);
    if (exact_)
        write_exact(out);
    else
        write_blocks(out, levels_);
    if (layout_.samples) write_blocks(out, draws_);
}

}  // namespace

codec::Status codec_encode(const Layout& layout, const RowsIn& row, const codec::EncodeOptions& options, std::uint8_t*& out,
                           codec::Coded& coded, std::uint32_t* scratch) {
    RowEncoder encoder(layout, scratch);
    const Status status = encoder.read(row);
    if (status != codec::kOk) return status;
    coded.kl = encoder.quantise(options.max_kl, options.values_bits);
    coded.exact = encoder.exact();
    encoder.write(out, options.count_width);
    return codec::kOk;
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
