"""Clusters of latents, which a prior tells itself where images have no labels."""

import warnings
from unittest import mock

import pytest
import torch

from stage2_prior.autoregressive import AutoregressiveConfig, CascadeConfig
from stage2_prior.conditions import Cluster, components
from stage2_prior.heads import Categorical
from stage2_prior.latents import LatentDataset, LatentSpec
from stage2_prior.sampling import CannotSample, Sampling
from tests.parts import BACKBONES, HEADS, LEARNED, random_latents, randomized, spec_for


def clustered(backbone: str, head: str, spec: LatentSpec, clusters: int = 3):
    """A prior, and the latents in which its clusters were found."""
    prior = AutoregressiveConfig(BACKBONES[backbone], HEADS[head], Cluster(clusters)).build([spec])
    dataset = random_latents(200, spec)
    if spec.vocabulary is not None:
        dataset.vectors = torch.randn(spec.vocabulary, 4, generator=torch.Generator().manual_seed(0))
    prior.estimate(dataset)
    return randomized(prior.double().eval(), 0.3), dataset


def log_prob_in(prior, levels: list[torch.Tensor], cluster: int) -> torch.Tensor:
    """log p(cluster) + log p(levels | cluster), B."""
    with mock.patch.object(prior.condition, "assign", lambda latents: torch.full((len(latents),), cluster)):
        return prior.log_prob(levels)


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_the_density_is_that_of_the_nearest_cluster_a_bound_on_the_mixture(backbone, head):
    prior, dataset = clustered(backbone, head, spec_for(head, (2, 3)))
    levels, _ = dataset[torch.arange(50)]
    condition = prior.condition
    points = condition.vectors[levels[0]] if spec_for(head, (1, 1)).vocabulary else levels[0].double()
    nearest = torch.cdist(points.flatten(1), condition.centres).argmin(1)
    assert len(nearest.unique()) == 3
    with torch.no_grad():
        each = torch.stack([log_prob_in(prior, levels, k) for k in range(3)])
        torch.testing.assert_close(prior.log_prob(levels), each.gather(0, nearest[None])[0])
        assert prior.bounded and (prior.log_prob(levels) < each.logsumexp(0)).all()
        torch.testing.assert_close(prior(levels)["loss"], -prior.log_prob(levels).mean())


def test_the_mixture_over_clusters_sums_to_one_and_samples_follow_it():
    spec = LatentSpec((1, 2), vocabulary=3)
    prior, _ = clustered("pixelcnn", "categorical", spec)
    every = torch.cartesian_prod(torch.arange(3), torch.arange(3)).view(9, 1, 2)
    with torch.no_grad():
        each = [log_prob_in(prior, [every], k) for k in range(3)]
    mixture = torch.stack(each).logsumexp(0).exp()
    assert float(mixture.sum()) == pytest.approx(1)
    (drawn,) = prior.sample(torch.arange(20_000), seed=0)
    shares = torch.bincount(drawn.flatten(1) @ torch.tensor([3, 1]), minlength=9) / 20_000
    error = (mixture * (1 - mixture) / 20_000).sqrt()
    assert ((shares - mixture).abs() < 5 * error).all()


def test_groups_are_found_and_drawn_as_often_as_they_occur():
    centres = torch.tensor([[-9.0, 0.0], [0.0, 9.0], [9.0, 0.0]])
    truth = torch.tensor([0] * 100 + [1] * 60 + [2] * 40)
    latents = (centres[truth] + torch.randn(200, 2)).view(200, 2, 1, 1)
    prior = AutoregressiveConfig(condition=Cluster(3)).build([LatentSpec((2, 1, 1))])
    prior.estimate(LatentDataset([{"mean": latents, "std": torch.ones_like(latents)}]))
    found = prior.condition.assign(latents)
    assert len({*zip(truth.tolist(), found.tolist())}) == 3
    assert sorted(prior.condition.frequencies.tolist()) == pytest.approx([0.2, 0.3, 0.5])
    drawn = torch.bincount(prior.draw_contexts(torch.arange(5000), seed=0), minlength=3) / 5000
    assert (drawn - prior.condition.frequencies).abs().max() < 0.03


