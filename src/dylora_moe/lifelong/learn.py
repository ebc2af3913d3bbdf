"""Learning a new skill: an expert of its own is trained on its rows, and their sums are taken into the router.

Nothing that was there is touched: the old experts keep every bit, and their rows of the router change as they would
have been had the skill been there from the beginning.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from rich.console import Console
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl import SFTConfig  # pyright: ignore[reportPrivateImportUsage]

from dylora_moe.config import check_expert_name
from dylora_moe.data.examples import Example, to_dataset
from dylora_moe.experts.expert_set import NEW
from dylora_moe.model import DyLoraMoE
from dylora_moe.skills.library import SkillLibrary
from dylora_moe.training.recipe.methods import expert_stage
from dylora_moe.training.run.arguments import DEFAULT_ARGUMENTS, keep_intervals
from dylora_moe.training.run.stages import set_trainable, thaw
from dylora_moe.training.trainer.callbacks import ProgressBar
from dylora_moe.training.trainer.checkpoints import last_complete
from dylora_moe.training.trainer.interrupted import Interrupted
from dylora_moe.training.trainer.trainer import MoETrainer

from .look import Look, look

PASSES, LEAST_STEPS = 3, 60
RATE, RANK = 2e-3, 8
"""The learning rate of an expert of this rank; at alpha = 2r the best one goes as 1/√r."""


@dataclass(frozen=True)
class Training:
    """How the expert of a new skill is trained.

    Args:
        steps: optimizer steps; default as many as go `PASSES` times through the rows, and at least `LEAST_STEPS`.
        batch_size: rows of a step.
        learning_rate: the highest, after a warm-up of 5 %, from which it falls as a cosine; default 2e-3 · √(8/r).
        max_length: tokens of a row at most.
        lora: of the expert, where it differs from the mixture's.
        seed: of its first weights and of the order of the rows.
        folder: where checkpoints of the training go, each training's in a folder of its own, from which the same one
            goes on if it was cut off: same rows, same options, same mixture. Default none are kept.
        console: where the progress is shown; default nowhere.
    """

    steps: int | None = None
    batch_size: int = 8
    learning_rate: float | None = None
    max_length: int = 1024
    lora: LoraConfig | None = None
    seed: int = 0
    folder: Path | None = None
    console: Console | None = None

    def __post_init__(self):
        for key in ("steps", "batch_size", "max_length"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or value < (2 if key == "max_length" else 1)):
                raise ValueError(f"{key}={value!r}: a whole number from {2 if key == 'max_length' else 1} is needed.")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate={self.learning_rate}: a number greater than 0 is needed.")


@dataclass(frozen=True)
class Learned:
    """What came of rows that were to be learnt.

    Attributes:
        name: of the new expert; None where nothing was learnt.
        look: what the rows were.
        rows: how many the expert was trained on.
        moved: skill → how many of its kept rows are routed differently now, and how many are kept.
        nearest: the skill that the new one is least apart from, and how far, see `skills.separation`; None without
            another.
    """

    name: str | None
    look: Look
    rows: int = 0
    moved: Mapping[str, tuple[int, int]] | None = None
    nearest: tuple[str, float] | None = None


def learn(
    mixture: DyLoraMoE,
    rows: Iterable[str | Mapping[str, Any] | Example],
    name: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    separator: str | None = None,
    false_alarm: float = 0.01,
    everything: bool = False,
    source: str = "",
    training: Training | None = None,
) -> Learned:
    """Look at `rows`, and where they are new, train an expert on them and teach the router.

    Args:
        mixture: whose router is in closed form.
        rows: texts, or mappings with `prompt` and `completion`. Those of known skills are left out.
        name: of the new expert; default `skill_1`, `skill_2`, …
        tokenizer: of the base; default the one in the checkpoint's folder, else the base's.
        separator: what stands between prompt and completion; default as the mixture was taught.
        false_alarm: share of the rows of known skills that may be called new.
        everything: learn all rows, whatever they are.
        source: what to note of where they are from.
        training: how.

    Returns:
        what came of it. Nothing is learnt of known rows or of fewer than 8, see `Look.reason`.

    Raises:
        ValueError: a name that is taken or reserved, unusable rows, or a router that is trained. The mixture is left as
            it was, as it is by whatever stops the training.
        Interrupted: Ctrl-C (SIGINT) or SIGTERM.
    """
    training, names = training or Training(), mixture.expert_names
    check_can_learn(mixture)
    if name is None:
        name = next(free for number in range(1, len(names) + 2) if (free := f"skill_{number}") not in names)
    check_expert_name(name, taken=names, base=mixture.get_base_model())
    tokenizer = mixture.tokenizer() if tokenizer is None else tokenizer
    separator = mixture.skills.separator if separator is None else separator
    seen = look(mixture, rows, tokenizer, separator, false_alarm, training.max_length)
    if seen.reason is not None and not everything:
        return Learned(None, seen)
    chosen = list(seen.examples if everything else seen.new)
    before = mixture.skills
    with _undone_on_failure(mixture, name):
        set_seed(training.seed)
        mixture.add_expert(name, training.lora)
        _train(mixture, name, chosen, tokenizer, training)
        mixture.teach(name, chosen, tokenizer, separator, source)
        nearest = mixture.skills.separation(name).get(name)
        return Learned(name, seen, len(chosen), moved(before, mixture.skills), nearest)


def check_can_learn(mixture: DyLoraMoE) -> None:
    """Raise `ValueError` if the router of a mixture cannot take in a skill that it is taught."""
    if not mixture.router.computed:
        raise ValueError(
            f"the router is of the type {mixture.moe_config.router_type!r}, which is trained: a new skill needs a "
            "training of its own with `start`, see recipes/new_skill.yaml; or compose the experts anew in closed form."
        )


def moved(before: SkillLibrary, after: SkillLibrary) -> dict[str, tuple[int, int]]:
    """Skill → how many of its kept rows `after` sends elsewhere than `before`, and how many are kept.

    Each row is scored by a router that had never seen it.
    """
    then, now, found = before.left_out() if before else {}, after.left_out(), {}
    for skill, (scores, columns) in then.items():
        earlier = [columns[column] for column in scores.argmax(-1).tolist()]
        scores, columns = now[skill]
        later = [columns[column] for column in scores.argmax(-1).tolist()]
        found[skill] = (sum(a != b for a, b in zip(earlier, later, strict=True)), len(earlier))
    return found


def _train(mixture: DyLoraMoE, name: str, examples: list[Example], tokenizer: Any, training: Training) -> None:
    """Train the expert `name` alone; everything else is as before, modes included."""
    rank = mixture.lora_config(name).r
    rate = RATE * (RANK / rank) ** 0.5 if training.learning_rate is None else training.learning_rate
    steps = training.steps or max(LEAST_STEPS, -(-PASSES * len(examples) // training.batch_size))
    arguments = {
        **DEFAULT_ARGUMENTS,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": -(-steps // 20),
        "max_steps": steps,
        "per_device_train_batch_size": training.batch_size,
        "max_length": training.max_length,
        "seed": training.seed,
        "use_cpu": not torch.accelerator.is_available(),
    }
    if training.folder is None:
        arguments["save_strategy"] = "no"
    labelled = [replace(example, domain=name) for example in examples]
    frozen, was_training = mixture.frozen_experts, mixture.training
    own = None if training.folder is None else training.folder / _key(mixture, name, examples, arguments)
    with _folder(own) as folder:
        try:
            set_trainable(mixture, expert_stage(name))
            trainer = MoETrainer(
                mixture,
                args=SFTConfig(output_dir=str(folder), **arguments),
                train_dataset=to_dataset(labelled, tokenizer, bool(mixture.chat)),
                processing_class=tokenizer,
                force_domains=True,
                callbacks=[] if training.console is None else [ProgressBar(training.console, f"learning {name}")],
            )
            trainer.remove_callback(PrinterCallback)
            checkpoint = last_complete(folder)
            if checkpoint is not None:
                keep_intervals(cast(SFTConfig, trainer.args), checkpoint)
            trainer.train(resume_from_checkpoint=checkpoint is not None)
        except Interrupted as stopped:
            remedy = f"the same call goes on from the checkpoints in {own}."
            if own is None:
                remedy = "the training is lost. With Training(folder=...) the same call would go on with it."
            raise Interrupted(stopped.number, f"the mixture is as it was, and {remedy}") from stopped
        finally:
            thaw(mixture, frozen)
            mixture.train(was_training)


def _key(mixture: DyLoraMoE, name: str, examples: list[Example], arguments: Mapping[str, Any]) -> str:
    """A name for a training: another for other rows, other options, or a mixture that has changed.

    A checkpoint holds all of the mixture: to go on from that of another would bring back what was there then.
    """
    state, lora = mixture.state(), mixture.lora_config(name)
    rows = [(example.prompt, example.completion, example.separator, example.template) for example in examples]
    skills = {
        each: (skill.rows, skill.compact, [taught._replace(when="") for taught in skill.taught])
        for each, skill in state.skills.items()
    }
    known = [rows, dict(arguments), lora.lora_alpha, lora.lora_dropout, skills]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for of, tensors in [(each, adapter.tensors) for each, adapter in state.experts.items()] + [("", state.router)]:
        for key, tensor in tensors.items():
            digest.update(f"{of} {key} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"{name}-{digest.hexdigest()[:16]}"


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """The folder of the trainer: the one that was given, or one that goes afterwards."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="dylora-moe-") as folder:
        yield Path(folder)


@contextmanager
def _undone_on_failure(mixture: DyLoraMoE, name: str) -> Iterator[None]:
    """Take the expert `name` out again if the block does not come to its end; torch's random state stays outside."""
    states = dict(mixture.expert_states)
    skills, router = mixture.skills, {key: value.clone() for key, value in mixture.router.state_dict().items()}
    with torch.random.fork_rng():
        try:
            yield
        except BaseException:
            if name in mixture.expert_names:
                mixture.experts.states[name] = NEW  # or it might be the only one that is routed, which stays
                mixture.remove_expert(name)
            mixture.experts.states.update(states)
            mixture.skills = skills
            mixture.router.load_state_dict(router)
            raise
