"""A trained run in Python: sample, encode, decode, complete, evaluate.

N images, C colour channels, H×W pixels, c latent channels, h×w latent grid. Tensors are taken and returned on the CPU.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from pipelines.arguments import check_choice, check_from_one, check_numbers, check_whole, what_is
from pipelines.console import UserError, check_seed, counted, say
from pipelines.data.given import Given
from pipelines.data.images import ImageSet
from pipelines.runs.completion import completions, known_pixels, picture_to_complete
from pipelines.runs.conditions import asked_of_each, contexts_asked
from pipelines.runs.config import RunConfig, with_settings
from pipelines.runs.dataset import background_of, load_data, read_facts, write_given
from pipelines.runs.names import Dtype, Pixels, preset_name
from pipelines.runs.options import DEFAULTS, Options
from pipelines.runs.parts import check_density, load_autoencoder, specs_of
from pipelines.runs.priors import WithoutContext, open_prior, prior_names
from pipelines.runs.recipes import parts_of, preset
from pipelines.runs.run import GIVEN, Run, folder_of
from pipelines.runs.sampling import generate
from stage1_vae.bounds import draws, importance_weighted_bound
from stage2_prior.autoregressive import LearnedPrior
from stage2_prior.conditions import LabelCondition
from stage2_prior.prior import Prior
from stage2_prior.sampling import CannotSample, Sampling

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from pipelines.judging.comparison import Comparison
    from pipelines.judging.scores import Scores

PIXELS = get_args(Pixels)
BATCH = 500  # images encoded or judged at once
DTYPES = get_args(get_args(Dtype)[0])


class TwoStage:
    """Both stages of a trained run.

        from pipelines import TwoStage
        model = TwoStage.open("mnist5k")
        images = model.sample(16, label="3", seed=0)  # uint8, 16 1 28 28

    Wrong arguments raise UserError, a ValueError whose message says what to do.
    """

    def __init__(self, run: Run, dtype: Dtype = "float32"):
        """dtype: precision of the learned prior's backbone; its densities and the decoder stay float32.

        Raises UserError for a run whose stage 1 is not finished.
        """
        check_choice(dtype, DTYPES, "precision")
        self.run, self.dtype = run, getattr(torch, dtype)
        with own_random_state(self.device):
            self.autoencoder = load_autoencoder(run)
        self.specs = specs_of(self.autoencoder)
        """the shape of each level of latents, coarse to fine"""
        self.opened: dict[str, Prior] = {}

    @classmethod
    def open(cls, name: str | Path, device: str = "auto", dtype: Dtype = "float32") -> "TwoStage":
        """Open a run: a name under checkpoints/, a trained model that comes with the software, a path, or hub:owner/name.

        device: auto, cpu, cuda or mps. dtype: see `__init__`.
        """
        return cls(Run.open(str(name), str(device)), dtype)

    @classmethod
    def train(
        cls,
        config: str | RunConfig,
        run: str | None = None,
        settings: Mapping[str, Any] | None = None,
        options: Options = DEFAULTS,
        *,
        dataset: "Dataset[Any] | None" = None,
        held_out: "Dataset[Any] | None" = None,
    ) -> "TwoStage":
        """Train both stages of a run, or continue it where it is not finished, as `python -m pipelines.train_all` does.

        config: the name of a preset, such as "mnist5k-vqvae", or a config. run: a name under checkpoints/, or a path; the
        preset's name when None. settings: values that replace those of the config, by dotted path, such as {"stage2.steps": 500}.

        dataset: training images in place of the config's data: a torch Dataset of images, or of pairs of an image and a class
        number. An image is a Pillow image, or a tensor C H W or H W with 1 or 3 channels, uint8 or floats from 0 to 1; all images
        have the same size. held_out: the test images, likewise; a tenth of the dataset when None. Both are copied to the run's
        folder, where every command finds them. A preset whose prior is conditioned on labels needs class numbers.

        Raises UserError where the run has begun with another config, or a setting does not exist or has another type.

        The paths and URLs in the config are trusted, and a URL may be a shell command (`pipe:`). Read a config that comes from
        someone else before you pass it.
        """
        if isinstance(config, str):
            run = preset_name(*parts_of(config)) if run is None else run
            config = preset(config)
        if run is None:
            raise UserError("a config has no name: give the run one, as in train(config, 'name')")
        config = with_settings(config, settings or {})
        from pipelines.runs.phases import train  # slow to import, and drawing needs none of it

        folder = folder_of(run)
        if dataset is not None:
            config = replace(config, data=Given((folder / GIVEN).absolute()))
        made = Run.create(folder, config, options.device)
        if dataset is not None:
            write_given(made, dataset, held_out)
        train(made, options)
        return cls(made)

    def __repr__(self) -> str:
        channels, height, width = self.image_shape
        latents = " and ".join("×".join(map(str, spec.shape)) for spec in self.specs)
        kind = "latents" if self.specs[0].vocabulary is None else "codes"
        given = f", conditioned on the {self.run.conditioned_on}" if self.run.conditioned_on else ""
        return f"TwoStage({self.run.name}: images {channels}×{height}×{width}, {kind} {latents}{given})"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C H W."""
        return self.autoencoder.image_shape

    @property
    def labels(self) -> list[str]:
        """Names of the data set's labels; empty where it has none."""
        return read_facts(self.run).label_names

    @property
    def captions(self) -> list[str]:
        """Some captions of training images, where the prior is conditioned on captions; else empty."""
        return read_facts(self.run).caption_examples if self.run.conditioned_on == "caption" else []

    @property
    def priors(self) -> list[str]:
        """Names of the priors that can be sampled, the learned one last."""
        return prior_names(self.run, self.specs)

    @property
    def tuned(self) -> dict[str, Any]:
        """The settings that the comparison of the run draws the learned prior best with: `model.sample(**model.tuned)`.

        Empty for a run that was not compared, or where none are better than as fitted. Guidance toward a caption needs one.
        """
        from pipelines.judging.comparison import comparison_file, read_comparison  # slow to import
        from pipelines.judging.tradeoffs import departures, has_weaker

        if not self.run.learned or not (path := comparison_file(self.run)).is_file():
            return {}
        try:
            found = read_comparison(path)
        except UserError:  # it says how the images compare, and is not needed to draw them
            return {}
        return departures(found.tuned(has_weaker(self.prior("learned"))))

    def prior(self, name: str = "learned") -> Prior:
        """A prior by name; it is loaded once. Raises UserError for an unknown name."""
        if not isinstance(name, str):
            raise UserError(f"a prior is asked for by its name, not by {name!r}")
        if name not in self.opened:
            with own_random_state(self.device):
                prior = open_prior(self.run, name, self.specs)
            if isinstance(prior, LearnedPrior):
                for level in prior.levels:
                    for one in (level, level.weaker):
                        if one is not None:
                            one.backbone.to(self.dtype)
            self.opened[name] = prior
        return self.opened[name]

    def sample(
        self,
        count: int = 64,
        *,
        prior: str = "learned",
        label: str | int | Sequence[str | int] | None = None,
        caption: str | Sequence[str] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        guidance: float = 0.0,
        autoguidance: float = 0.0,
        seed: int = 0,
        pixels: Pixels = "mean",
        keep_best: float = 1.0,
        batch_size: int = 256,
    ) -> Tensor:
        """Sample latents from a prior and decode them; uint8 N C H W.

        Image i of a seed does not depend on the count, unless `keep_best` chooses among them.

        prior: learned; standard, which is N(0, I) or uniform codes; another of `priors`; or posterior, which reconstructs
            training images
        label: name or number of a label, for all images, or a list with one for each; drawn as often as in training when None
        caption: likewise, for a prior conditioned on captions; sampled without a caption when None
        temperature, top_k, top_p, guidance, autoguidance: see `Sampling`
        pixels: decode to the mean of p(x|z), or to a sample from it
        keep_best: rejection sampling: draw count / keep_best images, and keep those that a classifier assigns to their label most
            confidently
        batch_size: images sampled at once
        Raises UserError for an argument that makes no sense for the prior.
        """
        check_from_one(count=count, batch_size=batch_size)
        check_whole("the seed", seed)
        check_choice(pixels, PIXELS, "way to draw pixels")
        check_numbers(keep_best=keep_best)
        if not 0 < keep_best <= 1:
            raise UserError(f"keep-best is a share above 0 and at most 1, not {keep_best}")
        how, drawn = sampling(temperature, top_k, top_p, guidance, autoguidance), math.ceil(count / keep_best)
        contexts = self.contexts(drawn, prior, label, caption)  # before a prior is fitted, which can take minutes
        network = self.prior(prior)
        if guidance and isinstance(network, LearnedPrior) and self.run.conditioned_on == "caption" and not caption:
            raise UserError("guidance goes toward a caption: say which")
        if keep_best < 1:
            if not isinstance(network.given_condition, LabelCondition):
                raise UserError(
                    "keep-best needs a learned prior conditioned on labels: a classifier compares each image with its label"
                )
            if contexts is None:
                contexts = network.draw_contexts(torch.arange(drawn, device=self.device), seed)
        samples = generate(
            self.autoencoder,
            network,
            drawn,
            seed=seed,
            device=self.device,
            batch_size=batch_size,
            how=how,
            contexts=contexts,
            pixels=pixels,
        )
        if warning := samples.warning():
            say(f"warning: {warning}")
        if keep_best < 1:
            from pipelines.judging.features import (  # slow to import, and seldom needed
                label_log_prob,
                rejection_sampled,
                trained_classifier,
            )

            assert contexts is not None
            run = self.run
            with own_random_state(self.device):
                classifier, _ = trained_classifier(run.fabric, run.config.metrics, load_data(run), run.classifiers, seed=1)
            labels = contexts.cpu()
            confidence = label_log_prob(run.fabric, classifier, samples.images, labels)
            return samples.images[rejection_sampled(confidence, labels, keep_best)][:count]
        return samples.images.clone()  # no tensor of the inference mode, which could not be changed in place

    def conditions(
        self,
        count: int,
        *,
        label: str | int | Sequence[str | int] | None = None,
        caption: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> list[str]:
        """The condition of each image that `sample` returns for the same arguments: a label's name, or a caption. Empty for an
        unconditional prior."""
        check_from_one(count=count)
        check_whole("the seed", seed)
        if caption is not None:
            return asked_of_each(self.run, count, label, caption) or []
        prior, contexts = self.prior("learned"), self.contexts(count, "learned", label, caption)
        if contexts is None and isinstance(prior.given_condition, LabelCondition):
            contexts = prior.draw_contexts(torch.arange(count, device=self.device), seed)
        return [] if contexts is None else [self.labels[number] for number in contexts.tolist()]

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Encode images to latents: the mean of q(z|x), or codes.

        images: uint8 N C H W. Returns one tensor for each level, coarse to fine: float N c h w, or int64 codes N h w.
        `model.autoencoder.encode` returns q(z|x) itself.
        """
        parts = [self.autoencoder.mean(self.autoencoder.encode(batch.to(self.device))) for batch in self.batches(images)]
        return [torch.cat(level).cpu() for level in zip(*parts)]

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """Decode latents to the mean of p(x|z), uint8 N C H W. latents: one tensor for each level, as `encode` returns them."""
        wanted = f"latents are a list of {counted(len(self.specs), 'tensor')}, one for each level"
        if not isinstance(latents, Sequence) or not all(isinstance(level, Tensor) for level in latents):
            raise UserError(f"{wanted}, not {what_is(latents)}")
        if len(latents) != len(self.specs):
            raise UserError(f"{wanted}, not {len(latents)}")
        for spec, level in zip(self.specs, latents):
            if level.shape != (len(latents[0]), *spec.shape) or (spec.vocabulary is None) != level.dtype.is_floating_point:
                expected = ", ".join(map(str, (len(latents[0]), *spec.shape)))
                raise UserError(f"a level of latents has the shape ({expected}), not {tuple(level.shape)} of {level.dtype}")
            if spec.vocabulary is not None and level.numel() and not 0 <= int(level.min()) <= int(level.max()) < spec.vocabulary:
                raise UserError(f"codes are numbers from 0 to {spec.vocabulary - 1}")
        dtypes = [torch.float32 if spec.vocabulary is None else torch.int64 for spec in self.specs]
        batches = zip(*(level.to(self.device, dtype).split(BATCH) for level, dtype in zip(latents, dtypes)))
        return torch.cat([self.autoencoder.render(list(batch)).cpu() for batch in batches])

    @torch.no_grad()
    def log_likelihood(
        self,
        images: Tensor,
        samples: int = 16,
        *,
        prior: str = "learned",
        label: str | int | Sequence[str | int] | None = None,
        caption: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> Tensor:
        """The importance-weighted bound on log p(x) of each image, N, in nats (Burda et al. 2016). Higher is better.

        images: uint8 N C H W. samples: draws of z for each image; 1 gives the ELBO, and codes have a single z. label, caption: as
        in `sample`; the bound is then on log p(x|label). Without a label, p(x) is the mixture over labels; without a caption, it
        is conditioned on the empty caption. Most decoders give a density of pixels, not a probability of 8-bit images:
        `python -m pipelines.likelihood` says which. Raises UserError where the encoder has no density q(z|x).
        """
        check_from_one(samples=samples)
        check_whole("the seed", seed)
        check_seed(seed)  # which torch takes here
        self.check_some(images)
        check_density(self.run, self.autoencoder)
        contexts, network = self.contexts(len(images), prior, label, caption), self.prior(prior)
        log_prior = network.log_prob if contexts is not None else WithoutContext(network).log_prob
        samples = 1 if self.specs[0].vocabulary is not None else samples
        bounds = []
        with own_random_state(self.device):
            torch.manual_seed(seed)
            for rows, batch in zip(torch.arange(len(images)).split(BATCH), self.batches(images)):
                own = None if contexts is None else contexts[rows].to(self.device)
                made = draws(self.autoencoder, batch.to(self.device), samples, {prior: log_prior}, own)
                bounds.append(importance_weighted_bound(made.log_weights(prior)).cpu())
        return torch.cat(bounds)

    def complete(
        self,
        picture: Tensor | str | Path,
        keep: Tensor | str = "top-half",
        count: int = 16,
        *,
        label: str | int | Sequence[str | int] | None = None,
        caption: str | Sequence[str] | None = None,
        seed: int = 0,
        particles: int = 64,
        pixels: Pixels = "mean",
        batch_size: int = 256,
        tell: Callable[[str], None] = say,
    ) -> Tensor:
        """Complete a picture: keep a part of it, and sample the rest under the learned prior; uint8 N C H W.

        picture: uint8 C H W, or a file
        keep: the part that is kept: boolean H W; top-half, bottom-half, left-half, right-half; or the file of a mask that is
            white there
        count: number of completions
        label, caption, seed, pixels, batch_size: as in `sample`
        particles: for each completion so many are drawn, and one is chosen by its importance weight, the density of the latents
            and pixels that are kept
        tell: is called with each message, the last of which is the effective sample size
        """
        check_from_one(count=count, particles=particles, batch_size=batch_size)
        check_whole("the seed", seed)
        check_choice(pixels, PIXELS, "way to draw pixels")
        shape, network = self.image_shape, self.prior("learned")
        if not isinstance(network, LearnedPrior):
            raise UserError(f"completion needs a learned prior that is autoregressive, which that of {self.run.folder} is not")
        if not isinstance(picture, Tensor | str | Path):
            raise UserError(f"a picture is a tensor, uint8 {shape}, or a file, not {what_is(picture)}")
        if not isinstance(keep, Tensor | str | Path):
            raise UserError(f"what is kept is a boolean tensor, {shape[1:]}, a half by its name or a file, not {what_is(keep)}")
        picture = picture if isinstance(picture, Tensor) else self.read(picture)
        keep = keep if isinstance(keep, Tensor) else known_pixels(str(keep), shape)
        ((image,),) = self.batches(picture[None])
        if keep.shape != shape[1:] or keep.dtype != torch.bool:
            raise UserError(f"what is kept of a picture is boolean, {shape[1:]}, not {tuple(keep.shape)} of {keep.dtype}")
        if keep.all():
            raise UserError("all of the picture is kept, so there is nothing to draw: hide a part of it")
        made = completions(
            self.autoencoder,
            network,
            image,
            keep,
            count,
            seed=seed,
            device=self.device,
            batch_size=batch_size,
            particles=particles,
            contexts=self.contexts(count, "learned", label, caption),
            pixels=pixels,
            tell=tell,
        )
        return made.clone()

    def score(self, images: Tensor) -> "Scores":
        """Score how unusual images are: their bits under both stages, and where in the image these are; see `Scores`. To be
        compared with the scores of usual images.

        images: uint8 N C H W. A conditional prior is used with the null context. That is not the p(z) of `log_likelihood`, which
        sums over the labels. Raises UserError where the prior is not autoregressive, or the encoder has no density.
        """
        from pipelines.judging.scores import Scorer  # slow to import, and drawing needs none of it

        self.check_some(images)
        with own_random_state(self.device):
            return Scorer.of(self.run)(ImageSet(torch.cat(self.batches(images))))

    def read(self, picture: str | Path) -> Tensor:
        """Read an image file as the model's input, cropped and resized: uint8 C H W. Raises UserError where it is no image."""
        return picture_to_complete(Path(picture), self.image_shape, background_of(self.run))

    def compare(self) -> "Comparison":
        """The comparison of all priors, as data: read from the run's folder, or made, with its page, which takes minutes."""
        from pipelines.pages.report import finished_comparison  # slow to import, and drawing needs none of it

        splits = load_data(self.run)
        with self.run.locked():
            return finished_comparison(self.run, splits)

    @property
    def device(self) -> torch.device:
        return self.run.fabric.device

    def contexts(
        self,
        count: int,
        prior: str,
        label: str | int | Sequence[str | int] | None,
        caption: str | Sequence[str] | None,
    ) -> Tensor | None:
        """The condition of each of `count` images as the prior takes it; None where neither label nor caption is given."""
        if prior != "learned" and (label is not None or caption is not None):
            raise UserError(f"the {prior} prior takes neither label nor caption; the learned prior may")
        return contexts_asked(self.run, count, label, caption)

    def batches(self, images: Tensor) -> tuple[Tensor, ...]:
        """Raises UserError for what are no images of this model."""
        expected = ", ".join(map(str, self.image_shape))
        if not isinstance(images, Tensor):
            raise UserError(f"images are a tensor of uint8, of shape (N, {expected}), not {what_is(images)}")
        if images.ndim != 4 or images.shape[1:] != self.image_shape or images.dtype != torch.uint8:
            raise UserError(f"images are uint8, of shape (N, {expected}), not {tuple(images.shape)} of {images.dtype}")
        return images.split(BATCH)

    def check_some(self, images: Tensor) -> None:
        """Raises UserError for what are no images of this model, and for none."""
        if not len(self.batches(images)[0]):
            raise UserError("there are no images")


def own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn in it leaves torch's global random state, the caller's, as it was."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def sampling(temperature: float, top_k: int | None, top_p: float, guidance: float, autoguidance: float) -> Sampling:
    """`Sampling`, but raises UserError for a setting that is no number, or out of range."""
    check_numbers(temperature=temperature, top_p=top_p, guidance=guidance, autoguidance=autoguidance)
    if top_k is not None:
        check_from_one(top_k=top_k)
    try:
        return Sampling(temperature, top_k, top_p, guidance, autoguidance)
    except CannotSample as error:
        raise UserError(str(error)) from error
