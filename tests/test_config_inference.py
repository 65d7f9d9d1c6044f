"""The keys of the commands that sample, as far as the commands share them."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier import keys
from luthier.config import ChatConfig, EvalConfig, GenerateConfig, InferenceKeys, ServeConfig
from luthier.errors import UserError

COMMANDS = [
    (GenerateConfig, ["prompt=hi"]),
    (ChatConfig, []),
    (ServeConfig, []),
    (EvalConfig, ["hf_path=rows.jsonl"]),
    (InferenceKeys, []),
]


@pytest.mark.parametrize(("config", "needed"), COMMANDS, ids=lambda each: getattr(each, "__name__", ""))
def test_a_short_context_needs_no_shorter_completions(config, needed, tmp_path: Path):
    arguments = ["load_parameters_path=model", "max_target_length=128", *needed]
    keys.save(keys.read(config, arguments, {}), tmp_path / "recipe.yml")
    assert keys.read(config, [str(tmp_path / "recipe.yml")], {}).max_target_length == 128
    with pytest.raises(UserError, match="max_new_tokens=128 leaves no room"):
        keys.read(config, [*arguments, "max_new_tokens=128"], {})
