"""The public verbs, and the policy: what happens to a gradient once its norm is known.

    tree -> leaves -> partial -> (other shards) -> norm -> factor -> leaves -> tree

`flatten` (_tree) opens the tree, `kernels_for` (_dispatch) finds the library's kernels, `measure` (_kernels) and
the laws of _norms give the norm, `_decide` below turns it into one factor, and `scale` (_kernels) applies that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from gradclip import _arguments
from gradclip._dispatch import active, kernels_for, refuse_unwritable
from gradclip._errors import Culprit, NonFiniteError, described
from gradclip._kernels.dtypes import dtype_name
from gradclip._kernels.generic import Kernels
from gradclip._law import Law
from gradclip._norms import law
from gradclip._numbers import Measured, to_float32
from gradclip._tree import Flat
from gradclip._types import AllReduce, Array, Call, Clipped, Nonfinite, Scalar, Tree

T = TypeVar("T")


def global_norm(grads: Tree, norm_type: float = 2.0, *, all_reduce: AllReduce | None = None) -> Array:
    r"""Return the p-norm of all leaves taken together as one vector.

    .. math:: \|g\|_p = \Big(\sum_i \sum_j |g_{ij}|^p\Big)^{1/p}

    Parameters
    ----------
    grads : tree of arrays
        Any nesting of lists, tuples, dicts, named tuples and JAX pytree classes; float16, bfloat16, float32,
        float64, complex64 or complex128 leaves of any shape. None counts as nothing.
    norm_type : float, static
        p: any real number, `inf` (largest magnitude), `-inf` (smallest), 0 (number of non-zero elements).
    all_reduce : callable, optional
        Where the gradients are sharded: ``all_reduce(partial, op)`` joins a small array with those of the other
        shards, element by element, by op "sum", "max" or "min". `gradclip.distributed` makes them.

    Returns
    -------
    0-d array
        float32, or float64 if any leaf has 64-bit components. inf or NaN if an element is; inf also
        where the norm of finite gradients is beyond that dtype.

    Raises
    ------
    LeafError
        For a leaf that is no dense floating-point or complex array.
    TypeError
        For an `all_reduce` that is not callable.

    Notes
    -----
    At most 4 units in the last place off up to 1e5 elements (8, or 4/|p|, for p other than 0, 1, 2, inf, -inf),
    without overflow or underflow on the way: sums are kept wide, or in bins for big, middle and small magnitudes
    (Blue, ACM TOMS 4, 1978; Anderson, ACM TOMS 44, 2017). Never waits for the device. In JAX differentiable,
    0 at g = 0.

    Examples
    --------
    >>> import numpy as np
    >>> float(global_norm([np.float32([3e38]), {"b": np.float32([4e30])}]))
    3.0000000054977558e+38
    """
    norm_type = _arguments.norm_type(norm_type)
    flat = active(grads)
    kernels = kernels_for(flat)
    call = _arguments.shards(all_reduce, flat, norm_type, "propagate")
    return _plan(flat, kernels, law(norm_type), "propagate", _Bounds(), call).norm


def clip_grad_norm(
    grads: T,
    max_norm: Scalar,
    norm_type: float = 2.0,
    *,
    nonfinite: Nonfinite = "propagate",
    norm: Scalar | None = None,
    divide_by: Scalar | None = None,
    all_reduce: AllReduce | None = None,
) -> Clipped[T]:
    r"""Scale the gradients down, all by one factor, so that their global norm is at most `max_norm`.

    .. math:: \mathrm{clip}(g) = g \text{ if } \|g\| \le c, \text{ else } (c / \|g\|)\, g

    with c = `max_norm` (Pascanu, Mikolov, Bengio, ICML 2013). The inputs are never written to.

    Parameters
    ----------
    grads : tree of arrays
        As in `global_norm`.
    max_norm : float or 0-d array
        c >= 0, in the units of the gradients; inf clips nothing. A bound that lives on a device or is traced is
        not read by the host: there a negative one acts as 0, NaN gives NaN.
    norm_type : float, static
        p of the norm.
    nonfinite : {"propagate", "zero", "error"}, static
        If an element is inf or NaN: every element NaN, every leaf zeros, or `NonFiniteError`. "error" lets the
        host wait for one number; under `jax.jit` it needs `jax.experimental.checkify`.
    norm : float or 0-d array, optional
        The norm of these gradients (after `divide_by`), if it is known already. It is trusted.
    divide_by : float or 0-d array, optional
        Divide the gradients by this first (a loss scale, an accumulation count), at no extra pass. Positive and
        finite; one that is not, and that the host cannot see, gives NaN everywhere.
    all_reduce : callable, optional
        As in `global_norm`.

    Returns
    -------
    Clipped
        ``grads, norm = clip_grad_norm(...)``: the same tree, dtypes and devices; the norm before clipping,
        after `divide_by`, as `global_norm` returns it. Where nothing is clipped, every leaf comes back
        bit for bit (NumPy: the very same array).

    Raises
    ------
    LeafError
        As `global_norm`.
    NonFiniteError
        If `nonfinite` asks for it: the leaves that are not finite, with key paths and counts.
    ValueError, TypeError
        For a bad `max_norm`, `norm_type`, `nonfinite`, `norm` or `divide_by`, before any work.

    Examples
    --------
    >>> import numpy as np
    >>> grads, norm = clip_grad_norm({"w": np.array([6.0, 8.0]), "b": None}, max_norm=5.0)
    >>> grads, float(norm)
    ({'w': array([3., 4.]), 'b': None}, 10.0)
    """
    bounds = _Bounds.checked(max_norm, norm, divide_by)
    nonfinite, norm_type = _arguments.policy(nonfinite), _arguments.norm_type(norm_type)
    flat = active(grads)
    kernels = kernels_for(flat, bounds)
    call = None if norm is not None else _arguments.shards(all_reduce, flat, norm_type, nonfinite)
    plan = _plan(flat, kernels, law(norm_type), nonfinite, bounds, call)
    with kernels.quiet():
        return Clipped(flat.rebuild(kernels.scale(plan.arrays, plan.factor, plan.shift)), plan.norm)


def clip_grad_norm_(
    grads: Tree,
    max_norm: Scalar,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    nonfinite: Nonfinite = "propagate",
    norm: Scalar | None = None,
    divide_by: Scalar | None = None,
    all_reduce: AllReduce | None = None,
) -> Array:
    """Clip as `clip_grad_norm` does, in place; return the norm before clipping.

    The signature is that of `torch.nn.utils.clip_grad_norm_`, given gradients and not parameters. For arrays
    that can be written to (NumPy, CuPy, torch); all other parameters are those of `clip_grad_norm`.

    Parameters
    ----------
    error_if_nonfinite : bool
        True is `nonfinite="error"`: then nothing has been written when `NonFiniteError` is raised.

    Raises
    ------
    LeafError
        Also for a leaf that cannot be written to: a JAX array, a read-only NumPy array.

    Examples
    --------
    >>> import numpy as np
    >>> g = np.array([3.0, 4.0])
    >>> float(clip_grad_norm_([g], max_norm=1.0)), g
    (5.0, array([0.6, 0.8]))
    """
    if _arguments.flag("error_if_nonfinite", error_if_nonfinite):
        if nonfinite not in ("propagate", "error"):
            raise ValueError(f"error_if_nonfinite=True contradicts nonfinite={nonfinite!r}: pass one of them")
        nonfinite = "error"
    bounds = _Bounds.checked(max_norm, norm, divide_by)
    nonfinite, norm_type = _arguments.policy(nonfinite), _arguments.norm_type(norm_type)
    flat = active(grads)
    kernels = kernels_for(flat, bounds)
    refuse_unwritable(flat, kernels, "clip_grad_norm")
    call = None if norm is not None else _arguments.shards(all_reduce, flat, norm_type, nonfinite)
    plan = _plan(flat, kernels, law(norm_type), nonfinite, bounds, call)
    with kernels.quiet():
        kernels.scale_into(kernels.distinct(plan.arrays), plan.factor, plan.shift)
    return plan.norm


class _Bounds(NamedTuple):
    """The scalars of a call: each a float or a 0-d array as it comes, then a number of the kernels'."""

    max_norm: Any = math.inf
    norm: Any = None
    divide_by: Any = None

    @classmethod
    def checked(cls, max_norm: Any, norm: Any, divide_by: Any) -> _Bounds:
        return cls(
            _arguments.scalar("max_norm", max_norm),
            None if norm is None else _arguments.scalar("norm", norm, finite=False),
            None if divide_by is None else _arguments.scalar("divide_by", divide_by, positive=True),
        )


