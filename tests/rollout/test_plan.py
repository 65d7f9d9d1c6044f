from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from luthier import memory, mesh
from luthier.config import EngineKeys, ModelKeys
from luthier.errors import UserError
from luthier.model.cache import Line
from luthier.rollout.plan import Limits, Size, bucket, buckets

LINES = {"layers": Line(layers=8, heads=4, width=64)}  # 8 KiB a token in bf16, 1 MiB for 128
MIB = 2**20


def limits(context: int | None = 1024, devices: int = 1, axes: dict[str, int] | None = None, **keys: float) -> Limits:
    here = mesh.make(ModelKeys(**(axes or {})), jax.devices()[:devices])
    return Limits(EngineKeys(**keys), context, LINES, jnp.bfloat16, here)


@pytest.mark.parametrize(
    ("keys", "wanted", "size"),
    [
        ({}, (5, 100), Size(5, 128)),
        ({}, (5, 1000), Size(5, 1024)),
        ({}, (1000, 100), Size(32, 128)),
        ({"max_num_seqs": 3}, (5, 100), Size(3, 128)),
        ({"max_num_seqs": 100}, (50, 100), Size(50, 128)),
        ({"max_target_length": 300}, (5, 100), Size(5, 300)),
        ({"kv_cache_gib": 40 / 1024}, (None, None), Size(5, 1024)),
        ({"kv_cache_gib": 40 / 1024}, (2, None), Size(2, 1024)),
    ],
)
def test_size_is_what_is_wanted_within_the_limits(
    keys: dict[str, float], wanted: tuple[int | None, int | None], size: Size, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda mesh: 4096.0 * MIB)
    assert limits(**keys).size(*wanted) == size


def test_rows_are_split_over_devices_and_heads_too() -> None:
    assert limits(devices=8, kv_cache_gib=16 / 1024).size(3, 128) == Size(8, 128)
    assert limits(devices=8, kv_cache_gib=16 / 1024).size(None, None) == Size(16, 1024)
    assert limits(devices=8, axes={"ici_tensor_parallelism": 4}, kv_cache_gib=16 / 1024).size(None, None) == Size(
        16, 1024
    )


def test_a_context_that_nobody_asked_for_gives_way_to_memory() -> None:
    long = 131_072  # 1 GiB a row
    assert limits(long, kv_cache_gib=1).size(None, None) == Size(8, 16_384)
    assert limits(long, kv_cache_gib=1).size(1, None) == Size(1, 131_072)
    assert limits(long, kv_cache_gib=1 / 8).size(None, None) == Size(4, 4096)
    assert limits(long, kv_cache_gib=1, max_target_length=65_536).size(None, None) == Size(2, 65_536)


WINDOWS = {"windows": Line(layers=8, heads=4, width=64, window=32)}  # 1/4 MiB


@pytest.mark.parametrize(
    ("rows_of_memory", "wanted", "size"),
    [
        (99, (16, 100), Size(16, 128, 1)),
        (99, (None, 100), Size(32, 128, 1)),
        (99, (90, 16), Size(32, 16)),  # no row outgrows the window
        (99, (15, 100), Size(15, 128)),  # one more would cost much
        (15, (90, 100), Size(15, 128)),
        (18, (90, 100), Size(17, 128, 1)),  # one of them
        (18, (18, 100), Size(18, 128)),  # none waits
    ],
)
def test_a_row_beside_many_keeps_a_prompt_that_windows_lose(
    rows_of_memory: int, wanted: tuple[int | None, int], size: Size
) -> None:
    here = mesh.make(ModelKeys(), jax.devices()[:1])
    gib = rows_of_memory * 1.25 * MIB / 2**30  # 128 tokens and 32
    keys = EngineKeys(kv_cache_gib=gib, max_target_length=wanted[1] if wanted[1] < 100 else 0)
    assert Limits(keys, 1024, LINES | WINDOWS, jnp.bfloat16, here).size(*wanted) == size


def test_rows_that_are_split_over_devices_have_none_beside() -> None:
    here = mesh.make(ModelKeys(), jax.devices()[:2])
    assert Limits(EngineKeys(kv_cache_gib=1), 1024, WINDOWS, jnp.bfloat16, here).size(32, 128) == Size(32, 128)


