// More statistics of rows of logits, and their gradient. Formulas: kernels/token_statistics.py.
#pragma once

#include <cstdint>

#include "logprobs.h"

namespace rlvr {

// One value per row; pointers advance by 1.
struct TokenStatistics {
  RowStats row;
  float* mean_logit;
  float* log_sum;  // top + log_total
  float* squared;  // sum p^2
  float* kept;     // sum of the p that are at least min_p times the greatest
  float* max_prob;
  std::int64_t* top_id;
};

// d(loss)/d(statistic), one value per row; of the two that `RowStats` has besides there is none.
struct StatisticsGradient {
  const float* logp;
  const float* entropy;
  const float* mean_logit;
  const float* log_sum;
  const float* squared;
  const float* kept;
};

// `log_min_p` is -inf where all are kept.
template <class T>
void token_statistics_fwd(Rows<const T> logits, const std::int64_t* targets, Transform transform,
                          float log_min_p, TokenStatistics found, int threads);

// `out` as in `logprobs_bwd`.
template <class T, class Out>
void token_statistics_bwd(Rows<const T> logits, const std::int64_t* targets, Transform transform,
                          float log_min_p, TokenStatistics found, StatisticsGradient gradient,
                          Rows<Out> out, int threads);

}  // namespace rlvr
