"""Loading weights strictly, adapting them when asked, reporting what was done, and writing them."""

import json
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from checkpoint_samples import (
    SMALL,
    VANILLA,
    assert_same_weights,
    save_as_authors,
    small_model,
    to_older_names,
    weights,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vmamba
from vmamba.models import VMamba, VMambaConfig
from vmamba.models.checkpoint import (
    Checkpoint,
    CheckpointError,
    convert_checkpoint,
    export_official,
    infer_config,
    load_checkpoint,
    load_model,
    read_checkpoint,
    save_checkpoint,
)
from vmamba.models.config import get_config

# What the shapes of a state dict cannot tell, so that a round trip must keep it by other means.
UNUSUAL = replace(VANILLA, ssm_act="relu", routes="bidi", gate_act=False, out_norm="sigmoid", drop_path_rate=0.4)


def with_meta_weights(name: str) -> VMamba:
    with torch.device("meta"):
        return VMamba(get_config(name))


def stored(model: torch.nn.Module, source: str = "file.pth") -> Checkpoint:
    """Return a checkpoint of a model on the meta device: its shapes, with all values one shared zero."""
    tensors = {name: torch.zeros((), dtype=v.dtype).expand(v.shape) for name, v in model.state_dict().items()}
    return Checkpoint(source=source, state_dict=tensors)


# Writing and reading back


@pytest.mark.parametrize("config", [SMALL, UNUSUAL, replace(SMALL, norm_layer="bn", pos_embed=True)])
def test_own_files_round_trip_with_configuration_and_metadata(config, tmp_path):
    source = small_model(config)
    kept = {"labels": ["cat", "dög"], "mean": [0.5, 0.25, 0.125], "img_size": 32, "nested": {"top1": 98.5}}
    vmamba.save_checkpoint(source, tmp_path / "w.safetensors", metadata=kept)

    model, metadata = load_model(tmp_path / "w.safetensors")
    checkpoint = read_checkpoint(tmp_path / "w.safetensors")

    assert metadata == kept
    assert model.config == source.config == checkpoint.config
    assert checkpoint.layout.startswith("vmamba safetensors")
    assert_same_weights(weights(model), weights(source))
    assert not model.training
    image = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model(image), source(image))


def test_own_files_are_plain_to_other_peoples_code(tmp_path):
    source = small_model()
    save_checkpoint(source, tmp_path / "w.safetensors")
    export_official(source, tmp_path / "w.pth")

    assert_same_weights(load_file(tmp_path / "w.safetensors"), weights(source))
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    assert list(content) == ["model"]
    assert_same_weights(content["model"], weights(source))
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        header = file.metadata()
    assert header["format"] == "pt"
    assert header["vmamba_version"] == vmamba.__version__
    assert VMambaConfig.from_dict(json.loads(header["config"])) == SMALL


def test_wrapped_models_are_written_and_filled_as_the_model_inside(tmp_path):
    class Wrapper(torch.nn.Module):
        def __init__(self, module, name):
            super().__init__()
            self.add_module(name, module)

    wrapped = Wrapper(Wrapper(small_model(), "module"), "_orig_mod")
    save_checkpoint(wrapped, tmp_path / "w.safetensors")
    export_official(wrapped, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        target = small_model(seed=1)
        load_checkpoint(Wrapper(target, "module"), tmp_path / name)
        assert_same_weights(weights(target), weights(small_model()))
        assert read_checkpoint(tmp_path / name).layout in ("published layout", "vmamba safetensors, format 1")
    assert read_checkpoint(tmp_path / "w.safetensors").config == SMALL


@pytest.mark.parametrize("by_hand", [False, True])
def test_saving_keeps_the_classes_of_a_replaced_head(by_hand, tmp_path):
    source = small_model()
    if by_hand:
        source.classifier.head = torch.nn.Linear(source.num_features, 3)
    else:
        source.reset_classifier(3)
    save_checkpoint(source, tmp_path / "w.safetensors")
    model, _ = load_model(tmp_path / "w.safetensors")
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 3)


def test_metadata_that_is_no_json_is_a_type_error_and_writes_nothing(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(small_model(), tmp_path / "w.safetensors", metadata={"labels": {1, 2}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"format_version": "2"}, "has format version 2, and this vmamba reads up to 1: upgrade vmamba"),
        ({"format_version": "new"}, "has metadata that cannot be read"),
        ({"format_version": "1", "config": "{"}, "has metadata that cannot be read"),
        ({"format_version": "1", "config": '{"depth": 3}'}, "'depth' is not a field .* did you mean 'depths'"),
        ({"format_version": "1", "metadata": "3"}, "has metadata that cannot be read"),
    ],
)
def test_metadata_from_the_future_or_damaged_is_one_clear_error(header, says, tmp_path):
    save_file(weights(small_model()), tmp_path / "w.safetensors", header)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_checkpoint(tmp_path / "w.safetensors")
    assert str(tmp_path / "w.safetensors") in str(caught.value)


