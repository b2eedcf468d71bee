// attention_forward_gather.cu: fused L1 attention, forward; the baseline.
// Computes  out[b,i,c] = sum_j p[b,i,j] * v[b,j,c],  p = exp(s - max_j s) / sum_j exp(s - max_j s);  softmax[b,i] = both
//           s[b,i,j] = F(scale * sum_k |q[b,i,k] - k[b,j,k]|) + mask[b,i,j]
// Shapes    q (B,L,E)  k (B,S,E)  v (B,S,V)  mask (B,L,S)  out (B,L,V)  softmax (B,L,2); strides in elements, int64
// Tiling    one query and BLOCK_V channels of v per block; keys in tiles of BLOCK_K, a warp per score, then a thread per
//           channel. Online softmax: what was summed so far is scaled down when a larger score comes
//           With p.splits > 1 a block takes a share of the keys, and attention_merge joins them: see struct Split
// Cost      2*B*L*S*E adds and B*L*S*V multiply-adds, the scores again for every BLOCK_V channels; memory linear in L
// Delta     nothing is reused between queries: the one to read first
//
// One query, or a few, take the time of reading the keys and values, which are read once here too: the default for them in
// float64; attention_forward_stream.cu reads faster.
//
// @variant  op=attention_forward dtypes=f32,f16,bf16,f64 BLOCK_Q=1 BLOCK_K=32 BLOCK_V=64 THREADS=64 SPLIT_BLOCKS=1536 rank=31 max_q=4 max_v=64
// @variant  op=attention_forward dtypes=f32,f16,bf16,f64 BLOCK_Q=1 BLOCK_K=32 BLOCK_V=128 THREADS=128 SPLIT_BLOCKS=1536 rank=30 max_q=4
// @variant  op=attention_forward dtypes=f32,f16,bf16,f64 BLOCK_Q=1 BLOCK_K=32 BLOCK_V=128 THREADS=128 SPLIT_BLOCKS=1536 rank=1

const int AT_ONCE = sizeof(acc_t) == 8 ? 2 : 4;  // keys that a warp reads at once, as it waits for each
static_assert(BLOCK_K % AT_ONCE == 0, "a tile is a whole number of such groups");
static_assert(SPLIT_BLOCKS >= 1, "how far keys are split: see struct Split");
static_assert(BLOCK_Q == 1, "a block holds one query");
static_assert(BLOCK_K == 32, "a lane of the first warp owns one key of a tile");
static_assert(BLOCK_V == THREADS && THREADS % 32 == 0, "a thread owns one channel of v; whole warps, for the shuffles");

extern "C" __global__ void __launch_bounds__(THREADS) attention_forward(const AttentionForward p) {
    const Attention &a = p.a;
    const int v_blocks = max(1, ceil_div(a.channels_v, BLOCK_V));
    const Split split(p);
    const int c = split.block % v_blocks * BLOCK_V + threadIdx.x;
    const int i = split.block / v_blocks % a.length_q, b = split.block / v_blocks / a.length_q;
    const scalar_t *q = matrix(a.q, a.batch_shape, b) + i * a.q.row_stride;  // q[b, i, :]
    const scalar_t *k = matrix(a.k, a.batch_shape, b), *v = matrix(a.v, a.batch_shape, b);
    __shared__ acc_t weights[BLOCK_K], factor;
    __shared__ bool left[BLOCK_K];

    const int lane = threadIdx.x % 32;
    Softmax softmax = {-infinity(), 0};  // kept by the first warp
    acc_t sum = 0;
    int first = first_key(a, i), end = end_of_keys(a, i);
    split.narrow(first, end, BLOCK_K, p.splits);
    for (int j0 = first; j0 < end; j0 += BLOCK_K) {
        const int count = min(BLOCK_K, end - j0);
        for (int n = threadIdx.x / 32 * AT_ONCE; n < count; n += THREADS / 32 * AT_ONCE) {
            acc_t distances[AT_ONCE] = {};
            for (int e = lane; e < a.channels; e += 32) {
                const acc_t x = to_acc(q[e]);
#pragma unroll
                for (int m = 0; m < AT_ONCE; ++m) {  // beyond the last key it is read again
                    distances[m] += absolute(x - to_acc(k[(j0 + min(n + m, count - 1)) * a.k.row_stride + e]));
                }
            }
#pragma unroll
            for (int m = 0; m < AT_ONCE; ++m) {
                const acc_t distance = warp_sum(distances[m]);
                if (lane == m && n + m < count) weights[n + m] = masked(a, b, i, j0 + n + m, score_of(distance, a));
            }
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
#pragma unroll 4
            for (int n = 0; n < count; ++n) {
                const acc_t value = to_acc(v[(j0 + n) * a.v.row_stride + c]);
                sum = left[n] ? sum + weights[n] * value : sum;  // that of a key that is ruled out may be anything
            }
        }
        __syncthreads();  // all are done with the tile
    }

    if (threadIdx.x == 0) {
        if (p.splits == 1) softmax.finish();
        factor = p.splits == 1 ? softmax.factor() : 1;
        if (c < BLOCK_V) split.store(p, b, i, softmax);
    }
    __syncthreads();  // one over the sum of all weights is there
    if (c < a.channels_v) split.store(p, b, i, c, sum * factor);
}
