#include "sample.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "row_sweep.h"
#include "vector_math.h"

namespace rlvr {
namespace {

// The mass of a block of tokens is sum 2^shift.
struct Block {
  float sum;
  float shift;
};

struct Swept {
  float top = -std::numeric_limits<float>::infinity();  // greatest u
  std::int64_t top_id = 0;                              // its first id
  float shift = kNoMaximum;
};

RLVR_CLONES float mass(const float* u, std::int64_t size, Exponent exponent) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t v = 0; v < size; ++v) sum += exp2_bounded(in_bits(exponent, u[v]));
  return sum;
}

RLVR_CLONES void masses(float* u, std::int64_t size, Exponent exponent) {
#pragma omp simd
  for (std::int64_t v = 0; v < size; ++v) u[v] = exp2_bounded(in_bits(exponent, u[v]));
}

template <class T>
Swept sweep_blocks(const T* row, std::int64_t vocab_size, Transform transform, Block* blocks) {
  alignas(64) float u[kBlock<T>];
  const float factor = exponent(transform, 0.0).factor;
  Swept swept;
  for (std::int64_t start = 0; start < vocab_size; start += kBlock<T>) {
    const std::int64_t size = std::min(kBlock<T>, vocab_size - start);
    read_block(row + start, size, transform, u);
    const float top = greatest(u, size);
    if (top > swept.top) {
      swept.top = top;
      swept.top_id = start + (std::find(u, u + size, top) - u);
      swept.shift = std::max(factor * top, kNoMaximum);
    }
    *blocks++ = {mass(u, size, exponent(transform, swept.shift)), swept.shift};
  }
  return swept;
}

// The first token of a block at which its cumulative mass reaches `mark`. The sum of the block was
// taken in another order, so that it may be missed by a rounding: then the last that has any mass.
template <class T>
std::int64_t find_token(const T* block, std::int64_t size, Transform transform, float shift,
                        double mark) {
  alignas(64) float e[kBlock<T>];
  read_block(block, size, transform, e);
  masses(e, size, exponent(transform, shift));
  std::int64_t last = 0;
  double reached = 0.0;
  for (std::int64_t v = 0; v < size; ++v) {
    reached += e[v];
    if (e[v] > 0.0f) last = v;
    if (reached >= mark) break;
  }
  return last;
}

template <class T>
void sample_row(const T* row, std::int64_t vocab_size, Transform transform, const double* noise,
                std::vector<Block>& blocks, Drawn drawn) {
  const Swept swept = sweep_blocks(row, vocab_size, transform, blocks.data());
  const auto units = [&](const Block& block) {
    return std::exp2(static_cast<double>(block.shift) - swept.shift);
  };
  double total = 0.0;
  for (const Block& block : blocks) total += block.sum * units(block);
  std::int64_t token = swept.top_id;
  if (noise != nullptr) {
    const double mark = total * (1.0 - *noise);
    double reached = 0.0;
    for (std::size_t b = 0; b < blocks.size(); ++b) {
      const double before = reached;
      reached += blocks[b].sum * units(blocks[b]);
      if (!(reached >= mark)) continue;
      const std::int64_t start = b * kBlock<T>;
      token = start + find_token(row + start, std::min(kBlock<T>, vocab_size - start), transform,
                                 blocks[b].shift, (mark - before) / units(blocks[b]));
      break;
    }
  }
  float u;
  read_block(row + token, 1, transform, &u);
  const double d = static_cast<double>(exponent(transform, 0.0).factor) * u - swept.shift;
  *drawn.token = token;
  *drawn.logp = static_cast<float>(d * kLog2 - std::log(total));
}

}  // namespace

template <class T>
void sample(Rows<const T> logits, const double* noise, Transform transform, Drawn drawn,
            int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<Block> blocks((logits.vocab_size + kBlock<T> - 1) / kBlock<T>);
#pragma omp for schedule(static)
    for (std::int64_t t = 0; t < logits.count; ++t) {
      sample_row(logits.data + t * logits.stride, logits.vocab_size, transform,
                 noise == nullptr ? nullptr : noise + t, blocks, {drawn.token + t, drawn.logp + t});
    }
  }
}

#define RLVR_INSTANTIATE(T) \
  template void sample<T>(Rows<const T>, const double*, Transform, Drawn, int)

RLVR_INSTANTIATE(float);
RLVR_INSTANTIATE(BFloat16);
RLVR_INSTANTIATE(Half);

}  // namespace rlvr
