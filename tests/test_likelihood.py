"""The likelihood of held-out images: what is counted, what is told beside it, and that nothing is lost when it is stopped."""

import json
import math
import os
import signal

import pytest
import torch

from pipelines import likelihood as command
from pipelines.console import Stopped, UserError
from pipelines.judging import likelihood
from pipelines.judging.bounds import Bounds
from pipelines.judging.likelihood import active_units, mutual_information, rate_maps
from pipelines.pages.likelihood import columns_of, in_nats, notes_of
from pipelines.runs.dataset import load_data
from pipelines.runs.latents import encode
from pipelines.runs.parts import load_autoencoder, load_prior, specs_of
from pipelines.runs.run import Run
from stage1_vae import bottlenecks, likelihoods
from stage1_vae.bottlenecks import gaussian_rate
from stage2_prior.latents import LatentDataset
from tests.parts import trained_run

pytestmark = pytest.mark.usefixtures("small_data")


def measured(run: Run, **asked) -> Bounds:
    return likelihood.likelihood(run, load_data(run), **{"images": 20, "samples": 12, "naive": 50, **asked})


def test_what_stage_2_buys_is_the_difference_of_the_rates_on_the_same_draws(run):
    result = measured(run, samples=20)  # whole groups of 10, so that the average of their bounds lies below that of all 20
    priors = result.priors
    assert set(priors) == {"standard", "gaussian", "mixture", "learned"}
    for name, values in priors.items():
        assert values.negative_elbo.nats == pytest.approx(result.distortion.nats + values.rate.nats, rel=1e-6)
        if name != "standard":
            difference = priors["standard"].rate.nats - values.rate.nats
            assert values.negative_elbo.below_standard.nats == pytest.approx(difference, abs=1e-3)
        bounds = list(values.by_samples.values())
        assert list(values.by_samples) == ["1", "10", "20"] and bounds == sorted(bounds, reverse=True)
        assert bounds[0] == values.negative_elbo.nats and bounds[-1] == values.importance_weighted.nats
        assert 1 <= values.effective_samples <= 20
        assert (values.naive is not None) == (name != "learned")  # which is told the label
        assert name == "learned" or 1 <= values.naive.effective_samples <= 50.001
        assert values.negative_elbo.error > 0
    latents = result.latents
    assert 0 <= latents.mutual_information.nats <= latents.log_n + 1e-3
    assert priors["standard"].rate.nats >= latents.mutual_information.nats - 1  # KL(q(z) ‖ N(0, I)) ≥ 0


