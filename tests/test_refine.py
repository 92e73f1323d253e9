"""The third phase: both stages trained on under the learned prior."""

import dataclasses

import pytest
import torch

from pipelines.training.refine import BothStages
from stage1_vae import bottlenecks, likelihoods
from stage1_vae.autoencoder import Autoencoder, AutoencoderConfig
from stage2_prior.autoregressive import AutoregressiveConfig, AutoregressivePrior
from stage2_prior.conditions import ClassLabel
from stage2_prior.heads import Categorical
from stage2_prior.latents import LatentSpec
from tests.parts import BACKBONES, NETWORKS

CONFIG = AutoencoderConfig(NETWORKS["convolutional-flat"], bottlenecks.Gaussian(channels=2), likelihoods.Bernoulli())
PRIOR = AutoregressiveConfig(BACKBONES["transformer"])


def built(config: AutoencoderConfig = CONFIG, prior: AutoregressiveConfig = PRIOR) -> tuple[Autoencoder, AutoregressivePrior]:
    torch.manual_seed(0)
    autoencoder = config.build((1, 8, 8))
    return autoencoder, prior.build([LatentSpec(*latent) for latent in autoencoder.latents], classes=3)


def test_the_loss_is_the_elbo_under_the_prior_and_reaches_every_weight():
    """With a prior that is N(0, I), it is stage 1's own loss, up to the one draw that stands for the rate."""
    autoencoder, prior = built()
    both = BothStages(autoencoder, prior)
    images = torch.randint(0, 2, (6, 1, 8, 8), dtype=torch.uint8) * 255
    both(images)["loss"].backward()
    assert [name for name, p in both.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []

    head = prior.head
    with torch.no_grad():  # every component N(0, 1)
        head.output.weight.zero_()
        head.output.bias.zero_()
        many = images.repeat(4000, 1, 1, 1)
        assert float(both(many)["loss"]) == pytest.approx(float(autoencoder(many)["loss"]), abs=0.05)


def test_a_learned_sigma_moves_as_in_stage_1():
    """In training only; over steps that leave the weights alone, to the root mean squared error of draws of z."""
    autoencoder, prior = built(dataclasses.replace(CONFIG, likelihood=likelihoods.Gaussian()))
    both, sigma = BothStages(autoencoder, prior), autoencoder.likelihood.sigma
    images = torch.randint(0, 256, (500, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        both.eval()(images)
        assert autoencoder.likelihood.sigma == sigma
        for _ in range(3):
            both.train()(images)
        error = autoencoder.values(autoencoder.sample(autoencoder.encode(images))) - autoencoder.likelihood.scale(images)
    assert float(autoencoder.likelihood.sigma) == pytest.approx(float(error.square().mean().sqrt()), rel=0.01)
    assert float(autoencoder.likelihood.sigma) != pytest.approx(float(sigma), rel=0.05)


@pytest.mark.parametrize(
    ("config", "prior", "message"),
    [
        (dataclasses.replace(CONFIG, bottleneck=bottlenecks.Deterministic()), PRIOR, "only a Gaussian bottleneck"),
        (
            dataclasses.replace(CONFIG, bottleneck=bottlenecks.VectorQuantized(codes=5, channels=2)),
            dataclasses.replace(PRIOR, head=Categorical()),
            "only a Gaussian bottleneck",
        ),
        (CONFIG, dataclasses.replace(PRIOR, condition=ClassLabel()), "unconditional priors"),
    ],
)
def test_what_cannot_be_refined_is_refused(config, prior, message):
    with pytest.raises(ValueError, match=message):
        BothStages(*built(config, prior))
