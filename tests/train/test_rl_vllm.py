"""`luthier rl` with vLLM's servers, in whose place are fakes: what it learns from, what it says, and how it ends."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_rl
from fake import Fake
from fleets import Names, two
from launched import Run

from luthier import cli, config
from luthier.errors import UserError
from luthier.model.compute import Compute
from luthier.train import rl_plan, rl_report, rl_vllm

pytestmark = pytest.mark.multiprocess

STEPS = 4
Go = Callable[..., Path]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Fake]]:
    """Two servers, which are sent nothing but the version of the weights."""
    monkeypatch.setattr(rl_vllm, "_send", lambda job, base, dtype: Names())
    with two(monkeypatch) as both:
        yield both


@pytest.fixture
def run(tiny_model: Path, fakes: list[Fake], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Go:
    """Run `luthier rl` over the fakes and return the folder of its runs."""
    rows = test_rl.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")

    def go(code: int = 0, **keys: Any) -> Path:
        chosen = {"rollout_engine": "vllm", "vllm_urls": [each.url for each in fakes], "vllm_wait": 5} | {
            "decode_steps": None,
            "enable_checkpointing": False,
            "eval_interval": 2,
        }
        assert cli.main(["rl", *test_rl.arguments(tmp_path, tiny_model, rows, **chosen | keys)]) == code
        return tmp_path

    return go


def versions(folder: Path, number: int) -> set[int]:
    """The versions of the weights that drew a step's completions."""
    return {version for row in test_rl.completions(folder, number) for version in row["policy_versions"]}


def test_each_step_is_sampled_by_the_weights_before_it(run: Go, fakes: list[Fake], capsys: Any) -> None:
    folder = run(train_split="train[:9]", hf_eval_split="train[9:]", eval_num_generations=2)
    for number in range(1, STEPS + 1):
        assert versions(folder, number) == {number - 1}
    for fake in fakes:
        assert fake.versions == ["0", "1", "2", "3", "4"]
        assert fake.asked
    rows = test_rl.metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["seconds/sync"] > 0 and "importance_sampling/capped_mean" in row for row in rows)
    assert [row["step"] for row in test_rl.metrics(folder, evaluations=True)] == [0, 2, 4]
    shown = capsys.readouterr().out
    assert "2 vLLM servers sample" in shown
    assert "sampler corrected by token" in shown
    # The fakes' log-probs are made up, so that sampler and trainer are far apart.
    assert "Likely: vLLM" in " ".join(shown.split())


def test_weights_go_out_every_so_many_steps_and_before_an_evaluation(run: Go, fakes: list[Fake]) -> None:
    folder = run(weight_sync_interval=3, train_split="train[:9]", hf_eval_split="train[9:]")
    assert [versions(folder, number) for number in range(1, STEPS + 1)] == [{0}, {0}, {2}, {2}]
    assert fakes[0].versions == ["0", "2", "4"]


@pytest.mark.parametrize("interrupted", ["keep", pytest.param("drop", marks=pytest.mark.slow)])
def test_it_samples_ahead_within_its_bound(run: Go, fakes: list[Fake], interrupted: str) -> None:
    for fake in fakes:
        fake.seconds_a_token = 0.01
    folder = run(
        max_staleness=1,
        interrupted_completions=interrupted,
        train_split="train[:9]",
        hf_eval_split="train[9:]",
    )
    for number in range(1, STEPS + 1):
        assert versions(folder, number) <= set(range(max(0, number - 2), number))
    assert sorted(fakes[0].versions, key=int) == ["0", "1", "2", "3", "4"]
    assert [row["step"] for row in test_rl.metrics(folder, evaluations=True)] == [0, 2, 4]


def test_a_server_that_dies_costs_nothing_but_time(run: Go, fakes: list[Fake], capsys: Any) -> None:
    fakes[0].misbehave("dies")
    folder = run()
    assert [versions(folder, number) for number in range(1, STEPS + 1)] == [{0}, {1}, {2}, {3}]
    assert fakes[1].versions[-1] == "4"
    assert f"vLLM server {fakes[0].url}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("staleness", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_without_any_server_it_ends_and_says_how_to_go_on(
    run: Go, fakes: list[Fake], staleness: int, capsys: Any
) -> None:
    for fake in fakes:
        fake.misbehave("dies")
    run(1, vllm_wait=0.3, max_staleness=staleness)
    said = capsys.readouterr().err
    assert "no server was left" in said
    assert fakes[0].url in said
    assert "same command" in said


