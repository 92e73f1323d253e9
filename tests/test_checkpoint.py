"""Checkpoints: whole or not at all, and never used when damaged."""

import errno
import hashlib
import io
import json
import os
import pickle
import random
import resource
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from pipelines import files
from pipelines.console import UserError, run_command
from pipelines.runs.pictures import write_images
from pipelines.training import checkpoints


def torch_pickle(content) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": content}, buffer)
    return buffer.getvalue()


def save(folder, step, loss=1.0, value=0.0):
    record = checkpoints.Record(step, {"loss": loss})
    return checkpoints.save(folder, record, {"w": torch.full((3,), value)}, {"model.w": torch.full((3,), value)})


def to_go_on_from(folder):
    return [found.step for found in checkpoints.resumable(checkpoints.usable(folder))]


def test_comes_back_as_saved(tmp_path):
    save(tmp_path, 5, value=2.5)
    (found,) = checkpoints.usable(tmp_path)
    assert found.step == 5 and found.loss == 1.0
    assert torch.equal(found.model()["w"], torch.full((3,), 2.5))
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000005"]


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "config.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "empty"])
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path, capsys, name, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "step-0000002" / name
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "remove":
        path.unlink()
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"truncate": content[:middle], "flip": flipped, "empty": b""}[damage])
    assert to_go_on_from(tmp_path) == [1]
    assert "step-0000002" in capsys.readouterr().out


def test_every_truncation_and_every_flipped_bit_is_detected(tmp_path, capsys):
    """200 truncations and 200 flips, over all files of the newest checkpoint: the one before is used, always."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    generator = random.Random(0)
    files = sorted((tmp_path / "step-0000002").iterdir())
    contents = {path: path.read_bytes() for path in files}
    for trial in range(400):
        path = files[trial % len(files)]
        content = contents[path]
        place = generator.randrange(len(content))
        flipped = content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1 :]
        path.write_bytes(content[:place] if trial < 200 else flipped)
        assert to_go_on_from(tmp_path) == [1], (path.name, place, trial)
        path.write_bytes(content)
    capsys.readouterr()
    assert to_go_on_from(tmp_path) == [1, 2]


def test_a_file_that_changes_within_a_process_is_verified_anew(tmp_path, monkeypatch):
    """Long after it was written, too, and though its size and the time of its content are as before."""
    monkeypatch.setattr(checkpoints, "SETTLED_SECONDS", 0.05)
    path = save(tmp_path, 1).folder / "model.safetensors"
    before = path.stat()
    time.sleep(0.1)
    assert checkpoints.usable(tmp_path)
    path.write_bytes(bytes(len(path.read_bytes())))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match="altered"):
        checkpoints.usable(tmp_path)


class Boom:
    """Unpickled, it would leave a file."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def sealed(folder, files):
    """A checkpoint folder of any contents, with checksums that fit."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    (folder / "checksums.json").write_text(json.dumps(sums))


HEADER_TOO_LARGE = (2**62).to_bytes(8, "little") + b"{}"
HOSTILE = {
    "pickle": pickle.dumps({"weight": Boom()}),
    "torch-pickle": torch_pickle(Boom()),
    "huge-header": HEADER_TOO_LARGE,
    "offsets-outside": b"\x50\0\0\0\0\0\0\0" + b'{"weight":{"dtype":"F32","shape":[9,9],"data_offsets":[0,324]}}'.ljust(80),
    "empty": b"",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_in_a_sentence_and_nothing_runs(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    record = json.dumps({"step": 1, "held_out": {"loss": 1.0}, "history": []}).encode()
    sealed(tmp_path / "step-0000001", {"model.safetensors": HOSTILE[kind], "training.safetensors": b"x", "config.json": record})
    (found,) = checkpoints.usable(tmp_path)
    with pytest.raises(UserError, match="not a file of tensors"):
        found.load_into(nn.Linear(2, 3))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"weight": torch.zeros(3, 2)}, "bias is missing"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(4)}, r"bias is \(4,\) torch.float32, not \(3,\)"),
        ({"weight": torch.zeros(3, 2, dtype=torch.float64), "bias": torch.zeros(3)}, "weight is .*float64, not .*float32"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "../x": torch.zeros(1)}, "../x is not one of its tensors"),
    ],
)
def test_the_weights_of_another_model_are_refused(tmp_path, tensors, says):
    found = checkpoints.save(tmp_path, checkpoints.Record(1, {"loss": 1.0}), tensors, {})
    with pytest.raises(UserError, match=says):
        found.load_into(nn.Linear(2, 3))


@pytest.mark.parametrize(
    "record",
    [
        *("[]", "{}", "nonsense", "[" * 200_000),
        '{"step": "x", "held_out": {"loss": 1.0}}',
        '{"step": -3, "held_out": {"loss": 1.0}}',
        '{"step": 1, "held_out": 3}',
        '{"step": 1, "held_out": {"loss": 1.0}, "history": 3}',
        '{"step": 1, "held_out": {"loss": 1.0}, "rewinds": "x"}',
    ],
    ids=lambda record: record[:60],
)
def test_a_record_that_is_none_is_refused(tmp_path, record):
    sealed(tmp_path / "step-0000001", {"model.safetensors": b"", "training.safetensors": b"", "config.json": record.encode()})
    with pytest.raises(UserError, match="no usable checkpoint"):
        checkpoints.usable(tmp_path)


def test_no_good_one_is_an_error_that_says_what_to_do(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-0000001" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="model.safetensors.*delete"):
        checkpoints.usable(tmp_path)


def test_weights_alone_are_enough_to_use_but_not_to_go_on(tmp_path, capsys):
    for step in (1, 2):
        save(tmp_path, step, value=float(step))
        (tmp_path / f"step-000000{step}" / "training.safetensors").unlink()
    assert [found.step for found in checkpoints.usable(tmp_path)] == [1, 2] and not capsys.readouterr().out
    with pytest.raises(UserError, match="enough to draw.*step-0000002/training.safetensors is missing.*another --run") as told:
        checkpoints.resumable(checkpoints.usable(tmp_path))
    assert "elete" not in str(told.value)


@contextmanager
def files_of_at_most(size):
    """The system refuses to write more into a file, as it does when a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("what", ["checkpoint", "tensors", "file"])
