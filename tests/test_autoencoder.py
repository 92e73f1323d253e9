"""Stage 1: the contract of every bottleneck, likelihood and network; the KL, the ELBO, and what is averaged."""

import math

import pytest
import torch
from scipy import stats
from torch import distributions, nn

from stage1_vae import autoencoder, bottlenecks, likelihoods
from stage1_vae.autoencoder import Autoencoder, AutoencoderConfig
from stage1_vae.bottlenecks import gaussian_rate
from stage1_vae.bounds import (
    DECODED_AT_ONCE,
    draws,
    effective_samples,
    elbo,
    grouped,
    importance_weighted_bound,
    log_likelihoods,
)
from stage1_vae.hierarchy import Hierarchical
from stage1_vae.networks import Convolutional, ConvolutionalFlat, FullyConnected
from tests.parts import BOTTLENECKS, LIKELIHOODS, NETWORKS

SHAPES = [(1, 28, 28), (3, 16, 24)]


def random_images(count: int, shape=(1, 28, 28), seed: int = 0):
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def build(network="convolutional", bottleneck="gaussian", likelihood="gaussian", shape=(1, 28, 28)):
    torch.manual_seed(0)
    return AutoencoderConfig(NETWORKS[network], BOTTLENECKS[bottleneck], LIKELIHOODS[likelihood]).build(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
@pytest.mark.parametrize("network", NETWORKS)
def test_contract(network, bottleneck, likelihood, shape):
    if bottleneck.startswith("hierarchical"):
        shape = (shape[0], 32, 16)
        if network != "convolutional":
            with pytest.raises(ValueError, match="cannot be halved"):
                build(network, bottleneck, likelihood, shape)
            return
    model = build(network, bottleneck, likelihood, shape)
    images = random_images(5, shape)
    if bottleneck == "finite-scalar":  # away from the initial weights, at which every image gets the middle level
        model.bottleneck.project.weight.data.mul_(50)
    terms = model(images, progress=0.3)
    assert all(value.ndim == 0 and value.isfinite() for value in terms.values())
    codes = model.latents[0][1] is not None
    assert ("rate" in terms) == (bottleneck == "gumbel-softmax" or model.bottleneck.has_density and not codes)
    terms["loss"].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    model.eval()
    posteriors = model.encode(images)
    assert [tuple(p["codes" if codes else "mean"].shape[1:]) for p in posteriors] == [shape for shape, _ in model.latents]
    for posterior, (_, vocabulary) in zip(posteriors, model.latents, strict=True):
        assert not codes or ((posterior["codes"] >= 0).all() and (posterior["codes"] < vocabulary).all())
    levels = model.sample(posteriors)
    assert model.decode(levels).log_prob(model.likelihood.scale(images)).shape == (5,)
    for uniforms in (None, torch.rand(images.shape)):
        rendered = model.render(levels, uniforms)
        assert rendered.shape == images.shape and rendered.dtype == torch.uint8
    spread = (model.sample(posteriors)[0] - levels[0]).abs().max()
    assert (spread > 0) == (model.bottleneck.has_density and not codes)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_what_is_decoded_is_a_distribution_as_torch_has_them(likelihood):
    model = build(likelihood=likelihood).eval()
    images = random_images(2)
    distribution = model.decode(model.mean(model.encode(images)))
    assert distribution.sample().shape == distribution.mean.shape == images.shape and repr(distribution)
    assert distribution.log_prob(distribution.sample()).isfinite().all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (random_images(2) / 255, "uint8"),
        (random_images(2).long(), "uint8"),
        (random_images(2, (1, 32, 32)), r"of shape B×1×28×28, not 2×1×32×32"),
        (random_images(2, (3, 28, 28)), "not 2×3×28×28"),
        (random_images(1)[0], "not 1×28×28"),
    ],
)
def test_images_of_another_type_or_shape_are_refused(images, message):
    model = build()
    for use in (model, model.encode, lambda images: draws(model, images, 1, {})):
        with pytest.raises(ValueError, match=message):
            use(images)


