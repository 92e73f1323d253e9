"""What an export is: a run's folder with what drawing needs, which comes from elsewhere and is only read.

Its export.json lists the SHA-256 of every other file, so a copy is known to be whole. `pipelines.pages.exports` writes it.
"""

from pathlib import Path

from pipelines.console import UserError
from pipelines.files import read_as
from pipelines.training.checkpoints import checksum

LIST, CARD = "export.json", "README.md"
LIBRARY = "library_name: two-stage-latent-prior"
"""what a card says of itself, which tells it from a README.md of the user's"""
FORMAT = 1
"""of an export; higher where an earlier version would read it wrongly"""


def is_export(folder: Path) -> bool:
    """Whether a folder is an export, by its list or its card, so that one that was copied in part is not taken for a run."""
    return (folder / LIST).is_file() or LIBRARY in metadata_of(folder / CARD).splitlines()


def metadata_of(card: Path) -> str:
    """What stands between the first two lines `---` of a card; nothing where there is none."""
    if not card.is_file():
        return ""
    text = card.read_text(errors="replace")
    return text.partition("\n---")[0] if text.startswith("---\n") else ""


def files_of(folder: Path) -> list[str]:
    """All files of an export but its list, by their names in it. What begins with a dot is of a program that brought it."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(name.as_posix() for name in names if name.name != LIST and not any(part[0] == "." for part in name.parts))


AGAIN = "get the export again, or make it again with python -m pipelines.export"


def files_listed(folder: Path, again: str = AGAIN) -> dict[str, str]:
    """The checksums of an export's files by their names, from its list. again: how to get it as it was made.

    Raises UserError where the list is missing or damaged, or of a later version.
    """
    if not (folder / LIST).is_file():
        raise UserError(f"{folder} is a part of an export: it has no {LIST}; {again}")
    version, listed = read_as(folder / LIST, lambda values: (int(values["format"]), dict(values["files"].items())), again)
    if version > FORMAT:
        raise UserError(f"{folder} was exported by a later version of this software: update it, then run the command again")
    return listed


def check(folder: Path, again: str = AGAIN) -> None:
    """Raises UserError where an export is of a later version, or is not as it was made. Nothing in it is run or followed.

    The card may be edited: it is for people. again: how to get it as it was made.
    """
    listed = files_listed(folder, again)
    found = {name: checksum(folder / name) for name in files_of(folder)}
    differing = sorted(name for name in {*found, *listed} if name != CARD and found.get(name) != listed.get(name))
    if differing:
        name = differing[0]
        how = "is missing" if name not in found else "was added" if name not in listed else "is truncated or altered"
        raise UserError(f"{folder} is not as it was exported: {name} {how}; {again}")
