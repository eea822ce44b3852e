"""Detectors' files: the authors' layout against heads written out by their definition, and our own."""

import json

import pytest
import torch
import torch.nn.functional as F

from vmamba.models.checkpoint import CheckpointError
from vmamba.models.checkpoint_files import write_safetensors
from vmamba.models.config import get_config
from vmamba.models.vmamba import VMambaBackbone
from vmamba.tasks.detection import DetectorConfig, make_vmamba_detector
from vmamba.tasks.detection_checkpoint import (
    coco_classes,
    load_detector,
    load_official_detector,
    save_detector,
    start_from,
)

WIDTH, CLASSES = 8, 5
DIMS = get_config("vmamba_test").stage_dims


def official(classes=CLASSES, masks=True):
    """Return random weights under the names and in the shapes of mmdetection's Mask R-CNN."""
    shapes = {f"neck.lateral_convs.{i}.conv": (WIDTH, dim, 1, 1) for i, dim in enumerate(DIMS)}
    shapes |= {f"neck.fpn_convs.{i}.conv": (WIDTH, WIDTH, 3, 3) for i in range(4)}
    shapes |= {"rpn_head.rpn_conv": (WIDTH, WIDTH, 3, 3), "rpn_head.rpn_cls": (3, WIDTH, 1, 1)}
    shapes |= {"rpn_head.rpn_reg": (12, WIDTH, 1, 1), "roi_head.bbox_head.shared_fcs.0": (4 * WIDTH, 49 * WIDTH)}
    shapes |= {"roi_head.bbox_head.shared_fcs.1": (4 * WIDTH, 4 * WIDTH)}
    shapes |= {"roi_head.bbox_head.fc_cls": (classes + 1, 4 * WIDTH)}
    shapes |= {"roi_head.bbox_head.fc_reg": (4 * classes, 4 * WIDTH)}
    if masks:
        shapes |= {f"roi_head.mask_head.convs.{i}.conv": (WIDTH, WIDTH, 3, 3) for i in range(4)}
        shapes |= {"roi_head.mask_head.upsample": (WIDTH, WIDTH, 2, 2)}
        shapes |= {"roi_head.mask_head.conv_logits": (classes, WIDTH, 1, 1)}
    tensors = {}
    for name, shape in shapes.items():
        out = shape[1] if name.endswith("upsample") else shape[0]
        tensors[f"{name}.weight"] = torch.randn(shape) * 0.1
        tensors[f"{name}.bias"] = torch.randn(out)
    body = VMambaBackbone(get_config("vmamba_test"), num_classes=0)
    tensors |= {f"backbone.{name}": tensor + 0.01 for name, tensor in body.state_dict().items()}
    return tensors


def written(tensors, path):
    torch.save({"meta": {"epoch": 12}, "state_dict": tensors}, path)
    return path


@pytest.fixture
def file(tmp_path):
    tensors = official()
    return tensors, written(tensors, tmp_path / "mask_rcnn.pth")


def pyramid(w, maps):
    """Feature pyramid: 1×1 laterals, nearest upsampling added from above, 3×3; every second pixel of the last."""
    lateral = [F.conv2d(x, w[f"neck.lateral_convs.{i}.conv.weight"], w[f"neck.lateral_convs.{i}.conv.bias"])
               for i, x in enumerate(maps)]  # fmt: skip
    for i in (3, 2, 1):
        lateral[i - 1] = lateral[i - 1] + F.interpolate(lateral[i], size=lateral[i - 1].shape[2:], mode="nearest")
    outputs = [F.conv2d(x, w[f"neck.fpn_convs.{i}.conv.weight"], w[f"neck.fpn_convs.{i}.conv.bias"], padding=1)
               for i, x in enumerate(lateral)]  # fmt: skip
    return [*outputs, outputs[-1][:, :, ::2, ::2]]


