"""The section that an export writes, for the tests of the plugin that reads it."""

from typing import Any


def section(**changes: Any) -> dict[str, Any]:
    """A right one of three experts, with some keys changed."""
    return {
        "version": 1,
        "experts": ["red", "green", "blue"],
        "layers": 4,
        "router_layer": 1,
        "router_type": "mlp",
        "router_hidden_size": 8,
        "route_to_base": False,
        "granularity": "token",
        "temperature": 1.0,
        "top_k": 2,
        "closed": [],
        "modules": {"model.layers.1.self_attn.q_proj": [[0, 4, 2.0], [2, 8, 0.5]]},
        "selectors": {
            "red": [1, 0, 0],
            "green": [0, 1, 0],
            "blue": [0, 0, 1],
            "base": [0, 0, 0],
            "half": [0.5, 0.5, 0],
        },
    } | changes
