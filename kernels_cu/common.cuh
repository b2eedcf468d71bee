// common.cuh: what every kernel shares. Its text is put in front of each kernel file before compilation.
//
// Given by -D:  DTYPE (0 float32, 1 float16, 2 bfloat16, 3 float64, 4 int8, 5 uint8) and the parameters of the file's @variant line.
// Strides count elements and are 64-bit; every length, and the number of blocks, is below 2**31. Rows (the last
// dimension) are contiguous in every array that a kernel receives.

#define F32 0
#define F16 1
#define BF16 2
#define F64 3
#define I8 4
#define U8 5
#if DTYPE == F16
#include <cuda_fp16.h>
typedef __half scalar_t;
typedef float acc_t;
#elif DTYPE == BF16
#include <cuda_bf16.h>
typedef __nv_bfloat16 scalar_t;
typedef float acc_t;
#elif DTYPE == F64
typedef double scalar_t;
typedef double acc_t;
#elif DTYPE == I8 || DTYPE == U8
typedef unsigned char scalar_t;  // of int8 the bits
typedef float acc_t;
#else
typedef float scalar_t;
typedef float acc_t;
#endif

#define BYTES (DTYPE == I8 || DTYPE == U8)
#if BYTES
typedef float out_t;  // what scores are written in, and all but query and key of attention
#else
typedef scalar_t out_t;
#endif

typedef long long int64;

// ---- arguments ------------------------------------------------------------------------------------------------

const int MAX_BATCH_DIMS = 6;

struct Matrix {  // one matrix for each batch entry, its rows contiguous
    void *data;
    int64 batch_stride[MAX_BATCH_DIMS];  // 0 where the array is broadcast
    int64 row_stride;
};

struct Number {  // rounded by the host: a kernel would convert it again and again
    double as_double;
    float as_float;
    int unused;
    __device__ __forceinline__ operator acc_t() const { return DTYPE == F64 ? (acc_t)as_double : (acc_t)as_float; }
};

struct ScoresForward {
    Matrix q, k, out;                // (B, L, E), (B, S, E), (B, L, S)
    int batch_shape[MAX_BATCH_DIMS];  // B = their product; leading dimensions that are not there are 1
    int length_q, length_k, channels;
    int score;
    Number scale, eps;
};

struct ScoresQuantized {
    Matrix q, k, quant_scale, out;    // bytes (B, L, E), (B, S, E); float (B, 1, 1), address 0 for 1; float (B, L, S)
    int batch_shape[MAX_BATCH_DIMS];
    int length_q, length_k, channels;
    int score;
    Number scale, eps;
};

// One gradient. x is what to differentiate by, y the other array: for dq x is q and y is k, for dk the reverse.
struct Gradient {
    Matrix x, y, grad, scores, dx;   // (B, X, E), (B, Y, E), (B, L, S), (B, L, S), (B, X, E)
    int batch_shape[MAX_BATCH_DIMS];  // dimensions in which dx is one matrix for many entries come last
    int kept, summed;                // matrices of dx, and batch entries that are summed into each
    int length_x, length_y;          // length_x is 0 if this gradient is not wanted
    int x_is_row;                    // whether the rows of grad and scores are x (dq) or y (dk)
    int unused;
};

struct ScoresBackward {
    Gradient dq, dk;
    int channels;
    int score;
    Number scale, eps;
};

struct ScoresJvp {
    Matrix q, k, tq, tk, scores, out;  // (B, L, E), (B, S, E), tangents of these, (B, L, S), (B, L, S)
    int batch_shape[MAX_BATCH_DIMS];
    int length_q, length_k, channels;
    int score;
    Number scale, eps;
};

struct Attention {  // what forward and backward share
    Matrix q, k, v;                   // (B, L, E), (B, S, E), (B, S, V)
    Matrix mask;                      // (B, L, S)
    Matrix softmax;                   // (B, L, 2) in acc_t: see struct Softmax
    int64 mask_column;                // stride along S; rows of a mask need not be contiguous
    int batch_shape[MAX_BATCH_DIMS];  // in the backward pass, dimensions to sum over come last
    int length_q, length_k, channels, channels_v;
    int score;
    int mask_kind;                    // NO_MASK, BOOLEAN (bytes, 1 is to attend) or ADDITIVE (out_t)
    int left, right;                  // keys before and after its own place that a query attends to; -1: no limit
    Number scale, eps;
};

struct AttentionForward {
    Attention a;
    Matrix out;       // (B, L, V), in out_t, or in acc_t if `unrounded`: see store_out
    int64 out_split, softmax_split;  // strides of out and softmax from one of `splits` to the next
    int unrounded, splits;           // see struct Split
    Matrix quant_scale;              // of bytes alone: float (B, 1, 1), address 0 for 1
};

struct AttentionMerge {
    AttentionForward parts;  // what attention_forward made of each split
    Matrix out, softmax;
    int unrounded, shares;   // shares: how many warps divide the splits of a row among themselves
};

struct AttentionSaved {  // what the backward pass starts from
    Attention a;
    Matrix grad, delta;  // (B, L, V); (B, L) in acc_t: sum_c grad[i,c] * out[i,c] - grad_lse[i], out before it was rounded
    int kept, summed;    // matrices of a gradient, and batch entries that are summed into each
};

struct AttentionBackward {  // the gradient of q, or those of k and v: an address of 0 is one that is not wanted
    AttentionSaved s;
    Matrix dx, dxv;  // of q; of k and v
    int of_key, unused;
};

