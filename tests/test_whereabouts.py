"""Where data are read from, and by what program: what a command on this machine has named, not what an imported config says."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import compare, generate, likelihood, study, train_all
from pipelines.console import UserError
from pipelines.data.folder import Folder
from pipelines.data.shards import Shards
from pipelines.runs import whereabouts
from pipelines.runs.dataset import load_data
from pipelines.runs.recipes import preset
from pipelines.runs.run import Run

HOSTILE = {
    "program": {"kind": "Shards", "urls": "pipe:touch executed; cat x.tar"},
    "test-program": {"kind": "Shards", "urls": "x.tar", "test_urls": "pipe:touch executed"},
    "cache": {"kind": "Shards", "urls": "file:x.tar", "cache": "executed"},
    "elsewhere": {"kind": "Folder", "root": "/"},
    "download": {"kind": "TorchvisionSet", "name": "MNIST", "root": "executed"},
}
COMMANDS = {
    "compare": lambda run: compare.main([run, "--device", "cpu"]),
    "likelihood": lambda run: likelihood.main([run, "--device", "cpu"]),
    "study": lambda run: study.main(["mean-or-sample", "--run", run, "--device", "cpu"]),
    "generate": lambda run: generate.main([run, "--keep-best", "0.5", "--count", "4", "--device", "cpu"]),
    "train_all": lambda run: train_all.main(["--run", run, "--device", "cpu"]),
    "config": lambda run: train_all.main(["--config", f"{run}/config.json", "--run", "another", "--device", "cpu"]),
    "stage1-from": lambda run: train_all.main(["--stage1-from", run, "--run", "another", "--device", "cpu"]),
}


@pytest.mark.parametrize(
    ("command", "kind"),
    [(command, kind) for command in COMMANDS for kind in HOSTILE if command == "compare" or kind == "program"],
)
def test_an_imported_config_runs_nothing_and_writes_and_reads_nowhere(run, tmp_path, monkeypatch, command, kind):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run.folder, "friend")
    config = json.loads(Path("friend/config.json").read_text())
    Path("friend/config.json").write_text(json.dumps(config | {"data": HOSTILE[kind]}))
    with pytest.raises(UserError, match="which no command on this machine has named"):
        COMMANDS[command]("./friend")
    assert not Path("executed").exists() and not Path("another").exists()


def test_what_a_command_has_named_is_believed_from_then_on(tmp_path, monkeypatch):
    """Also of a run that was moved, and by a path relative to another folder; of other places nothing is."""
    config = replace(preset("folder"), data=Folder(tmp_path / "images"))
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=f"--run run --data.root {tmp_path}/images"):
        whereabouts.check(config, Path("run"))
    whereabouts.check(config, Path("run"), given={"--data.root"})
    whereabouts.remember(config)
    whereabouts.check(config, Path("moved"))
    monkeypatch.chdir(tmp_path)
    whereabouts.check(replace(config, data=Folder(Path("images"))), Path("run"))
    for data in (Folder(tmp_path), Shards(str(tmp_path / "images"))):
        with pytest.raises(UserError, match="has named"):
            whereabouts.check(replace(config, data=data), Path("run"))


def test_a_run_that_is_opened_is_not_believed_and_one_that_is_made_is(run, monkeypatch):
    assert run.given and not Run.open(str(run.folder), "cpu").given
    monkeypatch.setattr(whereabouts, "places", lambda config: {"--data.root": Path("/")})
    with pytest.raises(UserError, match="has named"):
        load_data(Run.open(str(run.folder), "cpu"))
