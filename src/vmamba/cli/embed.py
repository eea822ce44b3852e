"""`vmamba embed`: images into vectors, for search, clustering and probes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vmamba.cli.arguments import UsageError, parse

if TYPE_CHECKING:
    from torch import Tensor

    from vmamba.models.vmamba import VMamba


@dataclass(frozen=True)
class EmbedOptions:
    """Write the pooled features of images to a .parquet (file, embedding) or .npz file (files, embeddings).

    Interrupted, the same command goes on where it was. Under torchrun the processes share the work.

    Args:
        source: Folder, file or glob of images; or wds: and a folder, glob or brace pattern of tar files.
        target: File to write.
        checkpoint: Weights file, run folder, Hugging Face Hub id or name of a published variant; by default the
            newest run below runs/.
        normalize: Give every vector the length 1.
        img_size: Side of the images in pixels; by default as in training.
        batch_size: Images computed at once.
        part_size: Images between two savings.
        device: cpu, cuda, or auto for the best there is.
        overwrite: Replace the target if it exists.
    """

    source: str | None = None
    target: str | None = None
    checkpoint: str | None = None
    normalize: bool = False
    img_size: int | None = None
    batch_size: int = 32
    part_size: int = 1024
    device: Literal["auto", "cpu", "cuda"] = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "part_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")


def run(argv: Sequence[str]) -> int:
    """Embed as the words say; return 1 when some images are damaged."""
    options = parse("embed", EmbedOptions, argv, positionals=[("source", "?"), ("target", "?")])
    if not options.source or not options.target:
        raise UsageError("name the images and the file to write: vmamba embed IMAGES TARGET.parquet")
    import torch

    from vmamba.cli.opening import open_model
    from vmamba.deployment.embeddings import embed, plan
    from vmamba.deployment.export import sha256_of

    target = Path(options.target).expanduser()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} to")
    if target.suffix == ".parquet":
        import pyarrow.parquet  # noqa: F401  (now rather than after the work)
    plan(options.source, options.part_size)  # so that a mistyped place is told before a model is opened
    opened = open_model(options.checkpoint, options.device, options.img_size)
    model, device = opened.model, opened.device
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        model = model.to(device)
    weights = sha256_of(Path(opened.name)) if Path(opened.name).is_file() else opened.name
    report = embed(
        _vectors(model, options.normalize),
        opened.preprocessing.transform(),
        options.source,
        target,
        identity=f"{weights}, {opened.preprocessing}, normalize={options.normalize}",
        device=device,
        batch_size=options.batch_size,
        part_size=options.part_size,
        overwrite=options.overwrite,
        progress=_progress,
    )
    if report is None:
        return 0
    for name in report.damaged:
        print(f"vmamba embed: skipped {name}: it cannot be decoded", file=sys.stderr)
    again = f", {report.resumed} of {report.parts} parts taken over" if report.resumed else ""
    print(f"wrote {report.images} vectors of {report.width} numbers to {target}{again}")
    return 1 if report.damaged else 0


def _vectors(model: VMamba, normalize: bool) -> Callable[[Tensor], Tensor]:
    from torch.nn import functional

    def vectors(images: Tensor) -> Tensor:
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        return functional.normalize(pooled.float(), dim=1) if normalize else pooled

    return vectors


def _progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {of} parts", end="\n" if done == of else "", file=sys.stderr, flush=True)
