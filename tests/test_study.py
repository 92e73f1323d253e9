"""Every study runs on a shrunk run, and writes its plot, its numbers and its sentences."""

import json
import math

import pytest
import torch
from scipy import stats

from pipelines import study
from pipelines.console import UserError
from pipelines.runs.dataset import write_facts
from pipelines.runs.recipes import preset
from pipelines.runs.run import Run
from pipelines.studies import aggregate_posterior, evidence, samples_per_image, unusual_images
from pipelines.studies.samples_per_image import gradients_of_draws
from pipelines.studies.trained import Trained
from pipelines.training.config import FitConfig
from stage1_vae.bottlenecks import gaussian_rate
from stage1_vae.bounds import draws, log_likelihoods
from stage2_prior.gaussians import GaussianMixturePrior
from stage2_prior.heads import gaussian_log_prob
from stage2_prior.latents import LatentDataset, LatentSpec, draw
from tests.parts import random_latents, shrunk, small_splits, trained_run

pytestmark = pytest.mark.usefixtures("small_data")


def numbers(run: Run, name: str) -> dict:
    study.main([name, "--run", str(run.folder), "--device", "cpu"])
    assert (run.folder / "studies" / f"{name}.png").stat().st_size > 1000
    found = json.loads((run.folder / "studies" / f"{name}.json").read_text())
    assert len(found["findings"]) >= 3 and all(sentence.endswith(".") for sentence in found["findings"])
    return found


def test_samples_per_image(run, monkeypatch):
    monkeypatch.setattr(samples_per_image, "TOTAL", 4000)
    monkeypatch.setattr(samples_per_image, "REPEATS", 4)
    found = numbers(run, "samples-per-image")
    assert list(found["elbo"]) == ["1", "2", "5", "10", "20", "50", "100", "200"]
    for noise in (found["standard_deviation"], found["gradient_noise"]):
        assert noise["1"] / noise["100"] == pytest.approx(10, rel=0.35)  # 1/√L
    tight = list(found["importance_weighted"].values())
    assert all(value == pytest.approx(found["elbo"]["1"], rel=1e-4) for value in found["elbo"].values())
    assert tight[0] == pytest.approx(found["elbo"]["1"], rel=1e-4) and tight == sorted(tight)
    batches = found["gradient_noise_of_a_step"]
    assert batches["1"] < batches["256"]


