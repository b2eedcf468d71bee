// attention_forward_tiled.cu: fused L1 attention, forward; the default.
// Computes  out[b,i,c] = sum_j p[b,i,j] * v[b,j,c],  p = exp(s - max_j s) / sum_j exp(s - max_j s);  softmax[b,i] = both
//           s[b,i,j] = F(scale * sum_k |q[b,i,k] - k[b,j,k]|) + mask[b,i,j]
// Shapes    q (B,L,E)  k (B,S,E)  v (B,S,V)  mask (B,L,S)  out (B,L,V)  softmax (B,L,2); strides in elements, int64
// Tiling    BLOCK_Q queries and BLOCK_V channels of v per block; keys in tiles of TILE_K, their scores as in
//           scores_forward_tiled.cu, E in chunks of BLOCK_E; then v in parts of TILE_V keys
//           With p.splits > 1 a block takes a share of the keys, and attention_merge joins them: see struct Split
// Cost      2*B*L*S*E adds and B*L*S*V multiply-adds, the scores again for every BLOCK_V channels; memory linear in L
// Delta     like attention_forward_gather.cu, but scores, weights and sums of a tile of queries are shared and reused, and
//           with 16-bit numbers tensor cores (from sm_80 on) form p @ v. Tiles that causality or the window rules out
//           are not computed. One order of summation: the same bits in every run
//
// Weights stay float32 for the tensor cores: they take each as the sum of two 16-bit numbers. Float16 has too few small
// numbers for that, so there weights are WEIGHT_SCALE times as large until the end.
//
// @variant  op=attention_forward dtypes=f32 BLOCK_Q=64,128 TILE_K=64 TILE_V=64,32 BLOCK_E=16 BLOCK_V=64 THREADS=128,256 BLOCKS_PER_SM=3,2,4 rank=20 max_v=64
// @variant  op=attention_forward dtypes=f32 BLOCK_Q=64 TILE_K=64 TILE_V=32 BLOCK_E=16 BLOCK_V=128 THREADS=128 BLOCKS_PER_SM=2,3 rank=19
// @variant  op=attention_forward dtypes=f16,bf16 BLOCK_Q=64,128 TILE_K=64 TILE_V=64,32 BLOCK_E=16 BLOCK_V=64 THREADS=128,256 BLOCKS_PER_SM=3,2,4 rank=20 max_v=64
// @variant  op=attention_forward dtypes=f16,bf16 BLOCK_Q=64 TILE_K=64 TILE_V=64 BLOCK_E=16 BLOCK_V=128 THREADS=128 BLOCKS_PER_SM=2,3 rank=19
// @variant  op=attention_forward dtypes=f64 BLOCK_Q=32 TILE_K=32 TILE_V=32 BLOCK_E=8 BLOCK_V=32 THREADS=128 BLOCKS_PER_SM=2 rank=20

const int ACROSS = 8, DOWN = THREADS / ACROSS;              // threads along a row and a column of a tile of scores
const int OWN_Q = BLOCK_Q / DOWN, OWN_K = TILE_K / ACROSS;  // scores of a thread
const int OWN_V = BLOCK_V / ACROSS;
const int SUMMED = 32;  // channels after which a new sum is begun: exp makes absolute errors of a score relative ones
const acc_t WEIGHT_SCALE = DTYPE == F16 ? 32768 : 1;
static_assert(ACROSS == 8 && THREADS % 32 == 0, "three shuffles join what the threads of a row have");
static_assert(BLOCK_Q % DOWN == 0 && TILE_K % ACROSS == 0 && BLOCK_V % ACROSS == 0, "all threads own as many");
static_assert(OWN_Q % VEC == 0 && OWN_K % VEC == 0 && OWN_V % VEC == 0, "shared memory is read 128 bits at a time");
static_assert(TILE_K % TILE_V == 0 && TILE_V % VEC == 0, "a tile is a whole number of parts");

