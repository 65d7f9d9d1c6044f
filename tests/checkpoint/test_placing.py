"""Quantised bases as they are loaded: every variant of every family, on one device and on eight."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close
from family_variants import VARIANTS
from folders import keys, one_device, random_tensors, tiny_tokenizer, write_folder
from jax.sharding import Mesh

import tiny
from luthier import mesh as mesh_lib
from luthier.checkpoint import huggingface, placing
from luthier.checkpoint.source import Source, resolve
from luthier.model import codes, param, quant
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.model.param import Param

# Joined tensors, experts in one tensor and in many, latent attention, tied embeddings: what loading tells apart.
FIRST = ("llama3.1", "gemma3-text", "qwen3-moe", "gpt-oss", "phi3", "deepseek-v3")
NEWER = [name for name in VARIANTS if not name.endswith("-old")]
CASES = [(name, "nf4") for name in NEWER] + [(name, kind) for kind in ("int8", "int4") for name in FIRST]
QUICK_CASES = [("llama3.1", "nf4"), ("deepseek-v3", "nf4")]
SLOW_CASES = [*((name, "nf4") for name in (*FIRST, "mixtral")), ("qwen3-moe", "int8"), ("gpt-oss", "int4")]


def case(name: str, kind: str) -> Any:
    """A case with the mark that says who runs it."""
    if (name, kind) in QUICK_CASES:
        return name, kind
    listed = (name, kind) in SLOW_CASES
    return pytest.param(name, kind, marks=pytest.mark.slow if listed else pytest.mark.exhaustive)


every_case = pytest.mark.parametrize(("name", "kind"), [case(*each) for each in CASES])
# Half the time to compile, and the same arithmetic.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def model_of(name: str) -> Model:
    return Model.from_hf(VARIANTS[name].config, name)


@functools.cache
def tensors_of(name: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = param.tensor_shapes(model_of(name).spec)
    return {key: random.normal(float(len(shape) == 1), 0.1, shape).astype(np.float32) for key, shape in shapes.items()}


@functools.cache
def source_of(name: str) -> Source:
    return resolve(keys(write_folder(Path(FOLDER.name) / name, VARIANTS[name].config, tensors_of(name))))


def load(name: str, kind: str, mesh: Mesh, dtype: Any = jnp.float32) -> Any:
    model = model_of(name)
    return huggingface.load(source_of(name), model.spec, dtype, mesh, model.config.ignored, quantization=kind)


@functools.cache
def loaded(name: str, kind: str) -> Any:
    return load(name, kind, one_device())


def eight(name: str) -> Mesh:
    """Eight devices, as the variant's heads and experts allow."""
    config = VARIANTS[name].config
    config = config.get("text_config", config)
    tensor = 2 if config["num_attention_heads"] % 2 == 0 else 1
    expert = 2 if {"num_experts", "num_local_experts", "n_routed_experts"} & config.keys() else 1
    sizes = {"tensor": tensor, "expert": expert, "fsdp": 8 // (tensor * expert)}
    return mesh_lib.make(keys(**{f"ici_{axis}_parallelism": size for axis, size in sizes.items()}))


@functools.partial(jax.jit, compiler_options=QUICK)
def floats(params: Any) -> Any:
    """The same weights, as arrays."""
    return jax.tree.map(
        lambda leaf: leaf.materialised(jnp.float32) if quant.kind(leaf) else leaf, params, is_leaf=quant.is_quantised
    )


def logits(name: str, params: Any, mesh: Mesh) -> np.ndarray:
    model, rows = model_of(name), tiny.make_batch(8, 24)
    with mesh_lib.use(mesh):
        program = jax.jit(lambda params, rows: model.logits(params, rows, Compute()), compiler_options=QUICK)
        found = program(params, rows)
    return np.asarray(found)[np.asarray(rows.segments_BT) > 0]


def from_tensors(name: str, declared: Param, kind: str) -> np.ndarray:
    """What ``kind`` makes of a weight, from the matrices of its whole tensors, which others may have rows of."""
    found = np.empty(declared.shape, np.float32)
    for key, index in declared.tensors().items():
        tensor = tensors_of(name)[key]
        if tensor.ndim == 2:
            tensor = dequantised(tensor, kind)
        elif tensor.ndim == 3:  # one tensor of all experts, inputs first
            tensor = np.stack([dequantised(matrix.T, kind).T for matrix in tensor])
        found[index] = declared.from_tensor(tensor)
    return found


def dequantised(matrix: np.ndarray, kind: str) -> np.ndarray:
    """One level of scales, as exact as fp32: the second level changes the scales by less than 1 %."""
    if not kind:
        return matrix
    if kind == "int8":
        values, scales = codes.int8(matrix)
        return values * (scales / 127)[:, None]
    packed, scales = codes.four_bits(matrix, kind)
    values = codes.TABLES[kind][np.stack([packed >> 4, packed & 15], -1)]
    return (values.reshape(*scales.shape, -1) * scales[..., None]).reshape(matrix.shape)


@every_case
def test_quantised_weights_are_those_of_the_tensors(name: str, kind: str) -> None:
    spec = model_of(name).spec
    tree, declared = placing.structure(spec), param.leaves(spec).values()
    kinds = [quant.kind(weight) for weight in tree.flatten_up_to(loaded(name, kind))]
    for found, own, param_kind in zip(jax.tree.leaves(floats(loaded(name, kind))), declared, kinds, strict=True):
        made = from_tensors(name, own, param_kind)
        assert_close(found, made, {"": 0, "int8": 1e-6}.get(param_kind, 1e-2))
    assert set(kinds) == {"", kind} | ({"int8"} if "head" in spec else set())


@every_case
def test_a_quantised_base_computes_as_the_floats_that_it_stands_for(name: str, kind: str) -> None:
    params, one = loaded(name, kind), one_device()
    assert_close(logits(name, params, one), logits(name, floats(params), one))


@every_case
def test_eight_devices_have_the_same_codes_and_logits(name: str, kind: str) -> None:
    here, there = loaded(name, kind), load(name, kind, eight(name))
    for ours, theirs in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    shapes = quant.abstract(model_of(name).spec, kind, jnp.float32, eight(name))
    assert jax.tree.structure(shapes) == jax.tree.structure(there)
    for shape, array in zip(jax.tree.leaves(shapes), jax.tree.leaves(there), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert array.sharding.is_equivalent_to(shape.sharding, array.ndim)
    assert_close(logits(name, there, eight(name)), logits(name, here, one_device()))


@pytest.mark.parametrize("name", ["llama3.1"])
def test_floats_of_a_quantised_base_take_the_type_asked_for(name: str) -> None:
    def dtype(declared: Param) -> Any:
        return jnp.bfloat16 if len(declared.slice_shape) > 1 else jnp.float32

    params = load(name, "nf4", one_device(), dtype)
    assert params["head"].dtype == jnp.bfloat16
    assert params["norm"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params["embed"])} == {np.dtype("int8"), np.dtype("float32")}


@pytest.mark.parametrize("name", ["llama3.1"])
def test_a_quantised_base_is_not_saved(name: str, tmp_path: Path) -> None:
    params = loaded(name, "nf4")
    with pytest.raises(ValueError, match="only an adapter"):
        huggingface.save(tmp_path / "out", params, model_of(name).spec, source_of(name), tiny_tokenizer())


@pytest.mark.parametrize("kind", ["nf4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "int4"))])
def test_random_weights_are_quantised_as_loaded_ones_are(kind: str) -> None:
    model, key = model_of("llama3.1"), jax.random.key(0)
    exact = placing.random(model.spec, key, "", jnp.float32, one_device())
    found = placing.random(model.spec, key, kind, jnp.float32, eight("llama3.1"))
    wanted = placing.quantise(exact, model.spec, kind, one_device())
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [quant.kind(leaf) for leaf in jax.tree.leaves(exact)] == [""] * len(jax.tree.leaves(exact))


def test_rows_of_a_joined_tensor_have_the_codes_of_the_whole() -> None:
    """Phi-3's qkv_proj: scales are of blocks inside a row, so that codes do not depend on which rows are together."""
    spec, tensors = model_of("phi3").spec, tensors_of("phi3")
    whole, scales = codes.four_bits(tensors["model.layers.0.self_attn.qkv_proj.weight"], "nf4")
    attention = spec["layers"]
    packed, found = [], []
    for name, declared in param.leaves(attention).items():
        if "qkv_proj" in declared.tensor:
            piece = declared.from_tensor(tensors[declared.tensor.format(layer=0)])
            own = codes.four_bits(einops.rearrange(piece, "d n h -> (n h) d"), "nf4")
            packed.append((declared.part.start, name, own[0]))
            found.append((declared.part.start, name, own[1]))
    np.testing.assert_array_equal(np.concatenate([part for *_, part in sorted(packed)]), whole)
    np.testing.assert_array_equal(np.concatenate([part for *_, part in sorted(found)]), scales)


MEMORY = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from folders import one_device, keys, spec_of
from luthier.checkpoint import huggingface
from luthier.checkpoint.source import resolve

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

for name in ("small", "big"):  # the small one first brings in what is the same for any size
    source = resolve(keys(Path(sys.argv[1]) / name))
    before = peak()
    params = huggingface.load(source, spec_of(source.config), jnp.bfloat16, one_device(), quantization="nf4")
    loaded = peak()
print(loaded - before, sum(x.nbytes for x in jax.tree.leaves(params)), max(t.nbytes for t in source.tensors.values()))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_the_full_precision_model_is_never_whole_in_memory(tmp_path: Path) -> None:
    """Of 512 MB in bf16, a quarter stays; no more than three of the largest tensors, of 34 MB, are there besides."""
    big = tiny.TINY | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "vocab_size": 1024}
    for name, config in (("small", tiny.TINY), ("big", big)):
        write_folder(tmp_path / name, config, random_tensors(config, "bfloat16"))
    paths = {"PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    paths["MALLOC_MMAP_THRESHOLD_"] = "1048576"  # what is freed goes back at once, so that the peak is what was held
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True, env=paths)
    grown, held, largest = map(int, done.stdout.split())
    floats = sum(math.prod(shape) for shape in param.tensor_shapes(Model.from_hf(big, "big").spec).values()) * 2
    assert held < floats / 3
    assert grown < held + 3 * largest < floats / 2, done.stdout
