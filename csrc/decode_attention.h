// Attention of one new token per row to a prompt that several rows share and to what the row wrote.
#pragma once

#include <cstdint>

#include "small_products.h"

namespace rlvr {

// Tokens of a sequence in blocks of as many: keys lie as [blocks, d, kTokens], values as
// [blocks, kTokens, d], so that both products of attention run along their rows. Places without a
// token hold finite numbers.
constexpr std::int64_t kTokens = 16;

// [sequences, K heads, blocks, d * kTokens], contiguous.
template <class T>
struct Cached {
  T* keys;
  T* values;
  std::int64_t blocks;
};

struct DecodeShape {
  std::int64_t rows;
  std::int64_t heads;      // of queries
  std::int64_t key_heads;  // each serves heads / key_heads neighbouring ones
  std::int64_t size;       // d
  std::int64_t used;       // tokens that each row has written, the new one included
};

// Where a row is found; rows of the same prompt are neighbours.
struct DecodeRows {
  const std::int64_t* prompt;  // [rows]
  const std::int64_t* own;     // [rows], its sequence of `own`
  const std::int64_t* length;  // [prompts]
};

// Stores the new keys and values in `own`, and writes the attention's output, [rows, heads, d]
// contiguous. Sums are fp32, and the bits of a row depend on that row and its prompt alone.
template <class T>
void decode_attention(Heads<const T> query, Heads<const T> key, Heads<const T> value,
                      Cached<const T> prompts, Cached<T> own, DecodeRows where, DecodeShape shape,
                      float scale, T* out, int threads);

}  // namespace rlvr
