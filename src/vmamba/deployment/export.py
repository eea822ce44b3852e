"""Export a model and prove it: what was written is run against the model before it gets its name."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vmamba import __version__
from vmamba.deployment.files import SUFFIXES, Description, ExportedModel, Format, load_exported
from vmamba.deployment.program import flat_outputs, keep_linear_whole, prepared, trace
from vmamba.deployment.quantize import Quantization, quantize

Precision = Literal["float32", "float16"]

# Largest relative difference (norm of the difference over the norm) from the model in PyTorch.
_BOUNDS: dict[Format, float] = {"onnx": 1e-4, "program": 1e-5, "aoti": 1e-5}
# Eight bits are 2⁻⁷ of the largest value in a block or tensor, layer after layer; more than this share is a mistake.
_QUANTIZED_BOUND = 0.25
_SIZES = ((1, 64, 64), (2, 224, 224), (1, 97, 161))


class ExportFailedError(RuntimeError):
    """What was exported disagrees with the model; no file was left behind."""


@dataclass(frozen=True)
class Difference:
    """How far the exported file is from the model on some images.

    Attributes:
        shape: Batch, height and width.
        relative: Largest norm of a difference over the norm of the model's output, among the outputs.
        seconds: Time of one run of the file.
    """

    shape: tuple[int, int, int]
    relative: float
    seconds: float


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        path: The file.
        megabytes: Its size, with that of the weights beside it.
        differences: The runs that prove it.
        bound: What `relative` may be at most.
    """

    path: Path
    megabytes: float
    differences: tuple[Difference, ...]
    bound: float

    @property
    def largest(self) -> float:
        """The largest relative difference."""
        return max(difference.relative for difference in self.differences)


def export(
    model: nn.Module,
    target: str | os.PathLike[str],
    description: Description,
    *,
    format: Format = "onnx",
    precision: Precision = "float32",
    quantization: Quantization = "none",
    device: str | torch.device = "cpu",
    photographs: Sequence[Image.Image] | None = None,
    img_size: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Export a model to a file and run that on photographs at three sizes against the model.

    Args:
        model: Maps images (B, C, H, W) to what `vmamba.deployment.program.Exportable` takes.
        target: File to write: `.onnx`, or `.pt2` for a program or a package.
        description: What the file is to say of itself; precision and the like are filled in.
        format: "onnx"; "program", of `torch.export`; "aoti", a package that AOTInductor compiles for this machine.
        precision: Of weights, images and outputs. The state of the scan is float32 in any case.
        quantization: Of the weights of an ONNX model in float32; see `vmamba.deployment.quantize`.
        device: What an AOTInductor package is compiled for.
        photographs: Images to prove the file on; by default two photographs that come with scikit-learn.
        img_size: Height and width to fix; None leaves both open.
        overwrite: Whether to replace an existing file.

    Raises:
        ValueError: The combination is not possible here; the message says what is.
        ExportFailedError: The file disagrees with the model.
    """
    target = Path(target).expanduser()
    _check(target, format, precision, quantization, device, overwrite)
    in_chans = int(getattr(model, "in_chans", 3))
    photographs = sample_photographs() if photographs is None else list(photographs)
    if not photographs:
        raise ValueError("an export is proven on images; give one at least")
    description = replace(
        description,
        dtype=precision,
        quantization=quantization,
        dynamic_size=img_size is None,
        vmamba_version=__version__,
    )
    place = torch.device(device) if format == "aoti" else torch.device("cpu")
    reference = prepared(model).to(place)
    shapes = _SIZES if img_size is None else tuple((batch, *img_size) for batch, _, _ in _SIZES)
    batches = [photograph_batch(photographs, shape, description, in_chans) for shape in shapes]
    expected = [_outputs(reference, images) for images in batches]
    subject = reference.model.half() if precision == "float16" else reference.model
    bound = _bound(format, quantization, precision, prepared(subject).to(place), batches, expected)
    count = len(expected[0])
    if len(description.outputs) != count:
        description = replace(description, outputs=tuple(f"output_{i}" for i in range(count)))
    with TemporaryDirectory(dir=target.parent, prefix=".vmamba-export-") as folder:
        draft = Path(folder) / target.name
        _write(subject, draft, description, format, quantization, in_chans, img_size)
        differences = verify(load_exported(draft, device=place), batches, expected)
        worst = max(differences, key=lambda difference: difference.relative)
        if not worst.relative <= bound:  # also where it is NaN
            raise ExportFailedError(
                f"the exported file differs from the model by {worst.relative:.1e} on images of "
                f"{worst.shape[1]}×{worst.shape[2]}, where {bound:.1e} is allowed; it was not kept"
            )
        written = sorted(Path(folder).iterdir())
        for path in written:
            os.replace(path, target.parent / path.name)
    megabytes = sum((target.parent / path.name).stat().st_size for path in written) / 1e6
    return ExportReport(target, megabytes, tuple(differences), bound)


def verify(
    exported: ExportedModel | Callable[[np.ndarray], list[np.ndarray]],
    batches: Sequence[Tensor],
    expected: Sequence[Sequence[Tensor]],
) -> list[Difference]:
    """Run an exported model on images and compare.

    Args:
        exported: The model.
        batches: Images, (B, C, H, W) each.
        expected: The outputs of the model in PyTorch for each of them.
    """
    differences = []
    for images, wanted in zip(batches, expected, strict=True):
        start = time.perf_counter()
        given = exported(images.numpy())
        seconds = time.perf_counter() - start
        errors = [_relative(torch.from_numpy(a), b) for a, b in zip(given, wanted, strict=True)]
        # max() would pass over a NaN that is not the first.
        relative = float(np.max(errors))
        differences.append(Difference((images.shape[0], images.shape[2], images.shape[3]), relative, seconds))
    return differences


def sample_photographs() -> list[Image.Image]:
    """Return the two photographs that come with scikit-learn: a temple, and a flower.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise ValueError("no images to prove the export on: pip install 'vmamba[export]', or name some") from None
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def photograph_batch(
    photographs: Sequence[Image.Image], shape: tuple[int, int, int], description: Description, in_chans: int = 3
) -> Tensor:
    """Resize photographs to a batch (B, C, H, W), normalised as the model wants it; they take turns to fill it."""
    count, height, width = shape
    mean = torch.tensor(description.preprocessing.get("mean", (0.485, 0.456, 0.406))).view(-1, 1, 1)
    std = torch.tensor(description.preprocessing.get("std", (0.229, 0.224, 0.225))).view(-1, 1, 1)
    images = []
    for index in range(count):
        resized = photographs[index % len(photographs)].convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255
        images.append((pixels - mean) / std)
    batch = torch.stack(images)
    return batch if in_chans == 3 else batch.mean(1, keepdim=True).expand(-1, in_chans, -1, -1).contiguous()


def sha256_of(path: Path) -> str:
    """Return the checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require_compiler() -> None:
    """Raise ValueError where there is no C++ compiler, which AOTInductor needs while it builds a package."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise ValueError(
            f"AOTInductor builds its package with a C++ compiler, and {' and '.join(names)} cannot be found: install "
            "one (Debian: apt install g++), name it in CXX, or export to 'program' or 'onnx', which need none"
        )