struct AttentionMaskGradient {
    AttentionSaved s;
    Matrix dmask;
    int64 dmask_column;
    int one_row, one_column;  // whether all queries share a row of the mask, all keys a column
};

// Offset of the matrix of batch entry `index`, and its address. One batch dimension takes no division.
__device__ __forceinline__ int64 offset(const Matrix &m, const int *batch_shape, unsigned index) {
    int64 sum = 0;
#pragma unroll
    for (int dim = MAX_BATCH_DIMS - 1; dim >= 0; --dim) {
        const unsigned n = batch_shape[dim];
        if (n == 1) continue;
        const unsigned outer = index < n ? 0 : index / n;
        sum += (index - outer * n) * m.batch_stride[dim];
        index = outer;
    }
    return sum;
}
template <typename T = scalar_t>
__device__ __forceinline__ T *matrix(const Matrix &m, const int *batch_shape, int index) {
    return (T *)m.data + offset(m, batch_shape, index);
}

__device__ __forceinline__ int ceil_div(unsigned n, unsigned size) { return n / size + (n % size != 0); }

// The tile of scores of this block, by the grid rule of scores_forward: out[b, i0:i0+block_q, j0:j0+block_k].
struct Tile {
    int b, i0, j0;
    __device__ __forceinline__ Tile(int length_q, int length_k, int block_q, int block_k) {
        const unsigned q_blocks = ceil_div(length_q, block_q), k_blocks = ceil_div(length_k, block_k);
        const unsigned row = blockIdx.x / k_blocks;
        j0 = (blockIdx.x - row * k_blocks) * block_k;
        b = row / q_blocks;
        i0 = (row - b * q_blocks) * block_q;
    }
};

// ---- numbers --------------------------------------------------------------------------------------------------

#if DTYPE == F16
__device__ __forceinline__ acc_t to_acc(scalar_t x) { return __half2float(x); }
__device__ __forceinline__ scalar_t to_scalar(acc_t x) { return __float2half_rn(x); }
#elif DTYPE == BF16
__device__ __forceinline__ acc_t to_acc(scalar_t x) { return __bfloat162float(x); }
__device__ __forceinline__ scalar_t to_scalar(acc_t x) { return __float2bfloat16_rn(x); }
#else
__device__ __forceinline__ acc_t to_acc(scalar_t x) { return x; }
__device__ __forceinline__ scalar_t to_scalar(acc_t x) { return x; }
#endif

#if BYTES
__device__ __forceinline__ acc_t to_acc(out_t x) { return x; }
__device__ __forceinline__ out_t to_out(acc_t x) { return x; }
#else
__device__ __forceinline__ out_t to_out(acc_t x) { return to_scalar(x); }
#endif

