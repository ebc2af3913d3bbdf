"""Requests that name a selector get its weights, and nobody else does."""

import pytest
import torch
from torch import Tensor, nn

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


class LinearWithLoRA(nn.Module):
    """As vLLM's: slots of three weights; `set_lora` begins with `reset_lora`, and copies what there is of A."""

    def __init__(self):
        super().__init__()
        self.lora_a_stacked = (torch.full((2, 1, 1, 3), 7.0),)

    def reset_lora(self, index: int) -> None:
        self.lora_a_stacked[0][index] = 0

    def set_lora(self, index: int, lora_a: Tensor, lora_b: Tensor) -> None:
        self.reset_lora(index)
        self.lora_a_stacked[0][index, 0, : lora_a.shape[0], : lora_a.shape[1]].copy_(lora_a)


def test_own_selectors_are_taken():
    linear = LinearWithLoRA()
    take_own_only(linear, 3, "served")
    for weights in ([0.5, 0.25, 0.0], [0.0, 0.0, 1.0]):
        linear.set_lora(1, torch.tensor([weights]), torch.zeros(1, 1))
        assert linear.lora_a_stacked[0].flatten().tolist() == [7, 7, 7, *weights]


@pytest.mark.parametrize("experts", [2, 4])
def test_a_selector_of_another_export_is_an_error(experts: int):
    linear = LinearWithLoRA()
    take_own_only(linear, 3, "served")
    message = (
        f"no selector of served: it has {experts} routing weights, and this mixture has 3 experts; .* in served/selec"
    )
    with pytest.raises(SelectorError, match=message):
        linear.set_lora(0, torch.ones(1, experts), torch.zeros(1, 1))


def test_an_adapter_without_tensors_is_an_error():
    linear = LinearWithLoRA()
    take_own_only(linear, 3, "served")
    linear.set_lora(0, torch.ones(1, 3), torch.zeros(1, 1))
    with pytest.raises(SelectorError, match=r"it has no tensors of the layer dylora_select; .* in served/selectors"):
        linear.reset_lora(0)  # what vLLM does with a linear that an adapter does not name
