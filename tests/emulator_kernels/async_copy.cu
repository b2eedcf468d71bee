// async_copy.cu: out = 2 * x by double buffering with asynchronous copies; MODE 1 forgets to wait.
#include <cuda_pipeline_primitives.h>

struct AsyncArgs {
  const float* x;  // (chunks, blockDim)
  float* out;      // (chunks, blockDim)
  int chunks;
};

extern "C" __global__ void async_copy(const AsyncArgs args) {
  __shared__ float buffer[2][64];
  const int t = threadIdx.x, n = blockDim.x;
  __pipeline_memcpy_async(&buffer[0][t], args.x + t, 4);
  __pipeline_commit();
  for (int c = 0; c < args.chunks; ++c) {
    if (c + 1 < args.chunks) __pipeline_memcpy_async(&buffer[(c + 1) % 2][t], args.x + (c + 1) * n + t, 4);
    __pipeline_commit();
#if MODE == 0
    __pipeline_wait_prior(1);
#else
    __pipeline_wait_prior(2);
#endif
    __syncthreads();
    args.out[c * n + t] = 2.0f * buffer[c % 2][n - 1 - t];
    __syncthreads();
  }
}
