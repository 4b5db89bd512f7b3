// NumPy views in and out: no libtorch, so one build fits any torch. Callers have checked shapes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <type_traits>

#include "accumulate.h"
#include "arrays.h"
#include "decoder_bindings.h"
#include "divergence.h"
#include "generation_bindings.h"
#include "group_advantages.h"
#include "linear.h"
#include "logprobs.h"
#include "token_statistics.h"
#include "vector_math.h"

namespace py = pybind11;

namespace rlvr {
namespace {

using BFloat16Bits = py::array_t<std::uint16_t>;

// A gradient has its logits' dtype; that of float logits may have any.
template <class T, class F>
void with_narrower(const py::array& out, F&& call) {
  with_dtype(out, [&](auto tag) {
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, decltype(tag)>) {
      call(tag);
    } else {
      throw py::type_error("out: wanted the logits' dtype");
    }
  });
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
    with_narrower<T>(out, [&](auto out_tag) {
      const auto in = rows<T>(logits);
      const auto gradient = mutable_rows<decltype(out_tag)>(out);
      const auto forward = row_stats(stats);
      const auto* ids = targets.data();
      const auto* dl = dlogp.data();
      const auto* dh = dentropy ? dentropy->data() : nullptr;
      const py::gil_scoped_release release;
      logprobs_bwd(in, ids, {scale, cap}, forward, dl, dh, gradient, threads);
    });
  });
}

void bind_divergence(const py::array& student, const py::array& teacher, const Floats& coef,
                     int kind, float scale, float cap, Floats& kl, std::optional<py::array>& out,
                     int threads) {
  if (student.shape(0) == 0) return;
  with_dtype(student, [&](auto tag) {
    using T = decltype(tag);
    const auto run = [&](auto out_tag) {
      using Out = decltype(out_tag);
      const auto s = rows<T>(student);
      const auto t = rows<T>(teacher);
      const auto gradient = out ? mutable_rows<Out>(*out) : Rows<Out>{};
      const auto* c = coef.data();
      auto* found = kl.mutable_data();
      const py::gil_scoped_release release;
      divergence(s, t, c, static_cast<Divergence>(kind), {scale, cap}, found, gradient, threads);
    };
    if (out) {
      with_narrower<T>(*out, run);
    } else {
      run(tag);
    }
  });
}

// Rows as in `TokenStatistics` of rlvr_fast/ops/token_statistics.py.
TokenStatistics token_statistics(Floats& stats, Ints& top_id) {
  const auto row = [&](int i) { return stats.mutable_data(i, 0); };
  return {row_stats(stats), row(4), row(5), row(6), row(7), row(8), top_id.mutable_data()};
}

void bind_token_statistics_fwd(const py::array& logits, const Ints& targets, float scale, float cap,
                               float log_min_p, Floats& stats, Ints& top_id, int threads) {
  if (logits.shape(0) == 0) return;
  with_dtype(logits, [&](auto tag) {
    const auto in = rows<decltype(tag)>(logits);
    const auto found = token_statistics(stats, top_id);
    const auto* ids = targets.data();
    const py::gil_scoped_release release;
    token_statistics_fwd(in, ids, {scale, cap}, log_min_p, found, threads);
  });
}

void bind_token_statistics_bwd(const py::array& logits, const Ints& targets, Floats& stats,
                               Ints& top_id, const Floats& grads, float scale, float cap,
                               float log_min_p, py::array& out, int threads) {
  if (logits.shape(0) == 0) return;
  with_dtype(logits, [&](auto tag) {
    using T = decltype(tag);
    with_narrower<T>(out, [&](auto out_tag) {
      const auto in = rows<T>(logits);
      const auto gradient = mutable_rows<decltype(out_tag)>(out);
      const auto found = token_statistics(stats, top_id);
      const auto row = [&](int i) { return grads.data(i, 0); };
      const StatisticsGradient wanted{row(0), row(1), row(4), row(5), row(6), row(7)};
      const auto* ids = targets.data();
      const py::gil_scoped_release release;
      token_statistics_bwd(in, ids, {scale, cap}, log_min_p, found, wanted, gradient, threads);
    });
  });
}

