"""The final answer in a completion's text, by the marks that people and models set around one.

Left out on purpose: whether an answer is right, which is a reward function's business (``verifiers``).
"""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-\u2212])?[$€£]?(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?P<fraction>\.\d+)?"
)
_UNIT = r"[\s*$%.€£]*|[*$%€£]*\s+[^\W\d][\w\s/.]*"
_REASON = r"[*$%€£]*,\s+(?:because|since|as|so|which|given|not)\b.*"
_ALONE = re.compile(rf"[\s*$=]*{_NUMBER.pattern}(?:{_UNIT}|{_REASON})", re.IGNORECASE)
"""A number with nothing but its currency, its unit or the reason for it."""
_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_COLON = r"(?:\s+is)?\s*:[ \t*]*(?:\n[\s*]*(?:(?:\$\$|\\\[)\s*\n\s*)?(?!.*\banswer\b))?"
"""After a colon the answer may stand below, unless that line marks one itself; an opening ``$$`` or ``\\[`` is none."""
_AGAIN = r"(?:[ \t*]*(?:the\s+)?(?:final\s+|correct\s+)?answer\s+is\b:?)?"
"""What says once more, behind a colon, that the answer follows."""
_WORDS = re.compile(rf"\banswer(?:\*\*)?(?:{_COLON}{_AGAIN}|\s+is\b)(?P<answer>.*)", re.IGNORECASE)
_HOPE = re.compile(r"[.,!]?\s*I hope (?:it|this) is correct\b.*", re.IGNORECASE)
"""How a well-known prompt for mathematics has answers end."""
_BOX = r"\boxed{"
_HASHES = "####"
_HASHED = re.compile(r"####[ \t]*(?P<line>(?![\s#])(?:(?!##).)+)")
_TEXT = r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|mbox)\s*\{([^{}]*)\}"
_FORMS = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"^\s*(?:\$\$?|\\\[|\\\()([^$]*?)(?:\$\$?|\\\]|\\\))[\s.]*$", r"\1"),
        (r"\\(?:left|right)(?![a-zA-Z])|\\[!,;:]", ""),
        (rf"(?<=[\w)}}%])\s*{_TEXT}(?:\^\{{?\d\}}?)?\s*$", ""),  # a unit
        (rf"^\s*{_TEXT}\s*$", r"\1"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*(\w)(?=\s*(?:\{|\w(?!\w)))", r"\\frac{\1}"),  # braces that may be left out
        (r"(\\frac\s*\{[^{}]*\})\s*(\w)(?!\w)", r"\1{\2}"),
        (r"^\s*(-?)\s*\\frac\s*\{\s*(\w+)\s*\}\s*\{\s*(\w+)\s*\}\s*$", r"\1\2/\3"),
    )
]
"""Ways of LaTeX to write what has a plainer form, in the order in which they are undone."""
_TITLE = re.compile(r"[*_\s]*(?:\d+[.):]\s+)?[^\W\d_]")
"""How the title of a Markdown heading begins: with a letter, after a number at most."""


def tagged(text: str) -> str | None:
    """Return what stands in the last ``<answer>...</answer>``."""
    found = _TAGS.findall(text)
    return found[-1].strip() if found else None


def boxed(text: str) -> str | None:
    r"""Return what stands in the last ``\boxed{...}``, braces within it and all."""
    start = text.rfind(_BOX)
    if start == -1:
        return None
    start += len(_BOX)
    depth = 1
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if not depth:
            return text[start:index].strip()
    return None


def stated(text: str, *, reference: bool = False) -> str | None:
    """Return the answer that is marked as one: by tags, a box, ``####``, or ``answer:`` or ``answer is``.

    ``####`` before a title with text below it is a Markdown heading, which marks nothing. In a ``reference``, whose
    author used it as a mark, the last one always is.
    """
    marked = tagged(text) or boxed(text)
    if marked is None and reference and _HASHES in text:
        marked = _first_line(text.rpartition(_HASHES)[2])
    elif marked is None:
        marked = next((mark["line"].strip() for mark in _hashed(text) if not _is_heading(mark)), None)
    if marked is None and (found := list(_WORDS.finditer(text))):
        marked = _HOPE.sub("", found[-1]["answer"]).strip(" \t*_.")
    return marked or None


def final_number(text: str, *, reference: bool = False) -> str | None:
    """Return the number that ``text`` ends with: the one that stands alone after a ``####``, else the last one of all.

    In a ``reference`` it is the first after the last ``####``, alone or not, and None where none follows.
    Plain decimal digits, whatever commas, currency signs, units or zeros were around them: ``$1,050.0`` is ``1050``.
    """
    if reference and _HASHES in text:
        return next(iter(_numbers(text.rpartition(_HASHES)[2])), None)
    for mark in _hashed(text):
        if alone := _ALONE.fullmatch(_tidy(mark["line"])):
            return _plain(alone)
    found = _numbers(text)
    return found[-1] if found else None


def final_answer(text: str) -> str | None:
    """Return the answer in a form in which equal ones are equal: to count votes.

    The marked answer, else the last number, else the last line; None where there is no text.
    """
    answer = stated(text) or final_number(text) or next(filter(str.strip, reversed(text.split("\n"))), "")
    answer = _simple(answer)
    alone = _ALONE.fullmatch(_tidy(answer))
    return _plain(alone) if alone else " ".join(answer.split()).casefold() or None


def _hashed(text: str) -> list[re.Match[str]]:
    """Return the ``####`` with something on their line, the last first."""
    return list(_HASHED.finditer(text))[::-1]


def _is_heading(mark: re.Match[str]) -> bool:
    return bool(_TITLE.match(mark["line"]) and mark.string[mark.end() :].strip())


def _numbers(text: str) -> list[str]:
    return [_plain(match) for match in _NUMBER.finditer(_tidy(text))]


def _simple(text: str) -> str:
    """Return ``text`` with what LaTeX can write in several ways written in one."""
    for pattern, form in _FORMS:
        text = pattern.sub(form, text)
    return text


def _tidy(text: str) -> str:
    """Return ``text`` without what LaTeX puts into numbers."""
    return text.replace("{,}", ",").replace("\\!", "").replace("\\$", "$").replace("\\%", "%")


def _plain(match: re.Match[str]) -> str:
    value = Decimal((match["whole"].replace(",", "") or "0") + (match["fraction"] or ""))
    # Not by ``normalize``, which rounds to 28 digits.
    plain = f"{value:f}"
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return f"-{plain}" if match["sign"] and value else plain


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else ""
