"""Who has which of a host's GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.errors import UserError
from luthier.rollout.vllm import devices
from luthier.rollout.vllm.devices import VISIBLE


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """What the driver says of a host with four GPUs."""
    for number in range(4):
        (tmp_path / "gpus" / f"0000:0{number}:00.0").mkdir(parents=True)
    return tmp_path / "gpus"


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, ("0", "1", "2", "3")),
        ({VISIBLE: "3, 1"}, ("3", "1")),
        ({VISIBLE: "GPU-7"}, ("GPU-7",)),
        ({VISIBLE: "-1"}, ()),
        ({VISIBLE: ""}, ()),
    ],
)
def test_gpus_are_those_that_are_visible(driver: Path, environment: dict[str, str], found: tuple[str, ...]) -> None:
    assert devices.gpus(environment, driver) == found
    assert devices.gpus(environment, driver / "none") == ()


@pytest.mark.parametrize(
    ("servers", "sampling", "training", "visible", "theirs", "ours"),
    [
        (1, 0.5, 0.5, None, [("2", "3")], "0,1"),
        (2, 0.5, 0.5, None, [("2",), ("3",)], "0,1"),
        (3, 0.75, 0.25, "7,6,5,4", [("6",), ("5",), ("4",)], "7"),
        (2, 0.75, 0.25, None, [("1",), ("2",)], "0"),  # the fourth is nobody's
        (2, 1.0, 0.0, None, [("0", "1"), ("2", "3")], "-1"),
    ],
)
def test_each_side_has_its_own(
    driver: Path, servers: int, sampling: float, training: float, visible: str | None, theirs: list, ours: str
) -> None:
    environment = {} if visible is None else {VISIBLE: visible}
    shares = devices.take(servers, sampling, training, together=False, environment=environment, driver=driver)
    assert [share.gpus for share in shares] == theirs
    assert environment[VISIBLE] == ours
    assert shares[0].environment == {VISIBLE: ",".join(theirs[0])}


@pytest.mark.parametrize(
    ("servers", "sampling", "training", "words"),
    [
        (3, 0.5, 0.5, "of 4 GPUs give 2 to vllm_servers=3 and 2 to the trainer"),
        (1, 0.5, 0.1, "give 2 to vllm_servers=1 and 0 to the trainer"),
        (5, 1.0, 0.0, "vllm_servers=5: there are 4 GPUs"),
    ],
)
def test_too_few_are_refused(driver: Path, servers: int, sampling: float, training: float, words: str) -> None:
    with pytest.raises(UserError, match=words):
        devices.take(servers, sampling, training, together=False, environment={}, driver=driver)


def test_without_gpus_servers_have_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_cores", lambda: 12)
    environment: dict[str, str] = {}

    def threads(servers: int, together: bool) -> list[int]:
        nowhere = tmp_path / "none"
        shares = devices.take(servers, 0.5, 0.5, together=together, environment=environment, driver=nowhere)
        return [share.threads for share in shares]

    assert threads(2, together=False) == [6, 6]  # in turn with the trainer they have all
    assert threads(2, together=True) == [3, 3]
    assert threads(20, together=True) == [1] * 20
    assert not environment
