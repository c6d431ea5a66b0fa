// Decodes damaged rows and records under the address and undefined-behaviour sanitizers: `python -m tests.fuzz.codec`.
// Buffers have exactly the size they need, checksums are made to fit, and every instruction set has to say the same. With
// KDFAST_LIBFUZZER it is a libFuzzer target; without, a program that mutates on its own, or writes seeds for the target.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "checksum.h"
#include "codec_record.h"

namespace kdfast {

Isa chosen = Isa::baseline;
Isa isa() { return chosen; }

namespace {

using codec::Layout;
using Bytes = std::vector<std::uint8_t>;
using Random = std::mt19937_64;

std::uint64_t below(Random& random, std::uint64_t n) { return random() % n; }

// The first bytes of an input; a record follows them or, without its sections, its rows.
struct Choice {
    std::uint8_t vocab, temperatures;
    std::uint16_t k;
    std::uint8_t kind, column, samples, room;
    std::uint8_t bits;    // kRows and on
    std::uint8_t tokens;  // of kRows; a record says it itself
};
enum : unsigned { kRows = 1, kCounts = 2, kPart = 4, kNext = 8, kContexts = 16 };
constexpr std::size_t kChoiceBytes = 10;
static_assert(sizeof(Choice) == kChoiceBytes, "a choice is read as it lies in memory");

struct Case {
    Choice choice;
    std::vector<double> temperatures;
    Layout layout;
    const std::uint8_t* data;
    std::size_t size;
};

Case case_of(const std::uint8_t* input, std::size_t size) {
    static const std::int64_t vocabularies[] = {1, 2, 50, 1000, 151936, 1 << 24};
    static const std::vector<double> temperatures[] = {{1.0}, {0.5, 1.0, 2.0}, {4.0, 1.0}};
    Case c;
    std::memcpy(&c.choice, input, kChoiceBytes);
    const std::int64_t vocab = vocabularies[c.choice.vocab % 6], k = 1 + c.choice.k % std::min<std::int64_t>(vocab, 400);
    c.temperatures = temperatures[c.choice.temperatures % 3];
    const int n_t = static_cast<int>(c.temperatures.size()), one = n_t / 2;
    c.layout = {k, vocab, n_t, one, c.temperatures.data(), 0, false, one};
    if (c.choice.kind % 3) {
        c.layout.mixed = k > 1 && c.choice.kind % 3 == 2;
        c.layout.samples = static_cast<int>(k) + c.choice.samples;
        c.layout.sample_column = c.choice.column % n_t;
    }
    c.data = input + kChoiceBytes;
    c.size = size - kChoiceBytes;
    return c;
}

// One row of a made-up teacher, through the encoder.
void append_row(Random& random, const Layout& layout, unsigned width, Bytes& out) {
    const auto k = static_cast<std::size_t>(layout.k);
    std::vector<std::int32_t> ids(k, -1), draws(k, 1);
    std::vector<float> logp(k, -HUGE_VALF), log_z(static_cast<std::size_t>(layout.n_t)), log_tail(log_z.size());
    const std::size_t n = width ? below(random, k + 1) : k;
    const std::int64_t step = n ? layout.vocab / static_cast<std::int64_t>(n) : 1;
    std::vector<double> p(n);
    double sum = 0.01;
    for (auto& x : p) sum += x = std::exp(-8.0 * static_cast<double>(below(random, 1000)) / 1000);
    for (std::size_t i = 0; i < n; ++i) {
        const auto jitter = static_cast<std::int64_t>(below(random, static_cast<std::uint64_t>(step)));
        ids[i] = static_cast<std::int32_t>(static_cast<std::int64_t>(i) * step + jitter);
        logp[i] = static_cast<float>(std::log(p[i] / sum));
    }
    const std::size_t exact = layout.mixed && n ? below(random, n) : 0;  // one is drawn at least
    std::fill_n(draws.begin(), exact, 0);
    if (n > exact) draws[exact] = layout.samples - static_cast<int>(n - exact) + 1;
    for (std::size_t j = 0; j < log_z.size(); ++j) {
        double z = std::pow(0.01 / sum, 1 / layout.temperatures[j]), tail = z;
        for (double x : p) z += std::pow(x / sum, 1 / layout.temperatures[j]);
        log_z[j] = static_cast<float>(std::log(z));
        log_tail[j] = n ? static_cast<float>(std::log(tail / z)) : 0.0f;
    }
    auto scratch = codec::scratch_for(layout);
    const double max_kl = below(random, 4) ? 5e-5 : 1e-12;  // some rows are exact
    Bytes bytes(codec::row_bytes(k, layout.n_t));
    std::uint8_t* end = bytes.data();
    codec::Coded coded;
    const codec::RowsIn row{ids.data(), logp.data(), log_z.data(), log_tail.data(), draws.data()};
    const codec::Status status = KDFAST_CALL(codec_encode, layout, row, codec::EncodeOptions{max_kl, 0, width}, end, coded,
                                             codec::aligned(scratch));
    if (status != codec::kOk) {
        std::fprintf(stderr, "the encoder refused a sound row: %d\n", status);
        std::abort();
    }
    out.insert(out.end(), bytes.data(), end);
}

template <typename T>
void append(Bytes& out, const T& value) {
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(&value);
    out.insert(out.end(), bytes, bytes + sizeof(T));
}

// A choice and what it promises, from the encoder: most of few entries and tokens, some of hundreds.
Bytes sound_input(Random& random) {
    const auto byte = [&] { return static_cast<std::uint8_t>(random()); };
    const auto tokens = static_cast<std::uint8_t>(1 + below(random, 12)), bits = byte();
    const auto k = static_cast<std::uint16_t>(below(random, std::uint64_t{4} << below(random, 8)));
    Bytes out;
    const auto samples = static_cast<std::uint8_t>(below(random, 20));
    append(out, Choice{byte(), byte(), k, byte(), byte(), samples, 0, bits, tokens});
    const Case c = case_of(out.data(), out.size());
    if (!(bits & kRows)) {
        const bool mask = below(random, 2), labels = below(random, 2), context = below(random, 3) == 0;
        const std::uint32_t lengths[2] = {tokens, context ? 1 + static_cast<std::uint32_t>(below(random, 9)) : 0};
        const bool counts = bits & kCounts;
        for (int x : {mask | labels << 1 | context << 2 | counts << 3, 2, labels ? 3 : 0, context ? 4 : 0})
            out.push_back(static_cast<std::uint8_t>(x));
        append(out, lengths);
        const std::uint32_t sections = tokens * 2u + (mask ? (tokens + 7u) / 8 : 0) + (labels ? 3u * tokens : 0) + 4 * lengths[1];
        for (std::uint32_t i = 0; i < sections; ++i) out.push_back(byte());
    }
    const unsigned width = bits & kCounts ? codec::count_width_for(c.layout.k) : 0;
    for (int t = 0; t < tokens; ++t) append_row(random, c.layout, width, out);
    return out;
}

void damage(Random& random, Bytes& bytes) {
    for (std::uint64_t n = below(random, 6); n-- > 0 && !bytes.empty();) {
        const std::size_t at = below(random, bytes.size());
        switch (below(random, 6)) {
            case 0: bytes[at] ^= static_cast<std::uint8_t>(1 << below(random, 8)); break;
            case 1: bytes[at] = static_cast<std::uint8_t>(random()); break;
            case 2: bytes[at] = below(random, 2) ? 0xff : 0; break;
            case 3: bytes.resize(at); break;
            case 4: bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at), static_cast<std::uint8_t>(random())); break;
            default: {
                const std::size_t from = below(random, bytes.size()), length = below(random, 40);
                const std::size_t last = bytes.size() - std::max(at, from);
                for (std::size_t i = 0; i < length && i < last; ++i) bytes[at + i] = bytes[from + i];
            }
        }
    }
}

