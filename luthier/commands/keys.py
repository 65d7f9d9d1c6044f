"""`luthier keys sft`: every key of a command, as a table on a terminal and as Markdown elsewhere.

The docs' page of keys is this Markdown. Left out on purpose: the keys themselves, which stand in `config`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from luthier.config import COMMANDS, describe
from luthier.errors import UserError, did_you_mean


def run(arguments: Sequence[str]) -> None:
    """Print the keys of the command that is named, or those of every command.

    Raises UserError for a name without keys.
    """
    names = list(arguments) or list(COMMANDS)
    for name in names:
        if name not in COMMANDS:
            hint = did_you_mean(name, list(COMMANDS)) or f" Commands with keys: {', '.join(COMMANDS)}."
            raise UserError(f"no keys for `{name}`.{hint}")
    if sys.stdout.isatty():
        for name in names:
            _print_table(name)
    else:
        print("\n".join(map(markdown, names)), end="")


def markdown(name: str) -> str:
    """Return the keys of a command as a page of Markdown, a table for each group."""
    lines = [f"# The keys of `luthier {name}`"]
    for title, rows in describe(name).items():
        lines += [
            "",
            f"## {title.removesuffix('.')}",
            "",
            "| key | type | default | meaning |",
            "| --- | --- | --- | --- |",
        ]
        for row in rows:
            default = f"`{row.default}`" if row.default not in ("", "null") else ""
            meaning = row.meaning.replace("|", "\\|")
            lines.append(f"| `{row.name}` | {row.type} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _print_table(name: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for title, rows in describe(name).items():
        table = Table("key", "type", "default", "meaning", title=title, title_justify="left", expand=True)
        for column, ratio in zip(table.columns, (4, 3, 2, 6), strict=True):
            column.ratio = ratio
            column.overflow = "fold"
        for row in rows:
            default = "" if row.default == "null" else row.default
            table.add_row(*(Text(cell.replace("`", "")) for cell in (row.name, row.type, default, row.meaning)))
        console.print(table)
