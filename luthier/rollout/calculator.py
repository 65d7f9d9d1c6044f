"""A calculator for the model: it writes ``<calc>12*7</calc>``, and ``<result>84</result>`` is put behind it.

The worked example of an environment with several turns; it suits GSM8K. A turn that ends otherwise ends the episode.
Arithmetic is exact, on fractions, and bounded in what it may be asked for, so that no expression takes long.

Left out on purpose: names, functions and everything else that is not arithmetic.
"""

from __future__ import annotations

import ast
import decimal
import operator
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from luthier.rollout.environment import Answer, Edge, TextEnvironment
from luthier.rollout.prompts import Prompt
from luthier.rollout.text import Message

INSTRUCTIONS = (
    "You can use a calculator: write an expression between <calc> and </calc>, such as <calc>12*7</calc>, and its "
    "value follows as <result>84</result>."
)
OPEN, CLOSE = "<calc>", "</calc>"

LONGEST = 200  # characters of an expression
LARGEST = 256  # bits of a numerator or denominator
DECIMALS = 6  # significant digits behind those before the point

_ALLOWED = re.compile(r"[0-9.+\-*/%() ]+")
_WRITTEN = {",": "", "$": "", "_": "", "\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-", "^": "**"}
"""What people write, and how Python writes it."""


class Calculator(TextEnvironment):
    """Puts the value of each expression behind it, and lets the model go on."""

    stop = (CLOSE,)
    quick = True

    def __init__(self, edge: Edge, instructions: str = INSTRUCTIONS) -> None:
        """Tell the model of it by ``instructions``, in the system message; empty: do not."""
        super().__init__(edge)
        self._instructions = instructions

    def start(self, prompt: Prompt) -> Sequence[Message] | None:
        """Ask what the row asks, with the instructions."""
        if not self._instructions:
            return None
        first, *rest = prompt.messages
        if first["role"] != "system":
            return [{"role": "system", "content": self._instructions}, *prompt.messages]
        return [{**first, "content": f"{first['content']}\n\n{self._instructions}"}, *rest]

    def answer(self, reply: str) -> Answer:
        """Return the value of the expression that the turn ended with, or end the episode."""
        before, closed, behind = reply.rpartition(CLOSE)
        if not closed:
            return Answer(done=True)
        _, opened, expression = before.rpartition(OPEN)
        try:
            result = value(expression) if opened else "error: no expression"
        except ValueError as error:
            result = f"error: {error}"
        # The token that ends the expression may have begun the result too.
        return Answer(text=f"<result>{result}</result>".removeprefix(behind))


def value(expression: str) -> str:
    """Return the value of an expression of numbers and ``+ - * / // % **`` and parentheses, in decimal digits.

    Commas and currency signs are passed over. Raises ValueError, in a few words, for all else, and for numbers that are
    too large.
    """
    for written, meant in _WRITTEN.items():
        expression = expression.replace(written, meant)
    expression = " ".join(expression.split())
    if len(expression) > LONGEST:
        raise ValueError("too long")
    if not _ALLOWED.fullmatch(expression):
        raise ValueError("not arithmetic")
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("not arithmetic") from None
    return _shown(_value(tree.body))


_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}
_SIGNS: dict[type, Callable[[Fraction], Fraction]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number):
            return _bounded(Fraction(repr(number)))  # the digits that were written: 0.1 is a tenth
        case ast.UnaryOp(op=sign, operand=operand):
            return _SIGNS[type(sign)](_value(operand))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
            try:
                return _bounded(_OPERATORS[type(sign)](_value(left), _value(right)))
            except ZeroDivisionError:
                raise ValueError("division by zero") from None
    raise ValueError("not arithmetic")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("not a whole exponent")
    if base == 0 and exponent < 0:
        raise ValueError("division by zero")
    # Looked at before it is computed: there may be no end to it.
    if abs(exponent) * (_bits(base) - 1) > LARGEST:
        raise ValueError("too large")
    return _bounded(base ** int(exponent % 2 if abs(base) == 1 else exponent))


def _bounded(number: Fraction) -> Fraction:
    if _bits(number) > LARGEST:
        raise ValueError("too large")
    return number


def _bits(number: Fraction) -> int:
    return max(number.numerator.bit_length(), number.denominator.bit_length())


def _shown(number: Fraction) -> str:
    whole = abs(number.numerator) // number.denominator
    context = decimal.Context(prec=len(str(whole or "")) + DECIMALS)
    shown = context.divide(decimal.Decimal(number.numerator), decimal.Decimal(number.denominator))
    return f"{shown.normalize(context):f}"
