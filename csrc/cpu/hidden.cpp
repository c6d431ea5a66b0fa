// One read of student and teacher, one write of the gradient.
#include "hidden.h"

#include <algorithm>

#include "simd.h"

namespace kdfast {
namespace KDFAST_ISA {
namespace {

constexpr int64_t kSpan = 1024;                // elements summed in float32 before the sum moves to float64
constexpr int64_t kStreamBytes = 16 << 20;     // outputs beyond this are written past the caches
constexpr int64_t kSerialElements = 16 << 10;  // less than this is not worth waking a thread for

template <typename T>
vec load_n(const T* p, int64_t n) {
    return n >= W ? load(p) : load_tail(p, n, 0.0f);
}

template <typename T>
void store_n(T* p, int64_t n, vec x) {
    n >= W ? store(p, x) : store_tail(p, n, x);
}

// Sum over i < n of f(i, count), where count is W but at the ragged end.
template <typename F>
double sum_over(int64_t n, F f) {
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += kSpan) {
        const int64_t end = std::min(n, begin + kSpan);
        vec even{}, odd{};
        int64_t i = begin;
        for (; i + 2 * W <= end; i += 2 * W) {
            even += f(i, int64_t(W));
            odd += f(i + W, int64_t(W));
        }
        for (; i < end; i += W) even += f(i, end - i);
        total += reduce_add(even + odd);
    }
    return total;
}

template <typename S, typename T>
struct Row {
    const S* student;
    const T* teacher;
    S* grad;  // null when not wanted
    const float* bias;
    int64_t width;
    float scale;
    bool stream;
};

template <typename T>
void write(T* p, int64_t n, vec x, bool) {
    store_n(p, n, x);
}

inline void write(float* p, int64_t n, vec x, bool past_caches) {
    past_caches && n >= W ? stream(p, x) : store_n(p, n, x);
}

template <typename S, typename T>
float mse_row(const Row<S, T>& r) {
    const float to_grad = float(2.0 * r.scale / double(r.width));
    const double sum = sum_over(r.width, [&](int64_t i, int64_t n) {
        vec d = load_n(r.student + i, n) - load_n(r.teacher + i, n);
        if (r.bias) d += load_n(r.bias + i, n);
        if (r.grad) write(r.grad + i, n, to_grad * d, r.stream);
        return d * d;
    });
    return float(r.scale * (sum / double(r.width)));
}

// Three sums over a row of what f(i, count) returns for one vector.
struct Triple {
    vec x, y, z;
};
struct Sums {
    double x = 0, y = 0, z = 0;
};

template <typename F>
Sums sums_over(int64_t n, F f) {
    Sums total;
    for (int64_t begin = 0; begin < n; begin += kSpan) {
        const int64_t end = std::min(n, begin + kSpan);
        vec x{}, y{}, z{};
        for (int64_t i = begin; i < end; i += W) {
            const Triple t = f(i, end - i);
            x += t.x;
            y += t.y;
            z += t.z;
        }
        total.x += reduce_add(x);
        total.y += reduce_add(y);
        total.z += reduce_add(z);
    }
    return total;
}

// 1 - cos from p = t - (t.s / s.s) s, the teacher's part across the student: sin^2 = p.p / t.t and
// 1 - cos = sin^2 / (1 + cos), which does not cancel. The gradient is -p / (|s| |t|). p itself cancels when both point the
// same way, so it is made orthogonal to s a second time.
template <typename S, typename T>
float cosine_row(const Row<S, T>& r) {
    const Sums dots = sums_over(r.width, [&](int64_t i, int64_t n) {
        const vec s = load_n(r.student + i, n), t = load_n(r.teacher + i, n);
        return Triple{s * s, t * t, s * t};
    });
    const double ss = dots.x, tt = dots.y, st = dots.z;
    if (ss == 0 || tt == 0) {
        if (r.grad) std::memset(static_cast<void*>(r.grad), 0, size_t(r.width) * sizeof(S));
        return r.scale;
    }
    const vec along = set(float(-st / ss));
    const Sums across = sums_over(r.width, [&](int64_t i, int64_t n) {
        const vec s = load_n(r.student + i, n), p = fma(along, s, load_n(r.teacher + i, n));
        return Triple{p * p, p * s, vec{}};
    });
    const double rest = across.y / ss, norms = std::sqrt(ss) * std::sqrt(tt);
    if (r.grad) {
        const vec again = set(float(-rest)), to_grad = set(float(-r.scale / norms));
        for (int64_t i = 0; i < r.width; i += W) {
            const int64_t n = r.width - i;
            const vec s = load_n(r.student + i, n), p = fma(along, s, load_n(r.teacher + i, n));
            write(r.grad + i, n, to_grad * fma(again, s, p), r.stream);
        }
    }
    if (!std::isfinite(ss + tt + st)) return kNan;
    const double cosine = std::max(-1.0, std::min(1.0, st / norms));
    const double sin2 = std::max(0.0, across.x - rest * across.y) / tt;
    return float(r.scale * (cosine > 0 ? sin2 / (1 + cosine) : 1 - cosine));
}

template <typename S, typename T, typename F>
void all_rows(const HiddenArgs& a, F loss_of) {
    const int64_t width = a.teacher.columns;
    const auto address = reinterpret_cast<uintptr_t>(a.grad.data);
    const bool aligned = address % (W * 4) == 0 && a.grad.stride % W == 0;
    const bool stream = aligned && a.grad.data != a.student.data && a.rows * width * 4 >= kStreamBytes;
    const int threads = a.rows * width < kSerialElements ? 1 : a.threads;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < a.rows; ++r) {
            S* grad = a.grad.data ? reinterpret_cast<S*>(a.grad.row(r)) : nullptr;
            if (a.scale[r] == 0) {
                a.loss[r] = 0;
                if (grad) std::memset(static_cast<void*>(grad), 0, size_t(width) * sizeof(S));
                continue;
            }
            a.loss[r] = loss_of(Row<S, T>{reinterpret_cast<const S*>(a.student.row(r)),
                                          reinterpret_cast<const T*>(a.teacher.row(r)), grad, a.bias, width, a.scale[r],
                                          stream});
        }
        stream_fence();
    }
}

template <typename S, typename F>
void with_teacher(const HiddenArgs& a, F loss_of) {
    switch (a.teacher.dtype) {
        case Dtype::float32: return all_rows<S, float>(a, loss_of);
        case Dtype::bfloat16: return all_rows<S, bf16>(a, loss_of);
        case Dtype::float16: return all_rows<S, f16>(a, loss_of);
    }
}

template <typename F>
void with_types(const HiddenArgs& a, F loss_of) {
    switch (a.student.dtype) {
        case Dtype::float32: return with_teacher<float>(a, loss_of);
        case Dtype::bfloat16: return with_teacher<bf16>(a, loss_of);
        case Dtype::float16: return with_teacher<f16>(a, loss_of);
    }
}

}  // namespace

void hidden_mse(const HiddenArgs& a) {
    with_types(a, [](const auto& row) { return mse_row(row); });
}

void hidden_cosine(const HiddenArgs& a) {
    with_types(a, [](const auto& row) { return cosine_row(row); });
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
