// order.cu: in which order the threads of a block ran, before and after a barrier.
struct OrderArgs { int* out; };  // (2, blockDim)

extern "C" __global__ void order(const OrderArgs args) {
  __shared__ int turn;
  if (threadIdx.x == 0) turn = 0;
  __syncthreads();
  args.out[threadIdx.x] = atomicAdd(&turn, 1);
  __syncthreads();
  args.out[blockDim.x + threadIdx.x] = atomicAdd(&turn, 1);
}
