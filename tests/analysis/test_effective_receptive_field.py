"""Effective receptive fields against brute force, and the squares that hold shares of them."""

import pytest
import timm
import torch

import vmamba
from vmamba.analysis.effective_receptive_field import (
    central_squares,
    effective_receptive_field,
    field_table,
    noise_images,
    spread,
)


def brute_force(model: torch.nn.Module, image: torch.Tensor, stage: int) -> torch.Tensor:
    """Nudge every value of every pixel up and down, and see what the central feature makes of it."""

    def centre(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            (features,) = model.forward_intermediates(images, indices=[stage], intermediates_only=True)
        return features[:, :, features.shape[2] // 2, features.shape[3] // 2].relu().sum(1)

    nudge = 1e-5
    slopes = []
    for some in torch.arange(image.numel()).split(384):
        nudges = torch.zeros(len(some), image.numel(), dtype=image.dtype)
        nudges[torch.arange(len(some)), some] = nudge
        nudges = nudges.view(-1, *image.shape)
        slopes.append((centre(image + nudges) - centre(image - nudges)) / (2 * nudge))
    return torch.cat(slopes).view(image.shape).clamp_min(0).sum(0)


@pytest.mark.parametrize(("stage", "routes"), [(1, "cross2d"), (2, "unidi")])
def test_gradients_are_what_brute_force_finds_pixel_by_pixel(stage, routes, relative_error) -> None:
    model = vmamba.create_model("vmamba_test", routes=routes).double().eval()
    images = torch.randn(2, 3, 24, 16, dtype=torch.float64)
    exact = sum(brute_force(model, image, stage) for image in images) / 2
    for batches in ([images], images.split(1)):  # together or one by one
        field = effective_receptive_field(model, batches, stage)
        assert field.images == 2
        assert relative_error(field.contribution, exact) < 1e-6
        assert (field.contribution - exact).abs().max() < 1e-6 * exact.max()


def test_a_convolution_sees_its_kernel() -> None:
    class Convolution(torch.nn.Module):
        feature_info = ({"num_chs": 1},)

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
            torch.nn.init.ones_(self.layer.weight)

        def forward_intermediates(self, x, indices, intermediates_only):
            return [self.layer(x)]

    field = effective_receptive_field(Convolution(), [torch.ones(1, 1, 9, 9)])
    assert torch.equal(field.contribution.nonzero(), torch.cartesian_prod(torch.arange(3, 6), torch.arange(3, 6)))
    (square,) = central_squares(field.contribution, [0.99], "linear")
    assert (square.side, square.area) == (3, 9 / 81)
    assert spread(field) == pytest.approx((12 / 9) ** 0.5)


def test_squares_are_the_smallest_that_hold_the_share() -> None:
    contribution = torch.rand(20, 31, dtype=torch.float64).square() * 5
    for scale, values in (("linear", contribution), ("log", torch.log10(contribution + 1))):
        for square in central_squares(contribution, (0.2, 0.5, 0.9), scale):
            reach = square.side // 2

            def held(reach: int, values: torch.Tensor = values) -> float:
                inside = values[max(10 - reach, 0) : 11 + reach, max(15 - reach, 0) : 16 + reach]
                return float(inside.sum() / values.sum())

            assert held(reach) > square.share >= held(reach - 1)
    everything = central_squares(torch.ones(4, 4), [0.999])[0]
    assert everything.area == 1


def test_timm_models_have_fields_and_deeper_maps_see_more() -> None:
    model = timm.create_model("convnext_atto").train()
    first, last = (effective_receptive_field(model, noise_images(2, (64, 64)), stage) for stage in (0, -1))
    assert spread(first) < spread(last)
    assert model.training
    table = field_table("convnext_atto", last)
    assert [row["share"] for row in table] == [0.2, 0.3, 0.5, 0.99]
    assert [row["side_px"] for row in table] == sorted(row["side_px"] for row in table)


def test_images_without_a_finite_gradient_are_left_out_and_counted() -> None:
    model = vmamba.create_model("vmamba_test")
    good = torch.randn(1, 3, 32, 32)
    field = effective_receptive_field(model, [good, torch.full_like(good, torch.nan)])
    assert (field.images, field.skipped) == (1, 1)
    with pytest.raises(ValueError, match="no image with a finite gradient"):
        effective_receptive_field(model, [torch.full_like(good, torch.nan)])


def test_bad_input_is_a_sentence() -> None:
    model = vmamba.create_model("vmamba_test")
    for peer in (model, timm.create_model("resnet18")):
        with pytest.raises(ValueError, match="the model has maps 0 to"):
            effective_receptive_field(peer, noise_images(1, (64, 64)), 9)
    with pytest.raises(ValueError, match="forward_intermediates"):
        effective_receptive_field(torch.nn.Conv2d(3, 3, 1), noise_images(1, (32, 32)))
    with pytest.raises(ValueError, match="one size"):
        effective_receptive_field(model, [torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 64)])
    with pytest.raises(ValueError, match="between 0 and 1"):
        central_squares(torch.ones(3, 3), [1.5])
    with pytest.raises(ValueError, match="'log' or 'linear'"):
        central_squares(torch.ones(3, 3), scale="square")
    with pytest.raises(ValueError, match="zero everywhere"):
        central_squares(torch.zeros(3, 3))
