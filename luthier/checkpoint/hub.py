"""Files of a model on the Hugging Face hub, with its refusals told as messages that help.

Left out on purpose: data sets, which `datasets` fetches itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from luthier.errors import UserError

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
WEIGHT_FILES = ["*.safetensors"]
_IGNORED = ["*/*", "consolidated*"]  # other layouts of the same weights


def fetch(model: str, patterns: list[str], token: str | None, revision: str = "main") -> Path:
    """Return the local snapshot of the hub's ``model`` with the files of its root that match ``patterns``.

    The folder is named after the commit that it holds, which ``revision`` can name again.

    Raises UserError where the hub cannot be reached, does not know the model, or refuses it.
    """
    from huggingface_hub import snapshot_download

    with refusals(model):
        folder = snapshot_download(
            model, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED, token=token
        )
    return Path(folder)


@contextlib.contextmanager
def refusals(model: str) -> Iterator[None]:
    """Turn the hub's refusals to hand out ``model`` into UserErrors that name the remedy."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{model}"
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{model}: this model is gated. Ask for access at {page}, then run `hf auth login` or set hf_access_token."
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{model}: the hub has no such model, or it is private. Check {page}; "
            "for a private model run `hf auth login` (or set hf_access_token)."
        ) from None
    except errors.HFValidationError as error:
        raise UserError(f"{model}: not a hub id ({error}). Give a folder, a hub id or a .gguf file.") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(f"{model}: the hub refuses access ({status}). Run `hf auth login`; see {page}.") from None
        raise UserError(f"{model}: the hub answered {status} for {page}. Try again, or give a local folder.") from None
    except (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else str(error).split("\n")[0]
        raise UserError(
            f"{model}: not in the local cache, and the hub cannot be reached ({why}). Check the network, or set "
            "load_parameters_path to a local folder or .gguf file."
        ) from None
