#include "logprobs.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "vector_math.h"

namespace rlvr {
namespace {

// Probability 0 well before; keeps 0 * -inf out of the entropy.
constexpr float kLowest = -1e4f;

// Sums are float inside a block and double across: 150k float additions lose three digits.
constexpr std::int64_t kBlock = 2048;

template <bool HasCap>
RLVR_INLINE float transformed(float x, Transform transform) {
  const float scaled = x * transform.scale;
  return HasCap ? transform.cap * tanh_bounded(scaled / transform.cap) : scaled;
}

struct ExpSums {
  float top = -std::numeric_limits<float>::max();  // finite: a block of -inf must not give NaN
  double exp = 0.0;                                // sum exp(z - top)
  double shifted = 0.0;                            // sum exp(z - top) * (z - top)

  // As if all sums had been taken relative to a greater `new_top`.
  void raise(float new_top) {
    if (!(new_top > top)) return;
    if (exp > 0.0) {
      const double drop = static_cast<double>(top) - new_top;
      const double keep = std::exp(drop);
      shifted = (shifted + exp * drop) * keep;
      exp *= keep;
    }
    top = new_top;
  }
};

// One read of the row: a block is transformed into a buffer that stays in the first cache.
template <class T, bool HasCap>
RLVR_CLONES void add_block(const T* row, std::int64_t size, Transform transform, ExpSums& sums) {
  alignas(64) float z[kBlock];
  float top = -INFINITY;
#pragma omp simd reduction(max : top)
  for (std::int64_t v = 0; v < size; ++v) {
    z[v] = transformed<HasCap>(to_float(row[v]), transform);
    top = std::max(top, z[v]);
  }
  sums.raise(top);
  top = sums.top;
  float exp_sum = 0.0f, shifted_sum = 0.0f;
#pragma omp simd reduction(+ : exp_sum, shifted_sum)
  for (std::int64_t v = 0; v < size; ++v) {
    const float d = z[v] - top;
    const float shifted = d < kLowest ? kLowest : d;
    const float e = exp_nonpositive(shifted);
    exp_sum += e;
    shifted_sum += e * shifted;
  }
  sums.exp += exp_sum;
  sums.shifted += shifted_sum;
}

template <class T, bool HasCap>
void row_fwd(const T* row, std::int64_t vocab_size, std::int64_t target, Transform transform,
             const RowStats& stats, std::int64_t t) {
  // The target is left out of the sums, so that a sure token keeps its last digits below 0.
  ExpSums others;
  const std::int64_t bounds[] = {0, target, target + 1, vocab_size};
  for (const int part : {0, 2}) {
    for (std::int64_t v = bounds[part]; v < bounds[part + 1]; v += kBlock) {
      add_block<T, HasCap>(row + v, std::min(kBlock, bounds[part + 1] - v), transform, others);
    }
  }
  const float z = transformed<HasCap>(to_float(row[target]), transform);
  others.raise(z);
  const double d = static_cast<double>(z) - others.top;
  const double shifted = d < kLowest ? kLowest : d;
  const double e = std::exp(shifted);
  const double total = others.exp + e;
  const double log_total = shifted == 0.0 ? std::log1p(others.exp) : std::log(total);
  stats.logp[t] = static_cast<float>(shifted - log_total);
  stats.entropy[t] = static_cast<float>(log_total - (others.shifted + e * shifted) / total);
  stats.top[t] = others.top;
  stats.log_total[t] = static_cast<float>(log_total);
}

struct RowCoefficients {
  float top;
  float log_total;
  float entropy;
  float dlogp;
  float dentropy;
};

template <class T, bool HasCap, bool HasEntropy>
RLVR_CLONES void row_bwd(const T* row, T* out, std::int64_t vocab_size, Transform transform,
                         RowCoefficients c) {
#pragma omp simd
  for (std::int64_t v = 0; v < vocab_size; ++v) {
    const float z = transformed<HasCap>(to_float(row[v]), transform);
    const float shifted = z - c.top < kLowest ? kLowest : z - c.top;
    const float logp = shifted - c.log_total;
    const float inner = HasEntropy ? c.dlogp + c.dentropy * (logp + c.entropy) : c.dlogp;
    const float tanh = HasCap ? z / transform.cap : 0.0f;
    const float slope = transform.scale * (1.0f - tanh * tanh);
    out[v] = from_float<T>(-exp_nonpositive(logp) * inner * slope);
  }
}

// p - 1 loses what is left of a sure token's gradient; expm1 keeps it.
template <class T, bool HasCap>
T target_gradient(float logit, float logp, Transform transform, const RowCoefficients& c) {
  const float tanh = HasCap ? transformed<HasCap>(logit, transform) / transform.cap : 0.0f;
  const float slope = transform.scale * (1.0f - tanh * tanh);
  const float dz = -std::expm1(logp) * c.dlogp - std::exp(logp) * c.dentropy * (logp + c.entropy);
  return from_float<T>(dz * slope);
}

template <class T, bool HasCap>
void row_gradient(const T* row, T* out, std::int64_t vocab_size, std::int64_t target,
                  Transform transform, float logp, const RowCoefficients& c) {
  if (c.dlogp == 0.0f && c.dentropy == 0.0f) {
    std::fill(out, out + vocab_size, from_float<T>(0.0f));
    return;
  }
  const T at_target = target_gradient<T, HasCap>(to_float(row[target]), logp, transform, c);
  if (c.dentropy == 0.0f) {
    row_bwd<T, HasCap, false>(row, out, vocab_size, transform, c);
  } else {
    row_bwd<T, HasCap, true>(row, out, vocab_size, transform, c);
  }
  out[target] = at_target;
}

}  // namespace

template <class T>
void logprobs_fwd(Rows<const T> logits, const std::int64_t* targets, Transform transform,
                  RowStats stats, int threads) {
  const auto row_fn = transform.cap > 0.0f ? row_fwd<T, true> : row_fwd<T, false>;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t t = 0; t < logits.count; ++t) {
    row_fn(logits.data + t * logits.stride, logits.vocab_size, targets[t], transform, stats, t);
  }
}

template <class T>
void logprobs_bwd(Rows<const T> logits, const std::int64_t* targets, Transform transform,
                  RowStats stats, const float* dlogp, const float* dentropy, Rows<T> out,
                  int threads) {
  const auto row_fn = transform.cap > 0.0f ? row_gradient<T, true> : row_gradient<T, false>;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t t = 0; t < logits.count; ++t) {
    const RowCoefficients c{stats.top[t], stats.log_total[t], stats.entropy[t], dlogp[t],
                            dentropy == nullptr ? 0.0f : dentropy[t]};
    row_fn(logits.data + t * logits.stride, out.data + t * out.stride, logits.vocab_size,
           targets[t], transform, stats.logp[t], c);
  }
}

#define RLVR_INSTANTIATE(T)                                                                    \
  template void logprobs_fwd<T>(Rows<const T>, const std::int64_t*, Transform, RowStats, int); \
  template void logprobs_bwd<T>(Rows<const T>, const std::int64_t*, Transform, RowStats,       \
                                const float*, const float*, Rows<T>, int)

RLVR_INSTANTIATE(float);
RLVR_INSTANTIATE(BFloat16);
RLVR_INSTANTIATE(Half);

}  // namespace rlvr
