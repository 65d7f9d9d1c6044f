"""Transformers' side of `generate.py`: `model.generate`, weights in the dtype that is computed in.

Samples of one prompt are rows of the batch, each with its own reading of the prompt: that is what
`num_return_sequences` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from turns import Turns


def device_peak() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    turns = Turns(device_peak)
    plan = json.loads(Path(sys.argv[1]).read_text())
    versions = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    turns.facts |= {"versions": versions, "dtype": plan["dtype"]}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, plan["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(plan["model"], dtype=dtype, attn_implementation="sdpa")
    model = model.to(device).eval()
    model.generation_config.eos_token_id = None  # no token ends a completion
    while True:
        generate(model, plan, turns.before_step(settle))


def generate(model: Any, plan: dict[str, Any], job: dict[str, Any]) -> None:
    prompts_BT = torch.tensor(job["prompts"], device=model.device)
    drawn = {"do_sample": True, "temperature": plan["temperature"], "top_k": 0} if plan["temperature"] else {}
    tokens_BT = model.generate(
        prompts_BT,
        attention_mask=torch.ones_like(prompts_BT),
        max_new_tokens=job["new"],
        num_return_sequences=job["samples"],
        **(drawn or {"do_sample": False}),
    )
    wanted = (len(job["prompts"]) * job["samples"], prompts_BT.shape[1] + job["new"])
    if tuple(tokens_BT.shape) != wanted:
        raise ValueError(f"tokens of shape {wanted} wanted, {tuple(tokens_BT.shape)} came")


if __name__ == "__main__":
    main()
