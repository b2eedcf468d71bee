// scores_backward_scatter.cu: both gradients of the L1 scores in one pass, with atomics.
// Computes  dq[i,c] = sum_j h[i,j] * sign(q[i,c] - k[j,c]),  dk[j,c] = -sum_i of the same,  h = grad * F'(score) * scale
// Shapes    q (B,L,E)  k (B,S,E)  grad, scores (B,L,S)  dq, dk as q and k, in the accumulation type; strides int64
// Tiling    BLOCK_Q queries x BLOCK_K keys x BLOCK_E channels per block; a thread owns one channel of ROWS queries
// Cost      4*B*L*S*E operations for both gradients; B*S*E*L/ROWS + B*L*E*S/BLOCK_K atomic adds
// Delta     like scores_backward_tiled.cu, but the sign of a term serves both gradients. Several blocks add to one
//           gradient (ATOMIC=1: the outputs are float32 or float64, zero at the start), so the last bits vary.
// @variant  op=scores_backward dtypes=f32,f16,bf16,f64 BLOCK_Q=128 BLOCK_K=32 BLOCK_E=32 ROWS=32 THREADS=128 ATOMIC=1 rank=0

static_assert(BLOCK_E == 32, "the lanes of a warp are the channels");
static_assert(BLOCK_Q == THREADS && BLOCK_Q == THREADS / 32 * ROWS, "each warp owns ROWS queries");
static_assert(ROWS % VEC == 0, "a thread reads its h 128 bits at a time");
static_assert(ATOMIC == 1, "outputs are added to");
const int WARPS = THREADS / 32, STRIDE = BLOCK_Q + VEC;

extern "C" __global__ void __launch_bounds__(THREADS) scores_backward(const ScoresBackward p) {
    const Gradient &t = p.dq;  // the batch entries are the same for both gradients here, but not how dims are merged
    const int q_blocks = ceil_div(t.length_x, BLOCK_Q), k_blocks = ceil_div(t.length_y, BLOCK_K);
    const int e_blocks = ceil_div(p.channels, BLOCK_E);
    const int e0 = blockIdx.x % e_blocks * BLOCK_E, j0 = blockIdx.x / e_blocks % k_blocks * BLOCK_K;
    const int i0 = blockIdx.x / e_blocks / k_blocks % q_blocks * BLOCK_Q;
    const int b = blockIdx.x / e_blocks / k_blocks / q_blocks;
    const int q_count = min(BLOCK_Q, t.length_x - i0), k_count = min(BLOCK_K, t.length_y - j0);
    const int warp = threadIdx.x / 32, e = threadIdx.x % 32, first = warp * ROWS;
    const bool exists = e0 + e < p.channels;

    __shared__ alignas(16) acc_t h[BLOCK_K][STRIDE];       // grad[b, i0:i0+BLOCK_Q, j0:j0+BLOCK_K] * F' * scale, transposed
    __shared__ acc_t q_sums[BLOCK_Q], k_sums[WARPS][BLOCK_K];  // of h: over the keys, and over the queries of a warp

    const scalar_t *grad = matrix(t.grad, t.batch_shape, b) + i0 * t.grad.row_stride + j0;
    const scalar_t *scores = matrix(t.scores, t.batch_shape, b) + i0 * t.scores.row_stride + j0;
    const Derivative f(p.score, p.scale, p.eps);
    bool fast = true;
    for (int at = threadIdx.x; at < BLOCK_Q * BLOCK_K; at += THREADS) {
        const int i = at / BLOCK_K, j = at % BLOCK_K;
        acc_t value = 0;
        if (i < q_count && j < k_count) {
            const acc_t s = to_acc(scores[i * t.scores.row_stride + j]);
            value = to_acc(grad[i * t.grad.row_stride + j]) * f(s);
            fast = fast && absolute(value) < LARGE && !(s > f.nearly_equal);
        }
        h[j][i] = value;
    }

    acc_t q[ROWS], dq[ROWS] = {};
    const scalar_t *q_rows = matrix(t.x, t.batch_shape, b) + i0 * t.x.row_stride + e0 + e;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        q[r] = exists && first + r < q_count ? to_acc(q_rows[(first + r) * t.x.row_stride]) : 0;
        fast = fast && finite(q[r]);
    }
    const scalar_t *k_rows = matrix(t.y, t.batch_shape, b) + j0 * t.y.row_stride + e0 + e;
    for (int j = 0; j < k_count; ++j) fast = fast && (!exists || finite(to_acc(k_rows[j * t.y.row_stride])));
    fast = __syncthreads_and(fast);  // h is there

    // In the order in which the products below are added, so that the sums cancel exactly where all channels tie.
    if (fast) {
        acc_t sum = 0;
        for (int j = 0; j < BLOCK_K; ++j) sum += h[j][threadIdx.x];
        q_sums[threadIdx.x] = sum;
        sum = 0;
        for (int r = 0; r < ROWS; ++r) sum += h[e][first + r];  // BLOCK_K == 32: lane e adds up key e
        k_sums[warp][e] = sum;
    } else {
        q_sums[threadIdx.x] = 0;
        k_sums[warp][e] = 0;
    }
    __syncthreads();  // the sums are there

    acc_t *dk = (acc_t *)p.dk.dx.data + offset(p.dk.dx, p.dk.batch_shape, b) + e0 + e;
    for (int j = 0; j < k_count; ++j) {
        const acc_t k = exists ? to_acc(k_rows[j * t.y.row_stride]) : 0;
        acc_t sum = 0;
        if (fast) {
#pragma unroll
            for (int r = 0; r < ROWS; r += VEC) {
                const Vec hs = *(const Vec *)(h[j] + first + r);
#pragma unroll
                for (int n = 0; n < VEC; ++n) {
                    const acc_t step = half_step(q[r + n] - k);
                    dq[r + n] = multiply_add(step, hs.at[n], dq[r + n]);
                    sum = multiply_add(step, hs.at[n], sum);
                }
            }
        } else {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const acc_t term = h[j][first + r] / 2 * sign(q[r] - k);
                dq[r] += first + r < q_count ? term : 0;
                sum += first + r < q_count ? term : 0;
            }
        }
        if (exists && p.dk.dx.data != 0) atomicAdd(dk + (j0 + j) * p.dk.dx.row_stride, k_sums[warp][j] - 2 * sum);
    }
    if (!exists || p.dq.dx.data == 0) return;
    acc_t *out = (acc_t *)t.dx.data + offset(t.dx, t.batch_shape, b) + e0 + e;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        if (first + r < q_count) {
            atomicAdd(out + (i0 + first + r) * t.dx.row_stride, 2 * dq[r] - q_sums[first + r]);
        }
    }
}
