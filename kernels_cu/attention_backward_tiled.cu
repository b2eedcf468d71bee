// attention_backward_tiled.cu: gradients of fused L1 attention; the default.
// Computes  p = exp(s - largest) / total,  ds = p * (sum_c grad[i,c] * v[j,c] - delta[i]),  h = ds * F'(x) * scale
//           dx[i,e] = sum_j h[i,j] * sign(x[i,e] - y[j,e]) for (q, k), or for (k, q); then also dv[j,c] = sum_i p * grad
// Shapes    q (B,L,E)  k (B,S,E)  v (B,S,V)  mask (B,L,S)  grad (B,L,V)  softmax (B,L,2)  delta (B,L)
//           dx, dxv as q, or as k and v; strides in elements, int64
// Tiling    BLOCK_X rows of x and BLOCK_E channels, of dx or of dv, per block; rows of y in tiles of TILE_Y, their scores
//           and grad @ v as in scores_forward_tiled.cu, then ROWS x CHANNELS gradients per thread
// Cost      B*L*S*(2*E + V) operations for scores and ds, or 2*E for p, for every BLOCK_E channels; 3*B*L*S*E for each dx
//           and B*L*S*V for dv
// Delta     like attention_backward_gather.cu, but scores and h of a tile are shared and reused, and signs take three
//           instructions as in scores_backward_tiled.cu. Tiles that causality or the window rules out are not computed.
//           No atomics, one order of summation: the same bits in every run
//
// That way of taking signs loses, in a channel where rows tie, what is small beside their h. Here h is as uneven as a
// softmax can be. So a tile in which one |h| is above 1 / EVEN_SHARE of its row's takes signs in four instructions, which
// lose nothing, and one with what is not finite by comparison.
//
// @variant  op=attention_backward dtypes=f32,f16,bf16 BLOCK_X=64 TILE_Y=32 BLOCK_E=64 WIDTH=16 ROWS=8 CHANNELS=4 THREADS=128 BLOCKS_PER_SM=2,3 rank=20
// @variant  op=attention_backward dtypes=f64 BLOCK_X=32 TILE_Y=32 BLOCK_E=32 WIDTH=8 ROWS=4 CHANNELS=2 THREADS=128 BLOCKS_PER_SM=2 rank=20

const int ACROSS = 8, DOWN = THREADS / ACROSS;              // threads along a row and a column of a tile of scores
const int OWN_X = BLOCK_X / DOWN, OWN_Y = TILE_Y / ACROSS;  // scores of a thread
const int ALONG = BLOCK_E / CHANNELS, BELOW = BLOCK_X / ROWS;  // threads along the channels and the rows of gradients
static_assert(OWN_X % VEC == 0 && OWN_Y % VEC == 0, "a thread reads its rows and columns 128 bits at a time");
static_assert(BLOCK_X % DOWN == 0 && TILE_Y % ACROSS == 0, "all threads own as many scores");
static_assert(ALONG * BELOW == THREADS, "every thread owns ROWS x CHANNELS gradients");
static_assert(ROWS % VEC == 0 && CHANNELS % VEC == 0, "a thread reads its rows and channels 128 bits at a time");
const int EVEN_SHARE = 8;
const int SUMMED = 32;  // channels after which a new sum is begun: exp makes absolute errors of a score relative ones
const int TILES_SUMMED = 8;  // after so many the sums of gradients, too, begin anew
static_assert(BLOCK_X <= THREADS && TILE_Y <= THREADS, "a thread adds up the h of one row, and fetches one query");

typedef acc_t Factors[TILE_Y][BLOCK_X + VEC];  // h, or weights: factors[y][x]
typedef Straight<TILE_Y, BLOCK_E> Y;
struct Chunks {  // channels of x and y, and those after them
    typename Transposed<BLOCK_X, WIDTH>::Shared x[2];
    typename Transposed<TILE_Y, WIDTH>::Shared y[2];
};
struct Queries {  // of a tile, what backward starts from
    acc_t largest[BLOCK_X > TILE_Y ? BLOCK_X : TILE_Y], factor[BLOCK_X > TILE_Y ? BLOCK_X : TILE_Y];
    acc_t delta[BLOCK_X > TILE_Y ? BLOCK_X : TILE_Y];
};
struct Side {  // rows of a matrix, from the first of a tile on
    const scalar_t *rows;
    int64 stride;
};
__device__ __forceinline__ Side side(const Matrix &m, const Attention &a, int b, int first) {
    return {matrix(m, a.batch_shape, b) + first * m.row_stride, m.row_stride};
}

