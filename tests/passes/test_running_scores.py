"""What a pass at prefix granularity goes on from, in every family of decoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.arguments import sequence_starts
from dylora_moe.base.placement import Placement
from dylora_moe.passes.cache import RunningScores
from dylora_moe.passes.running_scores import Continued, continued, positions_scored
from families import FAMILIES, TARGETS, family_base
from rounding import FLOAT32
from tiny import difference

pytestmark = pytest.mark.filterwarnings("ignore:.*fast path.*")
IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
WITHOUT_CACHE = ("recurrent_gemma", "rwkv")
UNLIKE_OTHERS = ("mistral", "gemma3_text", "lfm2", "mamba", "nemotron_h", *WITHOUT_CACHE)
"""Families whose caches or masks are unlike a Llama's; the rest is slow."""


def last_logits(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    fixed = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **options}
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_logits=True, **fixed
    )
    return torch.stack(out.logits)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in UNLIKE_OTHERS else pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_decodes_with_a_cache_or_refuses_one(family):
    base, rows = family_base(family), IDS[:1]
    own = difference(last_logits(base, rows, use_cache=False), last_logits(base, rows))
    config = MoELoraConfig(
        expert_names=["red", "green"],
        r=4,
        target_modules=TARGETS.get(family, "all-linear"),
        router_layer=2,
        init_lora_weights=False,
        granularity="prefix",
    )
    model = DyLoraMoE.from_base(base, config).eval()
    model.router.up.data.mul_(10)
    whole = last_logits(model, rows, use_cache=False)
    if family in WITHOUT_CACHE:
        with pytest.raises(ValueError, match=r'no transformers Cache.*granularity="token", or use_cache=False'):
            last_logits(model, rows)
        with torch.no_grad():
            model(rows)
    else:
        assert difference(last_logits(model, rows), whole) <= max(20 * own, FLOAT32)
    model.moe_config.granularity = "token"
    assert difference(last_logits(model, rows, use_cache=False), whole) > 20 * max(own, FLOAT32)


def test_a_pass_gets_the_layer_of_its_cache():
    base = family_base("llama")
    where, kwargs = (base, Placement.of(base), False), {"input_ids": IDS}
    made, first = continued(*where, kwargs, 7, training=False)
    cache = made["past_key_values"]
    assert kwargs == {"input_ids": IDS}
    assert cache.layers[-1] is first.layer
    assert first.fits
    assert continued(*where, made, 7, training=False)[1].layer is first.layer
    assert positions_scored(cache) == 0
    first.layer.append(torch.ones(2, 7, 3))
    assert positions_scored(cache) == 7
    assert not continued(*where, made, 7, training=False)[1].fits  # the base's own layers are empty
    assert continued(*where, {"use_cache": False}, 7, training=False) == ({"use_cache": False}, Continued())
    assert positions_scored(None) == positions_scored(DynamicCache()) == 0


def test_totals_of_other_experts_or_positions_are_refused():
    layer = RunningScores(static=False)
    layer.append(torch.ones(1, 2, 3))
    assert torch.equal(Continued(layer).deciding(None, 2).before, torch.ones(1, 1, 3))
    for wrong, outputs in ((Continued(layer), 3), (Continued(layer, fits=False), 2)):
        with pytest.raises(ValueError, match="filled without the running mean"):
            wrong.deciding(None, outputs)


def test_where_sequences_start():
    positions = torch.tensor([[0, 1, 2, 0, 1], [5, 6, 7, 8, 3]])
    assert sequence_starts({"position_ids": positions}, 5).int().tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    both = {"cu_seq_lens_q": torch.tensor([0, 2, 5]), "seq_idx": torch.tensor([[0, 0, 1, 1, 2]])}
    assert sequence_starts(both, 5).int().tolist() == [[1, 0, 1, 0, 1]]
    assert sequence_starts({"position_ids": positions[:, :1]}, 1) is None  # a step of generate
    assert sequence_starts({"position_ids": None}, 5) is None