def _check(
    target: Path,
    format: Format,
    precision: Precision,
    quantization: Quantization,
    device: str | torch.device,
    overwrite: bool,
) -> None:
    if format not in SUFFIXES:
        raise ValueError(f"format must be one of {', '.join(SUFFIXES)}, not {format!r}")
    if target.suffix != SUFFIXES[format]:
        raise ValueError(f"{target} must end in {SUFFIXES[format]} for the format {format!r}")
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent} to write {target.name} to")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists already; overwrite it with --overwrite true")
    if quantization != "none" and (format != "onnx" or precision != "float32"):
        raise ValueError("quantised weights are for onnxruntime: --format onnx --precision float32")
    if format == "aoti":
        require_compiler()
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "a package for cuda is compiled and proven on a GPU, and there is none here; use device cpu"
            )


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    weight = next(model.parameters())
    with torch.inference_mode():
        return [output.float().cpu() for output in flat_outputs(model(images.to(weight.device, weight.dtype)))]


def _relative(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        raise ExportFailedError(f"the exported file gives {tuple(actual.shape)}, the model {tuple(expected.shape)}")
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def _bound(
    format: Format,
    quantization: Quantization,
    precision: Precision,
    rounded: nn.Module,
    batches: Sequence[Tensor],
    expected: Sequence[Sequence[Tensor]],
) -> float:
    """Say how far from the float32 model a file may be; in 16 bits, twice as far as the model in 16 bits is."""
    if quantization != "none":
        return _QUANTIZED_BOUND
    if precision == "float32":
        return _BOUNDS[format]
    differences = verify(
        lambda images: [t.numpy() for t in _outputs(rounded, torch.from_numpy(images))], batches, expected
    )
    return 2 * max(difference.relative for difference in differences)


def _write(
    model: nn.Module,
    draft: Path,
    description: Description,
    format: Format,
    quantization: Quantization,
    in_chans: int,
    img_size: tuple[int, int] | None,
) -> None:
    program = trace(model, in_chans, img_size)
    metadata = description.to_metadata()
    if format == "program":
        torch.export.save(program, str(draft), extra_files=dict(metadata))
    elif format == "aoti":
        settings: dict[str, Any] = {"aot_inductor.metadata": dict(metadata)}
        if img_size is None and next(model.parameters()).device.type == "cpu":
            keep_linear_whole(program)
            # It takes (B, H, W, C) for (B, C, H, W), and where sizes are open stores the residual stream in that order.
            settings["layout_optimization"] = False
        torch._inductor.aoti_compile_and_package(program, package_path=str(draft), inductor_configs=settings)
    else:
        from vmamba.deployment.onnx_model import save_onnx, to_onnx

        onnx_model = to_onnx(program, description.outputs, metadata, img_size is None)
        if quantization == "none":
            save_onnx(onnx_model, draft)
            return
        full = draft.with_name(f"full-{draft.name}")
        save_onnx(onnx_model, full)
        quantize(full, draft, quantization)
        full.unlink()
