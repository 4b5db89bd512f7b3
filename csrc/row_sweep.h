// One sweep over a row of logits, block by block through the first cache. Formulas:
// kernels/logprobs.py, but exponents are in bits: d = z log2(e) - shift.
#pragma once

#include <cstdint>
#include <limits>

#include "logprobs.h"
#include "vector_math.h"

namespace rlvr {

constexpr double kLog2 = 0.69314718055994531;
constexpr double kLog2E = 1.44269504088896341;

// Finite, so that a first block of -inf (a masked vocabulary) gives no -inf - -inf.
constexpr float kNoMaximum = -1e30f;

// A page of logits.
template <class T>
constexpr std::int64_t kBlock = 4096 / sizeof(T);

// z = outer(transform) * u, where u is x or tanh(scale * x / cap).
inline float outer(Transform transform) {
  return transform.cap > 0.0f ? transform.cap : transform.scale;
}
template <class T>
void read_block(const T* row, std::int64_t size, Transform transform, float* u);
template <class T>
void write_block(const float* values, std::int64_t size, T* out);
float greatest(const float* u, std::int64_t size);

// d = factor * u - shift, but at least `least`, where 2^d is 0. That is a variable because GCC
// would split a loop that it knows to be 0 there into two.
struct Exponent {
  float factor;
  float shift;
  float least = -127.0f;
};
inline Exponent exponent(Transform transform, double shift) {
  return {static_cast<float>(outer(transform) * kLog2E), static_cast<float>(shift)};
}
RLVR_INLINE float in_bits(Exponent exponent, float u) {
  return at_least(exponent.factor * u - exponent.shift, exponent.least);
}

// The fields marked so are right only after a sweep with Extra.
struct RowSums {
  float top = -std::numeric_limits<float>::infinity();  // greatest u
  std::int64_t top_id = 0;                              // Extra: its first id
  double sum = 0.0;                                     // Extra: sum u
  double shift = kNoMaximum;
  double exp = 0.0;        // sum 2^d
  double weighted = 0.0;   // sum 2^d d
  double squared = 0.0;    // Extra: sum 4^d
  double log_total = 0.0;  // log sum 2^d, in nats
  double target = 0.0;     // the target's d

  // As if all sums had been taken relative to `new_shift`.
  void rebase(double new_shift);
};

template <class T, bool Extra>
RowSums sweep(const T* row, std::int64_t vocab_size, std::int64_t target, Transform transform);

void put_stats(const RowSums& sums, Transform transform, RowStats stats, std::int64_t t);

}  // namespace rlvr
