"""Does a likelihood tell which images are unusual?"""

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from pipelines.data.images import ImageSet
from pipelines.judging.scores import Scorer, Usual, auroc, every
from pipelines.studies.trained import Findings, Trained

COUNT = 500  # images of each kind
NOISE = 50  # grey levels, standard deviation


def unusual_images(trained: Trained) -> Findings:
    """Held-out images changed in several ways, and how well each score distinguishes them from those that are not."""
    scorer = Scorer.of(trained.run)
    held_out = trained.held_out(2 * COUNT)
    reference, images = held_out[: len(held_out) // 2], held_out[len(held_out) // 2 :]
    usual = Usual.of(scorer(ImageSet(reference)))
    patched, patch = exchanged(images)
    kinds = {**changed(images), "patch of another": patched}
    found = {name: scorer(ImageSet(some), f"scoring: {name}") for name, some in {"held out": images, **kinds}.items()}
    values = {name: every(scores, usual.distance(scores)) for name, scores in found.items()}
    aurocs = {name: {way: auroc(own, values[name][way]) for way, own in values["held out"].items()} for name in kinds}
    finest = usual.excess(found["patch of another"])[-1]
    inside = torch.nn.functional.interpolate(patch[None, None].float(), finest.shape[1:], mode="area")[0, 0] > 0.5
    places = auroc(finest[:, ~inside].flatten(), finest[:, inside].flatten())
    sentences = [
        f"By their bits, -log₂ p(x), {in_words('bits', aurocs)}",
        f"By the bits of z alone, {in_words('bits of z', aurocs)}",
        "By how far the bits of z, of x given z and of the PNG file lie from those of held-out images, in either direction, as"
        f" python -m pipelines.score orders images, {in_words('all three', aurocs)}",
        f"Where a patch came from another image, the map of the bits of z finds the patch with an AUROC of {places:.2f} over"
        " positions.",
    ]
    return Findings(sentences, {"auroc": aurocs, "auroc_of_places": places, "images": len(images)}, plotted(kinds, aurocs))


def in_words(score: str, aurocs: dict[str, dict[str, float]]) -> str:
    ordered = sorted((values[score], name) for name, values in aurocs.items())
    (least, hardest), (most, easiest) = ordered[0], ordered[-1]
    below = [name for value, name in ordered if value < 0.5]
    more = f" Below 0.5, {' and '.join(below)} images count as more usual than real ones." if below else ""
    return f"changed images are told from held-out ones with an AUROC of {least:.2f} ({hardest}) to {most:.2f} ({easiest}).{more}"


def changed(images: Tensor) -> dict[str, Tensor]:
    """Images uint8 N C H W, changed in ways that a viewer sees; none is of the kind that the model was trained on."""
    generator = torch.Generator().manual_seed(0)
    noise = NOISE * torch.randn(images.shape, generator=generator)
    order = torch.randperm(images.shape[2] * images.shape[3], generator=generator)
    grey = images.float().mean((1, 2, 3), keepdim=True).round().to(torch.uint8).expand_as(images)
    return {
        "inverted": 255 - images,
        "noisy": (images + noise).round().clamp(0, 255).to(torch.uint8),
        "blurred": gaussian_blur(images, [9, 9], [2.0, 2.0]),
        "uniformly grey": grey,
        "upside down": images.flip(2),
        "of shuffled pixels": images.flatten(2)[:, :, order].view_as(images),
    }


def exchanged(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images with the middle replaced by another image's, and where that is, H W."""
    _, _, height, width = images.shape
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[height // 3 : 2 * height // 3, width // 3 : 2 * width // 3] = True
    return torch.where(inside, images.roll(1, 0), images), inside


def plotted(kinds: dict[str, Tensor], aurocs: dict[str, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(11, 0.6 * len(kinds) + 1))
    pictures, axis = figure.subplots(1, 2, width_ratios=(1, 1.4))
    rows = [torch.cat([*some[:8].movedim(1, -1)], 1) for some in kinds.values()]
    picture = torch.cat(rows).numpy()
    pictures.imshow(picture if picture.shape[-1] == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=255, aspect="auto")
    pictures.axis("off")
    table = torch.tensor([[*aurocs[name].values()] for name in kinds])
    axis.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axis.set_xticks(range(table.shape[1]), list(next(iter(aurocs.values()))))
    axis.set_yticks(range(len(kinds)), list(kinds))
    for row, values in enumerate(table.tolist()):
        for column, value in enumerate(values):
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", color="black")
    axis.set_title("AUROC against held-out images")
    figure.tight_layout()
    return figure
