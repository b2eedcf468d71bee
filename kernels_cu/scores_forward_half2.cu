// scores_forward_half2.cu: L1 scores, forward, two channels in one instruction, their sums on the tensor cores.
// Computes  out[b,i,j] = F(scale * sum_k |q[b,i,k] - k[b,j,k]|)
// Shapes    q (B,L,E)  k (B,S,E)  out (B,L,S); strides in elements, int64
// Tiling    BLOCK_Q x BLOCK_K outputs per block, WARP_Q x WARP_K per warp, E in chunks of BLOCK_E. A warp takes 32
//           channels at a time: LOAD of them belong to one of the 4 lanes that share a row of q
// Cost      1/2 packed operation and 1/256 of a tensor core operation a term (1/128 before sm_80); at least
//           2*(B*E*(L+S) + B*L*S) bytes
// Delta     like scores_forward_tiled.cu, but differences are 16-bit, two to an instruction, and are added up in float32
//           by tensor cores. By name only (rank 0): positive differences are rounded to float16, so that exchanging q
//           and k changes last digits, and the sums of the rows lose E * 2**-23 of their size, whatever the distance.
//
// One instruction makes max(q - k, 0) of a pair of channels, and sum |q - k| = 2 * sum max(q - k, 0) - sum q + sum k. The
// first sum is at most the distance. Sums of 16 x 16 such numbers along their rows are a product with a 16 x 8 matrix of
// zeros that has one column of ones; what is not finite, or overflows, makes NaN there and is computed once more.
//
// @variant  op=scores_forward dtypes=f16 BLOCK_Q=128 BLOCK_K=128 BLOCK_E=64 WARP_Q=32 WARP_K=64 THREADS=256 BLOCKS_PER_SM=2 rank=0 f16_differences=1

#if DTYPE != F16
#error "half2 is for float16"
#endif

const int STEP = 32;                                    // channels that a warp takes at a time, LOAD for each lane
const int TILES_Q = WARP_Q / 16, TILES_K = WARP_K / 8;  // a tensor core adds to 16 x 8 outputs
const int COLUMNS = WARP_K / 4;                         // neighbouring outputs of a lane
const int ROWS = BLOCK_Q + BLOCK_K, WARPS_Q = BLOCK_Q / WARP_Q;
const int GROUPS = BLOCK_E / LOAD, APART = THREADS / GROUPS;  // 128-bit loads in a row; rows that are loaded at once
static_assert(WARP_Q % 16 == 0 && WARP_K % 8 == 0, "a warp fills whole tiles of 16 x 8 outputs");
static_assert(BLOCK_Q % WARP_Q == 0 && BLOCK_K % WARP_K == 0, "a block is a whole number of warp tiles");
static_assert(THREADS == 32 * WARPS_Q * (BLOCK_K / WARP_K), "a warp for each part of the tile");
static_assert(BLOCK_E % STEP == 0, "a chunk is a whole number of steps");
static_assert(THREADS % GROUPS == 0 && BLOCK_Q % APART == 0 && BLOCK_K % APART == 0, "all threads load whole rows together");
static_assert(ROWS % 16 == 0 && COLUMNS % LOAD == 0, "16 rows are summed at once, outputs stored 128 bits at a time");

struct alignas(16) Pairs {  // LOAD channels of one row
    __half2 at[LOAD / 2];
};
typedef Pairs Chunk[BLOCK_E / STEP][ROWS][STEP / LOAD];  // rows of q, then of k

// COUNT rows of q or k to the chunk, from row `at` on; zeros for those that do not exist.
template <int COUNT>
__device__ __forceinline__ void put(Chunk &chunk, int at, const scalar_t *from, int64 stride, int count, int channels,
                                    bool whole) {
    const int group = threadIdx.x % GROUPS, first = threadIdx.x / GROUPS;
    from += first * stride + group * LOAD;
    Pairs *to = &chunk[group / (STEP / LOAD)][at + first][group % (STEP / LOAD)];
#pragma unroll
    for (int n = 0; n < COUNT; n += APART, from += APART * stride, to += APART * (STEP / LOAD)) {
        if (whole) {
            copy_async<Load>(to, from);
        } else {
            *(Load *)to = load(from, first + n < count ? channels - group * LOAD : 0);
        }
    }
}

__device__ __forceinline__ __half2 positive_part(__half2 q, __half2 k) {  // max(q - k, 0)
#if !defined(L1ATTN_EMULATOR) && __CUDA_ARCH__ >= 800
    return __hfma2_relu(k, __float2half2_rn(-1), q);
#else
    return __hmax2(__hsub2(q, k), __float2half2_rn(0));
#endif
}

