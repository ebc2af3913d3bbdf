"""Adapters that exist already and a few texts each, made a routed mixture without any training."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base.loading import load_base, load_tokenizer
from .checkpoint.adapters import ADAPTER_CONFIG, ADAPTER_TENSORS
from .checkpoint.card import public_name
from .checkpoint.files import local_folder, read_json
from .checkpoint.mixture import check_room
from .config import MoELoraConfig, check_expert_name
from .data.examples import Example
from .data.section import DataRecipe
from .data.sources import load_examples
from .model import DyLoraMoE
from .skills.reading import SEPARATOR

GRANULARITY = "sequence"
"""How a composed mixture routes: by few texts of 13 domains each single tokens are told apart at 75 to 80 %, whole
prompts at 95 to 98."""
FEW_TEXTS = 5
"""With fewer texts an expert is known too badly to go without a word."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ingredient:
    """One expert to be.

    Attributes:
        name: of the expert.
        adapter: folder or hub id of a stock PEFT LoRA adapter.
        texts: a file with texts of the kind that the adapter is for.
    """

    name: str
    adapter: str
    texts: Path

    @classmethod
    def parse(cls, text: str) -> Ingredient:
        """Of `NAME=ADAPTER:TEXTS`; the last colon parts adapter and texts.

        Raises:
            ValueError: another form.
        """
        name, _, rest = text.partition("=")
        adapter, _, texts = rest.rpartition(":")
        if not (name.strip() and adapter and texts):
            raise ValueError(f"--expert {text!r}: expected NAME=ADAPTER:TEXTS, for example sql=adapters/sql:sql.jsonl.")
        return cls(name.strip(), adapter, Path(texts).expanduser())


def read_texts(ingredients: Sequence[Ingredient], separator: str = SEPARATOR) -> dict[str, list[Example]]:
    """The texts of each expert to be; warns where they are few.

    Raises:
        ValueError: a name that is there twice or cannot be an expert's, or a file that is missing or cannot be used.
    """
    texts: dict[str, list[Example]] = {}
    for ingredient in ingredients:
        check_expert_name(ingredient.name, taken=list(texts))
        rows = texts[ingredient.name] = examples_in(ingredient.texts, ingredient.name, separator)
        if len(rows) < FEW_TEXTS:
            logger.warning(
                "%s: %d text%s for %r; with fewer than %d, texts of its kind often go elsewhere. Give five to twenty.",
                *(ingredient.texts, len(rows), "" if len(rows) == 1 else "s", ingredient.name, FEW_TEXTS),
            )
    return texts


def examples_in(file: Path, name: str, separator: str) -> list[Example]:
    """The rows of a file, for an expert.

    Raises:
        ValueError: there is no such file, or it cannot be used.
    """
    if not file.is_file():
        raise ValueError(f"no file {str(file)!r} with texts for {name!r}.")
    return load_examples(name, DataRecipe(train=str(file), separator=separator), "train")


def digest(file: Path) -> str:
    """What to note of the file that rows are from."""
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def base_of(ingredients: Sequence[Ingredient]) -> str:
    """The base that all adapters name.

    Raises:
        ValueError: they name none, or different ones.
    """
    named: dict[str, str] = {}
    for ingredient in ingredients:
        folder = local_folder(ingredient.adapter, [ADAPTER_CONFIG, ADAPTER_TENSORS])
        named[ingredient.name] = str(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    if len({public_name(base) for base in named.values()}) > 1:
        listed = ", ".join(f"{name}: {base or 'none'}" for name, base in named.items())
        raise ValueError(f"the adapters name different bases ({listed}); say which one is right with --base.")
    base = next(iter(named.values()))
    if not base:
        raise ValueError("the adapters name no base; say which one they were made for with --base.")
    return base


def compose(
    directory: Path,
    ingredients: Sequence[Ingredient],
    texts: Mapping[str, Sequence[Example]],
    base: str | None = None,
    separator: str = SEPARATOR,
    chat: bool | None = None,
    router_layer: int | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> DyLoraMoE:
    """Make a mixture of adapters, teach it their texts and save it.

    Args:
        directory: where it is saved; must not hold a mixture yet.
        ingredients: the experts to be.
        texts: of each, see `read_texts`.
        base: the base's name or folder; default the one that the adapters name.
        separator: what stands between prompt and completion where no chat template is used.
        chat: whether prompts go through the base's chat template; default if some text is made of messages.
        router_layer: whose input the router reads; default a quarter of the way up.
        progress: called with an expert's name and how many of its texts were read.

    Raises:
        ValueError: nothing to compose, a mixture in the way, or what the adapters, texts or base lack.
        CheckpointError: an adapter that is missing, damaged or made for another architecture.
    """
    if not ingredients:
        raise ValueError("nothing to compose; give at least one --expert NAME=ADAPTER:TEXTS.")
    check_room(directory)
    name = base or base_of(ingredients)
    try:
        model, saved_name = load_base(name, {})
        tokenizer: Any = load_tokenizer(None, name)
    except OSError as error:
        who = "--base is" if base else "the adapters name the base"
        raise ValueError(f"{who} {name}, which cannot be loaded: {error} Say where it is with --base.") from error
    config = MoELoraConfig(
        expert_names=[ingredient.name for ingredient in ingredients],
        router_type="closed_form",
        granularity=GRANULARITY,
        router_layer=router_layer,
        target_modules="all-linear",
    )
    mixture = DyLoraMoE.from_adapters(model, {each.name: each.adapter for each in ingredients}, config).eval()
    mixture.base_name = saved_name
    mixture.chat = any(row.form == "messages" for rows in texts.values() for row in rows) if chat is None else chat
    sources = {each.name: digest(each.texts) for each in ingredients}
    mixture.teach_many({name: texts[name] for name in sources}, tokenizer, separator, sources, progress)
    mixture.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return mixture
