"""Figures of sample quality against other implementations and known cases; the extractors; rejection."""

import dataclasses
import io
import json
import math
import pickle
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
from filelock import FileLock
from PIL import Image
from prdc import compute_prdc
from scipy.stats import mannwhitneyu
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kernel_poly, mmd2
from torchmetrics.image.kid import poly_mmd
from torchvision import transforms

from pipelines import files
from pipelines.benchmarks.measuring import peak_bytes
from pipelines.console import UserError
from pipelines.data.images import ImageSet
from pipelines.judging import compare, features, quality, rows
from pipelines.judging.comparison import SURELY, Verdict, read_comparison, verdict_of, write_comparison
from pipelines.judging.features import (
    FIGURES,
    Classifier,
    FeatureSpace,
    Judge,
    digest_of_state,
    feature_space,
    label_log_prob,
    rejection_sampled,
)
from pipelines.judging.published import PUBLISHED, DinoV2, published, resized
from pipelines.judging.quality import (
    Cloud,
    FrechetDistance,
    copied,
    copying_p,
    error,
    likeness,
    nearer,
    nearest_neighbours,
    resampled,
    subsampled,
)
from pipelines.judging.tradeoffs import Tradeoff, along, best_of, choose_sampling, ways_to_sample
from pipelines.pages.words import notes
from pipelines.runs.config import MetricsConfig
from pipelines.runs.dataset import load_data
from pipelines.runs.recipes import preset
from pipelines.training.devices import open_fabric
from stage1_vae import autoencoder
from stage2_prior.sampling import AS_FITTED, Sampling
from tests.parts import compared, shrunk, small_splits


