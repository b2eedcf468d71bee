// attention_forward_stream.cu: fused L1 attention, forward, for a query or a few; the default for them.
// Computes  out[b,i,c] = sum_j p[b,i,j] * v[b,j,c],  p = exp(s - max_j s) / sum_j exp(s - max_j s);  softmax[b,i] = both
//           s[b,i,j] = F(scale * sum_k |q[b,i,k] - k[b,j,k]|) + mask[b,i,j]
// Shapes    q (B,L,E)  k (B,S,E)  v (B,S,V)  mask (B,L,S)  out (B,L,V)  softmax (B,L,2); strides in elements, int64
// Tiling    one query and BLOCK_V channels of v per block; keys in tiles of BLOCK_K, LANES lanes for KEYS of them,
//           channels of k in chunks of BLOCK_E. Lanes that share keys have a softmax of their own, joined at the end
//           With p.splits > 1 a block takes a share of the keys, and attention_merge joins them: see struct Split
// Cost      reads k and v once for every query, which is what takes the time
// Delta     like attention_forward_gather.cu, but by 128-bit loads, with the keys and values of a tile on their way at once
//           and no barrier before the end
//
// @variant  op=attention_forward dtypes=f32,f16,bf16 BLOCK_Q=1 BLOCK_K=64 BLOCK_E=64 BLOCK_V=64 KEYS=4 THREADS=128 SPLIT_BLOCKS=1056 rank=33 max_q=4 max_v=64
// @variant  op=attention_forward dtypes=f32,f16,bf16 BLOCK_Q=1 BLOCK_K=32 BLOCK_E=128 BLOCK_V=128 KEYS=2 THREADS=128 SPLIT_BLOCKS=1056 rank=32 max_q=4
// @variant  op=attention_forward dtypes=f32,f16,bf16 BLOCK_Q=1 BLOCK_K=32 BLOCK_E=128 BLOCK_V=128 KEYS=2 THREADS=128 SPLIT_BLOCKS=1536 rank=0
// @variant  op=attention_forward dtypes=f64 BLOCK_Q=1 BLOCK_K=16 BLOCK_E=64 BLOCK_V=64 KEYS=1 THREADS=128 SPLIT_BLOCKS=1536 rank=0

const int LANES = 8, GROUPS = THREADS / LANES, WARPS = THREADS / 32;  // LANES lanes share a key
const int E_LOADS = BLOCK_E / (LANES * LOAD), V_LOADS = BLOCK_V / (LANES * LOAD), OWN_V = V_LOADS * LOAD;
static_assert(SPLIT_BLOCKS >= 1, "how far keys are split: see struct Split");
static_assert(BLOCK_Q == 1, "a block holds one query");
static_assert(BLOCK_K == GROUPS * KEYS, "each group of lanes takes KEYS keys of a tile");
static_assert(BLOCK_E % (LANES * LOAD) == 0 && BLOCK_V % (LANES * LOAD) == 0, "lanes load 128 bits at a time");
static_assert(BLOCK_V <= THREADS && THREADS % 32 == 0, "a thread writes a channel of v; whole warps, for the shuffles");

// A lane's numbers of a row, zeros beyond its end. WHOLE: rows are aligned to 128 bits, and a whole number of them long.
template <bool WHOLE, int N>
__device__ __forceinline__ void fetch(Load (&numbers)[N], const scalar_t *row, int channels, int lane) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const int e = (n * LANES + lane) * LOAD;
        if (WHOLE) {
            numbers[n] = e < channels ? *(const Load *)(row + e) : Load{};
        } else {
            numbers[n] = load(row + e, channels - e);
        }
    }
}

// What a group of lanes made of its keys.
struct Part {
    Softmax softmax;
    acc_t sums[OWN_V];  // of this lane's channels

    // Makes `largest` that of the softmax, which it is not below.
    __device__ __forceinline__ acc_t raise(acc_t largest) {
        const acc_t subtracted = largest == -infinity() ? 0 : largest;  // no key so far: 0, not NaN
        const acc_t rescale = exponential(softmax.largest - subtracted);
        softmax.largest = largest;
        softmax.total *= rescale;
#pragma unroll
        for (int c = 0; c < OWN_V; ++c) sums[c] *= rescale;
        return subtracted;
    }
};

// Scores of the KEYS keys from j on, GROUPS apart; -inf from `end` on.
template <bool WHOLE>
__device__ __forceinline__ void score_keys(acc_t (&scores)[KEYS], const Attention &a, const scalar_t *q, const scalar_t *k,
                                           int64 mask, int j, int end, int lane) {
#pragma unroll
    for (int n = 0; n < KEYS; ++n) scores[n] = 0;
    for (int e0 = 0; e0 < a.channels; e0 += BLOCK_E) {
        Load x[E_LOADS], y[KEYS][E_LOADS];
        fetch<WHOLE>(x, q + e0, a.channels - e0, lane);
#pragma unroll
        for (int n = 0; n < KEYS; ++n) {  // beyond the last key it is read again
            fetch<WHOLE>(y[n], k + min(j + n * GROUPS, end - 1) * a.k.row_stride + e0, a.channels - e0, lane);
        }
#pragma unroll
        for (int n = 0; n < KEYS; ++n) {
#pragma unroll
            for (int e = 0; e < E_LOADS * LOAD; ++e) {
                scores[n] += absolute(to_acc(x[e / LOAD].at[e % LOAD]) - to_acc(y[n][e / LOAD].at[e % LOAD]));
            }
        }
    }
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
#pragma unroll
        for (int n = 0; n < KEYS; ++n) scores[n] += __shfl_xor_sync(0xffffffff, scores[n], step);
    }
    apply_score(scores, a.score, a.scale, a.eps);
