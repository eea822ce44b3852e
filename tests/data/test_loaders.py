import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba.data import reading
from vmamba.data.loaders import ImageDataset, evaluation_loader, training_loader
from vmamba.data.reading import Draw, EpochSampler, LoaderError, Share
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


def positions(sampler):
    return [[draw.position for draw in part] for part in sampler]


def test_order_depends_on_seed_and_epoch_alone_and_can_start_in_the_middle():
    sampler = EpochSampler(20, 4, seed=3)
    sampler.start(epoch=1)
    order = list(sampler)
    assert sorted(draw.position for part in order for draw in part) == list(range(20))
    assert list(sampler) == order
    sampler.start(epoch=1, first=2)
    assert len(sampler) == 3
    assert list(sampler) == order[2:]
    sampler.start(epoch=2)
    assert list(sampler) != order
    other = EpochSampler(20, 4, seed=4)
    other.start(epoch=1)
    assert list(other) != order


@pytest.mark.parametrize(("processes", "parts"), [(1, 3), (2, 1), (2, 3), (6, 1)])
def test_processes_and_parts_share_each_batch_without_overlap(processes, parts):
    whole = positions(EpochSampler(50, 12, seed=3))
    shares = [positions(EpochSampler(50, 12, 3, Share(rank, processes), parts)) for rank in range(processes)]
    assert len(whole) == 4  # 50 images, the incomplete fifth batch is left out
    for step, batch in enumerate(whole):
        together = [
            position for share in shares for part in share[step * parts : (step + 1) * parts] for position in part
        ]
        assert together == batch


def test_fewer_images_than_a_batch_come_more_than_once():
    (batch,) = positions(EpochSampler(5, 12, seed=3))
    assert sorted(batch[:5]) == sorted(batch[5:10]) == list(range(5))  # pass after pass, each in its own order
    assert batch[:5] != batch[5:10]
    assert len(batch) == 12


def test_an_epoch_of_a_given_number_of_batches_goes_on_with_the_next_pass():
    batches = positions(EpochSampler(7, 4, seed=3, steps=5))
    assert len(batches) == 5
    drawn = [position for batch in batches for position in batch]
    assert sorted(drawn[:7]) == sorted(drawn[7:14]) == list(range(7))


def batches_of(images, augmentation, epoch=5, first=0, **options):
    loader = training_loader(images, augmentation, 16, img_size=32, seed=0, **options)
    return [batch for parts in loader.epoch(epoch, first) for batch in parts]


@pytest.mark.parametrize("workers", [0, 2])
def test_augmented_batches_do_not_depend_on_workers_or_global_randomness(digits, augmentation, workers):
    expected = batches_of(digits, augmentation, workers=0)
    random.seed(99)
    torch.manual_seed(99)
    batches = batches_of(digits, augmentation, workers=workers)
    assert len(batches) == len(expected) == 2  # 40 images, the incomplete third batch is left out
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.targets, other.targets)
        assert torch.equal(batch.targets, torch.from_numpy(digits.targets)[batch.indices])
    assert torch.equal(batches_of(digits, augmentation, first=1, workers=workers)[0].images, batches[1].images)


def test_loading_leaves_the_global_generators_alone(digits, augmentation):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    batches_of(digits, augmentation)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_each_draw_is_augmented_differently(digits, augmentation):
    dataset = ImageDataset(digits, augmentation)
    first, again, other = dataset[Draw(0, 1)], dataset[Draw(0, 1)], dataset[Draw(0, 2)]
    assert torch.equal(first.image, again.image)
    assert not torch.equal(first.image, other.image)


def test_fewer_images_than_a_batch_still_train(digits, augmentation):
    (batch,) = batches_of(digits.subset(np.arange(5)), augmentation)
    assert len(batch) == 16


