"""The commands on a device that lacks what MPS, a Mac's GPU, lacks: see mps.py."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric.accelerators import MPSAccelerator

from pipelines import files, generate, likelihood
from pipelines.runs.names import PRIORS
from pipelines.runs.phases import train
from pipelines.runs.pictures import write_images
from pipelines.runs.recipes import preset
from pipelines.runs.run import Run
from pipelines.train_all import train_all
from pipelines.training.devices import open_fabric, resolved
from stage2_prior.autoregressive import AutoregressiveConfig, CascadeConfig
from stage2_prior.baselines import CODE_BASELINES, CONTINUOUS_BASELINES
from stage2_prior.conditions import Caption, ClassLabel, Cluster
from stage2_prior.heads import Categorical
from stage2_prior.latents import LatentSpec
from stage2_prior.sampling import inverse_normal_cdf
from tests.forks import forked
from tests.mps import DEVICE, Device, Refused
from tests.parts import BACKBONES, RIVALS, shrunk, small_splits


@pytest.fixture
def device(monkeypatch):
    """The stand-in, which is what `--device auto` takes."""
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: True)
    monkeypatch.setattr(MPSAccelerator, "get_parallel_devices", lambda devices: [DEVICE])
    monkeypatch.setattr(MPSAccelerator, "parse_devices", lambda devices: 1)
    # Tensors with others inside cannot be looked at in part in inference mode.
    monkeypatch.setattr(torch.inference_mode, "__enter__", lambda self: torch.no_grad.__enter__(self))
    monkeypatch.setattr(torch.inference_mode, "__exit__", lambda self, *error: torch.no_grad.__exit__(self, *error))
    with Device():
        yield DEVICE


def run_of(name, folder, monkeypatch) -> Run:
    monkeypatch.chdir(folder)
    config = shrunk(preset(name))
    monkeypatch.setattr(type(config.data), "load", lambda self, report=None: small_splits((1, 16, 16), 4))
    run = Run.create(folder / "checkpoints" / name, config)
    assert run.fabric.device == DEVICE
    return run


def test_train_all_and_likelihood(device, tmp_path, monkeypatch):
    train_all(run_of("mnist5k", tmp_path, monkeypatch))
    likelihood.main(["mnist5k", "--images", "4", "--samples", "2", "--naive", "10"])
    generate.main(["mnist5k", "--count", "3", "--pixels", "sample"])
    write_images(tmp_path / "picture.png", torch.zeros(1, 1, 16, 16, dtype=torch.uint8))
    generate.main(["mnist5k", "--count", "2", "--complete", "picture.png", "--keep", "bottom-half", "--out", "completed.png"])


def test_codes(device, tmp_path, monkeypatch):
    train(run_of("fashion-vqvae2", tmp_path, monkeypatch))
    for prior in PRIORS:
        if prior not in CONTINUOUS_BASELINES:
            generate.main(["fashion-vqvae2", "--count", "3", "--prior", prior])


CONTINUOUS, COARSE, FINE = LatentSpec((2, 2, 2)), LatentSpec((2, 2), 5), LatentSpec((4, 4), 6)
PRIORS_ON_DEVICE = {
    **{name: ([CONTINUOUS], replace(config, condition=ClassLabel())) for name, config in RIVALS.items()},
    **{f"{name} of continuous latents": ([CONTINUOUS], make) for name, make in CONTINUOUS_BASELINES.items()},
    **{f"{name} of codes": ([COARSE, FINE], make) for name, make in CODE_BASELINES.items()},
    **{
        name: ([COARSE, FINE], CascadeConfig(*[AutoregressiveConfig(BACKBONES["pixelcnn"], Categorical(), condition)] * 2))
        for name, condition in {"labels": ClassLabel(), "clusters": Cluster(3), "captions": Caption(length=4)}.items()
    },
}


@pytest.mark.parametrize("name", PRIORS_ON_DEVICE)
@torch.no_grad()
def test_every_prior_samples_and_scores_on_its_device(device, name):
    specs, make = PRIORS_ON_DEVICE[name]
    prior = make(specs) if callable(make) else make.build(specs, 3)
    prior.to(device).eval()
    indices = torch.arange(3, device=device)
    contexts = prior.draw_contexts(indices, seed=0)
    drawn = prior.sample(indices, 0)
    assert [level.device for level in (*drawn, prior.log_prob(drawn, contexts))] == [device] * (len(specs) + 1)
    again = prior.sample(indices, 0, contexts=contexts)
    assert all(torch.equal(level.cpu(), same.cpu()) for level, same in zip(drawn, again))


def test_float32_is_float32_also_in_convolutions_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    open_fabric("cpu")
    assert not torch.backends.cudnn.allow_tf32


def test_auto_precision_on_a_mac_does_not_depend_on_its_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    found = {device: resolved("auto", device) for device in ("auto", "mps", "cpu")}
    assert found == {"auto": "float32", "mps": "float32", "cpu": "bfloat16"} and resolved("bfloat16", "mps") == "bfloat16"


def test_windows_opens_no_folder(tmp_path, monkeypatch):
    def opened(path, *how):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return os_open(path, *how)

    os_open = os.open
    monkeypatch.setattr(files, "os", SimpleNamespace(**{**vars(os), "name": "nt", "open": opened}))
    monkeypatch.setattr(files, "fcntl", None)
    for number in range(2):
        files.write_json(tmp_path / "x.json", number)
    assert files.read_as(tmp_path / "x.json", int) == 1 and [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_benchmarks_are_imported_where_there_is_no_module_resource(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    done = forked("pipelines.benchmarks.data", cwd=Path(__file__).parents[1], anew=True)
    assert done.returncode == 0, done.stderr


def test_what_mps_lacks_is_refused(device):
    numbers = torch.rand(3, device=device)
    for refused in (
        lambda: numbers.double(),
        lambda: numbers.to("cpu", torch.float64),
        lambda: torch.zeros(3, dtype=torch.float64, device=device),
        lambda: torch.special.ndtri(numbers),
        lambda: numbers + torch.rand(3),
    ):
        with pytest.raises(Refused, match="MPS"):
            refused()
    assert torch.equal(inverse_normal_cdf(numbers).cpu(), torch.special.ndtri(numbers.cpu()))
