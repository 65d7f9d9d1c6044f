"""TRL's side of `sft.py` and `lora.py`: an `SFTTrainer` as documented, taking turns through a callback.

What it is given is what makes it fastest here: rows of equal length without padding (so without an attention mask to
build), PyTorch's own attention kernel, no gradient checkpointing unless asked for. `bfloat16` is TRL's default mixed
precision: autocast over fp32 weights.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
import transformers
import trl
from datasets import load_dataset
from sft_torch import device_peak, facts, settle
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from turns import Turns


class InTurns(TrainerCallback):
    """Waits before each step."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Take the turn."""
        self._turns.before_step(settle)


def adapter(rank: int) -> object:
    """Return PEFT's configuration of an adapter of all linear modules, as TRL's documentation does."""
    import peft

    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def main() -> None:
    turns = Turns(device_peak)
    plan = json.loads(Path(sys.argv[1]).read_text())
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    if plan["rank"]:
        versions["peft"] = importlib.metadata.version("peft")
    turns.facts |= facts(plan, versions)
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(plan["model"]), dtype=torch.float32, attn_implementation="sdpa"
        ),
        args=trl.SFTConfig(
            output_dir=plan["output"],
            use_cpu=not torch.cuda.is_available(),
            bf16=plan["dtype"] == "bfloat16",
            gradient_checkpointing=plan["checkpointing"],
            per_device_train_batch_size=plan["batch"],
            max_length=plan["length"],
            max_steps=1_000_000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=load_dataset("json", data_files=plan["rows"], split="train", cache_dir=plan["output"]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(plan["model"]),
        callbacks=[InTurns(turns)],
        peft_config=adapter(plan["rank"]) if plan["rank"] else None,
    )
    if any(len(row["input_ids"]) != plan["length"] for row in trainer.train_dataset):
        raise ValueError("a row that is not full: the rows were to need no padding")
    trainer.train()


if __name__ == "__main__":
    main()
