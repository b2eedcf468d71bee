// scores_forward_half2.cu: L1 scores, forward, two channels in one instruction.
// Computes  out[b,i,j] = F(scale * sum_k |q[b,i,k] - k[b,j,k]|)
// Shapes    q (B,L,E)  k (B,S,E)  out (B,L,S); strides in elements, int64
// Tiling    BLOCK_Q x BLOCK_K outputs per block, TILE_K columns at a time, 8 x 8 per thread; E in chunks of BLOCK_E
// Cost      B*L*S*E packed adds, and 4 operations an output and chunk; at least 2*(B*E*(L+S) + B*L*S) bytes
// Delta     like scores_forward_tiled.cu, but differences are 16-bit, two to an instruction, and so are their sums within
//           a chunk: each is rounded to 11 bits. By name only (rank 0).
//
// The sums of a chunk are added up in float32. What overflows 16 bits, or is not finite, is computed once more.
//
// @variant  op=scores_forward dtypes=f16 BLOCK_Q=128 BLOCK_K=128,64,256 TILE_K=64 BLOCK_E=32 THREADS=128 BLOCKS_PER_SM=3,2 rank=0 f16_differences=1

#if DTYPE != F16
#error "half2 is for float16"
#endif

const int ACROSS = 8, DOWN = THREADS / ACROSS;              // threads along a row and a column of the tile
const int OWN_Q = BLOCK_Q / DOWN, OWN_K = TILE_K / ACROSS;  // outputs of a thread
const int PAIRS = BLOCK_E / 2;                              // of channels, in a chunk
static_assert(BLOCK_K % TILE_K == 0, "a block is a whole number of tiles");
static_assert(THREADS % ACROSS == 0 && BLOCK_Q % DOWN == 0 && TILE_K % ACROSS == 0, "all threads own as many outputs");
static_assert(OWN_Q % VEC == 0 && OWN_K % VEC == 0, "a thread reads its rows and columns 128 bits at a time");
static_assert(BLOCK_E % 2 == 0, "channels are summed two by two");

struct alignas(16) Pairs {
    __half2 at[VEC];
};

// BLOCK rows on their way, chunk by chunk, from global to shared memory: at[pair][row]. A chunk may be fetched while the one
// before is read; it is there after wait_async() and a barrier.
template <int BLOCK>
struct Chunk {
    static const int STEP = THREADS / PAIRS;  // rows that all threads load at once
    static_assert(THREADS % PAIRS == 0 && BLOCK % STEP == 0, "all threads load whole rows together");
    __half2 at[PAIRS][BLOCK + VEC];           // the extra VEC spreads the transposed stores over the banks

    __device__ __forceinline__ void fetch(const scalar_t *rows, int64 stride, int count, int channels, bool whole) {
        const int pair = threadIdx.x % PAIRS, first = threadIdx.x / PAIRS, left = channels - 2 * pair;
        const scalar_t *from = rows + first * stride + 2 * pair;
        __half2 *to = &at[pair][first];
        if (whole) {
#pragma unroll
            for (int n = 0; n < BLOCK; n += STEP, from += STEP * stride) copy_async<unsigned>(to + n, from);
        } else {
#pragma unroll 4
            for (int n = 0; n < BLOCK; n += STEP, from += STEP * stride) {
                const bool exists = first + n < count;
                const scalar_t zero = to_scalar(0);
                to[n] = __halves2half2(exists && left > 0 ? from[0] : zero, exists && left > 1 ? from[1] : zero);
            }
        }
    }
    // The numbers of the N rows of a thread, of which there are APART.
    template <int APART, int N>
    __device__ __forceinline__ void read(__half2 (&mine)[N], int pair, int place) const {
#pragma unroll
        for (int n = 0; n < N; n += VEC) {
            const Pairs v = *(const Pairs *)&at[pair][n * APART + place * VEC];
#pragma unroll
            for (int i = 0; i < VEC; ++i) mine[n + i] = v.at[i];
        }
    }
};

// Adds |q - k| of a pair of channels for all outputs of a thread. Only absolute values count of the sums: FIRST sets
// differences, which saves an instruction.
template <bool FIRST>
__device__ __forceinline__ void add_pair(__half2 (&sums)[OWN_Q][OWN_K], const Chunk<BLOCK_Q> &q, const Chunk<TILE_K> &k,
                                         int pair, int row, int column) {
    __half2 qs[OWN_Q], ks[OWN_K];
    q.read<DOWN>(qs, pair, row);
    k.read<ACROSS>(ks, pair, column);
#pragma unroll
    for (int r = 0; r < OWN_Q; ++r) {
#pragma unroll
        for (int c = 0; c < OWN_K; ++c) {
            const __half2 d = __hsub2(qs[r], ks[c]);
            sums[r][c] = FIRST ? d : __hadd2(__habs2(sums[r][c]), __habs2(d));
        }
    }
}

