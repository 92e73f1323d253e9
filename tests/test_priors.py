"""Every prior: normalized, sampled as its density says, the same sample in any batch, a gradient for every parameter."""

import math

import pytest
import torch
from scipy import stats

from stage2_prior.autoregressive import AutoregressiveConfig
from stage2_prior.latents import LatentDataset, LatentSpec, draw
from stage2_prior.prior import BASELINES, AggregatePosterior
from tests.parts import BACKBONES, HEADS, random_latents, random_prior

LEARNED = [(backbone, head) for backbone in BACKBONES for head in HEADS]
TINY = {"two-positions": LatentSpec((1, 1, 2)), "two-rows": LatentSpec((1, 2, 1)), "two-channels": LatentSpec((2, 1, 1))}
FALSE_ALARM = 1e-4  # the stated error rate of each statistical test; seeds are fixed


def all_priors(spec: LatentSpec) -> dict:
    torch.manual_seed(0)  # of the draws that the mixture is fitted to
    dataset = random_latents(2000, spec)
    dataset = LatentDataset([{name: tensor.double() for name, tensor in level.items()} for level in dataset.levels])
    few = LatentDataset([{name: tensor[:20] for name, tensor in level.items()} for level in dataset.levels])
    priors = {name: make(spec).double() for name, make in BASELINES.items()} | {"posterior": AggregatePosterior(few)}
    priors |= {f"{backbone}-{head}": random_prior(spec, backbone, head) for backbone, head in LEARNED}
    for name in BASELINES:
        priors[name].estimate(dataset)
    return priors


NAMES = list(all_priors(TINY["two-positions"]))


def density_on_a_square(prior, spec: LatentSpec, reach: float = 16.0, cells: int = 640):
    """p(z) at the midpoints of a fine grid over [-reach, reach]², and the area of one of its cells."""
    edge = torch.linspace(-reach, reach, cells + 1, dtype=torch.float64)
    middle = (edge[1:] + edge[:-1]) / 2
    points = torch.cartesian_prod(middle, middle).view(-1, *spec.shape)
    with torch.no_grad():
        density = torch.cat([prior.log_prob([chunk]).exp() for chunk in points.split(50_000)])
    return density.view(cells, cells), (2 * reach / cells) ** 2


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("name", NAMES)
def test_integrates_to_one(name, shape):
    density, area = density_on_a_square(all_priors(TINY[shape])[name], TINY[shape])
    assert float(density.sum() * area) == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("name", NAMES)
