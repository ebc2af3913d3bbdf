"""Settings that exclude one another, refused before anything is loaded, each with the reason."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from dylora_moe.schema import RecipeError

from .methods import METHODS
from .sections import Recipe

INTEGRATIONS = ("tensorboard", "wandb", "trackio", "mlflow", "swanlab", "dvclive", "clearml")
"""Values of `report_to` whose package has the same name."""
RUN_ENTRIES = ("stages", "figures")
"""Folders that a run has beside its experts' folders."""


def check_combinations(recipe: Recipe) -> None:
    """Raise a `RecipeError` for the first pair of settings in `recipe` that cannot be combined."""
    for key, excluded, reason in _exclusions(recipe):
        if excluded:
            raise RecipeError(f"{key}: {reason}")


def _exclusions(recipe: Recipe) -> list[tuple[str, Any, str]]:
    train, arguments = recipe.train, recipe.train.arguments
    packed = arguments.get("packing") or arguments.get("padding_free")
    checkpointing = arguments.get("activation_checkpointing") or arguments.get("gradient_checkpointing")
    reentrant = any(
        (arguments.get(key) or {}).get("use_reentrant")
        for key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
    )
    evaluates = arguments.get("eval_strategy", "no") != "no"
    taken = next((name for name in recipe.experts if name in RUN_ENTRIES), None)
    missing = _missing_integrations(arguments.get("report_to"))
    fsdp = arguments.get("fsdp_config") or {}
    fsdp = fsdp if isinstance(fsdp, dict) else {}
    return [
        (
            "train.packing" if arguments.get("packing") else "train.padding_free",
            packed and recipe.mixture.get("granularity") == "sequence",
            "a packed row holds several sequences, and mixture.granularity: sequence needs one per row. "
            "Use granularity: token, or no packing.",
        ),
        (
            "mixture.router_type",
            train.closed_form and recipe.mixture.get("router_type", "closed_form") != "closed_form",
            "`train.router: closed_form` computes a router of the type closed_form. Leave it out, or set "
            "`train.router: trained`.",
        ),
        (
            "mixture.router_type",
            recipe.mixture.get("router_type") == "closed_form" and any(stage.by_steps for stage in recipe.stages),
            "a router in closed form is computed, not trained. Use `method: specialists` or `staged` with `router: "
            "closed_form`, or another type.",
        ),
        (
            "train.padding_free",
            arguments.get("padding_free") and any(not s.router and len(s.domains) > 1 for s in recipe.stages),
            "a flattened batch is one row of several domains, and a forced row has one expert. Use packing, which "
            "keeps the domains apart, or neither.",
        ),
        (
            "train.deepspeed",
            checkpointing and _zero_stage(arguments.get("deepspeed")) == 3,
            "under ZeRO stage 3 the recompute of non-reentrant checkpointing, the kind that routing needs, finds "
            "weights of another shape than it recorded. Use stage 2, or leave checkpointing off.",
        ),
        (
            "train.torch_compile",
            arguments.get("torch_compile") and checkpointing,
            "compiling together with gradient checkpointing is not supported (stock PEFT cannot either). Keep one.",
        ),
        (
            "train.gradient_checkpointing_kwargs",
            reentrant,
            "use_reentrant: true cannot see the routing of its own forward pass. Leave it out or set it to false.",
        ),
        (
            "train.fsdp_config",
            "SHARDED" in str(fsdp.get("state_dict_type", "")).upper(),
            "SHARDED_STATE_DICT would save one expert and lose the rest. Use state_dict_type: FULL_STATE_DICT.",
        ),
        (
            "train.fsdp_config",
            str(fsdp.get("version", fsdp.get("fsdp_version", 2))) == "1",
            "FSDP 1 flattens frozen and trained parameters together. Use version: 2.",
        ),
        (
            "train.label_smoothing_factor",
            arguments.get("label_smoothing_factor") and arguments.get("loss_type") == "dft",
            "label smoothing is defined for loss_type: nll only.",
        ),
        (
            "train.eval_strategy",
            evaluates and not train.validation,
            "there is nothing to evaluate during training. Set train.validation to the number of examples per expert "
            "to hold out for it.",
        ),
        (
            "train.validation",
            train.validation and not evaluates,
            "examples would be held out and never used. Set train.eval_strategy (steps or epoch), or leave it out.",
        ),
        (
            "train.early_stopping_patience",
            train.early_stopping_patience and not (evaluates and arguments.get("load_best_model_at_end")),
            "it needs train.eval_strategy and train.load_best_model_at_end: true.",
        ),
        (
            "base.quantization",
            recipe.base.quantization and importlib.util.find_spec("bitsandbytes") is None,
            "bitsandbytes is not installed: pip install bitsandbytes.",
        ),
        (
            "train.report_to",
            missing,
            f"{', '.join(missing)} is not installed: pip install {' '.join(missing)}.",
        ),
        (
            f"experts.{taken}",
            taken,
            "a run's folder has an entry of this name for itself, and the expert's folder lies beside it. Choose "
            "another name.",
        ),
        (
            "train.save_only_model",
            arguments.get("save_only_model"),
            "a checkpoint without the optimizer's state cannot be resumed exactly. Leave it out: experts and router "
            "are small.",
        ),
        (
            "eval.baseline",
            recipe.eval.baseline and recipe.roster.imported,
            "a single LoRA trained from nothing is no fair match for experts that were trained before.",
        ),
        *(
            (key, train.method == name and excluded, reason)
            for name, method in METHODS.items()
            for key, excluded, reason in method.exclusions(train, recipe.roster)
        ),
    ]


def _missing_integrations(report_to: Any) -> list[str]:
    """The packages that `report_to` names and that are not there; unknown names are left to transformers."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    return [name for name in names if name in INTEGRATIONS and importlib.util.find_spec(name) is None]


def _zero_stage(config: Any) -> int | None:
    """The ZeRO stage of a DeepSpeed configuration (a mapping or a JSON file)."""
    if isinstance(config, str):
        try:
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # accelerate will say what is wrong with the file
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return zero.get("stage") if isinstance(zero, dict) else None