// Offset in the tile of a thread's n-th row or column: groups of VEC neighbours, `apart` * VEC apart.
__device__ __forceinline__ int place(int n, int thread, int apart) { return n / VEC * VEC * apart + thread * VEC + n % VEC; }

// sum |x - y|, or sum x * y, over all channels, for the OWN_X x OWN_Y pairs of a thread. `ready` runs when the first
// chunk is there.
template <bool DISTANCE_OF, typename Ready>
__device__ __forceinline__ void sum_channels(acc_t (&sum)[OWN_X][OWN_Y], Chunks &chunks, Side x, int x_count, Side y,
                                             int y_count, int channels, Ready ready) {
    const bool whole = x_count >= BLOCK_X && y_count >= TILE_Y && channels % WIDTH == 0 && channels > 0 &&
                       aligned_rows(x.rows, x.stride) && aligned_rows(y.rows, y.stride);
    compute_again(x.rows, x.stride);  // addresses that are the same for all tiles would take registers from the sums
    compute_again(y.rows, y.stride);
    Transposed<BLOCK_X, WIDTH> x_next;
    Transposed<TILE_Y, WIDTH> y_next;
    acc_t part[OWN_X][OWN_Y];
#pragma unroll
    for (int n = 0; n < OWN_X * OWN_Y; ++n) sum[n / OWN_Y][n % OWN_Y] = part[n / OWN_Y][n % OWN_Y] = 0;
    x_next.fetch(chunks.x[0], x.rows, x.stride, x_count, channels, whole);
    y_next.fetch(chunks.y[0], y.rows, y.stride, y_count, channels, whole);
    x_next.put(chunks.x[0]);
    y_next.put(chunks.y[0]);
    __syncthreads();  // the first chunk is there
    ready();
    for (int e0 = WIDTH, now = 0;; e0 += WIDTH, now ^= 1) {
        const bool more = e0 < channels;
        if (more) {  // the next chunk is on the way while the sums below are formed
            x_next.fetch(chunks.x[now ^ 1], x.rows + e0, x.stride, x_count, channels - e0, whole);
            y_next.fetch(chunks.y[now ^ 1], y.rows + e0, y.stride, y_count, channels - e0, whole);
        }
#pragma unroll 4
        for (int e = 0; e < WIDTH; ++e) {
            acc_t xs[OWN_X], ys[OWN_Y];
            read<DOWN>(xs, chunks.x[now][e], threadIdx.x / ACROSS);
            read<ACROSS>(ys, chunks.y[now][e], threadIdx.x % ACROSS);
#pragma unroll
            for (int r = 0; r < OWN_X; ++r) {
#pragma unroll
                for (int c = 0; c < OWN_Y; ++c) {
                    if (DISTANCE_OF) {
                        part[r][c] += absolute(xs[r] - ys[c]);
                    } else {
                        sum[r][c] = multiply_add(xs[r], ys[c], sum[r][c]);
                    }
                }
            }
        }
        if (DISTANCE_OF && (!more || e0 % SUMMED == 0)) {
#pragma unroll
            for (int n = 0; n < OWN_X * OWN_Y; ++n) {
                sum[n / OWN_Y][n % OWN_Y] += part[n / OWN_Y][n % OWN_Y];
                part[n / OWN_Y][n % OWN_Y] = 0;
            }
        }
        if (!more) break;
        x_next.put(chunks.x[now ^ 1]);  // was last read before the last barrier
        y_next.put(chunks.y[now ^ 1]);
        __syncthreads();  // the next chunk is there, and all are done with this one
    }
}

// A thread's numbers of one row of y.
__device__ __forceinline__ void read_row(acc_t (&mine)[CHANNELS], const scalar_t *row) {
#pragma unroll
    for (int c = 0; c < CHANNELS; c += VEC) {
        const Store numbers = *(const Store *)&row[place(c, threadIdx.x % ALONG, ALONG)];
#pragma unroll
        for (int n = 0; n < VEC; ++n) mine[c + n] = to_acc(numbers.at[n]);
    }
}

// A thread's numbers of the rows of x whose gradients it has; zeros where there are none.
__device__ __forceinline__ void load_x(acc_t (&x)[ROWS][CHANNELS], Side side, int e0, int rows, int channels) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int i = place(r, threadIdx.x / ALONG, BELOW);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const int e = place(c, threadIdx.x % ALONG, ALONG);
            x[r][c] = i < rows && e < channels ? to_acc(side.rows[i * side.stride + e0 + e]) : 0;
        }
    }
}

