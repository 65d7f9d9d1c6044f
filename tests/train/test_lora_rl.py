"""`luthier rl` with an adapter: one base for trainer, sampler and reference, and a run that goes on bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from luthier import cli
from luthier.model import quant
from luthier.model.lora import Lora
from luthier.train import rl, rl_setup
from tiny import ROOT

pytestmark = pytest.mark.multiprocess

STEPS, SLOW = 3, pytest.mark.slow
REWARDS = Path(__file__).with_name("rl_rewards.py")
KEYS = {
    "run_name": "run",
    "reward_functions": f"[{REWARDS}:even]",
    "reward_workers": 1,
    "prompts_per_step": 2,
    "num_generations": 4,
    "max_new_tokens": 8,
    "decode_steps": 4,
    "dtype": "float32",
    "learning_rate": 3e-2,
    "log_completions_steps": 0,
    "chips_per_vm": 1,
    "beta": 0.1,
    "lora_rank": 4,
    "jax_cache_dir": ROOT / ".cache" / "jax",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rl") / "rows.jsonl"
    asked = ({"question": f"{chr(97 + n)}: what is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(8))
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    return path


def run(folder: Path, model: Path, rows: Path, **keys: Any) -> int:
    chosen = KEYS | {"base_output_directory": folder, "load_parameters_path": model, "hf_path": rows} | keys
    return cli.main(["rl", *(f"{name}={value}" for name, value in chosen.items())])


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def adapter(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors")


WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora": {"quantization": "nf4"},
    "dora": {"use_dora": True},
    "pissa": {"lora_init": "pissa"},
}


@pytest.mark.parametrize("way", [way if way == "lora" else pytest.param(way, marks=SLOW) for way in WAYS])
def test_the_reference_is_the_base_and_a_run_goes_on_bit_for_bit(
    way: str, tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, tiny_model, rows, steps=STEPS, **WAYS[way]) == 0
    numbers = metrics(whole)
    assert [row["step"] for row in numbers] == list(range(1, STEPS + 1))
    assert numbers[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert min(row["kl"] for row in numbers[1:]) > 1e-5
    for row in numbers:
        assert row["sampling/logp_difference/max"] < 1e-4
        assert row["grad_norm"] > 0
    assert not (whole / "run" / "model").exists()
    assert run(parts, tiny_model, rows, steps=1, **WAYS[way]) == 0
    assert run(parts, tiny_model, rows, steps=STEPS, **WAYS[way]) == 0
    assert f"Going on after step 1 of {STEPS}" in capsys.readouterr().out
    ours, theirs = adapter(whole), adapter(parts)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("way", ["lora", pytest.param("qlora", marks=SLOW)])
def test_trainer_sampler_and_reference_share_one_base(
    way: str, tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very same arrays, before the first step and after the last."""
    seen: dict[str, Any] = {}
    make_engine, make_learner = rl_setup.engine, rl.Learner

    def engine(*arguments: Any) -> Any:
        seen["engine"] = make_engine(*arguments)
        return seen["engine"]

    def learner(*arguments: Any) -> Any:
        seen["learner"] = make_learner(*arguments)
        return seen["learner"]

    monkeypatch.setattr(rl_setup, "engine", engine)
    monkeypatch.setattr(rl, "Learner", learner)
    assert run(tmp_path, tiny_model, rows, steps=1, enable_checkpointing=False, **WAYS[way]) == 0
    base, params = seen["learner"].base.params, seen["engine"]._params
    pairs = jax.tree.map(_base, params, is_leaf=lambda leaf: isinstance(leaf, Lora) or quant.is_quantised(leaf))
    ours, theirs = jax.tree.leaves(pairs), jax.tree.leaves(base)
    assert len(ours) == len(theirs)
    assert all(mine is its for mine, its in zip(ours, theirs, strict=True))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (seen["learner"].reference, base)]
    assert sizes[0] < 0.2 * sizes[1]


def _base(leaf: Any) -> Any:
    return leaf.base if isinstance(leaf, Lora) else leaf


@SLOW
def test_a_sampler_of_its_own_is_sent_the_adapter(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    keys = {"steps": STEPS, "chips_per_vm": 2, "max_staleness": 1, "importance_sampling_correction": "token"}
    assert run(tmp_path, tiny_model, rows, **keys) == 0
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, STEPS + 1))
    assert all(np.isfinite(row["loss"]) for row in metrics(tmp_path))


@SLOW
def test_every_kind_of_model_samples_and_trains(other_model: Path, rows: Path, tmp_path: Path) -> None:
    assert run(tmp_path, other_model, rows, steps=2) == 0
    for row in metrics(tmp_path):
        assert row["sampling/logp_difference/max"] < 1e-4
        assert row["grad_norm"] > 0


def test_dropout_is_refused(tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, tiny_model, rows, steps=1, lora_dropout=0.1) == 2
    assert "lora_dropout=0.1" in capsys.readouterr().err
