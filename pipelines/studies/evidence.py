"""How can one z explain an image, and what does p(x) = ∫ p(x|z) p(z) dz cost to estimate?"""

import math

import torch
from matplotlib.figure import Figure

from pipelines.console import Progress
from pipelines.pages.plots import COLOURS
from pipelines.studies.trained import CHUNK, Findings, Trained
from stage1_vae.bounds import draws, importance_weighted_bound, log_likelihoods

TOTAL = 10_000  # draws of z


@torch.inference_mode()
def evidence(trained: Trained) -> Findings:
    """log p(x) of one typical image: naive Monte Carlo, the ELBO, the importance-weighted bound, against the number of z."""
    counts = [scale * 10**power for power in range(5) for scale in (1, 3) if scale * 10**power <= TOTAL]
    image = trained.typical()
    pixels = trained.on_device(image[None])
    priors = {"N(0, I)": trained.standard, "the learned prior": trained.learned}
    torch.manual_seed(0)
    made = draws(trained.autoencoder, pixels, TOTAL, {name: prior.log_prob for name, prior in priors.items()})
    log_likelihood = made.log_likelihood[:, 0]
    curves: dict[str, list[float]] = {}
    shares = {}
    for name, prior in priors.items():
        weights = made.log_weights(name)[:, 0]
        chunks = torch.arange(TOTAL, device=weights.device).split(CHUNK)
        with Progress(f"draws from {name}", TOTAL, "draws") as progress:
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
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, values in curves.items():
        axis = axes[0 if name.startswith("naive") else 1]
        colour = COLOURS["standard" if name.endswith("N(0, I)") else "learned"]
        axis.semilogx(counts, values, color=colour, marker=".", linestyle="--" if "ELBO" in name else "-", label=name)
    for axis, heading in zip(axes, ("z drawn blindly", "z proposed by the encoder")):
        axis.set(title=heading, xlabel="number of z", ylabel="estimate of log p(x), nats")
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    typical = float(log_likelihood.mean())
    sentences = said(typical, shares["N(0, I)"], shares["the learned prior"])
    return Findings(sentences, {"z": counts, "curves": curves, "posterior_log_likelihood": typical, "priors": shares}, figure)


def said(typical: float, standard: dict[str, float], learned: dict[str, float]) -> list[str]:
    """The findings in words. typical: log p(x|z) of z from the image's posterior, the mean in nats."""
    sentences = [
        f"A z from the image's own posterior explains it with log p(x|z) ≈ {typical:.0f} nats. Of {TOTAL} z from N(0, I),"
        f" {100 * standard['explain']:.2f} % explain it as well as the worst posterior draw does; the best of them reaches"
        f" {standard['best_of_naive']:.0f} nats."
    ]
    if rare(standard):
        sentences[0] += " Most z explain nothing: that is what p(x) = ∫ p(x|z) p(z) dz averages over."
        sentences.append(
            f"So the naive average would need {naive_draws(standard)} from N(0, I) before one such z turns up (the difference of"
            " log p(x|z) and log p(x) is that many powers of ten). The encoder proposes it at once."
        )
    else:
        sentences.append(
            "So z from N(0, I) explain this image about as well as those that the encoder proposes: the latents of this model"
            " say little of it, as those of a short training do."
        )
    gain = learned["log_evidence"] - standard["log_evidence"]
    more = f"{abs(gain):.1f} {'more' if gain >= 0 else 'less'}"
    return [
        *sentences,
        f"With {TOTAL} draws from q(z|x) the importance-weighted bound gives log p(x) ≥ {standard['log_evidence']:.1f} nats.",
        f"Under the learned prior the same image has log p(x) ≥ {learned['log_evidence']:.1f} nats, {more},"
        f" with the same decoder, and the naive way would need {naive_draws(learned)}.",
    ]


def rare(share: dict[str, float]) -> bool:
    """Whether a z that explains the image is rare under a prior, less than one of three draws."""
    return share["decades"] > 0.5


def naive_draws(share: dict[str, float]) -> str:
    """How many draws from a prior the naive average needs; below one there is no such number."""
    return f"about 10^{share['decades']:.0f} draws" if rare(share) else "only a few draws"
