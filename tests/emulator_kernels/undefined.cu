// undefined.cu: what C++ leaves undefined, and traps, one for each value of MODE.
struct UndefinedArgs {
  int* out;
  int big;  // 2147483647
  int zero;
};

__constant__ int table[4] = {1, 2, 3, 4};

extern "C" __global__ void undefined(const UndefinedArgs args) {
  const int t = threadIdx.x;
#if MODE == 0
  args.out[t] = args.big + t;
#elif MODE == 1
  args.out[t] = args.big / (args.zero + t - 3);
#elif MODE == 2
  args.out[t] = table[t + args.zero];
#elif MODE == 3
  __builtin_assume(t < 4);
  args.out[t] = t;
#elif MODE == 4
  if (t == 5) __trap();
#elif MODE == 5
  if (t == 5) assert(args.zero == 1);
#elif MODE == 6
  volatile char big[200000];  // more local memory than there is, and only its far end is used
  big[t] = 1;
  args.out[t] = big[t];
#elif MODE == 7
  *reinterpret_cast<int*>(16) = t;
#elif MODE == 8
  args.out[0] = t;  // all threads of all blocks
#elif MODE == 9
  if (blockIdx.x == 1 && t == 0) args.out[0] = 1;
  if (t == 0) args.out[blockIdx.x == 2 ? 0 : blockIdx.x] = 2;
#elif MODE == 10
  const int i = 65536 + args.zero;
  args.out[t] = static_cast<int>(static_cast<unsigned>(i) * static_cast<unsigned>(i));  // fine: unsigned wraps
#elif MODE == 11
  if (t == 0) memcpy(args.out, args.out + 60, 32);
#elif MODE == 12
  if (t == 0) memset(args.out + 60 + args.zero, 0, 20);
#elif MODE == 13
  int sum;  // never set to 0
  for (int i = 0; i < args.zero + 3; ++i) sum += i;
  args.out[t] = sum;
#elif MODE == 14
  struct Six { int at[6]; };
  if (t == 0) *reinterpret_cast<Six*>(args.out + 60) = *reinterpret_cast<Six*>(args.out);
#elif MODE == 15
  if (t == 0) atomicAdd(reinterpret_cast<int*>(reinterpret_cast<char*>(args.out) + 2), 1);
#elif MODE == 16
  volatile int x = 0;
  const int turns = blockIdx.x == args.zero ? 90000000 : 30000000;  // one block fails after the others
  for (int i = 0; i < turns; ++i) x = i;
  if (t == 0) args.out[64 + blockIdx.x] = x;
#endif
}