class _Plan(NamedTuple):
    """All that is known before the first element is written."""

    arrays: Sequence[Array]
    norm: Array
    factor: Array
    shift: Array | None


def _plan(
    flat: Flat,
    kernels: Kernels,
    p: Law,
    nonfinite: Nonfinite,
    bounds: _Bounds,
    all_reduce: Call | None,
) -> _Plan:
    """Measure the gradients, decide on the factor, and raise if the policy asks for it."""
    with kernels.quiet():
        arrays = kernels.adopted(flat.values)
        acc, home = kernels.accumulation(arrays), kernels.devices(arrays)[0]
        if all_reduce is not None:
            all_reduce.wide = kernels.reported(arrays) == kernels.xp.float64
        numbers = _Bounds(*(None if x is None else kernels.argument(x, acc, home) for x in bounds))
        decide = kernels.staged(_decide, arrays, all_reduce)
        norm, factor, shift, root, total = decide(
            kernels, arrays, numbers, law=p, nonfinite=nonfinite, all_reduce=all_reduce
        )
        if nonfinite == "error":
            _raise_if_bad(kernels, flat, arrays, norm, root, total, all_reduce)
    return _Plan(arrays, kernels.report(norm), factor, shift)


def _decide(
    kernels: Kernels,
    arrays: Sequence[Array],
    bounds: _Bounds,
    *,
    law: Law,
    nonfinite: Nonfinite,
    all_reduce: Call | None,
) -> tuple[Array, Array, Array | None, Array, Array]:
    """The policy: every row of the table of cases, as one factor. Nothing in here waits for a device."""
    xp, acc = kernels.xp, kernels.accumulation(arrays)
    max_norm, divisor = bounds.max_norm, bounds.divide_by
    with kernels.on(kernels.devices(arrays)[0]):
        if divisor is not None:
            positive = xp.logical_and(divisor.root > 0, divisor.root < math.inf)
            divisor = Measured(
                xp.where(positive, divisor.root, math.nan * xp.ones_like(divisor.root)), divisor.exponent
            )
        if bounds.norm is None:
            total = kernels.measure(arrays, law, acc, all_reduce)
            norm = total if divisor is None else total.divided(xp, divisor)
        else:  # it is the norm after the division
            norm = bounds.norm
            total = norm if divisor is None else norm.multiplied(xp, divisor)
        value = norm.value(xp)
        wide = kernels.reported(arrays) == xp.float64 or (all_reduce is not None and all_reduce.wide)
        reported = value if wide else to_float32(xp, value)
        one = xp.ones_like(value)
        bound = Measured(xp.maximum(max_norm.root, 0 * one), max_norm.exponent)  # NaN stays NaN
        # Both: a norm that was rounded up or down for the report must not make the difference.
        clips = norm.exceeds(xp, bound)
        clips = xp.logical_and(clips, Measured(xp.astype(reported, acc), None).exceeds(xp, bound))
        clips = xp.logical_and(clips, xp.isfinite(total.root))
        # c / ||g|| where it clips, else 1 / divide_by; in the other branch of each select stands a harmless 1.
        unity = Measured(one, None)
        factor, shift = kernels.quotient(
            bound.where(xp, clips, unity), total.where(xp, clips, unity if divisor is None else divisor)
        )
        factor = xp.where(xp.isnan(bound.root), bound.root, factor)
        root = total.root if divisor is None else xp.where(xp.isnan(divisor.root), divisor.root, total.root)
        factor = xp.where(xp.isfinite(root), factor, (0 if nonfinite == "zero" else math.nan) * one)
        return reported, factor, shift, root, total.root


def _raise_if_bad(
    kernels: Kernels,
    flat: Flat,
    arrays: Sequence[Array],
    norm: Array,
    root: Array,
    total: Array,
    call: Call | None,
) -> None:
    """Raise NonFiniteError if `root` is not finite: one number is read, and the leaves only if it is bad.

    `total` is the same on all shards, so that they ask each other for culprits either all or none.
    """
    if kernels.is_traced([*arrays, root]):
        for path, x in zip(flat.paths(), arrays, strict=True):
            kernels.insist(x, path)
        kernels.insist(root, "the global norm")
        return
    if math.isfinite(kernels.read(root, float)):
        return
    culprits = []
    for path, x in zip(flat.paths(), arrays, strict=True):
        nans, infs = kernels.census(x)
        if nans or infs:
            culprits.append(Culprit(path, f"{dtype_name(x)}, shape {tuple(x.shape)}", nans, infs))
    shards: list[str] = []
    if call is not None and not math.isfinite(kernels.read(total, float)):
        shards = call.gather("\n".join(described(culprits)))
    hint = (
        "" if culprits or any(shards) else "Every leaf here is finite: look at norm=, divide_by=, or the other shards."
    )
    raise NonFiniteError(str(kernels.read(norm, float)), culprits, hint, shards)