typedef acc_t Weights[BLOCK_Q][TILE_K + 8];  // the extra 8 spread the rows over the banks
typedef Straight<TILE_V, BLOCK_V> Value;
typedef Value::Shared Values;

// A thread's sums of weights * v, and of which queries and channels of the tile they are: rows of groups of VEC.
struct Outputs {
#if TENSOR_CORES
    static const int TILES = BLOCK_Q / (THREADS / 2);  // of 16 queries, of each warp
    static const int ROWS = 2 * TILES, COLUMNS = BLOCK_V / 4;
    static_assert(BLOCK_Q % (THREADS / 2) == 0 && BLOCK_V % 16 == 0 && TILE_V % 16 == 0, "whole tiles for every warp");
    __device__ __forceinline__ static int row(int r) {
        return (threadIdx.x / 32 * TILES + r / 2) * 16 + r % 2 * 8 + threadIdx.x % 32 / 4;
    }
    __device__ __forceinline__ static int column(int c) { return c / 4 * 16 + threadIdx.x % 4 * 4 + c % 4; }
#else
    static const int ROWS = OWN_Q, COLUMNS = OWN_V;
    __device__ __forceinline__ static int row(int r) { return r * DOWN + threadIdx.x / ACROSS; }
    __device__ __forceinline__ static int column(int c) {
        return c / VEC * VEC * ACROSS + threadIdx.x % ACROSS * VEC + c % VEC;
    }
#endif
    acc_t sum[ROWS][COLUMNS];

    __device__ __forceinline__ void scale(const acc_t *factors) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const acc_t factor = factors[row(r)];
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) sum[r][c] *= factor;
        }
    }
    // weights[:, j0:j0+TILE_V] @ values, all numbers of which are finite or belong to keys that are not ruled out.
    __device__ __forceinline__ void add(const Weights &weights, const Values &values, int j0) {
#if TENSOR_CORES
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 1
        for (int j = 2 * t; j < TILE_V; j += 16) {
            unsigned high[TILES][4], low[TILES][4];
#pragma unroll
            for (int n = 0; n < 4 * TILES; ++n) {
                const acc_t *from = &weights[row(n / 4 * 2 + n % 2)][j0 + j + n % 4 / 2 * 8];
                const Rounded rounded(from[0], from[1]);
                high[n / 4][n % 4] = rounded.high, low[n / 4][n % 4] = rounded.low;
            }
#pragma unroll
            for (int c = 0; c < COLUMNS; c += 4) {  // two products of 8 channels: the even ones of 16, and the odd
                unsigned v[4];                      // channels 2g and 2g + 1 of four keys
#pragma unroll
                for (int n = 0; n < 4; ++n) v[n] = *(const unsigned *)&values[j + n / 2 * 8 + n % 2][c * 4 + 2 * g];
#pragma unroll
                for (int odd = 0; odd < 2; ++odd) {
                    const int halves = odd ? 0x7632 : 0x5410;
                    const unsigned b0 = __byte_perm(v[0], v[1], halves), b1 = __byte_perm(v[2], v[3], halves);
#pragma unroll
                    for (int n = 0; n < TILES; ++n) {
                        acc_t *up = sum[2 * n] + c + odd, *down = sum[2 * n + 1] + c + odd;
                        multiply_add(up[0], up[2], down[0], down[2], low[n], b0, b1);
                        multiply_add(up[0], up[2], down[0], down[2], high[n], b0, b1);
                    }
                }
            }
        }
#else
#pragma unroll 2
        for (int j = 0; j < TILE_V; j += VEC) {
            Vec w[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) w[r] = *(const Vec *)&weights[row(r)][j0 + j];
#pragma unroll
            for (int n = 0; n < VEC; ++n) {
#pragma unroll
                for (int c = 0; c < COLUMNS; c += VEC) {
                    const Store v = *(const Store *)&values[j + n][column(c)];
#pragma unroll
                    for (int x = 0; x < VEC; ++x) {
#pragma unroll
                        for (int r = 0; r < ROWS; ++r) {
                            sum[r][c + x] = multiply_add(w[r].at[n], to_acc(v.at[x]), sum[r][c + x]);
                        }
                    }
                }
            }
        }
#endif
    }
    // The same by the formula, whatever the values are: those of keys that are ruled out do not count.
    __device__ __forceinline__ void add_exactly(const Weights &weights, const Values &values, int j0) {
#pragma unroll 1
        for (int j = 0; j < TILE_V; ++j) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const acc_t weight = weights[row(r)][j0 + j];
                if (is_ruled_out(weight)) continue;
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) sum[r][c] += weight * to_acc(values[j][column(c)]);
            }
        }
    }
};

