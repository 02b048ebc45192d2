"""The fixed part of the CUDA C that adds up: what leaves contribute to a norm, and how that joins. Text only."""

from __future__ import annotations

# Sums are kept as s + c, c the rounding errors of s (Knuth's two-sum). The intrinsics keep a product that is added from
# being fused into one of the additions only, which would spoil c. `across` joins what the threads of a block hold. They
# stand in `high` rows of `wide`: those of a column are joined, then every `length` neighbours of the first row, the
# first of which has the result. No other thread writes that: no barrier is needed there.
JOINING = """
__device__ __forceinline__ void add(double& s, double& c, double x) {
    const double sum = __dadd_rn(s, x), part = __dsub_rn(sum, s);
    c = __dadd_rn(c, __dadd_rn(__dsub_rn(s, __dsub_rn(sum, part)), __dsub_rn(x, part)));
    s = sum;
}
__device__ __forceinline__ void merge(double& s, double& c, double x, double d) { %(merge)s }
__device__ __forceinline__ double whole(double s, double c) { return fabs(c) < INFINITE ? s + c : s; }
__device__ __forceinline__ void clear(double* s, double* c) {
    for (int k = 0; k < %(slots)d; k++) s[k] = %(identity)s, c[k] = 0.0;
}
__device__ __forceinline__ void across(double* s, double* c, unsigned high, unsigned wide, unsigned length) {
    __shared__ double sums[THREADS], rests[THREADS];
    const unsigned me = threadIdx.x, y = me / wide, x = me %% wide %% length;
    #pragma unroll
    for (int k = 0; k < %(slots)d; k++) {
        sums[me] = s[k], rests[me] = c[k];
        __syncthreads();
        #pragma unroll 1
        for (unsigned half = THREADS / 2; half; half /= 2) {
            if (half >= high) continue;
            const unsigned other = me + half * wide;
            if (y < half && y + half < high) merge(sums[me], rests[me], sums[other], rests[other]);
            __syncthreads();
        }
        #pragma unroll 1
        for (unsigned half = THREADS / 2; half; half /= 2) {
            if (half >= length) continue;
            if (!y && x < half && x + half < length) merge(sums[me], rests[me], sums[me + half], rests[me + half]);
            __syncthreads();
        }
        s[k] = sums[me], c[k] = rests[me];
    }
}
"""

MERGE = {
    "sum": "add(s, c, x); c += d;",
    "max": "s = larger(s, x);",
    "min": "s = smaller(s, x);",
}

# What a few elements add to a sum. They are added up in their own precision, and of narrow ones only the sum becomes a
# double, for most GPUs have few units for doubles. A sum outside the range that is safe, where it may have lost bits or
# overflowed, or may yet do so in a bin, is made again of elements that a power of two has brought nearer to 1.
CONTRIBUTE = """
template <class R> __device__ __forceinline__ R term(R x) {
    %(term)s
}
template <class R, unsigned n> __device__ __forceinline__ R sum_of(const R (&x)[n]) {
    R sum = term(x[0]);
    #pragma unroll
    for (unsigned j = 1; j < n; j++) sum += term(x[j]);
    return sum;
}
template <class R, unsigned n> __device__ __forceinline__ R scaled_sum_of(R (&x)[n], R by) {
    #pragma unroll
    for (unsigned j = 0; j < n; j++) x[j] = times(x[j], by);
    return sum_of(x);
}
template <unsigned n> __device__ __forceinline__ void contribute(float (&x)[n], double* s, double* c) {
    float sum = sum_of(x);
    double back = 1.0;
    if (!(sum >= %(least_float)s && sum <= %(most_float)s)) {
        const bool is_small = sum < 1.0f;
        back = is_small ? %(down)s : %(up)s;
        sum = scaled_sum_of(x, is_small ? %(step_float)s : 1.0f / %(step_float)s);
    }
    s[1] = fma(doubled(sum), back, s[1]);
}
template <unsigned n> __device__ __forceinline__ void contribute(double (&x)[n], double* s, double* c) {
    double sum = sum_of(x);
    bool is_zero = true;
    #pragma unroll
    for (unsigned j = 0; j < n; j++) is_zero = is_zero && !((u64)__double_as_longlong(x[j]) << 1);
    if (is_zero || (sum >= %(least_double)s && sum <= %(most_double)s)) {
        add(s[1], c[1], sum);
        return;
    }
    const bool is_small = sum < 1.0;
    double bin = is_small ? s[0] : s[2], rest = is_small ? c[0] : c[2];
    add(bin, rest, scaled_sum_of(x, is_small ? %(step_double)s : 1.0 / %(step_double)s));
    if (is_small) s[0] = bin, c[0] = rest; else s[2] = bin, c[2] = rest;
}
template <class T, unsigned n> __device__ __forceinline__ void contribute(const Some<T, n>& e, double* s, double* c) {
    decltype(value(T())) x[n];
    #pragma unroll
    for (unsigned j = 0; j < n; j++) x[j] = value(e.of[j]);
    contribute(x, s, c);
}
template <class R, unsigned n> __device__ __forceinline__ void contribute(
    const Some<Pair<R>, n>& e, double* s, double* c
) {
    decltype(value(R())) x[2 * n];
    #pragma unroll
    for (unsigned j = 0; j < n; j++) x[2 * j] = value(e.of[j].re), x[2 * j + 1] = value(e.of[j].im);
    contribute(x, s, c);
}
"""

