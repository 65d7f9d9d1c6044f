"""Reward functions: finding them by name or path, calling them on the completions of a prompt, checking what they give.

A reward function is one that TRL's trainers take: called with keyword arguments ``prompts``, ``completions``,
``completion_ids`` and the columns of the dataset, each a list with an entry for each completion, it returns a list of
numbers, or of None where it has no opinion. A row of messages gives prompts and completions as lists of messages, a row
of texts as texts. ``reference`` is added: the text of the answer that the row itself holds, whatever a column of that
name says; without such an answer it is that column, or None. Functions without ``**kwargs`` are given what they name;
``async def`` is fine. An exception in place of a number says that this one completion could not be rewarded, and why.

A function's settings (``reward_kwargs``) are keyword arguments that are the same at each call. They go before columns.

Left out on purpose: weights, and the processes and limits of time (``workers``) in which all of this runs.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data import functions
from luthier.errors import UserError, did_you_mean
from luthier.rollout import verifiers
from luthier.rollout.failures import Failure
from luthier.rollout.judge import judge
from luthier.rollout.verifiers import Text

BUILT_IN: dict[str, Callable[..., Any]] = verifiers.VERIFIERS | {"judge": judge}
"""The built-in reward functions by name. Their settings, and nothing else, are keyword-only."""
KEY, SETTINGS_KEY = "reward_functions", "reward_kwargs"
_GIVEN = ("prompts", "completions", "completion_ids")
_NOT_COLUMNS = ("prompt", "completion", *_GIVEN)
"""Columns that are not handed on: they are in ``prompts``, or what the completions stand in place of."""
_LONGEST_REASON = 1000


@dataclass(frozen=True)
class Reward:
    """A reward function with its settings, and the name that its numbers carry."""

    name: str
    function: Callable[..., Any]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """A prompt with its G completions, and the row that they are for; ``place`` names that row in messages."""

    prompt: Text
    completions: Sequence[Text]
    completion_ids: Sequence[Sequence[int]]
    row: Mapping[str, Any]
    reference: str | None
    place: str


def names(paths: Sequence[str]) -> tuple[str, ...]:
    """Return what the functions at ``paths`` are called: by their own names where these differ, else by the paths.

    Raises UserError for a path named twice.
    """
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise UserError(f"{KEY}: {twice[0]} stands twice. Keep one.")
    counts = Counter(map(_short, paths))
    return tuple(_short(path) if counts[_short(path)] == 1 else path for path in paths)


def load(paths: Sequence[str], settings: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[Reward, ...]:
    """Return the functions that ``reward_functions`` names: built-in names, import paths or ``file.py:function``.

    ``settings`` holds each function's, by its name or by its path. Built-in functions have checked theirs, and imported
    what they need. Raises UserError for a function that is not there or cannot be called, or for wrong settings.
    """
    known, settings = names(paths), settings or {}
    for name in settings:
        if name not in (*known, *paths):
            hint = did_you_mean(name, list(known)) or f" There are {', '.join(known) or 'none'}."
            raise UserError(f"{SETTINGS_KEY}: {name} is none of the {KEY}.{hint}")
    rewards = []
    for name, path in zip(known, paths, strict=True):
        rewards.append(Reward(name, _find(path), {**settings.get(path, {}), **settings.get(name, {})}))
        _check_settings(rewards[-1])
        if path in BUILT_IN:
            _try(rewards[-1])
    return tuple(rewards)


def needs(reward: Reward) -> tuple[str, ...]:
    """Return the names of the arguments that the function cannot do without, and that are no settings."""
    required = [each.name for each in _named(reward.function) if each.default is each.empty]
    return tuple(name for name in required if name not in reward.settings)


def check_columns(needed: Mapping[str, Sequence[str]], columns: Iterable[str], source: str) -> None:
    """Raise UserError where a function needs what rows of ``columns`` do not give; ``source`` names the rows.

    ``needed`` holds what ``needs`` says of each function, by its name.
    """
    given = [*_GIVEN, "reference", *(name for name in columns if name not in _NOT_COLUMNS)]
    for function, wanted in needed.items():
        for name in wanted:
            if name not in given:
                raise UserError(f"{source}: reward function `{function}` {_lacking(name, given)}")


def score(reward: Reward, group: Group) -> tuple[list[float], Failure | None]:
    """Return what the function gives to each completion, NaN for None or what failed, and how it failed, if it did.

    A function that raises, or gives something else than G entries, loses the group. One that gives something else
    than a finite number or None for a completion loses that one.
    """
    count = len(group.completions)
    try:
        values = _call(reward, group)
    except _Lost as error:
        return [math.nan] * count, Failure(reward.name, group.place, str(error)[:_LONGEST_REASON], count)
    rewards, reasons = [], []
    for number, value in enumerate(values, start=1):
        try:
            rewards.append(_number(value))
        except _Lost as error:
            rewards.append(math.nan)
            reasons.append(f"{error} (completion {number})")
    failure = Failure(reward.name, group.place, reasons[0][:_LONGEST_REASON], len(reasons)) if reasons else None
    return rewards, failure


class _Lost(Exception):
    """What is said of a function that did not give a reward."""


def _short(path: str) -> str:
    return path.rpartition(":")[2].rpartition(".")[2]


def _find(path: str) -> Callable[..., Any]:
    if path in BUILT_IN:
        return BUILT_IN[path]
    if ":" not in path and "." not in path:
        hint = did_you_mean(path, list(BUILT_IN)) or f" There are {', '.join(BUILT_IN)}."
        raise UserError(f"{KEY}={path}: no built-in reward function.{hint} For your own: {functions.REMEDY}")
    return functions.load(path, KEY)


def _named(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of a function that have names of their own."""
    own = inspect.signature(function).parameters.values()
    return [each for each in own if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]


