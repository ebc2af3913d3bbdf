"""Recipes: what is read, what is refused, and with which words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from dylora_moe.data.sources import load_examples
from dylora_moe.schema import RecipeError
from dylora_moe.training.recipe.recipe import apply_overrides, load_recipe, parse_recipe

REPOSITORY = Path(__file__).resolve().parents[3]


def minimal(**sections):
    return {"experts": {"json": {"data": {"skill": "json"}}, "sql": {"data": {"skill": "sql"}}}, **sections}


def data(**options):
    return {"experts": {"a": {"data": options}}}


def test_defaults_are_written_out():
    recipe = parse_recipe(minimal())
    assert list(recipe.experts) == ["json", "sql"]
    assert recipe.base.model == "embedded"
    assert recipe.base.dtype == "float32"
    assert recipe.experts["json"].data.train == 1000
    assert recipe.experts["json"].data.test == 50
    assert recipe.train.method == "joint"
    assert recipe.train.arguments == {}
    assert recipe.eval.metric == "exact_match"
    assert recipe.seed == 0


def test_every_section_reaches_its_field():
    recipe = parse_recipe(
        minimal(
            base={"model": "some/where", "revision": "main", "dtype": "bfloat16", "chat": True},
            mixture={"r": 4, "lora_alpha": 8, "top_k": 1, "router_layer": "last", "target_modules": ["q_proj"]},
            train={"method": "staged", "expert_steps": 3, "router_steps": 2, "learning_rate": 1e-3},
            eval={"metric": "loss", "samples": 4, "batch_size": 2, "max_new_tokens": 7, "baseline": True},
            output="elsewhere",
            seed=3,
        )
    )
    assert (recipe.base.model, recipe.base.revision, recipe.base.chat) == ("some/where", "main", True)
    assert recipe.train.arguments == {"learning_rate": 1e-3}
    assert (recipe.train.expert_steps, recipe.train.router_steps) == (3, 2)
    assert (recipe.eval.samples, recipe.eval.batch_size, recipe.eval.baseline) == (4, 2, True)
    assert (recipe.output, recipe.seed) == ("elsewhere", 3)
    config = recipe.mixture_config()
    assert config.expert_names == ["json", "sql"]
    assert config.num_experts == 2
    assert (config.r, config.top_k, config.router_layer) == (4, 1, "last")


def test_to_dict_is_a_recipe_that_reads_back_as_itself():
    recipe = parse_recipe(minimal(train={"learning_rate": 2e-3, "max_steps": 7}, mixture={"r": 4}))
    data = recipe.to_dict()
    assert data["train"]["learning_rate"] == 2e-3
    assert data["train"]["mixing"] == "proportional"
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(data))) == recipe


def test_every_source_of_data_reads_back_as_itself(tmp_path):
    for name in ("d.csv", "d.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    experts = {
        "files": {"train": "d.csv", "test": "d.parquet", "limit": 3, "columns": {"prompt": "q"}, "weight": 2},
        "hub": {"path": "some/where", "name": "main", "test_split": "validation", "revision": "v1"},
        "folder": {"path": "folder", "filter": {"kind": ["x", 1, True]}, "columns": {"messages": "chat"}},
        "skill": {"skill": "json", "weight": 0.5},
    }
    recipe = parse_recipe(
        {
            "base": {"chat": True},
            "experts": {name: {"data": options} for name, options in experts.items()},
            "train": {"mixing": "temperature"},
        },
        tmp_path,
    )
    assert recipe.experts["files"].data.test == str(tmp_path / "d.parquet")
    assert recipe.experts["folder"].data.path == str(tmp_path / "folder")
    assert recipe.experts["hub"].data.path == "some/where"
    assert recipe.experts["hub"].data.split == "train"
    assert recipe.train.mixing_temperature == 2.0
    assert [expert.data.has_test for expert in recipe.experts.values()] == [True, True, False, True]
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


def test_mixture_config_does_not_share_lists_with_the_recipe():
    recipe = parse_recipe(minimal(mixture={"layers_to_transform": [7, 8]}))
    recipe.mixture_config().layers_to_transform.append(9)
    assert recipe.mixture == {"layers_to_transform": [7, 8]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (minimal(trian={}), r"^trian: unknown key\. Did you mean 'train'\? Valid keys: base, eval, experts, .*train"),
        (minimal(base={"modle": "x"}), r"^base\.modle: unknown key\. Did you mean 'model'\?"),
        (minimal(train={"learnin_rate": 1.0}), r"^train\.learnin_rate: .* Did you mean 'learning_rate'\?"),
        (minimal(train={"metod": "joint"}), r"^train\.metod: .* Did you mean 'method'\?"),
        (minimal(mixture={"topk": 1}), r"^mixture\.topk: .* Did you mean 'top_k'\?"),
        (minimal(eval={"sample": 1}), r"^eval\.sample: .* Did you mean 'samples'\?"),
        (
            {"experts": {"a": {"data": {"skill": "json"}, "lora": {"rr": 1}}}},
            r"^experts\.a\.lora\.rr: unknown key\. Did you mean 'r'\?",
        ),
        ({"experts": {"a": {"data": {"skil": "json"}}}}, r"^experts\.a\.data\.skil: .* Did you mean 'skill'\?"),
    ],
)
def test_unknown_keys_name_the_path_and_the_nearest_key(data, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(data)


def test_a_key_like_no_other_is_refused_without_a_guess():
    with pytest.raises(RecipeError, match=r"^eval\.zzz: unknown key\. Valid keys: baseline, baseline_learning_rate, b"):
        parse_recipe(minimal(eval={"zzz": 1}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (minimal(seed="one"), r"^seed: expected an integer, got 'one'"),
        (minimal(seed=True), r"^seed: expected an integer, got True"),
        (minimal(base=["embedded"]), r"^base: expected a mapping, got \['embedded'\]"),
        (minimal(base={"dtype": "int8"}), r"^base\.dtype: expected one of 'float32', .* got 'int8'"),
        (
            minimal(train={"method": "jiont"}),
            r"^train\.method: expected one of 'joint', 'specialists', 'staged', .* got 'jiont'",
        ),
        (minimal(train={"max_steps": "five"}), r"^train\.max_steps: expected an integer, got 'five'"),
        (minimal(train={"learning_rate": True}), r"^train\.learning_rate: expected a number, got True"),
        (minimal(train={"learning_rate": "fast"}), r"^train\.learning_rate: expected a number, got 'fast'"),
        (minimal(mixture={"r": 2.5}), r"^mixture\.r: expected an integer, got 2\.5"),
        (minimal(mixture={"target_modules": 3}), r"^mixture\.target_modules: expected .*text.*, got 3"),
        (minimal(eval={"samples": "all"}), r"^eval\.samples: expected an integer or null, got 'all'"),
        ({"experts": ["json"]}, r"^experts: expected .* got \['json'\]"),
        ({"experts": {"a": "json"}}, r"^experts\.a: expected a mapping, got 'json'"),
        ({"experts": {1: {"data": {"skill": "json"}}}}, r"^experts: the key 1 is not text"),
        ({"experts": {"a": {"data": {"skill": "json"}, "lora": {"r": "8"}}}}, r"^experts\.a\.lora\.r: .* got '8'"),
    ],
)
def test_wrong_types_name_the_value_and_what_was_expected(data, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"^experts: missing"),
        ({"experts": {}}, r"^experts: none given"),
        ({"experts": None}, r"^experts: none given"),
        ({"experts": {"a": {}}}, r"^experts: none has data and may be trained"),
        ({"experts": {"a": {"data": {}}}}, r"^experts\.a\.data: no data: give `train: FILE\.jsonl`"),
        ({"experts": {"a": {"data": {"skill": "jsn"}}}}, r"unknown skill 'jsn'\. Did you mean 'json'\? Skills: json, "),
        ({"experts": {"a": {"data": {"skill": "json", "train": "x.jsonl"}}}}, r"train='x\.jsonl' is a file, but"),
        ({"experts": {"a": {"data": {"skill": "json", "limit": 3}}}}, r"limit is for files"),
        ({"experts": {"a": {"data": {"skill": "json", "test": 0}}}}, r"^experts\.a\.data: test=0: must be 1 or more"),
        (data(skill="json", path="a/b"), r"^experts\.a\.data: skill='json' and path='a/b': give one source"),
        (
            data(skill="json", columns={"text": "t"}),
            r"columns=\{'text': 't'\} is for files and datasets; `skill: json`",
        ),
        (data(skill="json", filter={"a": 1}), r"filter=\{'a': 1\} is for files and datasets; `skill: json` has no"),
        (data(skill="json", split="train"), r"split='train' is for a dataset; give its id or folder as `path`"),
        (data(train="d.jsonl", revision="v1"), r"revision='v1' is for a dataset"),
        (data(path="a/b", train="d.jsonl"), r"train='d\.jsonl' beside path='a/b'; choose its part with `split`"),
        (data(path="a/b", test=5), r"test=5 beside path='a/b'; choose its part with `test_split`"),
        (
            data(train="d.txt"),
            r"train='d\.txt': unknown kind of file; expected \.jsonl, \.jsonl\.gz, .*\.parquet, \.csv",
        ),
        (
            data(path="a/b", columns={"promt": "q"}),
            r"columns: no field 'promt'\. Did you mean 'prompt'\? Fields: messages",
        ),
        (data(path="a/b", columns={"text": "t", "prompt": "q"}), r"columns: text, prompt do not go together"),
        (data(path="a/b", columns={"text": 3}), r"^experts\.a\.data\.columns\.text: expected text, got 3"),
        (data(path="a/b", columns={"messages": "m"}), r"^experts\.a\.data: chat messages .* set base\.chat: true"),
        (
            data(path="a/b", test_split="test", columns={"text": "t"}),
            r"^experts\.a\.data: eval\.metric=exact_match compares",
        ),
        (
            {**data(path="a/b", columns={"text": "t"}), "mixture": {"granularity": "sequence"}},
            r"^experts\.a\.data: mixture\.granularity=sequence routes by the prompt",
        ),
        (data(path="a/b", filter={"kind": {"x": 1}}), r"filter: kind=\{'x': 1\}: expected text, a number"),
        (data(path="a/b", filter={"kind": []}), r"filter: kind=\[\]: expected text, a number"),
        (data(path="a/b", test_limit=3), r"test_limit=3 without held-out data; add `test` or `test_split`"),
        (data(path="a/b", weight=0.0), r"^experts\.a\.data: weight=0\.0: must be greater than 0"),
        (data(path="a/b", weight=float("nan")), r"weight=nan: must be greater than 0"),
        (data(path="./no/where"), r"^experts\.a\.data\.path: no folder '\./no/where'; looked for /.*no/where"),
        (data(path=__file__), r"^experts\.a\.data\.path: '.*test_recipe\.py' is a file; give it as `train`"),
        (
            minimal(train={"mixing_temperature": 3.0}),
            r"^train: mixing_temperature=3\.0 is for `mixing: temperature`, not",
        ),
        (
            minimal(train={"mixing": "temperature", "mixing_temperature": 0.5}),
            r"^train: mixing_temperature=0\.5: must be 1 \(proportional\) or more",
        ),
        (
            minimal(train={"assistant_only_loss": True}),
            r"^train\.assistant_only_loss: not set here; of `messages` only",
        ),
        ({"experts": {"a": {"data": {"train": 100}}}}, r"train=100 is a number of examples, which needs `skill"),
        (minimal(mixture={"top_k": 3}), r"^mixture: top_k=3 with 2 experts"),
        (minimal(mixture={"num_experts": 2}), r"^mixture\.num_experts: not set here; it follows from `experts`"),
        (minimal(mixture={"temperature": 0.0}), r"^mixture: temperature=0\.0"),
        ({"experts": {"base": {"data": {"skill": "json"}}}}, r"^mixture: expert name 'base' is reserved"),
        (
            {"experts": {"a": {"data": {"skill": "json"}, "lora": {"bias": "some"}}}},
            r"^experts\.a\.lora\.bias: expected one of 'none', 'all', 'lora_only', got 'some'",
        ),
        (minimal(train={"output_dir": "x"}), r"^train\.output_dir: not set here; set `output`"),
        (minimal(train={"seed": 1}), r"^train\.seed: not set here"),
        (minimal(train={"method": "staged", "router_steps": 3}), r"^train: `method: staged` needs expert_steps, and"),
        (minimal(train={"router_steps": 3}), r"^train: router_steps is for `method: specialists or staged`"),
        (minimal(eval={"baseline_learning_rate": 0}), r"^eval: baseline_learning_rate=0: must be greater than 0"),
        (minimal(train={"router_learning_rate": 0.0}), r"^train: router_learning_rate=0\.0: must be greater than 0"),
        (
            minimal(train={"domain_coefficient": -0.1}),
            r"^train: domain_coefficient=-0\.1: must be 0 \(off\) or greater",
        ),
        (minimal(eval={"batch_size": 0}), r"^eval: batch_size=0: must be 1 or more"),
        (minimal(seed=-1), r"^seed=-1: must be 0 or more"),
        (minimal(seed=2**32), r"^seed=4294967296: must be 0 or more, and below"),
        (minimal(output=" "), r"^output: empty"),
        (minimal(base={"model": "./no/where"}), r"^base\.model: no folder '\./no/where'; looked for /.*no/where"),
        (minimal(train={"domain_coefficient": float("inf")}), r"domain_coefficient=inf: must be 0 .* and finite"),
        (minimal(train={"router_learning_rate": float("inf")}), r"router_learning_rate=inf"),
        (minimal(train={"gradient_accumulation_steps": 0}), r"^train\.gradient_accumulation_steps=0: must be 1 or"),
        (minimal(train={"per_device_train_batch_size": 0}), r"^train\.per_device_train_batch_size=0: must be 1 or"),
        (minimal(train={"max_length": 0}), r"^train\.max_length=0: must be 1 or more"),
        (minimal(train={"learning_rate": float("nan")}), r"^train\.learning_rate=nan: must be a finite number"),
        (minimal(train={"learning_rate": -1.0}), r"^train\.learning_rate=-1\.0: must be a finite number, 0 or"),
        (minimal(train={"weight_decay": -1.0}), r"^train\.weight_decay=-1\.0: "),
        (minimal(train={"label_smoothing_factor": 1.0}), r"^train\.label_smoothing_factor=1\.0: .* below 1"),
        (minimal(train={"max_steps": 0}), r"^train\.max_steps=0: must be 1 or more, or -1"),
        (minimal(train={"max_steps": -5}), r"^train\.max_steps=-5: "),
        (minimal(train={"num_train_epochs": 0}), r"^train\.num_train_epochs=0: must be greater than 0"),
        (minimal(train={"loss_type": "foo"}), r"^train\.loss_type=foo: must be nll or dft"),
        (minimal(train={"report_to": "wandbb"}), r"^train\.report_to: unknown logger 'wandbb'\. Did you mean 'wandb'"),
    ],
)
def test_values_that_cannot_be_used_are_refused_early(data, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(data)


def test_output_and_base_are_found_in_the_home_and_beside_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    assert parse_recipe(minimal(output="~/x")).output == str(tmp_path / "x")
    for name in ("base", "./base", "~/base"):
        assert parse_recipe(minimal(base={"model": name}), folder=tmp_path).base.model == str(tmp_path / "base")
    assert parse_recipe(minimal(base={"model": "owner/name"}), folder=tmp_path).base.model == "owner/name"


def test_tokens_are_not_written():
    recipe = parse_recipe(minimal(train={"hub_token": "hf_secret", "max_steps": 2}))
    assert recipe.train.arguments["hub_token"] == "hf_secret"
    assert "hf_secret" not in str(recipe.to_dict())
    assert recipe.to_dict()["train"]["max_steps"] == 2


def test_overrides_are_yaml_values_in_place():
    data = {"train": {"max_steps": 1, "learning_rate": 1.0}, "experts": {"a": {"data": None}}}
    changed = apply_overrides(
        data, ["train.max_steps=5", "train.learning_rate=2e-3", "experts.a.data.skill=json", "output=a=b", "new.x=[1]"]
    )
    assert changed == {
        "train": {"max_steps": 5, "learning_rate": 0.002},
        "experts": {"a": {"data": {"skill": "json"}}},
        "output": "a=b",
        "new": {"x": [1]},
    }
    assert data == {"train": {"max_steps": 1, "learning_rate": 1.0}, "experts": {"a": {"data": None}}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps", r"override 'train\.max_steps': expected KEY\.KEY=VALUE"),
        ("=5", r"override '=5': expected KEY\.KEY=VALUE"),
        ("train..x=5", r"expected KEY\.KEY=VALUE"),
        ("seed.x=5", r"override 'seed\.x=5': seed is 7, not a mapping"),
        ("train.max_steps=[1", r"override 'train\.max_steps=\[1': not valid YAML"),
    ],
)
def test_overrides_that_cannot_be_applied_are_refused(override, message):
    with pytest.raises(RecipeError, match=message):
        apply_overrides({"seed": 7}, [override])


def test_load_reads_overrides_and_finds_data_beside_the_recipe_first(tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    for place in (folder, elsewhere):
        place.mkdir()
        (place / "both.jsonl").write_text("")
    (elsewhere / "here.jsonl").write_text("")
    monkeypatch.chdir(elsewhere)
    (folder / "r.yaml").write_text("experts: {a: {data: {train: both.jsonl, test: here.jsonl}}}\nseed: 1\n")
    recipe = load_recipe(folder / "r.yaml", ["seed=2", "train.learning_rate=1e-3"])
    assert recipe.experts["a"].data.train == str(folder / "both.jsonl")
    assert recipe.experts["a"].data.test == str(elsewhere / "here.jsonl")
    assert recipe.seed == 2
    assert recipe.train.arguments == {"learning_rate": 1e-3}


def test_a_missing_data_file_names_the_places_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "r.yaml").write_text("experts: {a: {data: {train: no.jsonl}}}")
    with pytest.raises(RecipeError, match=r"^experts\.a\.data\.train: no file 'no\.jsonl'; looked for") as error:
        load_recipe(tmp_path / "sub" / "r.yaml")
    assert str(tmp_path / "sub" / "no.jsonl") in str(error.value)
    assert str(tmp_path / "no.jsonl") in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experts: {a: [}", r"r\.yaml: not valid YAML: .*line 1, column"),
        ("seed: 1\nseed: 2\n", r"r\.yaml: not valid YAML: the key 'seed' is given twice.*line 2"),
        ("- a\n- b\n", r"r\.yaml: expected a mapping, got \['a', 'b'\]"),
        ("", r"^experts: missing"),
    ],
)
def test_files_that_are_no_recipe_are_refused(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=re.compile(message, re.DOTALL)):
        load_recipe(tmp_path / "r.yaml")


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"absent\.yaml: cannot read the recipe"):
        load_recipe(tmp_path / "absent.yaml")


def test_only_true_and_false_are_no_text():
    """`eval_strategy: no` is what transformers calls it, and an answer may be `yes`."""
    recipe = parse_recipe(apply_overrides(minimal(), ["train.eval_strategy=no", "train.packing=True"]))
    assert recipe.train.arguments == {"eval_strategy": "no", "packing": True}


def test_the_shipped_skills_recipe_is_valid():
    recipe = load_recipe(REPOSITORY / "recipes" / "skills.yaml")
    assert len(recipe.experts) == 4
    assert recipe.mixture_config().num_experts == 4


@pytest.mark.parametrize("name", ["real", "staged"])
def test_the_shipped_recipes_on_real_data_name_data_sets_of_the_hub(name, tmp_path):
    file = REPOSITORY / "recipes" / f"{name}.yaml"
    recipe = load_recipe(file)
    assert list(recipe.experts) == ["gsm8k", "wikisql", "e2e_nlg", "pubmedqa"]
    assert recipe.eval.metric == "loss"
    assert all("/" in expert.data.path and expert.data.has_test for expert in recipe.experts.values())
    (tmp_path / "my.jsonl").touch()
    local = load_recipe(file, [f"experts.gsm8k.data.train={tmp_path / 'my.jsonl'}", "experts.gsm8k.data.limit=7"])
    data = local.experts["gsm8k"].data
    assert (data.path, data.train, data.columns, data.limit) == (None, str(tmp_path / "my.jsonl"), {}, 7)
    assert local.experts["wikisql"] == recipe.experts["wikisql"]


@pytest.mark.parametrize(
    ("name", "row", "prompt", "completion"),
    [
        ("gsm8k", {"question": "1 + 1?", "answer": "2\n#### 2"}, "1 + 1?", "2\n#### 2"),
        (
            "wikisql",
            {
                "phase": 1,
                "question": "Who?",
                "table": {"header": ["Name", "Age"], "rows": [["a", "1"]]},
                "sql": {"human_readable": "SELECT Name FROM table", "sel": 0},
            },
            'Table t has columns: "Name", "Age".\nWrite a SQL query for: Who?',
            "SELECT Name FROM table",
        ),
        (
            "e2e_nlg",
            {"meaning_representation": "name[X]", "human_reference": "X is nice."},
            "Write a sentence describing the restaurant: name[X]",
            "X is nice.",
        ),
        (
            "pubmedqa",
            {"question": "Does it?", "context": {"contexts": ["A.", "B."]}, "final_decision": "yes"},
            "Abstract: A. B.\n\nQuestion: Does it?\nAnswer yes, no or maybe.",
            "yes",
        ),
    ],
)
def test_rows_of_the_hub_become_prompts_and_completions(name, row, prompt, completion, monkeypatch):
    """Rows in the form that the data sets' pages show; the download itself is not tried here."""
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [row])
    data = load_recipe(REPOSITORY / "recipes" / "real.yaml").experts[name].data
    for split in ("train", "test"):
        (example,) = load_examples(name, data, split)
        assert (example.prompt, example.completion) == (prompt, completion)


