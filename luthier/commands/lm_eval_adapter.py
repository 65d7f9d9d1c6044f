"""A Luthier model as the lm-eval harness sees one: its ``LM`` class, registered as ``luthier``.

``--model_args`` takes ``path`` and the keys of sampling commands (``dtype=float32,max_length=2048,...``) but those of
how tokens are drawn: tasks say that.

Left out on purpose: several processes, and parts of prompts that are not text.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from luthier import keys
from luthier import mesh as mesh_lib
from luthier.commands.scoring import Scorer
from luthier.config import InferenceKeys
from luthier.config.groups import SampleKeys
from luthier.data import chat
from luthier.errors import UserError, did_you_mean
from luthier.rollout import text
from luthier.rollout.engine import Request, Sampling
from luthier.rollout.local import LocalEngine
from luthier.rollout.opened import end_tokens, open_engine, open_model

AUTO_ROWS = 16
"""Rows on each device for ``--batch_size auto``."""
CONTEXT_LENGTH = 2048
"""Where neither the model nor ``max_length`` says."""

_NAMES = {
    "path": "load_parameters_path",
    "pretrained": "load_parameters_path",
    "max_length": "max_target_length",
    "max_gen_toks": "max_new_tokens",
}
"""What other models of the harness call keys."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DRAWING = ("temperature", "top_k", "top_p", "min_p")
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0}
"""What tasks may say though it is not done here: at these values it changes nothing."""
_LOGGER = logging.getLogger(__name__)


