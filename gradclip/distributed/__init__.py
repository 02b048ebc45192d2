"""One norm across devices, processes and machines: makers of `all_reduce`, and how to write one.

A partial is a small array of shape (slots, groups): a column for each group of `per`, one for the global norm, and at
most 4 rows, whatever the number of leaves. Partials join by "sum", "max" or "min". So one collective gives every shard
the norms of the whole (two for p outside 0, 1, 2, inf, -inf), and with them the same factors. The groups must be the
same on all shards, in the same order. `psum` joins over JAX's named axes, `mpi` over MPI ranks, `nccl` over GPUs,
`torch` over the ranks of a group of `torch.distributed`.

For another engine, any callable ``(partial, op) -> joined`` will do: `partial` is an array of the gradients' library
(NumPy's on a shard without leaves), `joined` its like, joined element by element with those of all other shards, the
same on every shard bit for bit. Its last row may say which norms are float64: a callable joins that row like any other.
Here with threads as shards:

>>> import threading, numpy as np, gradclip
>>> barrier, slots = threading.Barrier(2), [None, None]
>>> def over_threads(rank):
...     def all_reduce(partial, op):
...         slots[rank] = partial
...         barrier.wait()  # all partials are there
...         joined = {"sum": np.sum, "max": np.max, "min": np.min}[op](np.stack(slots), axis=0)
...         barrier.wait()  # all have read them
...         return joined
...     return all_reduce
>>> norms = [None, None]
>>> def shard(rank, grads):
...     norms[rank] = float(gradclip.global_norm(grads, all_reduce=over_threads(rank)))
>>> threads = [threading.Thread(target=shard, args=x) for x in [(0, [np.array([3.0])]), (1, [np.array([4.0])])]]
>>> for t in threads: t.start()
>>> for t in threads: t.join()
>>> norms
[5.0, 5.0]

A plain callable counts every leaf on every shard that holds it, and under ``nonfinite="error"`` each shard names its
own leaves only. An engine that knows copies, or can gather texts, derives from `Engine`:

- ``told``: a tree prefix from the caller, one entry for each leaf; every call reads it, so no one-shot iterator;
- ``kind(leaf, entry)``: a hashable for each leaf, before any work; leaves of one kind count alike;
- ``counts(kind, like)``: whether this shard counts its leaves of that kind: a bool, or a 0-d array like `like`;
- ``join(partial, op, call)``: the collective. `call` says what all shards must agree on: `norm_type`, `nonfinite`, and
  `groups`, a text (``"all elements"``, ``"3 leaves"``, ``"labels 'enc', 'dec'"``);
- ``same_program``: True where all shards run one program, and so have leaves of the same dtypes: then no row of the
  partial says which norms are float64;
- ``gather(text)``: the texts of all shards by rank, on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradclip._tree import lasting
from gradclip._types import Engine, Tree

__all__ = ["Engine", "mpi", "nccl", "psum", "torch"]


def psum(axis_name: str | Sequence[str], varying: Tree = None) -> Engine:
    """Join over named axes of JAX: inside `shard_map`, `pmap`, and `vmap` with an `axis_name`.

    A leaf that is the same on all devices of an axis counts once: only the devices of index 0 count it.

    Parameters
    ----------
    axis_name : str or sequence of str
        The axes over which the gradients are spread, all of them in one collective.
    varying : tree of axis names, optional
        The axes over which each leaf varies: a tree prefix of the gradients, an entry being an axis name, a set of
        names, a `PartitionSpec` (so the `in_specs` of the gradients will do; ``PartitionSpec()``: over none), or
        None: as JAX tracks it. What is said here goes before what JAX tracks. Needed where JAX tracks nothing: in
        `vmap`, `pmap` and ``shard_map(check_vma=False)``.

    Returns
    -------
    Engine
        For ``all_reduce=``. The joined norm does not vary over the axes: it passes ``out_specs=PartitionSpec()``.

    Raises
    ------
    ValueError
        When it is used: if it is not known over which axes a leaf varies, or `varying` does not match the gradients.
    NameError
        When it is used: if there is no such axis.

    Notes
    -----
    One `lax.psum` (`pmax`, `pmin`) of at most 3 numbers for each group; two for p outside 0, 1, 2, inf, -inf. A leaf
    that varies over an axis that is not joined gives a norm that does, too: join over all axes, or average it first.
    Differentiable as the clip is: a replicated leaf's gradient is that of one device. Nothing is read on the host.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, gradclip
    >>> rows = jnp.array([[3.0], [4.0]])
    >>> norm = lambda row: gradclip.global_norm(row, all_reduce=psum("batch", varying="batch"))
    >>> jax.vmap(norm, axis_name="batch")(rows).tolist()
    [5.0, 5.0]
    """
    from gradclip.distributed._jax import Psum

    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    if not axes or not all(isinstance(axis, str) for axis in axes) or len(set(axes)) < len(axes):
        raise ValueError(f"psum takes an axis name or several different ones, got {axis_name!r}")
    return Psum(axes, lasting(varying, "varying"))


def mpi(comm: Any, replicated: Tree = None, *, gpu_aware: bool = False) -> Engine:
    """Join over the ranks of an MPI communicator (mpi4py), for NumPy, CuPy, torch on the CPU, and JAX outside `jit`.

    Every rank must call gradclip, with the same arguments, whatever leaves it holds. A rank may hold none where `per`
    is None: with `per`, all ranks need the same groups.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The norm is that of all leaves on the ranks of this communicator, no others.
    replicated : tree of bool, optional
        A tree prefix of the gradients: True for leaves of which all ranks hold equal copies. Those of rank 0 count.
    gpu_aware : bool
        Hand CuPy's device memory to MPI. False: by way of the host, 128 bytes for one group.

    Returns
    -------
    Engine
        For ``all_reduce=``.

    Raises
    ------
    TypeError, ValueError
        At once for something that is no intracommunicator. When it is used, on all ranks alike and with nothing
        clipped: if they do not agree on `norm_type`, on the groups, on whether ``nonfinite="error"``, or on the
        accumulation's dtype (JAX: give a rank without leaves an array of size 0). With `gpu_aware` that is not seen.

    Notes
    -----
    One `Allreduce` of 5 float64 numbers and the partial, 16 in all for one group; twice that for p outside 0, 1, 2,
    inf, -inf. A call with another number of groups than the last one takes one more. MPI promises the same result on
    all ranks, so the factor is the same bit for bit. A norm is float64 on all ranks if a leaf of its group is on any.
    ``nonfinite="error"`` raises on all ranks and names rank and key path, by one `allgather` more in that case only. A
    rank that raises or dies by itself leaves the others waiting: ``python -m mpi4py`` ends them all.

    Examples
    --------
    >>> from mpi4py import MPI  # doctest: +SKIP
    >>> joined = mpi(MPI.COMM_WORLD, replicated={"expert": False, "router": True})  # doctest: +SKIP
    >>> grads, norm = gradclip.clip_grad_norm(grads, 1.0, all_reduce=joined)  # doctest: +SKIP
    """
    from gradclip.distributed._mpi import Mpi

    return Mpi(comm, lasting(replicated, "replicated"), gpu_aware)


def nccl(comm: Any, replicated: Tree = None) -> Engine:
    """Join over the ranks of an NCCL communicator, for CuPy.

    Parameters
    ----------
    comm : cupy.cuda.nccl.NcclCommunicator
        The norm is that of all leaves on the ranks of this communicator. Its own device is where it joins.
    replicated : tree of bool, optional
        A tree prefix of the gradients: True for leaves of which all ranks hold equal copies. Those of rank 0 count.

    Returns
    -------
    Engine
        For ``all_reduce=``.

    Raises
    ------
    TypeError
        At once for something that is no communicator; when it is used, for gradients that are not CuPy's.

    Notes
    -----
    One `allReduce` of at most 4 float64 numbers for each group, on the current stream of the communicator's device; two
    for p outside 0, 1, 2, inf, -inf. The host does not wait, except on a rank without leaves. The ranks must agree on
    all arguments: NCCL would not tell. With `per`, the first call of each kind on a communicator asks all ranks, by one
    `allGather` for which the host waits, and raises ValueError on all of them if they mean different groups (not where
    a CUDA graph is captured: call once before). ``nonfinite="error"`` raises on all ranks and names rank and key path,
    by one `allGather` in that case only; each rank's text is cut at 4,096 bytes.

    Examples
    --------
    >>> comm = cupy.cuda.nccl.NcclCommunicator(size, unique_id, rank)  # doctest: +SKIP
    >>> gradclip.clip_grad_norm(grads, 1.0, all_reduce=nccl(comm))  # doctest: +SKIP
    """
    from gradclip.distributed._nccl import Nccl

    return Nccl(comm, lasting(replicated, "replicated"))


def torch(group: Any = None, replicated: Tree = None) -> Engine:
    """Join over the ranks of a process group of `torch.distributed`, for torch and NumPy.

    Every rank must call gradclip, with the same arguments, whatever leaves it holds. A rank may hold none where `per`
    is None: with `per`, all ranks need the same groups.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup or DeviceMesh, optional
        The norm is that of all leaves on the ranks of this group, no others. None: the default group, as it is when the
        engine is made. A mesh must have one dimension.
    replicated : tree of bool, optional
        A tree prefix of the gradients: True for leaves of which all ranks hold equal copies. Those of rank 0 of the
        group count.

    Returns
    -------
    Engine
        For ``all_reduce=``.

    Raises
    ------
    RuntimeError
        At once, if `torch.distributed` is not initialised.
    TypeError, ValueError
        At once for something that is no group, or a group without this rank. When it is used, with nothing clipped: for
        other arrays, DTensors, and tensors that record derivatives; and on all ranks alike if they do not agree on
        `norm_type`, on the groups, on whether ``nonfinite="error"``, or on the accumulation's dtype.

    Notes
    -----
    Where the group's backend works on the host (gloo, MPI), tensors of a device come there, so the host waits for them.
    One `all_gather` of 1,024 float64 numbers a rank (beyond 64 ranks fewer, 64 at least) shows every rank all partials
    and what each rank means, at every call. Ranks are added up in their order: the same bits on all. Longer partials,
    those of some 200 groups, are joined by one `all_reduce` more.

    Where it works on devices (NCCL), one `all_reduce` on the current stream, and the host does not wait, except on a
    rank without leaves (its current device is the one that joins), and at the first call of each kind on a group, which
    gathers those numbers in place of the `all_reduce`, or before it where the partial is longer. So a rank that differs
    from its first call on is told; one that begins to differ later is not: it gives a wrong norm, or leaves the others
    waiting until the group's timeout. While a CUDA graph is captured nothing is gathered: call once before.

    For p outside 0, 1, 2, inf, -inf, twice that. ``nonfinite="error"`` raises on all ranks and names rank and key path,
    by one `all_gather_object` in that case only. A rank that raises or dies by itself leaves the others waiting until
    the group's timeout.

    Examples
    --------
    >>> torch.distributed.init_process_group("gloo")  # doctest: +SKIP
    >>> joined = gradclip.distributed.torch(replicated={"expert": False, "router": True})  # doctest: +SKIP
    >>> grads, norm = gradclip.clip_grad_norm(grads, 1.0, all_reduce=joined)  # doctest: +SKIP
    """
    from gradclip.distributed._torch import Torch

    return Torch(group, lasting(replicated, "replicated"))
