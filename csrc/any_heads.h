// Heads whose dtype is known at run time, to and from fp32.
#pragma once

#include <cstdint>
#include <variant>

#include "small_products.h"
#include "vector_math.h"

namespace rlvr {

using AnyHeads = std::variant<Heads<const float>, Heads<const BFloat16>, Heads<const Half>>;
using AnyOut = std::variant<Heads<float>, Heads<BFloat16>, Heads<Half>>;

// Neighbouring rows and heads of d numbers each; as fp32 they lie end to end.
struct HeadRows {
  std::int64_t row;
  std::int64_t rows;
  std::int64_t head;
  std::int64_t heads;
  std::int64_t size;
};

// Both multiply by `factor`.
void read_heads(const AnyHeads& from, HeadRows part, float factor, float* to);
void write_heads(const float* from, HeadRows part, float factor, const AnyOut& to);

}  // namespace rlvr