def test_evaluation_sees_every_image_once_in_order(digits):
    loader = evaluation_loader(digits, Preprocessing.for_style("glyphs", 32).transform(), 16)
    assert torch.cat([batch.indices for batch in loader]).tolist() == list(range(40))


@pytest.mark.parametrize("processes", [1, 3, 50])
def test_processes_evaluate_every_image_once(digits, processes):
    transform = Preprocessing.for_style("glyphs", 32).transform()
    shares = [evaluation_loader(digits, transform, 16, share=Share(rank, processes)) for rank in range(processes)]
    seen = [index for share in shares for batch in share for index in batch.indices.tolist()]
    assert sorted(seen) == list(range(40))


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
    assert not len(batch)
    assert len(batch.damaged) == 1


@pytest.fixture
def files(tmp_path):
    names = []
    for index in range(8):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (40, 40), (index * 30, 0, 0)).save(path)
        names.append(str(path))
    return names


def train_batches(names, **options):
    transform = Preprocessing(img_size=32).transform()
    return training_loader(ImageSet(np.arange(len(names)), names), transform, 4, img_size=32, seed=0, **options)


def test_in_training_another_image_of_the_batch_stands_in_for_a_damaged_one(files, tmp_path):
    (tmp_path / "3.png").write_bytes(b"no")
    batches = [batch for parts in train_batches(files).epoch(0) for batch in parts]
    assert [batch.images.shape for batch in batches] == [(4, 3, 32, 32)] * 2
    (hit,) = [batch for batch in batches if batch.damaged]
    assert hit.damaged == [f"{files[3]}: not an image in a known format"]
    assert len(hit) == 3
    assert 3 not in hit.targets
    assert len(set(hit.targets.tolist())) == 3
    for index, name, target in zip(hit.indices.tolist(), hit.names, hit.targets.tolist(), strict=True):
        assert (name, target) == (files[index], index)


def test_a_training_batch_of_damaged_images_is_black_and_counts_none(files):
    for name in files:
        open(name, "wb").close()
    for (batch,) in train_batches(files).epoch(0):
        assert len(batch) == 0
        assert batch.images.shape == (4, 3, 32, 32)
        assert not batch.images.any()
        assert len(batch.damaged) == 4


class _Deadly:
    """A transform that does away with the process it runs in, or never comes back."""

    def __init__(self, hang):
        self.hang = hang

    def __call__(self, picture):
        if self.hang:
            time.sleep(3600)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("hang", [False, True])
def test_a_worker_that_dies_or_hangs_ends_in_an_error(files, hang):
    images = ImageSet(np.arange(8), files)
    options = {"img_size": 32, "seed": 0, "workers": 1, "timeout": 2.0 if hang else 60.0}
    loader = training_loader(images, _Deadly(hang), 4, **options)
    with pytest.raises(
        (LoaderError, RuntimeError), match=r"(timed out after 2|is killed by signal|exited unexpectedly)"
    ):
        list(loader.epoch(0))


def test_more_workers_than_cores_are_cut_to_them_and_told_once(digits, monkeypatch, capsys):
    monkeypatch.setattr(reading, "_cores", lambda: 1)
    reading._tell_of_cores.cache_clear()
    options = {"img_size": 32, "seed": 0, "workers": 64}
    transform = Preprocessing(img_size=32).transform()
    loaders = [training_loader(digits, transform, 32, **options) for _ in range(2)]
    assert [loader._loader.num_workers for loader in loaders] == [1, 1]
    assert capsys.readouterr().err.splitlines() == [
        "workers: 64 were asked for, cores of this machine: 1; as many processes read images, 1"
    ]


def test_streams_keep_the_workers_that_their_order_depends_on(monkeypatch, capsys):
    monkeypatch.setattr(reading, "_cores", lambda: 1)
    reading._tell_of_cores.cache_clear()
    assert reading.reading_options(1000, 4, False, 0.0, most=8)["num_workers"] == 4
    assert "fewer --workers may do" in capsys.readouterr().err