def test_the_gradient_of_each_draw_is_that_of_its_weight(run):
    """With respect to the posterior's mean and log standard deviation, by automatic differentiation of one draw's log weight."""
    trained = Trained.of(run)
    image = trained.splits.test.images[0]
    weights, gradients, z = gradients_of_draws(trained, image, 3)
    posterior = {name: value.detach() for name, value in trained.autoencoder.encode(image[None])[0].items()}
    for i in range(3):
        noise = (z[i] - posterior["mean"]) / posterior["std"]

        def weight(mean, log_std, noise=noise):
            at = mean + log_std.exp() * noise
            log_p = trained.autoencoder.decode([at]).log_prob(trained.autoencoder.likelihood.scale(image[None]))
            log_q = gaussian_log_prob(at, mean, log_std).sum()
            return (log_p + trained.standard.log_prob([at])).sum() - log_q

        inputs = (posterior["mean"], posterior["std"].log())
        assert float(weight(*inputs).detach()) == pytest.approx(float(weights[i]), rel=1e-4)
        expected = torch.cat(torch.autograd.functional.jacobian(weight, inputs), 1).flatten()
        assert torch.allclose(gradients[i], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_evidence(run, monkeypatch):
    monkeypatch.setattr(evidence, "TOTAL", 1000)
    found, trained = numbers(run, "evidence"), Trained.of(run)
    image = trained.typical()[None]
    with torch.no_grad():
        torch.manual_seed(0)  # the study's own draws from q(z|x)
        explained = draws(trained.autoencoder, image, 1000, {}).log_likelihood
        assert found["posterior_log_likelihood"] == pytest.approx(float(explained.mean()), rel=1e-5)
        for (name, of_prior), prior in zip(found["priors"].items(), (trained.standard, trained.learned), strict=True):
            assert found["curves"][f"ELBO, {name}"][0] <= of_prior["log_evidence"]
            difference = found["posterior_log_likelihood"] - of_prior["log_evidence"]
            assert of_prior["decades"] == pytest.approx(difference / math.log(10))
            fresh = log_likelihoods(trained.autoencoder, image, prior.sample(torch.arange(4000), seed=1))
            explain = int((fresh > explained.min()).sum())
            counts = [
                [explain, 4000 - explain],
                [round(1000 * share) for share in (of_prior["explain"], 1 - of_prior["explain"])],
            ]
            assert stats.fisher_exact(counts).pvalue > 1e-4


@pytest.mark.parametrize(
    ("decades", "needed"), [(-0.9, None), (0.0, None), (0.5, None), (0.6, "about 10^1 draws"), (5.2, "about 10^5 draws")]
)
def test_a_number_of_draws_is_said_only_where_it_is_above_one(decades, needed):
    share = {"log_evidence": -200.0, "explain": 0.9, "best_of_naive": -190.0, "decades": decades}
    text = " ".join(evidence.said(-199.0, share, share))
    if needed is None:
        assert "10^" not in text and "z from N(0, I) explain this image about as well as those that the encoder" in text
        assert "explain nothing" not in text and "the naive way would need only a few draws." in text
    else:
        assert text.count(needed) == 2 and "Most z explain nothing" in text and "about as well" not in text


def test_mean_or_sample(run):
    """Against other draws, many more; of the average of 100 draws, 1/100 of their variance is left."""
    found, trained = numbers(run, "mean-or-sample"), Trained.of(run)
    with torch.no_grad():
        (posterior,) = trained.autoencoder.encode(trained.held_out(200))
        at_mean = trained.autoencoder.decode([posterior["mean"]]).mean
        torch.manual_seed(1)
        drawn = torch.stack([trained.autoencoder.decode([draw(posterior)]).mean for _ in range(400)])
    variance = float(drawn.var(0).mean())
    bias = float((drawn.mean(0) - at_mean).square().mean()) - variance / 400
    assert found["rms_sample_against_average"] ** 2 == pytest.approx(variance * 0.99, rel=0.05)
    assert found["rms_mean_against_average"] ** 2 == pytest.approx(bias + variance / 100, rel=0.05)
    assert found["rate"] == pytest.approx(float(gaussian_rate(posterior["mean"], posterior["std"].log()).mean()), rel=1e-4)
    assert found["std"]["VAE"] == pytest.approx(float(posterior["mean"].std()), rel=1e-4)


def test_a_network_of_a_study_is_trained_anew_under_other_settings(run, tmp_path, monkeypatch):
    """And lies in the folder that is written to, which of an export is another than its own."""
    trained, digests = Trained.of(run), set()
    monkeypatch.setattr(type(run), "work", tmp_path)
    before = {*run.folder.rglob("*")}
    for steps in (2, 3, 3):
        monkeypatch.setattr(aggregate_posterior, "SWEEP_FIT", FitConfig(steps=steps, batch_size=16, checkpoint_steps=4))
        model = aggregate_posterior.swept_network(trained, 1, 4, 2).model
        digests.add(sum(float(parameter.detach().double().sum()) for parameter in model.parameters()))
    assert len(digests) == 2 and len([*(tmp_path / "studies").glob("fully-connected-1x4-2-*")]) == 2
    assert {*run.folder.rglob("*")} == before


def test_aggregate_posterior(run, monkeypatch):
    monkeypatch.setattr(aggregate_posterior, "SWEEP_FIT", FitConfig(steps=4, batch_size=16, checkpoint_steps=4))
    monkeypatch.setattr(
        aggregate_posterior, "SWEEP", {name: (layers, 16, size) for name, (layers, _, size) in aggregate_posterior.SWEEP.items()}
    )
    found = numbers(run, "aggregate-posterior")
    assert 0 <= found["mutual_information"] <= found["log_n"] + 1e-3
    assert set(found["rate"]) == {"standard", "gaussian", "mixture", "per label", "learned"}
    assert set(found["sweep"]) == set(aggregate_posterior.SWEEP)
    assert found["rate"]["learned"] != found["rate"]["standard"]
    trained = Trained.of(run)
    with torch.no_grad():
        (posterior,) = trained.autoencoder.encode(trained.splits.test.images)
        exact = float(gaussian_rate(posterior["mean"], posterior["std"].log()).mean())
        torch.manual_seed(1)
        log_q = torch.distributions.Normal(posterior["mean"], posterior["std"]).log_prob
        fresh = [
            (log_q(z).flatten(1).sum(1) - trained.standard.log_prob([z])).mean() for z in (draw(posterior) for _ in range(200))
        ]
    assert found["rate"]["standard"] == pytest.approx(exact, abs=4 * float(torch.stack(fresh).std()))  # of one draw an image
    for name, network in found["sweep"].items():
        assert network["dimensions"] == aggregate_posterior.SWEEP[name][2] and network["negative_elbo"] > network["rate"] > 0
        assert network["kl_at_least"] <= network["kl_at_most"] + 0.05  # of other draws


def test_a_gaussian_for_each_label_is_their_mixture():
    labels = torch.tensor([3, 1]).repeat(200)
    latents = random_latents(400, LatentSpec((1, 1, 2)))
    prior = aggregate_posterior.gaussian_per_label(latents, labels, [LatentSpec((1, 1, 2))])
    assert prior.weights.tolist() == [0.5, 0.5]
    z = torch.randn(5, 1, 1, 2)
    parts = []
    for label in (1, 3):
        one = GaussianMixturePrior([LatentSpec((1, 1, 2))], 1)
        one.estimate(LatentDataset(latents.posteriors(torch.nonzero(labels == label).squeeze(1))))
        parts.append(one.log_prob([z]))
    assert torch.allclose(prior.log_prob([z]), torch.stack(parts).logsumexp(0) - math.log(2), rtol=1e-5)


def test_a_wrong_name_is_answered_in_a_sentence():
    with pytest.raises(UserError, match="no study 'evidenc' - did you mean 'evidence'. There are: samples-per-image, "):
        study.main(["evidenc"])


def test_a_run_of_codes_is_refused(tmp_path):
    made = Run.create(tmp_path / "codes", shrunk(preset("mnist-vqvae")), "cpu")
    write_facts(made, small_splits((1, 28, 28), 4))
    with pytest.raises(UserError, match="no q"):
        study.main(["evidence", "--run", str(made.folder), "--device", "cpu"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Run:
    return trained_run(tmp_path_factory.mktemp("plain"), "mnist5k-plain")


@pytest.mark.parametrize("name", ["samples-per-image", "mean-or-sample"])
def test_without_a_learned_prior_studies_that_need_none_run(plain, monkeypatch, name):
    monkeypatch.setattr(samples_per_image, "TOTAL", 1000)
    monkeypatch.setattr(samples_per_image, "REPEATS", 2)
    numbers(plain, name)
    with pytest.raises(UserError, match="no learned prior"):
        study.main(["evidence", "--run", str(plain.folder), "--device", "cpu"])


def test_unusual_images(run, monkeypatch):
    found = numbers(run, "unusual-images")
    assert {"inverted", "uniformly grey", "patch of another"} <= found["auroc"].keys()
    for told in found["auroc"].values():
        assert {*told} == {"all three", "bits", "bits of z", "bits of x given z", "bits of PNG"} and all(
            0 <= value <= 1 for value in told.values()
        )
    # Squares on a dark ground: what is inverted lies far from them in every way.
    assert found["auroc"]["inverted"]["bits of x given z"] > 0.95 and found["auroc"]["inverted"]["all three"] > 0.95


def test_images_of_which_a_score_counts_more_as_usual_than_real_ones_are_named():
    told = {"inverted": {"bits": 0.9}, "blurred": {"bits": 0.2}}
    assert unusual_images.in_words("bits", told).endswith("Below 0.5, blurred images count as more usual than real ones.")
