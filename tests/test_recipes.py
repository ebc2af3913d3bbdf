"""Every recipe in `recipes/`, shrunk to a tiny base, few examples and few steps, from training to reloading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import set_seed

from dylora_moe import DyLoraMoE
from dylora_moe.training.recipe.methods import Stage
from dylora_moe.training.recipe.recipe import parse_recipe
from dylora_moe.training.recipe.sections import Recipe
from dylora_moe.training.run.build import base_of, build_mixture
from dylora_moe.training.run.folder import is_finished
from dylora_moe.training.run.job import Job
from dylora_moe.training.run.plan import plan
from dylora_moe.training.run.results import Results
from runs import STEPS, small
from tinybase import save_tiny_base

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SKILLS = "runs/skills"  # what the other recipes start from


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Callable[[str], tuple[Recipe, Results]]:
    """Train a recipe once; those that start from another one's output have that trained first."""
    done: dict[str, tuple[Recipe, Results]] = {}

    def once(name: str) -> tuple[Recipe, Results]:
        if name not in done:
            file = next(file for file in RECIPES if file.stem == name)
            content = yaml.safe_load(file.read_text())
            folder = tmp_path_factory.mktemp(name)
            skills = once("skills")[0].output if SKILLS in file.read_text() and name != "skills" else ""
            done[name] = train(shrunk(content, base, folder, skills))
        return done[name]

    return once


def train(recipe: Recipe) -> tuple[Recipe, Results]:
    results = Job(recipe, Console(quiet=True)).run()
    assert results is not None
    return recipe, results


def shrunk(content: dict[str, Any], base: str, folder: Path, skills: str = "") -> Recipe:
    """A recipe's content with little to do; `skills` takes the place of `runs/skills`."""
    content = small(content, base, folder)
    if "start" in content:
        content["start"] = moved(content["start"], skills)
    for expert in content["experts"].values():
        if "adapter" in expert:
            expert["adapter"] = moved(expert["adapter"], skills)
    return parse_recipe({**content, "output": str(folder / "run")})


def moved(path: str, skills: str) -> str:
    """`runs/skills/json` with another folder in place of `runs/skills`."""
    _, found, rest = path.partition(SKILLS)
    assert found, path
    return skills + rest


def tensors(mixture: DyLoraMoE) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of what can train: the tensors of every expert and of the router."""
    experts = {
        name: {key: parameter.detach().clone() for key, _, parameter in mixture.expert_tensors(name)}
        for name in mixture.expert_names
    }
    return {**experts, "router": {key: value.detach().clone() for key, value in mixture.router.named_parameters()}}


def at_start(recipe: Recipe) -> dict[str, dict[str, torch.Tensor]]:
    base = base_of(recipe)
    set_seed(recipe.seed)
    mixture = build_mixture(recipe, base)
    if not mixture.router.computed:
        mixture.start_routing()
    return tensors(mixture)


def steps(stage: Stage) -> int:
    """Optimizer steps of a stage; a router that is computed takes none."""
    return 0 if stage.fits else STEPS


def check(recipe: Recipe, results: Results) -> None:
    """What must be true of every run."""
    job, folder = Job(recipe), Path(recipe.output)
    assert results.reloaded_identical
    for name in ("results.json", "history.json", "recipe.yaml", "environment.json"):
        assert (folder / name).is_file(), name
    assert all(is_finished(job.folder.stage(stage)) for stage in job.stages)
    history = json.loads((folder / "history.json").read_text())
    for stage in job.stages:
        assert max((row["step"] for row in history if row["stage"] == stage.name), default=0) == steps(stage)
    assert set(results.columns["mixture"]) == set(recipe.data)

    before, after = at_start(recipe), tensors(DyLoraMoE.from_pretrained(recipe.output))
    assert before.keys() == after.keys()
    trained = {name for stage in job.stages for name in (*stage.experts, *(["router"] if stage.router else []))}
    for part, values in before.items():
        same = [torch.equal(value, after[part][key]) for key, value in values.items()]
        assert not all(same) if part in trained else all(same), part


@pytest.mark.parametrize("name", [file.stem for file in RECIPES])
def test_recipe_trains_what_it_says(name, run):
    check(*run(name))


@pytest.mark.parametrize("name", [file.stem for file in RECIPES])
def test_recipe_is_planned_as_it_runs(name, run):
    recipe, results = run(name)
    planned = plan(recipe)
    assert [(stage.name, stage.steps) for stage in planned.stages] == [(s.name, steps(s)) for s in Job(recipe).stages]
    assert planned.parameters.experts == {name: results.parameters[name] for name in planned.parameters.experts}


def test_on_a_trained_base(shared_dir, tmp_path):
    """stories260K, with a tokenizer and a context of its own."""
    content = yaml.safe_load((RECIPES[0].parent / "skills.yaml").read_text())
    check(*train(shrunk(content, str(shared_dir / "models" / "stories260K-hf"), tmp_path)))
