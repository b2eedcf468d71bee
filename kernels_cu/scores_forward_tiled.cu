// scores_forward_tiled.cu: L1 scores, forward; the default.
// Computes  out[b,i,j] = F(scale * sum_k |q[b,i,k] - k[b,j,k]|)
// Shapes    q (B,L,E)  k (B,S,E)  out (B,L,S); strides in elements, int64
// Tiling    BLOCK_Q x BLOCK_K outputs per block, 8 x 8 per thread, E in chunks of BLOCK_E
// Cost      2*B*L*S*E adds; at least itemsize*(B*E*(L+S) + B*L*S) bytes
// Delta     like scores_forward_gather.cu, but tiles of q and k are reused: 8 x 8 outputs need 4 shared loads of 128
//           bits per channel for 64 terms of 2 adds. The next chunk is fetched while this one is summed.
// @variant  op=scores_forward dtypes=f32,f16,bf16 BLOCK_Q=128 BLOCK_K=64,32,128 BLOCK_E=16,8 THREADS=128 BLOCKS_PER_SM=3,2 rank=20
// @variant  op=scores_forward dtypes=f32,f16,bf16 BLOCK_Q=64 BLOCK_K=32 BLOCK_E=8 THREADS=128 BLOCKS_PER_SM=4 rank=21 max_q=64
// @variant  op=scores_forward dtypes=f64 BLOCK_Q=64 BLOCK_K=32 BLOCK_E=8 THREADS=128 BLOCKS_PER_SM=4 rank=20

const int ACROSS = 8, DOWN = THREADS / ACROSS;                  // threads along a row and a column of the tile
const int ROWS = BLOCK_Q / DOWN, COLUMNS = BLOCK_K / ACROSS;    // outputs of a thread
static_assert(ROWS % VEC == 0 && COLUMNS % VEC == 0, "a thread reads its rows and columns 128 bits at a time");
static_assert(BLOCK_E % LOAD == 0, "a chunk of a row is a whole number of 128-bit loads");

// A thread's part of BLOCK rows on their way, chunk by chunk, from global to shared memory: chunk[e][row].
template <int BLOCK>
struct Chunk {
    static const int GROUPS = BLOCK_E / LOAD;                // 128-bit loads in a row of a chunk
    static const int STEP = THREADS / GROUPS;                // rows that all threads load at once
    static const int MINE = (BLOCK + STEP - 1) / STEP;
    static const int STRIDE = BLOCK + VEC;  // the extra VEC spreads the transposed stores over the banks
    Load numbers[MINE];

    __device__ __forceinline__ void fetch(const scalar_t *rows, int64 stride, int count, int channels, bool whole) {
        const int first = threadIdx.x / GROUPS, e = threadIdx.x % GROUPS * LOAD;
        const scalar_t *from = rows + first * stride + e;
        if (whole && BLOCK % STEP == 0) {
#pragma unroll
            for (int n = 0; n < MINE; ++n, from += STEP * stride) numbers[n] = *(const Load *)from;
        } else {
#pragma unroll
            for (int n = 0; n < MINE; ++n, from += STEP * stride) {
                numbers[n] = load(from, first + n * STEP < count ? channels - e : 0);
            }
        }
    }
    __device__ __forceinline__ void put(acc_t (*chunk)[STRIDE]) const {
        const int first = threadIdx.x / GROUPS, e = threadIdx.x % GROUPS * LOAD;
#pragma unroll
        for (int n = 0; n < MINE; ++n) {
            if (BLOCK % STEP != 0 && first + n * STEP >= BLOCK) break;
#pragma unroll
            for (int i = 0; i < LOAD; ++i) chunk[e + i][first + n * STEP] = to_acc(numbers[n].at[i]);
        }
    }
};

// A thread's numbers of one channel: groups of VEC neighbours, APART * VEC apart, so that a warp reads without conflicts.
template <int APART, int N>
__device__ __forceinline__ void read(acc_t (&mine)[N], const acc_t *channel, int place) {
#pragma unroll
    for (int n = 0; n < N; n += VEC) {
        const Vec v = *(const Vec *)(channel + n * APART + place * VEC);
#pragma unroll
        for (int i = 0; i < VEC; ++i) mine[n + i] = v.at[i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) scores_forward(const ScoresForward p) {
    const int q_blocks = ceil_div(p.length_q, BLOCK_Q), k_blocks = ceil_div(p.length_k, BLOCK_K);
    const int j0 = blockIdx.x % k_blocks * BLOCK_K, i0 = blockIdx.x / k_blocks % q_blocks * BLOCK_Q;
    const int b = blockIdx.x / k_blocks / q_blocks;
    const scalar_t *q = matrix(p.q, p.batch_shape, b) + i0 * p.q.row_stride;  // q[b, i0:i0+BLOCK_Q, :]
    const scalar_t *k = matrix(p.k, p.batch_shape, b) + j0 * p.k.row_stride;  // k[b, j0:j0+BLOCK_K, :]
    scalar_t *out = matrix(p.out, p.batch_shape, b) + i0 * p.out.row_stride + j0;
    const int q_count = min(p.length_q - i0, BLOCK_Q), k_count = min(p.length_k - j0, BLOCK_K);
    // Nothing to check at each access: all rows and channels of all chunks exist, and are aligned.
    const bool whole = q_count == BLOCK_Q && k_count == BLOCK_K && p.channels % BLOCK_E == 0 &&
                       aligned_rows(q, p.q.row_stride) && aligned_rows(k, p.k.row_stride) &&
                       aligned_rows(out, p.out.row_stride);

    __shared__ alignas(16) acc_t q_chunks[2][BLOCK_E][Chunk<BLOCK_Q>::STRIDE];
    __shared__ alignas(16) acc_t k_chunks[2][BLOCK_E][Chunk<BLOCK_K>::STRIDE];
    Chunk<BLOCK_Q> q_next;
    Chunk<BLOCK_K> k_next;
    const int row = threadIdx.x / ACROSS, column = threadIdx.x % ACROSS;
    acc_t distance[ROWS][COLUMNS] = {};

    q_next.fetch(q, p.q.row_stride, q_count, p.channels, whole);
    k_next.fetch(k, p.k.row_stride, k_count, p.channels, whole);
    q_next.put(q_chunks[0]);
    k_next.put(k_chunks[0]);
    __syncthreads();  // the first chunk is there

    for (int channels = p.channels, now = 0; channels > 0; channels -= BLOCK_E, now ^= 1) {
        if (channels > BLOCK_E) {  // the next chunk is on the way while the sums below are formed
            q_next.fetch(q += BLOCK_E, p.q.row_stride, q_count, channels - BLOCK_E, whole);
            k_next.fetch(k += BLOCK_E, p.k.row_stride, k_count, channels - BLOCK_E, whole);
        }
#pragma unroll 4
        for (int e = 0; e < BLOCK_E; ++e) {
            acc_t qs[ROWS], ks[COLUMNS];
            read<DOWN>(qs, q_chunks[now][e], row);
            read<ACROSS>(ks, k_chunks[now][e], column);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) distance[r][c] += absolute(qs[r] - ks[c]);
            }
        }
        if (channels > BLOCK_E) {
            q_next.put(q_chunks[now ^ 1]);  // was last read before the last barrier
            k_next.put(k_chunks[now ^ 1]);
            __syncthreads();  // the next chunk is there, and all are done with this one
        }
    }

    store_scores<DOWN, ACROSS>(distance, out, p.out.row_stride, row, column, q_count, k_count, whole, p);
}
