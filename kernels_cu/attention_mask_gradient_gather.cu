// attention_mask_gradient_gather.cu: gradient of a mask that is added to the scores of fused L1 attention.
// Computes  dmask[i,j] = sum_b p[b,i,j] * (sum_c grad[b,i,c] * v[b,j,c] - delta[b,i])
// Shapes    as in attention_backward_gather.cu; dmask as mask, where a dimension of 1 is summed over
// Tiling    one row of the mask, or all queries where they share one, and BLOCK_K columns, or all; a warp per pair
// Cost      B*L*S*(2*E + 2*V) operations; memory of dmask alone
// Delta     the sums of attention_backward_gather.cu without h: ds itself is the result. One order of summation
// @variant  op=attention_mask_gradient dtypes=f32,f16,bf16,f64 BLOCK_Q=1 BLOCK_K=32 THREADS=128 BLOCKS_PER_SM=4 rank=1

static_assert(BLOCK_Q == 1, "a block holds one row");
static_assert(BLOCK_K <= THREADS && THREADS % 32 == 0, "a thread writes one column; whole warps, for the shuffles");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) attention_mask_gradient(const AttentionMaskGradient p) {
    const Attention &a = p.s.a;
    const int rows = p.one_row ? 1 : a.length_q, k_blocks = p.one_column ? 1 : ceil_div(a.length_k, BLOCK_K);
    const int row = blockIdx.x / k_blocks % rows, column = blockIdx.x % k_blocks * BLOCK_K;
    const int entry = blockIdx.x / k_blocks / rows * p.s.summed;
    const int i_end = p.one_row ? a.length_q : row + 1;
    const int j_end = p.one_column ? a.length_k : min(a.length_k, column + BLOCK_K);
    __shared__ acc_t total[BLOCK_K];

    const int lane = threadIdx.x % 32;
    for (int n = threadIdx.x / 32; n < BLOCK_K; n += THREADS / 32) {
        if (lane == 0) total[n] = 0;
    }
    for (int b = entry; b < entry + p.s.summed; ++b) {
        for (int i = row; i < i_end; ++i) {
            const int first = first_key(a, i), end = min(j_end, end_of_keys(a, i));
            for (int j0 = column; j0 < end; j0 += BLOCK_K) {
                for (int n = threadIdx.x / 32; n < BLOCK_K; n += THREADS / 32) {
                    if (j0 + n < first || j0 + n >= end) continue;  // the same for the whole warp
                    acc_t weight, ds, score;
                    score_gradient(p.s, b, i, j0 + n, lane, weight, ds, score);
                    if (lane == 0) total[n] += ds;  // always by the same warp
                }
            }
        }
    }
    __syncthreads();  // the sums of all columns are there
    scalar_t *dmask = matrix(p.dmask, a.batch_shape, entry) + row * p.dmask.row_stride;
    if (p.one_column) {
        acc_t sum = 0;
        for (int n = 0; n < BLOCK_K && threadIdx.x == 0; ++n) sum += total[n];
        if (threadIdx.x == 0) dmask[0] = to_scalar(sum);
    } else if (column + threadIdx.x < j_end) {
        dmask[(column + threadIdx.x) * p.dmask_column] = to_scalar(total[threadIdx.x]);
    }
}
