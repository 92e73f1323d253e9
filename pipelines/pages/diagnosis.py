"""What limits a run, what to do next, and which figures of its comparison are not reliable. All of it is computed."""

import shlex

from pipelines.data.own import FOR_FIGURES, OwnImages, share_for_figures
from pipelines.judging.comparison import Comparison, Row
from pipelines.judging.features import ALIKE, is_weak
from pipelines.judging.published import Inception
from pipelines.judging.quality import ENOUGH
from pipelines.judging.tradeoffs import FEW_PER_FEATURE
from pipelines.pages.words import cell
from pipelines.runs.dataset import place_of_own_images, read_facts
from pipelines.runs.run import Run
from stage2_prior.autoregressive import AutoregressiveConfig, CascadeConfig
from stage2_prior.conditions import Cluster, Unconditional
from stage2_prior.transformer import TransformerConfig

FEW_IMAGES = 1000  # for training
CRUDE = ("standard", "gaussian", "unigram", "order2")  # priors whose samples no figure should prefer to reconstructions
COLLAPSED = 0.02  # of the codes, the perplexity below which they count as collapsed


def diagnosis(run: Run, comparison: Comparison) -> list[str]:
    """Sentences: what limits first, then whether stage 2 has learned, what the data allow, and which figures do not count."""
    health = health_line(comparison)
    return [
        limit(run, comparison),
        *([] if health is None else [health]),
        *learning(run, comparison),
        *data(run, comparison),
        *flags(comparison),
    ]


def limit(run: Run, comparison: Comparison) -> str:
    """Whether the decoder limits, or the prior, or another prior is better than the learned one."""
    real, reconstruction = comparison.real, comparison.reconstruction
    best = comparison.recommended
    if best is None or real.fd is None or reconstruction.fd is None:
        reason = comparison.withheld.get("fd", "there are too few images")
        more = "" if reason == ALIKE else more_held_out(run)
        return f"What limits this run cannot be told without a Fréchet distance: {reason}.{more}"
    row = comparison.priors[best]
    assert row.fd is not None
    decoder, prior = reconstruction.fd - real.fd, row.fd - reconstruction.fd
    where = f"real images lie at {cell(real, 'fd')}, reconstructions at {cell(reconstruction, 'fd')}"
    samples = f"samples drawn from {comparison.title(best)} at {cell(row, 'fd')}"
    if comparison.generator == "learned" and best not in ("learned", "tuned"):
        return (
            f"Another prior is better than the learned one: {samples}, from the learned prior at"
            f" {cell(comparison.priors['learned'], 'fd')}. Draw with --prior {best}; or train another prior on the"
            f" same decoder: {another_prior(run, comparison)}"
        )
    if decoder > max(prior, error(reconstruction, real)):
        finer = "a finer grid or more channels under another --run"
        idle = comparison.health is not None and comparison.health.gains_nothing
        prior_too = "" if idle else " A better prior cannot help much."  # then `learning` says to train it longer
        advice = f"Train stage 1 longer: {longer(run, 'stage1')}; or give it {finer}."
        return f"The decoder limits: {where}, {samples}.{prior_too} {advice}"
    if prior > error(row, reconstruction):
        if comparison.generator == "standard":
            return f"The prior limits: {where}, {samples}. Train a prior on the same decoder: {another_prior(run, comparison)}"
        health, advice = comparison.health, f"Train stage 2 longer: {longer(run, 'stage2')}"
        if health is not None and health.best_step < health.last_step:
            advice = f"More steps do not help: the held-out loss was lowest at step {health.best_step} of {health.last_step}"
        return (
            f"The prior limits: {where}, {samples}. {advice}. Another prior on the same decoder: {another_prior(run, comparison)}"
        )
    return f"By these figures, neither the decoder nor the prior limits: {where}, {samples}."


def more_held_out(run: Run) -> str:
    """How a run of the user's own images gets a Fréchet distance, where they are enough; else nothing."""
    if not isinstance(run.config.data, OwnImages):
        return ""
    split = read_facts(run).images
    share = share_for_figures(sum(split.values()))
    if share is None or split["test"] >= FOR_FIGURES:
        return ""
    return f" A new run with --data.test-share {share} holds out enough, unless the images have a test split of their own."


def error(one: Row, other: Row) -> float:
    """The error of the difference of two Fréchet distances."""
    return (one.plus_minus.get("fd", 0.0) ** 2 + other.plus_minus.get("fd", 0.0) ** 2) ** 0.5


def longer(run: Run, phase: str) -> str:
    """The command that trains a phase for twice as many steps."""
    return with_setting(run, f"{phase}.steps", 2 * getattr(run.config, phase).steps)


def with_setting(run: Run, setting: str, value: int) -> str:
    """The command that goes on with a run under another setting; of an export, which is only read, a new run of its config."""
    words = ["python", "-m", "pipelines.train_all"]
    if run.exported:
        words += ["--config", str(run.folder / "config.json"), *where_of(run), "--run", f"{run.title}-2"]
    else:
        words += ["--run", run.name]
    return shlex.join([*words, f"--{setting}", str(value)])


def where_of(run: Run) -> list[str]:
    """The option that names the images of an export, where its config cannot."""
    place = place_of_own_images(run)
    return [] if place is None else ["--data.root", str(place)]


