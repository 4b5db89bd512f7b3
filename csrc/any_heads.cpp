#include "any_heads.h"

namespace rlvr {
namespace {

template <class T>
RLVR_CLONES void read(Heads<const T> from, HeadRows part, float factor, float* to) {
  for (std::int64_t r = part.row; r < part.row + part.rows; ++r) {
    for (std::int64_t h = part.head; h < part.head + part.heads; ++h, to += part.size) {
      const T* x = from.at(r, h);
#pragma omp simd
      for (std::int64_t c = 0; c < part.size; ++c) to[c] = factor * to_float(x[c]);
    }
  }
}

template <class T>
RLVR_CLONES void write(const float* from, HeadRows part, float factor, Heads<T> to) {
  for (std::int64_t r = part.row; r < part.row + part.rows; ++r) {
    for (std::int64_t h = part.head; h < part.head + part.heads; ++h, from += part.size) {
      T* x = to.at(r, h);
#pragma omp simd
      for (std::int64_t c = 0; c < part.size; ++c) x[c] = from_float<T>(factor * from[c]);
    }
  }
}

}  // namespace

void read_heads(const AnyHeads& from, HeadRows part, float factor, float* to) {
  std::visit([&](auto x) { read(x, part, factor, to); }, from);
}

void write_heads(const float* from, HeadRows part, float factor, const AnyOut& to) {
  std::visit([&](auto x) { write(from, part, factor, x); }, to);
}

}  // namespace rlvr
