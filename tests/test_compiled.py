"""The draws of heads in C: those of torch's operations. Of the gated layers' steps, see test_backbones.py."""

import itertools
import shutil
from types import SimpleNamespace

import pytest
import torch

from stage2_prior import compiled
from stage2_prior.heads import Categorical, GaussianMixture
from stage2_prior.latents import LatentSpec
from stage2_prior.sampling import AS_FITTED, uniforms
from tests.parts import randomized


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler at installation, none of its work here")
def test_an_installation_with_a_compiler_has_the_compiled_steps():
    assert compiled.library() is not None


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
            noise = uniforms(0, torch.arange(batch), torch.arange(2), head.uniforms(AS_FITTED))
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
    unversioned = SimpleNamespace(origin=torch._C.__file__)
    with monkeypatch.context() as patched, pytest.warns(UserWarning, match="pip install -e . again"):
        patched.setattr(compiled, "find_spec", lambda name: unversioned)
        assert compiled.library.__wrapped__() is None
    if compiled.library() is not None:
        monkeypatch.setattr(compiled, "VERSION", compiled.VERSION + 1)
        with pytest.warns(UserWarning, match="pip install -e . again"):
            assert compiled.library.__wrapped__() is None
