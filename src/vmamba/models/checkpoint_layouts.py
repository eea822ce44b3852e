"""The layouts VMamba weights have been published in, brought to one; and what the shapes tell of the architecture."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vmamba.models.checkpoint_files import CheckpointError
from vmamba.models.config import VMambaConfig, get_config, list_models, variant_name

EMA_KEYS = ("model_ema", "state_dict_ema")
WEIGHT_KEYS = ("model", "state_dict")
_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.")  # DDP, torch.compile, trainers, mm detectors

_RENAMES = (
    (re.compile(r"^patch_embed\.proj\."), "patch_embed.0."),
    (re.compile(r"^patch_embed\.norm\."), "patch_embed.2."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.ln_1\."), r"\1.norm."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.self_attention\."), r"\1.op."),
    (re.compile(r"^norm\."), "classifier.norm."),
    (re.compile(r"^head\."), "classifier.head."),
)
_LINEAR = re.compile(r"\.(in_proj|out_proj|fc1|fc2|reduction|head)\.weight$")
_OUTNORM = re.compile(r"^outnorm\d+\.")
OUTNORM = "norms the authors' detection backbone puts on its outputs (outnorm)"


@dataclass
class Layout:
    """A state dict under the published names, and how it got there.

    Attributes:
        tensors: the weights under the published names, in the published shapes.
        extras: tensors of the detection backbone's output norms (`outnorm0.weight`, ...), which no classifier has.
        renamed: name in the file -> published name, where they differ (prefixes of wrappers aside).
        reshaped: published name -> "shape in the file -> published shape".
        skipped: what was left out -> the names in the file.
        prefix: the wrapper's prefix that all names bore, such as "backbone.".
    """

    tensors: dict[str, Tensor]
    extras: dict[str, Tensor] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    reshaped: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, tuple[str, ...]] = field(default_factory=dict)
    prefix: str = ""

    @property
    def description(self) -> str:
        """Name the layout in words."""
        base = "older published layout" if self.renamed or self.reshaped else "published layout"
        return f"{base} under {self.prefix!r}" if self.prefix else base


def select_weights(content: Any, prefer_ema: bool) -> tuple[dict[str, Tensor], str | None]:
    """Find the state dict in what a file holds.

    Returns:
        the tensors by name, and the key they were under (None for a bare state dict).

    Raises:
        CheckpointError: there is none; says what there is instead. The caller adds the path.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"holds a {type(content).__name__} where a dict of tensors was expected")
    entries = dict(dict.items(content))  # a pickle may shadow .items() with an attribute
    order = (*EMA_KEYS, *WEIGHT_KEYS) if prefer_ema else (*WEIGHT_KEYS, *EMA_KEYS)
    for key in order:
        if isinstance(entries.get(key), dict) and (tensors := _tensors_of(entries[key])):
            return tensors, key
    if tensors := _tensors_of(entries):
        return tensors, None
    names = ", ".join(map(repr, list(entries)[:8])) or "nothing"
    raise CheckpointError(f"holds no weights under {', '.join(map(repr, order))} or at its top level; it holds {names}")


def _tensors_of(entries: Mapping[Any, Any]) -> dict[str, Tensor]:
    pairs = dict.items(entries) if isinstance(entries, dict) else entries.items()
    return {name: value.detach() for name, value in pairs if isinstance(name, str) and isinstance(value, Tensor)}


def to_published(tensors: Mapping[str, Tensor]) -> Layout:
    """Bring a state dict of any known layout to the published names and shapes.

    Args:
        tensors: a state dict, perhaps inside a wrapper or a detector, perhaps of an older layout.

    Raises:
        CheckpointError: two names in the file stand for the same weight, or a weight cannot have the shape it has.
    """
    layout = Layout({})
    inner = _unwrap(dict(tensors), layout)
    for old, tensor in inner.items():
        if _OUTNORM.match(old):
            layout.extras[old] = tensor
            continue
        new = old
        for pattern, replacement in _RENAMES:
            new = pattern.sub(replacement, new)
        if new in layout.tensors:
            raise CheckpointError(f"holds both {new!r} and its older name {old!r}; one of them has to go")
        if new != old:
            layout.renamed[old] = new
        if tensor.ndim == 4 and _LINEAR.search(new) and tensor.shape[2:] == (1, 1):
            layout.reshaped[new] = f"{_shape(tensor)} -> {_shape(tensor[:, :, 0, 0])}"
            tensor = tensor[:, :, 0, 0]
        layout.tensors[new] = tensor
    for prefix in sorted({name[: -len("Ds")] for name in layout.tensors if name.endswith(".op.Ds")}):
        _gather_routes(layout, prefix)
    return layout


