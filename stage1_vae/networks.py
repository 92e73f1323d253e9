"""Encoders and decoders.

B batch, C colour channels, H×W pixels, F feature maps, h×w latent grid.

A network config builds an encoder, from images C H W to features F h w, and a decoder, from the bottleneck's channels on the
h×w grid to feature maps on H×W. A flat latent is a grid of one row, which a linear layer produces: positions × channels numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Protocol

from annotated_types import Interval
from einops.layers.torch import Rearrange
from torch import Tensor, nn


class Network(Protocol):
    """What every network config offers. image_shape: C H W."""

    def grid(self, image_shape: tuple[int, int, int]) -> tuple[int, int]:
        """The latent grid, h w. Raises ValueError for images that the network cannot take."""

    def encoder(self, image_shape: tuple[int, int, int]) -> tuple[nn.Module, int]:
        """A module from images B C H W to features B F h w, and F."""

    def decoder(self, latent_channels: int, image_shape: tuple[int, int, int], outputs: int) -> nn.Module:
        """A module from latents B latent_channels h w to B outputs H W."""


@dataclass(frozen=True)
class Convolutional:
    """Residual convolutional encoder and decoder, after VQ-VAE (van den Oord et al. 2017, section 4.1).

    Where we deviate: a normalization in each residual block, SiLU instead of ReLU, and residual blocks on every grid, not only
    on the latent grid. The encoder normalizes each position by itself, so that it stays local. The decoder normalizes groups of
    channels over the whole grid (Wu and He 2018), like the autoencoder of latent diffusion (Rombach et al. 2022).
    """

    width: Annotated[int, Interval(ge=2, le=65_536)] = 64
    """feature maps on the latent grid; half as many on each finer grid"""
    blocks: Annotated[int, Interval(ge=0, le=1000)] = 2
    """residual blocks on the latent grid, in the encoder and in the decoder; 2 in the paper"""
    finer_blocks: Annotated[int, Interval(ge=0, le=1000)] = 1
    """residual blocks on each grid between the latent grid and the images; 0 in the paper"""
    downsample: Annotated[int, Interval(ge=2, le=1024)] = 4
    """image size over latent grid size, a power of two: with 4, 28×28 images have a 7×7 latent grid"""
    positions: Annotated[int, Interval(ge=1, le=65_536)] | None = None
    """positions of a flat latent, a grid of one row; None keeps the convolutions' grid"""
    features: Annotated[int, Interval(ge=1, le=65_536)] = 2
    """encoder features at each position of the flat latent; a Gaussian bottleneck needs two for each of its channels, for a mean
    and a standard deviation"""

    def grid(self, image_shape: tuple[int, int, int]) -> tuple[int, int]:
        """The latent grid of images C H W. Raises ValueError where downsample does not divide the image size, and for features
        that nothing uses."""
        if self.positions is None and self.features != Convolutional.features:
            raise ValueError(
                f"features {self.features} has no effect without positions: set positions too, for a flat latent, or leave out"
                " features"
            )
        height, width = self.downsampled(image_shape)
        return (height, width) if self.positions is None else (1, self.positions)

    def downsampled(self, image_shape: tuple[int, int, int]) -> tuple[int, int]:
        """The last grid of the convolutions, h w. Raises ValueError for a size or a downsample that does not work."""
        if self.downsample < 2 or self.downsample & (self.downsample - 1):
            raise ValueError(f"downsample is a power of two from 2 up, not {self.downsample}")
        _, height, width = image_shape
        if height % self.downsample or width % self.downsample:
            raise ValueError(
                f"{height}×{width} images cannot be downsampled by {self.downsample}: use an image size divisible by"
                f" {self.downsample}, or another downsample"
            )
        return height // self.downsample, width // self.downsample

    def widths(self) -> list[int]:
        """Feature maps after each halving of the resolution, the latent grid last."""
        halvings = int(math.log2(self.downsample))
        return [self.width // 2] * (halvings - 1) + [self.width]

    def encoder(self, image_shape: tuple[int, int, int]) -> tuple[nn.Module, int]:
        layers: list[nn.Module] = []
        channels = image_shape[0]
        for width in self.widths():
            if layers:
                layers += [ResidualBlock(channels) for _ in range(self.finer_blocks)] + [nn.SiLU()]
            layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1)]
            channels = width
        layers += [nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)]
        layers += [ResidualBlock(channels) for _ in range(self.blocks)] + [nn.SiLU()]
        if self.positions is None:
            return nn.Sequential(*layers), channels
        flat = channels * math.prod(self.downsampled(image_shape))
        return nn.Sequential(*layers, nn.Flatten(), *to_flat(flat, self.positions, self.features)), self.features

    def decoder(self, latent_channels: int, image_shape: tuple[int, int, int], outputs: int) -> nn.Module:
        layers: list[nn.Module] = []
        if self.positions is not None:
            height, width = self.downsampled(image_shape)
            layers += [nn.Flatten(), nn.Linear(latent_channels * self.positions, self.width * height * width)]
            layers += [nn.Unflatten(1, (self.width, height, width))]
            latent_channels = self.width
        layers += [nn.Conv2d(latent_channels, self.width, 3, padding=1)]
        layers += [ResidualBlock(self.width, group_norm) for _ in range(self.blocks)] + [nn.SiLU()]
        channels, *finer = reversed(self.widths())
        for width in finer:
            layers += [nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1)]
            layers += [ResidualBlock(width, group_norm) for _ in range(self.finer_blocks)] + [nn.SiLU()]
            channels = width
        layers += [nn.ConvTranspose2d(channels, outputs, 4, stride=2, padding=1)]
        return nn.Sequential(*layers)


