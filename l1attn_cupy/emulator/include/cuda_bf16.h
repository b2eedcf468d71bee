// cuda_bf16.h: NVIDIA's own header, which runs under a host compiler, and what it gives to device code only.
#pragma once
#if !__has_include_next(<cuda_bf16.h>)
#error "L1ATTN-EMULATOR-NEEDS-CUDA-HEADERS cuda_bf16.h"
#else
#include <cuda_fp16.h>
#undef memcpy
#include_next <cuda_bf16.h>
#include "checked_memory.hpp"

EMU_FN __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __double2bfloat16(fma(double(__bfloat162float(a)), double(__bfloat162float(b)), double(__bfloat162float(c))));
}
EMU_FN __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return __halves2bfloat162(__hfma(__low2bfloat16(a), __low2bfloat16(b), __low2bfloat16(c)),
                            __hfma(__high2bfloat16(a), __high2bfloat16(b), __high2bfloat16(c)));
}
#define EMU_BFLOAT(name, expression)                                                                          \
  EMU_FN __nv_bfloat16 h##name(__nv_bfloat16 h) {                                                             \
    const float x = __bfloat162float(h);                                                                      \
    return __float2bfloat16_rn(expression);                                                                   \
  }                                                                                                           \
  EMU_FN __nv_bfloat162 h2##name(__nv_bfloat162 v) {                                                          \
    return __halves2bfloat162(h##name(__low2bfloat16(v)), h##name(__high2bfloat16(v)));                       \
  }
EMU_BFLOAT(exp, expf(x)) EMU_BFLOAT(exp2, exp2f(x)) EMU_BFLOAT(log, logf(x)) EMU_BFLOAT(log2, log2f(x))
EMU_BFLOAT(sqrt, sqrtf(x)) EMU_BFLOAT(rsqrt, rsqrtf(x)) EMU_BFLOAT(rcp, 1.0f / x)
EMU_BFLOAT(floor, floorf(x)) EMU_BFLOAT(ceil, ceilf(x)) EMU_BFLOAT(trunc, truncf(x)) EMU_BFLOAT(rint, rintf(x))
#undef EMU_BFLOAT
#endif
