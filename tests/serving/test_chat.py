"""`dylora-moe chat`: what it shows and obeys, in a pipe, for whoever types, and on a real terminal."""

from __future__ import annotations

import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dylora_moe.cli import app
from dylora_moe.serving import terminal as module
from dylora_moe.serving.conversation import Conversation
from dylora_moe.serving.terminal import COMMANDS, Terminal
from dylora_moe.session import Session
from dylora_moe.skills.background import background_texts
from serving.live import tiny_checkpoint
from serving.scripted import Scripted, token

ANSWER = [token(" I"), token(" am", 0.4, 0.3), token("\x1b[2J", 0.2, 0.8), token(" ok", 0.1, 0.1), token("\n")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("chat"), taught=True)


@pytest.fixture(scope="module")
def session(folder) -> Session:
    return Session(folder)


@pytest.fixture
def terminal(session, monkeypatch):
    """A terminal whose engine writes `answers`; what it shows is `terminal.console.file.getvalue()`."""

    def make(*answers, chat: bool = False, interactive: bool = True, width: int = 100, **how: Any) -> Terminal:
        monkeypatch.setattr(session, "chat", chat)
        template = "{% for m in messages %}{{ m.content }}{% endfor %}" if chat else None
        monkeypatch.setattr(session.tokenizer, "chat_template", template)
        conversation = Conversation(session, slot_length=100)
        conversation.engine = Scripted(*answers or [ANSWER])  # pyright: ignore[reportAttributeAccessIssue]
        how = {"color_system": "standard" if interactive else None, "force_terminal": interactive, **how}
        console, errors = (Console(file=io.StringIO(), width=width, **how) for _ in range(2))
        return Terminal(conversation, console, errors, "mine", interactive)

    return make


def shown(terminal: Terminal, *lines: str) -> str:
    """What some lines add to what is shown."""
    before = len(terminal.console.file.getvalue())
    for line in lines:
        terminal.handle(line)
    return terminal.console.file.getvalue()[before:]


def refused(terminal: Terminal, line: str) -> str:
    """What is said of a line that is wrong; nothing else is shown."""
    before = len(terminal.errors.file.getvalue())
    assert shown(terminal, line) == ""
    return re.sub(r"\x1b\[\d*m", "", terminal.errors.file.getvalue()[before:])


# ---------------------------------------------------------------------- answers


def test_every_token_has_the_colour_of_its_expert(terminal):
    first, rest = shown(terminal(), "who?").split("\n", 1)
    assert first == "\x1b[36mI\x1b[0m\x1b[2;36m am\x1b[0m\x1b[35m␛[2J\x1b[0m ok"  # cyan, dim, magenta, the base plain
    assert rest == "\x1b[2msql 54%, law 24%, base 22% · 5 tokens\x1b[0m\n"


def test_without_colours_nothing_is_lost(terminal):
    text = shown(terminal(color_system=None), "who?")
    assert text == "I am␛[2J ok\nsql 54%, law 24%, base 22% · 5 tokens\n"
    assert "\x1b[36m" not in shown(terminal(no_color=True), "who?")


def test_a_narrow_terminal_wraps_answers_itself(terminal):
    words = [token(f"word{n} ") for n in range(9)]
    text = shown(terminal(words, width=12, color_system=None), "who?")
    assert text.splitlines()[0] == " ".join(f"word{n}" for n in range(9))
    assert all(len(line) <= 12 for line in text.splitlines()[1:])


def test_what_cut_an_answer_short_is_said(terminal, monkeypatch):
    chat = terminal([token("1")] * 9)
    chat.conversation.max_new_tokens = 9
    monkeypatch.setattr(Scripted, "step", _cut(Scripted.step))
    assert "9 tokens, cut short (/set max-new-tokens allows more)" in shown(chat, "x")
    chat.conversation.max_new_tokens = 99
    assert "9 tokens, cut short (--slot-length allows more)" in shown(chat, "x")


def _cut(step):
    def cut(self):
        return [event._replace(finish_reason="length") if event.finish_reason else event for event in step(self)]

    return cut


def test_a_pipe_gets_plain_blocks(terminal):
    chat = terminal([token("one\ntwo\x1b")], [token(" ")], [token("three")], interactive=False)
    chat.read(io.StringIO("a\n\n  \nb\n/expert law\r\nc\n/quit\nd\n"))
    assert chat.console.file.getvalue() == "one\ntwo\x1b\n\n\n\nthree\n"
    assert [request.expert for request in chat.conversation.engine.requests] == [None, None, "law"]
    assert not chat.failed
    assert not chat.errors.file.getvalue()


def test_a_prompt_that_is_too_long_ends_nothing(terminal):
    chat = terminal(interactive=False)
    chat.read(["x" * 50 + "\n", "short\n"])
    assert "the prompt has 50 tokens" in chat.errors.file.getvalue()
    assert chat.console.file.getvalue() == "I am\x1b[2J ok\n"
    assert chat.failed


