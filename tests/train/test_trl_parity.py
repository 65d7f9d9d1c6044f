"""Loss curves against TRL's `SFTTrainer`, adapters against PEFT's in it: the same model, rows and settings, fp32.

Both sides are run as users run them: `luthier sft` as a process here, TRL as one process for all curves, by the
interpreter in TRL_PYTHON (default: the tests' own).

Where the two differ by definition, settings are taken that mean the same to both, never a wider tolerance:

- Warm-up. The first of n warm-up steps has 1/n of the peak here, and nothing in Transformers. Its "warmup_stable_decay"
  from a floor of 1/n, over one step fewer, is our "wsd" exactly; "linear" and "cosine" agree without a warm-up.
- The final learning rate is a share of the peak here; Transformers' "linear" ends at zero, and its "cosine" too unless
  called "cosine_with_min_lr".
- The white space that a template prints after a reply's end token is trained by TRL on rows of prompt and completion,
  and not here. On marked templates and on plain text, as below, the masks are the same.
- The last, incomplete batch of an epoch is filled with empty rows here, and short there; these rows make whole batches.
- AdamW is the same in both (decay times the learning rate, epsilon outside the root). Clipping differs by the 1e-6 that
  torch adds to the norm.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from luthier.config import SftConfig, resolve
from luthier.data import source
from luthier.model import param
from luthier.model.model import Model
from tiny import ROOT, TINY

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
# AdamW makes whole updates of the smallest gradients, and so of their rounding, and an adapter begins with small ones.
OF_ADAPTERS = 1e-3
STEPS, ROWS, LENGTH = 20, 80, 96
PYTHON = os.environ.get("TRL_PYTHON", sys.executable)
CONFIG = TINY | {
    "vocab_size": 512,
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "intermediate_size": 256,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Curve:
    """One training run, as our keys and as TRL's arguments; ``adapter`` are PEFT's, whose fresh adapter both train."""

    rows: str
    ours: dict[str, Any]
    theirs: dict[str, Any]
    adapter: dict[str, Any] = field(default_factory=dict)


SHARED = (
    {"learning_rate": 2e-3, "adam_weight_decay": 0.1, "adam_b2": 0.95, "per_device_batch_size": 4},
    {"learning_rate": 2e-3, "weight_decay": 0.1, "adam_beta2": 0.95, "per_device_train_batch_size": 4},
)
CURVES = {
    "replies, accumulated, clipped, linear": Curve(
        "messages",
        {"gradient_accumulation_steps": 2, "gradient_clipping_threshold": 0.5, "lr_schedule_type": "linear"}
        | {"warmup_steps_fraction": 0.0, "learning_rate_final_fraction": 0.0},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "lr_scheduler_type": "linear"}
        | {"assistant_only_loss": True},
    ),
    "completions, accumulated, warm-up": Curve(
        "completions",
        {"gradient_accumulation_steps": 2, "use_chat_template": False, "lr_schedule_type": "wsd"}
        | {"warmup_steps_fraction": 0.2, "wsd_decay_steps_fraction": 0.2, "learning_rate_final_fraction": 0.25},
        {"gradient_accumulation_steps": 2, "lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 3}
        | {"lr_scheduler_kwargs": {"num_decay_steps": 4, "decay_type": "linear", "min_lr_ratio": 0.25}},
    ),
    "whole conversations, unclipped, cosine": Curve(
        "messages",
        {"sft_train_on_completion_only": False, "gradient_clipping_threshold": 0.0, "lr_schedule_type": "cosine"}
        | {"warmup_steps_fraction": 0.0, "learning_rate_final_fraction": 0.1},
        {"max_grad_norm": 0.0, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    ),
}
_ADAPTED = Curve(
    "messages",
    {"learning_rate": 1e-2, "gradient_accumulation_steps": 2, "gradient_clipping_threshold": 0.5}
    | {"lr_schedule_type": "linear", "warmup_steps_fraction": 0.0, "learning_rate_final_fraction": 0.0},
    {"learning_rate": 1e-2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    | {"lr_scheduler_type": "linear", "assistant_only_loss": True},
)
CURVES |= {
    "lora": replace(_ADAPTED, adapter={"r": 8, "lora_alpha": 16}),
    "rslora": replace(_ADAPTED, adapter={"r": 16, "lora_alpha": 8, "use_rslora": True}),
    "dora": replace(_ADAPTED, adapter={"r": 4, "lora_alpha": 8, "use_dora": True}),
}


def conversation(random: np.random.Generator) -> list[dict[str, str]]:
    """Sums, some of them asked one after another; the longest do not fit a row."""
    turns = []
    for _ in range(int(random.integers(1, 4))):
        terms = random.integers(0, 100, int(random.integers(2, 5))).tolist()
        steps, total = [], terms[0]
        for term in terms[1:]:
            steps.append(f"{total} + {term} = {total + term}")
            total += term
        turns += [
            {"role": "user", "content": f"What is {' + '.join(map(str, terms))}?"},
            {"role": "assistant", "content": f"{'; '.join(steps)}. So it is {total}."},
        ]
    return turns


def write_rows(folder: Path) -> None:
    random = np.random.default_rng(0)
    conversations = [conversation(random) for _ in range(ROWS)]
    pairs = [{"prompt": f"{row[0]['content']}\n", "completion": row[1]["content"]} for row in conversations]
    for name, rows in (("messages", [{"messages": row} for row in conversations]), ("completions", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(folder: Path, corpus: list[str]) -> None:
    """A tiny random Llama of SmolLM2's kind with a byte-level BPE of its own and a ChatML template with marks."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    ids = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(CONFIG | ids))
    random, tensors = np.random.default_rng(0), {}
    for name, shape in param.tensor_shapes(Model.from_hf(CONFIG, "tiny").spec).items():
        drawn = random.standard_normal(shape) * 0.05
        tensors[name] = (drawn + (1.0 if len(shape) == 1 else 0.0)).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/`, `messages.jsonl` and `completions.jsonl`."""
    folder = tmp_path_factory.mktemp("trl")
    (folder / "model").mkdir()
    write_rows(folder)
    write_model(folder / "model", (folder / "messages.jsonl").read_text().splitlines())
    return folder


@pytest.fixture(scope="module")
def theirs(place: Path) -> dict[str, Any]:
    """{curve: its log and rows} of TRL, all from one process."""
    probe = "import importlib.util as of, sys; sys.exit(None in (of.find_spec('trl'), of.find_spec('peft')))"
    if subprocess.run([PYTHON, "-c", probe], check=False).returncode:
        pytest.skip(f"{PYTHON} has no trl or no peft: install the extra `trl`, or name another in TRL_PYTHON")
    plan = {
        name: {
            "rows": str(place / f"{curve.rows}.jsonl"),
            "settings": SHARED[1] | {"max_steps": STEPS, "max_length": LENGTH} | curve.theirs,
            "adapter": curve.adapter,
            "begin": str(place / f"begin {name}"),
        }
        for name, curve in CURVES.items()
    }
    (place / "curves.json").write_text(json.dumps({"model": str(place / "model"), "curves": plan}))
    program = Path(__file__).with_name("trl_curve.py")
    done = subprocess.run(
        [PYTHON, str(program), str(place / "curves.json")], check=False, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def arguments(place: Path, name: str) -> list[str]:
    """The keys of our run of a curve."""
    keys = SHARED[0] | CURVES[name].ours
    keys |= {"run_name": name.split(",")[0], "base_output_directory": place / "runs", "steps": STEPS}
    keys |= {"model_name": place / "model", "hf_path": place / f"{CURVES[name].rows}.jsonl", "dtype": "float32"}
    keys |= {"max_target_length": LENGTH, "packing": False, "enable_data_shuffling": False}
    keys |= {"lora_path": place / f"begin {name}"} if CURVES[name].adapter else {}
    keys |= {"grain_worker_count": 0, "enable_checkpointing": False, "jax_cache_dir": ROOT / ".cache" / "jax"}
    return [f"{key}={value}" for key, value in keys.items()]


def our_log(place: Path, name: str) -> list[dict[str, float]]:
    """Run `luthier sft` on one device and return its rows of metrics."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_FLAGS", "LUTHIER_"))}
    command = [sys.executable, "-m", "luthier", "sft", *arguments(place, name)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]
    config: SftConfig = resolve("sft", arguments(place, name), {})
    metrics = Path(config.base_output_directory, config.run_name, "metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


@pytest.mark.parametrize("name", CURVES)
def test_token_ids_and_labels_equal(place: Path, theirs: dict[str, Any], name: str) -> None:
    config: SftConfig = resolve("sft", arguments(place, name), {})
    rows, _ = source.load(config, PreTrainedTokenizerFast.from_pretrained(place / "model"))
    assert len(rows) == len(theirs[name]["rows"]) == ROWS
    for number, row in enumerate(theirs[name]["rows"]):
        ours = rows.example(number)
        assert ours.ids_T.tolist() == row["ids"]
        # A row's first token is predicted from nothing, so its label counts for nothing on either side.
        assert np.where(ours.mask_T, ours.ids_T, -100).tolist()[1:] == row["labels"][1:]


@pytest.mark.parametrize("name", CURVES)
def test_curves_equal(place: Path, theirs: dict[str, Any], name: str) -> None:
    ours, expected = our_log(place, name), theirs[name]["log"]
    assert [row["step"] for row in ours] == [row["step"] for row in expected] == list(range(1, STEPS + 1))
    adapted = bool(CURVES[name].adapter)
    tolerances = {"learning_rate": 1e-6, "loss": OF_ADAPTERS if adapted else TOLERANCE}
    tolerances |= {} if adapted else {"grad_norm": 10 * TOLERANCE}
    for key, tolerance in tolerances.items():
        got, want = (np.array([row[key] for row in rows]) for rows in (ours, expected))
        worst = np.abs(got / want - 1).max()
        print(f"{name}: {key}: greatest relative difference {worst:.1e}")
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=0, err_msg=f"{name}: {key}")
    assert ours[-1]["loss"] < 0.75 * ours[0]["loss"], "both stood still, so that their curves say nothing"


def test_the_curves_reach_what_they_are_named_for(theirs: dict[str, Any]) -> None:
    """Clipping bites, rows differ in length, and some were cut."""
    name, other, *_ = CURVES
    assert min(row["grad_norm"] for row in theirs[name]["log"]) > CURVES[name].ours["gradient_clipping_threshold"]
    lengths = [len(row["ids"]) for row in theirs[name]["rows"]]
    assert min(lengths) < LENGTH // 2
    assert max(lengths) == LENGTH
    assert theirs[other]["log"][0]["learning_rate"] == pytest.approx(SHARED[0]["learning_rate"] / 4)