__device__ __forceinline__ float absolute(float x) { return fabsf(x); }
__device__ __forceinline__ double absolute(double x) { return fabs(x); }
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ float reciprocal(float x) {  // one instruction, at most 1 ulp off; 0 where 1/x is denormal
#ifdef L1ATTN_EMULATOR
    return 1.0f / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
// exp in two instructions. To its 2 ulp comes what rounds x * log2(e): less than what rounding a score of that size does.
__device__ __forceinline__ float quick_exponential(float x) {  // 0 where exp(x) is denormal
    x *= 1.4426950408889634f;
#ifdef L1ATTN_EMULATOR
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
__device__ __forceinline__ double quick_exponential(double x) { return exp(x); }
__device__ __forceinline__ bool finite(acc_t x) { return x - x == 0; }

__device__ __forceinline__ acc_t sign(acc_t d) { return (acc_t)((d > 0) - (d < 0)); }

// 1, 1/2 or 0 as d is positive, zero or negative: 2 * half_step(d) - 1 = sign(d). In float one instruction, without a
// branch. Not for NaN. Denormals are flushed, so the smallest |d| times 1.7e38 is 2.
__device__ __forceinline__ float half_step(float d) {
#ifdef L1ATTN_EMULATOR
    return __saturatef(fmaf(d, 1.7e38f, 0.5f));
#else
    float t;  // __saturatef(fmaf(...)) would be two instructions
    asm("fma.rn.ftz.sat.f32 %0, %1, %2, %3;" : "=f"(t) : "f"(d), "f"(1.7e38f), "f"(0.5f));
    return t;
#endif
}
__device__ __forceinline__ double half_step(double d) { return d > 0 ? 1.0 : d < 0 ? 0.0 : 0.5; }

// ---- F and F' -------------------------------------------------------------------------------------------------

#define INVERSE 0
#define NEGATIVE 1
#define LAPLACIAN 2
#define DISTANCE 3

// Distances of N outputs become their scores; the branch is outside the loops.
template <int N>
__device__ __forceinline__ void apply_score(acc_t (&out)[N], int score, acc_t scale, acc_t eps) {
    if (score == INVERSE) {
#pragma unroll
        for (int n = 0; n < N; ++n) out[n] = reciprocal(eps + scale * out[n]);
    } else if (score == LAPLACIAN) {
#pragma unroll
        for (int n = 0; n < N; ++n) out[n] = exponential(-(scale * out[n]));
    } else {
        const acc_t factor = score == NEGATIVE ? -scale : scale;
#pragma unroll
        for (int n = 0; n < N; ++n) out[n] *= factor;
    }
}

// dscore/ddistance, F' * scale, as a function of the score itself: (a * s + b) * s where F is curved, else b.
struct Derivative {
    acc_t a, b;
    bool curved;
    // Scores beyond it are of rows so nearly equal that |h| may dwarf that of all others, while most channels tie:
    // x < 31 * eps for "inverse", x < 0.03 for "laplacian".
    acc_t nearly_equal;

    __device__ __forceinline__ Derivative(int score, acc_t scale, acc_t eps) {
        curved = score == INVERSE || score == LAPLACIAN;
        a = score == INVERSE ? -scale : 0;
        b = score == INVERSE ? 0 : score == DISTANCE ? scale : -scale;
        nearly_equal = score == INVERSE ? 1 / (32 * eps) : (acc_t)(score == LAPLACIAN ? 0.97 : 3e38);
    }
    __device__ __forceinline__ acc_t operator()(acc_t s) const { return curved ? multiply_add(a, s, b) * s : b; }
};

// ---- attention ------------------------------------------------------------------------------------------------

#define NO_MASK 0
#define BOOLEAN 1
#define ADDITIVE 2

__device__ __forceinline__ acc_t infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

__device__ __forceinline__ acc_t warp_sum(acc_t x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}
__device__ __forceinline__ acc_t warp_max(acc_t x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = max(x, __shfl_xor_sync(0xffffffff, x, step));
    return x;
}

// Distance of two rows, the same number in all lanes of a warp.
__device__ __forceinline__ acc_t warp_distance(const scalar_t *q, const scalar_t *k, int channels, int lane) {
    acc_t sum = 0;
    for (int e = lane; e < channels; e += 32) sum += absolute(to_acc(q[e]) - to_acc(k[e]));
    return warp_sum(sum);
}
__device__ __forceinline__ acc_t score_of(acc_t distance, const Attention &a) {
    acc_t result[1] = {distance};
    apply_score(result, a.score, a.scale, a.eps);
    return result[0];
}

// Matrix of numbers of the accumulation type of batch entry `index`.
__device__ __forceinline__ acc_t *accumulated(const Matrix &m, const int *batch_shape, int index) {
    return matrix<acc_t>(m, batch_shape, index);
}

// What stands for a score that is -inf by itself, of a key infinitely far away: -inf says that a key is ruled out, and
// nothing else. No other score comes to it: a mask of the lowest number there is, its neighbour, swallows what it is
// added to.
const acc_t FARTHEST = DTYPE == F64 ? -0x1.ffffffffffffep+1023 : -0x1.fffffcp+127;

// The score of a query and a key with the mask added, whose number for the two is `place` numbers from its first; -inf,
// whatever the score is, where the mask rules the key out.
__device__ __forceinline__ acc_t masked_at(const Attention &a, int64 place, acc_t score) {
    if (a.mask_kind == BOOLEAN) {
        if (!((const unsigned char *)a.mask.data)[place]) return -infinity();
    } else if (a.mask_kind == ADDITIVE) {
        const acc_t added = to_acc(((const out_t *)a.mask.data)[place]);
        if (added == -infinity()) return added;
        score += added;
    }
    return score == -infinity() ? FARTHEST : score;
}
// The same from what the mask adds, -inf where it rules the key out.
__device__ __forceinline__ acc_t with_mask(acc_t score, acc_t added) {
    if (added == -infinity()) return added;
    score += added;
    return score == -infinity() ? FARTHEST : score;
}
__device__ __forceinline__ acc_t masked(const Attention &a, int b, int i, int j, acc_t score) {
    const int64 place = a.mask_kind == NO_MASK ? 0 : offset(a.mask, a.batch_shape, b);
    return masked_at(a, place + i * a.mask.row_stride + j * a.mask_column, score);
}

// How the softmax of a row was taken: its largest masked score, and the sum of exp(score - largest). It is kept in these
// two parts, as their log-sum-exp in one number is too coarse where the largest is large: after a mask of -1e9 was added
// to all keys, in steps of 64. A row without a key has (-inf, 0), one whose keys are all infinitely far away NaN twice.
struct Softmax {
    acc_t largest, total;

    // Of a row that is done. Parts of the keys can be joined before, not after.
    __device__ __forceinline__ void finish() {
        if (largest == FARTHEST) largest = total = infinity() - infinity();
    }
    // What to multiply a sum of exp(score - largest) * value by.
    __device__ __forceinline__ acc_t factor() const { return total == 0 ? 0 : 1 / total; }
    // p of a masked score. Nothing of a key that is ruled out, -inf, may come into a sum: check for that, not for p = 0.
    __device__ __forceinline__ acc_t weight(acc_t score, acc_t factor) const {
        return score == -infinity() ? 0 : exponential(score - largest) * factor;
    }
    __device__ __forceinline__ void load(const Attention &a, int b, int i) {
        const acc_t *parts = accumulated(a.softmax, a.batch_shape, b) + i * a.softmax.row_stride;
        largest = parts[0], total = parts[1];
    }
};

// What stands for the weight of a key that is ruled out: 0 in products, and not what a weight can be.
__device__ __forceinline__ acc_t ruled_out() { return -(acc_t)0; }
__device__ __forceinline__ bool is_ruled_out(acc_t weight) { return weight == 0 && signbit(weight); }

// out[b, i, c] = x: unrounded where the backward pass will need it so, which with 16-bit numbers it does.
__device__ __forceinline__ void store_out(const Matrix &out, const int *batch_shape, bool unrounded, int b, int i,
                                          int64 c, acc_t x) {
    if (unrounded) {
        accumulated(out, batch_shape, b)[i * out.row_stride + c] = x;
    } else {
        matrix<out_t>(out, batch_shape, b)[i * out.row_stride + c] = to_out(x);
    }
}

// The keys of query i, and the queries of key j, that window and causality leave: from the first up to the end.
__device__ __forceinline__ int first_key(const Attention &a, int i) { return a.left < 0 ? 0 : max(0, i - a.left); }
__device__ __forceinline__ int end_of_keys(const Attention &a, int i) {
    return a.right < 0 || a.right >= a.length_k - i ? a.length_k : max(0, i + a.right + 1);
}
__device__ __forceinline__ int first_query(const Attention &a, int j) { return a.right < 0 ? 0 : max(0, j - a.right); }
__device__ __forceinline__ int end_of_queries(const Attention &a, int j) {
    return a.left < 0 || a.left >= a.length_q - j ? a.length_q : j + a.left + 1;
}

// A block's share of the keys of its queries. Where there are too few blocks of queries to fill a GPU, p.splits blocks take
// equal parts of the keys of each; their softmax is not finished, their out not divided by its total: attention_merge does.
struct Split {
    int index;
    unsigned block;  // what blockIdx.x would be without splits
    __device__ __forceinline__ Split(const AttentionForward &p) {
        block = p.splits == 1 ? blockIdx.x : blockIdx.x / p.splits;
        index = blockIdx.x - block * p.splits;
    }
    // Keys from `first` up to `end` become those of this split: a whole number of tiles, but for the last.
    __device__ __forceinline__ void narrow(int &first, int &end, int tile, int splits) const {
        if (splits == 1) return;
        const unsigned keys = ceil_div(ceil_div(max(0, end - first), splits), tile) * tile;
        first = min((unsigned)max(first, end), first + index * keys);
        end = min((unsigned)end, first + keys);
    }
    __device__ __forceinline__ void store(const AttentionForward &p, int b, int i, const Softmax &softmax) const {
        acc_t *parts = accumulated(p.a.softmax, p.a.batch_shape, b) + i * p.a.softmax.row_stride + index * p.softmax_split;
        parts[0] = softmax.largest, parts[1] = softmax.total;
    }
    __device__ __forceinline__ void store(const AttentionForward &p, int b, int i, int c, acc_t x) const {
        store_out(p.out, p.a.batch_shape, p.unrounded, b, i, c + index * p.out_split, x);
    }
    // N outputs of query i that follow on each other, of which `count` exist.
    template <int N>
    __device__ __forceinline__ void store(const AttentionForward &p, int64 matrix, int i, int c, const acc_t *x, int count) const {
        const int64 place = matrix + index * p.out_split + i * p.out.row_stride + c;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            if (n >= count) break;
            if (p.unrounded) {
                ((acc_t *)p.out.data)[place + n] = x[n];
            } else {
                ((out_t *)p.out.data)[place + n] = to_out(x[n]);
            }
        }
    }
};

// p and ds of query i and key j, by a warp, and the score without the mask. Returns whether the key is left: where it is
// ruled out it may hold anything, and p and ds are 0.
__device__ __forceinline__ bool score_gradient(const AttentionSaved &p, int b, int i, int j, int lane, acc_t &weight,
                                               acc_t &ds, acc_t &score) {
    const Attention &a = p.a;
    const scalar_t *q = matrix(a.q, a.batch_shape, b) + i * a.q.row_stride;
    const scalar_t *k = matrix(a.k, a.batch_shape, b) + j * a.k.row_stride;
    const scalar_t *v = matrix(a.v, a.batch_shape, b) + j * a.v.row_stride;
    const scalar_t *grad = matrix(p.grad, a.batch_shape, b) + i * p.grad.row_stride;
    score = score_of(warp_distance(q, k, a.channels, lane), a);
    acc_t product = 0;
    for (int c = lane; c < a.channels_v; c += 32) product += to_acc(grad[c]) * to_acc(v[c]);
    product = warp_sum(product);
    const acc_t delta = accumulated(p.delta, a.batch_shape, b)[i * p.delta.row_stride];
    const acc_t with_mask = masked(a, b, i, j, score);
    Softmax softmax;
    softmax.load(a, b, i);
    weight = softmax.weight(with_mask, softmax.factor());
    const bool left = with_mask != -infinity();
    ds = left ? weight * (product - delta) : 0;
    return left;
}

// The sum of more and larger |h| might overflow where that of h * sign does not.
const acc_t LARGE = DTYPE == F64 ? 1e300 : 1e30;

// ---- bytes ----------------------------------------------------------------------------------------------------

// sum plus the absolute differences of four bytes, by default unsigned: one instruction, some more from sm_120 on.
template <bool SIGNED = false>
__device__ __forceinline__ unsigned add_byte_distance(unsigned sum, unsigned a, unsigned b) {
#if defined(L1ATTN_EMULATOR)
    const unsigned flip = SIGNED ? 0x80808080u : 0;  // the same differences of unsigned bytes
    return sum + __vsadu4(a ^ flip, b ^ flip);
#elif __CUDA_ARCH__ >= 1200
    return __dp4a(SIGNED ? __vabsdiffs4(a, b) : __vabsdiffu4(a, b), 0x01010101u, sum);
#else
    unsigned total;  // sum + __vsadu4(a, b) would be two instructions
    if (SIGNED) {
        asm("vabsdiff4.u32.s32.s32.add %0, %1, %2, %3;" : "=r"(total) : "r"(a), "r"(b), "r"(sum));
    } else {
        asm("vabsdiff4.u32.u32.u32.add %0, %1, %2, %3;" : "=r"(total) : "r"(a), "r"(b), "r"(sum));
    }
    return total;
#endif
}

// ---- 128-bit loads --------------------------------------------------------------------------------------------

const int LOAD = 16 / sizeof(scalar_t);  // numbers in a 128-bit load from global memory
const int VEC = 16 / sizeof(acc_t);      // numbers in a 128-bit load from shared memory

template <typename T>
struct alignas(16) LoadOf {
    T at[16 / sizeof(T)];
};
typedef LoadOf<scalar_t> Load;
struct alignas(16) Vec {
    acc_t at[VEC];
};
typedef LoadOf<unsigned> FourWords;  // of bytes
struct alignas(8) HalfVec {
    acc_t at[VEC / 2];
};
struct alignas(VEC * sizeof(out_t)) Store {  // a Vec in the dtype of the results
    out_t at[VEC];
};

template <typename T>
__device__ __forceinline__ bool aligned(const void *place) {
    return (unsigned long long)place % sizeof(T) == 0;
}

// Whether every row of a matrix is aligned to 128 bits.
template <typename T>
__device__ __forceinline__ bool aligned_rows(const T *rows, int64 stride) {
    return aligned<LoadOf<T>>(rows) && stride % (16 / sizeof(T)) == 0;
}

// The first `count` of the numbers at `from` that 128 bits have room for, then zeros.
template <typename T>
__device__ __forceinline__ LoadOf<T> load(const T *from, int count) {
    const int most = 16 / sizeof(T);
    if (count >= most && aligned<LoadOf<T>>(from)) return *(const LoadOf<T> *)from;
    LoadOf<T> numbers;
#pragma unroll
    for (int i = 0; i < most; ++i) numbers.at[i] = i < count ? from[i] : (T)to_scalar(0);
    return numbers;
}

// The first `count` of LOAD numbers to `to`.
__device__ __forceinline__ void store(scalar_t *to, const Load &numbers, int count) {
    if (count >= LOAD && aligned<Load>(to)) {
        *(Load *)to = numbers;
        return;
    }
#pragma unroll
    for (int i = 0; i < LOAD; ++i) {
        if (i < count) to[i] = numbers.at[i];
    }
}

// ---- asynchronous copies --------------------------------------------------------------------------------------

#if !defined(L1ATTN_EMULATOR) && __CUDA_ARCH__ < 800
#define ASYNC_COPY 0
#else
#define ASYNC_COPY 1
#endif

// A T from global to shared memory, zeros if it does not exist; it is there after wait_async() and a barrier. Without such
// copies (before sm_80) it is there at once.
template <typename T>
__device__ __forceinline__ void copy_async(void *shared, const void *global, bool exists = true) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "the sizes that can be copied");
#if !ASYNC_COPY
    *(T *)shared = exists ? *(const T *)global : T{};
