"""A tokenizer, the data group of a configuration, and files of rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy import byte_level, wrap
from transformers import PreTrainedTokenizerFast

from luthier.config import SftConfig


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return wrap(byte_level())


@pytest.fixture
def keys(tmp_path):
    def make(**values) -> SftConfig:
        defaults = {"model_name": "none", "max_target_length": 64, "grain_worker_count": 0}
        return SftConfig(**{**defaults, "hf_path": str(tmp_path / "rows.jsonl"), **values})

    return make


@pytest.fixture
def write(tmp_path):
    """Write rows as JSON Lines and return the path."""

    def write_rows(rows, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write_rows


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