@pytest.mark.parametrize("bottleneck", ["gaussian", "vector-quantized", "hierarchical"])
def test_latents_that_are_no_list_of_levels_are_refused(bottleneck):
    model = build(bottleneck=bottleneck, shape=(1, 32, 32)).eval()
    levels = model.mean(model.encode(random_images(1, (1, 32, 32))))
    for wrong in (levels[0], levels[-1], [*levels, levels[0]], [level[..., :-1] for level in levels]):
        for use in (model.decode, model.render):
            with pytest.raises(ValueError, match="a list with one tensor for each level"):
                use(wrong)


@torch.no_grad()
@pytest.mark.parametrize("bottleneck", ["gaussian", "hierarchical"])
def test_few_images_are_encoded_and_decoded_at_once_with_the_same_results(bottleneck, monkeypatch):
    torch.manual_seed(0)
    model = Autoencoder((1, 16, 16), AutoencoderConfig(Convolutional(width=8), BOTTLENECKS[bottleneck])).eval()
    images, noise, sizes = torch.randint(0, 256, (7, 1, 16, 16), dtype=torch.uint8), torch.rand(7, 1, 16, 16), []
    for part in (model.encoder, model.decoder):
        part.register_forward_hook(lambda _, __, made: sizes.append(len(made[0] if isinstance(made, tuple | list) else made)))
    made = []
    for pixels in (2**19, 3 * 16 * 16):
        sizes.clear()
        monkeypatch.setattr(autoencoder, "PIXELS_AT_ONCE", pixels)
        levels = model.mean(model.encode(images))
        made.append((levels, model.render(levels), model.render(levels, noise)))
    assert max(sizes) <= 3
    for whole, parts in zip(made[0][0], made[1][0]):
        assert torch.allclose(whole.float(), parts.float(), atol=1e-5)
    assert all((whole.int() - parts.int()).abs().max() <= 1 for whole, parts in zip(made[0][1:], made[1][1:]))


def test_the_rate_is_the_divergence_of_torch():
    mean, log_std = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64)
    q, p = distributions.Normal(mean, log_std.exp()), distributions.Normal(0.0, 1.0)
    expected = distributions.kl_divergence(q, p).flatten(1).sum(1)
    assert torch.allclose(gaussian_rate(mean, log_std), expected)


@torch.no_grad()
def test_losses_are_sums_in_nats_and_beta_weighs_the_rate():
    images = random_images(4)
    for beta in (0.0, 1.0, 4.0):
        torch.manual_seed(0)
        model = AutoencoderConfig(NETWORKS["convolutional"], bottlenecks.Gaussian(beta=beta), likelihoods.Gaussian(0.5)).build(
            (1, 28, 28)
        )
        model.eval()
        terms = model(images)
        assert float(terms["loss"]) == pytest.approx(float(terms["distortion"] + beta * terms["rate"]), rel=1e-6)
        # 784 Gaussian pixels of σ = 1/2 cost at least 784 · log(σ √2π) nats: a sum, not a mean.
        assert float(terms["distortion"]) > 784 * math.log(0.5 * math.sqrt(2 * math.pi))


@torch.no_grad()
def test_several_samples_average_log_likelihoods_not_reconstructions():
    model = build(bottleneck="gaussian", likelihood="gaussian").eval()
    images, samples = random_images(3), 400
    model.bottleneck.samples = samples
    torch.manual_seed(0)
    many = float(model(images)["distortion"])
    torch.manual_seed(0)
    embedded, _, _ = model.bottleneck(model.features(images), 0)
    targets = model.likelihood.scale(images)
    outputs = torch.stack([model.decoder(z) for z in embedded])
    of_likelihoods = -torch.stack([model.likelihood(output).log_prob(targets) for output in outputs]).mean()
    of_reconstructions = -model.likelihood(outputs.mean(0)).log_prob(targets).mean()
    assert many == pytest.approx(float(of_likelihoods), rel=1e-5)
    # Jensen: the average reconstruction is nearer to the image than the reconstructions are on average.
    assert of_reconstructions < of_likelihoods - 1e-3


def test_a_learned_sigma_is_the_root_mean_squared_error_and_state():
    likelihood = likelihoods.Gaussian().build()
    torch.manual_seed(0)
    targets = torch.rand(500, 1, 8, 8)
    outputs = targets + 0.2 * torch.randn_like(targets)
    for start in range(0, 500, 50):
        likelihood.update(outputs[start : start + 50], targets[start : start + 50])
    assert float(likelihood.sigma) == pytest.approx(0.2, abs=0.005)
    restored = likelihoods.Gaussian().build()
    restored.load_state_dict(likelihood.state_dict())
    assert restored.sigma == likelihood.sigma


