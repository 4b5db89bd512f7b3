// One token drawn per row of logits, and its log-probability.
#pragma once

#include <cstdint>

#include "logprobs.h"

namespace rlvr {

// One value per row; pointers advance by 1.
struct Drawn {
  std::int64_t* token;
  float* logp;
};

// With noise u [count] in [0, 1) the first token, in the order of ids, at which the cumulative
// probability reaches 1 - u; where `noise` is null the likeliest, the first of several. A row
// without a distribution (NaN, an infinite logit, all -inf) has a logp that is not finite.
template <class T>
void sample(Rows<const T> logits, const double* noise, Transform transform, Drawn drawn,
            int threads);

}  // namespace rlvr
