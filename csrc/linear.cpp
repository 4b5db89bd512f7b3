#include "linear.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <memory>

#define RLVR_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512bf16")))

namespace rlvr {
namespace {

constexpr int kLanes = 16;

// A tile of out has kRows x kVectors accumulators: 24 of the 32 registers.
constexpr int kRows = 6;
constexpr int kVectors = 4;
constexpr int kColumns = kVectors * kLanes;

// 40 KiB of weights, so that they stay in the first cache. Sums over a block of D are added in
// fp32, which makes them more exact than one long chain.
constexpr int kDepth = 320;
static_assert(kDepth % (2 * kLanes) == 0, "pack writes whole squares");

// A block of weights: pairs of neighbouring d from kColumns rows side by side, as vdpbf16ps wants.
using Pairs = std::uint32_t[kDepth / 2][kColumns];

struct alignas(64) Panel {
  Pairs pairs;
  float bias[kColumns];
};

// Swaps the upper right with the lower left quarter of every square of 2 S x 2 S.
template <int S>
RLVR_AVX512_BF16 inline void swap_quarters(__m512i (&x)[kLanes]) {
  constexpr __mmask16 right = (0xffff / ((1 << S) + 1)) << S;  // lanes with bit S
  for (int i = 0; i < kLanes; ++i) {
    if ((i & S) != 0) continue;
    const __m512i upper = x[i], lower = x[i + S];
    x[i] = _mm512_mask_alignr_epi32(upper, right, lower, lower, kLanes - S);
    x[i + S] = _mm512_mask_alignr_epi32(lower, static_cast<__mmask16>(~right), upper, upper, S);
  }
}

RLVR_AVX512_BF16 inline void transpose(__m512i (&x)[kLanes]) {
  swap_quarters<1>(x);
  swap_quarters<2>(x);
  swap_quarters<4>(x);
  swap_quarters<8>(x);
}

// Rows and an odd d that are missing become zeros.
RLVR_AVX512_BF16 void pack(Matrix<const BFloat16> block, Pairs& pairs) {
  for (std::int64_t d = 0; d < block.columns; d += 2 * kLanes) {
    const auto missing = std::max<std::int64_t>(d + 2 * kLanes - block.columns, 0);
    const __mmask32 present = 0xffffffffu >> missing;
    for (int column = 0; column < kColumns; column += kLanes) {
      __m512i x[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const std::int64_t v = column + i;
        x[i] = v < block.rows ? _mm512_maskz_loadu_epi16(present, block.data + v * block.stride + d)
                              : _mm512_setzero_si512();
      }
      transpose(x);
      for (int i = 0; i < kLanes; ++i) _mm512_store_si512(&pairs[d / 2 + i][column], x[i]);
    }
  }
}

RLVR_AVX512_BF16 RLVR_INLINE __m512bh broadcast(std::int32_t pair) {
  __m512i all = _mm512_set1_epi32(pair);
  asm("" : "+v"(all));  // clang 16 crashes where it sees that all bf16 pairs are equal
  return reinterpret_cast<__m512bh>(all);
}

template <int R>
using Sums = __m512[R][kVectors];

// The one step of all sums: R values of hidden, a pair of d each, times kColumns weights.
template <int R>
RLVR_AVX512_BF16 RLVR_INLINE void add_products(Sums<R>& sums, const std::int32_t (&hidden)[R],
                                               const std::uint32_t (&weight)[kColumns]) {
  __m512bh w[kVectors];
  for (int c = 0; c < kVectors; ++c) {
    w[c] = reinterpret_cast<__m512bh>(_mm512_load_si512(weight + c * kLanes));
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const auto h = broadcast(hidden[r]);
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], h, w[c]);
  }
}

// Rows of out lie pages apart and are in no cache: asked for here, they are there when the sums
// are. The last column counts because a row may start within a line.
template <int R>
RLVR_AVX512_BF16 RLVR_INLINE void prefetch_for_writing(Matrix<float> out) {
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c <= kVectors; ++c) {
      const auto v = std::min<std::int64_t>(c * kLanes, out.columns - 1);
      __builtin_prefetch(out.data + r * out.stride + v, 1);
    }
  }
}

