"""The fixed part of the CUDA C: how a GPU goes through the memory of many leaves.

Text only. No header is included, so nothing has to be found on the user's machine.
"""

from __future__ import annotations

THREADS = 256
#: What a table says of groups: nothing, for there is one; the group of each leaf; or of which an axis is kept.
ONE, WHOLE, KEPT = 0, 1, 2
#: Leaves of one launch, by that. The table travels in the kernel's parameters, and those may take 4 KB in all.
LEAVES = {ONE: 250, WHOLE: 200, KEPT: 115}
#: Leaves of one launch that measures leaves of which an axis is kept: likewise.
TILED = 88
#: Of one launch that decides: how often float32 and float64 norms take turns. Likewise.
TURNS = 900
#: Of one launch that makes a row of numbers: how many single ones, repeated ones and arrays. Likewise.
ENTRIES = 338
#: Where each output starts, in bytes: outputs share one allocation, and a plain one would be aligned like this too.
ALIGNMENT = 256

# The leaves of one launch, sorted by kind (and group), cut into chunks of 2**bits elements. `table` fills it.
TABLE = """
struct Table {
    u64 from[%(leaves)d];             // where a leaf is
    %(inner)s
    unsigned to[%(leaves)d];          // to measure: the key of its group; to scale: its output, in units of 256 bytes
    %(group)s
    %(index)s first[%(leaves)d];      // its first chunk
    unsigned short last[%(leaves)d];  // the elements of its last chunk, less one
    unsigned short until[%(kinds)d];  // the end of each kind
    unsigned short leaves, bits;
    %(index)s chunks;
};
static_assert(sizeof(Table) == %(bytes)d, "the host lays it out otherwise");
"""
INNER = "u64 inner[%(leaves)d];            // so many elements side by side are in one group"
GROUP = "unsigned group[%(leaves)d];       // its first group"
LENGTH = "unsigned length[%(leaves)d];      // how many groups follow each other, again and again"

# Which line of a table has piece `%(piece)s`, of all that its lines have.
FIND = """
        unsigned low = 0, high = t.leaves;
        while (high - low > 1) {
            const unsigned middle = (low + high) / 2;
            if (t.first[middle] <= %(piece)s) low = middle; else high = middle;
        }
"""

# One chunk of one leaf: which leaf, where in it, how many elements.
CHUNKS = """
    for (unsigned chunk = begin; chunk < end; chunk += step) {
        %(find)s
        const bool is_last = chunk + 1 == (low + 1 < t.leaves ? t.first[low + 1] : t.chunks);
        const unsigned n = is_last ? t.last[low] + 1u : 1u << t.bits;
        const u64 skipped = (u64)(chunk - t.first[low]) << t.bits;
        %(each)s
    }
"""

# Calls `f` with the elements of a chunk and their places, 16 bytes at a time where they lie so; and writes what it
# makes of them.
VISIT = """
template <class T> struct __align__(16) Quad { T of[16 / sizeof(T)]; };
template <bool writes, class T, class F> __device__ __forceinline__ void visit(const T* p, T* to, unsigned n, F f) {
    unsigned done = 0;
    if ((((u64)p | (u64)to) & 15) == 0) {
        const unsigned each = 16 / sizeof(T), quads = n / each;
        #pragma unroll 4
        for (unsigned i = threadIdx.x; i < quads; i += THREADS) {
            Quad<T> quad = ((const Quad<T>*)p)[i];
            #pragma unroll
            for (unsigned j = 0; j < each; j++) f(quad.of[j], i * each + j);
            if (writes) ((Quad<T>*)to)[i] = quad;
        }
        done = quads * each;
    }
    for (unsigned i = done + threadIdx.x; i < n; i += THREADS) {
        T x = p[i];
        f(x, i);
        if (writes) to[i] = x;
    }
}
template <class T, class F> __device__ __forceinline__ void each(const T* p, unsigned n, F f) {
    visit<false>(p, (T*)0, n, f);
}
"""

