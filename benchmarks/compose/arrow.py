"""Arrow routing (Ostapenko et al. 2024, arXiv 2405.11157) of trained adapters, on the held-out rows of `measure.py`.

    python benchmarks/compose/arrow.py --data FOLDER --mixture FOLDER

Every layer chooses an expert for every token by |x · v|, where v is the first right singular vector of the expert's B·A
there. Needs adapters and no texts; `--mixture` is one whose experts are named after the domains, as
`benchmarks/quality/measure.py` trains them. Written to `results/arrow.json`: shares of prompt tokens, and of prompts by
the sum of all layers' and tokens' softmax, that go to the right expert.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

import torch
from measure import FOUR, RESULTS, rows_of
from torch import Tensor

from dylora_moe import DyLoraMoE
from dylora_moe.session import Session
from dylora_moe.skills.features import evaluating
from dylora_moe.skills.reading import read_rows


def directions(model: DyLoraMoE) -> dict[str, Tensor]:
    """Layer → `[E, D_in]` first right singular vectors of B·A, of the experts in the order of their names."""
    found = {}
    for layer in model.routed_layers:
        vectors = []
        for name in model.expert_names:
            A, B = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
            q, r = torch.linalg.qr(A.T)  # A = rᵀ qᵀ, so that the singular vectors of B rᵀ are those of B A along q
            vectors.append(q @ torch.linalg.svd(B @ r.T, full_matrices=False).Vh[0])
        found[layer.routing_name] = torch.stack(vectors).float()
    return found


def main() -> None:
    """Measure, and write the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder per domain")
    parser.add_argument("--mixture", type=Path, required=True, help="a mixture with an expert per domain")
    parser.add_argument("--held-out", type=int, default=40, help="held-out rows per domain")
    asked = parser.parse_args()
    session = Session(asked.mixture)
    model, vectors, chosen = session.model, directions(session.model), []

    def note(layer, args) -> None:
        chosen.append((args[0][0] @ vectors[layer.routing_name].T).abs())

    handles = [layer.register_forward_pre_hook(note) for layer in model.routed_layers]
    found = {}
    with evaluating(model.modules()):
        for name in FOUR:
            own, tokens, prompts = model.expert_names.index(name), [], []
            for row in read_rows(
                rows_of(asked.data / name / "test.jsonl", asked.held_out, "held out"), session.tokenizer
            ):
                chosen.clear()
                model(torch.tensor([row.ids[: row.prompt]]), experts="base")
                scores = torch.stack(chosen)  # [layers, S, E]
                tokens.append(float((scores.argmax(-1) == own).double().mean()))
                prompts.append(float(scores.softmax(-1).sum((0, 1)).argmax() == own))
            found[name] = {"rows": len(prompts), "prompts": mean(prompts), "tokens": mean(tokens)}
            print(name, found[name], flush=True)
    for handle in handles:
        handle.remove()
    (RESULTS / "arrow.json").write_text(json.dumps({"mixture": asked.mixture.name, "domains": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
