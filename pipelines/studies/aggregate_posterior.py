"""Is q(z) really N(0, I)?"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from pipelines.files import digest_of
from pipelines.judging.likelihood import mutual_information
from pipelines.pages.plots import COLOURS, plain
from pipelines.runs.dataset import read_facts
from pipelines.runs.latents import encode, encode_training, encoded, latent_dataset
from pipelines.runs.parts import specs_of
from pipelines.runs.priors import open_prior
from pipelines.runs.run import Run
from pipelines.studies.trained import CHUNK, Findings, Trained
from pipelines.training.config import FitConfig
from pipelines.training.fit import evaluate, fit
from stage1_vae.autoencoder import Autoencoder, AutoencoderConfig
from stage1_vae.bottlenecks import Gaussian
from stage1_vae.likelihoods import Bernoulli
from stage1_vae.networks import FullyConnected
from stage2_prior.baselines import CONTINUOUS_BASELINES
from stage2_prior.gaussians import GaussianMixturePrior
from stage2_prior.heads import gaussian_log_prob
from stage2_prior.latents import LatentDataset, LatentSpec, draw
from stage2_prior.prior import Prior


def aggregate_posterior(trained: Trained) -> Findings:
    """q(z) against N(0, I): how the rate splits, how well each prior fits held-out latents, and what other networks change."""
    run, splits = trained.run, trained.splits
    swept = {name: swept_network(trained, *sizes) for name, sizes in SWEEP.items()}
    with torch.inference_mode():
        specs = specs_of(trained.autoencoder)
        train = encode_training(run, trained.autoencoder, splits.train)
        test = encode(run, trained.autoencoder, splits.test, "test")
        priors = {name: open_prior(run, name, specs) for name in ("standard", "gaussian", "mixture")}
        priors["learned"] = trained.learned
        if (labels := splits.train.labels) is not None:
            priors["per label"] = gaussian_per_label(train, labels.repeat(len(train) // len(labels)), specs)
        rates = rates_of(run, test, priors)
        information = float(mutual_information(test, torch.arange(len(test)), seed=0).mean())
        (z,), _ = test[torch.arange(len(test))]
        flat = z.flatten(1)
    cap = math.log(len(test))
    figure = Figure(figsize=(12.5, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    shown = [name for name in PRIOR_NAMES if name in rates]
    colours = [COLOURS.get(name, "tab:green") for name in shown]  # green: a Gaussian for each label, which is no row's
    axes[0, 0].barh([PRIOR_NAMES[name] for name in shown], [rates[name] for name in shown], color=colours)
    axes[0, 0].invert_yaxis()
    axes[0, 0].set(xlabel="rate of held-out images, nats")
    axes[0, 1].hist(flat.flatten(), bins=200, density=True, color=COLOURS["posterior"], label="all latent numbers")
    grid = torch.linspace(-4, 4, 200)
    axes[0, 1].plot(grid, (-0.5 * grid.square()).exp() / math.sqrt(2 * math.pi), color=COLOURS["standard"], label="N(0, 1)")
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
    correlation = torch.atleast_2d(torch.corrcoef(flat.T)).fill_diagonal_(0).nan_to_num().abs()  # of one number it has no axis
    few, many = (swept[name] for name in (BY_DIMENSIONS[0], BY_DIMENSIONS[-1]))
    small, large = (swept[name] for name in (BY_ENCODER[0], BY_ENCODER[-1]))
    per_label = f" {rates['per label']:.1f} under one Gaussian for each label," if "per label" in rates else ""
    sentences = [
        f"Under N(0, I) a held-out image costs a rate of {rates['standard']:.1f} nats. That is I(x; z) + KL(q(z) ‖ N(0, I)). Of"
        f" the {len(test)} held-out images alone, I is {information:.2f} nats and the KL"
        f" {rates['standard'] - information:.1f}; but an empirical I cannot exceed log {len(test)} = {cap:.2f}, so the KL of the"
        " true q(z) may be smaller.",
        f"On the same draws the rate is {rates['gaussian']:.1f} nats under one Gaussian with q(z)'s moments,{per_label}"
        f" {rates['mixture']:.1f} under the mixture, {rates['learned']:.1f} under the learned prior. A prior that fits"
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
        f" So the lower bound on the KL {'grows' if large.least > small.least else 'shrinks'}"
        f"{', and stays above 0' if large.least > 0 else ''}.",
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
    "mixture": "mixture of Gaussians",
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
    name = f"fully-connected-{layers}x{width}-{positions}"
    settings = repr((decoder, SWEEP_FIT, run.config.seed, read_facts(run).content))
    folder = run.work / "studies" / f"{name}-{digest_of([settings.encode()])[:8]}"
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
    mixture = GaussianMixturePrior(specs, len(found))
    for component, label in enumerate(found):
        members = torch.nonzero(labels == label).squeeze(1)
        of_label = GaussianMixturePrior(specs, 1)
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
        scatter.scatter(of_label[:, 0], of_label[:, 1], s=4, linewidths=0, label=plain(name))
    if labels is not None:
        scatter.legend(fontsize=7, loc="upper left", markerscale=3)
    for radius in (1, 2, 3):
        scatter.add_patch(Circle((0, 0), radius, fill=False, linestyle=":"))
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
