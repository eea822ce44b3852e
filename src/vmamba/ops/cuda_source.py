"""The text of kernels in CUDA: files of a package's folder `cuda` behind what all of them share."""

import functools
from importlib import resources


@functools.cache
def read_source(package: str, *names: str) -> str:
    """Concatenate `ops/cuda/values.cuh` and files of a package's folder `cuda`; there are no includes."""
    texts = [resources.files("vmamba.ops").joinpath("cuda").joinpath("values.cuh")]
    texts += [resources.files(package).joinpath("cuda").joinpath(name) for name in names]
    return "\n".join(text.read_text(encoding="utf-8") for text in texts)
