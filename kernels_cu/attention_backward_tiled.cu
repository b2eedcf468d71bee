// attention_backward_tiled.cu: gradients of fused L1 attention; the default.
// Computes  p = exp(s - largest) / total,  ds = p * (sum_c grad[i,c] * v[j,c] - delta[i]),  h = ds * F'(x) * scale
//           dx[i,e] = sum_j h[i,j] * sign(x[i,e] - y[j,e]) for (q, k), or for (k, q); then also dv[j,c] = sum_i p * grad
// Shapes    q (B,L,E)  k (B,S,E)  v (B,S,V)  mask (B,L,S)  grad (B,L,V)  softmax (B,L,2)  delta (B,L)
//           dx, dxv as q, or as k and v; strides in elements, int64
// Tiling    BLOCK_X rows of x and BLOCK_E channels of dx, and of dv, per block; rows of y in tiles of TILE_Y. A warp has
//           a quarter of a tile's scores and of dv, a thread ROWS x CHANNELS of dx
// Cost      for every BLOCK_E channels B*L*S*(2*E + V) operations for scores and ds; 3*B*L*S*E for each dx, B*L*S*V for dv
// Delta     like attention_backward_gather.cu, but scores and h of a tile are shared and reused, signs take three
//           instructions as in scores_backward_tiled.cu, and tensor cores (from sm_80 on) form the products of matrices.
//           Tiles that causality or the window rules out are not computed. No atomics, one order of summation: the same
//           bits in every run
//
// That way of taking signs loses, in a channel where rows tie, what is small beside their h. Here h is as uneven as a
// softmax can be. So a tile in which one |h| is above 1 / EVEN_SHARE of its row's so far takes signs in four instructions,
// which lose nothing, and one with what is not finite by comparison.
//
// @variant  op=attention_backward dtypes=f32,f16,bf16 BLOCK_X=64 TILE_Y=64 BLOCK_E=64 ROWS=8 CHANNELS=4 THREADS=128 BLOCKS_PER_SM=2 rank=20
// @variant  op=attention_backward dtypes=f64 BLOCK_X=32 TILE_Y=32 BLOCK_E=32 ROWS=4 CHANNELS=2 THREADS=128 BLOCKS_PER_SM=2 rank=20

// Lanes of a warp along a column and a row of its quarter of a tile, as tensor cores have them; and warps.
const int DOWN = 8, ACROSS = 4, WARPS_DOWN = 2, WARPS_ACROSS = THREADS / 32 / WARPS_DOWN;
const int OWN_X = BLOCK_X / DOWN / WARPS_DOWN, OWN_Y = TILE_Y / ACROSS / WARPS_ACROSS;  // scores of a thread
const int OWN_V = BLOCK_E / ACROSS / WARPS_ACROSS;                                      // channels of dv of a thread
const int ALONG = BLOCK_E / CHANNELS, BELOW = BLOCK_X / ROWS;  // threads along the channels and the rows of dx
static_assert(OWN_X == VEC && OWN_Y % VEC == 0 && OWN_V % 2 == 0, "a thread reads scores 128 bits at a time");
static_assert(ALONG * BELOW == THREADS, "every thread owns ROWS x CHANNELS gradients");
static_assert(ROWS % VEC == 0 && TILE_Y % VEC == 0, "a thread reads rows of x, and of y, 128 bits at a time");
static_assert(BLOCK_X <= THREADS && TILE_Y <= THREADS, "a thread fetches one query, and adds up the h of one row");
const int EVEN_SHARE = 8;
const acc_t WEIGHT_SCALE = DTYPE == F16 ? 32768 : 1;  // of weights for tensor cores: float16 has few small numbers

typedef acc_t XRows[BLOCK_E][BLOCK_X + VEC];    // channels of the rows of x: [e][x]
typedef acc_t YRows[BLOCK_E][TILE_Y + VEC];
typedef acc_t Factors[TILE_Y][BLOCK_X + VEC];  // weights, then h: [y][x]
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