def test_few_images_make_few_clusters_and_no_others_are_ever_chosen():
    spec = LatentSpec((2, 2, 2))
    prior = AutoregressiveConfig(condition=Cluster(30)).build([spec])
    dataset = random_latents(70, spec)
    prior.estimate(dataset)
    assert int((prior.condition.frequencies > 0).sum()) == 3  # 20 images each at least
    far = 100 * torch.randn(500, *spec.shape)
    assert prior.condition.frequencies[prior.condition.assign(torch.cat([dataset[torch.arange(70)][0][0], far]))].min() > 0
    assert prior.condition.frequencies[prior.draw_contexts(torch.arange(500), seed=0)].min() > 0


def test_latents_that_are_all_alike_are_one_cluster():
    prior = AutoregressiveConfig(condition=Cluster(5)).build([LatentSpec((2, 2, 2))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior.estimate(LatentDataset([{"mean": torch.zeros(200, 2, 2, 2), "std": torch.ones(200, 2, 2, 2)}]))
    assert prior.condition.frequencies.max() == 1
    assert torch.isfinite(prior.log_prob([torch.randn(3, 2, 2, 2)])).all()


def test_levels_of_a_cascade_are_told_the_same_cluster():
    level = AutoregressiveConfig(BACKBONES["pixelcnn"], Categorical(), Cluster(3))
    specs = [LatentSpec((2, 2), 5), LatentSpec((4, 4), 6)]
    prior = CascadeConfig(level, level).build(specs)
    levels = [random_latents(100, spec).levels[0] for spec in specs]
    prior.estimate(LatentDataset(levels, None, torch.randn(5, 3)))
    top, bottom = (own.condition for own in prior.levels)
    codes = levels[0]["codes"]
    assert torch.equal(top.assign(codes), bottom.assign(codes)) and torch.equal(top.frequencies, bottom.frequencies)
    assert prior.bounded and [tuple(level.shape) for level in prior.sample(torch.arange(2), seed=0)] == [(2, 2, 2), (2, 4, 4)]
    both, clusters = [codes, levels[1]["codes"]], top.assign(codes)
    before, share = prior.eval().log_prob(both), top.log_prob(clusters)
    bottom.frequencies.mul_(0.5)
    assert torch.equal(prior.log_prob(both), before)
    top.frequencies.copy_(torch.tensor([0.6, 0.3, 0.1]))
    torch.testing.assert_close(prior.log_prob(both) - before, top.log_prob(clusters) - share)  # it is counted once


def test_labels_of_the_data_set_are_no_clusters():
    """A data set may have labels that the prior is not conditioned on."""
    prior, dataset = clustered("pixelcnn", "categorical", LatentSpec((2, 3), vocabulary=5))
    levels, labels = dataset[torch.arange(50)][0], torch.full((50,), 7)
    assert torch.equal(prior.log_prob(levels, labels), prior.log_prob(levels))
    assert torch.equal(prior(levels, labels)["loss"], prior(levels)["loss"])


def test_clusters_are_part_of_the_weights():
    spec = LatentSpec((2, 2), vocabulary=5)
    prior, dataset = clustered("pixelcnn", "categorical", spec)
    other = AutoregressiveConfig(BACKBONES["pixelcnn"], HEADS["categorical"], Cluster(3)).build([spec]).double().eval()
    other.load_state_dict(prior.state_dict())
    levels, _ = dataset[torch.arange(5)]
    assert torch.equal(other.log_prob(levels), prior.log_prob(levels))


def test_distances_between_codes_are_those_between_their_vectors():
    """In a codebook of many dimensions of which few matter."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(40, 5, generator=generator)).Q
    vectors = torch.randn(30, 5, generator=generator) @ plane.T + 3
    codes = torch.randint(0, 30, (100, 4, 4), generator=generator)
    torch.testing.assert_close(torch.cdist(*[components(vectors, codes)] * 2), torch.cdist(*[vectors.double()] * 2))


def test_what_has_no_meaning_is_refused():
    prior = AutoregressiveConfig(head=Categorical(), condition=Cluster(3)).build([LatentSpec((2, 2), 5)])
    with pytest.raises(ValueError, match="vectors"):
        prior.estimate(random_latents(50, LatentSpec((2, 2), 5)))
    with pytest.raises(CannotSample, match="takes no context"):
        prior.sample(torch.arange(2), seed=0, how=Sampling(guidance=0.5))
