// Rows in blocks of float32 that fit the first-level cache, and their log-sum-exps.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "elementary.h"
#include "matrix.h"

namespace kdfast {
namespace KDFAST_ISA {

constexpr int64_t kBlock = 2048;
constexpr int64_t kStreamBytes = 16 << 20;  // outputs beyond this are written past the caches
constexpr float kLowest = -1e6f;            // stands for -inf in exponents: exp gives 0, and 0 * kLowest is 0, not NaN

struct alignas(64) Buffer {
    float data[kBlock];
};

inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

template <typename T>
void widen(const T* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(to + i, load(from + i));
    if (i < n) store(to + i, load_tail(from + i, n - i, -kInf));
}

template <typename T>
void narrow(const float* from, int64_t n, T* to) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(to + i, load(from + i));
    if (i < n) store_tail(to + i, n - i, load(from + i));
}

// x through a model's head, in place; the padding stays -inf. +inf becomes NaN, which a cap would hide.
inline void through_head(Head head, int64_t n, float* x) {
    const float inverse = head.softcap == 0 ? 0 : 1 / head.softcap;
    for (int64_t i = 0; i < padded(n); i += W) {
        vec z = load(x + i) * head.scale;
        if (head.softcap != 0) z = z == set(kInf) ? set(kNan) : head.softcap * tanh(z * inverse);
        store(x + i, z);
    }
    std::fill(x + n, x + padded(n), -kInf);
}

// grad *= d head / d x, from z = head(x).
inline void back_through_head(Head head, int64_t n, const float* z, float* grad) {
    const float inverse = head.softcap == 0 ? 0 : 1 / head.softcap;
    for (int64_t i = 0; i < padded(n); i += W) {
        const vec t = inverse == 0 ? vec{} : load(z + i) * inverse;
        store(grad + i, load(grad + i) * (head.scale * (1.0f - t * t)));
    }
}

// One row of logits as the softmax sees them, read in blocks: float32 in place, anything else (a ragged end, filled with
// -inf; logits that pass a head) through a buffer.
struct Source {
    const char* data;
    Dtype dtype;
    Head head = {};

    const float* block(int64_t begin, int64_t n, Buffer& buffer) const {
        const char* from = data + begin * bytes_of(dtype);
        if (dtype == Dtype::float32) {
            if (n % W == 0 && head.trivial()) return reinterpret_cast<const float*>(from);
            widen(reinterpret_cast<const float*>(from), n, buffer.data);
        } else if (dtype == Dtype::bfloat16) {
            widen(reinterpret_cast<const bf16*>(from), n, buffer.data);
        } else {
            widen(reinterpret_cast<const f16*>(from), n, buffer.data);
        }
        if (!head.trivial()) through_head(head, n, buffer.data);
        return buffer.data;
    }

    const char* from(int64_t i) const { return data + i * bytes_of(dtype); }

    float at(int64_t i) const {
        const float x = head.scale * raw(i);
        return head.softcap == 0 ? x : head.softcap * std::tanh(x / head.softcap);
    }

    float raw(int64_t i) const {
        if (dtype == Dtype::float32) return reinterpret_cast<const float*>(data)[i];
        if (dtype == Dtype::bfloat16) return to_float(reinterpret_cast<const bf16*>(data)[i]);
        return to_float(reinterpret_cast<const f16*>(data)[i]);
    }
};

// One row of an output, written in blocks the same way. It may be the row a Source reads: a block is read before it is written.
struct Sink {
    char* data;
    Dtype dtype;

    float* block(int64_t begin, int64_t n, Buffer& buffer) const {
        if (dtype == Dtype::float32 && n % W == 0) return reinterpret_cast<float*>(data) + begin;
        return buffer.data;
    }

    void commit(int64_t begin, int64_t n, const float* from) const {
        char* to = data + begin * bytes_of(dtype);
        if (reinterpret_cast<const char*>(from) == to) return;
        if (dtype == Dtype::float32) {
            narrow(from, n, reinterpret_cast<float*>(to));
        } else if (dtype == Dtype::bfloat16) {
            narrow(from, n, reinterpret_cast<bf16*>(to));
        } else {
            narrow(from, n, reinterpret_cast<f16*>(to));
        }
    }

