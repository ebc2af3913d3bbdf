"""The OpenAI server: NAME is routed, NAME:red forced, all at once; a name that is nobody's is an error."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from comparison import check, reference

BIND = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@contextmanager
def serving(folder: Path, log: Path, *arguments: str, **environment: str) -> Iterator[openai.OpenAI]:
    """A server of the folder under the name `mix`, and a client of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "mix", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "256", "--max-num-batched-tokens", "64", "--max-num-seqs", "16"]
    command += ["--block-size", "32", "--enable-lora", "--max-loras", "5", "--max-lora-rank", "8", *arguments]
    with open(log, "w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | BIND | environment)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        for _ in range(300):
            assert server.poll() is None, log.read_text()[-4000:]
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(1)
        yield client
    finally:
        server.terminate()
        server.wait(60)


def ask(client: openai.OpenAI, model: str, row: dict) -> dict:
    """What the server answers to a row's prompt."""
    new = len(row["tokens"])
    extra = {"min_tokens": new, "ignore_eos": True, "return_token_ids": True}
    out = client.completions.create(model=model, prompt=row["prompt"], max_tokens=new, temperature=0, extra_body=extra)
    return {"tokens": out.choices[0].token_ids, "cached": 0}


@pytest.mark.parametrize("found_by", ["lora-modules", "resolver"])
def test_server(found_by: str, references: Path, tmp_path: Path) -> None:
    folder, answers = reference("top2", references)
    names = {"routed": "mix"} | {who: f"mix:{who}" for who in answers if who != "routed"}
    modules = [f"mix:{who}={folder}/selectors/{who}" for who in ("red", "green", "blue", "white", "base")]
    arguments = ["--lora-modules", *modules] if found_by == "lora-modules" else []
    environment = {} if arguments else {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with serving(folder, tmp_path / "log", *arguments, **environment) as client:
        if arguments:
            assert {model.id for model in client.models.list()} >= set(names.values())
        jobs = [(who, answers[who][number]) for number in range(12) for who in names]
        with ThreadPoolExecutor(8) as pool:
            outs = list(pool.map(lambda job: ask(client, names[job[0]], job[1]), jobs))
        for at, who in enumerate(names):
            check(f"server, {found_by}, {names[who]}", outs[at :: len(names)], answers[who][:12])
        for nobody in ("mix:nobody", "red", "other:red", "mix:../red", "mix:"):
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                ask(client, nobody, answers["red"][0])
