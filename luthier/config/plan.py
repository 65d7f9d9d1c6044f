"""The keys of `luthier plan`: those of the command that is planned, and the machine.

Left out on purpose: what the machines are (``plan.topologies``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import model_validator

from luthier import keys
from luthier.config.groups import PositiveInt
from luthier.config.rl import RlConfig
from luthier.config.sft import SftConfig
from luthier.errors import UserError
from luthier.keys import Keys, key

SOME_DATASET = "a-dataset"


class PlanKeys(Keys):
    """On which machine."""

    topology: str = key(
        "",
        "Machine, by its cloud's name: `v5p-8` (which counts cores: 4 chips), `v6e-8`, `v5e-16`, `v4-32`, "
        "`gpu-h100-80gb-8`, `gpu-h200`, and so on; `cpu`: this one.",
        "compile_topology",
    )
    topology_num_slices: PositiveInt = key(
        1, "How many of it, joined by the data centre's network.", "compile_topology_num_slices"
    )
    compile: bool = key(
        True, "Compile the programs, where the machine's compiler runs here; off: reckon from shapes, in a second."
    )
    search: bool = key(True, "Where it does not fit, look for the closest settings that do.")
    output_path: str = key("", "File to write all figures to, as JSON.")


class SftPlan(PlanKeys, SftConfig):
    """The keys of `luthier plan sft`."""

    hf_path: str = key(SOME_DATASET, "Dataset; no row of it is read.", "dataset_name")

    @model_validator(mode="after")
    def _check_machine(self) -> SftPlan:
        _check(self)
        return self


class RlPlan(PlanKeys, RlConfig):
    """The keys of `luthier plan rl`."""

    max_prompt_length: int = key(512, "Tokens of the longest prompt.", "max_prefill_predict_length", gt=0)

    @model_validator(mode="after")
    def _check_machine(self) -> RlPlan:
        _check(self)
        if self.rollout_engine == "vllm":
            raise ValueError(
                "rollout_engine=vllm: what vLLM's servers take and do cannot be planned. Leave it out: the policy step "
                "is the same"
            )
        return self


PLANS: dict[str, type[SftPlan] | type[RlPlan]] = {"sft": SftPlan, "rl": RlPlan}


def read(arguments: Sequence[str], environment: Mapping[str, str]) -> Any:
    """Return the frozen configuration of the command that is planned, which the first argument names."""
    name, *rest = arguments or [""]
    if name not in PLANS:
        raise UserError(
            f"{name or 'nothing'} is not what can be planned: give {' or '.join(PLANS)}, "
            "then its keys, and topology=...: luthier plan sft topology=v6e-8 model_name=llama3.1-8b."
        )
    return keys.read(PLANS[name], rest, environment)


def _check(config: PlanKeys) -> None:
    if not config.topology:
        raise ValueError("no machine: set topology=... (v5p-8, v6e-8, gpu-h100-80gb-8 and so on)")
