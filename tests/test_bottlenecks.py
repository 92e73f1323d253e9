"""Discrete bottlenecks: the codebook learns, revives and is exact; straight-through gradients; FSQ's codes."""

import copy
import math
import pickle

import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from stage1_vae import bottlenecks
from stage1_vae.bottlenecks import CodeUse, FiniteScalar, Gaussian, GumbelSoftmax, VectorQuantized
from stage1_vae.hierarchy import Hierarchical
from tests.parts import BOTTLENECKS


def clusters(count: int, codes: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Feature maps, count channels 1 1, around `codes` well-separated centres, each as often as the others."""
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(codes, channels, generator=torch.Generator().manual_seed(99))
    which = torch.arange(count) % codes
    return (centres[which] + 0.1 * torch.randn(count, channels, generator=generator))[:, :, None, None]


def quantizer(rate_weight=0.0, rate_share=0.0, **values):
    torch.manual_seed(0)
    made = VectorQuantized(rate_weight=rate_weight, rate_share=rate_share, **values).build(values["channels"])
    made.project = torch.nn.Identity()  # quantize the features themselves
    made.project.weight = torch.zeros(1)
    return made


@pytest.mark.parametrize("rate", [0.0, 2.0])
def test_the_code_chosen_costs_least_in_distance_and_rate(rate):
    model = quantizer(codes=9, channels=4, rate_weight=rate)
    vectors = torch.randn(2, 3, 5, 4)
    model.codebook.normal_()
    model.counts.copy_(torch.rand(9).square())
    distance = torch.cdist(vectors.view(-1, 4), model.codebook).square()
    rates = -torch.distributions.Categorical(probs=model.counts).log_prob(torch.arange(9))
    cost = distance + rate * rates.clamp(max=math.log(9))
    assert torch.equal(model.choose(vectors), cost.argmin(1).view(2, 3, 5))
    assert not torch.equal(cost.argmin(1), distance.argmin(1)) or rate == 0


def test_the_price_of_a_nat_rises_from_nothing():
    codes = []
    for progress, rate in ((0.0, 3.0), (0.5, 3.0), (0.0, 0.0)):
        model = quantizer(codes=9, channels=4, rate_weight=rate, rate_share=0.5).train()
        model.codebook.normal_(generator=torch.Generator().manual_seed(1))
        model.counts.copy_(torch.arange(1, 10))
        codes.append(model(torch.randn(50, 4, 2, 2, generator=torch.Generator().manual_seed(2)), progress)[0])
    assert torch.equal(codes[0], codes[2]) and not torch.equal(codes[1], codes[2])


def test_a_rate_saves_nats():
    """Features of which half are noise around one centre: it gets fewer codes where choosing one has a price."""
    entropy = {}
    for rate in (0.0, 1.0):
        model = quantizer(codes=16, channels=3, decay=0.9, rate_weight=rate).train()
        for step in range(200):
            features = torch.cat([clusters(80, 8, 3, seed=step), 0.5 * torch.randn(80, 3, 1, 1) + 30])
            terms = model(features, step / 200)[2]
        entropy[rate] = float(terms["perplexity"].log())
    assert entropy[1.0] < entropy[0.0] - 0.3


def test_the_codebook_finds_the_clusters():
    model = quantizer(codes=24, channels=3, decay=0.8).train()
    for step in range(100):
        features = clusters(160, 8, 3, seed=step)
        embedded, _, terms = model(features, step / 100)
    assert terms["perplexity"] > 7.9
    assert (embedded[0] - features).abs().max() < 1


def test_the_averages_are_those_of_the_paper():
    """Equations 6 to 8 of VQ-VAE, by hand, for one step from a known codebook."""
    model = quantizer(codes=2, channels=1, decay=0.9, revival=0.0).train()
    model.counts.copy_(torch.tensor([3.0, 1.0]))
    model.sums.copy_(torch.tensor([[0.0], [10.0]]))
    model.codebook.copy_(torch.tensor([[0.0], [10.0]]))
    embedded, commitment, _ = model(torch.tensor([1.0, -2.0, 9.0]).view(3, 1, 1, 1), 0)
    assert embedded.flatten().tolist() == [0, 0, 10]
    assert torch.allclose(commitment, 0.25 * torch.tensor([1.0, 4.0, 1.0]))
    assert torch.allclose(model.counts, torch.tensor([0.9 * 3 + 0.1 * 2, 0.9 * 1 + 0.1 * 1]))
    assert torch.allclose(model.codebook[:, 0], torch.tensor([0.1 * -1 / 2.9, (0.9 * 10 + 0.1 * 9) / 1.0]))


def test_dead_codes_are_revived_only_when_asked():
    used = {}
    for revival in (0.05, 0.0):
        model = quantizer(codes=16, channels=3, revival=revival, decay=0.5).train()
        model(clusters(64, 16, 3), 0)
        model.codebook[4:] = 1e4  # twelve codes far from everything
        model.counts[4:] = 1e-9
        model.sums[4:] = model.codebook[4:] * 1e-9
        for step in range(100):
            model(clusters(64, 16, 3, seed=step), step / 100)
        codes = model.posterior(clusters(64, 16, 3, seed=1000))[0]["codes"]
        used[revival] = len(codes.unique())
    assert used[0.0] <= 4 and used[0.05] >= 10


def test_nothing_moves_in_evaluation():
    model = quantizer(codes=4, channels=2).train()
    model(clusters(32, 4, 2), 0)
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(clusters(32, 4, 2, seed=1), 0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", BOTTLENECKS)
def test_a_copy_trains_its_own_state_and_no_other(name, copied):
    torch.manual_seed(0)
    model, features = BOTTLENECKS[name].build(8).train(), torch.randn(6, 8, 4, 4)
    model(features, 0.3)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    other = copied(model)
    results = []
    for trained in (other, model):
        torch.manual_seed(1)
        results.append(trained(features, 0.3)[0])
        if trained is other:
            assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(*results)
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_gradients_pass_straight_through():
    model = quantizer(codes=4, channels=2, commitment=0.5).eval()
    model.codebook.copy_(torch.randn(4, 2))
    features = torch.randn(3, 2, 2, 2, requires_grad=True)
    embedded, commitment, _ = model(features, 0)
    weights = torch.randn_like(embedded)
    (through,) = torch.autograd.grad((embedded * weights).sum(), features, retain_graph=True)
    assert torch.allclose(through, weights[0])
    (pull,) = torch.autograd.grad(commitment.sum(), features)
    assert torch.allclose(pull, 2 * 0.5 * (features - embedded[0]), atol=1e-5)


def test_every_level_of_a_hierarchy_has_a_price_of_its_own():
    torch.manual_seed(0)
    model = Hierarchical(VectorQuantized(codes=9, channels=4, rate_weight=8.0), levels=3, blocks=1, coarser_rate=0.25).build(4)
    vectors, codebook = torch.randn(500, 4), torch.randn(9, 4)
    counts = torch.tensor([256.0, 128, 64, 32, 16, 8, 4, 2, 1])
    fine_to_coarse = [model.finest, model.coarser.finest, model.coarser.coarser]
    for level, price in zip(fine_to_coarse, (8.0, 2.0, 0.5), strict=True):
        level.codebook.copy_(codebook)
        level.counts.copy_(counts)
        one_price = quantizer(codes=9, channels=4, rate_weight=price)
        one_price.codebook.copy_(codebook)
        one_price.counts.copy_(counts)
        assert torch.equal(level.choose(vectors), one_price.choose(vectors))
    chosen = [level.choose(vectors) for level in fine_to_coarse]
    assert not torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[1], chosen[2])


def test_no_code_is_revived_in_the_last_fifth_of_the_training():
    for progress, revived in ((0.79, True), (0.81, False)):
        model = quantizer(codes=16, channels=3, decay=0.5).train()
        model(clusters(64, 16, 3), 0.0)
        model.codebook[4:], model.counts[4:], model.sums[4:] = 1e4, 0.0, 0.0
        model(clusters(64, 16, 3), progress)
        assert bool((model.codebook[4:] < 1e3).all()) == revived


@pytest.mark.parametrize("levels", [(2, 3), (8, 5, 5), (4, 4, 4)])
def test_every_finite_scalar_code_comes_back_as_its_own_vector(levels):
    model = FiniteScalar(levels).build(4)
    codes = torch.arange(model.vocabulary)[:, None, None]
    vectors = model.embed([codes]).flatten(1)
    assert len(vectors.unique(dim=0)) == model.vocabulary
    assert vectors.min() == -1 and vectors.abs().max() <= 1


def test_finite_scalar_embeds_in_training_what_it_decodes_from_codes():
    model = FiniteScalar((8, 5, 3)).build(6).eval()
    features = 3 * torch.randn(10, 6, 4, 4)
    embedded, penalty, _ = model(features, 0)
    codes = model.posterior(features)[0]["codes"]
    assert torch.allclose(embedded[0], model.embed([codes]), atol=1e-6)
    assert penalty.eq(0).all() and len(codes.unique()) > 40


@pytest.mark.parametrize("name", ["vector-quantized", "finite-scalar", "hierarchical", "hierarchical-3"])
def test_what_the_decoder_reads_held_out_is_what_the_codes_embed(name):
    torch.manual_seed(3)
    model = BOTTLENECKS[name].build(6)
    features = 3 * torch.randn(10, 6, 8, 8)
    model(features, 0)  # sets the codebooks up
    with torch.no_grad():
        embedded, _, _ = model.eval()(features, 1)
        codes = [level["codes"] for level in model.posterior(features)]
        assert torch.allclose(embedded[0], model.embed(codes), atol=1e-5)
    assert all(len(level.unique()) > 3 for level in codes)


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_a_config_says_whether_its_latents_are_numbers(name):
    _, vocabulary = BOTTLENECKS[name].build(6).latents((4, 4))[0]
    assert BOTTLENECKS[name].continuous == (vocabulary is None)


def test_the_code_that_is_stored_is_the_likeliest():
    torch.manual_seed(0)
    model = GumbelSoftmax(codes=6, channels=2).build(4).eval()
    features = 3 * torch.randn(10, 4, 2, 3)
    codes, shares = model.posterior(features)[0]["codes"], model.project(features).softmax(1)
    assert torch.equal(shares.gather(1, codes[:, None]).squeeze(1), shares.amax(1)) and len(codes.unique()) > 3


def test_usage_and_perplexity():
    use = CodeUse(4)
    for _ in range(3):
        terms = use(torch.tensor([0, 1, 1, 0]))
    assert terms["usage"] == 0.5 and terms["perplexity"] == pytest.approx(2)
    assert use.eval()(torch.tensor([0, 1, 1, 0])) == {}  # they would be those of training


def test_the_relaxation_anneals_and_its_rate_is_the_divergence_from_uniform():
    model = GumbelSoftmax(codes=6, channels=2, beta=3.0, anneal_share=0.5).build(4)
    assert model.schedule(0) == (1.0, 0.0)
    assert model.schedule(0.5) == model.schedule(1.0) == pytest.approx((0.0625, 3.0))
    temperatures, weights = zip(*(model.schedule(step / 200) for step in range(101)))
    assert list(temperatures) == sorted(temperatures, reverse=True) and list(weights) == sorted(weights)
    features = 3 * torch.randn(5, 4, 2, 3)
    logits = model.project(features).movedim(1, -1)
    uniform = torch.distributions.Categorical(logits=torch.zeros(6))
    divergence = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=logits), uniform).flatten(1).sum(1)
    _, penalty, terms = model.train()(features, 0.25)
    assert torch.allclose(terms["rate"], divergence, atol=1e-4)
    assert torch.allclose(penalty, 1.5 * divergence, atol=1e-4)


def test_held_out_codes_are_drawn_from_their_distribution():
    """So that distortion and rate are of one q, and their sum a bound."""
    torch.manual_seed(0)
    count = 50_000
    model = GumbelSoftmax(codes=4, channels=2).build(3).eval()
    features = 3 * torch.randn(1, 3, 1, 1)
    with torch.no_grad():
        embedded, _, _ = model(features.expand(count, -1, -1, -1), 0)
        expected = model.project(features).flatten().double().softmax(0) * count
        distances = torch.cdist(embedded[0].flatten(1), model.codebook, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.amin(1).max() < 1e-5
    observed = torch.bincount(distances.argmin(1), minlength=4)
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-4


def test_a_relaxation_without_annealing_is_cold_at_once():
    assert GumbelSoftmax(anneal_share=0.0, beta=3.0).build(4).schedule(0) == pytest.approx((0.0625, 3.0))


def test_a_cold_relaxation_is_one_code():
    model = GumbelSoftmax(codes=6, channels=2, final_temperature=1e-4, anneal_share=0.01).build(4).train()
    embedded, _, _ = model(torch.randn(5, 4, 2, 3), 1)
    vectors = embedded[0].movedim(1, -1).reshape(-1, 2)
    assert torch.cdist(vectors, model.codebook).amin(1).max() < 1e-3


def test_mixed_precision_does_not_round_the_distances():
    """Codes so near to each other that bfloat16 confuses them."""
    torch.manual_seed(0)
    model = quantizer(codes=50, channels=8)
    model.codebook.copy_(1 + 0.01 * torch.randn(50, 8))
    vectors = 1 + 0.01 * torch.randn(400, 8)
    exact = model.choose(vectors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.choose(vectors), exact)


@pytest.mark.parametrize("levels", [2, 3, 5, 8])
def test_every_finite_scalar_level_is_reached_and_zero_is_the_middle_one(levels):
    model = FiniteScalar((levels,)).build(1)
    model.project = torch.nn.Identity()
    _, codes = model.rounded(torch.linspace(-9, 9, 101).view(-1, 1, 1, 1))
    assert codes.unique().tolist() == list(range(levels))
    assert model.rounded(torch.zeros(1, 1, 1, 1))[0] == pytest.approx(levels // 2, abs=1e-6)


def test_two_finite_scalar_levels_have_a_gradient():
    model = FiniteScalar((2,)).build(1)
    model.project.weight.data.fill_(1)
    model.project.bias.data.zero_()
    features = torch.linspace(-1, 1, 9).view(1, 1, 1, 9).requires_grad_()
    level, codes = model.rounded(features)
    level.sum().backward()
    assert codes.flatten().tolist() == [0] * 4 + [1] * 5 and (features.grad > 0.2).all()


def test_finite_scalar_codes_that_are_too_many_are_refused():
    with pytest.raises(ValueError, match="make 1,000,000,000 codes, and at most 1,000,000 can be modelled"):
        FiniteScalar((1000, 1000, 1000)).build(4)


def test_a_spike_of_log_sigma_makes_no_loss_infinite_and_comes_back():
    model = Gaussian(channels=1).build(2)
    model.project.weight.data.copy_(torch.eye(2)[..., None, None])
    model.project.bias.data.zero_()
    log_sigma = torch.tensor([-1000.0, -3.0, 2.0, 1000.0]).view(4, 1, 1, 1).requires_grad_()
    features = torch.cat([torch.zeros_like(log_sigma), log_sigma], 1)
    embedded, penalty, _ = model(features, 0.0)
    penalty.sum().backward()
    assert embedded.isfinite().all() and penalty.isfinite().all()
    assert log_sigma.grad.isfinite().all() and log_sigma.grad[3] > 1 and log_sigma.grad[0] < -0.5
    (posterior,) = model.posterior(features)
    assert torch.equal(posterior["std"][1:3], log_sigma[1:3].exp()) and posterior["std"].isfinite().all()


@torch.no_grad()
def test_nearest_codes_are_looked_for_few_at_a_time(monkeypatch):
    """No tensor on the way holds more distances than are meant to be in memory at once."""
    model = VectorQuantized(codes=12, channels=3).build(4)
    model.codebook.normal_()
    vectors = torch.randn(20, 5, 3)

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            self.numbers = max(self.numbers, made.numel() if isinstance(made, torch.Tensor) else 0)
            return made

    with Largest() as before:
        whole = model.choose(vectors)
    limit = 12 * 40  # more than the vectors have numbers
    assert before.numbers > limit
    monkeypatch.setattr(bottlenecks, "DISTANCES_AT_ONCE", limit)
    with Largest() as after:
        assert torch.equal(model.choose(vectors), whole)
    assert after.numbers <= limit
