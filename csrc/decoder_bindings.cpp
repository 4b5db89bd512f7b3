// As in bindings.cpp. Arrays are `[rows, groups, size]` or `[rows, size]`, fp32 or bf16 as uint16.
#include "decoder_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "arrays.h"
#include "decoder.h"
#include "vector_math.h"

namespace py = pybind11;

namespace rlvr {
namespace {

using Maybe = std::optional<py::array>;

template <class T>
Grouped<T> grouped(T* data, const py::array& a) {
  const auto item = static_cast<py::ssize_t>(sizeof(T));
  if (a.ndim() == 2) return {data, a.strides(0) / item, 0, a.shape(0), 1, a.shape(1)};
  return {data, a.strides(0) / item, a.strides(1) / item, a.shape(0), a.shape(1), a.shape(2)};
}

// One dtype for arrays that must share it.
template <class T>
void check(const py::array& a) {
  bool same = false;
  with_wide_dtype(a, [&](auto tag) { same = std::is_same_v<decltype(tag), T>; });
  const auto last = a.ndim() - 1;
  const bool fits = last == 1 || last == 2;
  if (!same || !fits || (a.shape(last) > 1 && a.strides(last) != py::ssize_t{sizeof(T)})) {
    throw py::type_error("wanted [rows, groups, size], contiguous in the last, of one dtype");
  }
}

template <class T>
Grouped<const T> in(const py::array& a) {
  check<T>(a);
  return grouped(static_cast<const T*>(a.data()), a);
}

template <class T>
Grouped<T> out(py::array& a) {
  check<T>(a);
  return grouped(static_cast<T*>(a.mutable_data()), a);
}

template <class T>
Grouped<const T> in(const Maybe& a) {
  return a ? in<T>(*a) : Grouped<const T>{nullptr, 0, 0, 0, 1, 0};
}

template <class T>
Grouped<T> out(Maybe& a) {
  return a ? out<T>(*a) : Grouped<T>{nullptr, 0, 0, 0, 1, 0};
}

std::vector<float> as_floats(const py::array& a) {
  std::vector<float> values(static_cast<std::size_t>(a.size()));
  with_wide_dtype(a, [&](auto tag) {
    const auto* x = static_cast<const decltype(tag)*>(a.data());
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = to_float(x[i]);
  });
  return values;
}

void bind_rms_norm_fwd(const py::array& x, const Maybe& added, const py::array& weight, float eps,
                       Maybe& total, py::array& normed, Floats& rstd, int threads) {
  const auto w = as_floats(weight);
  auto* r = rstd.mutable_data();
  with_wide_dtype(x, [&](auto stream) {
    with_wide_dtype(normed, [&](auto branch) {
      using S = decltype(stream);
      using B = decltype(branch);
      const auto from = in<S>(x);
      const auto plus = in<B>(added);
      const auto sum = out<S>(total);
      const auto to = out<B>(normed);
      const py::gil_scoped_release release;
      rms_norm_fwd(from, plus, w.data(), eps, sum, to, r, threads);
    });
  });
}

void bind_rms_norm_bwd(const py::array& total, const py::array& weight, const Floats& rstd,
                       const py::array& d_normed, const Maybe& d_total, py::array& d_x,
                       Maybe& d_added, Floats& d_weight, int threads) {
  const auto w = as_floats(weight);
  const auto* r = rstd.data();
  auto* dw = d_weight.mutable_data();
  with_wide_dtype(total, [&](auto stream) {
    with_wide_dtype(d_normed, [&](auto branch) {
      using S = decltype(stream);
      using B = decltype(branch);
      const auto from = in<S>(total);
      const auto d = in<B>(d_normed);
      const auto plus = in<S>(d_total);
      const auto to = out<S>(d_x);
      const auto also = out<B>(d_added);
      const py::gil_scoped_release release;
      rms_norm_bwd(from, w.data(), r, d, plus, to, also, dw, threads);
    });
  });
}

void bind_gated_fwd(const py::array& gate, const py::array& up, py::array& product, int threads) {
  with_wide_dtype(gate, [&](auto tag) {
    using T = decltype(tag);
    const auto g = in<T>(gate);
    const auto u = in<T>(up);
    const auto to = out<T>(product);
    const py::gil_scoped_release release;
    gated_fwd(g, u, to, threads);
  });
}

void bind_gated_bwd(const py::array& gate, const py::array& up, const py::array& d_product,
                    py::array& d_gate, py::array& d_up, int threads) {
  with_wide_dtype(gate, [&](auto tag) {
    using T = decltype(tag);
    const auto g = in<T>(gate);
    const auto u = in<T>(up);
    const auto d = in<T>(d_product);
    const auto to_gate = out<T>(d_gate);
    const auto to_up = out<T>(d_up);
    const py::gil_scoped_release release;
    gated_bwd(g, u, d, to_gate, to_up, threads);
  });
}

void bind_rotate(const py::array& x, const py::array& cosine, const py::array& sine, float sign,
                 py::array& turned, int threads) {
  with_wide_dtype(x, [&](auto from_tag) {
    with_wide_dtype(turned, [&](auto to_tag) {
      with_wide_dtype(cosine, [&](auto angle) {
        using Angle = decltype(angle);
        const auto from = in<decltype(from_tag)>(x);
        const auto to = out<decltype(to_tag)>(turned);
        const auto* c = static_cast<const Angle*>(cosine.data());
        const auto* s = static_cast<const Angle*>(sine.data());
        const py::gil_scoped_release release;
        rotate(from, c, s, sign, to, threads);
      });
    });
  });
}

}  // namespace

void bind_decoder(py::module_& m) {
  using py::arg;
  m.def("rms_norm_fwd", &bind_rms_norm_fwd, arg("x").noconvert(), arg("added").noconvert(),
        arg("weight").noconvert(), arg("eps"), arg("total").noconvert(), arg("normed").noconvert(),
        arg("rstd").noconvert(), arg("threads"));
  m.def("rms_norm_bwd", &bind_rms_norm_bwd, arg("total").noconvert(), arg("weight").noconvert(),
        arg("rstd").noconvert(), arg("d_normed").noconvert(), arg("d_total").noconvert(),
        arg("d_x").noconvert(), arg("d_added").noconvert(), arg("d_weight").noconvert(),
        arg("threads"));
  m.def("gated_fwd", &bind_gated_fwd, arg("gate").noconvert(), arg("up").noconvert(),
        arg("product").noconvert(), arg("threads"));
  m.def("gated_bwd", &bind_gated_bwd, arg("gate").noconvert(), arg("up").noconvert(),
        arg("d_product").noconvert(), arg("d_gate").noconvert(), arg("d_up").noconvert(),
        arg("threads"));
  m.def("rotate", &bind_rotate, arg("x").noconvert(), arg("cosine").noconvert(),
        arg("sine").noconvert(), arg("sign"), arg("turned").noconvert(), arg("threads"));
}

}  // namespace rlvr