// What may be done with a tile: signs by half_step with their -1/2 left to the sum of h, or not left; or by comparison.
enum Way { EVEN, UNEVEN, ANY };

// One tile to the sums of dv, or to half those of dx. In the way EVEN these lack minus half the sum of h.
__device__ __forceinline__ void add_tile(acc_t (&sum)[ROWS][CHANNELS], const acc_t (&x)[ROWS][CHANNELS],
                                         const Factors &factors, const typename Y::Shared &y_rows, bool of_v, Way way) {
    const int below = threadIdx.x / ALONG;
    acc_t hs[ROWS], ys[CHANNELS];
    if (way == ANY) {
#pragma unroll 1
        for (int j = 0; j < TILE_Y; ++j) {
            read<BELOW>(hs, factors[j], below);
            read_row(ys, y_rows[j]);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (of_v && is_ruled_out(hs[r])) continue;
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) {
                    sum[r][c] += of_v ? hs[r] * ys[c] : hs[r] / 2 * sign(x[r][c] - ys[c]);
                }
            }
        }
    } else if (of_v) {
#pragma unroll 4
        for (int j = 0; j < TILE_Y; ++j) {
            read<BELOW>(hs, factors[j], below);
            read_row(ys, y_rows[j]);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) sum[r][c] = multiply_add(hs[r], ys[c], sum[r][c]);
            }
        }
    } else if (way == EVEN) {
#pragma unroll 2
        for (int j = 0; j < TILE_Y; ++j) {
            read<BELOW>(hs, factors[j], below);
            read_row(ys, y_rows[j]);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) sum[r][c] = multiply_add(half_step(x[r][c] - ys[c]), hs[r], sum[r][c]);
            }
        }
    } else {
#pragma unroll 1
        for (int j = 0; j < TILE_Y; ++j) {
            read<BELOW>(hs, factors[j], below);
            read_row(ys, y_rows[j]);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) {
                    const acc_t half_sign = half_step(x[r][c] - ys[c]) - (acc_t)0.5;
                    sum[r][c] = multiply_add(half_sign, hs[r], sum[r][c]);
                }
            }
        }
    }
}

// A thread's sums to its totals; they begin anew. A longer chain of sums would round more than the formula in float32 does.
__device__ __forceinline__ void add_to_totals(acc_t (&totals)[ROWS * CHANNELS][THREADS], acc_t (&sum)[ROWS][CHANNELS]) {
#pragma unroll
    for (int n = 0; n < ROWS * CHANNELS; ++n) {
        totals[n][threadIdx.x] += sum[n / CHANNELS][n % CHANNELS];
        sum[n / CHANNELS][n % CHANNELS] = 0;
    }
}

// Query `first` + threadIdx.x of a batch entry, one of a tile.
__device__ __forceinline__ void fetch_query(Queries &queries, const AttentionSaved &p, int b, int i, int count) {
    if (threadIdx.x >= count) return;
    const bool exists = i < p.a.length_q;
    Softmax softmax = {0, 0};
    if (exists) softmax.load(p.a, b, i);
    queries.largest[threadIdx.x] = softmax.largest;
    queries.factor[threadIdx.x] = softmax.factor();
    queries.delta[threadIdx.x] = exists ? accumulated(p.delta, p.a.batch_shape, b)[i * p.delta.row_stride] : 0;
}