// Rows of a batch without a byte to spare.
struct Buffers {
    template <typename T>
    using Array = std::unique_ptr<T[]>;
    std::size_t rows, k, n_t, contexts;
    Array<std::int32_t> ids{new std::int32_t[rows * k]};
    Array<float> logp{new float[rows * k]}, weights{new float[rows * k]}, log_z{new float[rows * n_t]},
        log_tail{new float[rows * n_t]};
    Array<std::int64_t> input{new std::int64_t[rows]}, labels{new std::int64_t[rows]}, context{new std::int64_t[contexts]};
    Array<std::uint8_t> mask{new std::uint8_t[rows]}, attention{new std::uint8_t[rows]}, there{new std::uint8_t[contexts]};

    codec::RowsOut out() const { return {ids.get(), logp.get(), log_z.get(), log_tail.get(), weights.get()}; }
};

// The least a row may say, whatever its bytes were.
void check(const Layout& layout, const Buffers& found) {
    for (std::size_t i = 0; i < found.rows * found.k; ++i) {
        const bool sound = found.ids[i] >= -1 && found.ids[i] < layout.vocab && !std::isnan(found.logp[i]) &&
                           found.logp[i] <= 1e-3f &&
                           (!layout.samples || !(std::isnan(found.weights[i]) || found.weights[i] < 0));
        if (sound) continue;
        std::fprintf(stderr, "row %zu, entry %zu: id %d, log-probability %g\n", i / found.k, i % found.k, found.ids[i],
                     static_cast<double>(found.logp[i]));
        std::abort();
    }
}