class ChannelNorm(nn.Module):
    """Layer normalization over the channels of each position by itself (Ba et al. 2016).

    Unlike group normalization, it keeps a latent a function of its own part of the image. Completion relies on this: distant
    hidden pixels must not change a latent.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """B F h w to B F h w."""
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalization with 8 groups, or fewer where 8 does not divide the channels."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


class ResidualBlock(nn.Module):
    """x + conv1×1(SiLU(conv3×3(SiLU(norm(x)))))."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module] = ChannelNorm):
        super().__init__()
        self.layers = nn.Sequential(
            norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class PlainResidualBlock(nn.Module):
    """x + conv3×3(ELU(conv3×3(ELU(x))))."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


@dataclass(frozen=True)
class FullyConnected:
    """Fully connected encoder and decoder with a flat latent. Two layers of 500 units are the classic network for digits."""

    layers: Annotated[int, Interval(ge=0, le=1000)] = 2
    """hidden layers in the encoder and in the decoder"""
    width: Annotated[int, Interval(ge=1, le=65_536)] = 500
    """units in a hidden layer"""
    positions: Annotated[int, Interval(ge=1, le=65_536)] = 2
    """positions of the flat latent, a grid of one row"""
    features: Annotated[int, Interval(ge=1, le=65_536)] = 2
    """encoder features at each position of the flat latent; a Gaussian bottleneck needs two for each of its channels, for a mean
    and a standard deviation"""

    def grid(self, image_shape: tuple[int, int, int]) -> tuple[int, int]:
        return 1, self.positions

    def encoder(self, image_shape: tuple[int, int, int]) -> tuple[nn.Module, int]:
        sizes = [math.prod(image_shape)] + [self.width] * self.layers
        layers = [nn.Flatten(), *hidden_layers(sizes), *to_flat(sizes[-1], self.positions, self.features)]
        return nn.Sequential(*layers), self.features

    def decoder(self, latent_channels: int, image_shape: tuple[int, int, int], outputs: int) -> nn.Module:
        _, height, width = image_shape
        sizes = [latent_channels * self.positions] + [self.width] * self.layers
        return nn.Sequential(
            nn.Flatten(),
            *hidden_layers(sizes),
            nn.Linear(sizes[-1], outputs * height * width),
            nn.Unflatten(1, (outputs, height, width)),
        )


@dataclass(frozen=True)
class ConvolutionalFlat:
    """Residual convolutions with ELUs at two resolutions, then a fully connected layer and a flat latent.

    After the network for MNIST of Kingma et al. 2016 ("Improved Variational Inference with Inverse Autoregressive Flow", section
    C.1).
    """

    width: Annotated[int, Interval(ge=2, le=65_536)] = 32
    """feature maps at a quarter of the image resolution, half as many at half of it; 32 in the paper"""
    blocks: Annotated[int, Interval(ge=0, le=1000)] = 2
    """residual blocks at each resolution, in the encoder and in the decoder"""
    hidden: Annotated[int, Interval(ge=1, le=65_536)] = 450
    """units of the fully connected layer; 450 in the paper"""
    positions: Annotated[int, Interval(ge=1, le=65_536)] = 8
    """positions of the flat latent, a grid of one row; 8 with 4 latent channels each are the paper's 32 numbers"""
    features: Annotated[int, Interval(ge=1, le=65_536)] = 8
    """encoder features at each position of the flat latent; a Gaussian bottleneck needs two for each of its channels, for a mean
    and a standard deviation"""

    def grid(self, image_shape: tuple[int, int, int]) -> tuple[int, int]:
        """The latent grid. Raises ValueError where 4 does not divide the image size."""
        Convolutional(downsample=4).grid(image_shape)
        return 1, self.positions

    def encoder(self, image_shape: tuple[int, int, int]) -> tuple[nn.Module, int]:
        channels, height, width = image_shape
        return nn.Sequential(
            nn.Conv2d(channels, self.width // 2, 4, stride=2, padding=1),
            *self.residual(self.width // 2),
            nn.Conv2d(self.width // 2, self.width, 4, stride=2, padding=1),
            *self.residual(self.width),
            nn.Flatten(),
            nn.Linear(self.width * height * width // 16, self.hidden),
            nn.ELU(),
            *to_flat(self.hidden, self.positions, self.features),
        ), self.features

    def decoder(self, latent_channels: int, image_shape: tuple[int, int, int], outputs: int) -> nn.Module:
        _, height, width = image_shape
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(latent_channels * self.positions, self.hidden),
            nn.ELU(),
            nn.Linear(self.hidden, self.width * height * width // 16),
            nn.Unflatten(1, (self.width, height // 4, width // 4)),
            *self.residual(self.width),
            nn.ConvTranspose2d(self.width, self.width // 2, 4, stride=2, padding=1),
            *self.residual(self.width // 2),
            nn.ConvTranspose2d(self.width // 2, outputs, 4, stride=2, padding=1),
        )

    def residual(self, channels: int) -> list[nn.Module]:
        return [PlainResidualBlock(channels) for _ in range(self.blocks)] + [nn.ELU()]


def to_flat(units: int, positions: int, features: int) -> list[nn.Module]:
    """A linear layer from hidden units, B units, to the features of a flat latent, B F 1 positions."""
    return [nn.Linear(units, features * positions), Rearrange("b (f p) -> b f 1 p", f=features)]


def hidden_layers(sizes: list[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return layers


NetworkConfig = Convolutional | FullyConnected | ConvolutionalFlat
