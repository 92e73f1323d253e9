"""Guidance: toward a context, away from a weaker copy of the prior, and both at once."""

import math

import pytest
import torch
from scipy import stats

from stage2_prior.autoregressive import AutoregressiveConfig, CascadeConfig
from stage2_prior.conditions import Caption, ClassLabel, Unconditional
from stage2_prior.heads import Categorical, GaussianMixture
from stage2_prior.latents import LatentSpec
from stage2_prior.sampling import CannotSample, Sampling
from tests.parts import BACKBONES, CODE_HEADS, HEADS, LEARNED, randomized, spec_for

FALSE_ALARM = 1e-4
NO_LABEL = 3


def priors(backbone, head, spec, scale=0.3, seed=0, condition=ClassLabel()):  # noqa: B008
    """A prior of three labels, and another of the same parts that stands for it early in its training."""
    config = AutoregressiveConfig(BACKBONES[backbone], head, condition)
    prior, weaker = (randomized(config.build([spec], classes=3).double().eval(), scale, seed + i) for i in range(2))
    prior.guide_by(weaker)
    return prior, weaker


KINDS = {"guidance": (1.0, 0.0), "autoguidance": (0.0, 1.0), "both": (0.4, 0.6)}
"""By kind, the shares of a strength."""


def of(kind, strength, temperature=1.0):
    toward, away = KINDS[kind]
    return Sampling(temperature, guidance=toward * strength, autoguidance=away * strength)


def guided_density(prior, weaker, levels, label, how):
    """log of the density as fitted and, not normalized, of what guidance asks for."""
    labels = torch.full((len(levels[0]),), label)
    with torch.no_grad():
        own = prior.log_prob(levels, labels)
        without, early = prior.log_prob(levels, torch.full_like(labels, NO_LABEL)), weaker.log_prob(levels, labels)
    return own, own + how.guidance * (own - without) + how.autoguidance * (own - early)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_of_codes_is_the_normalized_product(kind):
    """One position: samples against p(z) Π (p(z) / weaker(z))^w, normalized, by a χ² test."""
    prior, weaker = priors("pixelcnn", Categorical(), LatentSpec((1, 1), vocabulary=5), scale=0.8)
    count, how = 20_000, of(kind, 1.5)
    fitted, guided = guided_density(prior, weaker, [torch.arange(5).view(5, 1, 1)], 2, how)
    with torch.no_grad():
        (samples,) = prior.sample(torch.arange(count), 0, how, contexts=torch.full((count,), 2))
    expected = guided.softmax(0) * count
    assert (expected - fitted.exp() * count).abs().max() > 0.02 * count  # guidance does something here
    observed = torch.bincount(samples.flatten(), minlength=5)
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > FALSE_ALARM


# Of one component a power is exact; weights whose product is a density, and unlike what is drawn from.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("components", "temperature", "scale", "seed"), [(3, 1.0, 0.5, 2), (1, 0.5, 0.3, 6)])
def test_the_bias_of_guided_continuous_draws_falls_with_the_candidates(monkeypatch, kind, components, temperature, scale, seed):
    """One position of one channel: the total variation from the exact product on a grid falls as candidates are added."""
    prior, weaker = priors("pixelcnn", GaussianMixture(components), LatentSpec((1, 1, 1)), scale, seed)
    count, how, edges = 40_000, of(kind, 2.0, temperature), torch.linspace(-12, 12, 241, dtype=torch.float64)
    middles = (edges[1:] + edges[:-1]) / 2
    _, guided = guided_density(prior, weaker, [middles.view(-1, 1, 1, 1)], 1, how)
    exact = (guided / temperature).softmax(0)
    distance = {}
    with torch.no_grad():
        for candidates in (1, 4, 64):
            monkeypatch.setattr("stage2_prior.heads.CANDIDATES", candidates)
            (z,) = prior.sample(torch.arange(count), 0, how, contexts=torch.ones(count, dtype=torch.int64))
            share = torch.histogram(z.flatten().double(), edges).hist / count
            distance[candidates] = float((share - exact).abs().sum() / 2)
    sampling_error = float((2 * exact * (1 - exact) / (math.pi * count)).sqrt().sum() / 2)
    assert distance[1] > distance[4] > distance[64]
    assert distance[64] < 0.1 * distance[1] + 2 * sampling_error < 0.5 * distance[1]


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_a_copy_that_is_no_weaker_changes_nothing(backbone, head):
    """p(z)^(1+w) / p(z)^w = p(z): codes are the very same; of continuous latents the candidates all weigh alike."""
    prior, _ = priors(backbone, HEADS[head], spec_for(head, (2, 3)))
    prior.guide_by(prior)
    labels = torch.arange(40) % 3
    with torch.no_grad():
        (plain,), (guided,), (strongly,) = (
            prior.sample(torch.arange(40), 0, of("autoguidance", w), labels) for w in (0.0, 1.0, 9.0)
        )
    assert torch.allclose(guided, strongly, atol=1e-9)
    if head in CODE_HEADS:
        assert torch.equal(plain, guided)


