"""The authors' constructor arguments, translated once, at the border, into named fields."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

# forward_type = CORE [_on…] [_nozact] [_noz] [_oact] [_no32]. The authors strip suffixes from the end in a fixed order,
# so another order does not parse there either.
_CORES: dict[str, dict[str, Any]] = {
    "v0": {"force_fp32": True},
    "v0seq": {"force_fp32": True, "sequential_routes": True},
    "v01": {"force_fp32": True},
    "v02": {"force_fp32": True},
    "v03": {"force_fp32": True},
    "v2": {"force_fp32": True},
    "v3": {},
    "v04": {},
    "v05": {},
    "v051d": {"routes": "unidi"},
    "v052d": {"routes": "bidi"},
    "v052dc": {"routes": "cascade2d"},
}
_OUT_NORMS = {
    "onnone": "none",
    "ondwconv3": "dwconv3",
    "oncnorm": "cnorm",
    "onsoftmax": "softmax",
    "onsigmoid": "sigmoid",
}
_SUFFIX_ORDER = (*_OUT_NORMS, "nozact", "noz", "oact", "no32")
_GRAMMAR = "CORE[_on…][_nozact][_noz][_oact][_no32]"

_PLAIN = {
    "patch_size": "patch_size",
    "in_chans": "in_chans",
    "num_classes": "num_classes",
    "depths": "depths",
    "ssm_d_state": "d_state",
    "ssm_ratio": "ssm_ratio",
    "ssm_dt_rank": "dt_rank",
    "ssm_conv_bias": "conv_bias",
    "ssm_drop_rate": "ssm_drop_rate",
    "mlp_ratio": "mlp_ratio",
    "mlp_drop_rate": "mlp_drop_rate",
    "gmlp": "gated_mlp",
    "drop_path_rate": "drop_path_rate",
    "patch_norm": "patch_norm",
    "posembed": "pos_embed",
    "imgsize": "img_size",
}
_CHOICES: dict[str, tuple[str, dict[str, str]]] = {
    "norm_layer": ("norm_layer", {"ln": "ln", "ln2d": "ln2d", "bn": "bn"}),
    "downsample_version": (
        "downsample",
        {"v1": "patch_merging", "v2": "conv2x2", "v3": "conv3x3", "none": "none"},
    ),
    "patchembed_version": ("stem", {"v1": "patch", "v2": "overlap"}),
    "ssm_init": ("ssm_init", {"v0": "mamba", "v1": "random", "v2": "zero"}),
    "ssm_act_layer": ("ssm_act", {name: name for name in ("silu", "gelu", "relu", "sigmoid")}),
    "mlp_act_layer": ("mlp_act", {name: name for name in ("silu", "gelu", "relu", "sigmoid")}),
}
# The authors' defaults where they differ from VMambaConfig's.
_DEFAULTS: dict[str, Any] = {
    "depths": (2, 2, 9, 2),
    "dims": (96, 192, 384, 768),
    "ssm_d_state": 16,
    "ssm_ratio": 2.0,
    "ssm_conv": 3,
    "ssm_conv_bias": True,
    "forward_type": "v2",
    "drop_path_rate": 0.1,
    "norm_layer": "ln",
    "downsample_version": "v2",
    "patchembed_version": "v1",
}


def translate(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the VMambaConfig fields that the authors' `VSSM(**arguments)` stands for.

    Raises:
        ValueError: an argument, a value, or a part of `forward_type` is unknown.
    """
    known = {*_PLAIN, *_CHOICES, "dims", "ssm_conv", "forward_type", "use_checkpoint"}
    for name in arguments:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(sorted(known))}"
            raise ValueError(f"the published constructor has no argument {name!r}; {hint}")
    given = {**_DEFAULTS, **arguments}
    given.pop("use_checkpoint", None)  # a training switch: set_grad_checkpointing()
    fields: dict[str, Any] = {ours: given[theirs] for theirs, ours in _PLAIN.items() if theirs in given}
    for theirs, (ours, choices) in _CHOICES.items():
        if theirs in given:
            value = str(given[theirs]).lower()
            if value not in choices:
                raise ValueError(f"{theirs} must be one of {', '.join(choices)}; got {given[theirs]!r}")
            fields[ours] = choices[value]
    dims = given["dims"]
    fields["dims"] = dims[0] if not isinstance(dims, int) and len(dims) == 1 else dims
    fields["d_conv"] = given["ssm_conv"] if given["ssm_conv"] > 1 else 0
    forward_type = parse_forward_type(given["forward_type"])
    if forward_type.pop("first_version"):
        # The first version's block has its convolution, its bias, SiLU and Mamba's initialisation built in.
        fields.update(d_conv=3, conv_bias=True, ssm_act="silu", ssm_init="mamba")
    return {**fields, **forward_type}


def parse_forward_type(text: str) -> dict[str, Any]:
    """Parse the authors' `forward_type` into fields, plus `first_version` (True for v0 and v0seq).

    Raises:
        ValueError: names the parts that were understood and those that are allowed.
    """
    core, *suffixes = str(text).split("_")
    if core not in _CORES:
        kind = "Mamba-2 form, which has" if re.fullmatch(r"m\d+", core) else "unknown core, which has"
        raise ValueError(
            f"forward_type {text!r} starts with {core!r}: {kind} no counterpart here; the cores are "
            f"{', '.join(_CORES)}, and the form is {_GRAMMAR}"
        )
    last = -1
    for i, suffix in enumerate(suffixes):
        understood = "_".join([core, *suffixes[:i]])
        if suffix not in _SUFFIX_ORDER:
            near = get_close_matches(suffix, _SUFFIX_ORDER, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"forward_type {text!r}: understood {understood!r}, then {suffix!r} is unknown{hint}; "
                f"the suffixes, in this order, are {', '.join(_SUFFIX_ORDER)}"
            )
        rank = 0 if suffix in _OUT_NORMS else _SUFFIX_ORDER.index(suffix)
        if rank <= last:
            raise ValueError(
                f"forward_type {text!r}: understood {understood!r}, then {suffix!r} comes twice or too late; "
                f"the form is {_GRAMMAR} with one of {', '.join(_OUT_NORMS)} for _on…"
            )
        last = rank
    first = core in ("v0", "v0seq")
    if first and suffixes:
        raise ValueError(
            f"forward_type {text!r}: understood {core!r}, which takes no suffix; got {', '.join(suffixes)}"
        )
    fields = dict(_CORES[core])
    if "no32" in suffixes:
        fields["force_fp32"] = False
    return {
        **fields,
        "first_version": first,
        "gated": "noz" not in suffixes,
        "gate_act": "nozact" not in suffixes,
        "out_norm": next((_OUT_NORMS[s] for s in suffixes if s in _OUT_NORMS), "norm"),
        "out_act": "oact" in suffixes,
    }
