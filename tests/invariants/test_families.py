"""Invariant 19: every family of decoders works in both forms of a pass, or is refused when the mixture is built.

`docs/families.md` has the table; a row that says "yes" passes everything here, one that says "refused" is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dylora_moe import DyLoraMoE, MoELoraConfig
from families import FAMILIES, TARGETS, family_base
from rounding import FLOAT32
from tiny import difference

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*fast path.*"),
]
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
FORMS: dict[str, dict[str, Any]] = {"one pass": {}, "with a routing pass": {"layers_to_transform": [0, 1, 2, 3]}}
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| (\w+) \|", re.MULTILINE)
TABLE = {name: dict(zip(FORMS, said, strict=True)) for name, *said in ROW.findall(PAGE.read_text(encoding="utf-8"))}
IDS = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))


def mixture(family: str, form: str, base: Any) -> DyLoraMoE:
    torch.manual_seed(1)
    targets = TARGETS.get(family, "all-linear")
    config = MoELoraConfig(
        expert_names=["red", "green"],
        r=4,
        target_modules=targets,
        router_layer=2,
        init_lora_weights=False,
        **FORMS[form],
    )
    model = DyLoraMoE.from_base(base, config).eval()
    for name in model.expert_names:
        for part in model.expert_tensors(name):
            part.tensor.data.mul_(0.3)
    return model


def last_logits(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits of every generated token `[new, B, V]`."""
    fixed = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_logits=True, **fixed, **options
    )
    return torch.stack(out.logits)


def gradients(model: DyLoraMoE) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_table_names_every_family():
    assert list(TABLE) == list(FAMILIES)
    assert {said for row in TABLE.values() for said in row.values()} == {"yes", "refused"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family, form, tmp_path):
    base = family_base(family)
    with torch.no_grad():
        bare = base(IDS).logits
    rows = IDS[:1] if family == "rwkv" else IDS  # a decoding step of transformers' RWKV mixes up several rows
    own = difference(last_logits(base, rows, use_cache=False), last_logits(base, rows))
    if TABLE[family][form] == "refused":
        with pytest.raises(ValueError, match="keeps its state in no transformers Cache"):
            mixture(family, form, base)
        with torch.no_grad():
            assert torch.equal(base(IDS).logits, bare)  # as it was
        return
    model = mixture(family, form, base)
    assert (model.passes_per_step > 1) == (form != "one pass")
    with torch.no_grad():
        assert torch.equal(model(IDS, experts="base").logits, bare)
        routed = model(IDS).logits
        assert difference(routed, bare) > 1e-3
        model.moe_config.mixing_form = "reference"
        assert difference(model(IDS).logits, routed) <= FLOAT32
        model.moe_config.mixing_form = "auto"
    cached, whole = last_logits(model, rows), last_logits(model, rows, use_cache=False)
    assert difference(cached, whole) <= max(20 * own, FLOAT32)
    if family != "rwkv":
        model.generate(IDS, num_beams=2, max_new_tokens=2, do_sample=False, pad_token_id=0)
    plain = gradients(model)
    assert plain["router.up"].any()
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients(model)
    assert again.keys() == plain.keys()
    for name, gradient in plain.items():
        assert difference(again[name], gradient) <= 20 * FLOAT32, name
    model.get_base_model().gradient_checkpointing_disable()
    model.eval().save_pretrained(tmp_path)
    loaded = DyLoraMoE.from_pretrained(str(tmp_path), base=family_base(family))
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, routed)
