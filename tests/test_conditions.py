"""Conditions: labels, coarser levels, guidance."""

import dataclasses

import pytest
import torch
from scipy import stats

from pipelines.judging.tradeoffs import takes_guidance
from stage2_prior.autoregressive import AutoregressiveConfig, CascadeConfig
from stage2_prior.conditions import Caption, ClassLabel, CoarserLevel, ConditionConfig
from stage2_prior.heads import Categorical, truncated
from stage2_prior.latents import LatentDataset, LatentSpec
from stage2_prior.sampling import CannotSample, Sampling
from tests.parts import BACKBONES, HEADS, LEARNED, RIVALS, random_latents, randomized, spec_for

FALSE_ALARM = 1e-4
LABEL = ClassLabel()


def conditional(backbone: str, head: str, spec: LatentSpec, scale: float = 0.3, condition: ConditionConfig = LABEL):
    prior = AutoregressiveConfig(BACKBONES[backbone], HEADS[head], condition).build([spec], classes=3)
    return randomized(prior.double().eval(), scale)


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_the_label_reaches_every_position(backbone, head):
    prior = conditional(backbone, head, spec_for(head, (3, 4)))
    levels, _ = random_latents(1, prior.spec)[torch.arange(1)]
    with torch.no_grad():
        by_label = [prior.log_prob_by_position(levels, torch.tensor([label])) for label in range(4)]
    assert all((by_label[a] != by_label[b]).all() for a in range(4) for b in range(a))


@pytest.mark.parametrize("kind", ["autoregressive", *RIVALS])
def test_as_many_contexts_as_samples_or_one_for_all(kind):
    spec, indices, one = LatentSpec((2, 2, 3)), torch.arange(3), torch.tensor([1])
    if kind in RIVALS:
        prior = dataclasses.replace(RIVALS[kind], condition=LABEL).build([spec], classes=3).eval()
    else:
        prior = conditional("pixelcnn", "mixture", spec)
    assert torch.equal(prior.sample(indices, 0, contexts=one)[0], prior.sample(indices, 0, contexts=one.repeat(3))[0])
    for contexts in (torch.tensor(1), torch.tensor([1, 2])):
        with pytest.raises(CannotSample, match="3 samples take a context each"):
            prior.sample(indices, 0, contexts=contexts)


def test_many_labels_share_maps_and_have_maps_of_their_own_all_the_same():
    """As different from each other as those of few labels are, and far fewer numbers."""
    torch.manual_seed(0)
    few, many = (ClassLabel().build(16, [LatentSpec((2, 8, 8))], classes) for classes in (10, 1000))
    size = {condition: sum(p.numel() for p in condition.parameters()) for condition in (few, many)}
    assert size[few] == 11 * 16 * 64 and size[many] == 64 * 16 * 64 + 1001 * 64
    labels = torch.tensor([0, 1, 500, 999, 1000])
    maps = many.eval()(labels).map
    assert maps.shape == (5, 16, 8, 8) and float(maps.detach().std()) == pytest.approx(float(few.maps.detach().std()), rel=0.1)
    assert torch.pdist(maps.flatten(1)).min() > 0.7 * torch.pdist(few.maps.flatten(1)).min()
    maps.square().sum().backward()
    assert all((p.grad != 0).any() for p in many.parameters()) and (many.weights.grad[labels] != 0).all()
    with pytest.raises(CannotSample, match="from 0 to 999"):
        many(torch.tensor([1001]))


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_every_token_of_a_caption_reaches_every_position(backbone, head):
    spec = spec_for(head, (3, 4))
    prior = AutoregressiveConfig(BACKBONES[backbone], HEADS[head], Caption(length=3)).build([spec])
    randomized(prior.double().eval(), 0.3)
    levels, _ = random_latents(1, spec)[torch.arange(1)]
    with torch.no_grad():
        before = prior.log_prob_by_position(levels, torch.tensor([[5, 6, 7]]))
        for changed in ([8, 6, 7], [5, 8, 7], [5, 6, 8], [5, 6, 0], [0, 0, 0]):
            assert (prior.log_prob_by_position(levels, torch.tensor([changed])) != before).all()


@pytest.mark.parametrize("told", [LABEL, Caption(length=3)], ids=["label", "caption"])
@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_contexts_are_forgotten_whole_and_in_training_only(backbone, head, told, monkeypatch):
    prior = conditional(backbone, head, spec_for(head, (2, 3)), condition=told)
    levels, _ = random_latents(400, prior.spec)[torch.arange(400)]
    contexts, nothing = torch.tensor([[5, 6, 7]] if isinstance(told, Caption) else [1]), prior.condition.null(400)
    contexts = contexts.expand_as(nothing)
    with torch.no_grad():
        known, unknown = prior.log_prob(levels, contexts), prior.log_prob(levels, nothing)
        density, found = prior.log_prob_by_position, []
        monkeypatch.setattr(prior, "log_prob_by_position", lambda *asked: found.append(density(*asked)) or found[-1])
        assert prior(levels, contexts)["loss"] == -known.mean()
        torch.manual_seed(0)
        loss = prior.train()(levels, contexts)["loss"]
        in_training = found[-1].flatten(1).sum(1)
    assert loss == -in_training.mean() and (known != unknown).all()
    forgotten = in_training == unknown
    assert (forgotten | (in_training == known)).all()
    assert stats.binomtest(int(forgotten.sum()), 400, 0.1).pvalue > FALSE_ALARM