def _unwrap(tensors: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Take off the prefixes of wrappers; beside a `backbone.`, whatever is not of it is a head, skipped by name."""
    while True:
        for wrapper in _WRAPPERS:
            inside = {name[len(wrapper) :]: value for name, value in tensors.items() if name.startswith(wrapper)}
            if inside and (len(inside) == len(tensors) or wrapper == "backbone."):
                for name in tensors:
                    if not name.startswith(wrapper):
                        part = name.split(".")[0]
                        layout.skipped[part] = (*layout.skipped.get(part, ()), layout.prefix + name)
                layout.prefix += wrapper
                tensors = inside
                break
        else:
            return tensors


def _gather_routes(layout: Layout, prefix: str) -> None:
    """Bring one block's per-route weights to x_proj_weight (K, R+2N, E), dt_projs_* (K, E, …), A_logs (K·E, N), Ds."""
    tensors = layout.tensors
    out_proj = tensors.get(f"{prefix}out_proj.weight")
    has_rank = any(name.startswith(f"{prefix}dt_projs") and "weight" in name for name in tensors)
    if out_proj is None or out_proj.ndim != 2 or not has_rank:  # Mamba-2 has no Δ rank; shapes are compared as they are
        return
    E = out_proj.shape[1]
    K = tensors[f"{prefix}Ds"].numel() // max(E, 1)
    if K == 0:
        return
    for old, new in (
        ("x_proj.weight", "x_proj_weight"),
        ("dt_projs.weight", "dt_projs_weight"),
        ("dt_projs.bias", "dt_projs_bias"),
    ):
        module, _, kind = old.partition(".")
        routes = [f"{prefix}{module}.{k}.{kind}" for k in range(K)]
        sources = routes if all(name in tensors for name in routes) else [f"{prefix}{old}"]
        if not all(name in tensors for name in sources) or f"{prefix}{new}" in tensors:
            continue
        parts = [tensors.pop(name) for name in sources]
        if len({part.shape for part in parts}) > 1:
            raise CheckpointError(f"the routes of {prefix}{module} have different shapes: {[*map(_shape, parts)]}")
        tensors[f"{prefix}{new}"] = torch.stack(parts) if sources is routes else parts[0]
        in_file = {now: before for before, now in layout.renamed.items()}
        layout.renamed.update({in_file.get(name, name): f"{prefix}{new}" for name in sources})
    wanted = {
        "x_proj_weight": (K, -1, E),
        "dt_projs_weight": (K, E, -1),
        "dt_projs_bias": (K, E),
        "A_logs": (K * E, -1),
        "Ds": (K * E,),
    }
    for name, shape in wanted.items():
        tensor = tensors.get(key := prefix + name)
        fixed = math.prod(size for size in shape if size > 0)
        if (
            tensor is None
            or tensor.numel() == 0
            or tensor.numel() % fixed
            or (-1 not in shape and tensor.numel() != fixed)
        ):
            continue
        if (reshaped := tensor.reshape(shape)).shape != tensor.shape:
            layout.reshaped[key] = f"{_shape(tensor)} -> {_shape(reshaped)}"
            tensors[key] = reshaped


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


@dataclass(frozen=True)
class Architecture:
    """What the names and shapes of a state dict tell; two equal ones take each other's weights."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    in_chans: int
    stem: str
    patch_size: int
    patch_norm: bool
    downsample: str
    batch_norm: bool
    pos_embed: bool
    d_state: int
    ranks: tuple[int, ...]
    inner: tuple[int, ...]
    gated: bool
    d_conv: int
    conv_bias: bool
    out_norm: str
    mlp: tuple[int, ...]
    gated_mlp: bool

    @classmethod
    def of_config(cls, config: VMambaConfig) -> "Architecture":
        """Return what a model of this configuration would show in its state dict."""
        dims = config.stage_dims
        used = [dim for dim, depth in zip(dims, config.depths, strict=True) if depth]
        ssm, mlp = bool(config.ssm_ratio and used), bool(config.mlp_ratio and used)
        return cls(
            depths=config.depths,
            dims=dims,
            in_chans=config.in_chans,
            stem=config.stem,
            patch_size=config.patch_size,
            patch_norm=config.patch_norm,
            downsample=config.downsample if len(dims) > 1 else "none",
            batch_norm=config.norm_layer == "bn",
            pos_embed=config.pos_embed,
            d_state=config.d_state if ssm else 0,
            ranks=tuple(config.rank(dim) for dim in used) if ssm else (),
            inner=tuple(config.d_inner(dim) for dim in used) if ssm else (),
            gated=ssm and config.gated,
            d_conv=config.d_conv if ssm else 0,
            conv_bias=ssm and bool(config.d_conv) and config.conv_bias,
            out_norm=_VISIBLE_NORMS.get(config.out_norm, "none") if ssm else "none",
            mlp=tuple(int(config.mlp_ratio * dim) for dim in used) if mlp else (),
            gated_mlp=mlp and config.gated_mlp,
        )

    @classmethod
    def of_state_dict(cls, tensors: Mapping[str, Tensor]) -> "Architecture":
        """Read the architecture off a state dict under the published names.

        Raises:
            CheckpointError: these are not the weights of a VMamba, or of a kind this package does not have.
        """
        return _Reader(tensors).read()


_VISIBLE_NORMS = {"norm": "norm", "dwconv3": "dwconv3", "cnorm": "cnorm"}


class _Reader:
    """Reads an `Architecture` off a state dict, one part at a time."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.depths = self._depths()
        self.first_blocks = [f"layers.{i}.blocks.0." for i, depth in enumerate(self.depths) if depth]

    def _size(self, name: str, axis: int) -> int:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"is not a VMamba this package knows: it has no {name!r}")
        if tensor.ndim <= axis:
            raise CheckpointError(f"is not a VMamba this package knows: {name!r} has shape {_shape(tensor)}")
        return tensor.shape[axis]

    def _depths(self) -> tuple[int, ...]:
        blocks = [m.groups() for name in self.tensors if (m := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name))]
        downs = [int(m[1]) + 2 for name in self.tensors if (m := re.match(r"layers\.(\d+)\.downsample\.", name))]
        if not blocks:
            raise CheckpointError("holds no weights of a VMamba: none of its names is layers.0.blocks.0....")
        stages = max([int(i) + 1 for i, _ in blocks] + downs)
        found = {(int(i), int(j)) for i, j in blocks}
        depths = tuple(max((j + 1 for i, j in found if i == stage), default=0) for stage in range(stages))
        if gaps := [(i, j) for i, depth in enumerate(depths) for j in range(depth) if (i, j) not in found]:
            raise CheckpointError(f"lacks block layers.{gaps[0][0]}.blocks.{gaps[0][1]} in the middle of a stage")
        return depths

    def read(self) -> Architecture:
        names = self.tensors
        ssm = any(".op." in name for name in names)
        mlp = any(".mlp." in name for name in names)
        if ssm and f"{self.first_blocks[0]}op.dt_projs_weight" not in names:
            kind = "a Mamba-2 (m0) model" if f"{self.first_blocks[0]}op.Ds" in names else "no VMamba"
            raise CheckpointError(
                f"is {kind}: its blocks have no dt_projs_weight; this package has the S6 models alone"
            )
        stem, patch_size, width = self._stem()
        downsample, dims = self._stages(width)
        op = [f"{block}op." for block in self.first_blocks] if ssm else []
        hidden = tuple(self._size(f"{block}mlp.fc2.weight", 1) for block in self.first_blocks) if mlp else ()
        inner = tuple(self._size(f"{prefix}out_proj.weight", 1) for prefix in op)
        d_conv = self._size(f"{op[0]}conv2d.weight", 3) if ssm and f"{op[0]}conv2d.weight" in names else 0
        return Architecture(
            depths=self.depths,
            dims=dims,
            in_chans=self._size("patch_embed.0.weight", 1),
            stem=stem,
            patch_size=patch_size,
            patch_norm="patch_embed.2.weight" in names,
            downsample=downsample,
            batch_norm=any(name.endswith(".running_mean") for name in names),
            pos_embed="pos_embed" in names,
            d_state=self._size(f"{op[0]}A_logs", 1) if ssm else 0,
            ranks=tuple(self._size(f"{prefix}dt_projs_weight", 2) for prefix in op),
            inner=inner,
            gated=ssm and self._size(f"{op[0]}in_proj.weight", 0) == 2 * inner[0],
            d_conv=d_conv,
            conv_bias=ssm and f"{op[0]}conv2d.bias" in names,
            out_norm=self._out_norm(op[0]) if ssm else "none",
            mlp=hidden,
            gated_mlp=mlp and self._size(f"{self.first_blocks[0]}mlp.fc1.weight", 0) == 2 * hidden[0],
        )

    def _stem(self) -> tuple[str, int, int]:
        if "patch_embed.5.weight" in self.tensors:
            stride = self._size("patch_embed.0.weight", 3) - 1  # of each of the two convolutions
            return "overlap", 2 * stride, self._size("patch_embed.5.weight", 0)
        return "patch", self._size("patch_embed.0.weight", 3), self._size("patch_embed.0.weight", 0)

    def _stages(self, width: int) -> tuple[str, tuple[int, ...]]:
        kind, dims = "none", [width]
        for i in range(len(self.depths) - 1):
            if f"layers.{i}.downsample.reduction.weight" in self.tensors:
                kind = "patch_merging"
                dims.append(self._size(f"layers.{i}.downsample.reduction.weight", 0))
            elif f"layers.{i}.downsample.1.weight" in self.tensors:
                kind = {2: "conv2x2", 3: "conv3x3"}.get(self._size(f"layers.{i}.downsample.1.weight", 3), "unknown")
                dims.append(self._size(f"layers.{i}.downsample.1.weight", 0))
            elif self.depths[i + 1]:
                block = f"layers.{i + 1}.blocks.0."
                name = next((n for n in (f"{block}norm.weight", f"{block}norm2.weight") if n in self.tensors), "")
                dims.append(self._size(name or f"{block}norm.weight", 0))
            else:
                dims.append(dims[-1])
        return kind, tuple(dims)

    def _out_norm(self, op: str) -> str:
        weights = [
            value for name, value in self.tensors.items() if re.match(rf"{re.escape(op)}out_norm\b.*weight$", name)
        ]
        convolved = any(weight.ndim == 4 for weight in weights)
        scaled = any(weight.ndim == 1 for weight in weights)
        return {(True, True): "cnorm", (True, False): "dwconv3", (False, True): "norm"}.get((convolved, scaled), "none")


