// Sums of the ranks' parts, always in rank order and with one rounding, so that any way to cut the work gives
// the same bits on every rank.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace anabranch {

enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3, kInt64 = 4, kInt32 = 5, kBytes = 6 };

inline size_t element_bytes(int dtype) {
  switch (dtype) {
    case kFloat64:
    case kInt64:
      return 8;
    case kFloat32:
    case kInt32:
      return 4;
    case kBytes:
      return 1;
    default:
      return 2;
  }
}

struct Bfloat16 {
  uint16_t bits;
  float wide() const {
    const uint32_t u = static_cast<uint32_t>(bits) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
  static Bfloat16 narrow(float f) {  // to nearest, ties to even, as PyTorch does
    uint32_t u;
    memcpy(&u, &f, 4);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
  }
};

#ifdef __FLT16_MANT_DIG__
struct Float16 {
  _Float16 value;
  float wide() const { return static_cast<float>(value); }
  static Float16 narrow(float f) { return {static_cast<_Float16>(f)}; }
};
#else
struct Float16 {
  uint16_t bits;
  float wide() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const uint32_t rest = bits & 0x7fff;
    float f;
    if (rest >= 0x7c00) {
      const uint32_t u = sign | 0x7f800000 | (rest & 0x3ff) << 13;
      memcpy(&f, &u, 4);
      return f;
    }
    // The exponent field is moved with the mantissa; the factor mends the bias, and subnormals with it.
    const uint32_t u = rest << 13;
    memcpy(&f, &u, 4);
    f *= 0x1p112f;
    return sign ? -f : f;
  }
  static Float16 narrow(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000);
    u &= 0x7fffffff;
    if (u > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (u >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (u < 0x38800000) {  // subnormal: the addition rounds
      float half;
      memcpy(&half, &u, 4);
      half += 0.5f;
      memcpy(&u, &half, 4);
      return {static_cast<uint16_t>(sign | (u - 0x3f000000))};
    }
    return {static_cast<uint16_t>(sign | ((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13))};
  }
};
#endif

template <class T>
struct Plain {
  using Wide = T;
  static T widen(T x) { return x; }
  static T narrow(T x) { return x; }
};

template <class T>
struct Rounded {
  using Wide = float;
  static float widen(T x) { return x.wide(); }
  static T narrow(float x) { return T::narrow(x); }
};

template <class T, class Rule>
void sum_parts(T* out, const T* const* parts, int size, size_t count) {
  constexpr size_t kBlock = 512;
  typename Rule::Wide total[kBlock];
  for (size_t start = 0; start < count; start += kBlock) {
    const size_t n = count - start < kBlock ? count - start : kBlock;
    const T* first = parts[0] + start;
    for (size_t i = 0; i < n; ++i) total[i] = Rule::widen(first[i]);
    for (int r = 1; r < size; ++r) {
      const T* part = parts[r] + start;
      for (size_t i = 0; i < n; ++i) total[i] += Rule::widen(part[i]);
    }
    T* to = out + start;  // may be one of the parts: this block of it has been read
    for (size_t i = 0; i < n; ++i) to[i] = Rule::narrow(total[i]);
  }
}

template <class T, class Rule>
void sum_as(void* out, const void* const* parts, int size, size_t count) {
  sum_parts<T, Rule>(static_cast<T*>(out), reinterpret_cast<const T* const*>(parts), size, count);
}

inline void sum(int dtype, void* out, const void* const* parts, int size, size_t count) {
  switch (dtype) {
    case kFloat32:
      return sum_as<float, Plain<float>>(out, parts, size, count);
    case kBfloat16:
      return sum_as<Bfloat16, Rounded<Bfloat16>>(out, parts, size, count);
    case kFloat16:
      return sum_as<Float16, Rounded<Float16>>(out, parts, size, count);
    case kFloat64:
      return sum_as<double, Plain<double>>(out, parts, size, count);
    case kInt64:
      return sum_as<int64_t, Plain<int64_t>>(out, parts, size, count);
    case kInt32:
      return sum_as<int32_t, Plain<int32_t>>(out, parts, size, count);
  }
}

}  // namespace anabranch
