"""Settings of the process, made before jax computes anything.

Left out on purpose: jax at import time, since `tune_allocator` must run before anything heavy is loaded.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from luthier.config import ProcessKeys

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
WRONG_SUMS, HANDED_OVER = ("0.10.2", "0.11.0"), "--xla_cpu_experimental_ynn_fusion_type"


def start(keys: ProcessKeys) -> None:
    """Prepare this process for a run: keep compiled programs on disk, so that a second run starts at once."""
    import jax

    have_sums_right()
    if keys.jax_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(keys.jax_cache_dir).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def have_sums_right() -> None:
    """On CPUs, have XLA compile sums itself where the library that it hands them to gets some wrong, or crashes.

    Two versions of jaxlib hand them to YNNPACK, the first of which is the last for Python 3.11: jax-ml/jax#39103 and
    #39257. Call it before jax computes anything. No effect where XLA_FLAGS say what is handed over.
    """
    from jaxlib.version import __version__

    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("-") and Path(flags).is_file():  # XLA takes flags from such a file
        flags = Path(flags).read_text(encoding="utf-8").strip()
    if __version__ in WRONG_SUMS and HANDED_OVER not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {HANDED_OVER}=-reduce".strip()


def tune_allocator() -> None:
    """Start this process anew with huge pages for large allocations, where Linux gives those on request alone.

    On a CPU, XLA asks for a step's memory at each step and gives it back: hundreds of thousands of page faults, about
    a twentieth of the time of a step. glibc reads the setting when a process starts, hence the new start; call this
    from a command line, before anything is imported or read. No effect elsewhere, nor where GLIBC_TUNABLES is set.
    """
    if "GLIBC_TUNABLES" in os.environ or not _glibc_has_huge_pages() or not HUGE_PAGES.is_file():
        return
    if "[madvise]" in HUGE_PAGES.read_text():
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def release_free_memory() -> None:
    """Give memory that was freed back to the system, after work that needed much for a moment: compiling.

    The C library would keep it (0.2 GB after compiling a train step); it counts into the peak of the run. glibc alone
    has the call.
    """
    if _glibc_version() is not None:
        ctypes.CDLL(None).malloc_trim(0)


def _glibc_has_huge_pages() -> bool:
    version = _glibc_version()
    return version is not None and version >= (2, 35)


def _glibc_version() -> tuple[int, ...] | None:
    if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return None
    name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    return tuple(int(part) for part in version.split(".")) if name == "glibc" else None
