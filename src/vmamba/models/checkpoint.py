"""Reading and writing weights: the authors' files, older layouts, detectors' files, the Hub, our own."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vmamba.models.checkpoint_files import CheckpointError, locate, read_file, write_pickle, write_safetensors
from vmamba.models.checkpoint_fitting import CLASSIFIER, Checkpoint, LoadReport, Plan, unwrapped
from vmamba.models.checkpoint_layouts import Architecture, by_pattern, infer_config, select_weights, to_published
from vmamba.models.config import VMambaConfig

if TYPE_CHECKING:
    from vmamba.models.vmamba import VMamba

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LoadReport",
    "convert_checkpoint",
    "export_official",
    "infer_config",
    "load_checkpoint",
    "load_model",
    "read_checkpoint",
    "save_checkpoint",
]

FORMAT_VERSION = 1

# Names in the authors' training configuration -> arguments of their constructor.
_OFFICIAL_FIELDS = {
    "PATCH_SIZE": "patch_size",
    "IN_CHANS": "in_chans",
    "DEPTHS": "depths",
    "EMBED_DIM": "dims",
    "SSM_D_STATE": "ssm_d_state",
    "SSM_RATIO": "ssm_ratio",
    "SSM_DT_RANK": "ssm_dt_rank",
    "SSM_ACT_LAYER": "ssm_act_layer",
    "SSM_CONV": "ssm_conv",
    "SSM_CONV_BIAS": "ssm_conv_bias",
    "SSM_DROP_RATE": "ssm_drop_rate",
    "SSM_INIT": "ssm_init",
    "SSM_FORWARDTYPE": "forward_type",
    "MLP_RATIO": "mlp_ratio",
    "MLP_ACT_LAYER": "mlp_act_layer",
    "MLP_DROP_RATE": "mlp_drop_rate",
    "GMLP": "gmlp",
    "PATCH_NORM": "patch_norm",
    "NORM_LAYER": "norm_layer",
    "DOWNSAMPLE": "downsample_version",
    "PATCHEMBED": "patchembed_version",
    "POSEMBED": "posembed",
}


def read_checkpoint(source: str | os.PathLike[str], *, prefer_ema: bool = True) -> Checkpoint:
    """Read weights and bring them to the published layout.

    Reads safetensors, and pickles that hold a state dict at the top level or under `model`, `model_ema` or
    `state_dict`, with or without the prefixes of wrappers. Pickles are read with `weights_only=True` alone: nothing in
    the file is run, and a file that refers to anything but weights and plain values is refused.

    Args:
        source: a path, a Hub id (`hf-hub:org/name`), or an http(s) address.
        prefer_ema: take the averaged weights where the file has both.

    Raises:
        CheckpointError: the file is missing, damaged or unsafe, holds no weights, or holds NaN or infinity.
    """
    name = os.fspath(source)
    path = locate(source)
    content, header = read_file(path)
    try:
        tensors, key = select_weights(content, prefer_ema)
        layout = to_published(tensors)
        config, metadata = _from_header(header) if header is not None else (_from_training(content, layout.tensors), {})
    except CheckpointError as error:
        raise CheckpointError(f"'{path}' {error}") from error
    _reject_unusable(path, {**layout.tensors, **layout.extras})
    ours = header is not None and "format_version" in header
    return Checkpoint(
        source=name,
        state_dict=layout.tensors,
        config=config,
        metadata=metadata,
        layout=f"vmamba safetensors, format {FORMAT_VERSION}" if ours else layout.description,
        weights_key=key,
        epoch=_epoch(content) if header is None else None,
        extras=layout.extras,
        renamed=layout.renamed,
        reshaped=layout.reshaped,
        skipped=layout.skipped,
    )


def _from_header(header: Mapping[str, str]) -> tuple[VMambaConfig | None, dict[str, Any]]:
    if "format_version" not in header:  # not written by save_checkpoint: its entries may mean anything
        return None, {}
    try:
        version = int(header["format_version"])
        if version <= FORMAT_VERSION:
            config = VMambaConfig.from_dict(json.loads(header["config"])) if "config" in header else None
            return config, dict(json.loads(header.get("metadata", "{}")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"has metadata that cannot be read: {error}") from error
    raise CheckpointError(f"has format version {version}, and this vmamba reads up to {FORMAT_VERSION}: upgrade vmamba")


def _from_training(content: Any, tensors: Mapping[str, Tensor]) -> VMambaConfig | None:
    """Take the configuration the authors' training script stored, if it is one of the model in the file."""
    training = _entry(content, "config")
    model = _entry(training, "MODEL")
    stored = _entry(model, "VSSM")
    if "EMBED_DIM" not in stored:
        return None
    head = tensors.get("classifier.head.weight")
    given = {theirs: stored[name] for name, theirs in _OFFICIAL_FIELDS.items() if name in stored}
    given["num_classes"] = 0 if head is None else head.shape[0]
    given["drop_path_rate"] = model.get("DROP_PATH_RATE", 0.1)
    given["imgsize"] = _entry(training, "DATA").get("IMG_SIZE", 224)
    try:
        config = VMambaConfig.from_official(**given)
        fits = Architecture.of_config(config) == Architecture.of_state_dict(tensors)
    except (TypeError, ValueError):  # edited by hand, or of a later version of their code: the shapes decide
        return None
    return config if fits else None


def _entry(mapping: Any, key: str) -> dict[str, Any]:
    """Return the mapping under `key` as a plain dict, {} where there is none."""
    value = dict.get(mapping, key) if isinstance(mapping, dict) else None
    return dict(dict.items(value)) if isinstance(value, dict) else {}


def _epoch(content: Any) -> int | None:
    for holder in (content, _entry(content, "meta")):  # "meta" is mmengine's
        if type(epoch := dict.get(holder, "epoch")) is int:
            return epoch
    return None


