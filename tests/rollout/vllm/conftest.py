"""Fake servers that end with their test, and a fleet that looks at them often."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fake import Fake

from luthier.rollout.vllm import engine, fleet


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Fake]]]:
    """Return what starts some of them."""
    monkeypatch.setattr(fleet, "LOOK_SECONDS", 0.03)
    monkeypatch.setattr(engine, "STEP_SECONDS", 0.05)
    started: list[Fake] = []

    def start(count: int, **settings: object) -> list[Fake]:
        started.extend(new := [Fake(**settings) for _ in range(count)])
        return new

    yield start
    for each in started:
        each.end()
