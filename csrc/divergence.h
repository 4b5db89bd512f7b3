// Divergence of two distributions, a row each. Formulas: kernels/divergence.py.
#pragma once

#include <cstdint>

#include "logprobs.h"

namespace rlvr {

// The values are those of `Divergence` in rlvr_fast/ops/divergence.py.
enum class Divergence { kForward = 0, kReverse = 1, kJensenShannon = 2 };

// coef, kl [count]. `out` may be `student` itself, the front of the same rows in a narrower dtype,
// or have null data: no gradient wanted. A row whose coefficient is 0 is not read: its divergence
// and gradient are 0.
template <class T, class Out>
void divergence(Rows<const T> student, Rows<const T> teacher, const float* coef, Divergence kind,
                Transform transform, float* kl, Rows<Out> out, int threads);

}  // namespace rlvr
