"""Tiny mixtures with experts strong enough to change answers, exported, and what the library itself answers, greedily.

    python reference.py OUT CASE...

Runs in the library's environment, not in vLLM's. Writes OUT/CASE/ as `dylora-moe export --to vllm` does, and
OUT/CASE.json: for `routed` and every forced name, per prompt the tokens, the gap between the two best logits at each
token and the smallest gap so far between the scores of the last output that was kept and the first that was not; for
`routed` the routing weights at every position but the last, too.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.base.embedded import embedded_base

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))
from tinybase import tiny_tokenizer

VOCAB = 512
CHUNK = 64
"""Tokens that vLLM reads at once in the comparisons; prompts are shorter and longer than that."""

# the tokenizer's end of text, which vLLM forbids as well while an answer is shorter than it must be
TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
GROUPED: dict[str, Any] = TOKENS | {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,
}
WITHOUT_HEAD_DIM = {key: value for key, value in GROUPED.items() if key != "head_dim"}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": WITHOUT_HEAD_DIM,
    "qwen3": GROUPED,
    "mistral": GROUPED | {"sliding_window": None},
    "phi3": WITHOUT_HEAD_DIM | {"sliding_window": None},
    "gemma2": GROUPED | {"sliding_window": 64, "query_pre_attn_scalar": 32},
    "gemma3_text": GROUPED | {"sliding_window": 64, "query_pre_attn_scalar": 32},
    "opt": TOKENS
    | {
        "hidden_size": 128,
        "ffn_dim": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": 128,
        "init_std": 0.12,
    },
    "gpt2": TOKENS
    | {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_inner": 192, "n_positions": 512, "initializer_range": 0.12},
    "falcon": TOKENS
    | {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "max_position_embeddings": 512,
        "initializer_range": 0.12,
    },
    "gpt_neox": TOKENS
    | {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.12,
    },
}
FORCED = ("red", "green", "base")
NAMES = ("red", "green", "blue", "white", "black", "brown", "grey", "pink")


@dataclass(frozen=True)
class Case:
    """A mixture and what it is asked.

    Attributes:
        base: of `FAMILIES`, with another configuration; or `"smollm2"`.
        experts: how many.
        ranks: theirs, in turn.
        config: further settings of the mixture.
        prompts: how many.
        new: tokens of each answer.
        strength: standard deviation of the experts' B.
        overrides: of the base's configuration.
        forced: names asked for besides routed.
        mixtures: fixed ones, by the names of their selectors.
        long: prompts may be longer than a chunk.
    """

    base: str = "llama"
    experts: int = 4
    ranks: tuple[int, ...] = (4, 8, 2, 16)
    config: dict[str, Any] = field(default_factory=dict)
    prompts: int = 48
    new: int = 24
    strength: float = 0.1
    overrides: dict[str, Any] = field(default_factory=dict)
    forced: tuple[str, ...] = ()
    mixtures: dict[str, dict[str, float]] = field(default_factory=dict)
    long: bool = True


CASES: dict[str, Case] = {
    "top2": Case(forced=FORCED),
    "top1": Case(config={"top_k": 1}),
    "dense": Case(config={"top_k": 4}),
    "two": Case(experts=2),
    "eight": Case(experts=8),
    "fixed": Case(prompts=12, forced=("red", "half"), mixtures={"half": {"red": 0.25, "blue": 0.5}}),
    "prefix": Case(config={"granularity": "prefix"}, prompts=24, forced=FORCED),
    "linear": Case(config={"router_type": "linear"}, prompts=24),
    "temperature": Case(config={"temperature": 0.5}, prompts=24),
    "route_to_base": Case(config={"route_to_base": True}, prompts=24),
    "closed_form": Case(config={"router_type": "closed_form"}, prompts=24),
    "closed_form_prefix": Case(config={"router_type": "closed_form", "granularity": "prefix"}, prompts=24),
    "prefix_window": Case(
        "mistral", config={"granularity": "prefix"}, prompts=12, overrides={"sliding_window": 32, "head_dim": 32}
    ),
    "prefix_gemma2": Case("gemma2", config={"granularity": "prefix"}, prompts=12),
    "smollm2": Case("smollm2", ranks=(16, 8, 16, 4), prompts=48, strength=0.02, forced=FORCED, long=False),
} | {f"family_{family}": Case(family, 3, (4, 8), prompts=12, new=12, forced=FORCED) for family in FAMILIES}


def base_of(case: Case, folder: Path) -> str:
    """The case's base, written."""
    if case.base == "smollm2":
        return str(embedded_base())
    torch.manual_seed(1)
    config = CONFIG_MAPPING[case.base](**FAMILIES[case.base] | case.overrides)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def mixture_of(case: Case, base: str) -> DyLoraMoE:
    """The case's mixture with random experts and a decided router."""
    torch.manual_seed(case.experts)
    names = list(NAMES[: case.experts])
    ranks = {name: case.ranks[i % len(case.ranks)] for i, name in enumerate(names)}
    experts = {
        name: LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")
        for name, r in ranks.items()
    }
    config = {"top_k": 2, "target_modules": "all-linear", "expert_names": names, "num_experts": case.experts}
    model = DyLoraMoE.from_base(base, MoELoraConfig(**config | case.config), expert_configs=experts).eval()
    for layer in model.experts.layers:
        for matrix in layer.lora_B.values():
            matrix.weight.normal_(0, case.strength)
    if case.config.get("router_type") == "closed_form":
        letters = ["abcde", "fghij", "klmno", "pqrst"]
        model.teach_many({name: _texts(letters[i]) for i, name in enumerate(names)}, tiny_tokenizer())
    else:
        model.router.up.mul_(6)
    return model