# ---------------------------------------------------------------------- commands


def test_two_slashes_begin_a_prompt(terminal, session):
    chat = terminal()
    shown(chat, "//etc/hosts?", "///")
    prompts = [session.tokenizer.decode(request.prompt) for request in chat.conversation.engine.requests]
    assert prompts == ["/etc/hosts?", "//"]


def test_who_answers(terminal):
    chat = terminal()
    assert "the router decides" in shown(chat, "/expert")
    assert "From now on the expert law answers" in shown(chat, "/expert law")
    assert shown(chat, "/expert").splitlines()[-1].endswith("code, base; law is forced.")
    shown(chat, "x", "/base", "x", "/route", "x")
    assert [request.expert for request in chat.conversation.engine.requests] == ["law", "base", None]
    assert "unknown expert 'lwa'; the experts are sql, law" in refused(chat, "/expert lwa")


def test_the_trace_names_the_experts_of_every_token(terminal):
    chat = terminal(color_system=None)
    assert "nothing was answered yet" in refused(chat, "/trace")
    shown(chat, "x")
    lines = shown(chat, "/trace").splitlines()
    assert [line.split("  ", 1)[1].strip() for line in lines[:4]] == [
        "sql 1.00",
        "sql 0.40, law 0.30, base 0.30",
        "law 0.80, sql 0.20",
        "base 0.80, sql 0.10, law 0.10",
    ]
    assert lines[0].startswith("' I'")
    table = [re.findall(r"[\w.%]+", line) for line in lines if "│" in line]
    assert table == [["sql", "54.0%", "60.0%"], ["law", "24.0%", "20.0%"], ["base", "22.0%", "20.0%"]]
    chat = terminal([])
    assert "0 tokens" in shown(chat, "x")
    assert "the last answer has no token" in refused(chat, "/trace")


def test_why(terminal, monkeypatch, tmp_path):
    monkeypatch.setenv("DYLORA_MOE_CACHE", str(tmp_path))
    monkeypatch.setattr("dylora_moe.model.background_texts", lambda: background_texts()[:20])
    chat = terminal(color_system=None)
    assert "nothing was asked yet" in refused(chat, "/why")
    shown(chat, "bccdbbccd")
    said, near = shown(chat, "/why").splitlines()
    assert re.fullmatch(
        r"(known|related): law \(p=[\d.]+\); p is the share of the taught texts .*|too short to say", said
    )
    assert re.fullmatch(r"nearest: law -?[\d.]+(, \w+ -?[\d.]+){4}", near)
    assert "20/20" in chat.errors.file.getvalue()


def test_settings(terminal):
    chat = terminal()
    assert shown(chat, "/set") == "temperature 0.0, max-new-tokens 256, seed random\n"
    assert shown(chat, "/set temperature 0.7", "/set max-new-tokens  5", "/set seed 3") == ""
    assert shown(chat, "/set") == "temperature 0.7, max-new-tokens 5, seed 3\n"
    for wrong, message in {
        "temperatur 1": "no setting 'temperatur'. Did you mean 'temperature'?",
        "temperature": "/set temperature : expected 0 (greedy) or a number above.",
        "temperature nan": "expected 0",
        "temperature -1": "expected 0",
        "temperature inf": "expected 0",
        "max-new-tokens 0": "expected a whole number from 1",
        "max-new-tokens 1.5": "expected a whole number from 1",
        f"seed {2**63}": "expected a whole number from 0",
    }.items():
        assert message in refused(chat, f"/set {wrong}")
    assert shown(chat, "/set") == "temperature 0.7, max-new-tokens 5, seed 3\n"


def test_a_conversation_is_forgotten_where_there_is_one(terminal):
    assert "answers every prompt by itself; there is nothing to forget" in refused(terminal(), "/new")
    chat = terminal(chat=True)
    shown(chat, "x")
    assert len(chat.conversation.messages) == 2
    assert "begins anew" in shown(chat, "/new")
    assert not chat.conversation.messages


def test_help_lists_every_command_and_what_is_none_is_said(terminal):
    chat = terminal(color_system=None)
    text = shown(chat, "/help")
    assert all(f"/{name}" in text and command.help in text for name, command in COMMANDS.items())
    said = refused(chat, "/exprt sql")
    assert "/exprt is no command. Did you mean 'expert'?" in said
    assert "begins with a slash is written with two" in said
    assert "/route takes nothing after it, and got 'sql'" in refused(chat, "/route sql")


# ---------------------------------------------------------------------- whoever types


def typed(chat: Terminal, monkeypatch, *lines: Any) -> str:
    """What is shown to one who types some lines, or raises something at the prompt."""
    left = list(lines)

    def answer(prompt: str) -> str:
        chat.console.file.write(prompt)
        line = left.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", answer)
    chat.talk()
    assert not left
    return chat.console.file.getvalue()