    void set(int64_t i, float x) const {
        if (dtype == Dtype::float32) {
            from_float(x, reinterpret_cast<float*>(data)[i]);
        } else if (dtype == Dtype::bfloat16) {
            from_float(x, reinterpret_cast<bf16*>(data)[i]);
        } else {
            from_float(x, reinterpret_cast<f16*>(data)[i]);
        }
    }

    void clear(int64_t n) const { std::memset(data, 0, size_t(n * bytes_of(dtype))); }
};

// exp((z - anchor) / T - log_sum), with the parts a loop over z needs.
struct Softmax {
    float anchor, inverse_t, binary_t, log_sum, factor;

    Softmax(float anchor_, float inverse_t_, double lse)
        : anchor(anchor_),
          inverse_t(inverse_t_),
          binary_t(inverse_t_ * kLog2e),
          log_sum(float(lse - double(anchor_) * inverse_t_)),
          factor(float(std::exp(-double(log_sum)))) {}

    // From a log-sum-exp alone: the anchor keeps z - anchor exact where z is large.
    static Softmax from_lse(double lse, float inverse_t) { return {float(lse / inverse_t), inverse_t, lse}; }

    vec shifted(vec z) const { return max(set(kLowest), (z - anchor) * inverse_t); }
    // The same in powers of 2, one product less on the way to an exponential.
    vec shifted_2(vec z) const { return max(set(kLowest), (z - anchor) * binary_t); }
};

// e = exp((z - anchor) / T) raised to T, where T is 1 or 2; else computed afresh.
template <int kPower>
inline vec exp_at_1(vec e, vec z, float anchor) {
    if (kPower == 1) return e;
    if (kPower == 2) return e * e;
    return exp(max(set(kLowest), z - anchor));
}

// Log-sum-exps of one row at T and (kAt1) at 1, block by block around a running maximum; with kMean the mean logit at 1 too.
template <bool kAt1, int kPower, bool kMean = false>
class OnlineSum {
  public:
    explicit OnlineSum(float inverse_t) : inverse_t_(inverse_t), binary_t_(inverse_t * kLog2e) {}

    // z holds padded(n) floats, -inf in the padding. `row`: what they come from. The first loop waits for memory and the second
    // does not: fetched there, the row's next block is at hand when its turn comes.
    void add(const float* z, int64_t begin, int64_t n, const Source* row = nullptr) {
        const int64_t m = padded(n), element = row ? bytes_of(row->dtype) : 0;
        const char* ahead = row ? row->from(begin + n) : reinterpret_cast<const char*>(z);
        vec high = set(-kInf), low = set(kInf);
        for (int64_t i = 0; i < m; i += W) {
            const vec x = load(z + i);
            high = max(high, x);
            low = min(low, x);
        }
        lowest_ = std::min(lowest_, reduce_min(low));
        const float top = reduce_max(high);
        if (top > anchor_) {
            if (started_) {
                sum_ *= std::exp((double(anchor_) - top) * inverse_t_);
                const double step = double(anchor_) - top;
                if (kMean) above_ = (above_ + step * sum_1_) * std::exp(step);
                if (kAt1) sum_1_ *= std::exp(step);
            }
            anchor_ = top;
            best_begin_ = begin;
            started_ = true;
        }
        const float anchor = started_ ? anchor_ : 0;
        vec sum{}, sum_1{}, above{};
        for (int64_t i = 0; i < m; i += W) {
            __builtin_prefetch(ahead + i * element);
            const vec x = load(z + i);
            const vec e = exp2(max(set(kLowest), (x - anchor) * binary_t_));
            sum += e;
            const vec e_1 = kAt1 ? exp_at_1<kPower>(e, x, anchor) : vec{};
            if (kAt1) sum_1 += e_1;
            if (kMean) above += e_1 * max(set(kLowest), x - anchor);
        }
        sum_ += reduce_add(sum);
        if (kAt1) sum_1_ += reduce_add(sum_1);
        if (kMean) above_ += reduce_add(above);
    }

