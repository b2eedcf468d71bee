// scores_forward_tiled.cu: L1 scores, forward; the default.
// Computes  out[b,i,j] = F(scale * sum_k |q[b,i,k] - k[b,j,k]|)
// Shapes    q (B,L,E)  k (B,S,E)  out (B,L,S); strides in elements, int64
// Tiling    BLOCK_Q x BLOCK_K outputs per block, TILE_K columns at a time, 8 x 8 per thread; E in chunks of BLOCK_E
// Cost      2*B*L*S*E adds; at least itemsize*(B*E*(L+S) + B*L*S) bytes
// Delta     like scores_forward_gather.cu, but tiles of q and k are reused: 8 x 8 outputs need 4 shared loads of 128
//           bits per channel for 64 terms of 2 adds. The next chunk is on its way while this one is summed, also the first
//           one of the next tile, so that a block waits for memory once.
// @variant  op=scores_forward dtypes=f32 BLOCK_Q=128 BLOCK_K=128,64,256 TILE_K=64 BLOCK_E=16 THREADS=128 BLOCKS_PER_SM=4,3 rank=20
// @variant  op=scores_forward dtypes=f16,bf16 BLOCK_Q=128 BLOCK_K=128,64,256 TILE_K=64 BLOCK_E=16 THREADS=128 BLOCKS_PER_SM=3,2 rank=20
// @variant  op=scores_forward dtypes=f32,f16,bf16 BLOCK_Q=64 BLOCK_K=32 TILE_K=32 BLOCK_E=8 THREADS=128 BLOCKS_PER_SM=4 rank=21 max_q=64
// @variant  op=scores_forward dtypes=f64 BLOCK_Q=64 BLOCK_K=32 TILE_K=32 BLOCK_E=8 THREADS=128 BLOCKS_PER_SM=4 rank=20

const int ACROSS = 8, DOWN = THREADS / ACROSS;                 // threads along a row and a column of the tile
const int OWN_Q = BLOCK_Q / DOWN, OWN_K = TILE_K / ACROSS;     // outputs of a thread
static_assert(BLOCK_K % TILE_K == 0, "a block is a whole number of tiles");
static_assert(THREADS % ACROSS == 0 && BLOCK_Q % DOWN == 0 && TILE_K % ACROSS == 0, "all threads own as many outputs");
static_assert(OWN_Q % VEC == 0 && OWN_K % VEC == 0, "a thread reads its rows and columns 128 bits at a time");
static_assert(BLOCK_E % LOAD == 0, "a chunk of a row is a whole number of 128-bit loads");

// BLOCK rows on their way, chunk by chunk, from global to shared memory: chunk[e][row]. fetch() may be called while the
// chunk before is read; what put() stores is there after a barrier.
template <int BLOCK>
struct Chunk {
    static const int STRIDE = BLOCK + VEC;  // the extra VEC spreads the transposed stores over the banks
    typedef acc_t Shared[BLOCK_E][STRIDE];
#if DTYPE == F32 || DTYPE == F64  // number by number, past the registers
    static const int STEP = THREADS / BLOCK_E;  // rows that all threads load at once
    static_assert(THREADS % BLOCK_E == 0 && BLOCK % STEP == 0, "all threads load whole rows together");

    __device__ __forceinline__ void fetch(Shared &chunk, const scalar_t *rows, int64 stride, int count, int channels,
                                          bool whole) {
        const int e = threadIdx.x % BLOCK_E, first = threadIdx.x / BLOCK_E;
        const scalar_t *from = rows + first * stride + e;
        if (whole) {
#pragma unroll
            for (int n = 0; n < BLOCK; n += STEP, from += STEP * stride) copy_async<scalar_t>(&chunk[e][first + n], from);
        } else {
#pragma unroll
            for (int n = 0; n < BLOCK; n += STEP, from += STEP * stride) {
                copy_async<scalar_t>(&chunk[e][first + n], from, first + n < count && e < channels);
            }
        }
    }
    __device__ __forceinline__ void put(Shared &) const { wait_async(); }
#else  // by 128-bit loads to registers, where they become acc_t
    static const int GROUPS = BLOCK_E / LOAD;                // 128-bit loads in a row of a chunk
    static const int STEP = THREADS / GROUPS;                // rows that all threads load at once
    static const int MINE = (BLOCK + STEP - 1) / STEP;
    static_assert(THREADS % GROUPS == 0, "all threads load whole rows together");
    Load numbers[MINE];