def test_ctrl_c_stops_an_answer_and_twice_at_the_prompt_the_chat(terminal, monkeypatch):
    chat = terminal([token(str(n)) for n in range(9)], color_system=None)
    step = chat.conversation.engine.step

    def interrupted():
        if len(chat.conversation.engine.left) == 6:
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(chat.conversation.engine, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    interrupts = (KeyboardInterrupt, "x", KeyboardInterrupt, KeyboardInterrupt)
    text = typed(chat, monkeypatch, "x", *interrupts)
    assert text.count("0123\nsql 100% · 4 tokens, stopped") == 2
    assert text.count("Ctrl-C again, or Ctrl-D, ends the chat.") == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_the_prompt_shows_who_is_forced_and_the_end_of_input_ends(terminal, monkeypatch):
    text = typed(terminal(color_system=None), monkeypatch, "/expert law", EOFError)
    assert text.startswith("mine has 5 experts and answers every prompt by itself. /help lists")
    assert "\n sql   law " in text
    assert text.endswith("\nlaw> \n")
    assert typed(terminal(chat=True), monkeypatch, "/quit").count("remembers the conversation") == 1


# ---------------------------------------------------------------------- the command


def test_the_command_in_a_pipe(folder, session):
    lines = "Käse?\n/expert nobody\n/trace\n".encode() + b"\xff\n"
    words = ["chat", str(folder), "--expert", "law", "--max-new-tokens", "7", "--slot-length", "100"]
    result = CliRunner().invoke(app, words, input=lines)
    assert result.exit_code == 1
    assert "unknown expert 'nobody'" in result.stderr
    conversation = Conversation(session, 100)
    conversation.force("law")
    conversation.max_new_tokens = 7
    list(conversation.ask("Käse?"))
    assert result.stdout.startswith(f"{conversation.answer.text}\n\n")
    assert result.stdout.count("law 1.00") == len(conversation.answer.tokens)
    assert CliRunner().invoke(app, [*words, "--temperature", "0.5"], input="x\n").exit_code == 0


def test_what_is_wrong_at_the_start_is_said_at_once(folder):
    result = CliRunner().invoke(app, ["chat", str(folder), "--expert", "nobody"], input="x\n")
    assert isinstance(result.exception, ValueError)
    assert "unknown expert 'nobody'" in str(result.exception)
    assert not result.stdout


SLOW_CHAT = """
import fcntl, sys, termios, time
from dylora_moe.__main__ import run
from dylora_moe.serving.engine import Engine

step = Engine.step

def slow(self):
    time.sleep(0.02)
    self.eos = frozenset()  # so that there is something to stop
    return step(self)

Engine.step = slow
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # ^C on this terminal is for us
sys.argv = ["dylora-moe", "chat", sys.argv[1], "--slot-length", "256"]
run()
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_on_a_real_terminal(folder):
    import pty

    screen, inner = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW_CHAT, str(folder)],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        env={**kept, "TERM": "xterm-256color"},
        start_new_session=True,  # a new process, not a fork of this one: torch's threads do not survive a fork
    )
    os.close(inner)
    try:
        seen = _until(screen, "> ")
        assert "has 5 experts" in seen
        assert "\x1b[7;36m sql \x1b[0m" in seen
        os.write(screen, b"aabx\x7fab?\r")
        seen = _until(screen, "\x1b[0m")
        os.write(screen, b"\x03")
        seen += _until(screen, "> ")
        assert re.search(r"\x1b\[(2;)?3\dm", seen)
        assert "stopped" in seen
        os.write(screen, b"\x1b[A\x01/expert law\x0b\r")  # the line before, another one before it, and the rest cut off
        seen = _until(screen, "law> ")
        assert "aabab?" in seen
        assert "From now on" in seen
        os.write(screen, b"\x03")
        # where the prompt stands and readline does not listen yet, Python sees the signal only at the next key
        _until(screen, "law> ", again=b"\x03")
        os.write(screen, b"\x04")
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
        os.close(screen)


def _until(screen: int, mark: str, again: bytes = b"") -> str:
    """What the screen shows up to a mark; keys that nothing came of are pressed `again`."""
    seen, deadline = "", time.monotonic() + 60
    while mark not in seen:
        if select.select([screen], [], [], 5)[0]:
            seen += os.read(screen, 65536).decode(errors="replace")
            continue
        assert time.monotonic() < deadline, f"no {mark!r} in {seen!r}"
        os.write(screen, again)
    return seen


def test_what_moves_the_cursor_is_shown_and_not_obeyed():
    assert "".join(map(module._harmless, "a\t\n\r\x07\x1b[31m\x9bé")) == "a\t\n␍␇␛[31m�é"
