// attention_forward_gather.cu: fused L1 attention, forward; the baseline.
// Computes  out[b,i,c] = sum_j p[b,i,j] * v[b,j,c],  p = exp(s - max_j s) / sum_j exp(s - max_j s);  softmax[b,i] = both
//           s[b,i,j] = F(scale * sum_k |q[b,i,k] - k[b,j,k]|) + mask[b,i,j]
// Shapes    q (B,L,E)  k (B,S,E)  v (B,S,V)  mask (B,L,S)  out (B,L,V)  softmax (B,L,2); strides in elements, int64
// Tiling    one query and BLOCK_V channels of v per block; keys in tiles of BLOCK_K, a warp per score, then a thread per
//           channel. Online softmax: what was summed so far is scaled down when a larger score comes
// Cost      2*B*L*S*E adds and B*L*S*V multiply-adds, the scores again for every BLOCK_V channels; memory linear in L
// Delta     nothing is reused between queries: the one to read first
// @variant  op=attention_forward dtypes=f32,f16,bf16,f64 BLOCK_Q=1 BLOCK_K=32 BLOCK_V=128 THREADS=128 rank=1

static_assert(BLOCK_Q == 1, "a block holds one query");
static_assert(BLOCK_K == 32, "a lane of the first warp owns one key of a tile");
static_assert(BLOCK_V == THREADS && THREADS % 32 == 0, "a thread owns one channel of v; whole warps, for the shuffles");

extern "C" __global__ void __launch_bounds__(THREADS) attention_forward(const AttentionForward p) {
    const Attention &a = p.a;
    const int v_blocks = max(1, ceil_div(a.channels_v, BLOCK_V));
    const int c = blockIdx.x % v_blocks * BLOCK_V + threadIdx.x;
    const int i = blockIdx.x / v_blocks % a.length_q, b = blockIdx.x / v_blocks / a.length_q;
    const scalar_t *q = matrix(a.q, a.batch_shape, b) + i * a.q.row_stride;  // q[b, i, :]
    const scalar_t *k = matrix(a.k, a.batch_shape, b), *v = matrix(a.v, a.batch_shape, b);
    __shared__ acc_t weights[BLOCK_K], factor;
    __shared__ bool left[BLOCK_K];

    const int lane = threadIdx.x % 32;
    Softmax softmax = {-infinity(), 0};  // kept by the first warp
    acc_t sum = 0;
    const int end = end_of_keys(a, i);
    for (int j0 = first_key(a, i); j0 < end; j0 += BLOCK_K) {
        const int count = min(BLOCK_K, end - j0);
        for (int n = threadIdx.x / 32; n < count; n += THREADS / 32) {
            const acc_t distance = warp_distance(q, k + (j0 + n) * a.k.row_stride, a.channels, lane);
            if (lane == 0) weights[n] = masked(a, b, i, j0 + n, score_of(distance, a));
        }
        __syncthreads();  // the scores of the tile are there

        if (threadIdx.x < 32) {
            const acc_t score = lane < count ? weights[lane] : -infinity(), before = softmax.largest;
            softmax.largest = max(before, warp_max(score));
            const acc_t subtracted = softmax.largest == -infinity() ? 0 : softmax.largest;  // no key so far: 0, not NaN
            const acc_t weight = exponential(score - subtracted), rescale = exponential(before - subtracted);
            softmax.total = softmax.total * rescale + warp_sum(weight);
            weights[lane] = weight;
            left[lane] = score != -infinity();
            if (lane == 0) factor = rescale;
        }
        __syncthreads();  // the weights are there

        if (c < a.channels_v) {
            sum *= factor;
            for (int n = 0; n < count; ++n) {  // the value of a key that is ruled out may be anything
                if (left[n]) sum += weights[n] * to_acc(v[(j0 + n) * a.v.row_stride + c]);
            }
        }
        __syncthreads();  // all are done with the tile
    }

    if (threadIdx.x == 0) {
        softmax.finish();
        factor = softmax.factor();
        if (c < BLOCK_V) softmax.store(a, b, i);
    }
    __syncthreads();  // one over the sum of all weights is there
    if (c < a.channels_v) store_out(p, b, i, c, sum * factor);
}
