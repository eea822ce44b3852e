"""The demo page: drop an image, see its classes, what a pixel looks at, and how far the model sees."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# What the page draws is as large as this on its shorter side, however small the model's images are.
_SHOWN = 448

_CSS = """
.gradio-container { max-width: 1080px !important; margin: auto; }
@media (max-width: 600px) {
  .gradio-container { padding: 8px !important; }
  .pictures { flex-direction: column !important; }
  .pictures > * { width: 100% !important; }
}
"""

_INTRODUCTION = """# VMamba: what the model sees
Drop an image, or pick one below. Then click into **What the model saw** to see what that pixel looks at."""


@dataclass(frozen=True)
class Looker:
    """What the page shows of a model.

    Attributes:
        name: Of the model.
        classify: Maps a picture to labels and confidences, most probable first.
        view: Maps a picture to what the model sees of it: cut and resized.
        activation: Maps a picture and a pixel (row, column) of its view to how much the pixel looks at every place,
            (h, w), not negative.
        receptive_field: Maps a picture to the effective receptive field of its centre, (H, W), not negative.
    """

    name: str
    classify: Callable[[Image.Image], dict[str, float]]
    view: Callable[[Image.Image], Image.Image]
    activation: Callable[[Image.Image, tuple[int, int]], np.ndarray]
    receptive_field: Callable[[Image.Image], np.ndarray]


def heat(values: np.ndarray, over: Image.Image | None = None, mark: tuple[int, int] | None = None) -> Image.Image:
    """Draw values as colours, alone or over a picture.

    Args:
        values: (h, w), not negative; scaled to its largest.
        over: The picture, whose size the result has.
        mark: A pixel (row, column) of the picture to ring.
    """
    from matplotlib import colormaps

    top = float(values.max())
    shares = values / top if top > 0 else np.zeros_like(values)
    colours = (colormaps["inferno"](shares)[..., :3] * 255).astype(np.uint8)
    if over is None:
        return Image.fromarray(colours)
    small = Image.fromarray((shares * 255).astype(np.uint8))
    weight = np.asarray(small.resize(over.size, Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255
    shades = np.asarray(Image.fromarray(colours).resize(over.size, Image.Resampling.BICUBIC), dtype=np.float32)
    # Dark places stay the picture's; the brightest are the map's for the most part.
    strength = 0.25 + 0.55 * weight
    grey = np.asarray(over.convert("L").convert("RGB"), dtype=np.float32)
    drawn = Image.fromarray((grey * (1 - strength) + shades * strength).astype(np.uint8))
    if mark is not None:
        from PIL import ImageDraw

        row, column = mark
        radius = max(3, over.size[0] // 50)
        box = (column - radius, row - radius, column + radius, row + radius)
        ImageDraw.Draw(drawn).ellipse(box, outline="cyan", width=max(2, radius // 3))
    return drawn


def enlarged(picture: Image.Image) -> Image.Image:
    """Bring a picture to the size it is shown in."""
    factor = _SHOWN / min(picture.size)
    size = (round(picture.width * factor), round(picture.height * factor))
    kind = Image.Resampling.NEAREST if factor > 3 else Image.Resampling.BICUBIC
    return picture.resize(size, kind)


def make_page(looker: Looker, examples: Sequence[str | Path] = ()) -> Any:
    """Build the page, a `gradio.Blocks`.

    Args:
        looker: The model.
        examples: Image files to offer.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    def look(picture: Image.Image | None) -> tuple[Any, ...]:
        if picture is None:
            return None, None, None, None
        picture = picture.convert("RGB")
        seen = looker.view(picture)
        middle = (seen.height // 2, seen.width // 2)
        shown = enlarged(seen)
        field = heat(np.log1p(_scaled(looker.receptive_field(picture))))
        return looker.classify(picture), shown, _map(picture, middle, seen, shown), enlarged(field)

    def click(picture: Image.Image | None, event: gradio.SelectData) -> Any:
        if picture is None:
            return None
        picture = picture.convert("RGB")
        seen = looker.view(picture)
        shown = enlarged(seen)
        column, row = event.index
        pixel = (
            min(int(row * seen.height / shown.height), seen.height - 1),
            min(int(column * seen.width / shown.width), seen.width - 1),
        )
        return _map(picture, pixel, seen, shown)

    # The annotation above is text here, and gradio looks for the class itself.
    click.__annotations__["event"] = gradio.SelectData

    def _map(picture: Image.Image, pixel: tuple[int, int], seen: Image.Image, shown: Image.Image) -> Image.Image:
        row, column = ((p + 0.5) * s / v for p, s, v in zip(pixel, shown.size[::-1], seen.size[::-1], strict=True))
        return heat(looker.activation(picture, pixel), shown, (round(row), round(column)))

    with gradio.Blocks(title=f"VMamba · {looker.name}", analytics_enabled=False) as page:
        gradio.Markdown(_INTRODUCTION)
        with gradio.Row(elem_classes="pictures"):
            with gradio.Column(min_width=280):
                given = gradio.Image(type="pil", label="Image", sources=["upload", "clipboard"], elem_id="given")
                if examples:
                    gradio.Examples([[str(path)] for path in examples], inputs=given, label="Examples")
            with gradio.Column(min_width=280):
                classes = gradio.Label(num_top_classes=5, label=f"{looker.name} says", elem_id="classes")
        with gradio.Row(elem_classes="pictures"):
            settings: dict[str, Any] = {"type": "pil", "interactive": False, "buttons": ["download", "fullscreen"]}
            view = gradio.Image(label="What the model saw (click)", elem_id="view", **settings)
            activation = gradio.Image(label="What the ringed pixel looks at", elem_id="activation", **settings)
            field = gradio.Image(label="How far the centre sees", elem_id="field", **settings)
        given.change(look, given, [classes, view, activation, field], show_progress="minimal")
        view.select(click, given, activation, show_progress="minimal")
    return page


def _scaled(values: np.ndarray) -> np.ndarray:
    """Scale contributions so that their logarithm spreads over the colours, as the paper's figures do."""
    top = float(values.max())
    return values / top * 1000 if top > 0 else values


def launch(page: Any, host: str, port: int, *, block: bool = True) -> str:
    """Serve the page and return its address; with `block`, until interrupted.

    Raises:
        ValueError: The port cannot be had.
    """
    import gradio

    theme = gradio.themes.Default(
        font=["system-ui", "sans-serif"],  # nothing is asked of other servers
        font_mono=["ui-monospace", "monospace"],
    )
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port or None,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            theme=theme,
            css=_CSS,
        )
    except OSError as error:
        raise ValueError(f"cannot listen at {host}:{port}: {error}; choose another --host or --port") from None
    print(f"the page is at {address}", flush=True)
    if block:
        # Not gradio's own block_thread, which takes Ctrl-C for success.
        try:
            while True:
                time.sleep(60)
        finally:
            page.close(verbose=False)
    return str(address)
