"""Sampling draws what torch's own functions say, by a generator of its own."""

import pytest
import torch

from dylora_moe.serving import sampling
from dylora_moe.serving.sampling import log_probabilities, sampled


def counted(logits: torch.Tensor, temperature: float, top_p: float, draws: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    found = torch.tensor([sampled(logits, temperature, top_p, generator) for _ in range(draws)])
    return found.bincount(minlength=len(logits)) / draws


def test_shares_at_a_temperature():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    expected = (logits / 0.7).softmax(-1)
    assert (counted(logits, 0.7, 1.0) - expected).abs().max() < 0.03


@pytest.mark.parametrize("temperature", [1e-3, 1e-37, 1e-40, 5e-324])
def test_hardly_any_temperature_takes_the_best_token(temperature):
    logits = torch.tensor([1.0, 40.0, 39.0, -1.0])
    assert counted(logits, temperature, 1.0, 20)[1] == 1
    assert counted(logits, temperature, 0.9, 20)[1] == 1


@pytest.mark.parametrize("few", [256, 2])
def test_only_the_fewest_best_tokens_that_sum_to_top_p(few, monkeypatch):
    monkeypatch.setattr(sampling, "FEW", few)
    shares = torch.tensor([0.1, 0.4, 0.2, 0.3])
    kept = torch.tensor([0.0, 0.4, 0.2, 0.3]) / 0.9
    assert (counted(shares.log(), 1.0, 0.75) - kept).abs().max() < 0.03
    assert counted(shares.log(), 1.0, 0.39)[1] == 1


def test_a_seed_draws_the_same_again():
    logits = torch.randn(50)
    draws = [
        [sampled(logits, 1.0, 1.0, generator) for _ in range(9)]
        for generator in (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    ]
    assert draws[0] == draws[1] != draws[2]


def test_logits_that_are_no_numbers_raise_nothing():
    assert 0 <= sampled(torch.full((5,), torch.nan), 1.0, 0.5, torch.Generator()) < 5


def test_log_probabilities():
    logits = torch.tensor([0.0, 2.0, 1.0])
    own, best = log_probabilities(logits, 2, 2)
    expected = logits.log_softmax(-1).tolist()
    assert own == pytest.approx(expected[2])
    assert best == [(1, pytest.approx(expected[1])), (2, pytest.approx(expected[2]))]
    assert log_probabilities(logits, 0, 0)[1] == []
