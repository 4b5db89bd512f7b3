// Logits in fp32 from bf16 hidden states and weights, on processors with AVX512-BF16.
#pragma once

#include <cstdint>

#include "vector_math.h"

namespace rlvr {

template <class T>
struct Matrix {
  T* data;
  std::int64_t stride;  // elements between rows
  std::int64_t rows;
  std::int64_t columns;
};

// Whether this build and this processor have the instructions; `linear_f32` needs them.
bool linear_f32_supported();

// out[t, v] = sum_d hidden[t, d] weight[v, d] + bias[v]; hidden [T, D], weight [V, D], out [T, V],
// and bias [V], which may be null. The bits of an element depend on its row of hidden, its row of
// weight and its bias alone. Subnormal inputs and sums count as 0.
void linear_f32(Matrix<const BFloat16> hidden, Matrix<const BFloat16> weight, const float* bias,
                Matrix<float> out, int threads);

}  // namespace rlvr