def test_an_override_of_an_expert_that_there_is_not_is_refused():
    data = {"experts": {"math": {"data": {"skill": "json"}}}}
    with pytest.raises(RecipeError, match=r"no expert 'mth'\. Did you mean 'math'\? Experts: math\."):
        apply_overrides(data, ["experts.mth.data.limit=5"])
    added = apply_overrides(data, ["experts.law={data: {skill: sql}}", "experts.law.data.train=3"])
    assert added["experts"]["law"] == {"data": {"skill": "sql", "train": 3}}
    assert apply_overrides({}, ["experts.a.data.skill=json"]) == {"experts": {"a": {"data": {"skill": "json"}}}}


def test_a_file_takes_the_place_of_a_data_set_whatever_the_order():
    data = {"experts": {"a": {"data": {"path": "x/y", "split": "dev", "columns": {"prompt": "q"}, "limit": 3}}}}
    overrides = ["experts.a.data.columns={prompt: p}", "experts.a.data.train=d.jsonl"]
    changed = {"experts": {"a": {"data": {"train": "d.jsonl", "columns": {"prompt": "p"}, "limit": 3}}}}
    assert apply_overrides(data, overrides) == apply_overrides(data, overrides[::-1]) == changed


@pytest.mark.parametrize(
    ("data", "keys", "owner"),
    [
        (minimal(train={"lerning_rate": 1}), "collapse_steps, domain_coefficient, ", "trl.SFTConfig"),
        (minimal(mixture={"topk": 1}), "balance_coefficient, balance_loss, ", "peft.LoraConfig"),
    ],
)
def test_an_unknown_key_shows_the_sections_own_keys(data, keys, owner):
    with pytest.raises(RecipeError) as error:
        parse_recipe(data)
    assert f" Valid keys: {keys}" in str(error.value)
    assert str(error.value).endswith(f" and the fields of {owner}.")
    assert str(error.value).count(",") < 40
    assert "adam_beta1" not in str(error.value)


