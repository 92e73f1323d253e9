"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum for matrices, made orthogonal.

The momentum M = U S Vᵀ of a matrix is replaced by about U Vᵀ: all directions are learned at one pace, not the strongest first.
Vectors and scalars, which have no such directions, are left to AdamW. So are embeddings of codes and the prior's layer before
their logits, as in the post: rare codes should not move as far as frequent ones. Maps of labels are matrices here.

torch.optim.Muon refuses the weights of convolutions, and iterates in bfloat16, which is slow on CPUs that emulate it.
"""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.training import sharding
from stage2_prior.heads import Logits

COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""The coefficients of a polynomial for each iteration, fitted for singular values from 0.001 to 1 to end near 1
(https://leloykun.github.io/ponder/muon-opt-coeffs)."""
MOMENTUM = 0.95  # as in the post
FEWEST = 4  # rows, or columns, of a matrix that is worth it


def matrices_of(model: nn.Module) -> list[Tensor]:
    """Weights that have several rows and columns, with all their dimensions but the first as one, and are no tables of codes."""
    tables = {module.weight for module in model.modules() if isinstance(module, (nn.Embedding, Logits))}
    return [weight for weight in model.parameters() if is_matrix(weight) and weight not in tables]


def is_matrix(weight: Tensor) -> bool:
    return weight.dim() > 1 and min(len(weight), weight.numel() // len(weight)) >= FEWEST


def orthogonal(matrices: Tensor) -> Tensor:
    """About U Vᵀ for matrices U S Vᵀ, N R C: singular values above 0.002 of the Frobenius norm end between 0.85 and 1.15.

    The iteration is X ← (a I + b X Xᵀ + c (X Xᵀ)²) X. Every X is a polynomial in G = X₀ X₀ᵀ, times X₀. So it runs on that
    polynomial P, of shape N R R, which commutes with G: X Xᵀ = P² G.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonal(matrices.mT).mT
    start = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    gram = start @ start.mT
    identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    polynomial = identity.expand_as(gram)
    for a, b, c in COEFFICIENTS:
        square = polynomial @ gram @ polynomial
        polynomial = (a * identity + torch.baddbmm(square, square, square, beta=b, alpha=c)) @ polynomial
    return polynomial @ start


class Muon(torch.optim.AdamW):
    """Muon for `matrices_of` a model, AdamW for its other weights; both at the learning rates of AdamW.

    The root mean square of a matrix's update is 0.2 times the learning rate, about that of AdamW (Liu et al. 2025,
    https://arxiv.org/abs/2502.16982).
    """

    def __init__(self, model: nn.Module, **settings: Any):
        """settings: those of AdamW, of which matrices take lr and weight_decay."""
        matrices = matrices_of(model)
        self.matrices = set(matrices)
        others = [weight for weight in model.parameters() if weight not in self.matrices]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": matrices}]
        super().__init__(groups, **settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step by the gradients there are. Matrices of one shape go together, which is faster."""
        groups = self.param_groups
        others, matrices = groups
        self.param_groups = [others]  # AdamW steps these
        super().step()
        self.param_groups = groups
        alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for weight in matrices["params"]:
            if weight.grad is not None:
                alike[weight.shape].append(weight)
        rate = matrices["lr"]
        for weights in alike.values():
            directions = orthogonal(torch.stack([self.direction(weight) for weight in weights]))
            scale = 0.2 * math.sqrt(max(directions.shape[1:]))
            for weight, direction in zip(weights, directions):
                weight.mul_(1 - rate * matrices["weight_decay"])
                weight.add_(sharding.as_split(direction.view_as(weight), weight), alpha=-rate * scale)

    def direction(self, weight: Tensor) -> Tensor:
        """Nesterov's momentum as a whole matrix."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device, dtype=torch.float32)  # AdamW wants one of every weight
            state["momentum"] = torch.zeros_like(weight)
        state["step"] += 1
        state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
        return sharding.whole(weight.grad.lerp(state["momentum"], MOMENTUM)).flatten(1)
