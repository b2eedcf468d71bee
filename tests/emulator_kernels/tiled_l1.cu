// tiled_l1.cu: a 128 x 128 tile of L1 distances over 64 channels a block, 8 x 8 outputs a thread; 8 blocks.
// The engine's own speed test: what a register-tiled kernel with shared tiles costs here.
struct TiledL1Args {
  const float* q;  // (blocks * 128, E)
  const float* k;  // (128, E)
  float* out;      // (blocks * 128, 128)
  int E;           // a multiple of BLOCK_E
};

constexpr int BLOCK = 128, BLOCK_E = 16;

extern "C" __global__ void __launch_bounds__(256) tiled_l1(const TiledL1Args args) {
  __shared__ __align__(16) float tile_q[BLOCK_E][BLOCK];
  __shared__ __align__(16) float tile_k[BLOCK_E][BLOCK];
  const int row = threadIdx.x / 16 * 8, col = threadIdx.x % 16 * 8;
  float acc[8][8] = {};
  for (int e0 = 0; e0 < args.E; e0 += BLOCK_E) {
    for (int i = threadIdx.x; i < BLOCK * BLOCK_E; i += blockDim.x) {
      const int r = i / BLOCK_E, e = i % BLOCK_E;
      tile_q[e][r] = args.q[((long long)blockIdx.x * BLOCK + r) * args.E + e0 + e];
      tile_k[e][r] = args.k[(long long)r * args.E + e0 + e];
    }
    __syncthreads();
    for (int e = 0; e < BLOCK_E; ++e) {
      float a[8], b[8];
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        *reinterpret_cast<float4*>(a + i) = *reinterpret_cast<const float4*>(&tile_q[e][row + i]);
        *reinterpret_cast<float4*>(b + i) = *reinterpret_cast<const float4*>(&tile_k[e][col + i]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) acc[i][j] += fabsf(a[i] - b[j]);
    }
    __syncthreads();
  }
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) args.out[((long long)blockIdx.x * BLOCK + row + i) * BLOCK + col + j] = acc[i][j];
}
