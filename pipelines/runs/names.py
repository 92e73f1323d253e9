"""The names that commands offer. What they stand for is imported elsewhere, so that --help stays fast."""

from typing import Annotated, Literal

import tyro

from pipelines.console import DEVICES

DATA = {
    "mnist5k": "5,000 real digits that need no download; minutes on 2 cores",
    "mnist": "MNIST, 60,000 digits",
    "fashion-mnist": "Fashion-MNIST, 60,000 pieces of clothing; fashion for short",
    "cifar10": "CIFAR-10, 50,000 colour pictures",
    "folder": "your own images: --data.root PATH",
    "webdataset": "your own images in tar files: --data.urls PATTERN",
    "torchvision": "any data set of torchvision, at any size: --data.name NAME",
    "parquet": "your own images in Parquet files, as the Hugging Face hub has them: --data.root PATH",
}
RECIPES = {
    "vae": "the default: a VAE, and a PixelSNAIL (a gated PixelCNN with attention)",
    "givt": "GIVT: the same VAE, and a transformer with a mixture of Gaussians",
    "vqvae": "VQ-VAE: codes on one grid, and a PixelSNAIL",
    "vqvae2": "VQ-VAE-2: codes on two grids, and a prior for each",
    "dalle": "a small DALL-E: a discrete VAE, and a transformer conditioned on a caption",
    "plain": "the opponent of vae: the same networks and time, all for samples from N(0, I)",
    "2d": "the classic plane: fully connected, two latent numbers",
    "binary": "black-and-white pixels, for the likelihoods that papers quote; a third phase fine-tunes both stages",
    "8bit": "vae with a probability of 8-bit images as p(x|z), for bits per dimension",
}
DEFAULT_PRESET, DEFAULT_RECIPE = "mnist5k", "vae"
SHORT = {"fashion": "fashion-mnist"}

ExtractorName = Literal["classifier", "inception", "dinov2"]
Pixels = Literal["mean", "sample"]
Dtype = Annotated[
    Literal["float32", "bfloat16"],
    tyro.conf.arg(help="precision of the learned prior's backbone; its densities and the decoder stay float32"),
]
PRIORS = ("standard", "gaussian", "mixture", "unigram", "order2", "learned", "posterior")

Device = Annotated[
    str,
    tyro.conf.arg(metavar="{" + ",".join(DEVICES) + "}", help="the device to run on; auto takes the fastest that is there"),
]
CardDevice = Annotated[Device, tyro.conf.arg(help="the device to sample the images of the card on")]
Half = Annotated[
    bool,
    tyro.conf.arg(
        help="store weights in float16, and those that autoguidance leads away from in 8 bits: half the size or less, and"
        " slightly different samples; statistics and codebooks stay float32"
    ),
]
RunName = Annotated[
    str, tyro.conf.arg(metavar="RUN", help="a name under checkpoints/, a trained model, a path, or hub:owner/name")
]
PriorName = Annotated[str, tyro.conf.arg(metavar="{" + ",".join(PRIORS) + "}")]


def preset_name(data: str, recipe: str) -> str:
    """The shortest name of a preset, which is its run's too where none is given."""
    if recipe == DEFAULT_RECIPE:
        return data
    short = next((short for short, long in SHORT.items() if long == data), data)
    return f"{short}-{recipe}"
