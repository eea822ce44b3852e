"""Small models, their weights in the layouts of other people's files, and pickles such as training scripts write."""

import re
import sys
import types
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vmamba.models import VMamba, VMambaConfig

SMALL = VMambaConfig(depths=(1, 2), dims=(8, 16), img_size=32, num_classes=5)
# The first release's model: patch stem, gated, no MLP, patch merging, d_state above 1.
VANILLA = VMambaConfig(
    depths=(1, 2),
    dims=(8, 16),
    img_size=32,
    num_classes=5,
    stem="patch",
    downsample="patch_merging",
    norm_layer="ln",
    d_state=3,
    ssm_ratio=2.0,
    conv_bias=True,
    gated=True,
    mlp_ratio=0.0,
)


def small_model(config: VMambaConfig = SMALL, seed: int = 0, **changes: Any) -> VMamba:
    """Build a model whose every tensor is random, norms included, so that no two are equal."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VMamba(config, **changes)
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    value.copy_(torch.rand(value.shape) * 0.3 + (0.5 if name.endswith("running_var") else -0.1))
    return model.eval()


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return a copy of a model's state dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype
        assert torch.equal(value, right[name]), name


def to_older_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a published state dict to the first release's names."""
    pairs = (
        (r"^patch_embed\.0\.", "patch_embed.proj."),
        (r"^patch_embed\.2\.", "patch_embed.norm."),
        (r"(blocks\.\d+)\.norm\.", r"\1.ln_1."),
        (r"(blocks\.\d+)\.op\.", r"\1.self_attention."),
        (r"^classifier\.", ""),
    )
    renamed = {}
    for name, value in tensors.items():
        for new, old in pairs:
            name = re.sub(new, old, name)
        renamed[name] = value
    return renamed


def per_block(change: Callable[[str, Tensor], dict[str, Tensor]]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Lift a change of one tensor of SS2D, by its name there, to a state dict."""

    def apply(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        result = {}
        for name, value in tensors.items():
            prefix, dot, last = name.partition(".op.")
            changed = change(last, value) if dot else {last: value}
            result.update({f"{prefix}{dot}{key}": tensor for key, tensor in changed.items()})
        return result

    return apply


class CfgNode(dict):
    """A dict subclass with the state that yacs 0.1.8 keeps in its instances, pickled as `yacs.config.CfgNode`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.__dict__["__immutable__"] = True
        self.__dict__["__deprecated_keys__"] = set()
        self.__dict__["__renamed_keys__"] = {}
        self.__dict__["__new_allowed__"] = False

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


@contextmanager
def importable(qualified: str, value: type) -> Any:
    """Let pickle find a class under another package's name while a file is written; that package is not installed."""
    module, _, name = qualified.rpartition(".")
    parts = module.split(".")
    added = [".".join(parts[: i + 1]) for i in range(len(parts))]
    fresh = [path for path in added if path not in sys.modules]
    for path in fresh:
        sys.modules[path] = types.ModuleType(path)
    was, value.__module__ = value.__module__, module
    qualname, value.__qualname__ = value.__qualname__, name
    setattr(sys.modules[module], name, value)
    try:
        yield
    finally:
        value.__module__, value.__qualname__ = was, qualname
        for path in fresh:
            del sys.modules[path]


def training_config(config: VMambaConfig, forward_type: str, **changes: Any) -> CfgNode:
    """Return the training configuration that the authors' script stores beside the weights of such a model."""
    stem = {"overlap": "v2", "patch": "v1"}[config.stem]
    downsample = {"conv3x3": "v3", "conv2x2": "v2", "patch_merging": "v1"}[config.downsample]
    vssm = CfgNode(
        {
            "PATCH_SIZE": config.patch_size,
            "IN_CHANS": config.in_chans,
            "DEPTHS": list(config.depths),
            "EMBED_DIM": config.stage_dims[0],
            "SSM_D_STATE": config.d_state,
            "SSM_RATIO": config.ssm_ratio,
            "SSM_RANK_RATIO": 2.0,
            "SSM_DT_RANK": "auto",
            "SSM_ACT_LAYER": "silu",
            "SSM_CONV": config.d_conv,
            "SSM_CONV_BIAS": config.conv_bias,
            "SSM_FORWARDTYPE": forward_type,
            "MLP_RATIO": config.mlp_ratio,
            "DOWNSAMPLE": downsample,
            "PATCHEMBED": stem,
            "NORM_LAYER": config.norm_layer,
            **changes,
        }
    )
    model = CfgNode({"TYPE": "vssm", "NUM_CLASSES": 1000, "DROP_PATH_RATE": 0.3, "VSSM": vssm})
    return CfgNode({"BASE": [""], "DATA": CfgNode({"IMG_SIZE": 224}), "MODEL": model, "TAG": "2024"})


def save_as_authors(path: Any, model: VMamba, forward_type: str = "v05_noz", ema: Any = None, **changes: Any) -> None:
    """Write what the authors' training script writes: weights, optimiser, scheduler, scaler and configuration."""
    content = {
        "model": model.state_dict(),
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}},
            "param_groups": [{"lr": 1e-3}],
        },
        "lr_scheduler": {"t_initial": 10, "base_values": [0.001], "noise_range_t": None},
        "max_accuracy": 82.5,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7},
        "epoch": 264,
        "config": training_config(model.config, forward_type, **changes),
    }
    if ema is not None:
        content |= {"model_ema": ema.state_dict(), "max_accuray_ema": 82.6}
    with importable("yacs.config.CfgNode", CfgNode):
        torch.save(content, path)
