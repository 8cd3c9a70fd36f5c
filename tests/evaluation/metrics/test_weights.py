import hashlib
import logging

import pytest
import torch

from qdiff.evaluation.weights import MissingWeightsError, Repository, Weights, WeightsFile

CONTENTS = b"weights"
SHA256 = hashlib.sha256(CONTENTS).hexdigest()
FILE = WeightsFile("net-1234.pth", "https://example.invalid/net-1234.pth", SHA256[:8], 3, aliases=("other-name.pth",))
MODEL = Repository("someone/model", ("config.json",), 7)


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """Torch hub's folder, empty."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("name", [FILE.name, *FILE.aliases])
def test_a_file_of_the_folder_comes_first(tmp_path, hub, name):
    (hub / FILE.name).write_bytes(CONTENTS)
    (tmp_path / name).write_bytes(CONTENTS)
    assert Weights(tmp_path, offline=True).find(FILE, "fid") == (tmp_path / name, SHA256)


def test_torch_hubs_checkpoints_are_looked_at(hub):
    (hub / FILE.name).write_bytes(CONTENTS)
    assert Weights(offline=True).find(FILE, "fid").path == hub / FILE.name


def test_offline_nothing_is_downloaded(monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(MissingWeightsError, match=r"fid needs net-1234.pth.*downloads are off.*3 MB.*--weights DIR"):
        Weights(offline=True).find(FILE, "fid")


def test_a_download_is_said(hub, monkeypatch, caplog):
    def download(url, path, hash_prefix):
        assert (url, hash_prefix) == (FILE.url, FILE.sha256)
        (hub / FILE.name).write_bytes(CONTENTS)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with caplog.at_level(logging.WARNING):
        assert Weights().find(FILE, "fid").sha256 == SHA256
    assert f"fid: downloading {FILE.url} (3 MB)" in caplog.text


def test_a_failed_download_says_what_to_do(monkeypatch):
    def download(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(MissingWeightsError, match=r"no route to host.*and put it into"):
        Weights().find(FILE, "fid")


def test_a_repository_needs_its_files_and_one_of_weights(tmp_path):
    folder = tmp_path / MODEL.id
    folder.mkdir(parents=True)
    weights = Weights(tmp_path, offline=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(MissingWeightsError, match=r"model.safetensors, config.json .*huggingface.co/someone/model"):
        weights.repository(MODEL, "clip-score")
    (folder / "pytorch_model.bin").write_bytes(CONTENTS)
    assert weights.repository(MODEL, "clip-score") == (folder, SHA256)


def test_own_weights_need_a_folder(tmp_path):
    with pytest.raises(MissingWeightsError, match="no folder of weights was named"):
        Weights().find_own("x.pth", "fd-inception-random")
    with pytest.raises(MissingWeightsError, match="has no such file"):
        Weights(tmp_path).find_own("x.pth", "fd-inception-random")
