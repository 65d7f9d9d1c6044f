"""The settings of a process: none of them may change what is computed or fail where it does not apply."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest

from luthier import runtime

CRASHES = """
from luthier import config, runtime
runtime.start(config.ProcessKeys(jax_cache_dir=""))
import jax, jax.numpy as jnp
x = jnp.ones((3, 1, 2, 2, 8, 8, 8))
print(jax.jit(lambda a, b: jnp.sum(a * b, axis=3))(x, x).sum())
"""
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


def test_sums_over_many_rows_are_right() -> None:
    """The case of jax-ml/jax#39103, of which jaxlib 0.10.2 by itself gets the last row wrong."""
    rows = np.arange(32_769, dtype=np.float32)[:, None] * np.array([1, 0, 0], np.float32)
    lengths = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
    np.testing.assert_array_equal(lengths, rows[:, 0] ** 2)


def test_a_sum_of_many_axes_does_not_crash() -> None:
    """The case of jax-ml/jax#40412, in a process that sets itself up as the commands do."""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CRASHES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["6144.0"]


@pytest.mark.parametrize(
    ("version", "before", "after"),
    [
        ("0.10.1", "", ""),
        ("0.10.2", "", f"{runtime.HANDED_OVER}=-reduce"),
        ("0.11.0", "--xla_a=1", f"--xla_a=1 {runtime.HANDED_OVER}=-reduce"),
        ("0.10.2", f"{runtime.HANDED_OVER}=", f"{runtime.HANDED_OVER}="),
        ("0.12.0", "", ""),
    ],
)
def test_xla_sums_by_itself_where_the_library_is_wrong(
    version: str, before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxlib.version, "__version__", version)
    monkeypatch.setenv("XLA_FLAGS", before)
    runtime.have_sums_right()
    assert os.environ["XLA_FLAGS"] == after


def test_flags_in_a_file_stay_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "flags"
    file.write_text("--xla_a=1\n--xla_b=2\n")
    monkeypatch.setattr(jaxlib.version, "__version__", "0.10.2")
    monkeypatch.setenv("XLA_FLAGS", str(file))
    runtime.have_sums_right()
    assert os.environ["XLA_FLAGS"].split() == ["--xla_a=1", "--xla_b=2", f"{runtime.HANDED_OVER}=-reduce"]