// Offset in the tile of a thread's n-th row or channel: groups of VEC neighbours, `apart` * VEC apart.
__device__ __forceinline__ int place(int n, int thread, int apart) { return n / VEC * VEC * apart + thread * VEC + n % VEC; }
// Of scores of a thread, and its channels of dv, the place in the tile.
__device__ __forceinline__ int x_place(int thread, int r) {
    return thread / 32 / WARPS_ACROSS * (BLOCK_X / WARPS_DOWN) + place(r, thread % 32 / ACROSS, DOWN);
}
__device__ __forceinline__ int y_place(int thread, int c) {
    return thread / 32 % WARPS_ACROSS * (TILE_Y / WARPS_ACROSS) + place(c, thread % ACROSS, ACROSS);
}
__device__ __forceinline__ int v_place(int thread, int c) {
    return thread / 32 % WARPS_ACROSS * (BLOCK_E / WARPS_ACROSS) + thread % ACROSS * OWN_V + c;
}
// The number of this thread. Places that follow from it are the same for all tiles; kept, they would take registers from
// the sums.
__device__ __forceinline__ int this_thread() {
    int thread = threadIdx.x;
    compute_again(thread);
    return thread;
}

// `count` rows to shared memory, transposed, their first `channels` channels; zeros where there are none. They are there
// after wait_async() and a barrier.
template <int Block>
__device__ __forceinline__ void fetch_rows(acc_t (&to)[BLOCK_E][Block + VEC], Side side, int count, int channels) {
    compute_again(side.rows, side.stride);
    compute_again(count);
    compute_again(channels);
    const int thread = this_thread();
#if DTYPE == F32 || DTYPE == F64
    const int e = thread % 8, row = thread / 8, step = THREADS / 8;  // 8 channels of 4 rows are in 32 banks
    const scalar_t *from = side.rows + row * side.stride + e;
    if (count >= Block && channels >= BLOCK_E) {
#pragma unroll
        for (int r = 0; r < Block; r += step, from += step * side.stride) {
#pragma unroll
            for (int n = 0; n < BLOCK_E; n += 8) copy_async<scalar_t>(&to[n + e][row + r], from + n);
        }
    } else {
#pragma unroll
        for (int r = 0; r < Block; r += step, from += step * side.stride) {
#pragma unroll
            for (int n = 0; n < BLOCK_E; n += 8) {
                copy_async<scalar_t>(&to[n + e][row + r], from + n, row + r < count && n + e < channels);
            }
        }
    }
#else
    static_assert(Block * BLOCK_E / LOAD % THREADS == 0 && THREADS % Block == 0, "all threads load as much");
    const int row = thread % Block, first = thread / Block * LOAD;  // neighbours are in different banks
    const bool whole = count >= Block && channels >= BLOCK_E && aligned_rows(side.rows, side.stride);
    const scalar_t *from = side.rows + row * side.stride + first;
    const int step = THREADS / Block * LOAD;
    Load numbers[BLOCK_E / step];
    if (whole) {
#pragma unroll
        for (int n = 0; n < BLOCK_E / step; ++n) numbers[n] = *(const Load *)(from + n * step);
    } else {
#pragma unroll
        for (int n = 0; n < BLOCK_E / step; ++n) {
            numbers[n] = load(from + n * step, row < count ? channels - first - n * step : 0);
        }
    }
#pragma unroll
    for (int n = 0; n < BLOCK_E / step; ++n) {
#pragma unroll
        for (int i = 0; i < LOAD; ++i) to[first + n * step + i][row] = to_acc(numbers[n].at[i]);
    }
#endif
}

// A thread's numbers of one row of shared memory, from `from` on in groups of VEC, APART * VEC apart.
template <int APART, int N>
__device__ __forceinline__ void read_from(acc_t (&mine)[N], const acc_t *from) {
#pragma unroll
    for (int n = 0; n < N; n += VEC) {
        const Vec v = *(const Vec *)(from + n * APART);
#pragma unroll
        for (int i = 0; i < VEC; ++i) mine[n + i] = v.at[i];
    }
}

// sum |x - y| over BLOCK_E channels, for the pairs of a thread.
__device__ __forceinline__ void sum_distances(acc_t (&sum)[OWN_X][OWN_Y], const XRows &x, const YRows &y) {
    const int thread = this_thread();
#pragma unroll 2
    for (int e0 = 0; e0 < BLOCK_E; e0 += SUMMED) {
        acc_t xs[SUMMED][OWN_X], ys[SUMMED][OWN_Y];
#pragma unroll
        for (int e = 0; e < SUMMED; ++e) {
            read_from<DOWN>(xs[e], &x[e0 + e][x_place(thread, 0)]);
            read_from<ACROSS>(ys[e], &y[e0 + e][y_place(thread, 0)]);
        }
        add_distances(sum, xs, ys);
    }
}

