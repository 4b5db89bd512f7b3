#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector_math.h"

namespace rlvr {
namespace {

// Vectors whose gradients of the weight are added one by one; the blocks' sums are added after.
constexpr std::int64_t kBlock = 32;

template <class S, class B>
RLVR_CLONES float norm(const S* x, const B* added, const float* weight, float eps, S* total, B* out,
                       std::int64_t size) {
  if (added != nullptr) {
#pragma omp simd
    for (std::int64_t i = 0; i < size; ++i) {
      total[i] = from_float<S>(to_float(x[i]) + to_float(added[i]));
    }
    x = total;
  }
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (std::int64_t i = 0; i < size; ++i) squares += to_float(x[i]) * to_float(x[i]);
  const float rstd = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) out[i] = from_float<B>(to_float(x[i]) * rstd * weight[i]);
  return rstd;
}

// d_x = d_total + rstd (g - n mean(g n)) with n = total rstd and g = d_out weight.
template <class S, class B>
RLVR_CLONES void norm_gradient(const S* total, const float* weight, float rstd, const B* d_out,
                               const S* d_total, S* d_x, B* d_added, float* d_weight,
                               std::int64_t size) {
  float product = 0.0f;
#pragma omp simd reduction(+ : product)
  for (std::int64_t i = 0; i < size; ++i) {
    const float along = to_float(d_out[i]) * to_float(total[i]) * rstd;
    d_weight[i] += along;
    product += along * weight[i];
  }
  const float mean = product / static_cast<float>(size) * rstd;
  if (d_total == nullptr) {
#pragma omp simd
    for (std::int64_t i = 0; i < size; ++i) {
      const float g = to_float(d_out[i]) * weight[i];
      d_x[i] = from_float<S>(rstd * (g - to_float(total[i]) * mean));
    }
  } else {
#pragma omp simd
    for (std::int64_t i = 0; i < size; ++i) {
      const float g = to_float(d_out[i]) * weight[i];
      d_x[i] = from_float<S>(to_float(d_total[i]) + rstd * (g - to_float(total[i]) * mean));
    }
  }
  if (d_added == nullptr) return;
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) d_added[i] = from_float<B>(to_float(d_x[i]));
}

RLVR_CLONES void add_rows(const float* rows, std::int64_t count, std::int64_t size, float* sum) {
  std::vector<double> wide(static_cast<std::size_t>(size), 0.0);
  double* total = wide.data();
  for (std::int64_t r = 0; r < count; ++r) {
#pragma omp simd
    for (std::int64_t i = 0; i < size; ++i) total[i] += rows[r * size + i];
  }
  for (std::int64_t i = 0; i < size; ++i) sum[i] = static_cast<float>(total[i]);
}

// 1 / (1 + e^-x); e^88 and beyond count as e^87.
RLVR_INLINE float sigmoid(float x) {
  const float bits = -at_least(-at_least(-1.44269504f * x, -126.0f), -126.0f);
  return 1.0f / (1.0f + exp2_bounded(bits));
}

template <class T>
RLVR_CLONES void gate(const T* gate, const T* up, T* out, std::int64_t size) {
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) {
    const float g = to_float(gate[i]);
    out[i] = from_float<T>(g * sigmoid(g) * to_float(up[i]));
  }
}

template <class T>
RLVR_CLONES void gate_gradient(const T* gate, const T* up, const T* d_out, T* d_gate, T* d_up,
                               std::int64_t size) {
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) {
    const float g = to_float(gate[i]);
    const float d = to_float(d_out[i]);
    const float s = sigmoid(g);
    d_up[i] = from_float<T>(d * g * s);
    d_gate[i] = from_float<T>(d * to_float(up[i]) * s * (1.0f + g * (1.0f - s)));
  }
}

template <class In, class Out, class Angle>
RLVR_CLONES void turn(const In* x, const Angle* cosine, const Angle* sine, float sign, Out* out,
                      std::int64_t half) {
#pragma omp simd
  for (std::int64_t i = 0; i < half; ++i) {
    const float a = to_float(x[i]), b = to_float(x[i + half]);
    const float c = to_float(cosine[i]), s = sign * to_float(sine[i]);
    out[i] = from_float<Out>(a * c - b * s);
    out[i + half] = from_float<Out>(b * c + a * s);
  }
}

}  // namespace

