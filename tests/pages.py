"""The code blocks of the documentation, and a folder in which they run."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from peft import LoraConfig, get_peft_model

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.serving import command
from runs import small, write
from serving.live import listening
from tinybase import tiny_base, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ADDRESS = "http://127.0.0.1:8000"
"""Where pages say that a server is."""
STRANGERS = {"sql": ["q_proj", "v_proj"], "law": ["down_proj"], "math": ["q_proj", "k_proj", "up_proj"]}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str

    @property
    def key(self) -> str:
        """Its first line, by which it can be named."""
        return self.text.splitlines()[0].strip()


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in some languages, in order."""
    found = [Block(page.name, *match) for match in FENCE.findall(page.read_text(encoding="utf-8"))]
    return [block for block in found if block.language in languages]


def furnish_adapters(folder: Path, base: str) -> None:
    """Put three strangers' adapters for `base` and their texts into `folder`, and a file of another skill."""
    for rank, (name, targets) in enumerate(STRANGERS.items(), start=2):
        torch.manual_seed(rank)
        config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        adapter = get_peft_model(tiny_base(), config)
        adapter.peft_config["default"].base_model_name_or_path = base
        adapter.save_pretrained(folder / "adapters" / name)
        rows = [{"text": f"{name} text number {i}"} for i in range(20)]
        for file in (f"{name}.jsonl", f"{name}-test.jsonl"):
            (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    dishes = [{"prompt": f"How long does dish {i} take?", "completion": f"{i} minutes."} for i in range(12)]
    (folder / "cooking.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dishes))


def furnish(folder: Path, base: str) -> None:
    """Put into `folder` what readers are said to have: strangers' adapters, their texts, a finished mixture."""
    furnish_adapters(folder, base)
    config = MoELoraConfig(expert_names=["json", "sql", "date", "cart"], r=2, target_modules="all-linear")
    mixture = DyLoraMoE.from_base(base, config)
    mixture.save_pretrained(folder / "runs" / "skills")
    tiny_tokenizer().save_pretrained(folder / "runs" / "skills")


def furnish_recipes(folder: Path, base: str) -> None:
    """Put the recipes into `folder / "recipes"`, each with little to do."""
    (folder / "recipes").mkdir()
    for file in (ROOT / "recipes").glob("*.yaml"):
        content = small(yaml.safe_load(file.read_text(encoding="utf-8")), base, folder)
        write(content, folder / "recipes" / file.name)


class Background:
    """What `dylora-moe serve` has made ready, listening beside what follows; one server at a time."""

    def __init__(self):
        self.url = ""
        self._servers = ExitStack()

    def run(self, app: Any, *_: Any) -> None:
        """Listen at `url`, instead of the server before."""
        self.stop()
        self.url = self._servers.enter_context(listening(app))

    def stop(self) -> None:
        """End the server, if there is one."""
        self._servers.close()

    def curl(self, words: list[str]) -> str:
        """What curl is answered; asked again while the server says that it is getting ready."""
        words = ["curl", "-sS", "--fail-with-body", *(word.replace(ADDRESS, self.url) for word in words)]
        deadline = time.monotonic() + 60
        while True:
            done = subprocess.run(words, capture_output=True, text=True, timeout=60)
            if done.returncode == 0:
                return done.stdout
            assert '"code":"preparing"' in done.stdout, f"{words}: {done.stdout}{done.stderr}"
            assert time.monotonic() < deadline, done.stdout
            time.sleep(0.1)


@contextmanager
def background(monkeypatch: Any) -> Iterator[Background]:
    """Within the block `dylora-moe serve` loads as always, then returns and goes on in a thread, at a free port."""
    servers = Background()
    monkeypatch.setattr(command, "_run", servers.run)
    try:
        yield servers
    finally:
        servers.stop()