#elif defined(L1ATTN_EMULATOR)
    __pipeline_memcpy_async(shared, global, sizeof(T), exists ? 0 : sizeof(T));
#else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
                 "l"(global), "n"(sizeof(T)), "r"(exists ? (int)sizeof(T) : 0));
#endif
}
__device__ __forceinline__ void wait_async() {
#if defined(L1ATTN_EMULATOR)
    __pipeline_commit();
    __pipeline_wait_prior(0);
#elif ASYNC_COPY
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// ---- tensor cores ---------------------------------------------------------------------------------------------

#ifdef L1ATTN_EMULATOR
// What they make of the exact sum of their products: they round down.
inline float rounded_down(double sum) {
    const float x = (float)sum;
    return x - x == 0 && fabs((double)x) > fabs(sum) ? __uint_as_float(__float_as_uint(x) - 1) : x;
}

// A product of matrices that are spread over a warp as below. `multiply` is what a word of a and one of b, a number or two
// each, come to.
inline void multiply_add_words(float *const (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                               double (*multiply)(unsigned, unsigned)) {
    struct alignas(8) Part {
        unsigned at[6];
    };
    __shared__ Part parts[THREADS];
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    Part *warp = parts + (threadIdx.x - lane);
    warp[lane] = {{a[0], a[1], a[2], a[3], b0, b1}};
    __syncwarp();
    double sum[4] = {*c[0], *c[1], *c[2], *c[3]};
    for (int from = 0; from < 4; ++from) {
        const Part rows = warp[g * 4 + from];
        for (int column = 0; column < 2; ++column) {
            const Part b = warp[(2 * t + column) * 4 + from];
            for (int n = 0; n < 4; ++n) {  // n / 2: row g or g + 8; n % 2: which word of b
                sum[n / 2 * 2 + column] += multiply(rows.at[n / 2 + n % 2 * 2], b.at[4 + n % 2]);
            }
        }
    }
    __syncwarp();
    for (int n = 0; n < 4; ++n) *c[n] = rounded_down(sum[n]);
}
#endif

#if (DTYPE == F16 || DTYPE == BF16) && (defined(L1ATTN_EMULATOR) || __CUDA_ARCH__ >= 800)
#define TENSOR_CORES 1

// Two numbers, as tensor cores take them, and what rounding them took away.
struct Rounded {
    unsigned high, low;

    __device__ __forceinline__ Rounded(acc_t x, acc_t y) {
        const Pair h = {{to_scalar(x), to_scalar(y)}};
        const Pair l = {{to_scalar(x - to_acc(h.at[0])), to_scalar(y - to_acc(h.at[1]))}};
        high = *(const unsigned *)&h, low = *(const unsigned *)&l;
    }
    struct alignas(4) Pair {
        scalar_t at[2];
    };
};

// c += a @ b for matrices of 16 x 16 and 16 x 8 numbers, spread over a warp. With g = lane / 4 and t = lane % 4, a lane has
// of a:  rows g (a[0], a[2]) and g + 8 (a[1], a[3]), columns 2t and 2t + 1 (a[0], a[1]), and those 8 further (a[2], a[3])
// of b:  column g, rows 2t and 2t + 1 (b0), and those 8 further (b1)
// of c:  rows g (c0, c1) and g + 8 (c2, c3), columns 2t and 2t + 1
__device__ __forceinline__ void multiply_add(float &c0, float &c1, float &c2, float &c3, const unsigned (&a)[4],
                                             unsigned b0, unsigned b1) {
#ifndef L1ATTN_EMULATOR
#if DTYPE == F16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    multiply_add_words({&c0, &c1, &c2, &c3}, a, b0, b1, [](unsigned x, unsigned y) {
        const scalar_t *xs = (const scalar_t *)&x, *ys = (const scalar_t *)&y;
        return (double)to_acc(xs[0]) * to_acc(ys[0]) + (double)to_acc(xs[1]) * to_acc(ys[1]);
    });
#endif
}
__device__ __forceinline__ void multiply_add_pairs(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply_add(c[0], c[1], c[2], c[3], a, b0, b1);
}
#elif (DTYPE == F32 || BYTES) && (defined(L1ATTN_EMULATOR) || __CUDA_ARCH__ >= 800)
#define TENSOR_CORES 1

