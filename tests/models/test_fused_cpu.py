"""The CPU inference form: equal to the model it was made from, for any configuration and size, and one-way."""

import copy
import pickle

import pytest
import torch
from torch import nn

import vmamba
from vmamba.models import fused_cpu
from vmamba.models.fused_cpu import FusedMlp, FusedSS2D, PackedLinear, fuse_for_cpu
from vmamba.models.layers import Mlp
from vmamba.models.ss2d import SS2D
from vmamba.models.vmamba import VMambaBackbone

pytestmark = pytest.mark.skipif(fused_cpu.unavailable() is not None, reason="torch comes without oneDNN here")
bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor does not compute in bfloat16"
)

CONFIGURATIONS = {
    "the paper's": {},
    "vanilla": {"gated": True, "mlp_ratio": 0.0, "d_state": 4, "ssm_ratio": 2.0},
    "gated mlp": {"gated_mlp": True},
    "another activation": {"mlp_act": "silu", "ssm_act": "gelu"},
    "cascade": {"routes": "cascade2d"},
    "one after the other": {"sequential_routes": True},
    "other routes and norms": {"routes": "bidi", "out_norm": "cnorm", "norm_layer": "bn", "post_norm": True},
    "bare": {"out_norm": "none", "d_conv": 0, "out_act": True},
    "patches": {"stem": "patch", "downsample": "patch_merging", "pos_embed": True, "conv_bias": True},
    "no head": {"num_classes": 0, "global_pool": ""},
}


def make(**overrides):
    model = vmamba.create_model("vmamba_test", **overrides).eval()
    for parameter in model.parameters():  # so that no bias is zero and no norm trivial
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("overrides", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@torch.no_grad()
def test_gives_what_the_model_gives(relative_error, overrides):
    model = make(**overrides)
    fused = fuse_for_cpu(model)
    for shape in ((1, 3, 64, 64), (3, 3, 64, 64), (2, 3, 61, 90)):
        images = torch.randn(shape)
        assert relative_error(fused(images), model(images)) <= 1e-5


@bf16
@pytest.mark.parametrize("overrides", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@torch.no_grad()
def test_in_bfloat16_it_errs_no_more_than_the_model_in_bfloat16(relative_error, overrides):
    model = make(**overrides)
    fused, narrow, exact = fuse_for_cpu(model, torch.bfloat16), copy.deepcopy(model).bfloat16(), model.double()
    errors = []
    for shape in ((1, 3, 64, 64), (3, 3, 64, 64), (2, 3, 61, 90)):
        images = torch.randn(shape)
        expected = exact(images.double())
        y = fused(images)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, fused(images.bfloat16()))
        errors.append((relative_error(y, expected), relative_error(narrow(images.bfloat16()), expected)))
    ours, theirs = (sum(column) for column in zip(*errors, strict=True))
    assert 0 < ours <= 1.25 * theirs


@bf16
@torch.no_grad()
def test_fuse_takes_the_dtype_asked_for_or_the_models():
    model, images = make(), torch.randn(1, 3, 64, 64)
    assert vmamba.fuse(model)(images).dtype == torch.float32
    asked = vmamba.fuse(model, torch.bfloat16)
    assert asked(images).dtype == torch.bfloat16
    assert asked.classifier.norm.weight.dtype == torch.float32  # norms compute in float32, and keep its weights
    assert vmamba.fuse(model.bfloat16())(images).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"stays bfloat16 there; take the one it was made from to torch.float32"):
        asked.float()


@torch.no_grad()
def test_features_and_backbones_too(relative_error):
    model, images = make(), torch.randn(2, 3, 64, 96)
    fused = fuse_for_cpu(model)
    pairs = [(fused.forward_features(images), model.forward_features(images))]
    pairs += zip(*(m.forward_intermediates(images, intermediates_only=True) for m in (fused, model)), strict=True)
    backbone = VMambaBackbone(model.config).eval()
    pairs += zip(fuse_for_cpu(backbone)(images), backbone(images), strict=True)
    assert len(pairs) == 9
    assert all(relative_error(actual, expected) <= 1e-5 for actual, expected in pairs)


def test_every_matrix_product_of_the_blocks_is_packed():
    fused = fuse_for_cpu(make())
    kinds = [type(module) for module in fused.layers.modules()]
    assert nn.Linear not in kinds
    blocks = sum(fused.config.depths)
    assert (kinds.count(FusedSS2D), kinds.count(FusedMlp)) == (blocks, blocks)
    assert kinds.count(PackedLinear) == 5 * blocks
    assert "followed by gelu" in repr(fused)