// Contiguous arrays of one size; with `out` this product is the last.
void bind_accumulate(Floats& total, const py::array& product, bool first,
                     std::optional<py::array>& out, int threads) {
  with_dtype(product, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (std::is_same_v<T, float>) {
      throw py::type_error("product: wanted uint16 (bf16 bits) or float16");
    } else {
      const auto size = static_cast<std::int64_t>(total.size());
      auto* sum = total.mutable_data();
      const auto* added = static_cast<const T*>(product.data());
      auto* last = out ? static_cast<T*>(out->mutable_data()) : nullptr;
      const py::gil_scoped_release release;
      if (last != nullptr) {
        accumulate_last(sum, added, last, size, threads);
      } else if (first) {
        accumulate_first(sum, added, size, threads);
      } else {
        accumulate(sum, added, size, threads);
      }
    }
  });
}

template <class T>
Matrix<T> matrix(Rows<T> a) {
  return {a.data, a.stride, a.count, a.vocab_size};
}

void bind_linear_f32(const BFloat16Bits& hidden, const BFloat16Bits& weight,
                     const std::optional<Floats>& bias, Floats& out, int threads) {
  if (hidden.shape(0) == 0) return;
  const auto h = matrix(rows<BFloat16>(hidden));
  const auto w = matrix(rows<BFloat16>(weight));
  const auto* b = bias ? bias->data() : nullptr;
  const auto o = matrix(mutable_rows<float>(out));
  const py::gil_scoped_release release;
  linear_f32(h, w, b, o, threads);
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
  rlvr::bind_decoder(m);
  rlvr::bind_generation(m);
  m.def("logprobs_fwd", &rlvr::bind_logprobs_fwd, arg("logits").noconvert(),
        arg("targets").noconvert(), arg("scale"), arg("cap"), arg("stats").noconvert(),
        arg("threads"));
  m.def("logprobs_bwd", &rlvr::bind_logprobs_bwd, arg("logits").noconvert(),
        arg("targets").noconvert(), arg("stats").noconvert(), arg("dlogp").noconvert(),
        arg("dentropy").noconvert(), arg("scale"), arg("cap"), arg("out").noconvert(),
        arg("threads"));
  m.def("divergence", &rlvr::bind_divergence, arg("student").noconvert(),
        arg("teacher").noconvert(), arg("coef").noconvert(), arg("kind"), arg("scale"), arg("cap"),
        arg("kl").noconvert(), arg("out").noconvert(), arg("threads"));
  m.def("token_statistics_fwd", &rlvr::bind_token_statistics_fwd, arg("logits").noconvert(),
        arg("targets").noconvert(), arg("scale"), arg("cap"), arg("log_min_p"),
        arg("stats").noconvert(), arg("top_id").noconvert(), arg("threads"));
  m.def("token_statistics_bwd", &rlvr::bind_token_statistics_bwd, arg("logits").noconvert(),
        arg("targets").noconvert(), arg("stats").noconvert(), arg("top_id").noconvert(),
        arg("grads").noconvert(), arg("scale"), arg("cap"), arg("log_min_p"),
        arg("out").noconvert(), arg("threads"));
  m.def("accumulate", &rlvr::bind_accumulate, arg("total").noconvert(), arg("product").noconvert(),
        arg("first"), arg("out").noconvert(), arg("threads"));
  m.def("linear_f32", &rlvr::bind_linear_f32, arg("hidden").noconvert(), arg("weight").noconvert(),
        arg("bias").noconvert(), arg("out").noconvert(), arg("threads"));
  m.def("linear_f32_supported", &rlvr::linear_f32_supported);
  m.def("group_advantages", &rlvr::bind_group_advantages, arg("rewards").noconvert(),
        arg("offsets").noconvert(), arg("scale"), arg("ddof"), arg("eps"),
        arg("advantages").noconvert());
}
