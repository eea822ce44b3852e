"""The inference form for GPUs gives what the model gives."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import vmamba
from vmamba.models import fused_gpu
from vmamba.ops.convolution import reference as convolution
from vmamba.ops.layer_norm.reference import add_norm_reference
from vmamba.ops.linear import reference as linear
from vmamba.ops.linear.api import HIDDEN_STEP, split_channels


def perturbed(name: str, **overrides: object) -> nn.Module:
    """Make a model whose norms are not as they are at initialisation, where folding them would be no test."""
    torch.manual_seed(0)
    model = vmamba.create_model(name, **overrides).eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if "norm" in parameter_name or p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model


def refusing(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Refuse the widths that the kernels refuse."""

    def checked(x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor, **options: float) -> torch.Tensor:
        split_channels(x.shape[-1])
        assert function is linear.norm_linear_reference or weight.shape[0] % HIDDEN_STEP == 0
        return function(x, weight, *rest, **options)

    return checked


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put what the kernels are specified to do in their place: folding and order are tested here, kernels on a GPU."""
    monkeypatch.setattr(fused_gpu, "why_not", lambda x: None)
    monkeypatch.setattr(fused_gpu, "norm_linear", refusing(linear.norm_linear_reference))
    monkeypatch.setattr(fused_gpu, "linear_gelu", linear.linear_gelu_reference)
    monkeypatch.setattr(fused_gpu, "norm_mlp", refusing(linear.norm_mlp_reference))
    monkeypatch.setattr(fused_gpu, "depthwise_silu", convolution.depthwise_silu_reference)
    monkeypatch.setattr(fused_gpu, "add_norm", add_norm_reference)
    monkeypatch.setattr(fused_gpu, "conv_norm", convolution.conv_norm_reference)


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ({"dims": 64, "depths": (1, 0, 2, 3)}, (64, 96)),  # 64 to 512 channels: narrow and wide blocks, and none
        ({"dims": 64, "depths": (1, 1), "ssm_ratio": 2.0, "conv_bias": True}, (37, 50)),
        ({"dims": 96, "depths": (1, 1), "routes": "bidi", "d_state": 4, "norm_layer": "ln"}, (32, 32)),
        (
            {"dims": 128, "depths": (1,), "ssm_ratio": 1.75, "mlp_ratio": 3.3},
            (32, 32),
        ),  # 224 and 422: no kernels' widths
        ({"dims": 64, "depths": (1, 1), "global_pool": "", "num_classes": 0, "in_chans": 1}, (32, 64)),
    ],
)
def test_folding_changes_nothing(without_kernels: None, overrides: dict[str, object], size: tuple[int, int]) -> None:
    model = perturbed("vmamba_tiny", **overrides)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, model.config.in_chans, *size)
    with torch.no_grad():
        expected, features = model(x), model.forward_features(x)
        small = fused_gpu.fuse_for_gpu(model, torch.float32)
        torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(small.forward_features(x), features, rtol=1e-4, atol=2e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in small.parameters())


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"gated": True}, "gated=True"),
        ({"norm_layer": "bn"}, "norm_layer='bn'"),
        ({"d_conv": 1}, "d_conv=1"),
        ({"mlp_ratio": 0.0}, "one of the two branches"),
        ({"dims": 40}, "widths"),
    ],
)
def test_what_cannot_be_fused_is_named(without_kernels: None, overrides: dict[str, object], reason: str) -> None:
    model = vmamba.create_model("vmamba_test", **{"dims": 64, **overrides})
    with pytest.raises(ValueError, match=reason):
        fused_gpu.fuse_for_gpu(model, torch.float32)


def test_a_model_off_the_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot be fused for a GPU: .*CUDA"):
        fused_gpu.fuse_for_gpu(vmamba.create_model("vmamba_test"))


def test_fuse_takes_the_form_of_the_device() -> None:
    model = vmamba.create_model("vmamba_test").eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(vmamba.fuse(model)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["vmamba_tiny", "vmamba_base", "vmamba_tiny_s2l5", "vmamba_nano"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_are_those_of_the_dtype(name: str, dtype: torch.dtype) -> None:
    model = perturbed(name).cuda()
    if name == "vmamba_nano":  # its stem has patches of 2 pixels
        with pytest.raises(ValueError, match="stem='patch'"):
            fused_gpu.fuse_for_gpu(model, dtype)
        return
    small, plain = fused_gpu.fuse_for_gpu(model, dtype), copy.deepcopy(model).to(dtype)
    for shape in ((4, 3, 224, 224), (1, 3, 96, 160), (3, 3, 250, 199)):
        x = torch.randn(shape, device="cuda")
        with torch.no_grad():
            exact = model.forward_features(x)
            errors = [(form.forward_features(x.to(dtype)) - exact).norm() / exact.norm() for form in (small, plain)]
        assert errors[0] <= 1.5 * errors[1], (shape, errors)


def test_a_changed_layer_is_found() -> None:
    def model() -> nn.Module:
        return vmamba.create_model("vmamba_test", drop_path_rate=0.1)

    assert fused_gpu.changed_layer(model()) is None
    replaced, hooked, biased, kept = model(), model(), model(), model()
    block = "layers.2.blocks.1."
    replaced.set_submodule(block + "mlp.act", nn.GELU("tanh"))
    assert fused_gpu.changed_layer(replaced).startswith(f"{block}mlp.act is not the layer that its configuration makes")
    hooked.get_submodule(block + "op").register_forward_hook(lambda module, args, y: 0 * y)
    assert fused_gpu.changed_layer(hooked).startswith(f"{block}op has a hook")
    biased.set_submodule(block + "op.in_proj", nn.Linear(16, 16))
    assert fused_gpu.changed_layer(biased).startswith(f"{block}op.in_proj is not the layer")
    kept.classifier.head = nn.Sequential(nn.Linear(24, 3))
    assert fused_gpu.changed_layer(kept) is None
