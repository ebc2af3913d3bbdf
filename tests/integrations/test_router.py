"""The plugin decides as the library does: its router and policy against the library's own."""

import pytest
import torch

from dylora_moe.routing.policies import Policy
from dylora_moe.routing.router import Router as Reference
from dylora_moe_vllm.router import Router, routing_weights
from dylora_moe_vllm.settings import parse
from plugin_section import section


@pytest.mark.parametrize("router_type", ["mlp", "linear", "closed_form"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_k": 1},
        {"top_k": 3, "temperature": 0.5},
        {"route_to_base": True, "top_k": 2},
        {"closed": [1], "top_k": 3},
    ],
)
def test_same_shares_as_the_library(router_type: str, changes: dict):
    settings = parse(section(router_type=router_type, **changes))
    reference, router = Reference(16, settings.outputs, router_type, 8), Router(settings, 16)
    for name, parameter in router.named_parameters():
        parameter.data.copy_(torch.randn_like(parameter))
        getattr(reference, name).data.copy_(parameter)
    hidden = torch.randn(50, 16).to(torch.bfloat16)
    scores = router(hidden)
    assert torch.equal(scores, reference(hidden))
    closed = torch.zeros(settings.outputs, dtype=torch.bool)
    closed[list(settings.closed)] = True
    policy = Policy(settings.top_k, settings.temperature, settings.closed)
    found = routing_weights(scores, settings, closed)
    assert found.shape == (50, 3)
    torch.testing.assert_close(found, policy.shares(scores).values[:, :3], rtol=0, atol=1e-6)
    assert (found[:, list(settings.closed)] == 0).all()


def test_ties_go_to_the_lowest_index():
    settings = parse(section(top_k=1))
    found = routing_weights(torch.zeros(2, 3), settings, torch.zeros(3, dtype=torch.bool))
    assert found.tolist() == [[1, 0, 0], [1, 0, 0]]
