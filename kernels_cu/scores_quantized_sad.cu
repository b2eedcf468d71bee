// scores_quantized_sad.cu: L1 scores of 8-bit queries and keys; the default.
// Computes  out[b,i,j] = F(scale * quant_scale[b] * sum_k |q[b,i,k] - k[b,j,k]|), the sum an exact integer
// Shapes    q (B,L,E)  k (B,S,E)  quant_scale (B,1,1)  out (B,L,S); strides in elements, int64
// Tiling    BLOCK_Q x BLOCK_K outputs per block, TILE_K columns at a time, 8 x 8 per thread; E in chunks of BLOCK_E
// Cost      B*L*S*E / 4 sums of four absolute differences; at least B*E*(L+S) + 4*B*L*S bytes
// Delta     like scores_forward_tiled.cu, but a number in shared memory is a word of four channels, for which one
//           instruction adds four terms; words pass through the registers, where int8 becomes unsigned
// @variant  op=scores_quantized dtypes=i8,u8 BLOCK_Q=128 BLOCK_K=128,64,256 TILE_K=64 BLOCK_E=32 THREADS=128 BLOCKS_PER_SM=3 rank=20
// @variant  op=scores_quantized dtypes=i8,u8 BLOCK_Q=64 BLOCK_K=32 TILE_K=32 BLOCK_E=64 THREADS=128 BLOCKS_PER_SM=4 rank=21 max_q=64

const int ACROSS = 8, DOWN = THREADS / ACROSS;              // threads along a row and a column of the tile
const int OWN_Q = BLOCK_Q / DOWN, OWN_K = TILE_K / ACROSS;  // outputs of a thread
const int WORD = 4, WORDS = BLOCK_E / WORD;                 // channels of a word, words of a chunk
static_assert(BLOCK_K % TILE_K == 0, "a block is a whole number of tiles");
static_assert(THREADS % ACROSS == 0 && BLOCK_Q % DOWN == 0 && TILE_K % ACROSS == 0, "all threads own as many outputs");
static_assert(OWN_Q % VEC == 0 && OWN_K % VEC == 0, "a thread reads its rows and columns 128 bits at a time");

// Block rows on their way, BLOCK_E channels at a time, from global to shared memory: chunk[word][row]; as Transposed.
template <int Block>
struct Words {
    typedef unsigned Shared[WORDS][Block + VEC];  // the extra VEC spreads the transposed stores over the banks
    static const int GROUPS = BLOCK_E / LOAD, STEP = THREADS / GROUPS;  // 128-bit loads in a row; rows loaded at once
    static const int MINE = Block / STEP;
    static_assert(BLOCK_E % LOAD == 0 && THREADS % GROUPS == 0 && Block % STEP == 0, "all threads load as much");
    Load numbers[MINE];

    __device__ __forceinline__ void fetch(const scalar_t *rows, int64 stride, int count, int channels, bool whole) {
        const int first = threadIdx.x / GROUPS, e = threadIdx.x % GROUPS * LOAD;
        const scalar_t *from = rows + first * stride + e;
#pragma unroll
        for (int n = 0; n < MINE; ++n, from += STEP * stride) {
            numbers[n] = whole ? *(const Load *)from : load(from, first + n * STEP < count ? channels - e : 0);
        }
    }
    // Signed bytes become unsigned ones with the same differences.
    __device__ __forceinline__ void put(Shared &chunk) const {
        const int first = threadIdx.x / GROUPS, word = threadIdx.x % GROUPS * (LOAD / WORD);
#pragma unroll
        for (int n = 0; n < MINE; ++n) {
            const unsigned *words = (const unsigned *)&numbers[n];
#pragma unroll
            for (int i = 0; i < LOAD / WORD; ++i) {
                chunk[word + i][first + n * STEP] = DTYPE == I8 ? words[i] ^ 0x80808080u : words[i];
            }
        }
    }
};

