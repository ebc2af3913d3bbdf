"""The router's losses of a step: one number for all its micro-batches, the model's own of the whole batch."""

from __future__ import annotations

import pytest
import torch

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.training.trainer.callbacks import StarvedExperts
from dylora_moe.training.trainer.router_losses import RouterLosses
from tinybase import tiny_base
from trainers import run

IDS = torch.arange(40).view(4, 10)


def mixture() -> DyLoraMoE:
    torch.manual_seed(1)
    losses = {"balance_loss": "switch", "balance_coefficient": 1.0, "z_loss_coefficient": 0.1}
    lora = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    config = MoELoraConfig(expert_names=["a", "b"], **lora, **losses)
    return DyLoraMoE.from_base(tiny_base(), config).train()


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_micro_batches_give_the_loss_of_the_whole_batch(parts):
    model = mixture()
    expected = model(IDS, labels=IDS).aux_loss
    losses = RouterLosses(model, 0.0, StarvedExperts(50))
    with model.recording() as losses.records:
        for rows in IDS.chunk(parts):
            model(rows)
            losses.collect(None)
        loss, logged = losses.of_step()
        assert losses.of_step() == (None, {})  # each step by itself
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)  # float32, in another order
    assert logged["aux_loss"] == pytest.approx(float(loss.detach()))
    assert logged["router/load/a"] + logged["router/load/b"] == pytest.approx(1, abs=1e-5)


def test_domains_go_with_the_micro_batches_that_were_routed():
    model = mixture()
    losses = RouterLosses(model, 2.0, StarvedExperts(50))
    domains = torch.tensor([0, 1, 1, 0])[:, None].expand(4, 10)
    with model.recording() as losses.records:
        for rows, own in zip(IDS.chunk(2), domains.chunk(2), strict=True):
            model(rows)
            losses.collect(own)
        model(IDS, experts="a")  # forced: nothing to score
        losses.collect(domains)
        scores = torch.cat([record.score(model.router) for record in losses.records])
        loss, logged = losses.of_step()
    expected = torch.nn.functional.cross_entropy(scores, domains.flatten())
    assert logged["router/domain_loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    aux, _ = model.auxiliary_losses(scores)
    torch.testing.assert_close(loss, aux + 2.0 * expected, rtol=1e-5, atol=1e-6)


def test_an_expert_that_is_not_routed_yet_has_no_part_in_them():
    """Its logit is masked in the forward pass, so in the trainer's second scoring as well."""
    model = mixture()
    model.add_expert("late")
    expected = model(IDS, labels=IDS).aux_loss
    losses = RouterLosses(model, 0.0, StarvedExperts(50))
    with model.recording() as losses.records:
        model(IDS)
        loss, logged = losses.of_step()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)  # float32, in another order
    assert logged["router/load/late"] == 0
    loss.backward()
    assert not model.router.up.grad[2].any()
    assert model.router.up.grad[:2].any()


def test_domains_of_an_expert_that_is_not_routed_yet_are_refused():
    model = mixture()
    model.add_expert("late")
    losses = RouterLosses(model, 1.0, StarvedExperts(50))
    with model.recording() as losses.records:
        model(IDS)
        losses.collect(torch.tensor([0, 1, 2, 0])[:, None].expand(4, 10))
        with pytest.raises(ValueError, match=r"'late' is not routed yet; call start_routing\('late'\)"):
            losses.of_step()


def test_a_router_that_does_not_train_has_no_losses():
    model = mixture()
    model.router.requires_grad_(False)
    losses = RouterLosses(model, 0.0, StarvedExperts(50))
    with model.recording() as losses.records:
        model(IDS)
        assert losses.of_step() == (None, {})
        assert losses.records == []


def test_metrics_of_the_router_are_logged(tmp_path):
    trainer = run(tmp_path, max_steps=1)
    trainer.train()
    row = trainer.state.log_history[0]
    assert 0.5 <= row["router/max_probability"] <= 1
    assert row["router/load/a"] + row["router/load/b"] == pytest.approx(1, abs=1e-5)
    assert row["router/dead_experts"] == 0
    assert row["tokens_per_second"] > 0
