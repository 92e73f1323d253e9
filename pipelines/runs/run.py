"""A run: one folder under checkpoints/, with its config and all that is made of it; checkpoints/README.md lists its content."""

import os
import shlex
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from filelock import Timeout

from pipelines import files, processes
from pipelines.console import UserError, nearest
from pipelines.runs import exported, hub
from pipelines.runs.config import RunConfig, check_ranges, differences, read_config, to_dict
from pipelines.training.checkpoints import checksum
from pipelines.training.config import FitConfig, check_batches
from pipelines.training.devices import open_fabric, resolved
from pipelines.training.fabric import Fabric
from stage2_prior.conditions import ClassLabel, Cluster, ConditionConfig, Unconditional

CHECKPOINTS = Path("checkpoints")
TRAINED = Path(__file__).parents[1] / "trained"
"""exports that come with the software"""
UNREADABLE = "unreadable.json"
GIVEN = "images.safetensors"
"""images that a Python program gave"""

Phase = Literal["stage1", "stage2", "refined"]
"""a phase of training, by the name of its folder in a run"""


class PhaseNames(NamedTuple):
    config: str
    """its name in a config"""
    title: str
    """in messages"""


PHASES: dict[Phase, PhaseNames] = {
    "stage1": PhaseNames("stage1", "stage 1"),
    "stage2": PhaseNames("stage2", "stage 2"),
    "refined": PhaseNames("refine", "joint fine-tuning"),
}
"""The phases in the order of training."""
FREE = {
    *("data.root", "data.urls", "data.test_urls", "data.cache", "data.in_memory", "data.skip_unreadable"),
    *(f"{phase.config}.{setting}" for phase in PHASES.values() for setting in ("compile", "checkpoint_steps")),
}
"""Settings of the same images and the same training: a run goes on under others. So are all of metrics."""


def folder_of(name: str) -> Path:
    """Where a run is made, by its name under checkpoints/ or its path. Raises UserError for a name on the hub."""
    if name.startswith(hub.PREFIX):
        raise UserError(f"{name} is a model on the hub, which is not trained on: give the run another name")
    return Path(name) if "/" in name or os.sep in name else CHECKPOINTS / name


def names_of_runs() -> list[str]:
    """The names of the runs under checkpoints/, finished or not, and of the exports that come with the software."""
    return sorted({path.parent.name for place in (CHECKPOINTS, TRAINED) for path in place.glob("*/config.json")})


