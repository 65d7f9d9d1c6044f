"""The keys of `luthier sft`."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from luthier.config.groups import DataKeys, ModelKeys, PositiveInt, RunKeys, TrainKeys, check_model, check_training
from luthier.config.lora import LoraKeys, check_adapter
from luthier.keys import key


class SftConfig(LoraKeys, TrainKeys, DataKeys, ModelKeys, RunKeys):
    """The keys of `luthier sft`."""

    gradient_accumulation_steps: PositiveInt = key(1, "Micro-batches in a step.")
    eval_steps: int = key(-1, "Batches in an evaluation; -1: all.", ge=-1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_model(self)
        if not self.hf_path:
            raise ValueError("no dataset: set hf_path=... (a hub id, a saved folder or files)")
        check_training(self)
        check_adapter(self)
        if self.eval_steps == 0:
            raise ValueError("eval_steps=0: give a number of batches, or -1 for all of them")
        return self
