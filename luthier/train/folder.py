"""The folder that a run leaves, and whether a command may go on in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from luthier import config as config_lib
from luthier.errors import UserError

# Keys that may change between a run and its continuation: how far it goes and what is kept, not what a step does.
CONTINUABLE = {
    *("steps", "num_epoch", "eval_interval", "eval_steps", "log_period"),
    *("profiler", "profiler_steps", "skip_first_n_steps_for_profiler"),
    *("checkpoint_period", "max_num_checkpoints_to_keep", "async_checkpointing", "save_dtype"),
    *("grain_worker_count", "jax_cache_dir", "hf_access_token"),
}


def path(config: Any) -> Path:
    """Return the run's folder."""
    return Path(config.base_output_directory).expanduser() / config.run_name


def check(config: Any) -> Path:
    """Return the run's folder if this command may run there: it is new, empty, or holds this same run.

    Raises UserError where it holds a different run, naming the keys that differ, or something that is no run.
    """
    folder = path(config)
    elsewhere = "Choose another run_name, or remove the folder."
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a folder for a run. {elsewhere}")
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    recipe = folder / "config.yml"
    if not recipe.is_file():
        raise UserError(f"{folder}: holds files but no config.yml, so it is not a run of Luthier. {elsewhere}")
    before = yaml.safe_load(recipe.read_text()) or {}
    now = config.model_dump()
    differing = [
        f"{name} (there {before[name]!r}, here {now[name]!r})"
        for name in now
        if name not in CONTINUABLE and name in before and before[name] != now[name]
    ]
    if differing:
        raise UserError(f"{folder}: holds a different run: {', '.join(differing)}. {elsewhere}")
    return folder


def open_(config: Any) -> Path:
    """Make the folder and write ``config.yml`` into it. Call after ``check``, once nothing cheap can fail any more."""
    folder = path(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config_lib.save(config, folder / "config.yml")
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise UserError(f"{folder}: {reason}. Choose another base_output_directory.") from None
    return folder
