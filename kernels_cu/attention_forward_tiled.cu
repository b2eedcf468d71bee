// attention_forward_tiled.cu: fused L1 attention, forward; the default.
// Computes  out[b,i,c] = sum_j p[b,i,j] * v[b,j,c],  p = exp(s - max_j s) / sum_j exp(s - max_j s);  softmax[b,i] = both
//           s[b,i,j] = F(scale * sum_k |q[b,i,k] - k[b,j,k]|) + mask[b,i,j]
// Shapes    q (B,L,E)  k (B,S,E)  v (B,S,V)  mask (B,L,S)  out (B,L,V)  softmax (B,L,2); strides in elements, int64
// Tiling    BLOCK_Q queries and BLOCK_V channels of v per block; keys in tiles of TILE_K, E in chunks of BLOCK_E, v in
//           parts of TILE_V keys. A thread has OWN_Q x OWN_K scores of a tile, and outputs of the same queries
//           With p.splits > 1 a block takes a share of the keys, and attention_merge joins them: see struct Split
// Cost      2*B*L*S*E adds and B*L*S*V multiply-adds, the scores again for every BLOCK_V channels; memory linear in L
// Delta     like attention_forward_gather.cu, but tiles of q, k and v are reused, and the next chunk is on its way while
//           one is summed, also the first one of the next tile. Weights stay in the registers in which their scores were
//           summed: that is how tensor cores (from sm_80 on) take them, but for the order of keys, which is that of v then.
//           Tiles that causality or the window rules out are not computed. One order of summation: the same bits in every
//           run. Of bytes, four terms are one instruction, and their sum is exact, to be multiplied
//           by quant_scale (B,1,1) too; all else is float32
//
// Tensor cores take numbers of fewer bits: each float32 is two of them, what rounding takes away being the second. Of
// float16 there are too few small ones for that, so there weights are WEIGHT_SCALE times as large until the end.
//
// Blocks share the keys of a tile of queries where that makes no more than SPLIT_BLOCKS blocks: two for each of 132
// multiprocessors.
//
// @variant  op=attention_forward dtypes=f32 BLOCK_Q=128 TILE_K=32 TILE_V=32 BLOCK_E=32 BLOCK_V=64 STEP_V=16 THREADS=128 Q_CHUNKS=2 UNROLL=2 SHARED=55296 BLOCKS_PER_SM=2 SPLIT_BLOCKS=264 rank=20 max_v=64
// @variant  op=attention_forward dtypes=f32 BLOCK_Q=64 TILE_K=32 TILE_V=32 BLOCK_E=32 BLOCK_V=128 STEP_V=16 THREADS=128 Q_CHUNKS=4 UNROLL=2 SHARED=63488 BLOCKS_PER_SM=2 SPLIT_BLOCKS=264 rank=19
// @variant  op=attention_forward dtypes=f16,bf16 BLOCK_Q=128 TILE_K=32 TILE_V=32 BLOCK_E=32 BLOCK_V=64 STEP_V=16 THREADS=128 Q_CHUNKS=2 UNROLL=2 SHARED=51200 BLOCKS_PER_SM=2 SPLIT_BLOCKS=264 rank=20 max_v=64
// @variant  op=attention_forward dtypes=f16,bf16 BLOCK_Q=64 TILE_K=64 TILE_V=32 BLOCK_E=16 BLOCK_V=128 STEP_V=16 THREADS=128 Q_CHUNKS=8 UNROLL=2 SHARED=60416 BLOCKS_PER_SM=2 SPLIT_BLOCKS=264 rank=19
// @variant  op=attention_forward dtypes=f64 BLOCK_Q=64 TILE_K=32 TILE_V=32 BLOCK_E=8 BLOCK_V=32 STEP_V=16 THREADS=128 Q_CHUNKS=4 UNROLL=1 SHARED=34816 BLOCKS_PER_SM=2 SPLIT_BLOCKS=264 rank=20
// @variant  op=attention_forward dtypes=i8,u8 BLOCK_Q=128 TILE_K=32 TILE_V=32 BLOCK_E=64 BLOCK_V=64 STEP_V=16 THREADS=128 Q_CHUNKS=2 UNROLL=2 SHARED=34816 BLOCKS_PER_SM=2 SPLIT_BLOCKS=264 rank=20

