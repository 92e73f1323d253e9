"""Every prior: normalized, sampled as its density says, the same sample in any batch, a gradient for every parameter."""

import dataclasses
import functools
import math

import pytest
import torch
from scipy import stats
from torch import distributions

from stage2_prior import ancestral, context_models, gaussians, latents
from stage2_prior.ancestral import Conditioned, sample_grid
from stage2_prior.autoregressive import AutoregressiveConfig
from stage2_prior.baselines import CODE_BASELINES, CONTINUOUS_BASELINES, baselines
from stage2_prior.context_models import Order2Level
from stage2_prior.gaussians import AggregatePosterior, GaussianMixturePrior
from stage2_prior.heads import MINIMUM_LOG_STD, Categorical, GaussianMixture, truncated
from stage2_prior.latents import LatentDataset, LatentSpec, draw
from stage2_prior.layers import attend
from stage2_prior.pixelcnn import PixelCNNConfig
from stage2_prior.sampling import AS_FITTED, CannotSample, Sampling, uniforms
from stage2_prior.transformer import TransformerConfig
from tests.parts import (
    BACKBONES,
    CODE_HEADS,
    HEADS,
    LEARNED,
    RIVALS,
    in_receptive_field,
    random_latents,
    random_prior,
    randomized,
    spec_for,
)

TINY = {"two-positions": LatentSpec((1, 1, 2)), "two-rows": LatentSpec((1, 2, 1)), "two-channels": LatentSpec((2, 1, 1))}
FALSE_ALARM = 1e-4  # the stated error rate of each statistical test; seeds are fixed


@functools.cache
def all_priors(spec: LatentSpec) -> dict:
    torch.manual_seed(0)  # of the draws that the mixture is fitted to
    dataset = random_latents(2000, spec)
    dataset = LatentDataset([{name: tensor.double() for name, tensor in level.items()} for level in dataset.levels])
    few = LatentDataset([{name: tensor[:20] for name, tensor in level.items()} for level in dataset.levels])
    priors = {name: make([spec]).double() for name, make in CONTINUOUS_BASELINES.items()} | {"posterior": AggregatePosterior(few)}
    learned = [(backbone, head) for backbone, head in LEARNED if head not in CODE_HEADS]
    priors |= {f"{backbone}-{head}": random_prior(spec, backbone, head, scale=0.2) for backbone, head in learned}
    priors |= {name: config.build([spec]).double().eval() for name, config in RIVALS.items()}
    for name in (*CONTINUOUS_BASELINES, *RIVALS):
        priors[name].estimate(dataset)
    return priors


LEARNED_NAMES = [f"{backbone}-{head}" for backbone, head in LEARNED if head not in CODE_HEADS]
NAMES = [*CONTINUOUS_BASELINES, "posterior", *LEARNED_NAMES, *RIVALS]
EXACT = [name for name in NAMES if name != "second-vae"]


@functools.cache
def density_on_a_square(prior, spec: LatentSpec, reach: float = 16.0, cells: int = 320):
    """p(z) at the midpoints of a fine grid over [-reach, reach]², and the area of one of its cells."""
    edge = torch.linspace(-reach, reach, cells + 1, dtype=torch.float64)
    middle = (edge[1:] + edge[:-1]) / 2
    points = torch.cartesian_prod(middle, middle).view(-1, *spec.shape)
    with torch.no_grad():
        density = torch.cat([prior.log_prob([chunk]).exp() for chunk in points.split(50_000)])
    return density.view(cells, cells), (2 * reach / cells) ** 2


def test_all_densities_are_exact_but_that_of_the_second_vae():
    assert [name for name, prior in all_priors(TINY["two-positions"]).items() if not prior.bounded] == EXACT


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("name", EXACT)
def test_integrates_to_one(name, shape):
    density, area = density_on_a_square(all_priors(TINY[shape])[name], TINY[shape])
    assert float(density.sum() * area) == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("name", EXACT)
def test_samples_follow_log_prob(name, shape):
    """A χ² test of samples in 16×16 cells against the integrated density."""
    spec, count, reach, coarse = TINY[shape], 20_000, 16.0, 16
    prior = all_priors(spec)[name]
    density, area = density_on_a_square(prior, spec)
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


@pytest.mark.parametrize("kind", HEADS)
def test_samples_need_no_gradients(kind):
    spec = spec_for(kind, (2, 3))
    priors = [AutoregressiveConfig(backbone, HEADS[kind]).build([spec]) for backbone in BACKBONES.values()]
    priors += [make([spec]) for make in baselines([spec]).values()]
    priors += [config.build([spec]) for config in RIVALS.values() if kind == "mixture"]
    for prior in priors:
        (latent,) = prior.sample(torch.arange(2), seed=3)
        assert not latent.requires_grad, type(prior)


@pytest.mark.parametrize("kind", HEADS)
def test_no_latents_have_no_densities(kind):
    spec = spec_for(kind, (2, 3))
    none = torch.zeros(0, *spec.shape, dtype=torch.int64 if kind in CODE_HEADS else torch.float32)
    priors = [make([spec]) for make in baselines([spec]).values()]
    # Not of the flow, whose library needs a row.
    priors += [config.build([spec]) for name, config in RIVALS.items() if kind == "mixture" and name != "flow"]
    assert all(prior.log_prob([none]).shape == (0,) for prior in priors)


