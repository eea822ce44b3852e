"""Fitting the weights of a file to a model: the plan is made, and checked, before the model is touched."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.models.checkpoint_files import CheckpointError
from vmamba.models.checkpoint_layouts import OUTNORM, Architecture, by_pattern, describe, differences, infer_config
from vmamba.models.config import VMambaConfig, variant_name

CLASSIFIER = "classifier."


@dataclass(frozen=True)
class Checkpoint:
    """What a weight file holds, under the published names.

    Attributes:
        source: path, Hub id or address it was read from.
        state_dict: the weights, in the published layout.
        config: the model's configuration where the file tells it (ours, and the authors' training files), else None;
            `infer_config(state_dict)` reads it off the shapes.
        metadata: what `save_checkpoint` was given (labels, mean, std, ...); empty for other files.
        layout: the layout it had, in words.
        weights_key: the entry the weights were under, such as "model_ema"; None where they were at the top level.
        epoch: the training epoch, where the file tells it.
        extras: norms of the authors' detection backbone on its outputs, which a classifier has not.
        renamed: name in the file -> published name, where they differ.
        reshaped: published name -> "shape in the file -> shape here".
        skipped: what was left out, such as a detector's heads -> names in the file.
    """

    source: str
    state_dict: Mapping[str, Tensor]
    config: VMambaConfig | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    layout: str = "published layout"
    weights_key: str | None = None
    epoch: int | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    reshaped: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did; `str()` of it is meant for people.

    Attributes:
        source, layout, weights_key, epoch, renamed, reshaped: as in `Checkpoint`; position embeddings that were
            resized are among `reshaped`.
        matched: weights of the model that the file filled.
        skipped: what the file holds and the model did not take, by kind -> names.
        reset: weights that were initialised afresh (the classifier, when adapted).
        kept: weights the file lacks, which stay as the model had them.
    """

    source: str
    layout: str
    weights_key: str | None
    epoch: int | None
    matched: tuple[str, ...]
    renamed: Mapping[str, str]
    reshaped: Mapping[str, str]
    skipped: Mapping[str, tuple[str, ...]]
    reset: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f" from {self.weights_key!r}" if self.weights_key else ""
        epoch = f", epoch {self.epoch}" if self.epoch is not None else ""
        lines = [f"{self.source}: loaded {len(self.matched)} tensors{where} ({self.layout}{epoch})"]
        if self.renamed:
            lines.append(f"  renamed {len(self.renamed)} to the published names, e.g. {_example(self.renamed)}")
        if self.reshaped:
            name, change = next(iter(self.reshaped.items()))
            lines.append(f"  reshaped {len(self.reshaped)}, e.g. {name}: {change}")
        lines += [f"  skipped {len(names)}: {kind}" for kind, names in self.skipped.items()]
        if self.reset:
            lines.append(f"  initialised afresh: {', '.join(by_pattern(self.reset))}")
        if self.kept:
            lines.append(f"  not in the file, left as they were: {', '.join(by_pattern(self.kept))}")
        return "\n".join(lines)


def _example(renamed: Mapping[str, str]) -> str:
    old, new = next(iter(renamed.items()))
    return f"{old} -> {new}"


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile, DDP and averaging, whose names differ."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model


