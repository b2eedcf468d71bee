// broken.cu: does not compile.
struct BrokenArgs { int* out; };

extern "C" __global__ void broken(const BrokenArgs args) {
  args.out[threadIdx.x] = no_such_name;
}
