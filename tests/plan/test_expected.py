"""What a compiled step sends, held against what its mesh should make it send: on pods that are not there."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__)
LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
LENGTH = 128
MORE = 1.05  # scalars, norms, and what `expected` leaves out
LESS = 0.9  # the head's gradient is cut even here
PODS = [{"fsdp": 64}, {"data": 8, "fsdp": 8}]
LARGER = [{"data": 8, "fsdp": 4, "context": 2}, {"data": 2, "fsdp": 32}]


def sizes(pod: dict[str, int]) -> list[str]:
    return [f"ici_{axis}_parallelism={size}" for axis, size in ({"fsdp": 1} | pod).items()]


def per_axis(devices: Any, settings: list[str]) -> dict[str, list[float]]:
    """Return for each axis of the mesh what a device sends over it in a step, and should."""
    from luthier import mesh as mesh_lib
    from luthier.algorithms.sft import sft
    from luthier.checkpoint.source import Source
    from luthier.config import SftConfig, resolve
    from luthier.model.model import Model
    from luthier.plan import expected, traffic
    from luthier.train import job as job_lib

    own = ["model_name=x", "hf_path=x", f"max_target_length={LENGTH}", "per_device_batch_size=1", *settings]
    config: SftConfig = resolve("sft", own, {})
    mesh = mesh_lib.make(config, devices)
    with mesh_lib.use(mesh):
        source = Source("random", "x", Path(), LLAMA)
        job = job_lib.prepare(config, source, Model.from_hf(LLAMA, "x"), mesh)
        program = job_lib.trace_training(job, sft).lower().compile()
    found, should = traffic.collectives(program), expected.expected(job, LENGTH)
    # A CPU, and a TPU where arrays are as small as here, does not cut a sum: each device gets all of it. What goes over
    # `data` is not cut.
    twice = 2.0
    return {
        axis: [
            sum(each.total for each in found if axis in each.axes(mesh)),
            sum(
                each.bytes * (twice if each.what == "gradients" and "data" not in each.axes else 1.0)
                for each in should
                if axis in each.axes
            ),
        ]
        for axis, size in mesh.shape.items()
        if size > 1
    }


@pytest.mark.multiprocess
@pytest.mark.parametrize("pods", [PODS, LARGER])
def test_a_pod_of_eight_hosts_sends_no_more_than_it_should(pods: list[dict[str, int]]) -> None:
    """64 devices are simulated in a process of their own: 8 hosts with 8 each."""
    flags = "--xla_force_host_platform_device_count=64"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(HERE.parents[2])}
    command = [sys.executable, str(HERE), json.dumps([sizes(pod) for pod in pods])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for pod, axes in zip(pods, json.loads(done.stdout), strict=True):
        assert set(axes) == set(pod)
        for axis, (sent, should) in axes.items():
            assert sent <= MORE * should, f"{pod}: over {axis}, {sent:.0f} bytes are sent and {should:.0f} should be"
            assert sent > LESS * should, f"{pod}: over {axis}, only {sent:.0f} of {should:.0f} bytes: is all counted?"


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
@pytest.mark.parametrize(
    ("machine", "pod"),
    [
        ("v5p-128", {"data": 8, "fsdp": 8}),
        ("v6e-8", {"tensor": 8}),
        ("v6e-8", {"fsdp": 4, "tensor": 2}),
    ],
)
def test_a_tpu_sends_no_more_than_it_should(machine: str, pod: dict[str, int]) -> None:
    from luthier.plan import topologies

    for axis, (sent, should) in per_axis(topologies.find(machine).devices(), sizes(pod)).items():
        assert sent <= MORE * should, f"over {axis}, {sent:.0f} bytes are sent and {should:.0f} should be"


def test_what_axes_should_send_follows_from_the_weights() -> None:
    """A model whose weights are counted by hand, on eight devices."""
    sent, should = per_axis(None, sizes({"fsdp": 8}))["fsdp"]
    layers = LLAMA["num_hidden_layers"] * (4 * 256 * 256 + 3 * 256 * 512)
    table = 512 * 256
    gathered = 2 * layers + table  # forward and backward, and the head once
    gradients = 2 * (layers + table)
    whole = 4 * (gathered + gradients) * 7 / 8
    norms, exchanged = 5 * 256 * 4 * 4, 3 * LENGTH * 256 * 4
    assert math.isclose(should, whole, abs_tol=norms + exchanged)
    assert sent <= MORE * should


if __name__ == "__main__":
    print(json.dumps([per_axis(None, settings) for settings in json.loads(sys.argv[1])]))