template <int N, int M>
__device__ __forceinline__ bool all_finite(const acc_t (&numbers)[N][M]) {
    acc_t zero = 0;
#pragma unroll
    for (int n = 0; n < N * M; ++n) zero = multiply_add(numbers[n / M][n % M], 0, zero);
    return zero == 0;
}

#if TENSOR_CORES
// Two numbers as tensor cores take them: words of two 16-bit numbers, whose sum the numbers are to the last bit.
struct Pair {
    static const int PARTS = DTYPE == F32 ? 3 : 1;
    unsigned part[PARTS];

    __device__ __forceinline__ explicit Pair(const scalar_t *numbers) {
#if DTYPE == F32
        float x = numbers[0], y = numbers[1];
#pragma unroll
        for (int n = 0; n < PARTS; ++n) {
            part[n] = bfloat16_pair(x, y);
            x -= first_of_pair(part[n]), y -= second_of_pair(part[n]);
        }
#else
        part[0] = *(const unsigned *)numbers;
#endif
    }
};
// The first `count` of the numbers at `from`, then zeros.
__device__ __forceinline__ Store load_some(const scalar_t *from, int count) {
    Store numbers;
#pragma unroll
    for (int i = 0; i < VEC; ++i) numbers.at[i] = i < count ? from[i] : to_scalar(0);
    return numbers;
}
#endif

// sum_c x * y of rows in global memory, for the pairs of a thread.
__device__ __forceinline__ void multiply_rows(acc_t (&sum)[OWN_X][OWN_Y], Side x, int x_count, Side y, int y_count,
                                              int channels) {
    compute_again(x.rows, x.stride);
    compute_again(y.rows, y.stride);
    compute_again(x_count);
    compute_again(y_count);
    compute_again(channels);
#pragma unroll
    for (int n = 0; n < OWN_X * OWN_Y; ++n) sum[n / OWN_Y][n % OWN_Y] = 0;
#if TENSOR_CORES
    const int STEP = ACROSS * VEC, PAIRS = OWN_X / 2, TILES = OWN_Y / 2;  // channels at a time, products of 16 x 8
    const bool whole = x_count >= BLOCK_X && y_count >= TILE_Y && channels % STEP == 0 && aligned<Store>(x.rows) &&
                       x.stride % VEC == 0 && aligned<Store>(y.rows) && y.stride % VEC == 0;
    const int thread = this_thread(), g = thread % 32 / 4, t = thread % 4;
    const int x_first = x_place(thread, 0), y_first = y_place(thread, 0) - t * VEC + g / 2 * VEC + g % 2;
    const scalar_t *x_from = x.rows + x_first * x.stride + t * VEC, *y_from = y.rows + y_first * y.stride + t * VEC;
    // Columns 2t and 2t + 1 of the n-th product are the thread's 2n-th and next.
    const auto row = [](int n) { return n / 2 * VEC * ACROSS + n % 2 * 2; };
#pragma unroll 1
    for (int c = t * VEC; c - t * VEC < channels; c += STEP, x_from += STEP, y_from += STEP) {
        Store xs[OWN_X], ys[TILES];
        if (whole) {
#pragma unroll
            for (int r = 0; r < OWN_X; ++r) xs[r] = *(const Store *)(x_from + r * x.stride);
#pragma unroll
            for (int n = 0; n < TILES; ++n) ys[n] = *(const Store *)(y_from + row(n) * y.stride);
        } else {
#pragma unroll
            for (int r = 0; r < OWN_X; ++r) {
                xs[r] = load_some(x_from + r * x.stride, x_first + r < x_count ? channels - c : 0);
            }
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                ys[n] = load_some(y_from + row(n) * y.stride, y_first + row(n) < y_count ? channels - c : 0);
            }
        }
        unsigned parts[PAIRS][Pair::PARTS][4];
#pragma unroll
        for (int n = 0; n < 4 * PAIRS; ++n) {
            const Pair pair(xs[n / 4 * 2 + n % 2].at + n % 4 / 2 * 2);
#pragma unroll
            for (int i = 0; i < Pair::PARTS; ++i) parts[n / 4][i][n % 4] = pair.part[i];
        }
        unsigned columns[TILES][Pair::PARTS][2];
#pragma unroll
        for (int n = 0; n < 2 * TILES; ++n) {
            const Pair pair(ys[n / 2].at + n % 2 * 2);
#pragma unroll
            for (int i = 0; i < Pair::PARTS; ++i) columns[n / 2][i][n % 2] = pair.part[i];
        }
        acc_t part[PAIRS][TILES][4] = {};  // tensor cores round sums down: few are added there, the smallest first
#pragma unroll
        for (int least = Pair::PARTS - 1; least >= 0; --least) {
#pragma unroll
            for (int i = 0; i <= least; ++i) {
#pragma unroll
                for (int n = 0; n < PAIRS * TILES; ++n) {
                    const unsigned *column = columns[n % TILES][least - i];
                    multiply_add_pairs(part[n / TILES][n % TILES], parts[n / TILES][i], column[0], column[1]);
                }
            }
        }
#pragma unroll
        for (int n = 0; n < OWN_X * OWN_Y; ++n) {
            const int r = n / OWN_Y, c = n % OWN_Y;
            sum[r][c] += part[r / 2][c / 2][r % 2 * 2 + c % 2];
        }
    }
    if (all_finite(sum)) return;