def test_what_the_disk_does_not_take_is_named_in_a_sentence_and_nothing_is_left(tmp_path, capsys, what):
    target = tmp_path / "x.safetensors"
    large = {"w": torch.zeros(1000)}
    write = {
        "checkpoint": lambda: checkpoints.save(tmp_path, checkpoints.Record(1, None), large, large),
        "tensors": lambda: files.cached(target, "key", lambda: large),
        "file": lambda: files.write_file(target, bytes(4000)),
    }[what]
    with files_of_at_most(500), pytest.raises(SystemExit) as ended:
        run_command(write)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and str(tmp_path) in said and "make room" in said
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("name", ["x.npz", "x.png"])
def test_images_that_the_disk_does_not_take_are_written_elsewhere(tmp_path, monkeypatch, name):
    images = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(3, 1, 16, 16)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").touch()  # no folder to write to
    with pytest.raises(UserError, match="cannot be written .*; what was drawn lies in") as told:
        write_images(tmp_path / "file" / name, images)
    written = Path(str(told.value).rpartition(" lies in ")[2])
    assert written.name == name and written.stat().st_size > 100
    with files_of_at_most(50), pytest.raises(UserError, match="so what was drawn is lost: make room"):
        write_images(tmp_path / name, images)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_folder_ends_in_a_sentence(capsys, number):
    def main():
        raise OSError(number, os.strerror(number), "RUN/latents")

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2 and f"{os.strerror(number)}: RUN/latents" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "named"),
    [("folder.npz", "folder.npz"), ("file/x.npz", "file"), ("file/deeper/x.npz", "file/deeper"), ("x" * 300, "." + "x" * 300)],
)
def test_an_output_path_that_cannot_be_ends_in_a_sentence(tmp_path, capsys, path, named):
    (tmp_path / "file").touch()
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: files.write_file(tmp_path / path, b"x"))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and str(tmp_path / named) in said and "give another path" in said
    assert sorted(found.name for found in tmp_path.iterdir()) == ["file", "folder.npz"]