// Adds the sums of two rows of 16 numbers, of which each lane of a quad has four: `up` of row lane / 4 of the warp's 16, and
// `down` of the row 8 below it. They go to column `column` of a 16 x 8 tile, or to all its columns. Of this tile a lane has
// columns 2 * (lane % 4) and the next, of row lane / 4 (sum[0], sum[1]) and the one 8 below.
const int ALL = -1;
__device__ __forceinline__ void add_rows(float (&sum)[4], const __half2 (&up)[2], const __half2 (&down)[2], int column) {
#ifndef L1ATTN_EMULATOR
    const unsigned ones = column == ALL || threadIdx.x % 32 / 4 == column ? 0x3c003c00 : 0;
    const unsigned *u = (const unsigned *)up, *d = (const unsigned *)down;
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%8}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(u[0]), "r"(d[0]), "r"(u[1]), "r"(d[1]), "r"(ones));
#else
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(u[n]), "r"(d[n]), "r"(ones));
    }
#endif
#else
    struct Rows {
        float sum[2];
    } mine;  // 8 bytes, which one shuffle of the emulator moves
    mine.sum[0] = __low2float(up[0]) + __high2float(up[0]) + (__low2float(up[1]) + __high2float(up[1]));
    mine.sum[1] = __low2float(down[0]) + __high2float(down[0]) + (__low2float(down[1]) + __high2float(down[1]));
    for (int with = 1; with < 4; with *= 2) {
        const Rows other = __shfl_xor_sync(0xffffffff, mine, with);
        mine.sum[0] += other.sum[0], mine.sum[1] += other.sum[1];
    }
    for (int n = 0; n < 4; ++n) {
        if (column == ALL || column == threadIdx.x % 4 * 2 + n % 2) sum[n] += mine.sum[n / 2];
    }
#endif
}

// Half the sum of each row of the chunk, NaN if it is not finite. The numbers of such a row become zeros, as they would
// make NaN of its neighbours in a product.
__device__ __forceinline__ void sum_rows(float *sums, Chunk &chunk, int steps) {
    const int lane = threadIdx.x % 4;
    for (int up = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; up < ROWS; up += THREADS / 2) {
        float sum[4] = {};
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            const Pairs u = chunk[step][up][lane], v = chunk[step][up + 8][lane];
            add_rows(sum, {u.at[0], u.at[1]}, {v.at[0], v.at[1]}, ALL);
            add_rows(sum, {u.at[2], u.at[3]}, {v.at[2], v.at[3]}, ALL);
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            if (lane == 0) sums[up + 8 * m] = sum[2 * m] / 2 + 0 * sum[2 * m];
            if (finite(sum[2 * m])) continue;
            for (int step = 0; step < steps; ++step) *(Load *)&chunk[step][up + 8 * m][lane] = {};
        }
    }
}

