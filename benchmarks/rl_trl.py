"""TRL's side of `rl.py`: a `GRPOTrainer` as its documentation builds one, taking turns through a callback.

What is sampled in a step is trained on at once, in one update, so that TRL scores nothing a second time. Where its
reward function is called and where that returns, a step is cut in three: before, TRL has sampled; after, it trains.
The end token is never drawn, since TRL would end completions with it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import load_dataset
from rl_rewards import even_tokens
from sft_torch import device_peak, facts, settle
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from turns import Turns


class InTurns(TrainerCallback):
    """Waits before each step, and tells sampling, rewards and training apart."""

    def __init__(self, turns: Turns, new: int) -> None:
        self._turns, self._new, self._marked = turns, new, 0.0

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Take the turn."""
        self._turns.before_step(settle)
        self._marked = time.perf_counter()

    def reward(self, completion_ids: list[list[int]], **_: object) -> list[float]:
        """Return the rewards of completions, which are to have the length that is measured."""
        self._mark("sampling")
        lengths = {len(tokens) for tokens in completion_ids}
        if lengths != {self._new}:
            raise ValueError(f"completions of {self._new} tokens wanted, lengths {lengths} came")
        rewards = even_tokens(completion_ids)
        self._mark("reward")
        return rewards

    def on_step_end(self, *_: object, **__: object) -> None:
        """Count what came after the rewards as training."""
        self._mark("training")

    def _mark(self, part: str) -> None:
        settle()
        now = time.perf_counter()
        self._turns.parts[part] = self._turns.parts.get(part, 0.0) + now - self._marked
        self._marked = now


def main() -> None:
    turns = Turns(device_peak)
    plan = json.loads(Path(sys.argv[1]).read_text())
    turns.facts |= facts(plan, {"trl": trl.__version__, "transformers": transformers.__version__})
    in_turns = InTurns(turns, plan["new"])
    rows = load_dataset("json", data_files=plan["rows"], split="train", cache_dir=plan["output"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(plan["model"])
    asked = tokenizer.apply_chat_template(list(rows["prompt"]), add_generation_prompt=True)
    lengths = {len(ids) for ids in asked["input_ids"]}
    if lengths != {plan["prompt"]}:
        raise ValueError(f"prompts of {plan['prompt']} tokens wanted, lengths {lengths} came")
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(plan["model"], dtype=torch.float32, attn_implementation="sdpa"),
        reward_funcs=in_turns.reward,
        args=configuration(plan),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[in_turns],
    )
    trainer.train()


def configuration(plan: dict[str, Any]) -> trl.GRPOConfig:
    """Return the run's settings, and with ``batch`` None TRL's own for how it is computed."""
    batch = plan["batch"] or trl.GRPOConfig.per_device_train_batch_size
    return trl.GRPOConfig(
        output_dir=plan["output"],
        use_cpu=not torch.cuda.is_available(),
        bf16=plan["dtype"] == "bfloat16",
        gradient_checkpointing=plan["batch"] is None,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=plan["prompts"] * plan["samples"] // batch,
        num_generations=plan["samples"],
        max_completion_length=plan["new"],
        generation_kwargs={"min_new_tokens": plan["new"]},
        loss_type="grpo",
        learning_rate=plan["learning_rate"],
        lr_scheduler_type="constant",
        shuffle_dataset=False,
        max_steps=1_000_000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


if __name__ == "__main__":
    main()
