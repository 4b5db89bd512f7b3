#include "accumulate.h"

#include <algorithm>

#include "vector_math.h"

namespace rlvr {
namespace {

constexpr std::int64_t kBlock = 1 << 16;

template <class T>
RLVR_CLONES void store(float* total, const T* product, std::int64_t size) {
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) total[i] = to_float(product[i]);
}

template <class T>
RLVR_CLONES void add(float* total, const T* product, std::int64_t size) {
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) total[i] += to_float(product[i]);
}

template <class T>
RLVR_CLONES void finish(const float* total, const T* product, T* out, std::int64_t size) {
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) out[i] = from_float<T>(total[i] + to_float(product[i]));
}

template <class F>
void by_blocks(std::int64_t size, int threads, F&& run) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t begin = 0; begin < size; begin += kBlock) {
    run(begin, std::min(kBlock, size - begin));
  }
}

}  // namespace

template <class T>
void accumulate_first(float* total, const T* product, std::int64_t size, int threads) {
  by_blocks(size, threads,
            [=](std::int64_t i, std::int64_t n) { store(total + i, product + i, n); });
}

template <class T>
void accumulate(float* total, const T* product, std::int64_t size, int threads) {
  by_blocks(size, threads, [=](std::int64_t i, std::int64_t n) { add(total + i, product + i, n); });
}

template <class T>
void accumulate_last(const float* total, const T* product, T* out, std::int64_t size, int threads) {
  by_blocks(size, threads,
            [=](std::int64_t i, std::int64_t n) { finish(total + i, product + i, out + i, n); });
}

#define RLVR_INSTANTIATE(T)                                               \
  template void accumulate_first<T>(float*, const T*, std::int64_t, int); \
  template void accumulate<T>(float*, const T*, std::int64_t, int);       \
  template void accumulate_last<T>(const float*, const T*, T*, std::int64_t, int)

RLVR_INSTANTIATE(BFloat16);
RLVR_INSTANTIATE(Half);

}  // namespace rlvr
