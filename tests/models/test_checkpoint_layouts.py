"""Every layout VMamba weights come in, brought to the published one; and architectures read off shapes."""

from dataclasses import replace

import pytest
import torch
from checkpoint_samples import SMALL, VANILLA, assert_same_weights, per_block, small_model, to_older_names, weights
from reference_data import SHARED, needs_shared, relative_error
from safetensors.torch import load_file

from vmamba.models import VMamba, VMambaBackbone, VMambaConfig
from vmamba.models.checkpoint import CheckpointError, infer_config, load_checkpoint, load_model
from vmamba.models.checkpoint_layouts import Architecture, to_published
from vmamba.models.config import PUBLISHED, get_config, variant_name

K = 4


def four_dimensional(tensors):
    linear = ("in_proj", "out_proj", "fc1", "fc2", "reduction", "head")
    return {
        name: value[:, :, None, None] if name.split(".")[-2] in linear and name.endswith("weight") else value
        for name, value in tensors.items()
    }


STORED_OTHERWISE = {
    "older names": to_older_names,
    "linear weights as 1x1 convolutions": four_dimensional,
    "x_proj as one matrix": per_block(
        lambda n, v: {"x_proj.weight": v.flatten(0, 1)} if n == "x_proj_weight" else {n: v}
    ),
    "x_proj as one grouped convolution": per_block(
        lambda n, v: {"x_proj.weight": v.flatten(0, 1)[:, :, None]} if n == "x_proj_weight" else {n: v}
    ),
    "x_proj as one layer a route": per_block(
        lambda n, v: {f"x_proj.{k}.weight": v[k] for k in range(K)} if n == "x_proj_weight" else {n: v}
    ),
    "x_proj flat": per_block(lambda n, v: {n: v.flatten(0, 1)} if n == "x_proj_weight" else {n: v}),
    "dt_projs as one layer": per_block(
        lambda n, v: (
            {n.replace("_weight", ".weight").replace("_bias", ".bias"): v.flatten(0, 1)}
            if n.startswith("dt_projs")
            else {n: v}
        )
    ),
    "dt_projs as one layer a route": per_block(
        lambda n, v: (
            {f"dt_projs.{k}.{n.split('_')[-1]}": v[k] for k in range(K)} if n.startswith("dt_projs") else {n: v}
        )
    ),
    "A_logs and Ds by route": per_block(lambda n, v: {n: v.unflatten(0, (K, -1))} if n in ("A_logs", "Ds") else {n: v}),
    "wrapped for DDP": lambda t: {f"module.{n}": v for n, v in t.items()},
    "compiled inside a trainer": lambda t: {f"model._orig_mod.{n}": v for n, v in t.items()},
    "in a detector": lambda t: {f"backbone.{n}": v for n, v in t.items()},
    "all at once": lambda t: {
        f"module.backbone.{n}": v
        for n, v in to_older_names(
            per_block(
                lambda n, v: {"x_proj.weight": v.flatten(0, 1)} if n == "x_proj_weight" else {n: v},
            )(four_dimensional(t))
        ).items()
    },
}


@pytest.mark.parametrize("config", [SMALL, VANILLA], ids=["v2", "vanilla"])
@pytest.mark.parametrize("layout", STORED_OTHERWISE)
def test_each_layout_loads_as_the_published_one(layout, config, tmp_path):
    source, target = small_model(config), small_model(config, seed=1)
    stored = STORED_OTHERWISE[layout](weights(source))
    assert stored.keys() != source.state_dict().keys() or any(
        value.shape != source.state_dict()[name].shape for name, value in stored.items()
    )
    torch.save({"model": stored}, tmp_path / "old.pth")

    report = load_checkpoint(target, tmp_path / "old.pth")

    assert_same_weights(weights(target), weights(source))
    assert len(report.matched) == len(source.state_dict())
    assert not report.skipped
    assert not report.kept
    if not layout.startswith(("wrapped", "compiled", "in a")):
        assert report.renamed or report.reshaped
        assert report.layout.startswith("older")


def test_report_names_the_files_own_names():
    older = to_older_names(STORED_OTHERWISE["x_proj as one matrix"](weights(small_model())))
    layout = to_published(older)
    assert layout.renamed["layers.0.blocks.0.self_attention.x_proj.weight"] == "layers.0.blocks.0.op.x_proj_weight"
    assert layout.renamed["layers.1.blocks.1.ln_1.bias"] == "layers.1.blocks.1.norm.bias"
    assert layout.renamed["head.bias"] == "classifier.head.bias"
    assert set(layout.renamed) <= set(older)
    assert layout.reshaped["layers.0.blocks.0.op.x_proj_weight"] == "(12, 8) -> (4, 3, 8)"


def test_a_weight_stored_under_both_its_names_is_an_error():
    tensors = weights(small_model())
    tensors["layers.0.blocks.0.ln_1.weight"] = torch.ones(8)
    with pytest.raises(CheckpointError, match=r"holds both 'layers\.0\.blocks\.0\.norm\.weight' and its older name"):
        to_published(tensors)


