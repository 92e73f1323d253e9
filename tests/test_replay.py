"""The loop of sampling as a CUDA graph replays it, on a stand-in for graphs that runs anywhere.

A graph is a list of kernels with the places that they read and write. The stand-in records every operation with its tensors, and
replays it into the same tensors; what a capture would not survive, because it waits for a value, is refused.
"""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from stage2_prior import ancestral, compiled
from stage2_prior.ancestral import Conditioned, draw_grid, sample_grid
from stage2_prior.replay import GraphedFunction, replayed
from stage2_prior.sampling import AS_FITTED, Sampling, uniforms
from tests.parts import LEARNED, random_prior, spec_for

WAITS = ("_local_scalar_dense", "nonzero", "lift_fresh", "equal.default", "masked_select", "is_nonzero")


class Graph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(name in str(function) for name in WAITS), f"{function} waits for a value"
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.calls:
            for place, value in zip(tree_flatten(result)[0], tree_flatten(function(*args, **kwargs))[0]):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Stand-ins for CUDA's graphs, and steps as a GPU takes them; the list of all graphs made."""
    made = []

    def new():
        made.append(Graph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: graph)
    monkeypatch.setattr(compiled, "library", lambda: None)
    return made


def setting(backbone, head, how, batch=4):
    """The prior, the modules of the loop, the loop, and its inputs under a seed."""
    spec = spec_for(head, (3, 4))
    prior = random_prior(spec, backbone, head, scale=0.15).float()
    strengths = [strength for strength in (how.guidance, how.autoguidance) if strength]
    copies = 1 + len(strengths)
    modules = [prior.backbone, prior.head] * copies

    def draw(uniform, *conditions):
        own, *others = [Conditioned(prior.backbone, prior.head, *pair) for pair in zip(conditions[::2], conditions[1::2])]
        weaker = list(zip(strengths, others))
        return draw_grid(own, weaker, spec.grid, how, len(uniform), lambda positions: uniform[:, positions])

    def inputs(seed):
        generator = torch.Generator().manual_seed(seed)
        uniform = uniforms(seed, torch.arange(batch), torch.arange(12), prior.head.uniforms_per_position(how))
        shapes = [(batch, 6, 3, 4), (batch, 2, 6)] * copies
        return [uniform, *(torch.randn(shape, generator=generator) for shape in shapes)]

    return prior, modules, draw, inputs


def same(a, b):
    return torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_a_replayed_loop_draws_what_the_loop_does(backbone, head, guidance, graphs):
    how = Sampling(temperature=0.9, guidance=guidance)
    prior, modules, draw, inputs = setting(backbone, head, how)
    replayed = GraphedFunction()
    for seed in range(4):
        assert same(replayed("kind", modules, draw, inputs(seed)), draw(*inputs(seed)))
    with torch.no_grad():  # a graph reads the weights where they are
        for parameter in prior.parameters():
            parameter.mul_(0.7)
    assert same(replayed("kind", modules, draw, inputs(0)), draw(*inputs(0)))
    assert len(graphs) == 1


def test_codes_with_top_k_and_top_p_are_replayed():
    _, modules, draw, inputs = setting("pixelcnn", "categorical", Sampling(top_k=3, top_p=0.9))
    replayed = GraphedFunction()
    for seed in range(3):
        assert same(replayed("kind", modules, draw, inputs(seed)), draw(*inputs(seed)))


def test_another_kind_of_call_is_not_replayed(graphs):
    """Another batch, other settings or weights in another place run as they are, and leave no graph behind that is wrong."""
    replayed = GraphedFunction()
    _, modules, draw, inputs = setting("pixelcnn", "mixture", AS_FITTED)
    for seed in range(2):
        replayed("kind", modules, draw, inputs(seed))
    assert len(graphs) == 1
    _, _, smaller, few = setting("pixelcnn", "mixture", AS_FITTED, batch=2)
    assert same(replayed("kind", modules, smaller, few(0)), smaller(*few(0)))
    assert same(replayed("other", modules, draw, inputs(5)), draw(*inputs(5)))
    _, elsewhere, draw, inputs = setting("pixelcnn", "mixture", AS_FITTED)
    assert same(replayed("other", elsewhere, draw, inputs(6)), draw(*inputs(6)))
    assert len(graphs) == 1


def test_a_returned_sample_is_not_overwritten_by_the_next():
    _, modules, draw, inputs = setting("pixelcnn", "mixture", AS_FITTED)
    replayed = GraphedFunction()
    first, second, third = (replayed("kind", modules, draw, inputs(seed)) for seed in range(3))
    assert same(second, draw(*inputs(1))) and same(third, draw(*inputs(2)))


def test_a_device_that_cannot_capture_draws_all_the_same(monkeypatch):
    _, modules, draw, inputs = setting("pixelcnn", "mixture", AS_FITTED)
    replayed, tries = GraphedFunction(), []

    def fails():
        tries.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", fails)
    with pytest.warns(UserWarning, match="without a CUDA graph: operation not permitted"):
        for seed in range(4):
            assert same(replayed("kind", modules, draw, inputs(seed)), draw(*inputs(seed)))
    assert len(tries) == 1


def test_the_noise_of_a_replayed_grid_is_made_few_positions_at_a_time(monkeypatch, graphs):
    prior, _, _, _ = setting("pixelcnn", "mixture", AS_FITTED)
    told, indices, made = Conditioned(prior.backbone, prior.head, None, None), torch.arange(4), []
    whole = sample_grid(told, (3, 4), indices, 0)
    monkeypatch.setattr(ancestral, "uniforms", lambda *asked: made.append(len(asked[2])) or uniforms(*asked))
    monkeypatch.setattr(ancestral, "NOISE_AT_ONCE", 5 * 4 * prior.head.uniforms_per_position(AS_FITTED))
    monkeypatch.setattr(ancestral, "can_replay", lambda device, positions: True)
    assert all(same(sample_grid(told, (3, 4), indices, 0), whole) for _ in range(3))
    assert made == 3 * [5, 5, 2] and len(graphs) == 1


def test_a_graph_keeps_no_gradients(monkeypatch):
    """A graph's inputs are written again and again: each time, they would keep what the gradients of the last time need."""
    prior, _, _, _ = setting("pixelcnn", "mixture", AS_FITTED)
    monkeypatch.setattr(ancestral, "can_replay", lambda device, positions: True)
    for seed in range(3):
        prior.sample(torch.arange(4), seed)
    assert replayed[prior.backbone].graph is not None
    _, kept, _ = replayed[prior.backbone].graph
    assert not any(place.requires_grad for place in kept if place is not None)


def test_a_graph_goes_with_its_backbone(monkeypatch):
    """Nothing that is kept for replays holds on to the weights."""
    prior, modules, draw, inputs = setting("pixelcnn", "mixture", AS_FITTED)
    for seed in range(2):
        replayed.setdefault(prior.backbone, GraphedFunction())(((3, 4), AS_FITTED), modules, draw, inputs(seed))
    gone = weakref.ref(prior.backbone)
    del prior, modules, draw, inputs
    gc.collect()
    assert gone() is None
