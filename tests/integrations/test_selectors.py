"""Requests that name a selector get its weights, and nobody else does."""

from types import SimpleNamespace

import pytest
import torch

from dylora_moe_vllm.selectors import SelectorError, forced, selector_of, take_own_only


def test_only_tokens_with_a_slot_are_forced():
    weights, rows = torch.rand(5, 3), torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    found = forced(weights, rows, torch.tensor([-1, 0, 1, -1, 0]))
    assert torch.equal(found[[0, 3]], weights[[0, 3]])
    assert found[[1, 4]].tolist() == [[1, 0, 0]] * 2
    assert found[2].tolist() == [0, 0, 0]


def test_slots_of_padding_may_be_anything():
    weights, rows = torch.rand(3, 3), torch.eye(3)
    found = forced(weights, rows, torch.tensor([10**9, -(10**9), 1]))
    assert found[2].tolist() == [0, 1, 0]
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    ("model", "selector"),
    [
        ("mix:red", "red"),
        ("mix:base", "base"),
        ("or:g/mix:red", "red"),
        ("mix", None),
        ("mix:", None),
        ("mix:blue", None),
        ("other:red", None),
        ("red", None),
        (":red", None),
        ("mix:../red", None),
    ],
)
def test_a_name_stands_for_a_selector_or_for_nothing(model: str, selector: str | None):
    assert selector_of(model, {"mix", "or:g/mix"}, {"red", "base"}) == selector


class Manager:
    """As vLLM's, as far as adapters are added."""

    def __init__(self):
        self.added: list[SimpleNamespace] = []

    def add_adapter(self, adapter: SimpleNamespace) -> bool:
        self.added.append(adapter)
        return True


def manager() -> Manager:
    made = Manager()
    take_own_only(made, 3, "served")
    return made


def adapter(**loras: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(loras={name: SimpleNamespace(lora_a=lora_a) for name, lora_a in loras.items()})


def test_own_selectors_are_taken():
    made, own = manager(), adapter(dylora_select=torch.ones(1, 3))
    assert made.add_adapter(own)
    assert made.added == [own]


@pytest.mark.parametrize("experts", [2, 4])
def test_a_selector_of_another_export_is_an_error(experts: int):
    made = manager()
    message = rf"no selector of served: it has {experts} routing weights, and this mixture has 3 .* in served/selectors"
    with pytest.raises(SelectorError, match=message):
        made.add_adapter(adapter(dylora_select=torch.ones(1, experts)))
    assert not made.added


def test_an_adapter_without_tensors_is_an_error():
    made = manager()
    with pytest.raises(SelectorError, match=r"no tensors of the layer dylora_select; .* in served/selectors"):
        made.add_adapter(adapter())
    assert not made.added
