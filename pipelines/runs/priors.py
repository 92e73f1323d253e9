"""The priors of a run, by name: the learned one, those that need no training, and q(z) itself."""

import torch
from torch import Tensor

from pipelines import files
from pipelines.console import Progress, UserError, nearest
from pipelines.runs.latents import training_latents
from pipelines.runs.parts import finished, last_phase, load_prior
from pipelines.runs.run import Run
from pipelines.training.order import seed_of
from stage2_prior.baselines import baselines
from stage2_prior.conditions import LabelCondition
from stage2_prior.gaussians import AggregatePosterior
from stage2_prior.latents import LatentSpec
from stage2_prior.prior import Prior
from stage2_prior.sampling import AS_FITTED, CannotSample, Sampling


def prior_names(run: Run, specs: list[LatentSpec]) -> list[str]:
    """The priors that a run has, the learned one last; `posterior`, which is no generator, is not among them."""
    return [*baselines(specs), *(["learned"] if run.learned else [])]


def open_prior(run: Run, name: str, specs: list[LatentSpec]) -> Prior:
    """A prior by name, fitted. Raises UserError for an unknown name or an unfinished run."""
    if name == "learned":
        return load_prior(run, specs)
    if name == "posterior":
        return AggregatePosterior(training_latents(run, specs))
    known = baselines(specs)
    if name not in known:
        raise UserError(f"there is no prior {name!r} for these latents{nearest(name, [*prior_names(run, specs), 'posterior'])}")
    baseline = known[name](specs)

    def fitted() -> dict[str, Tensor]:
        latents = training_latents(run, specs)
        with Progress(f"fitting the {name} prior", len(latents), "images") as progress:
            torch.manual_seed(seed_of(run.config.seed, 3))
            baseline.estimate(latents)
            progress.update(len(latents))
        return baseline.state_dict()

    if name != "standard":
        key = finished(run, last_phase(run, "autoencoder")).digest()
        path = run.work / "baselines" / f"{name}.safetensors"
        state = files.cached(path, key, fitted)
        try:
            if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
                raise ValueError("not all of it are numbers")
            baseline.load_state_dict(state)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{path} is of other latents ({error}); delete {path.parent} to have it made again") from error
    run.fabric.to_device(baseline)
    return baseline.eval()


def check_without_context(prior: Prior) -> None:
    """Raises UserError for a prior that has no density without its label or caption."""
    try:
        prior.null_contexts(1)
    except CannotSample as error:
        raise UserError(str(error)) from error


class WithoutContext(Prior):
    """A prior without its condition, so that it compares with unconditional priors.

    Of labels it is the exact mixture, p(z) = Σ p(label) p(z|label). Of captions, which cannot be summed over, it is the prior
    under the empty caption.
    """

    def __init__(self, prior: Prior):
        """Raises UserError as `check_without_context`, but not for labels."""
        super().__init__()
        self.by_label = isinstance(prior.given_condition, LabelCondition)
        if not self.by_label:
            check_without_context(prior)
        self.prior = prior

    def log_prob(self, levels: list[Tensor], contexts: Tensor | None = None) -> Tensor:
        condition, batch = self.prior.given_condition, len(levels[0])
        if not isinstance(condition, LabelCondition):
            return self.prior.log_prob(levels, self.prior.null_contexts(batch))
        labels, log_shares = condition.frequencies.nonzero().flatten(), condition.frequencies.log()
        each = [log_shares[label] + self.prior.log_prob(levels, label.expand(batch)) for label in labels]
        return torch.stack(each).logsumexp(0)

    def sample(self, indices: Tensor, seed: int, how: Sampling = AS_FITTED, contexts: Tensor | None = None) -> list[Tensor]:
        return self.prior.sample(indices, seed, how, None if self.by_label else self.prior.null_contexts(len(indices)))