const int WARPS = THREADS / 32, DOWN = 8, ACROSS = 4;  // threads of a warp along a column and a row of its scores
const int WARP_Q = BLOCK_Q / WARPS, OWN_Q = WARP_Q / DOWN, OWN_K = TILE_K / ACROSS, OWN_V = BLOCK_V / ACROSS;
const int GROUP_V = STEP_V / ACROSS;  // neighbours among the latter
const int STEP = GROUP_V / 2;  // channels of v whose sums tensor cores form at once
#if defined(L1ATTN_EMULATOR) || __CUDA_ARCH__ < 900
const bool KEYS_FIRST = false;
#else
const bool KEYS_FIRST = true;  // takes less registers there
#endif
const acc_t WEIGHT_SCALE = DTYPE == F16 ? 32768 : 1;
const acc_t SLACK = DTYPE == F16 ? 0 : 8;  // weights are exp(SLACK) at most
static_assert(THREADS % 32 == 0 && BLOCK_Q % (WARPS * DOWN) == 0, "all threads own as many queries");
static_assert(TILE_K % ACROSS == 0 && OWN_V % GROUP_V == 0, "threads own groups of neighbours");
static_assert(GROUP_V % VEC == 0 && BLOCK_E % SUMMED == 0, "shared memory is read 128 bits at a time");
static_assert(SPLIT_BLOCKS >= 1, "how far keys are split: see struct Split");
static_assert(TILE_K % TILE_V == 0 && TILE_V % (ACROSS * 4) == 0, "a tile is a whole number of parts");

typedef Converted<BLOCK_Q, BLOCK_E> Query;
typedef Converted<TILE_K, BLOCK_E> Key;
typedef Straight<TILE_V, BLOCK_V, 2 * (16 / sizeof(out_t)), out_t> Value;  // four rows of which a warp reads without conflicts

struct Memory {
    alignas(16) typename Query::Shared q_chunks[Q_CHUNKS];
    alignas(16) typename Key::Shared k_chunks[2];
    alignas(16) typename Value::Shared values;
};
static_assert(sizeof(Memory) <= SHARED, "SHARED bytes hold all of it");
typedef acc_t Scores[OWN_Q][OWN_K];

// Which of a tile a thread owns: its r-th query, its c-th key, its c-th channel of v. Keys and channels as thread t of a row.
__device__ __forceinline__ int query(int r) { return threadIdx.x / 32 * WARP_Q + r * DOWN + threadIdx.x % 32 / ACROSS; }
__device__ __forceinline__ int key(int c, int t) { return c * ACROSS + t; }
__device__ __forceinline__ int channel(int c, int t) { return c / GROUP_V * GROUP_V * ACROSS + t * GROUP_V + c % GROUP_V; }

#if BYTES
typedef unsigned Distances[OWN_Q][OWN_K];

// Adds |q - k| over the channels of a chunk.
__device__ __forceinline__ void sum_distances(Distances &sum, const typename Query::Shared &q, const typename Key::Shared &k) {
#pragma unroll UNROLL
    for (int e0 = 0; e0 < BLOCK_E; e0 += LOAD) {
        FourWords qs[OWN_Q];
#pragma unroll
        for (int r = 0; r < OWN_Q; ++r) qs[r] = *(const FourWords *)&q[query(r)][e0];
#pragma unroll
        for (int c = 0; c < OWN_K; ++c) {
            const FourWords ks = *(const FourWords *)&k[key(c, threadIdx.x % ACROSS)][e0];
#pragma unroll
            for (int r = 0; r < OWN_Q; ++r) {
#pragma unroll
                for (int n = 0; n < 4; ++n) sum[r][c] = add_byte_distance<DTYPE == I8>(sum[r][c], qs[r].at[n], ks.at[n]);
            }
        }
    }
}
#else
typedef Scores Distances;

