"""python -m pipelines.study NAME: questions that people ask about VAEs, answered by running one.

    samples-per-image    how many z for each image? What is averaged?
    mean-or-sample       decode the posterior's mean, or a sample?
    evidence             how can one z explain an image, and what does p(x) = ∫ p(x|z) p(z) dz cost to estimate?
    aggregate-posterior  is q(z) really N(0, I)?

Each runs on a trained run (mnist5k, which is trained if it is not there), in minutes on 2 cores, and writes a plot, the
numbers and what they say under RUN/studies/.

x an image, z a latent, L draws of z; all likelihoods in nats.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import tyro
from einops import rearrange
from matplotlib.axes import Axes
from torch import Tensor

from pipelines.checkpoint import write_file, write_json
from pipelines.config import preset
from pipelines.console import Progress, UserError, run_command, say
from pipelines.data import Splits
from pipelines.fit import FitConfig, evaluate, fit
from pipelines.likelihood import mutual_information
from pipelines.metrics import feature_space
from pipelines.report import Figure, png, pyplot
from pipelines.run import CHECKPOINTS, Run, encoded, latent_dataset
from pipelines.train_all import DEFAULT_PRESET, train_all
from stage1_vae.autoencoder import Autoencoder, AutoencoderConfig
from stage1_vae.bottlenecks import Deterministic, Gaussian, gaussian_rate
from stage1_vae.bounds import draws, elbo, grouped, importance_weighted_bound, log_likelihoods
from stage1_vae.likelihoods import Bernoulli
from stage1_vae.networks import FullyConnected
from stage2_prior.heads import gaussian_log_prob
from stage2_prior.latents import LatentDataset, LatentSpec, draw
from stage2_prior.prior import CONTINUOUS_BASELINES, GaussianMixturePrior, Prior

CHUNK = 500
TOTAL = 100_000  # draws of z of one image
DECODINGS, REPEATS = 256, 12  # of a training step; steps whose gradients are compared


@dataclass(frozen=True)
class Findings:
    sentences: list[str]
    numbers: dict[str, Any]
    figure: Figure


@dataclass(frozen=True)
class Trained:
    """What a study looks at."""

    run: Run
    splits: Splits
    autoencoder: Autoencoder
    standard: Prior

    @property
    def learned(self) -> Prior:
        """Raises UserError where there is none."""
        return self.run.prior("learned", self.run.specs(self.autoencoder))

    @classmethod
    def of(cls, run: Run) -> "Trained":
        """Raises UserError where there is no q(z|x) over continuous latents."""
        if not isinstance(run.config.autoencoder.bottleneck, Gaussian):
            raise UserError(f"{run.folder} has no q(z|x) over continuous latents, which this study is about; use mnist5k")
        autoencoder = run.load_autoencoder()
        specs = run.specs(autoencoder)
        return cls(run, run.data(), autoencoder, run.prior("standard", specs))

    def on_device(self, tensor: Tensor) -> Tensor:
        return self.run.fabric.to_device(tensor)

    def held_out(self, count: int) -> Tensor:
        """Test images drawn at random (they may lie sorted by label), N C H W."""
        chosen = torch.randperm(len(self.splits.test), generator=torch.Generator().manual_seed(0))[:count]
        return self.splits.test.images[chosen]

    def typical(self) -> Tensor:
        """Of some test images the one whose rate is nearest the median, C H W."""
        images = self.held_out(500)
        (posterior,) = self.autoencoder.encode(self.on_device(images))
        rate = gaussian_rate(posterior["mean"], posterior["std"].log())
        return images[int((rate - rate.median()).abs().argmin())]


def samples_per_image(trained: Trained) -> Findings:
    """The ELBO of one image and its gradient from L draws of z: all from the same draws, L times fewer repeats."""
    counts = [scale * 10**power for power in range(6) for scale in (1, 2, 5) if scale * 10**power <= TOTAL // 10]
    image = trained.typical()
    weights, gradients, z = gradients_of_draws(trained, image, TOTAL)
    signal = gradients.mean(0).norm()
    spread = {count: float(elbo(grouped(weights, count)).std()) for count in counts}
    value = {count: float(elbo(grouped(weights, count)).mean()) for count in counts}
    tight = {count: float(importance_weighted_bound(grouped(weights, count)).mean()) for count in counts}
    noise = {count: float(elbo(grouped(gradients, count)).var(0).sum().sqrt() / signal) for count in counts}
    shared = gradient_noise_of_batches(trained, [1, 4, 16, 64, 256])
    with torch.inference_mode():
        pictures = trained.autoencoder.decode([z[:200]]).mean
        pixels = trained.autoencoder.likelihood.scale(trained.on_device(image[None]))
        error = float((pictures - pixels).square().mean((1, 2, 3)).mean().sqrt())
        average = float((pictures.mean(0, keepdim=True) - pixels).square().mean().sqrt())
        apart = float((pictures[:100] - pictures[100:]).square().mean((1, 2, 3)).mean().sqrt())
    figure, axes = pyplot.subplot_mosaic("AB;CD;EE", figsize=(9, 8), height_ratios=(3, 3, 1), layout="constrained")
    left, right, lower_left, lower_right, below = axes.values()
    row = torch.cat([pixels, pictures[:10], pictures.mean(0, keepdim=True)]).cpu()
    below.imshow(rearrange(row, "n c h w -> h (n w) c").clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
    below.set_title("the image, ten reconstructions of it, the average of 200", fontsize=10)
    below.axis("off")
    for axis, measured, what in (
        (left, spread, "standard deviation of the ELBO, nats"),
        (lower_left, noise, "gradient: noise / signal"),
    ):
        axis.loglog(counts, measured.values(), marker="o", label="measured")
        axis.loglog(counts, [measured[1] / count**0.5 for count in counts], linestyle=":", label="1/√L")
        axis.set(xlabel="L, draws of z for each image", ylabel=what)
        axis.legend()
    right.semilogx(counts, value.values(), marker="o", label="ELBO: average of log weights")
    right.semilogx(counts, tight.values(), marker="s", label="importance-weighted: log of the average")
    right.set(xlabel="L, draws of z for each image", ylabel="value, nats")
    right.legend(loc="upper left", fontsize=8)
    lower_right.loglog(list(shared), list(shared.values()), marker="o")
    lower_right.set(
        xlabel=f"L, of {DECODINGS} decodings a step: {DECODINGS} / L images", ylabel="noise of the decoder's gradient"
    )
    most = counts[-1]
    sentences = [
        f"With one z the ELBO of one image is known to ±{spread[1]:.1f} nats, with 100 to ±{spread[100]:.2f}, with {most} to"
        f" ±{spread[most]:.2f}: the error falls as 1/√L, so {most} draws cost {most} times as much for"
        f" {spread[1] / spread[most]:.0f} times less noise. Over a batch of 64 images one z each leaves ±{spread[1] / 8:.1f}"
        " nats; that is why one is enough to train with.",
        f"The value does not depend on L: what is averaged are log-likelihoods, and an average of averages is the average,"
        f" {value[1]:.1f} nats. The logarithm of the average weight is another, tighter bound: it rises from {tight[1]:.1f} to"
        f" {tight[most]:.1f} nats.",
        f"The gradient behaves alike: that of one image's posterior has {noise[1]:.1f} times as much noise as signal with one z,"
        f" {noise[100]:.2f} with 100, {noise[most]:.2f} with {most}. At equal compute more images are better than more z: of"
        f" {DECODINGS} decodings a step, {DECODINGS // 16} images with 16 z each leave {shared[16] / shared[1]:.1f} times the"
        f" noise in the decoder's gradient that {DECODINGS} images with one z each leave, and one image with {DECODINGS} z"
        f" {shared[DECODINGS] / shared[1]:.0f} times.",
        f"Reconstructions of one image from different z differ by {apart:.3f} a pixel (root mean square), and each by"
        f" {error:.3f} from the image: alike, not the same. Their average is nearer to the image, {average:.3f}, because it is"
        " blurred: no z decodes to it, and its likelihood is not what the ELBO averages.",
    ]
    numbers = {
        "draws": TOTAL,
        "standard_deviation": spread,
        "elbo": value,
        "importance_weighted": tight,
        "gradient_noise": noise,
        "gradient_noise_of_a_step": shared,
        "rms_image_average_apart": [error, average, apart],
    }
    return Findings(sentences, numbers, figure)


def gradients_of_draws(trained: Trained, image: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of `count` draws z ~ q(z|x) of one image: log weights under N(0, I), L; their gradients with respect to the posterior's
    mean and log standard deviation, L 2·C·h·w; and z."""
    model = trained.autoencoder
    pixels = model.likelihood.scale(trained.on_device(image[None]))
    with torch.no_grad():
        (posterior,) = model.encode(trained.on_device(image[None]))
        mean, std = posterior["mean"], posterior["std"]
    torch.manual_seed(0)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with Progress("draws of z and their gradients", count, "draws") as progress:
        for start in range(0, count, CHUNK):
            noise = torch.randn(min(CHUNK, count - start), *mean.shape[1:], device=mean.device)
            z = (mean + std * noise).requires_grad_()
            log_joint = model.decode([z]).log_prob(pixels.expand(len(z), -1, -1, -1)) + trained.standard.log_prob([z])
            # Draws do not touch each other, so the gradient of their sum is the gradient of each.
            (gradient,) = torch.autograd.grad(log_joint.sum(), z)
            log_q = gaussian_log_prob(z, mean, std.log()).flatten(1).sum(1)
            # z = mean + std ε: log q(z|x) at its own draw falls with log std alone, by 1 each.
            of_posterior = torch.cat([gradient, gradient * std * noise + 1], 1).flatten(1)
            parts.append(((log_joint - log_q).detach(), of_posterior, z.detach()))
            progress.update(len(z))
    weights, gradients, z = (torch.cat(part) for part in zip(*parts))
    return weights, gradients, z