// A thread's part of the softmax of its OWN_Q queries. `total` is of this thread's keys alone until join().
struct Rows {
    acc_t largest[OWN_Q], total[OWN_Q];

    // The query of the tile that is the thread's r-th, and its c-th key.
    __device__ __forceinline__ static int query(int r) {
        return r / VEC * VEC * DOWN + threadIdx.x / ACROSS * VEC + r % VEC;
    }
    __device__ __forceinline__ static int key(int c) {
        return c / VEC * VEC * ACROSS + threadIdx.x % ACROSS * VEC + c % VEC;
    }

    // What the mask adds to this thread's scores, -inf where it or their place rules keys out, to where their weights will
    // be. There are not the registers to hold it.
    __device__ __forceinline__ static void fetch_mask(Weights &added, const Attention &a, int64 mask, int i0, int j0) {
#pragma unroll 1
        for (int r = 0; r < OWN_Q; ++r) {
            const int i = i0 + query(r), first = first_key(a, i), after = i < a.length_q ? end_of_keys(a, i) : 0;
#pragma unroll
            for (int c = 0; c < OWN_K; ++c) {
                const int j = j0 + key(c);
                const int64 place = mask + i * a.mask.row_stride + j * a.mask_column;
                added[query(r)][key(c)] = j < first || j >= after ? -infinity() : masked_at(a, place, 0);
            }
        }
    }
    // Weights of one more tile, from its masked scores, and what to multiply former sums by.
    __device__ __forceinline__ void add(acc_t (&scores)[OWN_Q][OWN_K], Weights &weights, acc_t *factors) {
#pragma unroll
        for (int r = 0; r < OWN_Q; ++r) {
            acc_t most = scores[r][0];
#pragma unroll
            for (int c = 1; c < OWN_K; ++c) most = max(most, scores[r][c]);
#pragma unroll
            for (int step = 1; step < ACROSS; step *= 2) most = max(most, __shfl_xor_sync(0xffffffff, most, step));
            most = max(most, largest[r]);
            const acc_t subtracted = most == -infinity() ? 0 : most;  // no key so far: 0, not NaN
            const acc_t factor = quick_exponential(largest[r] - subtracted);
            largest[r] = most;
            acc_t sum = 0;
#pragma unroll
            for (int c = 0; c < OWN_K; c += VEC) {
                Vec group;
#pragma unroll
                for (int n = 0; n < VEC; ++n) {
                    const acc_t weight = quick_exponential(scores[r][c + n] - subtracted);
                    sum += weight;
                    group.at[n] = scores[r][c + n] == -infinity() ? ruled_out() : weight * WEIGHT_SCALE;
                }
                *(Vec *)&weights[query(r)][key(c)] = group;
            }
            total[r] = total[r] * factor + sum;
            if (threadIdx.x % ACROSS == 0) factors[query(r)] = factor;
        }
    }
    // All parts of each row together.
    __device__ __forceinline__ Softmax join(int r) const {
        Softmax softmax = {largest[r], total[r]};
#pragma unroll
        for (int step = 1; step < ACROSS; step *= 2) softmax.total += __shfl_xor_sync(0xffffffff, softmax.total, step);
        return softmax;
    }
};

