// NumPy views in and out, as in bindings.cpp. Callers have checked shapes.
#include "generation_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>

#include "arrays.h"
#include "decode_attention.h"
#include "pack_attention.h"
#include "sample.h"
#include "vector_math.h"

namespace py = pybind11;

namespace rlvr {
namespace {

void bind_sample(const py::array& logits, const std::optional<py::array_t<double>>& noise,
                 float scale, float cap, Ints& tokens, Floats& logp, int threads) {
  if (logits.shape(0) == 0) return;
  with_dtype(logits, [&](auto tag) {
    using T = decltype(tag);
    const auto stride = logits.strides(0) / static_cast<py::ssize_t>(sizeof(T));
    const Rows<const T> in{static_cast<const T*>(logits.data()), stride, logits.shape(0),
                           logits.shape(1)};
    const double* u = noise ? noise->data() : nullptr;
    const Drawn drawn{tokens.mutable_data(), logp.mutable_data()};
    const py::gil_scoped_release release;
    sample(in, u, {scale, cap}, drawn, threads);
  });
}

template <class T>
Heads<const T> heads(const py::array& x) {
  const auto bytes = static_cast<py::ssize_t>(sizeof(T));
  return {static_cast<const T*>(x.data()), x.strides(0) / bytes, x.strides(1) / bytes};
}

template <class T>
Cached<const T> cached(const py::array& keys, const py::array& values) {
  return {static_cast<const T*>(keys.data()), static_cast<const T*>(values.data()), keys.shape(2)};
}

template <class T>
Cached<T> mutable_cached(py::array& keys, py::array& values) {
  return {static_cast<T*>(keys.mutable_data()), static_cast<T*>(values.mutable_data()),
          keys.shape(2)};
}

// All arrays of numbers have one dtype.
void bind_decode_attention(const py::array& query, const py::array& key, const py::array& value,
                           const py::array& prompt_keys, const py::array& prompt_values,
                           py::array& own_keys, py::array& own_values, const Ints& prompt,
                           const Ints& own, const Ints& length, std::int64_t used, float scale,
                           py::array& out, int threads) {
  with_dtype(query, [&](auto tag) {
    using T = decltype(tag);
    const DecodeShape shape{query.shape(0), query.shape(1), key.shape(1), query.shape(2), used};
    const auto q = heads<T>(query), k = heads<T>(key), v = heads<T>(value);
    const auto prompts = cached<T>(prompt_keys, prompt_values);
    const auto written = mutable_cached<T>(own_keys, own_values);
    const DecodeRows where{prompt.data(), own.data(), length.data()};
    auto* o = static_cast<T*>(out.mutable_data());
    const py::gil_scoped_release release;
    decode_attention(q, k, v, prompts, written, where, shape, scale, o, threads);
  });
}

AnyHeads any_heads(const py::array& x) {
  AnyHeads found;
  with_dtype(x, [&](auto tag) { found = heads<decltype(tag)>(x); });
  return found;
}

AnyOut any_out(py::array& x) {
  AnyOut found;
  with_dtype(x, [&](auto tag) {
    using T = decltype(tag);
    const Heads<const T> in = heads<T>(x);
    found = Heads<T>{static_cast<T*>(x.mutable_data()), in.row_stride, in.head_stride};
  });
  return found;
}

PackInputs pack_inputs(const py::array& query, const py::array& key, const py::array& value,
                       const Ints& stretches, float scale) {
  static_assert(sizeof(Stretch) == 5 * sizeof(std::int64_t), "a row of the table");
  const PackShape shape{query.shape(0), query.shape(1), key.shape(1), query.shape(2)};
  const auto* table = reinterpret_cast<const Stretch*>(stretches.data());
  return {
      any_heads(query), any_heads(key), any_heads(value), table, stretches.shape(0), shape, scale};
}

void bind_pack_attention_fwd(const py::array& query, const py::array& key, const py::array& value,
                             const Ints& stretches, float scale, py::array& out, int threads) {
  const PackInputs inputs = pack_inputs(query, key, value, stretches, scale);
  const AnyOut o = any_out(out);
  const py::gil_scoped_release release;
  pack_attention_fwd(inputs, o, threads);
}

void bind_pack_attention_bwd(const py::array& query, const py::array& key, const py::array& value,
                             const Ints& stretches, float scale, const py::array& d_out,
                             py::array& d_query, py::array& d_key, py::array& d_value,
                             int threads) {
  const PackInputs inputs = pack_inputs(query, key, value, stretches, scale);
  const AnyHeads upstream = any_heads(d_out);
  const PackGradients gradients{any_out(d_query), any_out(d_key), any_out(d_value)};
  const py::gil_scoped_release release;
  pack_attention_bwd(inputs, upstream, gradients, threads);
}

}  // namespace

void bind_generation(py::module_& m) {
  using py::arg;
  m.def("sample", &bind_sample, arg("logits").noconvert(), arg("noise").noconvert(), arg("scale"),
        arg("cap"), arg("tokens").noconvert(), arg("logp").noconvert(), arg("threads"));
  m.def("decode_attention", &bind_decode_attention, arg("query").noconvert(),
        arg("key").noconvert(), arg("value").noconvert(), arg("prompt_keys").noconvert(),
        arg("prompt_values").noconvert(), arg("own_keys").noconvert(),
        arg("own_values").noconvert(), arg("prompt").noconvert(), arg("own").noconvert(),
        arg("length").noconvert(), arg("used"), arg("scale"), arg("out").noconvert(),
        arg("threads"));
  m.def("pack_attention_fwd", &bind_pack_attention_fwd, arg("query").noconvert(),
        arg("key").noconvert(), arg("value").noconvert(), arg("stretches").noconvert(),
        arg("scale"), arg("out").noconvert(), arg("threads"));
  m.def("pack_attention_bwd", &bind_pack_attention_bwd, arg("query").noconvert(),
        arg("key").noconvert(), arg("value").noconvert(), arg("stretches").noconvert(),
        arg("scale"), arg("d_out").noconvert(), arg("d_query").noconvert(),
        arg("d_key").noconvert(), arg("d_value").noconvert(), arg("threads"));
}

}  // namespace rlvr
