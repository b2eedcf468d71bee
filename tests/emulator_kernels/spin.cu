// spin.cu: kernels that never end, one way for each value of MODE.
struct SpinArgs { volatile int* flag; };

extern "C" __global__ void spin(const SpinArgs args) {
#if MODE == 0  // arithmetic alone
  unsigned x = threadIdx.x;
  while (x != 12345u) x = (x * 2u + 2u) & ~1u;
  *args.flag = static_cast<int>(x);
#elif MODE == 1  // waits for a flag that nobody sets
  while (*args.flag == 0) {}
#elif MODE == 2  // barriers
  for (;;) __syncthreads();
#elif MODE == 3  // library calls
  volatile float x = 1.0f;
  for (;;) x = expf(-x);
#elif MODE == 4  // not one instruction but the jump
  for (;;) {}
#endif
}