def test_one_absurd_image_does_not_move_a_learned_sigma():
    likelihood = likelihoods.Gaussian().build()
    torch.manual_seed(0)
    targets = torch.rand(16, 1, 8, 8)
    outputs = targets + 0.05 * torch.randn_like(targets)
    for _ in range(200):
        likelihood.update(outputs, targets)
    before = float(likelihood.sigma)
    outputs[3] = 1e5
    likelihood.update(outputs, targets)
    assert before < float(likelihood.sigma) < 1.1 * before
    for _ in range(1000):  # but where every image is far away, σ follows
        likelihood.update(torch.full_like(targets, 30), targets)
    assert float(likelihood.sigma) == pytest.approx(29.5, rel=0.01)


def test_sigma_leaves_its_floor():
    likelihood = likelihoods.Gaussian().build()
    for _ in range(200):
        likelihood.update(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    for _ in range(1000):
        likelihood.update(torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    assert float(likelihood.sigma) == pytest.approx(1, rel=0.01)


def test_sigma_is_floored_at_half_a_grey_level():
    likelihood = likelihoods.Gaussian().build()
    for _ in range(200):
        likelihood.update(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    assert float(likelihood.sigma) == pytest.approx(0.5 / 255)


def test_a_likelihood_never_depends_on_batch_mates():
    model = build(likelihood="gaussian-learned").eval()
    images = random_images(6)
    posteriors = model.encode(images)
    alone = model.decode([posteriors[0]["mean"][:1]]).log_prob(model.likelihood.scale(images[:1]))
    together = model.decode([posteriors[0]["mean"]]).log_prob(model.likelihood.scale(images))[:1]
    assert torch.allclose(alone, together, rtol=1e-5)
    sigma = model.likelihood.sigma.clone()
    model(images)
    assert model.likelihood.sigma == sigma


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_images_against_outputs_broadcast(likelihood):
    model = build(likelihood=likelihood, bottleneck="gaussian", shape=(3, 16, 24)).eval()
    images = random_images(2, (3, 16, 24))
    p = model.decode([torch.randn(3, *model.latents[0][0])])
    together = p.log_prob(model.likelihood.scale(images)[:, None])
    apart = [p.log_prob(model.likelihood.scale(image).expand(3, -1, -1, -1)) for image in images]
    assert together.shape == (2, 3) and torch.allclose(together, torch.stack(apart))


def discretized(components: int = 3, spread: float = 1.5, count: int = 4):
    """The likelihood, and outputs for `count` 2×3 images of two channels, at random; some of its logistics are very narrow."""
    likelihood = likelihoods.DiscretizedLogistic(components).build()
    outputs = spread * torch.randn(count, 2 * 3 * components, 2, 3, dtype=torch.float64)
    outputs[:, -2 * components :] -= 3
    return likelihood, outputs


@pytest.mark.parametrize("spread", [0.3, 1.5, 8.0])
def test_the_probabilities_of_the_256_levels_sum_to_one(spread):
    torch.manual_seed(0)
    levels = torch.arange(256, dtype=torch.float64).div(255).view(-1, 1, 1, 1, 1)
    likelihood, outputs = discretized(spread=spread)
    pixels = likelihood(outputs).base_dist
    probabilities = pixels.log_prob(levels).exp()
    assert torch.allclose(probabilities.sum(0), torch.ones(1, dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(probabilities.cumsum(0), pixels.cdf(levels), rtol=1e-9)
    # The mean that is rendered is the mean of these probabilities, to less than half a grey level.
    assert ((probabilities * levels).sum(0) - pixels.mean).abs().max() < 0.5 / 255


@pytest.mark.parametrize("given_noise", [True, False])
def test_a_discretized_logistic_is_sampled_as_its_probabilities_say(given_noise):
    torch.manual_seed(0)
    likelihood, outputs = discretized(count=1)
    pixels = likelihood(outputs).base_dist
    levels = torch.arange(256, dtype=torch.float64).div(255)
    count = 20_000
    expected = pixels.log_prob(levels.view(-1, 1, 1, 1, 1)).exp().flatten(1) * count
    uniforms = torch.rand(count, 2, 2, 3, dtype=torch.float64)
    many = outputs.expand(count, -1, -1, -1)
    samples = likelihood.sample(many, uniforms) if given_noise else likelihood(outputs).sample((count,))
    samples = (samples.flatten(1) * 255).round().long()
    for pixel in range(samples.shape[1]):
        observed = torch.bincount(samples[:, pixel], minlength=256).double()
        often = expected[:, pixel] > 5
        bins = [torch.cat([each[often], each[~often].sum()[None] + 1e-9]) for each in (observed, expected[:, pixel])]
        assert stats.chisquare(*(each / each.sum() * count for each in bins)).pvalue > 1e-4


def test_a_narrow_discretized_logistic_is_certain_and_has_gradients():
    outputs = torch.zeros(1, 3, 1, 2, requires_grad=True)
    likelihood = likelihoods.DiscretizedLogistic(components=1).build()
    narrow = outputs + torch.tensor([0.0, 2 * 100 / 255 - 1, -30.0]).view(1, 3, 1, 1)
    right, wrong = (likelihood(narrow).log_prob(torch.full((1, 1, 1, 2), level / 255)) for level in (100, 220))
    assert right > 2 * math.log(0.97) and wrong < -100 and wrong.isfinite()  # the floor on the scale leaves 3 % beside a level
    wrong.sum().backward()
    assert outputs.grad.isfinite().all() and outputs.grad[:, 1].abs().min() > 0


@pytest.mark.parametrize("raw", [-100.0, 6.0, 14.0, 40.0, 87.0, 100.0])
def test_a_discretized_logistic_has_gradients_and_a_mean_whatever_the_decoder_says(raw):
    """A wide logistic clipped to [0, 1] is nearly always at one end, with a mean in the middle; a narrow one keeps its mean."""
    likelihood = likelihoods.DiscretizedLogistic(components=2).build()
    outputs = torch.zeros(1, 6, 1, 1)
    outputs[:, 2:] = torch.tensor([0.3, -0.2, raw, raw - 1])[:, None, None]
    outputs.requires_grad_()
    distribution = likelihood(outputs)
    distribution.log_prob(torch.full((1, 1, 1, 1), 0.6)).backward()
    assert outputs.grad.isfinite().all()
    assert distribution.mean.item() == pytest.approx(0.525 if raw < 0 else 0.5, abs=1e-3)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_draws_are_the_inverse_of_the_cdf(likelihood):
    """At evenly spread uniform numbers: in order, with the mean and the standard deviation of p(x|z); in place, whatever the
    rest of the batch."""
    torch.manual_seed(0)
    count, model = 2000, build(likelihood=likelihood).likelihood
    # A standard deviation of a logistic of some grey levels, so that few draws leave [0, 1].
    outputs = 0.3 * torch.randn(1, model.outputs_per_channel, 2, 3, dtype=torch.float64)
    if likelihood == "discretized-logistic":
        outputs[:, -3:] -= 4
    p, outputs = model(outputs).base_dist, outputs.expand(count, -1, -1, -1)
    uniforms = ((torch.arange(count, dtype=torch.float64) + 0.5) / count).view(-1, 1, 1, 1).expand(-1, 1, 2, 3)
    drawn = model.sample(outputs, uniforms)
    assert drawn.dtype == outputs.dtype and (drawn.diff(dim=0) >= 0).all()
    assert torch.allclose(drawn.mean(0), p.mean[0], atol=2e-3)
    assert torch.equal(model.sample(outputs[7:9], uniforms[7:9].flip(0)), drawn[7:9].flip(0))
    if likelihood != "discretized-logistic":
        assert torch.allclose(drawn.std(0), p.stddev[0], rtol=1e-2)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_what_is_not_a_number_is_not_drawn_as_one(likelihood):
    model = build(likelihood=likelihood).likelihood
    outputs = torch.randn(2, model.outputs_per_channel, 4, 4)
    outputs[1, :, 2, 2] = torch.nan
    drawn = model.sample(outputs, torch.rand(2, 1, 4, 4))
    assert drawn[1, :, 2, 2].isnan().all() and drawn.isnan().sum() == 1


def test_what_a_likelihood_is_of_given_images():
    grey, binary = random_images(3), random_images(3) // 128 * 255
    measures = {name: config.build().measure for name, config in LIKELIHOODS.items()}
    assert measures["bernoulli"](binary) == "probability" and measures["bernoulli"](grey) == "pseudo-likelihood"
    assert measures["gaussian"](grey) == "density" and measures["discretized-logistic"](grey) == "probability"
    likelihood = likelihoods.Bernoulli().build()
    logits = torch.randn(3, 1, 28, 28)
    expected = -nn.functional.binary_cross_entropy_with_logits(logits, binary / 255, reduction="none").flatten(1).sum(1)
    assert torch.allclose(likelihood(logits).log_prob(likelihood.scale(binary)), expected, rtol=1e-5)


def log_weights(model, images, samples, log_prior):
    return draws(model, images, samples, {"prior": log_prior}).log_weights("prior")


class LinearGaussian(nn.Module):
    """x = W z + b + σ ε with z ~ N(0, I): evidence, posterior and all bounds are known in closed form.

    Behind the autoencoder's methods, for `bounds`; images are one row of pixels.
    """

    at_once = 128

    def __init__(self, pixels: int, dimensions: int, sigma: float, optimal: bool):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(pixels, dimensions, generator=generator, dtype=torch.float64) * 0.3
        self.likelihood = likelihoods.Gaussian(sigma).build().double()
        self.bottleneck = bottlenecks.Gaussian(channels=1).build(2)
        precision = torch.eye(dimensions, dtype=torch.float64) + self.weight.T @ self.weight / sigma**2
        self.gain = torch.linalg.solve(precision, self.weight.T) / sigma**2
        self.std = precision.diagonal().rsqrt() if optimal else torch.full((dimensions,), 0.5, dtype=torch.float64)
        # With orthogonal columns the true posterior is diagonal, so the optimal encoder makes the ELBO tight.
        self.covariance = self.weight @ self.weight.T + sigma**2 * torch.eye(pixels, dtype=torch.float64)

    def encode(self, images):
        mean = self.likelihood.scale(images).double().flatten(1) @ self.gain.T
        return [{"mean": mean[:, None, None], "std": self.std.expand_as(mean)[:, None, None]}]

    def sample(self, posteriors):
        return [torch.normal(p["mean"], p["std"]) for p in posteriors]

    def outputs(self, levels):
        return (levels[0].flatten(1) @ self.weight.T)[:, None, None]

    decode = Autoencoder.decode

    def evidence(self, images):
        zero = torch.zeros(len(self.weight), dtype=torch.float64)
        return distributions.MultivariateNormal(zero, self.covariance).log_prob(self.likelihood.scale(images).double().flatten(1))


def standard_normal(levels, contexts=None):
    return distributions.Normal(0.0, 1.0).log_prob(levels[0]).flatten(1).sum(1)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_the_bounds_against_a_known_evidence(dimensions):
    torch.manual_seed(0)
    images = random_images(6, (1, 1, 12))
    model = LinearGaussian(12, dimensions, sigma=0.4, optimal=False)
    weights = log_weights(model, images, 4000, standard_normal)
    evidence, bound, tight = model.evidence(images), elbo(weights), importance_weighted_bound(weights)
    error = weights.std(0) / len(weights) ** 0.5
    q = model.encode(images)[0]
    assert (bound < evidence + 4 * error).all()
    assert (tight > bound).all()
    assert torch.allclose(tight, evidence, atol=0.05)
    if dimensions == 1:  # the gap is KL(q ‖ true posterior), here between two Gaussians of one mean
        truth = LinearGaussian(12, 1, sigma=0.4, optimal=True)
        gap = (
            distributions.kl_divergence(
                distributions.Normal(q["mean"], q["std"]), distributions.Normal(q["mean"], truth.encode(images)[0]["std"])
            )
            .flatten(1)
            .sum(1)
        )
        assert torch.allclose(evidence - bound, gap, atol=4 * float(error.max()))


def test_more_samples_make_the_bound_tighter_up_to_the_evidence():
    """Bounds from the same draws, in groups of 1 to 4,000, under a prior that is not N(0, I)."""
    torch.manual_seed(0)
    images = random_images(4, (1, 1, 12))
    model = LinearGaussian(12, 2, sigma=0.4, optimal=False)
    shift, scale = 0.7, 1.6  # z ~ N(shift, scale²) makes x Gaussian too

    def log_prior(levels, contexts):
        return distributions.Normal(shift, scale).log_prob(levels[0]).flatten(1).sum(1)

    zero = model.weight.sum(1) * shift
    covariance = scale**2 * model.weight @ model.weight.T + 0.4**2 * torch.eye(12, dtype=torch.float64)
    evidence = distributions.MultivariateNormal(zero, covariance).log_prob(model.likelihood.scale(images).double().flatten(1))
    weights = log_weights(model, images, 16_000, log_prior)
    bounds = [importance_weighted_bound(grouped(weights, samples)).mean(0) for samples in (1, 8, 64, 4000)]
    assert torch.allclose(bounds[0], elbo(weights))
    assert all((looser < tighter).all() for looser, tighter in zip(bounds, bounds[1:]))
    assert torch.allclose(bounds[-1], evidence, atol=0.05)


def test_the_naive_estimate_converges_to_a_known_evidence():
    torch.manual_seed(0)
    images = random_images(5, (1, 1, 12))
    model = LinearGaussian(12, 2, sigma=0.4, optimal=False)
    weights = log_likelihoods(model, images, [torch.randn(50_000, 1, 1, 2, dtype=torch.float64)])
    # The standard error of the logarithm of an average is 1/√(effective samples), to first order.
    error = effective_samples(weights).rsqrt()
    assert error.max() < 0.1
    assert ((importance_weighted_bound(weights) - model.evidence(images)).abs() < 5 * error).all()


def test_effective_samples_by_hand():
    weights = torch.tensor([[1.0, 3.0], [1.0, 1e-30], [1.0, 1e-30], [1.0, 1.0]]).log()
    assert torch.allclose(effective_samples(weights), torch.tensor([4.0, 16 / 10]))


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_a_bound_leaves_the_model_as_it_is(training):
    model = build(likelihood="gaussian-learned").train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draws(model, random_images(3), 2, {"prior": standard_normal})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_draws_belong_to_their_image_however_many_are_decoded_at_once():
    model = build(bottleneck="vector-quantized")
    images, contexts = random_images(5), torch.arange(5.0)
    model(images)  # sets the codebook up
    model.eval()
    expected = model.decode(model.sample(model.encode(images))).log_prob(model.likelihood.scale(images))
    assert len(expected.unique()) == 5
    for at_once in (100, 7, 2):
        made = draws(model, images, 6, {"told": lambda levels, told: told}, contexts, at_once)
        assert torch.allclose(made.log_likelihood, expected.expand(6, -1), rtol=1e-5)
        assert torch.equal(made.log_prior["told"], contexts.expand(6, -1)) and (made.log_posterior == 0).all()
        assert torch.equal(made.log_weights("told"), made.log_likelihood + contexts)


@torch.no_grad()
def test_bounds_decode_fewer_large_images_at_once(monkeypatch):
    model, images = build().eval(), random_images(5)
    decoded = []
    model.decoder.register_forward_hook(lambda decoder, inputs, outputs: decoded.append(len(outputs)))
    levels = [torch.randn(300, *shape) for shape, _ in model.latents]
    for pixels, at_once in ((3 * images[0].numel(), 3), (10**9, DECODED_AT_ONCE)):
        monkeypatch.setattr(autoencoder, "PIXELS_AT_ONCE", pixels)
        for bound in (lambda: draws(model, images, 60, {}), lambda: log_likelihoods(model, images, levels)):
            decoded.clear()
            bound()
            assert max(decoded) == at_once and sum(decoded) == 300


def test_the_elbo_is_tight_where_the_encoder_is_optimal():
    images = random_images(6, (1, 1, 12))
    model = LinearGaussian(12, 1, sigma=0.4, optimal=True)
    weights = log_weights(model, images, 3, standard_normal)
    assert torch.allclose(weights, model.evidence(images).expand_as(weights), rtol=1e-6)


@torch.no_grad()
def test_the_training_loss_is_the_negative_elbo():
    model = build(bottleneck="gaussian", likelihood="gaussian").eval()
    images = random_images(4)
    model.bottleneck.samples = 1
    torch.manual_seed(0)
    losses = [float(model(images)["loss"]) for _ in range(300)]
    weights = log_weights(model, images, 300, standard_normal)
    mean, error = sum(losses) / 300, torch.tensor(losses).std() / 300**0.5
    assert mean == pytest.approx(-float(elbo(weights).mean()), abs=5 * float(error) + 5 * float(weights.mean(1).std()) / 300**0.5)


def test_the_gradient_of_the_bound_is_that_of_the_training_loss():
    """With the same noise: z is reparametrized, so the encoder learns from both."""
    model = build(bottleneck="gaussian", likelihood="gaussian").eval()
    model.bottleneck.samples = 1
    images = random_images(64)
    gradients = []
    for loss in (
        lambda: model(images)["loss"],
        lambda: -elbo(log_weights(model, images, 1, standard_normal)).mean(),
    ):
        model.zero_grad()
        torch.manual_seed(0)
        loss().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.encoder.parameters()]))
    # The training loss has the rate in closed form, the bound a draw of it; the distortion is the same.
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
    assert gradients[1].norm() == pytest.approx(float(gradients[0].norm()), rel=0.05)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_under_mixed_precision_a_density_is_not_rounded(likelihood):
    model = build(likelihood=likelihood).eval()
    images = random_images(2)
    with torch.autocast("cpu", torch.bfloat16):
        p = model.decode(model.sample(model.encode(images)))
        assert p.log_prob(model.likelihood.scale(images)).dtype == p.mean.dtype == torch.float32


def test_a_deterministic_encoder_has_no_likelihood():
    model = build(bottleneck="deterministic")
    assert model.encode(random_images(2))[0]["std"].abs().max() == 0
    with pytest.raises(ValueError, match="no density"):
        log_weights(model, random_images(2), 1, standard_normal)


def test_the_latent_grid_is_a_setting():
    for downsample, grid in ((2, (14, 14)), (4, (7, 7))):
        model = AutoencoderConfig(Convolutional(width=8, downsample=downsample)).build((1, 28, 28))
        assert model.latents == [((4, *grid), None)]


@pytest.mark.parametrize("kind", [Convolutional, FullyConnected, ConvolutionalFlat])
def test_a_flat_latent_has_positions_and_features(kind):
    network = kind(width=8, positions=5, features=6)
    model = AutoencoderConfig(network, bottlenecks.Gaussian(channels=3)).build((1, 28, 28))
    assert model.latents == [((3, 1, 5), None)]
    images = random_images(40)
    features = model.features(images)
    assert features.shape == (40, 6, 1, 5)
    # No two say the same, so mean and standard deviation of every channel are free.
    assert torch.linalg.matrix_rank(features[:, :, 0, 0].double(), rtol=1e-5) == 6
    assert model.decode(model.sample(model.encode(images))).mean.shape == images.shape


def test_feature_maps_are_halved_on_the_grids_between_images_and_latents():
    for downsample, widths in ((2, [8]), (4, [4, 8]), (8, [4, 4, 8])):
        assert Convolutional(width=8, downsample=downsample).widths() == widths


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: Convolutional(downsample=8).grid((1, 28, 28)), "divisible by 8"),
        (lambda: Convolutional(downsample=3).grid((1, 28, 28)), "power of two"),
        (lambda: AutoencoderConfig(Convolutional(features=6)).build((1, 28, 28)), "features 6 has no effect without positions"),
        *(
            (lambda network=network, kind=kind: AutoencoderConfig(network, kind).build((1, 28, 28)), message)
            for network in (Convolutional(8, positions=8), FullyConnected(width=8), Convolutional(width=2))
            for kind, message in (
                (bottlenecks.Gaussian(channels=4), "need 8 features .* has 2: set --autoencoder.network.features"),
                (bottlenecks.Gaussian(channels=2), "need 4 features"),
                (bottlenecks.Deterministic(channels=3), "need 3 features"),
            )
        ),
        (lambda: AutoencoderConfig(bottleneck=Hierarchical(levels=1)).build((1, 32, 32)), "two levels or more, not 1"),
    ],
)
def test_refuses_what_cannot_work(config, message):
    with pytest.raises(ValueError, match=message):
        config()


