"""Weights into workers: what arrives, and that whatever does not arrive is noticed and named."""

from __future__ import annotations

import asyncio
import json
import socket
import threading

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from luthier.rollout.vllm import stream
from luthier.rollout.vllm.weights import Transfer, send_adapter

torch = pytest.importorskip("torch", reason="vLLM's worker needs torch")

import workers  # noqa: E402
from workers import Model, Server, Worker  # noqa: E402

DONE = ["luthier_receive", "reset", "version 7", "resume"]


@pytest.fixture(scope="module")
def call():
    """Run coroutines on a loop of a thread's own, as the engine does."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture
def serve(monkeypatch):
    """Return a function that makes a server of some workers."""
    monkeypatch.setattr(stream, "SLOT", 256)  # so that tensors travel in many parts
    servers, everyone = [], []

    def make(*of: Worker, breaks: str = "") -> Server:
        everyone.extend(of)
        workers.install(monkeypatch, everyone)
        servers.append(Server(list(of), breaks))
        return servers[-1]

    yield make
    for server in servers:
        server.end()


def tensors(dtype=np.float32):
    """Return a checkpoint of ``workers.Model``: three matrices for a fused one, nothing for the tied head."""
    random = np.random.default_rng(0)
    shapes = {"embed.weight": (32, 8)}
    for layer in range(2):
        shapes |= {f"layers.{layer}.{name}_proj.weight": (8, 8) for name in "qkv"}
        shapes |= {f"layers.{layer}.norm.weight": (8,)}
    return {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def sync(call, servers, sent, **settings):
    with Transfer(servers, call, 7, **{"timeout": 10.0, **settings}) as to:
        for name, array in sent.items():
            to.put(name, array)
    return to


def holds(worker, sent):
    """Say whether a worker's model is that of ``sent``, its packed head included."""
    model = worker.model_runner.model
    places = [(model.place(name)[1].detach().float().numpy(), array.astype(np.float32)) for name, array in sent.items()]
    same = all(np.array_equal(*pair) for pair in places)
    return same and np.array_equal(model.packed.float().numpy(), sent["embed.weight"].astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shared", [True, False], ids=["shared-memory", "network"])
def test_all_workers_of_all_servers_have_what_was_sent(call, serve, monkeypatch, tmp_path, dtype, shared):
    if not shared:
        monkeypatch.setattr(stream, "_SHARED", tmp_path / "none")
    kind = torch.float32 if dtype is np.float32 else torch.bfloat16
    several = [Worker(Model(dtype=kind)) for _ in range(3)]
    servers = [serve(*several[:2]), serve(several[2])]
    sent = tensors(dtype)
    to = sync(call, servers, sent)
    assert to.failed == {}
    assert all(holds(worker, sent) for worker in several)
    assert [server.said for server in servers] == [["pause keep", *DONE]] * 2
    assert to.bytes == sum(array.nbytes for array in sent.values())
    assert to.seconds > 0


def test_what_was_put_may_change_afterwards(call, serve):
    worker, sent = Worker(), tensors()
    with Transfer([serve(worker)], call, 7, timeout=10.0) as to:
        for name, array in sent.items():
            given = array.copy()
            to.put(name, given)
            given[...] = 0.0
    assert to.failed == {}
    assert holds(worker, sent)


def test_a_model_of_another_type_is_compared_in_that_type(call, serve):
    worker = Worker(Model(dtype=torch.bfloat16))
    assert sync(call, [serve(worker)], tensors(np.float32)).failed == {}


@pytest.mark.parametrize("lost", ["embed.weight", "layers.1.norm.weight", "layers.1.v_proj.weight"])
def test_a_tensor_that_was_left_out_is_named(call, serve, lost):
    good, server = serve(Worker()), serve(Worker())
    sent = tensors()
    assert sync(call, [server, good], sent).failed == {}
    server.said.clear()
    to = sync(call, [server], {name: array for name, array in sent.items() if name != lost})
    module = lost.replace("v_proj", "qkv_proj").removesuffix(".weight")
    assert f"weights that were not sent: {module}" in str(to.failed[server])
    assert server.said == ["pause keep", "luthier_receive"], "it must not be used"


def test_a_tensor_that_the_model_does_not_know_is_named_and_the_load_is_ended(call, serve):
    worker = Worker()
    server, sent = serve(worker), tensors()
    to = sync(call, [server], sent | {"layers.0.gate.weight": np.zeros(3, np.float32)})
    assert "gate" in str(to.failed[server])
    assert not worker.begun
    assert sync(call, [server], sent).failed == {}


@pytest.mark.parametrize("forgotten", ["embed.weight", "layers.0.norm.weight", "layers.1.k_proj.weight"])
def test_a_tensor_that_arrived_and_was_not_loaded_is_named(call, serve, forgotten):
    server = serve(Worker(forgets=forgotten))
    failure = sync(call, [server], tensors()).failed[server]
    home = forgotten.replace("k_proj", "qkv_proj")
    assert f"the model's {home} is something else" in str(failure)


@pytest.mark.parametrize("where", ["shared-memory", "network"])
def test_a_byte_that_changed_on_its_way_is_noticed(call, serve, monkeypatch, tmp_path, where):
    hit, good, sent = serve(Worker()), serve(Worker()), tensors()
    count = [0]

    def changed(part):
        count[0] += 1
        return memoryview(bytes([part[0] ^ 1]) + bytes(part[1:])) if count[0] == 3 else part

    if where == "network":
        monkeypatch.setattr(stream, "_SHARED", tmp_path / "none")
        give = stream.Worker.give
        monkeypatch.setattr(
            stream.Worker,
            "give",
            lambda self, part, slot: give(self, changed(part) if self.server == 0 else part, slot),
        )
        spared = [good]
    else:
        write = stream.Slots.write
        monkeypatch.setattr(stream.Slots, "write", lambda self, slot, part: write(self, slot, changed(part)))
        spared = []
    to = sync(call, [hit, good], sent)
    assert "embed.weight did not arrive as it was sent" in str(to.failed[hit])
    assert [server for server in (hit, good) if server not in to.failed] == spared


def test_a_message_that_was_lost_is_noticed(call, serve):
    server, sent = serve(Worker()), tensors()
    with Transfer([server], call, 7, timeout=10.0) as to:
        for name, array in sent.items():
            to.put(name, array)
        to._names.insert(3, "layers.0.rotary.weight")
    assert "layers.0.rotary.weight did not" in str(to.failed[server])


def test_an_error_of_the_trainer_leaves_no_server_usable_and_the_next_sync_is_right(call, serve):
    worker = Worker()
    server, sent = serve(worker), tensors()
    to = Transfer([server], call, 7, timeout=10.0)

    def half() -> None:
        with to:
            to.put("embed.weight", sent["embed.weight"])
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        half()
    assert "the trainer broke off" in str(to.failed[server])
    assert "resume" not in server.said
    assert sync(call, [server], sent, pause_mode="abort").failed == {}
    assert holds(worker, sent)
    assert server.said[-5:] == ["pause abort", *DONE]


@pytest.mark.parametrize(
    ("breaks", "kind", "message"),
    [("hangs", "late", "said nothing for 3 s"), ("refuses", "refused", "no such method"),
     ("forgets", "wrong", "its weights are called default, and they are 7")],
)  # fmt: skip
def test_a_server_that_fails_does_not_keep_the_others(call, serve, breaks, kind, message):
    bad, worker = serve(Worker(), breaks=breaks), Worker()
    good, sent = serve(worker), tensors()
    to = sync(call, [bad, good], sent, timeout=3.0)
    assert list(to.failed) == [bad]
    assert to.failed[bad].kind == kind
    assert message in to.failed[bad].what
    assert holds(worker, sent)
    assert "resume" in good.said
    assert "resume" not in bad.said


def test_a_server_that_is_gone_is_unreachable(call, serve):
    gone = serve(Worker())
    gone.end()
    assert sync(call, [gone], tensors()).failed[gone].kind == "unreachable"


def test_who_has_no_token_is_no_worker(call, serve):
    worker, tried = Worker(), []
    server = serve(worker)
    rpc = server.rpc

    async def eavesdropped(method, *arguments, **more):
        order = json.loads(arguments[0])
        other = socket.create_connection((order["host"], order["port"]))
        other.sendall(workers._hello({**order, "token": "0" * 32}))
        tried.append(other)
        return await rpc(method, *arguments, **more)

    server.rpc = eavesdropped
    sent = tensors()
    assert sync(call, [server], sent).failed == {}
    assert holds(worker, sent)
    assert tried[0].recv(1) == b"", "it is sent nothing"


def test_nothing_is_left_in_shared_memory(call, serve):
    before = set(stream._SHARED.glob("luthier-*"))
    sync(call, [serve(Worker())], tensors())
    assert set(stream._SHARED.glob("luthier-*")) <= before


def adapter(scale):
    random = np.random.default_rng(1)
    values = {
        "layers.0.lora_A.weight": random.normal(size=(2, 8)).astype(np.float32),
        "layers.0.lora_B.weight": scale * random.normal(size=(24, 2)).astype(np.float32),
    }
    config = {"r": 2, "lora_alpha": 4, "use_rslora": False}
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(values)}


