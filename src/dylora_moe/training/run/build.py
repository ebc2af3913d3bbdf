"""From a recipe to its examples, base, tokenizer and untrained mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from dylora_moe.base.embedded import EMBEDDED, MODEL, resolve_base
from dylora_moe.base.loading import load_base
from dylora_moe.checkpoint.files import CheckpointError
from dylora_moe.checkpoint.mixture import CONFIG_FILE, moved_base, read_description, read_vocabulary
from dylora_moe.checkpoint.vocabulary import put_rows, resize_as_saved
from dylora_moe.data.examples import Example
from dylora_moe.data.sources import load_examples
from dylora_moe.model import DyLoraMoE
from dylora_moe.schema import RecipeError
from dylora_moe.training.recipe.sections import Recipe


def load_recipe_examples(recipe: Recipe) -> tuple[dict[str, list[Example]], list[Example]]:
    """The training examples of every expert that has data and all held-out ones, checked against the recipe's settings.

    Raises:
        DataError: as `load_examples`.
        RecipeError: as `Recipe.check_form`.
    """
    train: dict[str, list[Example]] = {}
    test: list[Example] = []
    for name, data in recipe.data.items():
        train[name] = load_examples(name, data, "train", recipe.seed)
        held_out: list[Example] = []
        if data.has_test:
            held_out = load_examples(name, data, "test", recipe.seed, recipe.eval.samples)
        for form in {example.form for example in train[name]} | {example.form for example in held_out}:
            recipe.check_form(name, form, any(example.form == form for example in held_out))
        test += held_out
    return train, test


def base_name(recipe: Recipe) -> str:
    """The name of the recipe's base: its own, or that of the mixture in `start`."""
    if recipe.base.model is not None:
        return recipe.base.model
    folder, known = read_description(str(recipe.start))
    name = known.base_name
    if not name:
        raise CheckpointError(f"{folder / CONFIG_FILE} names no base; set base.model.")
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def base_title(recipe: Recipe) -> str:
    """The base as a reader knows it."""
    name = base_name(recipe)
    return f"{name} ({MODEL})" if name == EMBEDDED else name


def code_options(recipe: Recipe) -> dict[str, Any]:
    """What configuration, tokenizer and weights of the base are all loaded with."""
    base = recipe.base
    revision = {"revision": base.revision} if base.revision else {}
    return revision | ({"trust_remote_code": True} if base.trust_remote_code else {})


def loading_options(recipe: Recipe) -> dict[str, Any]:
    """What the base's weights are loaded with."""
    base = recipe.base
    given = {"attn_implementation": base.attn_implementation, "device_map": base.device_map}
    options = {**code_options(recipe), **{key: value for key, value in given.items() if value is not None}}
    dtype = getattr(torch, base.dtype)
    if base.quantization == "4bit":
        four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **four)
    elif base.quantization == "8bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    return {**options, "dtype": dtype}


def base_of(recipe: Recipe) -> PreTrainedModel:
    """The recipe's base, loaded, with the rows that the mixture in `start` adds to its embeddings."""
    try:
        base, _ = load_base(base_name(recipe), loading_options(recipe))
    except OSError as error:
        if recipe.base.model is not None:
            raise
        raise moved_base(*read_description(str(recipe.start)), error) from error
    if recipe.start is not None:
        folder, known = read_description(str(recipe.start))
        resize_as_saved(base, known.vocabulary)
        put_rows(base, read_vocabulary(folder, known, base))
    return base


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The base's tokenizer, whose `model_max_length` is the base's context.

    Raises:
        ValueError: there is no such base.
        RecipeError: `max_length` is beyond the base's context.
    """
    path, options = resolve_base(base_name(recipe)), code_options(recipe)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        config = AutoConfig.from_pretrained(path, **options)
    except OSError as error:
        if recipe.base.model is None:
            raise moved_base(*read_description(str(recipe.start)), error) from error
        raise ValueError(f"base.model: {path!s} is no folder here, and the hub did not deliver it: {error}") from error
    if recipe.base.chat_template is not None:
        tokenizer.chat_template = Path(recipe.base.chat_template).read_text(encoding="utf-8")
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    wanted = recipe.train.arguments.get("max_length")
    if context and wanted and wanted > context:
        raise RecipeError(
            f"train.max_length={wanted}: {base_title(recipe)} has {context} positions (max_position_embeddings); give "
            "at most that, or leave it out to use them all."
        )
    if context:
        tokenizer.model_max_length = min(tokenizer.model_max_length, context)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_mixture(recipe: Recipe, base: PreTrainedModel) -> DyLoraMoE:
    """The mixture of a recipe on `base`, as its training starts: new, imported and continued experts."""
    if recipe.start is not None:
        mixture = DyLoraMoE.from_pretrained(recipe.start, base=base)
        for key, value in recipe.mixture.items():
            setattr(mixture.moe_config, key, value)
        for name, expert in recipe.experts.items():
            if name not in mixture.expert_names:
                mixture.add_expert(name, expert.adapter or mixture.moe_config.expert_config(**expert.lora))
            elif expert.adapter or expert.lora:
                raise ValueError(f"experts.{name}: the mixture in `start` has it; leave out its adapter and lora.")
    else:
        config = recipe.mixture_config()
        sources = {n: e.adapter or config.expert_config(**e.lora) for n, e in recipe.experts.items()}
        mixture = DyLoraMoE.from_adapters(base, sources, config)
    for name, expert in recipe.experts.items():
        if expert.frozen:
            mixture.freeze_expert(name)
        else:
            mixture.unfreeze_expert(name)
    mixture.base_name, mixture.chat = base_name(recipe), recipe.base.chat
    return mixture


def single_lora_config(mixture: DyLoraMoE) -> LoraConfig:
    """A single LoRA on the mixture's layers whose rank is the sum of the experts' and whose scaling is the same."""
    config = mixture.moe_config
    targets = sorted({layer.routing_name for layer in mixture.routed_layers})
    total = sum(mixture.lora_config(name).r for name in mixture.expert_names)
    return config.expert_config(
        r=total,
        lora_alpha=config.lora_alpha * total / config.r,
        target_modules=targets,
        layers_to_transform=None,
        exclude_modules=None,
    )
