"""A conversation in the terminal: lines in, coloured tokens out, and commands that begin with a slash."""

from __future__ import annotations

import signal
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table
from rich.text import Text

from dylora_moe.arguments import BASE
from dylora_moe.experts.expert_set import NEW
from dylora_moe.report.terminal import colour_of, name_experts
from dylora_moe.schema import nearest

from .conversation import Conversation, trimmed
from .request import Token

NEAREST = 5
"""How many of the nearest skills are named."""
_MOST_SEED = 2**63 - 1


class Setting(NamedTuple):
    """Something that `/set` sets: `kind(text)`, from `least` to `most`."""

    kind: Callable[[str], float]
    least: float
    most: float
    expected: str


SETTINGS = {
    "temperature": Setting(float, 0, sys.float_info.max, "0 (greedy) or a number above"),
    "max-new-tokens": Setting(int, 1, sys.maxsize, "a whole number from 1"),
    "seed": Setting(int, 0, _MOST_SEED, "a whole number from 0"),
}
"""What `/set` sets, by the name of the command's option."""


class Terminal:
    """A conversation with whoever types, or with a pipe.

    Args:
        conversation: with the mixture.
        console: where answers go.
        errors: where messages of failure and the progress go.
        name: what the mixture is called.
        interactive: whether somebody types: then there are a prompt, a line on every answer, and Ctrl-C stops it.

    Attributes:
        failed: whether a prompt or command could not be answered.
    """

    def __init__(self, conversation: Conversation, console: Console, errors: Console, name: str, interactive: bool):
        self.conversation, self.console, self.errors = conversation, console, errors
        self.name, self.interactive, self.failed = name, interactive, False
        self._blocks = 0

    # ------------------------------------------------------------------ lines

    def talk(self) -> None:
        """Read lines from whoever types until the end: Ctrl-D, `/quit`, or Ctrl-C twice."""
        with suppress(ImportError):
            import readline  # noqa: F401  # where it is there, `input` edits lines and has a history
        self._greet()
        interrupted = False
        while True:
            try:
                line = input(f"{self.conversation.expert or ''}> ")
                interrupted = False
                with self._stoppable():
                    self.handle(line)
            except EOFError:
                self._say("")
                return
            except KeyboardInterrupt:
                self._say("")
                if interrupted:
                    return
                interrupted = True
                self._say("Ctrl-C again, or Ctrl-D, ends the chat.", "dim")

    def read(self, lines: Iterable[str]) -> None:
        """Answer the lines of a pipe: one block for each, with an empty line between two."""
        try:
            for line in lines:
                self.handle(line.rstrip("\r\n"))
        except EOFError:
            return

    def handle(self, line: str) -> None:
        """Answer a prompt or obey a command; what is wrong with it is said.

        Raises:
            EOFError: it ends the chat.
        """
        if not line.strip():
            return
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._obey(line)
            else:
                self._answer(line.removeprefix("/"))
        except (ValueError, InterruptedError) as error:
            self.failed = True
            self.errors.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Within the block Ctrl-C ends what the conversation is at, between two of its steps."""
        before = signal.signal(signal.SIGINT, lambda *_: self.conversation.stop())
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    # ------------------------------------------------------------------ answers

    def _answer(self, prompt: str) -> None:
        pieces = trimmed(self.conversation.ask(prompt))
        self._begin_block()
        try:
            for text, token in pieces:
                self._write(text, token)
        finally:
            self._say("")
        answer = self.conversation.answer
        assert answer is not None
        if answer.why is not None:
            raise ValueError(f"the answer failed: {answer.why}")
        if self.interactive:
            more = "/set max-new-tokens" if len(answer.tokens) == self.conversation.max_new_tokens else "--slot-length"
            ends = {"length": f", cut short ({more} allows more)", "cancelled": ", stopped"}
            shares = [f"{name} {share:.0%}" for name, share in answer.load().items() if share >= 0.005]
            count = f"{len(answer.tokens)} token{'' if len(answer.tokens) == 1 else 's'}"
            count += ends.get(str(answer.finish_reason), "")
            self._say(" · ".join([*([", ".join(shares[:NEAREST])] if shares else []), count]), "dim")

    def _write(self, text: str, token: Token) -> None:
        """A piece of an answer as it is, neither wrapped nor cut; a terminal is kept from obeying it."""
        if self.interactive:
            text = "".join(_harmless(letter) for letter in text)
        self.console.print(Segments([Segment(text, style_of(token))]), end="", soft_wrap=True)

    def _begin_block(self) -> None:
        if self._blocks and not self.interactive:
            self._say("")
        self._blocks += 1

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=not self.interactive)

    def _greet(self) -> None:
        model, chat = self.conversation.session.model, self.conversation.session.chat
        names = model.expert_names
        how = "remembers the conversation" if chat else "answers every prompt by itself"
        self._say(f"{self.name} has {len(names)} experts and {how}. /help lists the commands, Ctrl-D ends.")
        legend = Text(" ").join(Text(f" {name} ", style=f"reverse {colour_of(i)}") for i, name in enumerate(names))
        self.console.print(legend)

    # ------------------------------------------------------------------ commands

    def _obey(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        if name not in COMMANDS:
            raise ValueError(
                f"/{name} is no command.{nearest(name, COMMANDS)} /help lists them; a prompt that begins with a slash "
                "is written with two."
            )
        command = COMMANDS[name]
        argument = argument.strip()
        if argument and not command.argument:
            raise ValueError(f"/{name} takes nothing after it, and got {argument!r:.60}.")
        command.do(self, argument)

    def help(self, _: str) -> None:
        """What can be typed."""
        table = Table.grid(padding=(0, 2))
        for name, command in COMMANDS.items():
            table.add_row(Text(f"/{name} {command.argument}".rstrip(), style="bold"), Text(command.help))
        table.add_row(Text("//…", style="bold"), Text("a prompt that begins with a slash"))
        table.add_row(Text("Ctrl-C", style="bold"), Text("stop the answer; twice at the prompt, end the chat"))
        self.console.print(table)
        self._say("Every token has the colour of the expert with the largest weight, dim where that is below a half.")

    def expert(self, name: str) -> None:
        """Force an expert, or list those there are."""
        conversation = self.conversation
        if not name:
            forced = f"{conversation.expert} is forced" if conversation.expert else "the router decides"
            states = conversation.session.model.expert_states
            new = [f"{expert} (not routed yet)" if states[expert] == NEW else expert for expert in states]
            self._say(f"{', '.join([*new, BASE])}; {forced}.")
            return
        conversation.force(name)
        what = "the base alone" if name == BASE else f"the expert {name}"
        self._note(f"From now on {what} answers; /route lets the router decide again.")

    def route(self, _: str) -> None:
        """Force nothing any more."""
        self.conversation.force(None)
        self._note("The router decides.")

    def base(self, _: str) -> None:
        """Force the base."""
        self.expert(BASE)

    def trace(self, _: str) -> None:
        """Who wrote the last answer."""
        answer = self.conversation.answer
        if answer is None or not answer.tokens:
            raise ValueError("nothing was answered yet." if answer is None else "the last answer has no token.")
        self._begin_block()
        names, weights = answer.weights()
        self.console.print(name_experts(answer.pieces, weights, names), soft_wrap=True)
        table = Table(title=f"Load of {len(answer.tokens)} tokens")
        table.add_column("expert")
        table.add_column("load", justify="right")
        table.add_column("strongest for", justify="right")
        for name, share in answer.load().items():
            strongest = sum(token.expert == name for token in answer.tokens) / len(answer.tokens)
            style = "" if name == BASE else colour_of(names.index(name))
            table.add_row(Text(name, style=style), f"{share:.1%}", f"{strongest:.1%}")
        self.console.print(table)

    def why(self, _: str) -> None:
        """What the last prompt is to the mixture's skills."""
        columns = ("Reading generic texts, once for this base", MofNCompleteColumn(), BarColumn())
        with Progress(*columns, console=self.errors, transient=True, disable=not self.errors.is_terminal) as bar:
            task = bar.add_task("", total=None)
            found, near = self.conversation.look(lambda done, count: bar.update(task, completed=done, total=count))
        self._begin_block()
        self._say(
            f"{found}; p is the share of the taught texts that look as new." if "(p=" in str(found) else f"{found}"
        )
        self._say("nearest: " + ", ".join(f"{name} {score:.2f}" for name, score in near[:NEAREST]))

    def new(self, _: str) -> None:
        """Forget the conversation."""
        if not self.conversation.session.chat:
            raise ValueError("this mixture answers every prompt by itself; there is nothing to forget.")
        self.conversation.messages = []
        self._note("The conversation begins anew.")

    def set(self, words: str) -> None:
        """Change a setting, or show them all."""
        name, _, text = words.partition(" ")
        if not words:
            shown = {key: getattr(self.conversation, key.replace("-", "_")) for key in SETTINGS}
            self._say(", ".join(f"{key} {'random' if value is None else value}" for key, value in shown.items()))
            return
        if name not in SETTINGS:
            raise ValueError(f"no setting {name!r}.{nearest(name, SETTINGS)} There are {', '.join(SETTINGS)}.")
        setting = SETTINGS[name]
        try:
            value = setting.kind(text)
        except ValueError:
            value = None
        if value is None or not setting.least <= value <= setting.most:
            raise ValueError(f"/set {name} {text}: expected {setting.expected}.")
        setattr(self.conversation, name.replace("-", "_"), value)

    def quit(self, _: str) -> None:
        """End."""
        raise EOFError

    def _note(self, text: str) -> None:
        """Say what has been done, to those who type."""
        if self.interactive:
            self._say(text, "dim")


