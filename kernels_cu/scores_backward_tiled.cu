// scores_backward_tiled.cu: gradients of the L1 scores; the default.
// Computes  dx[i,c] = sum_j h[i,j] * sign(x[i,c] - y[j,c]),  h = grad * F'(score) * scale,  for (q, k) and for (k, q)
// Shapes    x (B,X,E)  y (B,Y,E)  grad, scores (B,L,S)  dx (B,X,E); strides in elements, int64
// Tiling    BLOCK_X x BLOCK_E gradients per block, ROWS x CHANNELS per thread; y and h in chunks of BLOCK_Y rows
// Cost      3*B*L*S*E operations for each gradient; at least 2*itemsize*B*(L*S + E*(L+S)) bytes for each
// Delta     like scores_backward_gather.cu, but x and the sums stay in registers, and one number of y serves ROWS rows,
//           one of h CHANNELS channels. No atomics, one order of summation: the same bits in every run.
//
// With t = half_step(x - y), sum h * sign = 2 * sum h * t - sum h: three instructions a term and no branch. Where all
// channels tie the two sums cancel exactly, being rounded alike; where some do, what is lost is in proportion to the
// largest |h| of the row. So chunks in which two rows are nearly equal, anything is not finite, or an h is so large that
// their sum might overflow, go a slower way that is exact in ties and spreads NaN and infinity as the formula does.
//
// @variant  op=scores_backward dtypes=f32,f16,bf16 BLOCK_X=64 BLOCK_E=64 BLOCK_Y=16 ROWS=8 CHANNELS=4 THREADS=128 BLOCKS_PER_SM=4,3 rank=20
// @variant  op=scores_backward dtypes=f64 BLOCK_X=64 BLOCK_E=32 BLOCK_Y=16 ROWS=4 CHANNELS=4 THREADS=128 BLOCKS_PER_SM=2 rank=20

const int ACROSS = BLOCK_E / CHANNELS, DOWN = BLOCK_X / ROWS;  // threads along the channels and the rows of the tile
static_assert(ACROSS * DOWN == THREADS, "every thread owns ROWS x CHANNELS gradients");
static_assert(ROWS % VEC == 0 && CHANNELS % VEC == 0, "a thread reads its rows and channels 128 bits at a time");
static_assert(BLOCK_X <= THREADS, "a thread adds up the h of one row");
static_assert(BLOCK_X % LOAD == 0 && BLOCK_Y % LOAD == 0 && BLOCK_E % LOAD == 0, "rows are loaded 128 bits at a time");
const int STRIDE = BLOCK_X + VEC;  // the extra VEC spreads the transposed stores over the banks

// Offset in the tile of a thread's n-th row or channel: groups of VEC neighbours, `apart` * VEC apart.
__device__ __forceinline__ int place(int n, int thread, int apart) { return n / VEC * VEC * apart + thread * VEC + n % VEC; }

// BLOCK_Y rows of y, and grad and scores of all x with them, on their way from global to shared memory.
struct Chunk {
    static const int H_MINE = (BLOCK_X * BLOCK_Y / LOAD + THREADS - 1) / THREADS;  // 128-bit loads of a thread
    static const int Y_MINE = (BLOCK_Y * BLOCK_E / LOAD + THREADS - 1) / THREADS;
    static const int Y_APART = THREADS / (BLOCK_E / LOAD);  // rows of y that all threads load at once
    // Whether the last of these loads is one for every thread.
    static const bool H_EVEN = BLOCK_X * BLOCK_Y / LOAD % THREADS == 0, Y_EVEN = BLOCK_Y * BLOCK_E / LOAD % THREADS == 0;
    Load grad[H_MINE], scores[H_MINE], y[Y_MINE];
    const scalar_t *y_from, *grad_from, *scores_from;  // this thread's first numbers of the next chunk
    int j0;                                            // its first row of y
    int y_row, y_column, h_row, h_column, h_apart;     // this thread's place in it; rows of h that are loaded at once
    bool even;                                         // whether all rows are aligned to 128 bits

