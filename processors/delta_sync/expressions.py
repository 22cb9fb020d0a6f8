"""Expressions over a row's columns, for computed fields and filters of `pipeline.yaml`: a small part of Python's.

The text is parsed by Python's own parser, and what is in it is walked once, into functions that call each other; what
is not on this page is refused. Nothing is evaluated by Python, so an expression can reach nothing but the row: no
attributes, no imports, no calls but of the functions below, nothing whose result could grow beyond its operands.

None is a value that is not there, as in SQL: arithmetic and functions with it give None, comparing it by < or > is
false, and `coalesce` replaces it.
"""

from __future__ import annotations

import ast
import datetime as dt
import decimal
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from delta_sync.errors import ProcessorError
from delta_sync.values import Row, scalar_text

TEXT_MOST = 4096  # characters of an expression: a longer one belongs into processor.py
ROW = "row"  # `row["odd name"]`, for columns whose names are none in Python

Evaluate = Callable[[Row], Any]


class Expression(NamedTuple):
    """What an expression's text means: call `evaluate` with a row. `columns` are those that it needs."""

    text: str
    columns: frozenset[str]
    evaluate: Evaluate


def parse_expression(text: str) -> Expression:
    """Return the expression of a text. Raises ValueError saying what it may not hold."""
    if len(text) > TEXT_MOST:
        raise ValueError(f"an expression has at most {TEXT_MOST} characters; write a function in processor.py")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        columns: set[str] = set()
        inner = _compiled(tree.body, columns)
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no expression: {error.msg}") from None
    except RecursionError:
        raise ValueError("the expression is nested too deeply; write a function in processor.py") from None

    def evaluate(row: Row) -> Any:
        try:
            return inner(row)
        except _FAILURES as error:
            raise ProcessorError(f"{text!r}: {type(error).__name__}: {error}") from error

    return Expression(text, frozenset(columns), evaluate)


_FAILURES = (TypeError, ValueError, ArithmeticError, LookupError)  # what the operations and functions below raise


def _compiled(node: ast.expr, columns: set[str]) -> Evaluate:
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return lambda _row: value
        case ast.Name(id=name):
            columns.add(name)
            return operator.itemgetter(name)
        case ast.Subscript(value=ast.Name(id="row"), slice=ast.Constant(value=str() as name)):
            columns.add(name)
            return operator.itemgetter(name)
        case ast.Subscript(value=of, slice=ast.Slice(lower=lower, upper=upper, step=None)):
            return _slice(_compiled(of, columns), *(_part(bound, columns) for bound in (lower, upper)))
        case ast.Subscript(value=of, slice=index) if not isinstance(index, ast.Slice):
            return _member(_compiled(of, columns), _compiled(index, columns))
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            parts = [_compiled(element, columns) for element in elements]
            return lambda row: [part(row) for part in parts]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _arithmetic(_ARITHMETIC[type(op)], _compiled(left, columns), _compiled(right, columns))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _compiled(operand, columns)
            return lambda row: not inner(row)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _arithmetic(operator.sub, lambda _row: 0, _compiled(operand, columns))
        case ast.BoolOp(op=op, values=values):
            return _either(isinstance(op, ast.Or), [_compiled(value, columns) for value in values])
        case ast.IfExp(test=test, body=body, orelse=orelse):
            decide, yes, no = (_compiled(part, columns) for part in (test, body, orelse))
            return lambda row: yes(row) if decide(row) else no(row)
        case ast.Compare(left=left, ops=ops, comparators=comparators) if all(type(op) in _COMPARISONS for op in ops):
            operands = [_compiled(part, columns) for part in (left, *comparators)]
            return _comparison([_COMPARISONS[type(op)] for op in ops], operands)
        case ast.JoinedStr(values=values):
            return _joined([_text_part(value, columns) for value in values])
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return _call(name, [_compiled(argument, columns) for argument in arguments])
        case ast.Call(func=ast.Name(id=name)):
            raise ValueError(f"there is no function {name}; there are {', '.join(sorted(FUNCTIONS))}")
        case _:
            raise ValueError(f"`{ast.unparse(node)}` is not allowed in an expression; write a function in processor.py")


def _part(node: ast.expr | None, columns: set[str]) -> Evaluate:
    return (lambda _row: None) if node is None else _compiled(node, columns)


def _slice(of: Evaluate, lower: Evaluate, upper: Evaluate) -> Evaluate:
    def evaluate(row: Row) -> Any:
        value = of(row)
        return None if value is None else value[lower(row) : upper(row)]

    return evaluate


