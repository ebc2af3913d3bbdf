"""Teach, forget and the library in a mixture: what routes, what stays bit for bit, what a checkpoint holds."""

from __future__ import annotations

import json
from itertools import permutations

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from dylora_moe import CheckpointError, DyLoraMoE, MoELoraConfig
from dylora_moe.data.examples import Example, encode, encode_prompt
from dylora_moe.skills.library import SkillLibrary
from tiny import difference
from tinybase import save_tiny_base, tiny_base, tiny_tokenizer
from topics import NAMES, mixture, teach, texts

EXACT = 1e-9
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def prompts(name: str, count: int = 10) -> list[torch.Tensor]:
    rows = [row for row in texts(NAMES.index(name), 2 * count, seed=9) if isinstance(row, dict)][:count]
    return [torch.tensor([encode_prompt(Example(row["prompt"], ""), tiny_tokenizer())]) for row in rows]


def chosen(model: DyLoraMoE, ids: torch.Tensor) -> str:
    with torch.no_grad():
        return model.expert_names[int(model(ids).routing_weights[0].mean(0).argmax())]


def router_of(model: DyLoraMoE) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.router.state_dict().items()}


def experts_of(model: DyLoraMoE, *names: str) -> dict[str, torch.Tensor]:
    return {part.key + name: part.tensor.clone() for name in names for part in model.expert_tensors(name)}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


PLACES = {
    "one pass": {},
    "first layer": {"router_layer": 0},
    "last": {"router_layer": "last"},
    "below": {"router_layer": 2, "layers_to_transform": [0, 1, 2, 3]},
}


