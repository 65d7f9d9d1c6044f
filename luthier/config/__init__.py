"""Every key of every command: its type, its default, its meaning.

Keys are flat and carry MaxText's names wherever it has one, else Hugging Face's, TRL's or vLLM's. The table of keys in
the docs is made from these declarations. ``keys.py`` says how they are read.

Left out on purpose: checks that need jax, a model or the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier import keys
from luthier.config.convert import ConvertConfig
from luthier.config.groups import (
    CapacityKeys,
    DataKeys,
    DatasetKeys,
    EngineKeys,
    MaskKeys,
    ModelKeys,
    ProcessKeys,
    RunKeys,
    SampleKeys,
    SourceKeys,
    SplitKeys,
    TemplateKeys,
    TrainKeys,
)
from luthier.config.inference import ChatConfig, EvalConfig, GenerateConfig, InferenceKeys, ServeConfig
from luthier.config.lora import LoraKeys
from luthier.config.plan import PlanKeys, RlPlan, SftPlan
from luthier.config.plan import read as read_plan
from luthier.config.rl import RlConfig
from luthier.config.sft import SftConfig
from luthier.config.vllm import ServerKeys, VllmConfig, VllmKeys
from luthier.keys import Keys, Row

COMMANDS: dict[str, type[Keys]] = {
    "sft": SftConfig,
    "rl": RlConfig,
    "generate": GenerateConfig,
    "chat": ChatConfig,
    "eval": EvalConfig,
    "serve": ServeConfig,
    "vllm": VllmConfig,
    "convert": ConvertConfig,
    "plan": PlanKeys,
}

__all__ = [
    "COMMANDS",
    "CapacityKeys",
    "ChatConfig",
    "ConvertConfig",
    "DataKeys",
    "DatasetKeys",
    "EngineKeys",
    "EvalConfig",
    "GenerateConfig",
    "InferenceKeys",
    "LoraKeys",
    "MaskKeys",
    "ModelKeys",
    "PlanKeys",
    "ProcessKeys",
    "RlConfig",
    "RlPlan",
    "RunKeys",
    "SampleKeys",
    "ServeConfig",
    "ServerKeys",
    "SftConfig",
    "SftPlan",
    "SourceKeys",
    "SplitKeys",
    "TemplateKeys",
    "TrainKeys",
    "VllmConfig",
    "VllmKeys",
    "describe",
    "resolve",
]


def resolve(command: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Any:
    """Return the frozen configuration of ``command``; see ``keys.read``."""
    if command == "plan":  # has the keys of what is planned, besides its own
        return read_plan(arguments, environment)
    return keys.read(COMMANDS[command], arguments, environment)


def describe(command: str) -> dict[str, list[Row]]:
    """Return the keys of ``command`` by group."""
    return keys.table(COMMANDS[command])