def test_the_rate_under_the_standard_normal_is_the_closed_form(run):
    """On average over draws; and the maps of it sum to it."""
    result = measured(run, images=1000, samples=30, naive=0, priors=["standard"])
    latents = encode(run, load_autoencoder(run), load_data(run).test, "test")
    (posterior,) = latents.levels
    exact = gaussian_rate(posterior["mean"], posterior["std"].log())
    assert result.images == 120 and result.priors["standard"].naive is None
    assert result.priors["standard"].rate.nats == pytest.approx(float(exact.mean()), rel=0.02)
    (maps,) = rate_maps(run, latents, load_prior(run, specs_of(load_autoencoder(run))), torch.arange(120), seed=0)
    torch.manual_seed(0)
    (z,), _ = latents[torch.arange(120)]
    log_q, log_p = (torch.distributions.Normal(*of).log_prob(z) for of in ((posterior["mean"], posterior["std"]), (0.0, 1.0)))
    assert torch.allclose(maps["standard"], (log_q - log_p).sum(1).mean(0), rtol=1e-4, atol=1e-4)
    channels = [values for name, values in maps.items() if "channel" in name]
    assert torch.allclose(torch.stack(channels).sum(0), maps["standard"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_of_signal", [2, 4])
def test_a_stopped_measurement_goes_on_and_ends_the_same(run, monkeypatch, batch_of_signal):
    monkeypatch.setattr(likelihood, "DRAWS_AT_ONCE", 60)  # 5 images
    asked = {"seed": 70 + batch_of_signal, "naive": 0, "priors": ["standard"]}  # which no other test measures
    of_images, calls = likelihood.Measurement.of_images, []
    before = set((run.folder / "likelihood").glob("*"))

    def stopping(self, batch, prior_draws):
        calls.append(len(batch))
        if len(calls) == batch_of_signal:
            os.kill(os.getpid(), signal.SIGTERM)
        return of_images(self, batch, prior_draws)

    monkeypatch.setattr(likelihood.Measurement, "of_images", stopping)
    with pytest.raises(Stopped, match=f"{5 * batch_of_signal} of 20 images"):
        measured(run, **asked)
    resumed = measured(run, **asked)
    assert calls == [5, 5, 5, 5]
    assert measured(run, **asked) == resumed and len(calls) == 4  # nothing is measured twice
    (kept,) = set((run.folder / "likelihood").glob("*")) - before
    kept.unlink()
    assert measured(run, **asked) == resumed
    assert measured(run, **asked, images=25).images == 25 and len(calls) == 9  # more images: only those are new


def test_the_progress_advances_with_each_batch_of_images(run, monkeypatch):
    shown = []

    class Watched(likelihood.Progress):
        def update(self, count, values=None):
            super().update(count, values)
            shown.append(self.done)

    monkeypatch.setattr(likelihood, "Progress", Watched)
    monkeypatch.setattr(likelihood, "DRAWS_AT_ONCE", 60)  # 5 images
    measured(run, seed=95, images=20, naive=0, priors=["standard"])
    assert shown == [5, 10, 15, 20]


def test_the_interval_in_the_table_is_that_of_95_percent():
    value = likelihood.estimate(torch.arange(100.0))
    assert value.error == pytest.approx(2.9, abs=0.01) and in_nats(value) == "49.50 ± 5.69"


def test_the_figure_of_an_image_does_not_depend_on_what_was_measured_before(run, monkeypatch):
    monkeypatch.setattr(likelihood, "DRAWS_AT_ONCE", 60)  # 5 images
    asked = {"seed": 90, "naive": 0, "priors": ["standard"]}
    few = measured(run, **asked, images=7)
    grown = measured(run, **asked, images=20)
    for path in (run.folder / "likelihood").glob("*"):
        path.unlink()
    assert measured(run, **asked, images=20) == grown and measured(run, **asked, images=7) == few


def test_codes_over_all_levels(tmp_path):
    run = trained_run(tmp_path, "fashion-vqvae2")
    result = measured(run)
    assert result.samples == 1 and result.codes == 2 and result.latents is None
    assert set(result.priors) == {"standard", "unigram", "order2", "learned"}
    uniform = 7 * 7 * math.log(512) + 14 * 14 * math.log(512)
    assert result.priors["standard"].rate.nats == pytest.approx(uniform, rel=1e-5)
    assert result.priors["unigram"].naive and not result.priors["learned"].naive  # which is told a label
    assert columns_of(result) == ["rate", "-ELBO", "naive"]
    with pytest.raises(UserError, match="no prior 'posterior' with a density"):
        measured(run, priors=["posterior"])
    autoencoder = load_autoencoder(run)
    latents = encode(run, autoencoder, load_data(run).test, "test")
    maps = rate_maps(run, latents, load_prior(run, specs_of(autoencoder)), torch.arange(120), seed=0)
    assert [tuple(level["learned"].shape) for level in maps] == [(7, 7), (14, 14)]
    every = measured(run, images=120, naive=0, priors=["learned"]).priors["learned"].rate.nats
    assert sum(float(level["learned"].sum()) for level in maps) == pytest.approx(every, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (likelihoods.DiscretizedLogistic(components=2), "a probability"),
        (likelihoods.Bernoulli(), "pseudo-likelihood"),
        (likelihoods.Gaussian(), "not a probability of 8-bit"),
    ],
)
def test_bits_per_dimension_of_probabilities_only(tmp_path, kind, says):
    result = measured(trained_run(tmp_path, "mnist5k", likelihood=kind), naive=0, priors=["standard"])
    best = result.priors["standard"].importance_weighted
    assert says in notes_of(result)[0]
    if says == "a probability":
        assert best.bits_per_dimension == pytest.approx(best.nats / (784 * math.log(2)))
        assert best.nats > 0 and "bits/dim" in columns_of(result)
    else:
        assert best.bits_per_dimension is None and "bits/dim" not in columns_of(result)


def test_the_command(run, tmp_path, capsys):
    file = tmp_path / "l.json"
    arguments = ["--samples", "3", "--images", "10", "--naive", "5", "--device", "cpu", "--prior", "learned", "posterior"]
    command.main([str(run.folder), *arguments, "--json", str(file)])
    written, shown = json.loads(file.read_text()), capsys.readouterr().out
    assert set(written["priors"]) == {"learned", "posterior"}
    assert f"{written['priors']['learned']['negative_elbo']['nats']:.2f}" in shown and "K = 3" in shown and "10 images" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--samples", "0"], "--samples is a number from 1 up"),
        (["--images", "0"], "--images is a number from 1 up"),
        (["--naive", "-1"], "--naive is a number from 0 up"),
        (["--prior", "lerned"], "did you mean 'learned'"),
    ],
)
def test_bad_input(run, arguments, says):
    with pytest.raises(UserError, match=says):
        command.main([str(run.folder), *arguments, "--device", "cpu"])


def test_a_deterministic_encoder_is_refused(tmp_path):
    run = trained_run(tmp_path, "mnist5k", bottleneck=bottlenecks.Deterministic())
    with pytest.raises(UserError, match="no density"):
        measured(run)


def test_mutual_information_by_hand():
    """Posteriors far apart tell everything, log n; all the same one, nothing; two of them half each, log 2."""
    for means, expected in ((torch.arange(50.0), math.log(50)), (torch.zeros(50), 0.0), (torch.arange(50.0) % 2, math.log(2))):
        mean = 100 * means.view(-1, 1, 1, 1)
        latents = LatentDataset([{"mean": mean, "std": torch.ones_like(mean)}])
        assert torch.allclose(mutual_information(latents, torch.arange(50), seed=0), torch.tensor(expected).double(), atol=1e-4)


def test_active_units_by_hand():
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 0.12, 0.08, 0.0]).view(1, 4, 1, 1)
    mean = spread * torch.randn(4000, 4, 1, 1, generator=generator)
    assert active_units(LatentDataset([{"mean": mean, "std": torch.ones_like(mean)}])) == 2
