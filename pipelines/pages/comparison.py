"""The comparison: one frozen decoder, every prior side by side.

The figures, all measured on the same number of images and against the training split:

    fd          Fréchet distance; kid, precision, recall, density, coverage: see quality.py
    nearer      share of held-out images that lie farther from the training set than a sample does: 1/2 without memorization
    nll         -E_q[log p(z)] of held-out images' latents under a prior, in nats an image
    gap_closed  (fd(standard) - fd(learned)) / (fd(standard) - fd(reconstruction)): 0 where the learned prior buys nothing,
                1 where its samples are as near to the data as the decoder's own reconstructions; gap_closed_guided of guided ones
"""

import math
import platform
import time
from typing import Any

import torch
from torch import Tensor

from pipelines import processes
from pipelines.console import say
from pipelines.data.images import Splits
from pipelines.files import read_json, write_json
from pipelines.judging.features import Classifier, Judge, feature_space, logits_of, trained_classifier
from pipelines.judging.likelihood import likelihood, rate_maps
from pipelines.judging.quality import intervals, nearest_neighbours
from pipelines.judging.tradeoffs import guidance, lowest_fd, rejection
from pipelines.pages.likelihood import as_table
from pipelines.pages.page import Picture, Section, chart_picture, images_picture, section, write_page
from pipelines.pages.plots import histogram, nearest_plot, picture, projections, rate_plot, tradeoff_plot, training_curves
from pipelines.pages.tables import write_csv
from pipelines.pages.words import drawn_from, generator, title
from pipelines.runs.config import RunConfig, to_dict
from pipelines.runs.latents import encode
from pipelines.runs.parts import load_autoencoder, specs_of, weights_of
from pipelines.runs.priors import densities, open_prior
from pipelines.runs.run import Run
from pipelines.runs.sampling import Samples, generate, pixel_noise
from pipelines.training import checkpoints
from stage1_vae.autoencoder import Autoencoder
from stage1_vae.bottlenecks import perplexity
from stage2_prior.autoregressive import LearnedPrior
from stage2_prior.conditions import Unconditional
from stage2_prior.latents import LatentDataset, LatentSpec
from stage2_prior.prior import Prior
from stage2_prior.sampling import Sampling

SHOWN = 16  # images in a row of the picture
GRID = 64  # samples shown on the page
POINTS = 1000  # draws in a scatter plot
NOT_A_GENERATOR = "not a generator: reconstructs training images"
NO_LEARNED_PRIOR = "none: this run was trained without a second stage (stage2.steps 0)"
BATCH = 500
FEW = 8  # draws of z an image for the likelihood; python -m pipelines.likelihood takes more


