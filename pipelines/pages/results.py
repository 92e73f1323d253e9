"""docs/results.json: the figures of whole trainings, and the tables of README and docs that are made of them.

A training is what `python -m pipelines.train_all COMMAND --seed S` leaves. COMMAND is a preset, perhaps with overrides.
A table stands in a document between `<!-- table NAME -->` and `<!-- end -->`, one about a single command between
`<!-- table NAME of COMMAND -->` and `<!-- end -->`; `written` puts it there anew.
"""

import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import TypeVar

from pipelines.console import UserError
from pipelines.files import read_as, structured, write_json
from pipelines.judging.comparison import Comparison
from pipelines.judging.together import Standing
from pipelines.judging.tradeoffs import described
from pipelines.pages.tables import markdown

FIGURES = ("fd", "precision", "recall", "coverage", "label_read")
"""of each row that is kept"""
Made = TypeVar("Made", bound="Training | Ranking")
KEPT = ("reconstruction", "standard", "mixture", "learned", "tuned")


@dataclass(frozen=True)
class Training:
    """One training of a command on one seed, and what its comparison found."""

    command: str
    """what stands after `train_all`, without the seed and where the images lie"""
    seed: int
    gap_closed: float | None
    gap_closed_tuned: float | None
    sampling: str
    """how the tuned row was drawn"""
    rows: dict[str, dict[str, float]]
    """by the name of a row, its figures"""
    images: int
    """in every row"""
    seconds: dict[str, float]
    """of each phase of the training, and of the comparison"""
    commit: str
    hardware: str
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, command: str, seed: int, comparison: Comparison, seconds: dict[str, float], commit: str, hardware: str
    ) -> "Training":
        tuned = comparison.priors.get("tuned")
        rows = {}
        for name in KEPT:
            if name in comparison.rows:
                figures = {figure: getattr(comparison.rows[name], figure) for figure in FIGURES}
                rows[name] = {figure: value for figure, value in figures.items() if value is not None}
        return cls(
            command=command,
            seed=seed,
            gap_closed=comparison.gap_closed,
            gap_closed_tuned=comparison.gap_closed if tuned is None else comparison.gap_closed_tuned,
            sampling="as fitted" if tuned is None or tuned.sampling is None else described(tuned.sampling),
            rows=rows,
            images=comparison.images,
            seconds=seconds,
            commit=commit,
            hardware=hardware,
            versions=comparison.versions,
        )

    def figure(self, row: str, name: str) -> float | None:
        """The figure of a row; of the learned prior as fitted, where no other way to draw was better."""
        row = "learned" if row == "tuned" and "tuned" not in self.rows else row
        return self.rows.get(row, {}).get(name)


@dataclass(frozen=True)
class Ranking:
    """Every prior on the decoder of one training, the nearest to the training images first."""

    command: str
    """of the training whose stage 1 they share"""
    seed: int
    standings: list[Standing]
    commit: str
    hardware: str


@dataclass(frozen=True)
class Results:
    trainings: list[Training] = field(default_factory=list)
    rankings: list[Ranking] = field(default_factory=list)

    def with_training(self, new: Training) -> "Results":
        """A new training takes the place of the same command's on the same seed."""
        return replace(self, trainings=in_place(self.trainings, new))

    def with_ranking(self, new: Ranking) -> "Results":
        """A new ranking takes the place of that on the same decoder."""
        return replace(self, rankings=in_place(self.rankings, new))


def read_results(path: Path) -> Results:
    """Raises UserError where the file holds something else."""
    if not path.is_file():
        return Results()
    return read_as(path, lambda values: structured(values, Results), "delete it, or bring back its last version")


def write_results(path: Path, results: Results) -> None:
    write_json(path, asdict(results))


def in_place(old: list[Made], new: Made) -> list[Made]:
    """The results with a new one in the place of the same command's on the same seed. Commands keep the order they came in."""
    order = list(dict.fromkeys(one.command for one in [*old, new]))
    others = [one for one in old if (one.command, one.seed) != (new.command, new.seed)]
    return sorted([*others, new], key=lambda one: (order.index(one.command), one.seed))


# Tables


def over_seeds(trainings: list[Training], of: Callable[[Training], float | None], digits: int, spread: bool = True) -> str:
    """The mean over trainings, and ± their standard deviation where there are several; a dash where one has no figure.

    spread: whether the standard deviation is shown.
    """
    values = [of(training) for training in trainings]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    deviation = f" ± {stdev(known):.{digits}f}" if spread and len(known) > 1 else ""
    return f"{mean(known):.{digits}f}{deviation}"


def of_row(row: str, figure: str) -> Callable[[Training], float | None]:
    return lambda training: training.figure(row, figure)


def by_command(trainings: list[Training]) -> dict[str, list[Training]]:
    found: dict[str, list[Training]] = {}
    for training in trainings:
        found.setdefault(training.command, []).append(training)
    return found


