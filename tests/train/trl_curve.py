"""Train by TRL's `SFTTrainer` and write down what it saw and how it went: run by an interpreter that has TRL.

    python trl_curve.py curves.json

The file holds `{"model": folder, "curves": {name: {"rows": file, "settings": SFTConfig's arguments, "adapter":
LoraConfig's or none, "begin": folder}}}`. A fresh adapter is saved in `begin` before it is trained. The answer, one
line of JSON on stdout, gives for each name `log` (a row a step) and `rows` (token ids and labels as trained on).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def adapted(model: Any, adapter: dict[str, Any], begin: str) -> Any:
    """Return the model with a fresh adapter, which is saved as it begins."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **adapter))
    model.save_pretrained(begin)
    return model


def curve(
    model: str, rows: str, settings: dict[str, Any], adapter: dict[str, Any], begin: str, output: str
) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    fixed = {
        "output_dir": output,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = SFTTrainer(
        model=adapted(base, adapter, begin) if adapter else base,
        args=SFTConfig(**fixed, **settings),
        train_dataset=load_dataset("json", data_files=rows, split="train", cache_dir=output),
        processing_class=PreTrainedTokenizerFast.from_pretrained(model),
    )
    trainer.train()
    seen = [{"ids": row["input_ids"], "labels": row["labels"]} for row in trainer.train_dataset]
    return {"log": [row for row in trainer.state.log_history if "loss" in row], "rows": seen}


def main() -> None:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is no part of the answer
    plan = json.loads(Path(sys.argv[1]).read_text())
    with tempfile.TemporaryDirectory() as scratch:
        curves = {name: curve(plan["model"], **settings, output=scratch) for name, settings in plan["curves"].items()}
    answer.write(json.dumps(curves))
    answer.close()


if __name__ == "__main__":
    main()