def gradient_noise_of_batches(trained: Trained, counts: list[int]) -> dict[int, float]:
    """The noise of the decoder's gradient over batches of DECODINGS / L training images with L draws of z each, for each L."""
    model, images = trained.autoencoder, trained.splits.train.images
    weights = list(model.decoder.parameters())
    noise = {}
    with Progress("gradients of batches", len(counts) * REPEATS, "batches") as progress:
        for count in counts:
            gradients = []
            for repeat in range(REPEATS):
                torch.manual_seed(repeat)
                batch = trained.on_device(images[torch.randint(len(images), (DECODINGS // count,))])
                made = draws(model, batch, count, {"standard": trained.standard.log_prob}, at_once=DECODINGS)
                gradient = torch.autograd.grad(elbo(made.log_weights("standard")).mean(), weights)
                gradients.append(torch.cat([part.flatten() for part in gradient]))
                progress.update(1)
            noise[count] = float(torch.stack(gradients).var(0).sum().sqrt())
    return noise


@torch.inference_mode()
def evidence(trained: Trained) -> Findings:
    """log p(x) of one typical image: naive Monte Carlo, the ELBO, the importance-weighted bound, against the number of z."""
    total = TOTAL // 10
    counts = [scale * 10**power for power in range(5) for scale in (1, 3) if scale * 10**power <= total]
    image = trained.typical()
    pixels = trained.on_device(image[None])
    priors = {"N(0, I)": trained.standard, "the learned prior": trained.learned}
    torch.manual_seed(0)
    made = draws(trained.autoencoder, pixels, total, {name: prior.log_prob for name, prior in priors.items()})
    log_likelihood = made.log_likelihood[:, 0]
    curves: dict[str, list[float]] = {}
    shares = {}
    for name, prior in priors.items():
        weights = made.log_weights(name)[:, 0]
        chunks = torch.arange(total, device=weights.device).split(CHUNK)
        with Progress(f"draws from {name}", total, "draws") as progress:
            explained = []
            for indices in chunks:
                explained.append(log_likelihoods(trained.autoencoder, pixels, prior.sample(indices, seed=0))[:, 0])
                progress.update(len(indices))
        naive = torch.cat(explained)
        curves[f"naive Monte Carlo, z from {name}"] = [float(importance_weighted_bound(naive[:count])) for count in counts]
        curves[f"importance-weighted bound, {name}"] = [float(importance_weighted_bound(weights[:count])) for count in counts]
        curves[f"ELBO, {name}"] = [float(weights.mean())] * len(counts)
        shares[name] = {
            "log_evidence": float(importance_weighted_bound(weights)),
            "explain": float((naive > log_likelihood.min()).double().mean()),
            "best_of_naive": float(naive.max()),
            "decades": (float(log_likelihood.mean()) - float(importance_weighted_bound(weights))) / math.log(10),
        }
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for name, values in curves.items():
        axis = axes[0 if name.startswith("naive") else 1]
        axis.semilogx(counts, values, marker=".", linestyle="--" if "ELBO" in name else "-", label=name)
    for axis, heading in zip(axes, ("z drawn blindly", "z proposed by the encoder")):
        axis.set(title=heading, xlabel="number of z", ylabel="estimate of log p(x), nats")
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    standard, learned = shares["N(0, I)"], shares["the learned prior"]
    typical = float(log_likelihood.mean())
    sentences = [
        f"A z from the image's own posterior explains it with log p(x|z) ≈ {typical:.0f} nats. Of {total} z from N(0, I),"
        f" {100 * standard['explain']:.2f} % explain it as well as the worst posterior draw does; the best of them reaches"
        f" {standard['best_of_naive']:.0f} nats. Most z explain nothing: that is what p(x) = ∫ p(x|z) p(z) dz averages over.",
        f"So the naive average would need about 10^{standard['decades']:.0f} draws from N(0, I) before one such z turns"
        f" up (the"
        f" difference of log p(x|z) and log p(x) is that many powers of ten). The encoder proposes it at once: with"
        f" {total} draws"
        f" from q(z|x) the importance-weighted bound gives log p(x) ≥ {standard['log_evidence']:.1f} nats.",
        f"Under the learned prior the same image has log p(x) ≥ {learned['log_evidence']:.1f} nats,"
        f" {learned['log_evidence'] - standard['log_evidence']:.1f} more, with the same decoder, and the naive way would"
        f" need about"
        f" 10^{learned['decades']:.0f} draws.",
    ]
    return Findings(sentences, {"z": counts, "curves": curves, "posterior_log_likelihood": typical, "priors": shares}, figure)


def mean_or_sample(trained: Trained) -> Findings:
    """E[f(z)] against f(E[z]), and the same network with a point for a posterior."""
    run, splits = trained.run, trained.splits
    config = replace(run.config.autoencoder, bottleneck=Deterministic(run.config.autoencoder.bottleneck.channels))  # type: ignore[union-attr]
    torch.manual_seed(0)
    point = config.build(splits.image_shape)
    folder = run.folder / "studies" / "point-posterior"
    examples = (run.examples(splits.train), splits.validation)
    fit(run.fabric, point, *examples, run.config.stage1, run.config.seed, folder, "point posterior")
    space = feature_space(run.fabric, run.config.metrics, splits, run.classifiers)
    images = trained.held_out(200)
    with torch.inference_mode():
        (posterior,) = trained.autoencoder.encode(trained.on_device(images))
        of_mean = trained.autoencoder.decode([posterior["mean"]]).mean
        torch.manual_seed(0)
        of_samples = [trained.autoencoder.decode(trained.autoencoder.sample([posterior])).mean for _ in range(100)]
        average = torch.stack(of_samples).mean(0)
        jensen = float((average - of_mean).square().mean().sqrt())
        spread = float((of_samples[0] - average).square().mean().sqrt())
        (codes,) = point.encode(trained.on_device(images))
        scale = {"VAE": posterior["mean"], "point posterior": codes["mean"]}
        standard = {name: float(values.std()) for name, values in scale.items()}
        noise = trained.standard.sample(torch.arange(16, device=run.fabric.device), seed=0)
        distance = {}
        for name, model in (("VAE", trained.autoencoder), ("point posterior", point)):
            draws = (trained.standard.sample(some, seed=0) for some in torch.arange(1000, device=run.fabric.device).split(CHUNK))
            fd = space.frechet_distance(torch.cat([model.render(z).cpu() for z in draws]), f"features of {name} samples")
            distance[name] = "unknown (too few images)" if fd is None else round(fd, 1)
        shown = [
            ("image", images[:16]),
            ("VAE: decode the mean", trained.autoencoder.render([posterior["mean"][:16]])),
            ("VAE: decode a sample", trained.autoencoder.render(trained.autoencoder.sample([posterior]))[:16]),
            ("VAE: z from N(0, I)", trained.autoencoder.render(noise)),
            ("point posterior: decode it", point.render([codes["mean"][:16]])),
            ("point posterior: z from N(0, I)", point.render(noise)),
        ]
        rate = float(gaussian_rate(posterior["mean"], posterior["std"].log()).mean())
    figure, axes = pyplot.subplots(len(shown), 1, figsize=(11, 0.6 * len(shown)))
    figure.subplots_adjust(left=0.22, right=0.995, top=0.99, bottom=0.01, hspace=0.06)
    for axis, (name, row) in zip(axes, shown):
        axis.imshow(torch.cat(list(row.cpu().movedim(1, -1)), 1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
        axis.set_title(name, x=-0.01, y=0.5, ha="right", va="center", fontsize=9)
        axis.axis("off")
    sentences = [
        f"E[f(z)] and f(E[z]) are two pictures: over 200 images they differ by {jensen:.4f} a pixel (root mean square, of"
        f" values in [0, 1]), while one f(z) differs from their average by {spread:.4f}. The decoder is trained on samples,"
        " not on means.",
        f"The posterior's noise is what the rate pays for: {rate:.0f} nats an image.",
        "The same network with a point for a posterior has no noise and no rate. Drawn from N(0, I), its samples lie at a"
        f" Fréchet distance of {distance['point posterior']}, those of the VAE at {distance['VAE']}: the rate alone does not make"
        " q(z) N(0, I).",
    ]
    return Findings(
        sentences,
        {
            "rms_mean_against_average": jensen,
            "rms_sample_against_average": spread,
            "std": standard,
            "rate": rate,
            "fd_of_standard": distance,
        },
        figure,
    )


def aggregate_posterior(trained: Trained) -> Findings:
    """q(z) against N(0, I): how the rate splits, how well each prior fits held-out latents, and what other networks change."""
    run, splits = trained.run, trained.splits
    swept = {name: swept_network(trained, *sizes) for name, sizes in SWEEP.items()}
    with torch.inference_mode():
        specs = run.specs(trained.autoencoder)
        train = run.encode_training(trained.autoencoder, splits.train)
        test = run.encode(trained.autoencoder, splits.test, "test")
        priors = {name: run.prior(name, specs) for name in ("standard", "gaussian", "mixture", "learned")}
        if (labels := splits.train.labels) is not None:
            priors["per label"] = gaussian_per_label(train, labels.repeat(len(train) // len(labels)), specs)
        rates = rates_of(run, test, priors)
        information = float(mutual_information(test, torch.arange(len(test)), seed=0).mean())
        (z,), _ = test[torch.arange(len(test))]
        flat = z.flatten(1)
    cap = math.log(len(test))
    figure, axes = pyplot.subplots(2, 3, figsize=(12.5, 7), layout="constrained")
    shown = {PRIOR_NAMES[name]: rates[name] for name in PRIOR_NAMES if name in rates}
    axes[0, 0].barh(list(shown), list(shown.values()))
    axes[0, 0].invert_yaxis()
    axes[0, 0].set(xlabel="rate of held-out images, nats")
    axes[0, 1].hist(flat.flatten(), bins=200, density=True, label="all latent numbers")
    grid = torch.linspace(-4, 4, 200)
    axes[0, 1].plot(grid, (-0.5 * grid.square()).exp() / math.sqrt(2 * math.pi), label="N(0, 1)")
    axes[0, 1].set(xlabel="z", xlim=(-5, 5))
    axes[0, 1].legend(fontsize=8)
    encoders = f"encoder: hidden layers × units, for {SWEEP[BY_ENCODER[0]][2]} latent numbers"
    for axis, names, what in ((axes[0, 2], BY_DIMENSIONS, "latent numbers"), (axes[1, 0], BY_ENCODER, encoders)):
        at = range(len(names))
        axis.bar(at, [swept[name].rate for name in names], color="0.85", label="rate")
        axis.vlines(at, [swept[name].least for name in names], [swept[name].most for name in names], linewidth=6, label="KL")
        axis.set(xticks=list(at), xticklabels=names, ylabel="nats", xlabel=what)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_title("KL(q(z) ‖ N(0, I)) lies on the bar", fontsize=10)
        axis.legend(fontsize=8)
    plane_of_images(trained, swept[PLANE], axes[1, 1], axes[1, 2])
    correlation = torch.corrcoef(flat.T).fill_diagonal_(0).nan_to_num().abs()
    few, many = (swept[name] for name in (BY_DIMENSIONS[0], BY_DIMENSIONS[-1]))
    small, large = (swept[name] for name in (BY_ENCODER[0], BY_ENCODER[-1]))
    per_label = f" {rates['per label']:.1f} under one Gaussian for each label," if "per label" in rates else ""
    sentences = [
        f"Under N(0, I) a held-out image costs a rate of {rates['standard']:.1f} nats. That is I(x; z) + KL(q(z) ‖ N(0, I)). Of"
        f" the {len(test)} held-out images alone, I is {information:.2f} nats and the KL"
        f" {rates['standard'] - information:.1f}; but an empirical I cannot exceed log {len(test)} = {cap:.2f}, so the KL of the"
        " true q(z) may be smaller.",
        f"On the same draws the rate is {rates['gaussian']:.1f} nats under one Gaussian with q(z)'s moments,{per_label}"
        f" {rates['mixture']:.1f} under a mixture of ten, {rates['learned']:.1f} under the learned prior. A prior that fits"
        " better than N(0, I) proves a KL at least as large as what it saves:"
        f" {rates['standard'] - min(rates.values()):.1f} nats.",
        f"Single latent numbers look normal (mean {float(flat.mean()):.2f}, standard deviation {float(flat.std()):.2f}); what"
        f" N(0, I) misses is how they hang together: the strongest correlation of two is {float(correlation.max()):.2f}, and the"
        " rest is not linear.",
        f"More latent numbers? In fully connected networks with {BY_DIMENSIONS[0]} the KL lies between {few.least:.2f} and"
        f" {few.most:.2f} nats of a rate of {few.rate:.1f}, with {BY_DIMENSIONS[-1]} between {many.least:.2f} and"
        f" {many.most:.2f} of {many.rate:.1f} (from below by the best of the fitted densities, from above by the empirical I of"
        f" these images alone); -ELBO {'falls' if many.loss < few.loss else 'rises'} from {few.loss:.1f} to {many.loss:.1f}. So"
        f" q(z) is {nearness(few, many)} N(0, I).",
        f"A larger encoder? At {SWEEP[BY_ENCODER[0]][2]} latent numbers the KL lies between {small.least:.2f} and"
        f" {small.most:.2f} nats with an encoder of {BY_ENCODER[0]} units, between {large.least:.2f} and {large.most:.2f} with"
        f" {BY_ENCODER[-1]}; -ELBO {'falls' if large.loss < small.loss else 'rises'} from {small.loss:.1f} to {large.loss:.1f}."
        f" What q(z) certainly misses N(0, I) by {'grows' if large.least > small.least else 'shrinks'}"
        f"{', and is not gone' if large.least > 0 else ''}.",
    ]
    numbers = {
        "rate": rates,
        "mutual_information": information,
        "log_n": cap,
        "sweep": {
            name: {
                "dimensions": sizes[2],
                "rate": of.rate,
                "kl_at_least": of.least,
                "kl_at_most": of.most,
                "negative_elbo": of.loss,
            }
            for (name, sizes), of in zip(SWEEP.items(), swept.values())
        },
    }
    return Findings(sentences, numbers, figure)


PRIOR_NAMES = {
    "standard": "N(0, I)",
    "gaussian": "one Gaussian",
    "per label": "a Gaussian per label",
    "mixture": "ten Gaussians",
    "learned": "learned prior",
}

# Fully connected networks: hidden layers and width of the encoder, latent numbers. The decoder is the same for all.
SWEEP = {
    "2 numbers": (2, 256, 2),
    "4 numbers": (2, 256, 4),
    "16 numbers": (2, 256, 16),
    "32 numbers": (2, 256, 32),
    "1 × 64": (1, 64, 8),
    "2 × 256": (2, 256, 8),
    "4 × 512": (4, 512, 8),
}
BY_DIMENSIONS = ["2 numbers", "4 numbers", "16 numbers", "32 numbers"]
BY_ENCODER = ["1 × 64", "2 × 256", "4 × 512"]
PLANE = "2 numbers"
SWEEP_FIT = FitConfig(steps=1500, batch_size=100, average_decay=0.99, checkpoint_steps=300)


@dataclass(frozen=True)
class Swept:
    """One network of the sweep, and what it makes of the held-out images, in nats an image."""

    model: Autoencoder
    latents: LatentDataset
    loss: float
    """-ELBO"""
    rate: float
    least: float
    """KL(q(z) ‖ N(0, I)) is no less: a fitted density saves as much on held-out latents"""
    most: float
    """nor is it more, of these images alone: the rate less the empirical I(x; z)"""


def nearness(few: Swept, many: Swept) -> str:
    """What the bounds on two KLs say of the second network's q(z), beside the first's."""
    if many.least > few.most:
        return "certainly farther from"
    return "certainly nearer to" if many.most < few.least else "not provably nearer to"


def swept_network(trained: Trained, layers: int, width: int, positions: int) -> Swept:
    """A fully connected VAE with an encoder of this size, trained on the run's images (grey levels as probabilities)."""
    run, splits = trained.run, trained.splits
    decoder = AutoencoderConfig(FullyConnected(2, 256, positions), Gaussian(channels=1), Bernoulli())
    torch.manual_seed(0)
    model = decoder.build(splits.image_shape)
    model.encoder, _ = FullyConnected(layers, width, positions).encoder(splits.image_shape)
    folder = run.folder / "studies" / f"fully-connected-{layers}x{width}-{positions}"
    label = f"encoder of {layers} × {width}, {positions} latent numbers"
    fit(run.fabric, model, splits.train, splits.validation, SWEEP_FIT, run.config.seed, folder, label)
    terms = evaluate(run.fabric, model, splits.test, CHUNK, 0)
    model.eval()
    specs = [LatentSpec(shape) for shape, _ in model.latents]
    train, test = (latent_dataset([encoded(run.fabric, model, part, label)]) for part in (splits.train, splits.test))
    priors: dict[str, Prior] = {name: CONTINUOUS_BASELINES[name](specs) for name in ("standard", "gaussian", "mixture")}
    torch.manual_seed(0)
    for prior in priors.values():
        prior.estimate(train)
    if splits.label_names:
        priors["per label"] = gaussian_per_label(train, splits.train.labels, specs)
    with torch.inference_mode():
        rates = rates_of(run, test, priors)
        information = float(mutual_information(test, torch.arange(len(test)), seed=0).mean())
    standard = rates["standard"]
    return Swept(model, test, terms["loss"], standard, standard - min(rates.values()), standard - information)


def rates_of(run: Run, latents: LatentDataset, priors: dict[str, Prior]) -> dict[str, float]:
    """E_q[log q(z|x) - log p(z)] under each prior over all images, at one draw of z each, the same for every prior."""
    torch.manual_seed(1)  # not the noise that priors were fitted to
    totals = dict.fromkeys(priors, 0.0)
    for prior in priors.values():
        run.fabric.to_device(prior)
    for start in range(0, len(latents), CHUNK):
        (posterior,) = run.fabric.to_device(latents.posteriors(slice(start, start + CHUNK)))
        z = draw(posterior)
        log_q = gaussian_log_prob(z, posterior["mean"], posterior["std"].log()).flatten(1).sum(1)
        for name, prior in priors.items():
            totals[name] += float((log_q - prior.log_prob([z])).sum())
    return {name: total / len(latents) for name, total in totals.items()}


def gaussian_per_label(latents: LatentDataset, labels: Tensor | None, specs: list[LatentSpec]) -> GaussianMixturePrior:
    """The mixture of one Gaussian for each label, of the moments of that label's q(z)."""
    assert labels is not None
    found = labels.unique()
    mixture = GaussianMixturePrior(specs, components=len(found))
    for component, label in enumerate(found):
        members = torch.nonzero(labels == label).squeeze(1)
        of_label = GaussianMixturePrior(specs, components=1)
        of_label.estimate(LatentDataset(latents.posteriors(members)))
        mixture.weights[component] = len(members) / len(labels)
        mixture.means[component], mixture.factors[component] = of_label.means[0], of_label.factors[0]
    return mixture


@torch.inference_mode()
def plane_of_images(trained: Trained, swept: Swept, scatter: Axes, plane: Axes) -> None:
    """Two latent numbers: the posteriors' means by label, and what the decoder makes of N(0, I), quantile by quantile."""
    points = swept.latents.posteriors(slice(None))[0]["mean"].flatten(1)
    labels = trained.splits.test.labels
    for label, name in enumerate(trained.splits.label_names) if labels is not None else [(0, "")]:
        of_label = points if labels is None else points[labels == label]
        scatter.scatter(of_label[:, 0], of_label[:, 1], s=4, linewidths=0, label=name)
    if labels is not None:
        scatter.legend(fontsize=7, loc="upper left", markerscale=3)
    for radius in (1, 2, 3):
        scatter.add_patch(pyplot.Circle((0, 0), radius, fill=False, linestyle=":"))
    scatter.set(xlim=(-5, 5), ylim=(-5, 5), aspect="equal")
    scatter.set_title("means of q(z|x) by label; circles: N(0, I) at 1, 2, 3 σ", fontsize=10)
    side = 15
    normal = torch.special.ndtri(torch.linspace(0.02, 0.98, side))
    z = torch.stack([normal.repeat(side), normal.flip(0).repeat_interleave(side)], 1)  # up is up
    images = swept.model.render([trained.on_device(z[:, None, None])]).cpu()
    grid = rearrange(images, "(r c) k h w -> (r h) (c w) k", r=side)
    plane.imshow(grid.expand(-1, -1, 3).numpy() if grid.shape[2] == 1 else grid.numpy())
    plane.set_title("the plane decoded, by quantiles of N(0, 1)", fontsize=10)
    plane.axis("off")


STUDIES: dict[str, Callable[[Trained], Findings]] = {
    "samples-per-image": samples_per_image,
    "mean-or-sample": mean_or_sample,
    "evidence": evidence,
    "aggregate-posterior": aggregate_posterior,
}


@dataclass(frozen=True)
class Arguments:
    """Answer a question about VAEs by running one."""

    study: tyro.conf.Positional[Literal["samples-per-image", "mean-or-sample", "evidence", "aggregate-posterior"]]
    """which question"""
    run: str = DEFAULT_PRESET
    """a run's name under checkpoints/, or its path; mnist5k is trained if it is not there"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""


def main(arguments: list[str] | None = None) -> None:
    asked = tyro.cli(Arguments, prog="python -m pipelines.study", args=arguments)
    if asked.run == DEFAULT_PRESET and not (CHECKPOINTS / DEFAULT_PRESET / "config.json").is_file():
        train_all(Run.create(CHECKPOINTS / DEFAULT_PRESET, preset(DEFAULT_PRESET), asked.device))
    run = Run.open(asked.run, asked.device)
    folder = run.folder / "studies"
    with run.locked():
        found = STUDIES[asked.study](Trained.of(run))
        write_file(folder / f"{asked.study}.png", png(found.figure))
        write_json(folder / f"{asked.study}.json", {"findings": found.sentences, **found.numbers})
    for sentence in found.sentences:
        say(f"\n{sentence}")
    say(f"\nplot and numbers: {folder / asked.study}.png, .json")


if __name__ == "__main__":
    run_command(main)
