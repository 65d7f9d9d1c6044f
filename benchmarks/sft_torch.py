"""Bare torch's side of `sft.py`: Transformers' Llama, `torch.optim.AdamW` (fused), and a loop of five lines.

`bfloat16` is autocast over fp32 weights, the same arithmetic as on the other sides. Left out on purpose: data loading,
logging, clipping's report, and all else that a trainer does; and `torch.compile`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from turns import Turns


def device_peak() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def facts(plan: dict[str, Any], versions: dict[str, str]) -> dict[str, Any]:
    versions = {"torch": torch.__version__, **versions, "python": sys.version.split()[0]}
    return {"versions": versions, "dtype": plan["dtype"], "threads": torch.get_num_threads()}


def rows(plan: dict[str, Any], device: str) -> torch.Tensor:
    """Token ids ``[rows, length]``; the tokenizer is imported here, since TRL's side has no use for this."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(plan["model"])
    texts = [json.loads(line)["text"] for line in Path(plan["rows"]).read_text().splitlines()]
    ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(texts)["input_ids"]]
    return torch.tensor(ids, device=device)


def main() -> None:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    turns = Turns(device_peak)
    plan = json.loads(Path(sys.argv[1]).read_text())
    turns.facts |= facts(plan, {"transformers": transformers.__version__})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(plan["model"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").to(device).train()
    if plan["checkpointing"]:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)
    mixed = torch.autocast(device, torch.bfloat16) if plan["dtype"] == "bfloat16" else contextlib.nullcontext()
    batches = rows(plan, device).split(plan["batch"])
    step = 0
    while True:
        turns.before_step(settle)
        batch = batches[step % len(batches)]
        with mixed:
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1


if __name__ == "__main__":
    main()
