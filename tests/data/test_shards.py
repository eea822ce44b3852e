import http.server
import io
import json
import threading
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba.data.loaders import evaluation_loader, training_loader
from vmamba.data.reading import LoaderError, Share
from vmamba.data.shards import open_shards, write_shards
from vmamba.data.sources import open_source, with_labels
from vmamba.data.transforms import Preprocessing

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # webdataset leaves files to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
TRANSFORM = Preprocessing(img_size=32).transform()


def encoded(value):
    stream = io.BytesIO()
    Image.new("RGB", (40, 40), (value, 0, 0)).save(stream, "png")
    return stream.getvalue()


def samples(count, first=0):
    return ((encoded(index + first), "png", (index + first) % 3) for index in range(count))


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "shards"
    write_shards(samples(40), ["ant", "bee", "cow"], place, "train", per_shard=5)
    write_shards(samples(11, first=100), ["ant", "bee", "cow"], place, "held_out", per_shard=4)
    return place


def values(batch):
    """The red value of each image, which tells it from all others."""
    red = batch.images[:, 0, 0, 0] * Preprocessing().std[0] + Preprocessing().mean[0]
    return (red * 255).round().int().tolist()


@pytest.mark.parametrize(
    "spec", ["wds:{0}", "wds:{0}/dataset.json", "wds:{0}/train-{{000000..000007}}.tar::{0}/val-*.tar"]
)
def test_every_way_to_name_shards(folder, spec):
    source = open_source(spec.format(folder))
    assert (len(source.train), len(source.held_out)) == (40, 11)
    assert len(source.classes) == 3
    assert source.classes == (("ant", "bee", "cow") if "*" not in spec else ("0", "1", "2"))


def test_a_folder_without_description_is_counted(folder):
    (folder / "dataset.json").unlink()
    source = open_source(f"wds:{folder}")
    assert (len(source.train), len(source.held_out), source.classes) == (40, 11, ("0", "1", "2"))


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (3, 0), (2, 2)])
def test_evaluation_sees_every_sample_once(folder, processes, workers):
    source = open_source(f"wds:{folder}")
    seen, targets = [], []
    for rank in range(processes):
        for batch in evaluation_loader(source.held_out, TRANSFORM, 4, share=Share(rank, processes), workers=workers):
            seen += values(batch)
            targets += batch.targets.tolist()
    assert sorted(seen) == list(range(100, 111))
    assert [value % 3 for value in seen] == targets


def stream(folder, epoch=0, first=0, processes=1, workers=0, parts=1, batch_size=8):
    """The values of the batches of every process."""
    source = open_source(f"wds:{folder}")
    options = {"img_size": 32, "seed": 7, "workers": workers, "parts": parts}
    shares = [
        training_loader(source.train, TRANSFORM, batch_size, share=Share(rank, processes), **options)
        for rank in range(processes)
    ]
    return [[[values(b) for b in step] for step in loader.epoch(epoch, first)] for loader in shares]


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (4, 2)])
def test_training_streams_share_the_shards_and_shuffle(folder, processes, workers):
    steps = stream(folder, processes=processes, workers=workers, batch_size=4)
    assert {len(loader) for loader in steps} == {10}
    seen = [value for loader in steps for step in loader for batch in step for value in batch]
    assert sorted(seen) == list(range(40))  # all readers give as many batches: an epoch is a pass
    assert seen != sorted(seen)
    again = stream(folder, epoch=1, processes=processes, workers=workers, batch_size=4)
    assert again != steps


@pytest.mark.parametrize(("processes", "workers", "parts"), [(1, 0, 1), (1, 2, 1), (2, 2, 2), (1, 2, 2)])
@pytest.mark.parametrize("first", [1, 2, 4])
def test_a_stream_goes_on_in_the_middle_of_an_epoch(folder, processes, workers, parts, first):
    options = {"epoch": 3, "processes": processes, "workers": workers, "parts": parts}
    whole = stream(folder, **options)
    rest = stream(folder, first=first, **options)
    assert rest == [loader[first:] for loader in whole]