def test_detectors_heads_are_counted_by_name_and_its_output_norms_reported(tmp_path):
    source = VMambaBackbone(SMALL, out_indices=(0, 1))
    stored = {f"backbone.{name}": value for name, value in source.state_dict().items()}
    stored |= {f"decode_head.conv{i}.weight": torch.zeros(2) for i in range(3)}
    stored |= {"neck.fpn.bias": torch.zeros(2)}
    torch.save({"meta": {"epoch": 12}, "state_dict": stored}, tmp_path / "detector.pth")

    classifier = small_model()
    head = classifier.classifier.head.weight.clone()
    with pytest.raises(CheckpointError, match="backbone without a classifier; the model has 5 classes"):
        load_checkpoint(classifier, tmp_path / "detector.pth")
    assert torch.equal(head, classifier.classifier.head.weight)
    report = load_checkpoint(classifier, tmp_path / "detector.pth", adapt_classifier=True)

    counts = {kind: len(names) for kind, names in report.skipped.items()}
    assert counts.pop("decode_head") == 3
    assert counts.pop("neck") == 1
    ((kind, count),) = counts.items()
    assert "outnorm" in kind
    assert count == 4
    assert report.epoch == 12
    assert report.weights_key == "state_dict"
    assert "backbone." in report.layout
    assert set(report.reset) == {n for n in classifier.state_dict() if n.startswith("classifier.")}
    assert "skipped 3: decode_head" in str(report)


def test_output_norms_go_to_a_backbone_that_has_them(tmp_path):
    source, target = VMambaBackbone(SMALL, out_indices=(0, 1)), VMambaBackbone(SMALL, out_indices=(0, 1))
    with torch.no_grad():
        source.outnorm1.weight.fill_(3)
    torch.save({f"backbone.{name}": value for name, value in source.state_dict().items()}, tmp_path / "d.pth")

    report = load_checkpoint(target, tmp_path / "d.pth")

    assert_same_weights(weights(target), weights(source))
    assert not report.skipped


def test_classification_weights_go_to_a_backbone_and_its_new_norms_are_reported(tmp_path):
    source, target = small_model(), VMambaBackbone(SMALL, out_indices=(0, 1))
    torch.save({"model": source.state_dict()}, tmp_path / "c.pth")

    report = load_checkpoint(target, tmp_path / "c.pth")

    assert torch.equal(target.layers[1].blocks[0].op.A_logs, source.layers[1].blocks[0].op.A_logs)
    assert report.kept == ("outnorm0.weight", "outnorm0.bias", "outnorm1.weight", "outnorm1.bias")
    assert [len(names) for names in report.skipped.values()] == [4]


def test_a_backbone_file_that_lost_its_output_norms_is_an_error(tmp_path):
    tensors = {
        n: v for n, v in VMambaBackbone(SMALL, out_indices=(0, 1)).state_dict().items() if not n.startswith("outnorm")
    }
    torch.save(tensors, tmp_path / "d.pth")
    with pytest.raises(CheckpointError, match="missing in the file \\(4\\)"):
        load_checkpoint(VMambaBackbone(SMALL, out_indices=(0, 1)), tmp_path / "d.pth")


ODD = {
    "small": SMALL,
    "vanilla": VANILLA,
    "gray": replace(SMALL, in_chans=1),
    "wide patch": replace(SMALL, patch_size=8),
    "patch of 2": replace(SMALL, stem="patch", patch_size=2),
    "no stem norm": replace(SMALL, patch_norm=False),
    "conv2x2": replace(SMALL, downsample="conv2x2"),
    "isotropic": replace(SMALL, dims=(8, 8), downsample="none"),
    "one stage": replace(SMALL, depths=(2,), dims=(24,)),
    "empty stage": replace(SMALL, depths=(1, 0, 2), dims=(8, 12, 20)),
    "empty last stage": replace(SMALL, depths=(1, 0), dims=(8, 12)),
    "batch norm": replace(SMALL, norm_layer="bn"),
    "rank 3": replace(SMALL, dt_rank=3),
    "ratios": replace(SMALL, dims=(10, 25), ssm_ratio=1.3, mlp_ratio=2.7),
    "thirds": replace(SMALL, dims=(9, 12), ssm_ratio=4 / 3),
    "no mlp": replace(SMALL, mlp_ratio=0.0),
    "mlp alone": replace(SMALL, ssm_ratio=0.0),
    "gated mlp": replace(SMALL, gated_mlp=True),
    "gated": replace(SMALL, gated=True, d_state=5),
    "no convolution": replace(SMALL, d_conv=0),
    "5x5 with bias": replace(SMALL, d_conv=5, conv_bias=True),
    "position embedding": replace(SMALL, pos_embed=True),
    "oblong position embedding": replace(SMALL, pos_embed=True, img_size=(32, 64)),
    "no out-norm": replace(SMALL, out_norm="none"),
    "dwconv3": replace(SMALL, out_norm="dwconv3"),
    "cnorm": replace(SMALL, out_norm="cnorm"),
    "no classifier": replace(SMALL, num_classes=0),
}


