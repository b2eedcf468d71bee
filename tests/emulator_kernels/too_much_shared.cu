// too_much_shared.cu: one word more than CUDA allows without `extern`.
struct TooMuchSharedArgs { int* out; };

extern "C" __global__ void too_much_shared(const TooMuchSharedArgs args) {
  __shared__ int words[12289];
  words[threadIdx.x] = args.out[threadIdx.x];
}
