"""RunConfig, and its reading and writing. The union types of the configs are the registry."""

import functools
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import cattrs
from annotated_types import Interval
from cattrs.strategies import configure_tagged_union

from pipelines.console import UserError, nearest
from pipelines.data.sets import DataConfig
from pipelines.files import read_as, strict, structured
from pipelines.runs.names import ExtractorName, Pixels
from pipelines.training.config import FitConfig, Precision
from stage1_vae.autoencoder import AutoencoderConfig, BottleneckConfig
from stage1_vae.likelihoods import LikelihoodConfig
from stage1_vae.networks import NetworkConfig
from stage2_prior.autoregressive import AutoregressiveConfig, BackboneConfig
from stage2_prior.conditions import ConditionConfig, RivalCondition
from stage2_prior.heads import HeadConfig
from stage2_prior.kinds import PriorConfig

CLASSIFIER = FitConfig(steps=1500, learning_rate=3e-3, checkpoint_steps=500, gradient_clip=10.0)


@dataclass(frozen=True)
class MetricsConfig:
    """How samples are judged."""

    images: Annotated[int, Interval(ge=1, le=10_000_000)] = 10_000
    """number of images in every row of the comparison, at most"""
    pixels: Pixels = "mean"
    """judge the mean of p(x|z), or a sample from it, as for black-and-white images"""
    extractor: ExtractorName = "classifier"
    """the network whose features images are compared in: classifier, a small one trained on the data set's labels; inception
    (FID); dinov2 (Stein et al. 2023)"""
    weights: Path | None = None
    """file of inception's or dinov2's weights, where they cannot be downloaded"""
    classifier: FitConfig = CLASSIFIER
    """training of the classifier"""


@dataclass(frozen=True)
class RunConfig:
    """The settings that a run's weights and figures depend on."""

    data: DataConfig
    stage1: FitConfig
    stage2: FitConfig
    mirror: bool = False
    """fit the priors to the latents of mirror images too, left to right: for scenes and objects, not for writing. Stage 1, which
    reconstructs mirror images as well without, is not trained on them. Captions are not changed: where they say left or right,
    they are wrong for the mirror image"""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    prior: PriorConfig = field(default_factory=AutoregressiveConfig)
    refine: FitConfig | None = None
    """a third phase that fine-tunes both stages jointly, for the ELBO under the learned prior; None or 0 steps leaves it out"""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    seed: Annotated[int, Interval(ge=0, le=2**32 - 1)] = 0
    """random seed of the weights, the data order and every draw in training"""
    precision: Precision = "auto"
    """precision of the convolutions in training: float32, bfloat16, or auto, which is bfloat16 where the device supports it
    natively. Densities, weights and everything after training are always float32"""

    def __post_init__(self) -> None:
        if self.refine is not None and self.refine.steps == 0:
            object.__setattr__(self, "refine", None)


def check_ranges(config: Any, name: str = "") -> None:
    """Raises UserError where a setting, at any depth, lies outside the Interval that its type is annotated with."""
    intervals = intervals_of(type(config))  # type: ignore[arg-type]
    for entry in fields(config):
        value, here = getattr(config, entry.name), f"{name}.{entry.name.replace('_', '-')}".removeprefix(".")
        if is_dataclass(value):
            check_ranges(value, here)
        elif (interval := intervals[entry.name]) is not None and value is not None:
            for number in value if isinstance(value, tuple) else (value,):
                if not inside(number, interval):
                    raise UserError(f"--{here} is a number {interval_in_words(interval)}, not {number}")


@functools.cache
def intervals_of(kind: type) -> dict[str, Interval | None]:
    """The intervals of a config's fields, by name."""
    return {name: interval_of(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}


def interval_of(hint: Any) -> Interval | None:
    """The one that a type is annotated with, or a part of it: of `Annotated[int, Interval(ge=1)] | None`, too."""
    own = [part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Interval)]
    return next(iter([*own, *filter(None, map(interval_of, get_args(hint)))]), None)


def inside(number: float, interval: Interval) -> bool:
    """False of what is not a number."""
    tests = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}
    return all(test(number, bound) for name, test in tests.items() if (bound := getattr(interval, name)) is not None)


