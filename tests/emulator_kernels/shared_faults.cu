// shared_faults.cu: wrong and right uses of shared memory, one for each value of MODE.
struct SharedArgs { float* out; };

extern "C" __global__ void __launch_bounds__(64) shared_faults(const SharedArgs args) {
  __shared__ __align__(16) float tile[64];
  __shared__ float scalar;
  const int t = threadIdx.x;
  float result = 0.0f;
#if MODE == 0  // one element is never written
  if (t != 7) tile[t] = t;
  __syncthreads();
  result = tile[63 - t];
#elif MODE == 1  // nor is the scalar
  if (t == 0) result = scalar;
#elif MODE == 2  // an index outside the array
  tile[t + 1] = t;
#elif MODE == 3  // a pointer that leaves all shared memory
  float* p = tile + t;
  p[4096] = t;
#elif MODE == 4  // 16 bytes at a multiple of 4
  tile[t] = t;
  __syncthreads();
  if (t < 32) result = reinterpret_cast<const float4*>(tile + t)->x;
#elif MODE == 5  // a scalar, without a barrier
  if (t == 0) scalar = 1.0f;
  result = scalar;
#elif MODE == 6  // all write the same value: a race all the same
  scalar = 1.0f;
#elif MODE == 7  // fine: lanes of a warp, ordered by __syncwarp()
  tile[t] = t;
  __syncwarp();
  result = tile[t ^ 1];
  __syncwarp();
  tile[t] = result;
#elif MODE == 8  // across warps that is not enough
  tile[t] = t;
  __syncwarp();
  result = tile[t ^ 32];
#elif MODE == 9  // fine: atomics do not race with each other
  if (t == 0) scalar = 0.0f;
  __syncthreads();
  atomicAdd(&scalar, 1.0f);
  __syncthreads();
  result = scalar;
#elif MODE == 10  // but with an ordinary read they do
  if (t == 0) scalar = 0.0f;
  __syncthreads();
  atomicAdd(&scalar, 1.0f);
  result = scalar;
#elif MODE == 11  // fine: a warp's shuffle lies between
  tile[t] = t;
  result = __shfl_xor_sync(0xffffffffu, 1.0f, 1) + tile[t ^ 1];
#elif MODE == 12  // fine: neighbours in one word
  reinterpret_cast<unsigned char*>(tile)[t] = static_cast<unsigned char>(t);
  __syncthreads();
  result = reinterpret_cast<unsigned char*>(tile)[63 - t];
#endif
  args.out[t] = result;
}