def test_a_cache_with_a_row_beside_grows_with_it_and_is_not_made_anew_for_it() -> None:
    here = mesh.make(ModelKeys(), jax.devices()[:1])
    roomy, scarce = (
        Limits(EngineKeys(kv_cache_gib=rows * MIB / 4 / 2**30), 1024, WINDOWS, jnp.bfloat16, here) for rows in (99, 18)
    )
    assert roomy.grown(Size(16, 128, 1), 3, 256) == Size(16, 256, 1)
    assert roomy.grown(Size(16, 128, 1), 20, 128) == Size(20, 128, 1)
    assert roomy.grown(Size(32, 128, 1), 90, 128) == Size(32, 128, 1)
    size = scarce.grown(Size(0, 0), 30, 128)
    assert size == Size(17, 128, 1)
    for sequences in (18, 30, 18, 30):
        before, size = size, scarce.grown(size, sequences, 128)
    assert size == before


def test_the_row_beside_makes_room_for_the_new_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda mesh: 0.0)
    here = mesh.make(ModelKeys(), jax.devices()[:1])
    found = Limits(EngineKeys(), 1024, WINDOWS, jnp.bfloat16, here)
    assert found.size(None, 128, Size(63, 128)).rows == 15
    assert found.size(None, 128, Size(63, 128, 1)) == Size(15, 128, 1)


def test_the_old_cache_makes_room_for_the_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda mesh: 100.0 * MIB)
    assert limits().size(None, None) == Size(3, 1024)
    assert limits().size(None, None, Size(15, 1024)) == Size(6, 1024)


@pytest.mark.parametrize(
    ("old", "wanted", "size"),
    [
        (Size(0, 0), (5, 100), Size(5, 128)),
        (Size(2, 256), (2, 200), Size(2, 256)),
        (Size(2, 256), (4, 200), Size(4, 256)),
        (Size(4, 256), (1, 500), Size(4, 512)),
        (Size(8, 512), (20, 100), Size(8, 512)),  # all there is memory for: the rest wait
        (Size(8, 512), (2, 600), Size(6, 640)),
        (Size(30, 128), (40, 100), Size(32, 128)),
    ],
)
def test_a_cache_grows_to_what_is_wanted_and_stays_where_it_cannot(
    old: Size, wanted: tuple[int, int], size: Size, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = old.rows * old.length / 128 * MIB
    monkeypatch.setattr(memory, "available", lambda mesh: 4 * 32.0 * MIB - taken)
    assert limits().grown(old, *wanted) == size


def test_a_cache_that_is_long_enough_stays_when_memory_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda mesh: -1.0 * MIB)
    assert limits().grown(Size(1, 256), 3, 200) == Size(1, 256)
    with pytest.raises(UserError, match="keys and values of 384 tokens"):
        limits().grown(Size(1, 256), 1, 300)


def test_a_platform_that_tells_nothing_gets_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda mesh: None)
    assert limits().size(5, 100) == Size(5, 128)
    assert limits(devices=8).size(5, 100) == Size(8, 128)


def test_the_default_is_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda mesh: 160.0 * MIB)
    assert limits().size(None, None) == Size(5, 1024)


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(UserError) as refused:
        limits(kv_cache_gib=4 / 1024).size(1, 1024)
    message = str(refused.value)
    assert "keys and values of 1024 tokens take 0.0078 GiB" in message
    assert "kv_cache_gib is 0.0039 GiB" in message
    assert "max_target_length=512 fits" in message


def test_a_model_without_a_limit_needs_the_key() -> None:
    assert limits(None).size(1, 100) == Size(1, 128)
    assert limits(None, max_target_length=77).size(None, None) == Size(32, 77)
    with pytest.raises(UserError, match=r"max_target_length=0: the model's config.json names no limit"):
        limits(None).size(None, None)


def test_buckets_are_few() -> None:
    assert buckets(1) == (1,)
    assert buckets(5) == (1, 5)
    assert buckets(256) == (1, 8, 32, 128, 256)
    assert bucket(buckets(40), 9) == 32