def points(count: int, at: float, seed: int, features: int = 4) -> torch.Tensor:
    return at + torch.randn(count, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def sets():
    """Features with structure: correlated, of unequal scales, the generated ones off by a bit."""
    mix = points(16, 0.0, 9, 16)
    return points(400, 0.3, 0, 16) @ mix, (1.1 * points(300, 0.35, 1, 16)) @ mix


def single(real: torch.Tensor, generated: torch.Tensor) -> dict[str, float]:
    return {name: float(value) for name, value in likeness(Cloud.of(real), generated).items()}


def test_the_frechet_distance_is_that_of_torch_fidelity(sets):
    real, generated = (fid_features_to_statistics(features) for features in sets)
    expected = fid_statistics_to_metric(real, generated, verbose=False)["frechet_inception_distance"]
    assert FrechetDistance(sets[0])(sets[1]) == pytest.approx(expected, rel=1e-3)


def test_kid_is_that_of_torchmetrics_and_torch_fidelity_on_the_same_subset(sets):
    real, generated = (features[:250] for features in sets)
    kid = single(real, generated)["kid"]
    assert kid == pytest.approx(float(poly_mmd(real, generated)), abs=1e-6)
    kernels = [
        kernel_poly(x.numpy(), y.numpy(), kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1)
        for x, y in ((real, real), (real, generated), (generated, generated))
    ]
    assert kid == pytest.approx(mmd2(*kernels), abs=1e-6)


def test_precision_recall_density_coverage_are_those_of_prdc(sets):
    figures = single(*sets)
    three, five = (compute_prdc(sets[0].numpy(), sets[1].numpy(), nearest_k=k) for k in (3, 5))
    assert 0.1 < figures["precision"] < 0.99 and 0.1 < figures["coverage"] < 0.99
    for name, expected in (("precision", three), ("recall", three), ("density", five), ("coverage", five)):
        assert figures[name] == pytest.approx(expected[name], abs=1e-12), name


def test_chunks_do_not_matter(sets, monkeypatch):
    weights = resampled(len(sets[1]), 3)
    whole = likeness(Cloud.of(sets[0]), sets[1], weights), *nearest_neighbours(*sets)
    monkeypatch.setattr(quality, "CHUNK", 1000)
    parts = likeness(Cloud.of(sets[0]), sets[1], weights), *nearest_neighbours(*sets)
    for name, values in whole[0].items():
        torch.testing.assert_close(parts[0][name], values)
    torch.testing.assert_close(parts[1:], whole[1:])


def test_a_weighting_is_the_images_so_often(sets):
    real, generated = sets
    weights = resampled(len(generated), 2, seed=3)
    assert (weights[0] == 1).all() and (weights.sum(1) == len(generated)).all()
    under = likeness(Cloud.of(real), generated, weights)
    distance = FrechetDistance(real).under(generated, weights)
    repeated = generated.repeat_interleave(weights[2].long(), 0)
    again = single(real, repeated)
    for name in (
        "precision",
        "density",
    ):  # the others look at pairs, of which some are now copies, or have other resamples
        assert float(under[name][2]) == pytest.approx(again[name]), name
    assert float(distance[2]) == pytest.approx(FrechetDistance(real)(repeated))


def test_errors_are_those_of_drawing_other_samples():
    """The spread over independent sets of samples, which the bootstrap estimates from one of them."""
    real = Cloud.of(points(400, 0.0, 0))
    figures = [likeness(real, points(200, 0.3, seed), resampled(200)) for seed in range(1, 13)]
    distance = FrechetDistance(real.points)
    for number, one in enumerate(figures):
        one["fd"] = distance.under(points(200, 0.3, number + 1), resampled(200))
    for name in figures[0]:
        spread = 1.96 * float(torch.stack([one[name][0] for one in figures]).std())
        stated = sum(error(one[name]) for one in figures) / len(figures)
        assert 0.5 < stated / spread < 2, name


@pytest.mark.parametrize(("name", "share"), [("recall", 0.5), ("coverage", 0.9)])
def test_recall_and_coverage_are_resampled_without_copies(sets, name, share):
    real, generated = sets
    under = likeness(Cloud.of(real), generated, resampled(len(generated), 4))[name]
    of_parts = [single(real, generated[chosen])[name] for chosen in subsampled(len(generated), 4, share)]
    assert float(under[0]) == pytest.approx(of_parts[0])
    expected = (share / (1 - share)) ** 0.5 * torch.tensor(of_parts[1:]).std()
    assert float(under[1:].std()) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(("name", "spread"), [("recall", 0.6), ("coverage", 2.0)])
def test_intervals_of_recall_and_coverage_hold_them(name, spread):
    """Of samples less varied than real images, or more. Over bootstrap resamples, they did so in three of four trials."""
    real = Cloud.of(points(200, 0.0, 0, 8))
    found = [likeness(real, spread * points(200, 0.0, seed, 8), resampled(200, 40))[name] for seed in range(1, 61)]
    values = torch.stack([values[0] for values in found])
    held = [abs(float(one[0] - values.mean())) < error(one) for one in found]
    assert 0.2 < float(values.mean()) < 0.9 and sum(held) >= 0.9 * len(held)


def test_precision_and_recall_of_known_cases():
    real = points(500, 0.0, 0)
    same, far = single(real, real), single(real, points(500, 100.0, 1))
    assert same["precision"] == same["recall"] == same["coverage"] == 1 and same["kid"] < 0.1
    assert far["precision"] == far["recall"] == far["density"] == far["coverage"] == 0 and far["kid"] > 1e6
    # Half of the samples far away: half the precision, and the rest still covers about as much.
    halves = single(real, torch.cat([points(250, 0.0, 2), points(250, 100.0, 3)]))
    assert halves["precision"] == pytest.approx(0.5, abs=0.06) and halves["recall"] > 0.6
    # One mode of two: all samples are real-like, half of what is real is missed.
    one_mode = single(torch.cat([real, points(500, 100.0, 4)]), points(1000, 0.0, 5))
    assert one_mode["precision"] > 0.8 and one_mode["recall"] == pytest.approx(0.5, abs=0.06)
    assert one_mode["coverage"] == pytest.approx(0.5, abs=0.06)


def test_precision_by_hand():
    """Real points 0 … 5 on a line, whose third neighbours are at distance 3, 2, 2, 2, 2, 3."""
    real = torch.arange(6.0, dtype=torch.float64)[:, None]
    generated = torch.tensor([[-2.9], [8.1], [7.9], [2.0], [50.0], [60.0]], dtype=torch.float64)
    assert single(real, generated)["precision"] == pytest.approx(3 / 6)


def test_nearest_is_the_nearest(sets):
    distances, indices = nearest_neighbours(sets[1], sets[0])
    every = torch.cdist(sets[1], sets[0])
    torch.testing.assert_close(distances, every.min(1).values)
    assert torch.equal(indices, every.argmin(1))


def test_copies_are_told_from_new_samples():
    train, held_out, fresh = points(1000, 0.0, 0), points(300, 0.0, 1), points(300, 0.0, 2)
    copies = train[:300] + 0.01 * points(300, 0.0, 3)
    of_held_out, of_fresh, of_copies, of_noise = (nearest_neighbours(x, train)[0] for x in (held_out, fresh, copies, 9 * fresh))
    share = [float(nearer(distances, of_held_out).mean()) for distances in (of_held_out, of_fresh, of_copies, of_noise)]
    assert share[0] == 0.5 and share[1] == pytest.approx(0.5, abs=0.08) and share[2] > 0.98 and share[3] < 0.1
    # The statistic of Mann and Whitney, which counts the pairs in which the first is larger.
    expected = mannwhitneyu(of_fresh, of_held_out, method="asymptotic", use_continuity=False, alternative="less")
    assert 1 - share[1] == pytest.approx(expected.statistic / 300**2)


@pytest.mark.parametrize("others", ["good samples", "mush"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.05, 0.2])
def test_a_few_copies_are_found_among_good_samples_and_among_mush(others, share):
    train, held_out, samples = points(2000, 0.0, 0, 16), points(1000, 0.0, 1, 16), points(1000, 0.0, 2, 16)
    samples = 3 * samples if others == "mush" else samples
    samples[: int(1000 * share)] = train[: int(1000 * share)]
    of_held_out, of_samples = (nearest_neighbours(x, train)[0] for x in (held_out, samples))
    among, p = float(copied(of_samples, of_held_out).double().mean()), copying_p(of_samples, of_held_out)
    assert float(copied(of_held_out, of_held_out).sum()) == 10 and copying_p(of_held_out, of_held_out) > 0.5
    assert share <= among <= share + 0.02
    assert p < 1e-4 if share else p > 0.1


def test_new_samples_are_seldom_called_copies():
    """As often as the probability says, also where data have duplicates, so that many distances are zero."""
    generator = torch.Generator().manual_seed(0)
    for floor in (0.0, 2.0):  # of distances around 2: none, and half of them, are zero
        drawn = (2 + torch.randn(2, 400, 500, generator=generator) - floor).clamp(min=0)
        called = [copying_p(samples, held_out) < SURELY for samples, held_out in zip(*drawn)]
        assert sum(called) / len(called) < 2 * SURELY


def space(tmp_path, count: int) -> FeatureSpace:
    torch.manual_seed(0)
    model = Classifier(1, 2, (28, 28))
    images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8)
    return FeatureSpace(model, "test", ImageSet(images), open_fabric("cpu", "float32"), tmp_path)


