// Decodes damaged records under the address and undefined-behaviour sanitizers: `python -m tests.fuzz.codec --seconds 600`.
// Buffers have exactly the size they need, checksums are made to fit, and the instruction sets take turns.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "checksum.h"
#include "codec_record.h"

namespace kdfast {

Isa chosen = Isa::baseline;
Isa isa() { return chosen; }

namespace {

using codec::Layout;
using Random = std::mt19937_64;

std::uint64_t below(Random& random, std::uint64_t n) { return random() % n; }

struct Case {
    std::vector<double> temperatures;
    Layout layout;
    std::int64_t tokens;
    std::vector<std::uint8_t> record;
};

template <typename T>
std::unique_ptr<T[]> exact(std::size_t n) {
    return std::unique_ptr<T[]>(new T[n]);
}

Layout random_layout(Random& random, std::vector<double>& temperatures) {
    static const std::int64_t vocabularies[] = {1, 2, 50, 1000, 151936, 1 << 24};
    const std::int64_t vocab = vocabularies[below(random, 6)];
    const std::int64_t most = vocab < 200 ? vocab : 200;
    temperatures = below(random, 2) ? std::vector<double>{1.0} : std::vector<double>{0.5, 1.0, 2.0};
    const int n_t = static_cast<int>(temperatures.size()), one = n_t / 2;
    Layout layout{1 + static_cast<std::int64_t>(below(random, most)), vocab, n_t, one, temperatures.data(), 0, false, one};
    if (below(random, 3) == 0) {
        layout.mixed = layout.k > 1 && below(random, 2);
        layout.samples = static_cast<int>(layout.k) + static_cast<int>(below(random, 20));
        layout.sample_column = static_cast<int>(below(random, static_cast<std::uint64_t>(n_t)));
    }
    return layout;
}

// One row of a made-up teacher, through the encoder.
void append_row(Random& random, const Layout& layout, unsigned width, std::vector<std::uint8_t>& out) {
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
    if (n) draws[0] = layout.samples - static_cast<int>(n) + 1;
    for (std::size_t j = 0; j < log_z.size(); ++j) {
        double z = std::pow(0.01 / sum, 1 / layout.temperatures[j]), tail = z;
        for (double x : p) z += std::pow(x / sum, 1 / layout.temperatures[j]);
        log_z[j] = static_cast<float>(std::log(z));
        log_tail[j] = n ? static_cast<float>(std::log(tail / z)) : 0.0f;
    }
    auto scratch = codec::scratch_for(layout);
    std::vector<std::uint8_t> bytes(codec::row_bytes(k, layout.n_t));
    std::uint8_t* end = bytes.data();
    std::uint32_t count;
    float kl;
    const codec::RowsIn row{ids.data(), logp.data(), log_z.data(), log_tail.data(), draws.data()};
    const codec::Status status = KDFAST_CALL(codec_encode, layout, row, codec::EncodeOptions{5e-5, 0, width}, end, count, kl,
                                             codec::aligned(scratch));
    if (status != codec::kOk) {
        std::fprintf(stderr, "the encoder refused a sound row: %d\n", status);
        std::abort();
    }
    out.insert(out.end(), bytes.data(), end);
}

Case random_case(Random& random) {
    Case made;
    made.layout = random_layout(random, made.temperatures);
    made.tokens = 1 + static_cast<std::int64_t>(below(random, 12));
    const bool counts = below(random, 2), mask = below(random, 2), labels = below(random, 2);
    auto& out = made.record;
    out = {static_cast<std::uint8_t>(mask | labels << 1 | counts << 3), 2, static_cast<std::uint8_t>(labels ? 3 : 0), 0};
    const std::uint32_t lengths[2] = {static_cast<std::uint32_t>(made.tokens), 0};
    out.insert(out.end(), reinterpret_cast<const std::uint8_t*>(lengths), reinterpret_cast<const std::uint8_t*>(lengths + 2));
    const std::int64_t sections = made.tokens * 2 + (mask ? (made.tokens + 7) / 8 : 0) + (labels ? 3 * made.tokens : 0);
    for (std::int64_t i = 0; i < sections; ++i) out.push_back(static_cast<std::uint8_t>(random()));
    const unsigned width = counts ? codec::count_width_for(made.layout.k) : 0;
    for (std::int64_t t = 0; t < made.tokens; ++t) append_row(random, made.layout, width, out);
    return made;
}

void damage(Random& random, std::vector<std::uint8_t>& bytes) {
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

// What the decoder of whole records says of one, and the rows it wrote where it accepts it.
struct Verdict {
    codec::BatchResult result;
    const codec::RowsOut& rows;
};

bool poisoned(const Layout& layout, const codec::RowsOut& rows, std::size_t row) {
    bool found = true;
    for (std::size_t i = row * static_cast<std::size_t>(layout.k); i < (row + 1) * static_cast<std::size_t>(layout.k); ++i)
        found = found && rows.ids[i] == 0 && std::isnan(rows.logprobs[i]);
    return found;
}

// Index and decoder of indexed rows, without a byte to spare: the same rows, or a refusal, or NaN where the other refused.
void compare_indexed(const Case& c, const codec::Job& job, const codec::BatchOut& out, const Verdict& whole) {
    const auto rows = static_cast<std::size_t>(job.room), k = static_cast<std::size_t>(c.layout.k);
    const auto n_t = static_cast<std::size_t>(c.layout.n_t), size = c.record.size();
    auto data = exact<std::uint8_t>(size + codec::kSlack);
    auto offsets = exact<std::int64_t>(rows);
    auto counts = exact<std::int32_t>(rows);
    const codec::IndexOut index{data.get(), offsets.get(), counts.get()};
    const auto indexed = codec::index_batch(c.layout, &job, 1, true, out, index, 1);
    const auto wrong = [&](const char* what) {
        std::fprintf(stderr, "index and decoder disagree: %s (%d at %lld, %d at %lld)\n", what, indexed.status,
                     static_cast<long long>(indexed.token), whole.result.status, static_cast<long long>(whole.result.token));
        std::abort();
    };
    if (indexed.status != codec::kOk) {
        if (whole.result.status == codec::kOk) wrong("only the index refuses");
        return;
    }
    auto ids = exact<std::int32_t>(rows * k);
    auto logp = exact<float>(rows * k), weights = exact<float>(rows * k), log_z = exact<float>(rows * n_t),
         log_tail = exact<float>(rows * n_t);
    const codec::RowsOut found{ids.get(), logp.get(), log_z.get(), log_tail.get(), weights.get()};
    codec::decode_indexed(c.layout, {data.get(), size, offsets.get(), counts.get()}, job.room, found, 1);
    if (whole.result.status != codec::kOk) {
        if (!poisoned(c.layout, found, static_cast<std::size_t>(whole.result.token))) wrong("a refused row is not NaN");
        return;
    }
    const bool same = !std::memcmp(ids.get(), whole.rows.ids, rows * k * 4) &&
                      !std::memcmp(logp.get(), whole.rows.logprobs, rows * k * 4) &&
                      !std::memcmp(log_z.get(), whole.rows.log_z, rows * n_t * 4) &&
                      !std::memcmp(log_tail.get(), whole.rows.log_tail, rows * n_t * 4) &&
                      (!c.layout.samples || !std::memcmp(weights.get(), whole.rows.weights, rows * k * 4));
    if (!same) wrong("other floats");
}

// Decodes a record into buffers without a byte to spare; false when it is refused.
bool decode(Random& random, const Case& c) {
    const std::int64_t room = below(random, 4) ? c.tokens : 1 + static_cast<std::int64_t>(below(random, 16));
    const auto rows = static_cast<std::size_t>(room), k = static_cast<std::size_t>(c.layout.k);
    const auto n_t = static_cast<std::size_t>(c.layout.n_t);
    auto data = exact<std::uint8_t>(c.record.size());
    std::memcpy(data.get(), c.record.data(), c.record.size());
    const codec::Job job{static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(data.get())),
                         static_cast<std::int64_t>(c.record.size()), c.tokens, 0,
                         static_cast<std::int64_t>(xxh64(data.get(), c.record.size())), 0, room, 0};
    auto ids = exact<std::int32_t>(rows * k);
    auto logp = exact<float>(rows * k), weights = exact<float>(rows * k), log_z = exact<float>(rows * n_t),
         log_tail = exact<float>(rows * n_t);
    auto input = exact<std::int64_t>(rows), labels = exact<std::int64_t>(rows);
    auto mask = exact<std::uint8_t>(rows), attention = exact<std::uint8_t>(rows);
    const codec::BatchOut out{{ids.get(), logp.get(), log_z.get(), log_tail.get(), weights.get()}, input.get(), labels.get(),
                              mask.get(), attention.get(), nullptr, nullptr, 0};
    const auto result = codec::decode_batch(c.layout, &job, 1, true, out, 1);
    compare_indexed(c, job, out, {result, out.rows});
    if (result.status != codec::kOk) return false;
    for (std::size_t i = 0; i < rows * k; ++i) {
        const bool sound = ids[i] >= -1 && ids[i] < c.layout.vocab && !std::isnan(logp[i]) && logp[i] < 1e-3f &&
                           (!c.layout.samples || !(std::isnan(weights[i]) || weights[i] < 0));
        if (!sound) {
            std::fprintf(stderr, "row %zu, entry %zu: id %d, log-probability %g\n", i / k, i % k, ids[i], logp[i]);
            std::abort();
        }
    }
    return true;
}

}  // namespace
}  // namespace kdfast

int main(int argc, char** argv) {
    using namespace kdfast;
    const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
    Random random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
    std::vector<Isa> known{Isa::baseline};
#if KDFAST_X86
    if (__builtin_cpu_supports("avx2")) known.push_back(Isa::avx2);
    if (__builtin_cpu_supports("avx512bw")) known.push_back(Isa::avx512);
#endif
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    unsigned long long records = 0, decoded = 0;
    while (std::chrono::steady_clock::now() < end) {
        chosen = known[below(random, known.size())];
        const Case sound = random_case(random);
        if (!decode(random, sound)) {
            std::fprintf(stderr, "a sound record was refused\n");
            return 1;
        }
        for (int i = 0; i < 200; ++i) {
            Case bad = sound;
            bad.layout.temperatures = bad.temperatures.data();
            damage(random, bad.record);
            chosen = known[below(random, known.size())];
            decoded += decode(random, bad);
            ++records;
        }
    }
    std::printf("%llu damaged records, %llu of them decoded, none read or wrote where it must not\n", records, decoded);
}