# `rows` is out: the norm, the factor, the shift. A norm stands in its own dtype: float32 ones that follow each other
# lie side by side, from the place of the first of them. `finite` likewise: of this shard's norm, and of that which all
# shards have in common.
SETTLE = """
struct Turns { unsigned at[%(turns)d], n; };  // float32 from the first on, float64 from the second on, and so on
extern "C" __global__ void __launch_bounds__(THREADS) gradclip_settle(
    double* rows, bool* finite, const Turns turns, unsigned begin, unsigned count, bool zeroes, %(parameters)s
) {
    const unsigned g = begin + blockIdx.x;
    %(join)s
    if (threadIdx.x) return;
    unsigned low = 0, high = turns.n;
    while (high - low > 1) {
        const unsigned middle = (low + high) / 2;
        if (turns.at[middle] <= g) low = middle; else high = middle;
    }
    const unsigned since = turns.at[low];
    const bool doubled = low %% 2;
    %(body)s
    if (doubled) narrow(%(norm)s, *(Double*)(rows + g)); else narrow(%(norm)s, ((Single*)(rows + since))[g - since]);
    rows[count + g] = %(factor)s;
    rows[2 * (u64)count + g] = %(shift)s;
    finite[g] = %(finite)s;
    finite[count + g] = %(joined_finite)s;
}
"""
BOUND = "const double* {0}_at, unsigned {0}_step, double {0}_value"
READ = "{0}_at ? {0}_at[g * {0}_step] : {0}_value"

# The norms: of `groups` partials, those of parameters follow those of gradients where bounds are relative to them.
FOUND = """
    const unsigned groups = relative ? 2 * count : count;
    double s[%(slots)d], c[%(slots)d], ps[%(slots)d], pc[%(slots)d];
    join(s, c, g, groups, columns, stride, keys, sections);
    clear(ps, pc);
    if (relative) join(ps, pc, count + g, groups, columns, stride, keys, sections);
"""
RELATIVE = """
    double params = 0.0, params_exponent = 0.0;
    if (relative) {
        %(body)s
        params = %(mantissa)s, params_exponent = %(exponent)s;
    }
"""

# Bounds of many groups as one row: numbers by value, numbers on the device, each for one group or several, and rows.
ROW = """
struct Row { u64 bits[%(entries)d]; unsigned what[%(entries)d]; };  // the first group, 1 bit: one for all, the kind
extern "C" __global__ void __launch_bounds__(THREADS) gradclip_row(
    const Row row, double* out, unsigned n, unsigned end
) {
    const unsigned begin = row.what[0] >> 4;
    for (unsigned i = begin + blockIdx.x * THREADS + threadIdx.x; i < end; i += gridDim.x * THREADS) {
        unsigned low = 0, high = n;
        while (high - low > 1) {
            const unsigned middle = (low + high) / 2;
            if (row.what[middle] >> 4 <= i) low = middle; else high = middle;
        }
        const unsigned kind = row.what[low] & 7, k = row.what[low] & 8 ? 0 : i - (row.what[low] >> 4);
        const void* p = (const void*)row.bits[low];
        %(cases)s
        out[i] = __longlong_as_double((long long)row.bits[low]);
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
"""
UNCHANGED = "    if (keep && !base) {leave};\n"
# Where the first element of a chunk stands: in its run, and which run that is.
PHASE = """
        const u64 inner = t.inner[low], within = skipped % inner;
        const unsigned length = t.length[low], run = (unsigned)(skipped / inner % length);
"""
#: The group of element i of a chunk, which has at most 2**16 elements, and at most one end of a longer run.
IN_GROUP = (
    "t.group[low] + (run + (inner < n ? ((unsigned)within + i) / (unsigned)inner : i >= inner - within)) % length"
)

# The sum over `length` runs, each times a factor: a thread for each element of the result.
WEIGHTED = """
__device__ __forceinline__ double normal(double x, Single) { x = as_float32(x); return fabs(x) < %(single)s ? 0.0 : x; }
__device__ __forceinline__ double normal(double x, Double) { return fabs(x) < %(double)s ? 0.0 : x; }
template <class T, class R> __device__ __forceinline__ void weigh(
    const T* from, R* to, u64 skipped, unsigned n, u64 inner, unsigned length, const double* factors,
    const double* shifts
) {
    for (unsigned i = threadIdx.x; i < n; i += THREADS) {
        const u64 at = skipped + i;
        const T* p = from + at + at / inner * inner * (length - 1);
        double sum = 0.0;
        for (unsigned k = 0; k < length; k++) {
            const double factor = factors[k], shift = shifts ? shifts[k] : 1.0;
            if (factor != 0) sum += widen(p[k * inner]) * shift * factor * shift;
        }
        narrow(normal(sum, R()), to[at]);
    }
}
extern "C" __global__ void __launch_bounds__(THREADS) gradclip_weighted(
    const Table t, const double* factors, const double* shifts, char* base
) {
    const unsigned begin = blockIdx.x, end = t.chunks, step = gridDim.x;
    %(chunks)s
}
"""