// out = base + hidden * pairs for R rows; base may be out.
template <int R>
RLVR_AVX512_BF16 void multiply(Matrix<const BFloat16> hidden, const Pairs& pairs,
                               Matrix<const float> base, Matrix<float> out) {
  prefetch_for_writing<R>(out);
  Sums<R> sums;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) sums[r][c] = _mm512_setzero_ps();
  }
  std::int32_t pair[R];
  const std::int64_t whole = hidden.columns / 2;
  for (std::int64_t k = 0; k < whole; ++k) {
    for (int r = 0; r < R; ++r) std::memcpy(&pair[r], hidden.data + r * hidden.stride + 2 * k, 4);
    add_products<R>(sums, pair, pairs[k]);
  }
  if (hidden.columns % 2 != 0) {
    for (int r = 0; r < R; ++r) pair[r] = hidden.data[r * hidden.stride + 2 * whole].bits;
    add_products<R>(sums, pair, pairs[whole]);
  }
#pragma GCC unroll 8
  for (int c = 0; c < kVectors; ++c) {
    const auto present = std::clamp<std::int64_t>(out.columns - c * kLanes, 0, kLanes);
    const __mmask16 mask = 0xffffu >> (kLanes - present);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512 b = _mm512_maskz_loadu_ps(mask, base.data + r * base.stride + c * kLanes);
      _mm512_mask_storeu_ps(out.data + r * out.stride + c * kLanes, mask,
                            _mm512_add_ps(b, sums[r][c]));
    }
  }
}

constexpr decltype(&multiply<kRows>) kMultiply[kRows] = {multiply<1>, multiply<2>, multiply<3>,
                                                         multiply<4>, multiply<5>, multiply<6>};

std::int64_t blocks_of_depth(std::int64_t depth) { return (depth - 1) / kDepth + 1; }

// Panel by panel, each from its first d to its last; after the last block come empty ones.
Matrix<const BFloat16> weight_block(Matrix<const BFloat16> weight, std::int64_t index) {
  const std::int64_t depths = blocks_of_depth(weight.columns);
  const std::int64_t v = index / depths * kColumns;
  const std::int64_t d = index % depths * kDepth;
  return {weight.data + v * weight.stride + d, weight.stride,
          std::clamp<std::int64_t>(weight.rows - v, 0, kColumns),
          std::min<std::int64_t>(weight.columns - d, kDepth)};
}

// The share of a block that falls on rows [begin, end) of `count`.
void prefetch(Matrix<const BFloat16> block, std::int64_t begin, std::int64_t end,
              std::int64_t count) {
  constexpr std::int64_t line = 64 / sizeof(BFloat16);
  for (auto v = block.rows * begin / count; v < block.rows * end / count; ++v) {
    for (std::int64_t d = 0; d < block.columns; d += line) {
      __builtin_prefetch(block.data + v * block.stride + d, 0, 2);
    }
  }
}

// The columns of out from v on, as many as a panel has.
void multiply_panel(Matrix<const BFloat16> hidden, Matrix<const BFloat16> weight, const float* bias,
                    std::int64_t v, Matrix<float> out, Panel& panel) {
  const std::int64_t columns = std::min<std::int64_t>(out.columns - v, kColumns);
  if (bias != nullptr) std::copy_n(bias + v, columns, panel.bias);
  const std::int64_t depths = blocks_of_depth(weight.columns);
  for (std::int64_t i = 0; i < depths; ++i) {
    const std::int64_t index = v / kColumns * depths + i;
    const auto block = weight_block(weight, index);
    const auto next = weight_block(weight, index + 1);
    pack(block, panel.pairs);
    for (std::int64_t t = 0; t < out.rows; t += kRows) {
      const std::int64_t rows = std::min<std::int64_t>(out.rows - t, kRows);
      const BFloat16* h = hidden.data + t * hidden.stride + i * kDepth;
      float* to = out.data + t * out.stride + v;
      const auto base = i == 0 ? Matrix<const float>{panel.bias, 0, rows, columns}
                               : Matrix<const float>{to, out.stride, rows, columns};
      prefetch(next, t, t + rows, out.rows);
      kMultiply[rows - 1]({h, hidden.stride, rows, block.columns}, panel.pairs, base,
                          {to, out.stride, rows, columns});
    }
  }
}

}  // namespace

bool linear_f32_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512bf16");
}

void linear_f32(Matrix<const BFloat16> hidden, Matrix<const BFloat16> weight, const float* bias,
                Matrix<float> out, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const auto panel = std::make_unique<Panel>();
#pragma omp for schedule(static)
    for (std::int64_t v = 0; v < out.columns; v += kColumns) {
      multiply_panel(hidden, weight, bias, v, out, *panel);
    }
  }
}

}  // namespace rlvr

#else

namespace rlvr {

bool linear_f32_supported() { return false; }

void linear_f32(Matrix<const BFloat16>, Matrix<const BFloat16>, const float*, Matrix<float>, int) {}

}  // namespace rlvr

#endif
