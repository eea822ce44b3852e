import random

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba.data.loaders import Draw, EpochSampler, ImageDataset, evaluation_loader, training_loader
from vmamba.data.sources import ImageSet, open_source
from vmamba.data.transforms import Preprocessing

# Python 3.12 and later warn whenever a process with threads starts workers by fork, as torch does on Linux.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def digits():
    return open_source("digits").train.subset(np.arange(40))


@pytest.fixture(scope="module")
def augmentation():
    return Preprocessing.for_style("glyphs", 32).training_transform("glyphs", random_erasing=0.5)


def test_order_depends_on_seed_and_epoch_alone_and_can_start_in_the_middle():
    sampler = EpochSampler(20, seed=3)
    sampler.start(epoch=1)
    order = list(sampler)
    assert sorted(draw.position for draw in order) == list(range(20))
    assert list(sampler) == order
    sampler.start(epoch=1, first=8)
    assert len(sampler) == 12
    assert list(sampler) == order[8:]
    sampler.start(epoch=2)
    assert [draw.position for draw in sampler] != [draw.position for draw in order]
    other = EpochSampler(20, seed=4)
    other.start(epoch=1)
    assert list(other) != order


@pytest.mark.parametrize("workers", [0, 2])
def test_augmented_batches_do_not_depend_on_workers_or_global_randomness(digits, augmentation, workers):
    loader, sampler = training_loader(digits, augmentation, 16, seed=0, workers=0)
    sampler.start(5)
    expected = list(loader)
    loader, sampler = training_loader(digits, augmentation, 16, seed=0, workers=workers)
    sampler.start(5)
    random.seed(99)
    torch.manual_seed(99)
    batches = list(loader)
    assert len(batches) == len(expected) == 2  # 40 images, the incomplete third batch is left out
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.targets, other.targets)
        assert torch.equal(batch.targets, torch.from_numpy(digits.targets)[batch.indices])


def test_loading_leaves_the_global_generators_alone(digits, augmentation):
    loader, _ = training_loader(digits, augmentation, 16, seed=0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    list(loader)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_each_draw_is_augmented_differently(digits, augmentation):
    dataset = ImageDataset(digits, augmentation)
    first, again, other = dataset[Draw(0, 1)], dataset[Draw(0, 1)], dataset[Draw(0, 2)]
    assert torch.equal(first.image, again.image)
    assert not torch.equal(first.image, other.image)


def test_fewer_images_than_a_batch_still_train(digits, augmentation):
    loader, _ = training_loader(digits.subset(np.arange(5)), augmentation, 16, seed=0)
    assert [len(batch.targets) for batch in loader] == [5]


def test_evaluation_sees_every_image_once_in_order(digits):
    loader = evaluation_loader(digits, Preprocessing.for_style("glyphs", 32).transform(), 16)
    assert torch.cat([batch.indices for batch in loader]).tolist() == list(range(40))


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_left_out_and_named(tmp_path, workers):
    names = []
    for index in range(6):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (40, 40), (index * 40, 0, 0)).save(path)
        names.append(str(path))
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "4.png").unlink()
    images = ImageSet(np.arange(6), names)
    batches = list(evaluation_loader(images, Preprocessing(img_size=32).transform(), 3, workers=workers))
    assert [batch.targets.tolist() for batch in batches] == [[0, 2], [3, 5]]
    assert batches[0].damaged == [f"{names[1]}: the file is empty"]
    assert batches[1].damaged == [f"{names[4]}: No such file or directory"]


def test_a_batch_of_damaged_images_is_empty(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no")
    (batch,) = evaluation_loader(ImageSet(np.array([0]), [str(tmp_path / "a.png")]), Preprocessing().transform(), 4)
    assert not len(batch.targets)
    assert len(batch.damaged) == 1
