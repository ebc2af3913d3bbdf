"""Invariant 16: on a separable problem no expert dies and routing is right.

Task t adds SHIFTS[t] to a symbol modulo 16. Its symbols are tokens of its own, whose embeddings share a direction.
"""

import pytest
import torch
from torch import Tensor

from dylora_moe import DyLoraMoE
from tiny import NAMES, WIDTH, every_architecture, tiny_base, tiny_config

SHIFTS = (1, 7, 12)


def examples(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids `[rows, 6]` that count up by the shift of a task, and the tasks `[rows]`."""
    task = torch.randint(len(SHIFTS), (rows, 1), generator=generator)
    first = torch.randint(16, (rows, 1), generator=generator)
    symbols = (first + torch.tensor(SHIFTS)[task] * torch.arange(6)) % 16
    return 10 + 16 * task + symbols, task.flatten()


class Run:
    """A mixture of three experts on a random base of two layers, and its training data."""

    def __init__(self, architecture: str, **settings):
        self.generator = torch.Generator().manual_seed(1)
        layers = {"n_layer": 2} if architecture == "gpt2" else {"num_hidden_layers": 2}
        config = tiny_config(r=8, lora_alpha=16, init_lora_weights=True, router_layer=0, **settings)
        base = tiny_base(architecture, **layers)
        for task, direction in enumerate(torch.eye(len(SHIFTS), WIDTH)):
            base.get_input_embeddings().weight.data[10 + 16 * task :][:16] += 1.5 * direction
        self.model = DyLoraMoE(base, config)

    def train(self, steps: int, learning_rate: float, forced: bool = False) -> None:
        self.model.train()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=learning_rate)
        for _ in range(steps):
            ids, task = examples(16, self.generator)
            experts = [NAMES[t] for t in task.tolist()] if forced else None
            self.model(ids, labels=ids, experts=experts).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        self.model.eval()

    @torch.no_grad()
    def accuracy(self, *, oracle: bool = False, **options) -> float:
        """Share of the right next tokens; the oracle knows the task."""
        ids, task = examples(200, torch.Generator().manual_seed(2))
        if oracle:
            options["experts"] = [NAMES[t] for t in task.tolist()]
        return float((self.model(ids, **options).logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean())

    @torch.no_grad()
    def confusion(self) -> Tensor:
        """Share of the tokens of each task `[task]` whose strongest expert is `[expert]`."""
        ids, task = examples(200, torch.Generator().manual_seed(3))
        best = self.model(ids).routing_weights.argmax(-1)
        return torch.stack(
            [best[task == t].flatten().bincount(minlength=3) / (best[task == t].numel()) for t in range(3)]
        )

    def load(self) -> dict[str, float]:
        with self.model.trace() as trace, torch.no_grad():
            self.model(examples(200, torch.Generator().manual_seed(4))[0])
        return trace.load()


@every_architecture
def test_a_router_finds_the_expert_of_each_task(architecture):
    run = Run(architecture)
    assert run.accuracy() < 0.1
    run.train(60, 2e-2, forced=True)
    oracle = run.accuracy(oracle=True)
    assert oracle > 0.6
    for name in NAMES:
        assert run.accuracy(experts=name) < 0.5  # each expert knows its own task only
        run.model.freeze_expert(name)
    run.train(60, 1e-2)
    assert run.confusion().diag().min() > 0.9
    assert min(run.load().values()) > 0.2
    assert run.accuracy() > oracle - 0.05
    run.model.moe_config.top_k = 1
    assert run.accuracy() > oracle - 0.05


@pytest.mark.parametrize(
    ("architecture", "settings"), [("llama", {}), ("gpt2", {"train_top_k": 2, "balance_loss": "switch"})], ids=str
)
def test_joint_training_keeps_every_expert_alive(architecture, settings):
    run = Run(architecture, **settings)
    run.train(100, 1e-2)
    assert run.accuracy() > 0.9
    assert min(run.load().values()) > 0.1
    for name in NAMES:
        assert all(t.tensor.abs().max() > 0 for t in run.model.expert_tensors(name)), name
