"""The methods: what each trains on in a stage, which of its weights, and how its model is then called.

All adapt the same layers of the same base, k to L − 1, all linear modules, with alpha = 2 r, by the same loop; all are
mixtures of this library, so that nothing but the method differs. A stage is one task's worth of steps.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.data.examples import Example
from loop import completion_loss, train
from tasks import Task, batches

ONE = "one"
REPLAYED = 0.02
ORTHOGONALITY = 0.5


@dataclass(frozen=True)
class Budget:
    """What every method gets.

    Attributes:
        steps: per task.
        batch: rows per step.
        rank: r of an expert.
        wide: r of the adapter of a method that has one.
        rate: the learning rate of rank r.
        seed: of initial weights and the order of rows.
    """

    steps: int = 25
    batch: int = 8
    rank: int = 8
    wide: int = 32
    rate: float = 2e-3
    seed: int = 0

    def rates(self, rank: int) -> list[float]:
        """Three learning rates to choose from for a rank: around rate · √(r / rank)."""
        middle = self.rate * (self.rank / rank) ** 0.5
        return [middle / 2, middle, 2 * middle]


class Method:
    """One method at work: `learn(0)`, `learn(1)`, …; its weights can be kept in a folder in between.

    Attributes:
        swept: which rank of the budget it has, where the learning rate is chosen on the first task; None for the
            budget's own rate.
        sequential: whether the tasks come one after the other, and so can be forgotten.
        model: the mixture, from the first `learn` on.
    """

    swept: Literal["rank", "wide"] | None = None
    sequential = True

    def __init__(
        self, base: str, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], budget: Budget, rate: float
    ):
        self.base, self.tokenizer, self.tasks, self.budget, self.rate = base, tokenizer, tasks, budget, rate
        self.model: Any = None
        self.optimizer: dict[str, Any] | None = None

    @property
    def force(self) -> dict[str, Any]:
        """How the model is called; empty for routed."""
        return {"experts": ONE}

    def learn(self, stage: int) -> None:
        """Go through one stage; the model is in evaluation mode afterwards."""
        raise NotImplementedError

    def keep(self, folder: Path) -> None:
        """Write what the next stage needs; `folder` appears last and whole."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.optimizer, folder.with_suffix(".pt"))
        self.model.save_pretrained(folder)

    def take_up(self, folder: Path) -> None:
        """Go on from what `keep` wrote."""
        self.optimizer = torch.load(folder.with_suffix(".pt"), weights_only=True)
        self.model = DyLoraMoE.from_pretrained(str(folder), base=self.base)

    def _mixture(self, name: str, rank: int) -> DyLoraMoE:
        self._draw(name)
        config = MoELoraConfig(
            expert_names=[name],
            r=rank,
            lora_alpha=2 * rank,
            target_modules="all-linear",
            router_type="closed_form",
            granularity="sequence",
            top_k=1,
        )
        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        return DyLoraMoE.from_base(base, config).eval()

    def _draw(self, name: str) -> None:
        """Initial weights depend on the seed and the expert, not on what was trained before."""
        torch.manual_seed(zlib.crc32(f"{self.budget.seed} {name}".encode()))

    def _plan(self, rows: Sequence[Example], steps: int, what: str) -> list[list[Example]]:
        return batches(rows, steps, self.budget.batch, f"{self.budget.seed} {what}")

    def _loss(self, rows: Sequence[Example]) -> Tensor:
        return completion_loss(self.model, rows, self.tokenizer, **self.force)

    def _parameters(self, name: str) -> list[Any]:
        return [part.tensor for part in self.model.expert_tensors(name)]


class Base(Method):
    """No training."""

    sequential = False

    @property
    def force(self) -> dict[str, Any]:
        return {"experts": "base"}

    def learn(self, stage: int) -> None:
        self.model = self.model or self._mixture(ONE, self.budget.rank)


class Ours(Method):
    """An expert per task, trained alone on its rows; the router in closed form from the same rows."""

    @property
    def force(self) -> dict[str, Any]:
        return {}

    def learn(self, stage: int) -> None:
        task = self.tasks[stage]
        if self.model is None:
            self.model = self._mixture(task.name, self.budget.rank)
        else:
            self._draw(task.name)
            self.model.add_expert(task.name)

        def loss(rows: Sequence[Example]) -> Tensor:
            return completion_loss(self.model, rows, self.tokenizer, experts=task.name)

        self.model.train()
        train(loss, self._parameters(task.name), self._plan(task.train, self.budget.steps, task.name), self.rate)
        self.model.eval().freeze_expert(task.name)
        self.model.teach(task.name, task.train, self.tokenizer)


