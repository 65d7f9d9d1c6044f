"""What a sync sends: all weights each time, or the base once and then an adapter.

Left out on purpose: how it travels (``weights``), and when (``engine``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from luthier.model.param import Tree
from luthier.rollout.vllm.client import Client, Failure, Pause
from luthier.rollout.vllm.weights import Call, Transfer, send_adapter

ADAPTER = "policy"
"""The name that servers know the trained adapter by."""
Tensors = Callable[[Tree], Iterator[tuple[str, np.ndarray]]]
"""Names and values of all weights, one at a time (``named.full``); all processes go through it together."""


class Sent(NamedTuple):
    """A sync: which servers did not take it and why, how long it took, and the bytes that one server was sent."""

    failed: Mapping[Client, Failure]
    seconds: float
    bytes: int


NOTHING = Sent({}, 0.0, 0)
"""A sync of no server, as processes other than the first see it."""


class Send(Protocol):
    """Brings weights to servers."""

    @property
    def adapter(self) -> str:
        """The adapter that completions are asked of, "" for none."""
        ...

    def __call__(
        self, params: Tree, version: int, stale: Sequence[Client], fresh: Sequence[Client], *, whole: bool, call: Call
    ) -> Sent:
        """Bring ``params``, as the engine's ``sync`` was given them, to all of these servers, as ``version``.

        ``stale`` have older ones; ``fresh`` have just been started and have none. All processes call it together, the
        first one alone with servers; ``whole`` tells each of them whether there are any ``fresh`` ones.
        """
        ...


@dataclass(frozen=True)
class Whole:
    """Sends all weights at each sync."""

    tensors: Tensors
    pause_mode: Pause = "keep"
    timeout: float = 600.0

    @property
    def adapter(self) -> str:
        """No adapter."""
        return ""

    def __call__(
        self, params: Tree, version: int, stale: Sequence[Client], fresh: Sequence[Client], *, whole: bool, call: Call
    ) -> Sent:
        """Bring all weights to all of these servers."""
        if not (stale or fresh):  # not the first process: it does its part in gathering alone
            for _ in self.tensors(params):
                pass
            return NOTHING
        to = Transfer([*stale, *fresh], call, version, pause_mode=self.pause_mode, timeout=self.timeout)
        with to:
            for name, array in self.tensors(params):
                to.put(name, array)
        return Sent(to.failed, to.seconds, to.bytes)


@dataclass(frozen=True)
class Adapted:
    """Sends the base to servers that have none, and then nothing but the adapter, whose ``files`` follow from params.

    ``base`` and ``files`` are given the same params, and take of them what they need.
    """

    base: Tensors
    files: Callable[[Tree], Mapping[str, bytes]]
    pause_mode: Pause = "keep"
    timeout: float = 600.0

    @property
    def adapter(self) -> str:
        """The adapter's name."""
        return ADAPTER

    def __call__(
        self, params: Tree, version: int, stale: Sequence[Client], fresh: Sequence[Client], *, whole: bool, call: Call
    ) -> Sent:
        """Bring the base to the fresh ones, and the adapter to all."""
        first = NOTHING
        if whole:
            first = Whole(self.base, self.pause_mode, self.timeout)(params, version, (), fresh, whole=True, call=call)
        well = [client for client in (*stale, *fresh) if client not in first.failed]
        files = self.files(params)
        if not well:
            return first
        then = send_adapter(well, call, version, files, name=ADAPTER, pause_mode=self.pause_mode, timeout=self.timeout)
        return Sent({**first.failed, **then.failed}, first.seconds + then.seconds, first.bytes + then.bytes)
