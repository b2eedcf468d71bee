// cuda_math.hpp: CUDA's device functions on numbers.
//
// The C header, not <cmath>: a third of a second less for every kernel. What C++ overloads for float is given as
// templates, so that a later #include <cmath> still works. The fast intrinsics (__expf, ...) are computed in full.
#pragma once

// Only what ISO C has, or names like finite() and y1() would not be the kernel's to use.
#undef _GNU_SOURCE
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#undef _GLIBCXX_INCLUDE_NEXT_C_HEADERS

extern "C" int abs(int) noexcept;

#define EMU_FN __forceinline__

template <class T, class U> struct EmuOnly {};
template <class T> struct EmuOnly<T, T> { using type = int; };
#define EMU_ONLY(T, U) class T, typename EmuOnly<T, U>::type = 0

// ---- overloads for float -----------------------------------------------------------------------------------

#define EMU_UNARY(name) template <EMU_ONLY(T, float)> EMU_FN float name(T x) { return name##f(x); }
EMU_UNARY(acos) EMU_UNARY(asin) EMU_UNARY(atan) EMU_UNARY(cbrt) EMU_UNARY(ceil) EMU_UNARY(cos) EMU_UNARY(cosh)
EMU_UNARY(erf) EMU_UNARY(erfc) EMU_UNARY(exp) EMU_UNARY(exp2) EMU_UNARY(expm1) EMU_UNARY(fabs) EMU_UNARY(floor)
EMU_UNARY(log) EMU_UNARY(log10) EMU_UNARY(log1p) EMU_UNARY(log2) EMU_UNARY(rint) EMU_UNARY(round) EMU_UNARY(sin)
EMU_UNARY(sinh) EMU_UNARY(sqrt) EMU_UNARY(tan) EMU_UNARY(tanh) EMU_UNARY(trunc)
#define EMU_BINARY(name) template <EMU_ONLY(T, float)> EMU_FN float name(T x, T y) { return name##f(x, y); }
EMU_BINARY(atan2) EMU_BINARY(copysign) EMU_BINARY(fdim) EMU_BINARY(fmax) EMU_BINARY(fmin) EMU_BINARY(fmod)
EMU_BINARY(pow)
template <EMU_ONLY(T, float)> EMU_FN float fma(T x, T y, T z) { return fmaf(x, y, z); }
template <EMU_ONLY(T, float)> EMU_FN float abs(T x) { return fabsf(x); }
template <EMU_ONLY(T, double)> EMU_FN double abs(T x) { return fabs(x); }
template <EMU_ONLY(T, long long)> EMU_FN long long abs(T x) { return x < 0 ? -x : x; }
#undef EMU_UNARY
#undef EMU_BINARY

// min and max take any two numbers, as CUDA's many overloads do; for floating point a NaN loses.
template <class T> struct EmuIsFloating { static constexpr bool value = T(0.5) != T(0); };
template <class A, class B>
EMU_FN constexpr auto min(A a, B b) -> decltype(true ? A() : B()) {
  using T = decltype(true ? A() : B());
  if constexpr (EmuIsFloating<T>::value) return fmin(T(a), T(b));
  else return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
EMU_FN constexpr auto max(A a, B b) -> decltype(true ? A() : B()) {
  using T = decltype(true ? A() : B());
  if constexpr (EmuIsFloating<T>::value) return fmax(T(a), T(b));
  else return T(a) < T(b) ? T(b) : T(a);
}

EMU_FN float rsqrtf(float x) { return 1.0f / sqrtf(x); }
EMU_FN double rsqrt(double x) { return 1.0 / sqrt(x); }
template <EMU_ONLY(T, float)> EMU_FN float rsqrt(T x) { return rsqrtf(x); }

// ---- intrinsics --------------------------------------------------------------------------------------------

// The compiler may fuse a * b + c (as nvcc does), but never through these, whose rounding is part of their name.
#if defined(__x86_64__)
#define EMU_ROUNDED(x) asm volatile("" : "+x"(x))
#else
#define EMU_ROUNDED(x) asm volatile("" : "+w"(x))
#endif
#define EMU_ARITHMETIC(name, T, op) \
  EMU_FN T name(T a, T b) { EMU_ROUNDED(a); EMU_ROUNDED(b); T r = a op b; EMU_ROUNDED(r); return r; }
EMU_ARITHMETIC(__fadd_rn, float, +)
EMU_ARITHMETIC(__fsub_rn, float, -)
EMU_ARITHMETIC(__fmul_rn, float, *)
EMU_ARITHMETIC(__fdiv_rn, float, /)
EMU_ARITHMETIC(__dadd_rn, double, +)
EMU_ARITHMETIC(__dsub_rn, double, -)
EMU_ARITHMETIC(__dmul_rn, double, *)
EMU_ARITHMETIC(__ddiv_rn, double, /)
#undef EMU_ARITHMETIC
EMU_FN float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
EMU_FN double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
EMU_FN float __frcp_rn(float x) { return 1.0f / x; }
EMU_FN float __fsqrt_rn(float x) { return sqrtf(x); }
EMU_FN float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
EMU_FN float __fdividef(float x, float y) { return x / y; }
EMU_FN float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }  // NaN gives 0
EMU_FN float __expf(float x) { return expf(x); }
EMU_FN float __exp10f(float x) { return powf(10.0f, x); }
EMU_FN float __logf(float x) { return logf(x); }
EMU_FN float __log2f(float x) { return log2f(x); }
EMU_FN float __log10f(float x) { return log10f(x); }
EMU_FN float __powf(float x, float y) { return powf(x, y); }
EMU_FN float __sinf(float x) { return sinf(x); }
EMU_FN float __cosf(float x) { return cosf(x); }
EMU_FN float __tanhf(float x) { return tanhf(x); }

