import numpy as np
import pytest
import torch
from PIL import Image

from vmamba.data.transforms import Preprocessing


def picture(width=50, height=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("style", ["photos", "garments", "glyphs"])
@pytest.mark.parametrize("policy", ["auto", "none", "light", "photo"])
def test_every_policy_gives_normalised_tensors_of_the_size(style, policy):
    preprocessing = Preprocessing.for_style(style, 32)
    tensor = preprocessing.training_transform(style, policy, random_erasing=0.3)(picture())
    assert tensor.shape == (3, 32, 32)
    assert tensor.dtype == torch.float32
    assert torch.isfinite(tensor).all()
    assert tensor.std() > 0.1


def test_photographs_are_seen_as_in_the_paper():
    preprocessing = Preprocessing.for_style("photos", 224)
    assert (preprocessing.mean, preprocessing.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (preprocessing.crop_pct, preprocessing.interpolation) == (0.875, "bicubic")


def test_small_pictures_are_seen_whole_and_scaled_to_one():
    white = Image.new("RGB", (28, 28), "white")
    tensor = Preprocessing.for_style("glyphs", 32).transform()(white)
    assert torch.allclose(tensor, torch.ones(3, 32, 32))


def test_metadata_round_trip_and_defaults():
    preprocessing = Preprocessing.for_style("garments", 48)
    assert Preprocessing.from_metadata({**preprocessing.to_dict(), "labels": ["a"]}) == preprocessing
    listed = {
        name: list(value) if isinstance(value, tuple) else value for name, value in preprocessing.to_dict().items()
    }
    assert Preprocessing.from_metadata(listed) == preprocessing
    assert Preprocessing.from_metadata({}) == Preprocessing()
    assert Preprocessing.from_metadata(listed, img_size=64).img_size == 64


def test_light_augmentation_moves_digits_but_does_not_mirror_them():
    wedge = np.zeros((32, 32), dtype=np.uint8)
    wedge[8:24, 6:12] = 255
    image = Image.fromarray(wedge).convert("RGB")
    columns = torch.linspace(0, 1, 32)
    centres = {}
    for style in ("glyphs", "garments"):
        transform = Preprocessing.for_style(style, 32).training_transform(style)
        torch.manual_seed(0)
        outputs = [transform(image).add(1) for _ in range(60)]
        centres[style] = [float((output * columns).sum() / output.sum()) for output in outputs]
    assert max(centres["glyphs"]) < 0.5 < max(centres["garments"])
    assert np.std(centres["glyphs"]) > 0.01


def test_impossible_augmentation_is_refused():
    with pytest.raises(ValueError, match="needs the augmentation policy 'photo'; here it is 'light'"):
        Preprocessing.for_style("glyphs", 32).training_transform("glyphs", auto_augment="rand-m9-mstd0.5-inc1")
    photo = Preprocessing.for_style("photos", 64)
    with pytest.raises(ValueError, match="does not understand auto_augment 'nonsense'"):
        photo.training_transform("photos", auto_augment="nonsense")
    assert photo.training_transform("photos", auto_augment="rand-m9-mstd0.5-inc1")(picture()).shape == (3, 64, 64)
