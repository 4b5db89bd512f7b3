#include "divergence.h"

#include <algorithm>
#include <cmath>

#include "row_sweep.h"
#include "vector_math.h"

namespace rlvr {
namespace {

// log2 p = factor u - shift - rest: float cannot hold all of the shift.
struct Logarithm {
  Exponent exponent;
  float rest;
};

Logarithm logarithm(Transform transform, double log2_sum) {
  const Exponent found = exponent(transform, log2_sum);
  return {found, static_cast<float>(log2_sum - found.shift)};
}

struct RowPair {
  Logarithm student;
  Logarithm teacher;
  float shift;  // K, in bits
};

// In bits; no token is the target here, so any will do.
template <class T>
double log2_sum(const T* row, std::int64_t vocab_size, Transform transform) {
  const RowSums sums = sweep<T, false>(row, vocab_size, 0, transform);
  return sums.shift + sums.log_total * kLog2E;
}

template <class T>
RowPair row_pair(const T* student, const T* teacher, std::int64_t vocab_size, Transform transform) {
  const double own = log2_sum(student, vocab_size, transform);
  const double other = log2_sum(teacher, vocab_size, transform);
  return {logarithm(transform, own), logarithm(transform, other), static_cast<float>(other - own)};
}

// One entry of both rows, in bits.
struct Compared {
  float log_p;
  float log_q;
  float x;
};

// x is a difference of u times a factor, not of z: equal logits give exactly 0, whatever the
// compiler fuses.
RLVR_INLINE Compared compared(float u, float u_teacher, const RowPair& pair) {
  const float factor = pair.student.exponent.factor;
  return {factor * u - pair.student.exponent.shift - pair.student.rest,
          factor * u_teacher - pair.teacher.exponent.shift - pair.teacher.rest,
          factor * (u_teacher - u) - pair.shift};
}

// `least` as in Exponent.
RLVR_INLINE float exp2_least(float d, float least) { return exp2_bounded(at_least(d, least)); }

// phi where |x| < 0.5.
RLVR_INLINE float phi_near(float x) {
  float series = 1.0f / 5040 + x * (1.0f / 40320);
  series = 1.0f / 720 + x * series;
  series = 1.0f / 120 + x * series;
  series = 1.0f / 24 + x * series;
  series = 1.0f / 6 + x * series;
  return x * x * (1.0f / 2 + x * series);
}

// p phi(x): that of a pair of zeros, whose x is NaN, is 0.
RLVR_INLINE float relative_entropy(float log_p, float log_q, float bits, float least) {
  const float p = exp2_least(log_p, least);
  const float q = exp2_least(log_q, least);
  const float x = bits * static_cast<float>(kLog2);
  const float far = (q - p) - p * (p == 0.0f ? 0.0f : x);
  return std::fabs(x) < 0.5f ? p * phi_near(x) : far;
}

struct Mixed {
  float n;
  float g;
  float w;  // exp(-n)
  float c;
  float above;
  float below;
};

// Numbers, not a Compared: GCC would choose between two addresses in it, and not vectorise.
RLVR_INLINE Mixed mixed(float log_p, float log_q, float x, float least) {
  const float log_g = x > 0.0f ? log_q : log_p;
  // A pair of zeros has an x of NaN; where one of a pair is 0 the bound keeps 0 * inf out.
  const float negative = log_g < least ? least : at_least(-std::fabs(x), least);
  const float g = exp2_least(log_g, least);
  const float w = exp2_bounded(negative);
  const float n = negative * static_cast<float>(-kLog2);
  const float near = phi_near(-n), far = 1.0f - w;
  const float phi = n < 0.5f ? near : n - far;
  const float lost = n < 0.5f ? n - near : far;
  const float t = lost / (4.0f - lost);
  const float square = t * t;
  float series = 1.0f / 11 + square * (1.0f / 13);
  series = 1.0f / 9 + square * series;
  series = 1.0f / 7 + square * series;
  series = 1.0f / 5 + square * series;
  series = 1.0f / 3 + square * series;
  const float rest = t * square * series;
  const float above = 2.0f * (square / (1.0f + t) + rest);
  return {n, g, w, 2.0f * (t + rest), above, 0.5f * lost * lost - w * (phi - above)};
}

// Float inside a block, double across: 150k float additions lose three digits.
struct Sums {
  double kl = 0.0;
  double centre = 0.0;  // what the gradient subtracts
};

template <Divergence kind>
RLVR_CLONES void add_terms(const float* u, const float* u_teacher, std::int64_t size,
                           const RowPair& pair, Sums& sums) {
  const float least = pair.student.exponent.least;
  float kl = 0.0f, centre = 0.0f;
#pragma omp simd reduction(+ : kl, centre)
  for (std::int64_t v = 0; v < size; ++v) {
    const Compared e = compared(u[v], u_teacher[v], pair);
    if constexpr (kind == Divergence::kForward) {
      kl += relative_entropy(e.log_q, e.log_p, -e.x, least);
    } else if constexpr (kind == Divergence::kReverse) {
      kl += relative_entropy(e.log_p, e.log_q, e.x, least);
    } else {
      const Mixed m = mixed(e.log_p, e.log_q, e.x, least);
      kl += 0.5f * m.g * (m.above + m.below);
      centre += m.g * (e.x > 0.0f ? m.below : m.above);
    }
  }
  sums.kl += kl;
  sums.centre += kind == Divergence::kJensenShannon ? centre : kl;
}

// The gradient takes the place of the teacher's u.
template <Divergence kind, bool HasCap>
RLVR_CLONES void gradient_block(const float* u, float* u_teacher, std::int64_t size,
                                const RowPair& pair, float centre, float factor) {
  const float least = pair.student.exponent.least;
#pragma omp simd
  for (std::int64_t v = 0; v < size; ++v) {
    const Compared e = compared(u[v], u_teacher[v], pair);
    float dz;
    if constexpr (kind == Divergence::kForward) {
      dz = exp2_least(e.log_p, least) - exp2_least(e.log_q, least);
    } else if constexpr (kind == Divergence::kReverse) {
      const float p = exp2_least(e.log_p, least);
      dz = -p * ((p == 0.0f ? 0.0f : e.x * static_cast<float>(kLog2)) + centre);
    } else {
      const Mixed m = mixed(e.log_p, e.log_q, e.x, least);
      const float below = m.w * (m.c - m.n - centre);
      dz = 0.5f * m.g * (e.x > 0.0f ? below : m.c - centre);
    }
    u_teacher[v] = dz * factor * (HasCap ? 1.0f - u[v] * u[v] : 1.0f);
  }
}

template <Divergence kind, class T, class Out>
float row_divergence(const T* student, const T* teacher, std::int64_t vocab_size,
                     Transform transform, float coef, Out* out) {
  const RowPair pair = row_pair(student, teacher, vocab_size, transform);
  alignas(64) float u[kBlock<T>], u_teacher[kBlock<T>];
  const auto each_block = [&](auto&& visit) {
    for (std::int64_t v = 0; v < vocab_size; v += kBlock<T>) {
      const std::int64_t size = std::min(kBlock<T>, vocab_size - v);
      read_block(student + v, size, transform, u);
      read_block(teacher + v, size, transform, u_teacher);
      visit(v, size);
    }
  };
  Sums sums;
  each_block(
      [&](std::int64_t, std::int64_t size) { add_terms<kind>(u, u_teacher, size, pair, sums); });
  if (out == nullptr) return static_cast<float>(sums.kl);
  const auto gradient_fn =
      transform.cap > 0.0f ? gradient_block<kind, true> : gradient_block<kind, false>;
  each_block([&](std::int64_t v, std::int64_t size) {
    const auto centre = static_cast<float>(sums.centre);
    gradient_fn(u, u_teacher, size, pair, centre, coef * transform.scale);
    write_block(u_teacher, size, out + v);
  });
  return static_cast<float>(sums.kl);
}

template <class T, class Out>
auto row_function(Divergence kind) {
  switch (kind) {
    case Divergence::kForward:
      return row_divergence<Divergence::kForward, T, Out>;
    case Divergence::kReverse:
      return row_divergence<Divergence::kReverse, T, Out>;
    case Divergence::kJensenShannon:
      break;
  }
  return row_divergence<Divergence::kJensenShannon, T, Out>;
}

}  // namespace

template <class T, class Out>
void divergence(Rows<const T> student, Rows<const T> teacher, const float* coef, Divergence kind,
                Transform transform, float* kl, Rows<Out> out, int threads) {
  const auto row_fn = row_function<T, Out>(kind);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t t = 0; t < student.count; ++t) {
    Out* row_out = out.data == nullptr ? nullptr : out.data + t * out.stride;
    if (coef[t] == 0.0f) {
      kl[t] = 0.0f;
      if (row_out != nullptr) std::fill_n(row_out, student.vocab_size, from_float<Out>(0.0f));
      continue;
    }
    kl[t] = row_fn(student.data + t * student.stride, teacher.data + t * teacher.stride,
                   student.vocab_size, transform, coef[t], row_out);
  }
}

#define RLVR_INSTANTIATE(T, Out)                                                           \
  template void divergence<T, Out>(Rows<const T>, Rows<const T>, const float*, Divergence, \
                                   Transform, float*, Rows<Out>, int)

RLVR_INSTANTIATE(float, float);
RLVR_INSTANTIATE(float, BFloat16);
RLVR_INSTANTIATE(float, Half);
RLVR_INSTANTIATE(BFloat16, BFloat16);
RLVR_INSTANTIATE(Half, Half);

}  // namespace rlvr
