"""The built-in reward functions: how a completion is held against a row's reference, or against a rule.

Each is a reward function as a user writes one (see ``reward``), and gives None where a row has nothing to hold it
against. Arguments after a ``*`` are its settings; wrong ones raise UserError, on no completion at all too.

Left out on purpose: a model that judges (``judge``), and limits of time, which whoever calls may set.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from luthier.data import reasoning
from luthier.errors import UserError
from luthier.rollout import answers

Text = str | Sequence[Mapping[str, Any]]
Rewards = list[float | None]
_SECONDS = 3
"""How long an expression may take to parse or to compare: so short that a few such do not use up a group's time."""
_REFERENCE = "{reference}"
_UNITS = ("tokens", "words", "characters")


def text_of(completion: Text) -> str:
    """Return the text of a completion: itself, or the content of its messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def exact_match(completions: Sequence[Text], reference: Sequence[str | None]) -> Rewards:
    """1 where the completion is the reference, white space around them aside."""
    return _each(completions, reference, lambda text, known: float(text.strip() == known.strip()))


def regex_match(
    completions: Sequence[Text], reference: Sequence[str | None], *, pattern: str, full: bool = False
) -> Rewards:
    """1 where the regular expression ``pattern`` is found in the completion, or with ``full`` matches it whole.

    White space around the completion does not count. ``{reference}`` in the pattern stands for the row's reference,
    letter for letter.
    """
    if not isinstance(pattern, str):
        raise UserError(f"pattern={pattern!r} is not a text.")
    try:
        re.compile(pattern.replace(_REFERENCE, "reference"))
    except re.error as error:
        raise UserError(f"pattern={pattern!r} is not a regular expression: {error}.") from None

    def matches(text: str, known: str) -> float:
        wanted = pattern.replace(_REFERENCE, re.escape(known.strip()))
        find = re.fullmatch if full else re.search
        return float(bool(find(wanted, text.strip())))

    if _REFERENCE in pattern:
        return _each(completions, reference, matches)
    return [matches(text_of(completion), "") for completion in completions]


def final_number(completions: Sequence[Text], reference: Sequence[str | None]) -> Rewards:
    """1 where completion and reference end with the same number: after ``####``, as in GSM8K, else the last of all."""
    return _numbers(completions, reference, lambda found, known: found == known)


def close_number(
    completions: Sequence[Text], reference: Sequence[str | None], *, relative: float = 0.01, absolute: float = 0.0
) -> Rewards:
    """1 where the numbers that ``final_number`` finds have |found - known| <= max(relative * |known|, absolute)."""
    if relative < 0 or absolute < 0:
        raise UserError(f"relative={relative}, absolute={absolute}: none may be below 0.")
    share, least = Decimal(repr(float(relative))), Decimal(repr(float(absolute)))
    return _numbers(completions, reference, lambda found, known: abs(found - known) <= max(share * abs(known), least))


def math(completions: Sequence[Text], reference: Sequence[str | None]) -> Rewards:
    """1 where math-verify finds the answers equal: numbers, fractions, LaTeX, sets, intervals and more."""
    import math_verify

    # It breaks off by a signal, which only the main thread can set. Elsewhere it warns of that at each call.
    limit = _SECONDS if threading.current_thread() is threading.main_thread() else None
    if limit is None:
        logging.getLogger("math_verify").setLevel(logging.ERROR)

    def equal(text: str, known: str) -> float | None:
        known = answers.stated(known, reference=True) or known.strip()
        gold = math_verify.parse(rf"\boxed{{{known}}}", parsing_timeout=limit)  # type: ignore[arg-type]
        if not gold:
            return None
        return float(math_verify.verify(gold, math_verify.parse(text, parsing_timeout=limit), timeout_seconds=limit))  # type: ignore[arg-type]

    return _each(completions, reference, equal)


def boxed(completions: Sequence[Text]) -> Rewards:
    r"""1 where the completion has an answer in ``\boxed{...}``, whatever it is."""
    return [float(bool(answers.boxed(text_of(text)))) for text in completions]


def answer_tags(completions: Sequence[Text]) -> Rewards:
    """1 where the completion has one answer in ``<answer>...</answer>``, whatever it is."""
    texts = [text_of(text) for text in completions]
    return [float(bool(answers.tagged(text)) and text.count("<answer>") == 1) for text in texts]


def length(
    completions: Sequence[Text],
    completion_ids: Sequence[Sequence[int]],
    *,
    minimum: int = 0,
    maximum: int | None = None,
    slack: int = 0,
    unit: str = "tokens",
) -> Rewards:
    """1 where a completion's length n is within ``minimum`` and ``maximum``; outside it falls to 0 over ``slack``.

    max(0, 1 - distance / (slack + 1)), where distance = max(minimum - n, n - maximum, 0). For a target length, both
    limits are the target. The ``unit`` is ``tokens``, ``words`` (separated by white space) or ``characters``.
    """
    if unit not in _UNITS:
        raise UserError(f"unit={unit!r}: there are {', '.join(_UNITS)}.")
    if maximum is None and minimum <= 0:
        raise UserError("it has no limit. Set `maximum`, `minimum` or both.")
    most = float("inf") if maximum is None else maximum
    if not 0 <= minimum <= most or slack < 0:
        raise UserError(f"minimum={minimum}, maximum={maximum}, slack={slack}: 0 <= minimum <= maximum and slack >= 0.")
    texts = [text_of(text) for text in completions]
    lengths = {
        "tokens": lambda: [len(ids) for ids in completion_ids],
        "words": lambda: [len(text.split()) for text in texts],
        "characters": lambda: [len(text) for text in texts],
    }[unit]()
    return [max(0.0, 1 - max(minimum - n, n - most, 0) / (slack + 1)) for n in lengths]


def reasoning_gym(
    completions: Sequence[Text],
    task: Sequence[str],
    question: Sequence[str],
    answer: Sequence[str],
    metadata: Sequence[Any],
) -> Rewards:
    """What the verifier of the row's own task gives to the marked answer, or to the whole text where none is marked.

    It takes rows of ``hf_path=reasoning_gym:TASK``.
    """
    reasoning.library()
    rewards: Rewards = []
    for text, name, asked, known, data in zip(map(text_of, completions), task, question, answer, metadata, strict=True):
        row = {"question": asked, "answer": known, "metadata": data}
        rewards.append(reasoning.score(name, answers.stated(text) or text.strip(), row))
    return rewards


def _each(
    completions: Sequence[Text],
    reference: Sequence[str | None],
    function: Callable[[str, str], float | None],
) -> Rewards:
    """Return what ``function`` says of each completion's text and its reference, None where there is none."""
    pairs = zip(completions, reference, strict=True)
    return [None if known is None else function(text_of(text), known) for text, known in pairs]


def _numbers(
    completions: Sequence[Text], reference: Sequence[str | None], near: Callable[[Decimal, Decimal], bool]
) -> Rewards:
    """Return 1 where the final numbers are ``near``; None where the reference has none."""

    def compare(text: str, known: str) -> float | None:
        wanted, found = answers.final_number(known, reference=True), answers.final_number(text)
        if wanted is None:
            return None
        return float(found is not None and near(Decimal(found), Decimal(wanted)))

    return _each(completions, reference, compare)


VERIFIERS: dict[str, Callable[..., Rewards]] = {
    function.__name__: function
    for function in (
        exact_match,
        regex_match,
        final_number,
        close_number,
        math,
        boxed,
        answer_tags,
        length,
        reasoning_gym,
    )
}
"""The functions here by name."""