@pytest.mark.parametrize("kind", HEADS)
def test_no_samples_are_an_empty_latent(kind):
    """Of the dtype of others; the learned priors of a width that steps.c takes."""
    spec = spec_for(kind, (2, 3))
    backbones = [dataclasses.replace(config, width=32) for config in BACKBONES.values()]
    priors = [AutoregressiveConfig(backbone, HEADS[kind]).build([spec]).eval() for backbone in backbones]
    priors += [make([spec]) for make in baselines([spec]).values()] + [AggregatePosterior(random_latents(5, spec))]
    priors += [config.build([spec]) for config in RIVALS.values() if kind == "mixture"]
    for prior in priors:
        (none,), (one,) = (prior.sample(torch.arange(count), seed=3) for count in (0, 1))
        assert none.shape == (0, *spec.shape) and none.dtype == one.dtype


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_every_factor_depends_on_nothing_later(backbone, head):
    spec = spec_for(head, (3, 3))
    prior = random_prior(spec, backbone, head)
    (latent,), _ = random_latents(1, spec)[torch.arange(1)]
    influence = sensitivity(prior, latent[0])
    positions = torch.arange(math.prod(spec.grid))
    later = positions[None, :] > positions[:, None]
    assert (influence[later] == 0).all()
    for i, j in torch.nonzero(~later).tolist():
        seen = i == j or in_receptive_field(BACKBONES[backbone], divmod(i, 3), divmod(j, 3))
        assert (influence[i, j] > 0) == seen


def sensitivity(prior, latent) -> torch.Tensor:
    """How far log p(z_i | z_<i) moves with the latent at position j: i × j."""
    if prior.spec.vocabulary is None:
        jacobian = torch.autograd.functional.jacobian(lambda z: prior.log_prob_by_position([z[None]])[0], latent.double())
        return jacobian.abs().amax(2).flatten(2).flatten(0, 1)
    rows = []
    for j in range(latent.numel()):  # codes: try every other code at j
        others = latent.flatten().repeat(prior.spec.vocabulary, 1)
        others[:, j] = torch.arange(prior.spec.vocabulary)
        with torch.no_grad():  # each by itself: products may round differently in another row of a batch
            values = torch.cat([prior.log_prob_by_position([other.view(1, *latent.shape)]).flatten(1) for other in others])
        rows.append((values - values[latent.flatten()[j]]).abs().amax(0))
    return torch.stack(rows, 1)


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_every_parameter_receives_a_gradient(backbone, head):
    torch.manual_seed(0)
    prior = AutoregressiveConfig(BACKBONES[backbone], HEADS[head]).build([spec_for(head, (4, 4))])
    prior(*random_latents(8, prior.spec)[torch.arange(8)])["loss"].backward()
    without = [name for name, p in prior.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6)])
@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_the_cached_sampler_draws_what_whole_forward_passes_would(backbone, head, grid):
    """In float32: features equal to 1e-5, and the same noise drawn from a whole forward's features gives the same sample."""
    spec = spec_for(head, grid)
    prior = random_prior(spec, backbone, head).float()
    indices = torch.arange(4)
    with torch.no_grad():
        (sample,) = prior.sample(indices, 3)
        values = prior.head.values(sample)
        features = prior.backbone(prior.head.embed(values).movedim(-1, 1), prior.position).movedim(1, -1)
        positions = torch.arange(math.prod(spec.grid))
        state = prior.head.begin(uniforms(3, indices, positions, prior.head.uniforms_per_position(AS_FITTED)), AS_FITTED)
        for position in range(math.prod(spec.grid)):
            r, c = divmod(position, grid[1])
            again = prior.head.draw(features[:, r, c], position, state)
            assert torch.allclose(again.float(), values[:, r, c].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_temperature_zero_is_one_sample(backbone, head):
    prior = random_prior(spec_for(head, (2, 2)), backbone, head)
    with torch.no_grad():
        (coldest,) = prior.sample(torch.arange(4), seed=0, how=Sampling(temperature=0.0))
    assert torch.allclose(coldest, coldest[:1].expand_as(coldest))


# Codes


@pytest.mark.parametrize("backbone", BACKBONES)
def test_codes_are_normalized_and_sampled_as_their_probabilities_say(backbone):
    """All 5³ grids of three codes: probabilities sum to one, and a χ² test of samples against them."""
    prior = random_prior(LatentSpec((1, 3), vocabulary=5), backbone, "categorical")
    everything = torch.cartesian_prod(*3 * [torch.arange(5)]).view(-1, 1, 3)
    with torch.no_grad():
        probabilities = prior.log_prob([everything]).exp()
        (samples,) = prior.sample(torch.arange(20_000), seed=2)
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-12)
    observed = torch.bincount(samples.flatten(1) @ torch.tensor([25, 5, 1]), minlength=125)
    often = probabilities * 20_000 > 5
    expected = torch.cat([probabilities[often], probabilities[~often].sum()[None] + 1e-12]) * 20_000
    counts = torch.cat([observed[often], observed[~often].sum()[None]]).double()
    assert stats.chisquare(counts.numpy(), (expected * counts.sum() / expected.sum()).numpy()).pvalue > FALSE_ALARM