def _reject_unusable(path: Path, tensors: Mapping[str, Tensor]) -> None:
    bad = [n for n, t in tensors.items() if t.layout != torch.strided or t.is_quantized or t.device.type == "meta"]
    if bad:
        raise CheckpointError(f"'{path}' holds tensors without plain values (sparse, quantised or meta): {bad[0]!r}")
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise CheckpointError(
            f"'{path}' holds NaN or infinity in {len(bad)} of {len(tensors)} tensors "
            f"({', '.join(by_pattern(bad, limit=4))}): the training that wrote it had diverged, or the file is corrupt"
        )


def load_checkpoint(
    model: nn.Module,
    source: str | os.PathLike[str] | Checkpoint,
    *,
    strict: bool = True,
    adapt_classifier: bool = False,
    prefer_ema: bool = True,
) -> LoadReport:
    """Load weights into a model, whatever layout they are in; the model is not touched unless all of them fit.

    A position embedding of another size is resized (bicubic). A backbone without a classifier skips that of the file.

    Args:
        model: a VMamba, perhaps inside the wrappers of torch.compile or DDP.
        source: as in `read_checkpoint`, or what it returned.
        strict: every weight must be in the file and every weight in the file be used. Otherwise missing and left-over
            ones are only reported; one of another shape is an error all the same.
        adapt_classifier: where the file has another number of classes, or no classifier, keep the backbone and
            initialise the head afresh.
        prefer_ema: take the averaged weights where the file has both.

    Returns:
        what was loaded, renamed, reshaped, skipped and initialised.

    Raises:
        CheckpointError: the file cannot be read or does not fit; the first line says why, the rest lists what differs.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source, prefer_ema=prefer_ema)
    model = unwrapped(model)
    plan = Plan(model, checkpoint)
    plan.resize_position_embedding()
    plan.fit_backbone()
    if adapt_classifier:
        plan.adapt_classifier()
    plan.check(strict)
    with torch.no_grad():
        model.load_state_dict(plan.tensors, strict=False)
    return plan.report()


def load_model(
    source: str | os.PathLike[str] | Checkpoint, *, prefer_ema: bool = True
) -> "tuple[VMamba, dict[str, Any]]":
    """Build the model a file is of, and load it.

    The configuration is the one stored in the file, or is read off the shapes; see `infer_config` for what shapes
    cannot tell.

    Returns:
        the model, in evaluation mode, and the file's metadata (labels, mean, std, ... as `save_checkpoint` got them).

    Raises:
        CheckpointError: as `read_checkpoint` and `load_checkpoint`.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source, prefer_ema=prefer_ema)
    model, _ = _build(checkpoint)
    return model, dict(checkpoint.metadata)


def _build(checkpoint: Checkpoint) -> "tuple[VMamba, LoadReport]":
    from vmamba.models.vmamba import VMamba

    try:
        model = VMamba(checkpoint.config or infer_config(checkpoint.state_dict))
    except ValueError as error:
        raise CheckpointError(f"'{checkpoint.source}' {error}") from error
    # A detector's backbone has no classifier norm: the model has one, which then starts as the identity.
    headless = not any(name.startswith(CLASSIFIER) for name in checkpoint.state_dict)
    report = load_checkpoint(model, checkpoint, adapt_classifier=headless)
    return model.eval(), report


def save_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model as safetensors: its weights under the published names, its configuration, and `metadata`.

    The file appears whole or not at all: it is written beside its place, flushed to disk, then moved.

    Args:
        model: a VMamba; its `config` is stored with the weights.
        path: where to; an existing file is replaced.
        metadata: anything JSON-able worth keeping beside the weights, such as labels, mean, std, img_size.
        state_dict: weights to write instead of the model's own, such as those gathered from several processes.

    Raises:
        CheckpointError: the file cannot be written.
        TypeError: `metadata` is not JSON-able.
    """
    from vmamba import __version__

    model = unwrapped(model)
    header = {
        "format": "pt",  # what transformers and timm look for
        "format_version": str(FORMAT_VERSION),
        "vmamba_version": __version__,
        "metadata": json.dumps(dict(metadata or {})),
    }
    tensors = model.state_dict() if state_dict is None else state_dict
    if isinstance(config := getattr(model, "config", None), VMambaConfig):
        head = tensors.get(f"{CLASSIFIER}head.weight")
        if head is not None:  # another layer may have been put in its place
            config = config.replace(num_classes=head.shape[0])
        header["config"] = json.dumps(config.to_dict())
    write_safetensors(tensors, path, header)


def export_official(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model as the authors publish theirs: a `.pth` of `{"model": state_dict}`, atomically.

    Raises:
        CheckpointError: the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in unwrapped(model).state_dict().items()}
    write_pickle({"model": tensors}, path)


def convert_checkpoint(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, prefer_ema: bool = True
) -> LoadReport:
    """Turn any file `read_checkpoint` reads into ours (`.safetensors`) or the published layout (`.pth`).

    The model is built and filled on the way, so what is written is known to be complete.

    Returns:
        what was read.

    Raises:
        CheckpointError: as `load_model` and `save_checkpoint`, or `target` ends in neither.
    """
    suffix = Path(target).suffix.lower()
    if suffix not in (".safetensors", ".pth"):
        raise CheckpointError(f"'{os.fspath(target)}' must end in .safetensors (ours) or .pth (the published layout)")
    checkpoint = read_checkpoint(source, prefer_ema=prefer_ema)
    model, report = _build(checkpoint)
    if suffix == ".pth":
        export_official(model, target)
    else:
        save_checkpoint(model, target, metadata=checkpoint.metadata)
    return report