def test_safetensors_of_others_are_read_by_their_shapes(tmp_path):
    save_file(weights(small_model()), tmp_path / "w.safetensors", {"format": "pt", "config": "not ours"})
    model, metadata = load_model(tmp_path / "w.safetensors")
    assert metadata == {}
    assert_same_weights(weights(model), weights(small_model()))


def test_conversion_goes_both_ways(tmp_path):
    source = small_model(VANILLA)
    torch.save({"model": to_older_names(weights(source)), "epoch": 9}, tmp_path / "old.pth")

    report = convert_checkpoint(tmp_path / "old.pth", tmp_path / "new.safetensors")
    convert_checkpoint(tmp_path / "new.safetensors", tmp_path / "back.pth")

    assert report.epoch == 9
    assert_same_weights(torch.load(tmp_path / "back.pth", weights_only=True)["model"], weights(source))
    with pytest.raises(CheckpointError, match=r"must end in \.safetensors \(ours\) or \.pth"):
        convert_checkpoint(tmp_path / "old.pth", tmp_path / "new.onnx")


def test_conversion_keeps_metadata_and_what_shapes_do_not_tell(tmp_path):
    save_checkpoint(small_model(UNUSUAL), tmp_path / "a.safetensors", metadata={"labels": ["x"]})
    convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    model, metadata = load_model(tmp_path / "b.safetensors")
    assert model.config == UNUSUAL
    assert metadata == {"labels": ["x"]}


# Which weights


@pytest.mark.parametrize("prefer_ema", [True, False])
@pytest.mark.parametrize("has_ema", [True, False])
def test_averaged_weights_are_taken_where_there_are_any(prefer_ema, has_ema, tmp_path):
    plain, average = small_model(seed=1), small_model(seed=2)
    save_as_authors(tmp_path / "w.pth", plain, ema=average if has_ema else None)
    model = small_model()

    report = load_checkpoint(model, tmp_path / "w.pth", prefer_ema=prefer_ema)

    averaged = has_ema and prefer_ema
    assert report.weights_key == ("model_ema" if averaged else "model")
    assert_same_weights(weights(model), weights(average if averaged else plain))
    assert str(report).startswith(f"{tmp_path / 'w.pth'}: loaded {len(weights(model))} tensors from ")
    assert "epoch 264" in str(report)


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"state_dict": t}, lambda t: {"model_ema": t}])
def test_each_container_is_read(wrap, tmp_path):
    torch.save(wrap(weights(small_model())), tmp_path / "w.pth")
    model = small_model(seed=1)
    load_checkpoint(model, tmp_path / "w.pth")
    assert_same_weights(weights(model), weights(small_model()))


def test_load_model_takes_what_the_training_configuration_tells(tmp_path):
    save_as_authors(tmp_path / "w.pth", small_model(), forward_type="v052d_onsoftmax_noz", SSM_ACT_LAYER="gelu")
    # The stored configuration has no out-norm weights, and the file has: it is not that model's.
    assert load_model(tmp_path / "w.pth")[0].config.routes == "cross2d"
    save_as_authors(tmp_path / "w.pth", small_model(), forward_type="v052d_noz", SSM_ACT_LAYER="gelu")
    config = load_model(tmp_path / "w.pth")[0].config
    assert (config.routes, config.ssm_act) == ("bidi", "gelu")


# Strictness


def test_another_variant_is_told_by_name_before_the_differences():
    model = with_meta_weights("vmamba_tiny_s2l5")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, stored(with_meta_weights("vmamba_tiny_s1l8")))
    first, *rest = str(caught.value).splitlines()
    assert first == "'file.pth' does not fit: this file is a vmamba_tiny_s1l8; the model is a vmamba_tiny_s2l5"
    assert len(rest) < 30
    text = "\n".join(rest)
    assert "  not in the model (" in text
    assert "layers.*.blocks.*.op.A_logs ×11" in text
    assert "e.g. layers.0.blocks.0.op." in text


def test_an_unnamed_variant_is_told_by_what_differs():
    with pytest.raises(
        CheckpointError, match=r"d_state 1 in the file, 3 in the model; .*gated False in the file, True"
    ):
        load_checkpoint(small_model(replace(SMALL, d_state=3, gated=True)), stored(small_model()))
    with pytest.raises(CheckpointError, match="it holds no weights of a VMamba"):
        load_checkpoint(small_model(), Checkpoint("resnet.pth", {"conv1.weight": torch.zeros(1)}))