#pragma unroll
    for (int n = 0; n < KEYS; ++n) {
        const int key = j + n * GROUPS;
        scores[n] = key < end ? masked_at(a, mask + key * a.mask_column, scores[n]) : -infinity();
    }
}

// Adds the keys from j0 up to `end`, and their values.
template <bool WHOLE>
__device__ __forceinline__ void add_keys(Part &part, const Attention &a, const scalar_t *q, const scalar_t *k,
                                         const scalar_t *v, int channels_v, int64 mask, int j0, int end) {
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    for (; j0 < end; j0 += BLOCK_K) {  // all lanes of a warp stay, for the shuffles
        Load values[KEYS][V_LOADS];    // on their way while the scores are formed
#pragma unroll
        for (int n = 0; n < KEYS; ++n) {
            fetch<WHOLE>(values[n], v + min(j0 + group + n * GROUPS, end - 1) * a.v.row_stride, channels_v, lane);
        }
        acc_t scores[KEYS], largest = part.softmax.largest;
        score_keys<WHOLE>(scores, a, q, k, mask, j0 + group, end, lane);
#pragma unroll
        for (int n = 0; n < KEYS; ++n) largest = max(largest, scores[n]);
        const acc_t subtracted = part.raise(largest);
#pragma unroll
        for (int n = 0; n < KEYS; ++n) {
            if (scores[n] == -infinity()) continue;  // the value of a key that is ruled out may be anything
            const acc_t weight = exponential(scores[n] - subtracted);
            part.softmax.total += weight;
#pragma unroll
            for (int c = 0; c < OWN_V; ++c) {
                part.sums[c] = multiply_add(weight, to_acc(values[n][c / LOAD].at[c % LOAD]), part.sums[c]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) attention_forward(const AttentionForward p) {
    const Attention &a = p.a;
    const int v_blocks = max(1, ceil_div(a.channels_v, BLOCK_V));
    const Split split(p);
    const int c0 = split.block % v_blocks * BLOCK_V, channels_v = a.channels_v - c0;
    const int i = split.block / v_blocks % a.length_q, b = split.block / v_blocks / a.length_q;
    const scalar_t *q = matrix(a.q, a.batch_shape, b) + i * a.q.row_stride;  // q[b, i, :]
    const scalar_t *k = matrix(a.k, a.batch_shape, b), *v = matrix(a.v, a.batch_shape, b) + c0;
    const int64 mask = a.mask_kind == NO_MASK ? 0 : offset(a.mask, a.batch_shape, b) + i * a.mask.row_stride;
    __shared__ Softmax parts[GROUPS];
    __shared__ acc_t sums[WARPS][BLOCK_V];

    int first = first_key(a, i), end = end_of_keys(a, i);
    split.narrow(first, end, BLOCK_K, p.splits);
    Part part = {{-infinity(), 0}, {}};
    if (aligned<Load>(q) && aligned_rows(k, a.k.row_stride) && aligned_rows(v, a.v.row_stride) &&
        a.channels % LOAD == 0 && channels_v % LOAD == 0) {
        add_keys<true>(part, a, q, k, v, channels_v, mask, first, end);
    } else {
        add_keys<false>(part, a, q, k, v, channels_v, mask, first, end);
    }

    if (threadIdx.x % LANES == 0) parts[threadIdx.x / LANES] = part.softmax;  // the same in all lanes of a group
    __syncthreads();                                                          // those of all groups are there

    Softmax softmax = {-infinity(), 0};
    for (int n = 0; n < GROUPS; ++n) softmax.largest = max(softmax.largest, parts[n].largest);
    const acc_t subtracted = part.raise(softmax.largest);
    for (int n = 0; n < GROUPS; ++n) softmax.total += parts[n].total * exponential(parts[n].largest - subtracted);
#pragma unroll
    for (int c = 0; c < OWN_V; ++c) {
        acc_t sum = part.sums[c];
#pragma unroll
        for (int step = LANES; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
        if (threadIdx.x % 32 < LANES) {
            sums[threadIdx.x / 32][(c / LOAD * LANES + threadIdx.x % LANES) * LOAD + c % LOAD] = sum;
        }
    }
    __syncthreads();  // the sums of all warps are there

    const bool done = p.splits == 1;
    if (done) softmax.finish();
    if (threadIdx.x == 0 && c0 == 0) split.store(p, b, i, softmax);
    const int c = threadIdx.x;
    if (c >= BLOCK_V || c >= channels_v) return;
    acc_t sum = 0;
#pragma unroll
    for (int n = 0; n < WARPS; ++n) sum += sums[n][c];
    split.store(p, b, i, c0 + c, done ? sum * softmax.factor() : sum);
}