// A thread's words of one row of a chunk: groups of VEC neighbours, APART * VEC apart.
template <int APART, int N>
__device__ __forceinline__ void read_words(unsigned (&mine)[N], const unsigned *words, int place) {
#pragma unroll
    for (int n = 0; n < N; n += VEC) {
        const FourWords v = *(const FourWords *)(words + n * APART + place * VEC);
#pragma unroll
        for (int i = 0; i < VEC; ++i) mine[n + i] = v.at[i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) scores_quantized(const ScoresQuantized p) {
    const Tile tile(p.length_q, p.length_k, BLOCK_Q, BLOCK_K);
    const scalar_t *q = matrix(p.q, p.batch_shape, tile.b) + tile.i0 * p.q.row_stride;  // q[b, i0:i0+BLOCK_Q, :]
    const scalar_t *k = matrix(p.k, p.batch_shape, tile.b) + tile.j0 * p.k.row_stride;  // k[b, j0:j0+BLOCK_K, :]
    out_t *out = accumulated(p.out, p.batch_shape, tile.b) + tile.i0 * p.out.row_stride + tile.j0;
    const acc_t scale = p.quant_scale.data ? p.scale * *accumulated(p.quant_scale, p.batch_shape, tile.b) : (acc_t)p.scale;
    const int q_count = min(p.length_q - tile.i0, BLOCK_Q), k_count = min(p.length_k - tile.j0, BLOCK_K);
    // Nothing to check at each access: all rows and channels of all chunks exist, and are aligned.
    const bool whole = q_count == BLOCK_Q && k_count % TILE_K == 0 && p.channels % BLOCK_E == 0 && p.channels > 0 &&
                       aligned_rows(q, p.q.row_stride) && aligned_rows(k, p.k.row_stride) && aligned<Load>(out) &&
                       p.out.row_stride % VEC == 0;

    __shared__ alignas(16) typename Words<BLOCK_Q>::Shared q_chunks[2];
    __shared__ alignas(16) typename Words<TILE_K>::Shared k_chunks[2];
    Words<BLOCK_Q> q_next;
    Words<TILE_K> k_next;
    const int row = threadIdx.x / ACROSS, column = threadIdx.x % ACROSS;
    unsigned distance[OWN_Q][OWN_K] = {};

    q_next.fetch(q, p.q.row_stride, q_count, p.channels, whole);
    k_next.fetch(k, p.k.row_stride, k_count, p.channels, whole);
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
            q_next.fetch(q, p.q.row_stride, q_count, channels, whole);
            k_next.fetch(k, p.k.row_stride, k_left, channels, whole);
        }
#pragma unroll 4
        for (int word = 0; word < WORDS; ++word) {
            unsigned qs[OWN_Q], ks[OWN_K];
            read_words<DOWN>(qs, q_chunks[now][word], row);
            read_words<ACROSS>(ks, k_chunks[now][word], column);
#pragma unroll
            for (int r = 0; r < OWN_Q; ++r) {
#pragma unroll
                for (int c = 0; c < OWN_K; ++c) distance[r][c] = add_byte_distance(distance[r][c], qs[r], ks[c]);
            }
        }
        if (last) {
            acc_t scores[OWN_Q][OWN_K];
#pragma unroll
            for (int n = 0; n < OWN_Q * OWN_K; ++n) {
                scores[n / OWN_K][n % OWN_K] = __uint2float_rn(distance[n / OWN_K][n % OWN_K]);
                distance[n / OWN_K][n % OWN_K] = 0;
            }
            apply_score((acc_t(&)[OWN_Q * OWN_K])scores, p.score, scale, p.eps);
            store_part<DOWN, ACROSS>(scores, out, p.out.row_stride, row, column, q_count, k_left + TILE_K, whole);
            out += TILE_K;
        }
        if (k_left > 0) {
            q_next.put(q_chunks[now ^ 1]);  // was last read before the last barrier
            k_next.put(k_chunks[now ^ 1]);
            __syncthreads();  // the next chunk is there, and all are done with this one
        }
    }
}