class Command(NamedTuple):
    """What a line with a slash does."""

    argument: str
    help: str
    do: Callable[[Terminal, str], None]


COMMANDS = {
    "expert": Command(
        "NAME", "let one expert write everything from now on; without a name, list them", Terminal.expert
    ),
    "route": Command("", "let the router decide again", Terminal.route),
    "base": Command("", "let the base alone write", Terminal.base),
    "trace": Command("", "the weights of every token of the last answer", Terminal.trace),
    "why": Command("", "whether the last prompt is like what was taught, and the nearest skills", Terminal.why),
    "new": Command("", "forget the conversation", Terminal.new),
    "set": Command("NAME VALUE", "temperature, max-new-tokens or seed; without a name, show them", Terminal.set),
    "help": Command("", "this list", Terminal.help),
    "quit": Command("", "end the chat, as Ctrl-D does", Terminal.quit),
}
"""Commands by name."""


def style_of(token: Token) -> Style:
    """The colour of the expert that weighs most for a token, dim where that is below a half; none for the base."""
    if token.expert == BASE:
        return Style.null()
    index = token.experts.index(token.expert)
    return Style(color=colour_of(index), dim=token.weights[index] < 0.5)


def _harmless(letter: str) -> str:
    """A letter that moves no cursor and begins no control sequence: of a control character its picture."""
    if unicodedata.category(letter) != "Cc" or letter in "\n\t":
        return letter
    return chr(0x2400 + ord(letter)) if ord(letter) < 0x20 else "\N{REPLACEMENT CHARACTER}"
