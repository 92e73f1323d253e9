"""Muon: what makes a momentum orthogonal, and one step of it."""

import math

import pytest
import torch
from torch import nn

from pipelines.training.muon import MOMENTUM, Muon, is_matrix, orthogonal
from stage2_prior.heads import Logits

SHAPES = [(4, 4), (4, 40), (40, 4), (64, 576), (100, 100)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_end_near_one_and_vectors_stay(shape):
    """Of matrices whose singular values spread over two powers of ten, and so are 0.002 of the norm or more."""
    left, _, right = torch.linalg.svd(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    values = torch.logspace(0, -2, min(shape))
    turned = left.mT @ orthogonal(left * values @ right) @ right.mT
    diagonal = turned.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.85 and diagonal.max() < 1.15
    assert (turned - diagonal.diag_embed()).abs().max() < 0.01


def test_neither_scale_nor_company_matters():
    matrices = torch.randn(5, 6, 30, generator=torch.Generator().manual_seed(0))
    together = orthogonal(matrices)
    for matrix, result in zip(matrices, together):
        assert torch.allclose(orthogonal(1e6 * matrix[None])[0], result, atol=1e-4)
    assert torch.equal(orthogonal(torch.zeros(1, 6, 30)), torch.zeros(1, 6, 30))


class Codes(nn.Module):
    """Weights of all kinds that are not made orthogonal."""

    def __init__(self):
        super().__init__()
        self.embedding, self.slim, self.logits = nn.Embedding(9, 4), nn.Linear(4, 3), Logits(4, 9)

    def forward(self):
        features = self.embedding(torch.arange(9))
        return self.logits(features).logsumexp(1).sum() + self.slim(features).square().sum()


def test_vectors_slim_matrices_and_tables_of_codes_are_adamw_s():
    assert not any(is_matrix(torch.empty(shape)) for shape in ((8,), (), (8, 3), (1, 64), (3, 8, 3, 3)))
    assert all(is_matrix(torch.empty(shape)) for shape in ((8, 4), (8, 1, 3, 3), (4, 4)))
    models = [Codes(), Codes()]
    models[1].load_state_dict(models[0].state_dict())
    settings = {"lr": 0.1, "weight_decay": 0.2, "betas": (0.9, 0.99)}
    optimizers = [Muon(models[0], **settings), torch.optim.AdamW(models[1].parameters(), **settings)]
    for model, optimizer in zip(models, optimizers):
        for _ in range(3):
            model().backward()
            optimizer.step()
    assert all(torch.allclose(*pair, rtol=1e-5) for pair in zip(models[0].parameters(), models[1].parameters()))
    assert not optimizers[0].matrices


def test_two_steps_are_as_the_formula_says():
    """Of a convolution: m ← μ m + (1-μ) g, then w ← (1-ρλ) w - 0.2 ρ √max(R, C) O((1-μ) g + μ m)."""
    layer, lr, decay = nn.Conv2d(4, 6, 3, bias=False), 0.01, 0.5
    optimizer = Muon(layer, lr=lr, weight_decay=decay, betas=(0.9, 0.99))
    expected, momentum = layer.weight.detach().clone().reshape(6, 36), torch.zeros(6, 36)
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.randn(16, 4, 5, 5)).pow(3).sum().backward()
        gradient = layer.weight.grad.reshape(6, 36)
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        direction = orthogonal(((1 - MOMENTUM) * gradient + MOMENTUM * momentum)[None])[0]
        expected = (1 - lr * decay) * expected - 0.2 * lr * math.sqrt(36) * direction
        optimizer.step()
        assert torch.allclose(layer.weight.detach().reshape(6, 36), expected, atol=1e-6)


def test_a_weight_without_a_gradient_stays():
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    before = [parameter.detach().clone() for parameter in layers.parameters()]
    optimizer = Muon(layers, lr=0.1, weight_decay=0.1, betas=(0.9, 0.99))
    layers[0](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    moved = [not torch.equal(*pair) for pair in zip(before, layers.parameters())]
    assert moved == [True, True, False, False]
