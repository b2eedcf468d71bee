// dynamic_shared.cu: out = x reversed within each block, through `extern __shared__` memory.
struct DynamicArgs {
  const float* x;
  float* out;
};

namespace {
__device__ float* scratch() {
  extern __align__(16) __shared__ unsigned char bytes[];
  return reinterpret_cast<float*>(bytes);
}
}  // namespace

extern "C" __global__ void dynamic_shared(const DynamicArgs args) {
  extern __shared__ float again[];  // the same memory: all that is extern begins together
  __shared__ float fixed[32];
  const int t = threadIdx.x, n = blockDim.x, i = blockIdx.x * n + t;
  if (t < 32) fixed[t] = 1.0f;
  scratch()[t] = args.x[i];
  __syncthreads();
  args.out[i] = again[n - 1 - t] * fixed[t % 32];
}