// Adds |q - k| over the channels of a chunk.
__device__ __forceinline__ void sum_distances(Scores &sum, const typename Query::Shared &q, const typename Key::Shared &k) {
#pragma unroll UNROLL
    for (int e0 = 0; e0 < BLOCK_E; e0 += SUMMED) {
        acc_t qs[OWN_Q][SUMMED];
#pragma unroll
        for (int r = 0; r < OWN_Q; ++r) read<1>(qs[r], q[query(r)] + e0, 0);
#pragma unroll
        for (int c = 0; c < OWN_K; ++c) {
            acc_t ks[SUMMED];
            read<1>(ks, k[key(c, threadIdx.x % ACROSS)] + e0, 0);
#pragma unroll
            for (int r = 0; r < OWN_Q; ++r) sum[r][c] += distance(qs[r], ks);
        }
    }
}
#endif

// A thread's sums of weights * v.
struct Outputs {
    acc_t sum[OWN_Q][OWN_V];

    __device__ __forceinline__ void scale(int r, acc_t factor) {
#pragma unroll
        for (int c = 0; c < OWN_V; ++c) sum[r][c] *= factor;
    }
    // += weights[:, part:part+TILE_V] @ values, all numbers of which are finite or belong to keys that are not ruled out.
    __device__ __forceinline__ void add(Scores &weights, const typename Value::Shared &values, int part) {
#if !TENSOR_CORES
        add_by_key<false>(weights, values, part);
#else
        const int lane = threadIdx.x % 32, g = lane / ACROSS, t = lane % ACROSS;
#if DTYPE == F32 || BYTES
        // Of products of two numbers of two parts each, all but the smallest of the four. Tensor cores round sums down:
        // they add up the small products of 16 keys first, so that only the two sums after them are rounded noticeably.
        const int GROUPS = OWN_V / GROUP_V, FOURS = TILE_V / ACROSS / 4;  // of channels, and of a thread's keys
#pragma unroll
        for (int n = 0; n < GROUPS * FOURS; ++n) {
            const int j = (KEYS_FIRST ? n / GROUPS : n % FOURS) * 4;
            const int c = (KEYS_FIRST ? n % GROUPS : n / FOURS) * GROUP_V;
            unsigned w_high[2][OWN_Q / 2][4], w_low[2][OWN_Q / 2][4], v_high[2][STEP][2], v_low[2][STEP][2];
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                const int first = j + 2 * pair;
#pragma unroll
                for (int n = 0; n < 4 * (OWN_Q / 2); ++n) {
                    const Rounded w(weights[n / 4 * 2 + n % 2][part / ACROSS + first + n % 4 / 2]);
                    w_high[pair][n / 4][n % 4] = w.high, w_low[pair][n / 4][n % 4] = w.low;
                }
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    acc_t neighbours[STEP];
                    read<1>(neighbours, values[key(first + n, t)] + c * ACROSS, g);
#pragma unroll
                    for (int m = 0; m < STEP; ++m) {
                        const Rounded v(neighbours[m]);
                        v_high[pair][m][n] = v.high, v_low[pair][m][n] = v.low;
                    }
                }
            }
            acc_t some[OWN_Q][GROUP_V] = {};
#pragma unroll
            for (int product = 0; product < 6; ++product) {
                const int pair = product % 2;
                const auto &w = product < 2 ? w_low[pair] : w_high[pair];
                const auto &v = product / 2 == 1 ? v_low[pair] : v_high[pair];
#pragma unroll
                for (int m = 0; m < STEP; ++m) {
#pragma unroll
                    for (int n = 0; n < OWN_Q / 2; ++n) {
                        acc_t *up = some[2 * n] + m, *down = some[2 * n + 1] + m;
                        multiply_add(up[0], up[STEP], down[0], down[STEP], w[n], v[m][0], v[m][1]);
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < OWN_Q * GROUP_V; ++n) sum[n / GROUP_V][c + n % GROUP_V] += some[n / GROUP_V][n % GROUP_V];
        }
#else
#pragma unroll
        for (int j = 0; j < TILE_V / ACROSS; j += 4) {  // keys j up to j + 3 of each thread
            unsigned high[OWN_Q / 2][4], low[OWN_Q / 2][4];
#pragma unroll
            for (int n = 0; n < 4 * (OWN_Q / 2); ++n) {
                const acc_t *pair = &weights[n / 4 * 2 + n % 2][part / ACROSS + j + n % 4 / 2 * 2];
                const Rounded rounded(pair[0], pair[1]);
                high[n / 4][n % 4] = rounded.high, low[n / 4][n % 4] = rounded.low;
            }
#pragma unroll
            for (int c = 0; c < OWN_V; c += 4) {  // two products of 8 channels: the even ones of 16, and the odd
                unsigned v[4];                      // channels 2g and 2g + 1 of four keys
#pragma unroll
                for (int n = 0; n < 4; ++n) v[n] = *(const unsigned *)&values[key(j + n, t)][c * ACROSS + 2 * g];
#pragma unroll
                for (int odd = 0; odd < 2; ++odd) {
                    const int halves = odd ? 0x7632 : 0x5410;
                    const unsigned b0 = __byte_perm(v[0], v[1], halves), b1 = __byte_perm(v[2], v[3], halves);
#pragma unroll
                    for (int n = 0; n < OWN_Q / 2; ++n) {
                        acc_t *up = sum[2 * n] + c + odd, *down = sum[2 * n + 1] + c + odd;
                        multiply_add(up[0], up[2], down[0], down[2], low[n], b0, b1);
                        multiply_add(up[0], up[2], down[0], down[2], high[n], b0, b1);
                    }
                }
            }
        }
#endif
#endif
    }
    // The same key by key; EXACTLY: by the formula, whatever the values are: those of keys that are ruled out do not count.
    template <bool EXACTLY>
    __device__ __forceinline__ void add_by_key(const Scores &weights, const typename Value::Shared &values, int part) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int c = 0; c < TILE_V / ACROSS; ++c) {
#pragma unroll 1
            for (int t = 0; t < ACROSS; ++t) {
                const out_t *value = values[key(c, t)];
                acc_t weight[OWN_Q];
#pragma unroll
                for (int r = 0; r < OWN_Q; ++r) {
                    weight[r] = __shfl_sync(0xffffffff, weights[r][part / ACROSS + c], lane / ACROSS * ACROSS + t);
                }
#pragma unroll
                for (int n = 0; n < OWN_V; n += VEC) {
                    const Store v = *(const Store *)&value[channel(n, lane % ACROSS)];
#pragma unroll
                    for (int x = 0; x < VEC; ++x) {
#pragma unroll
                        for (int r = 0; r < OWN_Q; ++r) {
                            if (EXACTLY && is_ruled_out(weight[r])) continue;
                            sum[r][n + x] = multiply_add(weight[r], to_acc(v.at[x]), sum[r][n + x]);
                        }
                    }
                }
            }
        }
    }
};