def summary(trainings: list[Training]) -> list[list[str]]:
    """One row a command: Fréchet distances, and the gap closed."""
    rows = [["preset", "reconstructions", "N(0, I)", "mixture", "learned", "tuned", "gap closed", "gap closed, tuned", "seeds"]]
    for command, some in by_command(trainings).items():
        cells = [over_seeds(some, of_row(row, "fd"), 2) for row in KEPT]
        cells += [over_seeds(some, lambda one: one.gap_closed, 3), over_seeds(some, lambda one: one.gap_closed_tuned, 3)]
        rows.append([f"`{command}`", *cells, str(len(some))])
    return rows


def overview(trainings: list[Training]) -> list[list[str]]:
    """One row a command, in means over seeds: Fréchet distances from the worst source of latents to the best, and minutes."""
    rows = [["preset", "N(0, I)", "mixture", "learned", "tuned", "reconstructions", "gap closed", "minutes"]]
    for command, some in by_command(trainings).items():
        columns = [(of_row(row, "fd"), 2) for row in ("standard", "mixture", "learned", "tuned", "reconstruction")]
        columns += [(lambda one: one.gap_closed, 3), (lambda one: sum(one.seconds.values()) / 60, 0)]
        rows.append([f"`{command}`", *(over_seeds(some, of, digits, spread=False) for of, digits in columns)])
    return rows


def quality(trainings: list[Training]) -> list[list[str]]:
    """One row a command: precision, recall, coverage and label accuracy."""
    judged = ["precision", "recall", "coverage", "label accuracy"]
    rows = [["preset", *judged, *(f"tuned: {name}" for name in judged)]]
    for command, some in by_command(trainings).items():
        pairs = [(row, name) for row in ("learned", "tuned") for name in FIGURES[1:]]
        cells = [over_seeds(some, of_row(row, name), 2) for row, name in pairs]
        rows.append([f"`{command}`", *cells])
    return rows


def trainings_apart(trainings: list[Training]) -> list[list[str]]:
    """One row a training: what varies with the seed, and what it was made with."""
    rows = [
        [
            "preset",
            "seed",
            "learned",
            "tuned",
            "drawn with",
            "gap closed",
            "tuned",
            "seconds: stage 1, stage 2, comparison",
            "commit",
            "on",
        ]
    ]
    for one in trainings:
        distances = [over_seeds([one], of_row(row, "fd"), 2) for row in ("learned", "tuned")]
        closed = [over_seeds([one], lambda one: one.gap_closed, 3), over_seeds([one], lambda one: one.gap_closed_tuned, 3)]
        seconds = ", ".join(f"{value:.0f}" for value in one.seconds.values())
        rows.append([f"`{one.command}`", str(one.seed), *distances, one.sampling, *closed, seconds, one.commit, one.hardware])
    return rows


def priors(rankings: list[Ranking]) -> list[list[str]]:
    """One row a prior on a shared decoder: its samples, its density, its size and its time."""
    judged = ["fd", "precision", "recall", "coverage", "copied, %", "nats above the best"]
    rows = [["z from", *judged, "parameters", "s to train", "s per 1,000"]]
    for standing in (standing for ranking in rankings for standing in ranking.standings):
        fd = number(standing.fd, 2) + ("" if standing.fd_plus_minus is None else f" ± {standing.fd_plus_minus:.2f}")
        shares = [number(value, 2) for value in (standing.precision, standing.recall, standing.coverage)]
        copied = number(None if standing.copied is None else 100 * standing.copied, 1)
        nats = number(standing.nats_above_best, 1)
        if standing.nats_above_best and standing.nats_plus_minus is not None:
            nats += f" ± {standing.nats_plus_minus:.1f}"
        times = [number(standing.seconds_to_train, 0), number(standing.seconds_to_draw, 1)]
        size = "–" if standing.parameters is None else f"{standing.parameters:,}"
        rows.append([standing.prior, fd, *shares, copied, nats, size, *times])
    return rows


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


TABLES: dict[str, Callable[[Results], list[list[str]]]] = {
    "overview": lambda results: overview(results.trainings),
    "summary": lambda results: summary(results.trainings),
    "quality": lambda results: quality(results.trainings),
    "trainings": lambda results: trainings_apart(results.trainings),
    "priors": lambda results: priors(results.rankings),
}


MARKED = re.compile(r"<!-- table (\w+)(?: of ([^\n]+))? -->\n.*?<!-- end -->", re.DOTALL)


def written(text: str, results: Results) -> str:
    """A document with its tables made anew. Raises UserError for a table that there is not."""

    def anew(found: re.Match[str]) -> str:
        beginning, (name, command) = found.group(0).partition("\n")[0], found.groups()
        if name not in TABLES:
            raise UserError(f"there is no table {name!r}; there are: {', '.join(TABLES)}")
        return f"{beginning}\n{markdown(TABLES[name](of_command(results, command)))}\n<!-- end -->"

    return MARKED.sub(anew, text)


def of_command(results: Results, command: str | None) -> Results:
    """All results where no command is named. Raises UserError where there are none of a command."""
    if command is None:
        return results
    some = Results(
        [training for training in results.trainings if training.command == command],
        [ranking for ranking in results.rankings if ranking.command == command],
    )
    if some == Results():
        raise UserError(
            f"a table is of {command!r}, of which there are no results: python -m pipelines.reproduce {shlex.quote(command)}"
        )
    return some
