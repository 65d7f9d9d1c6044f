"""Settings of the process, made once before jax computes anything."""

from __future__ import annotations

from pathlib import Path

import jax

from luthier.config import RunKeys


def start(keys: RunKeys) -> None:
    """Prepare this process for a run: keep compiled programs on disk, so that a second run starts at once."""
    if keys.jax_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(keys.jax_cache_dir).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
