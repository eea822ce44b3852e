import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from torch import nn

import vmamba
from vmamba.deployment import export as export_module
from vmamba.deployment import onnx_scan
from vmamba.deployment.accuracy import compare_on
from vmamba.deployment.export import ExportFailedError, export, sample_photographs
from vmamba.deployment.files import Description, load_exported
from vmamba.deployment.onnx_model import to_onnx
from vmamba.deployment.program import FeatureMaps, OpenPooling, keep_linear_whole, prepared, trace
from vmamba.models import VMambaBackbone

SHAPES = [(1, 64, 64), (5, 97, 161), (1, 32, 32), (2, 64, 96)]


def differences(exported, model, shapes=SHAPES):
    found = []
    for batch, height, width in shapes:
        images = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected = model(images)
        expected = expected if isinstance(expected, (list, tuple)) else [expected]
        for given, wanted in zip(exported(images.numpy()), expected, strict=True):
            found.append(((torch.from_numpy(given) - wanted).norm() / wanted.norm()).item())
    return found


def test_onnx_of_any_size(onnx_report, model):
    exported = load_exported(onnx_report.path, threads=1)
    assert max(differences(exported, model)) <= 1e-5
    assert onnx_report.largest <= 1e-5
    assert [d.shape for d in onnx_report.differences] == [(1, 64, 64), (2, 224, 224), (1, 97, 161)]


def test_onnx_tells_what_it_is(onnx_report, description):
    file = onnx.load(str(onnx_report.path))
    (images,) = file.graph.input
    sizes = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, "height", "width"]
    assert [output.name for output in file.graph.output] == ["logits"]
    stored = json.loads({p.key: p.value for p in file.metadata_props}["vmamba"])
    assert stored["labels"][3] == "class 3"
    assert stored["preprocessing"]["crop_pct"] == description.preprocessing["crop_pct"]
    assert stored["vmamba_version"] == vmamba.__version__
    assert load_exported(onnx_report.path).description.labels == description.labels


@pytest.mark.parametrize(
    "changes",
    [
        {"routes": "cascade2d"},
        {"gated": True, "sequential_routes": True, "force_fp32": True, "d_state": 4, "downsample": "patch_merging"},
        {"pos_embed": True, "norm_layer": "bn", "routes": "bidi"},
    ],
    ids=["cascade", "vanilla", "position embedding"],
)
def test_onnx_of_other_architectures(changes, tmp_path):
    model = vmamba.create_model("vmamba_test", depths=(1, 1), **changes).eval()
    report = export(model, tmp_path / "model.onnx", Description("other"))
    assert report.largest <= 1e-5
    assert max(differences(load_exported(report.path, threads=1), model, SHAPES[:2])) <= 1e-5


def test_onnx_of_feature_maps(tmp_path):
    model = VMambaBackbone(vmamba.VMambaConfig(depths=(1, 1), dims=8), out_indices=(0, 1)).eval()
    told = Description("backbone", task="features", outputs=("stage0", "stage1"))
    report = export(model, tmp_path / "maps.onnx", told)
    exported = load_exported(report.path, threads=1)
    assert exported.description.outputs == ("stage0", "stage1")
    assert max(differences(exported, model, SHAPES[:2])) <= 1e-5


def test_feature_maps_are_those_of_the_model(model):
    images = torch.randn(1, 3, 64, 64)
    for given, wanted in zip(
        FeatureMaps(model)(images), model.forward_intermediates(images, intermediates_only=True), strict=True
    ):
        assert torch.equal(given, wanted)


@pytest.mark.slow  # builds and traces a segmentation model
def test_onnx_of_a_segmentation_model(tmp_path):
    import segmentation_models_pytorch as smp

    import vmamba.models  # noqa: F401  (registers the names)

    model = smp.FPN("tu-vmamba_test", encoder_weights=None, classes=3).eval()
    told = Description("fpn", task="segmentation", outputs=("masks",))
    report = export(model, tmp_path / "fpn.onnx", told, img_size=(64, 96))
    exported = load_exported(report.path, threads=1)
    assert exported(np.zeros((3, 3, 64, 96), np.float32))[0].shape == (3, 3, 64, 96)
    assert report.largest <= 1e-5


