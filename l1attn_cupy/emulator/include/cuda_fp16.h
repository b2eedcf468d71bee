// cuda_fp16.h: NVIDIA's own header, which runs under a host compiler, and what it gives to device code only.
#pragma once
#if !__has_include_next(<cuda_fp16.h>)
#error "L1ATTN-EMULATOR-NEEDS-CUDA-HEADERS cuda_fp16.h"
#else
#undef memcpy
#include_next <cuda_fp16.h>
#include "checked_memory.hpp"

// The same results as NVIDIA's bit by bit conversions, ten times faster.
#if defined(__FLT16_MAX__)
EMU_FN float emu_half2float(__half h) { return emu_bits<_Float16>(__half_as_ushort(h)); }
EMU_FN __half emu_float2half(float x) { return __ushort_as_half(emu_bits<unsigned short>(static_cast<_Float16>(x))); }
#else
EMU_FN float emu_half2float(__half h) { return __half2float(h); }
EMU_FN __half emu_float2half(float x) { return __float2half_rn(x); }
#endif
#define EMU_HALF_ARITHMETIC(name, op)                                                            \
  EMU_FN __half emu_##name(__half a, __half b) {                                                 \
    return emu_float2half(emu_half2float(a) op emu_half2float(b));                               \
  }                                                                                              \
  EMU_FN __half2 emu_##name##2(__half2 a, __half2 b) {                                           \
    return __halves2half2(emu_##name(a.x, b.x), emu_##name(a.y, b.y));                           \
  }
EMU_HALF_ARITHMETIC(hadd, +)
EMU_HALF_ARITHMETIC(hsub, -)
EMU_HALF_ARITHMETIC(hmul, *)
#undef EMU_HALF_ARITHMETIC
EMU_FN float emu_low2float(__half2 v) { return emu_half2float(v.x); }
EMU_FN float emu_high2float(__half2 v) { return emu_half2float(v.y); }
#define __half2float emu_half2float
#define __float2half emu_float2half
#define __float2half_rn emu_float2half
#define __low2float emu_low2float
#define __high2float emu_high2float
#define __hadd emu_hadd
#define __hadd2 emu_hadd2
#define __hsub emu_hsub
#define __hsub2 emu_hsub2
#define __hmul emu_hmul
#define __hmul2 emu_hmul2

// Through float or double: one more rounding than the GPU's, which only a tie could show.
EMU_FN __half __hfma(__half a, __half b, __half c) {
  return __double2half(fma(double(__half2float(a)), double(__half2float(b)), double(__half2float(c))));
}
EMU_FN __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __halves2half2(__hfma(__low2half(a), __low2half(b), __low2half(c)),
                        __hfma(__high2half(a), __high2half(b), __high2half(c)));
}
#define EMU_HALF(name, expression)                                                      \
  EMU_FN __half h##name(__half h) { const float x = __half2float(h); return __float2half_rn(expression); } \
  EMU_FN __half2 h2##name(__half2 v) { return __halves2half2(h##name(__low2half(v)), h##name(__high2half(v))); }
EMU_HALF(exp, expf(x)) EMU_HALF(exp2, exp2f(x)) EMU_HALF(log, logf(x)) EMU_HALF(log2, log2f(x))
EMU_HALF(sqrt, sqrtf(x)) EMU_HALF(rsqrt, rsqrtf(x)) EMU_HALF(rcp, 1.0f / x)
EMU_HALF(floor, floorf(x)) EMU_HALF(ceil, ceilf(x)) EMU_HALF(trunc, truncf(x)) EMU_HALF(rint, rintf(x))
#undef EMU_HALF
#endif
