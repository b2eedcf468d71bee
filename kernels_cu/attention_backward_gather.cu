// attention_backward_gather.cu: gradients of fused L1 attention; the baseline.
// Computes  p = exp(s - largest) / total,  ds = p * (sum_c grad[i,c] * v[j,c] - delta[i]),  h = ds * F'(x) * scale
//           dx[i,e] = sum_j h[i,j] * sign(x[i,e] - y[j,e]) for (q, k), or for (k, q); then also dv[j,c] = sum_i p * grad
// Shapes    q (B,L,E)  k (B,S,E)  v (B,S,V)  mask (B,L,S)  grad (B,L,V)  softmax (B,L,2)  delta (B,L)
//           dx, dxv as q, or as k and v; strides in elements, int64
// Tiling    one row of x and BLOCK_E of its channels per block; rows of y in tiles of BLOCK_Y, a warp per h, then a
//           thread per channel
// Cost      B*L*S*(3*E + 2*V) operations for the scores and ds, for every BLOCK_E channels, and 3*B*L*S*E for each dx
// Delta     nothing is reused but h: the one to read first. One order of summation: the same bits in every run
// @variant  op=attention_backward dtypes=f32,f16,bf16,f64 BLOCK_X=1 BLOCK_Y=32 BLOCK_E=128 THREADS=128 BLOCKS_PER_SM=4 rank=1

static_assert(BLOCK_X == 1, "a block holds one row of x");
static_assert(BLOCK_E == THREADS && THREADS % 32 == 0, "a thread owns one channel; whole warps, for the shuffles");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) attention_backward(const AttentionBackward p) {
    const Attention &a = p.s.a;
    const int x_parts = ceil_div(a.channels, BLOCK_E), e_blocks = x_parts + (p.of_key ? ceil_div(a.channels_v, BLOCK_E) : 0);
    const int part = blockIdx.x % e_blocks;
    const bool of_x = part < x_parts;  // or of v
    const int e = (of_x ? part : part - x_parts) * BLOCK_E + threadIdx.x;
    const bool mine_is_there = e < (of_x ? a.channels : a.channels_v);
    const int length_x = p.of_key ? a.length_k : a.length_q;
    const int row = blockIdx.x / e_blocks % length_x, entry = blockIdx.x / e_blocks / length_x * p.s.summed;
    const Matrix &x = p.of_key ? a.k : a.q, &y = p.of_key ? a.q : a.k;
    __shared__ acc_t h[BLOCK_Y], weights[BLOCK_Y];
    __shared__ bool left[BLOCK_Y];

    const int lane = threadIdx.x % 32;
    const int first = p.of_key ? first_query(a, row) : first_key(a, row);
    const int end = p.of_key ? end_of_queries(a, row) : end_of_keys(a, row);
    const Derivative derivative(a.score, a.scale, a.eps);
    acc_t sum = 0;
    for (int b = entry; b < entry + p.s.summed; ++b) {
        const acc_t mine = of_x && mine_is_there ? to_acc(matrix(x, a.batch_shape, b)[row * x.row_stride + e]) : 0;
        const scalar_t *ys = matrix(y, a.batch_shape, b), *grad = matrix(p.s.grad, a.batch_shape, b);
        for (int j0 = first; j0 < end; j0 += BLOCK_Y) {
            const int count = min(BLOCK_Y, end - j0);
            for (int n = threadIdx.x / 32; n < count; n += THREADS / 32) {
                acc_t weight, ds, score;
                const int i = p.of_key ? j0 + n : row, j = p.of_key ? row : j0 + n;
                const bool counts = score_gradient(p.s, b, i, j, lane, weight, ds, score);
                if (lane == 0) {
                    h[n] = counts ? ds * derivative(score) : 0;
                    weights[n] = weight;
                    left[n] = counts;
                }
            }
            __syncthreads();  // this tile of h is there
            acc_t part = 0;  // a single chain of sums would round more than the formula in float32 does
            for (int n = 0; n < count && mine_is_there; ++n) {
                if (of_x) {
                    part += h[n] * sign(mine - to_acc(ys[(j0 + n) * y.row_stride + e]));
                } else if (left[n]) {
                    part += weights[n] * to_acc(grad[(j0 + n) * p.s.grad.row_stride + e]);
                }
            }
            sum += part;
            __syncthreads();  // all are done with it
        }
    }
    const Matrix &result = of_x ? p.dx : p.dxv;
    if (mine_is_there && result.data) matrix(result, a.batch_shape, entry)[row * result.row_stride + e] = to_scalar(sum);
}
