"""The third phase, where a config asks for it: both stages trained on together, toward one bound on log p(x).

    loss = -E_q[log p(x|z) + log p(z) - log q(z|x)],   p(z) the learned prior, in nats an image

Stage 1 paid for a q(z|x) near N(0, I); under the learned prior it need not, and encoder and decoder move to where the two
together explain the images best (the ELBO with a learned prior: Chen et al. 2017, "Variational Lossy Autoencoder").
"""

from torch import Tensor, nn

from stage1_vae.autoencoder import Autoencoder
from stage1_vae.bounds import log_posterior
from stage2_prior.autoregressive import LearnedPrior


class BothStages(nn.Module):
    """Both stages as one model. Raises ValueError where no gradient reaches the encoder, or the prior is conditional."""

    def __init__(self, autoencoder: Autoencoder, prior: LearnedPrior):
        super().__init__()
        if any(vocabulary is not None for _, vocabulary in autoencoder.latents) or not autoencoder.bottleneck.has_density:
            raise ValueError("only a Gaussian bottleneck can be refined under its prior: its samples pass a gradient on")
        if any(level.condition is not None for level in prior.levels):
            raise ValueError("refining is for unconditional priors: use --prior.condition none, or --refine.steps 0")
        self.autoencoder, self.prior = autoencoder, prior

    def forward(self, images: Tensor, progress: float = 0.0) -> dict[str, Tensor]:
        """images uint8 B C H W; returns loss, distortion and rate, mean nats an image, of one z ~ q(z|x) each."""
        autoencoder, likelihood = self.autoencoder, self.autoencoder.likelihood
        posteriors = autoencoder.encode(images)
        levels = autoencoder.sample(posteriors)
        log_q = log_posterior(levels, posteriors)
        outputs, targets = autoencoder.outputs(levels), likelihood.scale(images)
        distortion = -likelihood(outputs).log_prob(targets).mean()
        if self.training:
            likelihood.update(outputs, targets)
        rate = (log_q - self.prior.log_prob(levels)).mean()
        return {"loss": distortion + rate, "distortion": distortion, "rate": rate}
