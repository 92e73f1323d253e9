"""What each tab of the explorer shows of a trained run, without a browser.

N images, C colour channels, H×W pixels. Every function raises UserError, in one sentence, where the run lacks what it needs.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pipelines.console import UserError
from pipelines.data.decoding import opaque
from pipelines.data.images import ImageSet, Splits
from pipelines.judging.compare import nearest_training_images
from pipelines.judging.comparison import title
from pipelines.judging.features import FeatureSpace, feature_space
from pipelines.judging.quality import nearest_neighbours
from pipelines.judging.scores import Scorer, Usual
from pipelines.judging.tradeoffs import described, has_weaker, takes_guidance
from pipelines.pages.scores import BRIGHTEST, heat
from pipelines.runs.completion import with_hidden_grey
from pipelines.runs.conditions import remarks_on
from pipelines.runs.dataset import background_of, drawn_alike, load_data, read_facts
from pipelines.runs.latents import training_latents
from pipelines.runs.priors import WithoutContext
from pipelines.training.order import evenly
from pipelines.two_stage import TwoStage
from stage2_prior.sampling import Sampling

TILES = 20  # images of the decoded plane, along either side
POINTS = 4000  # latents shown on the plane
OUTSIDE = 0.002  # share of latents beyond either edge of the plane
HELD_OUT = 1000  # held-out images, at most, that say which scores are usual
NEIGHBOUR_BYTES = 2**30  # of training images, at most, that the nearest is looked for among


@dataclass(frozen=True)
class Strip:
    """Pictures in a row with a heading, and what is to say of them."""

    heading: str
    images: Tensor | None
    """uint8 N C H W; None where there are none, and the note says why"""
    note: str = ""


@dataclass(frozen=True)
class Plane:
    """Two latent numbers as a picture: x to the right, y upward."""

    low: Tensor
    """the lower left corner, 2"""
    high: Tensor
    """the upper right corner, 2"""
    images: Tensor
    """the plane decoded, TILES rows from the top of TILES images each, uint8 N C H W"""
    points: Tensor
    """means of q(z|x) of training images, N 2; none where their latents are not there"""
    labels: Tensor | None
    """of the points, N; None where they are not known"""

    def at(self, x: float, y: float) -> Tensor:
        """The latent numbers, 2, at a place in the picture: shares of its width and height, from the upper left corner."""
        return torch.lerp(self.low, self.high, torch.tensor([x, 1 - y], dtype=torch.float32))


class Views:
    """A trained run, as the explorer shows it. What takes long to load is loaded when it is first asked for, and kept."""

    def __init__(self, model: TwoStage):
        """Raises UserError where stage 2 is not finished; a run without a learned prior is shown with the others."""
        self.model, self.run = model, model.run
        if self.run.learned:
            model.prior("learned")

    @cached_property
    def loading(self) -> Future[Splits]:
        """The data on their way: they are loaded beside what else is done."""
        return ThreadPoolExecutor(1).submit(load_data, self.run)

    @property
    def data(self) -> Splits:
        """Raises UserError where they are not there; asked again, they are looked for again."""
        try:
            return self.loading.result()
        except UserError:
            vars(self).pop("loading", None)
            raise

    @property
    def guided(self) -> bool:
        """Whether guidance has a meaning."""
        return takes_guidance(self.model.prior("learned") if self.run.learned else None)

    @property
    def autoguided(self) -> bool:
        """Whether there is a weaker copy of the learned prior to be led away from."""
        return has_weaker(self.model.prior("learned") if self.run.learned else None)

    @cached_property
    def plane(self) -> Plane:
        return plane_of(self)

    @cached_property
    def space(self) -> FeatureSpace:
        data, run = self.data, self.run
        return feature_space(run.fabric, replace(run.config.metrics, extractor="classifier"), data, run.classifiers)

    @cached_property
    def scorer(self) -> Scorer:
        return Scorer.of(self.run)

    @cached_property
    def usual(self) -> Usual:
        """What scores of held-out images are like."""
        test = self.data.test
        return Usual.of(self.scorer(test.subset(evenly(len(test), HELD_OUT)), "scoring held-out images"))

    def remarks(self, caption: str | None) -> str:
        """What of a caption the prior does not see."""
        return "; ".join(remarks_on(self.run, [] if caption is None else [caption]))

    def draw(self, count: int, seed: int, how: Sampling, label: str | None, caption: str | None) -> list[Strip]:
        """The same seeds under each prior, the learned one first; label, caption and `how` are of the learned one."""
        model, strips = self.model, []
        codes = model.specs[0].vocabulary is not None
        for name in reversed(model.priors):
            own = {"label": label, "caption": caption, **vars(how)} if name == "learned" else {}
            heading = f"learned prior, {described(how)}" if name == "learned" else title(name, codes)
            try:
                note = self.remarks(caption) if name == "learned" else ""
                strips.append(Strip(heading, model.sample(count, prior=name, seed=seed, **own), note))
            except UserError as error:
                if name == "learned":
                    raise
                if strips and strips[-1].note == str(error):  # that there are no images to fit them to
                    heading = f"{strips.pop().heading}, {heading}"
                strips.append(Strip(heading, None, str(error)))
        return strips

    def under(self, x: float, y: float) -> list[Strip]:
        """The image at a place in the picture of the plane, as shares of its width and height from the upper left corner."""
        z = self.plane.at(x, y)
        level = z.view(1, *self.model.specs[0].shape)
        with torch.inference_mode():
            nats = {
                title(name, False): float(WithoutContext(self.model.prior(name)).log_prob([level.to(self.model.device)]))
                for name in self.model.priors
            }
        densities = ", ".join(f"{value:.1f} under {name}" for name, value in nats.items())
        return [Strip(f"z = ({z[0]:.2f}, {z[1]:.2f})", self.model.decode([level]), f"log p(z): {densities}")]

    def held_out(self, number: int) -> Tensor:
        """A held-out image by its number, uint8 C H W."""
        images = self.data.test.images
        if not 0 <= number < len(images):
            raise UserError(f"there is no held-out image {number}; they are numbered from 0 to {len(images) - 1}")
        return images[torch.tensor([number])][0]

    def check_line(self) -> None:
        """Raises UserError where there is no line between latents."""
        if self.model.specs[0].vocabulary is not None:
            raise UserError(f"the latents of {self.run.name} are codes, between which there is no line; take a run with a VAE")

    def walk(self, start: Tensor, end: Tensor, steps: int) -> list[Strip]:
        """Along the straight line in z between the posteriors' means of two images, uint8 C H W each."""
        self.check_line()
        (z,) = self.model.encode(torch.stack([start, end]))
        share = torch.linspace(0, 1, steps)[:, None, None, None]
        images = self.model.decode([torch.lerp(z[:1], z[1:], share)])
        return [
            Strip("from", start[None]),
            Strip("between their latents", images, "The first and the last are reconstructions."),
            Strip("to", end[None]),
        ]

    def complete(
        self, picture: Tensor, hidden: Tensor, count: int, particles: int, seed: int, label: str | None, caption: str | None
    ) -> list[Strip]:
        """The hidden part, boolean H W, of a picture, uint8 C H W, drawn anew; each of `count` is chosen among `particles`."""
        if not hidden.any():
            raise UserError("nothing is painted over: paint the part that is to be drawn anew")
        messages: list[str] = []
        made = self.model.complete(
            picture, ~hidden, count, label=label, caption=caption, seed=seed, particles=particles, tell=messages.append
        )
        given = with_hidden_grey(picture, ~hidden)[None]
        note = "; ".join(filter(None, (self.remarks(caption), messages[-1])))
        return [Strip("what is kept", given), Strip("the rest drawn anew, under the learned prior", made, note)]

    def nearest(self, count: int, seed: int, how: Sampling, label: str | None, caption: str | None) -> list[Strip]:
        """Samples of the learned prior, and below each the training image that is nearest: in pixels and in features."""
        data = self.data
        samples = self.model.sample(count, seed=seed, label=label, caption=caption, **vars(how))
        rows = evenly(len(data.train), max(1, NEIGHBOUR_BYTES // (4 * samples[0].numel())))
        some = "" if len(rows) == len(data.train) else f" Looked for among {len(rows)} training images, evenly spaced."
        pixels, drawn = (part.flatten(1).float().div_(255) for part in (data.train.images[rows], samples))
        _, places = nearest_neighbours(drawn, pixels)
        # What the search gives is rounded: a copy is not quite at 0.
        by_pixels = (drawn - pixels[places]).norm(dim=1), rows[places]
        distances, places = nearest_neighbours(self.space.features(samples, "features of the samples"), self.space.reference)
        by_features = distances, self.space.numbers(places)
        strips = [Strip("samples of the learned prior", samples, self.remarks(caption))]
        for where, (distances, found), note in (("pixels", by_pixels, some), ("a classifier's features", by_features, "")):
            listed = ", ".join(f"{number} ({distance:.2g})" for number, distance in zip(found.tolist(), distances.tolist()))
            images = nearest_training_images(data, found)
            strips.append(Strip(f"nearest in {where}", images, f"Their numbers, and how far they are: {listed}.{note}"))
        return strips

    def score(self, picture: Tensor) -> list[Strip]:
        """How unusual a picture is, uint8 C H W, and where: its bits at each position, beside held-out images'."""
        given = drawn_alike(self.run, ImageSet(picture[None]))
        scores, usual, shown = self.scorer(given), self.usual, given.images[:]
        size = (picture.shape[1], picture.shape[2])
        maps = [heat(level, size) for level in usual.excess(scores)]
        percent = float(100 * usual.more_usual(usual.distance(scores)))
        verdict = f"More unusual than {percent:.0f} % of {len(usual.distances)} held-out images"
        order = " From the coarse grid to the fine one." if len(maps) > 1 else ""
        again = self.model.decode(self.model.encode(shown))
        return [
            Strip("the picture, and its reconstruction", torch.cat([shown, again]), f"{verdict}: {scores.in_words(0)}."),
            Strip(
                "where its bits of z lie",
                torch.cat(maps),
                f"Bright: more bits than in held-out images, up to {BRIGHTEST:g} standard deviations.{order}",
            ),
        ]


@torch.inference_mode()
def plane_of(views: Views) -> Plane:
    """Raises UserError where the latents are not two numbers."""
    model = views.model
    spec = model.specs[0]
    if spec.vocabulary is not None or spec.dimensions != 2:
        size = " + ".join(str(spec.dimensions) for spec in model.specs)
        kind = "numbers" if spec.vocabulary is None else "codes"
        raise UserError(f"{views.run.name} has {size} latent {kind}, and a plane two numbers: choose the run mnist5k-2d")
    labels = None
    try:
        rows = evenly(read_facts(views.run).images["train"], POINTS)  # mirror images, which come after, have no labels
        points = training_latents(views.run, model.specs).posteriors(rows)[0]["mean"].flatten(1)
        low, high = points.quantile(OUTSIDE, 0), points.quantile(1 - OUTSIDE, 0)
    except UserError:
        points, low, high = torch.empty(0, 2), torch.full((2,), -3.0), torch.full((2,), 3.0)
    try:
        known = views.data.train.labels
        labels = None if known is None or not len(points) else known[rows]
    except UserError:
        pass
    middles = (torch.arange(TILES) + 0.5) / TILES
    plane = Plane(low, high, torch.empty(0), points, labels)
    z = torch.stack([plane.at(float(x), float(y)) for y in middles for x in middles])
    return replace(plane, images=model.decode([z.view(-1, *spec.shape)]))


def hidden_part(model: TwoStage, picture: str, layers: Sequence[str]) -> tuple[Tensor, Tensor]:
    """A picture as the model takes it, uint8 C H W, and which of its pixels are painted over, boolean H W.

    picture: a file; layers: files of what is painted over it, of the same size, transparent elsewhere. A pixel is painted over
    where any part of it is. Of a picture that was enlarged in whole pixels, these are its own.
    """
    channels, height, width = model.image_shape
    hidden = torch.zeros(height, width, dtype=torch.bool)
    for layer in layers:
        with Image.open(layer) as image:
            alpha = image.convert("RGBA").getchannel("A").point(lambda value: 255 * (value > 0))
            share = ImageOps.fit(alpha, (width, height), Image.Resampling.BOX)
        hidden |= torch.from_numpy(np.array(share)) > 0
    pixels = model.read(picture)
    with Image.open(picture) as image:
        shown = opaque(image, background_of(model.run), {})
        large = np.array(shown.convert("L" if channels == 1 else "RGB"))
    times = large.shape[0] // height
    if large.shape[:2] == (times * height, times * width):
        small = large[::times, ::times]
        if (small.repeat(times, 0).repeat(times, 1) == large).all():
            pixels = torch.tensor(small).view(height, width, channels).movedim(-1, 0)
    return pixels, hidden