def test_json_that_is_none_is_named(tmp_path):
    (tmp_path / "facts.json").write_text('{"image_shape": [1, 28')
    with pytest.raises(UserError, match="facts.json cannot be read .*train_all again"):
        files.read_as(tmp_path / "facts.json", dict)


def test_a_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch):
    save(tmp_path, 1, value=1.0)
    write_flushed, writes = files.write_flushed, []

    def full(path, content):
        writes.append(path)
        if len(writes) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_flushed(path, content)

    monkeypatch.setattr(checkpoints, "write_flushed", full)
    with pytest.raises(OSError):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]
    assert torch.equal(checkpoints.usable(tmp_path)[0].model()["w"], torch.ones(3))


def test_a_damaged_one_is_written_anew(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step-0000002" / "model.safetensors").write_bytes(b"")
    save(tmp_path, 2, value=3.0)
    assert torch.equal(checkpoints.usable(tmp_path)[-1].model()["w"], torch.full((3,), 3.0))


def test_what_a_killed_process_left_is_cleared(tmp_path):
    saved = save(tmp_path, 1)
    for name in (".step-0000002.0123abcd.partial", ".mine.0123abcd.partial"):
        (tmp_path / name).mkdir()
    assert checkpoints.prune(tmp_path, [saved]) == [saved]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.0123abcd.partial", "step-0000001"]


def test_one_that_a_killed_process_was_deleting_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch, capsys):
    def killed(path):
        (path / "model.safetensors").unlink()
        raise KeyboardInterrupt

    made = [save(tmp_path, step) for step in (1, 2, 3)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "delete", killed)
        checkpoints.prune(tmp_path, made)
    left = checkpoints.usable(tmp_path)
    assert [found.step for found in left] == [2, 3] and checkpoints.prune(tmp_path, left) == left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000002", "step-0000003"]
    assert "damaged" not in capsys.readouterr().out


def test_many_writers_of_one_file_all_succeed(tmp_path):
    path, contents = tmp_path / "samples.png", [bytes([number]) * 20_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: files.write_file(path, contents[number % 8]), range(300)))
    assert path.read_bytes() in contents and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_writer_left_is_deleted_by_the_next_and_what_is_being_written_is_not(tmp_path, folder):
    path = tmp_path / "x"
    process = os.fork()
    if process == 0:
        with files.aside(path, folder):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    (left,) = tmp_path.iterdir()
    with files.aside(path, folder) as made:
        assert not left.exists()
        with pytest.raises(KeyError), files.aside(path, folder) as other:
            assert {*tmp_path.iterdir()} == {made, other}
            raise KeyError
        assert [*tmp_path.iterdir()] == [made]
    assert [*tmp_path.iterdir()] == [path]


def test_a_folder_of_many_images_is_listed_once(tmp_path, monkeypatch):
    """A listing for each image would take a time that grows with the square of their number. What killed writers left goes."""
    images, listed, iterdir = torch.zeros(30, 1, 2, 2, dtype=torch.uint8), [], Path.iterdir
    (tmp_path / ".00007.png.0123abcd.partial").touch()
    (tmp_path / ".another.png.0123abcd.partial").touch()
    monkeypatch.setattr(Path, "iterdir", lambda path: listed.append(path) or iterdir(path))
    write_images(tmp_path, images, texts=["a"] * 30)
    assert listed == [tmp_path]
    names = sorted(path.name for path in iterdir(tmp_path))
    assert names == [".another.png.0123abcd.partial", *(f"{number:05}.png" for number in range(30)), "captions.jsonl"]


