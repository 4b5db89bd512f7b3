#include "logprobs.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "row_sweep.h"
#include "vector_math.h"

namespace rlvr {
namespace {

struct RowCoefficients {
  float logp;
  float entropy;
  float dlogp;
  float dentropy;
};

// dz scale = 2^d (at_zero + per_bit d): p, the coefficients and the scale in two numbers.
struct Slope {
  float at_zero;
  float per_bit;
};

// d = log2 p, but for what float cannot hold of the shift.
Slope slope(const RowCoefficients& c, float scale, double lost) {
  const double factor = -std::exp2(lost) * scale;
  const double inner = c.dlogp + c.dentropy * (c.entropy + kLog2 * lost);
  return {static_cast<float>(factor * inner), static_cast<float>(factor * c.dentropy * kLog2)};
}

template <bool HasCap>
RLVR_CLONES void gradient_block(const float* u, std::int64_t size, Exponent exponent, Slope slope,
                                float* out) {
#pragma omp simd
  for (std::int64_t v = 0; v < size; ++v) {
    const float d = in_bits(exponent, u[v]);
    const float dz = exp2_bounded(d) * (slope.at_zero + slope.per_bit * d);
    out[v] = HasCap ? dz * (1.0f - u[v] * u[v]) : dz;
  }
}

// p - 1 loses what is left of a sure token's gradient; expm1 keeps it.
float target_gradient(float u, Transform transform, const RowCoefficients& c) {
  const float dz =
      -std::expm1(c.logp) * c.dlogp - std::exp(c.logp) * c.dentropy * (c.logp + c.entropy);
  return dz * transform.scale * (transform.cap > 0.0f ? 1.0f - u * u : 1.0f);
}

template <class T, class Out>
void row_gradient(const T* row, Out* out, std::int64_t vocab_size, std::int64_t target,
                  Transform transform, double log_sum, const RowCoefficients& c) {
  if (c.dlogp == 0.0f && c.dentropy == 0.0f) {
    std::fill(out, out + vocab_size, from_float<Out>(0.0f));
    return;
  }
  alignas(64) float u[kBlock<T>];
  Out at_target{};
  if (target >= 0) {
    read_block(row + target, 1, transform, u);
    at_target = from_float<Out>(target_gradient(u[0], transform, c));
  }
  const Exponent probability = exponent(transform, log_sum * kLog2E);
  const Slope bits = slope(c, transform.scale, probability.shift - log_sum * kLog2E);
  const auto block_fn = transform.cap > 0.0f ? gradient_block<true> : gradient_block<false>;
  for (std::int64_t start = 0; start < vocab_size; start += kBlock<T>) {
    const std::int64_t size = std::min(kBlock<T>, vocab_size - start);
    read_block(row + start, size, transform, u);
    if constexpr (std::is_same_v<Out, float>) {
      block_fn(u, size, probability, bits, out + start);
    } else {
      block_fn(u, size, probability, bits, u);
      write_block(u, size, out + start);
    }
  }
  if (target >= 0) out[target] = at_target;
}

}  // namespace

template <class T>
void logprobs_fwd(Rows<const T> logits, const std::int64_t* targets, Transform transform,
                  RowStats stats, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t t = 0; t < logits.count; ++t) {
    const T* row = logits.data + t * logits.stride;
    put_stats(sweep<T, false>(row, logits.vocab_size, targets[t], transform), transform, stats, t);
  }
}

template <class T, class Out>
void logprobs_bwd(Rows<const T> logits, const std::int64_t* targets, Transform transform,
                  RowStats stats, const float* dlogp, const float* dentropy, Rows<Out> out,
                  int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t t = 0; t < logits.count; ++t) {
    const double log_sum = static_cast<double>(stats.top[t]) + stats.log_total[t];
    const RowCoefficients c{stats.logp[t], stats.entropy[t], dlogp[t],
                            dentropy == nullptr ? 0.0f : dentropy[t]};
    row_gradient(logits.data + t * logits.stride, out.data + t * out.stride, logits.vocab_size,
                 targets[t], transform, log_sum, c);
  }
}

#define RLVR_FWD(T) \
  template void logprobs_fwd<T>(Rows<const T>, const std::int64_t*, Transform, RowStats, int)
#define RLVR_BWD(T, Out)                                                                      \
  template void logprobs_bwd<T, Out>(Rows<const T>, const std::int64_t*, Transform, RowStats, \
                                     const float*, const float*, Rows<Out>, int)

RLVR_FWD(float);
RLVR_FWD(BFloat16);
RLVR_FWD(Half);
RLVR_BWD(float, float);
RLVR_BWD(float, BFloat16);
RLVR_BWD(float, Half);
RLVR_BWD(BFloat16, BFloat16);
RLVR_BWD(Half, Half);

}  // namespace rlvr
