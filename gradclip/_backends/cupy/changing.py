"""The fixed part of the CUDA C that changes leaves, element by element, or adds them up along an axis. Text only."""

from __future__ import annotations

from gradclip._backends.cupy.text import ALIGNMENT

# `x * shift * factor * shift`. A factor is quick where its first 48 bits are the sum of two normal floats: with these,
# and one rounding at the end, a product is as good as in double, for which most GPUs have few units.
FACTOR = """
struct Factor { double factor, shift; float high, low; bool keep, quick; };
__device__ __forceinline__ Factor factor_of(double factor, double shift) {
    const double high = __longlong_as_double(__double_as_longlong(factor) & ~0x1fffffffLL);
    Factor f;
    f.factor = factor, f.shift = shift, f.high = (float)high, f.low = (float)(factor - high);
    f.keep = factor == 1 && shift == 1;
    f.quick = shift == 1 && factor > %(least)s && factor < %(most)s;
    return f;
}
__device__ __forceinline__ float scaled(float x, const Factor& f) {
    const float rest = times(x, f.low);
    return plus_times(rest == rest ? rest : 0.0f, x, f.high);  // infinity has no rest
}
// The same where x * f.low may be subnormal. A subnormal result has the bits of a whole number, of so many 2**-149: to
// that 2**100 times as much is rounded where 12 is added. Conversions, as slow as doubles, are not needed.
__device__ __forceinline__ float scaled_to_little(float x, const Factor& f) {
    const float y = times(x, %(up)sf), sum = plus_times(times(y, f.low), y, f.high);
    if (fabs(sum) >= %(normal)sf) return times(sum, %(down)sf);
    const u64 size = ((u64)(__float_as_uint(y) & 0x7fffffffu) << 29) + (896ull << 52);
    const double product = __dadd_rn(__dmul_rn(__longlong_as_double((long long)size), f.factor), 12.0);
    return __uint_as_float((__float_as_uint(x) & 0x80000000u) | (unsigned)__double_as_longlong(product));
}
template <class T> __device__ __forceinline__ void scale_one(T& x, const Factor& f) {
    narrow(scaled(value(x), f), x);
}
__device__ __forceinline__ void scale_one(Single& x, const Factor& f) {
    float to = scaled(value(x), f);
    if ((__float_as_uint(to) & 0x7fffffffu) < 0x0d800000u && x.bits << 1) to = scaled_to_little(value(x), f);
    narrow(to, x);
}
__device__ __forceinline__ void scale_one(Double& x, const Factor& f) { narrow(value(x) * f.factor, x); }
template <class T, class N> __device__ __forceinline__ void scale(const T* p, T* to, N n, const Factor& f) {
    if (f.keep && p == to) return;
    if (f.quick) visit<true, 4>(p, to, n, [&](auto& x) {
        #pragma unroll
        for (unsigned j = 0; j < sizeof(x) / sizeof(T); j++) if (!f.keep) scale_one(x.of[j], f);
    });
    else visit<true, 0>(p, to, n, [&](auto& x) {
        narrow(f.factor == 0 ? 0.0 : widen(x.of[0]) * f.shift * f.factor * f.shift, x.of[0]);
    });
}
"""

# In place where `base` is null.
SCALE = """
extern "C" __global__ void __launch_bounds__(THREADS, 3) gradclip_scale(
    const Table t, const double* factors, const double* shifts, char* base
) {
    const unsigned begin = blockIdx.x, end = t.chunks, step = gridDim.x;
    %(chunks)s
}
"""
SCALE_SPREAD = """
extern "C" __global__ void __launch_bounds__(THREADS, 3) gradclip_scale_spread(
    const Tiles t, const double* factors, const double* shifts, char* base
) {
    for (unsigned tile = blockIdx.x; tile < t.tiles; tile += gridDim.x) {
        %(find)s
        const Area area(t, low, tile - t.first[low]);
        %(output)s
        %(factor)s
        %(choice)s
    }
}
"""
GROUP_FACTOR = "const Factor factor = factor_of(factors[{group}], shifts ? shifts[{group}] : 1.0);"
#: Where the output of the leaf `low` is.
OUTPUT = f"char* const output = base ? base + t.to[low] * {ALIGNMENT}ull : (char*)t.from[low];"

# min(max(x, low), high), with bounds as the leaf's dtype has them. A NaN stays as it is, and one as a bound spoils all.
CLAMP = """
template <class T> __device__ __forceinline__ void clamp(const T* p, T* to, unsigned n, double lower, double upper) {
    T low, high;
    narrow(lower, low), narrow(upper, high);
    if (lower != lower || upper != upper) low = high = lower != lower ? low : high;
    const bool spoilt = lower != lower || upper != upper;
    const auto least = value(low), most = value(high);
    visit<true, 4>(p, to, n, [&](auto& x) {
        #pragma unroll
        for (unsigned j = 0; j < sizeof(x) / sizeof(T); j++) {
            if (spoilt || less(value(x.of[j]), least)) x.of[j] = low;
            if (less(most, value(x.of[j]))) x.of[j] = high;
        }
    });
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) gradclip_clamp(
    const Table t, %(parameters)s, char* base
) {
    const unsigned begin = blockIdx.x, end = t.chunks, step = gridDim.x;
    %(chunks)s
}
"""

# The sum over `length` runs, each times a factor: a thread for each element of the result.
WEIGHTED = """
__device__ __forceinline__ double normal(double x, Single) { x = as_float32(x); return fabs(x) < %(single)s ? 0.0 : x; }
__device__ __forceinline__ double normal(double x, Double) { return fabs(x) < %(double)s ? 0.0 : x; }
template <class T, class R> __device__ __forceinline__ void weigh(
    const T* from, R* to, u64 at, u64 inner, unsigned length, const double* factors, const double* shifts
) {
    const u64 ONE = 0x3ff0000000000000ull;  // numbers are compared as whole ones: units for doubles are few
    const T* p = from + at + at / inner * inner * (length - 1);
    double sum = 0.0;
    for (unsigned k = 0; k < length; k += 8) {
        T of[8];
        #pragma unroll
        for (unsigned j = 0; j < 8; j++) of[j] = k + j < length ? p[(k + j) * inner] : T();
        #pragma unroll
        for (unsigned j = 0; j < 8; j++) {
            const u64 factor = k + j < length ? __double_as_longlong(factors[k + j]) : 0;
            const u64 shift = shifts && factor ? __double_as_longlong(shifts[k + j]) : ONE;
            if (!(factor << 1)) continue;  // whatever the element is
            double x = widen(of[j]), by = __longlong_as_double((long long)factor);
            if (shift != ONE) {
                const double step = __longlong_as_double((long long)shift);
                x = x * step * by, by = step;
            }
            sum += x * by;
        }
    }
    narrow(normal(sum, R()), to[at]);
}
extern "C" __global__ void __launch_bounds__(THREADS) gradclip_weighted(
    const Tiles t, const double* factors, const double* shifts, char* base
) {
    for (unsigned tile = blockIdx.x; tile < t.tiles; tile += gridDim.x) {
        %(find)s
        const u64 at = (u64)(tile - t.first[low]) * THREADS + threadIdx.x;
        if (at >= t.outer[low] * t.inner[low]) continue;
        %(choice)s
    }
}
"""
