"""Train by TRL's `SFTTrainer` and write down what it saw and how it went: run by an interpreter that has TRL.

    python trl_curve.py curves.json

The file holds `{"model": folder, "curves": {name: {"rows": file, "settings": SFTConfig's arguments}}}`. The answer, one
line of JSON on stdout, gives for each name `log` (a row a step) and `rows` (token ids and labels as trained on).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def curve(model: str, rows: str, settings: dict[str, Any], output: str) -> dict[str, Any]:
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
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
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