#pragma unroll
    for (int n = 0; n < OWN_X * OWN_Y; ++n) sum[n / OWN_Y][n % OWN_Y] = 0;
#endif
    const int again = this_thread();
#pragma unroll 1
    for (int c = 0; c < channels; ++c) {  // by the formula, whatever the numbers are
        acc_t xs[OWN_X], ys[OWN_Y];
#pragma unroll
        for (int r = 0; r < OWN_X; ++r) {
            const int i = x_place(again, r);
            xs[r] = i < x_count ? to_acc(x.rows[i * x.stride + c]) : 0;
        }
#pragma unroll
        for (int n = 0; n < OWN_Y; ++n) {
            const int j = y_place(again, n);
            ys[n] = j < y_count ? to_acc(y.rows[j * y.stride + c]) : 0;
        }
#pragma unroll
        for (int n = 0; n < OWN_X * OWN_Y; ++n) {
            sum[n / OWN_Y][n % OWN_Y] = multiply_add(xs[n / OWN_Y], ys[n % OWN_Y], sum[n / OWN_Y][n % OWN_Y]);
        }
    }
}

template <int N, int M>
__device__ __forceinline__ void add_to(acc_t (&total)[N][M], const acc_t (&sum)[N][M]) {
#pragma unroll
    for (int n = 0; n < N * M; ++n) total[n / M][n % M] += sum[n / M][n % M];
}

// weights^T @ y of one tile, y being rows in global memory, for a thread's rows and channels of dv.
__device__ __forceinline__ void add_values(acc_t (&total)[OWN_X][OWN_V], const Factors &weights, Side y, int y_count,
                                           int channels) {
    compute_again(y.rows, y.stride);
    compute_again(y_count);
    compute_again(channels);
    acc_t sum[OWN_X][OWN_V] = {};
#if TENSOR_CORES
    const int PAIRS = OWN_X / 2, COLUMNS = OWN_V / 2;  // products of 16 rows and of 8 channels
    struct alignas(COLUMNS * sizeof(scalar_t)) Values {
        scalar_t at[COLUMNS];
    };
    const bool whole = y_count >= TILE_Y && channels >= BLOCK_E && aligned<Values>(y.rows) && y.stride % COLUMNS == 0;
    const int thread = this_thread(), g = thread % 32 / 4, t = thread % 4, x = x_place(thread, 0);
    const int v = v_place(thread, 0) - t * OWN_V + g * COLUMNS;  // channels from v on: of each product one
    const int STEP = DTYPE == F32 ? 8 : 16, ROWS_Y = STEP / 4;
    const auto row = [t](int n) { return 2 * t + n % 2 + n / 2 * 8; };  // of a product's rows those of this lane
    const scalar_t *from = y.rows + row(0) * y.stride + v;
#pragma unroll 1
    for (int s = 0; s < TILE_Y; s += STEP, from += STEP * y.stride) {
        Vec ws[ROWS_Y];
        Values ys[ROWS_Y];
#pragma unroll
        for (int n = 0; n < ROWS_Y; ++n) ws[n] = *(const Vec *)&weights[s + row(n)][x];
        if (whole) {
#pragma unroll
            for (int n = 0; n < ROWS_Y; ++n) ys[n] = *(const Values *)(from + (row(n) - row(0)) * y.stride);
        } else {
#pragma unroll
            for (int n = 0; n < ROWS_Y; ++n) {
#pragma unroll
                for (int i = 0; i < COLUMNS; ++i) {
                    const bool exists = s + row(n) < y_count && v + i < channels;
                    ys[n].at[i] = exists ? from[(row(n) - row(0)) * y.stride + i] : to_scalar(0);
                }
            }
        }
        unsigned high[PAIRS][4], low[PAIRS][4];
#pragma unroll
        for (int n = 0; n < 4 * PAIRS; ++n) {
            const int r = n / 4 * 2 + n % 2, j = n % 4 / 2;
#if DTYPE == F32
            const Rounded rounded(ws[j].at[r]);
#else
            const Rounded rounded(ws[2 * j].at[r], ws[2 * j + 1].at[r]);
#endif
            high[n / 4][n % 4] = rounded.high, low[n / 4][n % 4] = rounded.low;
        }
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
#if DTYPE == F32
            const Rounded b0(ys[0].at[n]), b1(ys[1].at[n]);
            const unsigned b[2][2] = {{b0.high, b1.high}, {b0.low, b1.low}};
            const int MOST = 3;
#else
            unsigned b[1][2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const unsigned *first = (const unsigned *)&ys[2 * i], *second = (const unsigned *)&ys[2 * i + 1];
                b[0][i] = __byte_perm(first[n / 2], second[n / 2], n % 2 ? 0x7632 : 0x5410);
            }
            const int MOST = 2;
#endif
#pragma unroll
            for (int i = 0; i < MOST; ++i) {  // what rounding took away of a, or of b; then the large part
                const auto &a = i == 0 ? low : high;
                const unsigned *column = b[i == 1 && MOST == 3];
#pragma unroll
                for (int m = 0; m < PAIRS; ++m) {
                    acc_t *up = sum[2 * m] + n, *down = sum[2 * m + 1] + n;
                    multiply_add(up[0], up[COLUMNS], down[0], down[COLUMNS], a[m], column[0], column[1]);
                }
            }
        }
    }
    if (all_finite(sum)) {
        add_to(total, sum);
        return;
    }
