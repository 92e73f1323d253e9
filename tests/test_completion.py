"""Completion: held latents stay, the rest follows p(free | held), whatever is held and where."""

import math

import pytest
import torch
from scipy import stats

from stage2_prior.autoregressive import AutoregressiveConfig, CascadeConfig
from stage2_prior.completion import complete, effective
from stage2_prior.conditions import ClassLabel
from stage2_prior.heads import Categorical
from stage2_prior.latents import LatentSpec
from stage2_prior.sampling import AS_FITTED, CannotSample, uniforms
from tests.parts import BACKBONES, CODE_HEADS, LEARNED, random_latents, random_prior, randomized, spec_for

FALSE_ALARM = 1e-4


def exact_and_drawn(prior, held, given, particles, count=6000, label=None):
    """p(free | held) over every filling of the free positions of all levels, and how often each was drawn.

    Labels that are not given are summed over: p(z) = Σ p(label) p(z | label).
    """
    free = torch.cat([~mask.flatten() for mask in held])
    codes = torch.cat([torch.full((mask.numel(),), own.spec.vocabulary) for own, mask in zip(prior.levels, held)])[free].tolist()
    fillings = torch.cartesian_prod(*map(torch.arange, codes)).view(-1, len(codes))
    everything = torch.cat([latent.flatten() for latent in given]).repeat(len(fillings), 1)
    everything[:, free] = fillings
    by_level = everything.split([mask.numel() for mask in held], 1)
    levels = [flat.unflatten(1, mask.shape) for flat, mask in zip(by_level, held, strict=True)]
    condition = prior.levels[0].condition
    with torch.no_grad():
        if condition is None:
            exact = prior.log_prob(levels).softmax(0)
        else:
            shares = dict(enumerate(condition.frequencies)) if label is None else {label: torch.ones(())}
            each = [share.log() + prior.log_prob(levels, torch.full((len(fillings),), c)) for c, share in shares.items()]
            exact = torch.stack(each).logsumexp(0).softmax(0)
    contexts = None if label is None else torch.full((count,), label)
    drawn, sizes = complete(prior, given, held, torch.arange(count), 3, particles=particles, contexts=contexts)
    assert all((level[:, mask] == latent[mask]).all() for level, latent, mask in zip(drawn, given, held))
    which = torch.zeros(count, dtype=torch.int64)
    for column, vocabulary in zip(torch.cat([level.flatten(1) for level in drawn], 1)[:, free].T, codes):
        which = which * vocabulary + column
    return exact, torch.bincount(which, minlength=len(fillings)), sizes


def distance(prior, held, given, particles, count=3000, label=None) -> float:
    """Total variation of the draws from the exact conditional."""
    exact, drawn, sizes = exact_and_drawn(prior, held, given, particles, count, label)
    assert (sizes >= 1).all() and (sizes <= particles).all()
    return float((drawn / count - exact).abs().sum() / 2)