@pytest.mark.parametrize("name", ODD)
def test_architecture_is_read_off_the_shapes_alone(name):
    config = ODD[name]
    tensors = small_model(config).state_dict()

    inferred = infer_config(tensors)

    assert Architecture.of_config(config) == Architecture.of_state_dict(tensors)
    assert inferred.num_classes == config.num_classes
    if config.pos_embed:
        assert inferred.img_size == config.img_size
    rebuilt = VMamba(inferred)
    rebuilt.load_state_dict(tensors)
    image = torch.rand(1, config.in_chans, 32, 32)
    torch.testing.assert_close(rebuilt.eval()(image), small_model(config)(image))


@pytest.mark.parametrize("name", ["vmamba_test", "vmamba_nano", *PUBLISHED])
def test_published_architectures_are_recognised(name):
    config = get_config(name)
    with torch.device("meta"):
        # Two blocks at most of the deep stage: its depth is counted, not built.
        shallow = VMamba(config.replace(depths=tuple(min(d, 2) for d in config.depths))).state_dict()
    tensors = dict(shallow)
    for stage, depth in enumerate(config.depths):
        for block in range(2, depth):
            first = f"layers.{stage}.blocks.0."
            tensors |= {
                n.replace(first, f"layers.{stage}.blocks.{block}."): v
                for n, v in shallow.items()
                if n.startswith(first)
            }

    inferred = infer_config(tensors)

    assert Architecture.of_config(inferred) == Architecture.of_config(config)
    # Ablations of routes, activation and out-norm have the shapes of a main model, and are taken for that.
    unseen = {
        "routes": "cross2d",
        "ssm_act": "silu",
        "out_norm": "none" if config.out_norm == "softmax" else config.out_norm,
    }
    assert variant_name(inferred) == variant_name(config.replace(**unseen))
    assert variant_name(inferred) is not None


def test_routes_no_shape_shows_are_taken_for_the_published_default():
    with torch.device("meta"):
        tensors = VMamba(get_config("vmambav2_tiny_224_unidi_ndw")).state_dict()
    assert infer_config(tensors).routes == "cross2d"
    assert variant_name(infer_config(tensors)) == "vmambav2_tiny_224_ndw"


def test_mamba2_weights_are_told_apart():
    tensors = {n: v for n, v in weights(small_model()).items() if "dt_projs_weight" not in n}
    with pytest.raises(CheckpointError, match="Mamba-2"):
        infer_config(tensors)


def test_weights_of_another_kind_are_no_vmamba():
    with pytest.raises(CheckpointError, match="holds no weights of a VMamba"):
        infer_config({"conv1.weight": torch.zeros(8, 3, 7, 7)})
    tensors = {n: v for n, v in weights(small_model()).items() if not n.startswith("layers.1.blocks.0")}
    with pytest.raises(CheckpointError, match=r"lacks block layers\.1\.blocks\.0"):
        infer_config(tensors)
    odd = weights(small_model())
    odd["layers.1.blocks.0.op.dt_projs_weight"] = torch.zeros(4, 16, 7)
    with pytest.raises(CheckpointError, match="no VMambaConfig describes: ranks"):
        infer_config(odd)


@needs_shared
@pytest.mark.parametrize("name", ["v2_s1", "v2_s2_ln", "vanilla", "gated_v05", "nodw"])
def test_golden_weights_in_the_authors_container_give_the_golden_logits(name, tmp_path):
    tensors = load_file(SHARED / "golden" / f"{name}.safetensors")
    golden = {key: tensors.pop(key) for key in list(tensors) if key.startswith("golden.")}
    torch.save({"model": to_older_names(tensors), "epoch": 3}, tmp_path / "authors.pth")

    model, _ = load_model(tmp_path / "authors.pth")

    with torch.inference_mode():
        assert relative_error(model(golden["golden.image"]), golden["golden.logits"]) <= 1e-5


def test_of_config_covers_every_field_that_changes_a_shape():
    base = {n: v.shape for n, v in VMamba(SMALL).state_dict().items()}
    changes = {"d_state": 2, "dt_rank": 5, "ssm_ratio": 2.0, "mlp_ratio": 1.0, "gated": True, "d_conv": 5}
    changes |= {"conv_bias": True, "out_norm": "cnorm", "gated_mlp": True, "in_chans": 4, "patch_size": 6}
    for field, value in changes.items():
        changed = VMambaConfig.from_dict({**SMALL.to_dict(), field: value})
        assert {n: v.shape for n, v in VMamba(changed).state_dict().items()} != base
        assert Architecture.of_config(changed) != Architecture.of_config(SMALL)