class Sequential(Method):
    """One adapter, trained on one task after the other."""

    swept = "wide"

    def learn(self, stage: int) -> None:
        self.model = self.model or self._mixture(ONE, self.budget.wide)
        plan = self._plan(self._rows(stage), self.budget.steps, self.tasks[stage].name)
        self.model.train()
        train(self._loss, self._parameters(ONE), plan, self.rate)
        self.model.eval()

    def _rows(self, stage: int) -> list[Example]:
        return self.tasks[stage].train


class Replay(Sequential):
    """The same, with 2 % of every earlier task's rows among a task's own."""

    def _rows(self, stage: int) -> list[Example]:
        kept = [row for task in self.tasks[:stage] for row in task.train[: round(REPLAYED * len(task.train)) or 1]]
        return [*self.tasks[stage].train, *kept]


class OLora(Method):
    """O-LoRA (arXiv 2310.14152): a new adapter per task on top of the sum of the earlier ones, which are frozen, its A
    kept orthogonal to theirs: λ Σ |A_i A_tᵀ|, summed over entries, earlier tasks and modules, λ = 0.5."""

    swept = "rank"

    @property
    def force(self) -> dict[str, Any]:
        return {"routing_weights": torch.ones(self.model.num_experts)}

    def learn(self, stage: int) -> None:
        name = self.tasks[stage].name
        if self.model is None:
            self.model = self._mixture(name, self.budget.rank)
        else:
            for earlier in self.model.expert_names:
                self.model.freeze_expert(earlier)
            self._draw(name)
            self.model.add_expert(name)
        earlier: dict[str, list[Tensor]] = {}
        for other in self.model.expert_names[:-1]:
            for key, tensor in self._downs(other).items():
                earlier.setdefault(key, []).append(tensor.detach())
        fixed = {key: torch.cat(tensors) for key, tensors in earlier.items()}

        def loss(rows: Sequence[Example]) -> Tensor:
            overlap = sum((fixed[key] @ a.T).abs().sum() for key, a in self._downs(name).items() if fixed)
            return self._loss(rows) + ORTHOGONALITY * overlap

        self.model.train()
        plan = self._plan(self.tasks[stage].train, self.budget.steps, name)
        train(loss, self._parameters(name), plan, self.rate)
        self.model.eval()

    def _downs(self, name: str) -> dict[str, Tensor]:
        """The matrices A of one expert by key."""
        return {part.key: part.tensor for part in self.model.expert_tensors(name) if "lora_A" in part.key}


class Joint(Method):
    """One adapter on the rows of all tasks, shuffled: one schedule, of which a stage is a part."""

    swept = "wide"
    sequential = False

    def learn(self, stage: int) -> None:
        self.model = self.model or self._mixture(ONE, self.budget.wide)
        steps = self.budget.steps
        whole = self._plan([row for task in self.tasks for row in task.train], steps * len(self.tasks), "joint")
        self.model.train()
        self.optimizer = train(
            self._loss,
            self._parameters(ONE),
            whole[stage * steps : (stage + 1) * steps],
            self.rate,
            first=stage * steps,
            total=len(whole),
            state=self.optimizer,
        )
        self.model.eval()


METHODS: dict[str, type[Method]] = {
    "ours": Ours,
    "base": Base,
    "sequential": Sequential,
    "olora": OLora,
    "joint": Joint,
    "replay": Replay,
}
"""In the order they are run."""


def rate_loss(
    base: str, tokenizer: PreTrainedTokenizerBase, task: Task, budget: Budget, rank: int, rate: float
) -> float:
    """Loss on a task's spare rows (its own without any) after training one adapter of a rank at a rate."""
    method = Sequential(base, tokenizer, [task], Budget(**{**vars(budget), "wide": rank}), rate)
    method.learn(0)
    rows = task.spare or task.train
    parts = [rows[i : i + budget.batch] for i in range(0, len(rows), budget.batch)]
    with torch.no_grad():
        losses = [float(completion_loss(method.model, part, tokenizer, **method.force)) * len(part) for part in parts]
    return sum(losses) / len(rows)
