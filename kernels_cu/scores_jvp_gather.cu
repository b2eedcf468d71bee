// scores_jvp_gather.cu: tangent of the L1 scores, for forward mode and second derivatives; the baseline.
// Computes  out[b,i,j] = F'(score[b,i,j]) * scale * sum_k sign(q[b,i,k] - k[b,j,k]) * (tq[b,i,k] - tk[b,j,k])
// Shapes    q, tq (B,L,E)  k, tk (B,S,E)  scores, out (B,L,S); strides in elements, int64
// Tiling    one query against BLOCK_K keys per block; a warp per output, its lanes stride over the channels
// Cost      4*B*L*S*E operations; every block reads its BLOCK_K keys and tangents again
// Delta     scores_forward_gather.cu with a sign and a second pair of arrays, and no barrier: lane 0 writes
// @variant  op=scores_jvp dtypes=f32,f16,bf16,f64 BLOCK_Q=1 BLOCK_K=32 THREADS=256 rank=1

static_assert(BLOCK_Q == 1, "a block holds one query");
static_assert(THREADS % 32 == 0, "whole warps, for the shuffles");

extern "C" __global__ void __launch_bounds__(THREADS) scores_jvp(const ScoresJvp p) {
    const Tile t(p.length_q, p.length_k, BLOCK_Q, BLOCK_K);
    const scalar_t *q = matrix(p.q, p.batch_shape, t.b) + t.i0 * p.q.row_stride;
    const scalar_t *tq = matrix(p.tq, p.batch_shape, t.b) + t.i0 * p.tq.row_stride;
    const scalar_t *k = matrix(p.k, p.batch_shape, t.b), *tk = matrix(p.tk, p.batch_shape, t.b);
    const scalar_t *scores = matrix(p.scores, p.batch_shape, t.b) + t.i0 * p.scores.row_stride;
    scalar_t *out = matrix(p.out, p.batch_shape, t.b) + t.i0 * p.out.row_stride;
    const Derivative f(p.score, p.scale, p.eps);

    const int lane = threadIdx.x % 32, end = min(p.length_k, t.j0 + BLOCK_K);
    for (int j = t.j0 + threadIdx.x / 32; j < end; j += THREADS / 32) {
        const scalar_t *row = k + j * p.k.row_stride, *tangent = tk + j * p.tk.row_stride;
        acc_t sum = 0;
        for (int e = lane; e < p.channels; e += 32) {
            sum += sign(to_acc(q[e]) - to_acc(row[e])) * (to_acc(tq[e]) - to_acc(tangent[e]));
        }
        sum = warp_sum(sum);
        if (lane == 0) out[j] = to_scalar(sum * f(to_acc(scores[j])));
    }
}
