"""Reward functions in processes: whatever one does costs its own rewards alone, and nothing is left running."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from luthier.data import files
from luthier.errors import UserError
from luthier.rollout.reward import Group
from luthier.rollout.workers import Pending, Scorers
from tiny import ROOT, needs_reasoning_gym

LIMIT = 1.0
OWN = r'''
import asyncio, ctypes, itertools, os, re, signal, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).parent

def good(completions): return [float(len(text)) for text in completions]
def none(completions): return [None for _ in completions]

def sleeps(completions): time.sleep(600)

async def never(completions):
    await asyncio.sleep(600)

def backtracks(completions):
    return [float(bool(re.match(r"(a+)+$", "a" * 40 + "b"))) for _ in completions]  # keeps the interpreter's lock

def ignores(completions):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    ctypes.PyDLL(None).sleep(600)

def leaves_a_child(completions):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (HERE / "child").write_text(str(child.pid))
    child.wait()

def raises(completions): return [1 / 0]
def nan(completions): return [1.0, float("nan")]
def infinite(completions): return [float("-inf"), 2.0]
def few(completions): return [1.0]
def endless(completions): return itertools.count()
def number(completions): return 1.0
def excuse(completions): return [ValueError("no judge"), 0.5]
def exits(completions): os._exit(3)
def leaves(completions): sys.exit("enough")
def killed(completions): os.kill(os.getpid(), signal.SIGKILL)
def crashes(completions): ctypes.string_at(0)

def prints(completions):
    for _ in range(2000):
        print("x" * 1000)
    print("the last line", file=sys.stderr)
    return [1.0] * len(completions)

async def waits(completions):
    await asyncio.sleep(0.01)
    return [3.0] * len(completions)

def asks(completions): return [float(sys.stdin.read() == "")] * len(completions)
def imports_jax(completions): return [float("jax" in sys.modules)] * len(completions)
def naps(completions, seconds): time.sleep(seconds[0]); return [seconds[0]] * len(completions)

def meets(completions, mine, other):
    (HERE / mine[0]).touch()
    while not (HERE / other[0]).exists():
        time.sleep(0.01)
    return [1.0] * len(completions)

def process(completions): return [float(os.getpid())] * len(completions)

def signalled(completions):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    return [1.0] * len(completions)

def children(completions):
    """Of a process that stops when it is asked to, as it should."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    time.sleep(0.05)
    child.terminate()
    return [float(child.wait())] * len(completions)
