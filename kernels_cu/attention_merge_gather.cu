// attention_merge_gather.cu: what attention_forward made of parts of the keys, joined.
// Computes  largest = max_s largest[s],  w[s] = exp(largest[s] - largest),  total = sum_s w[s] * total[s]
//           out[b,i,c] = sum_s w[s] * parts[s,b,i,c] / total;  softmax[b,i] = largest and total
// Shapes    parts (S,B,L,V) and their softmax (S,B,L,2) in acc_t, S splits;  out (B,L,V)  softmax (B,L,2)
// Tiling    a warp per query and BLOCK_V channels of v, or p.shares warps, which divide its splits among themselves
// Cost      reads all parts once
// Delta     one order of summation: the same bits in every run
// @variant  op=attention_merge dtypes=f32,f16,bf16,f64 BLOCK_V=32 THREADS=256 rank=1

static_assert(BLOCK_V == 32, "a lane owns one channel of v");
static_assert(THREADS % 32 == 0, "whole warps, for the shuffles");
const int WARPS = THREADS / 32;

extern "C" __global__ void __launch_bounds__(THREADS) attention_merge(const AttentionMerge p) {
    const Attention &a = p.parts.a;
    const unsigned v_blocks = max(1, ceil_div(a.channels_v, BLOCK_V));
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, share = warp % p.shares;
    unsigned batch = 1;
#pragma unroll
    for (int dim = 0; dim < MAX_BATCH_DIMS; ++dim) batch *= a.batch_shape[dim];
    const unsigned item = blockIdx.x * (WARPS / p.shares) + warp / p.shares;  // which query and channels of v
    const bool exists = item < batch * a.length_q * v_blocks;
    const int c = item % v_blocks * BLOCK_V + lane;
    const int i = exists ? item / v_blocks % a.length_q : 0, b = exists ? item / v_blocks / a.length_q : 0;
    const acc_t *softmax = accumulated(a.softmax, a.batch_shape, b) + i * a.softmax.row_stride;
    const acc_t *parts = accumulated(p.parts.out, a.batch_shape, b) + i * p.parts.out.row_stride + c;
    __shared__ acc_t sums[WARPS][BLOCK_V], totals[WARPS];

    Softmax whole = {-infinity(), 0};
    for (int s = lane; s < p.parts.splits; s += 32) whole.largest = max(whole.largest, softmax[s * p.parts.softmax_split]);
    whole.largest = warp_max(whole.largest);
    const acc_t subtracted = whole.largest == -infinity() ? 0 : whole.largest;  // no key at all: 0, not NaN
    acc_t sum = 0;
#pragma unroll 4
    for (int s = share; s < p.parts.splits; s += p.shares) {
        const acc_t *part = softmax + s * p.parts.softmax_split;
        const acc_t weight = exponential(part[0] - subtracted);
        whole.total += weight * part[1];
        if (c < a.channels_v) sum += weight * parts[s * p.parts.out_split];
    }
    sums[warp][lane] = sum;
    if (lane == 0) totals[warp] = whole.total;
    __syncthreads();  // the sums of all shares are there

    if (share > 0 || !exists) return;
    for (int n = 1; n < p.shares; ++n) sum += sums[warp + n][lane], whole.total += totals[warp + n];
    whole.finish();
    if (c < a.channels_v) store_out(p.out, a.batch_shape, p.unrounded, b, i, c, sum * whole.factor());
    if (c == 0) {
        acc_t *to = accumulated(p.softmax, a.batch_shape, b) + i * p.softmax.row_stride;
        to[0] = whole.largest, to[1] = whole.total;
    }
}