// What the mask adds to this thread's scores, -inf where it or their place rules pairs out, to where their factors will be.
// There are not the registers to hold it.
__device__ __forceinline__ void fetch_mask(Factors &added, const Attention &a, int64 mask, bool of_key, int x0, int y0) {
#pragma unroll 1
    for (int r = 0; r < OWN_X; ++r) {
        const int x_place = place(r, threadIdx.x / ACROSS, DOWN), x = x0 + x_place;
        const int first = of_key ? first_query(a, x) : first_key(a, x);
        const int after = x >= (of_key ? a.length_k : a.length_q) ? 0 : of_key ? end_of_queries(a, x) : end_of_keys(a, x);
#pragma unroll
        for (int c = 0; c < OWN_Y; ++c) {
            const int y_place = place(c, threadIdx.x % ACROSS, ACROSS), y = y0 + y_place;
            const int64 at = mask + (of_key ? y : x) * a.mask.row_stride + (of_key ? x : y) * a.mask_column;
            added[y_place][x_place] = y < first || y >= after ? -infinity() : masked_at(a, at, 0);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) attention_backward(const AttentionBackward p) {
    const Attention &a = p.s.a;
    const bool of_key = p.of_key;
    const unsigned x_parts = ceil_div(a.channels, BLOCK_E), parts = x_parts + (of_key ? ceil_div(a.channels_v, BLOCK_E) : 0);
    const int length_x = of_key ? a.length_k : a.length_q;
    const unsigned x_blocks = ceil_div(length_x, BLOCK_X), tile = blockIdx.x / parts, kept = tile / x_blocks;
    const unsigned part = blockIdx.x - tile * parts, x_block = tile - kept * x_blocks;
    const bool of_v = part >= x_parts;
    if (!(of_v ? p.dxv.data : p.dx.data)) return;  // the same for the whole block
    const int e0 = (of_v ? part - x_parts : part) * BLOCK_E, entry = kept * p.s.summed;
    const int channels = min(BLOCK_E, (of_v ? a.channels_v : a.channels) - e0);
    const int x0 = (of_key ? x_block : x_blocks - 1 - x_block) * BLOCK_X;  // causal: the longest first
    const int x_count = min(BLOCK_X, length_x - x0), x_last = x0 + x_count - 1;

    __shared__ alignas(16) union {  // first the one, then the other
        Chunks chunks;
        Factors factors;
    } tiles;
    __shared__ alignas(16) typename Y::Shared y_rows;
    __shared__ Queries queries;
    __shared__ acc_t totals[ROWS * CHANNELS][THREADS];  // of this thread, sums of TILES_SUMMED tiles
    const int below = threadIdx.x / ALONG, along = threadIdx.x % ALONG;
    acc_t sum[ROWS][CHANNELS] = {}, h_sum = 0, h_total = 0;  // of h those of row threadIdx.x of the tile
#pragma unroll
    for (int n = 0; n < ROWS * CHANNELS; ++n) totals[n][threadIdx.x] = 0;

    acc_t x[ROWS][CHANNELS];
    bool x_finite = true;
    load_x(x, of_key ? side(a.k, a, entry, x0) : side(a.q, a, entry, x0), e0, x_count, of_v ? 0 : channels);
#pragma unroll
    for (int n = 0; n < ROWS * CHANNELS; ++n) x_finite = x_finite && finite(x[n / CHANNELS][n % CHANNELS]);

    // Rows of y that all rows of x are paired with; those from y0 up to `end` with some of them.
    const int all_first = of_key ? first_query(a, x_last) : first_key(a, x_last);
    const int all_end = of_key ? end_of_queries(a, x0) : end_of_keys(a, x0);
    const int end = of_key ? end_of_queries(a, x_last) : end_of_keys(a, x_last);
    const Derivative f(a.score, a.scale, a.eps);
    int tiles_left = TILES_SUMMED;
    for (int b = entry; b < entry + p.s.summed; ++b) {
        const int64 mask = a.mask_kind == NO_MASK ? 0 : offset(a.mask, a.batch_shape, b);
        int y0 = of_key ? first_query(a, x0) : first_key(a, x0);
        const Side q = side(a.q, a, b, of_key ? y0 : x0), k = side(a.k, a, b, of_key ? x0 : y0);
        const Side grad = side(p.s.grad, a, b, of_key ? y0 : x0), v = side(a.v, a, b, of_key ? x0 : y0);
        const Side x_side = of_key ? k : q, x2_side = of_key ? v : grad;
        Side y_side = of_key ? q : k, y2_side = of_key ? grad : v;
        for (; y0 < end; y0 += TILE_Y) {
            const int y_count = (of_key ? a.length_q : a.length_k) - y0;
            acc_t scores[OWN_X][OWN_Y];
            fetch_query(queries, p.s, b, (of_key ? y0 : x0) + threadIdx.x, of_key ? TILE_Y : BLOCK_X);
            sum_channels<true>(scores, tiles.chunks, x_side, x_count, y_side, y_count, a.channels, [&] {
                const Side rows = of_v ? y2_side : y_side;
                Y::fetch(y_rows, rows.rows + e0, rows.stride, y_count, channels);
            });
            const bool some = a.mask_kind != NO_MASK || y0 < all_first || y0 + TILE_Y > all_end || x_count < BLOCK_X;
            bool simple = true, even = true;
            __syncthreads();  // all are done with the chunks, whose place others take
            if (some) fetch_mask(tiles.factors, a, mask, of_key, x0, y0);
#pragma unroll
            for (int r = 0; r < OWN_X; ++r) {  // scores become weights, times the derivative for dx
                apply_score(scores[r], a.score, a.scale, a.eps);
#pragma unroll
                for (int c = 0; c < OWN_Y; ++c) {
                    const int x_place = place(r, threadIdx.x / ACROSS, DOWN), y_place = place(c, threadIdx.x % ACROSS, ACROSS);
                    const int query = of_key ? y_place : x_place;
                    const acc_t score = scores[r][c], shifted = with_mask(score, some ? tiles.factors[y_place][x_place] : 0);
                    const acc_t weight = quick_exponential(shifted - queries.largest[query]) * queries.factor[query];
                    // Adding 0 makes 0 of -0, which stands for keys that are ruled out.
                    const acc_t factor = of_v ? weight : multiply_add(weight, f(score), 0);
                    scores[r][c] = shifted == -infinity() ? ruled_out() : factor;
                }
            }
            __syncthreads();  // all have read what the mask adds
            if (!of_v) {
                acc_t products[OWN_X][OWN_Y];
                sum_channels<false>(products, tiles.chunks, x2_side, x_count, y2_side, y_count, a.channels_v, [] {});
#pragma unroll
                for (int r = 0; r < OWN_X; ++r) {
                    acc_t of_row = 0, most = 0;
#pragma unroll
                    for (int c = 0; c < OWN_Y; ++c) {
                        const int x_place = place(r, threadIdx.x / ACROSS, DOWN);
                        const int query = of_key ? place(c, threadIdx.x % ACROSS, ACROSS) : x_place;
                        const acc_t h = scores[r][c] * (products[r][c] - queries.delta[query]);
                        scores[r][c] = is_ruled_out(scores[r][c]) ? 0 : h;
                        of_row += absolute(scores[r][c]);
                        most = max(most, absolute(scores[r][c]));
                    }
#pragma unroll
                    for (int step = 1; step < ACROSS; step *= 2) of_row += __shfl_xor_sync(0xffffffff, of_row, step);
                    simple = simple && of_row < LARGE;
                    even = even && most * EVEN_SHARE <= of_row;
                }
                even = __syncthreads_and(even);  // all are done with these chunks
            }
#pragma unroll
            for (int c = 0; c < OWN_Y; ++c) {
#pragma unroll
                for (int r = 0; r < OWN_X; r += VEC) {
                    Vec group;
#pragma unroll
                    for (int n = 0; n < VEC; ++n) group.at[n] = scores[r + n][c];
                    const int y_place = place(c, threadIdx.x % ACROSS, ACROSS);
                    *(Vec *)&tiles.factors[y_place][place(r, threadIdx.x / ACROSS, DOWN)] = group;
                }
            }
            wait_async();
            simple = of_v ? !some || Y::finite(y_rows) : simple && x_finite && Y::finite(y_rows);
            const bool fast = __syncthreads_and(simple);  // the factors are there, and the rows of y
            const Way way = !fast ? ANY : even ? EVEN : UNEVEN;
            if (!of_v && way == EVEN && threadIdx.x < BLOCK_X) {
                for (int j = 0; j < TILE_Y; ++j) h_sum += tiles.factors[j][threadIdx.x];
            }
            add_tile(sum, x, tiles.factors, y_rows, of_v, way);
            if (--tiles_left == 0) {
                add_to_totals(totals, sum);
                h_total += h_sum;
                h_sum = 0;
                tiles_left = TILES_SUMMED;
            }
            __syncthreads();  // all are done with the tile
            y_side.rows += TILE_Y * y_side.stride;
            y2_side.rows += TILE_Y * y2_side.stride;
        }
    }

    acc_t *h_sums = tiles.factors[0];
    if (threadIdx.x < BLOCK_X) h_sums[threadIdx.x] = h_total + h_sum;
    __syncthreads();  // the sums of h are there
    const Side result = of_v ? side(p.dxv, a, entry, x0) : side(p.dx, a, entry, x0);
    scalar_t *dx = (scalar_t *)result.rows + e0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int i = place(r, below, BELOW);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const int e = place(c, along, ALONG);
            const acc_t total = totals[r * CHANNELS + c][threadIdx.x] + sum[r][c];
            const acc_t gradient = of_v ? total : 2 * total - h_sums[i];
            if (i < x_count && e < channels) dx[i * result.stride + e] = to_scalar(gradient);
        }
    }
}