    __device__ __forceinline__ Chunk(bool x_is_row) {
        const int width = x_is_row ? BLOCK_Y : BLOCK_X;
        y_row = threadIdx.x / (BLOCK_E / LOAD), y_column = threadIdx.x % (BLOCK_E / LOAD) * LOAD;
        h_row = threadIdx.x / (width / LOAD), h_column = threadIdx.x % (width / LOAD) * LOAD;
        h_apart = THREADS / (width / LOAD);
    }
    // The next chunk is the first one of batch entry `index`.
    __device__ __forceinline__ void begin(const Gradient &t, int index, int i0, int e0) {
        const int64 row = h_row + (t.x_is_row ? i0 : 0), column = h_column + (t.x_is_row ? 0 : i0);
        y_from = matrix(t.y, t.batch_shape, index) + y_row * t.y.row_stride + y_column + e0;
        grad_from = matrix(t.grad, t.batch_shape, index) + row * t.grad.row_stride + column;
        scores_from = matrix(t.scores, t.batch_shape, index) + row * t.scores.row_stride + column;
        j0 = 0;
        even = aligned_rows(y_from, t.y.row_stride) && aligned_rows(grad_from, t.grad.row_stride) &&
               aligned_rows(scores_from, t.scores.row_stride);
    }
    __device__ __forceinline__ void fetch(const Gradient &t, int x_count, int channels, bool curved) {
        const int y_count = min(BLOCK_Y, t.length_y - j0);
        const bool whole = even && H_EVEN && Y_EVEN && y_count == BLOCK_Y && x_count == BLOCK_X && channels == BLOCK_E;
        if (whole) {  // nothing to check at each access
#pragma unroll
            for (int n = 0; n < Y_MINE; ++n) y[n] = *(const Load *)(y_from + n * Y_APART * t.y.row_stride);
            const int64 apart = h_apart * t.grad.row_stride, s_apart = h_apart * t.scores.row_stride;
#pragma unroll
            for (int n = 0; n < H_MINE; ++n) grad[n] = *(const Load *)(grad_from + n * apart);
            if (curved) {
#pragma unroll
                for (int n = 0; n < H_MINE; ++n) scores[n] = *(const Load *)(scores_from + n * s_apart);
            }
        } else {
            fetch_some(t, x_count, y_count, channels, curved);
        }
        y_from += BLOCK_Y * t.y.row_stride;
        grad_from += t.x_is_row ? BLOCK_Y : BLOCK_Y * t.grad.row_stride;
        scores_from += t.x_is_row ? BLOCK_Y : BLOCK_Y * t.scores.row_stride;
        j0 += BLOCK_Y;
    }
    __device__ __forceinline__ void fetch_some(const Gradient &t, int x_count, int y_count, int channels, bool curved) {
#pragma unroll
        for (int n = 0; n < Y_MINE; ++n) {
            const int count = y_row + n * Y_APART < y_count ? channels - y_column : 0;
            y[n] = load(y_from + n * Y_APART * t.y.row_stride, count);
        }
        const int rows = t.x_is_row ? x_count : y_count, columns = t.x_is_row ? y_count : x_count;
#pragma unroll
        for (int n = 0; n < H_MINE; ++n) {
            const int count = h_row + n * h_apart < rows ? columns - h_column : 0;
            grad[n] = load(grad_from + n * h_apart * t.grad.row_stride, count);
            if (curved) scores[n] = load(scores_from + n * h_apart * t.scores.row_stride, count);
        }
    }

    // To h[y][x] and y_rows[y][channel]. Returns whether the fast way will do for it.
    __device__ __forceinline__ bool put(acc_t (*h)[STRIDE], acc_t (*y_rows)[BLOCK_E], bool x_is_row,
                                        const Derivative &f) const {
        acc_t zero = 0, total = 0, largest_score = 0;  // the first stays 0 while all numbers of y are finite
#pragma unroll
        for (int n = 0; n < Y_MINE; ++n) {
            if (!Y_EVEN && y_row + n * Y_APART >= BLOCK_Y) break;
#pragma unroll
            for (int i = 0; i < LOAD; ++i) {
                const acc_t value = to_acc(y[n].at[i]);
                zero = multiply_add(value, 0, zero);
                y_rows[y_row + n * Y_APART][y_column + i] = value;
            }
        }
#pragma unroll
        for (int n = 0; n < H_MINE; ++n) {
            const int r = h_row + n * h_apart;
            if (!H_EVEN && r >= (x_is_row ? BLOCK_X : BLOCK_Y)) break;
#pragma unroll
            for (int i = 0; i < LOAD; ++i) {
                const acc_t s = f.curved ? to_acc(scores[n].at[i]) : 0;
                const acc_t value = to_acc(grad[n].at[i]) * f(s);
                total += absolute(value);
                largest_score = max(largest_score, s);
                h[x_is_row ? h_column + i : r][x_is_row ? r : h_column + i] = value;
            }
        }
        return zero == 0 && total < LARGE && !(largest_score > f.nearly_equal);
    }
};

template <int N>
__device__ __forceinline__ void read(acc_t (&mine)[N], const acc_t *row, int thread, int apart) {
#pragma unroll
    for (int n = 0; n < N; n += VEC) {
        const Vec v = *(const Vec *)(row + place(n, thread, apart));
#pragma unroll
        for (int i = 0; i < VEC; ++i) mine[n + i] = v.at[i];
    }
}

