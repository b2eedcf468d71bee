// scores_forward_gather.cu: L1 scores, forward; the baseline.
// Computes  out[b,i,j] = F(scale * sum_k |q[b,i,k] - k[b,j,k]|)
// Shapes    q (B,L,E)  k (B,S,E)  out (B,L,S); strides in elements, int64
// Tiling    one query against BLOCK_K keys per block; a warp per output, its lanes stride over the channels
// Cost      2*B*L*S*E adds; every block reads its BLOCK_K keys again, so B*L*S*E numbers from the caches
// Delta     nothing is reused: the one to read first, and the one the others are checked against
// @variant  op=scores_forward dtypes=f32,f16,bf16,f64 BLOCK_Q=1 BLOCK_K=32 THREADS=256 rank=1

static_assert(BLOCK_Q == 1, "a block holds one query");
static_assert(BLOCK_K <= THREADS, "one thread writes one output");
static_assert(THREADS % 32 == 0, "whole warps, for the shuffles");

extern "C" __global__ void __launch_bounds__(THREADS) scores_forward(const ScoresForward p) {
    const int k_blocks = ceil_div(p.length_k, BLOCK_K);
    const int j0 = blockIdx.x % k_blocks * BLOCK_K;
    const int i = blockIdx.x / k_blocks % p.length_q;
    const int b = blockIdx.x / k_blocks / p.length_q;
    const scalar_t *q = matrix(p.q, p.batch_shape, b) + i * p.q.row_stride;
    const scalar_t *k = matrix(p.k, p.batch_shape, b);
    scalar_t *out = matrix(p.out, p.batch_shape, b) + i * p.out.row_stride;
    __shared__ acc_t distance[BLOCK_K];

    const int lane = threadIdx.x % 32;
    for (int column = threadIdx.x / 32; column < BLOCK_K; column += THREADS / 32) {
        if (j0 + column >= p.length_k) break;  // the same for the whole warp
        const scalar_t *row = k + (j0 + column) * p.k.row_stride;
        acc_t sum = 0;
        for (int e = lane; e < p.channels; e += 32) sum += absolute(to_acc(q[e]) - to_acc(row[e]));
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
        if (lane == 0) distance[column] = sum;
    }
    __syncthreads();  // the distances come from all warps; they leave together, coalesced

    const int column = threadIdx.x;
    if (column < BLOCK_K && j0 + column < p.length_k) {
        acc_t result[1] = {distance[column]};
        apply_score(result, p.score, p.scale, p.eps);
        out[j0 + column] = to_scalar(result[0]);
    }
}