def test_samples_follow_log_prob(name, shape):
    """A χ² test of samples in 16×16 cells against the integrated density."""
    spec, count, reach, coarse = TINY[shape], 20_000, 16.0, 16
    prior = all_priors(spec)[name]
    density, area = density_on_a_square(prior, spec, reach)
    expected = count * area * density.view(coarse, -1, coarse, density.shape[1] // coarse).sum((1, 3))
    with torch.no_grad():
        (samples,) = prior.sample(torch.arange(count), seed=5)
    cell = ((samples.flatten(1) + reach) / (2 * reach) * coarse).long().clamp(0, coarse - 1)
    observed = torch.zeros(coarse, coarse, dtype=torch.float64).index_put_(
        (cell[:, 0], cell[:, 1]), torch.ones(count, dtype=torch.float64), accumulate=True
    )
    often = expected > 5
    observed = torch.cat([observed[often], observed[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None] + 1e-9])
    result = stats.chisquare(observed.numpy(), (expected * observed.sum() / expected.sum()).numpy())
    assert result.pvalue > FALSE_ALARM


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_the_same_in_any_batch(name):
    spec = LatentSpec((2, 3, 4))
    prior = all_priors(spec)[name]
    with torch.no_grad():
        (together,) = prior.sample(torch.arange(6), seed=3)
        (again,) = prior.sample(torch.arange(6), seed=3)
        (apart,) = prior.sample(torch.tensor([4, 1]), seed=3)
        (other,) = prior.sample(torch.arange(6), seed=4)
    assert together.shape == (6, *spec.shape)
    assert torch.equal(together, again)
    assert torch.allclose(together[[4, 1]], apart, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(together, other)
    assert len({tuple(sample.flatten().tolist()) for sample in together}) == 6


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_every_factor_depends_on_nothing_later(backbone, head):
    spec = LatentSpec((2, 3, 3))
    prior = random_prior(spec, backbone, head)
    latent = torch.randn(spec.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    influence = torch.autograd.functional.jacobian(lambda z: prior.log_prob_by_position([z[None]])[0], latent)
    influence = influence.abs().amax(2).flatten(2).flatten(0, 1)  # position × position, over channels
    positions = torch.arange(spec.positions)
    later = positions[None, :] > positions[:, None]
    assert (influence[later] == 0).all()
    for i, j in torch.nonzero(~later).tolist():
        (r, c), (r2, c2), reach = divmod(i, 3), divmod(j, 3), prior.backbone.reach
        seen = i == j or (c - c2 <= reach + 1 if r == r2 else r - r2 <= reach + 1 and abs(c - c2) <= reach)
        assert (influence[i, j] > 0) == seen


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_every_parameter_receives_a_gradient(backbone, head):
    torch.manual_seed(0)
    prior = AutoregressiveConfig(BACKBONES[backbone], HEADS[head]).build(LatentSpec((2, 4, 4)))
    prior(*random_latents(8, prior.spec)[torch.arange(8)])["loss"].backward()
    without = [name for name, p in prior.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_held_positions_stay_and_the_rest_is_drawn(backbone, head):
    spec = LatentSpec((2, 3, 4))
    prior = random_prior(spec, backbone, head)
    given = torch.randn(5, *spec.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(spec.grid, dtype=torch.bool)
    mask[0, :3] = mask[2, 1] = True
    with torch.no_grad():
        (free,) = prior.sample(torch.arange(5), seed=0)
        (held,) = prior.sample(torch.arange(5), seed=0, given=[given], mask=[mask])
    assert torch.allclose(held[:, :, mask], given[:, :, mask], rtol=1e-12, atol=1e-12)
    assert (held[:, :, ~mask] != free[:, :, ~mask]).all()  # what is held is seen by everything after it


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_temperature_zero_is_one_sample(backbone, head):
    prior = random_prior(LatentSpec((2, 2, 2)), backbone, head)
    with torch.no_grad():
        (coldest,) = prior.sample(torch.arange(4), seed=0, temperature=0.0)
    assert torch.allclose(coldest, coldest[:1].expand_as(coldest))


def test_standardization_is_part_of_the_density():
    """Twice the latents with twice the scale: the density falls by log 2 a dimension."""
    spec = LatentSpec((2, 2, 3))
    prior = random_prior(spec, "pixelcnn", "mixture")
    prior.shift.zero_()
    latent = torch.randn(3, *spec.shape, dtype=torch.float64)
    before = prior.log_prob([latent])
    prior.scale.mul_(2)
    assert torch.allclose(prior.log_prob([2 * latent]), before - spec.dimensions * math.log(2))


def test_estimate_standardizes_the_aggregate_posterior():
    spec = LatentSpec((3, 2, 2))
    dataset = random_latents(500, spec)
    prior = AutoregressiveConfig().build(spec)
    prior.estimate(dataset)
    draws = torch.cat([dataset[torch.arange(500)][0][0] for _ in range(200)])
    standardized = (draws - prior.shift) / prior.scale
    assert standardized.mean((0, 2, 3)).abs().max() < 0.01
    assert (standardized.std((0, 2, 3)) - 1).abs().max() < 0.01


def test_the_fitted_gaussian_has_the_moments_of_the_aggregate_posterior():
    spec = LatentSpec((2, 1, 2))
    dataset = random_latents(400, spec)
    prior = BASELINES["gaussian"](spec)
    prior.estimate(dataset)
    torch.manual_seed(0)
    draws = torch.cat([dataset[torch.arange(400)][0][0] for _ in range(500)]).flatten(1)
    assert torch.allclose(prior.means[0], draws.mean(0), atol=0.02)
    assert torch.allclose(prior.factors[0] @ prior.factors[0].T, torch.cov(draws.T), atol=0.06)


@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_a_baseline_recovers_a_density_of_its_own_kind(name):
    """Fitted to draws of a known two-component mixture: the mixture prior reaches its entropy, the Gaussian cannot."""
    spec = LatentSpec((1, 1, 2))
    torch.manual_seed(0)
    side = torch.randint(0, 2, (4000, 1, 1, 1)) * 8.0 - 4
    points = side + torch.randn(4000, *spec.shape)
    dataset = LatentDataset([{"mean": points, "std": torch.zeros_like(points)}])
    prior = BASELINES[name](spec)
    prior.estimate(dataset)
    entropy = math.log(2) + 2 * 0.5 * math.log(2 * math.pi * math.e)
    gap = float(prior([points])["loss"]) - entropy
    assert gap < 0.05 if name == "mixture" else gap > 0.3


def test_diagonal_covariances_beyond_the_affordable(monkeypatch):
    monkeypatch.setattr("stage2_prior.prior.LARGEST_FULL_COVARIANCE", 3)
    spec = LatentSpec((1, 2, 2))
    for name in ("gaussian", "mixture"):
        prior = BASELINES[name](spec)
        prior.estimate(random_latents(200, spec))
        assert prior.factors.ndim == 2
        (samples,) = prior.sample(torch.arange(4000), seed=0)
        reference = draw(random_latents(200, spec).levels[0])
        assert (samples.mean((0, 1)) - reference.mean((0, 1))).abs().max() < 0.4
        # The entropy of a diagonal Gaussian mixture lies below that of a Gaussian of its moments.
        assert float(prior([samples])["loss"]) < 0.5 * spec.dimensions * math.log(2 * math.pi * math.e * float(samples.var()))


def test_the_aggregate_posterior_is_the_mixture_of_its_posteriors():
    dataset = random_latents(7, LatentSpec((1, 1, 2)))
    prior = AggregatePosterior(dataset)
    points = torch.randn(5, 1, 1, 2)
    level = dataset.levels[0]
    each = torch.distributions.Normal(level["mean"], level["std"]).log_prob(points[:, None]).flatten(2).sum(2)
    assert torch.allclose(prior.log_prob([points]), each.exp().mean(1).log(), atol=1e-4)


def test_a_latent_data_set_draws_afresh():
    dataset = random_latents(10, LatentSpec((1, 2, 2)))
    (first,), (second,) = dataset[torch.arange(3)], dataset[torch.arange(3)]
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize(("shape", "vocabulary"), [((3, 3), None), ((1, 3, 3), 8), ((0, 2, 2), None)])
def test_a_latent_spec_refuses_what_fits_no_kind(shape, vocabulary):
    with pytest.raises(ValueError, match="does not fit"):
        LatentSpec(shape, vocabulary)
