#include "row_sweep.h"

#include <algorithm>
#include <cmath>

#include "vector_math.h"

namespace rlvr {
namespace {

// Probability 0 well before; keeps 0 * -inf out of the entropy.
constexpr double kLowest = -1e4 * kLog2E;

// Sums are float inside a block and double across: 150k float additions lose three digits.
struct BlockSums {
  float exp;
  float weighted;
  float squared;
};

template <bool Extra>
RLVR_CLONES BlockSums block_sums(const float* u, std::int64_t size, Exponent exponent) {
  float exp = 0.0f, weighted = 0.0f, squared = 0.0f;
#pragma omp simd reduction(+ : exp, weighted, squared)
  for (std::int64_t v = 0; v < size; ++v) {
    const float d = in_bits(exponent, u[v]);
    const float e = exp2_bounded(d);
    exp += e;
    weighted += e * d;
    if (Extra) squared += e * e;
  }
  return {exp, weighted, squared};
}

RLVR_CLONES float sum(const float* u, std::int64_t size) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t v = 0; v < size; ++v) sum += u[v];
  return sum;
}

void include_target(RowSums& sums, double z) {
  // Relative to a token surer than all others together nothing cancels.
  if (std::exp2(z - sums.shift) >= sums.exp) sums.rebase(z);
  const double shifted = z - sums.shift;
  const double d = shifted < kLowest ? kLowest : shifted;
  const double e = std::exp2(d);
  sums.log_total = d == 0.0 ? std::log1p(sums.exp) : std::log(sums.exp + e);
  sums.exp += e;
  sums.weighted += e * d;
  sums.squared += e * e;
  sums.target = d;
}

}  // namespace

void RowSums::rebase(double new_shift) {
  const double drop = shift - new_shift;
  const double keep = std::exp2(drop);
  weighted = (weighted + exp * drop) * keep;
  exp *= keep;
  squared *= keep * keep;
  shift = new_shift;
}

// Loops of one width each: GCC vectorises a loop that mixes 2- and 4-byte types poorly.
template <class T>
RLVR_CLONES void read_block(const T* row, std::int64_t size, Transform transform, float* u) {
#pragma omp simd
  for (std::int64_t v = 0; v < size; ++v) u[v] = to_float(row[v]);
  if (!(transform.cap > 0.0f)) return;
  const float inner = transform.scale / transform.cap;
#pragma omp simd
  for (std::int64_t v = 0; v < size; ++v) u[v] = tanh_bounded(u[v] * inner);
}

template <class T>
RLVR_CLONES void write_block(const float* values, std::int64_t size, T* out) {
#pragma omp simd
  for (std::int64_t v = 0; v < size; ++v) out[v] = from_float<T>(values[v]);
}

// Two at a time, because each maximum waits for the last one.
RLVR_CLONES float greatest(const float* u, std::int64_t size) {
  const std::int64_t half = size / 2;
  float top = u[size - 1];
#pragma omp simd reduction(max : top)
  for (std::int64_t v = 0; v < half; ++v) {
    const float one = u[v], other = u[v + half];
    const float greater = one < other ? other : one;
    top = top < greater ? greater : top;
  }
  return top;
}

template <class T, bool Extra>
RowSums sweep(const T* row, std::int64_t vocab_size, std::int64_t target, Transform transform) {
  alignas(64) float u[kBlock<T>];
  const float factor = exponent(transform, 0.0).factor;
  RowSums sums;
  double z_target = 0.0;
  for (std::int64_t start = 0; start < vocab_size; start += kBlock<T>) {
    const std::int64_t size = std::min(kBlock<T>, vocab_size - start);
    read_block(row + start, size, transform, u);
    const float top = greatest(u, size);
    if (top > sums.top) {
      sums.top = top;
      sums.rebase(std::max(factor * top, kNoMaximum));
      if (Extra) sums.top_id = start + (std::find(u, u + size, top) - u);
    }
    if (Extra) sums.sum += sum(u, size);
    // The target is left out at first, so that a sure token keeps its last digits below 0.
    if (start <= target && target < start + size) {
      z_target = static_cast<double>(factor) * u[target - start];
      u[target - start] = -INFINITY;
    }
    const BlockSums found = block_sums<Extra>(u, size, exponent(transform, sums.shift));
    sums.exp += found.exp;
    sums.weighted += found.weighted;
    sums.squared += found.squared;
  }
  include_target(sums, z_target);
  return sums;
}

void put_stats(const RowSums& sums, Transform transform, RowStats stats, std::int64_t t) {
  const double log_total = sums.log_total;
  const float top = outer(transform) * sums.top;
  stats.logp[t] = static_cast<float>(sums.target * kLog2 - log_total);
  stats.entropy[t] = static_cast<float>(log_total - kLog2 * sums.weighted / sums.exp);
  stats.top[t] = top;
  stats.log_total[t] = static_cast<float>(sums.shift * kLog2 + log_total - top);
}

#define RLVR_INSTANTIATE(T)                                                          \
  template void read_block<T>(const T*, std::int64_t, Transform, float*);            \
  template void write_block<T>(const float*, std::int64_t, T*);                      \
  template RowSums sweep<T, false>(const T*, std::int64_t, std::int64_t, Transform); \
  template RowSums sweep<T, true>(const T*, std::int64_t, std::int64_t, Transform)

RLVR_INSTANTIATE(float);
RLVR_INSTANTIATE(BFloat16);
RLVR_INSTANTIATE(Half);

}  // namespace rlvr
