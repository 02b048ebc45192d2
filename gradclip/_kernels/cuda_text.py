"""The fixed part of the CUDA C: how a GPU goes through the memory of many leaves, and reads and writes their numbers.

Text only. No header is included, so nothing has to be found on the user's machine.

A leaf's number becomes a double through integers, and a result becomes a leaf's number likewise: the options under
which a kernel is compiled may flush float32 subnormals to zero (CuPy's do), and integers do not care.
"""

from __future__ import annotations

from typing import NamedTuple

THREADS = 256
#: Leaves of one launch. The table travels in the kernel's parameters, and those may take 4 KB in all.
LEAVES = 250
TABLE_BYTES = 4024
#: Where each output starts, in bytes: outputs share one allocation, and a plain one would be aligned like this too.
ALIGNMENT = 256


class Kind(NamedTuple):
    """How C reads the elements of a dtype."""

    storage: str
    component: str  # the kind of one real component
    bits: int  # of one component


#: In this order in a table.
KINDS = {
    "float16": Kind("Half", "float16", 16),
    "bfloat16": Kind("Brain", "bfloat16", 16),
    "float32": Kind("Single", "float32", 32),
    "float64": Kind("Double", "float64", 64),
    "complex64": Kind("Pair<Single>", "float32", 32),
    "complex128": Kind("Pair<Double>", "float64", 64),
}

NUMBERS = """
typedef unsigned long long u64;
#define THREADS %(threads)d
#define INFINITE __longlong_as_double(0x7ff0000000000000LL)
#define NOT_A_NUMBER __longlong_as_double(0x7ff8000000000000LL)

struct Half { unsigned short bits; };
struct Brain { unsigned short bits; };
struct Single { unsigned bits; };
struct Double { u64 bits; };
template <class R> struct Pair { R re, im; };

// The bits of a format with M bits of mantissa and E of exponent, shifted into those of a double, stand for a number
// that is 2**(1023 - bias) too small; subnormal ones too.
template <int M, int E> __device__ __forceinline__ double widened(u64 bits) {
    const u64 sign = bits >> (M + E) << 63, rest = bits & ((1ull << (M + E)) - 1);
    const bool finite = rest < (((1ull << E) - 1) << M);
    const double size = finite
        ? __longlong_as_double((long long)(rest << (52 - M))) *
              __longlong_as_double((long long)(2046 - ((1ull << (E - 1)) - 1)) << 52)
        : __longlong_as_double((long long)((0x7ffull << 52) | (rest << (64 - M) >> 12)));
    return __longlong_as_double((long long)(sign | (u64)__double_as_longlong(size)));
}
// Rounded once, to nearest and ties to even; the other way round.
template <int M, int E> __device__ __forceinline__ unsigned narrowed(double x) {
    const u64 bits = (u64)__double_as_longlong(x), bias = (1ull << (E - 1)) - 1;
    const unsigned sign = (unsigned)(bits >> 63) << (M + E), infinite = ((1u << E) - 1) << M;
    u64 size = bits & 0x7fffffffffffffffull;
    if (size > 0x7ff0000000000000ull) return sign | infinite | 1u << (M - 1);
    if (size < (1024 - bias) << 52)  // subnormal: a whole number of the smallest unit
        return sign | (unsigned)__double2ll_rn(
            __longlong_as_double((long long)size) * __longlong_as_double((long long)(1022 + bias + M) << 52));
    size += (1ull << (51 - M)) - 1 + (size >> (52 - M) & 1);
    size = (size >> (52 - M)) - ((1023 - bias) << M);
    return sign | (size < infinite ? (unsigned)size : infinite);
}
__device__ __forceinline__ double widen(Half x) { return widened<10, 5>(x.bits); }
__device__ __forceinline__ double widen(Brain x) { return widened<7, 8>(x.bits); }
__device__ __forceinline__ double widen(Single x) {  // the conversion of the machine, where nothing can be flushed
    return x.bits & 0x7f800000u ? (double)__uint_as_float(x.bits) : widened<23, 8>(x.bits);
}
__device__ __forceinline__ double widen(Double x) { return __longlong_as_double((long long)x.bits); }
__device__ __forceinline__ void narrow(double x, Half& to) { to.bits = (unsigned short)narrowed<10, 5>(x); }
__device__ __forceinline__ void narrow(double x, Brain& to) { to.bits = (unsigned short)narrowed<7, 8>(x); }
__device__ __forceinline__ void narrow(double x, Single& to) {
    to.bits = fabs(x) > 2e-38 && fabs(x) < 3e38 ? __float_as_uint((float)x) : narrowed<23, 8>(x);
}
__device__ __forceinline__ void narrow(double x, Double& to) { to.bits = (u64)__double_as_longlong(x); }
__device__ __forceinline__ double as_float32(double x) { Single s; narrow(x, s); return widen(s); }

// NaN stays NaN.
__device__ __forceinline__ double larger(double a, double b) { return a > b || a != a ? a : b; }
__device__ __forceinline__ double smaller(double a, double b) { return a < b || a != a ? a : b; }
"""