def infer_config(tensors: Mapping[str, Tensor]) -> VMambaConfig:
    """Read a model's configuration off its weights' names and shapes.

    Where a named variant has this architecture, its configuration is returned (with the file's number of classes); of
    several, the one nearest to the main models, not an ablation of its routes or activations. Otherwise what shapes
    cannot tell takes VMambaConfig's default: activations (SiLU, GELU), routes (cross2d), the gate's and the output's
    activation, pre-norm, "ln2d" for either layer norm. Of the three out-norms without weights, "none" is taken.

    Args:
        tensors: a state dict in any layout `read_checkpoint` reads.

    Raises:
        CheckpointError: these are not the weights of a VMamba, or one that no VMambaConfig describes.
    """
    published = to_published(tensors).tensors
    seen = Architecture.of_state_dict(published)
    head = published.get("classifier.head.weight")
    found: dict[str, Any] = {"num_classes": 0 if head is None else head.shape[0]}
    if seen.pos_embed:
        height, width = (size * seen.patch_size for size in published["pos_embed"].shape[-2:])
        found["img_size"] = height if height == width else (height, width)
    if named := [config for config, architecture in _named() if architecture == seen]:
        return min(named, key=_oddity).replace(**found)
    try:
        config = _assemble(seen, found)
    except ValueError as error:
        raise CheckpointError(f"has an architecture this package does not have: {error}") from error
    if (built := Architecture.of_config(config)) != seen:
        raise CheckpointError(f"has an architecture no VMambaConfig describes: {differences(seen, built, 'one')}")
    return config


