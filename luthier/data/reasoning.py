"""``reasoning_gym:TASK`` as a dataset: problems that reasoning-gym makes when asked for them, and its own verifiers.

``reasoning_gym:chain_sum,min_terms=3,max_terms=4,seed=1`` is the task with its settings. The same text gives the same
problems on any machine. ``train`` has 10,000 problems, or ``size``, and ``test`` 500. They share none but by chance,
and neither do two seeds, whereas reasoning-gym's own problems for seed 1 are those for seed 0 but for the first.

Left out on purpose: reasoning-gym's curricula and its mixtures of tasks.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import yaml

from luthier.data.rows import Row, digest
from luthier.errors import UserError, did_you_mean

PREFIX = "reasoning_gym:"
TASK_COLUMN = "task"
"""Column that holds the task with its settings, from which ``score`` finds the verifier."""
TRAIN_SIZE, TEST_SIZE = 10_000, 500


class Problems:
    """The problems of a task: columns ``question``, ``answer``, ``metadata`` and ``task``, made when asked for."""

    columns = ("question", "answer", "metadata", TASK_COLUMN)

    def __init__(self, task: str, split: str, changes: Mapping[str, int]):
        self.source = f"{PREFIX}{task} ({split})"
        self._task, self._changes = task, dict(changes)

    @property
    def fingerprint(self) -> str:
        """Of the task, its settings and the release of reasoning-gym."""
        return digest(self._task, repr(self._changes), importlib.metadata.version("reasoning-gym"))

    @cached_property
    def _dataset(self) -> Any:
        return _dataset(self._task, **self._changes)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_dataset"}

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Row:
        entry = self._dataset[index]
        # A task that accepts many answers may give none itself.
        return {**entry, "answer": entry["answer"] or "", TASK_COLUMN: self._task}

    def place(self, index: int) -> str:
        """Task, split and problem, from 1."""
        return f"{self.source}, problem {index + 1}"


def splits(path: str, key: str) -> dict[str, Callable[[], Problems]]:
    """Return the splits of ``reasoning_gym:TASK``. Raises UserError naming ``key`` for a task or setting not there."""
    task = path.removeprefix(PREFIX)
    try:
        settings = _settings(task)
        _dataset(task)
    except ValueError as error:
        raise UserError(f"{key}={path}: {error}") from None
    sizes = {"train": settings.get("size", TRAIN_SIZE), "test": TEST_SIZE}
    seeds = np.random.SeedSequence(settings.get("seed", 0)).generate_state(len(sizes)) >> 1
    changes = {
        split: {"seed": int(seed), "size": size} for (split, size), seed in zip(sizes.items(), seeds, strict=True)
    }
    return {split: lambda split=split: Problems(task, split, changes[split]) for split in sizes}


def score(task: str, answer: str | None, row: Mapping[str, Any]) -> float:
    """Return what the task's own verifier gives an answer to a row of ``Problems``: 1 right, 0 wrong, some between."""
    return float(_verifier(task).score_answer(answer, {name: row[name] for name in ("question", "answer", "metadata")}))


@functools.cache
def library() -> Any:
    """Import reasoning-gym without pycosat, which needs a C compiler and serves one of its hundred tasks.

    Raises UserError where it is not installed.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(
            "reasoning-gym is not installed: pip install 'luthier[demo]', then pip install --no-deps reasoning-gym."
        )
    if "pycosat" not in sys.modules and importlib.util.find_spec("pycosat") is None:
        sys.modules["pycosat"] = types.ModuleType("pycosat")
    import reasoning_gym

    return reasoning_gym


@functools.cache
def _verifier(task: str) -> Any:
    return _dataset(task)


def _dataset(task: str, **changes: int) -> Any:
    """Return reasoning-gym's dataset. Raises ValueError in words for a user."""
    settings = {"seed": 0, "size": TRAIN_SIZE} | _settings(task) | changes
    name = task.partition(",")[0]
    try:
        return library().create_dataset(name, **settings)
    except Exception as error:
        # Tasks check their settings by assertions, and by errors of their own.
        raise ValueError(f"reasoning-gym refuses it: {type(error).__name__}: {error}") from error


def _settings(task: str) -> dict[str, Any]:
    """Return the settings in ``TASK,name=value,...``; values are read as YAML. Raises ValueError."""
    library()
    from reasoning_gym.factory import DATASETS

    name, _, text = task.partition(",")
    if name not in DATASETS:
        hint = did_you_mean(name, list(DATASETS)) or f" There are {', '.join(sorted(DATASETS))}."
        raise ValueError(f"reasoning-gym has no task `{name}`.{hint}")
    try:
        settings = yaml.safe_load("{" + text.replace("=", ": ") + "}")
    except yaml.YAMLError:
        raise ValueError(f"`{text}` is not a list of name=value, separated by commas.") from None
    known = [field.name for field in dataclasses.fields(DATASETS[name][1])]
    for setting in settings:
        if setting not in known:
            hint = did_you_mean(str(setting), known) or f" It has {', '.join(known)}."
            raise ValueError(f"`{name}` has no setting `{setting}`.{hint}")
    return settings
