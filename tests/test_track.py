"""Trackers: curves and pictures of a training that is stopped, killed or rewound have every step once."""

import csv
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from pipelines.console import UserError
from pipelines.training import fit as fitting
from pipelines.training.trackers import Tracked, Tracking
from tests.test_fit import Breaks, Killed, train

HELD_OUT = [4, 8, 12]


@pytest.fixture(autouse=True)
def a_point_every_second_step(monkeypatch):
    monkeypatch.setattr(fitting, "CURVE_STEPS", 2)


def draw(model):
    assert not model.training and not torch.is_grad_enabled()
    return {"weights": torch.full((20, 1, 8, 8), 100, dtype=torch.uint8)}


def tracked(folder, kind, **more):
    return train(folder / "stage", tracker=Tracking(kind, folder).stage("stage", draw), **more)


def interrupted(folder, kind):
    """Killed at step 5, then rewound at step 7 to step 4, then killed at step 9; returns the losses that were not rewound."""
    losses, scalars = {}, Tracked.scalars

    def noted(self, step, part, values):
        losses[part, step] = float(values["loss"])
        scalars(self, step, part, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracked, "scalars", noted)
        for killed_at in (5, 9, None):
            model = Breaks([7], rewinds=[0], killed_at=killed_at)
            if killed_at is None:
                tracked(folder, kind, model=model, on_nan="rewind")
            else:
                with pytest.raises(Killed):
                    tracked(folder, kind, model=model, on_nan="rewind")
    return [[losses[part, step] for step in steps] for part, steps in (("train", range(2, 13, 2)), ("held_out", HELD_OUT))]


def test_the_weights_do_not_depend_on_it(tmp_path):
    _, plain = train(tmp_path / "plain")
    _, chosen = tracked(tmp_path, "csv")
    assert all(torch.equal(a, b) for a, b in zip(plain.training().values(), chosen.training().values()))


def test_csv(tmp_path):
    train_losses, held_out_losses = interrupted(tmp_path, "csv")
    with open(tmp_path / "track" / "stage.csv") as file:
        rows = [(int(row["step"]), row["name"], float(row["value"])) for row in csv.DictReader(file)]
    assert [step for step, name, _ in rows if name == "train/loss"] == [2, 4, 6, 8, 10, 12]
    assert [step for step, name, _ in rows if name == "held_out/loss"] == HELD_OUT
    assert [value for _, name, value in rows if name == "train/loss"] == train_losses
    assert [value for _, name, value in rows if name == "held_out/loss"] == held_out_losses
    pictures = sorted((tmp_path / "track" / "stage").iterdir())
    assert [path.name for path in pictures] == [f"weights-{step:07d}.png" for step in HELD_OUT]
    with Image.open(pictures[0]) as picture:
        assert picture.size == (16 * 9 + 1, 2 * 9 + 1)  # two rows of up to 16, with a margin of one pixel


def test_pictures_of_the_user_beside_ours_stay(tmp_path):
    names = ["my-notes.png", "photo-2024.png", "weights-0000009.png"]
    (tmp_path / "track" / "stage").mkdir(parents=True)
    for name in names:
        (tmp_path / "track" / "stage" / name).touch()
    Tracking("csv", tmp_path).stage("stage", draw).begin(6)
    assert sorted(path.name for path in (tmp_path / "track" / "stage").iterdir()) == names[:2]


def test_csv_with_a_torn_last_line_goes_on(tmp_path):
    table = tmp_path / "track" / "stage.csv"
    tracker = Tracking("csv", tmp_path).stage("stage", draw)
    tracker.begin(0)
    tracker.scalars(2, "train", {"loss": 0.1})
    table.write_text(table.read_text() + "4,train/lo")
    tracker.begin(4)
    tracker.scalars(6, "train", {"loss": 0.3})
    assert table.read_text() == "step,name,value\n2,train/loss,0.1\n6,train/loss,0.3\n"


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_losses, held_out_losses = interrupted(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "track" / "stage"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]
    assert [event.step for event in events.Scalars("held_out/loss")] == HELD_OUT
    assert [event.step for event in events.Images("weights")] == HELD_OUT
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(train_losses)
    assert [event.value for event in events.Scalars("held_out/loss")] == pytest.approx(held_out_losses)


def test_wandb(tmp_path, monkeypatch):
    """Against a stand-in, which refuses to go back as the tool does: a rewound training goes on in a run of its own."""
    runs, groups = {}, set()

    def init(*, id, resume, group, **_):
        assert resume == "allow"
        groups.add(group)
        curves = runs.setdefault(id, {})

        def log(values, step):
            if step >= max((step for step, _ in curves), default=0):
                curves.update({(step, name): value for name, value in values.items()})

        return SimpleNamespace(log=log)

    stand_in = SimpleNamespace(init=init, Image=lambda array: array.shape, errors=SimpleNamespace(Error=RuntimeError))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    train_losses, held_out_losses = interrupted(tmp_path, "wandb")
    first, last = runs.values()
    assert len(groups) == 1 and (tmp_path / "track" / "stage.wandb").read_text() == [*runs][-1]
    assert max(step for step, _ in first) == 6 and min(step for step, _ in last) == 6
    assert [last[step, "train/loss"] for step in (6, 8, 10, 12)] == train_losses[2:]
    assert first[6, "train/loss"] != train_losses[2]  # where it diverged
    assert [(first | last)[step, "held_out/loss"] for step in HELD_OUT] == held_out_losses
    assert {step for step, name in (*first, *last) if name == "weights"} == {*HELD_OUT}


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(UserError, match=rf"--tracker {kind} needs the library {kind}: pip install .*trackers"):
        Tracking(kind, tmp_path)