@pytest.mark.parametrize("granularity", ["token", "sequence", pytest.param("prefix", marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", PLACES)
def test_texts_are_routed_to_what_was_taught_with_them(place, granularity):
    model = teach(mixture(granularity=granularity, **PLACES[place]))
    assert set(model.expert_states.values()) == {"routed"}
    right = [chosen(model, ids) == name for name in NAMES for ids in prompts(name)]
    assert sum(right) >= 0.9 * len(right)  # letters of neighbouring topics overlap


@pytest.mark.parametrize("place", PLACES)
def test_the_router_scores_what_the_library_computed(place):
    """The mixture's own logits are those of the library's fit on the states of the bare base."""
    model = teach(mixture(granularity="sequence", **PLACES[place]))
    fit, ids = model.skills.fit(), prompts("law")[0]
    base = tiny_base().eval()
    with torch.no_grad():
        hidden = base(ids, output_hidden_states=True).hidden_states[model.router_layer_index]
        states = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])[0].double()
        scores = (states @ fit.weight.T + fit.bias).mean(0) / fit.temperatures["sequence"]
        found = model(ids).router_logits[0, 0]
    expected = scores[[fit.names.index(name) for name in model.expert_names]]
    assert difference(found, expected) <= 1e-4  # float32 scores against float64


def test_any_order_of_teaching_gives_the_same_router():
    routers = []
    for order in list(permutations(NAMES))[::24]:
        routers.append(router_of(teach(mixture(), *order)))
    for router in routers[1:]:
        for key, tensor in router.items():
            assert difference(tensor, routers[0][key]) <= EXACT, key


def test_rows_added_later_count_as_if_they_had_come_at_once():
    whole, parts = mixture(), mixture()
    rows = texts(0, 9)
    teach(whole, *NAMES[1:])
    teach(parts, *NAMES[1:])
    whole.teach("sql", rows, tiny_tokenizer())
    parts.teach("sql", rows[5:], tiny_tokenizer())
    parts.teach("sql", rows[:5], tiny_tokenizer())
    for key, tensor in router_of(whole).items():
        assert difference(parts.router.state_dict()[key], tensor) <= 1e-6, key  # stored in float32
    assert difference(parts.skills["sql"].sums.scatter, whole.skills["sql"].sums.scatter) <= 1e-12
    assert sorted(each.rows for each in parts.skills["sql"].taught) == [4, 5]


def test_several_are_taught_with_one_fit_or_none(monkeypatch):
    at_once, one_by_one, fits = mixture(), teach(mixture(), "sql", "law"), []
    rows = {name: texts(NAMES.index(name), 6) for name in ("sql", "law")}
    fit = SkillLibrary.fit
    monkeypatch.setattr(SkillLibrary, "fit", lambda library, scored: fits.append(1) or fit(library, scored))
    told: list[tuple[str, int]] = []
    at_once.teach_many(
        rows, tiny_tokenizer(), sources={"law": "a hash"}, progress=lambda *progress: told.append(progress)
    )
    assert fits == [1]
    assert_equal(router_of(at_once), router_of(one_by_one))
    assert_equal(at_once.skills.tensors(), one_by_one.skills.tensors())
    assert told == [(name, count) for name in rows for count in range(1, 7)]
    assert [at_once.skills[name].taught[0].source for name in rows] == ["", "a hash"]
    for wrong, message in (({"math": ["fine"], "chat": [""]}, "row 1 is empty"), ({"sql": ["a"], "tax": ["b"]}, "tax")):
        with pytest.raises(ValueError, match=message):
            at_once.teach_many(wrong, tiny_tokenizer())
    assert_equal(router_of(at_once), router_of(one_by_one))
    assert list(at_once.skills) == ["sql", "law"]


def test_an_expert_that_was_never_taught_is_not_chosen():
    model = mixture()
    with pytest.raises(ValueError, match=r"no expert is routed yet: call model\.teach"):
        model(prompts("sql")[0])
    with torch.no_grad():
        assert torch.isfinite(model(prompts("sql")[0], experts="law").logits).all()  # forced it works at once
    teach(model, "sql", "law")
    assert model.expert_states == {"sql": "routed", "law": "routed", "math": "new", "chat": "new", "code": "new"}
    weights = model(prompts("code")[0]).routing_weights
    assert weights[..., 2:].abs().max() == 0
    with pytest.raises(ValueError, match=r"call teach\(name, rows\)"):
        model.start_routing("math")


def test_teaching_changes_no_bit_of_an_expert_and_nothing_else():
    model = teach(mixture(), "sql", "law").train()
    model.get_base_model().lm_head.eval()
    before = experts_of(model, *NAMES)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    teach(model, "math")
    assert_equal(experts_of(model, *NAMES), before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert not any(p.requires_grad for p in model.router.parameters())
    assert model.training
    assert not model.get_base_model().lm_head.training
    assert model.hooks.call is None


def test_rows_of_the_router_change_on_nothing_else():
    model = teach(mixture())
    model.moe_config.target_modules = {"q_proj"}
    before = router_of(model)
    model.add_expert("late", LoraConfig(r=1, target_modules=["q_proj"]))
    after = router_of(model)
    assert model.expert_states["late"] == "new"
    assert_equal({key: after[key][:5] for key in ("weight", "bias")}, {key: before[key] for key in ("weight", "bias")})
    model.rename_expert("law", "legal")
    model.freeze_expert("sql")
    assert_equal(router_of(model), after)
    assert list(model.skills) == ["sql", "legal", "math", "chat", "code"]
    model.remove_expert("legal")
    assert list(model.skills) == ["sql", "math", "chat", "code"]
    kept = [0, 2, 3, 4, 5]
    assert_equal({"weight": router_of(model)["weight"]}, {"weight": after["weight"][kept]})


def test_a_forgotten_expert_leaves_the_others_as_if_it_had_never_been_there():
    model, never = teach(mixture()), teach(mixture(("sql", "math", "chat", "code")))
    others = ("sql", "math", "chat", "code")
    before = experts_of(model, *others)
    ids = prompts("sql")[0]
    with torch.no_grad():
        forced = model(ids, experts="sql").logits
        model.forget("law")
        assert model.expert_names == list(others)
        assert torch.equal(model(ids).router_logits, never(ids).router_logits)
        assert torch.equal(model(ids, experts="sql").logits, forced)
    assert_equal(experts_of(model, *others), before)
    with pytest.raises(ValueError, match="unknown expert 'law'"):
        model.forget("law")


def test_forgetting_what_was_compacted_is_refused_unless_asked():
    model = teach(mixture())
    model.skills.compact()
    with pytest.raises(ValueError, match="'law' is compact"):
        model.forget("law")
    assert model.expert_names == list(NAMES)
    with pytest.raises(ValueError, match="'law' is compact"):
        teach(model, "law")
    model.forget("law", exact=False)
    assert "law" not in model.skills


def test_forgetting_the_only_taught_expert_is_refused():
    model = teach(mixture(("sql", "law")), "sql")
    with pytest.raises(ValueError, match="teach it"):
        model.forget("sql")
    model.forget("law")
    assert model.expert_names == ["sql"]


def test_merged_libraries_are_one():
    whole, one, other = teach(mixture()), teach(mixture(), "sql", "law"), teach(mixture(), "math", "chat", "code")
    one.merge_skills(other.skills)
    for key, tensor in router_of(whole).items():
        assert difference(one.router.state_dict()[key], tensor) <= 1e-6, key
    with pytest.raises(ValueError, match="unknown expert 'math'"):
        teach(mixture(("sql", "law"))).merge_skills(other.skills)
    elsewhere = teach(mixture(router_layer=2), "sql")
    for model in (whole, mixture()):
        with pytest.raises(ValueError, match="layer 1, 2"):
            model.merge_skills(elsewhere.skills)
    changed = mixture()
    changed.get_base_model().lm_head.weight.data.mul_(2)
    with pytest.raises(ValueError, match="base '"):
        changed.merge_skills(one.skills)
    assert not changed.skills


def test_texts_read_otherwise_are_refused_and_change_nothing():
    model = teach(mixture(), "sql", separator=": ")
    before = router_of(model)
    with pytest.raises(ValueError, match=r"separator ': ', ' '"):
        teach(model, "law", separator=" ")
    with pytest.raises(ValueError, match="row 2 is empty"):
        model.teach("law", ["fine", ""], tiny_tokenizer())
    chat = [Example([{"role": "user", "content": "fine"}], "yes", place="law.jsonl, line 7")]
    with pytest.raises(ValueError, match=r"law.jsonl, line 7 is made of chat messages, .* model.chat = True"):
        model.teach("law", chat, tiny_tokenizer())
    with pytest.raises(ValueError, match="unknown expert 'tax'"):
        model.teach("tax", ["fine"], tiny_tokenizer())
    assert list(model.skills) == ["sql"]
    assert_equal(router_of(model), before)
    teach(model, "law")  # as before


def test_the_tokenizer_is_the_checkpoints_or_the_bases(tmp_path):
    with pytest.raises(ValueError, match="pass tokenizer="):
        mixture().teach("sql", texts(0, 3))
    base = save_tiny_base(tmp_path / "base")
    config = MoELoraConfig(
        expert_names=list(NAMES), router_type="closed_form", target_modules=["q_proj"], router_layer=1
    )
    model = DyLoraMoE.from_base(base, config)
    model.teach("sql", texts(0, 3))
    model.save_pretrained(tmp_path / "mixture")
    other = tiny_tokenizer()
    other.add_tokens(["xyz"])
    other.save_pretrained(tmp_path / "mixture")
    loaded = DyLoraMoE.from_pretrained(str(tmp_path / "mixture"))
    with pytest.raises(ValueError, match="tokenizer '"):  # the folder's own comes first
        loaded.teach("law", texts(1, 3))


def test_a_long_row_is_read_in_windows():
    model = mixture()
    model.teach("sql", ["ab" * 1000], tiny_tokenizer())  # the base has 256 positions
    assert model.skills["sql"].tokens == 2000


def test_a_compiled_base_is_taught_as_well():
    model, plain = mixture(), teach(mixture(), "sql")
    model.compile(backend="eager")
    assert_equal(teach(model, "sql").skills.tensors(), plain.skills.tensors())


def test_progress_is_told_row_by_row():
    seen: list[int] = []
    teach(mixture(), "sql", count=4, progress=seen.append)
    assert seen == [1, 2, 3, 4]


def test_a_trained_router_is_left_alone():
    """The library serves others as well."""
    model = mixture(router_type="mlp")
    before = router_of(model)
    teach(model, "sql")
    assert_equal(router_of(model), before)
    assert list(model.skills) == ["sql"]
    assert model.expert_states["law"] == "routed"


def test_the_base_route_is_refused():
    with pytest.raises(ValueError, match="route_to_base=True with router_type='closed_form'"):
        MoELoraConfig(router_type="closed_form", route_to_base=True)


@pytest.mark.parametrize("granularity", ["token", "sequence", "prefix"])
@pytest.mark.parametrize("place", PLACES)
def test_decoding_with_a_cache_and_in_a_padded_batch_is_the_plain_forward(place, granularity):
    model = teach(mixture(granularity=granularity, **PLACES[place]))
    one, two = prompts("sql")[0], prompts("chat")[1]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}
    alone = [model.generate(ids, **options) for ids in (one, two)]
    plain = [model.generate(ids, use_cache=False, **options) for ids in (one, two)]
    length = max(one.shape[1], two.shape[1])
    padded = torch.cat([torch.nn.functional.pad(ids, (length - ids.shape[1], 0)) for ids in (one, two)])
    mask = torch.stack([torch.arange(length) >= length - ids.shape[1] for ids in (one, two)]).long()
    together = model.generate(padded, attention_mask=mask, **options)
    for row, (cached, uncached) in enumerate(zip(alone, plain, strict=True)):
        found = torch.stack(cached.logits)[:, 0]
        # float32: a cache and padding add up in another order
        assert difference(found, torch.stack(uncached.logits)[:, 0]) <= 1e-4
        assert difference(torch.stack(together.logits)[:, row], found) <= 1e-4


# ---------------------------------------------------------------------- checkpoints


def saved(model: DyLoraMoE, folder) -> DyLoraMoE:
    model.save_pretrained(folder)
    return DyLoraMoE.from_pretrained(str(folder), base=tiny_base())


@pytest.mark.parametrize("compact", [False, True])
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, compact):
    model = teach(mixture(granularity="sequence"), "sql", "law", "chat", source="a hash")
    if compact:
        model.skills.compact()
    loaded = saved(model, tmp_path / "mixture")
    assert_equal(router_of(loaded), router_of(model))
    assert_equal(loaded.skills.tensors(), model.skills.tensors())
    assert loaded.skills.description() == model.skills.description()
    assert loaded.expert_states == model.expert_states
    assert not any(p.requires_grad for p in loaded.router.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(prompts("law")[0]).logits, model(prompts("law")[0]).logits)
    assert json.loads((tmp_path / "mixture/moe_config.json").read_text())["format_version"] == 2
    teach(loaded, "math")
    teach(model, "math")
    assert_equal(router_of(loaded), router_of(model))