@pytest.mark.parametrize("size", [1, 2, 3, (6, 4), (None, 2)])
def test_open_pooling_is_adaptive_average_pooling(size):
    theirs, ours = nn.AdaptiveAvgPool2d(size), OpenPooling(size)
    for height, width in ((1, 1), (2, 5), (6, 6), (13, 40)):
        images = torch.randn(2, 3, height, width)
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "format",
    [
        "onnx",
        pytest.param("program", marks=pytest.mark.slow),  # as above, traced again
    ],
)
def test_upernet_of_any_size(format, tmp_path):
    from vmamba.tasks.segmentation import create_segmenter

    config = vmamba.VMambaConfig(depths=(1, 1, 1, 1), dims=8)
    model = create_segmenter(config, 5, hidden=8, auxiliary=4).eval()
    told = Description("UperNet", task="segmentation")
    target = tmp_path / ("model.onnx" if format == "onnx" else "model.pt2")
    exported = load_exported(export(model, target, told, format=format).path, threads=1)
    assert exported.description.dynamic_size
    assert max(differences(exported, lambda images: model(images).logits)) <= 1e-5
    assert isinstance(model.decode_head.psp_modules.blocks[0].layers[0], nn.AdaptiveAvgPool2d)
    assert not any(isinstance(module, OpenPooling) for module in model.modules())


def test_half_precision_is_as_exact_as_the_model_in_half(model, description, tmp_path):
    report = export(model, tmp_path / "half.onnx", description, precision="float16")
    assert 1e-5 < report.largest <= report.bound < 1e-1
    assert load_exported(report.path).description.dtype == "float16"


def test_program(model, description, tmp_path):
    report = export(model, tmp_path / "model.pt2", description, format="program")
    exported = load_exported(report.path)
    assert exported.format == "program"
    assert exported.description.labels == description.labels
    assert max(differences(exported, model)) <= 1e-5


@pytest.mark.slow  # compiles C++
def test_aoti(model, description, tmp_path):
    try:
        export_module.require_compiler()
    except ValueError as error:
        pytest.skip(str(error))
    report = export(model, tmp_path / "model.pt2", description, format="aoti")
    exported = load_exported(report.path)
    assert exported.format == "aoti"
    assert exported.description.labels == description.labels
    assert max(differences(exported, model)) <= 1e-5


def test_missing_compiler_is_told(model, description, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="no-such-compiler cannot be found"):
        export(model, tmp_path / "model.pt2", description, format="aoti")


@pytest.mark.parametrize("kind", ["int8-weights", "int8-dynamic"])
def test_quantised_weights(kind, model, description, tmp_path):
    report = export(model, tmp_path / "small.onnx", description, quantization=kind)
    exported = load_exported(report.path)
    assert exported.description.quantization == kind
    assert 1e-5 < report.largest < 0.1
    assert list(tmp_path.iterdir()) == [report.path]
    if kind == "int8-dynamic":  # as processors add them that have no VNNI: 2 · 255 · 64 is the most that 16 bits hold
        tensors = [numpy_helper.to_array(tensor) for tensor in onnx.load(report.path).graph.initializer]
        weights = [tensor for tensor in tensors if tensor.dtype == np.int8 and tensor.ndim == 2]
        assert weights
        assert max(np.abs(weight.astype(int)).max() for weight in weights) <= 64


