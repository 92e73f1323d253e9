"""Rivals of the autoregressive prior: their densities against brute force, and that they learn. See also test_priors.py."""

import dataclasses
import math
import sys

import pytest
import torch
from scipy import stats
from torch import distributions

from pipelines import TwoStage
from pipelines.console import UserError
from pipelines.runs.dataset import load_data
from pipelines.runs.parts import load_autoencoder, load_prior, specs_of
from stage2_prior.conditions import ClassLabel
from stage2_prior.latents import LatentDataset, LatentSpec
from stage2_prior.sampling import CannotSample, Sampling
from stage2_prior.second_vae import SecondVaeConfig
from tests.parts import RIVALS, compared, random_latents, randomized
from tests.test_sharing import sharing

SPEC = LatentSpec((1, 1, 2))
LABELLED = {name: dataclasses.replace(config, condition=ClassLabel()) for name, config in RIVALS.items()}


@pytest.mark.parametrize("name", RIVALS)
def test_every_parameter_receives_a_gradient(name):
    prior = RIVALS[name].build([LatentSpec((2, 2, 2))])
    prior.estimate(random_latents(20, LatentSpec((2, 2, 2))))
    prior(*random_latents(20, LatentSpec((2, 2, 2)))[torch.arange(20)])["loss"].backward()
    assert [name for name, p in prior.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_a_spike_of_the_second_vae_makes_no_infinite_loss_and_leads_back():
    prior = RIVALS["second-vae"].build([SPEC])
    prior.estimate(random_latents(20, SPEC))
    with torch.no_grad():
        prior.encoder.last.bias[2:] = 100  # log σ of q(u|z)
    loss = prior(*random_latents(20, SPEC)[torch.arange(20)])["loss"]
    loss.backward()
    assert loss.isfinite() and prior.encoder.last.bias.grad.isfinite().all()
    assert (prior.encoder.last.bias.grad[2:] > 0).all()


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_learns_what_no_single_gaussian_can(name):
    """Two clusters: after a few small steps the loss lies below that of the best Gaussian, and samples lie in the clusters."""
    torch.manual_seed(0)
    side = torch.randint(0, 2, (4000, 1, 1, 1)) * 8.0 - 4
    points = side + 0.5 * torch.randn(4000, *SPEC.shape)
    prior = RIVALS[name].build([SPEC])
    prior.estimate(LatentDataset([{"mean": points, "std": torch.full_like(points, 0.1)}]))
    optimizer = torch.optim.AdamW(prior.parameters(), lr=2e-2)
    for step in range(250):
        optimizer.zero_grad()
        prior([points[torch.arange(step * 64, (step + 1) * 64) % 4000]])["loss"].backward()
        optimizer.step()
    gaussian = distributions.MultivariateNormal(points.flatten(1).mean(0), torch.cov(points.flatten(1).T))
    with torch.no_grad():
        gain = prior.log_prob([points]) - gaussian.log_prob(points.flatten(1))
        (samples,) = prior.sample(torch.arange(1000), seed=0)
    assert float(gain.mean()) > 0.3
    assert 0.3 < float((samples[..., 0] > 0).float().mean()) < 0.7
    assert float(((samples.abs() - 4).abs() < 2).flatten(1).all(1).float().mean()) > 0.6


def test_vamp_is_the_mixture_of_its_components():
    """Which begin at the means of different images, as wide as all latents together."""
    dataset = random_latents(30, SPEC)
    prior = RIVALS["vamp"].build([SPEC])
    prior.estimate(dataset)
    means, stds = (prior.flattened.latent(prior.means)[0].flatten(1), prior.stds() * prior.flattened.scale)
    for mean in means:
        near = (dataset.levels[0]["mean"].flatten(1) - mean).abs().sum(1).argmin()
        assert torch.allclose(mean, dataset.levels[0]["mean"][near].flatten(), atol=1e-4)
    variance = dataset.levels[0]["mean"].flatten(1).var(0, correction=0) + dataset.levels[0]["std"].flatten(1).square().mean(0)
    assert torch.allclose(stds**2, variance.expand_as(stds), rtol=5e-3)  # a smooth floor adds a thousandth
    assert len(means.unique(dim=0)) == 5
    randomized(prior)
    means, stds = (prior.flattened.latent(prior.means)[0].flatten(1), prior.stds() * prior.flattened.scale)
    points = 3 * torch.randn(7, 1, 1, 2)
    each = distributions.Normal(means, stds).log_prob(points.flatten(1)[:, None]).sum(2)
    assert torch.allclose(prior.log_prob([points]), each.logsumexp(1) - math.log(5), atol=1e-3)


@pytest.mark.parametrize("name", LABELLED)
def test_a_rival_with_labels_learns_which_cluster_a_label_means(name):
    """It gains log 2 nats from the label; samples of a label lie in its cluster, and labels are drawn as often as in training."""
    torch.manual_seed(0)
    labels = (torch.rand(4000) < 0.3).long()
    points = (labels * 8.0 - 4)[:, None, None, None] + 0.5 * torch.randn(4000, *SPEC.shape)
    prior = LABELLED[name].build([SPEC], classes=2)
    dataset = LatentDataset([{"mean": points, "std": torch.full_like(points, 0.1)}], labels)
    prior.estimate(dataset)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=2e-2)
    for step in range(250):
        rows = torch.arange(step * 64, (step + 1) * 64) % 4000
        optimizer.zero_grad()
        prior([points[rows]], labels[rows])["loss"].backward()
        optimizer.step()
    prior.eval()
    with torch.no_grad():
        right, wrong = prior.log_prob([points], labels).mean(), prior.log_prob([points], 1 - labels).mean()
        either = prior.log_prob([points], prior.null_contexts(4000)).mean()
        (samples,) = prior.sample(torch.arange(500), 0, contexts=torch.ones(500, dtype=torch.int64))
        drawn = prior.draw_contexts(torch.arange(2000), 0)
        (same,), (also,) = prior.sample(torch.arange(5), 3), prior.sample(torch.arange(5), 3, contexts=drawn_for(prior, 5))
    assert right > either + 0.2 and right > wrong + 5
    assert float((samples > 0).flatten(1).all(1).float().mean()) > 0.9
    assert 0.25 < float(drawn.float().mean()) < 0.35
    assert torch.equal(same, also)