def test_no_text_is_stored(tmp_path):
    model = mixture()
    model.teach("sql", ["a confidential sentence", {"prompt": "another one", "completion": "secret"}], tiny_tokenizer())
    model.save_pretrained(tmp_path / "mixture")
    for file in (tmp_path / "mixture").rglob("skills.*"):
        assert not any(word in file.read_bytes() for word in (b"confidential", b"another", b"secret"))


def test_nothing_stale_stays(tmp_path):
    teach(mixture(), "sql").save_pretrained(tmp_path / "mixture")
    assert (tmp_path / "mixture/skills.json").is_file()
    mixture(router_type="mlp").save_pretrained(tmp_path / "mixture")
    assert not list((tmp_path / "mixture").glob("skills.*"))
    assert json.loads((tmp_path / "mixture/moe_config.json").read_text())["format_version"] == 1


def test_a_mixture_without_skills_can_be_saved(tmp_path):
    loaded = saved(mixture(), tmp_path / "mixture")
    assert set(loaded.expert_states.values()) == {"new"}
    assert not loaded.skills


def test_restoring_takes_the_skills_over(tmp_path):
    model, other = teach(mixture(), "sql", "law"), teach(mixture())
    model.save_pretrained(tmp_path / "mixture")
    other.restore(tmp_path / "mixture")
    assert_equal(other.skills.tensors(), model.skills.tensors())
    assert_equal(router_of(other), router_of(model))
    assert other.expert_states == model.expert_states


