"""What a lone process does where several agree, and how values travel. Several are in ``train/test_processes.py``."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from luthier import parting, processes
from luthier.config.groups import HostKeys
from luthier.errors import RunError, UserError
from tiny import ROOT


def test_a_lone_process_answers_for_itself() -> None:
    assert processes.is_first()
    assert not processes.several()
    assert processes.gather({"a": [1, None]}) == [{"a": [1, None]}]
    assert processes.tell("é") == "é"
    assert processes.by_first(lambda: 3) == 3
    assert int(processes.greatest(15)) == 15
    processes.wait("nothing")
    processes.check_alike("the rows", "abc")
    with pytest.raises(RunError, match="full"):
        processes.by_first(_fail)


def _fail() -> None:
    raise RunError("full")


def test_arrays_are_fetched_whole() -> None:
    mesh = jax.make_mesh((8,), ("x",))
    rows_BT = np.arange(32.0).reshape(8, 4)
    split = jax.device_put(rows_BT, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    found = processes.fetch({"split": split, "one": jax.numpy.ones(2)})
    np.testing.assert_array_equal(found["split"], rows_BT)
    assert isinstance(found["one"], np.ndarray)
    gathered = processes._whole(mesh)({0: split})[0]
    assert gathered.is_fully_replicated


@pytest.mark.parametrize("length", [0, 1, 4096, 4097, 10_000])
def test_values_travel_in_few_sizes(length: int) -> None:
    data = np.full(length, 7, np.uint8)
    padded = processes._padded(data, length)
    np.testing.assert_array_equal(padded[:length], data)
    assert len(padded) in (4096, 8192, 16384)


def test_what_differs_is_named_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "gather", lambda value: [value, "other", value])
    with pytest.raises(UserError, match="the rows differ between processes: those of 1 are not process 0's"):
        processes.check_alike("the rows", "one")


def test_keys_that_other_versions_do_not_have_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(value: Any) -> list[Any]:
        return [value, {"a_newer_key": 1}] if isinstance(value, dict) else [value, "other"]

    monkeypatch.setattr(processes, "gather", gather)
    with pytest.raises(UserError, match="started differently") as caught:
        processes.check_same(HostKeys())
    assert "num_processes" not in str(caught.value)
    assert "a_newer_key (None in process 0, 1 in process 1)" in str(caught.value)
    assert "version of jax" in str(caught.value)


ABORTED = """
import os
from luthier import parting
parting.say_last_words("first words")
parting.say_last_words("a peer has died")
os.abort()
"""
FAILED = """
import sys
from luthier import parting
if sys.argv[1] == "several":
    parting._handlers.append(None)
with parting.ending_together():
    raise SystemExit(int(sys.argv[2]))
"""


LOST = """
import jax
from luthier import parting
parting._handlers.append(None)
with parting.losses_named():
    raise jax.errors.JaxRuntimeError("INTERNAL: connection closed\\nmore")
"""


def test_an_aborted_process_has_last_words_and_an_exit_code() -> None:
    done = subprocess.run([sys.executable, "-c", ABORTED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "luthier: a peer has died\n")


def test_a_computation_that_another_process_broke_off_is_told_in_a_line() -> None:
    done = subprocess.run([sys.executable, "-c", LOST], cwd=ROOT, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith("luthier: a computation of all processes broke off: another of them has ended")
    assert line.endswith("goes on from the last checkpoint. (INTERNAL: connection closed)")


@pytest.mark.parametrize("several", ["several", "alone"])
@pytest.mark.parametrize("code", [0, 2, 143])
def test_exit_codes_are_kept(several: str, code: int) -> None:
    command = [sys.executable, "-c", FAILED, several, str(code)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == code


def test_errors_of_a_lone_process_are_left_alone() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), parting.losses_named():
        raise jax.errors.JaxRuntimeError("INTERNAL: ours")