def _texts(letters: str, rows: int = 24) -> list[str]:
    draw = torch.randint(0, len(letters), (rows, 40)).tolist()
    return ["".join(letters[at] for at in row) for row in draw]


def prompts_of(case: Case, vocabulary: int) -> list[list[int]]:
    """Token ids, of many lengths; every third begins with the same 64, which a prefix cache finds again."""
    draw = torch.Generator().manual_seed(0)
    found = []
    shared = torch.randint(3, vocabulary, (64,), generator=draw).tolist()
    for number in range(case.prompts):
        longest = 100 if case.long and number % 4 == 0 else 24
        length = int(torch.randint(3, longest, (1,), generator=draw))
        own = torch.randint(3, vocabulary, (length,), generator=draw).tolist()
        found.append(shared + own if number % 3 == 0 else own)
    return found


@torch.no_grad()
def answers_of(model: DyLoraMoE, prompts: list[list[int]], new: int, **forced: Any) -> list[dict[str, Any]]:
    """What the library answers, a row by itself as the batch would round otherwise."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=0,
            **forced,
        )
        best = torch.stack(out.logits, 1)[0].topk(2).values
        row = {"prompt": prompt, "tokens": out.sequences[0, len(prompt) :].tolist()}
        row["gap"] = (best[:, 0] - best[:, 1]).tolist()
        row["tie"] = [float("inf")] * new if forced else _ties(model, out.sequences)[len(prompt) - 1 :]
        if not forced:
            row["routing"] = model(out.sequences).routing_weights[0, :-1].tolist()
        rows.append(row)
    return rows


def _ties(model: DyLoraMoE, sequence: Tensor) -> list[float]:
    """The smallest gap up to each token between the score that was just kept and the one that was just not."""
    scores, k = model(sequence).router_logits, model.moe_config.top_k
    if k >= scores.shape[-1]:
        return [float("inf")] * (sequence.shape[1] - 1)
    best = scores.sort(-1, descending=True).values[0]
    return (best[:, k - 1] - best[:, k]).cummin(0).values.tolist()[:-1]


def write(name: str, out: Path) -> None:
    """One case: folder and answers."""
    case = CASES[name]
    model = mixture_of(case, base := base_of(case, out / "bases" / name))
    model.export_vllm(out / name, case.mixtures)
    vocabulary = VOCAB if case.base != "smollm2" else model.config.vocab_size
    prompts = prompts_of(case, vocabulary)
    answers = {"routed": answers_of(model, prompts, case.new)}
    for who in case.forced:
        fixed = case.mixtures.get(who)
        weights = torch.tensor([(fixed or {}).get(expert, 0.0) for expert in model.expert_names])
        forced = {"routing_weights": weights} if fixed else {"experts": who}
        answers[who] = answers_of(model, prompts, case.new, **forced)
    loads = torch.stack([model(torch.tensor([p])).routing_weights.mean((0, 1)) for p in prompts]).mean(0)
    (out / f"{name}.json").write_text(json.dumps({"answers": answers}))
    changed = sum(a["tokens"] != b["tokens"] for a, b in zip(answers["routed"], answers.get("base", []), strict=False))
    print(f"{name}: {base}, load {[round(x, 3) for x in loads.tolist()]}, {changed} answers differ from the base's")


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    for name in sys.argv[2:] or CASES:
        write(name, out)