def test_more_readers_than_shards_are_refused(folder):
    with pytest.raises(ValueError, match=r"8 shards cannot be divided among 10 readers \(5 processes × 2 workers\)"):
        training_loader(
            open_source(f"wds:{folder}").train, TRANSFORM, 40, img_size=32, seed=0, share=Share(0, 5), workers=2
        )


@pytest.mark.parametrize("cut", [0.3, 0.55])
def test_a_shard_cut_short_is_named_and_the_rest_is_read(folder, cut):
    shard = folder / "val-000001.tar"
    shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * cut)])
    source = open_source(f"wds:{folder}")
    seen, damaged = [], []
    for batch in evaluation_loader(source.held_out, TRANSFORM, 4):
        seen += values(batch) if len(batch) else []
        damaged += batch.damaged
    assert {100, 101, 102, 103, 108, 109, 110} <= set(seen)
    assert len(seen) == len(set(seen)) < 11
    assert damaged
    assert all(str(shard) in line for line in damaged)


def test_training_goes_on_over_damaged_shards(folder):
    for number, content in enumerate([b"", b"garbage" * 300]):
        (folder / f"train-{number:06d}.tar").write_bytes(content)
    source = open_source(f"wds:{folder}")
    loader = training_loader(source.train, TRANSFORM, 8, img_size=32, seed=0)
    batches = [batch for step in loader.epoch(0) for batch in step]
    assert len(batches) == 5
    named = " ".join(line for batch in batches for line in batch.damaged)
    assert "train-000001.tar: damaged after 0 samples" in named
    seen = {value for batch in batches for value in values(batch)}
    assert seen <= set(range(10, 40))


def test_shards_of_which_nothing_can_be_read_are_an_error(folder):
    source = open_source(f"wds:{folder}")
    for shard in folder.glob("train*.tar"):
        shard.write_bytes(b"garbage" * 300)
    with pytest.raises(LoaderError, match="none of the samples in"):
        list(training_loader(source.train, TRANSFORM, 8, img_size=32, seed=0).epoch(0))


def test_samples_without_class_or_image_are_named(tmp_path):
    from webdataset import TarWriter

    for split in ("train", "val"):
        with TarWriter(str(tmp_path / f"{split}-0.tar")) as writer:
            writer.write({"__key__": "good", "png": encoded(1), "cls": "0"})
            writer.write({"__key__": "homeless", "png": encoded(2)})
            writer.write({"__key__": "blind", "cls": "0"})
            writer.write({"__key__": "worded", "png": encoded(3), "cls": "cat"})
            writer.write({"__key__": "rotten", "png": b"rotten", "cls": "0"})
    description = {"classes": ["only"], **{s: {"shards": [f"{p}-0.tar"], "samples": [5]} for s, p in SPLITS.items()}}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    batches = list(evaluation_loader(open_source(f"wds:{tmp_path}").held_out, TRANSFORM, 8))
    assert [len(batch) for batch in batches] == [1]
    named = "\n".join(batches[0].damaged)
    for key, reason in (
        ("homeless", "no class of the data set"),
        ("blind", "no image"),
        ("worded", "no class"),
        ("rotten", "not an image"),
    ):
        assert f"val-0.tar::{key}: {reason}" in named


SPLITS = {"train": "train", "held_out": "val"}


def test_shards_without_classes_are_refused(tmp_path):
    from webdataset import TarWriter

    path = tmp_path / "nothing.tar"
    with TarWriter(str(path)) as writer:
        writer.write({"__key__": "a", "png": encoded(1)})
    with pytest.raises(ValueError, match="no sample in the shards"):
        open_shards(f"{path}::{path}")