def test_what_cannot_be_is_refused_before_weights_are_read(
    run: Go, fakes: list[Fake], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.train.rl.load", None)
    fakes[0].longest = 8
    run(2)
    assert "takes sequences of 8 tokens" in capsys.readouterr().err
    run(2, use_dora=True)
    assert "DoRA" in capsys.readouterr().err
    run(2, vllm_urls=None, vllm_python="/no/python", chips_per_vm=None)
    assert "vllm_python=/no/python: no such program" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_of_several_processes_the_first_speaks_to_servers(
    tiny_model: Path, fakes: list[Fake], tmp_path: Path, staleness: int
) -> None:
    fakes[1].misbehave("dies")
    rows = test_rl.write_rows(tmp_path / "rows.jsonl")
    keys = test_rl.arguments(
        tmp_path,
        tiny_model,
        rows,
        rollout_engine="vllm",
        vllm_urls=[each.url for each in fakes],
        decode_steps=None,
        chips_per_vm=None,
        max_staleness=staleness,
        enable_checkpointing=False,
        train_split="train[:9]",
        hf_eval_split="train[9:]",
    )
    Run("rl", keys, tmp_path / "logs", count=2, prepare=send_names).done()
    for number in range(1, STEPS + 1):
        assert versions(tmp_path, number) <= set(range(max(0, number - 1 - staleness), number))
    assert [row["step"] for row in test_rl.metrics(tmp_path)] == [1, 2, 3, 4]
    assert [row["step"] for row in test_rl.metrics(tmp_path, evaluations=True)] == [0, 4]
    assert fakes[0].versions[-1] == "4"


def send_names() -> None:
    """Have servers sent nothing but the version of the weights."""
    rl_vllm._send = lambda job, base, dtype: Names()  # type: ignore[assignment]


KEYS = functools.partial(config.RlConfig, model_name="m", rollout_engine="vllm", vllm_urls=["http://one:1"])


@pytest.mark.parametrize(
    ("keys", "correction", "old"),
    [
        ({}, "token", "current"),
        ({"importance_sampling_correction": "none"}, "none", "current"),
        ({"num_mini_batches": 2}, "token", "trainer"),
        ({"num_mini_batches": 2, "importance_sampling_correction": "sequence"}, "sequence", "trainer"),
    ],
)
def test_another_engines_log_probs_are_corrected_for_and_never_the_old_policys(
    keys: dict[str, Any], correction: str, old: str
) -> None:
    objective = rl_plan.objective(KEYS(**keys), np.float32)
    assert (objective.settings["importance_sampling_correction"], objective.old) == (correction, old)


def test_vllms_devices_are_none_of_jax() -> None:
    import jax

    here = jax.local_devices()
    assert rl_plan.devices(KEYS(max_staleness=1), here[:1]) == (here[:1], here[:1])


def test_servers_are_not_started_where_they_could_have_nothing() -> None:
    class Tpu:
        platform, process_index = "tpu", 0

    with pytest.raises(UserError, match=r"TPU.*luthier vllm"):
        rl_plan.devices(KEYS(vllm_urls=[]), [Tpu()])


@pytest.mark.parametrize(
    ("keys", "dtype", "words"),
    [
        ({}, np.float32, "vLLM computes something else"),
        ({}, np.float16, "other kernels"),
        ({"max_staleness": 2}, np.float32, "up to 2 steps older"),
        ({"weight_sync_interval": 4}, np.float32, "up to 3 steps older"),
    ],
)
def test_a_mismatch_is_told_with_its_likely_cause(keys: dict[str, Any], dtype: Any, words: str) -> None:
    assert words in rl_report.mismatch(KEYS(**keys), Compute(dtype), 3, 0.2)
