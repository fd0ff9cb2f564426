// What a step of decoding computes: products, norms and rotations. inference/cpu.py compiles it and
// has the formulas.
//
// Sums are float32, and numbers are added in the same order however many rows there are, so that a
// row gets the same result in any company.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

struct bfloat16 {
    uint16_t bits;
};

constexpr int LANES = 16;   // numbers of a vector
constexpr long STEP = 32;  // columns that are multiplied at a time
constexpr long ROWS = 4;   // of the weight, at a time: their sums do not wait for each other

// ------------------------------------------------------------------ numbers

static inline Floats load(const float* p) {
    Floats values;
    memcpy(&values, p, sizeof values);
    return values;
}

static inline Floats load(const bfloat16* p) {
    Ints bits;
    for (int i = 0; i < LANES; i++) bits[i] = p[i].bits;
    return (Floats)(bits << 16);
}

static inline Floats load(const int8_t* p) {
    Ints values;
    for (int i = 0; i < LANES; i++) values[i] = p[i];
    return __builtin_convertvector(values, Floats);
}

static inline float widen(float x) { return x; }

static inline float widen(bfloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

static inline void store(float* p, float value) { *p = value; }

static inline void store(bfloat16* p, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);

    // To the nearest, ties to even. A NaN keeps a bit of its fraction.
    uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    if (value != value) rounded = bits | 0x400000;
    p->bits = rounded >> 16;
}

static inline float sum(Floats v) {
    const Ints half = {8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7};
    const Ints quarter = {4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11};
    v += __builtin_shuffle(v, half);
    v += __builtin_shuffle(v, quarter);
    return (v[0] + v[2]) + (v[1] + v[3]);
}

// ------------------------------------------------------------------ products

// y[m][n] = factor scales[n] sum_k x[m][k] w[n][k] for M rows of x, N rows of the weight and K
// columns, a multiple of STEP. The weight is read once.

// A weight that is stored as numbers, and where it is in memory.
template <class W>
struct Numbers {
    static constexpr int BYTES = STEP * sizeof(W);  // of STEP columns
    const W* w;
    long K;

    Numbers from(long n) const { return {w + n * K, K}; }
    const char* address(long r, long k) const { return (const char*)(w + r * K + k); }

    // Columns k + i to k + i + 15 of row r.
    Floats at(long r, long k, int i) const { return load(w + r * K + k + i); }

    // Where column k of x goes, so that it meets these columns.
    static long place(long k) { return k; }
};

// A weight of 4-bit codes, two to a byte, with a scale for each 64 of them: nf4.py.
struct NF4 {
    static constexpr int BYTES = STEP / 2;
    const uint8_t* packed;
    const float* scales;
    Floats code;
    long K;

    NF4 from(long n) const { return {packed + n * K / 2, scales + n * K / 64, code, K}; }
    const char* address(long r, long k) const { return (const char*)packed + (r * K + k) / 2; }

    // STEP columns are 16 bytes: their upper halves are the even columns, the lower ones the odd.
    Floats at(long r, long k, int i) const {
        const uint8_t* bytes = packed + (r * K + k) / 2;
        Ints index;
        for (int lane = 0; lane < LANES; lane++) index[lane] = bytes[lane];
        if (i == 0)
            index >>= 4;
        else
            index &= 15;
        return __builtin_shuffle(code, index) * scales[(r * K + k) / 64];
    }

    static long place(long k) { return k / STEP * STEP + k % 2 * LANES + k % STEP / 2; }
};

// R rows of the weight and C rows of x, whose R C sums stay in registers. Meanwhile the next R rows
// of the weight are fetched.
template <int R, int C, class X, class Weight>
static inline void tile(const float* x, Weight w, const float* scales, float factor, X* y, long N,
                        long K) {
    Floats sums[R][C] = {};
    for (long k = 0; k < K; k += STEP) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const char* next = w.address(r + R, k);
#pragma GCC unroll 8
            for (int byte = 0; byte < Weight::BYTES; byte += 64) __builtin_prefetch(next + byte);
        }

#pragma GCC unroll 8
        for (int i = 0; i < STEP; i += LANES) {
            Floats weights[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) weights[r] = w.at(r, k, i);
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) {
                Floats inputs = load(x + c * K + k + i);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) sums[r][c] += weights[r] * inputs;
            }
        }
    }

    for (int r = 0; r < R; r++) {
        float scale = factor;
        if (scales) scale *= scales[r];
        for (int c = 0; c < C; c++) store(y + c * N + r, sum(sums[r][c]) * scale);
    }
}

// R rows of the weight and all M of x. After the first tile these R rows are in the cache.
template <int R, class X, class Weight>
static inline void strip(const float* x, Weight w, const float* scales, float factor, X* y, long M,
                         long N, long K) {
    long m = 0;
    for (; m + 4 <= M; m += 4) tile<R, 4>(x + m * K, w, scales, factor, y + m * N, N, K);
    for (; m + 2 <= M; m += 2) tile<R, 2>(x + m * K, w, scales, factor, y + m * N, N, K);
    for (; m < M; m++) tile<R, 1>(x + m * K, w, scales, factor, y + m * N, N, K);
}

