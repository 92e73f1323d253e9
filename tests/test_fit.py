"""The training loop: its order, its resume, its average, and what it does when a number goes wrong."""

import contextlib
import dataclasses
import math
import os
import re
import signal

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from pipelines.console import Progress, Signals, Stopped, UserError, say
from pipelines.files import read_tensors
from pipelines.training import checkpoints
from pipelines.training import fit as fitting
from pipelines.training.average import Average
from pipelines.training.config import FitConfig
from pipelines.training.fit import REWINDS, UNTRACKED, Training, fit, learning_rate, warn_of_divergence
from pipelines.training.order import Order, evenly, seed_of

CONFIG = FitConfig(steps=12, batch_size=4, checkpoint_steps=4, warmup_steps=2, learning_rate=0.05)


class Points:
    def __init__(self, count: int):
        self.x = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, indices):
        return (self.x[indices] + 0.1 * torch.randn(3),)  # a draw, as the latents of stage 2 are


class Noisy(nn.Module):
    """Draws noise and drops out in forward, and keeps state in a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 3))
        self.register_buffer("seen", torch.tensor(0.0))

    def forward(self, x, progress=0.0):
        if self.training:
            self.seen += x.abs().sum()
        return {"loss": (self.layers(x + 0.1 * torch.randn_like(x)) - x).square().mean()}


def train(folder, config=CONFIG, model=None, on_nan="stop", tracker=UNTRACKED):
    model = Noisy() if model is None else model
    where = folder, "test"
    chosen = fit(Fabric(accelerator="cpu"), model, Points(30), Points(10), config, 0, *where, on_nan=on_nan, tracker=tracker)
    return model, chosen


def test_progress_counts_the_steps_that_were_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Progress, "SECONDS", 0.0)
    train(tmp_path)
    assert f"test: {CONFIG.steps}/{CONFIG.steps} steps, 100 %" in capsys.readouterr().out


def test_progress_shows_the_held_out_loss_beside_that_of_other_models(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Progress, "SECONDS", 0.0)
    fit(Fabric(accelerator="cpu"), Noisy(), Points(30), Points(10), CONFIG, 0, tmp_path, "test", beside=lambda: {"other": 7.25})
    lines = [line for line in capsys.readouterr().out.splitlines() if "steps," in line]
    assert len(lines) > 4 and all(", other 7.25" in line for line in lines)
    shown = [float(re.search(r"held out ([\d.]+),", line)[1]) for line in lines if "held out" in line]
    judged = [moment.held_out["loss"] for moment in checkpoints.usable(tmp_path)[-1].record.history]
    assert {*shown} <= {float(f"{loss:.4g}") for loss in judged} and 0 < len(shown) < len(lines)


def assert_equal(whole, resumed):
    """Two checkpoints, bit for bit."""
    for a, b in ((whole.model(), resumed.model()), (whole.training(), resumed.training())):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    whole, resumed = (dataclasses.replace(each.record, time=None, seconds=None) for each in (whole, resumed))
    assert whole == resumed


class Killed(Exception):
    pass


class ChannelsLast(Noisy):
    """With a kernel whose numbers lie in memory in another order than a checkpoint has them."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)

    def forward(self, x, progress=0.0):
        terms = super().forward(x, progress)
        images = torch.arange(len(x) * 27.0).reshape(len(x), 3, 3, 3).sin()
        return terms | {"loss": terms["loss"] + self.convolution(images).square().mean()}


@pytest.mark.parametrize("model", [Noisy, ChannelsLast])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("saves", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, saves, optimizer, model):
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    _, whole = train(tmp_path / "whole", config, model())
    save, count = checkpoints.save, 0

    def killed_after(*arguments):
        nonlocal count
        result = save(*arguments)
        count += 1
        if count == saves:
            raise Killed
        return result

    monkeypatch.setattr(checkpoints, "save", killed_after)
    with pytest.raises(Killed):
        train(tmp_path / "killed", config, model())
    monkeypatch.setattr(checkpoints, "save", save)
    _, resumed = train(tmp_path / "killed", config, model())
    assert_equal(whole, resumed)


def test_a_checkpoint_counts_the_seconds_of_training_of_all_starts(tmp_path):
    _, first = train(tmp_path, dataclasses.replace(CONFIG, steps=4))
    later = dataclasses.replace(first.record, seconds=1000.0)
    checkpoints.save(tmp_path, later, first.model(), first.training())
    _, second = train(tmp_path)
    assert 0 < first.record.seconds < 100 and 1000 < second.record.seconds < 1100


