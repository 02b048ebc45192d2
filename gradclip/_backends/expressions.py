"""A namespace whose arrays are text: the mathematics of a norm, and the policy, run on them once and read off as a
program.

This module stands where an array library's namespace stands. Whatever is written against `xp` and takes no branch on
an array's value (the laws of `_norms`, `_scaled`, the policy) gives an expression for one element or one scalar, in
double precision; `Printed` writes that down as statements of C, or of another language. So what runs there has no
second copy of the formulas.

Only what those rooms call is here. A bool of an expression raises: a branch cannot be seen by running it once.
"""

from __future__ import annotations

import math
from typing import Any


def _prints(form: str, dtype: str = "float64") -> Any:
    """A function, or a method of `Expression`, whose result prints as `form` with its operands in it."""

    def made(*operands: Expression | float) -> Expression:
        return Expression(form, tuple(x if isinstance(x, Expression) else number(x) for x in operands), dtype)

    return made


class Expression:
    """A value in C: `form` with the names of `args` in it. Without any, it has that name in C already."""

    __hash__ = object.__hash__

    def __init__(self, form: str, args: tuple[Expression, ...] = (), dtype: str = "float64") -> None:
        self.form, self.args, self.dtype = form, args, dtype

    def __bool__(self) -> bool:
        raise TypeError("an expression has no value yet: select with xp.where, do not branch")

    __add__, __radd__ = _prints("{} + {}"), _prints("{1} + {0}")
    __sub__, __rsub__ = _prints("{} - {}"), _prints("{1} - {0}")
    __mul__, __rmul__ = _prints("{} * {}"), _prints("{1} * {0}")
    __truediv__, __rtruediv__ = _prints("{} / {}"), _prints("{1} / {0}")
    __lt__, __gt__ = _prints("{} < {}", "bool"), _prints("{} > {}", "bool")
    __le__, __ge__ = _prints("{} <= {}", "bool"), _prints("{} >= {}", "bool")
    __eq__ = _prints("{} == {}", "bool")
    __neg__ = _prints("-{}")

    def __pow__(self, power: float) -> Any:
        # pow costs a hundred instructions and more; these cost one to three, and round no worse.
        forms = {
            1.0: "{0}",
            2.0: "{0} * {0}",
            3.0: "{0} * {0} * {0}",
            4.0: "({0} * {0}) * ({0} * {0})",
            0.5: "sqrt({0})",
        }
        return _prints(forms.get(float(power), f"pow({{}}, {number(power).form})"))(self)


def number(value: float) -> Expression:
    """A constant. `repr` gives the digits that make exactly this number."""
    value = float(value)
    if math.isnan(value):
        return Expression("NOT_A_NUMBER")
    digits = "INFINITE" if math.isinf(value) else repr(math.fabs(value))
    return Expression(digits if math.copysign(1.0, value) > 0 else f"(-{digits})")


# -- the namespace -----------------------------------------------------------------------------------------------------

float32, float64 = "float32", "float64"

where = _prints("{} ? {} : {}")
logical_and, logical_or = _prints("{} && {}", "bool"), _prints("{} || {}", "bool")
logical_not = _prints("!{}", "bool")
isnan, isinf = _prints("{0} != {0}", "bool"), _prints("fabs({}) == INFINITE", "bool")
isfinite = _prints("fabs({}) < INFINITE", "bool")
abs, sqrt, log = _prints("fabs({})"), _prints("sqrt({})"), _prints("log({})")
maximum, minimum = _prints("larger({}, {})"), _prints("smaller({}, {})")


def zeros_like(x: Expression) -> Expression:
    return number(0.0)


def ones_like(x: Expression) -> Expression:
    return number(1.0)


def full_like(x: Expression, value: float) -> Expression:
    return number(value)


def astype(x: Expression, dtype: str) -> Any:
    """float32 stays a double in C, rounded: every float32 is one, and what reads it computes in double."""
    return _prints("as_float32({})" if dtype == "float32" else "{}", dtype)(x)


class Printed:
    """The statements of C that compute expressions, each value once: those in which a name of `varying` is, apart.

    `real`: the type of numbers.
    """

    def __init__(self, *varying: str, real: str = "double") -> None:
        self._real = real
        self.once: list[str] = []
        self.each: list[str] = []
        self._varying = set(varying)
        self._names: dict[Expression, str] = {}
        self._known: dict[str, str] = {}  # the names of what stands in statements

    def name(self, x: Expression) -> str:
        """What `x` is called in the program; its statements, and those of all that it needs, have been written."""
        if x not in self._names:
            args = [self.name(arg) for arg in x.args]
            value = self._form(x.form).format(*args)
            if args and value not in self._known:
                name = self._known[value] = f"v{len(self._known)}"
                statements = self.once
                if not self._varying.isdisjoint(args):
                    self._varying.add(name)
                    statements = self.each
                statements.append(self._statement(x, name, value))
            self._names[x] = self._known.get(value, value)
        return self._names[x]

    def _form(self, form: str) -> str:
        """An expression's form in the language that is printed."""
        return form

    def _statement(self, x: Expression, name: str, value: str) -> str:
        return f"const {'bool' if x.dtype == 'bool' else self._real} {name} = {value};"
