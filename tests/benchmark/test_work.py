"""Every variant does the work it is said to do, on the same weights."""

from __future__ import annotations

import pytest
import torch

from dylora_moe.benchmark.kinds import KINDS, TIMED_ALONE


def outputs(runners):
    found = {}
    for key, runner in runners.items():
        with runner.in_force():
            found[key] = runner.forward().detach()
    return found


@pytest.mark.parametrize("work", ["train", "prefill", "linear", "linear-train", "linear-token"])
def test_every_form_agrees_with_the_loop(variants, work):
    _, _, runners, _ = variants(work=work, length=16)
    found = outputs(runners)
    for key, output in found.items():
        kind = KINDS[key.partition("/")[0]]
        if kind.family == "ours" and not kind.dropout and not kind.by_row:
            loop = found["loop-top/4" if kind.sparse else "loop/4"]
            torch.testing.assert_close(output, loop, rtol=2e-5, atol=1e-6)  # float32, other GEMM shapes
    if "by-row/4" in found:
        torch.testing.assert_close(found["by-row/4"], found["by-row-dense/4"], rtol=2e-5, atol=1e-6)
        assert not torch.allclose(found["by-row/4"], found["loop/4"], rtol=1e-4)
    assert torch.equal(found["base"], found["base-again"])
    assert not torch.allclose(found["base"], found["loop/4"], rtol=1e-4)
    assert not torch.allclose(found["loop-top/4"], found["loop/4"], rtol=1e-5, atol=0)


def test_every_form_generates_what_the_loop_does(variants):
    _, _, runners, _ = variants(work="decode")
    found = outputs(runners)
    assert all(tokens.shape == (2, 15) for tokens in found.values())
    for key in ("dense", "auto"):
        assert torch.equal(found[f"{key}/4"], found["loop/4"])
    assert torch.equal(found["auto-top/4"], found["loop-top/4"])


@pytest.mark.parametrize("work", TIMED_ALONE)
def test_every_variant_runs_or_says_why(variants, work):
    settings, _, runners, missing = variants(work=work, experts=(2, 4))
    expected = {
        key if not KINDS[key].per_experts else f"{key}/{size}" for key in settings.kinds for size in settings.experts
    }
    assert set(runners) | set(missing) == expected
    assert not set(runners) & set(missing)
    assert missing["auto-top/2"] == "top-2 of 2 is dense"
    assert not any(key.startswith("xlora") for key in missing), missing


def test_a_training_step_reaches_router_and_experts_of_ours_and_the_adapters_of_peers(variants):
    _, models, runners, _ = variants(work="train")
    for key in ("peft", "auto/4", "passes/4", "xlora/4"):
        runner = runners[key]
        with runner.in_force():
            runner.step()
            missed = [n for n, p in runner.model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missed, (key, missed[:3])
    assert all(parameter.grad is None for parameter in models.base.parameters())


def test_base_trains_no_parameter_but_sends_gradients_through_its_layers(variants):
    _, models, runners, _ = variants(work="train")
    seen = []
    handle = models.bare().model.layers[1].register_full_backward_hook(lambda *_: seen.append(1))
    with runners["base"].in_force():
        runners["base"].step()
    handle.remove()
    assert seen


def test_all_variants_share_the_tensors_of_one_base(variants):
    _, models, runners, _ = variants(work="prefill")
    pointers = {parameter.data_ptr() for parameter in models.base.parameters()}
    for runner in runners.values():
        assert pointers <= {parameter.data_ptr() for parameter in runner.model.parameters()}
