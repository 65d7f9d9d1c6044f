"""Compute losses by TRL's `GRPOTrainer` on given completions: run by an interpreter that has TRL.

    python trl_policy.py plan.json

The plan holds `tokens` and `mask` of completions, `advantages`, and how far other log-probs lie from the model's own
(`old`, `sampler`, `reference`: added to them), all `[B, T]` lists; and `variants`: {name: GRPOConfig's arguments}.
`cap` in a variant's arguments stands for a correction of the sampler's log-probs, truncated by token.

The answer, one line of JSON on stdout: `logp` and `entropy` by the model, and for each variant `loss`, `gradient` with
respect to the log-probs, and `metrics`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def save_model(folder: str) -> None:
    """A tiny random Llama with a tokenizer of words that are numbers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({str(number): number for number in range(64)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def trainer_of(model: str, settings: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    fixed = {
        "output_dir": model,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "num_generations": 2,
        "per_device_train_batch_size": 2,
    }
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(**fixed, **settings),
        train_dataset=Dataset.from_dict({"prompt": ["3 4"] * 4}),
    )
    trainer.model.eval()
    return trainer


def losses(model: str, plan: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    cap = settings.pop("cap", None)
    trainer = trainer_of(model, settings)
    mask, tokens = torch.tensor(plan["mask"]), torch.tensor(plan["tokens"])
    inputs = {
        "prompt_ids": torch.full((len(mask), 2), 5),
        "prompt_mask": torch.ones(len(mask), 2, dtype=torch.long),
        "completion_ids": tokens,
        "completion_mask": torch.ones_like(mask),
        "tool_mask": mask,
        "advantages": torch.tensor(plan["advantages"]),
        "num_items_in_batch": mask.sum(),
    }
    score, seen = trainer._get_per_token_logps_and_entropies, {}

    def scored(*args: Any, **kwargs: Any) -> Any:
        """Score as before, and keep what comes out, with its gradient."""
        logp, entropy, rest = score(*args, **kwargs)
        seen["logp"], seen["entropy"] = logp, entropy
        logp.retain_grad()
        old = logp.detach() + torch.tensor(plan["old"])
        inputs["old_per_token_logps"] = old
        inputs["ref_per_token_logps"] = logp.detach() + torch.tensor(plan["reference"])
        if cap is not None:
            trainer.use_vllm = True
            ratio = torch.exp(old - logp.detach() - torch.tensor(plan["sampler"]))
            inputs["importance_sampling_ratio"] = torch.clamp(ratio, max=cap)
        return logp, entropy, rest

    trainer._get_per_token_logps_and_entropies = scored
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return {
        "loss": loss.item(),
        "gradient": seen["logp"].grad.tolist(),
        "logp": seen["logp"].tolist(),
        "entropy": seen["entropy"].tolist(),
        "metrics": {name: values[-1] for name, values in trainer._metrics["eval"].items()},
    }


def main() -> None:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is no part of the answer
    plan = json.loads(Path(sys.argv[1]).read_text())
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        found = {name: losses(folder, plan, dict(settings)) for name, settings in plan["variants"].items()}
    answer.write(json.dumps(found))
    answer.close()


if __name__ == "__main__":
    main()
