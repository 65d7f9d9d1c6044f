"""Reward functions: finding them by name or path, calling them on the completions of a prompt, checking what they give.

A reward function is one that TRL's trainers take: called with keyword arguments ``prompts``, ``completions``,
``completion_ids`` and the columns of the dataset, each a list with an entry for each completion, it returns a list of
numbers, or of None where it has no opinion. A row of messages gives prompts and completions as lists of messages, a row
of texts as texts. ``reference`` is added: the text of the answer that the row itself holds, whatever a column of that
name says; without such an answer it is that column, or None. Functions without ``**kwargs`` are given what they name;
``async def`` is fine.

Left out on purpose: weights, processes and limits of time, which training needs and adds.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.data import functions
from luthier.errors import UserError, did_you_mean
from luthier.rollout.verifiers import BUILT_IN, Text

KEY = "reward_functions"
_NOT_COLUMNS = ("prompt", "completion", "prompts", "completions", "completion_ids")
"""Columns that are not handed on: they are in ``prompts``, or what the completions stand in place of."""


@dataclass(frozen=True)
class Reward:
    """A reward function and the name that its numbers carry."""

    name: str
    function: Callable[..., Any]


@dataclass(frozen=True)
class Group:
    """A prompt with its G completions, and the row that they are for; ``place`` names that row in messages."""

    prompt: Text
    completions: Sequence[Text]
    completion_ids: Sequence[Sequence[int]]
    row: Mapping[str, Any]
    reference: str | None
    place: str


def load(paths: Sequence[str]) -> tuple[Reward, ...]:
    """Return the functions that ``reward_functions`` names: built-in names, import paths or ``file.py:function``.

    Raises UserError for one that is not there, or named twice.
    """
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise UserError(f"{KEY}: {twice[0]} stands twice. Keep one.")
    names = Counter(map(_short, paths))
    return tuple(Reward(_short(path) if names[_short(path)] == 1 else path, _find(path)) for path in paths)


def score(rewards: Sequence[Reward], group: Group) -> np.ndarray:
    """Return ``rewards_GF``, float64: what each of F functions gives to each completion; NaN stands for None.

    Raises UserError naming function and row where one fails, or gives something else than G finite numbers or Nones.
    """
    columns = [_checked(reward, group, _call(reward, group)) for reward in rewards]
    return np.array(columns, np.float64).reshape(len(rewards), len(group.completions)).T


def _short(path: str) -> str:
    return path.rpartition(":")[2].rpartition(".")[2]


def _find(path: str) -> Callable[..., Any]:
    if path in BUILT_IN:
        return BUILT_IN[path]
    if ":" not in path and "." not in path:
        hint = did_you_mean(path, list(BUILT_IN)) or f" There are {', '.join(BUILT_IN)}."
        raise UserError(f"{KEY}={path}: no built-in reward function.{hint} For your own: {functions.REMEDY}")
    return functions.load(path, KEY)


def _call(reward: Reward, group: Group) -> Any:
    count = len(group.completions)
    given = {name: value for name, value in group.row.items() if name not in _NOT_COLUMNS}
    given = {"reference": group.reference} | given
    if group.reference is not None:
        given["reference"] = group.reference
    arguments = {name: [value] * count for name, value in given.items()} | {
        "prompts": [group.prompt] * count,
        "completions": list(group.completions),
        "completion_ids": [list(ids) for ids in group.completion_ids],
    }
    wanted = _wanted(reward, arguments, group.place)
    try:
        result = reward.function(**wanted)
        return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result
    except UserError as error:
        raise UserError(f"{group.place}: reward function `{reward.name}`: {error}") from None
    except Exception as error:
        # The function is the user's: whatever it raises is about this row or about the function.
        reason = f"{type(error).__name__}: {error}.{functions.line_of(error)}"
        raise UserError(f"{group.place}: reward function `{reward.name}` failed: {reason}") from error


async def _awaited(result: Any) -> Any:
    return await result


def _wanted(reward: Reward, arguments: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return those of ``arguments`` that the function takes. Raises UserError where it needs one that is not there."""
    parameters = inspect.signature(reward.function).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = [
        parameter for parameter in parameters if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    for parameter in named:
        if parameter.name not in arguments and parameter.default is parameter.empty:
            hint = did_you_mean(parameter.name, list(arguments))
            raise UserError(
                f"{place}: reward function `{reward.name}` needs `{parameter.name}`, which is no column of the row. "
                f"There are {', '.join(arguments)}.{hint}"
            )
    names = {parameter.name for parameter in named}
    return {name: value for name, value in arguments.items() if takes_all or name in names}


def _checked(reward: Reward, group: Group, result: Any) -> list[float]:
    count = len(group.completions)
    place = f"{group.place}: reward function `{reward.name}` returned"
    wants = f"a list of {count}, one number (or None) for each completion"
    if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__iter__"):
        raise UserError(f"{place} {type(result).__name__}; it should return {wants}.")
    values = list(result)
    if len(values) != count:
        raise UserError(f"{place} {len(values)} rewards; it should return {wants}.")
    return [
        _number(value, f"{place} {value!r} for completion {number}") for number, value in enumerate(values, start=1)
    ]


def _number(value: Any, said: str) -> float:
    if value is None:
        return math.nan
    if not hasattr(value, "__float__") and not hasattr(value, "__index__"):
        raise UserError(f"{said}, which is no number. Return a float, or None for no opinion.")
    number = float(value)
    if not math.isfinite(number):
        raise UserError(f"{said}, which is not finite. Return a finite number, or None for no opinion.")
    return number
