"""The loss of a dataset's own tokens: plain text, or the replies of conversations.

Rows are tokenised, packed and scored as training would (``data.source``, ``train.step``), so the numbers are those that
a run reports for its held-out rows.

Left out on purpose: windows that slide over long texts; the lm-eval adapter's ``loglikelihood_rolling`` has them.
"""

from __future__ import annotations

import math
import time
from typing import Any

from rich.console import Console

from luthier import mesh as mesh_lib
from luthier.algorithms.sft import sft
from luthier.config import EvalConfig
from luthier.data import chat, source, store
from luthier.data.rows import Rows
from luthier.data.schemas import Selection
from luthier.errors import RunError
from luthier.rollout.opened import Opened
from luthier.train import display, step
from luthier.train.evaluation import evaluate as mean_loss

MAX_ROW_LENGTH = 2048
"""Tokens in a packed row where ``max_target_length`` does not say; less for a model of a shorter context."""


def evaluate(config: EvalConfig, opened: Opened, rows: Rows, chosen: Selection, console: Console) -> dict[str, Any]:
    """Return token loss, perplexity and accuracy over ``rows``, in the mesh in use.

    Raises UserError for rows that cannot be read, or that hold nothing to score, RunError for a loss that is none.
    """
    limit = config.max_target_length or min(opened.context_length or MAX_ROW_LENGTH, MAX_ROW_LENGTH)
    how = chat.rendering(config, opened.tokenizer)
    with display.counting(console, "Tokenising") as counted:
        job = store.Job(rows, chosen, opened.tokenizer, how)
        tokens = source.token_rows(job, limit=limit, on_progress=counted)
    tokens.check_vocabulary(opened.model.config.vocab_size)
    report = tokens.report
    if report.truncated:
        display.warn(console, f"{report.truncated:,} rows are over {limit} tokens, and scored up to there.")
    started = time.perf_counter()
    size = config.per_device_batch_size * mesh_lib.batch_shards(opened.mesh)
    loader = source.batches(tokens.packed, batch_size=size, seed=config.seed, shuffle=False)
    placed = (step.place(item["batch"], opened.mesh) for item in loader)
    program = step.make_eval_step(opened.model, sft, opened.compute)
    means = mean_loss(program, opened.params, placed)
    loader.close()
    if not math.isfinite(means["loss"]):
        raise RunError(f"the loss is {means['loss']}: the model's weights are broken, or too large for its dtype.")
    text = {
        "loss": means["loss"],
        "perplexity": math.exp(means["loss"]),
        "mean_token_accuracy": means["mean_token_accuracy"],
        "num_scored_tokens": report.trained_tokens,
        "num_tokens": report.tokens,
        "rows": report.conversations,
        "rows_truncated": report.truncated,
        "rows_without_scored_tokens": report.untrained,
    }
    return {"text": text, "seconds": time.perf_counter() - started}
