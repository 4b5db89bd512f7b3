// Products of fp32 matrices that fit the caches, and what attention does with them.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "row_sweep.h"
#include "vector_math.h"

namespace rlvr {

// Columns of a product are a multiple of as many.
constexpr std::int64_t kLanes = 16;

// The first element of a matrix, rows `stride` apart.
template <class T>
struct Rectangle {
  T* data;
  std::int64_t stride;
  Rectangle row(std::int64_t r) const { return {data + r * stride, stride}; }
  Rectangle from(std::int64_t column) const { return {data + column, stride}; }
  operator Rectangle<const T>() const { return {data, stride}; }
};

struct ProductSize {
  std::int64_t rows;
  std::int64_t depth;
  std::int64_t columns;
};

// out [rows, columns] += a [rows, depth] b [depth, columns]. The order of an element's sums follows
// from the depth alone.
void multiply(Rectangle<const float> a, Rectangle<const float> b, ProductSize size,
              Rectangle<float> out);

// The same with a [depth, rows].
void multiply_transposed(Rectangle<const float> a, Rectangle<const float> b, ProductSize size,
                         Rectangle<float> out);

// Rows of scores, in bits, become probabilities.
void softmax(Rectangle<float> scores, std::int64_t rows, std::int64_t width);

// [rows, heads, d], the last contiguous.
template <class T>
struct Heads {
  T* data;
  std::int64_t row_stride;
  std::int64_t head_stride;
  T* at(std::int64_t row, std::int64_t head) const {
    return data + row * row_stride + head * head_stride;
  }
};

template <class T>
const float* as_floats(const T* x, std::int64_t size, std::vector<float>& numbers) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    read_block(x, size, {1.0f, 0.0f}, numbers.data());
    return numbers.data();
  }
}

}  // namespace rlvr
