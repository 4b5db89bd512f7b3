#include "token_statistics.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "row_sweep.h"
#include "vector_math.h"

namespace rlvr {
namespace {

// Kept are the logits whose z is at most -log_min_p below the greatest. In terms of u the
// difference is exactly 0 for the greatest itself, whatever the scale.
struct Filter {
  float top;
  float outer;
  float log_min_p;
};
RLVR_INLINE bool keeps(Filter filter, float u) {
  return filter.outer * (u - filter.top) >= filter.log_min_p;
}

RLVR_CLONES float kept_block(const float* u, std::int64_t size, Exponent exponent, Filter filter) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t v = 0; v < size; ++v) {
    const float e = exp2_bounded(in_bits(exponent, u[v]));
    sum += keeps(filter, u[v]) ? e : 0.0f;
  }
  return sum;
}

// Relative to 2^shift. Most blocks have nothing that is kept.
template <class T>
double kept_sum(const T* row, std::int64_t vocab_size, Transform transform, const RowSums& sums,
                Filter filter) {
  alignas(64) float u[kBlock<T>];
  const Exponent relative = exponent(transform, sums.shift);
  double kept = 0.0;
  for (std::int64_t start = 0; start < vocab_size; start += kBlock<T>) {
    const std::int64_t size = std::min(kBlock<T>, vocab_size - start);
    read_block(row + start, size, transform, u);
    if (keeps(filter, greatest(u, size))) kept += kept_block(u, size, relative, filter);
  }
  return kept * std::exp2(relative.shift - sums.shift);
}

template <class T>
void row_fwd(const T* row, std::int64_t vocab_size, std::int64_t target, Transform transform,
             float log_min_p, const TokenStatistics& found, std::int64_t t) {
  const RowSums sums = sweep<T, true>(row, vocab_size, target, transform);
  put_stats(sums, transform, found.row, t);
  const Exponent relative = exponent(transform, sums.shift);
  const double d = static_cast<double>(relative.factor) * sums.top - sums.shift;
  double kept = 1.0;
  if (log_min_p > -INFINITY) {
    const Filter filter{sums.top, outer(transform), log_min_p};
    kept = kept_sum(row, vocab_size, transform, sums, filter) / sums.exp;
  }
  found.mean_logit[t] = static_cast<float>(outer(transform) * sums.sum / vocab_size);
  found.log_sum[t] = static_cast<float>(sums.shift * kLog2 + sums.log_total);
  found.squared[t] = static_cast<float>(sums.squared / (sums.exp * sums.exp));
  found.kept[t] = static_cast<float>(kept > 1.0 ? 1.0 : kept);
  found.max_prob[t] = static_cast<float>(std::exp2(d) / sums.exp);
  found.top_id[t] = sums.top_id;
}

// dz = p (at_zero + log_p log p + p p + kept [if kept]) + all.
struct Coefficients {
  double at_zero;
  double log_p;
  double p;
  double kept;
  double all;
};

// The target's gradient from its logp is not in here.
Coefficients coefficients(const TokenStatistics& found, const StatisticsGradient& gradient,
                          std::int64_t vocab_size, std::int64_t t) {
  const double entropy = gradient.entropy[t], squared = gradient.squared[t];
  const double kept = gradient.kept[t];
  const double at_zero = gradient.log_sum[t] - gradient.logp[t] - entropy * found.row.entropy[t] -
                         kept * found.kept[t] - 2.0 * squared * found.squared[t];
  return {at_zero, -entropy, 2.0 * squared, kept, gradient.mean_logit[t] / vocab_size};
}

// The same times the transform's slope at 0, for d = log2 p but for what float cannot hold of the
// shift.
struct Slope {
  float at_zero;
  float per_bit;
  float per_exp;
  float kept;
  float all;
};

Slope slope(const Coefficients& c, float scale, double lost) {
  const double factor = std::exp2(lost) * scale;
  return {static_cast<float>(factor * (c.at_zero + c.log_p * kLog2 * lost)),
          static_cast<float>(factor * c.log_p * kLog2),
          static_cast<float>(factor * std::exp2(lost) * c.p), static_cast<float>(factor * c.kept),
          static_cast<float>(scale * c.all)};
}