# Sums are kept as s + c, c the rounding errors of s (Knuth's two-sum). The intrinsics keep a product that is added from
# being fused into one of the additions only, which would spoil c.
JOINING = """
__device__ __forceinline__ void add(double& s, double x) { s += x; }
__device__ __forceinline__ void add(double& s, double& c, double x) {
    const double sum = __dadd_rn(s, x), part = __dsub_rn(sum, s);
    c = __dadd_rn(c, __dadd_rn(__dsub_rn(s, __dsub_rn(sum, part)), __dsub_rn(x, part)));
    s = sum;
}
__device__ __forceinline__ void merge(double& s, double& c, double x, double d) { %(merge)s }
__device__ __forceinline__ double whole(double s, double c) { return fabs(c) < INFINITE ? s + c : s; }

// Joins what the threads of a block hold; thread 0 has the result.
__device__ __forceinline__ void across(double* s, double* c) {
    __shared__ double sums[THREADS], rests[THREADS];
    const unsigned me = threadIdx.x;
    for (int k = 0; k < %(slots)d; k++) {
        sums[me] = s[k], rests[me] = c[k];
        __syncthreads();
        for (unsigned half = THREADS / 2; half; half /= 2) {
            if (me < half) merge(sums[me], rests[me], sums[me + half], rests[me + half]);
            __syncthreads();
        }
        if (me == 0) s[k] = sums[0], c[k] = rests[0];  // no other thread writes there: no barrier is needed
    }
}
"""

MERGE = {
    "sum": "add(s, c, x); c += d;",
    "max": "s = larger(s, x);",
    "min": "s = smaller(s, x);",
}
IDENTITY = {"sum": "0.0", "max": "0.0", "min": "INFINITE"}

# The leaves of one launch, sorted by kind, cut into chunks of 2**bits elements. `cuda_table` fills it.
TABLE = """
struct Table {
    u64 from[%(leaves)d];             // where a leaf is
    unsigned out[%(leaves)d];         // where its output starts, in units of 256 bytes
    unsigned short first[%(leaves)d]; // its first chunk
    unsigned short last[%(leaves)d];  // the elements of its last chunk, less one
    unsigned short until[%(kinds)d];  // the end of each kind
    unsigned short leaves, chunks, bits;
};
static_assert(sizeof(Table) == %(bytes)d, "the host lays it out otherwise");
template <class T> struct __align__(16) Quad { T of[16 / sizeof(T)]; };
"""

