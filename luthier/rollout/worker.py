"""What runs in a process that calls reward functions: ``workers`` starts it, and asks it one thing at a time.

Functions run in the main thread, as those want that set signals.

Left out on purpose: jax, which takes seconds to import and may take hold of the accelerator.
"""

from __future__ import annotations

import faulthandler
import math
import os
import pickle
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from luthier.errors import UserError
from luthier.rollout import reward
from luthier.rollout.failures import Failure

TRACE_SIGNAL = signal.SIGUSR1
"""Makes the process write down where its main thread is."""


@dataclass(frozen=True)
class Call:
    """A call of function ``number`` on a pickled group of ``count`` completions; ``place`` names its row."""

    number: int
    count: int
    place: str
    group: bytes


@dataclass(frozen=True)
class Loaded:
    """The functions are loaded: what each of them needs, by its name in the order of the paths."""

    needs: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Refused:
    """A function could not be loaded, which is the user's to mend."""

    message: str


def serve(connection: int, trace: int) -> None:
    """Load what comes first over ``connection``, then answer calls until its other end is closed.

    ``connection`` and ``trace``, where the main thread's place is written when asked for, are file descriptors.
    """
    for descriptor in (connection, trace):
        os.set_inheritable(descriptor, False)
    # Not SIG_IGN, which processes that a function starts would inherit.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    faulthandler.register(TRACE_SIGNAL, trace, all_threads=False)
    pipe = Connection(connection)
    try:
        rewards = reward.load(*pipe.recv())
    except UserError as error:
        pipe.send(Refused(str(error)))
        return
    pipe.send(Loaded({each.name: reward.needs(each) for each in rewards}))
    while True:
        pipe.send(_answer(rewards, pipe.recv()))


def _answer(rewards: Sequence[reward.Reward], call: Call) -> tuple[list[float], Failure | None]:
    asked = rewards[call.number]
    try:
        group = pickle.loads(call.group)
    except Exception as error:
        # A row may hold objects of the user's own, which can do anything as they are read.
        reason = f"could not be called: its row cannot be read in another process: {type(error).__name__}: {error}"
        return [math.nan] * call.count, Failure(asked.name, call.place, reason, call.count)
    return reward.score(asked, group)