#endif
    const int again = this_thread();
#pragma unroll
    for (int n = 0; n < OWN_X * OWN_V; ++n) sum[n / OWN_V][n % OWN_V] = 0;
#pragma unroll 1
    for (int j = 0; j < TILE_Y; ++j) {  // by the formula, whatever the numbers are
        const Vec w = *(const Vec *)&weights[j][x_place(again, 0)];
        const scalar_t *from = y.rows + j * y.stride + v_place(again, 0);
        const int count = j < y_count ? channels - v_place(again, 0) : 0;
#pragma unroll
        for (int c = 0; c < OWN_V; ++c) {
            const acc_t value = c < count ? to_acc(from[c]) : 0;
#pragma unroll
            for (int r = 0; r < OWN_X; ++r) {
                if (!is_ruled_out(w.at[r])) sum[r][c] = multiply_add(w.at[r], value, sum[r][c]);
            }
        }
    }
    add_to(total, sum);
}

// A thread's numbers of the rows of x whose gradients it has; zeros where there are none.
__device__ __forceinline__ void load_x(acc_t (&x)[ROWS][CHANNELS], Side side, int rows, int channels) {
    compute_again(side.rows, side.stride);
    compute_again(rows);
    compute_again(channels);
    const int thread = this_thread(), first = thread / ALONG * VEC, along = thread % ALONG;
    const scalar_t *from = side.rows + first * side.stride + along;
    if (rows >= BLOCK_X && channels >= BLOCK_E) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) x[r][c] = to_acc(from[place(r, 0, BELOW) * side.stride + c * ALONG]);
        }
    } else {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) {
                const bool exists = first + place(r, 0, BELOW) < rows && along + c * ALONG < channels;
                x[r][c] = exists ? to_acc(from[place(r, 0, BELOW) * side.stride + c * ALONG]) : 0;
            }
        }
    }
}

// What may be done with a tile: signs by half_step with their -1/2 left to the sum of h, or not left; or by comparison.
enum Way { EVEN, UNEVEN, ANY };

