"""What a stage leaves trainable, and that everything comes back after it."""

from __future__ import annotations

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.training.recipe.methods import Stage
from dylora_moe.training.run.stages import set_trainable, thaw
from tinybase import tiny_base


def test_only_what_the_stage_trains_is_trainable_until_it_is_over():
    config = MoELoraConfig(expert_names=["a", "b", "c"], r=2, target_modules="all-linear")
    mixture = DyLoraMoE.from_base(tiny_base(layers=2), config)
    mixture.freeze_expert("c")
    before = {name for name, parameter in mixture.named_parameters() if parameter.requires_grad}
    for stage in (Stage("expert-a", ("a",), False, ("a",)), Stage("router", (), True, ("a", "b"))):
        set_trainable(mixture, stage)
        for name in mixture.expert_names:
            assert all(part.tensor.requires_grad == (name in stage.experts) for part in mixture.expert_tensors(name))
        assert all(parameter.requires_grad == stage.router for parameter in mixture.router.parameters())
    thaw(mixture, {"c"})
    assert {name for name, parameter in mixture.named_parameters() if parameter.requires_grad} == before
    assert mixture.frozen_experts == {"c"}
