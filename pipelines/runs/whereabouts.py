"""Where a run's data lie. A place is trusted only if a command on this machine has named it.

The folder of a run may come from anyone, and the URL of a shard may be a shell command (`pipe:`). So the places in its
config.json are not trusted. `train_all` notes the places that it was given, each as an empty file named by a checksum, in the
user's state folder. That lies outside of every run, so the notes also hold for a run that was moved.
"""

import hashlib
import os
import shlex
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.console import UserError, first_process, say
from pipelines.runs.config import RunConfig, replaced

SETTINGS = {"data": ("root", "urls", "test_urls", "cache"), "metrics": ("weights",)}


def places(config: RunConfig) -> dict[str, Path | str]:
    """The settings that name a place other than the default one, by their options on the command line."""
    found = {}
    for name, settings in SETTINGS.items():
        part: Any = vars(config)[name]
        for setting in settings:
            default = getattr(type(part), setting, None)  # of a dataclass, its attribute
            if (value := vars(part).get(setting)) not in (None, default):
                found[f"--{name}.{setting.replace('_', '-')}"] = value
    return found


def without_places(config: RunConfig) -> RunConfig:
    """A config that names no place other than the default one."""
    for name, settings in SETTINGS.items():
        part: Any = vars(config)[name]
        defaults = {setting: getattr(type(part), setting) for setting in settings if setting in vars(part)}
        config = replaced(config, name, replace(part, **defaults))
    return config


def remember(config: RunConfig) -> None:
    """Believe the places of a config that was given on this machine, from now on."""
    wanted = [record(option, place) for option, place in places(config).items()] if first_process() else []
    try:
        for path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    except OSError as error:
        say(f"warning: {error.filename} cannot be written, so other commands will not believe where the data of this run lie")


def check(config: RunConfig, run: Path, given: Collection[str] | None = None) -> None:
    """Raises UserError where a config names a place that no command on this machine has.

    given: the options of the command that asks, where it takes them.
    """
    for option, place in places(config).items():
        if option not in (given or ()) and not record(option, place).exists():
            named = f"{option} {shlex.quote(str(place))}"
            remedy = (
                f"add {named}" if given is not None else f"python -m pipelines.train_all --run {shlex.quote(str(run))} {named}"
            )
            raise UserError(
                f"the config of {run} says {option} {str(place)!r}, a place that you have not confirmed on this machine; a config"
                f" may come from anyone. If you trust it: {remedy}"
            )


def options_in(arguments: Sequence[str]) -> set[str]:
    """The options that a command line gives, as `places` names them."""
    return {argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")}


def record(option: str, place: Path | str) -> Path:
    """The file that is there where a place is believed. A path is known by where it leads to."""
    named = str(place.resolve() if isinstance(place, Path) else place)
    digest = hashlib.sha256(os.fsencode(f"{option} {named}")).hexdigest()
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "two-stage-latent-prior" / "places" / digest
