"""Continuous batching packs requests into one row over a paged cache: right per token in one pass, else refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from dylora_moe import DyLoraMoE
from tiny import PLACEMENTS, VOCAB, tiny_mixture

pytestmark = pytest.mark.filterwarnings("ignore")


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(2, 12, (count,), generator=generator).tolist()
    return [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def packed(model: DyLoraMoE, inputs: list[list[int]], new: int = 6) -> list[list[int]]:
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    base: Any = model.get_base_model()
    outputs = base.generate_batch(
        inputs=inputs,
        generation_config=GenerationConfig(**options),
        progress_bar=False,
    )
    return [outputs[key].generated_tokens for key in sorted(outputs, key=lambda key: int(key.rpartition("_")[2]))]


@pytest.mark.parametrize("count", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_packed_requests_are_answered_as_alone(count):
    model = tiny_mixture("llama", **PLACEMENTS["middle"])
    inputs = prompts(count)
    found = packed(model, inputs)
    assert len(found) == count
    for ids, answer in zip(inputs, found, strict=True):
        alone = model.generate(torch.tensor([ids]), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
        assert answer == alone[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": "sequence", **PLACEMENTS["middle"]}, "packed rows hold several sequences"),
        (PLACEMENTS["below"], "packs several requests into one row over a paged cache"),
        (PLACEMENTS["last"], "packs several requests into one row over a paged cache"),
    ],
)
def test_what_cannot_be_packed_is_refused(settings, message):
    model = tiny_mixture("llama", **settings)
    with pytest.raises(ValueError, match=message):
        model.get_base_model()(torch.tensor([prompts(1)[0]]), cache=object(), use_cache=False)


def test_rows_packed_by_their_positions_cannot_share_a_sequences_routing():
    model = tiny_mixture("llama", granularity="sequence")
    ids, positions = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match="packed rows hold several sequences"):
        model.get_base_model()(ids, position_ids=positions)


def test_a_compiled_model_refuses_them_too():
    torch._dynamo.reset()
    model = tiny_mixture("llama", granularity="sequence").eval()
    model.compile(backend="eager", fullgraph=True)
    ids, alone = torch.tensor([[5, 6, 7, 8, 9]]), torch.arange(5)[None]
    model(ids, position_ids=alone)
    with pytest.raises(RuntimeError, match="packed rows hold several sequences"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1]]))
