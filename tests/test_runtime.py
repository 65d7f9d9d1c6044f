"""The settings of a process: none of them may change what is computed or fail where it does not apply."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from luthier import runtime

SHOW = """
import os, sys
from luthier import runtime
runtime.tune_allocator()
print(os.environ["GLIBC_TUNABLES"], *sys.argv[1:])
"""


def output(**environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", SHOW, "a b", "c=d"]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True).stdout.strip()


def test_a_process_starts_anew_with_its_own_arguments() -> None:
    asks = runtime.HUGE_PAGES.is_file() and "[madvise]" in runtime.HUGE_PAGES.read_text()
    if not asks or not runtime._glibc_has_huge_pages():
        pytest.skip("huge pages are not given on request here")
    assert output() == "glibc.malloc.hugetlb=1 a b c=d"


def test_a_setting_of_the_user_is_kept() -> None:
    assert output(GLIBC_TUNABLES="glibc.malloc.check=0") == "glibc.malloc.check=0 a b c=d"


def test_nothing_happens_off_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started anew"))
    runtime.tune_allocator()
    runtime.release_free_memory()


def test_free_memory_is_released() -> None:
    runtime.release_free_memory()
