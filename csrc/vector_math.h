// Scalar code that compilers vectorise: conversions, exp and tanh for one float.
#pragma once

#include <cstdint>
#include <cstring>

// Function multiversioning: one binary runs well on old and new x86. Elsewhere plain -O3.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RLVR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RLVR_CLONES
#endif
#define RLVR_INLINE inline __attribute__((always_inline))

namespace rlvr {

struct BFloat16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

template <class To, class From>
RLVR_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

RLVR_INLINE float to_float(float x) { return x; }

RLVR_INLINE float to_float(BFloat16 x) {
  return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}

// The multiplication moves the exponent's bias (127 - 15) and makes subnormals right.
RLVR_INLINE float to_float(Half x) {
  const auto spread = static_cast<std::uint32_t>(static_cast<std::int16_t>(x.bits)) << 13;
  const float finite = bit_cast<float>(spread & 0x8fffffffu) * 0x1p112f;
  const std::uint32_t special = (spread & 0x0f800000u) == 0x0f800000u ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<std::uint32_t>(finite) | special);
}

template <class T>
T from_float(float x);

template <>
RLVR_INLINE float from_float<float>(float x) {
  return x;
}

// Round to nearest even; a NaN stays one.
template <>
RLVR_INLINE BFloat16 from_float<BFloat16>(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<std::uint16_t>(x == x ? rounded : 0x7fc0u)};
}

// Adding a power of two lets the hardware round at the right digit, also for subnormals.
template <>
RLVR_INLINE Half from_float<Half>(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const float small = bit_cast<float>(magnitude) + 0.5f;  // ulp(0.5f) is the least half, 2^-24
  const std::uint32_t subnormal = bit_cast<std::uint32_t>(small) - bit_cast<std::uint32_t>(0.5f);
  const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  std::uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<std::uint16_t>(half | sign)};
}

// 2^x for x >= -127, where it is 0: x = n + r, a degree-5 polynomial in |r| <= 1/2, and n added to
// the exponent. Adding 1.5 * 2^23 rounds x to n, and leaves n in the lowest bits. Error 1.3 ulp.
RLVR_INLINE float exp2_bounded(float x) {
  const float rounder = 12582912.0f;
  const float biased = x + rounder;
  const float r = x - (biased - rounder);
  float p = 1.326466445e-3f;
  p = p * r + 9.671554901e-3f;
  p = p * r + 5.55071868e-2f;
  p = p * r + 2.402224243e-1f;
  p = p * r + 6.931470037e-1f;
  p = p * r + 1.0f;
  return bit_cast<float>(bit_cast<std::uint32_t>(p) + (bit_cast<std::uint32_t>(biased) << 23));
}

RLVR_INLINE float at_least(float x, float bound) { return x < bound ? bound : x; }

// A polynomial near 0, where the exponentials cancel (Cephes, `tanhf`).
RLVR_INLINE float tanh_bounded(float x) {
  const float square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near = x + x * square * p;
  const float bits = -at_least(-at_least(2.88539008f * x, -100.0f), -100.0f);
  const float far = 1.0f - 2.0f / (1.0f + exp2_bounded(bits));
  return square < 0.390625f ? near : far;
}

}  // namespace rlvr
