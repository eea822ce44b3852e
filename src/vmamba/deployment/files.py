"""Exported models as they lie on disk: what they say of themselves, and running them."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Format = Literal["onnx", "program", "aoti"]
Task = Literal["classification", "features", "segmentation"]
SUFFIXES: Mapping[Format, str] = {"onnx": ".onnx", "program": ".pt2", "aoti": ".pt2"}
_KEY = "vmamba"


@dataclass(frozen=True)
class Description:
    """What an exported file says of itself.

    Attributes:
        model: Name of the variant or of the weights' source.
        task: What the outputs are: logits of classes, feature maps, or logits of classes for each position.
        outputs: Their names.
        labels: Class names, empty where none were stored.
        preprocessing: How to bring an image into shape: img_size, mean, std, interpolation, crop_pct, crop_mode.
        source: The weights it was made from.
        source_sha256: Checksum of that file; empty for weights that came from no file.
        dtype: Of images and outputs: float32 or float16.
        quantization: What was done to the weights.
        dynamic_size: Whether height and width are open.
        vmamba_version: The package that wrote the file.
    """

    model: str
    task: Task = "classification"
    outputs: tuple[str, ...] = ("logits",)
    labels: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    source_sha256: str = ""
    dtype: str = "float32"
    quantization: str = "none"
    dynamic_size: bool = True
    vmamba_version: str = ""

    def to_metadata(self) -> dict[str, str]:
        """Return what is stored in the file: one entry of JSON."""
        return {_KEY: json.dumps(asdict(self), ensure_ascii=False)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Path) -> Description:
        """Read what `to_metadata` gave.

        Raises:
            ValueError: The file was not written by `vmamba export`.
        """
        if _KEY not in metadata:
            raise ValueError(f"{path} was not written by `vmamba export`: it does not say what it holds")
        values = json.loads(metadata[_KEY])
        known = {entry.name: values[entry.name] for entry in fields(cls) if entry.name in values}
        for name in ("outputs", "labels"):
            known[name] = tuple(known.get(name, ()))
        return cls(**known)


@dataclass(frozen=True)
class ExportedModel:
    """An exported model, ready to run.

    Attributes:
        path: The file.
        format: What kind of file.
        description: What it says of itself.
        run: Maps images (B, C, H, W), float32, to the outputs, float32.
    """

    path: Path
    format: Format
    description: Description
    run: Callable[[np.ndarray], list[np.ndarray]]

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """Run the model."""
        return self.run(images)


def format_of(path: Path) -> Format:
    """Tell what kind of file an exported model is.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".onnx":
        return "onnx"
    if path.suffix != ".pt2":
        raise ValueError(f"{path} is no exported model: those end in .onnx or .pt2")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no exported model, or is truncated or corrupt: a .pt2 file is a ZIP archive")
    with zipfile.ZipFile(path) as archive:
        return "aoti" if any("aotinductor" in name for name in archive.namelist()) else "program"


def load_exported(
    path: str | os.PathLike[str], threads: int | None = None, device: str | torch.device = "cpu"
) -> ExportedModel:
    """Open a file that `vmamba export` wrote.

    Args:
        path: The file.
        threads: Of onnxruntime; None lets it choose.
        device: Where a program or package runs; a package runs where it was compiled for.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not one of these, or damaged.
    """
    path = Path(path).expanduser()
    kind = format_of(path)
    try:
        if kind == "onnx":
            description, run = _open_onnx(path, threads)
        else:
            description, run = (_open_aoti if kind == "aoti" else _open_program)(path, torch.device(device))
    except (RuntimeError, zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{path} cannot be opened: {str(error).splitlines()[0]}") from error
    return ExportedModel(path, kind, description, run)


def _open_onnx(path: Path, threads: int | None) -> tuple[Description, Callable[[np.ndarray], list[np.ndarray]]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds share no base but this
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be opened by onnxruntime: {reason}") from error
    description = Description.from_metadata(session.get_modelmeta().custom_metadata_map, path)
    (given,) = session.get_inputs()
    kind = np.float16 if given.type == "tensor(float16)" else np.float32

    def run(images: np.ndarray) -> list[np.ndarray]:
        outputs: Sequence[np.ndarray] = session.run(None, {given.name: np.ascontiguousarray(images, dtype=kind)})
        return [output.astype(np.float32, copy=False) for output in outputs]

    return description, run


def _open_program(path: Path, device: torch.device) -> tuple[Description, Callable[[np.ndarray], list[np.ndarray]]]:
    import vmamba.ops  # noqa: F401  (registers the operator that the program calls)

    extra = {_KEY: ""}
    program = torch.export.load(str(path), extra_files=extra)
    description = Description.from_metadata({k: v for k, v in extra.items() if v}, path)
    return description, _tensor_runner(program.module().to(device), description, device)


def _open_aoti(path: Path, device: torch.device) -> tuple[Description, Callable[[np.ndarray], list[np.ndarray]]]:
    import vmamba.ops  # noqa: F401  (as above)

    package = torch._inductor.aoti_load_package(str(path))
    description = Description.from_metadata(package.loader.get_metadata(), path)
    return description, _tensor_runner(package, description, device)


def _tensor_runner(
    call: Callable[[Tensor], Sequence[Tensor]], description: Description, device: torch.device
) -> Callable[[np.ndarray], list[np.ndarray]]:
    dtype = torch.float16 if description.dtype == "float16" else torch.float32

    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            outputs = call(torch.from_numpy(np.ascontiguousarray(images)).to(device, dtype))
        return [output.float().cpu().numpy() for output in outputs]

    return run