# The largest magnitude of real elements, found as whole numbers.
HIGHEST = """
template <class T, class N> __device__ __forceinline__ double highest(const T* p, const N& n) {
    decltype(size_bits(T())) most = 0;
    each<4>(p, n, [&](const auto& x) {
        #pragma unroll
        for (unsigned j = 0; j < sizeof(x) / sizeof(T); j++) {
            const auto bits = size_bits(x.of[j]);
            most = bits > most ? bits : most;
        }
    });
    T highest;
    highest.bits = most;
    return widen(highest);
}
"""

# One group (`keys` is null): a column for each block, whose chunks lie far apart, so that all blocks read side by side.
# Several: each block has chunks that follow each other, and writes a column at the end of each group that it meets.
# Column block + leaf, the leaf with which it began that group, is nobody else's: along the chunks both only grow.
# Columns that are skipped so hold nothing, under the same key: keys never fall from column to column.
MEASURE = """
%(gather)s
extern "C" __global__ void __launch_bounds__(THREADS, %(resident)d) gradclip_measure(
    const Table t, double* columns, unsigned stride, unsigned at, unsigned* keys, const double* seen, unsigned groups
) {
    double s[%(slots)d], c[%(slots)d];
    clear(s, c);
    const unsigned begin = keys ? blockIdx.x * t.chunks / gridDim.x : blockIdx.x;
    const unsigned end = keys ? (blockIdx.x + 1) * t.chunks / gridDim.x : t.chunks, step = keys ? 1 : gridDim.x;
    double peak = 0.0;  // the largest magnitude of real elements, where that is asked for
    unsigned since = t.leaves;  // the first leaf of this column
    %(chunks)s
}
"""
FLUSH = """
        if (keys && since == t.leaves) since = low;
        %(choice)s
        const bool ends = chunk + step >= end;
        if (!ends && !(keys && is_last && t.to[low + 1] != t.to[low])) continue;
        %(peak)s
        peak = 0.0;
        across(s, c, 1, THREADS, THREADS);
        const unsigned mine = at + blockIdx.x + (keys ? since : 0);
        const unsigned next = keys ? at + blockIdx.x + low + 1 + (ends && is_last) : mine + 1;
        for (unsigned i = mine + threadIdx.x; i < next; i += THREADS) {
            for (int k = 0; k < %(slots)d; k++)
                columns[k * (u64)stride + i] = i == mine ? whole(s[k], c[k]) : %(identity)s;
            if (keys) keys[i] = t.to[low];
        }
        clear(s, c);
        since = t.leaves;
"""

# Leaves of which an axis is kept: see `tiles`. A group has `parts` columns, side by side: of this leaf's strips of rows
# and pieces of runs, and of other leaves'.
SPREAD = """
%(gather)s
extern "C" __global__ void __launch_bounds__(THREADS, %(resident)d) gradclip_spread(
    const Tiles t, double* columns, unsigned stride, unsigned* keys, const double* seen, unsigned groups
) {
    double s[%(slots)d], c[%(slots)d];
    for (unsigned tile = blockIdx.x; tile < t.tiles; tile += gridDim.x) {
        %(find)s
        const Area area(t, low, tile - t.first[low]);
        const unsigned key = t.group[low] + area.group;
        const bool is_first = threadIdx.x < area.wide && threadIdx.x %% area.width == 0;
        const double n = is_first ? area.rows * (double)(t.inner[low] < area.run ? t.inner[low] : area.run) : 0.0;
        double peak = 0.0;
        clear(s, c);
        %(choice)s
        %(peak)s
        across(s, c, area.high, area.wide, area.width);
        if (!is_first) continue;
        const u64 i = t.to[low] + area.group * (u64)t.parts[low] + area.part;
        for (int j = 0; j < %(slots)d; j++) columns[j * (u64)stride + i] = whole(s[j], c[j]);
        keys[i] = key;
    }
}
"""

# The columns of group `g`. Without keys: every `groups`-th. With keys (section * groups + g, rising; a section is one
# kind of leaves, or all of which an axis is kept): those with its key in each section, found by halving.
COLUMNS = "const double* columns, unsigned stride, const unsigned* keys, unsigned sections"
JOIN = f"""
__device__ __forceinline__ void join(double* s, double* c, unsigned g, unsigned groups, {COLUMNS}) {{
    clear(s, c);
    for (unsigned section = 0; section < sections; section++) {{
        const unsigned key = section * groups + g;
        unsigned low = keys ? 0 : g, high = keys ? stride : 0;
        while (low < high) {{
            const unsigned middle = (low + high) / 2;
            if (keys[middle] < key) low = middle + 1; else high = middle;
        }}
        const unsigned step = keys ? 1 : groups;
        const u64 far = blockDim.x * (u64)step;
        for (u64 i = low + (u64)threadIdx.x * step; i < stride && (!keys || keys[i] == key); i += far)
            for (int k = 0; k < %(slots)d; k++) merge(s[k], c[k], columns[k * (u64)stride + i], 0.0);
    }}
    across(s, c, 1, blockDim.x, blockDim.x);
}}
"""

JOINED = """
extern "C" __global__ void __launch_bounds__(THREADS) gradclip_join(double* out, unsigned groups, %(columns)s) {
    double s[%(slots)d], c[%(slots)d];
    const unsigned g = blockIdx.x;
    join(s, c, g, groups, columns, stride, keys, sections);
    if (threadIdx.x) return;
    for (int k = 0; k < %(slots)d; k++) out[k * (u64)groups + g] = whole(s[k], c[k]);
}
"""
