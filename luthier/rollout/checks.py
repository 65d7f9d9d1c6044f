"""What is wrong with a request, before it is begun."""

from __future__ import annotations

from collections.abc import Collection

from luthier.errors import UserError, did_you_mean
from luthier.model.model import Model
from luthier.rollout.engine import Request, Sampling

MOST_ALTERNATIVES = 20
COLDEST, HOTTEST = 1e-6, 1e3  # beyond these, fp32 gives infinities or a uniform draw


def check(
    request: Request, vocab_size: int, length: int | None, reads_text: bool, adapters: Collection[str] = ()
) -> None:
    """Raise UserError where a model of ``vocab_size`` and ``length`` tokens of context cannot serve a request."""
    if request.adapter and request.adapter not in adapters:
        hint = did_you_mean(request.adapter, list(adapters)) or " Leave it out: there is none."
        raise UserError(f"adapter={request.adapter}: the engine has no adapter of that name.{hint}")
    if request.samples < 1:
        raise UserError(f"samples={request.samples}: at least one completion must be asked for.")
    if len(request.prompt) == 0:
        raise UserError("the prompt has no tokens: give it at least one, such as the BOS token.")
    wrong = [token for token in request.prompt if not 0 <= token < vocab_size]
    if wrong:
        raise UserError(
            f"the prompt holds token {wrong[0]}, and the model's vocabulary is {vocab_size} tokens. "
            "The tokenizer is not this model's: set tokenizer_path to the one it was trained with."
        )
    if length is not None and len(request.prompt) >= length:
        raise UserError(
            f"the prompt has {len(request.prompt)} tokens, and prompt and completion together have {length} "
            "(max_target_length, or the model's own limit). Shorten the prompt or raise max_target_length."
        )
    for token in request.sampling.stop_token_ids:
        if not 0 <= token < vocab_size:
            raise UserError(f"stop_token_ids: {token} is no token of the model, which has {vocab_size}. Leave it out.")
    check_sampling(request.sampling, reads_text)


def check_routes(model: Model) -> None:
    """Raise UserError where the model sends its tokens to no experts, which could be recorded."""
    if model.routes is None:
        raise UserError("routing_replay=true: this model has no experts that tokens are sent to. Leave it out.")


def check_sampling(how: Sampling, reads_text: bool) -> None:
    """Raise UserError for a setting that is out of its range; ``reads_text`` is whether stop texts can be found."""
    ranges = {
        "temperature": (
            how.temperature == 0 or COLDEST <= how.temperature <= HOTTEST,
            f"0 (the likeliest token) or from {COLDEST:g} to {HOTTEST:g}",
        ),
        "top_k": (0 <= how.top_k < 2**31, "0 (all tokens) or more, below 2^31"),
        "top_p": (0 < how.top_p <= 1, "over 0 and at most 1"),
        "min_p": (0 <= how.min_p <= 1, "from 0 to 1"),
        "max_new_tokens": (how.max_new_tokens >= 1, "at least 1"),
        "seed": (how.seed is None or how.seed >= 0, "0 or more"),
        "logprobs": (0 <= how.logprobs <= MOST_ALTERNATIVES, f"from 0 to {MOST_ALTERNATIVES}"),
    }
    for name, (good, range_) in ranges.items():
        if not good:
            raise UserError(f"{name}={getattr(how, name)}: it must be {range_}.")
    if "" in how.stop:
        raise UserError("stop: an empty text would end every completion at once. Leave it out.")
    if how.stop and not reads_text:
        raise UserError(
            f"stop={list(how.stop)}: the engine was given no tokenizer to find texts with. Give it one, or use "
            "stop_token_ids."
        )