template <class To, class From> EMU_FN To emu_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}
EMU_FN int __float_as_int(float x) { return emu_bits<int>(x); }
EMU_FN unsigned __float_as_uint(float x) { return emu_bits<unsigned>(x); }
EMU_FN float __int_as_float(int x) { return emu_bits<float>(x); }
EMU_FN float __uint_as_float(unsigned x) { return emu_bits<float>(x); }
EMU_FN long long __double_as_longlong(double x) { return emu_bits<long long>(x); }
EMU_FN double __longlong_as_double(long long x) { return emu_bits<double>(x); }

// Conversions to integers saturate, and NaN gives 0.
template <class To, class From> EMU_FN To emu_to_integer(From x) {
  constexpr To lowest = To(-1) < To(0) ? To(1ull << (8 * sizeof(To) - 1)) : To(0);
  constexpr To highest = To(~lowest);
  if (x != x) return 0;
  if (x <= From(lowest)) return lowest;
  if (x >= From(highest)) return highest;
  return To(x);
}
EMU_FN int __float2int_rn(float x) { return emu_to_integer<int>(rintf(x)); }
EMU_FN int __float2int_rz(float x) { return emu_to_integer<int>(x); }
EMU_FN int __float2int_rd(float x) { return emu_to_integer<int>(floorf(x)); }
EMU_FN int __float2int_ru(float x) { return emu_to_integer<int>(ceilf(x)); }
EMU_FN unsigned __float2uint_rn(float x) { return emu_to_integer<unsigned>(rintf(x)); }
EMU_FN unsigned __float2uint_rz(float x) { return emu_to_integer<unsigned>(x); }
EMU_FN long long __float2ll_rn(float x) { return emu_to_integer<long long>(rintf(x)); }
EMU_FN float __int2float_rn(int x) { return static_cast<float>(x); }
EMU_FN float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
EMU_FN float __ll2float_rn(long long x) { return static_cast<float>(x); }
EMU_FN float __double2float_rn(double x) { return static_cast<float>(x); }

EMU_FN int __popc(unsigned x) { return __builtin_popcount(x); }
EMU_FN int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
EMU_FN int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
EMU_FN int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
EMU_FN int __ffs(int x) { return __builtin_ffs(x); }
EMU_FN int __ffsll(long long x) { return __builtin_ffsll(x); }
EMU_FN unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1u) << (31 - i);
  return r;
}
EMU_FN unsigned __umulhi(unsigned a, unsigned b) { return unsigned((static_cast<unsigned long long>(a) * b) >> 32); }
EMU_FN int __mulhi(int a, int b) { return int((static_cast<long long>(a) * b) >> 32); }
EMU_FN unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> (4 * i) & 15u, byte = unsigned(bytes >> (8 * (s & 7u))) & 255u;
    r |= (s & 8u ? (byte & 128u ? 255u : 0u) : byte) << (8 * i);
  }
  return r;
}

// Four bytes in one word.
EMU_FN unsigned __vabsdiffu4(unsigned a, unsigned b) {
  unsigned r = 0;
  for (int i = 0; i < 32; i += 8) {
    const int d = int(a >> i & 255u) - int(b >> i & 255u);
    r |= unsigned(d < 0 ? -d : d) << i;
  }
  return r;
}
EMU_FN unsigned __vsadu4(unsigned a, unsigned b) {
  const unsigned d = __vabsdiffu4(a, b);
  return (d & 255u) + (d >> 8 & 255u) + (d >> 16 & 255u) + (d >> 24);
}
EMU_FN int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += static_cast<signed char>(a >> i) * static_cast<signed char>(b >> i);
  return c;
}
EMU_FN unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255u) * (b >> i & 255u);
  return c;
}
