#include "group_advantages.h"

#include <algorithm>
#include <cmath>

namespace rlvr {
namespace {

struct Moments {
  std::int64_t count = 0;
  double mean = 0.0;
  double squares = 0.0;  // sum of squared deviations
  bool all_equal = true;
};

// Two passes: E[x^2] - E[x]^2 cancels.
Moments moments(const float* first, const float* last) {
  Moments m;
  float any = NAN;
  for (const float* r = first; r != last; ++r) {
    if (std::isnan(*r)) continue;
    if (m.count > 0 && *r != any) m.all_equal = false;
    any = *r;
    m.mean += *r;
    ++m.count;
  }
  m.mean /= static_cast<double>(std::max<std::int64_t>(m.count, 1));
  for (const float* r = first; r != last; ++r) {
    if (!std::isnan(*r)) m.squares += (*r - m.mean) * (*r - m.mean);
  }
  return m;
}

double multiplier(const Moments& m, const GroupNormalisation& normalisation) {
  const double count = static_cast<double>(m.count);
  switch (normalisation.scale) {
    case Scale::kStd:
      return 1.0 /
             (std::sqrt(m.squares / std::max(count - normalisation.ddof, 1.0)) + normalisation.eps);
    case Scale::kLeaveOneOut:
      return count / std::max(count - 1.0, 1.0);
    case Scale::kNone:
      break;
  }
  return 1.0;
}

}  // namespace

void group_advantages(const float* rewards, const std::int64_t* offsets, std::int64_t num_groups,
                      GroupNormalisation normalisation, float* advantages) {
  for (std::int64_t g = 0; g < num_groups; ++g) {
    const float* first = rewards + offsets[g];
    const float* last = rewards + offsets[g + 1];
    const Moments m = moments(first, last);
    const double factor = multiplier(m, normalisation);
    for (const float* r = first; r != last; ++r) {
      const bool zero = m.all_equal || std::isnan(*r);
      advantages[r - rewards] = zero ? 0.0f : static_cast<float>((*r - m.mean) * factor);
    }
  }
}

}  // namespace rlvr
