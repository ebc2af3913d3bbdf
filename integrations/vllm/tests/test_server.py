"""The OpenAI server: NAME is routed, NAME:red forced, all at once; a name that is nobody's is an error.

With the middleware it says by which weights each token was written.
"""

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

from comparison import TIE, WEIGHTS, check, reference

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


NAMES = ("red", "green", "blue", "white")
ROUTING = ("--middleware", "dylora_moe_vllm.middleware.Routing")
ROUTING += ("--worker-cls", "dylora_moe_vllm.worker.RecordingWorker")


def ask_routing(client: openai.OpenAI, model: str, row: dict, stream: bool) -> list[dict]:
    """What the server says of the tokens it wrote after a row's prompt."""
    new = len(row["tokens"])
    extra = {"min_tokens": new, "ignore_eos": True, "routing": True}
    asked = {"model": model, "prompt": row["prompt"], "max_tokens": new, "temperature": 0, "extra_body": extra}
    if not stream:
        return client.completions.create(**asked).choices[0].routing
    choices = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    assert len(choices) > 1
    assert not any(hasattr(choice, "routing") for choice in choices[:-1])
    return choices[-1].routing


def test_routing(references: Path, tmp_path: Path) -> None:
    folder, answers = reference("top2", references)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    arguments = [*ROUTING, "--chat-template", template, "--lora-modules", f"mix:red={folder}/selectors/red"]
    with serving(folder, tmp_path / "log", *arguments) as client:
        jobs = [
            (model, answers[who][number], stream)
            for number in range(12)
            for model, who in (("mix", "routed"), ("mix:red", "red"))
            for stream in (False, True)
        ]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda job: ask_routing(client, *job), jobs))
        equal, near = 0, 0
        for (model, row, _), entries in zip(jobs, found, strict=True):
            assert [each["token_id"] for each in entries] == row["tokens"]
            first = len(row["prompt"]) - 1
            for at, each in enumerate(entries):
                expected = row["routing"][first + at] if model == "mix" else [1.0, 0.0, 0.0, 0.0]
                ours = [each["weights"].get(name, 0.0) for name in NAMES]
                if max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < WEIGHTS:
                    equal += 1
                    assert each["weights"][each["expert"]] == max(each["weights"].values())
                else:
                    assert row["tie"][at] < TIE
                    near += 1
        print(f"\nCOMPARED server: weights of {equal} tokens equal, {near} near ties, streamed and not")

        chat = {"model": "mix", "messages": [{"role": "user", "content": "abc def"}], "max_tokens": 8, "temperature": 0}
        extra = {"routing": True, "return_token_ids": True}
        whole = client.chat.completions.create(**chat, extra_body=extra)
        row = {"prompt": whole.prompt_token_ids, "tokens": whole.choices[0].token_ids}
        assert [each["token_id"] for each in whole.choices[0].routing] == row["tokens"]
        # the tiny tokenizer's tokens may be parts of a character, which is then never whole
        assert "".join(each["token"] for each in whole.choices[0].routing).startswith(whole.choices[0].message.content)
        *_, last = client.chat.completions.create(**chat, stream=True, extra_body={"routing": True})
        assert last.choices[0].routing == whole.choices[0].routing
        if len(row["tokens"]) == 8:
            assert ask_routing(client, "mix", row, stream=False) == whole.choices[0].routing

        plain = client.completions.create(model="mix", prompt=row["prompt"], max_tokens=2)
        assert not hasattr(plain.choices[0], "routing")
        with pytest.raises(openai.BadRequestError, match="routing with n=2"):
            client.completions.create(model="mix", prompt="a", n=2, extra_body={"routing": True})
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.completions.create(model="mix:nobody", prompt="a", extra_body={"routing": True})