def judged(space: FeatureSpace, count: int) -> tuple[Judge, dict]:
    features = space.features(torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8), "features")
    distances, _ = nearest_neighbours(features, space.reference)
    judge = Judge(space, distances, seed=0)
    return judge, judge.figures(judge.under_resamples(features, distances), distances)


@pytest.mark.parametrize("count", [6, 45, 200])
def test_a_share_of_none_or_all_has_the_error_that_so_few_images_leave(tmp_path, count):
    """Of a share beyond it, none of so many images would be seen with a probability below 5 %."""
    made = space(tmp_path, 300)
    judge = Judge(made, torch.linspace(1, 2, count), seed=0)
    features = made.features(torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8), "features")
    for distance, share in ((9.0, 0.0), (0.5, 1.0)):
        distances = torch.full((count,), distance)
        figures = judge.figures(judge.under_resamples(features, distances), distances)
        for name in ("copied", "nearer"):
            assert figures[name] == share and (1 - figures["plus_minus"][name]) ** count == pytest.approx(0.05)
    some = torch.linspace(1.5, 3, count)
    assert 0 < judge.figures(judge.under_resamples(features, some), some)["plus_minus"]["nearer"] != 1 - 0.05 ** (1 / count)


def test_what_too_few_images_cannot_say_is_withheld_with_the_reason(tmp_path):
    made = space(tmp_path, 100)
    judge, figures = judged(made, 70)
    assert judge.withheld == {} and set(figures["plus_minus"]) == set(FIGURES)
    judge, figures = judged(made, 64)
    assert figures["fd"] is None and "fd" not in figures["plus_minus"] and figures["kid"] is not None
    assert judge.withheld["fd"] == "64 images for 64 features: a covariance needs more images than features"
    for count in (3, 8, 49):
        judge, figures = judged(made, count)
        assert [name for name in FIGURES if figures[name] is not None] == ["nearer", "copied"]
        assert any(f"{count} images, of at least 50 needed" in reason for reason in judge.withheld.values())
    judge, figures = judged(made, 1)
    assert [name for name in FIGURES if figures[name] is not None] == ["nearer"]
    assert "a single held-out image" in judge.withheld["copied"]


