"""What was sampled, for people to read: a file of JSON lines a step, and the best and worst completion on the screen.

Left out on purpose: reading them back. A resumed run samples the steps after its checkpoint again, the same.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from luthier import processes
from luthier.checkpoint import disk
from luthier.train.sampler import Collected, Scored

SHOWN_CHARACTERS = 600


class RolloutFiles:
    """The folder ``rollouts/`` of a run, with ``step-000001.jsonl`` and so on: a line for each completion.

    Of several processes the first writes them; all call it.
    """

    def __init__(self, folder: Path, resumed_at: int) -> None:
        """Make the folder, and remove what was sampled after the step that the run goes on from."""
        self._folder = folder
        if not processes.is_first():
            return
        folder.mkdir(exist_ok=True)
        for path in folder.glob("*step-*.jsonl"):
            if path.name.startswith(".") or int(path.stem.rpartition("-")[2]) > resumed_at:
                path.unlink()

    def write(self, collected: Collected) -> None:
        """Write a step's completions, the file in one piece. Raises RunError where the disk refuses."""
        processes.by_first(lambda: self._write(collected))

    def _write(self, collected: Collected) -> None:
        path = self._folder / f"step-{collected.number:06d}.jsonl"
        draft = path.with_name(f".{path.name}")
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in _lines(collected))
        with disk.writing(path, "the completions", lambda: "Make room, and run the same command again: it goes on."):
            draft.write_text("".join(lines), encoding="utf-8")
            draft.replace(path)


def show(console: Console, collected: Collected) -> None:
    """Print the completions of the highest and of the lowest reward."""
    every = [(group, sample) for group in collected.groups for sample in range(len(group.episodes))]
    known = [(group, sample) for group, sample in every if math.isfinite(group.rewards_G[sample])]
    if not known:
        return
    known.sort(key=lambda item: item[0].rewards_G[item[1]])
    for title, (group, sample) in (("best", known[-1]), ("worst", known[0])):
        episode = group.episodes[sample]
        console.print(
            f"[bold]{title} of step {collected.number}[/bold] "
            f"[dim](reward {group.rewards_G[sample]:.3g}, {len(episode.tokens_T)} tokens, {episode.finish}; "
            f"{escape(group.task.prompt.place)})[/dim]"
        )
        console.print(escape(_short(_last(group.task.prompt.shown))), style="dim")
        console.print(escape(_short(episode.text)), end="\n\n")


def _lines(collected: Collected) -> list[dict[str, Any]]:
    return [
        {
            "step": collected.number,
            "place": group.task.prompt.place,
            "sample": sample,
            "prompt": group.task.prompt.shown,
            "completion": episode.text,
            "reference": group.task.prompt.reference,
            "rewards": dict(zip(collected.names, map(_number, group.rewards_GF[sample]), strict=True)),
            "reward": _number(group.rewards_G[sample]),
            "advantage": _number(group.advantages_G[sample]),
            "trained": bool(group.trained_G[sample]),
            "failures": [f"{failure.function} {failure.reason}" for failure in group.failures],
            "finish_reason": episode.finish,
            "turns": episode.turns,
            "prompt_tokens": len(group.task.ids),
            "completion_tokens": len(episode.tokens_T),
            "logprob": _number(np.sum(episode.logp_T)),
            "policy_versions": _versions(group, sample),
        }
        for group in collected.groups
        for sample, episode in enumerate(group.episodes)
    ]


def _versions(group: Scored, sample: int) -> list[int]:
    """Return the oldest and the newest policy version that drew the completion's tokens."""
    episode = group.episodes[sample]
    own_T = episode.versions_T[episode.mask_T]
    return [int(own_T.min()), int(own_T.max())] if len(own_T) else []


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _last(shown: Any) -> str:
    return shown if isinstance(shown, str) else str(shown[-1]["content"])


def _short(text: str) -> str:
    return (
        text
        if len(text) <= SHOWN_CHARACTERS
        else f"{text[: SHOWN_CHARACTERS // 2]} ... {text[-SHOWN_CHARACTERS // 2 :]}"
    )
