"""The fixed part of the CUDA C: how a GPU goes through the memory of many leaves.

Text only. No header is included, so nothing has to be found on the user's machine.
"""

from __future__ import annotations

THREADS = 256
#: What a table says of groups: nothing, for there is one; the group of each leaf; or of which an axis is kept.
ONE, WHOLE, KEPT = 0, 1, 2
#: Leaves of one launch, by that. The table travels in the kernel's parameters, and those may take 4 KB in all.
LEAVES = {ONE: 250, WHOLE: 200, KEPT: 88}
#: Of one launch that decides: how often float32 and float64 norms take turns. Likewise.
TURNS = 900
#: Of one launch that makes a row of numbers: how many single ones, repeated ones and arrays. Likewise.
ENTRIES = 338
#: Where each output starts, in bytes: outputs share one allocation, and a plain one would be aligned like this too.
ALIGNMENT = 256

# The leaves of one launch, sorted by kind (and group), cut into chunks of 2**bits bytes. `table` fills it.
TABLE = """
struct Table {
    u64 from[%(leaves)d];             // where a leaf is
    unsigned to[%(leaves)d];          // to measure: the key of its group; to scale: its output, in units of 256 bytes
    %(group)s
    unsigned short first[%(leaves)d]; // its first chunk
    unsigned short last[%(leaves)d];  // the elements of its last chunk, less one
    unsigned short until[%(kinds)d];  // the end of each kind
    unsigned short leaves, bits, chunks;
};
static_assert(sizeof(Table) == %(bytes)d, "the host lays it out otherwise");
"""
GROUP = "unsigned group[%(leaves)d];       // its group"

# Which line of a table has piece `%(piece)s`, of all that its lines have.
FIND = """
        unsigned low = 0, high = t.leaves;
        while (high - low > 1) {
            const unsigned middle = (low + high) / 2;
            if (t.first[middle] <= %(piece)s) low = middle; else high = middle;
        }
"""

# One chunk of one leaf: which leaf, where in it; `length` says how many elements.
CHUNKS = """
    for (unsigned chunk = begin; chunk < end; chunk += step) {
        %(find)s
        const bool is_last = chunk + 1 == (low + 1 < t.leaves ? t.first[low + 1] : t.chunks);
        const u64 skipped = (u64)(chunk - t.first[low]) << t.bits;
        const char* const source = (const char*)t.from[low] + skipped;
        %(each)s
    }
"""
#: How many elements `{0}` a chunk has.
LENGTH = "is_last ? t.last[low] + 1u : (1u << t.bits) / (unsigned)sizeof({0})"

# Calls `f` with elements, a few at a time, and writes what it makes of them to `to`. Memory is slow to answer, so what
# `batch` asks for is under way together: so many pieces of 16 bytes where elements lie side by side, else some of them.
# A batch of 0: one element after the other, for long formulas, of which one copy is enough. Elements come as many as
# fill 8 bytes, and before and after an edge of 16 bytes by ones.
VISIT = """
template <class T, unsigned n> struct Some { T of[n]; };
template <class T> struct __align__(16) Quad { T of[16 / sizeof(T)]; };

template <bool writes, unsigned most, class T, class A, class F> __device__ __forceinline__ void singly(
    const T* p, T* to, unsigned n, A at, F f
) {
    const unsigned few = most > 1 && sizeof(T) < 8 ? 8 / sizeof(T) : 1;
    for (unsigned k = 0; k < n; k += most) {
        Some<T, few> x[most / few];
        #pragma unroll
        for (unsigned j = 0; j < most; j++) x[j / few].of[j % few] = k + j < n ? p[at(k + j)] : T();
        #pragma unroll
        for (unsigned j = 0; j < most / few; j++) if (k + j * few < n) f(x[j]);
        #pragma unroll
        for (unsigned j = 0; j < most; j++) if (writes && k + j < n) to[at(k + j)] = x[j / few].of[j % few];
    }
}
template <bool writes, int batch, class T, class F> __device__ __forceinline__ void visit(
    const T* p, T* to, unsigned n, F f
) {
    const unsigned each = 16 / sizeof(T), few = sizeof(T) < 8 ? 8 / sizeof(T) : 1, t = threadIdx.x;
    unsigned head = (0u - (unsigned)(u64)p & 15) / (unsigned)sizeof(T);
    if (!batch || head > n || (u64)p % sizeof(T) || (writes && ((u64)p - (u64)to & 15))) head = n;
    const unsigned quads = (n - head) / each, rest = n - quads * each;
    if (batch) for (unsigned i = t; i < quads; i += batch * THREADS) {
        Quad<T> x[batch ? batch : 1];
        #pragma unroll
        for (int j = 0; j < batch; j++)
            if (i + j * THREADS < quads) x[j] = ((const Quad<T>*)(p + head))[i + j * THREADS];
        #pragma unroll
        for (int j = 0; j < batch; j++) {
            if (i + j * THREADS >= quads) continue;
            #pragma unroll
            for (unsigned k = 0; k < each; k += few) {
                Some<T, few> some;
                #pragma unroll
                for (unsigned m = 0; m < few; m++) some.of[m] = x[j].of[k + m];
                f(some);
                #pragma unroll
                for (unsigned m = 0; m < few; m++) x[j].of[k + m] = some.of[m];
            }
            if (writes) ((Quad<T>*)(to + head))[i + j * THREADS] = x[j];
        }
    }
    const auto at = [=](unsigned k) { const unsigned i = t + k * THREADS; return i < head ? i : i + quads * each; };
    singly<writes, batch ? 4 : 1>(p, to, t < rest ? (rest - t - 1) / THREADS + 1 : 0, at, f);
}
template <int batch, class T, class N, class F> __device__ __forceinline__ void each(const T* p, N n, F f) {
    visit<false, batch>(p, (T*)0, n, f);
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
    __shared__ double found[2][2][%(slots)d];
    #pragma unroll 1
    for (unsigned i = 0; i <= relative; i++) {
        double s[%(slots)d], c[%(slots)d];
        join(s, c, i * count + g, groups, columns, stride, keys, sections);
        if (!threadIdx.x) for (int k = 0; k < %(slots)d; k++) found[i][0][k] = s[k], found[i][1][k] = c[k];
    }
    const double *s = found[0][0], *c = found[0][1], *ps = found[1][0], *pc = found[1][1];
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