def test_nothing_is_drawn_to_choose_by_where_there_are_too_few_images(tmp_path):
    made, ways = space(tmp_path, 100), ways_to_sample(guided=True, weaker=True)
    assert choose_sampling(made, ways, 49, lambda how, count: pytest.fail("they are drawn")) == (AS_FITTED, [])


def test_the_error_of_a_distance_is_that_of_the_table(tmp_path):
    made = space(tmp_path, 300)
    judge, _ = judged(made, 100)
    again = made.features(torch.randint(0, 256, (100, 1, 28, 28), dtype=torch.uint8), "features")
    distances, _ = nearest_neighbours(again, made.reference)
    figures = judge.figures(judge.under_resamples(again, distances), distances)
    assert made.error_of(again) == pytest.approx(figures["plus_minus"]["fd"])
    assert made.error_of(again[:64]) is None, "too few for a covariance"


def test_label_accuracy_among_the_ways_to_draw_is_of_the_labels_in_their_order(tmp_path):
    """And decides where fd does not; a weak classifier has none."""
    made, ways = space(tmp_path, 400), [AS_FITTED, Sampling(0.9)]
    nn.init.zeros_(made.model.output.bias)
    made.model.output.weight.data.zero_()[:, 0] = torch.tensor([-1.0, 1.0])  # label 1 where the first feature is positive
    features = torch.randn(400, 64, dtype=torch.float64)
    labels = (features[:, 0] > 0).long()
    worse = torch.where(torch.rand(400)[:, None] < 0.5, features.roll(1, 0), features)
    assert made.share_read(features, labels) is None, "no accuracy is known of a network that is no classifier"
    made.description = dataclasses.replace(made.description, accuracy=0.9)
    assert made.share_read(features, labels) == 1.0 > made.share_read(features, labels.roll(1)) > 0.3
    drawn = {AS_FITTED: worse, Sampling(0.9): features}
    best, tried = choose_sampling(made, ways, 400, lambda how, count: drawn[how][:count], torch.cat([labels, labels]))
    assert [point.label_read for point in tried] == [made.share_read(worse, labels), 1.0] and best == Sampling(0.9)
    made.description = dataclasses.replace(made.description, accuracy=0.6)
    assert made.share_read(features, labels) is None


@pytest.mark.parametrize(("error", "best"), [(None, 0), (0.0, 0), (0.3, 2), (0.6, 2), (1.1, 3)])
@pytest.mark.parametrize("labelled", [False, True])
def test_among_distances_within_the_error_of_the_lowest_label_accuracy_decides(error, best, labelled):
    figures = {"kid": 0.0, "recall": 0.0, "density": 0.0, "coverage": 0.0, "images": 1000}
    known = [(1.0, 0.80), (1.2, 0.79), (1.3, 0.85), (2.0, 0.95), (None, 0.99)]
    points = [Tradeoff(fd=fd, fd_plus_minus=error, precision=share, **figures) for fd, share in known]
    if labelled:
        points = [dataclasses.replace(point, label_read=point.precision, precision=1 - point.precision) for point in points]
    assert best_of(points) is points[best if labelled else 0] and best_of(points[4:]) is best_of([]) is None


@pytest.mark.parametrize("dead", [False, True])
def test_features_that_do_not_vary_are_withheld_with_the_reason(tmp_path, dead):
    """Of images that are all alike, or of a network whose features are dead."""
    model = Classifier(1, 2, (8, 8))
    if dead:
        nn.init.constant_(model.layers[-2].weight, 0)
    images = torch.full((100, 1, 8, 8), 7, dtype=torch.uint8)
    if dead:
        images.random_(generator=torch.Generator().manual_seed(0))
    made = FeatureSpace(model, "test", ImageSet(images), open_fabric("cpu", "float32"), tmp_path)
    features = made.features(images, "features")
    distances, _ = nearest_neighbours(features, made.reference)
    judge = Judge(made, distances, seed=0)
    figures = judge.figures(judge.under_resamples(features, distances), distances)
    assert features.isfinite().all() and [name for name in FIGURES if figures[name] is not None] == ["nearer", "copied"]
    assert len(judge.withheld) == 2 and {*judge.withheld.values()} == {"the training images have all the same features"}
    assert along({"one": features}, made) == {} and made.frechet_distance(images, "features") is None


