"""Log-probs and entropies of completions that share their prompts, against Transformers on each completion alone."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import tiny
from luthier.data.groups import Layout, pack, unpack
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.types import Trajectory


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["llama3.1", "smollm2"])
def test_equals_transformers(name: str, shared: bool, temperature: float) -> None:
    torch = pytest.importorskip("torch")
    model, twin = Model.from_hf(tiny.CONFIGS[name], name), tiny.torch_twin(tiny.CONFIGS[name])
    random = np.random.default_rng(0)
    ours = []
    for _ in range(2):
        prompt_T = random.integers(0, 256, random.integers(5, 40)).astype(np.int32)
        for _ in range(3):
            tokens_T = random.integers(0, 256, random.integers(1, 17)).astype(np.int32)
            logp_T = np.zeros(len(tokens_T), np.float32)
            mask_T = random.random(len(tokens_T)) < 0.8
            ours.append(Trajectory(prompt_T, tokens_T, mask_T, logp_T, logp_T, None, 0.0))
    packed = pack(ours, Layout(2, 128, 96, 6, 16, shared))
    score = jax.jit(
        lambda params, batch: model.score_tokens(params, batch, Compute(), temperature=temperature, entropy=True)
    )
    params = tiny.params_from_torch(model.spec, twin)
    scores = [score(params, micro.batch) for micro in packed]
    shapes = [micro.batch.places_BSC.shape for micro in packed]
    logps = unpack(packed, [one.logp_BT.reshape(shape) for one, shape in zip(scores, shapes, strict=True)], ours)
    entropies = unpack(packed, [one.entropy_BT.reshape(shape) for one, shape in zip(scores, shapes, strict=True)], ours)
    for one, logp_T, entropy_T in zip(ours, logps, entropies, strict=True):
        ids = torch.tensor(np.concatenate([one.prompt_T, one.tokens_T])[None]).long()
        with torch.no_grad():
            logits = twin(ids).logits[0, len(one.prompt_T) - 1 : -1] / temperature
        distribution = torch.distributions.Categorical(logits=logits)
        expected_T = distribution.log_prob(torch.tensor(one.tokens_T).long()).numpy()
        np.testing.assert_allclose(logp_T, np.where(one.mask_T, expected_T, 0), atol=1e-4)
        np.testing.assert_allclose(entropy_T, np.where(one.mask_T, distribution.entropy().numpy(), 0), atol=1e-4)
