import json
import math

import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from vmamba.analysis.flops import count_flops
from vmamba.tasks.detection import (
    CountedForward,
    DetectorConfig,
    PyramidRoIAlign,
    make_vmamba_detector,
    paste_masks,
)

# Published rows: backbone, 10⁶ parameters, 10⁹ operations at 1280×800, and the older count the tables strike through.
# VMamba-S is printed with 384; published.json's errata say that 349 is meant.
ROWS = (
    ("vanilla_vmamba_tiny", 42, 286, 262),
    ("vanilla_vmamba_small", 64, 400, 357),
    ("vanilla_vmamba_base", 96, 540, 482),
    ("vmamba_tiny_s2l5", 50, 270, None),
    ("vmamba_small", 70, 349, None),
    ("vmamba_base", 108, 485, None),
    ("vmamba_tiny", 50, 271, None),
)


@pytest.mark.parametrize(("backbone", "parameters", "operations", "naive"), ROWS)
def test_parameters_and_flops_are_the_published_ones(backbone, parameters, operations, naive):
    with torch.device("meta"):
        model = make_vmamba_detector(backbone, DetectorConfig(80))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=0.01)
    counted = CountedForward(model)
    assert count_flops(counted, (800, 1280)).total / 1e9 == pytest.approx(operations, rel=0.01)
    if naive:
        assert count_flops(counted, (800, 1280), convention="naive").total / 1e9 == pytest.approx(naive, rel=0.01)


def small(masks=True, **changes):
    torch.manual_seed(0)
    config = DetectorConfig(3, masks=masks, min_size=64, max_size=128, channels=8, **changes)
    return make_vmamba_detector("vmamba_test", config)


def targets(masks):
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [30.0, 10.0, 60.0, 44.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 3])}
    if masks:
        target["masks"] = torch.zeros(2, 64, 96, dtype=torch.uint8)
        target["masks"][0, 6:50, 4:40] = 1
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    if masks:
        empty["masks"] = torch.zeros(0, 80, 64, dtype=torch.uint8)
    return [target, empty]


@pytest.mark.parametrize("masks", [True, False])
def test_every_weight_gets_a_gradient_even_beside_an_image_without_objects(masks):
    model = small(masks).train()
    losses = model([torch.rand(3, 64, 96), torch.rand(3, 80, 64)], targets(masks))
    assert set(losses) == {
        "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", *(["loss_mask"] if masks else []),
    }  # fmt: skip
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without


def test_an_image_alone_without_objects_has_a_loss_that_reaches_every_weight():
    model = small().train()
    sum(model([torch.rand(3, 80, 64)], targets(True)[1:]).values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_images_keep_their_size_in_training_and_results_come_in_pixels_of_the_original():
    model = small(score_threshold=0.0).eval()
    with torch.no_grad():
        (found,) = model([torch.rand(3, 200, 100)])
    assert found["masks"].shape[1:] == (1, 28, 28)
    assert found["boxes"][:, 2].max() <= 100
    assert 64 < found["boxes"][:, 3].max() <= 200
    images, _ = model.train().transform([torch.rand(3, 200, 100)])
    assert images.image_sizes == [(200, 100)]


def test_anchors_are_not_rounded_and_stay_exact_beside_16_bit_maps():
    anchors = small().rpn.anchor_generator
    maps = [torch.zeros(1, 8, 64 // 2**i, 512 // 2**i, dtype=torch.bfloat16) for i in range(5)]
    (every,) = anchors(ImageList(torch.zeros(1, 3, 256, 2048), [(256, 2048)]), maps)
    assert every.dtype == torch.float32
    wide, square, tall = every[:3]
    root = math.sqrt(2)
    expected = torch.tensor([-16 * root, -16 / root, 16 * root, 16 / root])
    torch.testing.assert_close(wide, expected)
    torch.testing.assert_close(square, torch.tensor([-16.0, -16.0, 16.0, 16.0]))
    torch.testing.assert_close(tall, expected[[1, 0, 3, 2]])
    torch.testing.assert_close(every[3 * 511 + 1], torch.tensor([2028.0, -16.0, 2060.0, 16.0]))


@pytest.mark.parametrize(("side", "level"), [(20, 0), (111, 0), (113, 1), (223, 1), (225, 2), (449, 3), (2000, 3)])
def test_a_region_is_pooled_from_the_map_of_its_size(side, level):
    maps = {str(i): torch.full((1, 1, 64, 64), float(i)) for i in range(4)}
    pooled = PyramidRoIAlign(2)(maps, [torch.tensor([[0.0, 0.0, side, side]])], [(2048, 2048)])
    assert pooled.mean() == level


def test_pooling_a_ramp_gives_the_values_at_the_centres_of_the_cells():
    """Pixel i of the map covers the image from 4i to 4i + 4: at x its value is x/4 - 1/2 on a ramp."""
    ramp = torch.arange(32.0).expand(1, 1, 32, 32)
    maps = {str(i): ramp for i in range(4)}
    pooled = PyramidRoIAlign(2)(maps, [torch.tensor([[16.0, 16.0, 48.0, 48.0]])], [(128, 128)])
    torch.testing.assert_close(pooled[0, 0, 0], torch.tensor([24 / 4 - 0.5, 40 / 4 - 0.5]))


def test_mixed_precision_keeps_boxes_to_the_pixel():
    model = small(score_threshold=0.0).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = model([torch.rand(3, 64, 128)])
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32


def test_pasted_masks_fill_their_boxes():
    found = {"boxes": torch.tensor([[10.0, 5.0, 30.0, 25.0], [0.0, 0.0, 8.0, 8.0]]), "masks": torch.ones(2, 1, 28, 28)}
    masks = paste_masks(found, (40, 50))
    assert masks.dtype == torch.bool
    assert masks[0, 6:24, 11:29].all()
    assert not masks[0, :4].any()
    assert not masks[0, :, 33:].any()
    assert torch.equal(paste_masks(found, (40, 50), 1, 1), masks[1:])
    assert paste_masks({name: value[:0] for name, value in found.items()}, (40, 50)).shape == (0, 40, 50)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"classes": 0}, "classes must be 1 or more"),
        ({"classes": 2, "max_size": 100}, "max_size must be min_size"),
        ({"classes": 2, "nms_threshold": 2}, r"nms_threshold must lie in \[0, 1\]"),
    ],
)
def test_a_detector_that_makes_no_sense_is_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        DetectorConfig(**values)


def test_backbones_without_the_four_strides_are_refused():
    with pytest.raises(ValueError, match="strides 4, 8, 16 and 32"):
        make_vmamba_detector("vmamba_test", DetectorConfig(2), {"patch_size": 8})
    with pytest.raises(ValueError, match=r"needs four stages, .*; vmamba_nano has 3: take vmamba_tiny"):
        make_vmamba_detector("vmamba_nano", DetectorConfig(2))


def test_a_configuration_survives_json():
    config = DetectorConfig(5, masks=False, detections=7)
    assert DetectorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="later version"):
        DetectorConfig.from_dict({"classes": 2, "colour": 1})
