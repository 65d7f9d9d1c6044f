"""What a model costs, counted by hand for small ones."""

import pytest
from family_variants import VARIANTS

from luthier.model import cost, param
from luthier.model.decoder import Decoder
from luthier.model.model import Model
from tiny import TINY


def decoder(**changes: object) -> Decoder:
    return Model.from_hf(TINY | changes, "tiny").config


def test_flops_of_a_token_are_those_of_the_papers_formula() -> None:
    # PaLM's 6N + 12LHQT, attention halved for causality; the embedding is looked up, and multiplies nothing.
    model = decoder()
    weights = param.count(model.spec) - 256 * 64
    assert cost.flops_per_token(model, 32) == 6 * weights + 6 * 3 * 4 * 16 * 32
    assert cost.multiplied(decoder(tie_word_embeddings=True)) == weights


def test_a_window_is_all_that_a_query_meets() -> None:
    full, window = (decoder(model_type="mistral", sliding_window=size) for size in (None, 8))
    # Of 32 tokens, the first 8 meet 4 on average (halved) and each later one 8.
    met = (8 * 4 + 24 * 8) / 32
    assert cost.flops_per_token(window, 32) == cost.flops_per_token(full, 32) - 6 * 3 * 2 * 4 * 16 * (16 - met)


def test_of_experts_only_those_chosen_multiply() -> None:
    config = VARIANTS["mixtral"].config
    model = Model.from_hf(config, "mixtral").config
    experts, chosen = config["num_local_experts"], config["num_experts_per_tok"]
    each = 3 * config["hidden_size"] * config["intermediate_size"] * config["num_hidden_layers"]
    whole = param.count(model.spec) - config["vocab_size"] * config["hidden_size"]
    assert cost.multiplied(model) == pytest.approx(whole - (experts - chosen) * each)


def test_the_largest_layer_has_all_of_its_experts() -> None:
    config = VARIANTS["deepseek-v3"].config
    model = Model.from_hf(config, "v3").config
    sizes = {name: param.count(layer) for name, layer in model.spec["layers"].items()}
    runs = {str(run.first): run.repeats for run in model.runs}
    assert cost.largest_layer(model) == max(sizes[name] // runs[name] for name in sizes)