// sum_j h * sign(x - y) / 2 of one tile for a thread's rows and channels. In the way EVEN it lacks minus half the sum of h;
// `h_total` gets this of row threadIdx.x, rounded like the others: where all rows tie, the two cancel exactly.
template <Way way>
__device__ __forceinline__ void add_signs(acc_t (&total)[ROWS][CHANNELS], acc_t &h_total, const acc_t (&x)[ROWS][CHANNELS],
                                          const Factors &h, const YRows &y) {
    const int thread = this_thread(), below = thread / ALONG, along = thread % ALONG;
    acc_t sum[ROWS][CHANNELS] = {}, h_sum = 0;
#pragma unroll(way == EVEN ? 2 : 1)
    for (int j0 = 0; j0 < TILE_Y; j0 += VEC) {
        Vec ys[CHANNELS];
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) ys[c] = *(const Vec *)&y[along + c * ALONG][j0];
        if (way == EVEN && thread < BLOCK_X) {
#pragma unroll
            for (int j = 0; j < VEC; ++j) h_sum += h[j0 + j][thread];
        }
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            acc_t hs[ROWS];
            read_from<BELOW>(hs, &h[j0 + j][below * VEC]);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) {
                    const acc_t d = x[r][c] - ys[c].at[j];
                    const acc_t half_sign = way == ANY ? sign(d) / 2 : half_step(d) - (way == EVEN ? 0 : (acc_t)0.5);
                    sum[r][c] = multiply_add(half_sign, hs[r], sum[r][c]);
                }
            }
        }
    }
    h_total += h_sum;
    add_to(total, sum);
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
__device__ __forceinline__ void fetch_mask(Factors &added, const Attention &a, int b, bool of_key, int x0, int y0) {
    const int64 mask = a.mask_kind == NO_MASK ? 0 : offset(a.mask, a.batch_shape, b);
    const int thread = this_thread();
#pragma unroll 1
    for (int r = 0; r < OWN_X; ++r) {
        const int x = x0 + x_place(thread, r);
        const int first = of_key ? first_query(a, x) : first_key(a, x);
        const int after = x >= (of_key ? a.length_k : a.length_q) ? 0 : of_key ? end_of_queries(a, x) : end_of_keys(a, x);
#pragma unroll
        for (int c = 0; c < OWN_Y; ++c) {
            const int y = y0 + y_place(thread, c);
            const int64 at = mask + (of_key ? y : x) * a.mask.row_stride + (of_key ? x : y) * a.mask_column;
            added[y_place(thread, c)][x_place(thread, r)] = y < first || y >= after ? -infinity() : masked_at(a, at, 0);
        }
    }
}

// Scores become weights times the derivative, and the weights go to where the mask was, if `keep`. With SOME the mask is
// there, and may rule pairs out.
template <bool OF_KEY, bool SOME>
__device__ __forceinline__ void weigh(acc_t (&scores)[OWN_X][OWN_Y], Factors &weights, const Queries &queries,
                                      const Derivative &f, bool keep) {
    const int thread = this_thread();
#pragma unroll
    for (int c = 0; c < OWN_Y; ++c) {
        Vec added = {}, kept;
        if (SOME) added = *(const Vec *)&weights[y_place(thread, c)][x_place(thread, 0)];
#pragma unroll
        for (int r = 0; r < OWN_X; ++r) {
            const int query = OF_KEY ? y_place(thread, c) : x_place(thread, r);
            const acc_t score = scores[r][c], sum = SOME ? score + added.at[r] : score;  // as with_mask() has it
            const acc_t shifted = sum == -infinity() ? FARTHEST : sum;
            const bool out = SOME && added.at[r] == -infinity();
            const acc_t weight = quick_exponential(shifted - queries.largest[query]) * queries.factor[query];
            const acc_t factor = multiply_add(weight, f(score), 0);  // adding 0 makes 0 of -0, which says "ruled out"
            kept.at[r] = out ? ruled_out() : weight * WEIGHT_SCALE;
            scores[r][c] = out ? ruled_out() : factor;
        }
        if (keep) *(Vec *)&weights[y_place(thread, c)][x_place(thread, 0)] = kept;
    }
}

// Products of rows, and weights times the derivative, become h. Whether all may be summed by half_step, and whether with
// the sum of h apart: `rows` has the sums of |h| of this warp's rows.
template <bool OF_KEY, bool SOME>
__device__ __forceinline__ void finish_h(acc_t (&h)[OWN_X][OWN_Y], const acc_t (&products)[OWN_X][OWN_Y],
                                         const Queries &queries, acc_t (&rows)[OWN_X], bool &simple, bool &even) {
    const int thread = this_thread();
#pragma unroll
    for (int r = 0; r < OWN_X; ++r) {
        acc_t of_row = 0, most = 0;
#pragma unroll
        for (int c = 0; c < OWN_Y; ++c) {
            const acc_t delta = queries.delta[OF_KEY ? y_place(thread, c) : x_place(thread, r)];
            h[r][c] = SOME && is_ruled_out(h[r][c]) ? 0 : h[r][c] * (products[r][c] - delta);
            of_row += absolute(h[r][c]);
            most = max(most, absolute(h[r][c]));
        }
#pragma unroll
        for (int step = 1; step < ACROSS; step *= 2) of_row += __shfl_xor_sync(0xffffffff, of_row, step);
        rows[r] += of_row;
        simple = simple && of_row < LARGE;
        even = even && most * EVEN_SHARE <= rows[r];
    }
}