template <class S, class B>
void rms_norm_fwd(Grouped<const S> x, Grouped<const B> added, const float* weight, float eps,
                  Grouped<S> total, Grouped<B> out, float* rstd, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t i = 0; i < x.rows * x.groups; ++i) {
    rstd[i] = norm(x.at(i), added.at(i), weight, eps, total.at(i), out.at(i), x.size);
  }
}

template <class S, class B>
void rms_norm_bwd(Grouped<const S> total, const float* weight, const float* rstd,
                  Grouped<const B> d_out, Grouped<const S> d_total, Grouped<S> d_x,
                  Grouped<B> d_added, float* d_weight, int threads) {
  const std::int64_t count = total.rows * total.groups;
  const std::int64_t blocks = (count + kBlock - 1) / kBlock;
  std::vector<float> sums(static_cast<std::size_t>(blocks * total.size), 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t block = 0; block < blocks; ++block) {
    float* sum = sums.data() + block * total.size;
    for (std::int64_t i = block * kBlock; i < std::min(count, (block + 1) * kBlock); ++i) {
      norm_gradient(total.at(i), weight, rstd[i], d_out.at(i), d_total.at(i), d_x.at(i),
                    d_added.at(i), sum, total.size);
    }
  }
  add_rows(sums.data(), blocks, total.size, d_weight);
}

template <class T>
void gated_fwd(Grouped<const T> gate, Grouped<const T> up, Grouped<T> out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t i = 0; i < gate.rows; ++i) {
    rlvr::gate(gate.at(i), up.at(i), out.at(i), gate.size);
  }
}

template <class T>
void gated_bwd(Grouped<const T> gate, Grouped<const T> up, Grouped<const T> d_out,
               Grouped<T> d_gate, Grouped<T> d_up, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t i = 0; i < gate.rows; ++i) {
    gate_gradient(gate.at(i), up.at(i), d_out.at(i), d_gate.at(i), d_up.at(i), gate.size);
  }
}

template <class In, class Out, class Angle>
void rotate(Grouped<const In> x, const Angle* cosine, const Angle* sine, float sign,
            Grouped<Out> out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t i = 0; i < x.rows * x.groups; ++i) {
    const std::int64_t angle = i / x.groups * x.size;
    turn(x.at(i), cosine + angle, sine + angle, sign, out.at(i), x.size / 2);
  }
}

#define RLVR_NORM(S, B)                                                                           \
  template void rms_norm_fwd(Grouped<const S>, Grouped<const B>, const float*, float, Grouped<S>, \
                             Grouped<B>, float*, int);                                            \
  template void rms_norm_bwd(Grouped<const S>, const float*, const float*, Grouped<const B>,      \
                             Grouped<const S>, Grouped<S>, Grouped<B>, float*, int)
#define RLVR_GATED(T)                                                                       \
  template void gated_fwd(Grouped<const T>, Grouped<const T>, Grouped<T>, int);             \
  template void gated_bwd(Grouped<const T>, Grouped<const T>, Grouped<const T>, Grouped<T>, \
                          Grouped<T>, int)
#define RLVR_ROTATE(In, Out)                                                                     \
  template void rotate(Grouped<const In>, const float*, const float*, float, Grouped<Out>, int); \
  template void rotate(Grouped<const In>, const BFloat16*, const BFloat16*, float, Grouped<Out>, \
                       int)

RLVR_NORM(float, float);
RLVR_NORM(float, BFloat16);
RLVR_NORM(BFloat16, float);
RLVR_NORM(BFloat16, BFloat16);
RLVR_GATED(float);
RLVR_GATED(BFloat16);
RLVR_ROTATE(float, float);
RLVR_ROTATE(float, BFloat16);
RLVR_ROTATE(BFloat16, float);
RLVR_ROTATE(BFloat16, BFloat16);

}  // namespace rlvr
