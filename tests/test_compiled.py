"""The draws of heads in C: those of torch's operations; and all of steps.c in every build. Of the steps in the build that was
installed, see test_backbones.py."""

import ctypes
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stage2_prior import compiled
from stage2_prior.heads import Categorical, GaussianMixture
from stage2_prior.latents import LatentSpec
from stage2_prior.pixelcnn import PixelCNNConfig
from stage2_prior.pixelsnail import PixelSNAILConfig
from stage2_prior.sampling import AS_FITTED, CannotSample, uniforms
from stage2_prior.transformer import TransformerConfig
from tests.parts import randomized

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler at installation, none of its work here")
def test_an_installation_with_a_compiler_has_the_compiled_steps():
    assert compiled.library() is not None


def test_arguments_are_declared_as_in_the_c_code():
    """A wrong order or type would write over other memory."""
    prototypes = re.findall(r"^void (\w+)\(([^)]*)\) \{", (ROOT / "stage2_prior" / "steps.c").read_text(), re.MULTILINE)
    marks = {"size": "", "float": "~", "float *": "*", "const float *": "*", "int64_t *": "*"}

    def declared(parameter: str) -> str:
        kind, name = re.fullmatch(r"(.*?)(\w+)", " ".join(parameter.split())).groups()
        return marks[kind.strip()] + name

    found = {name: " ".join(map(declared, parameters.split(","))) for name, parameters in prototypes}
    assert found == compiled.SIGNATURES


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [1, 6, 50])
@pytest.mark.parametrize("codes", [2, 37, 512])
def test_compiled_draws_are_those_without_them(codes, batch, threads):
    """Of codes and of mixtures, whose outputs do and do not fill the tiles of steps.c; logits near each other and far apart."""
    of_codes, of_mixtures = LatentSpec((4, 4), codes), LatentSpec((3, 4, 4))
    heads = [
        Categorical().build(of_codes, 32),
        Categorical(hidden=48).build(of_codes, 32),
        Categorical(hidden=16).build(of_codes, 20),
        GaussianMixture(codes % 50).build(of_mixtures, 32),
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for head, scale in itertools.product(heads, (0.05, 1.0)):
            randomized(head, scale, seed=codes)
            generator, width = torch.Generator().manual_seed(batch), head.hidden.in_features
            features = torch.randn(width, batch, generator=generator).T  # not row by row
            noise = uniforms(0, torch.arange(batch), torch.arange(2), head.uniforms_per_position(AS_FITTED))
            with torch.no_grad():
                state = head.begin(noise, AS_FITTED)
                assert (compiled.library() is None) == (state.compiled is None)
                drawn, expected = head.draw(features, 1, state), head.draw(features, 1, state._replace(compiled=None))
            assert torch.allclose(drawn, expected, rtol=1e-4, atol=1e-5) if drawn.is_floating_point() else drawn.equal(expected)
    finally:
        torch.set_num_threads(before)


def test_compiled_draws_of_what_is_not_a_number_stay_within_bounds():
    head = Categorical().build(LatentSpec((2, 2), 5), 16)
    head.output.bias.data.fill_(torch.nan)
    with torch.no_grad():
        state = head.begin(uniforms(0, torch.arange(9), torch.arange(1), 1), AS_FITTED)
        assert all(0 <= code < 5 for code in head.draw(torch.ones(9, 16), 0, state).tolist())


def test_an_older_installation_is_told_of_and_not_used(monkeypatch):
    """One of before there were versions, and one of another."""
    monkeypatch.delenv("STEPS_BUILD", raising=False)
    unversioned = SimpleNamespace(origin=torch._C.__file__)
    with monkeypatch.context() as patched, pytest.warns(UserWarning, match="pip install -e . again"):
        patched.setattr(compiled, "find_spec", lambda name: unversioned)
        assert compiled.library.__wrapped__() is None
    if compiled.library() is not None:
        monkeypatch.setattr(compiled, "VERSION", compiled.VERSION + 1)
        with pytest.warns(UserWarning, match="pip install -e . again"):
            assert compiled.library.__wrapped__() is None


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler")
@pytest.mark.parametrize("name", compiled.BUILDS)
def test_every_build_does_what_torch_does(name, tmp_path, monkeypatch):
    """With vectors of 16, 8 and 4, as far as this machine can run them, at widths of one vector and of several."""
    build = built(name, tmp_path)
    lanes, library = compiled.lanes(build), compiled.library
    configs = [
        PixelCNNConfig(width=lanes, layers=2, kernel=5),
        PixelCNNConfig(width=5 * lanes, layers=2),
        PixelSNAILConfig(width=2 * lanes, blocks=2, layers=1, heads=2),
        TransformerConfig(width=3 * lanes, layers=2, heads=1),
    ]
    before = torch.get_num_threads()
    for config, threads, batch in itertools.product(configs, (1, 2), (1, 7, 33)):
        backbone, head = randomized(config.build().eval(), scale=0.2), Categorical().build(LatentSpec((3, 4), 9), config.width)
        noise = uniforms(0, torch.arange(batch), torch.arange(12), 1)
        results = []
        torch.set_num_threads(threads)
        try:
            for used in (build, None):
                monkeypatch.setattr(compiled, "library", lambda used=used: used)
                results.append(drawn(backbone, randomized(head), noise, used is not None))
        finally:
            torch.set_num_threads(before)
            monkeypatch.setattr(compiled, "library", library)
        (features, codes), (expected, expected_codes) = results
        assert torch.allclose(features, expected, rtol=1e-4, atol=1e-5) and codes.equal(expected_codes)


def built(name: str, folder: Path) -> ctypes.CDLL:
    """steps.c as pyproject.toml has it compiled under a name."""
    tomllib = pytest.importorskip("tomllib")
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    (module,) = (module for module in setuptools["ext-modules"] if module["name"] == f"stage2_prior.{name}")
    sources, flags, path = [ROOT / source for source in module["sources"]], module["extra-compile-args"], folder / f"{name}.so"
    done = subprocess.run(["gcc", "-shared", "-fPIC", *flags, *sources, "-o", path, "-lm"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this compiler makes no {name}: {done.stderr}")
    build = ctypes.CDLL(str(path))
    # The last two need no more than any processor has, even where others are faster.
    if not build.runs_here() and name in compiled.BUILDS[:2]:
        pytest.skip(f"this processor runs no {name}")
    return compiled.declared(build)


@torch.no_grad()
def drawn(backbone, head, noise: torch.Tensor, in_c: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and codes of a grid of 3×4, position by position."""
    state, draws, previous, features, codes = backbone.begin(len(noise), (3, 4)), head.begin(noise, AS_FITTED), None, [], []
    assert (draws.compiled is not None) == in_c
    for position in range(12):
        features.append(backbone.step(previous, position, state).clone())
        codes.append(head.draw(features[-1], position, draws))
        previous = head.embed(codes[-1])
    return torch.stack(features), torch.stack(codes)


@pytest.mark.parametrize("last_runs", [True, False])
def test_the_first_build_for_this_processor_is_used(last_runs, monkeypatch, recwarn):
    """Of those that are installed. One of another version is not; it is told of where nothing else is left."""
    monkeypatch.delenv("STEPS_BUILD", raising=False)
    versions = {"of another version": compiled.VERSION + 1}
    processors = {"for another processor": False, "last": last_runs}
    names = iter(["of another version", "for another processor", "last", None])
    monkeypatch.setattr(compiled, "find_spec", lambda name: SimpleNamespace(origin=next(names)))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(name=name, runs_here=lambda: processors[name]))
    monkeypatch.setattr(compiled, "version_of", lambda build: versions.get(build.name, compiled.VERSION))
    monkeypatch.setattr(compiled, "declared", lambda build: build)
    used = compiled.library.__wrapped__()
    assert (used is not None and used.name == "last") == last_runs
    assert len(recwarn) == (0 if last_runs else 1)


@pytest.mark.parametrize("name", compiled.BUILDS[1:])
def test_a_build_that_is_asked_for_is_used_though_another_is_faster(name, monkeypatch, recwarn):
    monkeypatch.setattr(compiled, "find_spec", lambda module: SimpleNamespace(origin=module))
    monkeypatch.setattr(ctypes, "CDLL", lambda module: SimpleNamespace(name=module, runs_here=lambda: "avx512" in module))
    monkeypatch.setattr(compiled, "version_of", lambda build: compiled.VERSION)
    monkeypatch.setattr(compiled, "declared", lambda build: build)
    for asked, used in ((name, name), (None, compiled.BUILDS[0])):
        monkeypatch.setenv("STEPS_BUILD", asked) if asked else monkeypatch.delenv("STEPS_BUILD")
        assert compiled.library.__wrapped__().name == f"stage2_prior.{used}"
    monkeypatch.setenv("STEPS_BUILD", "none")
    assert compiled.library.__wrapped__() is None and not len(recwarn)


def test_a_build_that_there_is_not_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("STEPS_BUILD", "avx2")
    with pytest.raises(CannotSample, match="compiled_steps_avx2, .* or none, not 'avx2'"):
        compiled.library.__wrapped__()


@pytest.mark.parametrize(("installed", "says"), [("compiled_steps_one_thread", "without OpenMP"), (None, "without a C compiler")])
def test_what_is_missing_is_said_once(installed, says, monkeypatch):
    def spec(name: str) -> SimpleNamespace | None:
        return SimpleNamespace(origin=name) if name == f"stage2_prior.{installed}" else None

    monkeypatch.delenv("STEPS_BUILD", raising=False)
    monkeypatch.setattr(compiled, "find_spec", spec)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(runs_here=lambda: True))
    monkeypatch.setattr(compiled, "version_of", lambda build: compiled.VERSION)
    monkeypatch.setattr(compiled, "declared", lambda build: build)
    compiled.library.cache_clear()
    with pytest.warns(UserWarning, match=f"{says}.*pip install -e . again") as warned:
        assert [compiled.library() is not None for _ in range(2)] == [installed is not None] * 2
    compiled.library.cache_clear()
    assert len(warned) == 1