def compare(run: Run, splits: Splits, seed: int = 0) -> tuple[dict[str, Any], Section]:
    """Sample from every prior, measure, and write RUN/compare/: metrics.json, metrics.csv, timing.json, samples.png, page.html.

    Returns the metrics, and what the page says.
    """
    beginning = time.perf_counter()
    autoencoder = load_autoencoder(run)
    specs = specs_of(autoencoder)
    space = feature_space(run.fabric, run.config.metrics, splits, run.classifiers)
    count = min(run.config.metrics.images, len(splits.test))
    chosen = torch.randperm(len(splits.test), generator=torch.Generator().manual_seed(seed))[:count]
    latents = encode(run, autoencoder, splits.test, "test")
    told = None if latents.contexts is None or isinstance(run.condition, Unconditional) else latents.contexts[chosen]
    rows = {"real": splits.test.images[chosen], "reconstruction": reconstruct(run, autoencoder, latents, chosen)}
    priors = {name: open_prior(run, name, specs) for name in (*densities(run, specs), "posterior")}
    seconds, flat, warnings = {}, {}, []

    def sampled(row: str, prior: Prior, number: int = count, seed: int = seed, guided: float = 0.0) -> Samples:
        started = time.perf_counter()
        samples = generate(
            autoencoder,
            prior,
            number,
            seed=seed,
            device=run.fabric.device,
            how=Sampling(guidance=guided),
            contexts=told,
            pixels=run.config.metrics.pixels,
            label=f"sampling {row}",
        )
        seconds[row] = 1000 * (time.perf_counter() - started) / number
        if warning := samples.warning():
            warnings.append(f"{row}: {warning}")
        return samples

    for name, prior in priors.items():
        samples = sampled(name, prior)
        rows[name], flat[name] = samples.images, embedded(run, autoencoder, samples.levels)
    learned, strengths, best = priors.get("learned"), [], None
    if learned is not None and told is not None:
        few = math.ceil(count / 5) if space.withheld(count) else max(math.ceil(count / 5), space.fewest)
        strengths = guidance(space, lambda strength: sampled(f"guidance {strength:g}", learned, few, seed + 1, strength).images)
        best = lowest_fd(strengths)  # of other samples than those that are judged
        if best and best["guidance"]:
            rows["guided"] = sampled("guided", learned, guided=best["guidance"]).images
    features = {name: space.features(images, f"features of {name}") for name, images in rows.items()}
    learned_from = space.reference
    if run.config.mirror:  # a copy may be of either
        mirrored = space.features(splits.train.images, "features of the mirror images", mirror=True)
        learned_from = torch.cat([learned_from, mirrored])
    nearest_training = {name: nearest_neighbours(values, learned_from) for name, values in features.items()}
    judge = Judge(space, nearest_training["real"][0], seed)
    figures = {name: judge(values, nearest_training[name][0]) for name, values in features.items()}
    error = (rows["reconstruction"].double() - rows["real"].double()).div(255).square().mean()
    figures["reconstruction"]["mse"] = float(error)
    figures["posterior"]["note"] = NOT_A_GENERATOR
    metrics: dict[str, Any] = {name: figures[name] for name in ("real", "reconstruction")}
    metrics["priors"] = {name: row for name, row in figures.items() if name not in metrics}
    for name in priors:
        if name != "posterior" and autoencoder.bottleneck.has_density:
            metrics["priors"][name]["nll"] = latent_nll(run, priors[name], latents, chosen, seed)
    if not run.learned:
        metrics["priors"]["learned"] = {"note": NO_LEARNED_PRIOR}
    elif told is not None and splits.test.labels is not None:
        labels = splits.test.labels[chosen]
        reader = space.model if isinstance(space.model, Classifier) else classifier(run, splits, seed=0)
        for name, row in figures.items():
            if name in ("real", "reconstruction", "learned", "guided"):
                read = logits_of(run.fabric, reader, rows[name]).argmax(1)
                row["label_read"] = float((read == labels).float().mean())
        other = classifier(run, splits, seed=1)
        metrics["rejection"] = rejection(run, space, other, rows["learned"], features["learned"], labels)
    if strengths:
        metrics["guidance"] = strengths
    if best and "guided" in rows:
        figures["guided"]["guidance"] = best["guidance"]
    codes = [posterior["codes"] for posterior in latents.sample() if "codes" in posterior]
    if codes:
        metrics["codes"] = [code_report(level, spec) for level, spec in zip(codes, specs)]
    metrics |= verdict(metrics, judge.withheld.get("fd"))
    metrics["told"] = run.told if run.learned else None
    metrics["images"] = count
    metrics["images_of"] = {"reference": len(splits.train), "real": "test split", "reconstruction": "test split"}
    metrics["seed"] = seed
    metrics["weights"] = weights_of(run)
    metrics["features"] = space.description
    metrics["intervals"] = intervals(space.model.dimensions)
    metrics["withheld"] = judge.withheld
    metrics["warnings"] = warnings
    metrics["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    folder = run.folder / "compare"
    (folder / "metrics.json").unlink(missing_ok=True)  # with it, a comparison is finished
    picture(folder / "samples.png", {name: images[:SHOWN] for name, images in rows.items()}, metrics)
    shown = pictures(run, splits, metrics, rows, flat, nearest_training, codes, specs)
    if len(specs) == 1 and not codes and count > 1:
        shown.insert(2, interpolations(run, autoencoder, latents, chosen))
    tables = []
    if autoencoder.bottleneck.has_density:
        metrics["likelihood"] = likelihood(run, splits, images=BATCH, samples=FEW, naive=0, seed=seed)
        tables.append(as_table(metrics["likelihood"]))
    if autoencoder.bottleneck.has_density and isinstance(learned, LearnedPrior):
        maps = rate_maps(run, latents, learned, chosen[:BATCH], seed)
        caption = f"Nats of the rate of {len(chosen[:BATCH])} held-out images at each position of the latent grid, on average."
        shown.append(chart_picture("Where the rate lies", caption, rate_plot(maps, metrics)))
    described = section(run.folder.name, metrics, seconds, shown, to_dict(run.config), tables)
    write_csv(folder / "metrics.csv", {run.folder.name: metrics})
    write_json(folder / "timing.json", {"seconds_per_1000_images": seconds, "seconds": time.perf_counter() - beginning})
    write_page(folder / "page.html", [described], metrics["versions"])
    write_json(folder / "metrics.json", metrics)
    return metrics, described


def pictures(
    run: Run,
    splits: Splits,
    metrics: dict[str, Any],
    rows: dict[str, Tensor],
    flat: dict[str, Tensor],
    nearest_training: dict[str, tuple[Tensor, Tensor]],
    codes: list[Tensor],
    specs: list[LatentSpec],
) -> list[Picture]:
    """What the page shows of a run."""
    titles = {name: title(name, metrics) for name in rows}
    made = []
    for name in rows:
        if name in ("standard", "learned", "guided"):
            caption = f"The first {min(len(rows[name]), GRID)} drawn under seed {metrics['seed']}, not chosen."
            made.append(images_picture(f"Samples: {titles[name]}", caption, rows[name][:GRID]))
    pairs = torch.stack([rows["real"][:SHOWN], rows["reconstruction"][:SHOWN]]).flatten(0, 1)
    made.append(images_picture("Reconstructions", "Held-out images above, their reconstructions below.", pairs))
    name = generator(metrics)
    samples, (_, indices) = rows[name][:SHOWN], nearest_training[name]
    caption = (
        f"Samples drawn from {drawn_from(metrics)} above, below them the training images nearest in the features that images are"
        " compared in: copies would be the same image twice."
    )
    mirrored, indices = indices[:SHOWN] >= len(splits.train), indices[:SHOWN] % len(splits.train)
    found = splits.train.images[indices]
    both = torch.cat([samples, torch.where(mirrored[:, None, None, None], found.flip(-1), found)])
    made.append(images_picture("Nearest training images", caption, both))
    distances_of = {titles[row]: nearest_training[row][0] for row in ("real", name, "posterior")}
    caption = (
        "How far images lie from the training set: the share that is nearer than a distance. Copies lie left of held-out images,"
        " as reconstructions of training images do; what resembles no image lies right of them."
    )
    made.append(chart_picture("Memorization", caption, nearest_plot(distances_of)))
    for name in rows:
        if name not in ("standard", "learned", "guided", "reconstruction"):
            made.append(images_picture(titles[name], f"{SHOWN} images.", rows[name][:SHOWN]))
    if min(flat["posterior"].shape) > 1:
        caption = "Grey: latents of real images, q(z), on its first two principal components. Blue: draws from the prior."
        made.append(chart_picture("Where each prior puts z", caption, projections(flat, titles)))
    if codes:
        made.append(chart_picture("Use of the codes", "Over the whole test split.", histogram(codes, specs)))
    if metrics.get("guidance"):
        caption = f"Samples of the learned prior, pushed toward the {metrics['told']} by classifier-free guidance; 0 is none."
        figure = tradeoff_plot(metrics["guidance"], "guidance", "strength of guidance")
        made.append(chart_picture("Diversity traded for fidelity: guidance", caption, figure))
    if metrics.get("rejection"):
        caption = "Of the learned prior's samples, the share that a second classifier is surest of; judged by the first."
        figure = tradeoff_plot(metrics["rejection"], "kept", "share of samples kept")
        made.append(chart_picture("Diversity traded for fidelity: rejection", caption, figure))
    stages = [stage for stage in ("stage1", "stage2", "refined") if (run.folder / stage).is_dir()]
    histories = {stage: checkpoints.usable(run.folder / stage)[-1].record["history"] for stage in stages}
    made.append(chart_picture("Training", "Loss in nats an image, over steps.", training_curves(histories)))
    return made


@torch.inference_mode()
def embedded(run: Run, autoencoder: Autoencoder, levels: list[Tensor]) -> Tensor:
    """The first latents as the decoder reads them, flattened: POINTS D, on the CPU."""
    first = [level[:POINTS].to(run.fabric.device) for level in levels]
    return autoencoder.bottleneck.embed(first).flatten(1).cpu()


@torch.inference_mode()
def interpolations(run: Run, autoencoder: Autoencoder, latents: LatentDataset, chosen: Tensor) -> Picture:
    """Straight lines in z between the posteriors' means of pairs of held-out images, of which there are two or more."""
    pairs = min(3, len(chosen) // 2)
    posteriors = run.fabric.to_device(latents.posteriors(chosen[: 2 * pairs]))
    (z,) = autoencoder.mean(posteriors)
    share = torch.linspace(0, 1, SHOWN, device=z.device)[None, :, None, None, None]
    between = torch.lerp(z[:pairs, None], z[pairs:, None], share).flatten(0, 1)
    caption = "From one held-out image to another along a straight line in z: what lies between is not always an image."
    return images_picture("Interpolations", caption, autoencoder.render([between]).cpu())


@torch.inference_mode()
def reconstruct(run: Run, autoencoder: Autoencoder, latents: LatentDataset, chosen: Tensor) -> Tensor:
    """What the decoder makes of a sample z ~ q(z|x), as generation decodes samples; uint8 N C H W."""

    def reconstructed(batch: Tensor) -> Tensor:
        posteriors = run.fabric.to_device(latents.posteriors(batch))
        torch.manual_seed(int(batch[0]))
        noise = pixel_noise(run.config.metrics.pixels, 0, run.fabric.to_device(batch), autoencoder.image_shape)
        return autoencoder.render(autoencoder.sample(posteriors), noise).cpu()

    return torch.cat(processes.in_batches(reconstructed, chosen, BATCH, "reconstructing"))


@torch.inference_mode()
def latent_nll(run: Run, prior: Prior, latents: LatentDataset, chosen: Tensor, seed: int) -> float:
    """-E_q[log p(z)] in nats an image, over one z ~ q(z|x) of each chosen image; the same draws for every prior."""

    def nats(batch: Tensor) -> float:
        torch.manual_seed(seed + int(batch[0]))
        levels, contexts = run.fabric.to_device(latents[batch])
        return -float(prior.log_prob(levels, contexts).sum())

    return sum(processes.in_batches(nats, chosen, BATCH, "likelihood of latents")) / len(chosen)


def classifier(run: Run, splits: Splits, seed: int) -> Classifier:
    return trained_classifier(run.fabric, run.config.metrics, splits, run.classifiers, seed)[0]


def code_report(codes: Tensor, spec: LatentSpec) -> dict[str, Any]:
    """How many codes of one level are used over the whole test split, and the perplexity of their use."""
    assert spec.vocabulary is not None
    counts = torch.bincount(codes.flatten(), minlength=spec.vocabulary).double()
    return {
        "grid": spec.grid,
        "codes": spec.vocabulary,
        "used": int((counts > 0).sum()),
        "perplexity": float(perplexity(counts)),
    }


def verdict(metrics: dict[str, Any], withheld: str | None) -> dict[str, Any]:
    """gap_closed, or null with the reason, and gap_closed_guided where there are guided samples.

    withheld: why there is no Fréchet distance.
    """
    if "fd" not in metrics["priors"]["learned"]:
        return {"gap_closed": None, "gap_closed_reason": metrics["priors"]["learned"]["note"]}
    if withheld is not None:
        return {"gap_closed": None, "gap_closed_reason": f"no Fréchet distance of {withheld}"}
    priors = metrics["priors"]
    standard = priors["standard"]["fd"]
    gap = standard - metrics["reconstruction"]["fd"]
    # The distance of real held-out images is what sampling error alone costs: a gap below it cannot be told from noise.
    if gap <= max(metrics["real"]["fd"], 0.0):
        reason = f"{title('standard', metrics)} is no worse than the reconstructions, beyond sampling error"
        return {"gap_closed": None, "gap_closed_reason": reason}
    closed = {name: (standard - priors[name]["fd"]) / gap for name in ("learned", "guided") if name in priors}
    return {"gap_closed": closed.pop("learned")} | {f"gap_closed_{name}": value for name, value in closed.items()}


def compared(run: Run, splits: Splits) -> dict[str, Any]:
    """The metrics of the comparison that the run's config asks for, made unless it is there."""
    path = run.folder / "compare" / "metrics.json"
    metrics, weights = read_json(path) if processes.on_first(path.exists) else {}, weights_of(run)
    if metrics and asked_for(metrics, run.config, weights):
        say("compare: finished, skipped")
    else:
        metrics, _ = compare(run, splits)
    return metrics


def asked_for(metrics: dict[str, Any], config: RunConfig, weights: dict[str, str]) -> bool:
    """Whether a comparison is of these weights, and not one made with another --seed or --metrics.extractor."""
    by_inception = metrics["features"]["extractor"].startswith("inception")
    as_configured = metrics["seed"] == 0 and by_inception == (config.metrics.extractor == "inception")
    return as_configured and metrics.get("weights", weights) == weights  # of an earlier version there are none