def test_a_base_of_other_weights_is_warned_of(tmp_path, caplog):
    saved(teach(mixture(("sql", "law"))), tmp_path / "mixture")
    assert not caplog.records
    other = tiny_base()
    other.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    DyLoraMoE.from_pretrained(str(tmp_path / "mixture"), base=other)
    assert "were taught with a base of other weights" in caplog.text


def _drop(folder):
    (folder / "skills.json").unlink()


def _cut(folder):
    file = folder / "skills.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def _other_skill(folder):
    file = folder / "skills.json"
    file.write_text(file.read_text().replace('"law"', '"tax"'))
    tensors = {key.replace("law", "tax"): tensor for key, tensor in load_file(folder / "skills.safetensors").items()}
    save_file(tensors, folder / "skills.safetensors")


def _missing_tensor(folder):
    tensors = load_file(folder / "skills.safetensors")
    del tensors["law.mean"]
    save_file(tensors, folder / "skills.safetensors")


def _three_views(folder):
    tensors = load_file(folder / "skills.safetensors")
    tensors |= {key: tensor[:, :3].clone() for key, tensor in tensors.items() if key.endswith(".row_views")}
    save_file(tensors, folder / "skills.safetensors")


def test_a_library_of_an_older_version_is_given_up_and_taught_anew(tmp_path):
    model = teach(mixture(("sql", "law")))
    model.save_pretrained(tmp_path)
    _three_views(tmp_path)
    with pytest.raises(CheckpointError, match=r"skills.safetensors and skills.json: .* 3 views .* Without them the"):
        DyLoraMoE.from_pretrained(str(tmp_path), base=tiny_base())
    for file in ("skills.safetensors", "skills.json"):
        (tmp_path / file).unlink()
    file = tmp_path / "moe_config.json"
    file.write_text(file.read_text().replace('"skills": true', '"skills": false'))
    loaded = DyLoraMoE.from_pretrained(str(tmp_path), base=tiny_base())
    assert_equal(router_of(loaded), router_of(model))
    assert loaded.expert_states == model.expert_states
    for name in ("sql", "law"):
        assert chosen(loaded, prompts(name)[0]) == chosen(model, prompts(name)[0])
    teach(loaded)
    assert_equal(router_of(loaded), router_of(model))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_three_views, r'law.row_views has 3 views .*set "skills" to false in moe_config.json'),
        (_drop, "skills.json is missing"),
        (_cut, "skills.safetensors is truncated or damaged"),
        (_other_skill, "skills tax are no experts"),
        (_missing_tensor, "law.mean is missing"),
    ],
)
def test_a_damaged_library_is_named(tmp_path, damage, message):
    folder = tmp_path / "mixture"
    model = teach(mixture(("sql", "law")))
    model.save_pretrained(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        DyLoraMoE.from_pretrained(str(folder), base=tiny_base())
    before = router_of(model)
    with pytest.raises(CheckpointError, match=message):
        model.restore(folder)
    assert_equal(router_of(model), before)


def test_rows_are_read_as_the_trainer_reads_them():
    row = {"prompt": "two", "completion": "three"}
    model = mixture()
    model.teach("sql", [row], tiny_tokenizer(), separator=" = ")
    ids, _ = encode(Example("two", "three", separator=" = "), tiny_tokenizer())
    assert model.skills["sql"].tokens == len(ids) - 1
    assert isinstance(model.skills, SkillLibrary)