def test_the_authors_layers_compute_what_their_definition_says(file):
    w, path = file
    model, _ = load_detector(path)
    body = VMambaBackbone(get_config("vmamba_test"), num_classes=0).eval()
    body.load_state_dict({n.removeprefix("backbone."): t for n, t in w.items() if n.startswith("backbone.")})
    with torch.no_grad():
        image = torch.randn(1, 3, 96, 128)
        expected = pyramid(w, body(image))
        found = list(model.backbone(image).values())
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)

        scores, offsets = model.rpn.head(found)
        for x, score, offset in zip(expected, scores, offsets, strict=True):
            hidden = F.conv2d(x, w["rpn_head.rpn_conv.weight"], w["rpn_head.rpn_conv.bias"], padding=1).relu()
            cls = F.conv2d(hidden, w["rpn_head.rpn_cls.weight"], w["rpn_head.rpn_cls.bias"])
            reg = F.conv2d(hidden, w["rpn_head.rpn_reg.weight"], w["rpn_head.rpn_reg.bias"])
            torch.testing.assert_close(score, cls, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(offset, reg, atol=1e-5, rtol=1e-5)

        regions, head = torch.randn(6, WIDTH, 7, 7), "roi_head.bbox_head"
        hidden = regions.flatten(1)
        for i in (0, 1):
            hidden = F.linear(hidden, w[f"{head}.shared_fcs.{i}.weight"], w[f"{head}.shared_fcs.{i}.bias"]).relu()
        cls = F.linear(hidden, w[f"{head}.fc_cls.weight"], w[f"{head}.fc_cls.bias"]).softmax(1)  # background last
        reg = F.linear(hidden, w[f"{head}.fc_reg.weight"], w[f"{head}.fc_reg.bias"])
        logits, boxes = model.roi_heads.box_predictor(model.roi_heads.box_head(regions))
        torch.testing.assert_close(logits.softmax(1)[:, 1:], cls[:, :-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(boxes[:, 4:], reg, atol=1e-5, rtol=1e-5)

        x = regions = torch.randn(3, WIDTH, 14, 14)
        for i in range(4):
            conv = f"roi_head.mask_head.convs.{i}.conv"
            x = F.conv2d(x, w[f"{conv}.weight"], w[f"{conv}.bias"], padding=1).relu()
        up, last = "roi_head.mask_head.upsample", "roi_head.mask_head.conv_logits"
        x = F.conv_transpose2d(x, w[f"{up}.weight"], w[f"{up}.bias"], stride=2).relu()
        expected_masks = F.conv2d(x, w[f"{last}.weight"], w[f"{last}.bias"])
        masks = model.roi_heads.mask_predictor(model.roi_heads.mask_head(regions))
        torch.testing.assert_close(masks[:, 1:], expected_masks, atol=1e-5, rtol=1e-5)


def test_the_report_tells_what_was_loaded_and_reordered(file):
    tensors, path = file
    model = make_vmamba_detector("vmamba_test", DetectorConfig(CLASSES, channels=WIDTH))
    report = load_official_detector(model, path)
    assert report.backbone + report.heads == len(tensors)
    assert len(report.reordered) == 6  # weight and bias of class, box and mask
    assert "background moved" in str(report)


def test_a_file_of_other_classes_keeps_all_but_the_last_layers(file):
    tensors, path = file
    model = make_vmamba_detector("vmamba_test", DetectorConfig(2, channels=WIDTH))
    before = model.state_dict()["roi_heads.box_predictor.cls_score.weight"].clone()
    assert "other classes" in start_from(model, path)
    after = model.state_dict()
    assert torch.equal(after["roi_heads.box_head.fc7.weight"], tensors["roi_head.bbox_head.shared_fcs.1.weight"])
    assert torch.equal(after["roi_heads.box_predictor.cls_score.weight"], before)


def test_boxes_alone_and_the_names_of_coco(tmp_path):
    model, metadata = load_detector(written(official(80, masks=False), tmp_path / "faster.pth"))
    assert not model.roi_heads.has_mask()
    assert metadata["labels"] == list(coco_classes())
    assert (len(coco_classes()), coco_classes()[0], coco_classes()[-1]) == (80, "person", "toothbrush")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("neck.fpn_convs.2.conv.bias"), "lacks backbone.fpn.layer_blocks.2.0.bias"),
        (lambda t: t.update({"roi_head.mask_iou_head.fc.weight": torch.ones(1)}), "another kind than Mask R-CNN"),
        (lambda t: t.update({"rpn_head.rpn_cls.bias": torch.ones(9)}), "in another shape rpn.head.cls_logits.bias"),
        (lambda t: t.update({"rpn_head.rpn_cls.bias": torch.full((3,), float("nan"))}), "NaN or infinity"),
        (lambda t: t.pop("neck.lateral_convs.0.conv.weight"), "another kind than Mask R-CNN"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, change, sentence):
    tensors = official()
    change(tensors)
    with pytest.raises(CheckpointError, match=sentence):
        load_detector(written(tensors, tmp_path / "other.pth"))


def test_our_files_stand_for_themselves(tmp_path):
    model = make_vmamba_detector("vmamba_test", DetectorConfig(2, channels=WIDTH, min_size=64, detections=9))
    save_detector(model, tmp_path / "ours.safetensors", {"labels": ["a", "b"]})
    again, metadata = load_detector(tmp_path / "ours.safetensors")
    assert metadata == {"labels": ["a", "b"]}
    assert again.config == model.config
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_files_of_no_detector_or_of_a_later_version_are_refused(tmp_path):
    write_safetensors({"layers.0.weight": torch.ones(1)}, tmp_path / "other.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="holds no detector"):
        load_detector(tmp_path / "other.safetensors")
    header = {"detector_version": "99", "detector": json.dumps({"classes": 1}), "backbone": "{}"}
    write_safetensors({"a": torch.ones(1)}, tmp_path / "later.safetensors", header)
    with pytest.raises(CheckpointError, match="upgrade vmamba"):
        load_detector(tmp_path / "later.safetensors")