@torch.no_grad()
@pytest.mark.parametrize("features", [2, 3, 8])
def test_latents_of_a_built_bottleneck_have_full_rank(features):
    """Mean and log standard deviation vary in all their dimensions, so none is a function of the others."""
    for kind, each in ((bottlenecks.Gaussian, 2), (bottlenecks.Deterministic, 1)):
        bottleneck = kind(channels=features // each).build(features)
        numbers = bottleneck.project(torch.randn(100, features, 1, 1)).flatten(1)
        assert torch.linalg.matrix_rank(numbers - numbers.mean(0)) == each * (features // each)


@torch.no_grad()
def test_the_bound_of_codes_is_their_own_probability_and_likelihood():
    """-log p(codes) - log p(x|codes) over both levels, and below log p(x) = log Σ p(x|z) p(z) over all codes."""
    network = Convolutional(width=8, blocks=1, downsample=2)
    torch.manual_seed(0)
    bottleneck = Hierarchical(bottlenecks.VectorQuantized(codes=3, channels=2), blocks=1)
    model = AutoencoderConfig(network, bottleneck, likelihoods.Gaussian(0.3)).build((1, 4, 4))
    model.train()(random_images(8, (1, 4, 4)))  # sets the codebooks up
    model.eval()
    (top, k1), (bottom, k2) = model.latents
    assert (top, bottom) == ((1, 1), (2, 2))
    image = random_images(1, (1, 4, 4), seed=1)

    def uniform(levels, contexts=None):
        return torch.full((len(levels[0]),), -math.log(3) * 5)

    weights = log_weights(model, image, 2, uniform)
    assert weights.shape == (2, 1) and torch.equal(weights[0], weights[1])
    codes = model.sample(model.encode(image))
    expected = model.decode(codes).log_prob(model.likelihood.scale(image)) + uniform(codes)
    assert torch.allclose(weights[0], expected)
    every = torch.cartesian_prod(*5 * [torch.arange(3)])
    levels = [every[:, :1].view(-1, 1, 1), every[:, 1:].reshape(-1, 2, 2)]
    target = model.likelihood.scale(image).expand(len(every), -1, -1, -1)
    evidence = (model.decode(levels).log_prob(target) + uniform(levels)).logsumexp(0)
    assert elbo(weights) <= evidence + 1e-4


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_an_output_that_is_not_a_number_is_a_loss_that_is_none(likelihood):
    """And no exception, so that training can say what to do; the other images of the batch keep their likelihood."""
    torch.manual_seed(0)
    model = build(likelihood=likelihood)
    outputs = torch.randn(3, model.likelihood.outputs_per_channel, 4, 4)
    images = random_images(3, (1, 4, 4))
    expected = model.likelihood(outputs).log_prob(model.likelihood.scale(images))
    outputs[1, -1, 2, 2] = torch.nan
    log_prob = model.likelihood(outputs).log_prob(model.likelihood.scale(images))
    assert log_prob[1].isnan() and torch.equal(log_prob[[0, 2]], expected[[0, 2]])
    next(model.decoder.parameters()).data.fill_(torch.nan)
    assert model(random_images(3))["loss"].isnan()


@pytest.mark.parametrize("bottleneck", [*BOTTLENECKS.values(), bottlenecks.FiniteScalar()], ids=str)
def test_features_that_are_not_numbers_are_a_loss_that_is_none(bottleneck):
    shape = (1, 32, 32)
    model = AutoencoderConfig(NETWORKS["convolutional"], bottleneck, LIKELIHOODS["gaussian"]).build(shape)
    model(random_images(3, shape))
    next(model.encoder.parameters()).data.fill_(torch.nan)
    assert model(random_images(3, shape))["loss"].isnan()


def test_a_posterior_that_is_not_a_number_gives_draws_that_are_none():
    model = build()
    model.bottleneck.project.bias.data[model.bottleneck.latent_channels] = torch.nan  # of one channel's log std
    images = random_images(2)
    assert model.encode(images)[0]["std"].isnan().any() and not model.encode(images)[0]["mean"].isnan().any()
    made = draws(model, images, 3, {"flat": lambda levels, told: torch.zeros(len(levels[0]))})
    assert made.log_likelihood.isnan().all() and made.log_posterior.isnan().all() and made.log_weights("flat").isnan().all()
