// scores_backward_gather.cu: gradients of the L1 scores; the baseline.
// Computes  dx[i,c] = sum_j h[i,j] * sign(x[i,c] - y[j,c]),  h = grad * F'(score) * scale,  for (q, k) and for (k, q)
// Shapes    x (B,X,E)  y (B,Y,E)  grad, scores (B,L,S)  dx (B,X,E); strides in elements, int64
// Tiling    one row of x per block, a thread per channel; h in chunks of BLOCK_Y
// Cost      3*B*L*S*E operations for each gradient; every block reads all of y
// Delta     nothing is reused but h: the one to read first
// @variant  op=scores_backward dtypes=f32,f16,bf16,f64 BLOCK_X=1 BLOCK_E=64 BLOCK_Y=64 THREADS=64 rank=1

static_assert(BLOCK_X == 1, "a block holds one row of x");
static_assert(BLOCK_E == THREADS && BLOCK_Y == THREADS, "a thread owns one channel, and computes one h of a chunk");

extern "C" __global__ void __launch_bounds__(THREADS) scores_backward(const ScoresBackward p) {
    const int e_blocks = ceil_div(p.channels, BLOCK_E), dq_blocks = p.dq.kept * p.dq.length_x * e_blocks;
    const bool is_dq = blockIdx.x < dq_blocks;
    const Gradient &t = is_dq ? p.dq : p.dk;
    const int block = is_dq ? blockIdx.x : blockIdx.x - dq_blocks;
    const int i = block / e_blocks % t.length_x, entry = block / e_blocks / t.length_x * t.summed;
    const int e = block % e_blocks * BLOCK_E + threadIdx.x;
    const Derivative f(p.score, p.scale, p.eps);
    __shared__ acc_t h[BLOCK_Y];

    const acc_t x = e < p.channels ? to_acc(matrix(t.x, t.batch_shape, entry)[i * t.x.row_stride + e]) : 0;
    acc_t sum = 0;
    for (int part = 0; part < t.summed; ++part) {
        const scalar_t *y = matrix(t.y, t.batch_shape, entry + part);
        const scalar_t *grad = matrix(t.grad, t.batch_shape, entry + part);
        const scalar_t *scores = matrix(t.scores, t.batch_shape, entry + part);
        for (int j0 = 0; j0 < t.length_y; j0 += BLOCK_Y) {
            const int j = j0 + threadIdx.x;
            if (j < t.length_y) {
                const int64 row = t.x_is_row ? i : j, column = t.x_is_row ? j : i;
                const acc_t g = to_acc(grad[row * t.grad.row_stride + column]);
                const acc_t s = to_acc(scores[row * t.scores.row_stride + column]);
                h[threadIdx.x] = g * f(s);
            }
            __syncthreads();  // this chunk of h is there
            const int count = min(BLOCK_Y, t.length_y - j0);
            for (int n = 0; n < count && e < p.channels; ++n) {
                sum += h[n] * sign(x - to_acc(y[(j0 + n) * t.y.row_stride + e]));
            }
            __syncthreads();  // all are done with it
        }
    }
    if (e < p.channels) matrix(t.dx, t.batch_shape, entry)[i * t.dx.row_stride + e] = to_scalar(sum);
}
