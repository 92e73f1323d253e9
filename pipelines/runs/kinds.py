"""The kinds of parts that a config can be made of, chosen by name: --prior.backbone transformer.

The union types of the configs are the registry; a kind is named by its class, in lower case and without Config.
"""

import re
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, get_args, get_type_hints

from pipelines.console import UserError, nearest
from pipelines.runs.config import RunConfig, replaced
from stage1_vae.hierarchy import Hierarchical
from stage2_prior.autoregressive import AutoregressiveConfig, CascadeConfig
from stage2_prior.conditions import Cluster, RivalCondition, Unconditional
from stage2_prior.heads import Categorical, GaussianMixture, HeadConfig
from stage2_prior.kinds import PriorConfig, RivalConfig

RIVALS = {
    "flow": "normalizing flow",
    "second-vae": "second VAE",
    "vamp": "mixture of learned posteriors",
}
"""Kinds of learned priors that are not autoregressive, in words."""
BOTTLENECK, PRIOR, CONDITION = "autoencoder.bottleneck", "prior", "prior.condition"


def kinds_of(config: Any, path: str = "") -> dict[str, dict[str, type]]:
    """The kinds by name of each part of a config of which there are several, by its dotted path.

    The data set is not among them: a preset names it.
    """
    found: dict[str, dict[str, type]] = {}
    for entry in fields(config):
        here, value = f"{path}.{entry.name}".removeprefix("."), vars(config)[entry.name]
        if not is_dataclass(value) or here == "data":
            continue
        kinds = [kind for kind in get_args(get_type_hints(type(config))[entry.name]) if is_dataclass(kind)]
        if len(kinds) > 1:
            found[here] = {name_of(kind): kind for kind in kinds}  # type: ignore[arg-type, misc]
        found |= kinds_of(value, here)
    return found


def choices(config: RunConfig) -> dict[str, dict[str, type]]:
    """What a command line can choose: the kinds of every part, and those of the condition, which all levels share."""
    found = kinds_of(config)
    return found | {CONDITION: found["prior.top.condition"]} if isinstance(config.prior, CascadeConfig) else found


def name_of(kind: type) -> str:
    """FiniteScalar is finite-scalar, PixelCNNConfig is pixelcnn; an unconditional prior has the condition none."""
    if kind is Unconditional:
        return "none"
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "-", kind.__name__.removesuffix("Config")).lower()


def name_of_prior(prior: PriorConfig) -> str:
    """What a learned prior is, for people: PixelSNAIL with clusters; of several levels all, such as PixelSNAIL + PixelCNN.

    A condition that is given, a label or a caption, is not part of the name.
    """
    if isinstance(prior, RivalConfig):
        return RIVALS[name_of(type(prior))]
    levels = (prior.top, prior.bottom) if isinstance(prior, CascadeConfig) else (prior,)
    names = dict.fromkeys(type(level.backbone).__name__.removesuffix("Config") for level in levels)
    return " + ".join(names) + (" with clusters" if isinstance(prior.condition, Cluster) else "")


def choose_kinds(config: RunConfig, arguments: list[str]) -> tuple[RunConfig, list[str]]:
    """A config with the kinds that a command line names, with their default settings, and the arguments that are left.

    Where a bottleneck is chosen, heads and levels of the prior follow, unless they are chosen too. Raises UserError for a kind
    that there is not.
    """
    left, chosen = list(arguments), set()
    while (found := first_choice(config, left)) is not None:
        # All levels of a prior have the same condition.
        both = found.path == CONDITION and isinstance(config.prior, CascadeConfig)
        for path in ("prior.top.condition", "prior.bottom.condition") if both else (found.path,):
            part = config
            for name in path.split("."):
                part = vars(part)[name]
            if type(part) is not found.kind:
                config = replaced(config, path, like(config.prior, found.kind()) if path == PRIOR else found.kind())
            chosen.add(path)
        del left[found.start : found.stop]
    if BOTTLENECK in chosen:
        config = replace(config, prior=fitting_prior(config, chosen))
    return config, left


def like(before: PriorConfig, prior: PriorConfig) -> PriorConfig:
    """A prior of another kind with the condition of the one before, where it takes such a condition."""
    condition = before.condition
    if isinstance(prior, CascadeConfig):
        return replace(prior, top=replace(prior.top, condition=condition), bottom=replace(prior.bottom, condition=condition))
    if isinstance(prior, AutoregressiveConfig):
        return replace(prior, condition=condition)
    return replace(prior, condition=condition) if isinstance(condition, RivalCondition) else prior


class Choice(NamedTuple):
    """A kind that a command line names for a part of a config."""

    path: str  # of the part, dotted
    kind: type
    start: int  # the arguments that say so are those from start to stop-1
    stop: int


def first_choice(config: RunConfig, arguments: list[str]) -> Choice | None:
    """The argument that chooses the kind of the outermost part. Raises UserError for a kind that there is not."""
    found = []
    for path, kinds in choices(config).items():
        for index, argument in enumerate(arguments):
            option, equals, value = argument.partition("=")
            if option.replace("-", "_") != f"__{path}":
                continue
            if not equals:
                value = arguments[index + 1] if index + 1 < len(arguments) else ""
            if not value or value.startswith("--"):
                raise UserError(f"{option} needs a kind: {', '.join(kinds)}")
            if value not in kinds:
                raise UserError(f"{option} has no kind {value!r}{nearest(value, kinds)}")
            found.append(Choice(path, kinds[value], index, index + (1 if equals else 2)))
    return min(found, key=lambda choice: (choice.path.count("."), choice.path), default=None)


def fitting_prior(config: RunConfig, chosen: set[str]) -> PriorConfig:
    """The prior with a head for the latents of a bottleneck that was chosen, and one prior a level where it has several."""
    bottleneck, prior = config.autoencoder.bottleneck, config.prior
    if isinstance(prior, RivalConfig):  # which has no heads; building it says what does not fit
        return prior
    continuous, several = bottleneck.continuous, isinstance(bottleneck, Hierarchical)
    if PRIOR not in chosen:
        if several and not isinstance(prior, CascadeConfig):
            prior = CascadeConfig(prior, prior)
        elif not several:
            prior = prior.top
    if isinstance(prior, AutoregressiveConfig):
        return prior if "prior.head" in chosen else with_head(prior, continuous)
    top = prior.top if "prior.top.head" in chosen else with_head(prior.top, continuous)
    return replace(prior, top=top, bottom=prior.bottom if "prior.bottom.head" in chosen else with_head(prior.bottom, continuous))


def with_head(prior: AutoregressiveConfig, continuous: bool) -> AutoregressiveConfig:
    wanted: type = GaussianMixture if continuous else Categorical
    head: HeadConfig = prior.head if isinstance(prior.head, wanted) else wanted()
    return replace(prior, head=head)