#if !defined(L1ATTN_EMULATOR) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ == 800 && TENSOR_CORES || __CUDA_ARCH__ >= 1200)
const int BLOCKS = BLOCKS_PER_SM < 2 ? BLOCKS_PER_SM : 2;  // there the code takes more registers
#else
const int BLOCKS = BLOCKS_PER_SM;
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_forward(const AttentionForward p) {
    const Attention &a = p.a;
    const unsigned v_blocks = max(1, ceil_div(a.channels_v, BLOCK_V)), q_blocks = ceil_div(a.length_q, BLOCK_Q);
    const Split split(p);
    const unsigned tile = split.block / v_blocks, b = tile / q_blocks;
    const int c0 = (split.block - tile * v_blocks) * BLOCK_V;
    const int i0 = (q_blocks - 1 - (tile - b * q_blocks)) * BLOCK_Q;  // causal: the longest first
    const int q_count = min(a.length_q - i0, BLOCK_Q), v_count = min(a.channels_v - c0, BLOCK_V);
    const scalar_t *q = matrix(a.q, a.batch_shape, b) + i0 * a.q.row_stride;  // q[b, i0:i0+BLOCK_Q, :]
    const scalar_t *k = matrix(a.k, a.batch_shape, b), *v = matrix(a.v, a.batch_shape, b) + c0;
    const int64 mask = a.mask_kind == NO_MASK ? 0 : offset(a.mask, a.batch_shape, b);
    const bool regular = a.channels % BLOCK_E == 0 && a.channels > 0 && aligned_rows(q, a.q.row_stride) &&
                         aligned_rows(k, a.k.row_stride);

    __shared__ alignas(16) union {  // first the one, then the other
        struct {
            typename Transposed<BLOCK_Q, BLOCK_E>::Shared q[2];
            typename Transposed<TILE_K, BLOCK_E>::Shared k[2];
        } chunks;
        Weights weights;
    } tiles;
    __shared__ alignas(16) Values values;
    __shared__ acc_t factors[BLOCK_Q];
    Transposed<BLOCK_Q, BLOCK_E> q_next;
    Transposed<TILE_K, BLOCK_E> k_next;
    Outputs outputs;
    Rows rows;
#pragma unroll
    for (int n = 0; n < Outputs::ROWS * Outputs::COLUMNS; ++n) {
        outputs.sum[n / Outputs::COLUMNS][n % Outputs::COLUMNS] = 0;
    }
#pragma unroll
    for (int r = 0; r < OWN_Q; ++r) rows.largest[r] = -infinity(), rows.total[r] = 0;

    // Keys that all queries of the tile attend to, by their place; those from j0 up to `end` some of them.
    const int all_first = first_key(a, i0 + q_count - 1), all_end = end_of_keys(a, i0);
    int first = first_key(a, i0), end = end_of_keys(a, i0 + q_count - 1);
    split.narrow(first, end, TILE_K, p.splits);
    for (int j0 = first; j0 < end; j0 += TILE_K) {
        const scalar_t *k_from = k + j0 * a.k.row_stride;
        const int k_count = min(a.length_k - j0, TILE_K);
        const bool whole = regular && q_count == BLOCK_Q && k_count == TILE_K;
        q_next.fetch(tiles.chunks.q[0], q, a.q.row_stride, q_count, a.channels, whole);
        k_next.fetch(tiles.chunks.k[0], k_from, a.k.row_stride, k_count, a.channels, whole);
        q_next.put(tiles.chunks.q[0]);
        k_next.put(tiles.chunks.k[0]);
        __syncthreads();  // the first chunk is there
        Value::fetch(values, v + j0 * a.v.row_stride, a.v.row_stride, k_count, v_count);

        acc_t scores[OWN_Q][OWN_K] = {}, sums[OWN_Q][OWN_K] = {};
        for (int e0 = BLOCK_E, now = 0;; e0 += BLOCK_E, now ^= 1) {
            const bool more = e0 < a.channels;
            if (more) {  // the next chunk is on the way while the sums below are formed
                q_next.fetch(tiles.chunks.q[now ^ 1], q + e0, a.q.row_stride, q_count, a.channels - e0, whole);
                k_next.fetch(tiles.chunks.k[now ^ 1], k_from + e0, a.k.row_stride, k_count, a.channels - e0, whole);
            }
#pragma unroll 4
            for (int e = 0; e < BLOCK_E; ++e) {
                acc_t qs[OWN_Q], ks[OWN_K];
                read<DOWN>(qs, tiles.chunks.q[now][e], threadIdx.x / ACROSS);
                read<ACROSS>(ks, tiles.chunks.k[now][e], threadIdx.x % ACROSS);
#pragma unroll
                for (int r = 0; r < OWN_Q; ++r) {
#pragma unroll
                    for (int c = 0; c < OWN_K; ++c) sums[r][c] += absolute(qs[r] - ks[c]);
                }
            }
            if (!more || e0 % SUMMED == 0) {
#pragma unroll
                for (int n = 0; n < OWN_Q * OWN_K; ++n) {
                    scores[n / OWN_K][n % OWN_K] += sums[n / OWN_K][n % OWN_K];
                    sums[n / OWN_K][n % OWN_K] = 0;
                }
            }
            if (!more) break;
            q_next.put(tiles.chunks.q[now ^ 1]);  // was last read before the last barrier
            k_next.put(tiles.chunks.k[now ^ 1]);
            __syncthreads();  // the next chunk is there, and all are done with this one
        }

        const bool some = a.mask_kind != NO_MASK || j0 < all_first || j0 + TILE_K > all_end;  // keys are ruled out
        __syncthreads();  // all are done with the chunks, whose place the weights take
        if (some) rows.fetch_mask(tiles.weights, a, mask, i0, j0);
#pragma unroll
        for (int r = 0; r < OWN_Q; ++r) {
            apply_score(scores[r], a.score, a.scale, a.eps);
#pragma unroll
            for (int c = 0; c < OWN_K; ++c) {
                scores[r][c] = with_mask(scores[r][c], some ? tiles.weights[rows.query(r)][rows.key(c)] : 0);
            }
        }
        rows.add(scores, tiles.weights, factors);
        for (int part = 0; part < TILE_K; part += TILE_V) {
            if (part > 0) {
                __syncthreads();  // all are done with the last part
                Value::fetch(values, v + (j0 + part) * a.v.row_stride, a.v.row_stride, k_count - part, v_count);
            }
            wait_async();
            // In tensor cores infinity would meet what rounding took away, 0 perhaps.
            const bool simple = (!some && !TENSOR_CORES) || Value::finite(values);
            const bool fast = __syncthreads_and(simple);  // weights and v are there
            if (part == 0) outputs.scale(factors);
            if (fast) {
                outputs.add(tiles.weights, values, part);
            } else {
                outputs.add_exactly(tiles.weights, values, part);
            }
        }
        __syncthreads();  // all are done with the tile
    }

#pragma unroll
    for (int r = 0; r < OWN_Q; ++r) {
        Softmax softmax = rows.join(r);
        if (p.splits == 1) softmax.finish();
        if (threadIdx.x % ACROSS != 0) continue;
        factors[rows.query(r)] = (p.splits == 1 ? softmax.factor() : 1) / WEIGHT_SCALE;
        if (c0 == 0 && rows.query(r) < q_count) split.store(p, b, i0 + rows.query(r), softmax);
    }
    __syncthreads();  // one over each row's sum of weights is there
    outputs.scale(factors);
#pragma unroll
    for (int r = 0; r < Outputs::ROWS; ++r) {
        if (outputs.row(r) >= q_count) continue;
#pragma unroll
        for (int c = 0; c < Outputs::COLUMNS; ++c) {
            const int i = i0 + outputs.row(r), column = outputs.column(c);
            if (column < v_count) split.store(p, b, i, c0 + column, outputs.sum[r][c]);
        }
    }
}
