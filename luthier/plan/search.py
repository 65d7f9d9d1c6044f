"""The closest settings that fit, where those asked for do not.

Settings are tried in the order of what they cost: first those that change no result (recomputation, smaller
micro-batches that add up to the same step, weights split over all devices), then those that change rounding, then the
optimizer, then what is trained. Each is reckoned from shapes; only one that should fit is compiled, and what the
compiler says corrects what is reckoned of those after it.

Left out on purpose: the fastest settings. What fits first is given, not what runs best.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console

from luthier.config import PlanKeys, RlPlan, SftPlan
from luthier.errors import UserError
from luthier.memory import GIB
from luthier.plan import plans
from luthier.plan.report import Plan

C = TypeVar("C", SftPlan, RlPlan)
ROOM = 0.98
"""Of the memory, what a reckoned need may come to for it to be worth compiling."""

ROUNDING = ({"mu_dtype": "bfloat16"}, {"weight_dtype": "bfloat16"})
WEIGHTS = ({"opt_type": "adafactor"},)
TRAINED = ({"enable_lora": True}, {"enable_lora": True, "quantization": "nf4"})

SAME_RESULT = {
    *("remat_policy", "per_device_batch_size", "gradient_accumulation_steps", "max_num_seqs", "row_length"),
    *(f"ici_{axis}_parallelism" for axis in ("data", "fsdp", "tensor", "context", "expert")),
}
"""Keys that change nothing but rounding by another order of sums."""


@dataclass(frozen=True)
class Better:
    """Settings that fit: their plan, and the command that runs them."""

    plan: Plan
    command: str


def closest(found: Plan, console: Console) -> Better | None:
    """Return the closest settings to those of ``found``, which does not fit, that do; None where nothing does."""
    config, machine = found.config, found.machine
    limit = machine.chip.memory
    error = found.greatest.needed / plans.plan(config, machine, compiles=False).greatest.needed
    for changes in ladder(config):
        try:
            changed = with_changes(config, changes)
            reckoned = plans.plan(changed, machine, compiles=False)
        except (UserError, ValueError):  # settings that do not go together
            continue
        needed = error * reckoned.greatest.needed
        console.print(f"{_words(changes)}: about {needed / GIB:.1f} GiB", markup=False)
        if needed > ROOM * limit:
            continue
        plan = plans.plan(changed, machine, compiles=config.compile)
        if plan.fits:
            return Better(plan, command(found.command, changed))
        error = max(error, plan.greatest.needed / reckoned.greatest.needed)
    return None


def ladder(config: SftPlan | RlPlan) -> Iterator[dict[str, Any]]:
    """Yield changes of settings, each with all that stand before it of the same kind."""
    free: dict[str, Any] = {}
    for change in _free(config):
        free = {**free, **change}
        yield free
    for change in (*ROUNDING, *WEIGHTS):
        free = {**free, **change}
        yield free
    for change in TRAINED[config.enable_lora + bool(config.quantization) :]:
        # An adapter's moments are small, and need no smaller ones.
        yield {**{key: value for key, value in free.items() if key in SAME_RESULT}, **change}


def _free(config: SftPlan | RlPlan) -> Iterator[dict[str, Any]]:
    """Yield what changes no result, one after the other."""
    if config.ici_data_parallelism != 1:
        yield {"ici_data_parallelism": 1, "ici_fsdp_parallelism": -1}
    if config.remat_policy != "full":
        yield {"remat_policy": "full"}
    rows = config.per_device_batch_size
    while rows > 1:
        least = next(factor for factor in range(2, rows + 1) if rows % factor == 0)
        rows //= least
        yield _smaller(config, rows)
    if isinstance(config, RlPlan):
        completions = config.prompts_per_step * config.num_generations
        most = min(config.max_num_seqs or completions, completions)
        yield from ({"max_num_seqs": most // share} for share in (2, 4) if most >= share)


def _smaller(config: SftPlan | RlPlan, rows: int) -> dict[str, Any]:
    if isinstance(config, RlPlan):  # packs a step's completions into as many micro-batches as they take
        return {"per_device_batch_size": rows}
    steps = config.gradient_accumulation_steps * config.per_device_batch_size // rows
    return {"per_device_batch_size": rows, "gradient_accumulation_steps": steps}


def with_changes(config: C, changes: dict[str, Any]) -> C:
    """Return ``config`` with some keys changed. Raises ValueError where they do not go together."""
    return type(config)(**{**config.model_dump(exclude_unset=True), **changes})


def command(name: str, config: SftPlan | RlPlan) -> str:
    """Return the command that runs ``config``: its keys that are not at their defaults, but for the machine's."""
    own = set(PlanKeys.model_fields)
    set_ = config.model_dump(exclude_defaults=True, exclude={*own, "hf_access_token"})
    words = [f"{key}={shlex.quote(_text(value))}" for key, value in set_.items()]
    if "hf_path" not in set_ and isinstance(config, SftPlan):
        words.append("hf_path=DATASET")
    return " ".join(["luthier", name, *words])


def _words(changes: dict[str, Any]) -> str:
    return " ".join(f"{key}={_text(value)}" for key, value in changes.items())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, list | dict) else str(value)