bool same(const Layout& layout, const Buffers& a, const Buffers& b, bool record) {
    const auto equal = [](const auto& x, const auto& y, std::size_t n) { return !std::memcmp(&x[0], &y[0], n * sizeof(x[0])); };
    const std::size_t entries = a.rows * a.k, columns = a.rows * a.n_t;
    const bool rows = equal(a.ids, b.ids, entries) && equal(a.logp, b.logp, entries) && equal(a.log_z, b.log_z, columns) &&
                      equal(a.log_tail, b.log_tail, columns) && (!layout.samples || equal(a.weights, b.weights, entries));
    return rows && (!record || (equal(a.input, b.input, a.rows) && equal(a.labels, b.labels, a.rows) &&
                                equal(a.mask, b.mask, a.rows) && equal(a.attention, b.attention, a.rows)));
}

bool poisoned(const Buffers& found, std::size_t row) {
    bool nan = true;
    for (std::size_t i = row * found.k; i < (row + 1) * found.k; ++i) nan = nan && found.ids[i] == 0 && std::isnan(found.logp[i]);
    return nan;
}

// Index and decoder of indexed rows: the rows that `whole` has, or a refusal, or NaN where the decoder of records refused.
void compare_indexed(const Case& c, const codec::Job& job, const codec::BatchOut& out, const codec::BatchResult& result,
                     const Buffers& whole) {
    const auto data = std::unique_ptr<std::uint8_t[]>(new std::uint8_t[c.size + codec::kSlack]);
    const auto offsets = std::unique_ptr<std::int64_t[]>(new std::int64_t[whole.rows]);
    const auto counts = std::unique_ptr<std::int32_t[]>(new std::int32_t[whole.rows]);
    const codec::IndexOut index{data.get(), offsets.get(), counts.get()};
    const auto indexed = codec::index_batch(c.layout, &job, 1, c.choice.bits & kNext, out, index, 1);
    const auto wrong = [&](const char* what) {
        std::fprintf(stderr, "index and decoder disagree: %s (%d at %lld, %d at %lld)\n", what, indexed.status,
                     static_cast<long long>(indexed.token), result.status, static_cast<long long>(result.token));
        std::abort();
    };
    if (indexed.status != codec::kOk) {
        if (result.status == codec::kOk) wrong("only the index refuses");
        return;
    }
    const Buffers found{whole.rows, whole.k, whole.n_t, whole.contexts};
    codec::decode_indexed(c.layout, {data.get(), c.size, offsets.get(), counts.get()}, job.room, found.out(), 1);
    if (result.status == codec::kOk) {
        if (!same(c.layout, found, whole, false)) wrong("other floats");
    } else if (!poisoned(found, static_cast<std::size_t>(result.token))) {
        wrong("a refused row is not NaN");
    }
}

codec::Status decode(const Case& c, const std::uint8_t* data, const Buffers& to, std::int64_t tokens, std::int64_t contexts) {
    const unsigned bits = c.choice.bits;
    if (bits & kRows) {
        auto scratch = codec::scratch_for(c.layout);
        const unsigned width = bits & kCounts ? codec::count_width_for(c.layout.k) : 0;
        return codec::decode_rows(c.layout, data, c.size, width, tokens, to.out(), !(bits & kPart), scratch).status;
    }
    const codec::Job job{static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(data)), static_cast<std::int64_t>(c.size),
                         tokens, contexts, static_cast<std::int64_t>(xxh64(data, c.size)), 0,
                         static_cast<std::int64_t>(to.rows), 0};
    std::int64_t* context = bits & kContexts ? to.context.get() : nullptr;
    const codec::BatchOut out{to.out(), to.input.get(), to.labels.get(), to.mask.get(), to.attention.get(), context,
                              to.there.get(), static_cast<std::int64_t>(to.contexts)};
    const auto result = codec::decode_batch(c.layout, &job, 1, bits & kNext, out, 1);
    compare_indexed(c, job, out, result, to);
    return result.status;
}

