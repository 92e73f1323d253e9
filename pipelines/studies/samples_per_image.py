"""How many z for each image? What is averaged?"""

import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor

from pipelines.console import Progress
from pipelines.studies.trained import CHUNK, Findings, Trained
from stage1_vae.bounds import draws, elbo, grouped, importance_weighted_bound
from stage2_prior.heads import gaussian_log_prob

TOTAL = 100_000  # draws of z of one image
DECODINGS, REPEATS = 256, 12  # of a training step; steps whose gradients are compared


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
    figure = Figure(figsize=(9, 8), layout="constrained")
    axes = figure.subplot_mosaic("AB;CD;EE", height_ratios=(3, 3, 1))
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
    """The log weights of `count` draws z ~ q(z|x) of one image under N(0, I), L; their gradients with respect to the posterior's
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
