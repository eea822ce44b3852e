"""What timm's own model tests check, for every variant, and the libraries that come in through timm."""

import pytest
import timm
import torch
from timm.models import group_parameters

import vmamba.models
from vmamba.models import list_models

# One variant of each kind of architecture runs; all are checked without running on the meta device.
RUN = ["vmamba_test", "vmamba_nano", "vmamba_tiny_s1l8", "vanilla_vmamba_tiny"]
VARIANTS = list_models()


def test_all_variants_are_registered() -> None:
    assert set(VARIANTS) <= set(timm.list_models("*vmamba*"))


@pytest.mark.parametrize("name", VARIANTS)
def test_default_cfg_names_what_is_there(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        cfg = model.default_cfg
        state = model.state_dict()
        assert cfg["classifier"] + ".weight" in state
        assert cfg["first_conv"] + ".weight" in state
        assert state[cfg["classifier"] + ".weight"].shape[0] == cfg["num_classes"] == model.num_classes
        features = model.forward_features(torch.empty(1, *cfg["input_size"]))
        assert tuple(features.shape[2:]) == cfg["pool_size"]
        assert features.shape[1] == model.num_features
        model.reset_classifier(0)
        assert model(torch.empty(1, *cfg["input_size"])).shape == (1, model.num_features)
        model.reset_classifier(0, "")
        assert model(torch.empty(1, *cfg["input_size"])).ndim == 4
        bare = timm.create_model(name, num_classes=0, global_pool="")
        assert bare(torch.empty(1, *cfg["input_size"])).ndim == 4
        assert not [k for k in bare.state_dict() if k.startswith(cfg["classifier"])]


@pytest.mark.parametrize("name", VARIANTS)
def test_features_only_gives_the_maps_that_feature_info_announces(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True)
        size = 64
        maps = model(torch.empty(1, 3, size, size))
        assert [m.shape[1] for m in maps] == model.feature_info.channels()
        assert [size // m.shape[2] for m in maps] == model.feature_info.reduction()
        some = timm.create_model(name, features_only=True, out_indices=(0, 1))
        assert [m.shape for m in some(torch.empty(1, 3, size, size))] == [m.shape for m in maps[:2]]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_has_a_layer_group_in_depth_order(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        grouped = [p for names in groups.values() for p in names]
        assert sorted(grouped) == sorted(n for n, _ in model.named_parameters())
    layer = {n: i for i, names in group_parameters(model, model.group_matcher()).items() for n in names}
    assert layer["patch_embed.0.weight"] == 0
    if second := layer.get("layers.0.blocks.1.norm.weight"):
        assert layer["layers.0.blocks.0.norm.weight"] < second
    down = next(n for n in layer if n.startswith("layers.0.downsample"))
    assert layer["layers.0.blocks.0.norm.weight"] < layer[down] < layer["layers.1.blocks.0.norm.weight"]
    assert layer["classifier.head.weight"] == max(layer.values())


@pytest.mark.parametrize("name", RUN)
def test_forward_and_backward(name: str) -> None:
    model = timm.create_model(name, num_classes=42, drop_path_rate=0.0)
    x = torch.randn(2, 3, 32, 32)
    model.train()
    logits = model(x)
    assert logits.shape == (2, 42)
    logits.mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", RUN)
def test_forward_intermediates_agrees_with_forward_features(name: str) -> None:
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        features = model.forward_features(x)
        last, maps = model.forward_intermediates(x, norm=True)
        nhwc = model.forward_intermediates(x, indices=[-1], output_fmt="NHWC", intermediates_only=True)
        early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(last, features)
    torch.testing.assert_close(maps[-1], features)
    assert nhwc[0].shape[-1] == model.num_features
    torch.testing.assert_close(early[0], maps[1])
    with pytest.raises(ValueError, match="indices must name stages"):
        model.forward_intermediates(x, indices=[9])


def test_other_channels_and_classes() -> None:
    model = timm.create_model("vmamba_test", in_chans=5, num_classes=3)
    assert model(torch.randn(1, 5, 64, 64)).shape == (1, 3)
    model.reset_classifier(7)
    assert model(torch.randn(1, 5, 64, 64)).shape == (1, 7)
    assert model.get_classifier().out_features == 7
    with pytest.raises(ValueError, match="global_pool must be"):
        model.reset_classifier(7, "max")


def test_pretrained_weights_follow_channels_classes_and_the_published_choice_of_average(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VMAMBA_WEIGHTS_DIR", str(tmp_path))
    raw = vmamba.create_model("vanilla_vmamba_tiny", in_chans=3)
    average = {name: value + 1 for name, value in raw.state_dict().items()}
    torch.save({"model": raw.state_dict(), "model_ema": average}, tmp_path / "vanilla_vmamba_tiny.pth")
    model = timm.create_model("vanilla_vmamba_tiny", pretrained=True, num_classes=7, in_chans=1)
    theirs = raw.state_dict()  # this one's accuracy was published for the raw weights
    torch.testing.assert_close(model.layers[0].blocks[0].op.A_logs, theirs["layers.0.blocks.0.op.A_logs"])
    torch.testing.assert_close(model.patch_embed[0].weight, theirs["patch_embed.0.weight"].sum(1, keepdim=True))
    assert model.classifier.head.weight.shape[0] == 7


def test_grad_checkpointing_is_reached_through_timm() -> None:
    model = timm.create_model("vmamba_test")
    model.set_grad_checkpointing()
    assert model.grad_checkpointing
    assert all(stage.blocks.grad_checkpointing for stage in model.stages())


@pytest.mark.slow
def test_upernet_of_segmentation_models_pytorch_takes_the_backbone() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    net = smp.UPerNet("tu-vmamba_tiny", encoder_weights=None, classes=5).eval()
    with torch.inference_mode():
        assert net(torch.randn(1, 3, 64, 96)).shape == (1, 5, 64, 96)


def test_a_checkpoint_goes_into_a_feature_extractor(tmp_path) -> None:
    source, images = vmamba.create_model("vmamba_test", num_classes=3).eval(), torch.randn(1, 3, 64, 64)
    vmamba.save_checkpoint(source, tmp_path / "w.safetensors")
    options = {"features_only": True, "out_indices": (0, 2), "checkpoint_path": str(tmp_path / "w.safetensors")}
    maps = vmamba.create_model("vmamba_test", **options).eval()(images)
    expected = source.forward_intermediates(images, indices=(0, 2), intermediates_only=True)
    assert all(torch.equal(one, other) for one, other in zip(maps, expected, strict=True))
