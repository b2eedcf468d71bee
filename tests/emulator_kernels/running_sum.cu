// running_sum.cu: every thread of a block adds up the sums of `chunks` chunks. Each of its barriers is needed.
struct RunningSumArgs {
  const float* x;  // (grid, chunks, blockDim)
  float* out;      // (grid, blockDim)
  int chunks;
};

extern "C" __global__ void __launch_bounds__(128) running_sum(const RunningSumArgs args) {
  __shared__ float tile[128];
  const int t = threadIdx.x;
  float sum = 0.0f;
  for (int c = 0; c < args.chunks; ++c) {
    tile[t] = args.x[(blockIdx.x * args.chunks + c) * 128 + t];
    __syncthreads();  // tile is complete
    for (int half = 64; half > 0; half /= 2) {
      if (t < half) tile[t] += tile[t + half];
      __syncthreads();  // this level is complete
    }
    sum += tile[0];
    __syncthreads();  // everyone has read tile[0]
  }
  args.out[blockIdx.x * 128 + t] = sum;
}
