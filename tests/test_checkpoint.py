"""Checkpoints: whole or not at all, and never used when damaged."""

import errno

import pytest
import torch

from pipelines import checkpoint
from pipelines.console import UserError


def save(folder, step, loss=1.0, value=0.0):
    return checkpoint.save(
        folder, {"step": step, "held_out": {"loss": loss}}, {"w": torch.full((3,), value)}, {"model.w": torch.full((3,), value)}
    )


def test_comes_back_as_saved(tmp_path):
    save(tmp_path, 5, value=2.5)
    (found,) = checkpoint.usable(tmp_path)
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
    assert [found.step for found in checkpoint.usable(tmp_path)] == [1]
    assert "step-0000002" in capsys.readouterr().out


def test_no_good_one_is_an_error_that_says_what_to_do(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-0000001" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="model.safetensors.*Delete"):
        checkpoint.usable(tmp_path)


def test_a_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch):
    save(tmp_path, 1, value=1.0)
    write_file, writes = checkpoint.write_file, []

    def full(path, content):
        writes.append(path)
        if len(writes) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_file(path, content)

    monkeypatch.setattr(checkpoint, "write_file", full)
    with pytest.raises(OSError):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]
    assert torch.equal(checkpoint.usable(tmp_path)[0].model()["w"], torch.ones(3))


def test_a_damaged_one_is_written_anew(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step-0000002" / "model.safetensors").write_bytes(b"")
    save(tmp_path, 2, value=3.0)
    assert torch.equal(checkpoint.usable(tmp_path)[-1].model()["w"], torch.full((3,), 3.0))


def test_what_a_killed_process_left_is_cleared(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step-0000002.999").mkdir()
    checkpoint.prune(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]


def test_the_best_is_of_lowest_loss_and_among_equals_the_newest(tmp_path):
    made = [save(tmp_path, step, loss) for step, loss in ((1, 2.0), (2, 1.0), (3, 1.0), (4, 3.0))]
    assert checkpoint.best(made).step == 3


def test_cached_tensors_are_made_once_and_again_when_the_key_or_the_file_changes(tmp_path, capsys):
    made = []

    def make():
        made.append(1)
        return {"x": torch.tensor([len(made)])}

    path = tmp_path / "x.safetensors"
    assert checkpoint.cached(path, "a", make)["x"] == 1
    assert checkpoint.cached(path, "a", make)["x"] == 1
    assert checkpoint.cached(path, "b", make)["x"] == 2
    path.write_bytes(path.read_bytes()[:-3])
    assert checkpoint.cached(path, "b", make)["x"] == 3
    assert "truncated" in capsys.readouterr().out