template <bool HasCap>
RLVR_CLONES void gradient_block(const float* u, std::int64_t size, Exponent exponent, Slope slope,
                                Filter filter, float* out) {
#pragma omp simd
  for (std::int64_t v = 0; v < size; ++v) {
    const float d = in_bits(exponent, u[v]);
    const float e = exp2_bounded(d);
    const float kept = keeps(filter, u[v]) ? slope.kept : 0.0f;
    const float dz = e * (slope.at_zero + kept + slope.per_bit * d + slope.per_exp * e) + slope.all;
    out[v] = HasCap ? dz * (1.0f - u[v] * u[v]) : dz;
  }
}

// p - 1 loses what is left of a sure token's gradient; expm1 keeps it.
float target_gradient(float u, Transform transform, const Coefficients& c, float logp, float dlogp,
                      Filter filter) {
  const double p = std::exp(static_cast<double>(logp));
  const double others = c.at_zero + dlogp + c.log_p * logp + c.p * p;
  const double kept = keeps(filter, u) ? c.kept : 0.0;
  const double dz = -std::expm1(static_cast<double>(logp)) * dlogp + p * (others + kept) + c.all;
  return static_cast<float>(dz * transform.scale * (transform.cap > 0.0f ? 1.0f - u * u : 1.0f));
}

template <class T, class Out>
void row_bwd(const T* row, Out* out, std::int64_t vocab_size, std::int64_t target,
             Transform transform, float log_min_p, const TokenStatistics& found,
             const StatisticsGradient& gradient, std::int64_t t) {
  const Coefficients c = coefficients(found, gradient, vocab_size, t);
  alignas(64) float u[kBlock<T>];
  read_block(row + found.top_id[t], 1, transform, u);
  const Filter filter{u[0], outer(transform), log_min_p};
  read_block(row + target, 1, transform, u);
  const Out at_target = from_float<Out>(
      target_gradient(u[0], transform, c, found.row.logp[t], gradient.logp[t], filter));

  const double log_sum = static_cast<double>(found.row.top[t]) + found.row.log_total[t];
  const Exponent probability = exponent(transform, log_sum * kLog2E);
  const Slope bits = slope(c, transform.scale, probability.shift - log_sum * kLog2E);
  const auto block_fn = transform.cap > 0.0f ? gradient_block<true> : gradient_block<false>;
  for (std::int64_t start = 0; start < vocab_size; start += kBlock<T>) {
    const std::int64_t size = std::min(kBlock<T>, vocab_size - start);
    read_block(row + start, size, transform, u);
    block_fn(u, size, probability, bits, filter, u);
    write_block(u, size, out + start);
  }
  out[target] = at_target;
}

}  // namespace

template <class T>
void token_statistics_fwd(Rows<const T> logits, const std::int64_t* targets, Transform transform,
                          float log_min_p, TokenStatistics found, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t t = 0; t < logits.count; ++t) {
    row_fwd(logits.data + t * logits.stride, logits.vocab_size, targets[t], transform, log_min_p,
            found, t);
  }
}

template <class T, class Out>
void token_statistics_bwd(Rows<const T> logits, const std::int64_t* targets, Transform transform,
                          float log_min_p, TokenStatistics found, StatisticsGradient gradient,
                          Rows<Out> out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t t = 0; t < logits.count; ++t) {
    row_bwd(logits.data + t * logits.stride, out.data + t * out.stride, logits.vocab_size,
            targets[t], transform, log_min_p, found, gradient, t);
  }
}

#define RLVR_FWD(T)                                                                           \
  template void token_statistics_fwd<T>(Rows<const T>, const std::int64_t*, Transform, float, \
                                        TokenStatistics, int)
#define RLVR_BWD(T, Out)                                                                           \
  template void token_statistics_bwd<T, Out>(Rows<const T>, const std::int64_t*, Transform, float, \
                                             TokenStatistics, StatisticsGradient, Rows<Out>, int)

RLVR_FWD(float);
RLVR_FWD(BFloat16);
RLVR_FWD(Half);
RLVR_BWD(float, float);
RLVR_BWD(float, BFloat16);
RLVR_BWD(float, Half);
RLVR_BWD(BFloat16, BFloat16);
RLVR_BWD(Half, Half);

}  // namespace rlvr
