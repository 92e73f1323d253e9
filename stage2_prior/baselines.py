"""The priors that need no training, by name."""

from collections.abc import Callable

from stage2_prior.context_models import IndependentCodes, Order2Codes
from stage2_prior.gaussians import GaussianMixturePrior, StandardNormal
from stage2_prior.latents import LatentSpec
from stage2_prior.prior import Prior

MIXTURE_COMPONENTS = (10, 50, 100, 200)

CONTINUOUS_BASELINES: dict[str, Callable[[list[LatentSpec]], Prior]] = {
    "standard": StandardNormal,
    "gaussian": lambda specs: GaussianMixturePrior(specs, 1),
    "mixture": lambda specs: GaussianMixturePrior(specs, *MIXTURE_COMPONENTS),
}
CODE_BASELINES: dict[str, Callable[[list[LatentSpec]], Prior]] = {
    "standard": lambda specs: IndependentCodes(specs, fitted=False),
    "unigram": lambda specs: IndependentCodes(specs, fitted=True),
    "order2": Order2Codes,
}


def baselines(specs: list[LatentSpec]) -> dict[str, Callable[[list[LatentSpec]], Prior]]:
    """By name, for latents of this kind. `standard` is what is sampled from without a second stage."""
    return CONTINUOUS_BASELINES if specs[0].vocabulary is None else CODE_BASELINES