def test_a_density_forgets_no_label_in_training_mode_but_the_loss_does():
    """Without dropout in the backbone, log_prob is the same in both modes, and draws no random number."""
    dataset = random_latents(40, SPECS[0])
    labels = torch.arange(40) % 3
    prior = randomized(AutoregressiveConfig(BACKBONES["pixelcnn"], Categorical(), ClassLabel(dropout=0.5)).build(SPECS[:1], 3))
    levels, state = [dataset.levels[0]["codes"]], torch.get_rng_state()
    evaluated = prior.eval().log_prob(levels, labels)
    assert torch.equal(prior.train().log_prob(levels, labels), evaluated)
    assert torch.equal(torch.get_rng_state(), state)
    assert prior(levels, labels)["loss"].item() != pytest.approx(-evaluated.mean().item(), rel=1e-4)


@pytest.mark.parametrize("told", [ClassLabel(dropout=0.0), Caption(length=3, dropout=0.0)], ids=["label", "caption"])
def test_a_prior_that_never_saw_the_null_context_is_not_used_with_it(told):
    prior = conditional("pixelcnn", "categorical", spec_for("categorical", (2, 2)), condition=told)
    contexts = prior.condition.null(3) if isinstance(told, Caption) else torch.tensor([0, 1, 2])
    assert len(prior.sample(torch.arange(3), 0, contexts=contexts)[0]) == 3 and not takes_guidance(prior)
    with pytest.raises(CannotSample, match="condition.dropout 0"):
        prior.sample(torch.arange(3), 0, Sampling(guidance=1.0), contexts)
    if isinstance(told, Caption):
        with pytest.raises(CannotSample, match="give one"):
            prior.sample(torch.arange(3), 0)
    assert takes_guidance(conditional("pixelcnn", "categorical", spec_for("categorical", (2, 2))))


def test_sampling_forgets_no_label_in_training_mode_either():
    prior = conditional("pixelcnn", "categorical", spec_for("categorical", (2, 2)), scale=1.0)
    indices, labels = torch.arange(200), torch.arange(200) % 3
    expected = prior.eval().sample(indices, seed=0, contexts=labels)
    assert torch.equal(prior.train().sample(indices, seed=0, contexts=labels)[0], expected[0])


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_unasked_labels_are_drawn_as_often_as_they_occur(backbone, head):
    prior = conditional(backbone, head, spec_for(head, (2, 2)))
    prior.condition.count(torch.tensor([0] * 70 + [1] * 20 + [2] * 10))
    indices = torch.arange(3000)
    labels = prior.draw_contexts(indices, seed=1)
    assert stats.chisquare(torch.bincount(labels).numpy(), [2100, 600, 300]).pvalue > FALSE_ALARM
    with torch.no_grad():
        (drawn,), (told,) = prior.sample(indices[:5], 1), prior.sample(indices[:5], 1, contexts=labels[:5])
    assert torch.equal(drawn, told)


def test_labels_need_a_data_set_with_labels():
    with pytest.raises(ValueError, match="images with labels"):
        AutoregressiveConfig(condition=ClassLabel()).build([LatentSpec((2, 2, 2))])
    prior = conditional("pixelcnn", "mixture", LatentSpec((2, 2, 2)))
    with pytest.raises(CannotSample, match="from 0 to 2"):
        prior.sample(torch.arange(2), 0, contexts=torch.tensor([0, 7]))


# Several levels

SPECS = [LatentSpec((2, 2), vocabulary=3), LatentSpec((2, 4), vocabulary=4)]


def cascade(backbone: str = "pixelcnn", scale: float = 0.4, specs=SPECS):
    config = AutoregressiveConfig(BACKBONES[backbone], Categorical(), ClassLabel())
    return randomized(CascadeConfig(config, config).build(specs, classes=2).double().eval(), scale)


def test_levels_and_their_priors_fit():
    level = AutoregressiveConfig(BACKBONES["pixelcnn"], Categorical())
    with pytest.raises(ValueError, match="a prior for each"):
        level.build(SPECS)
    with pytest.raises(ValueError, match="a cascade is for several levels of latents, not for one"):
        CascadeConfig(level, level).build(SPECS[:1])
    with pytest.raises(ValueError, match="the same condition"):
        CascadeConfig(AutoregressiveConfig(BACKBONES["pixelcnn"], Categorical(), ClassLabel()), level).build(SPECS, classes=2)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_level_sees_the_whole_coarser_level_and_its_own_past(backbone):
    prior = cascade(backbone)
    generator = torch.Generator().manual_seed(0)
    top, bottom = (torch.randint(0, spec.vocabulary, (1, *spec.shape), generator=generator) for spec in SPECS)
    labels = torch.tensor([1])
    with torch.no_grad():
        before = prior.levels[1].log_prob_by_position([top, bottom], labels)
        for r, c in ((0, 0), (0, 1), (1, 0), (1, 1)):
            other = top.clone()
            other[0, r, c] = (other[0, r, c] + 1) % 3
            after = prior.levels[1].log_prob_by_position([other, bottom], labels)
            own_cells = (slice(None), slice(r, r + 1), slice(2 * c, 2 * c + 2))
            assert (after != before)[own_cells].all()
        assert prior.log_prob([top, bottom], labels) == pytest.approx(
            float(prior.levels[0].log_prob([top], labels) + before.sum()), rel=1e-12
        )