// A number as tensor cores take it, its first 11 bits, and what rounding took away: they ignore the last 13 bits.
struct Rounded {
    unsigned high, low;

    __device__ __forceinline__ explicit Rounded(float x)
        : high((__float_as_uint(x) + 0x1000) & 0xffffe000), low(__float_as_uint(x - __uint_as_float(high))) {}
};

// c += a @ b for matrices of 16 x 8 and 8 x 8 numbers, spread over a warp. With g = lane / 4 and t = lane % 4, a lane has
// of a:  rows g (a[0], a[2]) and g + 8 (a[1], a[3]), columns t (a[0], a[1]) and t + 4 (a[2], a[3])
// of b:  column g, rows t (b0) and t + 4 (b1)
// of c:  rows g (c0, c1) and g + 8 (c2, c3), columns 2t and 2t + 1
__device__ __forceinline__ void multiply_add(float &c0, float &c1, float &c2, float &c3, const unsigned (&a)[4],
                                             unsigned b0, unsigned b1) {
#ifndef L1ATTN_EMULATOR
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    multiply_add_words({&c0, &c1, &c2, &c3}, a, b0, b1, [](unsigned x, unsigned y) {
        return (double)__uint_as_float(x & 0xffffe000) * __uint_as_float(y & 0xffffe000);
    });
#endif
}