@pytest.mark.parametrize("other", [VANILLA, replace(SMALL, dims=(8, 24)), replace(SMALL, num_classes=3)])
@pytest.mark.parametrize("strict", [True, False])
def test_a_model_is_untouched_when_its_weights_do_not_fit(other, strict, tmp_path):
    export_official(small_model(), tmp_path / "w.pth")
    model = small_model(other, seed=3)
    before = weights(model)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_checkpoint(model, tmp_path / "w.pth", strict=strict)
    assert_same_weights(weights(model), before)


def test_missing_and_left_over_weights_are_errors_unless_asked(tmp_path):
    tensors = weights(small_model())
    tensors["extra.weight"] = torch.zeros(2)
    for name in [n for n in tensors if n.startswith("layers.1.blocks.1.")]:
        del tensors[name]
    torch.save(tensors, tmp_path / "w.pth")
    model = small_model(seed=1)
    with pytest.raises(CheckpointError, match=r"depths \(1, 1\) in the file, \(1, 2\) in the model") as caught:
        load_checkpoint(model, tmp_path / "w.pth")
    assert "not in the model (1):\n    extra.weight" in str(caught.value)
    before = weights(model)

    report = load_checkpoint(model, tmp_path / "w.pth", strict=False)

    assert report.skipped == {"not in the model": ("extra.weight",)}
    assert {name.rsplit(".op.")[0].split(".norm")[0][:18] for name in report.kept} >= {"layers.1.blocks.1."[:18]}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in report.kept)
    assert all(torch.equal(model.state_dict()[name], tensors[name]) for name in report.matched)
    assert "not in the file, left as they were: " in str(report)


def test_nothing_in_common_is_an_error_even_when_not_strict():
    with pytest.raises(CheckpointError, match="holds no weights of a VMamba"):
        load_checkpoint(small_model(), Checkpoint("x.pth", {"conv1.weight": torch.zeros(1)}), strict=False)


# Another number of classes


def test_another_number_of_classes_is_adapted_only_when_asked(tmp_path):
    export_official(small_model(), tmp_path / "w.pth")
    model = small_model(seed=1, num_classes=3)
    asked = r"this file has 5 classes; the model has 3 classes\. adapt_classifier=True keeps the backbone"
    with pytest.raises(CheckpointError, match=asked):
        load_checkpoint(model, tmp_path / "w.pth")

    report = load_checkpoint(model, tmp_path / "w.pth", adapt_classifier=True)

    source, loaded = weights(small_model()), weights(model)
    head = {"classifier.head.weight", "classifier.head.bias"}
    assert set(report.reset) == head
    assert report.skipped == {"the head for 5 classes": ("classifier.head.weight", "classifier.head.bias")}
    assert all(torch.equal(loaded[name], source[name]) for name in source.keys() - head)
    assert torch.count_nonzero(loaded["classifier.head.bias"]) == 0
    assert 0 < loaded["classifier.head.weight"].std() < 0.05
    assert "initialised afresh: classifier.head.weight, classifier.head.bias" in str(report)


def test_an_equal_number_of_classes_is_not_adapted(tmp_path):
    export_official(small_model(), tmp_path / "w.pth")
    model = small_model(seed=1)
    report = load_checkpoint(model, tmp_path / "w.pth", adapt_classifier=True)
    assert report.reset == ()
    assert_same_weights(weights(model), weights(small_model()))


def test_a_model_without_a_head_takes_the_rest_when_asked(tmp_path):
    export_official(small_model(), tmp_path / "w.pth")
    model = small_model(seed=1, num_classes=0)
    with pytest.raises(CheckpointError, match="this file has 5 classes; the model has no head"):
        load_checkpoint(model, tmp_path / "w.pth")
    report = load_checkpoint(model, tmp_path / "w.pth", adapt_classifier=True)
    assert report.skipped == {
        "the part of the classifier that this model has not": ("classifier.head.weight", "classifier.head.bias")
    }
    assert torch.equal(model.classifier.norm.weight, small_model().classifier.norm.weight)


def test_load_model_builds_a_model_for_a_backbone_alone(tmp_path):
    tensors = {n: v for n, v in weights(small_model()).items() if not n.startswith("classifier.")}
    torch.save({"state_dict": {f"backbone.{n}": v for n, v in tensors.items()}}, tmp_path / "d.pth")
    model, _ = load_model(tmp_path / "d.pth")
    assert model.num_classes == 0
    assert model.forward_features(torch.rand(1, 3, 64, 64)).shape == (1, 16, 8, 8)
    assert torch.equal(model.classifier.norm.weight, torch.ones(16))
    assert_same_weights({n: v for n, v in weights(model).items() if n in tensors}, tensors)


# Position embedding, dtypes, odd files


