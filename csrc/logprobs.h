// Log-probability and entropy of rows of logits, and their gradient. Formulas: kernels/logprobs.py.
#pragma once

#include <cstdint>

namespace rlvr {

// z = scale * x, or cap * tanh(scale * x / cap) where cap > 0.
struct Transform {
  float scale;
  float cap;
};

template <class T>
struct Rows {
  T* data;
  std::int64_t stride;  // elements between rows
  std::int64_t count;
  std::int64_t vocab_size;
};

// One value per row; pointers advance by 1.
struct RowStats {
  float* logp;
  float* entropy;
  float* top;        // greatest z
  float* log_total;  // log sum exp(z - top)
};

template <class T>
void logprobs_fwd(Rows<const T> logits, const std::int64_t* targets, Transform transform,
                  RowStats stats, int threads);

// `out` may be `logits` itself, or the front of the same rows in a narrower dtype. `dentropy` may
// be null. A target of -1 is in another slice of the vocabulary.
template <class T, class Out>
void logprobs_bwd(Rows<const T> logits, const std::int64_t* targets, Transform transform,
                  RowStats stats, const float* dlogp, const float* dentropy, Rows<Out> out,
                  int threads);

}  // namespace rlvr