// Scores of one row that are NaN, a few neighbours, once more: by the formula, from q[i, :] and k[j:, :].
__device__ __forceinline__ void store_exact(scalar_t *to, const scalar_t *q, const scalar_t *k, int count,
                                            const ScoresForward &p) {
#pragma unroll 1
    for (int n = 0; n < count; ++n, k += p.k.row_stride) {
        if (to_acc(to[n]) == to_acc(to[n])) continue;
        acc_t distance[1] = {0};
#pragma unroll 1
        for (int e = 0; e < p.channels; ++e) distance[0] += absolute(to_acc(q[e]) - to_acc(k[e]));
        apply_score(distance, p.score, p.scale, p.eps);
        to[n] = to_scalar(distance[0]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) scores_forward(const ScoresForward p) {
    const Tile tile(p.length_q, p.length_k, BLOCK_Q, BLOCK_K);
    const int q_count = min(p.length_q - tile.i0, BLOCK_Q), k_count = min(p.length_k - tile.j0, BLOCK_K);
    const scalar_t *q = matrix(p.q, p.batch_shape, tile.b) + tile.i0 * p.q.row_stride;  // q[b, i0:i0+BLOCK_Q, :]
    const scalar_t *k = matrix(p.k, p.batch_shape, tile.b) + tile.j0 * p.k.row_stride;  // k[b, j0:j0+BLOCK_K, :]
    scalar_t *out = matrix(p.out, p.batch_shape, tile.b) + tile.i0 * p.out.row_stride + tile.j0;
    const bool whole = q_count == BLOCK_Q && k_count == BLOCK_K && p.channels % BLOCK_E == 0 &&
                       aligned_rows(q, p.q.row_stride) && aligned_rows(k, p.k.row_stride);

    __shared__ alignas(16) Chunk rows;
    __shared__ alignas(16) float sums[ROWS];
    const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, lane = threadIdx.x % 4;
    const int i_warp = warp % WARPS_Q * WARP_Q + row, j_warp = warp / WARPS_Q * WARP_K;
    const bool busy = i_warp - row < q_count && j_warp < k_count;  // the warp has outputs that exist
    float half[TILES_Q][TILES_K][4] = {};                         // half the distances

    for (int e0 = 0; e0 < p.channels; e0 += BLOCK_E) {
        __syncthreads();  // all are done with the last chunk
        put<BLOCK_Q>(rows, 0, q + e0, p.q.row_stride, q_count, p.channels - e0, whole);
        put<BLOCK_K>(rows, BLOCK_Q, k + e0, p.k.row_stride, k_count, p.channels - e0, whole);
        wait_async();
        __syncthreads();  // this one is there
        const int steps = min(BLOCK_E / STEP, ceil_div(p.channels - e0, STEP));
        sum_rows(sums, rows, steps);
        __syncthreads();  // the sums are there
        if (!busy) continue;
#pragma unroll
        for (int m = 0; m < TILES_Q; ++m) {
#pragma unroll
            for (int n = 0; n < 4 * TILES_K; ++n) {
                half[m][n / 4][n % 4] += sums[BLOCK_Q + j_warp + lane * COLUMNS + n / 4 * 2 + n % 2] -
                                         sums[i_warp + m * 16 + n % 4 / 2 * 8];
            }
        }
        for (int step = 0; step < steps; ++step) {
            Pairs qs[TILES_Q][2];
#pragma unroll
            for (int m = 0; m < 2 * TILES_Q; ++m) qs[m / 2][m % 2] = rows[step][i_warp + m * 8][lane];
            // Column c of tile n belongs to the lane c / 2, whose outputs are neighbours.
#pragma unroll 1
            for (int c = 0; c < 8; ++c) {
                const Pairs (*ks)[STEP / LOAD] = rows[step] + BLOCK_Q + j_warp + c / 2 * COLUMNS + c % 2;
#pragma unroll
                for (int n = 0; n < TILES_K; ++n) {
                    const Pairs key = ks[n * 2][lane];
#pragma unroll
                    for (int m = 0; m < TILES_Q; ++m) {
#pragma unroll
                        for (int i = 0; i < LOAD / 2; i += 2) {
                            const __half2 up[2] = {positive_part(qs[m][0].at[i], key.at[i]),
                                                  positive_part(qs[m][0].at[i + 1], key.at[i + 1])};
                            const __half2 down[2] = {positive_part(qs[m][1].at[i], key.at[i]),
                                                    positive_part(qs[m][1].at[i + 1], key.at[i + 1])};
                            add_rows(half[m][n], up, down, c);
                        }
                    }
                }
            }
        }
    }

    const int j = j_warp + lane * COLUMNS;  // the first of this lane's columns
    out += i_warp * p.out.row_stride + j;
    acc_t zero = 0;  // stays 0 while all distances are finite
#pragma unroll
    for (int m = 0; m < 2 * TILES_Q; ++m) {
        acc_t x[COLUMNS];
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
            x[n] = 2 * half[m / 2][n / 2][m % 2 * 2 + n % 2];
            x[n] = x[n] < 0 ? 0 : multiply_add(x[n], 0, x[n]);  // rounded below 0; infinity becomes NaN
            zero = multiply_add(x[n], 0, zero);
        }
        apply_score(x, p.score, p.scale, p.eps);
        scalar_t *to = out + m * 8 * p.out.row_stride;
        if (i_warp + m * 8 < q_count) {
#pragma unroll
            for (int n = 0; n < COLUMNS; n += LOAD) {
                Load scores;
#pragma unroll
                for (int u = 0; u < LOAD; ++u) scores.at[u] = to_scalar(x[n + u]);
                store(to + n, scores, k_count - j - n);
            }
        }
    }
    if (zero == 0) return;
#pragma unroll 1
    for (int i = i_warp; i < min(q_count, i_warp - row + WARP_Q); i += 8) {
        store_exact(out + (i - i_warp) * p.out.row_stride, q + i * p.q.row_stride, k + j * p.k.row_stride,
                    min(COLUMNS, k_count - j), p);
    }
}