# One chunk of one leaf: which leaf, where in it, how many elements.
CHUNKS = """
    for (unsigned chunk = blockIdx.x; chunk < t.chunks; chunk += gridDim.x) {
        unsigned low = 0, high = t.leaves;
        while (high - low > 1) {
            const unsigned middle = (low + high) / 2;
            if (t.first[middle] <= chunk) low = middle; else high = middle;
        }
        const bool is_last = chunk + 1 == (low + 1 < t.leaves ? t.first[low + 1] : t.chunks);
        const unsigned n = is_last ? t.last[low] + 1u : 1u << t.bits;
        const u64 skipped = (u64)(chunk - t.first[low]) << t.bits;
        %(choice)s
    }
"""

MEASURE = """
template <class T, class F> __device__ __forceinline__ void visit(const T* p, unsigned n, F f) {
    unsigned done = 0;
    if (((u64)p & 15) == 0) {  // 16 bytes at a time
        const unsigned each = 16 / sizeof(T), quads = n / each;
        const Quad<T>* q = (const Quad<T>*)p;
        #pragma unroll 4
        for (unsigned i = threadIdx.x; i < quads; i += THREADS) {
            const Quad<T> quad = q[i];
            #pragma unroll
            for (unsigned j = 0; j < each; j++) f(quad.of[j]);
        }
        done = quads * each;
    }
    for (unsigned i = done + threadIdx.x; i < n; i += THREADS) f(p[i]);
}
%(gather)s
extern "C" __global__ void __launch_bounds__(THREADS) gradclip_measure(
    const Table t, double* table, unsigned stride, unsigned at, const double* seen
) {
    double s[%(slots)d], c[%(slots)d];
    for (int k = 0; k < %(slots)d; k++) s[k] = %(identity)s, c[k] = 0.0;
    %(chunks)s
    across(s, c);
    if (threadIdx.x == 0)
        for (int k = 0; k < %(slots)d; k++) table[k * (u64)stride + at + blockIdx.x] = whole(s[k], c[k]);
}
"""

SETTLE = """
extern "C" __global__ void __launch_bounds__(THREADS) gradclip_settle(%(parameters)s) {
    %(join)s
    if (threadIdx.x) return;
    %(body)s
}
"""

JOIN = """
    double s[%(slots)d], c[%(slots)d];
    for (int k = 0; k < %(slots)d; k++) {
        s[k] = %(identity)s, c[k] = 0.0;
        for (unsigned i = threadIdx.x; i < stride; i += THREADS) merge(s[k], c[k], table[k * (u64)stride + i], 0.0);
    }
    across(s, c);
"""

SCALE = """
template <class T> __device__ __forceinline__ T product(T x, double factor, double shift, bool keep) {
    T out = x;
    if (!keep) narrow(factor == 0 ? 0.0 : widen(x) * shift * factor * shift, out);
    return out;
}
template <class T> __device__ __forceinline__ void rewrite(
    const T* p, T* to, unsigned n, double factor, double shift, bool keep
) {
    unsigned done = 0;
    if ((((u64)p | (u64)to) & 15) == 0) {
        const unsigned each = 16 / sizeof(T), quads = n / each;
        #pragma unroll 4
        for (unsigned i = threadIdx.x; i < quads; i += THREADS) {
            Quad<T> quad = ((const Quad<T>*)p)[i];
            #pragma unroll
            for (unsigned j = 0; j < each; j++) quad.of[j] = product(quad.of[j], factor, shift, keep);
            ((Quad<T>*)to)[i] = quad;
        }
        done = quads * each;
    }
    for (unsigned i = done + threadIdx.x; i < n; i += THREADS) to[i] = product(p[i], factor, shift, keep);
}
// In place where `base` is null.
extern "C" __global__ void __launch_bounds__(THREADS) gradclip_scale(
    const Table t, const double* factor_at, const double* shift_at, char* base
) {
    const double factor = *factor_at, shift = shift_at ? *shift_at : 1.0;
    const bool keep = factor == 1 && shift == 1;
    if (keep && !base) return;
    %(chunks)s
}
"""
