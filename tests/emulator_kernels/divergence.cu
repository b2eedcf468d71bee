// divergence.cu: barriers that not all threads reach, one way for each value of MODE.
struct DivergenceArgs { int* out; };

extern "C" __global__ void divergence(const DivergenceArgs args) {
  const int t = threadIdx.x;
#if MODE == 0  // two barriers
  if (t < 10) {
    __syncthreads();
  } else {
    __syncthreads();
  }
#elif MODE == 1  // an early return
  if (t >= 50) return;
  __syncthreads();
#elif MODE == 2  // half a warp in a shuffle for all of it
  int v = t;
  if (t % 32 < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);
  else __syncthreads();
  args.out[t] = v;
#elif MODE == 3  // a mask without the caller
  args.out[t] = __shfl_sync(0x0000ffffu, t, 0);
#elif MODE == 4  // fine: lanes that have ended are not waited for
  if (t >= 48) return;
  args.out[t] = __shfl_xor_sync(0xffffffffu, t, 1);
#endif
}