std::vector<Isa> instruction_sets() {
    std::vector<Isa> known{Isa::baseline};
#if KDFAST_X86
    if (__builtin_cpu_supports("avx2")) known.push_back(Isa::avx2);
    if (__builtin_cpu_supports("avx512bw")) known.push_back(Isa::avx512);
#endif
    return known;
}

// Decodes an input with every instruction set; false when it is refused.
bool try_input(const std::uint8_t* input, std::size_t size) {
    static const std::vector<Isa> known = instruction_sets();
    if (size < kChoiceBytes) return false;
    const Case c = case_of(input, size);
    const bool record = !(c.choice.bits & kRows);
    std::uint32_t lengths[2] = {c.choice.tokens, 0};
    if (record && c.size >= 12) std::memcpy(lengths, c.data + 4, sizeof(lengths));
    // What the index would say; a record that says more than fits here contradicts it.
    const auto tokens = std::min<std::uint32_t>(lengths[0], 64), contexts = std::min<std::uint32_t>(lengths[1], 64);
    const std::size_t rows = record && c.choice.room ? c.choice.room % 64 : tokens;
    const auto data = std::unique_ptr<std::uint8_t[]>(new std::uint8_t[c.size]);
    if (c.size) std::memcpy(data.get(), c.data, c.size);
    std::vector<Buffers> found;
    std::vector<codec::Status> statuses;
    for (Isa one : known) {
        chosen = one;
        const auto k = static_cast<std::size_t>(c.layout.k), n_t = static_cast<std::size_t>(c.layout.n_t);
        found.push_back(Buffers{rows, k, n_t, static_cast<std::size_t>(contexts)});
        statuses.push_back(decode(c, data.get(), found.back(), tokens, contexts));
        const bool agree = statuses.back() == statuses.front() &&
                           (statuses.back() != codec::kOk || same(c.layout, found.front(), found.back(), record));
        if (!agree) {
            std::fprintf(stderr, "instruction set %d: status %d, the first one's %d\n", static_cast<int>(one),
                         statuses.back(), statuses.front());
            std::abort();
        }
    }
    if (statuses.front() == codec::kOk) check(c.layout, found.front());
    return statuses.front() == codec::kOk;
}

}  // namespace
}  // namespace kdfast

#ifdef KDFAST_LIBFUZZER
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    kdfast::try_input(data, size);
    return 0;
}
#else
namespace {

int write_seeds(const std::string& folder, int count) {
    kdfast::Random random(0);
    for (int i = 0; i < count; ++i) {
        const kdfast::Bytes input = kdfast::sound_input(random);
        std::FILE* file = std::fopen((folder + "/seed-" + std::to_string(i)).c_str(), "wb");
        if (!file || std::fwrite(input.data(), 1, input.size(), file) != input.size() || std::fclose(file)) return 1;
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    using namespace kdfast;
    if (argc == 4 && std::string(argv[1]) == "seeds") return write_seeds(argv[2], std::atoi(argv[3]));
    const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
    Random random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    unsigned long long inputs = 0, decoded = 0;
    while (std::chrono::steady_clock::now() < end) {
        const Bytes sound = sound_input(random);
        if (!try_input(sound.data(), sound.size())) {
            std::fprintf(stderr, "a sound input was refused\n");
            return 1;
        }
        for (int i = 0; i < 200; ++i) {
            Bytes bad(sound.begin() + kChoiceBytes, sound.end());
            damage(random, bad);
            bad.insert(bad.begin(), sound.begin(), sound.begin() + kChoiceBytes);
            if (below(random, 4) == 0) bad[7] = static_cast<std::uint8_t>(random());  // room
            decoded += try_input(bad.data(), bad.size());
            ++inputs;
        }
    }
    std::printf("%llu damaged inputs, %llu of them decoded, none read or wrote where it must not\n", inputs, decoded);
}
#endif