// Distances of a tile become masked scores: -inf where the mask or their place rules keys out.
__device__ __forceinline__ void mask_scores(Scores &scores, const Attention &a, int b, int i0, int j0) {
    compute_again(b);
    const int64 mask = a.mask_kind == NO_MASK ? 0 : offset(a.mask, a.batch_shape, b);
#pragma unroll
    for (int r = 0; r < OWN_Q; ++r) {
        const int i = i0 + query(r), first = first_key(a, i), after = i < a.length_q ? end_of_keys(a, i) : 0;
#pragma unroll
        for (int c = 0; c < OWN_K; ++c) {
            const int j = j0 + key(c, threadIdx.x % ACROSS);
            const int64 place = mask + i * a.mask.row_stride + j * a.mask_column;
            scores[r][c] = j < first || j >= after ? -infinity() : masked_at(a, place, scores[r][c]);
        }
    }
}

// A thread's part of the softmax of its queries. `total` is of this thread's keys alone until join(). `largest` is less than
// the largest score by SLACK at most: while that holds, sums need not be scaled.
struct Rows {
    acc_t largest[OWN_Q], total[OWN_Q];

    // Masked scores of one more tile become weights, of which SOME may be of keys that are ruled out.
    template <bool SOME>
    __device__ __forceinline__ void add(Scores &scores, Outputs &outputs) {
        acc_t factors[OWN_Q];
        bool more = false;
#pragma unroll
        for (int r = 0; r < OWN_Q; ++r) {
            acc_t most = scores[r][0];
#pragma unroll
            for (int c = 1; c < OWN_K; ++c) most = max(most, scores[r][c]);
#pragma unroll
            for (int step = 1; step < ACROSS; step *= 2) most = max(most, __shfl_xor_sync(0xffffffff, most, step));
            most = most > largest[r] + SLACK ? most : largest[r];
            const acc_t subtracted = most == -infinity() ? 0 : most;  // no key so far: 0, not NaN
            factors[r] = quick_exponential(largest[r] - subtracted);
            more = more || most != largest[r];
            largest[r] = most;
            acc_t sum = 0;
#pragma unroll
            for (int c = 0; c < OWN_K; ++c) {
                const acc_t weight = quick_exponential(scores[r][c] - subtracted) * WEIGHT_SCALE;
                sum += weight;
                scores[r][c] = SOME && scores[r][c] == -infinity() ? ruled_out() : weight;
            }
            total[r] = total[r] * factors[r] + sum;
        }
        if (!__any_sync(0xffffffff, more)) return;  // all factors are 1
#pragma unroll
        for (int r = 0; r < OWN_Q; ++r) outputs.scale(r, factors[r]);
    }
    // All parts of each row together.
    __device__ __forceinline__ Softmax join(int r) const {
        Softmax softmax = {largest[r], total[r]};
#pragma unroll
        for (int step = 1; step < ACROSS; step *= 2) softmax.total += __shfl_xor_sync(0xffffffff, softmax.total, step);
        softmax.total /= WEIGHT_SCALE;
        return softmax;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) attention_forward(const AttentionForward p) {
    const Attention &a = p.a;
    const unsigned v_blocks = max(1, ceil_div(a.channels_v, BLOCK_V)), q_blocks = ceil_div(a.length_q, BLOCK_Q);
    const Split split(p);
    const unsigned tile = split.block / v_blocks, b = tile / q_blocks;
    const int c0 = (split.block - tile * v_blocks) * BLOCK_V;
    const int i0 = (q_blocks - 1 - (tile - b * q_blocks)) * BLOCK_Q;  // causal: the longest first
    const int q_count = min(a.length_q - i0, BLOCK_Q), v_count = min(a.channels_v - c0, BLOCK_V);
    const scalar_t *q = matrix(a.q, a.batch_shape, b) + i0 * a.q.row_stride;  // q[b, i0:i0+BLOCK_Q, :]
    const scalar_t *k = matrix(a.k, a.batch_shape, b);
    const out_t *v = matrix<out_t>(a.v, a.batch_shape, b) + c0;

    extern __shared__ int4 memory[];
    Memory &shared = *(Memory *)memory;
    auto &q_chunks = shared.q_chunks;
    auto &k_chunks = shared.k_chunks;
    auto &values = shared.values;
    Query q_next;
    Key k_next;
    Outputs outputs = {};
    Rows rows;
#pragma unroll
    for (int r = 0; r < OWN_Q; ++r) rows.largest[r] = -infinity(), rows.total[r] = 0;

    // Keys that all queries of the tile attend to, by their place; those from `first` up to `end` some of them.
    const int all_first = first_key(a, i0 + q_count - 1), all_end = end_of_keys(a, i0);
    int first = first_key(a, i0), end = end_of_keys(a, i0 + q_count - 1);
    split.narrow(first, end, TILE_K, p.splits);
    const bool resident = a.channels <= Q_CHUNKS * BLOCK_E;  // all of q is in shared memory
    const auto place = [&](int now, int e0) { return resident ? e0 / BLOCK_E : now; };  // of a chunk of q
    const auto fetch = [&](int now, int j0, int e0) {  // chunk e0 of the tile of keys j0
        const scalar_t *q_from = q, *k_from = k;  // what is the same for all tiles would take registers from the sums
        int64 q_stride = a.q.row_stride, k_stride = a.k.row_stride;
        compute_again(q_from, q_stride);
        compute_again(k_from, k_stride);
        if (!resident || j0 == first) {
            q_next.fetch(q_chunks[place(now, e0)], q_from + e0, q_stride, q_count, a.channels - e0);
        }
        k_next.fetch(k_chunks[now], k_from + j0 * k_stride + e0, k_stride, a.length_k - j0, a.channels - e0);
    };
    const auto put = [&](int now, int j0, int e0) {
        if (!resident || j0 == first) q_next.put(q_chunks[place(now, e0)]);
        k_next.put(k_chunks[now]);
    };
    const auto fetch_values = [&](int j) {  // from row j on
        const out_t *v_from = v;
        int64 v_stride = a.v.row_stride;
        compute_again(v_from, v_stride);
        Value::fetch(values, v_from + j * v_stride, v_stride, a.length_k - j, v_count);
    };
    const auto values_are_there = [&] {  // and whether all of them are finite
        wait_async();
        return __syncthreads_and(Value::finite(values));  // the values are there, and the next chunk
    };
    if (first < end) {
        fetch(0, first, 0);
        put(0, first, 0);
    }
    __syncthreads();  // the first chunk is there
    for (int j0 = first, now = 0; j0 < end; j0 += TILE_K) {
        // All are done with the former values since the last barrier.
        fetch_values(j0);
        Distances distances = {};
        bool fast = false;
        for (int e0 = 0;; e0 += BLOCK_E) {
            const bool last = e0 + BLOCK_E >= a.channels;
            if (!last) {  // the next chunk is on the way while the sums below are formed
                fetch(now ^ 1, j0, e0 + BLOCK_E);
            } else if (j0 + TILE_K < end) {
                fetch(now ^ 1, j0 + TILE_K, 0);
            }
            sum_distances(distances, q_chunks[place(now, e0)], k_chunks[now]);
            if (last && e0 > 0) break;
            if (!last) put(now ^ 1, j0, e0 + BLOCK_E);
            if (e0 == 0) fast = values_are_there();
            if (last) break;
            if (e0 > 0) __syncthreads();  // the next chunk is there, and all are done with this one
            now ^= 1;
        }

#if BYTES
        Scores scores;
#pragma unroll
        for (int n = 0; n < OWN_Q * OWN_K; ++n) {
            scores[n / OWN_K][n % OWN_K] = __uint2float_rn(distances[n / OWN_K][n % OWN_K]);
        }
        const acc_t scale = p.quant_scale.data ? a.scale * *accumulated(p.quant_scale, a.batch_shape, b) : (acc_t)a.scale;
#else
        Scores &scores = distances;
        const Number &scale = a.scale;
#endif
        apply_score((acc_t(&)[OWN_Q * OWN_K])scores, a.score, scale, a.eps);
        if (a.mask_kind != NO_MASK || j0 < all_first || j0 + TILE_K > all_end) {  // keys are ruled out
            mask_scores(scores, a, b, i0, j0);
            rows.template add<true>(scores, outputs);
        } else {
            if (a.score == NEGATIVE) {
#pragma unroll
                for (int n = 0; n < OWN_Q * OWN_K; ++n) {
                    acc_t &score = scores[n / OWN_K][n % OWN_K];
                    score = score == -infinity() ? FARTHEST : score;
                }
            }
            rows.template add<false>(scores, outputs);
        }
#pragma unroll
        for (int part = 0; part < TILE_K; part += TILE_V) {
            if (part > 0) {
                __syncthreads();  // all are done with the last part
                fetch_values(j0 + part);
                fast = values_are_there();
            }
            if (fast) {
                outputs.add(scores, values, part);
            } else {
                outputs.template add_by_key<true>(scores, values, part);
            }
        }
        if (j0 + TILE_K < end) put(now ^ 1, j0 + TILE_K, 0);
        __syncthreads();  // the next tile's first chunk is there, and all are done with this tile
        now ^= 1;
    }

    const int64 out = offset(p.out, a.batch_shape, b) + c0;
#pragma unroll
    for (int r = 0; r < OWN_Q; ++r) {
        Softmax softmax = rows.join(r);
        if (p.splits == 1) softmax.finish();
        outputs.scale(r, (p.splits == 1 ? softmax.factor() : 1) / WEIGHT_SCALE);
        if (query(r) >= q_count) continue;
        const int i = i0 + query(r);
        if (c0 == 0 && threadIdx.x % ACROSS == 0) split.store(p, b, i, softmax);
#pragma unroll
        for (int c = 0; c < OWN_V; c += GROUP_V) {
            const int column = channel(c, threadIdx.x % ACROSS);
            split.template store<GROUP_V>(p, out, i, column, outputs.sum[r] + c, v_count - column);
        }
    }
}
