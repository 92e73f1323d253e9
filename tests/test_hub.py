"""A run on the Hugging Face hub and back. Nothing is asked of the network: a folder stands in for the hub."""

import fnmatch
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from pipelines import TwoStage, generate, publish, train_all
from pipelines import export as exporting
from pipelines.console import UserError
from pipelines.runs.exported import CARD, LIST
from tests.parts import compared, small_splits, trained_run

hub = pytest.importorskip("huggingface_hub")
COMMIT, OTHER = "a" * 40, "b" * 40


class Hub:
    """Repositories as folders by commit; what is fetched is copied to a cache in the library's layout."""

    def __init__(self, folder: Path):
        self.folder, self.cache, self.made = folder / "hub", folder / "cache", []
        self.commits = {"main": COMMIT}

    def create_repo(self, _, repository: str, private: bool | None, exist_ok: bool) -> None:
        self.made.append((repository, private))

    def upload_folder(self, _, repo_id: str, folder_path: Path, delete_patterns: list[str], **how) -> SimpleNamespace:
        to = self.folder / repo_id / COMMIT
        there = {path.relative_to(to).as_posix() for path in to.rglob("*") if path.is_file()} - {".gitattributes"}
        for name in hub.utils.filter_repo_objects(there, allow_patterns=delete_patterns):
            (to / name).unlink()
        shutil.copytree(folder_path, to, dirs_exist_ok=True)
        (to / ".gitattributes").write_text("*.safetensors filter=lfs")
        (to / "LICENSE").write_text("as anybody adds on the hub")
        return SimpleNamespace(oid=COMMIT)

    def snapshot_download(self, repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        commit = self.commits.get(revision or "main", revision)
        there = self.folder / repository
        if not there.is_dir():
            raise hub.errors.RepositoryNotFoundError("404", response=MagicMock())
        if not (there / commit).is_dir():
            raise hub.errors.RevisionNotFoundError("404", response=MagicMock())
        to = self.cache / f"models--{repository.replace('/', '--')}" / "snapshots" / commit
        for path in (there / commit).rglob("*"):
            name = path.relative_to(there / commit).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (to / name).parent.mkdir(parents=True, exist_ok=True)
                (to / name).unlink(missing_ok=True)
                (to / name).symlink_to(path)
        return str(to)


@pytest.fixture
def remote(tmp_path, monkeypatch) -> Hub:
    """One that knows nothing yet; commands work in another folder."""
    made = Hub(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", made.snapshot_download)
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(hub.HfApi, name, lambda *given, name=name, **named: getattr(made, name)(*given, **named))
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def published(run, remote) -> Path:
    publish.main([str(run.folder), "friend/digits", "--device", "cpu", "--license", "mit"])
    return remote.folder / "friend/digits" / COMMIT


def test_a_published_run_is_the_same_model(run, remote, published, small_data, capsys):
    assert remote.made == [("friend/digits", None)]
    images = TwoStage.open(run.folder, "cpu").sample(3, seed=1, label="2")
    for name in ("hub:friend/digits", "hub:friend/digits@main", f"hub:friend/digits@{COMMIT}"):
        model = TwoStage.open(name, "cpu")
        assert torch.equal(model.sample(3, seed=1, label="2"), images) and model.run.name == name and model.run.exported
    generate.main(["hub:friend/digits", "--count", "2", "--device", "cpu"])
    assert "prior of hub:friend/digits" in capsys.readouterr().out
    assert not [*remote.cache.rglob("LICENSE")]
    exporting.main(["hub:friend/digits", "--out", "again", "--device", "cpu"])
    assert torch.equal(TwoStage.open("again", "cpu").sample(3, seed=1, label="2"), images)


def test_the_next_version_of_a_model_leaves_no_file_of_the_last_but_what_its_owner_added(run, remote, published, tmp_path):
    (published / "README.de.md").write_text("as its owner adds")
    refined = trained_run(tmp_path, "mnist-binary")
    publish.main([str(refined.folder), "friend/digits", "--device", "cpu"])
    assert [*published.glob("refined/step-*/model.safetensors")]
    for again in (refined, run):
        publish.main([str(again.folder), "friend/digits", "--device", "cpu"])
        listed = json.loads((published / LIST).read_text())["files"]
        there = {path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()}
        assert there - {*listed} == {LIST, "README.de.md", "LICENSE", ".gitattributes"}


def test_the_card_is_read_by_the_hubs_own_loader_and_says_what_was_measured(run, remote, published, tmp_path, monkeypatch):
    card = hub.ModelCard.load(published / CARD)
    assert card.data.license == "mit" and card.data.pipeline_tag == "unconditional-image-generation"
    assert "vae" in card.data.tags and 'TwoStage.open("hub:friend/digits")' in card.text and "(samples.png)" in card.text
    assert "python -m pipelines.generate hub:friend/digits" in card.text
    copy = TwoStage.open(shutil.copytree(run.folder, tmp_path / "copy"), "cpu").run
    comparison = compared(copy, small_splits((1, 28, 28), 4))
    exporting.main([str(copy.folder), "--out", "first", "--device", "cpu", "--license", "cc-by-4.0"])
    exporting.main(["first", "--out", "second", "--device", "cpu"])
    for folder in ("first", "second"):  # of an export, too
        card = hub.ModelCard.load(Path(folder) / CARD)
        assert f"| N(0, I) | {comparison.priors['standard'].fd:.2f} |" in card.text and card.data.license == "cc-by-4.0"
        assert (Path(folder) / "compare/metrics.json").read_bytes() == (copy.folder / "compare/metrics.json").read_bytes()
    with pytest.raises(UserError, match="--license is an identifier"):
        exporting.main(["first", "--out", "third", "--device", "cpu", "--license", "mit\ntags: x"])


def test_what_comes_from_the_hub_is_checked_as_any_export(published, remote):
    weights = next(published.glob("stage1/step-*/model.safetensors"))
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match="truncated or altered; delete .*models--friend--digits, and the same command"):
        TwoStage.open("hub:friend/digits", "cpu")
    weights.unlink()
    with pytest.raises(UserError, match="model.safetensors is missing"):
        TwoStage.open("hub:friend/digits", "cpu")
    weights.write_bytes(good)
    (published / CARD).write_text("The owner writes more about it on the hub.")
    TwoStage.open("hub:friend/digits", "cpu")
    (published / LIST).write_text("[" * 10**5)
    with pytest.raises(UserError, match="cannot be read"):
        TwoStage.open("hub:friend/digits", "cpu")
    (published / LIST).write_text(json.dumps({"format": 1, "files": {"../../../secret": "0"}}))
    with pytest.raises(UserError, match="is not as it was exported"):
        TwoStage.open("hub:friend/digits", "cpu")
    (published / LIST).unlink()
    shutil.rmtree(remote.cache)
    with pytest.raises(UserError, match="friend/digits on the hub was not made by"):
        TwoStage.open("hub:friend/digits", "cpu")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hub:friend/shoes", "there is no friend/shoes on the hub, or it is not open to you"),
        (f"hub:friend/digits@{OTHER}", "friend/digits on the hub has no revision 'bbb"),
        ("hub:digits", "named owner/name or owner/name@revision, not 'digits'"),
        ("hub:../../x", "named owner/name"),
    ],
)
def test_a_name_that_is_not_on_the_hub_is_said(remote, name, says):
    (remote.folder / "friend/digits" / COMMIT).mkdir(parents=True)
    with pytest.raises(UserError, match=says):
        TwoStage.open(name, "cpu")


