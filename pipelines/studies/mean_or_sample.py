"""Decode the posterior's mean, or a sample?"""

from dataclasses import replace

import torch
from matplotlib.figure import Figure

from pipelines.judging.features import feature_space
from pipelines.studies.trained import CHUNK, Findings, Trained
from pipelines.training.fit import fit
from stage1_vae.bottlenecks import Deterministic, gaussian_rate


def mean_or_sample(trained: Trained) -> Findings:
    """E[f(z)] against f(E[z]), and the same network with a point for a posterior."""
    run, splits = trained.run, trained.splits
    config = replace(run.config.autoencoder, bottleneck=Deterministic(run.config.autoencoder.bottleneck.channels))  # type: ignore[union-attr]
    torch.manual_seed(0)
    point = config.build(splits.image_shape)
    folder = run.work / "studies" / "point-posterior"
    fit(run.fabric, point, splits.train, splits.validation, run.config.stage1, run.config.seed, folder, "point posterior")
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
    figure = Figure(figsize=(11, 0.6 * len(shown)))
    figure.subplots_adjust(left=0.22, right=0.995, top=0.99, bottom=0.01, hspace=0.06)
    for axis, (name, row) in zip(figure.subplots(len(shown), 1), shown):
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
