"""UperNet on a VMamba: its definition, the published sizes, weights of mmsegmentation, loss and figures."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from vmamba.analysis.flops import count_flops
from vmamba.models.checkpoint import CheckpointError
from vmamba.tasks.segmentation import (
    IGNORE,
    SegmentationLogits,
    SegmentationReport,
    create_segmenter,
    evaluate,
    segmentation_loss,
)
from vmamba.tasks.segmentation_checkpoint import (
    load_segmentation_checkpoint,
    load_segmentation_model,
    save_segmentation_checkpoint,
)

VARIANTS = {
    "Vanilla-VMamba-T": "vanilla_vmamba_tiny",
    "Vanilla-VMamba-S": "vanilla_vmamba_small",
    "Vanilla-VMamba-B": "vanilla_vmamba_base",
    "VMamba-T[s2l5]": "vmamba_tiny_s2l5",
    "VMamba-S[s2l15]": "vmamba_small",
    "VMamba-B[s2l15]": "vmamba_base",
    "VMamba-T[s1l8]": "vmamba_tiny",
}


def random_model(classes=7, auxiliary=8, seed=0):
    """A small UperNet whose every tensor is random, running statistics included."""
    torch.manual_seed(seed)
    model = create_segmenter("vmamba_test", classes, hidden=16, auxiliary=auxiliary)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and not name.startswith("backbone."):
                value.copy_(torch.rand(value.shape) * 0.3 + (0.5 if name.endswith("running_var") else -0.1))
    return model.eval()


def mmseg_layout(model):
    return {
        name.replace(".batch_norm.", ".bn.").replace(".classifier.", ".conv_seg."): value.clone()
        for name, value in model.state_dict().items()
    }


def written_by_hand(weights, maps):
    """UPerHead as mmsegmentation defines it, from its names: conv, norm, ReLU; pyramid pooling; top-down sums."""

    def conv(name, x):
        kernel = weights[f"decode_head.{name}.conv.weight"]
        y = functional.conv2d(x, kernel, padding=kernel.shape[2] // 2)
        mean, var, scale, shift = (
            weights[f"decode_head.{name}.bn.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((y - mean) / (var + 1e-5).sqrt() * scale + shift).relu()

    def up(x, like):
        return functional.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)

    top = maps[3]
    pooled = [
        conv(f"psp_modules.{i}.1", functional.adaptive_avg_pool2d(top, bins)) for i, bins in enumerate((1, 2, 3, 6))
    ]
    laterals = [conv(f"lateral_convs.{i}", maps[i]) for i in range(3)]
    laterals.append(conv("bottleneck", torch.cat([top, *(up(p, top) for p in pooled)], 1)))
    for i in (2, 1, 0):
        laterals[i] = laterals[i] + up(laterals[i + 1], laterals[i])
    fine = [conv(f"fpn_convs.{i}", laterals[i]) for i in range(3)] + [laterals[3]]
    joined = conv("fpn_bottleneck", torch.cat([up(x, fine[0]) for x in fine], 1))
    return functional.conv2d(joined, weights["decode_head.conv_seg.weight"], weights["decode_head.conv_seg.bias"])


def test_published_segmentation_rows_have_the_published_size(shared: Path) -> None:
    published = json.loads((shared / "reference" / "published.json").read_text())
    rows = [(row, (512, 2048)) for row in published["performance_md"]["seg"]]
    rows += [(row, (640, 2560)) for row in published["seg_640_old_readme"]]
    checked = naive = 0
    for row, size in rows:
        if row["backbone"] not in VARIANTS:
            continue
        with torch.device("meta"):
            model = create_segmenter(VARIANTS[row["backbone"]], 150)
        assert count_flops(model, size).total / 1e9 == pytest.approx(row["flops_G"], rel=2e-3)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(row["params_M"], abs=0.51, rel=0)
        checked += 1
        if older := row.get("flops_G_naive_struck"):
            assert count_flops(model, size, convention="naive").total / 1e9 == pytest.approx(older, rel=2e-3)
            naive += 1
    assert (checked, naive) == (9, 3)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_logits_after_mapping_mmseg_weights_are_those_of_a_head_written_by_hand(tmp_path: Path, prefix: str) -> None:
    source = random_model()
    weights = mmseg_layout(source)
    path = tmp_path / "iter_160000.pth"
    torch.save({"meta": {"iter": 1}, "state_dict": {prefix + name: t for name, t in weights.items()}}, path)
    model, metadata = load_segmentation_model(path)
    assert metadata == {}
    images = torch.randn(2, 3, 96, 70)
    with torch.no_grad():
        exact = written_by_hand(weights, model.backbone(images))
        actual = model(images).logits
    assert actual.shape == (2, 7, 24, 18)
    assert (actual - exact).abs().max() <= 1e-5
    assert exact.abs().max() > 0.1
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_own_files_keep_configuration_and_metadata(tmp_path: Path) -> None:
    path, source = tmp_path / "w.safetensors", random_model()
    save_segmentation_checkpoint(source, path, metadata={"labels": ["a"]})
    model, metadata = load_segmentation_model(path)
    assert metadata == {"labels": ["a"], "task": "segmentation"}
    assert model.config == source.config
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images).logits, source(images).logits)


def test_weights_that_do_not_fit_leave_the_model_alone_and_say_why(tmp_path: Path) -> None:
    path = tmp_path / "seven.pth"
    weights = mmseg_layout(random_model())
    torch.save({"state_dict": weights}, path)
    model = random_model(classes=5, auxiliary=0, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="only the number of classes differs"):
        load_segmentation_checkpoint(model, path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    report = load_segmentation_checkpoint(model, path, adapt_classifier=True)
    assert set(report.reset) == {"decode_head.classifier.weight", "decode_head.classifier.bias"}
    assert len(report.unused) == 8
    assert "conv_seg" in str(report)
    assert torch.equal(model.state_dict()["decode_head.classifier.bias"], before["decode_head.classifier.bias"])
    assert torch.equal(model.decode_head.bottleneck.conv.weight, weights["decode_head.bottleneck.conv.weight"])

    del weights["decode_head.fpn_bottleneck.conv.weight"]
    torch.save({"state_dict": weights}, path)
    with pytest.raises(CheckpointError, match=r"missing in the file \(1\):\n.*fpn_bottleneck"):
        load_segmentation_checkpoint(model, path, adapt_classifier=True)
    weights["decode_head.bottleneck.conv.weight"][0] = torch.nan
    torch.save({"state_dict": weights}, path)
    with pytest.raises(CheckpointError, match="NaN"):
        load_segmentation_model(path)
    torch.save({"state_dict": {n: t for n, t in weights.items() if n.startswith("backbone.")}}, path)
    with pytest.raises(CheckpointError, match="no segmentation model"):
        load_segmentation_model(path)


def test_the_auxiliary_head_trains_and_is_not_computed_in_evaluation() -> None:
    model = random_model()
    assert model(torch.randn(1, 3, 64, 64)).auxiliary is None
    output = model.train()(torch.randn(2, 3, 64, 64))
    assert output.auxiliary.shape == (2, 7, 4, 4)
    segmentation_loss(output, torch.randint(0, 7, (2, 64, 64), dtype=torch.uint8)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    classifier = model.decode_head.classifier
    assert isinstance(classifier, nn.Conv2d)
    dropped = classifier(torch.ones(1, 16, 1, 1).expand(64, 16, 8, 8))
    assert dropped.std(0).max() > 0  # not the same channels of each image
    assert torch.equal(dropped[..., :1, :1].expand_as(dropped), dropped)  # whole channels


def test_loss_is_the_mean_over_all_pixels_and_unlabelled_pictures_give_none() -> None:
    logits, auxiliary = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    masks = torch.tensor([[[0, 1, 2, IGNORE]] * 4], dtype=torch.uint8)
    known = masks.long().reshape(-1) != IGNORE
    one, two = (
        functional.cross_entropy(x.permute(0, 2, 3, 1).reshape(-1, 3)[known], masks.long().reshape(-1)[known]) * 0.75
        for x in (logits, auxiliary)
    )
    assert segmentation_loss(SegmentationLogits(logits, auxiliary), masks) == pytest.approx(float(one + 0.4 * two))
    nothing = torch.full_like(masks, IGNORE)
    assert segmentation_loss(SegmentationLogits(logits, None), nothing) == 0


def test_figures_come_from_the_confusion_matrix() -> None:
    true = torch.tensor([[[0, 0, 1, 1], [1, IGNORE, IGNORE, 0]]], dtype=torch.uint8)
    predicted = torch.tensor([[[0, 1, 1, 1], [1, 2, 0, 0]]], dtype=torch.uint8)
    batches = [(torch.zeros(1, 3, 2, 4), true), (torch.empty(0), torch.empty(0, 1, 1))]
    report = evaluate(lambda images, size: predicted, batches, ("a", "b", "c", "d"), torch.device("cpu"))
    assert report.confusion[0] == (2, 1, 0, 0)
    assert (report.count, report.pixels) == (1, 6)
    assert report.iou == (2 / 3, 3 / 4, None, None)
    assert report.miou == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert report.pixel_accuracy == pytest.approx(5 / 6)
    assert report.accuracy == (2 / 3, 1.0, None, None)
    # A class that is only predicted counts as missed by all.
    wrong = SegmentationReport.of_confusion(torch.tensor([[1, 1], [0, 0]]), ("a", "b"), 1)
    assert wrong.iou == (0.5, 0.0)
    assert wrong.accuracy == (0.5, None)
    with pytest.raises(ValueError, match="no readable image"):
        evaluate(lambda images, size: predicted, [], ("a", "b"), torch.device("cpu"))


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="two classes"):
        create_segmenter("vmamba_test", 1)
    with pytest.raises(ValueError, match="vmamba_tiny"):
        create_segmenter("vmamba_tinny", 3)
