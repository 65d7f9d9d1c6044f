"""Runs `luthier rl`, and kills it at a chosen moment: `rl_killed.py PLACE COUNT key=value ...`.

It dies once it has drawn a chunk of tokens for the COUNTth time, or as the COUNTth checkpoint is being written.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys

from luthier import cli
from luthier.checkpoint.state import Checkpoints
from luthier.rollout.local import LocalEngine

PLACES = {"sampling": (LocalEngine, "step"), "saving": (Checkpoints, "save")}


def kill_at(place: str, count: int) -> None:
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), itertools.count(1)

    def dying(*arguments, **keywords):
        result = original(*arguments, **keywords)
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)


if __name__ == "__main__":
    if sys.argv[1] in PLACES:
        kill_at(sys.argv[1], int(sys.argv[2]))
    raise SystemExit(cli.main(["rl", *sys.argv[3:]]))