@pytest.fixture
def server(folder):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *arguments: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_shards_behind_an_address(folder, server):
    source = open_source(f"wds:{server}")
    seen = [value for batch in evaluation_loader(source.held_out, TRANSFORM, 4) for value in values(batch)]
    assert sorted(seen) == list(range(100, 111))
    (folder / "val-000001.tar").unlink()
    batches = list(evaluation_loader(source.held_out, TRANSFORM, 4))
    assert sorted(v for b in batches if len(b) for v in values(b)) == [*range(100, 104), 108, 109, 110]
    assert any("val-000001.tar: damaged after 0 samples" in line for batch in batches for line in batch.damaged)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "does not describe shards"),
        (b"[]", "does not describe shards"),
        (
            json.dumps({"classes": ["a"], "train": {"shards": ["a.tar"], "samples": [1]}}).encode(),
            "KeyError: 'held_out'",
        ),
        (
            b'{"classes": ["a"], "train": {"shards": ["pipe:touch x"], "samples": [1]}}',
            "must be the name of a file beside",
        ),
        (b'{"classes": ["a"], "train": {"shards": ["../x.tar"], "samples": [1]}}', "must be the name of a file beside"),
        (
            json.dumps({"classes": [], **{s: {"shards": ["a.tar"], "samples": [1]} for s in SPLITS}}).encode(),
            "a.tar, which is not there",
        ),
    ],
)
def test_a_bad_description_is_explained(tmp_path, content, message):
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_source(f"wds:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wds:{0}/nothing", "neither a folder, nor a dataset.json"),
        ("wds:{0}", r"no train\*.tar in"),
        ("wds:{0}/a-{{0..3}}.tar::{0}/b.tar", "there is no shard .*a-0.tar"),
        ("wds:pipe:touch x::{0}/b.tar", "need a dataset.json"),
        ("wds:http://127.0.0.1:9/", "cannot read http://127.0.0.1:9/dataset.json"),
        ("wds:", "names no known data set"),
    ],
)
def test_shards_that_are_not_there_are_said_so(tmp_path, spec, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_source(spec.format(tmp_path))


def test_classes_are_numbered_as_a_model_does(folder):
    source = open_source(f"wds:{folder}")
    images = with_labels(source.held_out, source.classes, ("cow", "dog", "bee", "ant"))
    batches = list(evaluation_loader(images, TRANSFORM, 4))
    for batch in batches:
        assert batch.targets.tolist() == [[3, 2, 0][value % 3] for value in values(batch)]
    both = source.train.joined(source.held_out)
    assert len(both) == 51


def test_write_shards_refuses_an_unknown_split(tmp_path):
    with pytest.raises(ValueError, match="must be one of train, held_out"):
        write_shards(iter([]), ["a"], tmp_path, "test")


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(10)], "label": [i % 2 for i in range(10)]}
    rows["image"][3] = {"bytes": b"rotten", "path": None}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(str(tmp_path / "plain"))
    source = open_source(f"hf:{tmp_path / 'plain'}", 0.2)
    assert source.classes == ("ant", "bee")
    assert (len(source.train), len(source.held_out)) == (8, 2)
    batches = list(evaluation_loader(source.train.joined(source.held_out), TRANSFORM, 4, workers=1))
    found = dict(
        zip([v for b in batches for v in values(b)], torch.cat([b.targets for b in batches]).tolist(), strict=True)
    )
    assert found == {i: i % 2 for i in range(10) if i != 3}
    assert [line for batch in batches for line in batch.damaged] == ["train/3: not an image in a known format"]
    datasets.DatasetDict({"train": table, "test": table.select(range(4))}).save_to_disk(str(tmp_path / "split"))
    source = open_source(f"hf:{tmp_path / 'split'}")
    assert (len(source.train), len(source.held_out), source.note) == (10, 4, "the split 'test' held out")
    assert np.asarray(source.held_out.read(1)).shape == (40, 40, 3)


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"x": [1]}, "needs a column of type Image and one of type ClassLabel; it has x"), (None, "is not what")],
)
def test_saved_datasets_of_another_kind_are_refused(tmp_path, columns, message):
    datasets = pytest.importorskip("datasets")
    if columns:
        datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        open_source(f"hf:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        open_source(f"hf:{tmp_path}/nothing")