// From sm_100 on the compiler packs floats in pairs, and needs more registers for it.
#if !defined(L1ATTN_EMULATOR) && __CUDA_ARCH__ >= 1000
const int RESIDENT = 2;
#else
const int RESIDENT = BLOCKS_PER_SM;
#endif

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) scores_backward(const ScoresBackward p) {
    const unsigned e_blocks = ceil_div(p.channels, BLOCK_E);
    const unsigned dq_blocks = p.dq.length_x > 0 ? p.dq.kept * ceil_div(p.dq.length_x, BLOCK_X) * e_blocks : 0;
    const bool is_dq = blockIdx.x < dq_blocks;
    const Gradient &t = is_dq ? p.dq : p.dk;
    const unsigned block = is_dq ? blockIdx.x : blockIdx.x - dq_blocks, x_blocks = ceil_div(t.length_x, BLOCK_X);
    const int e0 = block % e_blocks * BLOCK_E, i0 = block / e_blocks % x_blocks * BLOCK_X;
    const int entry = block / e_blocks / x_blocks * t.summed;
    const int x_count = min(BLOCK_X, t.length_x - i0), channels = min(BLOCK_E, p.channels - e0);

    __shared__ alignas(16) acc_t h[BLOCK_Y][STRIDE];
    __shared__ alignas(16) acc_t y_rows[BLOCK_Y][BLOCK_E];
    const int down = threadIdx.x / ACROSS, across = threadIdx.x % ACROSS;
    acc_t x[ROWS][CHANNELS], sum[ROWS][CHANNELS] = {}, h_sum = 0;  // h_sum is of row threadIdx.x of the tile

    bool x_finite = true;
    const scalar_t *x_rows = matrix(t.x, t.batch_shape, entry) + i0 * t.x.row_stride + e0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const int i = place(r, down, DOWN), e = place(c, across, ACROSS);
            x[r][c] = i < x_count && e < channels ? to_acc(x_rows[i * t.x.row_stride + e]) : 0;
            x_finite = x_finite && finite(x[r][c]);
        }
    }

    const Derivative f(p.score, p.scale, p.eps);
    const int y_blocks = ceil_div(t.length_y, BLOCK_Y), chunks = t.summed * y_blocks;
    Chunk next(t.x_is_row);
    if (chunks > 0) {
        next.begin(t, entry, i0, e0);
        next.fetch(t, x_count, channels, f.curved);
    }
    for (int chunk = 1; chunk <= chunks; ++chunk) {
        const bool h_fast = next.put(h, y_rows, t.x_is_row, f);
        const bool fast = __syncthreads_and(x_finite && h_fast);  // the chunk is there
        if (chunk < chunks) {  // the next is on the way while this one is summed
            if (next.j0 >= t.length_y) next.begin(t, entry + chunk / y_blocks, i0, e0);
            next.fetch(t, x_count, channels, f.curved);
        }
        if (fast) {
            if (threadIdx.x < BLOCK_X) {
                for (int j = 0; j < BLOCK_Y; ++j) h_sum += h[j][threadIdx.x];
            }
#pragma unroll 2
            for (int j = 0; j < BLOCK_Y; ++j) {
                acc_t hs[ROWS], ys[CHANNELS];
                read(hs, h[j], down, DOWN);
                read(ys, y_rows[j], across, ACROSS);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                    for (int c = 0; c < CHANNELS; ++c) {
                        sum[r][c] = multiply_add(half_step(x[r][c] - ys[c]), hs[r], sum[r][c]);
                    }
                }
            }
        } else {
#pragma unroll 1
            for (int j = 0; j < BLOCK_Y; ++j) {  // from y_count on, h is 0
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const acc_t half_h = h[j][place(r, down, DOWN)] / 2;
#pragma unroll
                    for (int c = 0; c < CHANNELS; ++c) {
                        sum[r][c] += half_h * sign(x[r][c] - y_rows[j][place(c, across, ACROSS)]);
                    }
                }
            }
        }
        __syncthreads();  // all are done with the chunk
    }

    if (threadIdx.x < BLOCK_X) h[0][threadIdx.x] = h_sum;
    __syncthreads();  // the sums of h are there
    scalar_t *dx = matrix(t.dx, t.batch_shape, entry) + i0 * t.dx.row_stride + e0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int i = place(r, down, DOWN);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const int e = place(c, across, ACROSS);
            if (i < x_count && e < channels) dx[i * t.dx.row_stride + e] = to_scalar(2 * sum[r][c] - h[0][i]);
        }
    }
}
