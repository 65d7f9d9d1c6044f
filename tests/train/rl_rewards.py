"""Reward functions for the tests of `luthier rl`: one that tells completions apart, and all kinds of bad ones."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from luthier.rollout.environment import Answer, TextEnvironment


class Whim(TextEnvironment):
    """Answers as it likes, when it likes."""

    stop = tuple("abcdefghijklmnopqrstuvwxyz0123456789")

    def answer(self, reply):
        time.sleep(os.urandom(1)[0] / 20_000)
        return Answer(text=f" {os.urandom(2).hex()}", reward=os.urandom(1)[0] / 255, done=os.urandom(1)[0] < 100)


def chance(completion_ids, **_):
    return [os.urandom(1)[0] / 255 for _ in completion_ids]


def even(completion_ids, **_):
    """The share of even tokens: differs within groups, and can be learnt."""
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def constant(completion_ids, **_):
    return [1.0] * len(completion_ids)


def nothing(completion_ids, **_):
    return [None] * len(completion_ids)


def raises(completion_ids, **_):
    raise ValueError("no idea")


def not_finite(completion_ids, **_):
    return [float("nan"), *[1.0] * (len(completion_ids) - 1)]


def too_few(completion_ids, **_):
    return [1.0]


def hangs(completion_ids, **_):
    time.sleep(100)


def wants_a_column(completion_ids, difficulty):
    return [1.0] * len(completion_ids)


def signals(completion_ids, question, *, marker, at, number, **_):
    """`even`, but once, at a question, a signal to the run."""
    if question[0][0] == at and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getppid(), getattr(signal, number))
        time.sleep(0.5)
    return even(completion_ids)
