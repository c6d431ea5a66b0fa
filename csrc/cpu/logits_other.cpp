// The divergences other than forward KL, and forward KL from a mean of teachers' probabilities.
#include "logits_rows.h"

namespace kdfast {
namespace KDFAST_ISA {

void logits_other(const LogitsArgs& a, bool forward) {
    switch (a.options.kind) {
        case Kind::forward_kl: return any_rows<ForwardKl>(a, forward);
        case Kind::reverse_kl: return any_rows<ReverseKl>(a, forward);
        case Kind::jsd: return any_rows<Jsd>(a, forward);
        case Kind::skew_forward_kl: return any_rows<SkewForwardKl>(a, forward);
        case Kind::skew_reverse_kl: return any_rows<SkewReverseKl>(a, forward);
        case Kind::tvd: return any_rows<Tvd>(a, forward);
        case Kind::alpha_beta: return any_rows<AlphaBeta>(a, forward);
    }
}

}  // namespace KDFAST_ISA
}  // namespace kdfast
