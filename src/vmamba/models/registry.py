"""Models by name: `create_model`, and the same names in timm's registry."""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from vmamba.models.config import NAMED_VARIANTS, VMambaConfig, get_config, published_info
from vmamba.models.pretrained import fetch_pretrained
from vmamba.models.vmamba import VMamba


def create_model(
    name: str | VMambaConfig,
    pretrained: bool = False,
    checkpoint_path: str = "",
    **overrides: Any,
) -> VMamba:
    """Build a model by name or configuration.

    Args:
        name: one of `vmamba.list_models(published=True)`, or a VMambaConfig.
        pretrained: load the published weights, fetched once into timm's cache. With another number of classes the head
            starts afresh.
        checkpoint_path: a weights file to load instead, strictly.
        **overrides: fields of VMambaConfig; for a name also timm's `features_only=True, out_indices=…`, which returns
            timm's feature extractor.

    Raises:
        ValueError: the name or a field is unknown (the message tells the nearest), or there are no published weights.
    """
    if isinstance(name, VMambaConfig):
        if pretrained:
            raise ValueError("a VMambaConfig has no published weights of its own; give a name, or checkpoint_path=…")
        model = VMamba(name, **overrides)
    else:
        get_config(name)  # an unknown name is told here, before timm wraps it
        if checkpoint_path and overrides.get("features_only"):  # before timm takes the model apart
            file = {"file": checkpoint_path, "custom_load": True}
            extractor: VMamba = _build(name, True, pretrained_cfg_overlay=file, **overrides)
            return extractor
        model = _build(name, pretrained, **overrides)
    if checkpoint_path:
        from vmamba.models.checkpoint import load_checkpoint

        load_checkpoint(model, checkpoint_path)
    return model


def _default_cfg(name: str) -> dict[str, Any]:
    """Return timm's description of a variant: input, normalisation, where the classifier and the first layer are."""
    config = get_config(name)
    published = published_info(name)
    size = config.img_size if isinstance(config.img_size, int) else max(config.img_size)
    stride = config.patch_size * 2 ** (len(config.depths) - 1)
    return {
        "url": (published.url if published else None) or "",
        "custom_load": True,
        "num_classes": config.num_classes,
        "input_size": (config.in_chans, size, size),
        "pool_size": (size // stride, size // stride),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.0",
        "classifier": "classifier.head",
        "license": "mit",
        "origin_url": "https://github.com/MzeroMiko/VMamba",
        "paper_ids": "arXiv:2401.10166",
    }


def _build(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
    told = kwargs.get("pretrained_cfg")  # a dictionary when timm loads from the Hub; None or a tag otherwise
    if pretrained and not kwargs.get("pretrained_cfg_overlay") and (told is None or isinstance(told, str)):
        kwargs["pretrained_cfg_overlay"] = {"file": str(fetch_pretrained(name)), "custom_load": True}
    if name not in default_cfgs:
        kwargs.setdefault("pretrained_cfg", _default_cfg(name))
    stages = len(get_config(name).depths)
    out_indices = kwargs.pop("out_indices", tuple(range(stages)))
    # timm hands these to every model; None means the variant's own.
    kwargs = {k: v for k, v in kwargs.items() if v is not None or k not in VMambaConfig.field_names()}

    def build(**fields: Any) -> nn.Module:
        model = VMamba(get_config(name, **fields))
        published = published_info(name)
        model.prefer_ema = published is None or published.ema
        return model

    return build_model_with_cfg(
        build,
        name,
        pretrained,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


def _register(name: str) -> None:
    def entry(pretrained: bool = False, **kwargs: Any) -> Any:
        return _build(name, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"Build {name}; see vmamba.create_model."
    globals()[name] = register_model(entry)


default_cfgs = generate_default_cfgs({f"{name}.in1k": _default_cfg(name) for name in NAMED_VARIANTS})
__all__ = ["create_model"]
for _name in NAMED_VARIANTS:
    _register(_name)