def test_the_base_has_its_loading_options(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    (tmp_path / "chat.jinja").write_text("x")
    options = {"attn_implementation": "eager", "device_map": {"": 0}, "trust_remote_code": True}
    recipe = parse_recipe(
        minimal(base={"model": "a/b", "quantization": 4, "chat": True, "chat_template": "chat.jinja", **options}),
        tmp_path,
    )
    assert recipe.base.quantization == "4bit"
    assert recipe.base.chat_template == str(tmp_path / "chat.jinja")
    assert recipe.base.device_map == {"": 0}
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"quantization": "2bit"}, r"^base\.quantization: expected one of '4bit', '8bit', 4, 8 or null, got '2bit'"),
        ({"quantization": "4bit"}, r"^base\.quantization: bitsandbytes is not installed: pip install bitsandbytes"),
        ({"chat_template": "x.jinja"}, r"^base: chat_template='x\.jinja' is for `chat: true`"),
        ({"chat": True, "chat_template": "x.jinja"}, r"^base\.chat_template: no file 'x\.jinja'; looked for /"),
        ({"device_map": 3}, r"^base\.device_map: expected a mapping or text or null, got 3"),
    ],
)
def test_options_of_the_base_that_cannot_be_used_are_refused(base, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=message):
        parse_recipe(minimal(base=base))


