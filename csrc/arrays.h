// NumPy arrays as the extension takes them: bf16 crosses as uint16, fp16 as NumPy's float16 ("e").
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>

#include "vector_math.h"

namespace rlvr {

using Floats = pybind11::array_t<float>;
using Ints = pybind11::array_t<std::int64_t>;

// `call` with a value of the array's type, fp32 or bf16.
template <class F>
void with_wide_dtype(const pybind11::array& x, F&& call) {
  const char kind = x.dtype().char_();
  if (kind == 'f') {
    call(float{});
  } else if (kind == 'H') {
    call(BFloat16{});
  } else {
    throw pybind11::type_error("wanted float32 or uint16 (bf16 bits)");
  }
}

// The same for fp16 too.
template <class F>
void with_dtype(const pybind11::array& x, F&& call) {
  const char kind = x.dtype().char_();
  if (kind == 'e') {
    call(Half{});
  } else if (kind == 'f' || kind == 'H') {
    with_wide_dtype(x, call);
  } else {
    throw pybind11::type_error("wanted float32, uint16 (bf16 bits) or float16");
  }
}

}  // namespace rlvr