def test_a_file_that_disagrees_is_not_left_behind(model, description, tmp_path, monkeypatch):
    wrong = onnx_scan._SOFTPLUS.replace("Relu(z)", "Abs(z)")
    monkeypatch.setattr(onnx_scan, "_SOFTPLUS", wrong)
    with pytest.raises(ExportFailedError, match="differs from the model by"):
        export(model, tmp_path / "model.onnx", description)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_gives_nan_is_not_left_behind(model, description, tmp_path, monkeypatch):
    none = "minus = Neg(t) none = Log(minus) log1p = Mul(none, ratio)"
    wrong = onnx_scan._SOFTPLUS.replace("log1p = Mul(t, ratio)", none)
    monkeypatch.setattr(onnx_scan, "_SOFTPLUS", wrong)
    with pytest.raises(ExportFailedError, match="nan"):
        export(model, tmp_path / "model.onnx", description)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.pt2", {}, "must end in .onnx"),
        ("model.onnx", {"format": "program"}, "must end in .pt2"),
        ("model.onnx", {"format": "tensorrt"}, "format must be one of"),
        ("model.onnx", {"precision": "float16", "quantization": "int8-dynamic"}, "--precision float32"),
        ("nowhere/model.onnx", {}, "there is no folder"),
        ("model.onnx", {"photographs": []}, "proven on images"),
        ("there.onnx", {}, "exists already"),
    ],
)
def test_what_cannot_be_exported(name, options, message, model, description, tmp_path):
    (tmp_path / "there.onnx").write_bytes(b"mine")
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / name, description, **options)
    assert (tmp_path / "there.onnx").read_bytes() == b"mine"


def test_a_model_that_returns_something_else(description, tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images):
            return "a cat"

    with pytest.raises(TypeError, match="must return tensors, not str"):
        export(Odd(), tmp_path / "odd.onnx", description)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_exported(tmp_path / "missing.onnx")
    for name in ("broken.onnx", "broken.pt2", "model.txt"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(ValueError, match=name):
            load_exported(tmp_path / name)


def test_an_onnx_file_of_others_is_refused(model, tmp_path):
    file = to_onnx(trace(model), ("logits",), {})
    onnx.save(file, str(tmp_path / "theirs.onnx"))
    with pytest.raises(ValueError, match="was not written by `vmamba export`"):
        load_exported(tmp_path / "theirs.onnx")


def test_description_survives_what_later_versions_add(tmp_path):
    told = Description("m", labels=("a",)).to_metadata()
    later = {"vmamba": json.dumps(json.loads(told["vmamba"]) | {"invented": 1})}
    assert Description.from_metadata(later, tmp_path) == dataclasses.replace(Description("m", labels=("a",)))


def test_photographs_are_real():
    assert all(isinstance(p, Image.Image) and min(p.size) > 300 for p in sample_photographs())


def test_accuracy_beside_the_model(model, onnx_report):
    from vmamba.data.sources import open_source
    from vmamba.data.transforms import Preprocessing

    images = open_source("digits").held_out.subset(np.arange(40))
    transform = Preprocessing.for_style("glyphs", 32).transform()
    compared = compare_on(images, model, load_exported(onnx_report.path), transform)
    assert compared.count == 40
    assert compared.agreement == 1.0
    assert compared.model == compared.exported
    with torch.no_grad():
        batch = torch.stack([transform(images.read(i)) for i in range(40)])
        right = (model(batch).argmax(1).numpy() == images.targets).mean()
    assert compared.model == pytest.approx(right)


def test_linear_layers_kept_whole_for_compilers(model):
    program = trace(model)
    count = sum(node.target is torch.ops.aten.linear.default for node in program.graph.nodes)
    keep_linear_whole(program)
    targets = [node.target for node in program.graph.nodes]
    assert torch.ops.aten.linear.default not in targets
    assert targets.count(torch.ops.vmamba.whole_linear.default) == count > 0
    images = torch.randn(3, 3, 40, 70)
    with torch.no_grad():
        assert torch.equal(program.module()(images)[0], prepared(model)(images)[0])
