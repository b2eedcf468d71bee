// warp.cu: one output row for each shuffle and vote.
struct WarpArgs {
  int* out;      // (ROWS, blockDim)
  double* wide;  // (blockDim): 8 bytes through a shuffle
};

extern "C" __global__ void warp(const WarpArgs args) {
  const int t = threadIdx.x, n = blockDim.x, lane = t % warpSize;
  const unsigned all = 0xffffffffu;
  int row = 0;
  auto put = [&](int value) { args.out[row++ * n + t] = value; };
  put(__shfl_sync(all, t, 3));
  put(__shfl_sync(all, t, 3, 8));
  put(__shfl_up_sync(all, t, 2));
  put(__shfl_up_sync(all, t, 2, 16));
  put(__shfl_down_sync(all, t, 5));
  put(__shfl_down_sync(all, t, 5, 8));
  put(__shfl_xor_sync(all, t, 7));
  put(static_cast<int>(__ballot_sync(all, t % 3 == 0)));
  put(__any_sync(all, lane == 31 && t > 40));
  put(__all_sync(all, t < 32));
  put(static_cast<int>(__activemask()));
  if (lane < 16) put(__shfl_down_sync(0x0000ffffu, t, 1));
  else put(__shfl_up_sync(0xffff0000u, t, 1));
  put(__syncthreads_count(t % 2));
  put(__syncthreads_and(t >= 0));
  put(__syncthreads_or(t == 77));
  double sum = t + 0.5;
  for (int with = 16; with > 0; with /= 2) sum += __shfl_xor_sync(all, sum, with);
  args.wide[t] = sum;
}