    __device__ __forceinline__ void fetch(Shared &, const scalar_t *rows, int64 stride, int count, int channels,
                                          bool whole) {
        const int first = threadIdx.x / GROUPS, e = threadIdx.x % GROUPS * LOAD;
        const scalar_t *from = rows + first * stride + e;
#pragma unroll
        for (int n = 0; n < MINE; ++n, from += STEP * stride) {
            if (whole && BLOCK % STEP == 0) {
                numbers[n] = *(const Load *)from;
            } else {
                numbers[n] = load(from, first + n * STEP < count ? channels - e : 0);
            }
        }
    }
    __device__ __forceinline__ void put(Shared &chunk) const {
        const int first = threadIdx.x / GROUPS, e = threadIdx.x % GROUPS * LOAD;
#pragma unroll
        for (int n = 0; n < MINE; ++n) {
            if (BLOCK % STEP != 0 && first + n * STEP >= BLOCK) break;
#pragma unroll
            for (int i = 0; i < LOAD; ++i) chunk[e + i][first + n * STEP] = to_acc(numbers[n].at[i]);
        }
    }
#endif
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
    const Tile tile(p.length_q, p.length_k, BLOCK_Q, BLOCK_K);
    const scalar_t *q = matrix(p.q, p.batch_shape, tile.b) + tile.i0 * p.q.row_stride;  // q[b, i0:i0+BLOCK_Q, :]
    const scalar_t *k = matrix(p.k, p.batch_shape, tile.b) + tile.j0 * p.k.row_stride;  // k[b, j0:j0+BLOCK_K, :]
    scalar_t *out = matrix(p.out, p.batch_shape, tile.b) + tile.i0 * p.out.row_stride + tile.j0;
    const int q_count = min(p.length_q - tile.i0, BLOCK_Q), k_count = min(p.length_k - tile.j0, BLOCK_K);
    // Nothing to check at each access: all rows and channels of all chunks exist, and are aligned.
    const bool whole = q_count == BLOCK_Q && k_count % TILE_K == 0 && p.channels % BLOCK_E == 0 && p.channels > 0 &&
                       aligned_rows(q, p.q.row_stride) && aligned_rows(k, p.k.row_stride) &&
                       aligned_rows(out, p.out.row_stride);

    __shared__ alignas(16) typename Chunk<BLOCK_Q>::Shared q_chunks[2];
    __shared__ alignas(16) typename Chunk<TILE_K>::Shared k_chunks[2];
    Chunk<BLOCK_Q> q_next;
    Chunk<TILE_K> k_next;
    const int row = threadIdx.x / ACROSS, column = threadIdx.x % ACROSS;
    acc_t distance[OWN_Q][OWN_K] = {};

    q_next.fetch(q_chunks[0], q, p.q.row_stride, q_count, p.channels, whole);
    k_next.fetch(k_chunks[0], k, p.k.row_stride, k_count, p.channels, whole);
    q_next.put(q_chunks[0]);
    k_next.put(k_chunks[0]);
    __syncthreads();  // the first chunk is there

    int k_left = k_count, channels = p.channels;
    for (int now = 0; k_left > 0; now ^= 1) {
        const bool last = channels <= BLOCK_E;  // channels of this tile
        q += BLOCK_E, k += BLOCK_E, channels -= BLOCK_E;
        if (last) {
            k_left -= TILE_K;
            channels = p.channels;
            const int back = ceil_div(channels, BLOCK_E) * BLOCK_E;
            q -= back, k += TILE_K * p.k.row_stride - back;
        }
        if (k_left > 0) {  // the next chunk is on the way while the sums below are formed
            q_next.fetch(q_chunks[now ^ 1], q, p.q.row_stride, q_count, channels, whole);
            k_next.fetch(k_chunks[now ^ 1], k, p.k.row_stride, k_left, channels, whole);
        }
#pragma unroll 4
        for (int e = 0; e < BLOCK_E; ++e) {
            acc_t qs[OWN_Q], ks[OWN_K];
            read<DOWN>(qs, q_chunks[now][e], row);
            read<ACROSS>(ks, k_chunks[now][e], column);
#pragma unroll
            for (int r = 0; r < OWN_Q; ++r) {
#pragma unroll
                for (int c = 0; c < OWN_K; ++c) distance[r][c] += absolute(qs[r] - ks[c]);
            }
        }
        if (last) {
            store_scores<DOWN, ACROSS>(distance, out, p.out.row_stride, row, column, q_count, k_left + TILE_K, whole, p);
            out += TILE_K;
#pragma unroll
            for (int n = 0; n < OWN_Q * OWN_K; ++n) distance[n / OWN_K][n % OWN_K] = 0;
        }
        if (k_left > 0) {
            q_next.put(q_chunks[now ^ 1]);  // was last read before the last barrier
            k_next.put(k_chunks[now ^ 1]);
            __syncthreads();  // the next chunk is there, and all are done with this one
        }
    }
}
