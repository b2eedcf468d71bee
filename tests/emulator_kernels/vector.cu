// vector.cu: out = a + b, and the ways to get an address wrong.
struct VectorArgs {
  const float* a;
  const float* b;
  float* out;
  int n;
  int read_shift;   // in elements, added to the index into a
  int write_shift;  // the same for out
};

extern "C" __global__ void add(const VectorArgs args) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < args.n) {
    const float x = args.a[i + args.read_shift] + args.b[i];
    args.out[i + args.write_shift] = x;
  }
}

extern "C" __global__ void add4(const VectorArgs args) {
  const int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
  if (i < args.n) {
    const float4 a = *reinterpret_cast<const float4*>(args.a + i + args.read_shift);
    const float4 b = *reinterpret_cast<const float4*>(args.b + i);
    *reinterpret_cast<float4*>(args.out + i + args.write_shift) =
        make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
  }
}
