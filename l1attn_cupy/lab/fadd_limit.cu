// fadd_limit.cu: how many terms a second a GPU can do when nothing but the arithmetic is left.
//
// Computes   limit_forward   acc += |q - k|                             FADD, FADD with a free |.|    2 a term
//            limit_backward  t = saturate((q - k) * 1.7e38 + 0.5)       FADD, FFMA.SAT
//                            acc += t * h                               FFMA                          3 a term
// Types      -DTERM_TYPE=1 float, 2 half2 (two terms in each operation), 3 double (forward only), 4 four bytes (forward
//            only, four terms in one VABSDIFF4; before sm_120, where it is four instructions)
// Shapes     out (blocks * THREADS); a pass of a thread is PERIOD * ROWS * COLS terms
// Cost       one shared load of COLS values per ROWS * COLS terms, one branch per UNROLL of those
//
// q and the sums stay in registers; k comes from a small table, because the assembler would otherwise see that
// q - k is the same in every pass and compute it once.

#include <cuda_fp16.h>

#ifndef THREADS
#define THREADS 256
#endif

#if TERM_TYPE == 1
typedef float T;
__device__ T forward_term(T acc, T q, T k) { return acc + fabsf(q - k); }
__device__ T backward_term(T acc, T q, T k, T h) {
    float t;  // __saturatef(fmaf(...)) would be two instructions
    asm("fma.rn.ftz.sat.f32 %0, %1, 0f7EFFC99E, 0f3F000000;" : "=f"(t) : "f"(q - k));  // 1.7e38, 0.5
    return fmaf(t, h, acc);
}
__device__ T make(float x) { return x; }
__device__ float value(T x) { return x; }
#elif TERM_TYPE == 2
typedef half2 T;
__device__ T forward_term(T acc, T q, T k) { return __hadd2(acc, __habs2(__hsub2(q, k))); }
__device__ T backward_term(T acc, T q, T k, T h) {
    const T steep = __float2half2_rn(60000.0f), half_way = __float2half2_rn(0.5f);
    return __hfma2(__hfma2_sat(__hsub2(q, k), steep, half_way), h, acc);
}
__device__ T make(float x) { return __float2half2_rn(x); }
__device__ float value(T x) { return __low2float(x) + __high2float(x); }
#elif TERM_TYPE == 4
typedef unsigned T;
__device__ T forward_term(T acc, T q, T k) {
#if __CUDA_ARCH__ >= 1200
    return __dp4a(__vabsdiffu4(q, k), 0x01010101u, acc);
#else
    T sum;  // acc + __vsadu4(q, k) would be two instructions
    asm("vabsdiff4.u32.u32.u32.add %0, %1, %2, %3;" : "=r"(sum) : "r"(q), "r"(k), "r"(acc));
    return sum;
#endif
}
__device__ T make(float x) { return __float_as_uint(x); }
__device__ float value(T x) { return static_cast<float>(x); }
#else
typedef double T;
__device__ T forward_term(T acc, T q, T k) { return acc + fabs(q - k); }
__device__ T make(float x) { return x; }
__device__ float value(T x) { return static_cast<float>(x); }
#endif

constexpr int COLS = 4;                        // one or two 128-bit loads
constexpr int ROWS = sizeof(T) == 8 ? 8 : 16;  // 32 or 64 sums: enough to hide the adders' latency, no spills
constexpr int PERIOD = 64, UNROLL = 4;
static_assert(PERIOD % UNROLL == 0, "the unrolled loop has no tail");

extern "C" __constant__ int limit_terms_per_pass = PERIOD * ROWS * COLS * (TERM_TYPE % 2 ? 1 : TERM_TYPE);

struct alignas(16) Columns { T k[COLS]; };

template <class Term>
__device__ void loop(float* out, int passes, Term term) {
    __shared__ Columns table[PERIOD];
    for (int i = threadIdx.x; i < PERIOD * COLS; i += THREADS) table[i / COLS].k[i % COLS] = make(0.01f * i);
    __syncthreads();

    T q[ROWS], acc[ROWS][COLS];
    for (int i = 0; i < ROWS; ++i) {
        q[i] = table[(i + threadIdx.x) % PERIOD].k[0];  // loaded, so that it is kept and not computed again
        for (int j = 0; j < COLS; ++j) acc[i][j] = make(0.0f);
    }
    for (int pass = 0; pass < passes; ++pass) {
#pragma unroll UNROLL
        for (int step = 0; step < PERIOD; ++step) {
            const Columns columns = table[step];
#pragma unroll
            for (int i = 0; i < ROWS; ++i)
#pragma unroll
                for (int j = 0; j < COLS; ++j) acc[i][j] = term(acc[i][j], q[i], columns.k[j]);
        }
    }
    float sum = 0.0f;  // written, so that no sum is thought unused
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < COLS; ++j) sum += value(acc[i][j]);
    out[blockIdx.x * THREADS + threadIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) limit_forward(float* out, int passes) {
    loop(out, passes, [](T acc, T q, T k) { return forward_term(acc, q, k); });
}

#if TERM_TYPE < 3
extern "C" __global__ void __launch_bounds__(THREADS) limit_backward(float* out, int passes) {
    const T h = make(1e-3f * (threadIdx.x + 1));
    loop(out, passes, [h](T acc, T q, T k) { return backward_term(acc, q, k, h); });
}
#endif
