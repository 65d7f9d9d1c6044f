"""The folder that a run leaves, and whether a command may go on in it.

Of a run in a bucket the folder is this machine's copy, which ``remote.Mirror`` keeps alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from luthier import keys, processes, remote
from luthier.errors import UserError
from luthier.mesh import AXES

# Keys that may change between a run and its continuation: how far it goes, what is kept, and the machines it goes on,
# not what a step does. Of rows, devices and accumulation the product stays: `saving.check_rows`.
CONTINUABLE = {
    *("base_output_directory", "coordinator_address", "num_processes", "process_id", "chips_per_vm"),
    *("jax_distributed_initialization_timeout", "jax_distributed_heartbeat_timeout_seconds"),
    *(f"{network}_{axis}_parallelism" for network in ("ici", "dcn") for axis in AXES),
    *("context_parallel_strategy", "per_device_batch_size", "gradient_accumulation_steps"),
    *("steps", "num_epoch", "eval_interval", "eval_steps", "log_period"),
    *("profiler", "profiler_steps", "skip_first_n_steps_for_profiler"),
    *("checkpoint_period", "max_num_checkpoints_to_keep", "async_checkpointing", "save_dtype"),
    *("grain_worker_count", "jax_cache_dir", "hf_access_token"),
    *("reward_workers", "reward_timeout", "max_reward_failures", "log_completions_steps", "max_logp_difference"),
    *("vllm_urls", "vllm_servers", "vllm_python", "vllm_arguments", "vllm_timeout", "vllm_wait"),
    *("sampler_devices_fraction", "trainer_devices_fraction"),
}

_ELSEWHERE = "Choose another run_name, or remove the folder."


def path(config: Any) -> Path:
    """Return the run's folder on this machine."""
    if found := url(config):
        return remote.local(found, "runs")
    return Path(config.base_output_directory).expanduser() / config.run_name


def url(config: Any) -> str:
    """Return the run's place in a bucket, "" where it has none."""
    base = config.base_output_directory
    return f"{base.rstrip('/')}/{config.run_name}" if remote.is_url(base) else ""


def check(config: Any) -> Path:
    """Return the run's folder if this command may run there: it is new, empty, without progress, or this same run.

    Of a run in a bucket, what this machine has not is copied in first.

    Raises UserError where it holds a different run, naming the keys that differ, or something that is no run.
    """
    found = url(config)
    if not found:
        return _check(config, progress=False)
    # The first alone has the copy, where machines share no folder.
    processes.by_first(lambda: _check(config, progress=remote.Mirror(path(config), found).pull()))
    return path(config)


def _check(config: Any, *, progress: bool) -> Path:
    """``progress``: there is more of the run than the folder shows."""
    folder = path(config)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a folder for a run. {_ELSEWHERE}")
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    recipe = folder / "config.yml"
    if not recipe.is_file():
        raise UserError(f"{folder}: holds files but no config.yml, so it is not a run of Luthier. {_ELSEWHERE}")
    if progress or _has_progress(folder):
        _check_same(folder, _read(recipe), config.model_dump())
    return folder


def open_(config: Any) -> Path:
    """Make the folder and write ``config.yml`` into it. Call after ``check``, once nothing cheap can fail any more."""
    folder = path(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / ".config.yml"
        keys.save(config, draft)
        draft.replace(folder / "config.yml")
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise UserError(f"{folder}: {reason}. Choose another base_output_directory.") from None
    if found := url(config):
        remote.Mirror(folder, found).push()  # now, that a bucket which takes nothing ends the run before it begins
    return folder


def _has_progress(folder: Path) -> bool:
    """Say whether there is something that another run would destroy: a whole checkpoint or a trained model."""
    trained = any((folder / name).exists() for name in ("model", "adapter"))
    return trained or any(step.name.isdigit() for step in (folder / "checkpoints").glob("*"))


def _read(recipe: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(recipe.read_text())
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{recipe}: cannot be read, so what run this is cannot be known. {_ELSEWHERE}")
    return values


def _check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [
        f"{name} (there {before[name]!r}, here {now[name]!r})"
        for name in now
        if name not in CONTINUABLE and name in before and before[name] != now[name]
    ]
    if differing:
        raise UserError(f"{folder}: holds a different run: {', '.join(differing)}. {_ELSEWHERE}")