@pytest.mark.parametrize("change", ["no moments", "another shape", "no number", "too many", "another optimizer"])
def test_the_optimizer_of_another_training_is_refused(tmp_path, change):
    train(tmp_path, dataclasses.replace(CONFIG, steps=4))
    last = checkpoints.usable(tmp_path)[-1]
    training = last.training()
    if change == "no moments":
        del training["optimizer.0.exp_avg"]
    elif change == "another optimizer":
        training["optimizer.0.momentum"] = training.pop("optimizer.0.exp_avg")
    elif change == "another shape":
        training["optimizer.0.exp_avg"] = training["optimizer.0.exp_avg"][:1].clone()
    else:
        training[f"optimizer.{'x' if change == 'no number' else 99}.step"] = torch.tensor(1.0)
    checkpoints.save(tmp_path, last.record, last.model(), training)
    with pytest.raises(UserError, match="training.safetensors is of another training"):
        train(tmp_path)


def test_a_finished_training_is_only_loaded(tmp_path, capsys):
    first, chosen = train(tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    second, again = train(tmp_path)
    assert again.folder == chosen.folder and "skipped" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def test_keeps_the_last_two_and_the_best(tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    monkeypatch.setattr("pipelines.training.fit.evaluate", lambda *_: {"loss": next(losses)})
    _, chosen = train(tmp_path, dataclasses.replace(CONFIG, checkpoint_steps=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000004", "step-0000010", "step-0000012"]
    assert chosen.step == 4


@pytest.mark.parametrize(
    ("train", "held_out", "warns"),
    [
        ((9, 5, 1, 9), (9, 5, 2, 8), True),
        ((9, 5, 3, 1), (9, 5, 6, 9), False),  # overfits
        ((9, 5, 1, 3), (9, 5, 2, 3), False),  # noise
        ((9, 5, 2, 1), (9, 5, 2, 1), False),
        ((9,), (9,), False),
    ],
)
def test_a_training_that_diverged_says_so(train, held_out, warns, capsys):
    points = enumerate(zip(train, held_out), 1)
    warn_of_divergence("stage 1", [checkpoints.Moment(i, {"loss": a}, {"loss": b}) for i, (a, b) in points])
    out = capsys.readouterr().out
    assert ("stage 1 diverged: the held-out loss was 2 at step 3 and is 8 at the end" in out) == warns
    assert bool(out) == warns


def test_a_training_that_diverged_says_so_once(tmp_path, monkeypatch, capsys):
    """Not each time that it is loaded again."""
    monkeypatch.setattr("pipelines.training.fit.warn_of_divergence", lambda label, history: print("diverged"))
    for _ in range(3):
        fit(Fabric(accelerator="cpu"), Noisy(), Points(30), Points(10), CONFIG, 0, tmp_path, "test")
    assert capsys.readouterr().out.count("diverged") == 1


def test_of_a_large_batch_that_is_not_a_number_some_images_are_named(tmp_path):
    config = dataclasses.replace(CONFIG, batch_size=20)
    with pytest.raises(UserError, match=r"is not a number \(images (\d+, ){7}\d+ and 12 more\)"):
        fit(Fabric(accelerator="cpu"), Breaks([0]), Points(30), Points(10), config, 0, tmp_path, "test")


@pytest.mark.parametrize(("length", "batch"), [(10, 4), (10, 10), (3, 8), (7, 1)])
def test_every_epoch_sees_every_example_once(length, batch):
    order = Order(length, batch, seed=3)
    seen = torch.cat([order.indices(step) for step in range(6 * length)])
    for epoch in range(len(seen) // length):
        assert sorted(seen[epoch * length : (epoch + 1) * length].tolist()) == list(range(length))
    assert torch.equal(Order(length, batch, seed=3).indices(5), order.indices(5))
    if length > 3:
        assert not torch.equal(seen[:length], seen[length : 2 * length])
        assert not torch.equal(Order(length, batch, seed=4).indices(0), order.indices(0)) or batch == 1


def test_the_learning_rate_warms_up_and_decays():
    rates = [learning_rate(CONFIG, step) for step in range(CONFIG.steps)]
    assert rates[0] == pytest.approx(0.025) and max(rates) <= CONFIG.learning_rate
    assert all(a > b for a, b in zip(rates[1:], rates[2:])) and rates[-1] < 0.1 * CONFIG.learning_rate
    longer = dataclasses.replace(CONFIG, steps=1000, warmup_steps=10)
    assert max(learning_rate(longer, step) for step in range(1000)) == pytest.approx(CONFIG.learning_rate, rel=1e-3)


class Slope(nn.Module):
    """A loss of the same gradient everywhere."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))

    def forward(self, x, progress=0.0):
        return {"loss": 6 * self.weights @ torch.tensor([1.0, 2.0, 2.0])}  # a gradient of norm 18


@pytest.mark.parametrize("clip", [100.0, 2.0])
def test_a_step_clips_the_gradient_and_decays_the_weights(tmp_path, clip):
    """The first step of AdamW, whose size is the learning rate; its moment is a tenth of the gradient."""
    model, config = Slope(), dataclasses.replace(CONFIG, weight_decay=0.5, gradient_clip=clip)
    before = model.weights.detach().clone()
    training = Training(Fabric(accelerator="cpu"), model, Points(30), Points(10), config, 0, tmp_path, "test")
    training.step(0)
    moment = training.optimizer.state[model.weights]["exp_avg"]
    assert torch.allclose(moment, 0.1 * min(clip, 18.0) * torch.tensor([1.0, 2.0, 2.0]) / 3, rtol=1e-4)
    rate = learning_rate(config, 0)
    assert torch.allclose(model.weights.detach(), before * (1 - rate * 0.5) - rate, rtol=1e-5)


def test_the_kept_weights_are_the_average():
    """Against the average written out: w̄ ← d w̄ + (1-d) w with d = min(decay, (1+t)/(10+t))."""
    torch.manual_seed(0)
    weights = torch.randn(20, 5)
    model = nn.Linear(5, 1, bias=False)
    average, expected = Average(model, 0.5), weights[0].clone()
    for t in range(20):
        model.weight.data.copy_(weights[t])
        average.update(t)
        if t:
            decay = min(0.5, (1 + t) / (10 + t))
            expected = decay * expected + (1 - decay) * weights[t]
    with average.in_use():
        assert torch.allclose(model.weight[0], expected)
    assert torch.equal(model.weight[0], weights[-1])


def test_buffers_of_the_kept_weights_are_the_models_own(tmp_path):
    model, chosen = train(tmp_path, dataclasses.replace(CONFIG, steps=4))
    assert torch.equal(chosen.model()["seen"], chosen.training()["model.seen"])
    assert chosen.model()["seen"] > 0
    assert not torch.equal(chosen.model()["layers.0.weight"], chosen.training()["model.layers.0.weight"])


class Breaks(Noisy):
    """Not a number at some steps: in the loss, or in the gradient alone. rewinds: how many there were when it does."""

    def __init__(self, steps, where="loss", rewinds=range(9), killed_at=None):
        super().__init__()
        self.steps, self.where, self.killed_at = steps, where, killed_at
        self.seeds = {(seed_of(0, 2, number) if number else 0) for number in rewinds}

    def forward(self, x, progress=0.0):
        step = round(progress * CONFIG.steps)
        broken = self.training and step in self.steps and torch.initial_seed() in {seed_of(seed, step, 0) for seed in self.seeds}
        if self.training and step == self.killed_at:
            raise Killed
        loss = super().forward(x, progress)["loss"]
        if broken:
            last = self.layers[-1].bias.sum()
            slope = 0 * (last - last.detach()).sqrt()  # NaN: 0 times the infinite slope of √0
            loss = loss * float("nan") if self.where == "loss" else loss + slope
        return {"loss": loss}


@pytest.mark.parametrize(("where", "named"), [("loss", "loss"), ("gradient", "the gradient of layers.2.bias")])
def test_what_is_not_a_number_stops_before_it_touches_anything(tmp_path, where, named):
    with pytest.raises(UserError, match=rf"test, step 6: {named} is not a number \(images .*step-0000004"):
        train(tmp_path, model=Breaks([6], where))
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000004"]
    assert all(tensor.isfinite().all() for tensor in checkpoints.check(tmp_path / "step-0000004").model().values())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_skipped_steps_leave_no_trace(tmp_path, where, capsys):
    """With step 6 left out, weights, buffers and optimizer after step 6 are those after step 5."""
    model = Breaks([6], where)
    training = Training(Fabric(accelerator="cpu"), model, Points(30), Points(10), CONFIG, 0, tmp_path, "test", "skip")
    model.train()
    for step in range(6):
        training.step(step)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = {name: value.clone() for name, value in training.optimizer.state[model.layers[0].weight].items()}
    training.step(6)
    assert "the step is left out" in capsys.readouterr().out
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(moments[name], value) for name, value in training.optimizer.state[model.layers[0].weight].items())
    training.step(7)
    assert not torch.equal(before["layers.0.weight"], model.layers[0].weight)


def test_checkpoints_by_the_clock_change_nothing(tmp_path, monkeypatch):
    """With one after every step, a killed run loses none, and ends in the same checkpoints as one without."""
    _, whole = train(tmp_path / "whole")
    monkeypatch.setattr(fitting, "SAVE_SECONDS", 0)
    monkeypatch.setattr(fitting, "SAVE_SHARE", math.inf)
    with pytest.raises(Killed):
        train(tmp_path / "often", model=Breaks([], killed_at=7))
    assert [found.step for found in checkpoints.usable(tmp_path / "often")] == [4, 7]
    _, resumed = train(tmp_path / "often")
    assert_equal(whole, resumed)
    names = [sorted(path.name for path in (tmp_path / run).iterdir()) for run in ("whole", "often")]
    assert names[0] == names[1]


@pytest.mark.parametrize("killed_at", [8, 10])
def test_a_run_that_skipped_steps_resumes_to_the_same(tmp_path, killed_at):
    _, whole = train(tmp_path / "whole", model=Breaks([6]), on_nan="skip")
    with pytest.raises(Killed):
        train(tmp_path / "killed", model=Breaks([6], killed_at=killed_at), on_nan="skip")
    _, resumed = train(tmp_path / "killed", model=Breaks([6]), on_nan="skip")
    assert_equal(whole, resumed)


@pytest.mark.parametrize(("breaks", "back_to"), [(1, 0), (6, 4)])
def test_rewinds_to_the_last_checkpoint_and_goes_on_with_other_draws(tmp_path, capsys, breaks, back_to):
    _, plain = train(tmp_path / "plain")
    model, rewound = train(tmp_path / "rewound", model=Breaks([breaks], rewinds=[0, 1]), on_nan="rewind")
    said = capsys.readouterr().out
    assert (
        len(re.findall(rf"step {breaks}: loss is not a number \(images (\d+, ){{3}}\d+\); rewound to .*-{back_to:07d}", said))
        == 2
    )
    assert rewound.step == plain.step == CONFIG.steps and rewound.record.rewinds == 2
    assert not torch.equal(plain.model()["layers.0.weight"], rewound.model()["layers.0.weight"])
    assert [moment.step for moment in rewound.record.history] == [4, 8, 12]


@pytest.mark.parametrize("killed_at", [5, 7, 9])
def test_a_run_that_was_rewound_resumes_to_the_same(tmp_path, killed_at):
    """Killed before the step that broke, after it on the way to the next checkpoint, and after that one."""
    _, whole = train(tmp_path / "whole", model=Breaks([6], rewinds=[0]), on_nan="rewind")
    with pytest.raises(Killed):
        train(tmp_path / "killed", model=Breaks([6], rewinds=[0], killed_at=killed_at), on_nan="rewind")
    _, resumed = train(tmp_path / "killed", model=Breaks([6], rewinds=[0]), on_nan="rewind")
    assert_equal(whole, resumed)


def test_rewinding_ends_when_it_does_not_help(tmp_path, capsys):
    with pytest.raises(UserError, match=f"step 6: loss is not a number .*after {REWINDS} rewinds to .*step-0000004"):
        train(tmp_path, model=Breaks([6]), on_nan="rewind")
    assert capsys.readouterr().out.count("rewound to") == REWINDS
    assert [found.step for found in checkpoints.usable(tmp_path)] == [4]


@contextlib.contextmanager
def unread_output():
    """Standard output is a pipe whose reader has ended, as of `train_all | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output, contextlib.redirect_stdout(output):
        yield


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGPIPE])
def test_a_signal_or_an_end_of_the_output_saves_and_the_run_goes_on_as_if_never_stopped(tmp_path, number):
    _, whole = train(tmp_path / "whole")

    class Signalled(Noisy):
        def forward(self, x, progress=0.0):
            if self.training and round(progress * CONFIG.steps) == 5:
                say("a line") if number == signal.SIGPIPE else os.kill(os.getpid(), number)
            return super().forward(x, progress)

    handler = signal.SIG_IGN if number == signal.SIGPIPE else signal.default_int_handler
    before = signal.signal(number, handler)
    with pytest.raises(Stopped, match="saved at test, step 6 of 12") as stopped, unread_output():
        train(tmp_path / "stopped", model=Signalled())
    assert stopped.value.signal == number and signal.signal(number, before) == handler
    assert [c.step for c in checkpoints.usable(tmp_path / "stopped")] == [4, 6]
    _, resumed = train(tmp_path / "stopped")
    assert_equal(whole, resumed)


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    """As of a closed terminal, under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
    assert signals.received is None and signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_seeds_differ():
    seeds = {seed_of(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(("microbatches", "says"), [(3, "batches of 4 do not divide into 3 microbatches")])
def test_a_batch_divides_into_equal_microbatches(tmp_path, microbatches, says):
    with pytest.raises(UserError, match=says):
        train(tmp_path, dataclasses.replace(CONFIG, microbatches=microbatches))


@pytest.mark.parametrize("fails", [None, nn.Linear, Noisy, "held out"])
def test_compiling_changes_nothing_but_speed_and_is_left_out_where_it_does_not_work(tmp_path, monkeypatch, capsys, fails):
    """By a compiler that only traces; by one that is not there, which a probe finds; by one that fails at the model alone; and by
    one that fails where no gradient is wanted."""
    _, plain = train(tmp_path / "plain")
    compile, compiled = nn.Module.compile, []

    def broken(graph, inputs):
        if fails == "held out" and torch.is_grad_enabled():
            return graph
        raise RuntimeError("no C++ compiler found")

    def traced(model):
        compiled.append(type(model))
        compile(model, backend=broken if type(model) is (Noisy if fails == "held out" else fails) else "eager")

    monkeypatch.setattr(nn.Module, "compile", traced)
    monkeypatch.setattr(fitting, "WORTH_COMPILING", CONFIG.steps)
    _, chosen = train(tmp_path / "compiled", dataclasses.replace(CONFIG, compile=True))
    assert compiled == ([nn.Linear] if fails is nn.Linear else [nn.Linear, Noisy])
    said = capsys.readouterr().out
    assert said.count("warning") == bool(fails) and ("compiling, which takes minutes" in said) == (fails is not nn.Linear)
    assert not fails or ("no C++ compiler found" in said and "going on without" in said)
    for a, b in ((plain.model(), chosen.model()), (plain.training(), chosen.training())):
        assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name]) for name in a)


def test_a_training_that_is_shorter_than_its_compilation_is_not_compiled(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nn.Module, "compile", lambda model: pytest.fail("compiled"))
    train(tmp_path, dataclasses.replace(CONFIG, compile=True))
    assert "not compiled, which would take longer" in capsys.readouterr().out


class Precise(nn.Module):
    """Computes in full precision, whatever it is called under, as a density is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(3, 3)

    def forward(self, x, progress=0.0):
        with torch.autocast("cpu", enabled=False):
            return {"loss": self.layer(x.float()).square().mean()}


def test_compiled_gradients_are_not_rounded_where_the_model_is_not(tmp_path, monkeypatch):
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda model: compile(model, backend="aot_eager"))
    monkeypatch.setattr(fitting, "WORTH_COMPILING", 1)
    first = dataclasses.replace(CONFIG, steps=1)
    moments = []
    for config in (first, dataclasses.replace(first, compile=True)):
        fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
        chosen = fit(fabric, Precise(), Points(30), Points(10), config, 0, tmp_path / str(config.compile), "test")
        moments.append(chosen.training()["optimizer.0.exp_avg"])  # a multiple of the first gradient
    torch.testing.assert_close(moments[0], moments[1], rtol=1e-5, atol=0)


def test_the_weights_of_an_eighth_of_the_training_are_kept_apart(tmp_path):
    """The average then, also where the training is stopped before it and goes on."""
    fabric, files = Fabric(accelerator="cpu"), []
    for steps_at_first in (CONFIG.steps, 1):
        folder = tmp_path / str(steps_at_first)
        files.append(folder / "early.safetensors")
        shorter = Breaks([], killed_at=steps_at_first) if steps_at_first < CONFIG.steps else None
        for model in [shorter, Noisy()] if shorter else [Noisy()]:
            with contextlib.suppress(Killed):
                fit(fabric, model, Points(30), Points(10), CONFIG, 0, folder, "test", early=files[-1])
    first = dataclasses.replace(CONFIG, checkpoint_steps=math.ceil(CONFIG.steps / 8))
    training = Training(fabric, Noisy(), Points(30), Points(10), first, 0, tmp_path / "other", "test")
    for step in range(first.checkpoint_steps):
        training.step(step)
    with training.average.in_use():
        expected = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    for kept in (read_tensors(path) for path in files):
        assert kept.keys() == expected.keys() and all(torch.equal(kept[name], expected[name]) for name in kept)


def test_some_examples_are_evenly_spaced_and_few_are_all():
    assert evenly(10, 4).tolist() == [0, 3, 6, 9] and evenly(3, 4).tolist() == [0, 1, 2]
