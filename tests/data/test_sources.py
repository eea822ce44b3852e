import gzip
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from vmamba.data.sources import open_source, with_labels


def write_idx(path, array, magic_type=8):
    header = struct.pack(">BBBB", 0, 0, magic_type, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(folder, suffix=""):
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("t10k", 4)):
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", generator.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", np.arange(count))
    return folder


def write_folder(root, counts, size=(8, 8)):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", size, (index, 0, 0)).save(root / name / f"{index}.png")
    return root


def test_digits_split_is_fixed_stratified_and_disjoint():
    first, second = open_source("digits"), open_source("digits")
    assert len(first.train) + len(first.held_out) == 1797
    assert set(first.train.names).isdisjoint(first.held_out.names)
    assert list(first.held_out.names) == list(second.held_out.names)
    shares = np.bincount(first.held_out.targets) / np.bincount(np.r_[first.train.targets, first.held_out.targets])
    assert np.abs(shares - 0.2).max() < 0.01
    assert first.classes == tuple("0123456789")


def test_digits_are_the_scikit_learn_images_at_32_pixels():
    from sklearn.datasets import load_digits

    source, bunch = open_source("digits"), load_digits()
    index = int(source.held_out.names[5].rpartition("/")[2])
    picture = source.held_out.read(5)
    assert picture.size == (32, 32)
    assert source.held_out.targets[5] == bunch.target[index]
    small = np.asarray(picture.convert("L").resize((8, 8), Image.Resampling.BOX)).astype(float)
    assert np.corrcoef(small.ravel(), bunch.images[index].ravel())[0, 1] > 0.97


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_from_idx_files(tmp_path, suffix):
    source = open_source(f"fashion-mnist:{write_fashion(tmp_path / 'data', suffix)}")
    assert (len(source.train), len(source.held_out)) == (6, 4)
    assert source.train.targets.tolist() == list(range(6))
    first = np.random.default_rng(0).integers(0, 256, (6, 28, 28))[2]
    assert np.array_equal(np.asarray(source.train.read(2).convert("L")), first)
    assert source.classes[9] == "Ankle boot"


def test_idx_errors_name_the_file(tmp_path):
    folder = write_fashion(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"no train-images-idx3-ubyte or train-images-idx3-ubyte\.gz in"):
        open_source(f"fashion-mnist:{tmp_path}")
    images = folder / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    images.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte is damaged: its header promises \(6, 28, 28\)"):
        open_source(f"fashion-mnist:{folder}")
    images.write_bytes(b"GIF89a and so on")
    with pytest.raises(ValueError, match="is not an IDX file"):
        open_source(f"fashion-mnist:{folder}")
    images.unlink()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-30])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        open_source(f"fashion-mnist:{folder}")
    images.write_bytes(whole)
    write_idx(folder / "train-labels-idx1-ubyte", np.arange(5))
    with pytest.raises(ValueError, match="do not belong together"):
        open_source(f"fashion-mnist:{folder}")


def test_fashion_mnist_download_failure_says_what_to_do(tmp_path, monkeypatch):
    from torchvision.datasets import FashionMNIST

    def no_network(self, root, download):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz\nand more")

    monkeypatch.setattr(FashionMNIST, "__init__", no_network)
    monkeypatch.setenv("VMAMBA_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"could not be downloaded.*--data fashion-mnist:FOLDER") as caught:
        open_source("fashion-mnist")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "folder:"])
def test_plain_class_folders_are_split_by_class(tmp_path, prefix):
    root = write_folder(tmp_path, {"cat": 10, "dog": 5, "eel": 1})
    source = open_source(f"{prefix}{root}", held_out=0.2)
    assert source.classes == ("cat", "dog", "eel")
    assert np.bincount(source.train.targets).tolist() == [8, 4, 1]
    assert np.bincount(source.held_out.targets).tolist() == [2, 1]
    assert set(source.train.names).isdisjoint(source.held_out.names)
    assert source.spec == f"folder:{root}"
    assert open_source(f"{prefix}{root}").held_out.names == source.held_out.names
    for index, name in enumerate(source.train.names):
        assert source.classes[source.train.targets[index]] in name


def test_own_split_of_a_folder_is_kept(tmp_path):
    write_folder(tmp_path / "train", {"cat": 3, "dog": 3})
    write_folder(tmp_path / "val", {"dog": 2})
    source = open_source(str(tmp_path))
    assert (len(source.train), len(source.held_out)) == (6, 2)
    assert source.held_out.targets.tolist() == [1, 1]
    write_folder(tmp_path / "val", {"emu": 1})
    with pytest.raises(ValueError, match="'emu', which the training images lack"):
        open_source(str(tmp_path))


def test_train_folder_alone_is_split(tmp_path):
    write_folder(tmp_path / "train", {"cat": 10, "dog": 10})
    source = open_source(str(tmp_path), held_out=0.3)
    assert (len(source.train), len(source.held_out)) == (14, 6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digts", "did you mean digits"),
        ("fashion_mnist", "did you mean fashion-mnist"),
        ("", "would do"),
        ("/no/such/folder", "no folder of that name"),
        ("folder:/no/such/folder", "there is no folder /no/such/folder"),
        ("fashion-mnist:/no/such/folder", "there is no folder /no/such/folder"),
    ],
)
def test_unknown_data_is_told_what_was_looked_for(spec, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_source(spec)


def test_folders_without_what_is_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no class folders: expected .*/CLASS/IMAGE"):
        open_source(str(tmp_path))
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images below .*looked for \.bmp"):
        open_source(str(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "a.png")
    with pytest.raises(ValueError, match="1 images are too few"):
        open_source(str(tmp_path))


def test_labels_of_a_model_decide_the_numbering(tmp_path):
    source = open_source(str(write_folder(tmp_path, {"cat": 5, "dog": 5})))
    renumbered = with_labels(source.train, source.classes, ["dog", "elk", "cat"])
    assert set(renumbered.targets[source.train.targets == 0]) == {2}
    assert set(renumbered.targets[source.train.targets == 1]) == {0}
    with pytest.raises(ValueError, match=r"does not know the class 'cat' of this data \(1 of 2 unknown\)"):
        with_labels(source.train, source.classes, ["dog", "elk"])


def test_image_sets_travel_to_other_processes(tmp_path):
    for spec in ("digits", str(write_folder(tmp_path, {"cat": 5, "dog": 5}))):
        images = open_source(spec).train
        copy = pickle.loads(pickle.dumps(images))
        assert copy.read(1).tobytes() == images.read(1).tobytes()
        joined = images.joined(copy)
        assert len(joined) == 2 * len(images)
        assert joined.read(len(images) + 1).tobytes() == images.read(1).tobytes()
