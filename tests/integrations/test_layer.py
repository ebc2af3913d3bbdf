"""What enters decoder layer k, however the model hands it over."""

import pytest
import torch
from torch import nn

from dylora_moe_vllm.layer import decoder_layers, listen
from dylora_moe_vllm.settings import SettingsError


class WithResidual(nn.Module):
    def forward(self, positions, hidden_states, residual):
        return hidden_states + 1


class Without(nn.Module):
    def forward(self, hidden_states):
        return hidden_states + 1


class Strange(nn.Module):
    def forward(self, x):
        return x


HIDDEN, RESIDUAL = torch.ones(2, 3), torch.full((2, 3), 2.0)


@pytest.mark.parametrize(
    ("kind", "args", "kwargs", "state"),
    [
        (WithResidual, (0, HIDDEN, RESIDUAL), {}, 3),
        (WithResidual, (0, HIDDEN, None), {}, 1),
        (WithResidual, (0,), {"residual": RESIDUAL, "hidden_states": HIDDEN}, 3),
        (Without, (HIDDEN,), {}, 1),
        (Without, (), {"hidden_states": HIDDEN}, 1),
    ],
)
def test_the_state_is_heard_before_the_layer_runs(kind, args, kwargs, state):
    heard = []
    layer, other = kind(), kind()
    listen(layer, heard.append)
    assert (layer(*args, **kwargs) == 2).all()
    assert len(heard) == 1
    assert (heard[0] == state).all()
    other(*args, **kwargs)
    assert len(heard) == 1
    assert isinstance(layer, kind)


def test_a_layer_without_hidden_states_is_refused():
    with pytest.raises(SettingsError, match=r"Strange takes no hidden_states \(x\)"):
        listen(Strange(), lambda hidden: None)


def test_the_layers_are_the_list_of_that_length():
    model = nn.ModuleDict({"layers": nn.ModuleList(Without() for _ in range(4)), "heads": nn.ModuleList([Without()])})
    path, layers = decoder_layers(model, 4)
    assert path == "layers"
    assert layers is model["layers"]
    with pytest.raises(SettingsError, match=r"layers=3: 0 lists"):
        decoder_layers(model, 3)