@pytest.fixture
def own_tmp(tmp_path, monkeypatch):
    monkeypatch.setattr(workers.EXTENSION.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


def test_an_adapter_is_loaded_once_and_then_replaced_in_place(call, serve, own_tmp):
    worker = Worker()
    server = serve(worker)
    for version in (1, 2, 3):
        to = send_adapter([server], call, version, adapter(float(version)), name="policy", timeout=10.0)
        assert to.failed == {}
        assert worker.adapters.keys() == {1}
        held = worker.adapters[1]["layers.0.lora_B.weight"].numpy()
        assert np.allclose(held, version * adapter_b()), version
    loads = [said for said in server.said if "load" in said]
    assert loads == ["load policy"]
    assert list(own_tmp.iterdir()) == [], "files are taken away"
    assert server.said[-3:] == ["reset", "version 3", "resume"]


def adapter_b():
    random = np.random.default_rng(1)
    random.normal(size=(2, 8))
    return random.normal(size=(24, 2)).astype(np.float32)


def test_an_adapter_that_vllm_did_not_replace_is_noticed(call, serve, own_tmp, monkeypatch):
    server = serve(Worker())
    assert send_adapter([server], call, 1, adapter(1.0), name="policy", timeout=10.0).failed == {}
    monkeypatch.setattr(Worker, "add_lora", lambda self, request: True)
    to = send_adapter([server], call, 2, adapter(2.0), name="policy", timeout=10.0)
    assert "vLLM has loaded something else" in str(to.failed[server])
    assert server.named == "1"


def test_a_server_without_room_for_adapters_says_so(call, serve, own_tmp):
    worker = Worker()
    for layer in worker.model_runner.model.layers:
        del layer.lora_a_stacked
    server = serve(worker)
    to = send_adapter([server], call, 1, adapter(1.0), name="policy", timeout=10.0)
    assert "without --enable-lora" in str(to.failed[server])
    assert list(own_tmp.iterdir()) == []