def interval_in_words(interval: Interval) -> str:
    lower = f"from {interval.ge}" if interval.ge is not None else f"above {interval.gt},"
    upper = (
        f"up and below {interval.lt}" if interval.le is None else f"{'to' if interval.gt is None else 'at most'} {interval.le:,}"
    )
    return f"{lower} {upper}"


@functools.cache  # it takes tens of milliseconds
def converter() -> cattrs.Converter:
    made = strict(cattrs.Converter(forbid_extra_keys=True))
    made.register_unstructure_hook(Path, os.fspath)
    made.register_structure_hook(str, lambda value, _: name_of_file(value))
    made.register_structure_hook(Path, lambda value, _: Path(name_of_file(value)))
    stage1 = (NetworkConfig, BottleneckConfig, LikelihoodConfig)
    stage2 = (BackboneConfig, HeadConfig, ConditionConfig, RivalCondition, PriorConfig)
    for union in (DataConfig, *stage1, *stage2):
        configure_tagged_union(union, made, tag_name="kind")
    return made


def name_of_file(value: Any) -> str:
    """Raises ValueError for what can be no file's name: texts in a config name places, or one of several kinds."""
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{value!r:.40} is no name")
    os.fsencode(value)
    return value


def to_dict(config: RunConfig) -> dict[str, Any]:
    """JSON-ready values; a union's member is named by `kind`."""
    return converter().unstructure(config, unstructure_as=RunConfig)


def judged_by(metrics: MetricsConfig) -> dict[str, Any]:
    """What the figures of a comparison depend on beside its seed, its extractor and the number of images, as JSON holds it."""
    values = converter().unstructure(metrics)
    return {name: values[name] for name in ("pixels", "weights", "classifier")}


def from_dict(values: dict[str, Any]) -> RunConfig:
    """Raises ValueError where the values are not a RunConfig's."""
    return structured(values, RunConfig, converter())


def differences(old: Any, new: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs as dicts differ, by dotted name with both values."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {name: (old, new)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        found |= differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    return found


def read_config(path: Path) -> RunConfig:
    """What is not in the file has its default. Raises UserError for another file."""

    def checked(values: dict[str, Any]) -> RunConfig:
        config = from_dict(values)
        check_ranges(config)
        return config

    return read_as(path, checked, "mend the file, or name another")


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """A config with other values of some settings, by their dotted paths. A path may be given as a text, and a list for a tuple.

    Raises UserError for a setting that there is not, and for a value of another type.
    """
    for path, value in settings.items():
        config = replaced(config, path, fitting(config, path, value))
    return config


def fitting(config: RunConfig, path: str, value: Any) -> Any:
    """A value as the setting takes it. Raises UserError as `with_settings`."""
    part: Any = config
    hint: Any = RunConfig
    *parents, last = path.split(".")
    for name in (*parents, last):
        known = [entry.name for entry in fields(part)] if is_dataclass(part) else []
        if name not in known:
            hint = nearest(name, known) if known else f": what it is to be a part of is {part!r}"
            raise UserError(f"there is no setting {name!r} in {path!r}{hint}")
        hint, part = get_type_hints(type(part), include_extras=True)[name], getattr(part, name)
    try:
        return converter().structure(converter().unstructure(value, unstructure_as=hint), hint)
    except Exception as error:  # which of many kinds it is depends on the type, and on the version of cattrs
        raise UserError(f"the setting {path} is {in_words(hint)}, not {value!r}") from error


def in_words(hint: Any) -> str:
    """What a setting of a type takes."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return in_words(inner[0])
    if kind in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(in_words, inner)))
    if kind is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if kind is tuple:
        return f"a tuple, of which each is {in_words(inner[0])}"
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", Path: "a path", type(None): "None"}
    return names.get(hint) or f"a {hint.__name__}"


def replaced(config: Any, path: str, value: Any) -> Any:
    """A config in which the part or setting at a dotted path is another."""
    name, _, rest = path.partition(".")
    return replace(config, **{name: replaced(vars(config)[name], rest, value) if rest else value})
