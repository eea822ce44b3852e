"""`vmamba demo`: a web page that shows what the model sees."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from vmamba.cli.arguments import parse
from vmamba.cli.ending import leaving_on_sigterm

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from vmamba.cli.opening import OpenedModel
    from vmamba.deployment.demo import Looker


@dataclass(frozen=True)
class DemoOptions:
    """Open a web page: drop an image, see its classes, what a pixel looks at, and how far the model sees.

    Args:
        checkpoint: Weights file, run folder, Hugging Face Hub id or name of a published variant; by default the
            newest run below runs/.
        host: Address to listen at; by default only this machine can ask.
        port: Port to listen at.
        stage: Whose last block the activation map is of, from 0; by default the last but one.
        img_size: Side of the images in pixels; by default as in training.
        device: cpu, cuda, or auto for the best there is.
    """

    checkpoint: str | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    stage: int | None = None
    img_size: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be from 0 to 65535, not {self.port}")


def run(argv: Sequence[str]) -> int:
    """Serve the page until interrupted."""
    options = parse("demo", DemoOptions, argv, positionals=[("checkpoint", "?")])
    from vmamba.cli.opening import open_model
    from vmamba.deployment.demo import launch, make_page

    opened = open_model(options.checkpoint, options.device, options.img_size)
    looker = make_looker(opened, options.stage)
    with leaving_on_sigterm("demo"), TemporaryDirectory(prefix="vmamba-demo-") as folder:
        page = make_page(looker, write_examples(Path(folder), opened.preprocessing.img_size))
        launch(page, options.host, options.port)
    return 0


def make_looker(opened: OpenedModel, stage: int | None) -> Looker:
    """Bring a model and the analyses of `vmamba.analysis` together for the page.

    Raises:
        ValueError: There is no such stage.
    """
    import torch

    from vmamba.analysis.attention_maps import attention_map, query_position, record_scan
    from vmamba.analysis.effective_receptive_field import effective_receptive_field
    from vmamba.deployment.demo import Looker
    from vmamba.deployment.predictor import default_labels
    from vmamba.models.config import variant_name

    model, transform = opened.model, opened.preprocessing.transform()
    depths = model.config.depths
    chosen = max(len(depths) - 2, 0) if stage is None else stage
    if not 0 <= chosen < len(depths):
        raise ValueError(f"--stage must be from 0 to {len(depths) - 1}, not {stage}")
    labels = opened.labels or default_labels(model.config.num_classes)

    def tensor(picture: Image.Image) -> Tensor:
        return transform(picture)[None].to(opened.device)

    def classify(picture: Image.Image) -> dict[str, float]:
        with torch.inference_mode():
            shares = model(tensor(picture)).float().softmax(1)[0].cpu()
        best = shares.topk(min(5, len(shares)))
        return {labels[i]: value for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)}

    def view(picture: Image.Image) -> Image.Image:
        return _picture_of(tensor(picture)[0].cpu(), opened)

    def activation(picture: Image.Image, pixel: tuple[int, int]) -> np.ndarray:
        images = tensor(picture)
        record = record_scan(model, images, chosen, depths[chosen] - 1)
        query = torch.tensor([query_position(record, pixel, (images.shape[2], images.shape[3]))], device=opened.device)
        row = attention_map(record, queries=query, normalization="absolute", reduction="absolute")
        values: np.ndarray = row.view(record.height, record.width).float().cpu().numpy()
        return values

    def receptive_field(picture: Image.Image) -> np.ndarray:
        values: np.ndarray = effective_receptive_field(model, [tensor(picture)]).contribution.numpy()
        return values

    name = variant_name(model.config) or "vmamba"
    return Looker(name, classify, view, activation, receptive_field)


def _picture_of(values: Tensor, opened: OpenedModel) -> Image.Image:
    """Undo the normalisation."""
    import torch
    from PIL import Image

    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (opened.preprocessing.mean, opened.preprocessing.std))
    pixels = ((values * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def write_examples(folder: Path, img_size: int) -> list[Path]:
    """Write example images: photographs, or digits for models of small images; none without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        print("vmamba demo: no example images without scikit-learn: pip install 'vmamba[demo]'", file=sys.stderr)
        return []
    from PIL import Image

    from vmamba.deployment.export import sample_photographs

    if img_size > 64:
        pictures = {f"photograph-{i}": picture for i, picture in enumerate(sample_photographs())}
    else:
        digits = load_digits().images[[0, 3, 7, 8]]
        pictures = {
            f"digit-{i}": Image.fromarray((digit * (255 / 16)).astype("uint8")).resize(
                (96, 96), Image.Resampling.BICUBIC
            )
            for i, digit in enumerate(digits)
        }
    paths = [folder / f"{name}.png" for name in pictures]
    for path, picture in zip(paths, pictures.values(), strict=True):
        picture.save(path)
    return paths