@register_model("luthier")
class LuthierLM(TemplateLM):
    """A model in this process; what it is not told, it takes from its configuration as other commands do."""

    def __init__(
        self,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        trust_remote_code: bool | None = None,
        **arguments: Any,
    ) -> None:
        """Open the model. ``batch_size`` counts rows on each device.

        ``max_batch_size`` and ``device`` are not used, nor ``trust_remote_code``, which the harness adds to the
        arguments when it is to trust a dataset's code: none that comes with a model is ever run.

        Raises UserError for an argument that is no key of a model, and for a model that cannot be opened.
        """
        super().__init__()
        rows = _rows(batch_size)
        self.config = _config(arguments)
        self.opened = open_model(self.config)
        self.tokenizer: Any = self.opened.tokenizer
        how = chat.prompt_rendering(self.config, self.tokenizer)
        if how.template:
            self.tokenizer.chat_template = how.template
        self.max_length = self.config.max_target_length or self.opened.context_length or CONTEXT_LENGTH
        # One more than the model reads: the last token of a sequence is scored, and not read.
        self._scorer = Scorer(self.opened, rows, self.max_length + 1)
        self._engine: LocalEngine | None = None
        self._warned = False

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token (eos_token), which the harness needs. Set tokenizer_path.")
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that the first one of a text is scored after: BOS where there is one."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """The name that the harness keeps requests under."""
        return self.opened.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return tokens, after BOS where the tokenizer puts one before texts and ``string`` does not begin with it."""
        if add_special_tokens is False:
            return self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        return text.encode_text(self.tokenizer, string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the conversation as text, to be answered or, if the last message is the answer's start, to go on with.

        A template that refuses system messages gets the conversation without them, as with the harness's own models.
        Raises UserError where there is no template, or it refuses the conversation.
        """
        if not self.tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template: leave out --apply_chat_template, or set chat_template."
            )
        try:
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            spoken = [message for message in chat_history if message["role"] != "system"]
            if len(spoken) < len(chat_history):
                self._warn_of_system(error)
                return self.apply_chat_template(spoken, add_generation_prompt)
            roles = ", ".join(message["role"] for message in chat_history)
            raise UserError(
                f"the chat template refuses a conversation of {roles}: {error}. Without --fewshot_as_multiturn it may "
                "do."
            ) from None

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-prob of each text, in windows as long as the model reads where it is longer."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            owners += [number] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (logp, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logp
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, cut before the first of its stop texts."""
        samplings = [self._sampling(request.args[1]) for request in requests]
        asked = []
        for request, sampling in zip(requests, samplings, strict=True):
            ids = self.tok_encode(request.args[0])
            asked.append(Request(ids[-(self.max_length - sampling.max_new_tokens) :], 1, sampling))
        answers = [""] * len(requests)
        with mesh_lib.use(self.opened.mesh), tqdm(total=len(asked), disable=disable_tqdm, desc="Generating") as bar:
            for completion in self._sampler().generate(asked):
                index = completion.request
                answers[index] = text.decode(self.tokenizer, completion, samplings[index].stop, asked[index].prompt)
                self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
                bar.update(1)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return (log-prob, whether greedy) of each continuation; contexts are cut from the left to what is read."""
        for _request, _context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(f"a continuation of {len(continuation)} tokens is over max_length={self.max_length}.")
        # A context of white space alone, which the harness moves to the continuation, leaves none to score it after.
        whole = ((context or [self.prefix_token_id]) + continuation for _, context, continuation in requests)
        sequences = [tokens[-(self.max_length + 1) :] for tokens in whole]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with mesh_lib.use(self.opened.mesh), tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring") as bar:
            for index, logp_T, greedy_T in self._scorer.score(sequences):
                start = len(sequences[index]) - len(requests[index][2])
                found[index] = float(logp_T[start:].sum(dtype="float64")), bool(greedy_T[start:].all())
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
                bar.update(1)
        return found

    def _warn_of_system(self, error: jinja2.TemplateError) -> None:
        if not self._warned:
            _LOGGER.warning("The chat template refuses system messages, so they are left out: %s", error)
        self._warned = True

    def _sampler(self) -> LocalEngine:
        """Return the engine, made when it is first needed: many tasks never sample."""
        if self._engine is None:
            self._engine = open_engine(self.config, self.opened)
        return self._engine

    def _sampling(self, wanted: Mapping[str, Any]) -> Sampling:
        """Return the task's ``generation_kwargs`` as ours: greedy unless it says otherwise. None is as if left out."""
        wanted = {name: value for name, value in wanted.items() if value is not None}
        _check_wanted(wanted)
        length = int(next((wanted[name] for name in _LENGTHS if name in wanted), self.config.max_new_tokens))
        if length >= self.max_length:
            raise UserError(
                f"max_gen_toks={length} leaves no room for a prompt in max_length={self.max_length}. Set it lower."
            )
        drawn: dict[str, Any] = {name: wanted[name] for name in _DRAWING if name in wanted}
        if not wanted.get("do_sample", drawn.get("temperature", 0) > 0):
            drawn = {"temperature": 0.0}
        until = wanted.get("until", [])
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        # Special tokens are no text: one that is asked for as a stop text ends a completion as a token.
        special = {str(token): number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return Sampling(
            **drawn,
            max_new_tokens=length,
            stop_token_ids=tuple({*end_tokens(self.opened), *(special[stop] for stop in stops if stop in special)}),
            stop=tuple(stop for stop in stops if stop not in special),
        )


def _config(arguments: Mapping[str, Any]) -> InferenceKeys:
    """Return the keys of the model. Raises UserError for one that says how tokens are drawn, which tasks do."""
    pairs = [f"{_NAMES.get(name, name)}={'null' if value is None else value}" for name, value in arguments.items()]
    config = keys.read(InferenceKeys, pairs, os.environ)
    for name in SampleKeys.model_fields:
        if name in config.model_fields_set and name != "max_new_tokens":
            raise UserError(
                f"{name}={getattr(config, name)}: the harness's tasks say how tokens are drawn and where answers end. "
                "Leave it out of --model_args and the environment; --gen_kwargs do_sample=true,temperature=0.7 changes "
                "what tasks say."
            )
    return config


def _check_wanted(wanted: Mapping[str, Any]) -> None:
    """Raise UserError for a setting of a task that would change something, and does not here."""
    known = ("until", "do_sample", *_LENGTHS, *_DRAWING, *_NEUTRAL)
    for name, value in wanted.items():
        if name not in known:
            raise UserError(f"generation_kwargs: `{name}` is not known here.{did_you_mean(name, known)}")
        if name in _NEUTRAL and value != _NEUTRAL[name]:
            raise UserError(f"generation_kwargs: {name}={value} is not done here. Set it to {_NEUTRAL[name]}.")


def _rows(batch_size: int | str) -> int:
    if str(batch_size).startswith("auto"):
        return AUTO_ROWS
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise UserError(f"batch_size={batch_size}: give a number of rows from 1, or auto.")
    return int(batch_size)
