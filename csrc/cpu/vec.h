// One vector type per instruction set, by the compiler's vector extensions: the same source becomes AVX-512, AVX2, NEON
// or plain code by the flags its translation unit is compiled with. No standard-library templates here: the linker could
// keep a copy with instructions that the processor at hand lacks.
#pragma once
#include <cstdint>

#if defined(HICL_VEC_BYTES)  // wider than the registers: the compiler splits, so wide code can be tested anywhere
#elif defined(__AVX512F__)
#define HICL_VEC_BYTES 64
#elif defined(__AVX2__)
#define HICL_VEC_BYTES 32
#else
#define HICL_VEC_BYTES 16
#endif

namespace hicl {
namespace HICL_ISA {

template <typename T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(HICL_VEC_BYTES)));
  typedef int32_t bits __attribute__((vector_size(HICL_VEC_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(HICL_VEC_BYTES)));
  typedef int64_t bits __attribute__((vector_size(HICL_VEC_BYTES)));
};
template <typename T>
using Vec = typename VecOf<T>::type;
template <typename T>
using Bits = typename VecOf<T>::bits;
template <typename T>
constexpr int kWidth = HICL_VEC_BYTES / sizeof(T);

template <typename T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <typename T>
inline Vec<T> splat(T x) {
  return Vec<T>{} + x;
}
// The first n < width elements; the rest are `fill`.
template <typename T>
inline Vec<T> load_head(const T* p, int64_t n, T fill) {
  Vec<T> v = splat(fill);
  __builtin_memcpy(&v, p, n * sizeof(T));
  return v;
}
template <typename T>
inline void store_head(T* p, Vec<T> v, int64_t n) {
  __builtin_memcpy(p, &v, n * sizeof(T));
}
// The elements one by one: in float the last of them would cost as many roundings as there are elements.
template <typename T>
inline T sum(Vec<T> v) {
  double total = 0;
  for (int i = 0; i < kWidth<T>; ++i) total += double(v[i]);
  return T(total);
}
template <typename T>
inline T largest(Vec<T> v) {
  T best = v[0];
  for (int i = 1; i < kWidth<T>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}
template <typename T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// exp for x ≤ 88 (709): x = n ln 2 + r, a polynomial (rational function) in r, times 2^n. Below the smallest normal
// result it is 0. NaN stays NaN: every comparison below is false for it.
template <typename T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float lowest = -87.33654f, round = 12582912.0f;  // ln 2^-126; 1.5 · 2^23
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int mantissa = 23, bias = 127;
};
template <>
struct ExpConstants<double> {
  static constexpr double lowest = -708.3964185322641, round = 6755399441055744.0;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr int mantissa = 52, bias = 1023;
};

inline Vec<float> exp_of_remainder(Vec<float> r) {
  Vec<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}
inline Vec<double> exp_of_remainder(Vec<double> r) {
  const Vec<double> rr = r * r;
  const Vec<double> p = r * ((rr * 1.26177193074810590878e-4 + 3.02994407707441961300e-2) * rr + 9.99999999999999999910e-1);
  const Vec<double> q = ((rr * 3.00198505138664455042e-6 + 2.52448340349684104192e-3) * rr + 2.27265548208155028766e-1) * rr + 2.0;
  return 1.0 + 2.0 * p / (q - p);
}
template <typename T>
inline Vec<T> exp(Vec<T> x) {
  using C = ExpConstants<T>;
  const Bits<T> vanishes = x < splat(C::lowest);
  const Vec<T> bounded = vanishes ? splat(C::lowest) : x;
  const Vec<T> shifted = bounded * T(1.44269504088896340736) + C::round;
  const Vec<T> n = shifted - C::round;
  const Vec<T> r = bounded - n * C::ln2_high - n * C::ln2_low;
  const Bits<T> power = ((Bits<T>)shifted - (Bits<T>)splat(C::round) + C::bias) << C::mantissa;
  return vanishes ? Vec<T>{} : exp_of_remainder(r) * (Vec<T>)power;
}

}  // namespace HICL_ISA
}  // namespace hicl