class Plan:
    """The weights a model will be given, worked out before it is touched."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.wanted: dict[str, Tensor] = model.state_dict()
        self.config = getattr(model, "config", None)
        self.given = dict(checkpoint.state_dict)
        self.given.update({name: t for name, t in checkpoint.extras.items() if name in self.wanted})
        self.reshaped = dict(checkpoint.reshaped)
        self.skipped = dict(checkpoint.skipped)
        self.reset: dict[str, Tensor] = {}
        if unused := tuple(name for name in checkpoint.extras if name not in self.wanted):
            self.skipped[OUTNORM] = unused
        # BatchNorm's step counter came late to torch, and older files lack it; it plays no part in the published norms.
        self.optional = {name for name in self.wanted if name.endswith("num_batches_tracked")}
        for name, tensor in self.given.items():
            target = self.wanted.get(name)
            if target is not None and target.shape != tensor.shape and _squeezed(target) == _squeezed(tensor):
                self._note(name, tensor, target.shape)
                self.given[name] = tensor.reshape(target.shape)
        self.tensors: dict[str, Tensor] = {}

    def _note(self, name: str, tensor: Tensor, shape: torch.Size) -> None:
        self.reshaped[name] = f"{tuple(tensor.shape)} -> {tuple(shape)}"

    def resize_position_embedding(self) -> None:
        """Bring the position embedding to the model's grid."""
        target, tensor = self.wanted.get("pos_embed"), self.given.get("pos_embed")
        if target is None or tensor is None or tensor.ndim != 4 or target.shape == tensor.shape:
            return
        if tensor.shape[:2] == target.shape[:2] and min(tensor.shape) > 0:
            resized = F.interpolate(
                tensor.float(), size=target.shape[2:], mode="bicubic", antialias=True, align_corners=False
            )
            self._note("pos_embed", tensor, target.shape)
            self.reshaped["pos_embed"] += " (resized, bicubic)"
            self.given["pos_embed"] = resized.to(tensor.dtype)

    def fit_backbone(self) -> None:
        """Into a model without any classifier, leave the file's out, and with it the demand for output norms."""
        classifier = tuple(name for name in self.given if name.startswith(CLASSIFIER))
        if classifier and not any(name.startswith(CLASSIFIER) for name in self.wanted):
            self._skip("the classifier, which this backbone has not", classifier)
            # A classification file never had the output norms: they start as the model made them, and are reported.
            self.optional |= {name for name in self.wanted if name.startswith("outnorm")}

    def adapt_classifier(self) -> None:
        """Leave the file's classifier out where it is of another size, and start the model's afresh."""
        head = [name for name in self.wanted if name.startswith(CLASSIFIER)]
        fits = all(name in self.given and self.given[name].shape == self.wanted[name].shape for name in head)
        left_over = tuple(name for name in self.given if name.startswith(CLASSIFIER) and name not in self.wanted)
        if left_over:
            self._skip("the part of the classifier that this model has not", left_over)
        if fits:
            return
        linear = [name for name in head if name.startswith(f"{CLASSIFIER}head.")]
        replaced = tuple(name for name in linear if name in self.given)
        if replaced:
            classes = self.given.get(f"{CLASSIFIER}head.weight", self.given[replaced[0]]).shape[0]
            self._skip(f"the head for {classes} classes", replaced)
        for name in head:
            if name in linear or name not in self.given:
                self.reset[name] = _fresh(name, self.wanted[name])

    def _skip(self, kind: str, names: tuple[str, ...]) -> None:
        self.skipped[kind] = names
        for name in names:
            del self.given[name]

    def check(self, strict: bool) -> None:
        """Settle `tensors`, in the model's dtypes; raise unless they fit."""
        here = self.checkpoint.source
        available = {**self.given, **self.reset}
        missing = [name for name in self.wanted if name not in available and name not in self.optional]
        unexpected = [name for name in self.given if name not in self.wanted]
        common = [name for name in self.wanted if name in available]
        other = [name for name in common if available[name].shape != self.wanted[name].shape]
        if other or (strict and (missing or unexpected)) or not common:
            raise CheckpointError(self._explain(missing, unexpected, other))
        if any(t.device.type == "meta" for t in self.wanted.values()):
            raise CheckpointError(
                f"cannot load '{here}': the model is on the meta device; call its to_empty(device=…) first"
            )
        for name in common:
            target, tensor = self.wanted[name], available[name]
            if target.is_floating_point() != tensor.is_floating_point():
                raise CheckpointError(f"'{here}' holds {tensor.dtype} in {name!r}, where the model has {target.dtype}")
            self.tensors[name] = tensor.to(target.dtype)
            if target.dtype != tensor.dtype and not bool(torch.isfinite(self.tensors[name]).all()):
                raise CheckpointError(
                    f"'{here}' holds values in {name!r} beyond the range of the model's {target.dtype}"
                )
        self.unexpected = tuple(unexpected)

    def _explain(self, missing: list[str], unexpected: list[str], other: list[str]) -> str:
        lines = [f"'{self.checkpoint.source}' does not fit: {self._diagnose()}"]
        for title, names in (("missing in the file", missing), ("not in the model", unexpected)):
            if names:
                lines += [f"  {title} ({len(names)}):", *(f"    {line}" for line in by_pattern(names))]
        if other:
            lines.append(f"  other shapes ({len(other)}):")
            lines += [f"    {line}" for line in by_pattern(other)]
            name = other[0]
            lines.append(
                f"    e.g. {name} is {tuple(self.given[name].shape)} in the file, "
                f"{tuple(self.wanted[name].shape)} in the model"
            )
        return "\n".join(lines)

    def _diagnose(self) -> str:
        tensors = self.checkpoint.state_dict
        try:
            file_config = self.checkpoint.config or infer_config(tensors)
            file = Architecture.of_state_dict(tensors)
        except CheckpointError as error:
            return f"it {error}"
        try:
            config = self.config if isinstance(self.config, VMambaConfig) else infer_config(self.wanted)
            model = Architecture.of_config(config)
        except CheckpointError:
            return f"this file is a {describe(file_config)}; the model is no VMamba"
        if file != model:
            sentence = f"this file is a {describe(file_config)}; the model is a {describe(config)}"
            both_named = variant_name(file_config) and variant_name(config)
            return sentence if both_named else f"{sentence} ({differences(file, model)})"
        theirs, ours = _classes(tensors), _classes(self.wanted)
        if theirs != ours:
            has = "is a backbone without a classifier" if theirs is None else f"has {theirs} classes"
            wants = "no head" if ours is None else f"{ours} classes"
            return (
                f"this file {has}; the model has {wants}. adapt_classifier=True keeps the backbone and initialises the "
                "model's head, if any, afresh"
            )
        return f"both are a {describe(config)}, but the file does not hold the same weights"

    def report(self) -> LoadReport:
        """Tell what the plan does."""
        checkpoint = self.checkpoint
        skipped = {**self.skipped, **({"not in the model": self.unexpected} if self.unexpected else {})}
        return LoadReport(
            source=checkpoint.source,
            layout=checkpoint.layout,
            weights_key=checkpoint.weights_key,
            epoch=checkpoint.epoch,
            matched=tuple(name for name in self.tensors if name not in self.reset),
            renamed=checkpoint.renamed,
            reshaped=self.reshaped,
            skipped=skipped,
            reset=tuple(self.reset),
            kept=tuple(name for name in self.wanted if name not in self.tensors),
        )


def _classes(tensors: Mapping[str, Tensor]) -> int | None:
    """Return the number of classes of a state dict, None without a head."""
    head = tensors.get(f"{CLASSIFIER}head.weight")
    return None if head is None else head.shape[0]


def _squeezed(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]


def _fresh(name: str, like: Tensor) -> Tensor:
    """Return a classifier's tensor as a new model has it: weights truncated normal (0.02), norms the identity."""
    value = torch.zeros(like.shape, dtype=torch.float32 if like.is_floating_point() else like.dtype)
    if name == f"{CLASSIFIER}head.weight":
        nn.init.trunc_normal_(value, std=0.02)
    elif name.endswith(("norm.weight", "running_var")):
        value.fill_(1)
    return value
