"""Checkpoints of several processes: written by all, restored by as many, by fewer and by more, damaged or not."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import ROOT

pytestmark = pytest.mark.multiprocess
SCRIPT = Path(__file__).with_name("state_process.py")


def together(place, what, count):
    """Run ``count`` processes to their ends, and return what each said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(place), what, address, str(count), str(number)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    ends = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0] * count, ends
    lines = [line for output, _ in ends for line in output.splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]  # and not Gloo's


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of two checkpoints that two processes have saved together."""
    place = tmp_path_factory.mktemp("saved") / "c"
    together(place, "save", 2)
    return place


@pytest.mark.parametrize("count", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_two_processes_saved_any_number_restores(saved, count):
    assert together(saved, "restore", count) == [{"row": 2, "good": True, "told": [], "latest": 2}] * count


def damage_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["a missing shard", pytest.param("a flipped bit", marks=pytest.mark.slow)])
def test_a_part_that_one_process_alone_reads_is_damaged_and_both_take_the_checkpoint_before(saved, tmp_path, how):
    shutil.copytree(saved, tmp_path / "c")
    part = max(
        (tmp_path / "c" / "2" / "state" / "ocdbt.process_1" / "d").iterdir(), key=lambda path: path.stat().st_size
    )
    damage_bit(part) if how == "a flipped bit" else part.unlink()
    for said in together(tmp_path / "c", "restore", 2):
        assert (said["row"], said["good"], said["latest"]) == (1, True, 1)
        assert "c/2: damaged (" in said["told"][0]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["1", "2.damaged"]
