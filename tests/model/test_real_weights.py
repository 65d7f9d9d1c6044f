"""Released weights, by their perplexity on a fixed text: ours is Transformers', from GGUF and from safetensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luthier.checkpoint import huggingface, tokenizer
from luthier.checkpoint.source import resolve
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.types import Batch

FOUR_DIGITS = 5e-5  # of the perplexity itself
TEXT = """\
A violin begins as two pieces of wood that have rested for years. The maker taps them, listens, and planes away what is
too stiff; then taps again. Nobody has written down how thick a plate ought to be, because no two trees grow alike, and
what makes one instrument sing leaves another mute. So the work goes slowly, and the maker learns to trust small
differences: a shaving no thicker than a hair, a change of pitch that a stranger would not notice.

When the body is closed and the strings are on, the real judgement comes from somebody else. A player draws the bow
once, frowns, and asks for the sound post to be moved by half a millimetre. It is moved. The sound opens, like a door
in a warm house, and everyone in the room looks up. After that there is only varnish, which protects the wood and does
not improve it, whatever the old stories say about lost recipes from Cremona.
"""


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float, Any]:
    """Return a model's GGUF file, a folder with the same weights as safetensors, Transformers' perplexity, and ids."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate", reason="Transformers reads GGUF files with accelerate")
    from transformers import AutoModelForCausalLM, GgufConfig

    file: Path = getattr(folders, request.param)()
    reading = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
    twin = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **reading).eval()
    ids_T = np.asarray(tokenizer.load(resolve(folders.keys(file))).encode(TEXT), np.int32)
    ids = torch.from_numpy(ids_T[None]).long()
    with torch.no_grad():
        theirs = math.exp(twin(ids, labels=ids).loss.item())
    folder = tmp_path_factory.mktemp(request.param)
    twin.save_pretrained(folder)
    return file, folder, theirs, ids_T


def perplexity(path: Path, ids_T: np.ndarray) -> float:
    source = resolve(folders.keys(path))
    model = Model.from_hf(source.config, source.name)
    params = huggingface.load(source, model.spec, jnp.float32, folders.one_device(), model.config.ignored)
    tokens_BT = ids_T[None]
    ones_BT = np.ones_like(tokens_BT)
    batch = Batch(tokens_BT, np.arange(tokens_BT.size, dtype=np.int32)[None], ones_BT, ones_BT)
    logp_BT = jax.jit(lambda params, batch: model.score(params, batch, Compute()).logp_BT)(params, batch)
    return math.exp(-float(np.asarray(logp_BT, np.float64)[0, 1:].mean()))


@pytest.mark.slow
def test_perplexity_is_transformers_to_four_digits(released: tuple[Path, Path, float, Any]) -> None:
    file, folder, theirs, ids_T = released
    assert 5 < theirs < 100, "the text is read as English"
    for path in (file, folder):
        assert perplexity(path, ids_T) == pytest.approx(theirs, rel=FOUR_DIGITS), path
