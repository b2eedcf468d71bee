// common.cuh: what every kernel shares. Its text is put in front of each kernel file before compilation.
//
// Given by -D:  DTYPE (0 float32, 1 float16, 2 bfloat16, 3 float64) and the parameters of the file's @variant line.
// Strides count elements and are 64-bit; every length, and the number of blocks, is below 2**31. Rows (the last
// dimension) are contiguous in every array that a kernel receives.

#define F32 0
#define F16 1
#define BF16 2
#define F64 3
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
#else
typedef float scalar_t;
typedef float acc_t;
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

struct Attention {  // what forward and backward share
    Matrix q, k, v;                   // (B, L, E), (B, S, E), (B, S, V)
    Matrix mask, lse;                 // (B, L, S); (B, L) in acc_t
    int64 mask_column;                // stride along S; rows of a mask need not be contiguous
    int batch_shape[MAX_BATCH_DIMS];  // in the backward pass, dimensions to sum over come last
    int length_q, length_k, channels, channels_v;
    int score;
    int mask_kind;                    // NO_MASK, BOOLEAN (bytes, 1 is to attend) or ADDITIVE (scalar_t)
    int left, right;                  // keys before and after its own place that a query attends to; -1: no limit
    Number scale, eps;
};

struct AttentionForward {
    Attention a;
    Matrix out;  // (B, L, V)
};

struct AttentionSaved {  // what the backward pass starts from
    Attention a;
    Matrix out, grad, grad_lse;  // (B, L, V) twice; (B, L) in acc_t, its address may be 0
    int kept, summed;            // matrices of a gradient, and batch entries that are summed into each
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
__device__ __forceinline__ scalar_t *matrix(const Matrix &m, const int *batch_shape, int index) {
    return (scalar_t *)m.data + offset(m, batch_shape, index);
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
    return (acc_t *)m.data + offset(m, batch_shape, index);
}

// The score of query i and key j with the mask added; -inf, whatever the score is, where the mask says so.
__device__ __forceinline__ acc_t masked(const Attention &a, int b, int i, int j, acc_t score) {
    if (a.mask_kind == NO_MASK) return score;
    const int64 place = offset(a.mask, a.batch_shape, b) + i * a.mask.row_stride + j * a.mask_column;
    if (a.mask_kind == BOOLEAN) return ((const unsigned char *)a.mask.data)[place] ? score : -infinity();
    const acc_t added = to_acc(((const scalar_t *)a.mask.data)[place]);
    return added == -infinity() ? added : score + added;
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

// ds of query i and key j, by a warp; `weight` becomes p, `score` the score without the mask.
__device__ __forceinline__ acc_t score_gradient(const AttentionSaved &p, int b, int i, int j, int lane,
                                                acc_t &weight, acc_t &score) {
    const Attention &a = p.a;
    const scalar_t *q = matrix(a.q, a.batch_shape, b) + i * a.q.row_stride;
    const scalar_t *k = matrix(a.k, a.batch_shape, b) + j * a.k.row_stride;
    const scalar_t *v = matrix(a.v, a.batch_shape, b) + j * a.v.row_stride;
    const scalar_t *grad = matrix(p.grad, a.batch_shape, b) + i * p.grad.row_stride;
    const scalar_t *out = matrix(p.out, a.batch_shape, b) + i * p.out.row_stride;
    score = score_of(warp_distance(q, k, a.channels, lane), a);
    acc_t product = 0, delta = 0;
    for (int c = lane; c < a.channels_v; c += 32) {
        product += to_acc(grad[c]) * to_acc(v[c]);
        delta += to_acc(grad[c]) * to_acc(out[c]);
    }
    product = warp_sum(product), delta = warp_sum(delta);
    if (p.grad_lse.data) delta -= accumulated(p.grad_lse, a.batch_shape, b)[i * p.grad_lse.row_stride];
    const acc_t lse = accumulated(a.lse, a.batch_shape, b)[i * a.lse.row_stride];
    weight = lse == -infinity() ? 0 : exponential(masked(a, b, i, j, score) - lse);
    return weight == 0 ? 0 : weight * (product - delta);  // what is masked may be NaN
}

// The sum of more and larger |h| might overflow where that of h * sign does not.
const acc_t LARGE = DTYPE == F64 ? 1e300 : 1e30;

// ---- 128-bit loads --------------------------------------------------------------------------------------------

const int LOAD = 16 / sizeof(scalar_t);  // numbers in a 128-bit load from global memory
const int VEC = 16 / sizeof(acc_t);      // numbers in a 128-bit load from shared memory

struct alignas(16) Load {
    scalar_t at[LOAD];
};
struct alignas(16) Vec {
    acc_t at[VEC];
};
struct alignas(VEC * sizeof(scalar_t)) Store {  // a Vec in the dtype of the arrays
    scalar_t at[VEC];
};

template <typename T>
__device__ __forceinline__ bool aligned(const void *place) {
    return (unsigned long long)place % sizeof(T) == 0;
}

// Whether every row of a matrix is aligned to 128 bits.
__device__ __forceinline__ bool aligned_rows(const scalar_t *rows, int64 stride) {
    return aligned<Load>(rows) && stride % LOAD == 0;
}

// The first `count` of LOAD numbers at `from`, then zeros.
__device__ __forceinline__ Load load(const scalar_t *from, int count) {
    if (count >= LOAD && aligned<Load>(from)) return *(const Load *)from;
    Load numbers;
#pragma unroll
    for (int i = 0; i < LOAD; ++i) numbers.at[i] = i < count ? from[i] : to_scalar(0);
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

// ---- tiles of scores ------------------------------------------------------------------------------------------

// F of a thread's N x M distances, to a tile of `out` with q_count x k_count outputs that exist. N_DOWN x N_ACROSS threads
// share the tile; either way a thread owns groups of VEC neighbours, N_DOWN * VEC or N_ACROSS * VEC apart. `whole` says
// that all outputs exist and their rows are aligned to 128 bits.
template <int N_DOWN, int N_ACROSS, int N, int M>
__device__ __forceinline__ void store_scores(acc_t (&distance)[N][M], scalar_t *out, int64 stride, int row,
                                             int column, int q_count, int k_count, bool whole,
                                             const ScoresForward &p) {
    apply_score((acc_t(&)[N * M])distance, p.score, p.scale, p.eps);
    out += row * VEC * stride + column * VEC;
#pragma unroll
    for (int r = 0; r < N; ++r) {
        const int i = r / VEC * VEC * N_DOWN + row * VEC + r % VEC;
#pragma unroll
        for (int c = 0; c < M; c += VEC) {
            const int j = c * N_ACROSS + column * VEC;
            scalar_t *to = out + c * N_ACROSS;
            Store scores;
#pragma unroll
            for (int n = 0; n < VEC; ++n) scores.at[n] = to_scalar(distance[r][c + n]);
            if (whole || (i < q_count && j + VEC <= k_count && aligned<Store>(to))) {
                *(Store *)to = scores;
            } else {
#pragma unroll
                for (int n = 0; n < VEC; ++n) {
                    if (i < q_count && j + n < k_count) to[n] = scores.at[n];
                }
            }
        }
        out += (r % VEC == VEC - 1 ? VEC * N_DOWN - VEC + 1 : 1) * stride;
    }
}
