// NumPy views in and out: no libtorch, so one build fits any torch. Callers have checked shapes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "group_advantages.h"
#include "logprobs.h"
#include "vector_math.h"

namespace py = pybind11;

namespace rlvr {
namespace {

using Floats = py::array_t<float>;
using Ints = py::array_t<std::int64_t>;

// bf16 crosses as uint16 and fp16 as NumPy's float16 ("e").
template <class F>
void with_dtype(const py::array& logits, F&& call) {
  const char kind = logits.dtype().char_();
  if (kind == 'f') {
    call(float{});
  } else if (kind == 'H') {
    call(BFloat16{});
  } else if (kind == 'e') {
    call(Half{});
  } else {
    throw py::type_error("logits: wanted float32, uint16 (bf16 bits) or float16");
  }
}

template <class T>
Rows<const T> rows(const py::array& a) {
  const auto stride = a.strides(0) / static_cast<py::ssize_t>(sizeof(T));
  return {static_cast<const T*>(a.data()), stride, a.shape(0), a.shape(1)};
}

template <class T>
Rows<T> mutable_rows(py::array& a) {
  const auto stride = a.strides(0) / static_cast<py::ssize_t>(sizeof(T));
  return {static_cast<T*>(a.mutable_data()), stride, a.shape(0), a.shape(1)};
}

RowStats row_stats(Floats& stats) {
  return {stats.mutable_data(0, 0), stats.mutable_data(1, 0), stats.mutable_data(2, 0),
          stats.mutable_data(3, 0)};
}

void bind_logprobs_fwd(const py::array& logits, const Ints& targets, float scale, float cap,
                       Floats& stats, int threads) {
  if (logits.shape(0) == 0) return;
  with_dtype(logits, [&](auto tag) {
    using T = decltype(tag);
    const auto in = rows<T>(logits);
    const auto out = row_stats(stats);
    const auto* ids = targets.data();
    const py::gil_scoped_release release;
    logprobs_fwd<T>(in, ids, {scale, cap}, out, threads);
  });
}

void bind_logprobs_bwd(const py::array& logits, const Ints& targets, Floats& stats,
                       const Floats& dlogp, const std::optional<Floats>& dentropy, float scale,
                       float cap, py::array& out, int threads) {
  if (logits.shape(0) == 0) return;
  with_dtype(logits, [&](auto tag) {
    using T = decltype(tag);
    const auto in = rows<T>(logits);
    const auto gradient = mutable_rows<T>(out);
    const auto forward = row_stats(stats);
    const auto* ids = targets.data();
    const auto* dl = dlogp.data();
    const auto* dh = dentropy ? dentropy->data() : nullptr;
    const py::gil_scoped_release release;
    logprobs_bwd<T>(in, ids, {scale, cap}, forward, dl, dh, gradient, threads);
  });
}

void bind_group_advantages(const Floats& rewards, const Ints& offsets, int scale, int ddof,
                           float eps, Floats& advantages) {
  group_advantages(rewards.data(), offsets.data(), offsets.size() - 1,
                   {static_cast<Scale>(scale), ddof, eps}, advantages.mutable_data());
}

}  // namespace
}  // namespace rlvr

PYBIND11_MODULE(_C, m) {
  using py::arg;
  m.def("logprobs_fwd", &rlvr::bind_logprobs_fwd, arg("logits").noconvert(),
        arg("targets").noconvert(), arg("scale"), arg("cap"), arg("stats").noconvert(),
        arg("threads"));
  m.def("logprobs_bwd", &rlvr::bind_logprobs_bwd, arg("logits").noconvert(),
        arg("targets").noconvert(), arg("stats").noconvert(), arg("dlogp").noconvert(),
        arg("dentropy").noconvert(), arg("scale"), arg("cap"), arg("out").noconvert(),
        arg("threads"));
  m.def("group_advantages", &rlvr::bind_group_advantages, arg("rewards").noconvert(),
        arg("offsets").noconvert(), arg("scale"), arg("ddof"), arg("eps"),
        arg("advantages").noconvert());
}