def _takes_all(function: Callable[..., Any]) -> bool:
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(function).parameters.values())


def _check_settings(reward: Reward) -> None:
    """Raise UserError for a setting that the function does not have. Values, which may be secrets, are not shown."""
    try:
        known = [each.name for each in _named(reward.function) if each.name not in (*_GIVEN, "reference")]
    except (TypeError, ValueError):
        raise UserError(f"{KEY}: `{reward.name}` does not say what it takes: wrap it in a function.") from None
    for setting in reward.settings:
        if setting in _GIVEN or (setting not in known and not _takes_all(reward.function)):
            hint = did_you_mean(setting, known) or f" There are {', '.join(known) or 'none'}."
            raise UserError(f"{SETTINGS_KEY}: `{reward.name}` has no setting `{setting}`.{hint}")


def _try(reward: Reward) -> None:
    """Call a built-in function on no completion at all: it looks at its settings and imports what it needs."""
    named = _named(reward.function)
    lacking = [each.name for each in named if each.kind is each.KEYWORD_ONLY and each.name in needs(reward)]
    if lacking:
        example = f"{SETTINGS_KEY}={{'{reward.name}': {{'{lacking[0]}': ...}}}}"
        raise UserError(f"{KEY}: `{reward.name}` needs a setting `{lacking[0]}`: {example}.")
    try:
        reward.function(**{name: [] for name in needs(reward)}, **reward.settings)
    except (UserError, TypeError, ValueError) as error:  # the last two for settings of a wrong type
        raise UserError(f"{SETTINGS_KEY}: `{reward.name}`: {error}") from None


def _call(reward: Reward, group: Group) -> list[Any]:
    """Return what the function gives, an entry for each completion. Raises _Lost."""
    count = len(group.completions)
    given = {"reference": group.reference}
    given |= {name: value for name, value in group.row.items() if name not in _NOT_COLUMNS}
    if group.reference is not None:
        given["reference"] = group.reference
    arguments = {name: [value] * count for name, value in given.items()} | {
        "prompts": [group.prompt] * count,
        "completions": list(group.completions),
        "completion_ids": [list(ids) for ids in group.completion_ids],
    }
    wanted = _wanted(reward, arguments)
    try:
        result = reward.function(**wanted, **reward.settings)
        result = asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result
        if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__iter__"):
            raise _Lost(f"returned {type(result).__name__}; {_wants(count)}")
        values = list(itertools.islice(result, count + 1))
    except _Lost:
        raise
    except UserError as error:
        raise _Lost(f"says: {error}") from None
    except (Exception, SystemExit) as error:
        # The function is the user's: whatever it raises is about this row or about the function.
        raise _Lost(f"failed: {_said(error)}") from None
    if len(values) != count:
        many = f"more than {count}" if len(values) > count else len(values)
        raise _Lost(f"returned {len(result) if hasattr(result, '__len__') else many} rewards; {_wants(count)}")
    return values


async def _awaited(result: Any) -> Any:
    return await result


def _wanted(reward: Reward, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of ``arguments`` that the function takes and no setting gives. Raises _Lost where one is lacking."""
    for name in needs(reward):
        if name not in arguments:
            raise _Lost(_lacking(name, list(arguments)))
    named = {each.name for each in _named(reward.function)}
    taken = arguments if _takes_all(reward.function) else named & set(arguments)
    return {name: arguments[name] for name in taken if name not in reward.settings}


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, Exception):
        raise _Lost(f"failed: {_said(value)}")
    if not hasattr(value, "__float__") and not hasattr(value, "__index__"):
        raise _Lost(f"returned {value!r:.100}, which is no number. Return a float, or None for no opinion.")
    try:
        number = float(value)
    except Exception as error:
        raise _Lost(f"returned {type(value).__name__}, which is no number: {_said(error)}") from None
    if not math.isfinite(number):
        raise _Lost(f"returned {number}, which is not finite. Return a finite number, or None for no opinion.")
    return number


def _said(error: Exception | SystemExit) -> str:
    return f"{type(error).__name__}: {error}.{functions.line_of(error)}"


def _wants(count: int) -> str:
    return f"it should return a list of {count}, one number (or None) for each completion."


def _lacking(name: str, given: Sequence[str]) -> str:
    return (
        f"needs `{name}`, which is no column of the row and not set by {SETTINGS_KEY}. There are {', '.join(given)}."
        f"{did_you_mean(name, list(given))}"
    )
