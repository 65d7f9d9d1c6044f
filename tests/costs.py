"""What `costs.txt` says of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

COLLECTED = pytest.StashKey[set[str]]()  # the names of all tests, before any are left out by their marks


def costs() -> dict[str, str]:
    """The mark of each test that `costs.txt` lists."""
    lines = Path(__file__).with_name("costs.txt").read_text(encoding="utf-8").splitlines()
    return {name: mark for mark, _, name in (line.partition(" ") for line in lines if not line.startswith("#"))}