'''
LOST = {
    "sleeps": (2, r"took longer than 1 seconds\. \(.*own\.py, line 10\)"),
    "never": (2, r"took longer than 1 seconds\.$"),
    "backtracks": (2, r"took longer than 1 seconds\. \(.*own\.py, line 16\)"),
    "ignores": (2, r"took longer than 1 seconds\. \(.*own\.py, line 21\)"),
    "leaves_a_child": (2, r"took longer than 1 seconds\. \(.*own\.py, line 26\)"),
    "raises": (2, r"failed: ZeroDivisionError: division by zero\. \(.*own\.py, line 28\)"),
    "nan": (1, r"returned nan, which is not finite.* \(completion 2\)"),
    "infinite": (1, r"returned -inf, which is not finite.* \(completion 1\)"),
    "few": (2, r"returned 1 rewards; it should return a list of 2"),
    "endless": (2, r"returned more than 2 rewards; it should return a list of 2"),
    "number": (2, r"returned float; it should return a list of 2"),
    "excuse": (1, r"failed: ValueError: no judge\. \(completion 1\)"),
    "exits": (2, r"ended its process with exit code 3\."),
    "leaves": (2, r"failed: SystemExit: enough\. \(.*own\.py, line 36\)"),
    "killed": (2, r"ended its process by SIGKILL \(the machine may be out of memory\)\."),
    "crashes": (2, r"ended its process by SIGSEGV\."),
}
KEPT = {
    "good": [2.0, 5.0],
    "none": [math.nan, math.nan],
    "nan": [1.0, math.nan],
    "infinite": [math.nan, 2.0],
    "excuse": [math.nan, 0.5],
    "prints": [1.0, 1.0],
    "waits": [3.0, 3.0],
    "asks": [1.0, 1.0],
    "imports_jax": [0.0, 0.0],
    "signalled": [1.0, 1.0],
    "children": [-15.0, -15.0],
}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "own.py"
    path.write_text(OWN)
    return path


def group(*completions: str, reference: str | None = "72", place: str = "line 3", **row: Any) -> Group:
    said = completions or ("72", "seven")
    return Group("How many?", said, [[1, 2]] * len(said), row, reference, place)


def column(pending: Pending) -> list[float]:
    scored = pending.result()
    assert not scored.failures, scored.failures
    return scored.rewards_GF[:, 0].tolist()


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def has_ended(pid: int) -> bool:
    """Say whether a process has ended, be it that nobody has asked for its exit code."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def everything(own: Path) -> tuple[list[str], list[Any], str]:
    """Names of functions that do what they can, what came of them over two groups, and what they printed."""
    names = list(dict.fromkeys([*LOST, *KEPT]))
    printed = own.with_name("printed")
    with Scorers([f"{own}:{name}" for name in names], workers=3, timeout=LIMIT, output=printed) as scorers:
        assert scorers.names == tuple(names)
        pending = [scorers.submit(group(place=place)) for place in ("line 3", "line 4")]
        return names, [each.result() for each in pending], printed.read_text()


@pytest.mark.parametrize("name", LOST)
def test_a_failure_costs_its_own_rewards(everything, name):
    lost, reason = LOST[name]
    for scored, place in zip(everything[1], ("line 3", "line 4"), strict=True):
        failure = next(each for each in scored.failures if each.function == name)
        assert (failure.place, failure.lost) == (place, lost)
        assert re.search(reason, failure.reason), failure.reason
        assert np.isnan(scored.rewards_GF[:, everything[0].index(name)]).sum() == lost


@pytest.mark.parametrize("name", KEPT)
def test_what_was_given_stands(everything, name):
    for scored in everything[1]:
        np.testing.assert_array_equal(scored.rewards_GF[:, everything[0].index(name)], KEPT[name])


def test_only_what_failed_is_a_failure(everything):
    for scored in everything[1]:
        assert {failure.function for failure in scored.failures} == set(LOST)
        assert scored.rewards_GF.dtype == np.float64


def test_what_functions_print_is_kept(everything):
    assert "the last line\n" in everything[2]


def test_what_a_function_started_ends_with_it(everything, own):
    child = int(own.with_name("child").read_text())
    until(lambda: has_ended(child))


def test_functions_and_groups_run_side_by_side(own):
    with Scorers([f"{own}:meets"], workers=2, timeout=30) as scorers:
        pending = [scorers.submit(group(mine=mine, other=other)) for mine, other in (("a", "b"), ("b", "a"))]
        assert [column(each) for each in pending] == [[1, 1], [1, 1]]


def test_order_and_limit_do_not_depend_on_the_queue(own):
    """The limit is for each call: all together take far longer. What is first done is not first in the results."""
    seconds = [0.6, 0.3, 0.0, 0.6, 0.0, 0.6, 0.6]
    with Scorers([f"{own}:naps", f"{own}:good"], workers=2, timeout=LIMIT) as scorers:
        pending = [scorers.submit(group(seconds=each)) for each in seconds]
        found = [each.result() for each in pending]
    assert not any(each.failures for each in found)
    assert [each.rewards_GF[0].tolist() for each in found] == [[each, 2.0] for each in seconds]


def test_functions_are_loaded_once_in_each_process_and_not_here(tmp_path):
    source = "import os, time\nfrom pathlib import Path\ntime.sleep(1.2)\n"
    source += "with Path(__file__).with_name('loaded').open('a') as file: print(os.getpid(), file=file)\n"
    (tmp_path / "slow.py").write_text(source + "def one(completions): return [1.0] * len(completions)\n")
    with Scorers([f"{tmp_path}/slow.py:one"], workers=2, timeout=LIMIT) as scorers:
        assert [column(scorers.submit(group())) for _ in range(5)] == [[1, 1]] * 5
        until(lambda: len((tmp_path / "loaded").read_text().split()) == 2)
        assert [column(scorers.submit(group())) for _ in range(5)] == [[1, 1]] * 5
    pids = (tmp_path / "loaded").read_text().split()
    assert len(set(pids)) == len(pids) == 2
    assert str(os.getpid()) not in pids


def test_a_process_that_ended_in_between_is_replaced(own):
    with Scorers([f"{own}:process"], workers=1, timeout=30) as scorers:
        [before, _] = column(scorers.submit(group()))
        os.kill(int(before), signal.SIGKILL)
        until(lambda: all(process.has_ended() for process in scorers._running))
        [after, _] = column(scorers.submit(group()))
    assert after != before


@pytest.mark.parametrize("row", [{"column": lambda: 0}, {"column": ZeroDivisionError}], ids=["sent", "read"])
def test_rows_that_cannot_be_sent(own, row, monkeypatch):
    if row["column"] is ZeroDivisionError:
        monkeypatch.setattr("luthier.rollout.workers.pickle.dumps", lambda *_: b"cnowhere\nthing\n.")
    with Scorers([f"{own}:good", f"{own}:none"], workers=1, timeout=30) as scorers:
        scored = scorers.submit(group(**row)).result()
        monkeypatch.undo()
        assert [failure.lost for failure in scored.failures] == [2, 2]
        assert "its row cannot be" in scored.failures[0].reason
        assert np.isnan(scored.rewards_GF).all()
        assert scorers.submit(group()).result().failures == ()


def test_functions_that_cannot_be_loaded_again(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("import os\ndef dies(completions): os._exit(1)\ndef good(completions): return [1.0, 2.0]\n")
    with Scorers([f"{path}:dies", f"{path}:good"], workers=1, timeout=30) as scorers:
        path.write_text("import nothing_of_the_kind\n")
        scored = scorers.submit(group()).result()
    assert "ended its process" in scored.failures[0].reason
    assert "loading it into another process failed: " in scored.failures[1].reason
    assert "No module named 'nothing_of_the_kind'" in scored.failures[1].reason


def test_closing_ends_all_at_once(own):
    scorers = Scorers([f"{own}:sleeps"], workers=2, timeout=600)
    pending = [scorers.submit(group()) for _ in range(4)]
    until(lambda: len(psutil.Process().children()) >= 2)
    time.sleep(0.3)
    started = time.monotonic()
    scorers.close()
    assert time.monotonic() - started < 5
    assert not any("luthier.rollout.worker" in " ".join(each.cmdline()) for each in psutil.Process().children())
    for each in pending:
        with pytest.raises(CancelledError):
            each.result()
    with pytest.raises(RuntimeError, match="closed"):
        scorers.submit(group())


@pytest.mark.parametrize("function", ["sleeps", "backtracks", "ignores", "leaves_a_child", "good"])
def test_processes_end_with_a_parent_that_is_killed(own, tmp_path, function):
    program = textwrap.dedent(f"""
        import time, psutil
        from pathlib import Path
        from luthier.rollout.reward import Group
        from luthier.rollout.workers import Scorers
        scorers = Scorers(["{own}:{function}"], workers=1, timeout=600)
        scorers.submit(Group("", ["72", "7"], [[], []], {{}}, None, "line 3"))
        time.sleep(0.5)
        print(*[each.pid for each in psutil.Process().children(recursive=True)], flush=True)
        time.sleep(600)
    """)
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == (3 if function == "leaves_a_child" else 2)  # the worker, its guard, and its child
    parent.kill()
    parent.wait()
    until(lambda: all(map(has_ended, pids)))


def test_ctrl_c_of_a_terminal_does_not_reach_them(own):
    """They are in sessions of their own, and do nothing on the signals that end others (``signalled``)."""
    with Scorers([f"{own}:process"], workers=1, timeout=30) as scorers:
        pid = int(column(scorers.submit(group()))[0])
        assert os.getsid(pid) == pid != os.getsid(0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def other(completions): pass", "no function `f` there. It has: other"),
        ("import os; os._exit(4)", "loading them ended its process with exit code 4"),
        ("raise SystemExit(5)", "loading them ended its process with exit code 5"),
        ("import time; time.sleep(600)", r"loading them took longer than 2 seconds. \(.*own.py, line 1\)"),
        ("1 / 0", "running it failed: division by zero"),
    ],
)
def test_what_cannot_be_loaded_is_refused_at_once(tmp_path, source, message):
    (tmp_path / "own.py").write_text(source + "\n")
    with pytest.raises(UserError, match=message):
        Scorers([f"{tmp_path}/own.py:f"], workers=2, load_timeout=2)


def test_wrong_names_settings_and_columns_are_refused(own):
    with pytest.raises(UserError, match="math stands twice"):
        Scorers(["math", "math"])
    with pytest.raises(UserError, match="Did you mean `math`"):
        Scorers(["maths"])
    with pytest.raises(UserError, match=r"`length` has no setting `maximun`\. Did you mean `maximum`"):
        Scorers(["length"], {"length": {"maximun": 3}})
    with Scorers([f"{own}:naps"], workers=1) as scorers:
        scorers.check_columns(["seconds"], "rows.jsonl")
        with pytest.raises(
            UserError, match=r"rows.jsonl: reward function `naps` needs `seconds`.*Did you mean `second`"
        ):
            scorers.check_columns(["second"], "rows.jsonl")


def test_no_functions_at_all():
    with Scorers([]) as scorers:
        scorers.check_columns([], "rows")
        scored = scorers.submit(group()).result()
    assert scored.rewards_GF.shape == (2, 0)
    assert scored.failures == ()


@needs_reasoning_gym
def test_built_in_functions_and_settings():
    row = files.open_splits("reasoning_gym:chain_sum,max_terms=3")["test"]()[0]
    right = row["answer"]
    names = ["reasoning_gym", "math", "length"]
    with Scorers(names, {"length": {"maximum": 5, "unit": "characters"}}, workers=2, timeout=30) as scorers:
        scorers.check_columns(row, "rows")
        scored = scorers.submit(group(right, "wrongly", reference=right, **row)).result()
    assert scored.failures == ()
    np.testing.assert_array_equal(scored.rewards_GF, [[1, 1, 1], [0, 0, 0]])


def test_math_breaks_off_by_itself():
    """What math-verify would take for ever over costs that completion, by its own limit, and not the group."""
    endless = r"\boxed{" + "^".join(["9"] * 9) + "}"
    with Scorers(["math"], workers=1, timeout=50) as scorers:
        assert column(scorers.submit(group("72", endless, "72"))) == [1, 0, 1]
