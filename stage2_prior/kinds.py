"""All kinds of learned priors. A config in this union can be chosen by name on the command line."""

from stage2_prior.autoregressive import AutoregressiveConfig, CascadeConfig
from stage2_prior.flow import FlowConfig
from stage2_prior.second_vae import SecondVaeConfig
from stage2_prior.vamp import VampConfig

RivalConfig = FlowConfig | SecondVaeConfig | VampConfig
"""Priors of the whole flattened latent at once: what an autoregressive prior is compared with."""
PriorConfig = AutoregressiveConfig | CascadeConfig | RivalConfig
