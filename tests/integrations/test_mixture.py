"""What the decision at layer k leaves behind for those who record it."""

from types import SimpleNamespace

import torch

from dylora_moe_vllm.mixture import Mixture
from dylora_moe_vllm.router import routing_weights
from dylora_moe_vllm.settings import parse
from plugin_section import section


def mixture(recorded: int, selected: object = None) -> Mixture:
    torch.manual_seed(0)
    made = Mixture(parse(section()), 6, None, lambda: selected, recorded)
    for parameter in made.router.parameters():
        parameter.data.normal_()
    return made


def test_the_weights_in_force_are_recorded_per_token():
    torch.manual_seed(1)
    made, hidden = mixture(5), torch.randn(3, 6)
    made.recorded.fill_(float("nan"))
    made.decide(hidden)
    expected = routing_weights(made.router(hidden), made.settings, made.closed)
    assert torch.equal(made.recorded[:3], expected)
    assert made.recorded[3:].isnan().all()


def test_those_of_a_selector_too():
    punica = SimpleNamespace(_token_lora_indices=torch.tensor([0, -1, 0]))
    rows = torch.tensor([0.25, 0.5, 0.0]).view(1, 1, 1, 3)
    made = mixture(3, SimpleNamespace(lora_a_stacked=(rows,), punica_wrapper=punica))
    made.decide(torch.randn(3, 6))
    assert made.recorded[[0, 2]].tolist() == [[0.25, 0.5, 0.0]] * 2
    assert made.recorded[1].tolist() != [0.25, 0.5, 0.0]


def test_nothing_is_kept_where_nothing_is_recorded():
    made = mixture(0)
    made.decide(torch.randn(3, 6))
    assert made.recorded.shape == (0, 3)