def test_position_embedding_is_resized_and_reported(tmp_path):
    source = small_model(replace(SMALL, pos_embed=True, img_size=32))
    export_official(source, tmp_path / "w.pth")
    model = small_model(replace(SMALL, pos_embed=True, img_size=(64, 48)), seed=1)

    report = load_checkpoint(model, tmp_path / "w.pth")

    expected = F.interpolate(source.pos_embed, size=(16, 12), mode="bicubic", antialias=True, align_corners=False)
    assert torch.equal(model.pos_embed, expected)
    assert report.reshaped["pos_embed"] == "(1, 8, 8, 8) -> (1, 8, 16, 12) (resized, bicubic)"
    assert "reshaped 1, e.g. pos_embed" in str(report)


def test_position_embedding_of_another_width_is_an_error():
    config = replace(SMALL, pos_embed=True)
    tensors = {**weights(small_model(config)), "pos_embed": torch.zeros(1, 4, 8, 8)}
    with pytest.raises(CheckpointError, match=r"pos_embed is \(1, 4, 8, 8\) in the file"):
        load_checkpoint(small_model(config), Checkpoint("x.pth", tensors))


def test_half_precision_files_fill_full_precision_models(tmp_path):
    export_official(small_model().half(), tmp_path / "w.pth")
    model = small_model(seed=1)
    load_checkpoint(model, tmp_path / "w.pth")
    assert_same_weights(weights(model), {n: v.half().float() for n, v in weights(small_model()).items()})


def test_values_beyond_a_half_precision_model_are_an_error_not_infinity(tmp_path):
    source = small_model()
    with torch.no_grad():
        source.layers[0].blocks[0].op.Ds[0] = 1e6
    export_official(source, tmp_path / "w.pth")
    model = small_model(seed=1).half()
    before = weights(model)
    with pytest.raises(CheckpointError, match=r"op\.Ds' beyond the range of the model's torch\.float16"):
        load_checkpoint(model, tmp_path / "w.pth")
    assert_same_weights(weights(model), before)


def test_integer_weights_are_an_error(tmp_path):
    tensors = weights(small_model())
    tensors["classifier.head.bias"] = torch.zeros(5, dtype=torch.int8)
    torch.save(tensors, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"holds torch\.int8 in 'classifier\.head\.bias'"):
        load_checkpoint(small_model(), tmp_path / "w.pth")


def test_a_model_on_the_meta_device_is_an_error_not_a_silent_nothing(tmp_path):
    export_official(small_model(), tmp_path / "w.pth")
    with torch.device("meta"):
        model = VMamba(SMALL)
    with pytest.raises(CheckpointError, match="the model is on the meta device"):
        load_checkpoint(model, tmp_path / "w.pth")


def test_batch_norm_counters_may_be_absent(tmp_path):
    config = replace(SMALL, norm_layer="bn")
    tensors = {n: v for n, v in weights(small_model(config)).items() if not n.endswith("num_batches_tracked")}
    torch.save(tensors, tmp_path / "w.pth")
    report = load_checkpoint(small_model(config), tmp_path / "w.pth")
    assert all(name.endswith("num_batches_tracked") for name in report.kept)
    assert load_model(tmp_path / "w.pth")[0].config.norm_layer == "bn"


def test_create_model_loads_a_file(tmp_path):
    source = vmamba.create_model("vmamba_test")
    save_checkpoint(source, tmp_path / "w.safetensors")
    model = vmamba.create_model("vmamba_test", checkpoint_path=str(tmp_path / "w.safetensors"))
    assert_same_weights(weights(model), weights(source))
    assert infer_config(source.state_dict()) == source.config


@pytest.mark.parametrize("create", [vmamba.create_model, timm.create_model])
def test_pretrained_models_take_a_local_file_and_a_new_head_for_other_classes(create, tmp_path, monkeypatch):
    source = vmamba.create_model("vmamba_test")
    export_official(source, tmp_path / "vmamba_test.pth")
    monkeypatch.setenv("VMAMBA_WEIGHTS_DIR", str(tmp_path))

    assert_same_weights(weights(create("vmamba_test", pretrained=True)), weights(source))
    fewer = create("vmamba_test", pretrained=True, num_classes=3)
    assert fewer.classifier.head.weight.shape == (3, 24)
    assert torch.equal(fewer.layers[2].blocks[1].op.A_logs, source.layers[2].blocks[1].op.A_logs)
    features = create("vmamba_test", pretrained=True, features_only=True)
    image = torch.rand(1, 3, 64, 64)
    for ours, theirs in zip(features.eval()(image), source.eval().forward_intermediates(image)[1], strict=True):
        assert torch.equal(ours, theirs)


def test_pretrained_without_published_weights_is_told(monkeypatch):
    monkeypatch.delenv("VMAMBA_WEIGHTS_DIR", raising=False)
    with pytest.raises(ValueError, match="no weights were published for 'vmamba_test'"):
        vmamba.create_model("vmamba_test", pretrained=True)