def test_guidance_leaves_what_is_told_nothing_as_it_is():
    """As a caption may be empty: p(z)^(1+w) / p(z)^w = p(z)."""
    config = AutoregressiveConfig(BACKBONES["transformer"], HEADS["categorical"], Caption(length=3))
    prior = randomized(config.build([LatentSpec((2, 2), vocabulary=5)]).eval(), 0.5)
    contexts = torch.zeros(40, 3, dtype=torch.int64)
    contexts[20:] = 7
    with torch.no_grad():
        (plain,), (guided,) = (prior.sample(torch.arange(40), 0, Sampling(guidance=w), contexts) for w in (0.0, 3.0))
    assert torch.equal(plain[:20], guided[:20]) and not torch.equal(plain[20:], guided[20:])


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_guided_sample_is_the_same_in_any_batch(backbone, head, kind):
    prior, _ = priors(backbone, HEADS[head], spec_for(head, (2, 3)))
    labels = torch.arange(12) % 3
    with torch.no_grad():
        (together,) = prior.sample(torch.arange(12), 0, of(kind, 1.0), labels)
        apart = [prior.sample(rows, 0, of(kind, 1.0), labels[rows])[0] for rows in torch.arange(12).flip(0).split(5)]
    assert torch.allclose(torch.cat(apart).flip(0), together)


def test_every_level_of_a_cascade_is_guided_away_from_its_own_weaker_copy():
    specs = [LatentSpec((1, 1), vocabulary=3), LatentSpec((1, 2), vocabulary=4)]
    config = AutoregressiveConfig(BACKBONES["pixelcnn"], Categorical())
    prior, weaker = (randomized(CascadeConfig(config, config).build(specs).double().eval(), 0.25, seed) for seed in range(2))
    prior.guide_by(weaker)
    count, w = 20_000, 1.0
    every = torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(4))
    levels = [every[:, :1].view(-1, 1, 1), every[:, 1:].view(-1, 1, 2)]
    with torch.no_grad():
        strong, weak = (
            torch.cat([own.log_prob_by_position(levels[: own.level + 1]).flatten(1) for own in model.levels], 1)
            for model in (prior, weaker)
        )
        top, bottom = prior.sample(torch.arange(count), 0, Sampling(autoguidance=w))
    guided = ((1 + w) * strong - w * weak).view(3, 4, 4, 3)
    # Each position is normalized over its own codes, given those before it.
    first = guided[:, 0, 0, 0].log_softmax(0)[:, None, None]
    second = guided[:, :, 0, 1].log_softmax(1)[:, :, None]
    expected = count * (first + second + guided[..., 2].log_softmax(2)).exp().flatten()
    observed = torch.bincount(16 * top.flatten() + bottom.flatten(1) @ torch.tensor([4, 1]), minlength=48)
    assert expected.min() > 5
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > FALSE_ALARM


def test_the_weaker_copy_is_no_part_of_the_weights():
    prior, weaker = priors("pixelcnn", GaussianMixture(3), LatentSpec((2, 2, 2)))
    alone = AutoregressiveConfig(BACKBONES["pixelcnn"], GaussianMixture(3), ClassLabel()).build(
        [LatentSpec((2, 2, 2))], classes=3
    )
    assert prior.state_dict().keys() == alone.state_dict().keys()
    assert len(list(prior.parameters())) == len(list(alone.parameters()))
    assert prior.weaker is weaker


def test_what_cannot_be_guided_says_why():
    alone = AutoregressiveConfig(BACKBONES["pixelcnn"], condition=Unconditional()).build([LatentSpec((2, 2, 2))])
    for more in ({"how": Sampling(guidance=1.0)}, {"contexts": torch.zeros(2, dtype=torch.int64)}):
        with pytest.raises(CannotSample, match="takes no context(, a label or a caption, .*: set a temperature instead)?$"):
            alone.sample(torch.arange(2), 0, **more)
    with pytest.raises(CannotSample, match="no weaker copy"):
        alone.sample(torch.arange(2), 0, Sampling(autoguidance=1.0))
    prior, _ = priors("pixelcnn", GaussianMixture(3), LatentSpec((2, 2, 2)))
    for kind in KINDS:
        with pytest.raises(CannotSample, match="all the same: guided, set it above 0"):
            prior.sample(torch.arange(2), 0, of(kind, 1.0, temperature=0.0))
    for kind in ("guidance", "autoguidance"):
        for wrong in (-1, math.inf, math.nan):
            with pytest.raises(CannotSample, match=f"{kind} is 0 or more"):
                Sampling(**{kind: wrong})
