// The sweeps between the matrix products of a decoder layer: norm, gate and rotation. fp32 inside.
#pragma once

#include <cstdint>

namespace rlvr {

// `[rows, groups, size]`; the last dimension is contiguous.
template <class T>
struct Grouped {
  T* data;
  std::int64_t row_stride;
  std::int64_t group_stride;
  std::int64_t rows;
  std::int64_t groups;
  std::int64_t size;

  // Vector i, counted row by row.
  T* at(std::int64_t i) const {
    return data == nullptr ? nullptr : data + i / groups * row_stride + i % groups * group_stride;
  }
};

// total = x + added;  rstd = (mean total^2 + eps)^-1/2;  out = total rstd weight.
// `added` and `total` may have no data: then total is x. All have one shape; rstd is `[rows
// groups]`.
template <class S, class B>
void rms_norm_fwd(Grouped<const S> x, Grouped<const B> added, const float* weight, float eps,
                  Grouped<S> total, Grouped<B> out, float* rstd, int threads);

// d_total += the norm's gradient; `d_x` gets that and `d_added` the same in its own dtype.
// `d_total` and `d_added` may have no data. d_weight is the sum over rows of d_out total rstd, and
// has the same bits for any number of threads.
template <class S, class B>
void rms_norm_bwd(Grouped<const S> total, const float* weight, const float* rstd,
                  Grouped<const B> d_out, Grouped<const S> d_total, Grouped<S> d_x,
                  Grouped<B> d_added, float* d_weight, int threads);

// out = gate / (1 + e^-gate) * up; groups are 1.
template <class T>
void gated_fwd(Grouped<const T> gate, Grouped<const T> up, Grouped<T> out, int threads);
template <class T>
void gated_bwd(Grouped<const T> gate, Grouped<const T> up, Grouped<const T> d_out,
               Grouped<T> d_gate, Grouped<T> d_up, int threads);

// Pairs (x_i, x_{i + size / 2}) turned by the angles of their row; `cosine` and `sine` are
// `[rows, size]`. With sign -1 the inverse rotation of the forward's, scaled alike.
template <class In, class Out, class Angle>
void rotate(Grouped<const In> x, const Angle* cosine, const Angle* sine, float sign,
            Grouped<Out> out, int threads);

}  // namespace rlvr
