"""Whole, sliding-window and multi-scale inference, for any size of image and within the memory stated."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from vmamba.tasks import segmentation_inference
from vmamba.tasks.segmentation import create_segmenter
from vmamba.tasks.segmentation_inference import InferenceOptions, Segmenter


class Pointwise(nn.Module):
    """Logits that depend on a place alone: what a window says of it must not depend on the window."""

    stride = 4

    def __init__(self, classes=5):
        super().__init__()
        self.conv = nn.Conv2d(3, classes, 4, stride=4)

    def forward(self, images):
        return SimpleNamespace(
            logits=self.conv(functional.pad(images, (0, -images.shape[3] % 4, 0, -images.shape[2] % 4)))
        )


def resized(logits, size):
    return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("size", [(61, 90), (128, 130), (32, 33), (5, 7)])
@pytest.mark.parametrize("band", [segmentation_inference.BAND_BYTES, 1])
def test_whole_is_the_argmax_of_the_resized_logits(size, band, monkeypatch):
    monkeypatch.setattr(segmentation_inference, "BAND_BYTES", band)
    model, image = create_segmenter("vmamba_test", 4, hidden=8, auxiliary=0).eval(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        model.decode_head.classifier.weight *= 100  # so that few places are undecided
        logits = resized(model(image).logits, size)
    actual = Segmenter(model)(image, size)
    assert actual.dtype == torch.uint8
    close = logits.topk(2, dim=1).values.diff(dim=1).abs()[:, 0] < 1e-5
    assert ((actual == logits.argmax(1)) | close).all()
    assert close.float().mean() < 0.02


@pytest.mark.parametrize("shape", [(64, 64), (64, 200), (201, 67), (150, 150), (40, 150)])
def test_windows_agree_with_the_whole_where_the_model_sees_no_further_than_a_place(shape):
    model, image = Pointwise().eval(), torch.randn(2, 3, *shape)
    whole = Segmenter(model)(image, shape)
    for step in (0, 32, 64):
        sliding = Segmenter(model, InferenceOptions("slide", window=64, step=step))(image, shape)
        assert torch.equal(whole, sliding)


def test_an_image_smaller_than_the_window_is_seen_whole():
    model, image = create_segmenter("vmamba_test", 4, hidden=8, auxiliary=0), torch.randn(1, 3, 50, 70)
    slide = Segmenter(model, InferenceOptions("slide", window=512))(image, (50, 70))
    assert torch.equal(slide, Segmenter(model)(image, (50, 70)))
    assert model.training  # as it was


def test_overlapping_windows_are_averaged():
    class Counting(nn.Module):
        stride, seen = 4, 0

        def forward(self, images):
            self.seen += 1
            value = torch.tensor([0.0, self.seen - 2.5])  # the mean of -1.5 and -0.5 is negative, that of 0.5 not
            return SimpleNamespace(logits=value[None, :, None, None].expand(1, 2, 16, 16))

    model = Counting()
    labels = Segmenter(model, InferenceOptions("slide", window=64, step=32))(torch.zeros(1, 3, 64, 128), (64, 128))[0]
    assert model.seen == 3
    assert labels[:, :56].eq(0).all()
    assert labels[:, 104:].eq(1).all()


def test_scales_and_mirror_images_average_probabilities():
    model, image = Pointwise().eval(), torch.randn(1, 3, 64, 96)
    options = InferenceOptions(scales=(0.5, 1.0, 1.75), flip=True)
    expected = torch.zeros(1, 5, 64, 96)
    with torch.no_grad():
        for scale in options.scales:
            scaled = resized(image, (int(64 * scale), int(96 * scale)))
            expected += resized(model(scaled).logits, (64, 96)).softmax(1)
            expected += resized(model(scaled.flip(3)).logits, (64, 96)).flip(3).softmax(1)
    actual = Segmenter(model, options)(image, (64, 96))
    close = expected.topk(2, dim=1).values.diff(dim=1).abs()[:, 0] < 1e-4
    assert ((actual == expected.argmax(1)) | close).all()
    assert close.float().mean() < 0.02


def test_a_model_is_right_by_windows_where_they_overlap_enough():
    model, image = create_segmenter("vmamba_test", 4, hidden=8, auxiliary=0), torch.randn(1, 3, 128, 256)
    labels = Segmenter(model, InferenceOptions("slide", window=64))(image, (256, 512))
    assert labels.shape == (1, 256, 512)
    assert labels.max() < 4


_LARGE = """
import resource, sys
import torch
from types import SimpleNamespace
from vmamba.tasks.segmentation_inference import InferenceOptions, Segmenter

class Model(torch.nn.Module):
    stride = 4
    def forward(self, images):
        mean = torch.nn.functional.avg_pool2d(images, 4)[:, :1]
        return SimpleNamespace(logits=mean * torch.arange(20.0)[None, :, None, None])

image = torch.ones(1, 3, 4096, 4096)
image[:, :, :, 2048:] = -1
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
labels = Segmenter(Model(), InferenceOptions(sys.argv[1], window=512))(image, (4096, 4096))
assert labels[0, :, :2046].eq(19).all() and labels[0, :, 2050:].eq(0).all()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


# Both fill tensors of a gigabyte in a process of their own.
@pytest.mark.parametrize("mode", ["slide", pytest.param("whole", marks=pytest.mark.slow)])
def test_4096_pixels_a_side_stay_within_the_memory_stated(mode):
    run = subprocess.run([sys.executable, "-c", _LARGE, mode], capture_output=True, text=True, check=True)
    logits, labels = 20 * 4096**2 / 16 * 4, 4096**2
    # torch's own work space for a convolution or pooling, and what it leaves to the allocator.
    allowance = 64 * 2**20
    model = 4096**2 / 16 * 4 if mode == "whole" else 0  # the model's own output, which here is nearly all it needs
    assert float(run.stdout) * 2**30 < logits + labels + 4 * segmentation_inference.BAND_BYTES + model + allowance


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        InferenceOptions(window=510)
    with pytest.raises(ValueError, match="step"):
        InferenceOptions(window=64, step=100)
    with pytest.raises(ValueError, match="scales"):
        InferenceOptions(scales=())