template <class X, class Weight>
static void product(const X* x, Weight w, const float* scales, float factor, X* y, long M, long N,
                    long K, int threads) {
    std::vector<float> wide(M * K);
    for (long m = 0; m < M; m++)
        for (long k = 0; k < K; k++) wide[m * K + Weight::place(k)] = widen(x[m * K + k]);

    const long strips = N / ROWS;
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < strips; i++) {
        long n = i * ROWS;
        const float* of_rows = scales ? scales + n : nullptr;
        strip<ROWS>(wide.data(), w.from(n), of_rows, factor, y + n, M, N, K);
    }

    for (long n = strips * ROWS; n < N; n++) {
        const float* of_row = scales ? scales + n : nullptr;
        strip<1>(wide.data(), w.from(n), of_row, factor, y + n, M, N, K);
    }
}

// ------------------------------------------------------------------ norms

enum Kind { RMS, OFFSET_RMS, LAYER };

// s = x + residual, where there is one, and y = norm(s), in rows of D numbers.
template <class X>
static void norm(const X* x, const X* residual, const X* weight, const X* bias, X* y, X* s,
                 long rows, long D, float eps, int kind) {
    std::vector<float> values(D);
    float* v = values.data();
    for (long row = 0; row < rows; row++, x += D, y += D) {
        for (long i = 0; i < D; i++) v[i] = widen(x[i]);
        if (residual) {
            // What is normalized is what the residual stream holds, its rounding included.
            for (long i = 0; i < D; i++) store(s + i, v[i] + widen(residual[i]));
            for (long i = 0; i < D; i++) v[i] = widen(s[i]);
            residual += D;
            s += D;
        }

        if (kind == LAYER) {
            float total = 0;
#pragma omp simd reduction(+ : total)
            for (long i = 0; i < D; i++) total += v[i];
            for (long i = 0; i < D; i++) v[i] -= total / D;
        }
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (long i = 0; i < D; i++) squares += v[i] * v[i];
        float factor = 1 / std::sqrt(squares / D + eps);

        if (kind == RMS) {
            // Llama rounds before it multiplies by the weight.
            for (long i = 0; i < D; i++) store(y + i, v[i] * factor);
            for (long i = 0; i < D; i++) store(y + i, widen(y[i]) * widen(weight[i]));
        } else {
            float offset = kind == OFFSET_RMS;
            for (long i = 0; i < D; i++) v[i] *= factor * (offset + widen(weight[i]));
            if (bias)
                for (long i = 0; i < D; i++) v[i] += widen(bias[i]);
            for (long i = 0; i < D; i++) store(y + i, v[i]);
        }
    }
}

// ------------------------------------------------------------------ rotations

// The heads of T tokens, of D numbers, of which the first R turn by the tables cos and sin (T, R).
template <class X>
static void turn(const X* x, const float* cos, const float* sin, X* y, long T, long heads, long D,
                 long R) {
    const long half = R / 2;
    for (long t = 0; t < T; t++, cos += R, sin += R) {
        for (long head = 0; head < heads; head++, x += D, y += D) {
            for (long i = 0; i < half; i++) {
                float left = widen(x[i]);
                float right = widen(x[i + half]);
                store(y + i, left * cos[i] - right * sin[i]);
                store(y + i + half, right * cos[i] + left * sin[i]);
            }
            for (long i = R; i < D; i++) y[i] = x[i];
        }
    }
}

// ------------------------------------------------------------------ by dtype

// Of x and of the weight.
#define PRODUCT(name, X, W)                                                                      \
    extern "C" void name(const X* x, const W* w, const float* scales, float factor, X* y,        \
                         long M, long N, long K, int threads) {                                  \
        product(x, Numbers<W>{w, K}, scales, factor, y, M, N, K, threads);                       \
    }

PRODUCT(product_float32_float32, float, float)
PRODUCT(product_float32_int8, float, int8_t)
PRODUCT(product_bfloat16_bfloat16, bfloat16, bfloat16)
PRODUCT(product_bfloat16_int8, bfloat16, int8_t)

#define NF4_PRODUCT(name, X)                                                                     \
    extern "C" void name(const X* x, const uint8_t* packed, const float* scales,                 \
                         const float* code, X* y, long M, long N, long K, int threads) {         \
        product(x, NF4{packed, scales, load(code), K}, nullptr, 1, y, M, N, K, threads);         \
    }

NF4_PRODUCT(nf4_float32, float)
NF4_PRODUCT(nf4_bfloat16, bfloat16)

#define LAYERS(norm_name, turn_name, X)                                                          \
    extern "C" void norm_name(const X* x, const X* residual, const X* weight, const X* bias,     \
                              X* y, X* s, long rows, long D, float eps, int kind) {              \
        norm(x, residual, weight, bias, y, s, rows, D, eps, kind);                               \
    }                                                                                            \
    extern "C" void turn_name(const X* x, const float* cos, const float* sin, X* y, long T,      \
                              long heads, long D, long R) {                                      \
        turn(x, cos, sin, y, T, heads, D, R);                                                    \
    }

LAYERS(norm_float32, turn_float32, float)
LAYERS(norm_bfloat16, turn_bfloat16, bfloat16)
