"""The engine on a real model: SmolLM2-135M-Instruct, dequantised."""

from __future__ import annotations

import folders
import jax
import jax.numpy as jnp
import numpy as np

from luthier import mesh
from luthier.checkpoint import huggingface, tokenizer
from luthier.checkpoint.source import resolve
from luthier.config import EngineKeys, ModelKeys
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.rollout import text
from luthier.rollout.engine import Request, Sampling
from luthier.rollout.local import LocalEngine
from luthier.types import Batch

QUESTIONS = ("What is the capital of France?", "Hi", "Name three colours of the rainbow, please.", "2 + 3 =", "Why?")


def test_log_probs_of_a_real_model_are_those_of_one_whole_pass() -> None:
    """Five questions through two rows, so that sequences come and go, read in pieces of 16 tokens."""
    source, compute = resolve(ModelKeys(load_parameters_path=str(folders.smollm2()))), Compute()
    model, words = Model.from_hf(source.config, source.name), tokenizer.load(source)
    prompts = [text.encode_text(words, question) for question in QUESTIONS]
    keys = EngineKeys(max_num_seqs=2, max_target_length=32, prefill_chunk_length=16, decode_steps=5)
    with mesh.use(mesh.make(ModelKeys(), jax.devices()[:1])) as one:
        params = huggingface.load(source, model.spec, jnp.float32, one)
        engine = LocalEngine(model, params, compute, one, keys)
        done = list(engine.generate([Request(prompt, 1, Sampling(max_new_tokens=12)) for prompt in prompts]))
        tokens_BT, segments_BT = np.zeros((5, 32), np.int32), np.zeros((5, 32), np.int32)
        for c in done:
            whole = [*prompts[c.request], *c.tokens_T]
            tokens_BT[c.request, : len(whole)], segments_BT[c.request, : len(whole)] = whole, 1
        batch = Batch(tokens_BT, np.tile(np.arange(32, dtype=np.int32), (5, 1)), segments_BT, segments_BT > 0)
        logp_BT = np.asarray(jax.jit(lambda params, batch: model.score(params, batch, compute).logp_BT)(params, batch))
    assert sorted(c.request for c in done) == [0, 1, 2, 3, 4]
    for c in done:
        start = len(prompts[c.request])
        np.testing.assert_allclose(c.softmax_logp_T, logp_BT[c.request, start : start + len(c.tokens_T)], atol=1e-4)
