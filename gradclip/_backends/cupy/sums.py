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
        for (unsigned half = THREADS / 2; half; half /= 2) {
            if (half >= high) continue;
            const unsigned other = me + half * wide;
            if (y < half && y + half < high) merge(sums[me], rests[me], sums[other], rests[other]);
            __syncthreads();
        }
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

# One group (`keys` is null): a column for each block, whose chunks lie far apart, so that all blocks read side by side.
# Several: each block has chunks that follow each other, and writes a column at the end of each group that it meets.
# Column block + leaf, the leaf with which it began that group, is nobody else's: along the chunks both only grow.
# Columns that are skipped so hold nothing, under the same key: keys never fall from column to column.
MEASURE = """
%(gather)s
extern "C" __global__ void __launch_bounds__(THREADS) gradclip_measure(
    const Table t, double* columns, unsigned stride, unsigned at, unsigned* keys, const double* seen, unsigned groups
) {
    double s[%(slots)d], c[%(slots)d];
    clear(s, c);
    const unsigned begin = keys ? blockIdx.x * t.chunks / gridDim.x : blockIdx.x;
    const unsigned end = keys ? (blockIdx.x + 1) * t.chunks / gridDim.x : t.chunks, step = keys ? 1 : gridDim.x;
    unsigned since = t.leaves;  // the first leaf of this column
    %(chunks)s
}
"""
FLUSH = """
        if (keys && since == t.leaves) since = low;
        %(choice)s
        const bool ends = chunk + step >= end;
        if (!ends && !(keys && is_last && t.to[low + 1] != t.to[low])) continue;
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

# Leaves of which an axis is kept. In memory such a leaf is `outer` rows of `length` runs, one a group, of `inner`
# elements. A tile is some rows of some whole runs, as many as a block has threads for; or of one piece of a longer run.
# Neighbouring threads read neighbours, down the rows. So a group has `parts` columns, side by side: of this leaf's
# strips of rows and pieces of runs, and of other leaves'.
TILES = """
struct Tiles {
    u64 from[%(leaves)d], inner[%(leaves)d];
    unsigned to[%(leaves)d];          // the first column of its first group
    unsigned parts[%(leaves)d];
    unsigned key[%(leaves)d];         // of its first group
    unsigned length[%(leaves)d], outer[%(leaves)d];
    unsigned first[%(leaves)d];       // its first tile
    unsigned short strips[%(leaves)d], pieces[%(leaves)d];
    unsigned short until[%(kinds)d];  // the end of each kind
    unsigned short leaves;
    unsigned tiles;
};
static_assert(sizeof(Tiles) == %(bytes)d, "the host lays it out otherwise");
struct Area { u64 stride, run; unsigned rows, wide, high; };
template <class T, class F> __device__ __forceinline__ void each(const T* p, const Area& area, F f) {
    const unsigned x = threadIdx.x %% area.wide, y = threadIdx.x / area.wide;
    if (y >= area.high) return;
    for (unsigned row = y; row < area.rows; row += area.high)
        for (u64 i = x; i < area.run; i += area.wide) f(p[row * area.stride + i], 0u);
}
"""
SPREAD = """
%(gather)s
extern "C" __global__ void __launch_bounds__(THREADS) gradclip_spread(
    const Tiles t, double* columns, unsigned stride, unsigned* keys, const double* seen, unsigned groups
) {
    double s[%(slots)d], c[%(slots)d];
    for (unsigned tile = blockIdx.x; tile < t.tiles; tile += gridDim.x) {
        %(find)s
        const u64 inner = t.inner[low];
        const unsigned pieces = t.pieces[low], strips = t.strips[low], length = t.length[low], outer = t.outer[low];
        const unsigned part = (tile - t.first[low]) %% (strips * pieces), piece = part %% pieces, strip = part / pieces;
        const unsigned each = inner < THREADS ? THREADS / (unsigned)inner : 1;
        const unsigned begin = (tile - t.first[low]) / (strips * pieces) * each;
        const u64 left = piece * inner / pieces, top = strip * (u64)outer / strips;
        Area area;
        area.stride = length * inner;
        area.run = (each < length - begin ? each : length - begin) * inner;
        if (pieces > 1) area.run = (piece + 1) * inner / pieces - left;
        area.rows = (unsigned)((strip + 1) * (u64)outer / strips - top);
        area.wide = area.run < THREADS ? (unsigned)area.run : THREADS;
        area.high = THREADS / area.wide;
        const unsigned width = inner < area.wide ? (unsigned)inner : area.wide;  // of a group, in threads
        const unsigned k = begin + threadIdx.x %% area.wide / width, key = t.key[low] + k;
        const bool is_first = threadIdx.x < area.wide && threadIdx.x %% width == 0;
        const u64 skipped = top * area.stride + begin * inner + left;
        const double n = is_first ? area.rows * (double)(inner < area.run ? inner : area.run) : 0.0;
        clear(s, c);
        %(choice)s
        across(s, c, area.high, area.wide, width);
        if (!is_first) continue;
        const u64 i = t.to[low] + k * (u64)t.parts[low] + part;
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
        for (u64 i = low + (u64)threadIdx.x * step; i < stride && (!keys || keys[i] == key); i += THREADS * (u64)step)
            for (int k = 0; k < %(slots)d; k++) merge(s[k], c[k], columns[k * (u64)stride + i], 0.0);
    }}
    across(s, c, 1, THREADS, THREADS);
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
