"""The counter-based noise: right, uniform, and independent of everything but its own counter."""

import pytest
import torch
from scipy import stats

from stage2_prior.sampling import MOST_NUMBERS, choose, normals, philox, uniforms

# The published known-answer vectors of Philox4x32-10 (Random123, kat_vectors): counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_words(counter, key, result):
    words = [torch.tensor(int(word, 16)) for word in counter.split()]
    k0, k1 = (int(word, 16) for word in key.split())
    assert [f"{int(word):08x}" for word in philox(tuple(words), (k0, k1))] == result.split()


def test_uniforms_are_uniform_and_open():
    numbers = uniforms(7, torch.arange(20_000), torch.arange(3), 5)
    assert numbers.shape == (20_000, 3, 5)
    assert 0 < numbers.min() and numbers.max() < 1
    for k in range(5):
        assert stats.kstest(numbers[:, 1, k].numpy(), "uniform").pvalue > 1e-4
    correlation = torch.corrcoef(numbers.flatten(1).T) - torch.eye(15)
    assert correlation.abs().max() < 5 / 20_000**0.5


def test_every_counter_has_its_own_numbers():
    indices = torch.tensor([0, 1, 2, 2**33])
    drawn = [uniforms(seed, indices, torch.arange(4), 6, stream) for seed in (0, 1, 2**40) for stream in (0, 1)]
    numbers = torch.stack(drawn).flatten()
    assert len(numbers.unique()) > 0.999 * len(numbers)


def test_a_number_depends_on_nothing_else():
    whole = uniforms(3, torch.arange(10), torch.arange(8), 6)
    assert torch.equal(uniforms(3, torch.tensor([7]), torch.tensor([5]), 6)[0, 0], whole[7, 5])
    assert torch.equal(uniforms(3, torch.arange(10), torch.arange(8), 3), whole[..., :3])


def test_uniforms_of_a_position_end_where_those_of_the_next_stream_begin():
    largest, next_stream = (
        uniforms(0, torch.arange(1), torch.zeros(1).long(), MOST_NUMBERS),
        uniforms(0, torch.arange(1), torch.zeros(1).long(), 8, stream=1),
    )
    assert largest.shape == (1, 1, MOST_NUMBERS) and not torch.equal(largest[..., :8], next_stream)
    with pytest.raises(ValueError, match="use more positions"):
        uniforms(0, torch.arange(1), torch.zeros(1).long(), MOST_NUMBERS + 1)


def test_normals_of_a_large_latent_are_not_those_of_another_stream():
    large, other = (normals(0, torch.arange(2), (4, MOST_NUMBERS // 2), stream) for stream in (0, 1))
    assert large.shape == (2, 4, MOST_NUMBERS // 2)
    assert len(torch.cat([large, other]).flatten(1)[:, ::4001].unique()) == 4 * len(range(0, 2 * MOST_NUMBERS, 4001))
    assert not set(large[0, 2, :100].tolist()) & set(other[0].flatten().tolist()[:100])
    assert torch.equal(normals(0, torch.arange(2), (MOST_NUMBERS,)), large[:, :2].flatten(1))


def test_normals_are_normal():
    assert stats.kstest(normals(0, torch.arange(5000), (2, 3)).flatten().numpy(), "norm").pvalue > 1e-4


def test_choose_is_the_inverse_cdf():
    log_weights = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().expand(5, -1)
    uniform = torch.tensor([0.1, 0.25, 0.69, 0.71, 1 - 2.0**-24])
    assert choose(log_weights, uniform).tolist() == [0, 2, 2, 3, 3]
