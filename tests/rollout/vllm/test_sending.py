"""An engine whose weights are really sent: what arrives where, and what becomes of a server that has half of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake import Fake
from fleets import Together, check_right, drain, engine, requests, until

from luthier import processes, rollout
from luthier.errors import RunError
from luthier.rollout.vllm.sending import ADAPTER, Adapted, Whole

EXTENSION = Path(rollout.__file__).parent / "vllm" / "extension"


class Workers:
    """A server's worker, which takes weights as vLLM's do and keeps them; ``breaks_off`` after so many tensors."""

    def __init__(self, extension: Any) -> None:
        """Take the file that vLLM's workers run."""
        self.extension, self.weights, self.breaks_off, self.taken = extension, {}, None, []

    def __call__(self, method: str, *arguments: str) -> Any:
        """Take weights, or the files of an adapter."""
        self.taken.append(method)
        if method == "luthier_check_adapter":
            return {}
        with self.extension._Trainer(json.loads(arguments[0])) as trainer:
            if self.breaks_off is not None:
                for _ in zip(range(self.breaks_off), trainer.tensors(), strict=False):
                    pass
                return {"error": "died"}  # without a word to the trainer
            return trainer.told(lambda: self._take(trainer))

    def _take(self, trainer: Any) -> dict[str, Any]:
        self.weights = {name: tensor.numpy().copy() for name, tensor in trainer.tensors()}
        return {"folder": "/nowhere", "replaced": False}


@pytest.fixture
def working(fakes, monkeypatch) -> Iterator[tuple[list[Fake], list[Workers]]]:
    """Return two servers and their workers."""
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(EXTENSION))
    import luthier_vllm

    workers = [Workers(luthier_vllm), Workers(luthier_vllm)]
    servers = fakes(2, seconds_a_token=0.002)
    for server, own in zip(servers, workers, strict=True):
        server.workers = own
    return servers, workers


def tensors(params: float) -> Iterator[tuple[str, np.ndarray]]:
    """Yield some weights."""
    for layer in range(5):
        yield f"model.layers.{layer}.weight", np.full((3, 2000), params + layer, np.float32)


def check_arrived(of: Workers, params: float) -> None:
    """Check that a worker has these weights, all of them."""
    wanted = dict(tensors(params))
    assert of.weights.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(of.weights[name], array)


def test_all_servers_have_what_was_synced(working):
    servers, workers = working
    asked = requests(3)
    with engine(servers, Whole(tensors), 10.0) as found:
        for own in workers:
            check_arrived(own, 10.0)
        check_right(list(found.generate(asked)), asked, versions={0})
        found.sync(20.0, 1)
        for own in workers:
            check_arrived(own, 20.0)
        check_right(list(found.generate(asked)), asked, versions={1})
        assert found.sent.bytes == sum(array.nbytes for _, array in tensors(0))
        assert found.sent.seconds > 0
        assert not found.sent.failed


def test_a_server_with_half_the_weights_draws_nothing_until_it_has_all(working):
    servers, workers = working
    asked = requests(4, limit=30)
    with engine(servers, Whole(tensors, timeout=5.0), 10.0, in_turn=False) as found:
        workers[0].breaks_off = 2
        numbers = [found.submit(each) for each in asked]
        until(lambda: all(each.draws for each in servers))
        found.sync(20.0, 1)
        assert [failure.server for failure in found.sent.failed.values()] == [servers[0].url]
        check_right(drain(found), asked, versions={0, 1}, numbers=numbers)
        before = len(servers[0].asked)
        check_right(list(found.generate(asked)), asked, versions={1})
        assert len(servers[0].asked) == before
        workers[0].breaks_off = None
        until(lambda: found.mend() or found.sent.failed == {})
        check_arrived(workers[0], 20.0)
        check_right(list(found.generate(asked)), asked, versions={1})
        assert len(servers[0].asked) > before


def test_all_processes_go_through_the_weights_and_the_first_sends_them(working, monkeypatch):
    servers, workers = working
    together, gathered = Together(2), [0, 0]
    monkeypatch.setattr(processes, "by_first", together.by_first)

    def run(number: int) -> None:
        def counted(params: float) -> Iterator[tuple[str, np.ndarray]]:
            for each in tensors(params):
                gathered[number] += 1
                yield each

        with engine(servers if number == 0 else [], Whole(counted, timeout=5.0), 10.0) as found:
            workers[1].breaks_off = 1
            found.sync(20.0, 1)
            workers[1].breaks_off = None
            while not gathered[number] > 10:
                found.mend()

    assert together.run(run) == [None, None]
    assert gathered == [15, 15]
    for own in workers:
        check_arrived(own, 20.0)


def test_half_the_weights_at_the_start_are_the_end(working):
    servers, workers = working
    workers[1].breaks_off = 3
    with pytest.raises(RunError, match="did not take the weights") as raised:
        engine(servers, Whole(tensors, timeout=5.0), 10.0)
    assert servers[1].url in str(raised.value)


def test_of_an_adapted_model_the_base_is_sent_once_and_the_adapter_each_time(working):
    servers, workers = working
    asked = requests(2)

    def files(params: float) -> dict[str, bytes]:
        return {"adapter_config.json": b"{}", "adapter_model.safetensors": f"of {params}".encode()}

    with engine(servers, Adapted(tensors, files), 10.0) as found:
        found.sync(20.0, 1)
        check_right(list(found.generate(asked)), asked, versions={1})
        kinds = ["luthier_receive_adapter", "luthier_check_adapter"]
        assert workers[0].taken == workers[1].taken == ["luthier_receive", *kinds, *kinds]
        assert all(own.weights["adapter_model.safetensors"].tobytes() == b"of 20.0" for own in workers)
        assert {each["model"] for server in servers for each in server.asked} == {ADAPTER}
        servers[0].end()
        servers[0].begin()  # without a base again
        until(lambda: list(found.generate(asked)) and len(workers[0].taken) > 5)
        check_right(list(found.generate(asked)), asked, versions={1})
    assert workers[0].taken[5:] == ["luthier_receive", *kinds]
