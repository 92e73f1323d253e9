"""Which images a run is trained on, and that they are the same whenever it goes on."""

from dataclasses import dataclass

from pipelines import files
from pipelines.console import UserError
from pipelines.data.images import ImageSet, Mirrored, Splits
from pipelines.runs.config import to_dict
from pipelines.runs.run import UNREADABLE, Run, refuse_another

FACTS = "stage1/facts.json"


@dataclass(frozen=True)
class Facts:
    """What the data set told stage 1, so that nothing else needs the data set to load a model."""

    image_shape: tuple[int, int, int]
    """C H W"""
    label_names: list[str]
    images: dict[str, int]
    """number of images in each split"""
    listing: str | None
    """of the user's own images, a checksum of their names and labels"""

    @classmethod
    def of(cls, splits: Splits) -> "Facts":
        return cls(splits.image_shape, splits.label_names, splits.sizes, splits.listing)


def write_facts(run: Run, splits: Splits) -> None:
    """Put down the config and the facts."""
    path = run.folder / "config.json"
    if path.exists():  # a process that began at the same time may have been first
        refuse_another(path, run.config)
    files.write_json(path, to_dict(run.config))
    files.write_json(run.folder / FACTS, vars(Facts.of(splits)))


def read_facts(run: Run) -> Facts:
    """Raises UserError where stage 1 has not been trained."""
    path = run.folder / FACTS
    if not path.is_file():
        raise UserError(f"{run.folder} is unfinished: stage 1 has not been trained. Run its train_all command again.")
    facts = files.read_json(path)
    return Facts(tuple(facts["image_shape"]), facts["label_names"], facts["images"], facts.get("listing"))


def load_data(run: Run) -> Splits:
    """The data set; what in it cannot be read is named in RUN/unreadable.json.

    Raises UserError when the run is trained on other splits: drawn anew, the test split would hold images of the training.
    """
    with run.fabric.rank_zero_first(local=True):  # which may download it, or read it whole
        splits = run.config.data.load(run.folder / UNREADABLE)
    if (run.folder / FACTS).is_file() and any((run.folder / "stage1").glob("step-*")):
        refuse_other_images(run, splits)
    return splits


def refuse_other_images(run: Run, splits: Splits) -> None:
    """Raises UserError where a trained run's images are not these."""
    before, now = read_facts(run), Facts.of(splits)
    sizes = [" + ".join(map(str, facts.images.values())) for facts in (before, now)]
    if before.images != now.images:
        other = f"{sizes[0]} of them ({', '.join(before.images)}), now there are {sizes[1]}"
    elif before.listing != now.listing:
        other = f"as many ({sizes[0]}), but under other names or labels"
    else:
        return
    raise UserError(
        f"{run.folder} is trained on other images: {other}. Split anew, images that it was trained on would be test"
        " images. Bring the same images back, or train another run on these: train_all with another --run."
    )


def examples_of(run: Run, images: ImageSet) -> ImageSet:
    """What is trained on: the training images, as often as not mirrored where the config asks for it."""
    return Mirrored(images) if run.config.mirror else images
