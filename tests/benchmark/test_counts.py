"""Counts against arithmetic done by hand."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from dylora_moe.benchmark import counts
from dylora_moe.benchmark.run import count
from dylora_moe.benchmark.work import Runner


def rows(built):
    settings, models, runners, _ = built
    with models.running():
        return {row["key"]: row for row in count(settings, models, list(runners.values()))}


def plain_runner(layer, forward):
    return Runner("base", "", None, layer, forward, forward, sections=[layer], layers=[layer])


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    layer = torch.nn.Linear(4, 4, bias=False)
    x = torch.randn(8, 4)
    assert counts.saved_bytes(layer, lambda: layer(x)) == x.nbytes
    assert counts.saved_bytes(layer, lambda: layer(x) + layer(x)) == x.nbytes


def test_saved_bytes_within_leaves_out_what_others_keep():
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.SiLU())
    x = torch.randn(8, 4)
    assert counts.saved_bytes(layers, lambda: layers(x)) == 2 * x.nbytes
    assert counts.saved_bytes(layers, lambda: layers(x), [layers[0]]) == x.nbytes


def test_flops_see_what_flopcountermode_does_not():
    a, b = torch.randn(6, 4), torch.randn(4, 5)
    model = torch.nn.Linear(1, 1)
    in_place = plain_runner(model, lambda: torch.zeros(6, 5).addmm_(a, b))
    assert counts.flops(in_place) == 2 * 6 * 4 * 5
    ends = torch.tensor([2, 6], dtype=torch.int32)
    left, right = torch.randn(6, 8), torch.randn(2, 8, 4)
    grouped = plain_runner(model, lambda: torch.nn.functional.grouped_mm(left, right, offs=ends))
    assert counts.flops(grouped) == 2 * 6 * 8 * 4


@pytest.mark.parametrize("shapes", [((6, 8), (2, 8, 4)), ((6, 8), (8, 4)), ((2, 3, 8), (8, 4)), ((2, 3, 8), (2, 8, 2))])
def test_grouped_mm_flops(shapes):
    expected = {2: 2 * 6 * 8 * 4, 3: 2 * 6 * 8 * 2 if len(shapes[1]) == 3 else 2 * 3 * 8 * 4}
    assert counts._grouped_mm_flops(*shapes) == expected[len(shapes[0])]


@pytest.mark.parametrize("work", ["linear", "linear-train"])
@pytest.mark.parametrize("fake", [False, True])
def test_dense_form_does_the_floor_and_no_more(variants, work, fake):
    found = rows(variants(work=work, fake=fake))
    assert found["base"]["over_floor"] == 1
    for key in ("dense/4", "peft", "peft-wide/4", "loop/4"):
        assert found[key]["over_floor"] == pytest.approx(1, abs=0.005), key


@pytest.mark.parametrize("work", ["linear", "linear-train"])
def test_top_k_does_the_floor_and_no_more(variants, work):
    found = rows(variants(work=work, fake=False, variants=("base", "grouped-top", "gathered-top"), experts=(8,)))
    for key in found.keys() - {"base"}:
        assert found[key]["over_floor"] == pytest.approx(1, abs=0.005), key


@pytest.mark.parametrize("experts", [1, 2, 16])
def test_dense_form_adds_two_gemms_for_any_number_of_experts(variants, experts):
    found = rows(variants(work="prefill", rank=3, experts=(experts,), variants=("base", "dense")))
    assert found[f"dense/{experts}"]["added_gemms"] == 11 / 7
    assert found[f"dense/{experts}"]["shrinks"] == 4


def test_floor_is_the_one_of_the_anchors():
    assert counts.floor("linear", 128, (4096, 4096)) == 1.0625
    assert counts.floor("train", 128, (4096, 4096)) == 1.09375
    assert counts.floor("linear", 32, (4096, 4096)) == 1.015625
    assert counts.floor("linear-train", 128, (1024, 1024)) == 1.375


def test_gemms_passes_and_shrinks(variants):
    found = rows(variants(work="train"))
    assert found["dense/4"]["added_gemms"] == 11 / 7  # four shrinks and seven expands for seven layers
    assert found["loop/4"]["added_gemms"] == 8
    assert found["peft"]["shrinks"] == 7
    assert found["loop/4"]["shrinks"] == 28
    assert found["dense/4"]["shrinks"] == 4
    passes = {key: row["base_passes"] for key, row in found.items()}
    assert (passes["base"], passes["auto/4"], passes["xlora/4"], passes["passes/4"]) == (1, 1, 2, 4)


def test_generation_needs_one_pass_per_token(variants):
    found = rows(variants(work="decode"))
    assert (found["base"]["base_passes"], found["auto-top/4"]["base_passes"]) == (1, 1)
    assert found["dense/4"]["added_gemms"] == 11 / 7


def test_a_rank_that_looks_like_a_width_leaves_the_shrinks_uncounted(variants):
    found = rows(variants(work="prefill", rank=16, variants=("base", "dense")))  # 4 · 16 is the width
    assert found["dense/4"]["shrinks"] is None


@pytest.mark.slow
def test_fake_tensors_count_what_real_ones_do(variants):
    chosen = ("base", "peft", "loop", "dense")
    real = rows(variants(work="train", variants=chosen))
    fake = rows(variants(work="train", variants=chosen, fake=True))
    # fake attention lays its output out differently, which costs every variant the same copy
    assert len({fake[key].pop("saved_bytes") - real[key]["saved_bytes"] for key in real}) == 1
    for key, row in fake.items():
        if key == "dense/4":  # fake parameters are not plain ones, so that each layer shrinks by itself
            assert (row.pop("shrinks"), row.pop("added_gemms")) == (7, 2)
        assert {name: real[key][name] for name in row} == row


@pytest.mark.slow
def test_mixture_keeps_little_more_than_one_adapter_in_the_base_dtype(variants):
    chosen = {"variants": ("base", "peft", "peft-same-dtype", "loop", "auto"), "dtype": "bfloat16", "fake": True}
    changes = {"work": "train", "shape": "8b-layer", "experts": (8,), "rank": 16, "batch": 1, "length": 256, **chosen}
    kept = {key: row["saved_in_layers"] for key, row in rows(variants(**changes)).items()}
    assert kept["auto/8"] <= 1.05 * kept["peft-same-dtype"]
    assert kept["auto/8"] <= 0.36 * kept["peft"]
    assert kept["auto/8"] <= 0.08 * kept["loop/8"]


@pytest.mark.slow
def test_dropout_keeps_no_mask(variants):
    found = rows(variants(work="train", experts=(8,)))
    assert found["auto-dropout/8"]["saved_bytes"] <= 1.02 * found["auto/8"]["saved_bytes"]


def test_peak_is_what_is_held_at_once(capfd):
    size = 1 << 20

    def step():
        a = torch.empty(size, dtype=torch.uint8)
        b = torch.empty(size, dtype=torch.uint8)
        del a, b
        return torch.empty(size, dtype=torch.uint8)

    assert counts.peak_bytes(plain_runner(torch.nn.Linear(1, 1), step)) == 2 * size
    assert capfd.readouterr().err == ""


def test_graph_breaks(variants):
    _, _, runners, _ = variants(work="prefill", variants=("base",))
    assert counts.graph_breaks(runners["base"]) == 0

    def two_graphs():
        y = torch.ones(2) + 1
        torch._dynamo.graph_break()
        return y * 2

    broken = plain_runner(torch.nn.Linear(1, 1), two_graphs)
    assert counts.graph_breaks(broken) == 1


def test_counting_saved_bytes_leaves_nothing_behind():
    layers, kept = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4)), []
    layers[1].register_forward_hook(lambda _module, _args, output: kept.append(weakref.ref(output)))
    counts.saved_bytes(layers, lambda: layers(torch.randn(2, 4)))
    gc.collect()
    assert [reference() for reference in kept] == [None]
