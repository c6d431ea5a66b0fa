#include <algorithm>
#include <limits>

#include "codec_math.h"

namespace kdfast {
namespace KDFAST_ISA {
namespace {

using codec::Cursor;
using codec::Layout;
using codec::RowsOut;
using codec::Status;

#if !defined(__AVX512F__)
// For every byte, the places of its set bits, one a byte.
struct Places {
    std::uint64_t of[256];
    constexpr Places() : of() {
        for (unsigned byte = 0; byte < 256; ++byte) {
            unsigned n = 0;
            for (unsigned bit = 0; bit < 8; ++bit)
                if (byte >> bit & 1) of[byte] |= static_cast<std::uint64_t>(bit) << 8 * n++;
        }
    }
};
constexpr Places kPlaces;

typedef std::uint8_t bytes8 __attribute__((vector_size(8)));
typedef std::int32_t words8 __attribute__((vector_size(32)));
#endif

// Places of the set bits; returns how many. Writes up to a vector too many.
std::int64_t select(const std::uint8_t* data, std::size_t bytes, std::uint32_t* places) {
    std::uint32_t* at = places;
#if defined(__AVX512F__)
    __m512i place = (__m512i)lane_numbers();
    for (std::size_t i = 0; i < bytes; i += 2, place = _mm512_add_epi32(place, _mm512_set1_epi32(16))) {
        std::uint16_t bits;
        std::memcpy(&bits, data + i, 2);
        if (i + 1 == bytes) bits &= 0xff;
        _mm512_storeu_si512(at, _mm512_maskz_compress_epi32(bits, place));
        at += __builtin_popcount(bits);
    }
#else
    for (std::size_t i = 0; i < bytes; ++i) {
        const words8 x = __builtin_convertvector(bits_as<bytes8>(kPlaces.of[data[i]]), words8) + static_cast<int>(8 * i);
        std::memcpy(at, &x, sizeof(x));
        at += __builtin_popcount(data[i]);
    }
#endif
    return at - places;
}

// The first `count` words of whole vectors.
template <typename T>
void copy_words(T* to, const T* from, std::int64_t count) {
    std::int64_t i = 0;
    for (; i + W <= count; i += W) store_words(to + i, load_words(from + i));
    for (; i < count; ++i) to[i] = from[i];
}

class RowDecoder {
  public:
    // late: logprobs receive probabilities (0 for an empty slot), whose logs the caller takes for many rows at once.
    RowDecoder(const Layout& layout, Cursor& in, std::uint32_t* scratch, bool late)
        : layout_(layout), in_(in), late_(late), words_(static_cast<std::size_t>(layout.k) + 128), places_(scratch),
          low_(scratch + 4 * words_), levels_(low_ + words_), draws_(levels_ + words_), patches_(draws_ + words_),
          p_(reinterpret_cast<float*>(patches_ + words_)), spare_logp_(p_ + words_),
          spare_ids_(reinterpret_cast<std::int32_t*>(spare_logp_ + words_)) {}

    Status row(std::int64_t count, const RowsOut& out);
    // Values of the last row if it was stored exactly, else null. Its log_tail, and late its logprobs, are for the caller to
    // copy from there when it has taken the other rows' logs.
    const std::uint8_t* exact() const { return exact_; }

  private:
    Status read_tails(bool empty, const RowsOut& out);
    Status read_exact(std::int64_t count);
    float exact_value(std::int64_t i) const {
        float x;
        std::memcpy(&x, exact_ + 4 * i, sizeof(x));
        return x;
    }
    double tail(std::int64_t count, int column) const;
    Status read_ids(std::int64_t count);
    Status read_blocks(std::int64_t count, std::uint32_t* out);
    bool apply_patches(unsigned patches, unsigned width, std::int64_t n, std::uint32_t* out);
    void probabilities(std::int64_t count);
    float log_z(std::int64_t count, int column);
    Status weights(std::int64_t count, const RowsOut& out);
    unsigned tail_code(int column) const {
        std::uint16_t code;
        std::memcpy(&code, in_.data + tails_at_ + 2 * static_cast<std::size_t>(column), 2);
        return code;
    }
    bool lacks(std::size_t bytes) const { return bytes > in_.size - in_.pos; }

