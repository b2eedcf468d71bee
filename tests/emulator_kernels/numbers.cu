// numbers.cu: intrinsics, and how numbers round.
struct NumbersArgs {
  const float* x;          // (4): tiny, tiny, 1.5, 0.7
  float* out;              // (13)
  unsigned* integers;      // (10)
};

extern "C" __global__ void numbers(const NumbersArgs args) {
  const float tiny = args.x[0], x = args.x[2];
  float* out = args.out;
  out[0] = tiny * 0.5f;                   // a denormal result
  out[1] = fabsf(args.x[1] - tiny * 2.0f) > 0.0f;  // a denormal difference
  out[2] = __saturatef(x);
  out[3] = __saturatef(__int_as_float(0x7fc00000));
  out[4] = __fdividef(x, 2.0f);
  out[5] = rsqrtf(4.0f) + rsqrt(16.0f);
  out[6] = __fmaf_rn(x, x, -2.25f);
  out[7] = __expf(x) - exp(x);
  out[8] = max(x, 2) + min(1, 2u) + fmaxf(__int_as_float(0x7fc00000), 1.0f);
  out[9] = __frcp_rn(x);
  out[10] = __ldg(args.x + 2);
  const float third = x / 4.5f;
  out[11] = third * third - __fmul_rn(third, third);  // the rounding of the second product, if the first is fused
  out[12] = __fadd_rn(third * args.x[3], -__fmul_rn(third, args.x[3]));  // never fused
  unsigned* integers = args.integers;
  integers[0] = __vsadu4(0x01ff0203u, 0x02000301u);
  integers[1] = __vabsdiffu4(0x01ff0203u, 0x02000301u);
  integers[2] = __popc(0xf0f0u) + __clz(1) + __ffs(8);
  integers[3] = __brev(1u);
  integers[4] = __byte_perm(0x03020100u, 0x07060504u, 0x7531u);
  integers[5] = __umulhi(0x80000000u, 6u);
  integers[6] = static_cast<unsigned>(__float2int_rz(3e9f));
  integers[7] = __float_as_uint(1.0f);
  integers[8] = static_cast<unsigned>(__dp4a(0x01020304, 0x01010101, 5));
  integers[9] = sizeof(float4) + alignof(float4) + sizeof(float3) + alignof(double2) + alignof(uchar4);
}
