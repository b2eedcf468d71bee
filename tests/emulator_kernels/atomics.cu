// atomics.cu: every thread of every block adds to the same places.
struct AtomicsArgs {
  const int* bin;           // (grid * blockDim), from 0 to 15
  int* histogram;           // (16), by way of shared memory
  float* sum;               // (1)
  double* wide_sum;         // (1)
  unsigned long long* count;  // (1)
  int* extremes;            // (2): largest and smallest thread
  unsigned* last;           // (1): by compare and swap, the same as the largest
};

extern "C" __global__ void atomics(const AtomicsArgs args) {
  __shared__ int local[16];
  const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  if (t < 16) local[t] = 0;
  __syncthreads();
  atomicAdd(&local[args.bin[i]], 1);
  __syncthreads();
  if (t < 16) atomicAdd(args.histogram + t, local[t]);
  atomicAdd(args.sum, 0.5f);
  atomicAdd(args.wide_sum, 0.25);
  atomicAdd(args.count, 1ull);
  atomicMax(&args.extremes[0], i);
  atomicMin(&args.extremes[1], i);
  unsigned seen = atomicAdd(args.last, 0u), want = static_cast<unsigned>(i);
  while (seen < want) {
    const unsigned before = atomicCAS(args.last, seen, want);
    if (before == seen) break;
    seen = before;
  }
}
