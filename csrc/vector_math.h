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
  const std::uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const float finite = bit_cast<float>(magnitude) * 0x1p112f;
  const std::uint32_t special = magnitude | 0x7f800000u;
  const std::uint32_t bits = magnitude >= 0x0f800000u ? special : bit_cast<std::uint32_t>(finite);
  return bit_cast<float>(bits | sign);
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

// exp(x) for x <= 88: x = n log 2 + r, a degree-6 polynomial in |r| <= log(2)/2, times 2^n.
// Error about 1 ulp; below -87 the result is 0, so that no subnormal slows the loop.
RLVR_INLINE float exp_nonpositive(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float n = __builtin_rintf(clamped * 1.44269504f);
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const auto exponent = static_cast<std::int32_t>(n) + 127;
  const float scaled = p * bit_cast<float>(static_cast<std::uint32_t>(exponent) << 23);
  return x < -87.0f ? 0.0f : scaled;
}

RLVR_INLINE float tanh_bounded(float x) {
  const float magnitude = x < 0 ? -x : x;
  const float e = exp_nonpositive(-2.0f * magnitude);
  const float t = (1.0f - e) / (1.0f + e);
  return x < 0 ? -t : t;
}

}  // namespace rlvr
