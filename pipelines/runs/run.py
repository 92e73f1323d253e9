"""A run: one folder under checkpoints/, with its config and all that is made of it; checkpoints/README.md lists its content."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout
from lightning_fabric import Fabric
from torch import Tensor, nn

from pipelines import files, processes
from pipelines.console import Progress, UserError, nearest
from pipelines.data.captions import CaptionTokenizer, captions_of
from pipelines.data.images import ImageSet, Mirrored, Splits
from pipelines.runs.config import RunConfig, check_sizes, differences, from_dict, to_dict
from pipelines.training import checkpoints
from pipelines.training.devices import devices
from pipelines.training.fit import check_config, in_order, seed_of
from stage1_vae.autoencoder import Autoencoder
from stage2_prior.autoregressive import LearnedPrior
from stage2_prior.conditions import Caption, ClassLabel, ConditionConfig, Unconditional
from stage2_prior.latents import Joined, LatentDataset, LatentSpec
from stage2_prior.prior import CODE_BASELINES, CONTINUOUS_BASELINES, AggregatePosterior, Prior, baselines

CHECKPOINTS = Path("checkpoints")
PRIORS = list({**CONTINUOUS_BASELINES, **CODE_BASELINES}) + ["learned", "posterior"]
ENCODING_BATCH = 500
Part = Literal["autoencoder", "prior"]
SHARD_BYTES = 2**28  # of latents in one file
UNREADABLE = "unreadable.json"
FACTS = "stage1/facts.json"
EARLY_PRIOR = "stage2/early.safetensors"
WHEREABOUTS = (
    "data.root:",
    "data.cache:",
    "data.in_memory:",
    "data.skip_unreadable:",
    "metrics.weights:",
    "stage1.compile:",
    "stage2.compile:",
    "refine.compile:",
    "metrics.classifier.compile:",
)  # of the same images and the same training; a run goes on under others


class Run:
    def __init__(self, folder: Path, config: RunConfig, fabric: Fabric):
        self.folder, self.config, self.fabric = folder, config, fabric

    @classmethod
    def create(cls, folder: Path, config: RunConfig, device: str = "auto") -> "Run":
        """A new run, or one to go on with; writes nothing yet.

        Raises UserError when the folder holds a run of another config, or something else, or the config makes no sense.
        """
        path = folder / "config.json"
        if path.exists():
            refuse_another(path, config)
        elif folder.exists():
            early = [path, folder / UNREADABLE]  # what is written first; a kill may leave part of it
            if not (folder.is_dir() and {*folder.iterdir()} <= {*early, *map(files.beside, early)}):
                raise UserError(f"{folder} is not empty and holds no run; give another name with --run")
        fabric = devices(device, config.precision)
        check_sizes(config)
        for part in (config.stage1, config.stage2, config.refine, config.metrics.classifier):
            if part is not None:
                check_config(part, fewest_steps=0 if part is config.stage2 else 1)
        if config.metrics.images < 1:
            raise UserError(f"metrics.images is a number from 1 up, not {config.metrics.images}")
        return cls(folder, config, fabric)

    @classmethod
    def open(cls, name: str, device: str = "auto") -> "Run":
        """A run by its name under checkpoints/, or by its path. Raises UserError when it is not there."""
        folder = next((path for path in (CHECKPOINTS / name, Path(name)) if (path / "config.json").is_file()), None)
        if folder is None:
            known = sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json"))
            hint = nearest(name, known) if known else "; train one with python -m pipelines.train_all"
            raise UserError(f"there is no run {name!r}{hint}")
        folder = folder if folder.name not in ("", "..") else folder.resolve()
        config = read_config(folder / "config.json")
        return cls(folder, config, devices(device, config.precision))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing to this run. Raises UserError when one does; a killed process holds no lock."""
        path = self.folder.parent / f".{self.folder.name}.lock"
        lock = FileLock(path)

        def acquire() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise UserError(f"another process is working on {self.folder}; wait for it, or use another --run") from error

        processes.on_first(acquire)
        try:
            yield
        finally:
            if lock.is_locked:
                path.unlink(missing_ok=True)
                lock.release()

    @property
    def name(self) -> str:
        """What the other commands know it by."""
        return self.folder.name if self.folder.parent == CHECKPOINTS else str(self.folder)

    @property
    def classifiers(self) -> Path:
        """The folder, beside the runs, of the classifiers and features that all runs on one data set share."""
        return self.folder.parent / ".classifiers"

    def data(self) -> Splits:
        """The data set; what in it cannot be read is named in RUN/unreadable.json.

        Raises UserError when the run is trained on other splits: drawn anew, the test split would hold images of the training.
        """
        with self.fabric.rank_zero_first(local=True):  # which may download it, or read it whole
            splits = self.config.data.load(self.folder / UNREADABLE)
        trained = (self.folder / FACTS).is_file() and any((self.folder / "stage1").glob("step-*"))
        facts = self.facts() if trained else {}
        before = facts.get("images", splits.sizes)
        listed = [" + ".join(map(str, sizes.values())) for sizes in (before, splits.sizes)]
        other = None
        if before != splits.sizes:
            other = f"{listed[0]} of them ({', '.join(before)}), now there are {listed[1]}"
        elif facts.get("listing", splits.listing) != splits.listing:
            other = f"as many ({listed[0]}), but under other names or labels"
        if other is not None:
            raise UserError(
                f"{self.folder} is trained on other images: {other}. Split anew, images that it was trained on would be test"
                " images. Bring the same images back, or train another run on these: train_all with another --run."
            )
        return splits

    def examples(self, images: ImageSet) -> ImageSet:
        """What is trained on: the training images, as often as not mirrored where the config asks for it."""
        return Mirrored(images) if self.config.mirror else images

    def write_facts(self, splits: Splits) -> None:
        """Put down the config, and what the data set told stage 1, so that nothing else needs the data set to load a model."""
        path = self.folder / "config.json"
        if path.exists():  # a process that began at the same time may have been first
            refuse_another(path, self.config)
        files.write_json(path, to_dict(self.config))
        facts = {
            "image_shape": splits.image_shape,
            "label_names": splits.label_names,
            "images": splits.sizes,
            "listing": splits.listing,
        }
        files.write_json(self.folder / FACTS, facts)

    def facts(self) -> dict:
        """What `write_facts` put down: image_shape, label_names, images, the number of them in each split, and their listing."""
        path = self.folder / FACTS
        if not path.is_file():
            raise UserError(f"{self.folder} is unfinished: stage 1 has not been trained. Run its train_all command again.")
        facts = files.read_json(path)
        return facts | {"image_shape": tuple(facts["image_shape"])}

    # Stage 1

    def new_autoencoder(self, image_shape: tuple[int, int, int]) -> Autoencoder:
        """Raises UserError when the network cannot take such images."""
        torch.manual_seed(seed_of(self.config.seed, 1))
        try:
            autoencoder = self.config.autoencoder.build(image_shape)
            self.specs(autoencoder)
        except ValueError as error:
            raise UserError(str(error)) from error
        return autoencoder

    def load_autoencoder(self) -> Autoencoder:
        """Raises UserError when stage 1 is not finished, nor refined where the config asks for it."""
        autoencoder = self.new_autoencoder(self.facts()["image_shape"])
        self.load(autoencoder, "autoencoder")
        return autoencoder

    def load(self, model: nn.Module, part: Part) -> None:
        """The weights to use. Raises UserError when they are not trained to the end, or do not fit."""
        stage = self.stage(part)
        found = self.finished(stage)
        tensors = found.model()
        if stage == "refined":
            tensors = {name.removeprefix(f"{part}."): x for name, x in tensors.items() if name.startswith(f"{part}.")}
        checkpoints.fill(model, tensors, found.folder)
        self.fabric.to_device(model).eval()

    def stage(self, part: Part) -> str:
        """The last phase that trains a part."""
        return "refined" if self.config.refine is not None else {"autoencoder": "stage1", "prior": "stage2"}[part]

    def finished(self, stage: str) -> checkpoints.Checkpoint:
        """The best checkpoint of a phase. Raises UserError when it is not trained to the end."""
        config = {"stage1": self.config.stage1, "stage2": self.config.stage2, "refined": self.config.refine}[stage]
        assert config is not None
        found = checkpoints.usable(self.folder / stage)
        if not found or found[-1].step < config.steps:
            done = f"is at step {found[-1].step} of {config.steps}" if found else "has not been trained"
            raise UserError(f"{self.folder} is unfinished: {stage} {done}. Run its train_all command again.")
        return checkpoints.best(found)

    def weights(self) -> dict[str, str]:
        """The digests of the weights to use, by the phase that trained them."""
        stages = {self.stage(part) for part in (("autoencoder", "prior") if self.learned else ("autoencoder",))}
        return {stage: self.finished(stage).digest() for stage in sorted(stages)}

    def follow(self, stage: str, before: str) -> None:
        """Put down after which weights of an earlier phase a phase is trained. Raises UserError where it was after others."""
        path, now = self.folder / stage / "after.json", {before: self.finished(before).digest()}

        def check() -> None:
            if not (path.is_file() and any(path.parent.glob("step-*"))):
                files.write_json(path, now)
            elif files.read_json(path) != now:
                raise UserError(
                    f"{path.parent} was trained after another {before} than the one that is there now: delete {path.parent} too,"
                    " to train it anew"
                )

        processes.on_first(check)

    # Latents

    def encode(self, autoencoder: Autoencoder, images: ImageSet, part: str, stage: str | None = None) -> LatentDataset:
        """The posteriors of a split, from disk when they were made by these very weights; with their contexts.

        stage: the phase whose weights these are; the last one when None.
        """
        stage = self.stage("autoencoder") if stage is None else stage
        key = f"{self.finished(stage).digest()} {len(images)}"
        path = self.folder / "latents" / f"{stage}-{part}.safetensors"
        # Mean and std, or a code of 64 bits: 8 bytes a position either way.
        batches = max(1, SHARD_BYTES // (ENCODING_BATCH * 8 * sum(spec.dimensions for spec in self.specs(autoencoder))))
        starts = range(0, len(images), batches * ENCODING_BATCH)
        paths = files.shards(path, len(starts))

        def clear() -> None:
            for other in set(files.found_shards(path)) - set(paths):
                other.unlink()

        processes.on_first(clear)
        for start, shard in zip(starts, paths):  # so that memory holds one at a time, and a killed process loses but one
            rows = range(start, min(start + starts.step, len(images)))
            label = f"encoding {part}" + (f", {rows.start} to {rows.stop} of {len(images)}" if len(paths) > 1 else "")
            files.cached(shard, key, lambda: encoded(self.fabric, autoencoder, images, label, rows))  # noqa: B023
        return latent_dataset([files.read_tensors(shard) for shard in paths], self.contexts(images, part))

    def encode_training(self, autoencoder: Autoencoder, images: ImageSet, stage: str | None = None) -> LatentDataset:
        """q(z), which priors are fitted to: the posteriors of the training images, and where the config asks for it of their
        mirror images."""
        encoded = self.encode(autoencoder, images, "train", stage)
        if self.config.mirror:
            encoded += self.encode(autoencoder, Mirrored(images, share=1.0), "mirrored", stage)
        return encoded

    def training_latents(self) -> LatentDataset:
        """What `encode_training` put down, without contexts."""
        shards = []
        for part in ("train", "mirrored") if self.config.mirror else ("train",):
            path = self.folder / "latents" / f"{self.stage('autoencoder')}-{part}.safetensors"
            paths = files.found_shards(path)
            if not paths or paths != files.shards(path, len(paths)):
                raise UserError(
                    f"there is no {path}, or not all of it, which tells how images are encoded. Run the train_all command of"
                    f" {self.folder} again."
                )
            shards += [files.read_tensors(shard) for shard in paths]
        return latent_dataset(shards)

    # Stage 2

    def specs(self, autoencoder: Autoencoder) -> list[LatentSpec]:
        return [LatentSpec(shape, vocabulary) for shape, vocabulary in autoencoder.latents]

    def new_prior(self, specs: list[LatentSpec], classes: int) -> LearnedPrior:
        """classes: number of labels. Raises UserError when its parts do not fit the latents or the data set."""
        torch.manual_seed(seed_of(self.config.seed, 2))
        try:
            return self.config.prior.build(specs, classes)
        except ValueError as error:
            raise UserError(str(error)) from error

    def load_prior(self, specs: list[LatentSpec]) -> LearnedPrior:
        """Raises UserError when stage 2 is not finished, nor refined where the config asks for it, or there is none."""
        if not self.learned:
            raise UserError(
                f"{self.folder} has no learned prior: it was trained without a second stage (stage2.steps 0). Draw with"
                f" --prior standard, or another of {', '.join(baselines(specs))}."
            )
        learned = self.new_prior(specs, len(self.facts()["label_names"]))
        self.load(learned, "prior")
        early = self.folder / EARLY_PRIOR
        # Refined, the prior is one of other latents than it was early on.
        if early.is_file() and self.config.refine is None:
            weaker = self.new_prior(specs, len(self.facts()["label_names"]))
            checkpoints.fill(weaker, files.read_tensors(early), early)
            self.fabric.to_device(weaker).eval()
            for own, other in zip(learned.levels, weaker.levels):
                own.guide_by(other)
        return learned

    @property
    def learned(self) -> tuple[str, ...]:
        """The name of the learned prior, where this run has one: not after a plain training, of 0 steps of stage 2."""
        return ("learned",) if self.config.stage2.steps else ()

    def prior(self, name: str, specs: list[LatentSpec]) -> Prior:
        """A prior by name, fitted. Raises UserError for an unknown name or an unfinished run."""
        if name == "learned":
            return self.load_prior(specs)
        if name == "posterior":
            return AggregatePosterior(self.training_latents())
        known = baselines(specs)
        if name not in known:
            raise UserError(f"there is no prior {name!r} for these latents{nearest(name, [*known, 'learned', 'posterior'])}")
        baseline = known[name](specs)

        def fitted() -> dict:
            latents = self.training_latents()
            with Progress(f"fitting the {name} prior", len(latents), "images") as progress:
                torch.manual_seed(seed_of(self.config.seed, 3))
                baseline.estimate(latents)
                progress.update(len(latents))
            return baseline.state_dict()

        if name != "standard":
            key = self.finished(self.stage("autoencoder")).digest()
            baseline.load_state_dict(files.cached(self.folder / "baselines" / f"{name}.safetensors", key, fitted))
        self.fabric.to_device(baseline)
        return baseline.eval()

    @property
    def condition(self) -> ConditionConfig:
        """What the learned prior is told."""
        return self.config.prior.top.condition

    def contexts(self, images: ImageSet, part: str = "train") -> Tensor | None:
        """What a conditional prior is told of each image of a split: its label, or its caption's tokens.

        Raises UserError when the tokenizer, which is fitted to the training split alone, is missing and this is another one.
        """
        if not isinstance(self.condition, Caption):
            return images.labels
        path = self.folder / "tokenizer.json"
        captions = captions_of(images, self.facts()["label_names"])
        vocabulary = self.condition.vocabulary

        def fitted() -> None:
            if path.is_file():
                return
            if part != "train":
                raise UserError(f"there is no {path}. Run the train_all command of this run again, to have it made as it was.")
            CaptionTokenizer.train(captions, vocabulary, path)

        processes.on_first(fitted)
        return CaptionTokenizer(path).tokens(captions, self.condition.length)

    def text(self, caption: str) -> Tensor:
        """The tokens of one caption. Raises UserError for a prior that takes none."""
        if not isinstance(self.condition, Caption):
            raise UserError(f"the prior of {self.folder} takes no text; {self.takes()}")
        return CaptionTokenizer(self.folder / "tokenizer.json").tokens([caption], self.condition.length)[0]

    @property
    def told(self) -> Literal["label", "caption"] | None:
        """What the learned prior is told of an image."""
        if isinstance(self.condition, Unconditional):
            return None
        return "label" if isinstance(self.condition, ClassLabel) else "caption"

    def takes(self) -> str:
        """The same, in words."""
        option = {None: "was trained without labels and captions", "label": "takes a --label", "caption": "takes a --text"}
        return f"it {option[self.told]}"

    def label(self, name: str) -> Tensor:
        """The number of a label by its name. Raises UserError for an unknown one, or a prior that takes none."""
        if not isinstance(self.condition, ClassLabel):
            raise UserError(f"the prior of {self.folder} takes no label; {self.takes()}")
        names = self.facts()["label_names"]
        # Upper or lower case; of a name like "5 - five" either half will do.
        found = [i for i, known in enumerate(names) if name.lower() in (known.lower(), *known.lower().split(" - "))]
        found = [i for i in found if names[i] == name] or found
        if not found:
            raise UserError(f"there is no label {name!r}{nearest(name, names)}")
        return torch.tensor(found[0])


def refuse_another(path: Path, config: RunConfig) -> None:
    """Raises UserError where a run's config.json is of another config."""
    changed = differences(to_dict(read_config(path)), to_dict(config))
    changed = [change for change in changed if not change.startswith(WHEREABOUTS)]
    if changed:
        raise UserError(
            f"{path.parent} holds a run of another config ({'; '.join(changed)}). Give this one another name with --run,"
            f" or delete {path.parent}."
        )


def read_config(path: Path) -> RunConfig:
    """What is not in the file, because a later version added it, has its default. Raises UserError for another file."""
    try:
        return from_dict(json.loads(path.read_text()))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete {path.parent}, or mend the file") from error


@torch.inference_mode()
def encoded(
    fabric: Fabric, autoencoder: Autoencoder, images: ImageSet, label: str, rows: range | None = None
) -> dict[str, Tensor]:
    """The posteriors of images, as tensors named LEVEL.NAME, on the CPU. rows: which; all when None."""

    def posteriors(rows: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(int(rows[0]))  # some data sets draw their examples
        (batch,) = in_order(images, rows, ENCODING_BATCH)
        levels = enumerate(autoencoder.encode(fabric.to_device(batch)))
        return {f"{level}.{name}": tensor.cpu() for level, posterior in levels for name, tensor in posterior.items()}

    rows = range(len(images)) if rows is None else rows
    batches = processes.in_batches(posteriors, torch.arange(rows.start, rows.stop), ENCODING_BATCH, label)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def latent_dataset(shards: list[dict[str, Tensor]], contexts: Tensor | None = None) -> LatentDataset:
    """Of posteriors as `encoded` names them, in one or several parts."""
    levels: dict[int, dict[str, Tensor | Joined]] = {}
    for key in shards[0]:
        level, name = key.split(".")
        levels.setdefault(int(level), {})[name] = shards[0][key] if len(shards) == 1 else Joined([s[key] for s in shards])
    return LatentDataset([levels[level] for level in sorted(levels)], contexts)
