"""An independent reading of a folder for vLLM, from its files alone: which weights each token gets, and what they add.

Shapes: S tokens of one row, D hidden size, E experts, n router outputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM


class Folder:
    """The files, and a stock base made of those that are not ours."""

    def __init__(self, folder: Path):
        self.folder = folder
        config = json.loads((folder / "config.json").read_text())
        self.section = config.pop("dylora_moe")
        (architecture,) = config.pop("architectures")
        assert architecture.startswith("DyLoRAMoE")
        self.tensors = load_file(folder / "dylora.safetensors")
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
        assert type(base).__name__ == architecture.removeprefix("DyLoRAMoE")
        weights: dict[str, Tensor] = {}
        for file in folder.glob("*.safetensors"):
            weights |= load_file(file)
        own = set(self.tensors)
        missing, unexpected = base.load_state_dict({k: v for k, v in weights.items() if k not in own}, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}  # tied
        base.tie_weights()
        self.base = base

    def router(self, key: str) -> Tensor:
        return self.tensors[f"dylora.router.{key}"]

    def weights_of(self, hidden: Tensor) -> Tensor:
        """`[S, E]` of one row's `hidden [S, D]`, by the page that says how the folder is read."""
        s = self.section
        x = nn.functional.layer_norm(hidden.float(), hidden.shape[-1:])
        if s["router_type"] == "mlp":
            assert self.router("down").shape[0] == s["router_hidden_size"]
            scores = nn.functional.silu(x @ self.router("down").T) @ self.router("up").T
        elif s["router_type"] == "linear":
            scores = x @ self.router("up").T
        else:
            scores = x @ self.router("weight").T + self.router("bias")
        assert scores.shape[-1] == len(s["experts"]) + s["route_to_base"]
        rows = []
        for t in range(len(scores)):
            score = (scores[: t + 1].mean(0) if s["granularity"] == "prefix" else scores[t]) / s["temperature"]
            score = score.tolist()
            for column in s["closed"]:
                score[column] = float("-inf")
            best = sorted(range(len(score)), key=lambda column: -score[column])[: s["top_k"]]
            exponentials = [torch.tensor(v).exp().item() if i in best else 0.0 for i, v in enumerate(score)]
            rows.append([value / sum(exponentials) for value in exponentials[: len(s["experts"])]])
        return torch.tensor(rows)

    def logits(self, ids: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits `[S, V]` of one row of ids `[S]`, and the weights `[S, E]`, routed or given."""
        now: dict[str, Any] = {"weights": weights}
        hooks = []
        layers = next(m for m in self.base.modules() if isinstance(m, nn.ModuleList))
        assert len(layers) == self.section["layers"]

        def decide(module, args, kwargs):
            if weights is None:
                now["weights"] = self.weights_of((args[0] if args else kwargs["hidden_states"])[0])

        hooks.append(layers[self.section["router_layer"]].register_forward_pre_hook(decide, with_kwargs=True))

        def adding(path: str, carried: list[tuple[int, int, float]]):
            A, B = self.tensors[f"dylora.experts.{path}.A"], self.tensors[f"dylora.experts.{path}.B"]
            assert A.shape[0] == B.shape[1] == sum(rank for _, rank, _ in carried)

            def add(module, args, output):
                x, at = args[0], 0
                for column, rank, scaling in carried:
                    a, b = A[at : at + rank], B[:, at : at + rank]
                    output = output + now["weights"][:, column, None] * scaling * (x @ a.T @ b.T)
                    at += rank
                return output

            return add

        for path, carried in self.section["modules"].items():
            hooks.append(self.base.get_submodule(path).register_forward_hook(adding(path, carried)))
        try:
            with torch.no_grad():
                return self.base(ids[None]).logits[0], now["weights"]
        finally:
            for hook in hooks:
                hook.remove()

    def selector(self, name: str) -> Tensor:
        """The weights `[E]` of a selector, by its tensors."""
        tensors = load_file(self.folder / "selectors" / name / "adapter_model.safetensors")
        key = "base_model.model.dylora_select.lora_{}.weight"
        assert set(tensors) == {key.format("A"), key.format("B")}
        assert torch.equal(tensors[key.format("B")], torch.zeros(1, 1))
        return tensors[key.format("A")][0]
