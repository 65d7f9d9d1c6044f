"""Adapters and quantised weights as the commands that sample take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest

import tiny
from luthier import cli, mesh
from luthier.checkpoint import huggingface, peft, source
from luthier.config import ModelKeys, resolve
from luthier.model import lora, quant
from luthier.model.lora import Adapter, Lora
from luthier.rollout import opened
from tiny import ROOT

SLOW = pytest.mark.slow
SHORT = tiny.CHATML.replace("<|im_start|>", "")
PLAIN = Adapter(rank=4, alpha=16)
KINDS = {
    "llama": Adapter(rank=4, alpha=8, dora=True),
    "qwen3-moe": Adapter(rank=2, alpha=8, targets=("q_proj", "experts.gate_up_proj", "experts.down_proj")),
    "deepseek-v3": Adapter(rank=2, alpha=8),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that writes a tiny model and an adapter of it as PEFT does, and returns both folders."""

    def write(kind: str, adapter: Adapter, chat_template: str = "") -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("adapters")
        tiny.write_model(folder / "base", kind)
        place = source.resolve(ModelKeys(load_parameters_path=str(folder / "base")))
        spec = lora.spec(tiny.kind_model(kind).spec, adapter)
        with mesh.use(mesh.make(ModelKeys(), jax.devices()[:1])):
            tree = tiny.random_params(spec)
            how = {"chat_template": chat_template}
            peft.save(folder / "mine", tree, spec, adapter, place, tiny.tokenizer(), **how)
        return folder / "base", folder / "mine"

    return write


@pytest.fixture(scope="module")
def plain(made: Any) -> tuple[Path, Path]:
    return made("llama", PLAIN, SHORT)


def arguments(**keys: Any) -> list[str]:
    chosen = {"dtype": "float32", "temperature": 0, "max_new_tokens": 8, "prompt": "hello", "logprobs": 0} | keys
    return [*(f"{name}={value}" for name, value in chosen.items()), f"jax_cache_dir={ROOT / '.cache' / 'jax'}"]


def generated(capsys: pytest.CaptureFixture[str], **keys: Any) -> dict[str, Any]:
    assert cli.main(["generate", *arguments(ignore_eos=True, **keys)]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=SLOW if kind in tiny.WITH_EXPERTS else []) for kind in KINDS]
)
def test_an_adapter_beside_its_base_says_what_both_merged_do(
    kind: str, made: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    base, mine = made(kind, KINDS[kind])
    beside = generated(capsys, load_parameters_path=base, lora_path=mine)
    merged = generated(capsys, load_parameters_path=mine)
    assert beside["completion"] == merged["completion"] != generated(capsys, load_parameters_path=base)["completion"]
    for one, other in zip(beside["tokens"], merged["tokens"], strict=True):
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)


def test_an_adapter_brings_its_tokenizer_and_template(
    plain: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, mine = plain
    lengths = [
        generated(capsys, load_parameters_path=base, **keys)["prompt_tokens"]
        for keys in ({}, {"lora_path": mine}, {"lora_path": mine, "tokenizer_path": base})
    ]
    assert lengths[0] == lengths[2] == lengths[1] + 2


def test_a_quantised_base_is_opened_with_an_adapter_over_it(plain: tuple[Path, Path]) -> None:
    base, mine = plain
    keys = arguments(load_parameters_path=base, lora_path=mine, quantization="nf4")
    found = opened.open_model(resolve("generate", keys, {}))
    up = found.params["layers"]["0"]["mlp"]["up"]
    assert isinstance(up, Lora)
    assert quant.kind(up.base) == "nf4"
    assert found.name == f"{base} (nf4) with {mine}"


def test_random_weights_can_be_quantised(plain: tuple[Path, Path]) -> None:
    keys = arguments(load_parameters_path="random", model_name=plain[0], quantization="int8")
    found = opened.open_model(resolve("generate", keys, {}))
    assert quant.kind(found.params["layers"]["0"]["mlp"]["up"]) == "int8"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lora_modules": "{x: MINE}", "lora_path": "MINE"}, "are both set"),
        ({"lora_modules": "{x: MINE}", "served_model_name": "x"}, "a name of its own"),
        ({"lora_modules": "{base: MINE}"}, "the model itself is called `base`"),
        ({"lora_modules": "{x: DORA}"}, "adapter x: DoRA"),
        ({"lora_modules": "{x: nowhere/at/all}"}, "nowhere/at/all"),
        ({"lora_path": "OTHER"}, "gate_up_proj"),
        ({"quantization": "fp4"}, "quantization=fp4"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(
    keys: dict[str, str],
    words: str,
    made: Any,
    plain: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface, "load", lambda *_: pytest.fail("weights were read"))
    places = {"MINE": plain[1]}
    if "DORA" in str(keys):
        places["DORA"] = made("llama", KINDS["llama"])[1]
    if "OTHER" in str(keys):
        places["OTHER"] = made("qwen3-moe", KINDS["qwen3-moe"])[1]
    for name, folder in places.items():
        keys = {key: value.replace(name, str(folder)) for key, value in keys.items()}
    given = {"load_parameters_path": plain[0], "port": 0, **keys}
    assert cli.main(["serve", *(f"{name}={value}" for name, value in given.items())]) == 2
    assert words in capsys.readouterr().err
