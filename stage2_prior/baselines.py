"""The baseline priors, which need no gradient training, by name."""

from collections.abc import Callable

from stage2_prior.context_models import MOST_COUNTED, IndependentCodes, Order2Codes
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
    """The baselines for these latents, by name. `standard` is the prior of a VAE without a second stage.

    `order2` is left out for levels of more than MOST_COUNTED codes.
    """
    if specs[0].vocabulary is None:
        return CONTINUOUS_BASELINES
    counted = all((spec.vocabulary or 0) <= MOST_COUNTED for spec in specs)
    return {name: make for name, make in CODE_BASELINES.items() if counted or name != "order2"}
