// Forward KL from one teacher, the loss most people train with, in all its variants; the others are in files of their own.
#include "logits_rows.h"

namespace kdfast {
namespace KDFAST_ISA {

void logits_forward_kl(const LogitsArgs& a, bool forward) {
    const bool hard = a.options.hard_weight != 0 || a.options.z_loss != 0;
    if (!forward) {
        hard ? all_rows<ForwardKl, true, false, 0, false>(a) : all_rows<ForwardKl, false, false, 0, false>(a);
        return;
    }
    with_power(a.options.temperature, [&](auto power) {
        constexpr int kPower = decltype(power)::value;
        if (a.parts) {
            all_rows<ForwardKl, true, true, kPower, true>(a);
        } else if (hard) {
            all_rows<ForwardKl, true, false, kPower, true>(a);
        } else {
            all_rows<ForwardKl, false, false, kPower, true>(a);
        }
    });
}

namespace {

void logits(const LogitsArgs& a, bool forward) {
    const bool plain = a.options.kind == Kind::forward_kl && !(a.teachers.size() > 1 && a.options.mix_probs);
    plain ? logits_forward_kl(a, forward) : logits_other(a, forward);
}

}  // namespace

void logits_forward(const LogitsArgs& a) { logits(a, true); }
void logits_backward(const LogitsArgs& a) { logits(a, false); }

}  // namespace KDFAST_ISA
}  // namespace kdfast