def another_prior(run: Run, comparison: Comparison) -> str:
    """The command that trains one on the same decoder: with labels where there are some, of another kind, or the first at all."""
    prior, labels = run.config.prior, comparison.commonest is not None
    if not run.learned:
        kind = "--stage2.steps 2000"
    elif not isinstance(prior, AutoregressiveConfig | CascadeConfig):
        kind = "--prior autoregressive"
    elif isinstance(prior.condition, Unconditional | Cluster) and labels:
        kind = "--prior.condition class-label"
    elif isinstance(prior.condition, Unconditional):
        kind = "--prior.condition cluster"
    else:
        part = "prior.top.backbone" if isinstance(prior, CascadeConfig) else "prior.backbone"
        kind = f"--{part} {'pixelsnail' if isinstance(prior.top.backbone, TransformerConfig) else 'transformer'}"
    words = ["--stage1-from", run.name, *where_of(run), *kind.split(), "--run", f"{run.title}-2"]
    return shlex.join(["python", "-m", "pipelines.train_all", *words])


def health_line(comparison: Comparison) -> str | None:
    """Nats under the learned prior beside those of the others, and training beside held out; None without a density."""
    found, learned = comparison.health, comparison.priors.get("learned")
    if found is None or learned is None:
        return None
    others = {"standard", found.rival, "gaussian", "unigram"} & comparison.priors.keys()
    ordered = [name for name in comparison.priors if name in others]
    beside = ", ".join(f"{cell(comparison.priors[name], 'nll')} under {comparison.title(name)}" for name in ordered)
    return (
        f"stage 2: {cell(learned, 'nll')} nats an image of held-out latents under the {comparison.prior}, {beside}."
        f" Loss {found.training:.1f} in training, {found.held_out:.1f} held out, at step {found.best_step} of {found.last_step}."
    )


def learning(run: Run, comparison: Comparison) -> list[str]:
    """Whether stage 2 overfits or gains nothing, and whether codes have collapsed."""
    lines, found = [], comparison.health
    for level in comparison.codes:
        if level.perplexity < max(2.0, COLLAPSED * level.codes):
            height, width = level.grid
            lines.append(
                f"The codes on the {height}×{width} grid have collapsed: {level.codes} codes have a perplexity of"
                f" {level.perplexity:.1f}. Use fewer, or --autoencoder.bottleneck finite-scalar, under another --run."
            )
    if found is None:
        return lines
    if found.overfits:
        lines.append(
            f"The learned prior overfits: its held-out loss was lowest at step {found.best_step} of {found.last_step}, and"
            f" {found.lost:.1f} nats higher at the end. The weights of step {found.best_step} are used. More images or more"
            " dropout help, more steps do not."
        )
    if found.gains_nothing:
        rival = ("" if found.rival == "standard" else "the ") + comparison.title(found.rival)
        lines.append(
            f"The learned prior is no better than {rival}: it saves {found.gain:.1f} ± {found.plus_minus:.1f} nats an image."
            f" Train it longer: {longer(run, 'stage2')}"
        )
    return lines


def data(run: Run, comparison: Comparison) -> list[str]:
    lines = []
    if comparison.images_of.reference < FEW_IMAGES:
        lines.append(
            f"There are only {comparison.images_of.reference} training images: all figures are rough, and a prior overfits early."
            " More images help most; --mirror doubles them where left and right may be exchanged."
        )
    if weak(comparison):
        command = with_setting(run, "metrics.classifier.steps", 2 * run.config.metrics.classifier.steps)
        judged = min(comparison.images, comparison.images_of.reference)
        published = "; or use --metrics.extractor inception" if judged > Inception.dimensions else ""
        lines.append(f"{weak(comparison)} Train it longer: {command}{published}.")
    return lines


def weak(comparison: Comparison) -> str:
    """What to say of a classifier that is little better than always guessing the commonest label; empty where it is good."""
    accuracy, commonest = comparison.features.accuracy, comparison.commonest
    if accuracy is None or commonest is None or not is_weak(accuracy, commonest):
        return ""
    return (
        f"The classifier is weak: its accuracy on test images is {100 * accuracy:.1f} %, and always guessing the commonest label"
        f" reaches {100 * commonest:.1f} %. Distances in its features say little."
    )


def flags(comparison: Comparison) -> list[str]:
    """Figures that fail a check."""
    lines = []
    if comparison.images < ENOUGH:
        lines.append(f"Too few held-out images, {comparison.images} of at least {ENOUGH}: the figures there are may be chance.")
    reconstruction, rows = comparison.reconstruction, comparison.priors
    apart = [  # both fd are withheld, or none
        name
        for name in CRUDE
        if name in rows and (rows[name].fd or 0.0) - (reconstruction.fd or 0.0) > 3 * error(rows[name], reconstruction)
    ]
    for figure, better in (("kid", -1), ("precision", 1), ("density", 1)):
        of_best = getattr(reconstruction, figure)
        scores = {name: getattr(rows[name], figure) for name in apart}
        fooled = [name for name, score in scores.items() if None not in (score, of_best) and better * (score - of_best) >= 0]
        for name in fooled[-1:]:
            lines.append(
                f"{figure}: does not count here. {comparison.title(name)} scores {cell(rows[name], figure)}, reconstructions"
                f" {cell(reconstruction, figure)}, though fd tells them apart."
            )
    if weak(comparison) and any(row.label_read is not None for row in comparison.rows.values()):
        lines.append("label accuracy: does not count here, since the classifier is weak.")
    tuned = comparison.priors.get("tuned")
    tried = [point for point in comparison.sampling if point.sampling is not None]
    if tuned is not None and tried and tried[0].images < FEW_PER_FEATURE * comparison.features.dimensions:
        lines.append(
            f"{comparison.title('tuned')}: chosen by only {tried[0].images} samples in {comparison.features.dimensions} features;"
            " other samples may choose otherwise."
        )
    if max(comparison.gap_closed or 0.0, comparison.gap_closed_tuned or 0.0) > 1:
        lines.append(
            "gap closed: above 1, because samples score better than the decoder's own reconstructions: by chance, or because fd"
            " rewards typical images. Read it as 1."
        )
    return lines
