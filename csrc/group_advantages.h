// Advantages of each group's sequences from their rewards. Formulas: kernels/group_advantages.py.
#pragma once

#include <cstdint>

namespace rlvr {

// The values are those of `Scale` in rlvr_fast/ops/group_advantages.py.
enum class Scale { kStd = 0, kNone = 1, kLeaveOneOut = 2 };

struct GroupNormalisation {
  Scale scale;
  int ddof;
  float eps;
};

// rewards, advantages [S]; offsets [num_groups + 1], in sequences. NaN: nobody could score it.
void group_advantages(const float* rewards, const std::int64_t* offsets, std::int64_t num_groups,
                      GroupNormalisation normalisation, float* advantages);

}  // namespace rlvr
