"""Which images a run is trained on, and that they are the same whenever it goes on."""

import shlex
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines import files, processes
from pipelines.console import NotThere, UserError
from pipelines.data.captions import captions_of
from pipelines.data.decoding import MOST_PIXELS
from pipelines.data.given import file_of
from pipelines.data.identity import content_of_captions, content_of_files, stamp
from pipelines.data.images import Binarized, ImageSet, Splits
from pipelines.data.sets import Folder, Parquet, Shards
from pipelines.runs import whereabouts
from pipelines.runs.config import to_dict
from pipelines.runs.run import GIVEN, UNREADABLE, Run, refuse_another
from pipelines.training import checkpoints
from stage2_prior.conditions import Caption

FACTS = "stage1/facts.json"
MOST_CHANNELS = 1000
CAPTION_EXAMPLES = 16
LOADING = threading.Lock()  # the explorer loads data beside what it draws, and two downloads would write the same files


@dataclass(frozen=True)
class Facts:
    """What the data set told stage 1, so that nothing else needs the data set to load a model."""

    image_shape: tuple[int, int, int]
    """C H W"""
    label_names: list[str]
    images: dict[str, int]
    """number of images in each split"""
    content: str
    """a checksum of the images, and of labels that came with them"""
    captions: str
    """a checksum of the captions"""
    listing: str | None = None
    """of the user's own images, a checksum of their names and labels"""
    caption_examples: list[str] = field(default_factory=list)
    """some captions of training images, for a prior conditioned on captions"""
    stamp: str | None = None
    """of images in files, a checksum of the sizes and times of these"""

    def __post_init__(self) -> None:
        """Raises ValueError for what no data set is."""
        channels, height, width = self.image_shape
        if min(self.image_shape) < 1 or channels > MOST_CHANNELS or height * width > MOST_PIXELS:
            raise ValueError(f"there are no images of shape {self.image_shape}")

    @classmethod
    def of(cls, splits: Splits, before: "Facts | None" = None) -> "Facts":
        """before: what is known of the data set, so that no file is read that has not been written since."""
        now = stamp(splits.used) if splits.used else None
        content = before.content if before is not None and now is not None and before.stamp == now else None
        if content is None:
            content = content_of_files(splits.used) if splits.used else splits.content_in_memory()
        captions = content_of_captions(part.captions for part in (splits.train, splits.validation, splits.test))
        return cls(splits.image_shape, splits.label_names, splits.sizes, content, captions, splits.listing, stamp=now)


def write_facts(run: Run, splits: Splits) -> None:
    """Put down the config and the facts, and that this machine has named where the data lie."""
    path = run.folder / "config.json"
    if path.exists():  # a process that began at the same time may have been first
        refuse_another(path, run.config)
    files.write_json(path, to_dict(run.config))
    before = read_facts(run) if (run.folder / FACTS).is_file() else None
    facts = Facts.of(splits, before)
    if isinstance(run.condition, Caption):
        captions = captions_of(splits.train, splits.label_names)
        some = list(dict.fromkeys(captions))[:CAPTION_EXAMPLES]
        telling = sorted(some, key=len)[len(some) // 2]  # neither the tersest nor the wordiest comes first
        facts = replace(facts, caption_examples=[telling, *(caption for caption in some if caption != telling)])
    files.write_json(run.folder / FACTS, vars(facts))
    if run.trusted:
        whereabouts.remember(run.config)


def write_given(run: Run, dataset: Any, held_out: Any) -> None:
    """Put down the images of a torch Dataset in the run's folder, from which they are read whenever the run goes on.

    Raises UserError where the run is trained on others, or the Dataset holds no images.
    """
    path, content = run.folder / GIVEN, file_of(dataset, held_out)
    if (run.folder / FACTS).is_file() and (not path.is_file() or path.read_bytes() != content):
        raise UserError(
            f"{run.folder} is trained on other images than this Dataset's: give the run another name. The Dataset of a run gives"
            " the same images whenever it is read, so without random changes in its transform."
        )
    files.write_file(path, content)


def read_facts(run: Run) -> Facts:
    """Raises UserError where stage 1 has not been trained, or its file holds something else."""
    path = run.folder / FACTS
    if not path.is_file():
        raise run.unfinished("stage 1 has not been trained")
    return files.read_as(path, lambda values: files.structured(values, Facts))


def load_data(run: Run) -> Splits:
    """The data set; what in it cannot be read is named in RUN/unreadable.json.

    Raises UserError when the run is trained on other splits: drawn anew, the test split would hold images of the training. Also
    where the config was read from the run's folder and names a place that no command on this machine has.
    """
    if not run.trusted:
        whereabouts.check(run.config, run.folder)
    data = run.config.data
    if (place := place_of_own_images(run)) is not None and isinstance(data, Folder | Parquet):
        data = replace(data, root=place)
    with LOADING:
        try:
            if isinstance(data, Shards) and processes.count() > 1:
                data.index_together()
            with run.fabric.rank_zero_first(local=True):  # which may download it, or read it whole
                splits = data.load(run.work / UNREADABLE)
        except NotThere as error:
            if not (run.folder / "config.json").is_file():
                raise
            root = vars(data).get("root")
            if run.exported and root is not None:
                raise UserError(f"{error.what}: put the images there, or make {root} a link to where they are") from error
            option = "--data.urls PATTERN" if isinstance(data, Shards) else "--data.root PATH"
            command = f"python -m pipelines.train_all --run {shlex.quote(str(run.folder))} {option}"
            raise UserError(f"{error.what}. Say where they lie now: {command}") from error
    if (run.folder / FACTS).is_file() and (run.exported or checkpoints.folders(run.folder / "stage1")):
        refuse_other_images(run, splits)
    return splits


def place_of_own_images(run: Run) -> Path | None:
    """Where the user's own images are looked for that an export was trained on: it names no place, and no option of a command
    does. None for a run, and for other data."""
    if not (run.exported and isinstance(run.config.data, Folder | Parquet)):
        return None
    return Path("data") / (run.title.partition("@")[0] if run.on_hub else run.title)  # the same for every revision


def refuse_other_images(run: Run, splits: Splits) -> None:
    """Raises UserError where a trained run's images are not these."""
    before = read_facts(run)
    now = Facts.of(splits, before)
    sizes = [" + ".join(map(str, facts.images.values())) for facts in (before, now)]
    others = "Split anew, images that it was trained on would be test images. "
    if before.images != now.images:
        what = f"other images: {sizes[0]} of them ({', '.join(before.images)}), now there are {sizes[1]}. {others}"
    elif before.listing != now.listing:
        what = f"other images: as many ({sizes[0]}), but under other names or labels. {others}"
    elif before.content != now.content:
        what = f"other images: as many ({sizes[0]}), but what is in them has changed. "
    elif run.conditioned_on == "caption" and before.captions != now.captions:
        what = "other captions of these images. "
    else:
        return
    raise UserError(
        f"{run.folder} is trained on {what}Bring the same {'captions' if 'captions' in what else 'images'} back, or train another"
        " run on these: train_all with another --run."
    )


def background_of(run: Run) -> str:
    """The colour behind transparent pixels of pictures that the run is given; of data sets that have none, white."""
    return getattr(run.config.data, "background", "white")


def drawn_alike(run: Run, images: ImageSet) -> ImageSet:
    """Pictures that a run is given, drawn black or white where its own images are."""
    return ImageSet(Binarized(images).images) if getattr(run.config.data, "binarize", False) else images