def test_what_is_not_a_checkpoint_of_ours_is_left_alone_and_a_damaged_one_is_moved(tmp_path, capsys):
    for name in ("step-mine", "step-7", "step-0000003.backup"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").touch()
    (save(tmp_path, 1).folder / "model.safetensors").unlink()
    (tmp_path / "step-0000001" / "notes.txt").touch()
    made = [save(tmp_path, step) for step in (2, 3, 4)]
    assert [found.step for found in checkpoints.prune(tmp_path, checkpoints.usable(tmp_path))] == [3, 4]
    assert not made[0].folder.exists() and (tmp_path / "damaged-1-step-0000001" / "notes.txt").exists()
    assert all((tmp_path / name / "notes.txt").exists() for name in ("step-mine", "step-7", "step-0000003.backup"))
    (made[2].folder / "model.safetensors").write_bytes(b"")
    save(tmp_path, 4)
    assert (tmp_path / "damaged-1-step-0000004").is_dir() and checkpoints.usable(tmp_path)[-1].step == 4
    assert capsys.readouterr().out.count("which you may delete") == 2


def test_steps_of_more_digits_come_last(tmp_path):
    for step in (10_000_000, 9_999_999):
        save(tmp_path, step)
    assert [found.step for found in checkpoints.usable(tmp_path)] == [9_999_999, 10_000_000]


def test_the_best_is_of_lowest_loss_and_among_equals_the_newest(tmp_path):
    made = [save(tmp_path, step, loss) for step, loss in ((1, 2.0), (2, 1.0), (3, 1.0), (4, 3.0))]
    assert checkpoints.best(made).step == 3


def test_one_that_was_not_judged_is_kept_only_while_it_is_the_newest(tmp_path):
    made = [checkpoints.save(tmp_path, checkpoints.Record(1, None), {}, {})]
    made = checkpoints.prune(tmp_path, made)
    for step, loss in ((2, 1.0), (3, 2.0), (4, None), (5, 3.0)):
        record = checkpoints.Record(step, None if loss is None else {"loss": loss})
        made = checkpoints.prune(tmp_path, [*made, checkpoints.save(tmp_path, record, {}, {})])
        assert made[-1].step == step
        assert sorted(path.name for path in tmp_path.iterdir()) == [found.folder.name for found in made]
        assert [found.step for found in made] == {2: [2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 3, 5]}[step]


def test_cached_tensors_are_made_once_and_again_when_the_key_or_the_file_changes(tmp_path, capsys):
    made = []

    def make():
        made.append(1)
        return {"x": torch.tensor([len(made)])}

    path = tmp_path / "x.safetensors"
    assert files.cached(path, "a", make)["x"] == 1
    assert files.cached(path, "a", make)["x"] == 1
    assert files.cached(path, "b", make)["x"] == 2
    path.write_bytes(path.read_bytes()[:-3])
    assert files.cached(path, "b", make)["x"] == 3
    assert "truncated" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.safetensors.lock", "x.safetensors"]
    files.write_tensors(path, {"x": torch.zeros(1)})  # whole, but made under no key
    assert files.cached(path, "b", make)["x"] == 4 and "truncated" not in capsys.readouterr().out


def test_of_several_runs_one_makes_what_is_cached_and_the_others_wait(tmp_path, capsys):
    made, begun = [], threading.Barrier(4)

    def make():
        made.append(1)
        time.sleep(0.3)
        return {"x": torch.tensor([len(made)])}

    def use(_):
        begun.wait()
        return int(files.cached(tmp_path / "x.safetensors", "a", make)["x"])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(use, range(4))) == [1, 1, 1, 1]
    assert made == [1] and "waiting for another process" in capsys.readouterr().out


def test_a_file_system_that_makes_no_file_ends_in_its_error(tmp_path, monkeypatch):
    def refuses(self, exist_ok=True):
        raise FileNotFoundError(2, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "touch", refuses)
    with pytest.raises(FileNotFoundError):
        files.write_file(tmp_path / "x.json", b"{}")