def test_the_model_is_left_alone():
    model = make().train()
    before = copy.deepcopy(model.state_dict())
    fused = fuse_for_cpu(model)
    assert model.training
    assert not fused.training
    with torch.no_grad():
        fused.patch_embed[0].weight.zero_()
        fused(torch.randn(1, 3, 64, 64))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_dropout_of_a_model_in_training_is_left_out(relative_error):
    model = make(drop_path_rate=0.5, drop_rate=0.5, mlp_drop_rate=0.5, ssm_drop_rate=0.5)
    images = torch.randn(2, 3, 64, 64)
    fused = fuse_for_cpu(model.train())
    with torch.no_grad():
        assert relative_error(fused(images), model.eval()(images)) <= 1e-5


def test_what_it_cannot_do_is_said(monkeypatch):
    model = make()
    fused = fuse_for_cpu(model)
    with pytest.raises(ValueError, match="no weights to save; save the model it was made from"):
        fused.state_dict()
    with pytest.raises(
        ValueError, match=r"stays float32 there; take the one it was made from to torch.bfloat16 on cpu"
    ):
        fused.bfloat16()
    with pytest.raises(ValueError, match=r"take the one it was made from to torch.float32 on meta"):
        fused.to("meta")
    with pytest.raises(ValueError, match="already fused"):
        fuse_for_cpu(fused)
    with pytest.raises(TypeError, match="fuse_for_cpu takes a VMamba, got Linear"):
        fuse_for_cpu(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"takes a model in float32 on the CPU; patch_embed.0.weight is torch.float64 on cpu"
    ):
        fuse_for_cpu(make().double())
    with pytest.raises(ValueError, match=r"the forms on the CPU are float32 and bfloat16, not torch\.float16"):
        vmamba.fuse(model, torch.float16)
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        with pytest.raises(ValueError, match="this processor does not compute in bfloat16; take float32"):
            vmamba.fuse(model, torch.bfloat16)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs oneDNN's packed weights: this build of torch comes without oneDNN"):
        fuse_for_cpu(model)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Zero(SS2D):
    def forward(self, x):
        return 0 * super().forward(x)


def listen(module):
    module.register_forward_hook(lambda module, args, y: 0 * y)
    return module


def of_another_class(kind):
    def change(module):
        module.__class__ = kind
        return module

    return change


CHANGES = {
    "another class": ("op.in_proj", of_another_class(Doubling)),
    "another class's MLP layer": ("mlp.fc1", of_another_class(Doubling)),
    "a bias": ("op.out_proj", lambda layer: nn.Linear(layer.in_features, layer.out_features)),
    "a wrapper": ("mlp.fc2", lambda layer: nn.Sequential(layer, nn.Tanh())),
    "another class of SS2D": ("op", of_another_class(Zero)),
    "a hook": ("op.in_proj", listen),
    "a hook on the branch": ("mlp", listen),
    "parametrised": ("mlp.fc1", nn.utils.parametrizations.weight_norm),
}


@pytest.mark.parametrize(("path", "change"), CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_changed_layers_stay_changed(relative_error, path, change):
    model, images = make(), 3 * torch.randn(2, 3, 64, 64)
    before = model(images)
    for stage in model.stages():
        for block in stage.blocks:
            block.set_submodule(path, change(block.get_submodule(path)))
    expected = model(images)
    if change is not nn.utils.parametrizations.weight_norm:  # which keeps the values
        assert relative_error(before, expected) > 1e-4
    fused = fuse_for_cpu(model)
    assert relative_error(fused(images), expected) <= 1e-5
    assert any(isinstance(module, PackedLinear) for module in fused.modules())


def test_an_approximate_gelu_is_not_made_exact():
    model = make()
    model.layers[0].blocks[0].mlp.act = nn.GELU("tanh")
    kinds = [type(block.mlp) for stage in fuse_for_cpu(model).stages() for block in stage.blocks]
    assert kinds == [Mlp, *[FusedMlp] * 4]


def test_copies_and_gradients_are_refused():
    fused, images = fuse_for_cpu(make()), torch.randn(1, 3, 64, 64, requires_grad=True)
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ValueError, match="cannot be copied or pickled; copy the model it was made from"):
            attempt(fused)
    with pytest.raises(RuntimeError, match="has no gradients; call it under"):
        fused(images)
    with torch.no_grad():
        fused(images)


@torch.no_grad()
def test_an_empty_batch_autocast_and_what_is_no_model():
    fused = fuse_for_cpu(make())
    assert fused(torch.randn(0, 3, 64, 64)).shape == (0, 10)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="computes in float32, and met a map in bfloat16; call it without autocast"),
    ):
        fused(torch.randn(1, 3, 64, 64))
    for wrong in ("vmamba_tiny", nn.ReLU(), nn.Sequential(make())):
        with pytest.raises(TypeError, match="fuse takes a VMamba, out of any wrapper; got"):
            vmamba.fuse(wrong)
