"""The table of metrics: each row is what a loop over the examples gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dylora_moe.data.examples import Example, encode, encode_prompt
from dylora_moe.evaluation.held_out import Measured, measured
from dylora_moe.evaluation.metrics import DEFAULT_METRIC, METRICS, Settings
from tinybase import tiny_base, tiny_tokenizer

EXAMPLES = [Example(f"ask {'very ' * (i % 3)}{i}", "yes" * (1 + i % 2), "ab"[i % 2]) for i in range(5)]


@pytest.fixture(scope="module")
def parts():
    return tiny_base(layers=2).eval(), tiny_tokenizer()


def loss_by_hand(model, tokenizer, example) -> tuple[float, int]:
    ids, prompt = encode(example, tokenizer)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, prompt - 1 : -1]
    return float(F.cross_entropy(logits, torch.tensor(ids[prompt:]), reduction="sum")), len(ids) - prompt


def test_the_loss_weighs_every_completion_token_alike(parts):
    found = METRICS["loss"].measure(*parts, EXAMPLES, Settings(batch_size=2), lambda done: None)
    for domain in "ab":
        sums = [loss_by_hand(*parts, example) for example in EXAMPLES if example.domain == domain]
        expected = sum(total for total, _ in sums) / sum(count for _, count in sums)
        assert found[domain].value == pytest.approx(expected, rel=1e-5)  # float32; padded rows round differently


def test_exact_match_is_the_share_of_greedy_answers_that_are_the_completion(parts):
    model, tokenizer = parts
    own = []
    for example in EXAMPLES:
        ids = torch.tensor([encode_prompt(example, tokenizer)])
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        own.append(Example(example.prompt, answer if example.domain == "a" else "something else", example.domain))
    done = []
    settings = Settings(batch_size=2, max_new_tokens=4)
    found = METRICS["exact_match"].measure(model, tokenizer, own, settings, done.append)
    assert found == {"a": Measured(1.0, 3, 1.0, 1.0), "b": Measured(0.0, 2, 0.0, 0.0)}
    assert sum(done) == len(own)


def test_every_metric_has_its_words():
    assert DEFAULT_METRIC in METRICS
    for name, metric in METRICS.items():
        assert metric.title == name.replace("_", " ")
        assert metric.unit
        assert metric.meaning[0].isupper()


def test_the_interval_is_that_of_resampled_rows():
    """A share of 200 rows: the normal approximation ±1.96·√(p(1-p)/n) holds to a resampling error of about 0.01."""
    found = measured([1.0] * 60 + [0.0] * 140, [1.0] * 200)
    assert (found.value, found.rows) == (pytest.approx(0.3), 200)
    half = 1.96 * (0.3 * 0.7 / 200) ** 0.5
    assert found.low == pytest.approx(0.3 - half, abs=0.015)
    assert found.high == pytest.approx(0.3 + half, abs=0.015)
    assert measured([1.0] * 60 + [0.0] * 140, [1.0] * 200) == found
    assert measured([4.0], [2.0]) == Measured(2.0, 1, 2.0, 2.0)


def test_rows_weigh_by_their_tokens():
    """A row of ten tokens beside one of a single token: the ratio of the sums, not the mean of the ratios."""
    found = measured([10.0, 5.0], [10.0, 1.0])
    assert found.value == pytest.approx(15 / 11)
    assert (found.low, found.high) == (1.0, 5.0)