// Those of a thread's N neighbouring scores that are NaN, once more: by the formula, from q[i, :] and k[j:, :].
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
    const scalar_t *q_rows = matrix(p.q, p.batch_shape, tile.b) + tile.i0 * p.q.row_stride;  // q[b, i0:i0+BLOCK_Q, :]
    const scalar_t *k_rows = matrix(p.k, p.batch_shape, tile.b) + tile.j0 * p.k.row_stride;  // k[b, j0:j0+BLOCK_K, :]
    scalar_t *out = matrix(p.out, p.batch_shape, tile.b) + tile.i0 * p.out.row_stride + tile.j0;
    const int q_count = min(p.length_q - tile.i0, BLOCK_Q), k_count = min(p.length_k - tile.j0, BLOCK_K);
    // Nothing to check at each access: all rows and channels of all chunks exist, and no pair is misaligned.
    const bool whole = q_count == BLOCK_Q && k_count % TILE_K == 0 && p.channels % BLOCK_E == 0 && p.channels > 0 &&
                       aligned<__half2>(q_rows) && aligned<__half2>(k_rows) &&
                       (p.q.row_stride | p.k.row_stride) % 2 == 0 && aligned_rows(out, p.out.row_stride);

    __shared__ alignas(16) Chunk<BLOCK_Q> q_chunks[2];
    __shared__ alignas(16) Chunk<TILE_K> k_chunks[2];
    const int row = threadIdx.x / ACROSS, column = threadIdx.x % ACROSS;
    acc_t distance[OWN_Q][OWN_K] = {};

    q_chunks[0].fetch(q_rows, p.q.row_stride, q_count, p.channels, whole);
    k_chunks[0].fetch(k_rows, p.k.row_stride, k_count, p.channels, whole);
    wait_async();
    __syncthreads();  // the first chunk is there

    for (int j0 = 0, e0 = 0, now = 0; j0 < k_count; now ^= 1) {
        const bool last = e0 + BLOCK_E >= p.channels;  // channels of this tile
        const int j_next = last ? j0 + TILE_K : j0, e_next = last ? 0 : e0 + BLOCK_E;
        if (j_next < k_count) {  // the next chunk is on the way while the sums below are formed
            q_chunks[now ^ 1].fetch(q_rows + e_next, p.q.row_stride, q_count, p.channels - e_next, whole);
            k_chunks[now ^ 1].fetch(k_rows + j_next * p.k.row_stride + e_next, p.k.row_stride, k_count - j_next,
                                    p.channels - e_next, whole);
        }
        __half2 sums[OWN_Q][OWN_K];
        add_pair<true>(sums, q_chunks[now], k_chunks[now], 0, row, column);
        __syncwarp();  // or the compiler would load the next pair along with this one, for which there are no registers
#pragma unroll 2
        for (int pair = 1; pair < PAIRS; ++pair) {
            add_pair<false>(sums, q_chunks[now], k_chunks[now], pair, row, column);
        }
        const acc_t before = e0 > 0;  // how often what was summed before counts
#pragma unroll
        for (int n = 0; n < OWN_Q * OWN_K; ++n) {
            const __half2 sum = __habs2(sums[n / OWN_K][n % OWN_K]);
            acc_t &x = distance[n / OWN_K][n % OWN_K];
            x = multiply_add(x, before, __low2float(sum) + __high2float(sum));
        }
        if (last) {
            acc_t zero = 0;  // stays 0 while all are finite
#pragma unroll
            for (int n = 0; n < OWN_Q * OWN_K; ++n) zero = multiply_add(distance[n / OWN_K][n % OWN_K], 0, zero);
            if (zero != 0) {  // infinity becomes NaN
#pragma unroll
                for (int n = 0; n < OWN_Q * OWN_K; ++n) {
                    acc_t &x = distance[n / OWN_K][n % OWN_K];
                    x = multiply_add(x, 0, x);
                }
            }
            store_scores<DOWN, ACROSS>(distance, out + j0, p.out.row_stride, row, column, q_count, k_count - j0, whole, p);
            if (zero != 0) {
#pragma unroll 1
                for (int n = 0; n < OWN_Q * OWN_K / VEC; ++n) {
                    const int r = n / (OWN_K / VEC), i = r / VEC * VEC * DOWN + row * VEC + r % VEC;
                    const int j = j0 + n % (OWN_K / VEC) * VEC * ACROSS + column * VEC;
                    if (i >= q_count) continue;
                    store_exact(out + i * p.out.row_stride + j, q_rows + i * p.q.row_stride, k_rows + j * p.k.row_stride,
                                min(VEC, k_count - j), p);
                }
#pragma unroll
                for (int n = 0; n < OWN_Q * OWN_K; ++n) distance[n / OWN_K][n % OWN_K] = 0;
            }
        }
        if (j_next < k_count) {
            wait_async();
            __syncthreads();  // the next chunk is there, and all are done with this one
        }
        j0 = j_next, e0 = e_next;
    }
}
