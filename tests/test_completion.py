"""Completion: held latents stay, the rest follows p(free | held), whatever is held and where."""

import pytest
import torch
from scipy import stats

from stage2_prior.autoregressive import AutoregressiveConfig, CascadeConfig
from stage2_prior.completion import complete, effective
from stage2_prior.conditions import ClassLabel
from stage2_prior.heads import Categorical
from stage2_prior.latents import LatentSpec
from tests.parts import BACKBONES, random_prior, randomized

FALSE_ALARM = 1e-4


def exact_and_drawn(prior, grid, held, given, codes, particles, count=6000):
    """p(free | held) over every filling of the free positions, and how often each was drawn."""
    free = torch.nonzero(~held.flatten()).flatten()
    fillings = torch.cartesian_prod(*[torch.arange(codes)] * len(free)).view(-1, len(free))
    everything = given.flatten().repeat(len(fillings), 1)
    everything[:, free] = fillings
    with torch.no_grad():
        exact = prior.log_prob([everything.view(-1, *grid)]).softmax(0)
    (drawn,), sizes = complete(prior, [given], [held], torch.arange(count), 3, particles)
    assert (drawn[:, held] == given[held]).all()
    powers = codes ** torch.arange(len(free) - 1, -1, -1)
    return exact, torch.bincount(drawn.flatten(1)[:, free] @ powers, minlength=len(fillings)), sizes


@pytest.mark.parametrize("backbone", BACKBONES)
def test_held_in_front_is_exact_with_one_particle(backbone):
    prior = random_prior(LatentSpec((2, 2), vocabulary=4), backbone, "categorical", scale=0.5)
    held = torch.tensor([[True, True], [False, False]])
    exact, drawn, sizes = exact_and_drawn(prior, (2, 2), held, torch.tensor([[1, 3], [0, 0]]), 4, particles=1)
    often = exact * 6000 > 5
    counts = torch.cat([drawn[often], drawn[~often].sum()[None]]).double()
    expected = torch.cat([exact[often], exact[~often].sum()[None] + 1e-12])
    assert stats.chisquare(counts.numpy(), (expected * counts.sum() / expected.sum()).numpy()).pvalue > FALSE_ALARM
    assert (sizes == 1).all()


@pytest.mark.parametrize("held", [[[False, False], [True, True]], [[False, True], [False, True]]])
def test_held_behind_is_approached_with_more_particles(held):
    prior = random_prior(LatentSpec((2, 2), vocabulary=3), "pixelcnn", "categorical", scale=0.9)
    distance = {}
    for particles in (1, 64):
        exact, drawn, sizes = exact_and_drawn(
            prior, (2, 2), torch.tensor(held), torch.tensor([[2, 0], [1, 2]]), 3, particles, count=3000
        )
        distance[particles] = float((drawn / 3000 - exact).abs().sum() / 2)
        assert (sizes >= 1).all() and (sizes <= particles).all()
    assert distance[1] > 0.1  # looking ahead matters here
    assert distance[64] < 0.05


def test_a_completion_is_the_same_in_any_batch():
    prior = random_prior(LatentSpec((3, 3), vocabulary=4), "pixelcnn", "categorical", scale=0.6)
    held = torch.zeros(3, 3, dtype=torch.bool)
    held[1, 1] = held[2, 0] = True
    given = torch.ones(3, 3, dtype=torch.int64)
    (together,), _ = complete(prior, [given], [held], torch.arange(6), 0, 8)
    (apart,), _ = complete(prior, [given], [held], torch.tensor([4]), 0, 8)
    assert torch.equal(together[4], apart[0])


def test_several_levels_and_continuous_latents():
    config = AutoregressiveConfig(BACKBONES["pixelcnn"], Categorical(), ClassLabel())
    specs = [LatentSpec((2, 2), vocabulary=3), LatentSpec((4, 4), vocabulary=5)]
    cascade = randomized(CascadeConfig(config, config).build(specs, classes=2).eval())
    given = [torch.zeros(2, 2, dtype=torch.int64), torch.ones(4, 4, dtype=torch.int64)]
    held = [torch.tensor([[True, True], [False, False]]), torch.arange(16).view(4, 4) > 9]
    levels, sizes = complete(cascade, given, held, torch.arange(5), 0, 4)
    for level, latent, mask in zip(levels, given, held):
        assert (level[:, mask] == latent[mask]).all()
    prior = random_prior(LatentSpec((2, 3, 3)), "pixelcnn", "mixture")
    latent, mask = torch.randn(2, 3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.bool)
    (drawn,), sizes = complete(prior, [latent], [mask], torch.arange(5), 0, 4)
    assert torch.allclose(drawn[:, :, mask], latent[:, mask].expand(5, -1, -1))
    assert (drawn[0] != drawn[1])[:, ~mask].all()


def test_what_else_is_known_weighs_the_particles():
    """With all weight on one code at a free position, that code is drawn; the rest follows the exact conditional."""
    prior = random_prior(LatentSpec((1, 2), vocabulary=3), "pixelcnn", "categorical", scale=0.5)
    held = torch.zeros(1, 2, dtype=torch.bool)

    def second_is_two(levels):
        return torch.where(levels[0][:, 0, 1] == 2, 0.0, -1e9)

    (drawn,), sizes = complete(
        prior, [torch.zeros(1, 2, dtype=torch.int64)], [held], torch.arange(3000), 0, 64, None, second_is_two
    )
    assert (drawn[:, 0, 1] == 2).all() and (sizes < 64).all()
    with torch.no_grad():
        exact = prior.log_prob([torch.tensor([[[0, 2]], [[1, 2]], [[2, 2]]])]).softmax(0)
    share = torch.bincount(drawn[:, 0, 0], minlength=3) / 3000
    assert (share - exact).abs().sum() / 2 < 0.05


def test_effective_sample_size():
    assert effective(torch.zeros(1, 8)) == pytest.approx(8)
    assert effective(torch.tensor([[0.0, -1e9, -1e9]])) == pytest.approx(1)