    float anchor() const { return anchor_; }
    float lowest() const { return lowest_; }  // -inf also stands for padding
    double lse() const { return double(anchor_) * inverse_t_ + std::log(sum_); }
    double lse_at_1() const { return double(anchor_) + std::log(sum_1_); }
    // What these logits add to the entropy at T = 1 of a row whose log-sum-exp is lse.
    double entropy_at_1(double lse) const {
        return sum_1_ == 0 ? 0 : std::exp(lse_at_1() - lse) * ((lse - double(anchor_)) - above_ / sum_1_);
    }

    // First id of the largest logit; looks again at the one block that holds it.
    template <typename Row>
    int64_t argmax(const Row& row, int64_t columns, Buffer& buffer) const {
        const int64_t n = std::min(kBlock, columns - best_begin_);
        const float* z = row.block(best_begin_, n, buffer);
        return best_begin_ + (std::find(z, z + n, anchor_) - z);
    }

  private:
    float inverse_t_, binary_t_, anchor_ = -kInf, lowest_ = kInf;
    double sum_ = 0, sum_1_ = 0, above_ = 0;
    int64_t best_begin_ = 0;
    bool started_ = false;
};

// Gradient of student ids the teacher does not have, [begin_id, vs): hard_grad * q - constant at T = 1.
inline void hard_only_pass(Source s, Sink g, int64_t begin_id, int64_t vs, double lse_1, float hard_grad, float constant,
                           Buffer& in, Buffer& gradient) {
    const Softmax q1(float(lse_1), 1, lse_1);
    for (int64_t begin = begin_id; begin < vs; begin += kBlock) {
        const int64_t n = std::min(kBlock, vs - begin);
        const float* z = s.block(begin, n, in);
        float* out = g.block(begin, n, gradient);
        for (int64_t i = 0; i < padded(n); i += W) {
            store(out + i, hard_grad == 0 ? vec{} : hard_grad * q1.factor * exp(q1.shifted(load(z + i))) - constant);
        }
        if (!s.head.trivial()) back_through_head(s.head, n, z, out);
        g.commit(begin, n, out);
    }
}

// A block with the selected ids (ascending) taken out as -inf; `next` moves past those of this block.
inline const float* without(const float* z, int64_t begin, int64_t n, const std::vector<int32_t>& ids, size_t& next, Buffer& buffer) {
    if (next >= ids.size() || ids[next] >= begin + n) return z;
    if (z != buffer.data) std::memcpy(buffer.data, z, size_t(padded(n)) * sizeof(float));
    for (; next < ids.size() && ids[next] < begin + n; ++next) buffer.data[ids[next] - begin] = -kInf;
    return buffer.data;
}

// A row that does not count.
inline void clear_row(int64_t r, int64_t n_stats, float* loss, double* stats, float* parts) {
    loss[r] = 0;
    std::fill_n(stats + r * n_stats, n_stats, 0.0);
    if (parts) std::fill_n(parts + r * kParts, kParts, 0.0f);
}

inline double sum_of(const float* z, int64_t n) {
    vec total{};
    int64_t i = 0;
    for (; i + W <= n; i += W) total += load(z + i);
    double sum = reduce_add(total);
    for (; i < n; ++i) sum += z[i];
    return sum;
}

inline double log_add(double a, double b) {
    if (a < b) std::swap(a, b);
    return std::isinf(b) ? a : a + std::log1p(std::exp(b - a));
}

// weight * x, where no weight means no term even if x is infinite.
inline float weighted(float weight, float x) { return weight == 0 ? 0 : weight * x; }

// Calls f with the temperature as a constant where that saves an exponential: 1, 2, or 0 for any other.
template <typename F>
void with_power(float temperature, F f) {
    if (temperature == 1) {
        f(std::integral_constant<int, 1>());
    } else if (temperature == 2) {
        f(std::integral_constant<int, 2>());
    } else {
        f(std::integral_constant<int, 0>());
    }
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
