"""The built-in reward functions: how a completion is held against a row's reference.

Each is a reward function as a user writes one (see ``reward``), and gives None where a row has nothing to hold it
against. Left out on purpose: rewards from models, and limits of time, which whoever calls may set.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from luthier.data import reasoning
from luthier.errors import UserError
from luthier.rollout import answers

Text = str | Sequence[Mapping[str, Any]]
_SECONDS = 5
"""How long an expression may take to parse or to compare."""


def text_of(completion: Text) -> str:
    """Return the text of a completion: itself, or the content of its messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def _each(function: Callable[[str, str], float | None]) -> Callable[..., list[float | None]]:
    """Make a reward function of one that looks at a completion's text and its reference."""

    def over_all(completions: Sequence[Text], reference: Sequence[str | None], **_: Any) -> list[float | None]:
        pairs = zip(completions, reference, strict=True)
        return [None if known is None else function(text_of(text), known) for text, known in pairs]

    # Not by functools.wraps: whoever asks for the signature would be told that of ``function``.
    over_all.__name__, over_all.__doc__ = function.__name__, function.__doc__
    return over_all


@_each
def exact_match(text: str, reference: str) -> float:
    """1 where the completion is the reference, white space around them aside."""
    return float(text.strip() == reference.strip())


@_each
def final_number(text: str, reference: str) -> float | None:
    """1 where completion and reference end with the same number: after ``####``, as in GSM8K, else the last of all."""
    known = answers.final_number(reference, reference=True)
    return None if known is None else float(answers.final_number(text) == known)


@_each
def math(text: str, reference: str) -> float | None:
    """1 where math-verify finds the answers equal: numbers, fractions, LaTeX, sets, intervals and more."""
    import math_verify

    # It breaks off by a signal, which only the main thread can set. Elsewhere it warns of that at each call.
    limit = _SECONDS if threading.current_thread() is threading.main_thread() else None
    if limit is None:
        logging.getLogger("math_verify").setLevel(logging.ERROR)
    known = answers.stated(reference, reference=True) or reference.strip()
    gold = math_verify.parse(rf"\boxed{{{known}}}", parsing_timeout=limit)  # type: ignore[arg-type]
    if not gold:
        return None
    return float(math_verify.verify(gold, math_verify.parse(text, parsing_timeout=limit), timeout_seconds=limit))  # type: ignore[arg-type]


def boxed(completions: Sequence[Text], **_: Any) -> list[float]:
    r"""1 where the completion has an answer in ``\boxed{...}``, whatever it is."""
    return [float(bool(answers.boxed(text_of(text)))) for text in completions]


def answer_tags(completions: Sequence[Text], **_: Any) -> list[float]:
    """1 where the completion has one answer in ``<answer>...</answer>``, whatever it is."""
    texts = [text_of(text) for text in completions]
    return [float(bool(answers.tagged(text)) and text.count("<answer>") == 1) for text in texts]


def reasoning_gym(completions: Sequence[Text], **columns: Any) -> list[float]:
    """What the verifier of the row's own task gives to the marked answer, or to the whole text where none is marked."""
    if reasoning.TASK_COLUMN not in columns:
        raise UserError("it scores rows of hf_path=reasoning_gym:TASK alone; these rows have no `task`.")
    rewards = []
    for number, text in enumerate(map(text_of, completions)):
        row = {name: values[number] for name, values in columns.items()}
        rewards.append(reasoning.score(row[reasoning.TASK_COLUMN], answers.stated(text) or text.strip(), row))
    return rewards


BUILT_IN: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (exact_match, final_number, math, boxed, answer_tags, reasoning_gym)
}
"""The built-in reward functions by name."""