def test_a_model_on_the_hub_is_not_trained_on(remote):
    with pytest.raises(UserError, match="is a model on the hub, which is not trained on"):
        train_all.main(["mnist5k", "--run", "hub:friend/digits"])
    with pytest.raises(UserError, match="without a revision"):
        publish.main(["mnist5k", "friend/digits@main"])


def test_without_a_network_the_cache_serves_what_it_holds_whole(run, tmp_path, monkeypatch):
    """By the library itself."""
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--friend--digits"
    with pytest.raises(UserError, match="the hub cannot be reached, and the cache holds no whole copy of friend/digits"):
        TwoStage.open("hub:friend/digits", "cpu")
    with pytest.raises(UserError, match="the request to the hub failed"):
        publish.main([str(run.folder), "friend/digits", "--device", "cpu"])
    exporting.main([str(run.folder), "--out", str(cache / "snapshots" / COMMIT), "--device", "cpu"])
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(COMMIT)
    assert TwoStage.open("hub:friend/digits", "cpu").sample(1).shape == (1, 1, 28, 28)
    next(cache.rglob("early.safetensors")).unlink()
    with pytest.raises(UserError, match="early.safetensors is missing"):
        TwoStage.open("hub:friend/digits", "cpu")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[hub\]'"):
        TwoStage.open("hub:friend/digits", "cpu")


def test_the_errors_of_the_library_are_known_in_a_new_process():
    """Which has imported nothing of it but what `library` does."""
    code = "from pipelines.runs.hub import library; print(library().errors.LocalEntryNotFoundError.__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
