"""A run's job for a machine that is not there: the model from its sizes alone, the mesh over devices described.

Left out on purpose: weights, rows and tokenizers. What a program is made of follows from keys and shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from luthier import mesh as mesh_lib
from luthier.checkpoint import maxtext_names
from luthier.checkpoint import source as source_lib
from luthier.checkpoint.source import Source
from luthier.config import RlConfig, SftConfig, SourceKeys
from luthier.errors import UserError
from luthier.model import published
from luthier.model.model import Model
from luthier.train import job as job_lib
from luthier.train.job import Job

C = TypeVar("C", bound=SftConfig | RlConfig)


def source(keys: SourceKeys) -> Source:
    """Return the model that the keys name, without weights: of a published one, no file is read.

    Raises UserError where it is neither published, nor a folder or file here, nor to be had from the hub.
    """
    name = keys.model_name or keys.load_parameters_path
    started = "" if keys.load_parameters_path == "random" else keys.load_parameters_path
    here = any(place and Path(place).exists() for place in (name, started))
    hub_id = maxtext_names.HUB_IDS.get(name, name)
    known = published.find(hub_id)
    if known is not None and not here:
        return Source("random", hub_id, Path(), known.config)
    try:
        found = source_lib.resolve(keys)
    except UserError as error:
        names = ", ".join(sorted(published.PUBLISHED))
        raise UserError(f"{error} These can be planned for without a file: {names}.") from None
    return replace(found, kind="random", adapter=None)


def job(config: C, devices: Sequence[Any]) -> Job[C]:
    """Return the job of a run on ``devices``, which may be those of a machine that is not there.

    Raises UserError where keys, mesh and model do not go together.
    """
    found = source(config)
    if config.lora_init == "loftq":  # begins as what a checkpoint's weights give, in the same shapes
        config = config.model_copy(update={"lora_init": "default"})
    mesh = mesh_lib.make(config, devices)
    with mesh_lib.use(mesh):
        return job_lib.prepare(config, found, Model.from_hf(found.config, found.name), mesh)
