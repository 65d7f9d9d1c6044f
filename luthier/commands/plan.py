"""`luthier plan sft topology=v6e-8 model_name=llama3.1-8b`: will it fit, and how fast can it be.

Left out on purpose: running anything. The programs are compiled for a machine that need not be there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from luthier import runtime
from luthier.config.plan import RlPlan, SftPlan
from luthier.errors import UserError
from luthier.plan import plans, report, search, topologies
from luthier.train import display


def run(config: SftPlan | RlPlan) -> None:
    """Run ``luthier plan``: print the plan, and where it does not fit, the command that does.

    Raises UserError for a machine or model that is not known, and for keys that do not go together.
    """
    runtime.have_sums_right()  # what is planned is compiled as it will be run
    jax.config.update("jax_platforms", "cpu")  # devices that are here are left alone
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read programs for devices that are not here
    console = display.console()
    machine = topologies.find(config.topology, config.topology_num_slices)
    if config.compile and machine.compiles:
        console.print(f"Compiling for {machine.name}: for large models this takes minutes.", markup=False)
    found = plans.plan(config, machine, compiles=config.compile)
    report.show(console, found)
    figures = found.figures()
    if not found.fits and config.search:
        better = search.closest(found, console)
        if better is None:
            console.print(f"Nothing that was tried fits {machine.name}. Take a larger machine.")
        else:
            report.show(console, better.plan)
            console.print(f"\nThe closest settings that fit:\n\n    {better.command}\n", markup=False)
            figures |= {"fitting": {"command": better.command, **better.plan.figures()}}
    _write(config.output_path, figures)


def _write(path: str, figures: dict[str, Any]) -> None:
    if not path:
        return
    try:
        Path(path).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"output_path={path}: {error.strerror}. Give a file that can be written.") from None
