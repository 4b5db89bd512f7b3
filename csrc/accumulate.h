// Sums of products that a GEMM rounded to bf16 or fp16, kept in fp32 between tiles.
#pragma once

#include <cstdint>

namespace rlvr {

// total = product.
template <class T>
void accumulate_first(float* total, const T* product, std::int64_t size, int threads);

// total += product.
template <class T>
void accumulate(float* total, const T* product, std::int64_t size, int threads);

// out = total + product: the last one needs no further pass over the total.
template <class T>
void accumulate_last(const float* total, const T* product, T* out, std::int64_t size, int threads);

}  // namespace rlvr