def test_a_cascade_is_normalized_and_sampled_as_it_says():
    specs = [LatentSpec((1, 1), vocabulary=3), LatentSpec((1, 2), vocabulary=4)]
    prior = cascade(scale=0.25, specs=specs)
    every = torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(4))
    levels = [every[:, :1].view(-1, 1, 1), every[:, 1:].view(-1, 1, 2)]
    labels = torch.zeros(20_000, dtype=torch.int64)
    with torch.no_grad():
        probabilities = prior.log_prob(levels, labels[: len(every)]).exp()
        top, bottom = prior.sample(torch.arange(20_000), 0, contexts=labels)
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-12)
    observed = torch.bincount(16 * top.flatten() + bottom.flatten(1) @ torch.tensor([4, 1]), minlength=48)
    assert probabilities.min() * 20_000 > 5
    assert stats.chisquare(observed.numpy(), (20_000 * probabilities).numpy()).pvalue > FALSE_ALARM


@pytest.mark.parametrize("how", [{"guidance": 3.0}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.6}], ids=str)
def test_every_level_of_a_cascade_departs_from_its_density_as_asked(how):
    """Samples against the product of each position's guided, tempered and truncated conditional, by a χ² test."""
    specs = [LatentSpec((1, 1), vocabulary=3), LatentSpec((1, 2), vocabulary=4)]
    how, prior, count = Sampling(**how), cascade(scale=0.3, specs=specs), 20_000
    every = torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(4))
    levels = [every[:, :1].view(-1, 1, 1), every[:, 1:].view(-1, 1, 2)]

    def conditionals(label: int) -> list[torch.Tensor]:
        """log p of each position's code, given those before it along the axes before: 3, 3 4 and 3 4 4."""
        labels = torch.full((len(every),), label)
        by_position = [own.log_prob_by_position(levels[: own.level + 1], labels).flatten(1) for own in prior.levels]
        top, left, right = torch.cat(by_position, 1).T.view(3, 3, 4, 4)
        return [top[:, 0, 0], left[:, :, 0], right]

    with torch.no_grad():
        expected, fitted = torch.zeros(3, 4, 4, dtype=torch.float64), []
        for position, (told, untold) in enumerate(zip(conditionals(0), conditionals(2))):
            guided = (told + how.guidance * (told - untold)).view(-1, told.shape[-1])
            factor = truncated(guided, how).log_softmax(-1).view_as(told)
            fitted.append(float((factor.exp() - told.exp()).abs().max()))
            expected += factor.view(*factor.shape, *[1] * (2 - position))
        top, bottom = prior.sample(torch.arange(count), 0, how, contexts=torch.zeros(count, dtype=torch.int64))
    assert min(fitted) > 0.05  # `how` does something at every position
    observed = torch.bincount(16 * top.flatten() + bottom.flatten(1) @ torch.tensor([4, 1]), minlength=48)
    expected = count * expected.exp().flatten()
    assert (observed[expected == 0] == 0).all()
    often = expected > 5
    bins = [torch.cat([each[often], each[~often].sum()[None] + 1e-9]).numpy() for each in (observed.double(), expected)]
    assert stats.chisquare(*(each / each.sum() * count for each in bins)).pvalue > FALSE_ALARM


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_no_samples_of_a_cascade_are_empty_levels(guidance):
    levels = cascade().sample(torch.arange(0), 0, Sampling(guidance=guidance))
    assert [level.shape for level in levels] == [(0, *spec.shape) for spec in SPECS]


def test_a_cascade_trains_every_parameter():
    config = AutoregressiveConfig(BACKBONES["pixelcnn"], Categorical(), ClassLabel())
    prior = CascadeConfig(config, config).build(SPECS, classes=2)
    dataset = LatentDataset([random_latents(16, spec).levels[0] for spec in SPECS], torch.arange(16) % 2)
    prior.estimate(dataset)
    torch.manual_seed(0)
    prior(*dataset[torch.arange(16)])["loss"].backward()
    assert [name for name, p in prior.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_grids_that_do_not_nest_are_refused():
    with pytest.raises(ValueError, match="does not nest"):
        CoarserLevel(LatentSpec((2, 3), vocabulary=4), (4, 4), 8)
    with pytest.raises(ValueError, match="needs codes"):
        CoarserLevel(LatentSpec((1, 2, 2)), (4, 4), 8)
