"""How CUDA C reads and writes the numbers of a leaf. Text only, as in `text`.

A leaf's number becomes a double through integers, and a result becomes a leaf's number likewise: the options under
which a kernel is compiled may flush float32 subnormals to zero (CuPy's do), and integers do not care.
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

# `widened`: the bits of a format with M bits of mantissa and E of exponent, shifted into those of a double, stand for
# a number that is 2**(1023 - bias) too small; subnormal ones too. `narrowed`: the other way round, rounded once, to
# nearest and ties to even; what is subnormal is a whole number of the smallest unit. The machine converts float32 where
# nothing can be flushed. `larger` and `smaller`: NaN stays NaN.
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
template <int M, int E> __device__ __forceinline__ double widen(Short<M, E> x) { return widened<M, E>(x.bits); }
__device__ __forceinline__ double widen(Single x) {
    return x.bits & 0x7f800000u ? (double)__uint_as_float(x.bits) : widened<23, 8>(x.bits);
}
__device__ __forceinline__ double widen(Double x) { return __longlong_as_double((long long)x.bits); }
template <int M, int E> __device__ __forceinline__ void narrow(double x, Short<M, E>& to) {
    to.bits = (unsigned short)narrowed<M, E>(x);
}
__device__ __forceinline__ void narrow(double x, Single& to) {
    to.bits = fabs(x) > 2e-38 && fabs(x) < 3e38 ? __float_as_uint((float)x) : narrowed<23, 8>(x);
}
__device__ __forceinline__ void narrow(double x, Double& to) { to.bits = (u64)__double_as_longlong(x); }
__device__ __forceinline__ double as_float32(double x) { Single s; narrow(x, s); return widen(s); }

__device__ __forceinline__ double larger(double a, double b) { return a > b || a != a ? a : b; }
__device__ __forceinline__ double smaller(double a, double b) { return a < b || a != a ? a : b; }
"""