def test_truncation_keeps_exactly_what_it_says():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()

    def kept(**how) -> list[int]:
        return torch.nonzero(truncated(logits, Sampling(**how))[0] > -math.inf).flatten().tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_k=9) == [0, 1, 2, 3]
    assert kept(top_p=0.39) == [1]
    assert kept(top_p=0.69) == [1, 3]
    assert kept(top_p=0.75) == [1, 2, 3]
    assert kept(temperature=0.0) == [1]
    assert kept(top_k=3, top_p=0.5) == [1, 3]
    assert truncated(logits, Sampling(temperature=0.5)).softmax(-1)[0, 1] == pytest.approx(0.16 / 0.30)


@pytest.mark.parametrize("how", [{"top_k": 3}, {"top_p": 0.5}])
def test_truncation_keeps_no_more_where_all_are_equally_likely(how):
    kept = truncated(torch.zeros(4, 6), Sampling(**how)).softmax(-1)
    assert ((kept > 0).sum(-1) == 3).all() and torch.allclose(kept.sum(-1), torch.ones(4))


@pytest.mark.parametrize("how", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": math.inf}])
def test_nonsense_is_refused(how):
    with pytest.raises(CannotSample):
        Sampling(**how)


@pytest.mark.parametrize("how", [{"top_k": 3}, {"top_p": 0.5}, {"guidance": 1.0}])
@pytest.mark.parametrize("name", NAMES)
def test_what_makes_no_sense_for_continuous_latents_is_refused(name, how):
    prior = all_priors(LatentSpec((1, 1, 2)))[name]
    says = "drawn as they are" if name == "posterior" else "takes no context" if "guidance" in how else "continuous"
    with pytest.raises(CannotSample, match=says):
        prior.sample(torch.arange(2), 0, Sampling(**how))


def test_posteriors_of_images_have_no_temperature():
    for spec in (LatentSpec((2, 2, 2)), LatentSpec((2, 2), vocabulary=5)):
        with pytest.raises(CannotSample, match="drawn as they are"):
            AggregatePosterior(random_latents(5, spec)).sample(torch.arange(2), 0, Sampling(temperature=0.5))


def test_a_head_refuses_latents_of_the_other_kind():
    for head, other in (("mixture", "categorical"), ("categorical", "mixture")):
        with pytest.raises(ValueError, match="continuous latents"):
            AutoregressiveConfig(BACKBONES["pixelcnn"], HEADS[head]).build([spec_for(other, (2, 2))])


@pytest.mark.parametrize("kind", ["mixture", "categorical", *RIVALS])
def test_latents_that_do_not_fit_are_refused(kind):
    """Also those that torch would broadcast: of one channel, or of one row."""
    spec = LatentSpec((3, 3), vocabulary=5) if kind == "categorical" else LatentSpec((2, 3, 3))
    prior = (
        RIVALS[kind].build([spec]) if kind in RIVALS else AutoregressiveConfig(BACKBONES["pixelcnn"], HEADS[kind]).build([spec])
    )
    (latent,), _ = random_latents(3, spec)[torch.arange(3)]
    wrong = [latent, latent[:1], [latent, latent], [latent[..., :1]], [latent[:, :1]], []]
    for levels in wrong + ([[latent.int()], [latent.float()]] if kind == "categorical" else []):
        for use in (prior, prior.log_prob):
            with pytest.raises(ValueError, match=r"a list with one tensor for each level, here of shape B×.*3×3"):
                use(levels)


# Standardization and baselines


def test_standardization_is_part_of_the_density():
    """Twice the latents with twice the scale: the density falls by log 2 a dimension."""
    spec = LatentSpec((2, 2, 3))
    prior = random_prior(spec, "pixelcnn", "mixture")
    prior.head.shift.zero_()
    latent = torch.randn(3, *spec.shape, dtype=torch.float64)
    before = prior.log_prob([latent])
    prior.head.scale.mul_(2)
    assert torch.allclose(prior.log_prob([2 * latent]), before - spec.dimensions * math.log(2))


def test_estimate_standardizes_the_aggregate_posterior():
    spec = LatentSpec((3, 2, 2))
    dataset = random_latents(500, spec)
    prior = AutoregressiveConfig().build([spec])
    prior.estimate(dataset)
    draws = torch.cat([dataset[torch.arange(500)][0][0] for _ in range(200)])
    standardized = prior.head.values(draws)
    assert torch.allclose(prior.head.latent(standardized), draws, atol=1e-5)
    assert standardized.mean((0, 1, 2)).abs().max() < 0.01
    assert (standardized.std((0, 1, 2)) - 1).abs().max() < 0.01


def test_the_fitted_gaussian_has_the_moments_of_the_aggregate_posterior():
    spec = LatentSpec((2, 1, 2))
    dataset = random_latents(400, spec)
    prior = CONTINUOUS_BASELINES["gaussian"]([spec])
    prior.estimate(dataset)
    torch.manual_seed(0)
    draws = torch.cat([dataset[torch.arange(400)][0][0] for _ in range(500)]).flatten(1)
    assert torch.allclose(prior.means[0], draws.mean(0), atol=0.02)
    assert torch.allclose(prior.factors[0] @ prior.factors[0].T, torch.cov(draws.T), atol=0.06)


@pytest.mark.parametrize(("images", "least", "most"), [(30, 5, 5), (70, 2, 3), (300, 0, 1)])
def test_the_mixture_is_fitted_to_a_bounded_number_of_draws(images, least, most, monkeypatch):
    """200 here; of as many images as there are, but for a twentieth, and of no image more draws than of another, but for one."""
    monkeypatch.setattr("stage2_prior.gaussians.MIXTURE_POINTS", 200)
    taken, held_out = [], []

    class Recorded(LatentDataset):
        def __getitem__(self, indices):
            taken.append(torch.bincount(indices, minlength=len(self)))
            return super().__getitem__(indices)

        def posteriors(self, indices):
            held_out.append(indices)
            return super().posteriors(indices)

    spec = LatentSpec((1, 1, 2))
    CONTINUOUS_BASELINES["mixture"]([spec]).estimate(Recorded(random_latents(images, spec).levels))
    (counts,) = taken
    apart = held_out[-1]
    assert len(apart) == images // 20 and counts[apart].sum() == 0
    fitted = counts[~torch.isin(torch.arange(images), apart)]
    assert counts.sum() == min(200, 5 * len(fitted)) and (fitted.min(), fitted.max()) == (least, most)
    assert images < 200 or counts[:200].min() == 0  # not the first ones: data may be sorted


def test_the_mixture_has_the_number_of_components_that_is_best_on_images_it_was_not_fitted_to():
    """Sixty clusters need more than ten; one correlated cluster needs full covariances. Either comes back from its file."""
    torch.manual_seed(0)
    centres = 40 * torch.rand(60, 1, 1, 2)
    clusters = centres[torch.arange(3000) % 60] + 0.3 * torch.randn(3000, 1, 1, 2)
    correlated = torch.randn(400, 10) @ torch.linalg.qr(torch.randn(10, 10)).Q.mul(torch.linspace(0.05, 3, 10)[:, None])
    for points, components in ((clusters, 80), (correlated.view(400, 1, 2, 5), 10)):
        spec = LatentSpec(tuple(points.shape[1:]))
        prior = GaussianMixturePrior([spec], 10, 80)
        prior.estimate(LatentDataset([{"mean": points, "std": torch.full_like(points, 0.01)}]))
        assert len(prior.weights) == components and prior.full == (components == 10)
        again = GaussianMixturePrior([spec], 10, 80)
        again.load_state_dict(prior.state_dict())
        assert torch.equal(again.log_prob([points]), prior.log_prob([points]))
        assert again.fitted_numbers() == prior.fitted_numbers() == (80 * 5 - 1 if components == 80 else 10 * 66 - 1)


@pytest.mark.parametrize("full", [True, False])
def test_a_mixture_is_sharpened_to_a_power_of_its_density(full, monkeypatch):
    """A wide and a narrow component: shares of samples against p^(1/T) integrated on a grid; T = 0 is its mode."""
    monkeypatch.setattr("stage2_prior.gaussians.LARGEST_FULL_COVARIANCE", 2 if full else 1)
    spec = LatentSpec((1, 1, 2))
    prior = GaussianMixturePrior([spec], 2).double()
    prior.weights.copy_(torch.tensor([0.6, 0.4]))
    prior.means.copy_(torch.tensor([[-6.0, 0.0], [6.0, 2.0]]))
    wide, narrow = torch.tensor([1.5, 1.0]), torch.tensor([0.8, 0.5])
    prior.factors.copy_(torch.stack([wide.diag(), narrow.diag()]) if full else torch.stack([wide, narrow]))
    if full:
        prior.factors[1, 1, 0] = 0.4
    density, _ = density_on_a_square(prior, spec)
    for temperature in (0.5, 1.0, 2.0):
        sharpened = density ** (1 / temperature)
        left = float(sharpened[: len(density) // 2].sum() / sharpened.sum())
        (samples,) = prior.sample(torch.arange(4000), 0, Sampling(temperature=temperature))
        assert stats.binomtest(int((samples[..., 0] < 0).sum()), 4000, left).pvalue > FALSE_ALARM
    (coldest,) = prior.sample(torch.arange(50), 0, Sampling(temperature=0.0))
    assert (coldest == coldest[0]).all()
    assert float(prior.log_prob([coldest[:1]]).exp()) >= float(density.max())


def told_nothing(channels: int, components: torch.Tensor, width: int = 6):
    """A learned prior of one position whose mixture is as given: K rows of a weight, C means and C log standard deviations."""
    backbone = dataclasses.replace(BACKBONES["pixelcnn"], width=width)
    prior = AutoregressiveConfig(backbone, GaussianMixture(len(components))).build([LatentSpec((channels, 1, 1))]).eval()
    with torch.no_grad():
        prior.head.output.weight.zero_()
        prior.head.output.bias.copy_(torch.cat([components[:, 0].log(), components[:, 1:].flatten()]))
    return prior


def test_a_learned_mixture_of_components_apart_is_sharpened_to_a_power_of_its_density():
    """Samples in 16×16 cells against p^(1/T), normalized on a grid; T = 0 is the highest mode, here of the least weight."""
    stds = torch.tensor([[1.2, 0.9], [0.6, 0.5], [0.3, 0.4]])
    means = torch.tensor([[-4.0, -4.0], [4.5, 0.0], [0.0, 5.0]])
    prior = told_nothing(2, torch.cat([torch.tensor([[0.5], [0.3], [0.2]]), means, stds.log()], 1)).double()
    prior.head.shift.copy_(torch.tensor([0.3, -0.2]))
    prior.head.scale.copy_(torch.tensor([1.2, 1.7]))
    density, _ = density_on_a_square(prior, prior.spec)
    count, coarse = 20_000, 16
    for temperature in (0.5, 0.8, 1.5):
        expected = (density ** (1 / temperature)).view(coarse, -1, coarse, density.shape[1] // coarse).sum((1, 3)).flatten()
        expected *= count / expected.sum()
        (samples,) = prior.sample(torch.arange(count), 0, Sampling(temperature=temperature))
        rows, columns = ((samples.flatten(1) + 16) / 32 * coarse).long().clamp(0, coarse - 1).T
        observed = torch.bincount(rows * coarse + columns, minlength=coarse**2).double()
        often = expected > 5
        bins = [torch.cat([each[often], each[~often].sum()[None] + 1e-9]) for each in (observed, expected)]
        assert stats.chisquare(*(each / each.sum() * count for each in bins)).pvalue > FALSE_ALARM
    (coldest,) = prior.sample(torch.arange(5), 0, Sampling(temperature=0.0))
    assert torch.allclose(prior.head.values(coldest).flatten(1), means[2].double().expand(5, -1), atol=1e-6)
    assert float(prior.log_prob([coldest[:1]]).detach().exp()) >= float(density.max())


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_a_component_narrower_than_the_floor_has_its_width(temperature):
    """In density and draws, those of steps.c where T = 1, and with a gradient; without a floor, float32 would overflow."""
    prior, std = told_nothing(2, torch.tensor([[1.0, 0.0, 0.0, -50.0, -50.0]]), width=32), math.exp(MINIMUM_LOG_STD)
    z = torch.tensor([[0.0, 0.0], [3 * std, 0.0], [1.0, 1.0]]).view(3, 2, 1, 1)
    log_prob = prior.log_prob([z])
    assert torch.allclose(log_prob, distributions.Normal(0.0, std).log_prob(z).flatten(1).sum(1), rtol=1e-5)
    log_prob.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in prior.head.output.parameters())
    assert (prior.head.output.bias.grad[3:] > 0).all()  # of the log standard deviations, which the third latent finds too low
    (samples,) = prior.sample(torch.arange(4000), 0, Sampling(temperature=temperature))
    assert stats.kstest((samples / (std * temperature**0.5)).flatten().numpy(), "norm").pvalue > FALSE_ALARM


@pytest.mark.parametrize("name", ["standard", "unigram"])
def test_code_baselines_are_sharpened_position_by_position(name):
    spec, count = LatentSpec((1, 2), vocabulary=4), 4000
    prior = CODE_BASELINES[name]([spec])
    often = torch.tensor([[1, 0], [1, 0], [1, 0], [1, 0], [3, 0], [3, 2], [3, 2], [0, 2], [0, 2], [2, 3]])
    prior.estimate(LatentDataset([{"codes": often.repeat(10, 1).view(-1, 1, 2)}]))
    everything = torch.cartesian_prod(torch.arange(4), torch.arange(4)).view(-1, 1, 2)
    probabilities = prior.log_prob([everything]).exp().view(4, 4)
    for position, p in enumerate((probabilities.sum(1), probabilities.sum(0))):
        best = p.sort(descending=True).values

        def shares(position=position, p=p, **how) -> torch.Tensor:
            """Of the codes as drawn, the likeliest first; of equally likely ones, the most frequent."""
            (codes,) = prior.sample(torch.arange(count), 1, Sampling(**how))
            found = torch.bincount(codes[:, 0, position], minlength=4) / count
            return found[sorted(range(4), key=lambda code: (round(float(p[code]), 4), float(found[code])), reverse=True)]

        assert shares(temperature=0.0).tolist() == [1, 0, 0, 0]
        assert torch.allclose(shares(temperature=0.5), best**2 / (best**2).sum(), atol=0.04)
        assert torch.allclose(shares(top_k=2), torch.cat([best[:2] / best[:2].sum(), torch.zeros(2)]), atol=0.04)
        assert (shares(top_p=0.45) > 0).sum() == (1 if best[0] >= 0.45 else 2)
    with pytest.raises(CannotSample, match="takes no context"):
        prior.sample(torch.arange(2), 0, Sampling(guidance=1.0))


@pytest.fixture(scope="module")
def ordered():
    """Grids of 2×2 with five codes, each mostly one more than its upper neighbour, and the order-2 model of them."""
    torch.manual_seed(0)
    codes = torch.randint(0, 5, (600, 2, 2))
    codes[:, 1] = (codes[:, 0] + 1 + (torch.rand(600, 2) < 0.2)) % 5
    prior = CODE_BASELINES["order2"]([LatentSpec((2, 2), vocabulary=5)])
    prior.estimate(LatentDataset([{"codes": codes}]))
    return codes, prior


def test_the_order_2_model_is_normalized_and_sampled_as_its_probabilities_say(ordered):
    _, prior = ordered
    everything = torch.cartesian_prod(*4 * [torch.arange(5)]).view(-1, 2, 2)
    probabilities = prior.log_prob([everything]).double().exp()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-4)
    (samples,) = prior.sample(torch.arange(20_000), seed=2)
    observed = torch.bincount(samples.flatten(1) @ torch.tensor([125, 25, 5, 1]), minlength=625)
    often = probabilities * 20_000 > 5
    expected = torch.cat([probabilities[often], probabilities[~often].sum()[None] + 1e-12]) * 20_000
    counts = torch.cat([observed[often], observed[~often].sum()[None]]).double()
    assert stats.chisquare(counts.numpy(), (expected * counts.sum() / expected.sum()).numpy()).pvalue > FALSE_ALARM
    (apart,) = prior.sample(torch.tensor([4, 1]), seed=2)
    assert torch.equal(apart, samples[[4, 1]])
    with pytest.raises(CannotSample, match="takes no context"):
        prior.sample(torch.arange(2), 0, Sampling(guidance=1.0))


def test_the_order_2_model_counts_both_neighbours_and_backs_off(ordered):
    """Against the formula, by hand for one position; it beats the unigram, and comes back from its file."""
    codes, prior = ordered
    (level,), alpha = prior.levels, float(prior.levels[0].weight)
    left, above, code = (int(codes[0, 1, 0]), int(codes[0, 0, 1]), int(codes[0, 1, 1]))
    outside = torch.full_like(codes[:, 0, 0], 5)
    a, b, c, d = codes[:, 0, 0], codes[:, 0, 1], codes[:, 1, 0], codes[:, 1, 1]
    triples = [(outside, outside, a), (a, outside, b), (outside, a, c), (c, b, d)]
    seen = torch.cat([torch.stack(triple, 1) for triple in triples])
    by_left, by_above, hit = seen[:, 0] == left, seen[:, 1] == above, seen[:, 2] == code
    unigram = prior.unigram.tables()[0][1, 1].exp()
    backed = (by_left & hit).sum() + (by_above & hit).sum() + alpha * unigram[code]
    backed = backed / (by_left.sum() + by_above.sum() + alpha)
    both = by_left & by_above
    expected = ((both & hit).sum() + alpha * backed) / (both.sum() + alpha)
    found = level.probabilities(unigram, torch.tensor(left), torch.tensor(above))[code]
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert float(prior.log_prob([codes]).mean()) > float(prior.unigram.log_prob([codes]).mean()) + 1
    again = CODE_BASELINES["order2"]([LatentSpec((2, 2), vocabulary=5)])
    again.load_state_dict(prior.state_dict())
    assert torch.equal(again.log_prob([codes]), prior.log_prob([codes]))


def test_the_order_2_model_holds_few_probabilities_at_once_with_the_same_results(ordered, monkeypatch):
    codes, prior = ordered
    whole, drawn = prior.log_prob([codes]), prior.sample(torch.arange(50), seed=2)
    probabilities, held = Order2Level.probabilities, []

    def watched(*asked):
        held.append((made := probabilities(*asked)).numel())
        return made

    monkeypatch.setattr(Order2Level, "probabilities", watched)
    monkeypatch.setattr(context_models, "PROBABILITIES_AT_ONCE", 5 * 7)
    assert torch.equal(prior.log_prob([codes]), whole) and torch.equal(prior.sample(torch.arange(50), seed=2)[0], drawn[0])
    assert max(held) == 5 * 7


@pytest.mark.parametrize(("codes", "counted"), [(8192, True), (8193, False)])
def test_pairs_of_codes_are_counted_only_where_their_tables_fit(codes, counted):
    specs = [LatentSpec((1, 1), 5), LatentSpec((2, 2), codes)]
    assert list(baselines(specs)) == ["standard", "unigram"] + ["order2"] * counted


@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_a_baseline_recovers_a_density_of_its_own_kind(name):
    """Fitted to draws of a known two-component mixture: the mixture prior reaches its entropy, the Gaussian cannot."""
    spec = LatentSpec((1, 1, 2))
    torch.manual_seed(0)
    side = torch.randint(0, 2, (4000, 1, 1, 1)) * 8.0 - 4
    points = side + torch.randn(4000, *spec.shape)
    dataset = LatentDataset([{"mean": points, "std": torch.zeros_like(points)}])
    prior = CONTINUOUS_BASELINES[name]([spec])
    prior.estimate(dataset)
    entropy = math.log(2) + 2 * 0.5 * math.log(2 * math.pi * math.e)
    gap = float(prior([points])["loss"]) - entropy
    assert gap < 0.05 if name == "mixture" else gap > 0.3


def test_a_trained_prior_reaches_the_entropy_of_a_known_mixture():
    """Within 0.06 nats: KL(mixture ‖ prior) over fresh draws of three correlated Gaussians, after 400 small steps."""
    torch.manual_seed(0)
    means = torch.tensor([[2.0, 2.0], [-2.0, 1.0], [0.0, -2.0]])
    factors = torch.tensor([[[0.6, 0.0], [0.5, 0.3]], [[0.4, 0.0], [-0.3, 0.4]], [[0.8, 0.0], [0.0, 0.2]]])
    truth = distributions.MixtureSameFamily(
        distributions.Categorical(torch.tensor([0.5, 0.3, 0.2])), distributions.MultivariateNormal(means, scale_tril=factors)
    )
    steps, head = 400, GaussianMixture(components=8)
    prior = AutoregressiveConfig(PixelCNNConfig(width=16, layers=2), head).build([LatentSpec((1, 1, 2))])
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        prior([truth.sample((256,)).view(-1, 1, 1, 2)])["loss"].backward()
        optimizer.step()
        schedule.step()
    z = truth.sample((20_000,))
    with torch.no_grad():
        divergence = truth.log_prob(z) - prior.log_prob([z.view(-1, 1, 1, 2)])
    error = float(divergence.std()) / len(z) ** 0.5
    assert -4 * error < float(divergence.mean()) < 0.06
    # The best single Gaussian, of the same moments, is far from it.
    gaussian = distributions.MultivariateNormal(z.mean(0), torch.cov(z.T))
    assert float((truth.log_prob(z) - gaussian.log_prob(z)).mean()) > 0.5


def test_diagonal_covariances_beyond_the_affordable(monkeypatch):
    monkeypatch.setattr("stage2_prior.gaussians.LARGEST_FULL_COVARIANCE", 3)
    spec = LatentSpec((1, 2, 2))
    for name in ("gaussian", "mixture"):
        prior = CONTINUOUS_BASELINES[name]([spec])
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


def test_the_density_of_the_aggregate_posterior_reads_each_posterior_once_and_few_at_a_time(monkeypatch):
    dataset, read = random_latents(50, LatentSpec((2, 2, 2))), []
    whole = AggregatePosterior(dataset).log_prob([torch.randn(40, 2, 2, 2, generator=torch.Generator().manual_seed(0))])
    of_rows = LatentDataset.posteriors
    monkeypatch.setattr("stage2_prior.gaussians.GAUSSIANS_AT_ONCE", 8)
    monkeypatch.setattr(LatentDataset, "posteriors", lambda self, rows: read.append(of_rows(self, rows)) or read[-1])
    parts = AggregatePosterior(dataset).log_prob([torch.randn(40, 2, 2, 2, generator=torch.Generator().manual_seed(0))])
    assert torch.allclose(parts, whole, atol=1e-5)
    sizes = [len(level["mean"]) for (level,) in read]
    assert max(sizes) == 8 and sum(sizes) == 50


def test_a_latent_data_set_of_tensors_is_refused():
    with pytest.raises(ValueError, match="takes a posterior for each level"):
        LatentDataset([torch.zeros(10, 1, 2, 2)])


def test_a_latent_data_set_draws_afresh():
    dataset = random_latents(10, LatentSpec((1, 2, 2)))
    (first,), (second,) = dataset[torch.arange(3)][0], dataset[torch.arange(3)][0]
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("shape", "vocabulary"), [((3, 3), None), ((1, 3, 3), 8), ((0, 2, 2), None)])
def test_a_latent_spec_refuses_what_fits_no_kind(shape, vocabulary):
    with pytest.raises(ValueError, match="does not fit"):
        LatentSpec(shape, vocabulary)


# Noise on the inputs


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_noise_falls_on_what_is_fed_and_never_on_what_is_predicted(backbone, head):
    """The first position is fed nothing, so its density stays as it is; that of the others moves."""
    prior = random_prior(spec_for(head, (3, 4)), backbone, head)
    levels, _ = random_latents(20, prior.spec)[torch.arange(20)]
    levels = [level.double() if head == "mixture" else level for level in levels]
    torch.manual_seed(0)
    with torch.no_grad():
        clean, noisy = (prior.log_prob_by_position(levels, noise=noise).flatten(1) for noise in (0.0, 1.0))
    assert torch.equal(clean[:, 0], noisy[:, 0])
    assert (clean[:, 1:] != noisy[:, 1:]).any(0).all()


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_noise_ends_after_three_quarters_of_the_training_and_is_never_there_in_evaluation(backbone, head):
    config = AutoregressiveConfig(BACKBONES[backbone], HEADS[head], input_noise=0.5)
    prior = randomized(config.build([spec_for(head, (3, 4))]).double(), 0.3)
    levels, _ = random_latents(20, prior.spec)[torch.arange(20)]
    levels = [level.double() if head == "mixture" else level for level in levels]
    with torch.no_grad():
        clean = -prior.log_prob(levels).mean()
        for progress, training, same in ((0.0, True, False), (0.5, True, False), (0.75, True, True), (0.0, False, True)):
            torch.manual_seed(0)
            assert torch.equal(prior.train(training)(levels, progress=progress)["loss"], clean) == same


def test_the_noise_is_as_large_as_it_says():
    gaussian = GaussianMixture().build(LatentSpec((2, 50, 50)), 4)
    codes = Categorical().build(LatentSpec((50, 50), vocabulary=5), 4)
    noise = torch.tensor([0.0, 0.2, 0.5]).view(3, 1, 1)
    torch.manual_seed(0)
    added = gaussian.perturbed(torch.zeros(3, 50, 50, 2), noise)
    assert torch.allclose(added.flatten(1).std(1), noise.flatten(), rtol=0.05)
    changed = (codes.perturbed(torch.zeros(3, 50, 50, dtype=torch.int64), noise) != 0).double().flatten(1).mean(1)
    assert torch.allclose(changed, 0.8 * noise.flatten().double(), atol=0.03)  # a fifth of the random codes are the same


@pytest.mark.parametrize("head", HEADS)
def test_a_transformer_sees_positions_beside_what_is_embedded_from_the_start(head):
    spec = spec_for(head, (8, 8))
    prior = AutoregressiveConfig(TransformerConfig(width=64), HEADS[head]).build([spec])
    values = torch.arange(5) if head in CODE_HEADS else torch.randn(500, 2)
    assert 0.2 < float((prior.position.std() / prior.head.embed(values).std()).detach()) < 5


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_noise_of_few_positions_is_made_at_once_with_the_same_samples(strength, monkeypatch):
    spec, how, sizes = spec_for("mixture", (3, 4)), Sampling(autoguidance=strength), []
    prior = random_prior(spec, "pixelcnn", "mixture", scale=0.15).float()
    told = Conditioned(prior.backbone, prior.head, None, None)
    weaker = [(strength, told)] if strength else []
    whole = sample_grid(told, spec.grid, torch.arange(5), 3, how, weaker=weaker)
    begin = type(prior.head).begin
    monkeypatch.setattr(
        type(prior.head), "begin", lambda self, noise, how: sizes.append(noise.shape[1]) or begin(self, noise, how)
    )
    monkeypatch.setattr(ancestral, "NOISE_AT_ONCE", 5 * 5 * prior.head.uniforms_per_position(how))
    assert torch.equal(sample_grid(told, spec.grid, torch.arange(5), 3, how, weaker=weaker), whole) and sizes == [5, 5, 2]


def test_moments_are_taken_of_few_posteriors_at_a_time_with_the_same_result(monkeypatch):
    spec = LatentSpec((2, 3, 3))
    dataset, of_head, of_prior = random_latents(50, spec), [], []
    for numbers in (2**21, 7 * spec.dimensions):
        monkeypatch.setattr(latents, "NUMBERS_AT_ONCE", numbers)
        head = GaussianMixture().build(spec, width=4).double()
        head.estimate(dataset.levels[0])
        of_head.append(torch.cat([head.shift, head.scale]))
        prior = GaussianMixturePrior([spec], 1)
        prior.estimate(dataset)
        of_prior.append(prior)
    mean, std = dataset.levels[0]["mean"].double(), dataset.levels[0]["std"].double()
    by_hand = mean.mean((0, 2, 3)), (mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))).sqrt()
    assert torch.allclose(of_head[0], torch.cat(by_hand)) and torch.allclose(of_head[1], of_head[0])
    for name, tensor in of_prior[0].state_dict().items():
        assert torch.allclose(tensor, of_prior[1].state_dict()[name], atol=1e-6)