    const Layout& layout_;
    Cursor& in_;
    const bool late_;
    std::size_t words_, tails_at_ = 0;
    const std::uint8_t* exact_ = nullptr;
    std::uint32_t *places_, *low_, *levels_, *draws_, *patches_;
    float *p_, *spare_logp_, *logp_ = nullptr;
    std::int32_t *spare_ids_, *ids_ = nullptr;
    std::int64_t last_count_ = 0;
    unsigned low_width_ = 0;
};

Status RowDecoder::read_tails(bool empty, const RowsOut& out) {
    tails_at_ = in_.pos;
    if (lacks(2 * static_cast<std::size_t>(layout_.n_t))) return codec::kTruncated;
    int all = 0;
    for (int j = 0; j < layout_.n_t; ++j) {
        const unsigned code = tail_code(j);
        all += code == codec::kTailAll;
        out.log_tail[j] = static_cast<float>(tail_mass(code).tail);  // its log is taken for all rows at once
    }
    if (all != layout_.n_t && (all || empty)) return codec::kBadTail;
    exact_ = all && !empty ? in_.data : nullptr;  // where its values are is known behind its ids
    in_.pos += 2 * static_cast<std::size_t>(layout_.n_t);
    return codec::kOk;
}

Status RowDecoder::read_ids(std::int64_t count) {
    if (count != last_count_) {
        last_count_ = count;
        low_width_ = low_width(layout_.vocab, count);
    }
    const unsigned l = low_width_;
    const std::size_t low_bytes = packed_bytes(static_cast<std::size_t>(count), l);
    const std::size_t high_bytes = packed_bytes(static_cast<std::size_t>(count + ((layout_.vocab - 1) >> l)), 1);
    if (lacks(low_bytes + high_bytes)) return codec::kTruncated;
    unpack(in_.data + in_.pos, l, count, low_);
    if (select(in_.data + in_.pos + low_bytes, high_bytes, places_) != count) return codec::kBadId;
    in_.pos += low_bytes + high_bytes;
    ivec previous = ivec{} - 1, wrong = {};
    for (std::int64_t i = 0; i < count; i += W) {
        const ivec n = lane_numbers() + static_cast<int>(i);
        const ivec id = ((load_words(places_ + i) - n) << static_cast<int>(l)) | load_words(low_ + i);
        wrong |= (id <= after(previous, id)) & (n < static_cast<int>(count));
        store_words(ids_ + i, id);
        previous = id;
    }
    return any(wrong) || ids_[count - 1] >= layout_.vocab ? codec::kBadId : codec::kOk;
}

// Places have to rise and stay below n. Eight at a time: the number of patches would be guessed wrong too often.
bool RowDecoder::apply_patches(unsigned patches, unsigned width, std::int64_t n, std::uint32_t* out) {
    constexpr unsigned together = 8;
    std::memset(patches_ + patches, 0, together * 4);
    for (unsigned j = 0; j < patches; j += together)
        for (unsigned l = 0; l < together; ++l)
            out[patches_[j + l] & (codec::kBlock - 1)] |= patches_[j + l] >> codec::kPlaceBits << width;
    ivec previous = ivec{} - 1, wrong = {};
    for (unsigned j = 0; j < patches; j += W) {
        const ivec place = load_words(patches_ + j) & (codec::kBlock - 1);
        const ivec there = lane_numbers() + static_cast<int>(j) < static_cast<int>(patches);
        wrong |= ((place <= after(previous, place)) | (place >= static_cast<int>(n))) & there;
        previous = place;
    }
    return !any(wrong);
}

Status RowDecoder::read_blocks(std::int64_t count, std::uint32_t* out) {
    for (std::int64_t i = 0; i < count; i += codec::kBlock, out += codec::kBlock) {
        const std::int64_t n = count - i < codec::kBlock ? count - i : codec::kBlock;
        if (lacks(2)) return codec::kTruncated;
        std::uint16_t head;
        std::memcpy(&head, in_.data + in_.pos, 2);
        const unsigned width = head & 31, more = head >> 5 & 31, patches = head >> 10;
        if (width + more > 16 || !patches != !more) return codec::kBadCode;
        const std::size_t bytes = packed_bytes(static_cast<std::size_t>(n), width);
        const std::size_t patch_bytes = packed_bytes(patches, more + codec::kPlaceBits);
        if (lacks(2 + bytes + patch_bytes)) return codec::kTruncated;
        const std::uint8_t* data = in_.data + in_.pos + 2;
        in_.pos += 2 + bytes + patch_bytes;
        unpack(data, width, n, out);
        if (!patches) continue;
        unpack(data + bytes, more + codec::kPlaceBits, patches, patches_);
        if (!apply_patches(patches, width, n, out)) return codec::kBadCode;
    }
    return codec::kOk;
}

// p_ and logp_ of a row that was stored exactly; whether its values are log-probabilities.
Status RowDecoder::read_exact(std::int64_t count) {
    const std::size_t bytes = codec::exact_bytes(static_cast<std::size_t>(count), layout_.n_t);
    if (lacks(bytes)) return codec::kTruncated;
    exact_ = in_.data + in_.pos;
    in_.pos += bytes;
    ivec wrong = {};
    for (std::int64_t i = 0; i < count; i += W) {
        const ivec there = lane_numbers() + static_cast<int>(i) < static_cast<int>(count);
        vec logp = {};  // the slack behind the row holds a vector
        std::memcpy(&logp, exact_ + 4 * i, sizeof(logp));
        wrong |= there & (~(logp <= 1e-3f) | ~(logp > -kInf));
        logp = there ? logp : vec{};
        store(logp_ + i, logp);
        store(p_ + i, exp_fixed(logp));
    }
    bool good = !any(wrong);
    for (int j = 0; j < layout_.n_t; ++j)
        good &= std::fabs(exact_value(count + j)) < kInf && exact_value(count + layout_.n_t + j) <= 1e-3f;
    return good ? codec::kOk : codec::kBadCode;
}

// What is left at a temperature.
double RowDecoder::tail(std::int64_t count, int column) const {
    if (!exact_) return tail_mass(tail_code(column)).tail;
    const float log_tail = exact_value(count + layout_.n_t + column);
    return log_tail > -kInf ? static_cast<double>(exp_fixed(set(log_tail))[0]) : 0.0;
}

// p_ and logp_ of entries in proportion to (2 level + 1)^2; late: p in the place of logp_.
void RowDecoder::probabilities(std::int64_t count) {
    std::uint64_t sum = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        const std::uint32_t odd = 2 * levels_[i] + 1;
        sum += static_cast<std::uint64_t>(odd) * odd;
    }
    const vec unit = set(static_cast<float>(tail_mass(tail_code(layout_.one)).rest / static_cast<double>(sum)));
    for (std::int64_t i = 0; i < count; i += W) {
        const vec odd = __builtin_convertvector(load_words(levels_ + i) * 2 + 1, vec), p = odd * odd * unit;
        if (late_) {
            store(logp_ + i, p);
        } else {
            store(p_ + i, p);
            store(logp_ + i, log_fixed(p));
        }
    }
}

float RowDecoder::log_z(std::int64_t count, int column) {
    const vec inverse = set(static_cast<float>(1.0 / layout_.temperatures[column]));
    float top = logp_[0];
    for (std::int64_t i = 1; i < count; ++i) top = logp_[i] > top ? logp_[i] : top;
    Sum16 sum;
    for (std::int64_t i = 0; i < count; i += 16) {
        float powers[16];
        for (int j = 0; j < 16; j += W) {
            const ivec n = lane_numbers() + static_cast<int>(i) + j;
            store(powers + j, n < static_cast<int>(count) ? exp_fixed((load(logp_ + i + j) - top) * inverse) : vec{});
        }
        sum.add(powers);
    }
    const double scaled = sum.total() / tail_mass(tail_code(column)).rest;
    return top * inverse[0] + log_fixed(static_cast<float>(scaled));
}

// Drawn entries: draws / n * p / r with r their probability in the distribution that was drawn from; exact ones: p.
Status RowDecoder::weights(std::int64_t count, const RowsOut& out) {
    const int column = layout_.sample_column;
    const vec inverse = set(static_cast<float>(1.0 / layout_.temperatures[column])), z = set(out.log_z[column]);
    Sum16 sum;
    std::uint64_t draws = 0;
    bool exact = false;
    for (std::int64_t i = 0; i < count; i += 16) {
        float drawn[16] = {};
        for (std::int64_t j = 0; j < 16 && i + j < count; j += W) {
            const ivec n = lane_numbers() + static_cast<int>(i + j), c = load_words(draws_ + i + j);
            const vec r = exp_fixed(load(logp_ + i + j) * inverse - z);
            store(drawn + j, ((n < static_cast<int>(count)) & (c > 0)) ? r : vec{});
        }
        sum.add(drawn);
    }
    for (std::int64_t i = 0; i < count; ++i) {
        draws += draws_[i];
        exact |= draws_[i] == 0;
    }
    if (draws != static_cast<std::uint64_t>(layout_.samples) || (exact && !layout_.mixed)) return codec::kBadDraws;
    const vec from = set(layout_.mixed ? static_cast<float>(sum.total() + tail(count, column)) : 1.0f);
    for (std::int64_t i = 0; i < count; i += W) {
        const ivec c = load_words(draws_ + i);
        const vec logp = load(logp_ + i), share = __builtin_convertvector(c, vec) / static_cast<float>(layout_.samples);
        const vec drawn = share * from * exp_fixed(logp - (logp * inverse - z));
        store(p_ + i, c > 0 ? drawn : load(p_ + i));
    }
    copy_words(out.weights, p_, count);
    return codec::kOk;
}

Status RowDecoder::row(std::int64_t count, const RowsOut& out) {
    Status status = read_tails(count == 0, out);
    if (status != codec::kOk) return status;
    // Whole vectors go where they belong at once; others are worked on where more than them may be touched.
    const bool direct = count % 16 == 0;
    ids_ = direct ? out.ids : spare_ids_;
    logp_ = direct ? out.logprobs : spare_logp_;
    if (count) {
        if ((status = read_ids(count)) != codec::kOk) return status;
        if ((status = exact_ ? read_exact(count) : read_blocks(count, levels_)) != codec::kOk) return status;
        if (layout_.samples && (status = read_blocks(count, draws_)) != codec::kOk) return status;
        if (!exact_) probabilities(count);
    }
    for (int j = 0; j < layout_.n_t; ++j)
        out.log_z[j] = exact_ ? exact_value(count + j) : j == layout_.one || !count ? 0.0f : log_z(count, j);
    if (!direct) {
        copy_words(out.ids, ids_, count);
        copy_words(out.logprobs, logp_, count);
    }
    if (layout_.samples && count && (status = weights(count, out)) != codec::kOk) return status;
    for (std::int64_t i = count; i < layout_.k; ++i) {
        out.ids[i] = -1;
        out.logprobs[i] = late_ ? 0.0f : -kInf;
        if (layout_.samples) out.weights[i] = 0.0f;
    }
    return codec::kOk;
}

}  // namespace

namespace {

// Masses to their logs, in place. Two vectors at a time: a logarithm is one long chain of operations.
void take_logs(float* masses, std::int64_t count) {
    const auto log = [](vec mass) { return mass > set(0.0f) ? log_fixed(mass) : set(-kInf); };
    std::int64_t i = 0;
    for (; i + 2 * W <= count; i += 2 * W) {
        const vec first = log(load(masses + i)), second = log(load(masses + i + W));
        store(masses + i, first);
        store(masses + i + W, second);
    }
    for (; i + W <= count; i += W) store(masses + i, log(load(masses + i)));
    if (i < count) store_tail(masses + i, count - i, log(load_tail(masses + i, count - i, 1.0f)));
}

// Whether nothing but the rows themselves needs the logs of their entries.
bool takes_logs_late(const Layout& layout) { return layout.n_t == 1 && !layout.samples; }

RowsOut row_at(const Layout& layout, const RowsOut& out, std::int64_t t) {
    return {out.ids + t * layout.k, out.logprobs + t * layout.k, out.log_z + t * layout.n_t, out.log_tail + t * layout.n_t,
            layout.samples ? out.weights + t * layout.k : nullptr};
}

void fill(const Layout& layout, const RowsOut& row, std::int32_t id, float logprob, float rest) {
    std::fill_n(row.ids, layout.k, id);
    std::fill_n(row.logprobs, layout.k, logprob);
    std::fill_n(row.log_z, layout.n_t, rest);
    std::fill_n(row.log_tail, layout.n_t, rest);
    if (layout.samples) std::fill_n(row.weights, layout.k, rest);
}

// Values of exact rows to where the logs of masses were taken.
void copy_exact(const Layout& layout, const std::uint8_t* values, std::int64_t count, const RowsOut& row) {
    std::memcpy(row.logprobs, values, static_cast<std::size_t>(count) * 4);
    std::memcpy(row.log_tail, values + 4 * (count + layout.n_t), static_cast<std::size_t>(layout.n_t) * 4);
}

constexpr std::int64_t kTogether = 32;  // rows that are still in the cache when their logs are taken

// Where the values of exact rows are; null for the others.
struct Exact {
    const std::uint8_t* values[kTogether];
    std::int64_t counts[kTogether];
};

codec::Result decode_masses(const Layout& layout, Cursor& in, unsigned count_width, std::int64_t tokens, const RowsOut& out,
                            Exact& exact, std::uint32_t* scratch) {
    RowDecoder decoder(layout, in, scratch, takes_logs_late(layout));
    const std::size_t most = codec::row_bytes(static_cast<std::size_t>(layout.k), layout.n_t) + codec::kSlack;
    for (std::int64_t t = 0; t < tokens; ++t) {
        if (!in.slack && in.size - in.pos < most) return {codec::kMore, t};
        std::uint32_t count = static_cast<std::uint32_t>(layout.k);
        if (count_width) {
            if (count_width > in.size - in.pos) return {codec::kTruncated, t};
            count = 0;
            std::memcpy(&count, in.data + in.pos, count_width);
            if (count > layout.k) return {codec::kBadCount, t};
            in.pos += count_width;
        }
        const Status status = decoder.row(count, row_at(layout, out, t));
        if (status != codec::kOk) return {status, t};
        exact.values[t] = decoder.exact();
        exact.counts[t] = count;
    }
    return {codec::kOk, tokens};
}

}  // namespace

codec::Result codec_decode(const Layout& layout, Cursor& in, unsigned count_width, std::int64_t tokens, const RowsOut& out,
                           std::uint32_t* scratch) {
    codec::Result result{codec::kOk, 0};
    Exact exact;
    while (result.status == codec::kOk && result.token < tokens) {
        const std::int64_t start = result.token, n = tokens - start < kTogether ? tokens - start : kTogether;
        const RowsOut rows = row_at(layout, out, start);
        const codec::Result some = decode_masses(layout, in, count_width, n, rows, exact, scratch);
        take_logs(rows.log_tail, some.token * layout.n_t);
        if (takes_logs_late(layout)) take_logs(rows.logprobs, some.token * layout.k);
        for (std::int64_t t = 0; t < some.token; ++t)
            if (exact.values[t]) copy_exact(layout, exact.values[t], exact.counts[t], row_at(layout, rows, t));
        result = {some.status, start + some.token};
    }
    return result;
}

void codec_decode_indexed(const Layout& layout, const codec::Indexed& in, std::int64_t tokens, const RowsOut& out,
                          std::uint32_t* scratch) {
    Cursor cursor{in.data, in.size, 0, true};
    RowDecoder decoder(layout, cursor, scratch, false);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (std::int64_t t = 0; t < tokens; ++t) {
        const RowsOut row = row_at(layout, out, t);
        const std::int64_t count = in.counts[t], offset = in.offsets[t];
        if (count == 0) {
            fill(layout, row, -1, -kInf, 0.0f);
            continue;
        }
        const bool inside = count > 0 && count <= layout.k && offset >= 0 && offset <= static_cast<std::int64_t>(in.size);
        cursor.pos = inside ? static_cast<std::size_t>(offset) : 0;
        if (!inside || decoder.row(count, row) != codec::kOk) {
            fill(layout, row, 0, nan, nan);
            continue;
        }
        take_logs(row.log_tail, layout.n_t);
        if (decoder.exact()) copy_exact(layout, decoder.exact(), count, row);
    }
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
