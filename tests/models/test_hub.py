import copy
import json

import pytest
import timm
import torch

import vmamba
import vmamba.models
from vmamba.models import VMamba
from vmamba.models.checkpoint import CheckpointError

METADATA = {"labels": ["a", "b", "c", "d"], "mean": [0.5] * 3, "std": [0.25] * 3, "img_size": 48, "top1": 0.91}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and the folder it was saved to."""
    torch.manual_seed(0)
    model = vmamba.create_model("vmamba_test", num_classes=4).eval()
    model.metadata = METADATA
    folder = tmp_path_factory.mktemp("hub")
    model.save_pretrained(folder)
    return model, folder


def test_opens_again(saved):
    model, folder = saved
    again = VMamba.from_pretrained(folder)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images), model(images))
    assert not again.training
    assert again.metadata == METADATA
    assert again.config == model.config


def test_opens_with_changes(saved):
    _, folder = saved
    changed = VMamba.from_pretrained(str(folder), num_classes=7, drop_path_rate=0.3)
    assert changed(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    assert changed.config.drop_path_rate == 0.3
    with pytest.raises(ValueError, match="drop_path_rate"):
        VMamba.from_pretrained(folder, drop_path_rat=0.3)


def test_card_and_configuration(saved):
    _, folder = saved
    card = (folder / "README.md").read_text()
    for words in ("library_name: vmamba", "pipeline_tag: image-classification", "23,584", "91.00%", "a, b, c, d"):
        assert words in card
    stored = json.loads((folder / "config.json").read_text())
    assert stored["architecture"] == "vmamba_test"
    assert stored["pretrained_cfg"]["label_names"] == METADATA["labels"]


def test_timm_opens_it(saved):
    model, folder = saved
    images = torch.randn(2, 3, 64, 64)
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(opened(images), model(images))
    assert opened.pretrained_cfg["mean"] == METADATA["mean"]
    maps = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()(images)
    wanted = model.forward_intermediates(images, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, wanted, strict=True))


def test_push_to_hub_sends_the_folder(saved, monkeypatch):
    model, _ = saved
    sent = {}

    class Created:
        repo_id = "someone/digits"

    def upload(self, repo_id, folder_path, **_):
        sent[repo_id] = {path.name for path in folder_path.iterdir()}
        return "address"

    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.create_repo", lambda self, repo_id, **_: Created)
    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.upload_folder", upload)
    assert model.push_to_hub("someone/digits") == "address"
    assert sent == {"someone/digits": {"model.safetensors", "config.json", "README.md"}}


def test_copies_keep_weights_and_metadata(saved):
    model, _ = saved
    copied = copy.deepcopy(model)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(copied(images), model(images))
    assert copied.metadata == METADATA


def test_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        VMamba.from_pretrained(tmp_path)


def test_backbone_of_transformers():
    transformers = pytest.importorskip("transformers")
    told = transformers.TimmBackboneConfig(backbone="vmamba_test", out_indices=(1, 3), use_pretrained_backbone=False)
    backbone = transformers.AutoBackbone.from_config(told)
    maps = backbone(torch.randn(2, 3, 64, 96)).feature_maps
    assert [tuple(m.shape) for m in maps] == [(2, 12, 8, 12), (2, 24, 2, 3)]
    assert backbone.channels == [12, 24]


def test_what_is_no_folder_and_no_repository():
    with pytest.raises(CheckpointError, match="there is no folder '/no/such', nor can a repository be called so"):
        VMamba.from_pretrained("/no/such")