// Products of rows are formed while x and y are on their way; later where the code takes more registers.
#if !defined(L1ATTN_EMULATOR) && __CUDA_ARCH__ >= 1200 && DTYPE == BF16
const bool PRODUCTS_FIRST = false;
#else
const bool PRODUCTS_FIRST = true;
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) attention_backward(const AttentionBackward p) {
    const Attention &a = p.s.a;
    const bool of_key = p.of_key;
    const unsigned x_parts = ceil_div(a.channels, BLOCK_E), v_parts = of_key ? ceil_div(a.channels_v, BLOCK_E) : 0;
    const int length_x = of_key ? a.length_k : a.length_q;
    const unsigned x_blocks = ceil_div(length_x, BLOCK_X), tile = blockIdx.x / (x_parts + v_parts);
    const unsigned part = blockIdx.x - tile * (x_parts + v_parts);
    // Blocks of one entry, which share y, follow on each other; unless some have more to do, which come first of all.
    const bool alike = a.left < 0 && a.right < 0;
    const unsigned kept = alike ? tile / x_blocks : tile % p.s.kept, x_block = alike ? tile % x_blocks : tile / p.s.kept;
    const bool of_x = part < x_parts && p.dx.data, of_v = part < v_parts && p.dxv.data;  // the others' blocks do nothing
    if (!of_x && !of_v) return;  // the same for the whole block
    const int e0 = part * BLOCK_E, entry = kept * p.s.summed;
    const int x0 = (of_key ? x_block : x_blocks - 1 - x_block) * BLOCK_X;  // causal: the longest first
    const int x_count = min(BLOCK_X, length_x - x0), x_last = x0 + x_count - 1;

    __shared__ alignas(16) union {  // first the one, then the other
        XRows x;
        Factors factors;
    } tiles;
    __shared__ alignas(16) YRows y_rows;
    __shared__ Queries queries;
    acc_t sum[ROWS][CHANNELS] = {}, h_sum = 0, rows_of_h[OWN_X] = {}, v_sum[OWN_X][OWN_V] = {};
    const int x_channels = min(BLOCK_E, a.channels - e0), v_channels = min(BLOCK_E, a.channels_v - e0);

    // Rows of y that all rows of x are paired with; those from y0 up to `end` with some of them.
    const int all_first = of_key ? first_query(a, x_last) : first_key(a, x_last);
    const int all_end = of_key ? end_of_queries(a, x0) : end_of_keys(a, x0);
    const int end = of_key ? end_of_queries(a, x_last) : end_of_keys(a, x_last);
    const Derivative f(a.score, a.scale, a.eps);
    for (int b = entry; b < entry + p.s.summed; ++b) {
        int y0 = of_key ? first_query(a, x0) : first_key(a, x0);
        const Side q = side(a.q, a, b, of_key ? y0 : x0), k = side(a.k, a, b, of_key ? x0 : y0);
        const Side grad = side(p.s.grad, a, b, of_key ? y0 : x0), v = side(a.v, a, b, of_key ? x0 : y0);
        const Side x_side = of_key ? k : q, x2_side = of_key ? v : grad;
        Side y_side = of_key ? q : k, y2_side = of_key ? grad : v;
        for (; y0 < end; y0 += TILE_Y) {
            const int y_count = (of_key ? a.length_q : a.length_k) - y0;
            acc_t scores[OWN_X][OWN_Y] = {}, products[OWN_X][OWN_Y];
            fetch_query(queries, p.s, b, (of_key ? y0 : x0) + threadIdx.x, of_key ? TILE_Y : BLOCK_X);
            for (unsigned n = 0; n < x_parts; ++n) {
                const int from = n * BLOCK_E;
                if (n > 0) __syncthreads();  // all are done with the part before
                fetch_rows<BLOCK_X>(tiles.x, {x_side.rows + from, x_side.stride}, x_count, a.channels - from);
                fetch_rows<TILE_Y>(y_rows, {y_side.rows + from, y_side.stride}, y_count, a.channels - from);
                if (PRODUCTS_FIRST && n == 0 && of_x) multiply_rows(products, x2_side, x_count, y2_side, y_count, a.channels_v);
                wait_async();
                __syncthreads();  // the part is there, and the queries
                sum_distances(scores, tiles.x, y_rows);
            }
            __syncthreads();  // all are done with x, whose place others take, and the queries are there
            if (of_x && part + 1 < x_parts) {  // the part of y that signs are taken of; it is there before h is
                fetch_rows<TILE_Y>(y_rows, {y_side.rows + e0, y_side.stride}, y_count, x_channels);
            }
            bool simple = all_finite(scores), even = true;
            const bool some = a.mask_kind != NO_MASK || y0 < all_first || y0 + TILE_Y > all_end || x_count < BLOCK_X;
            if (some) fetch_mask(tiles.factors, a, b, of_key, x0, y0);
            apply_score((acc_t(&)[OWN_X * OWN_Y])scores, a.score, a.scale, a.eps);
            if (of_key && some) {
                weigh<true, true>(scores, tiles.factors, queries, f, of_v);
            } else if (of_key) {
                weigh<true, false>(scores, tiles.factors, queries, f, of_v);
            } else if (some) {
                weigh<false, true>(scores, tiles.factors, queries, f, false);
            } else {
                weigh<false, false>(scores, tiles.factors, queries, f, false);
            }
            if (of_v) {
                __syncthreads();  // the weights are there
                add_values(v_sum, tiles.factors, {y2_side.rows + e0, y2_side.stride}, y_count, v_channels);
            }
            if (of_x) {
                if (!PRODUCTS_FIRST) multiply_rows(products, x2_side, x_count, y2_side, y_count, a.channels_v);
                if (of_key && some) {
                    finish_h<true, true>(scores, products, queries, rows_of_h, simple, even);
                } else if (of_key) {
                    finish_h<true, false>(scores, products, queries, rows_of_h, simple, even);
                } else if (some) {
                    finish_h<false, true>(scores, products, queries, rows_of_h, simple, even);
                } else {
                    finish_h<false, false>(scores, products, queries, rows_of_h, simple, even);
                }
                even = __syncthreads_and(even);  // all are done with the weights
                const int thread = this_thread();
#pragma unroll
                for (int c = 0; c < OWN_Y; ++c) {
                    Vec group;
#pragma unroll
                    for (int r = 0; r < OWN_X; ++r) group.at[r] = scores[r][c];
                    *(Vec *)&tiles.factors[y_place(thread, c)][x_place(thread, 0)] = group;
                }
                acc_t x[ROWS][CHANNELS];
                load_x(x, {x_side.rows + e0, x_side.stride}, x_count, x_channels);
                wait_async();
                simple = __syncthreads_and(simple);  // h is there
                if (simple && even) {
                    add_signs<EVEN>(sum, h_sum, x, tiles.factors, y_rows);
                } else if (simple) {
                    add_signs<UNEVEN>(sum, h_sum, x, tiles.factors, y_rows);
                } else {
                    add_signs<ANY>(sum, h_sum, x, tiles.factors, y_rows);
                }
            }
            __syncthreads();  // all are done with the tile
            y_side.rows += TILE_Y * y_side.stride;
            y2_side.rows += TILE_Y * y2_side.stride;
        }
    }

    const int thread = threadIdx.x;
    if (of_v) {
        const Side result = side(p.dxv, a, entry, x0);
#pragma unroll
        for (int r = 0; r < OWN_X; ++r) {
#pragma unroll
            for (int c = 0; c < OWN_V; ++c) {
                if (x_place(thread, r) >= x_count || v_place(thread, c) >= v_channels) continue;
                scalar_t *row = (scalar_t *)result.rows + x_place(thread, r) * result.stride + e0;
                row[v_place(thread, c)] = to_scalar(v_sum[r][c] / WEIGHT_SCALE);
            }
        }
    }
    if (!of_x) return;  // the same for the whole block
    acc_t *h_sums = tiles.factors[0];
    if (thread < BLOCK_X) h_sums[thread] = h_sum;
    __syncthreads();  // the sums of h are there
    const Side result = side(p.dx, a, entry, x0);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int i = place(r, thread / ALONG, BELOW);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const int e = thread % ALONG + c * ALONG;
            if (i >= x_count || e >= x_channels) continue;
            ((scalar_t *)result.rows)[i * result.stride + e0 + e] = to_scalar(2 * sum[r][c] - h_sums[i]);
        }
    }
}
