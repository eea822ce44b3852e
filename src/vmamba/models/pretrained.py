"""The published weights: where they are, and fetching them once."""

import os
from pathlib import Path

from vmamba.models.checkpoint_files import CheckpointError, download
from vmamba.models.config import get_config, list_models, published_info

WEIGHTS_DIR = "VMAMBA_WEIGHTS_DIR"


def models_with_weights() -> list[str]:
    """Return the names for which weights were published."""
    return [name for name in list_models(published=True) if (info := published_info(name)) and info.url]


def fetch_pretrained(name: str) -> Path:
    """Return the file of a variant's published weights, downloading it into timm's cache the first time.

    A file in the folder that the environment variable VMAMBA_WEIGHTS_DIR names goes first: under the published file's
    name, or as NAME.safetensors or NAME.pth.

    Args:
        name: one of `vmamba.list_models(published=True)`.

    Raises:
        ValueError: there is no such variant, or no weights were published for it; tells for which there are.
        CheckpointError: the download failed; names the address, the place in the cache, and the ways around it.
    """
    get_config(name)  # an unknown name is told with the nearest known one
    info = published_info(name)
    url = info.url if info else None
    folder = os.environ.get(WEIGHTS_DIR)
    candidates = [f"{name}.safetensors", f"{name}.pth", *([url.rsplit("/", 1)[-1]] if url else [])]
    if folder:
        if not Path(folder).expanduser().is_dir():
            raise CheckpointError(f"{WEIGHTS_DIR} names '{folder}', which is not a folder")
        for candidate in candidates:
            if (path := Path(folder).expanduser() / candidate).is_file():
                return path
    if url is None:
        raise ValueError(
            f"no weights were published for {name!r}; there are some for {', '.join(models_with_weights())}"
        )
    return download(
        url, f", or in the folder that {WEIGHTS_DIR} names, or give its path with checkpoint_path=… (--checkpoint FILE)"
    )
