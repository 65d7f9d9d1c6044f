"""Keys of vLLM that do not go together."""

from __future__ import annotations

import pytest

from luthier import config
from luthier.errors import UserError

VLLM = "rollout_engine=vllm"
ELSEWHERE = "vllm_urls=[http://one:8000, http://two:8000]"


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("rl", ["vllm_servers=2"], "vllm_servers=2 is for rollout_engine=vllm"),
        ("eval", ["hf_path=rows", ELSEWHERE], "vllm_urls=.* is for rollout_engine=vllm"),
        ("generate", ["prompt=x", "vllm_python=python"], "vllm_python=python is for rollout_engine=vllm"),
        ("rl", [VLLM, "vllm_urls=one:8000"], "vllm_urls=one:8000: give each as http://HOST:PORT"),
        ("rl", [VLLM, "vllm_urls=[http://one:1, http://one:1]"], "stands twice"),
        ("rl", [VLLM, ELSEWHERE, "vllm_servers=2"], "vllm_servers=2 is for servers that are started here"),
        ("rl", [VLLM, ELSEWHERE, "vllm_arguments=--x"], "vllm_arguments=--x is for servers that are started here"),
        ("generate", [VLLM, ELSEWHERE, "prompt=x", "kv_cache_gib=2"], "kv_cache_gib=2.0 is for servers"),
        ("generate", [VLLM, "prompt=x", "decode_steps=4"], "decode_steps=4 is the embedded engine's"),
        ("eval", [VLLM, "hf_path=rows", "attention=blockwise"], "attention=blockwise is the embedded engine's"),
        ("generate", [VLLM, "prompt=x", "float32_activations=attention"], "=attention is the embedded engine's"),
        ("rl", [VLLM, "vllm_arguments='--x"], "no closing quotation"),
        ("vllm", ["vllm_arguments='--x"], "no closing quotation"),
        ("vllm", ["vllm_arguments=-x --logprobs-mode=raw_logprobs"], "--logprobs-mode is what Luthier says itself"),
        ("rl", [VLLM, "top_k=8"], "top_k=8 with rollout_engine=vllm"),
        ("rl", [VLLM, "top_p=0.9"], "top_p=0.9 with rollout_engine=vllm"),
        ("rl", [VLLM, "routing_replay=true"], "routing_replay=true with rollout_engine=vllm"),
        ("rl", [VLLM, "temperature=0.001"], "temperature=0.001 with rollout_engine=vllm"),
        ("rl", [VLLM, "chips_per_vm=4"], "CUDA_VISIBLE_DEVICES"),
        ("rl", [VLLM, "trainer_devices_fraction=0.8"], "together at most 1"),
        ("rl", ["weight_sync_interval=2"], "weight_sync_interval=2: the embedded engine has the trainer's own"),
        ("rl", ["interrupted_completions=drop"], "interrupted_completions=drop is for rollout_engine=vllm"),
        ("rl", [VLLM, "weight_sync_interval=3", "max_staleness=1"], "new weights are needed every 2 steps"),
        ("plan", [VLLM, "topology=v6e-8"], "cannot be planned"),
    ],
)
def test_what_does_not_go_together_is_refused(command: str, arguments: list[str], words: str) -> None:
    kind = ["rl"] if command == "plan" else []
    with pytest.raises(UserError, match=words):
        config.resolve(command, [*kind, "model_name=m", *arguments], {})


@pytest.mark.parametrize(
    ("command", "arguments", "starts"),
    [
        ("rl", [VLLM, "weight_sync_interval=4", "vllm_servers=2"], True),
        ("rl", [VLLM, ELSEWHERE, "chips_per_vm=4", "trainer_devices_fraction=1", "max_target_length=512"], False),
        ("rl", [VLLM, "weight_sync_interval=2", "max_staleness=1", "interrupted_completions=drop"], True),
        ("rl", [VLLM, "attention=blockwise", "float32_activations=residual"], True),  # the trainer's
        ("generate", [VLLM, "prompt=x", "top_k=8", "quantization=int8"], True),
        ("eval", [VLLM, ELSEWHERE, "hf_path=rows", "temperature=0"], False),
        ("rl", [], False),
    ],
)
def test_what_goes_together_is_taken(command: str, arguments: list[str], starts: bool) -> None:
    assert config.resolve(command, ["model_name=m", *arguments], {}).starts_servers == starts
