"""How CUDA C reads and writes the numbers of a leaf. Text only, as in `text`.

The options under which a kernel is compiled may flush float32 subnormals to zero (CuPy's do). So what must not be is
said in PTX, which they do not touch, or done with whole numbers.
"""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """How C reads the elements of a dtype."""

    storage: str
    component: str  # the kind of one real component


#: In this order in a table.
KINDS = {
    "float16": Kind("Short<10, 5>", "float16"),
    "bfloat16": Kind("Short<7, 8>", "bfloat16"),
    "float32": Kind("Single", "float32"),
    "float64": Kind("Double", "float64"),
    "complex64": Kind("Pair<Single>", "float32"),
    "complex128": Kind("Pair<Double>", "float64"),
}
#: The kinds of real numbers.
REAL = [name for name, kind in KINDS.items() if kind.component == name]

# `value`: an element as an exact float, or double where a float holds less. `times`, `plus_times`, `doubled`, `singled`
# and `less`: what the machine does, but never with a subnormal flushed to zero, as CuPy's option -ftz=true has it for
# plain operations; only NVIDIA's compiler is given that. `widened` and `narrowed`: a short format of M bits of mantissa
# and E of exponent made a double, and back: rounded once, to nearest and ties to even. The bits of a short number,
# shifted into those of a double, stand for one that is 2**(1023 - bias) too small, subnormal or not; and a subnormal
# result is a whole number of the smallest unit. `larger` and `smaller`: NaN stays NaN.
NUMBERS = """
typedef unsigned long long u64;
#define THREADS %(threads)d
#define INFINITE __longlong_as_double(0x7ff0000000000000LL)
#define NOT_A_NUMBER __longlong_as_double(0x7ff8000000000000LL)

template <int M, int E> struct Short { unsigned short bits; };
struct Single { unsigned bits; };
struct Double { u64 bits; };
template <class R> struct Pair { R re, im; };

template <int M, int E> __device__ __forceinline__ double widened(u64 bits) {
    const u64 sign = bits >> (M + E) << 63, rest = bits & ((1ull << (M + E)) - 1);
    const bool finite = rest < (((1ull << E) - 1) << M);
    const double size = finite
        ? __longlong_as_double((long long)(rest << (52 - M))) *
              __longlong_as_double((long long)(2046 - ((1ull << (E - 1)) - 1)) << 52)
        : __longlong_as_double((long long)((0x7ffull << 52) | (rest << (64 - M) >> 12)));
    return __longlong_as_double((long long)(sign | (u64)__double_as_longlong(size)));
}
template <int M, int E> __device__ __forceinline__ unsigned narrowed(double x) {
    const u64 bits = (u64)__double_as_longlong(x), bias = (1ull << (E - 1)) - 1;
    const unsigned sign = (unsigned)(bits >> 63) << (M + E), infinite = ((1u << E) - 1) << M;
    u64 size = bits & 0x7fffffffffffffffull;
    if (size > 0x7ff0000000000000ull) return sign | infinite | 1u << (M - 1);
    if (size < (1024 - bias) << 52)
        return sign | (unsigned)__double2ll_rn(
            __longlong_as_double((long long)size) * __longlong_as_double((long long)(1022 + bias + M) << 52));
    size += (1ull << (51 - M)) - 1 + (size >> (52 - M) & 1);
    size = (size >> (52 - M)) - ((1023 - bias) << M);
    return sign | (size < infinite ? (unsigned)size : infinite);
}

#ifdef __CUDACC_RTC__
__device__ __forceinline__ double doubled(float x) {
    double y; asm("cvt.f64.f32 %%0, %%1;" : "=d"(y) : "f"(x)); return y;
}
__device__ __forceinline__ float singled(double x) {
    float y; asm("cvt.rn.f32.f64 %%0, %%1;" : "=f"(y) : "d"(x)); return y;
}
__device__ __forceinline__ float times(float x, float by) {
    float y; asm("mul.rn.f32 %%0, %%1, %%2;" : "=f"(y) : "f"(x), "f"(by)); return y;
}
__device__ __forceinline__ float plus_times(float sum, float x, float by) {
    float y; asm("fma.rn.f32 %%0, %%1, %%2, %%3;" : "=f"(y) : "f"(x), "f"(by), "f"(sum)); return y;
}
__device__ __forceinline__ bool less(float x, float y) {
    unsigned is;
    asm("{ .reg .pred p; setp.lt.f32 p, %%1, %%2; selp.u32 %%0, 1, 0, p; }" : "=r"(is) : "f"(x), "f"(y));
    return is;
}
__device__ __forceinline__ float value(Short<10, 5> x) {
    float y; asm("cvt.f32.f16 %%0, %%1;" : "=f"(y) : "h"(x.bits)); return y;
}
__device__ __forceinline__ void narrow(float x, Short<10, 5>& to) {
    asm("cvt.rn.f16.f32 %%0, %%1;" : "=h"(to.bits) : "f"(x));
}
#else
__device__ __forceinline__ double doubled(float x) { return (double)x; }
__device__ __forceinline__ float singled(double x) { return (float)x; }
__device__ __forceinline__ float times(float x, float by) { return x * by; }
__device__ __forceinline__ float plus_times(float sum, float x, float by) { return fmaf(x, by, sum); }
__device__ __forceinline__ bool less(float x, float y) { return x < y; }
__device__ __forceinline__ float value(Short<10, 5> x) { return (float)widened<10, 5>(x.bits); }
__device__ __forceinline__ void narrow(float x, Short<10, 5>& to) { to.bits = (unsigned short)narrowed<10, 5>(x); }
#endif
__device__ __forceinline__ double times(double x, double by) { return x * by; }
__device__ __forceinline__ bool less(double x, double y) { return x < y; }

__device__ __forceinline__ float value(Short<7, 8> x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ __forceinline__ float value(Single x) { return __uint_as_float(x.bits); }
__device__ __forceinline__ double value(Double x) { return __longlong_as_double((long long)x.bits); }
__device__ __forceinline__ void narrow(float x, Short<7, 8>& to) {
    const unsigned bits = __float_as_uint(x);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to.bits = (unsigned short)((nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
__device__ __forceinline__ void narrow(float x, Single& to) { to.bits = __float_as_uint(x); }

template <class T> __device__ __forceinline__ double widen(T x) { return doubled(value(x)); }
__device__ __forceinline__ double widen(Double x) { return value(x); }
template <int M, int E> __device__ __forceinline__ void narrow(double x, Short<M, E>& to) {
    to.bits = (unsigned short)narrowed<M, E>(x);
}
__device__ __forceinline__ void narrow(double x, Single& to) { to.bits = __float_as_uint(singled(x)); }
__device__ __forceinline__ void narrow(double x, Double& to) { to.bits = (u64)__double_as_longlong(x); }
__device__ __forceinline__ double as_float32(double x) { return doubled(singled(x)); }

// The bits of |x|: as whole numbers they rise with it, infinity above what is finite and NaN above all.
template <int M, int E> __device__ __forceinline__ unsigned size_bits(Short<M, E> x) { return x.bits & 0x7fffu; }
__device__ __forceinline__ unsigned size_bits(Single x) { return x.bits & 0x7fffffffu; }
__device__ __forceinline__ u64 size_bits(Double x) { return x.bits & 0x7fffffffffffffffull; }

__device__ __forceinline__ double larger(double a, double b) { return a > b || a != a ? a : b; }
__device__ __forceinline__ double smaller(double a, double b) { return a < b || a != a ? a : b; }
"""
