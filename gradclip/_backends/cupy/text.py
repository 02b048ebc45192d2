"""The fixed part of the CUDA C: how a GPU goes through the memory of many leaves.

Text only. No header is included, so nothing has to be found on the user's machine.
"""

from __future__ import annotations

THREADS = 256
#: Leaves of one launch, without and with a column of groups. The table travels in the kernel's parameters, and those
#: may take 4 KB in all.
LEAVES = {False: 250, True: 200}
#: Groups of one launch that decides: one bit of each travels likewise.
GROUPS = 8192
#: Single numbers of one launch that makes a row of them: they travel likewise.
ENTRIES = 400
#: Where each output starts, in bytes: outputs share one allocation, and a plain one would be aligned like this too.
ALIGNMENT = 256

# Sums are kept as s + c, c the rounding errors of s (Knuth's two-sum). The intrinsics keep a product that is added from
# being fused into one of the additions only, which would spoil c. `across` joins what the threads of a block hold;
# thread 0 has the result, which no other thread writes: no barrier is needed there.
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
        if (me == 0) s[k] = sums[0], c[k] = rests[0];
    }
}
"""

MERGE = {
    "sum": "add(s, c, x); c += d;",
    "max": "s = larger(s, x);",
    "min": "s = smaller(s, x);",
}

# The leaves of one launch, sorted by kind (and group), cut into chunks of 2**bits elements. `table` fills it.
TABLE = """
struct Table {
    u64 from[%(leaves)d];             // where a leaf is
    unsigned to[%(leaves)d];          // to measure: the key of its group; to scale: its output, in units of 256 bytes
    %(group)s
    unsigned short first[%(leaves)d]; // its first chunk
    unsigned short last[%(leaves)d];  // the elements of its last chunk, less one
    unsigned short until[%(kinds)d];  // the end of each kind
    unsigned short leaves, chunks, bits;
};
static_assert(sizeof(Table) == %(bytes)d, "the host lays it out otherwise");
template <class T> struct __align__(16) Quad { T of[16 / sizeof(T)]; };
"""
GROUP = "unsigned group[%(leaves)d];       // its group"

# One chunk of one leaf: which leaf, where in it, how many elements.
CHUNKS = """
    for (unsigned chunk = begin; chunk < end; chunk += step) {
        unsigned low = 0, high = t.leaves;
        while (high - low > 1) {
            const unsigned middle = (low + high) / 2;
            if (t.first[middle] <= chunk) low = middle; else high = middle;
        }
        const bool is_last = chunk + 1 == (low + 1 < t.leaves ? t.first[low + 1] : t.chunks);
        const unsigned n = is_last ? t.last[low] + 1u : 1u << t.bits;
        const u64 skipped = (u64)(chunk - t.first[low]) << t.bits;
        %(each)s
    }
"""

# Calls `f` with the elements of a chunk, 16 bytes at a time where they lie so; and writes what it makes of them.
VISIT = """
template <bool writes, class T, class F> __device__ __forceinline__ void visit(const T* p, T* to, unsigned n, F f) {
    unsigned done = 0;
    if ((((u64)p | (u64)to) & 15) == 0) {
        const unsigned each = 16 / sizeof(T), quads = n / each;
        #pragma unroll 4
        for (unsigned i = threadIdx.x; i < quads; i += THREADS) {
            Quad<T> quad = ((const Quad<T>*)p)[i];
            #pragma unroll
            for (unsigned j = 0; j < each; j++) f(quad.of[j]);
            if (writes) ((Quad<T>*)to)[i] = quad;
        }
        done = quads * each;
    }
    for (unsigned i = done + threadIdx.x; i < n; i += THREADS) {
        T x = p[i];
        f(x);
        if (writes) to[i] = x;
    }
}
"""

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
        across(s, c);
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

# The columns of group `g`. Without keys: every `groups`-th. With keys (section * groups + g, rising; a section is one
# kind of leaves): those with its key in each section, found by halving.
JOIN = """
    double s[%(slots)d], c[%(slots)d];
    clear(s, c);
    for (unsigned section = 0; section < sections; section++) {
        const unsigned key = section * groups + g;
        unsigned low = keys ? 0 : g, high = keys ? stride : 0;
        while (low < high) {
            const unsigned middle = (low + high) / 2;
            if (keys[middle] < key) low = middle + 1; else high = middle;
        }
        const unsigned step = keys ? 1 : groups;
        for (u64 i = low + (u64)threadIdx.x * step; i < stride && (!keys || keys[i] == key); i += THREADS * (u64)step)
            for (int k = 0; k < %(slots)d; k++) merge(s[k], c[k], columns[k * (u64)stride + i], 0.0);
    }
    across(s, c);
"""
COLUMNS = "const double* columns, unsigned stride, const unsigned* keys, unsigned sections"

JOINED = """
extern "C" __global__ void __launch_bounds__(THREADS) gradclip_join(double* out, unsigned groups, %(columns)s) {
    const unsigned g = blockIdx.x;
    %(join)s
    if (threadIdx.x) return;
    for (int k = 0; k < %(slots)d; k++) out[k * (u64)groups + g] = whole(s[k], c[k]);
}
"""

# `rows` is out: the norm (in its own dtype, at the start of its place), the factor, the shift. `finite` likewise: of
# this shard's norm, and of that which all shards have in common.
SETTLE = """
struct Flags { unsigned bits[%(words)d]; };
extern "C" __global__ void __launch_bounds__(THREADS) gradclip_settle(
    double* rows, bool* finite, const Flags flags, unsigned begin, unsigned groups, bool zeroes, %(parameters)s
) {
    const unsigned g = begin + blockIdx.x;
    %(join)s
    if (threadIdx.x) return;
    const bool doubled = flags.bits[blockIdx.x / 32] >> (blockIdx.x %% 32) & 1;
    %(body)s
    if (doubled) narrow(%(norm)s, *(Double*)(rows + g)); else narrow(%(norm)s, *(Single*)(rows + g));
    rows[groups + g] = %(factor)s;
    rows[2 * groups + g] = %(shift)s;
    finite[g] = %(finite)s;
    finite[groups + g] = %(joined_finite)s;
}
"""
BOUND = "const double* {0}_at, unsigned {0}_step, double {0}_value"
READ = "{0}_at ? {0}_at[g * {0}_step] : {0}_value"

# Bounds of many groups as one row: numbers by value, and numbers on the device.
ROW = """
struct Row { u64 bits[%(entries)d]; unsigned char kind[%(entries)d]; };
extern "C" __global__ void __launch_bounds__(THREADS) gradclip_row(const Row row, double* out, unsigned n) {
    for (unsigned i = threadIdx.x; i < n; i += THREADS) {
        const void* p = (const void*)row.bits[i];
        %(cases)s
        out[i] = __longlong_as_double((long long)row.bits[i]);
    }
}
"""

# In place where `base` is null.
SCALE = """
extern "C" __global__ void __launch_bounds__(THREADS) gradclip_scale(
    const Table t, const double* factors, const double* shifts, char* base
) {
    const unsigned begin = blockIdx.x, end = t.chunks, step = gridDim.x;
    %(once)s
    %(chunks)s
}
"""
FACTOR = """
    const double factor = factors[%(group)s], shift = shifts ? shifts[%(group)s] : 1.0;
    const bool keep = factor == 1 && shift == 1;
    if (keep && !base) %(leave)s;
"""