def test_the_points_that_a_mixture_is_fitted_to_are_limited_in_bytes(monkeypatch):
    spec, fitted = LatentSpec((1, 2, 2)), []
    monkeypatch.setattr(gaussians, "MIXTURE_BYTES", 8 * spec.dimensions * 30)
    fit = GaussianMixturePrior.fit
    monkeypatch.setattr(GaussianMixturePrior, "fit", lambda self, points, of: fitted.append(len(points)) or fit(self, points, of))
    GaussianMixturePrior([spec], 2).estimate(random_latents(50, spec))
    assert fitted == [30]


def test_attention_in_bfloat16_makes_no_square_of_its_positions(monkeypatch):
    q, k, v = torch.randn(3, 1, 2, 300, 8).bfloat16()
    later = torch.ones(300, 300, dtype=torch.bool).triu(1)
    expected = (q.float() @ k.float().mT * 8**-0.5).masked_fill(later, -math.inf).softmax(-1) @ v.float()
    monkeypatch.setattr(torch.Tensor, "softmax", lambda *_: pytest.fail("a softmax over all pairs of positions"))
    found = attend(q, k, v)
    assert found.dtype == torch.bfloat16 and torch.allclose(found.float(), expected, atol=0.02)


@pytest.mark.parametrize(("head", "layer"), (("categorical", "logits"), ("mixture", "raw")))
def test_mixed_precision_rounds_logits_of_codes_in_training_and_nothing_else_of_a_density(head, layer, monkeypatch):
    prior = random_prior(spec_for(head, (2, 2)), "pixelcnn", head).float()
    levels, _ = random_latents(3, prior.spec)[torch.arange(3)]
    dtypes, found = [], getattr(prior.head, layer)

    def seen(features: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        made = found(features)
        dtypes.append(made.dtype if isinstance(made, torch.Tensor) else made[0].dtype)
        return made

    monkeypatch.setattr(prior.head, layer, seen)
    for training, mixed in ((True, True), (True, False), (False, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            density = prior.train(training).log_prob(levels)
        assert density.dtype == torch.float32
    rounded = torch.bfloat16 if head == "categorical" else torch.float32
    assert dtypes == [rounded, torch.float32, torch.float32]


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_mixed_precision_does_not_round_draws(backbone, head):
    prior, how = random_prior(spec_for(head, (2, 2)), backbone, head).float(), Sampling(temperature=0.9)
    (exact,) = prior.sample(torch.arange(200), 0, how)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(*prior.sample(torch.arange(200), 0, how), exact)