@dataclass(frozen=True)
class Run:
    folder: Path
    config: RunConfig
    fabric: Fabric
    trusted: bool = True
    """whether a command gave the config; else it was read from the folder, and where it says that data lie is not believed"""
    on_hub: str | None = None
    """the name that it was opened by, where it comes from the hub"""

    @classmethod
    def create(cls, folder: Path, config: RunConfig, device: str = "auto") -> "Run":
        """A new run, or one to go on with; writes nothing yet.

        Raises UserError when the folder holds a run of another config, or something else, or the config makes no sense.
        """
        path = folder / "config.json"
        if exported.is_export(folder):
            raise UserError(f"{folder} is an export, which is not trained on: give the run another name with --run")
        if path.exists():
            if config.precision == "auto":
                config = replace(config, precision=read_config(path).precision)
            refuse_another(path, config)
            refuse_links(folder)
        elif folder.exists():
            early = ("config.json", UNREADABLE, GIVEN)  # what is written first; a kill may leave part of it
            if not folder.is_dir() or any((files.partial_of(inner) or inner.name) not in early for inner in folder.iterdir()):
                raise UserError(f"{folder} is not empty and holds no run; give another name with --run")
        fabric = open_fabric(device, config.precision)
        config = replace(config, precision=resolved(config.precision, device))  # the same on every machine that it goes on on
        check_ranges(config)
        trainings = {"stage1": config.stage1, "refine": config.refine, "metrics.classifier": config.metrics.classifier}
        for name, training in trainings.items():
            if training is not None and training.steps < 1:
                raise UserError(f"--{name}.steps is a number from 1 up, not {training.steps}")
        for training in (config.stage2, *trainings.values()):
            if training is not None:
                check_batches(training)
        return cls(folder, config, fabric)

    @classmethod
    def open(cls, name: str, device: str = "auto") -> "Run":
        """A run by its name under checkpoints/, or by its path; an export that comes with the software, by its name; or one on
        the hub, as hub:owner/name.

        Raises UserError when it is not there, or is an export that is not whole.
        """
        on_hub = name if name.startswith(hub.PREFIX) else None
        if on_hub:
            name = str(hub.fetched(on_hub))
        places = (CHECKPOINTS / name, Path(name), TRAINED / name)
        folder = next((path for path in places if (path / "config.json").is_file()), None)
        if folder is None:
            known = names_of_runs()
            hint = nearest(name, known) if known else "; train one with python -m pipelines.train_all"
            raise UserError(f"there is no run {name!r}{hint}")
        folder = folder if folder.name not in ("", "..") else folder.resolve()
        if exported.is_export(folder):
            exported.check(folder)  # it is only read
        else:
            refuse_links(folder)
        config = read_config(folder / "config.json")
        fabric = open_fabric(device, config.precision)
        return cls(folder, replace(config, precision=resolved(config.precision, device)), fabric, trusted=False, on_hub=on_hub)

    def unfinished(self, what: str) -> UserError:
        """What to raise where more is asked for than was trained. what: is missing, in words."""
        shipped = f" To use the trained model that comes with the software, name it by its path: {self.hidden}"
        return UserError(f"{self.folder} is unfinished: {what}. Run its train_all command again.{shipped if self.hidden else ''}")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing to this run. Raises UserError when one does; a killed process holds no lock."""
        lock = files.lock_of(self.work)

        def acquire() -> None:
            self.work.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise UserError(f"another process is working on {self.work}; wait until it has ended") from error

        processes.on_first(acquire)
        try:
            yield
        finally:
            lock.release()

    @property
    def name(self) -> str:
        """What the other commands know it by."""
        if self.on_hub:
            return self.on_hub
        return self.folder.name if self.folder.parent in (CHECKPOINTS, TRAINED) else str(self.folder)

    @property
    def hidden(self) -> Path | None:
        """The trained model of the same name that comes with the software, where there is one: a name means this run."""
        path = TRAINED / self.folder.name
        return path if self.folder.parent == CHECKPOINTS and path.is_dir() else None

    @property
    def known_as(self) -> str:
        """The name; the folder where a trained model that comes with the software has that name, too."""
        return str(self.folder) if self.hidden else self.name

    @property
    def title(self) -> str:
        """What tables and pages call it."""
        return self.on_hub.rpartition("/")[2] if self.on_hub else self.folder.name

    @property
    def exported(self) -> bool:
        """Whether it is an export, which is only read."""
        return exported.is_export(self.folder)

    @property
    def work(self) -> Path:
        """Where commands write what they make of the run: its folder; of an export, another one under checkpoints/."""
        if not self.exported:
            return self.folder
        digest = checksum(self.folder / exported.LIST)[:8]
        return CHECKPOINTS / "from-exports" / f"{self.title if self.on_hub else self.folder.resolve().name}-{digest}"

    @property
    def classifiers(self) -> Path:
        """The folder, beside the runs, of the classifiers and features that all runs on one data set share."""
        return (CHECKPOINTS if self.exported else self.folder.parent) / ".classifiers"

    @property
    def learned(self) -> bool:
        """Whether this run has a learned prior: not after a plain training, of 0 steps of stage 2."""
        return self.config.stage2.steps > 0

    @property
    def condition(self) -> ConditionConfig:
        """The condition of the learned prior, as its config says."""
        return self.config.prior.condition

    @property
    def conditioned_on(self) -> Literal["label", "caption"] | None:
        """What the learned prior is given of an image; clusters it finds by itself. None without a learned prior."""
        if not self.learned or isinstance(self.condition, Unconditional | Cluster):
            return None
        return "label" if isinstance(self.condition, ClassLabel) else "caption"


def refuse_links(folder: Path) -> None:
    """Raises UserError where a link in a run's folder leads out of it: a run may come from anyone, and commands write to it.

    The folder itself, or one above it, may be a link. Hard links are no links here: no file of a run is changed in place.
    """
    inside = folder.resolve()
    for path in folder.resolve().rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            name = folder / path.relative_to(inside)
            raise UserError(
                f"{name} is a link to {path.resolve()}, outside of the run, and commands would write there: put what it leads"
                f" to in its place. The whole run may lie elsewhere, with {folder} as a link to it."
            )


def training_of(config: RunConfig, phase: Phase) -> FitConfig | None:
    """How a phase is trained; None where the config does not ask for the phase."""
    return cast(FitConfig | None, getattr(config, PHASES[phase].config))


def longer(before: RunConfig, now: RunConfig) -> list[Phase]:
    """The phases that are to take more steps than before."""
    pairs = {phase: (training_of(before, phase), training_of(now, phase)) for phase in PHASES}
    return [phase for phase, (old, new) in pairs.items() if old is not None and new is not None and new.steps > old.steps]


def changes(before: dict[str, Any], now: dict[str, Any], free: Set[str] = FREE) -> str:
    """What differs between two configs as dicts, but for the free settings, in words; "" where nothing does."""
    found = differences(before, now)
    kept = [name for name in found if name not in free and not name.startswith("metrics.")]
    return "; ".join(f"{name}: {found[name][0]} in the run, {found[name][1]} asked for" for name in kept)


def refuse_another(path: Path, config: RunConfig) -> None:
    """Raises UserError where a run's config.json is of another config, which is not just of a longer training."""
    before = read_config(path)
    steps = {f"{PHASES[phase].config}.steps" for phase in longer(before, config)}
    if changed := changes(to_dict(before), to_dict(config), FREE | steps):
        folder = shlex.quote(str(path.parent))
        raise UserError(
            f"{path.parent} holds a run of another config ({changed}). To go on with it as it was begun:"
            f" python -m pipelines.train_all --run {folder}. To train another one, give it another name with --run."
        )