@pytest.mark.parametrize("count", [49, 50])
def test_a_tradeoff_has_figures_of_as_few_images_as_the_table_has(tmp_path, count):
    made = space(tmp_path, 100)
    features = made.reference[:count]
    judge = Judge(made, torch.ones(count), seed=0)
    assert bool(along({"one": features}, made)) == (judge.cloud is not None) == (count == 50)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_classifier_takes_images_of_any_size(size):
    assert Classifier(3, 2, (size, size)).eval().features(torch.zeros(5, 3, size, size, dtype=torch.uint8)).shape == (5, 64)


def test_the_classifier_looks_at_large_images_as_at_smaller_copies(tmp_path):
    """And is another one for them: its figures do not compare with those of one that sees them whole."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 64, 32), dtype=torch.uint8)
    large = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    whole, reducing = Classifier(3, 2, (64, 32)).eval(), Classifier(3, 2, (256, 128)).eval()
    reducing.load_state_dict(whole.state_dict(), strict=False)
    assert torch.allclose(whole.features(images), reducing.features(large), atol=1e-5)
    assert repr(whole) != repr(reducing) and digest_of_state(whole.state_dict()) != digest_of_state(reducing.state_dict())


def test_of_too_many_training_images_some_are_compared_with(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MOST_TRAINING", 40)
    some = space(tmp_path, 100)
    assert len(some.reference) == some.description.reference.images == 34
    assert some.numbers(torch.tensor([0, 1, 33, 34, 35])).tolist() == [0, 3, 99, 100, 103]


def test_features_are_kept_for_the_same_images_and_network_only(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "CHUNK", 7 * 64)  # features of a few images at a time
    first = space(tmp_path, 100)
    assert float(first.reference[:].var(0).sum()) == pytest.approx(100)
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "features", lambda *_: pytest.fail("they are on the disk"))
        second = space(tmp_path, 100)
    assert torch.equal(first.reference[:], second.reference[:]) and first.description == second.description
    other = space(tmp_path, 90)
    assert other.description.digest == first.description.digest
    assert other.description.reference != first.description.reference and len(other.reference) == 90


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Inception with random weights, as the file of weights that torch-fidelity reads."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        network = FeatureExtractorInceptionV3("inception-v3", ["2048"], empty)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(network.state_dict(), path)
    return network, path


def test_inception_features_are_those_of_torch_fidelity(inception_file):
    network, path = inception_file
    model, name = published("inception", path)
    assert name == "inception (not its standard weights, but random.pth)"
    images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    (expected,) = network(images.repeat(1, 3, 1, 1))
    features = model.features(images)
    assert torch.equal(features, expected) and features.shape == (2, model.dimensions)


def test_inception_features_are_not_scaled_and_too_few_images_have_no_fid(inception_file, tmp_path):
    network, path = inception_file
    splits = small_splits((1, 28, 28), 2, count=8)
    config = MetricsConfig(extractor="inception", weights=path)
    made = feature_space(open_fabric("cpu", "float32"), config, splits, tmp_path)
    (expected,) = network(splits.train.images.repeat(1, 3, 1, 1))
    assert torch.equal(made.reference[:], expected.double())
    assert made.withheld(1000) == f"{len(expected)} images for 2048 features: a covariance needs more images than features"


@pytest.fixture
def small_dinov2(monkeypatch):
    """Makes DINOv2 of one narrow layer; returns weights for it, named and shaped as in the published file."""
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, embed_dim=64, depth=1, num_heads=1))
    monkeypatch.setattr(DinoV2, "dimensions", 64)
    torch.manual_seed(0)
    state = timm.create_model("vit_large_patch14_dinov2", num_classes=0).state_dict()
    return {name: torch.randn_like(tensor) for name, tensor in state.items()} | {"mask_token": torch.zeros(1, 64)}


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 40, 24), (3, 256, 256)])
def test_dinov2_looks_at_images_as_dgm_eval_prepares_them(small_dinov2, tmp_path, shape):
    torch.save(small_dinov2, tmp_path / "random.pth")
    model, name = published("dinov2", tmp_path / "random.pth")
    assert name == "dinov2 (not its standard weights, but random.pth)"
    images = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    pictures = [Image.fromarray(image.expand(3, -1, -1).movedim(0, -1).numpy()) for image in images]
    dgm_eval = transforms.Compose(
        [
            transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    expected = model.network(torch.stack([dgm_eval(picture) for picture in pictures]))
    features = model.features(images)
    assert torch.equal(features, expected) and features.shape == (2, model.dimensions)
    assert not torch.allclose(features[0], features[1], atol=0.01)


def test_dinov2_features_are_not_scaled(small_dinov2, tmp_path):
    torch.save(small_dinov2, tmp_path / "random.pth")
    splits = small_splits((1, 28, 28), 2, count=8)
    config = MetricsConfig(extractor="dinov2", weights=tmp_path / "random.pth")
    made = feature_space(open_fabric("cpu", "float32"), config, splits, tmp_path)
    assert torch.equal(made.reference[:], made.model.features(splits.train.images).double())
    assert made.withheld(1000) == f"{len(splits.train)} images for 64 features: a covariance needs more images than features"


def test_positions_are_resized_by_the_scale_that_dinov2_was_trained_with():
    """A bicubic filter nearly reproduces a ramp, away from the borders: it tells where each new position lies in the old grid.

    By a scale of 37/16 the last one would lie 0.19 further on.
    """
    rows, columns = torch.meshgrid(torch.arange(37.0), torch.arange(37.0), indexing="ij")
    ramp = torch.stack([rows, columns], dim=-1).flatten(0, 1)
    made = resized(torch.cat([torch.tensor([[-1.0, -2.0]]), ramp])[None], 16)
    assert made.shape == (1, 257, 2) and made[0, 0].tolist() == [-1, -2]
    inner = (torch.arange(2, 14) + 0.5) * 37 / 16.1 - 0.5
    expected = torch.stack(torch.meshgrid(inner, inner, indexing="ij"), dim=-1)
    assert torch.allclose(made[0, 1:].unflatten(0, (16, 16))[2:14, 2:14], expected, rtol=0, atol=0.06)


class Boom:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_that_are_not_to_be_had(tmp_path, monkeypatch, name):
    address = re.escape(PUBLISHED[name].address)
    with pytest.raises(UserError, match=f"there is no file .*; download {address} .* --metrics.weights"):
        published(name, tmp_path / "no.pth")
    for file, content in (("text", b"weights"), ("hostile", pickle.dumps({"weight": Boom()})), ("empty", b"")):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(UserError, match=f"{file} is no file of weights; download {address}"):
            published(name, tmp_path / file)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth does not hold the weights of this network"):
        published(name, tmp_path / "other.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError, match=f"{name} weights could not be downloaded .no network.; download {address}"):
        published(name, None)

    def another_file(*_, **__):
        raise RuntimeError('invalid hash value (expected "6726825d", got "0")')

    monkeypatch.setattr(torch.hub, "download_url_to_file", another_file)
    with pytest.raises(UserError, match=f"^{address} does not hold the weights of this network"):
        published(name, None)


@pytest.mark.parametrize(
    "changed",
    [
        {"norm.weight": torch.ones(32)},  # another width
        {"pos_embed": torch.zeros(1, 1 + 37 * 36, 64)},  # no square of patches
        {"register_tokens": torch.zeros(1, 4, 64)},  # DINOv2 with registers
        {"pos_embed": torch.zeros(64)},
        {"cls_token": "text"},
    ],
)
def test_weights_of_another_dinov2_are_refused(small_dinov2, tmp_path, changed):
    torch.save(small_dinov2 | changed, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth does not hold the weights of this network; download"):
        published("dinov2", tmp_path / "other.pth")


def test_downloaded_weights_are_kept_and_their_checksum_is_asked_for(small_dinov2, tmp_path, monkeypatch):
    asked = []

    def network(address, path, checksum):
        asked.append((address, checksum))
        torch.save(small_dinov2, path)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", network)
    for _ in range(2):
        published("dinov2", None)
    assert asked == [(DinoV2.address, DinoV2.checksum)]


class Reader(nn.Module):
    """Is sure of label 1 in bright images, of label 0 in dark ones."""

    pixels = 2**10

    def features(self, images):
        return images.float().mean((1, 2, 3))[:, None] / 255

    def output(self, features):
        return torch.cat([-features, features], 1)


def test_the_share_kept_is_the_surest_of_each_label():
    brightness = torch.tensor([10, 200, 30, 100, 50, 250, 90, 0])
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    images = brightness.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    fabric = open_fabric("cpu", "float32")
    confidence = label_log_prob(fabric, Reader(), images, labels)
    assert rejection_sampled(confidence, labels, 0.5).tolist() == [0, 1, 2, 5]
    assert rejection_sampled(confidence, labels, 1.0).tolist() == list(range(8))
    assert rejection_sampled(confidence, labels, 0.1).tolist() == [0, 5]
    for share in (0.3, 0.4, 0.6):
        assert len(rejection_sampled(confidence, torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]), share)) >= share * len(images)


def made_by_a_second_run(make: Callable[[], Any], path: Path, lock: FileLock, capsys) -> Any:
    """What it makes once another lets go of the lock; until then it says that it waits, and nothing is at the path."""
    made: list[Any] = []
    with lock:
        second = Thread(target=lambda: made.append(make()))
        second.start()
        while "waiting for another process" not in capsys.readouterr().out:
            assert second.is_alive()
            time.sleep(0.01)
        assert not path.exists() and not made
    second.join()
    assert path.exists()
    return made[0]


def test_a_second_run_waits_for_the_features_that_another_is_making(tmp_path, capsys):
    first = space(tmp_path, 100)
    (path,) = tmp_path.glob("features-*.safetensors")
    path.unlink()  # as if the other were still at it
    second = made_by_a_second_run(lambda: space(tmp_path, 100), path, files.lock_of(path), capsys)
    assert torch.equal(second.reference[:], first.reference[:])


def test_a_second_run_waits_for_the_classifier_that_another_is_training(tmp_path, capsys):
    splits, config = small_splits((1, 8, 8), 2, count=80), shrunk(preset("mnist5k")).metrics

    def trained():
        return features.trained_classifier(open_fabric("cpu", "float32"), config, splits, tmp_path, seed=0)

    first, accuracy = trained()
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    last = sorted(folder.iterdir())[-1]
    shutil.rmtree(last)  # as if the other were still at it
    second, accuracy_again = made_by_a_second_run(trained, last, files.lock_of(folder), capsys)
    assert accuracy_again == accuracy
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def test_a_line_for_each_classifier_that_is_trained_and_none_for_one_that_is_there(tmp_path, capsys):
    splits, config = small_splits((1, 8, 8), 2, count=80), shrunk(preset("mnist5k")).metrics
    for expected in (["classifier", "second classifier"], []):
        for seed in (0, 1, 1):
            features.trained_classifier(open_fabric("cpu", "float32"), config, splits, tmp_path, seed)
        lines = capsys.readouterr().out.splitlines()
        assert [line.partition(": accuracy")[0] for line in lines] == expected


def test_accuracy_of_a_classifier_is_measured_once_for_the_same_test_images(tmp_path, monkeypatch):
    splits, config = small_splits((1, 8, 8), 2, count=80), shrunk(preset("mnist5k")).metrics
    measured, evaluate = [], features.evaluate

    def counted(*arguments):
        measured.append(evaluate(*arguments))
        return measured[-1]

    monkeypatch.setattr(features, "evaluate", counted)

    def accuracy(test: ImageSet) -> float:
        return features.trained_classifier(
            open_fabric("cpu", "float32"), config, dataclasses.replace(splits, test=test), tmp_path, seed=0
        )[1]

    other_labels = ImageSet(splits.test.images, 1 - splits.test.labels)
    first, again, other = accuracy(splits.test), accuracy(splits.test), accuracy(other_labels)
    assert first == again == measured[0]["accuracy"] and len(measured) == 2
    assert other == pytest.approx(1 - first)


def test_the_gap_closed_is_the_share_of_the_way_to_the_reconstructions():
    def distances(fd: float, spread: float = 0.0, seed: int = 0) -> torch.Tensor:
        others = torch.randn(100, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return torch.cat([torch.tensor([fd], dtype=torch.float64), fd + spread * others])

    fd = {"real": distances(0.5), "reconstruction": distances(2.0), "standard": distances(12.0), "learned": distances(4.0)}

    def verdict(withheld: str | None = None, **others: torch.Tensor) -> Verdict:
        return verdict_of(fd | others, withheld, "N(0, I)")

    assert verdict(tuned=distances(3.0)) == Verdict(pytest.approx(0.8), 0.0, tuned=pytest.approx(0.9), tuned_plus_minus=0.0)
    assert verdict("no Fréchet distance") == Verdict(None, reason="no Fréchet distance")
    assert verdict() == Verdict(pytest.approx(0.8), 0.0)
    above = verdict(standard=distances(2.5))  # the reconstructions, by no more than real images lie from each other
    assert above.closed is None and "N(0, I) is no worse" in above.reason
    # Its interval is that of the distances, 1.96 · 0.5 / 10; distances that err together err less than the same ones apart.
    assert verdict(learned=distances(4.0, 0.5)).plus_minus == pytest.approx(0.098, rel=0.2)
    together = verdict(learned=distances(2.2, 0.5), reconstruction=distances(2.0, 0.5))
    apart = verdict(learned=distances(2.2, 0.5, seed=1), reconstruction=distances(2.0, 0.5))
    assert together.plus_minus < apart.plus_minus / 5


@pytest.mark.usefixtures("small_data")
def test_memory_of_the_rows_grows_with_features_but_not_with_images(run, monkeypatch):
    """Beyond one batch, and beyond the images that are shown: by less than if one of the rows held its images."""
    for name, value in {"BATCH": 10, "SAMPLED_AT_ONCE": 10, "GRID": 10, "A_LABEL": 2, "POINTS": 10}.items():
        monkeypatch.setattr(rows, name, value)
    subject = rows.Subject.of(run, load_data(run), run.config.metrics, 0)

    def peak(count: int) -> int:
        some = dataclasses.replace(subject, chosen=subject.chosen[:count], contexts=subject.contexts[:count])
        return peak_bytes(lambda: compare.draw_rows(some), torch.device("cpu"))

    reader = rows.classifier(subject, seed=1)
    monkeypatch.setattr(rows, "classifier", lambda subject, seed: reader)  # reading it takes more than the rows do
    growth = (peak(120) - peak(40)) / 80
    of_features, of_pixels = 4 * subject.space.model.dimensions, math.prod(subject.splits.image_shape)
    assert growth < of_features * (len(subject.priors) + 3) + of_pixels / 2  # the other rows, and a copy of one


@pytest.mark.usefixtures("small_data")
def test_the_noise_of_pixels_is_not_held_of_a_whole_batch(run, monkeypatch):
    """Of a batch of reconstructions so few are rendered at once that the noise of their pixels takes no more with more images."""
    monkeypatch.setattr(autoencoder, "PIXELS_AT_ONCE", 2 * 28 * 28)
    monkeypatch.setattr(Classifier, "pixels", 2 * 28 * 28)
    subject = rows.Subject.of(run, load_data(run), run.config.metrics, 0)
    reader = rows.classifier(subject, seed=1)
    monkeypatch.setattr(rows, "classifier", lambda subject, seed: reader)

    def growth(pixels: str) -> float:
        judging = dataclasses.replace(subject.judging, pixels=pixels)
        parts = {count: (subject.chosen[:count], subject.contexts[:count]) for count in (40, 120)}
        few, many = (
            rows.Rows(dataclasses.replace(subject, judging=judging, chosen=chosen, contexts=contexts))
            for chosen, contexts in parts.values()
        )
        return (peak_bytes(many.reconstructions, torch.device("cpu")) - peak_bytes(few.reconstructions, torch.device("cpu"))) / 80

    assert growth("sample") < growth("mean") + 28 * 28  # float32 noise would take four times as much


@pytest.mark.usefixtures("small_data")
def test_a_comparison_comes_back_from_its_file(run, tmp_path, monkeypatch):
    """With what is missing and what is withheld; of a later version it is refused. No row's images are held but those shown."""
    splits, drawn = load_data(run), []
    monkeypatch.setattr(rows, "GRID", 10)
    draw_rows = compare.draw_rows
    monkeypatch.setattr(compare, "draw_rows", lambda subject: drawn.append(draw_rows(subject)) or drawn[-1])
    made = compared(run, splits)
    of_label = rows.A_LABEL * len(splits.label_names)
    assert {len(seen.features) for seen in drawn[0].seen.values()} == {120}
    for name, seen in drawn[0].seen.items():
        assert 10 < len(seen.images) <= 10 + of_label < 120 if name in rows.BY_LABEL else len(seen.images) == 10
    assert {len(images) for images in drawn[0].images.values()} == {10}
    few = compared(run, dataclasses.replace(splits, test=splits.test.subset(torch.arange(3))))
    without = dataclasses.replace(
        made, priors={name: row for name, row in made.priors.items() if name != "learned"}, missing={"learned": "none: none"},
        gap_closed=None, gap_closed_reason="none: none",
    )  # fmt: skip
    path = tmp_path / "metrics.json"
    for comparison in (made, few, without):
        write_comparison(path, comparison)
        assert read_comparison(path) == comparison
    assert json.loads(path.read_text())["priors"]["learned"] == {"note": "none: none"}
    assert any(note.startswith("copies: ") for note in notes(made))
    write_comparison(path, made)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(UserError, match="version 99.* delete it"):
        read_comparison(path)