def test_patterns_and_lists_of_files_are_found_beside_the_recipe(tmp_path):
    for name in ("a-1.jsonl", "a-2.jsonl", "b.csv"):
        (tmp_path / name).touch()
    experts = {
        "a": {"data": {"train": "a-*.jsonl", "test": ["b.csv"]}},
        "b": {"data": {"train": ["b.csv", "a-[1].jsonl"]}},
    }
    recipe = parse_recipe({"experts": experts}, tmp_path)
    files = {name: str(tmp_path / name) for name in ("a-1.jsonl", "a-2.jsonl", "b.csv")}
    assert recipe.experts["a"].data.train == [files["a-1.jsonl"], files["a-2.jsonl"]]
    assert recipe.experts["a"].data.test == [files["b.csv"]]
    assert recipe.experts["b"].data.train == [files["b.csv"], files["a-1.jsonl"]]
    for train, message in (("x-*.jsonl", r"no file 'x-\*\.jsonl'"), (["b.csv", "c.csv"], r"no file 'c\.csv'")):
        with pytest.raises(RecipeError, match=rf"^experts\.a\.data\.train: {message}; looked for "):
            parse_recipe({"experts": {"a": {"data": {"train": train}}}}, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": {"messages": "x"}}, r"template: no field 'messages'\..* Fields: prompt, completion, text"),
        ({"template": {"prompt": "{{ x"}}, r"template: prompt: no Jinja template"),
        (
            {"template": {"prompt": "x"}, "columns": {"prompt": "q"}},
            r"prompt: in columns and in template; give",
        ),
        ({"template": {"prompt": "x"}, "columns": {"text": "q"}}, r"columns: text, prompt do not go together"),
        ({"test_columns": {"prompt": "q"}}, r"test_columns and test_template are for held-out data"),
        ({"train": []}, r"train=\[\]: no file"),
        ({"train": ["d.txt"]}, r"train='d\.txt': unknown kind of file"),
    ],
)
def test_data_sections_that_cannot_be_used_are_refused(options, message):
    source = {} if "train" in options else {"path": "a/b"}
    with pytest.raises(RecipeError, match=r"^experts\.a\.data: " + message):
        parse_recipe(data(**source, **options))
