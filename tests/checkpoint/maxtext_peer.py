"""Run MaxText's own converter and model beside ours: run by an interpreter that has MaxText.

    python maxtext_peer.py job.json

The file holds a list of cases: `name` and `arguments` of MaxText's model (its `model_name` and further keys), `config`
(a `config.json`) and `folder` (the model in Hugging Face's layout), `ours` (that model as Luthier converted it, for
`scan_layers` "true" and "false"), `tokens`, and `output`, a folder for what comes of it:

- `tree-SCAN.json`: the paths and shapes of MaxText's own model;
- `theirs-SCAN`: `folder` as MaxText's `to_maxtext` converts it, and `back-SCAN`: ours as its `to_huggingface` does,
  where its converter knows the model;
- `logits-SCAN.npz`: logits of MaxText's model with the parameters that it loaded from ours.

The answer, one line of JSON on stdout, gives for each case what failed, by the names above.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = ""  # one device, whatever the tests have

FIXED = [
    "attention=dot_product",
    "skip_jax_distributed_system=true",
    "run_name=peer",
    "dtype=float32",
    "weight_dtype=float32",
    "override_model_config=true",
    "per_device_batch_size=1",
    "megablox=false",
    "sparse_matmul=false",
    "matmul_precision=highest",
    "hardware=cpu",
]


def arguments(case: dict[str, Any], scan: str, *more: str) -> list[str]:
    from maxtext.configs import pyconfig

    base = str(Path(pyconfig.__file__).with_name("base.yml"))
    return ["peer", base, f"model_name={case['name']}", *FIXED, *case["arguments"], f"scan_layers={scan}", *more]


def told(case: dict[str, Any]) -> None:
    """Tell MaxText's converter of the tiny model where it keeps the released one's config."""
    import transformers
    from maxtext.checkpoint_conversion import to_huggingface, to_maxtext
    from maxtext.checkpoint_conversion.utils import hf_model_configs

    config = dict(case["config"])
    kind = config.pop("model_type")
    for module in (hf_model_configs, to_huggingface, to_maxtext):
        module.HF_MODEL_CONFIGS[case["name"]] = transformers.AutoConfig.for_model(kind, **config)


def write_tree(case: dict[str, Any], scan: str, output: Path) -> None:
    from maxtext.checkpoint_conversion import to_maxtext
    from maxtext.configs import pyconfig

    config = pyconfig.initialize(arguments(case, scan, f"base_output_directory={output}"))
    tree, _ = to_maxtext.get_maxtext_model_info(config)
    found = {key.removeprefix("params-").replace("-", "/"): list(shape) for key, (_, shape) in tree.items()}
    (output / f"tree-{scan}.json").write_text(json.dumps(found))


def convert_there(case: dict[str, Any], scan: str, output: Path) -> None:
    from maxtext.checkpoint_conversion import to_maxtext
    from maxtext.checkpoint_conversion.utils import utils

    def without_torch(path: str, *rest: Any, **more: Any) -> Any:
        return utils.load_hf_dict_from_safetensors(path, None, None, framework="np")

    to_maxtext.load_hf_dict_from_safetensors = without_torch
    to_maxtext.main(
        arguments(case, scan, f"base_output_directory={output / f'theirs-{scan}'}"),
        lazy_load_tensors=False,
        hf_model_path=case["folder"],
        save_dtype="float32",
        simulated_cpu_devices_count=1,
    )


def convert_back(case: dict[str, Any], scan: str, output: Path) -> None:
    from absl import flags
    from maxtext.checkpoint_conversion import to_huggingface

    flags.FLAGS(["peer", f"--hf_model_path={case['folder']}", "--override_model_architecture"])
    told(case)  # which the conversion before may have changed
    to_huggingface.main(
        arguments(
            case, scan, f"load_parameters_path={case['ours'][scan]}", f"base_output_directory={output / f'back-{scan}'}"
        )
    )


def write_logits(case: dict[str, Any], scan: str, output: Path) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from maxtext.configs import pyconfig
    from maxtext.utils import model_creation_utils

    tokens_BT = np.asarray(case["tokens"], np.int32)
    length = f"max_target_length={tokens_BT.shape[1]}"
    config = pyconfig.initialize(
        arguments(case, scan, f"load_parameters_path={case['ours'][scan]}", length, f"base_output_directory={output}")
    )
    found = model_creation_utils.from_pretrained(config)
    model = found[0] if isinstance(found, tuple) else found
    with jax.default_matmul_precision("highest"):
        logits_BTV = model(
            jnp.asarray(tokens_BT),
            jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape),
            decoder_segment_ids=jnp.ones_like(tokens_BT),
            enable_dropout=False,
        )
    np.savez(output / f"logits-{scan}.npz", logits=np.asarray(logits_BTV, np.float32))


STEPS = {"tree": write_tree, "theirs": convert_there, "back": convert_back, "logits": write_logits}


def run(case: dict[str, Any]) -> dict[str, str]:
    """Return what failed of a case."""
    from maxtext.checkpoint_conversion.utils.param_mapping import PARAM_MAPPING

    output, failed = Path(case["output"]), {}
    output.mkdir(parents=True, exist_ok=True)
    told(case)
    for scan in case["ours"]:
        for name, step in STEPS.items():
            if name in ("theirs", "back") and case["name"] not in PARAM_MAPPING:
                continue
            try:
                step(case, scan, output)
            except Exception as error:  # the test says which may fail, and how
                failed[f"{name}-{scan}"] = f"{type(error).__name__}: {error}"[:2000]
    return failed


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    with contextlib.redirect_stdout(sys.stderr):
        failed = {case["name"]: run(case) for case in cases}
    print(json.dumps(failed))


if __name__ == "__main__":
    main()