def _member(of: Evaluate, index: Evaluate) -> Evaluate:
    """A member of a JSON object, or an element of a list; None where there is none."""

    def evaluate(row: Row) -> Any:
        value, place = of(row), index(row)
        if value is None or place is None:
            return None
        if isinstance(value, Mapping):
            return value.get(place)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] -- of JSON
        return value[place] if -len(value) <= place < len(value) else None

    return evaluate


def _numbers_only(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A text times a number would be as long as one likes, and a text's `%` formats."""

    def operate(left: Any, right: Any) -> Any:
        if not isinstance(left, _NUMBERS) or not isinstance(right, _NUMBERS):
            raise TypeError("it takes numbers")
        return operation(left, right)

    return operate


_NUMBERS = (int, float, decimal.Decimal)
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: _numbers_only(operator.mul),
    ast.Div: _numbers_only(lambda one, other: one / other),
    ast.FloorDiv: _numbers_only(lambda one, other: one // other),
    ast.Mod: _numbers_only(operator.mod),
}


def _arithmetic(operation: Callable[[Any, Any], Any], left: Evaluate, right: Evaluate) -> Evaluate:
    def evaluate(row: Row) -> Any:
        one, other = left(row), right(row)
        if one is None or other is None:
            return None
        if isinstance(one, decimal.Decimal) and isinstance(other, float):
            other = decimal.Decimal(str(other))
        elif isinstance(other, decimal.Decimal) and isinstance(one, float):
            one = decimal.Decimal(str(one))
        return operation(one, other)

    return evaluate


def _either(is_or: bool, parts: list[Evaluate]) -> Evaluate:
    def evaluate(row: Row) -> Any:
        value: Any = None
        for part in parts:
            value = part(row)
            if bool(value) is is_or:
                break
        return value

    return evaluate


def _ordered(operation: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda one, other: one is not None and other is not None and operation(one, other)


_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,  # for `is None`: there is nothing else of which it would be true for sure
    ast.IsNot: operator.is_not,
    ast.Lt: _ordered(operator.lt),
    ast.LtE: _ordered(operator.le),
    ast.Gt: _ordered(operator.gt),
    ast.GtE: _ordered(operator.ge),
    ast.In: lambda one, other: other is not None and one in other,
    ast.NotIn: lambda one, other: other is None or one not in other,
}


def _comparison(operations: list[Callable[[Any, Any], bool]], operands: list[Evaluate]) -> Evaluate:
    first, *others = operands

    def evaluate(row: Row) -> bool:
        left = first(row)
        for operation, operand in zip(operations, others, strict=True):
            right = operand(row)
            if not operation(left, right):
                return False
            left = right
        return True

    return evaluate


def _text_part(node: ast.expr, columns: set[str]) -> Evaluate:
    match node:
        case ast.Constant(value=str() as text):
            return lambda _row: text
        case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
            return _compiled(value, columns)
        case _:
            raise ValueError(f"`{ast.unparse(node)}`: a text in braces has neither a format nor a conversion")


def _joined(parts: list[Evaluate]) -> Evaluate:
    return lambda row: "".join(scalar_text(value) for part in parts if (value := part(row)) is not None)


def _call(name: str, arguments: list[Evaluate]) -> Evaluate:
    function = FUNCTIONS[name]
    if name == "coalesce":
        return lambda row: next((value for part in arguments if (value := part(row)) is not None), None)

    def evaluate(row: Row) -> Any:
        values = [argument(row) for argument in arguments]
        return None if None in values else function(*values)

    return evaluate


def _replace(text: str, old: str, new: str) -> str:
    if old == "":
        raise ValueError("replace needs a text to look for")
    return str.replace(text, old, new)


def _date(moment: object) -> dt.date:
    if not isinstance(moment, dt.date):
        raise TypeError("it takes a date or a timestamp")
    return moment.date() if isinstance(moment, dt.datetime) else moment


def _year(moment: object) -> int:
    return _date(moment).year


def _decimal(value: object) -> decimal.Decimal:
    return decimal.Decimal(str(value))


def _join(separator: str, parts: list[object]) -> str:
    return str.join(separator, [scalar_text(part) for part in parts if part is not None])


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "abs": abs,
    "coalesce": max,  # never called: it alone looks at None, so `_call` has it
    "date": _date,
    "decimal": _decimal,
    "endswith": str.endswith,
    "float": float,
    "int": int,
    "join": _join,
    "len": len,
    "lower": str.lower,
    "max": max,
    "min": min,
    "replace": _replace,
    "round": round,
    "split": str.split,
    "startswith": str.startswith,
    "strip": str.strip,
    "text": scalar_text,
    "upper": str.upper,
    "year": _year,
}
