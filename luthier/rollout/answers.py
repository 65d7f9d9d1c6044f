"""The final answer in a completion's text, by the marks that people and models set around one.

Left out on purpose: whether an answer is right, which is a reward function's business (``verifiers``).
"""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-\u2212])?[$€£]?(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?P<fraction>\.\d+)?"
)
_WITH_UNIT = re.compile(rf"[\s*$=]*{_NUMBER.pattern}(?:\s+[^\W\d][\w\s/.]*|[\s*$%.€£]*)")
_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_WORDS = re.compile(r"\banswer(?:\*\*)?(?:\s*:|\s+is\b:?)(?P<answer>.*)", re.IGNORECASE)
_BOX = r"\boxed{"
_HASHES = "####"


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


def stated(text: str) -> str | None:
    """Return the answer that is marked as one: by tags, a box, ``####``, or ``answer:`` or ``answer is``."""
    marked = tagged(text) or boxed(text)
    if marked is None and _HASHES in text:
        marked = _first_line(text.rpartition(_HASHES)[2])
    if marked is None and (found := list(_WORDS.finditer(text))):
        marked = found[-1]["answer"].strip(" \t*_.")
    return marked or None


def final_number(text: str) -> str | None:
    """Return the number that ``text`` ends with: the first after the last ``####``, else the last one of all.

    Plain decimal digits, whatever commas, currency signs, units or zeros were around them: ``$1,050.0`` is ``1050``.
    """
    if _HASHES in text:
        found = _numbers(text.rpartition(_HASHES)[2])
        return found[0] if found else None
    found = _numbers(text)
    return found[-1] if found else None


def final_answer(text: str) -> str | None:
    """Return the answer in a form in which equal ones are equal: to count votes.

    The marked answer, else the last number, else the last line; None where there is no text.
    """
    answer = stated(text) or final_number(text) or next(filter(None, reversed(text.split("\n"))), "")
    alone = _WITH_UNIT.fullmatch(_tidy(answer))
    return _plain(alone) if alone else " ".join(answer.split()).casefold() or None


def _numbers(text: str) -> list[str]:
    return [_plain(match) for match in _NUMBER.finditer(_tidy(text))]


def _tidy(text: str) -> str:
    """Return ``text`` without what LaTeX puts into numbers."""
    return text.replace("{,}", ",").replace("\\!", "").replace("\\$", "$").replace("\\%", "%")


def _plain(match: re.Match[str]) -> str:
    value = Decimal((match["whole"].replace(",", "") or "0") + (match["fraction"] or ""))
    plain = f"{value.normalize():f}"
    return f"-{plain}" if match["sign"] and value else plain


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else ""