def known(spec: LatentSpec, places: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A random latent, and the mask that holds it at these positions."""
    ((latent,),), _ = random_latents(1, spec)[torch.arange(1)]
    mask = torch.zeros(spec.grid, dtype=torch.bool)
    mask.view(-1)[places] = True
    return latent, mask


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6)])
@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_a_single_particle_is_what_whole_forward_passes_would_draw(backbone, head, grid):
    """In float32: held positions stay as they are, and the same noise drawn from a whole forward's features gives the rest."""
    prior = random_prior(spec_for(head, grid), backbone, head).float()
    if head == "mixture":
        prior.head.shift.zero_()  # standardized and back in float32, a shift would cost latents near 0 their last digits
    latent, mask = known(prior.spec, [0, 1, 2, -2])
    latent = latent.float() if head == "mixture" else latent
    with torch.no_grad():
        (drawn,), sizes = complete(prior, [latent], [mask], torch.arange(4), 3, particles=1)
        assert torch.allclose(drawn[..., mask], latent[..., mask].expand(4, *latent[..., mask].shape), rtol=1e-6)
        assert (sizes == 1).all()
        values = prior.head.values(drawn)
        features = prior.backbone(prior.head.embed(values).movedim(-1, 1), prior.position).movedim(1, -1)
        noise = uniforms(3, torch.arange(4), torch.arange(math.prod(grid)), prior.head.uniforms_per_position(AS_FITTED))
        state = prior.head.begin(noise, AS_FITTED)
        for r, c in (~mask).nonzero().tolist():
            again = prior.head.draw(features[:, r, c], r * grid[1] + c, state)
            assert torch.allclose(again.float(), values[:, r, c].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_held_positions_stay_and_are_seen_by_everything_after(backbone, head):
    prior = random_prior(spec_for(head, (3, 4)), backbone, head, scale=0.5 if head in CODE_HEADS else 0.3)
    latent, mask = known(prior.spec, [0, 1, 2, -2])
    latent = latent.double() if head == "mixture" else latent
    with torch.no_grad():
        (free,) = prior.sample(torch.arange(50), seed=0)
        (held,), _ = complete(prior, [latent], [mask], torch.arange(50), 0, particles=1)
    assert torch.allclose(held[..., mask], latent[..., mask].expand_as(held[..., mask]), rtol=1e-12, atol=1e-12)
    changed = (held != free).view(50, -1, *mask.shape).any(1).any(0)
    assert changed[~mask].all()


@pytest.mark.parametrize("head", ["mixture", "categorical"])
def test_a_latent_or_a_mask_of_another_shape_is_refused(head):
    prior = random_prior(spec_for(head, (3, 4)), "pixelcnn", head)
    latent, mask = known(prior.spec, [0])
    wider, its_mask = known(spec_for(head, (3, 5)), [0])
    for given, held in ((latent, its_mask), (wider, mask), (latent, mask.int())):
        with pytest.raises(CannotSample, match=r"boolean mask of .*3, 4\)"):
            complete(prior, [given], [held], torch.arange(2), 0)
    with pytest.raises(CannotSample, match="each level"):
        complete(prior, [], [mask], torch.arange(2), 0)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_held_in_front_is_exact_with_one_particle(backbone):
    prior = random_prior(LatentSpec((2, 2), vocabulary=4), backbone, "categorical", scale=0.5)
    held = torch.tensor([[True, True], [False, False]])
    exact, drawn, sizes = exact_and_drawn(prior, [held], [torch.tensor([[1, 3], [0, 0]])], particles=1)
    often = exact * 6000 > 5
    counts = torch.cat([drawn[often], drawn[~often].sum()[None]]).double()
    expected = torch.cat([exact[often], exact[~often].sum()[None] + 1e-12])
    assert stats.chisquare(counts.numpy(), (expected * counts.sum() / expected.sum()).numpy()).pvalue > FALSE_ALARM
    assert (sizes == 1).all()


@pytest.mark.parametrize("held", [[[False, False], [True, True]], [[False, True], [False, True]], [[False, True], [True, False]]])
def test_held_behind_is_approached_with_more_particles(held):
    prior = random_prior(LatentSpec((2, 2), vocabulary=3), "pixelcnn", "categorical")
    randomized(prior, 0.7, seed=2)  # weights under which what is held says much of what comes before
    known = [torch.tensor(held)], [torch.tensor([[2, 0], [1, 2]])]
    assert distance(prior, *known, particles=1) > 0.1  # looking ahead matters here
    assert distance(prior, *known, particles=64) < 0.05


def told_a_label(*specs: LatentSpec, scale: float = 0.7, seed: int = 2):
    """A prior of codes, told one of three labels that are not equally frequent."""
    level = AutoregressiveConfig(BACKBONES["pixelcnn"], Categorical(), ClassLabel())
    config = level if len(specs) == 1 else CascadeConfig(level, level)
    prior = randomized(config.build(list(specs), classes=3).double().eval(), scale, seed)
    prior.levels[0].condition.count(torch.tensor([0] * 5 + [1] * 3 + [2] * 2))
    return prior


# Weights under which what is held says much of the label.
@pytest.mark.parametrize(("held", "seed"), [([[True, True], [False, False]], 3), ([[False, True], [True, False]], 2)])
def test_a_label_that_is_not_given_is_weighed_by_what_is_held(held, seed):
    """So even where everything held comes first, one particle will not do."""
    prior = told_a_label(LatentSpec((2, 2), vocabulary=3), scale=0.6, seed=seed)
    known = [torch.tensor(held)], [torch.tensor([[2, 0], [1, 2]])]
    assert distance(prior, *known, particles=1, count=1500) > 0.1
    assert distance(prior, *known, particles=32, count=1500) < 0.03


def test_a_label_that_is_given_is_told_to_every_particle():
    prior = told_a_label(LatentSpec((2, 2), vocabulary=3))
    known = [torch.tensor([[True, True], [False, False]])], [torch.tensor([[2, 0], [0, 0]])]
    for particles in (1, 3):
        assert distance(prior, *known, particles, label=1) < 0.05
    exact = [exact_and_drawn(prior, *known, 1, 1, label)[0] for label in (1, 2)]
    assert (exact[0] - exact[1]).abs().sum() / 2 > 0.1  # the label matters here


def test_a_label_is_given_to_all_completions_at_once_and_to_no_unconditional_prior():
    given, held = [torch.tensor([[2, 0], [0, 0]])], [torch.tensor([[True, False], [False, False]])]
    prior = told_a_label(LatentSpec((2, 2), vocabulary=3))
    each, one = (complete(prior, given, held, torch.arange(4), 0, contexts=torch.tensor(labels))[0] for labels in ([1] * 4, [1]))
    assert torch.equal(each[0], one[0])
    with pytest.raises(CannotSample, match="a context each, or one for all"):
        complete(prior, given, held, torch.arange(4), 0, contexts=torch.tensor([1, 1]))
    with pytest.raises(CannotSample, match="takes no context"):
        prior = random_prior(LatentSpec((2, 2), vocabulary=3), "pixelcnn", "categorical")
        complete(prior, given, held, torch.arange(4), 0, contexts=torch.tensor([1]))


def test_labels_and_coarser_levels_are_weighed_together():
    prior = told_a_label(LatentSpec((1, 2), vocabulary=3), LatentSpec((1, 2), vocabulary=4))
    held = [torch.tensor([[True, False]]), torch.tensor([[False, True]])]
    known = held, [torch.tensor([[1, 0]]), torch.tensor([[0, 3]])]
    assert distance(prior, *known, particles=1, count=1500) > 0.1
    assert distance(prior, *known, particles=32, count=1500) < 0.03


@pytest.mark.parametrize("labels", [False, True])
def test_a_completion_is_the_same_in_any_batch(labels):
    spec = LatentSpec((3, 3), vocabulary=4)
    prior = told_a_label(spec) if labels else random_prior(spec, "pixelcnn", "categorical", scale=0.6)
    held = torch.zeros(3, 3, dtype=torch.bool)
    held[1, 1] = held[2, 0] = True
    given = torch.ones(3, 3, dtype=torch.int64)
    (together,), _ = complete(prior, [given], [held], torch.arange(6), 0, particles=8)
    (apart,), _ = complete(prior, [given], [held], torch.tensor([4]), 0, particles=8)
    assert torch.equal(together[4], apart[0])


def test_several_levels_and_continuous_latents():
    config = AutoregressiveConfig(BACKBONES["pixelcnn"], Categorical(), ClassLabel())
    specs = [LatentSpec((2, 2), vocabulary=3), LatentSpec((4, 4), vocabulary=5)]
    cascade = randomized(CascadeConfig(config, config).build(specs, classes=2).eval())
    given = [torch.zeros(2, 2, dtype=torch.int64), torch.ones(4, 4, dtype=torch.int64)]
    held = [torch.tensor([[True, True], [False, False]]), torch.arange(16).view(4, 4) > 9]
    levels, sizes = complete(cascade, given, held, torch.arange(5), 0, particles=4)
    for level, latent, mask in zip(levels, given, held):
        assert (level[:, mask] == latent[mask]).all()
    prior = random_prior(LatentSpec((2, 3, 3)), "pixelcnn", "mixture")
    latent, mask = torch.randn(2, 3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.bool)
    (drawn,), sizes = complete(prior, [latent], [mask], torch.arange(5), 0, particles=4)
    assert torch.allclose(drawn[:, :, mask], latent[:, mask].expand(5, -1, -1))
    assert (drawn[0] != drawn[1])[:, ~mask].all()


def test_what_else_is_known_weighs_the_particles():
    """With all weight on one code at a free position, that code is drawn; the rest follows the exact conditional."""
    prior = random_prior(LatentSpec((1, 2), vocabulary=3), "pixelcnn", "categorical", scale=0.5)
    held = torch.zeros(1, 2, dtype=torch.bool)

    def second_is_two(levels):
        return torch.where(levels[0][:, 0, 1] == 2, 0.0, -1e9)

    given = [torch.zeros(1, 2, dtype=torch.int64)]
    (drawn,), sizes = complete(prior, given, [held], torch.arange(3000), 0, particles=64, log_likelihood=second_is_two)
    assert (drawn[:, 0, 1] == 2).all() and (sizes < 64).all()
    with torch.no_grad():
        exact = prior.log_prob([torch.tensor([[[0, 2]], [[1, 2]], [[2, 2]]])]).softmax(0)
    share = torch.bincount(drawn[:, 0, 0], minlength=3) / 3000
    assert (share - exact).abs().sum() / 2 < 0.05


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_mixed_precision_does_not_round_completions(backbone, head):
    prior = random_prior(spec_for(head, (2, 3)), backbone, head).float()
    latent, mask = known(prior.spec, [1, 4])
    asked = prior, [latent.float() if latent.is_floating_point() else latent], [mask], torch.arange(50), 0
    exact, sizes = complete(*asked)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, mixed_sizes = complete(*asked)
    assert torch.equal(*mixed, *exact) and torch.equal(mixed_sizes, sizes)


def test_effective_sample_size():
    assert effective(torch.zeros(1, 8)) == pytest.approx(8)
    assert effective(torch.tensor([[0.0, -1e9, -1e9]])) == pytest.approx(1)