@lru_cache(maxsize=1)
def _named() -> tuple[tuple[VMambaConfig, Architecture], ...]:
    configs = [get_config(name) for name in list_models(published=True)]
    return tuple((config, Architecture.of_config(config)) for config in configs)


def _oddity(config: VMambaConfig) -> int:
    """Count the choices no shape shows that are not the usual ones: ablations share shapes with the main models."""
    unseen = ("routes", "ssm_act", "mlp_act", "gate_act", "out_act", "post_norm", "sequential_routes", "ssm_init")
    return sum(getattr(config, name) != getattr(VMambaConfig, name) for name in unseen)


def _assemble(seen: Architecture, found: Mapping[str, Any]) -> VMambaConfig:
    used = [dim for dim, depth in zip(seen.dims, seen.depths, strict=True) if depth]
    automatic = seen.ranks == tuple(-(-dim // 16) for dim in used) or not seen.ranks
    direct = ("depths", "dims", "in_chans", "stem", "patch_size", "patch_norm", "downsample", "pos_embed")
    values: dict[str, Any] = {name: getattr(seen, name) for name in direct}
    values |= {name: getattr(seen, name) for name in ("gated", "d_conv", "conv_bias", "out_norm", "gated_mlp")}
    return VMambaConfig(
        **values,
        norm_layer="bn" if seen.batch_norm else "ln2d",
        d_state=max(seen.d_state, 1),
        dt_rank="auto" if automatic else seen.ranks[0],
        ssm_ratio=_ratio(seen.inner, used),
        mlp_ratio=_ratio(seen.mlp, used),
        **found,
    )


def _ratio(sizes: tuple[int, ...], dims: list[int]) -> float:
    """Return the simplest r with int(r · dim) = size for every stage; 0 for no sizes."""
    if not sizes:
        return 0.0
    for denominator in (1, 2, 3, 4, 8, 16, 100, 1000):
        ratio = float(Fraction(sizes[-1], dims[-1]).limit_denominator(denominator))
        if all(int(ratio * dim) == size for size, dim in zip(sizes, dims, strict=True)):
            return ratio
    low = max(size / dim for size, dim in zip(sizes, dims, strict=True))
    return math.nextafter(low, math.inf)


def describe(config: VMambaConfig) -> str:
    """Name a configuration: its variant's name, or its main measures."""
    if name := variant_name(config):
        return name
    kind = "gated VMamba" if config.gated else "VMamba"
    return (
        f"{kind} with depths {'-'.join(map(str, config.depths))}, dims {'-'.join(map(str, config.stage_dims))}, "
        f"d_state {config.d_state} and ssm_ratio {config.ssm_ratio:g}"
    )


def differences(file: Architecture, model: Architecture, owner: str = "the model") -> str:
    """List the fields two architectures differ in."""
    pairs = ((name, getattr(file, name), getattr(model, name)) for name in Architecture.__dataclass_fields__)
    return "; ".join(f"{name} {a} in the file, {b} in {owner}" for name, a, b in pairs if a != b)


def by_pattern(names: Iterable[str], limit: int = 8) -> list[str]:
    """Group names that differ in stage and block alone: `layers.*.blocks.*.norm.weight ×12`."""
    counts = Counter(re.sub(r"\b(layers|blocks)\.\d+", r"\1.*", name) for name in names)
    lines = [f"{pattern} ×{count}" if count > 1 else pattern for pattern, count in counts.items()]
    hidden = len(lines) - limit
    return lines if hidden <= 1 else [*lines[:limit], f"and {hidden} more patterns"]
