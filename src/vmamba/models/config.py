"""What a VMamba is made of: one frozen dataclass, and the table of named variants."""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from vmamba.models.published import PUBLISHED, PublishedModel, official_arguments

Activation = Literal["silu", "gelu", "relu", "sigmoid"]
OutNorm = Literal["norm", "none", "dwconv3", "cnorm", "softmax", "sigmoid"]


@dataclass(frozen=True)
class VMambaConfig:
    """Architecture of a VMamba; every field is also a keyword of `vmamba.create_model`.

    Attributes:
        depths: VSS blocks in each stage.
        dims: channels of each stage; one integer is the first stage's, doubled from stage to stage.
        num_classes: outputs of the head; 0 leaves the head out.
        in_chans: channels of the input image.
        img_size: side, or (height, width), in pixels the position embedding and the default configuration are made for.
        patch_size: stride of the stem.
        stem: "overlap" (two overlapping 3×3 convolutions at patch_size 4) or "patch" (one patch_size × patch_size one).
        patch_norm: whether the stem normalises.
        downsample: layer between stages: "conv3x3" (size rounds up), "conv2x2" (rounds down), "patch_merging" (rounds
            up) or "none" (all stages keep the stem's stride).
        norm_layer: "ln" and "ln2d" name the same LayerNorm over channels (the published code stores the maps
            channels-last for one and channels-first for the other; here both are channels-last); "bn" is BatchNorm.
        pos_embed: whether a learned position embedding is added after the stem.
        d_state: N, the size of the state.
        dt_rank: R, the rank of Δ's projection; "auto" is ceil(width / 16).
        ssm_ratio: E = ssm_ratio · width inside SS2D; 0 leaves the SS2D branch out.
        ssm_act: activation after the depthwise convolution, and of the gate.
        d_conv: kernel of the depthwise convolution; 0 leaves it out.
        conv_bias: whether that convolution has a bias.
        gated: whether SS2D has the multiplicative branch of the vanilla block.
        gate_act: whether the gate passes through `ssm_act`.
        out_norm: what follows the merge: LayerNorm, nothing, a depthwise 3×3 convolution, LayerNorm and that
            convolution, softmax over positions, or a sigmoid.
        out_act: whether a GELU follows `out_norm`.
        routes: scan pattern: "cross2d", "unidi", "bidi" or "cascade2d" (ablation of the paper, appendix).
        sequential_routes: scan one route after the other (the first published version); equal results.
        force_fp32: give the scan float32 inputs whatever autocast says (the first published version).
        residual_in_fp32: keep what the blocks add up in float32 under bfloat16 autocast, as it always is under float16
            autocast; costs memory and time in training, and spares gradients about a fifth of their error there.
        ssm_init: "mamba" (Δ bias log-uniform, A = -1..-N, D = 1), "random" or "zero" (the paper's Table 10).
        dt_min, dt_max: range of the initial Δ, seconds in Mamba's notation; "mamba" initialisation only.
        dt_init: weights of Δ's projection: "random" or "constant"; "mamba" initialisation only.
        ssm_drop_rate: dropout after SS2D's output projection.
        mlp_ratio: hidden width of the MLP branch over the width; 0 leaves the branch out.
        mlp_act: activation of the MLP.
        gated_mlp: whether the MLP is gated.
        mlp_drop_rate: dropout in the MLP.
        post_norm: normalise each branch's output instead of its input.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.
        drop_rate: dropout before the head's linear layer.
        global_pool: "avg", or "" to leave the map unpooled.
        backend: which implementation scans; see `vmamba.ops.ss2d_scan`.
    """

    depths: tuple[int, ...] = (2, 2, 8, 2)
    dims: tuple[int, ...] | int = 96
    num_classes: int = 1000
    in_chans: int = 3
    img_size: int | tuple[int, int] = 224
    patch_size: int = 4
    stem: Literal["overlap", "patch"] = "overlap"
    patch_norm: bool = True
    downsample: Literal["conv3x3", "conv2x2", "patch_merging", "none"] = "conv3x3"
    norm_layer: Literal["ln", "ln2d", "bn"] = "ln2d"
    pos_embed: bool = False
    d_state: int = 1
    dt_rank: int | Literal["auto"] = "auto"
    ssm_ratio: float = 1.0
    ssm_act: Activation = "silu"
    d_conv: int = 3
    conv_bias: bool = False
    gated: bool = False
    gate_act: bool = True
    out_norm: OutNorm = "norm"
    out_act: bool = False
    routes: Literal["cross2d", "unidi", "bidi", "cascade2d"] = "cross2d"
    sequential_routes: bool = False
    force_fp32: bool = False
    residual_in_fp32: bool = False
    ssm_init: Literal["mamba", "random", "zero"] = "mamba"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: Literal["random", "constant"] = "random"
    ssm_drop_rate: float = 0.0
    mlp_ratio: float = 4.0
    mlp_act: Activation = "gelu"
    gated_mlp: bool = False
    mlp_drop_rate: float = 0.0
    post_norm: bool = False
    drop_path_rate: float = 0.2
    drop_rate: float = 0.0
    global_pool: Literal["avg", ""] = "avg"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type in _KINDS:
                object.__setattr__(self, field.name, _plain(field.name, field.type, getattr(self, field.name)))
        depths, dims = _integers("depths", self.depths), self.dims
        dims = tuple(dims * 2**i for i in range(len(depths))) if isinstance(dims, int) else _integers("dims", dims)
        object.__setattr__(self, "depths", depths)
        object.__setattr__(self, "dims", dims)
        sides = (self.img_size,) if not isinstance(self.img_size, Sequence) else self.img_size
        sides = tuple(_plain("img_size", int, side) for side in sides)
        object.__setattr__(self, "img_size", sides[0] if not isinstance(self.img_size, Sequence) else sides)
        if self.dt_rank != "auto":
            object.__setattr__(self, "dt_rank", _plain("dt_rank", int, self.dt_rank))
        self._validate(depths, dims)

    def _validate(self, depths: tuple[int, ...], dims: tuple[int, ...]) -> None:
        if not depths or min(depths) < 0:
            raise ValueError(f"depths must be one number of blocks, 0 or more, for each stage; got {self.depths}")
        if len(dims) != len(depths):
            raise ValueError(f"dims has {len(dims)} entries and depths {len(depths)}; give one width for each stage")
        if min(dims) < 1:
            raise ValueError(f"dims must be positive; got {self.dims}")
        for field in dataclasses.fields(self):
            if get_origin(field.type) is Literal and (value := getattr(self, field.name)) not in get_args(field.type):
                raise ValueError(
                    f"{field.name} must be one of {', '.join(map(repr, get_args(field.type)))}; got {value!r}"
                )
        if self.dt_rank != "auto" and self.dt_rank < 1:
            raise ValueError(f"dt_rank must be 'auto' or a positive integer; got {self.dt_rank!r}")
        sides = (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size
        least = self.patch_size if self.pos_embed else 1
        if len(sides) != 2 or min(sides) < least:
            raise ValueError(f"img_size must be a side or (height, width), at least {least}; got {self.img_size!r}")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"dt_min must be positive and at most dt_max; got {self.dt_min} and {self.dt_max}")
        if self.num_classes and not self.global_pool:
            raise ValueError(
                f"global_pool='' leaves the map unpooled, which the head for {self.num_classes} classes cannot take; "
                "give num_classes=0 with it"
            )
        for name, least in (("d_state", 1), ("num_classes", 0), ("in_chans", 1), ("patch_size", 1), ("d_conv", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        for name in ("ssm_ratio", "mlp_ratio"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")
        for name in ("drop_path_rate", "drop_rate", "ssm_drop_rate", "mlp_drop_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a probability below 1; got {getattr(self, name)}")
        if self.d_conv and self.d_conv % 2 == 0:
            raise ValueError(
                f"d_conv must be odd (or 0 for no convolution), so that the map keeps its size; got {self.d_conv}"
            )
        if self.stem == "overlap" and (self.patch_size < 4 or self.patch_size % 2):
            raise ValueError(f"the overlapping stem needs an even patch_size of at least 4; got {self.patch_size}")

    @classmethod
    def from_official(cls, **kwargs: Any) -> "VMambaConfig":
        """Translate the arguments of the authors' `VSSM` constructor.

        Raises:
            ValueError: an argument, or a part of `forward_type`, that the authors' code does not know.
        """
        from vmamba.models.official import translate

        return cls(**translate(kwargs))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VMambaConfig":
        """Rebuild a configuration from `to_dict`; an unknown name is a ValueError that tells the nearest one."""
        reject_unknown(values, cls.field_names(), "a VMambaConfig")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def replace(self, **changes: Any) -> "VMambaConfig":
        """Return a copy with some fields changed; an unknown name is a ValueError that tells the nearest one."""
        reject_unknown(changes, self.field_names(), "a VMambaConfig")
        depths = _integers("depths", changes.get("depths", self.depths))
        if "dims" not in changes and len(depths) != len(self.depths):
            changes = {**changes, "dims": self.stage_dims[0]}
        return dataclasses.replace(self, **changes)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Return the names of all fields."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @property
    def stage_dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        assert isinstance(self.dims, tuple)
        return self.dims

    def d_inner(self, dim: int) -> int:
        """Return E, the channels inside SS2D, of a block of width `dim`."""
        return int(self.ssm_ratio * dim)

    def rank(self, dim: int) -> int:
        """Return R, the rank of Δ's projection, of a block of width `dim`."""
        return resolve_dt_rank(self.dt_rank, dim)


def resolve_dt_rank(dt_rank: int | Literal["auto"], dim: int) -> int:
    """Return R for a block of width `dim`: "auto" is ceil(dim / 16)."""
    return -(-dim // 16) if dt_rank == "auto" else int(dt_rank)


_KINDS: Mapping[Any, str] = {int: "a whole number", float: "a number", bool: "True or False"}


def _plain(name: str, kind: Any, value: Any) -> Any:
    """Bring a value, such as NumPy's, to Python's own kind, which goes into files."""
    try:
        if kind is int:
            return int(operator.index(value))
        if kind is bool and value in (False, True):
            return bool(value)
        if kind is float and not isinstance(value, str):
            return value if isinstance(value, int) else float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name} must be {_KINDS[kind]}; got {value!r}")


def _integers(name: str, values: Any) -> tuple[int, ...]:
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError:
        raise ValueError(f"{name} must be whole numbers, one for each stage; got {values!r}") from None


def reject_unknown(given: Mapping[str, Any] | Sequence[str], known: Sequence[str], what: str) -> None:
    """Raise ValueError for the first of `given` that is not among `known`, naming the nearest."""
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"
            raise ValueError(f"{name!r} is not a field of {what}{hint}")


# Name in this package -> name in the published table: three of the paper, their other depth, the vanilla models.
_PAPER_NAMES = {
    "vmamba_tiny": "vmambav2v_tiny_224",
    "vmamba_tiny_s1l8": "vmambav2v_tiny_224",
    "vmamba_tiny_s2l5": "vmambav2_tiny_224",
    "vmamba_small": "vmambav2_small_224",
    "vmamba_small_s2l15": "vmambav2_small_224",
    "vmamba_small_s1l20": "vmambav2v_small_224",
    "vmamba_base": "vmambav2_base_224",
    "vmamba_base_s2l15": "vmambav2_base_224",
    "vmamba_base_s1l20": "vmambav2v_base_224",
    "vanilla_vmamba_tiny": "vmambav0_tiny_224",
    "vanilla_vmamba_small": "vmambav0_small_224",
    "vanilla_vmamba_base": "vmambav0_base_224",
}

_OWN = {
    # For small images and CPUs: the stem keeps half the resolution, so that 32×32 gives maps of 16, 8 and 4.
    "vmamba_nano": VMambaConfig(
        depths=(1, 1, 2), dims=64, img_size=32, patch_size=2, stem="patch", num_classes=10, drop_path_rate=0.05
    ),
    # For tests: every kind of layer, tens of thousands of parameters.
    "vmamba_test": VMambaConfig(
        depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), img_size=64, num_classes=10, drop_path_rate=0.0
    ),
}

NAMED_VARIANTS: tuple[str, ...] = (*_PAPER_NAMES, *_OWN)


def list_models(published: bool = False) -> list[str]:
    """Return the names of all variants; with `published`, also the authors' names for every published configuration."""
    return [*NAMED_VARIANTS, *(PUBLISHED if published else ())]


def get_config(name: str, **overrides: Any) -> VMambaConfig:
    """Return the configuration of a named variant, with some fields changed.

    Args:
        name: one of `list_models(published=True)`.
        **overrides: fields of VMambaConfig.

    Raises:
        ValueError: the name or a field is unknown; the message tells the nearest one.
    """
    if not isinstance(name, str):
        raise TypeError(f"a model is named by a string or given as a VMambaConfig; got {type(name).__name__}")
    if name in _OWN:
        return _OWN[name].replace(**overrides)
    published = published_info(name)
    if published is None:
        near = get_close_matches(name, list_models(published=True), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the named variants are {', '.join(NAMED_VARIANTS)}"
        raise ValueError(f"there is no model called {name!r}; {hint}")
    return VMambaConfig.from_official(**official_arguments(published)).replace(**overrides)


def published_info(name: str) -> PublishedModel | None:
    """Return what the authors published about a variant, or None for one of ours or an unknown name."""
    return PUBLISHED.get(_PAPER_NAMES.get(name, name))


# Fields that do not change which weights fit, so they do not take part in naming a configuration.
_NOT_ARCHITECTURE = (
    "num_classes",
    "img_size",
    "norm_layer",
    "sequential_routes",
    "force_fp32",
    "ssm_init",
    "dt_min",
    "dt_max",
    "dt_init",
    "ssm_drop_rate",
    "mlp_drop_rate",
    "drop_path_rate",
    "drop_rate",
    "global_pool",
    "backend",
)


def variant_name(config: VMambaConfig) -> str | None:
    """Return the name of the variant whose architecture `config` has, or None.

    Class count, image size, initialisation, dropout and how the scan is carried out do not matter; of several names for
    one architecture the most telling (`vmamba_tiny_s1l8` rather than `vmamba_tiny`) is given.
    """
    wanted = _architecture(config)
    short = {"vmamba_tiny", "vmamba_small", "vmamba_base"}
    for name in (*(n for n in NAMED_VARIANTS if n not in short), *PUBLISHED):
        if _architecture(get_config(name)) == wanted:
            return name
    return None


def _architecture(config: VMambaConfig) -> dict[str, Any]:
    values = {k: v for k, v in config.to_dict().items() if k not in _NOT_ARCHITECTURE}
    return {**values, "batch_norm": config.norm_layer == "bn"}
