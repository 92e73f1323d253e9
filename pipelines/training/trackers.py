"""The curves and pictures of a training while it runs: --tracker csv, tensorboard or wandb.

    csv          RUN/track/STAGE.csv with lines of step, name, value; pictures as RUN/track/STAGE/NAME-STEP.png
    tensorboard  event files under RUN/track/STAGE/: tensorboard --logdir RUN/track
    wandb        a run of Weights & Biases for each stage, whose id is kept in RUN/track/STAGE.wandb

Where a training is resumed or rewound, each goes on from there: no step is in a curve twice. Weights & Biases deletes no step:
there a rewound training goes on in another run of the same group, and the one before ends where it diverged.
"""

import csv
import io
import re
import uuid
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

import torch
from PIL import Image
from torch import Tensor, nn

from pipelines.console import UserError, first_process
from pipelines.files import write_file
from pipelines.grids import grid
from pipelines.training.config import TrackerKind
from pipelines.training.fit import Tracker

GRID_COLUMNS = 16
Draw = Callable[[Any], dict[str, Tensor]]
"""What a model in training has to show: images by name, uint8 N C H W."""


class Writer(Protocol):
    def begin(self, step: int) -> None: ...

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        """picture: uint8 H W 3."""


class CsvFiles:
    """Own code: the CSVLogger of lightning-fabric deletes what an earlier process has written."""

    def __init__(self, folder: Path, stage: str):
        self.table, self.pictures = folder / f"{stage}.csv", folder / stage

    def begin(self, step: int) -> None:
        kept = [["step", "name", "value"]]
        if self.table.exists():
            rows = csv.reader(io.StringIO(self.table.read_text(encoding="utf-8", errors="replace")))
            kept += [row for row in rows if len(row) == 3 and row[0].isdecimal() and int(row[0]) <= step]
        write_file(self.table, "".join(",".join(row) + "\n" for row in kept).encode())
        for path in self.pictures.glob("*-*.png"):
            number = re.fullmatch(r".+-(\d{7,})", path.stem)  # as below; other pictures are the user's
            if number and int(number[1]) > step:
                path.unlink()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        with open(self.table, "a", encoding="utf-8") as file:
            file.write("".join(f"{step},{name},{value!r}\n" for name, value in values.items()))

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        buffer = io.BytesIO()
        Image.fromarray(picture.numpy()).save(buffer, format="png")
        write_file(self.pictures / f"{name}-{step:07d}.png", buffer.getvalue())


class TensorBoard:
    def __init__(self, folder: Path, stage: str):
        self.folder = folder / stage
        self.writer: Any = None

    def begin(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is not None:
            self.writer.close()
        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        self.writer.add_image(name, picture, step, dataformats="HWC")
        self.writer.flush()


class WeightsAndBiases:
    """The tool refuses steps that a run has already: after a kill they are the same, but not after a rewinding."""

    def __init__(self, folder: Path, stage: str):
        self.folder, self.stage = folder, stage
        self.run: Any = None

    def begin(self, step: int) -> None:
        import wandb

        name = self.folder / f"{self.stage}.wandb"
        if self.run is not None or not name.exists():
            write_file(name, uuid.uuid4().hex[:12].encode())
        label = f"{self.folder.parent.name} {self.stage}"
        try:
            self.run = wandb.init(
                project="two-stage-latent-prior", name=label, group=label, dir=str(self.folder), id=name.read_text(),
                resume="allow", reinit="finish_previous",
            )  # fmt: skip
        except wandb.errors.Error as error:
            raise UserError(f"wandb: {error}. Log in with `wandb login`, or set WANDB_MODE=offline.") from error
        self.image = wandb.Image

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        self.run.log({name: self.image(picture.numpy())}, step=step)


WRITERS: dict[str, Any] = {"csv": CsvFiles, "tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Tracked(Tracker):
    """What one stage shows of itself, in the tool that was chosen."""

    def __init__(self, writer: Writer, draw: Draw):
        self.writer, self.draw = writer, draw

    def begin(self, step: int) -> None:
        self.writer.begin(step)

    def scalars(self, step: int, part: str, values: Mapping[str, SupportsFloat]) -> None:
        self.writer.scalars(step, {f"{part}/{name}": float(value) for name, value in values.items()})

    @torch.inference_mode()
    def pictures(self, step: int, model: nn.Module) -> None:
        for name, images in self.draw(model.eval()).items():
            self.writer.picture(step, name, grid(images.cpu(), GRID_COLUMNS))
        model.train()


class Tracking:
    """Trackers of the stages of a run. Raises UserError when the tool is not installed."""

    def __init__(self, kind: TrackerKind, folder: Path):
        self.kind, self.folder = kind, folder / "track"
        if kind in ("tensorboard", "wandb"):
            try:
                import_module(kind)
            except ImportError as error:
                needed = f"--tracker {kind} needs the library {kind}: pip install -e '.[trackers]'"
                raise UserError(needed) from error

    def stage(self, name: str, draw: Draw) -> Tracker:
        """A tracker of a stage; of several processes the first alone has one that keeps anything."""
        if self.kind == "none" or not first_process():
            return Tracker()
        return Tracked(WRITERS[self.kind](self.folder, name), draw)
