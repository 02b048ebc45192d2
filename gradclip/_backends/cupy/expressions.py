"""Symbols for arrays: the mathematics of a norm, and the policy, run on them once and read off as C.

`Symbols` stands where an array library's namespace stands. Whatever is written against `xp` and takes no branch on
an array's value (the laws of `_norms`, `_numbers`, the policy) gives an expression for one element or one scalar, in
double precision; `Printed` writes that down as statements of C. So kernels in C have no second copy of the formulas.

Only what those rooms call is here. A bool of an expression raises: a branch cannot be seen by running it once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

Operand: TypeAlias = "Expression | float"


def _operator(kind: str, form: str) -> Any:
    """A method that prints as `form`."""

    def method(self: Expression, other: Operand) -> Any:
        return getattr(self.symbols, kind)(form, self, other)

    return method


class Expression:
    """A value in C: `form` with the names of `args` in it. Equal ones are one object, so nothing is computed twice."""

    __hash__ = object.__hash__

    def __init__(self, symbols: Symbols, form: str, args: tuple[Expression, ...], kind: str, varies: bool) -> None:
        self.symbols, self.form, self.args, self.kind, self.varies = symbols, form, args, kind, varies

    @property
    def dtype(self) -> str:
        return self.kind

    def __bool__(self) -> bool:
        raise TypeError("an expression has no value yet: select with xp.where, do not branch")

    __add__, __radd__ = _operator("value", "{} + {}"), _operator("value", "{1} + {0}")
    __sub__, __rsub__ = _operator("value", "{} - {}"), _operator("value", "{1} - {0}")
    __mul__, __rmul__ = _operator("value", "{} * {}"), _operator("value", "{1} * {0}")
    __truediv__, __rtruediv__ = _operator("value", "{} / {}"), _operator("value", "{1} / {0}")
    __lt__, __gt__ = _operator("truth", "{} < {}"), _operator("truth", "{} > {}")
    __le__, __ge__ = _operator("truth", "{} <= {}"), _operator("truth", "{} >= {}")
    __eq__ = _operator("truth", "{} == {}")

    def __neg__(self) -> Expression:
        return self.symbols.value("-{}", self)

    def __pow__(self, power: float) -> Expression:
        # pow costs a hundred instructions and more; these cost one to three, and round no worse.
        forms = {
            1.0: "{0}",
            2.0: "{0} * {0}",
            3.0: "{0} * {0} * {0}",
            4.0: "({0} * {0}) * ({0} * {0})",
            0.5: "sqrt({0})",
        }
        if float(power) in forms:
            return self.symbols.value(forms[float(power)], self)
        return self.symbols.value("pow({}, {})", self, power)


def _function(kind: str, form: str) -> Any:
    """A function of the namespace that prints as `form`."""

    def method(self: Symbols, *operands: Operand) -> Any:
        return getattr(self, kind)(form, *operands)

    return method


class Symbols:
    """A namespace of the array API whose arrays are expressions. One for each program."""

    float32, float64 = "float32", "float64"

    def __init__(self) -> None:
        self._known: dict[Any, Expression] = {}

    # -- making expressions --------------------------------------------------------------------------------

    def _make(self, kind: str, form: str, operands: Sequence[Operand], varies: bool = False) -> Expression:
        args = tuple(x if isinstance(x, Expression) else self.number(x) for x in operands)
        key = (kind, form, *(id(x) for x in args))
        if key not in self._known:
            varies = varies or any(x.varies for x in args)
            self._known[key] = Expression(self, form, args, kind, varies)
        return self._known[key]

    def value(self, form: str, *operands: Operand) -> Expression:
        return self._make("float64", form, operands)

    def truth(self, form: str, *operands: Operand) -> Expression:
        return self._make("bool", form, operands)

    def given(self, name: str, *, varies: bool = False, kind: str = "float64") -> Expression:
        """A value that the C code has under this name; `varies`: from element to element."""
        return self._make(kind, name, (), varies)

    def number(self, value: float) -> Expression:
        """A constant. `repr` gives the digits that make exactly this number."""
        value = float(value)
        if math.isnan(value):
            return self.given("NOT_A_NUMBER")
        if math.isinf(value):
            return self.given("INFINITE" if value > 0 else "(-INFINITE)")
        return self.given(repr(value) if math.copysign(1.0, value) > 0 else f"({value!r})")

    # -- the namespace -------------------------------------------------------------------------------------

    where = _function("value", "{} ? {} : {}")
    logical_and, logical_or = _function("truth", "{} && {}"), _function("truth", "{} || {}")
    logical_not = _function("truth", "!{}")
    isnan, isinf = _function("truth", "{0} != {0}"), _function("truth", "fabs({}) == INFINITE")
    isfinite = _function("truth", "fabs({}) < INFINITE")
    abs, sqrt, log = _function("value", "fabs({})"), _function("value", "sqrt({})"), _function("value", "log({})")
    maximum, minimum = _function("value", "larger({}, {})"), _function("value", "smaller({}, {})")

    def zeros_like(self, x: Expression) -> Expression:
        return self.number(0.0)

    def ones_like(self, x: Expression) -> Expression:
        return self.number(1.0)

    def full_like(self, x: Expression, value: float) -> Expression:
        return self.number(value)

    def astype(self, x: Expression, dtype: str) -> Expression:
        """float32 stays a double in C, rounded: every float32 is one, and what reads it computes in double."""
        return self._make("float32", "as_float32({})", (x,)) if dtype == "float32" else self.value("{}", x)


class Printed:
    """The statements of C that compute expressions: those that vary from element to element apart from the others."""

    def __init__(self) -> None:
        self.once: list[str] = []
        self.each: list[str] = []
        self._names: dict[Expression, str] = {}

    def name(self, x: Expression) -> str:
        """What `x` is called in C; its statements, and those of all that it needs, have been written."""
        if x not in self._names:
            args = [self.name(arg) for arg in x.args]
            if args:
                self._names[x] = f"v{len(self.once) + len(self.each)}"
                kind = "bool" if x.kind == "bool" else "double"
                line = f"const {kind} {self._names[x]} = {x.form.format(*args)};"
                (self.each if x.varies else self.once).append(line)
            else:
                self._names[x] = x.form
        return self._names[x]