// Two numbers rounded to bfloat16, x in the lower half of the word.
__device__ __forceinline__ unsigned bfloat16_pair(float x, float y) {
#ifdef L1ATTN_EMULATOR
    const unsigned words[2] = {__float_as_uint(x), __float_as_uint(y)};
    unsigned rounded[2];
    for (int n = 0; n < 2; ++n) rounded[n] = (words[n] + 0x7fff + (words[n] >> 16 & 1)) >> 16;
    return rounded[1] << 16 | rounded[0];
#else
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    return pair;
#endif
}
__device__ __forceinline__ float first_of_pair(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float second_of_pair(unsigned pair) { return __uint_as_float(pair & 0xffff0000); }

// The same of pairs of bfloat16 numbers: with them as columns of a, and rows of b, for the columns and rows above.
__device__ __forceinline__ void multiply_add_pairs(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#ifndef L1ATTN_EMULATOR
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    multiply_add_words({&c[0], &c[1], &c[2], &c[3]}, a, b0, b1, [](unsigned x, unsigned y) {
        return (double)first_of_pair(x) * first_of_pair(y) + (double)second_of_pair(x) * second_of_pair(y);
    });
#endif
}
#else
#define TENSOR_CORES 0
#endif

// Keeps the compiler from computing what depends on these before the loop that the call is in.
template <typename T>
__device__ __forceinline__ void compute_again(const T *&address, int64 &stride) {
#ifndef L1ATTN_EMULATOR
    asm volatile("" : "+l"(address), "+l"(stride));
    __builtin_assume(__isGlobal(address));
#endif
}

__device__ __forceinline__ void compute_again(int &x) {
#ifndef L1ATTN_EMULATOR
    asm volatile("" : "+r"(x));
#endif
}

// ---- tiles in shared memory -----------------------------------------------------------------------------------

// A thread's part of Width channels of Block rows, by 128-bit loads; `whole` says that all exist and are aligned.
template <int Block, int Width>
struct ByRegisters {
    static const int GROUPS = Width / LOAD;  // 128-bit loads in a row
    static const int STEP = THREADS / GROUPS;  // rows that all threads load at once
    static const int MINE = (Block + STEP - 1) / STEP;
    static_assert(THREADS % GROUPS == 0, "all threads load whole rows together");
    Load numbers[MINE];

    __device__ __forceinline__ void fetch(const scalar_t *rows, int64 stride, int count, int channels, bool whole) {
        const int first = threadIdx.x / GROUPS, e = threadIdx.x % GROUPS * LOAD;
        const scalar_t *from = rows + first * stride + e;
#pragma unroll
        for (int n = 0; n < MINE; ++n, from += STEP * stride) {
            if (whole && Block % STEP == 0) {
                numbers[n] = *(const Load *)from;
            } else {
                numbers[n] = load(from, first + n * STEP < count ? channels - e : 0);
            }
        }
    }
};

// Block rows on their way, Width channels at a time, from global to shared memory: chunk[e][row]. fetch() may be called
// while the chunk before is read; what put() stores is there after a barrier.
template <int Block, int Width>
struct Transposed {
    static_assert(Width % LOAD == 0, "a chunk of a row is a whole number of 128-bit loads");
    static const int STRIDE = Block + VEC;  // the extra VEC spreads the transposed stores over the banks
    typedef acc_t Shared[Width][STRIDE];
#if DTYPE == F32 || DTYPE == F64  // number by number, past the registers
    static const int STEP = THREADS / Width;  // rows that all threads load at once
    static_assert(THREADS % Width == 0 && Block % STEP == 0, "all threads load whole rows together");

    __device__ __forceinline__ void fetch(Shared &chunk, const scalar_t *rows, int64 stride, int count, int channels,
                                          bool whole) {
        const int e = threadIdx.x % Width, first = threadIdx.x / Width;
        const scalar_t *from = rows + first * stride + e;
        if (whole) {
#pragma unroll
            for (int n = 0; n < Block; n += STEP, from += STEP * stride) copy_async<scalar_t>(&chunk[e][first + n], from);
        } else {
#pragma unroll
            for (int n = 0; n < Block; n += STEP, from += STEP * stride) {
                copy_async<scalar_t>(&chunk[e][first + n], from, first + n < count && e < channels);
            }
        }
    }
    __device__ __forceinline__ void put(Shared &) const { wait_async(); }
#else  // by registers, where they become acc_t
    typedef ByRegisters<Block, Width> Rows;
    static const int GROUPS = Rows::GROUPS, STEP = Rows::STEP, MINE = Rows::MINE;
    Rows rows;

    __device__ __forceinline__ void fetch(Shared &, const scalar_t *from, int64 stride, int count, int channels, bool whole) {
        rows.fetch(from, stride, count, channels, whole);
    }
    __device__ __forceinline__ void put(Shared &chunk) const {
        const int first = threadIdx.x / GROUPS, e = threadIdx.x % GROUPS * LOAD;
#pragma unroll
        for (int n = 0; n < MINE; ++n) {
            if (Block % STEP != 0 && first + n * STEP >= Block) break;
#pragma unroll
            for (int i = 0; i < LOAD; ++i) chunk[e + i][first + n * STEP] = to_acc(rows.numbers[n].at[i]);
        }
    }
#endif
};

// Rows in shared memory as they are: values[row][column], zeros where there are none. What fetch() copies is there after
// wait_async() and a barrier. The extra Pad numbers of a row spread the rows over the banks.
template <int Block, int Width, int Pad, typename T>
struct Straight {
    typedef T Shared[Block][Width + Pad];
    typedef LoadOf<T> Loaded;
    static const int LOADED = 16 / sizeof(T);
    static const int GROUPS = Width / LOADED, STEP = THREADS / GROUPS;  // 128-bit loads in a row, rows loaded at once
    static_assert(THREADS % GROUPS == 0 && Block % STEP == 0, "all threads load whole rows together, as many each");

    __device__ __forceinline__ static void fetch(Shared &values, const T *from, int64 stride, int rows, int columns) {
        int thread = threadIdx.x;
        compute_again(thread);  // what is the same for all tiles would take registers from the sums
        const int first = thread / GROUPS, column = thread % GROUPS * LOADED;
        const bool whole = columns >= Width && aligned_rows(from, stride);
        const T *mine = from + first * stride + column;
#pragma unroll
        for (int row = first; row < first + Block; row += STEP, mine += STEP * stride) {
            if (whole) {
                copy_async<Loaded>(&values[row][column], mine, row < rows);
            } else {
                *(Loaded *)&values[row][column] = load(mine, row < rows ? columns - column : 0);
            }
        }
    }
    // Whether all that this thread fetched, and waited for, is finite, and so far from infinity that rounding to fewer bits
    // does not lead there.
    __device__ __forceinline__ static bool finite(const Shared &values) {
        acc_t sum = 0;
#pragma unroll
        for (int n = 0; n < Block; n += STEP) {
            const Loaded numbers = *(const Loaded *)&values[threadIdx.x / GROUPS + n][threadIdx.x % GROUPS * LOADED];
#pragma unroll
            for (int i = 0; i < LOADED; ++i) sum += absolute(to_acc(numbers.at[i]));
        }
        return sum < LARGE;
    }
};

// Rows on their way, Width channels at a time, from global to shared memory, where they are acc_t, or bytes: chunk[row][e].
// fetch() may be called while the chunk before is read; what put() stores is there after a barrier.
template <int Block, int Width>
struct Converted {
#if DTYPE == F32 || DTYPE == F64 || BYTES  // past the registers
    typedef Straight<Block, Width, LOAD, scalar_t> Rows;  // the extra 128 bits spread the rows over the banks
    typedef typename Rows::Shared Shared;

    __device__ __forceinline__ void fetch(Shared &chunk, const scalar_t *rows, int64 stride, int count, int channels) {
        Rows::fetch(chunk, rows, stride, count, channels);
    }
    __device__ __forceinline__ void put(Shared &) const { wait_async(); }
#else  // by registers, where they become acc_t
    typedef acc_t Shared[Block][Width + VEC];
    typedef ByRegisters<Block, Width> Rows;
    static const int GROUPS = Rows::GROUPS, STEP = Rows::STEP, MINE = Rows::MINE;
    Rows rows;

    __device__ __forceinline__ void fetch(Shared &, const scalar_t *from, int64 stride, int count, int channels) {
        rows.fetch(from, stride, count, channels, count >= Block && channels >= Width && aligned_rows(from, stride));
    }
    __device__ __forceinline__ void put(Shared &chunk) const {
        const int first = threadIdx.x / GROUPS, e = threadIdx.x % GROUPS * LOAD;
#pragma unroll
        for (int n = 0; n < MINE; ++n) {
            if (Block % STEP != 0 && first + n * STEP >= Block) break;
#pragma unroll
            for (int i = 0; i < LOAD; i += VEC) {
                Vec group;
#pragma unroll
                for (int x = 0; x < VEC; ++x) group.at[x] = to_acc(rows.numbers[n].at[i + x]);
                *(Vec *)&chunk[first + n * STEP][e + i] = group;
            }
        }
    }
#endif
};

// A thread's numbers of one channel: groups of VEC neighbours, APART * VEC apart, so that a warp reads without conflicts.
template <int APART, int N>
__device__ __forceinline__ void read(acc_t (&mine)[N], const acc_t *channel, int place) {
    if (N == VEC / 2) {  // one group of half as many
        const HalfVec v = *(const HalfVec *)(channel + place * N);
#pragma unroll
        for (int i = 0; i < N; ++i) mine[i] = v.at[i];
        return;
    }
#pragma unroll
    for (int n = 0; n < N; n += VEC) {
        const Vec v = *(const Vec *)(channel + n * APART + place * VEC);
#pragma unroll
        for (int i = 0; i < VEC; ++i) mine[n + i] = v.at[i];
    }
}

const int SUMMED = 4;  // channels that are summed before they come to a sum: a chain of sums rounds more

// The sum of |x - y| over SUMMED channels. Attention forms its distances here in both passes, as weights are right only if a
// score is the same in both, to the last bit.
__device__ __forceinline__ acc_t distance(const acc_t (&x)[SUMMED], const acc_t (&y)[SUMMED]) {
    acc_t d[SUMMED];
#pragma unroll
    for (int e = 0; e < SUMMED; ++e) d[e] = absolute(x[e] - y[e]);
#pragma unroll
    for (int step = 1; step < SUMMED; step *= 2) {
#pragma unroll
        for (int e = 0; e < SUMMED; e += 2 * step) d[e] += d[e + step];
    }
    return d[0];
}

// Adds that of all pairs of x and y.
template <int N, int M>
__device__ __forceinline__ void add_distances(acc_t (&sum)[N][M], const acc_t (&xs)[SUMMED][N],
                                              const acc_t (&ys)[SUMMED][M]) {
#pragma unroll
    for (int r = 0; r < N; ++r) {
#pragma unroll
        for (int c = 0; c < M; ++c) {
            acc_t x[SUMMED], y[SUMMED];
#pragma unroll
            for (int e = 0; e < SUMMED; ++e) x[e] = xs[e][r], y[e] = ys[e][c];
            sum[r][c] += distance(x, y);
        }
    }
}

// ---- tiles of scores ------------------------------------------------------------------------------------------

// A thread's N x M scores to a tile of `out` with q_count x k_count outputs that exist; WHOLE: nothing to check.
template <int N_DOWN, int N_ACROSS, bool WHOLE, int N, int M>
__device__ __forceinline__ void store_tile(const acc_t (&scores)[N][M], out_t *out, int64 stride, int row, int column,
                                           int q_count, int k_count) {
#pragma unroll
    for (int r = 0; r < N; ++r) {
        const int i = r / VEC * VEC * N_DOWN + row * VEC + r % VEC;
#pragma unroll
        for (int c = 0; c < M; c += VEC) {
            out_t *to = out + c * N_ACROSS;
            Store group;
#pragma unroll
            for (int n = 0; n < VEC; ++n) group.at[n] = to_out(scores[r][c + n]);
            const int count = i < q_count ? k_count - c * N_ACROSS - column * VEC : 0;  // scores that exist
            if (WHOLE || (count >= VEC && aligned<Store>(to))) {
                *(Store *)to = group;
            } else {
#pragma unroll
                for (int n = 0; n < VEC; ++n) {
                    if (n < count) to[n] = group.at[n];
                }
            }
        }
        out += (r % VEC == VEC - 1 ? VEC * N_DOWN - VEC + 1 : 1) * stride;
    }
}

// A thread's N x M scores to a tile of `out` with q_count x k_count outputs that exist. N_DOWN x N_ACROSS threads share
// the tile; either way a thread owns groups of VEC neighbours, N_DOWN * VEC or N_ACROSS * VEC apart. `whole` says that all
// outputs exist and their rows are aligned to 128 bits.
template <int N_DOWN, int N_ACROSS, int N, int M>
__device__ __forceinline__ void store_part(const acc_t (&scores)[N][M], out_t *out, int64 stride, int row, int column,
                                           int q_count, int k_count, bool whole) {
    out += row * VEC * stride + column * VEC;
    if (whole) {
        store_tile<N_DOWN, N_ACROSS, true>(scores, out, stride, row, column, q_count, k_count);
    } else {
        store_tile<N_DOWN, N_ACROSS, false>(scores, out, stride, row, column, q_count, k_count);
    }
}

// The same of F of distances.
template <int N_DOWN, int N_ACROSS, int N, int M>
__device__ __forceinline__ void store_scores(acc_t (&distance)[N][M], out_t *out, int64 stride, int row, int column,
                                             int q_count, int k_count, bool whole, const ScoresForward &p) {
    apply_score((acc_t(&)[N * M])distance, p.score, p.scale, p.eps);
    store_part<N_DOWN, N_ACROSS>(distance, out, stride, row, column, q_count, k_count, whole);
}