def drawn_for(prior, count: int) -> torch.Tensor:
    return prior.draw_contexts(torch.arange(count), 3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["flow", "vamp"])
def test_a_density_given_a_label_integrates_to_one(name):
    prior = randomized(LABELLED[name].build([SPEC], classes=2).double(), 0.3).eval()
    edge = torch.linspace(-12, 12, 481, dtype=torch.float64)
    middle = (edge[1:] + edge[:-1]) / 2
    points = torch.cartesian_prod(middle, middle).view(-1, *SPEC.shape)
    densities = [prior.log_prob([points], torch.full((len(points),), label)).exp() for label in (0, 1, 2)]  # 2 is the null label
    for density in densities:
        assert float(density.sum()) * 0.05**2 == pytest.approx(1, abs=2e-3)
    assert not torch.allclose(densities[0], densities[1], rtol=0.05)


def test_labels_weigh_the_components_of_vamp():
    prior = randomized(LABELLED["vamp"].build([SPEC], classes=3)).eval()
    labels, points = torch.tensor([0, 2, 1, 0]), 3 * torch.randn(4, *SPEC.shape)
    means, stds = (prior.flattened.latent(prior.means)[0].flatten(1), prior.stds() * prior.flattened.scale)
    each = distributions.Normal(means, stds).log_prob(points.flatten(1)[:, None]).sum(2)
    weights = prior.condition.maps[labels].flatten(1).softmax(1)
    assert torch.allclose(prior.log_prob([points], labels), (weights.log() + each).logsumexp(1), atol=1e-3)


@pytest.mark.parametrize("name", LABELLED)
def test_what_a_rival_takes_is_asked_for(name):
    labelled, plain = LABELLED[name].build([SPEC], classes=2), RIVALS[name].build([SPEC])
    points, numbers = torch.zeros(2, *SPEC.shape), torch.arange(2)
    with pytest.raises(CannotSample, match="give a context for each latent"):
        labelled.log_prob([points])
    with pytest.raises(CannotSample, match="takes no context"):
        plain.sample(numbers, 0, contexts=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(CannotSample, match="only an autoregressive prior is guided"):
        labelled.sample(numbers, 0, Sampling(guidance=1.0))
    with pytest.raises(ValueError, match="needs images with labels: sort them into a folder for each, or use another condition"):
        LABELLED[name].build([SPEC])
    with pytest.raises(ValueError, match="needs a data set with contexts"):
        labelled.estimate(random_latents(20, SPEC))


@pytest.fixture(scope="module")
def second():
    """A second VAE whose density is known: by a fine sum over its u, of two numbers."""
    prior = randomized(SecondVaeConfig(hidden=6, layers=2, samples=20).build([SPEC]).double(), 0.35)
    prior.flattened.shift.fill_(0.5)
    prior.flattened.scale.fill_(1.5)

    def density(z: torch.Tensor) -> torch.Tensor:
        edge = torch.linspace(-7, 7, 100, dtype=torch.float64)
        u = torch.cartesian_prod(edge, edge)
        weight = distributions.Normal(0.0, 1.0).log_prob(u).sum(1) + 2 * (edge[1] - edge[0]).log()
        mean, gamma = prior.decoder(u), prior.log_gamma.exp()
        parts = []
        for values in prior.flattened.values([z]).split(100):
            each = distributions.Normal(mean, gamma).log_prob(values[:, None]).sum(2) + weight
            parts.append(each.logsumexp(1) - prior.flattened.log_volume())
        return torch.cat(parts)

    return prior, density


@torch.no_grad()
def test_the_bound_of_the_second_vae_lies_below_its_density(second):
    """In expectation over its noise, for one draw and for ten; with many draws it is nearly reached."""
    torch.manual_seed(0)
    prior, density = second
    z = torch.randn(12, 1, 1, 2, dtype=torch.float64) * 1.5
    exact, gaps = density(z), []
    for draws in (1, 10, 3000):
        noise = torch.randn(max(2, 600 // draws), draws, 2, dtype=torch.float64)
        bounds = torch.stack([prior.bound([z], each) for each in noise])
        assert (bounds.mean(0) < exact + 4 * bounds.std(0) / len(bounds) ** 0.5 + 0.01).all()
        gaps.append(float((exact - bounds.mean(0)).mean()))
    assert gaps[0] > gaps[1] > gaps[2] and abs(gaps[2]) < 0.05
    assert torch.allclose(prior.log_prob([z])[2:5], prior.log_prob([z[2:5]]))


@torch.no_grad()
def test_samples_of_the_second_vae_follow_its_density(second):
    """Each number of z in ten bins, against the density summed over a grid of z."""
    prior, density = second
    edge = torch.linspace(-16, 16, 81, dtype=torch.float64)
    middle = (edge[1:] + edge[:-1]) / 2
    table = density(torch.cartesian_prod(middle, middle).view(-1, 1, 1, 2)).exp().view(80, 80) * 0.16
    assert float(table.sum()) == pytest.approx(1, abs=0.01)
    (samples,) = prior.sample(torch.arange(2000), seed=1)
    for axis in (0, 1):
        expected = table.sum(1 - axis).view(10, 8).sum(1)
        observed = torch.histogram(samples.flatten(1)[:, axis].clamp(-15.99, 15.99), edge[::8]).hist
        often = expected * 2000 > 5
        counts = torch.cat([observed[often], observed[~often].sum()[None]]).numpy()
        shares = torch.cat([expected[often], expected[~often].sum()[None] + 1e-9]).numpy()
        assert stats.chisquare(counts, shares / shares.sum() * counts.sum()).pvalue > 1e-4


@pytest.mark.parametrize("name", RIVALS)
def test_codes_and_contexts_are_refused(name):
    with pytest.raises(ValueError, match="continuous latents, not codes"):
        RIVALS[name].build([LatentSpec((2, 2), vocabulary=5)])
    with pytest.raises(CannotSample, match="takes no context"):
        RIVALS[name].build([SPEC]).sample(torch.arange(2), 0, Sampling(guidance=1.0))


@pytest.mark.usefixtures("small_data")
@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_is_trained_and_saved_as_other_priors_are(run, name):
    other = sharing(run, name, prior=RIVALS[name], prior__backbone=None)
    autoencoder = load_autoencoder(other)
    prior = load_prior(other, specs_of(autoencoder))
    with torch.no_grad():
        (together,), (apart,) = (prior.sample(torch.tensor(numbers), 3) for numbers in ([0, 1, 2, 3], [3, 1]))
        assert torch.allclose(together[[3, 1]], apart, rtol=1e-4, atol=1e-4)
        assert prior.log_prob([together]).isfinite().all()
    if name == "second-vae":
        found = compared(other, load_data(other))
        assert [key for key, row in found.priors.items() if row.nll_is_bound] == ["learned"] and found.prior == "second VAE"
        assert math.isfinite(found.priors["learned"].nll) and found.conditioned_on is None
        assert math.isfinite(found.reconstruction.fd_perturbed) and found.reconstruction.fd_perturbed != found.reconstruction.fd


@pytest.mark.usefixtures("small_data")
def test_a_rival_with_labels_is_compared_and_drawn_from_by_label(run):
    """No guidance is tried, which such a prior does not have; log p(x) is that of the mixture over labels."""
    other = sharing(run, "labelled", prior=LABELLED["vamp"], prior__backbone=None)
    found = compared(other, load_data(other))
    assert found.conditioned_on == "label" and found.priors["learned"].label_read is not None
    assert not any(tried.sampling.guided for tried in found.sampling if tried.sampling)
    model = TwoStage.open(str(other.folder), "cpu")
    images = model.sample(6, label=2, seed=1)
    assert torch.equal(images, model.sample(6, label=[2] * 6, seed=1))
    assert model.conditions(3, label="2") == ["2"] * 3 and {*model.conditions(40)} <= {*model.labels}
    assert model.log_likelihood(images, samples=2).isfinite().all()
    with pytest.raises(UserError, match="only an autoregressive prior is guided"):
        model.sample(2, label=2, guidance=1.0)


@pytest.mark.usefixtures("small_data")
def test_a_rival_without_its_library_says_so(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko.flows", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[flow\]'"):
        sharing(run, "without", prior=RIVALS["flow"], prior__backbone=None)
