"""The command line; `learn`, `bench`, `export` and the commands of `keeping.py` are defined where their work is."""

from __future__ import annotations

import json
import logging
import os
import shlex
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from .benchmark.command import bench
from .exporting.command import export
from .failures import Verbose, one_message
from .gateway.command import gateway
from .keeping import commands as keeping
from .keeping import warn_of_twins
from .lifelong.command import learn
from .serving.chat import chat
from .serving.command import serve
from .version import __version__

if TYPE_CHECKING:  # whatever needs torch is imported by the command that uses it: help and completion answer at once
    from .session import Answer, Session

app = typer.Typer(
    help="Many LoRA experts in one model, routed token by token.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
recipes = typer.Typer(help="Look at recipes without training.", no_args_is_help=True)
app.add_typer(recipes, name="recipe")
app.command()(bench)
app.command()(learn)
app.command()(serve)
app.command()(chat)
app.command()(gateway)
app.add_typer(keeping)
app.command()(export)
console = Console(emoji=False)
errors = Console(stderr=True, emoji=False)


def _print_version(asked: bool) -> None:
    if asked:
        console.print(f"dylora-moe {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    pass


Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value, e.g. train.max_steps=5.")
]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, e.g. recipes/skills.yaml.")],
    overrides: Overrides = None,
    output: Annotated[str | None, typer.Option(help="Folder of the checkpoint; overrides the recipe's.")] = None,
    baseline: Annotated[bool, typer.Option(help="Also train and measure one LoRA of the same total rank.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the last whole checkpoint in the folder.")] = False,
    num_processes: Annotated[int, typer.Option(min=1, help="Train in so many processes of this machine.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Train so many experts at the same time (method: staged).")] = 1,
    report: Annotated[bool, typer.Option(help="Write report.html and the figures beside the checkpoint.")] = True,
    stage: Annotated[str | None, typer.Option(help="Train only this stage of a run that was begun, and stop.")] = None,
    verbose: Verbose = False,
) -> None:
    """Train a mixture, measure it on held-out examples, save it.

    A run that was cut off (a signal, a crash, kill -9) goes on where its last whole checkpoint was:
    [bold]dylora-moe train recipes/skills.yaml --resume[/]. With [bold]accelerate launch[/] or torchrun, start
    [bold]-m dylora_moe train …[/] in place of a script.

    Example: [bold]dylora-moe train recipes/skills.yaml --set train.max_steps=60 --output runs/short[/]
    """
    from .training.recipe.methods import METHODS
    from .training.recipe.recipe import load_recipe

    overrides = [*(overrides or []), *([] if output is None else [f"output={json.dumps(output)}"])]
    if baseline:
        overrides.append("eval.baseline=true")
    loaded = load_recipe(recipe, overrides)
    apart = METHODS[loaded.train.method].side_by_side and num_processes == 1 and stage is None
    if jobs > 1 and not apart:
        raise ValueError(
            f"--jobs {jobs} trains the experts of `method: staged` side by side, each in one process; leave it out "
            "with another method, with --num-processes and with --stage."
        )
    from .report.terminal import results_tables
    from .training.run import launch
    from .training.run.job import Job

    main_process = os.environ.get("RANK", "0") == "0"
    if num_processes > 1 and "WORLD_SIZE" not in os.environ:
        launch.processes(launch.arguments(recipe, overrides, resume, report, stage), num_processes)
        return
    job = Job(loaded, console if main_process else Console(quiet=True))
    if jobs == 1:
        results = job.run(resume, stage)
    else:
        job.read_data()
        with job.locked():
            job.begin(resume)
            launch.stages(job, launch.arguments(recipe, overrides, resume=True), jobs, console)
            results = job.run(resume=True)
    if results is None:
        return
    for table in results_tables(results):
        console.print(table)
    if report:
        _write_report(Path(results.output))
    same = {True: "identical answers", False: "[red]DIFFERENT answers[/]", None: "not compared"}
    console.print(
        f"Checkpoint: [bold]{results.output}[/] (reloaded: {same[results.reloaded_identical]})", highlight=False
    )
    console.print(f"Total time: {sum(results.seconds.values()):.0f} s; numbers in {results.output}/results.json")
    console.print("Next:", highlight=False)
    for words in (
        ["generate", "--show-routing", "--", results.output, job.prompt_to_try],
        ["inspect", results.output],
        ["serve", results.output],
    ):
        console.print(f"  {_command(*words)}", markup=False, highlight=False, soft_wrap=True)


def _command(*words: str) -> str:
    """A command line of ours that a shell reads as these words; `--` stands only where it is needed."""
    if "--" in words and not any(word.startswith("-") for word in words[words.index("--") + 1 :]):
        words = tuple(word for word in words if word != "--")
    return shlex.join(["dylora-moe", *words])


def _write_report(folder: Path) -> None:
    from .report.page import write_report

    try:
        console.print(f"Report: [bold]{write_report(folder)}[/]", highlight=False, soft_wrap=True)
    except ImportError as error:  # the training is done; figures can be had later
        console.print(
            f"No report: {error} Then: {_command('report', str(folder))}", markup=False, highlight=False, soft_wrap=True
        )


@app.command()
def compose(
    output: Annotated[Path, typer.Argument(help="Folder of the mixture to be.")],
    experts: Annotated[
        list[str],
        typer.Option(
            "--expert",
            metavar="NAME=ADAPTER:TEXTS",
            help="A LoRA adapter (folder or hub id) and a file with five to twenty texts of its kind; once per expert.",
        ),
    ],
    base: Annotated[str | None, typer.Option(help="The base, if the adapters name none or it has moved.")] = None,
    separator: Annotated[
        str,
        typer.Option(
            help="What stands between prompt and completion, as the adapters were trained.", show_default="a new line"
        ),
    ] = "\n",
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Prompts go through the base's chat template.")
    ] = None,
    router_layer: Annotated[
        int | None, typer.Option(min=0, help="Layer whose input the router reads; default a quarter of the way up.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Make a routed mixture of adapters that exist already, without any training.

    Five to twenty texts of the kind that an adapter is for tell the router when to choose it: rows with prompt and
    completion, messages, or text, in one of the formats of docs/data.md. They are not stored.

    Example: [bold]dylora-moe compose runs/mine --expert sql=adapters/sql:sql.jsonl --expert law=me/law:law.jsonl[/]
    """
    import time

    from .composition import Ingredient, read_texts
    from .composition import compose as make

    started = time.perf_counter()
    ingredients = [Ingredient.parse(text) for text in experts]
    separator = separator.replace("\\n", "\n").replace("\\t", "\t")  # as a shell passes them
    texts = read_texts(ingredients, separator)
    with console.status("Loading the base and the adapters") as status:

        def told(name: str, count: int) -> None:
            status.update(f"Reading the texts of {name}: {count} of {len(texts[name])}")

        mixture = make(output, ingredients, texts, base, separator, chat, router_layer, told)
    from .report.terminal import confusion_table

    console.print(confusion_table(mixture.skills.confusion(), mixture.expert_names))
    warn_of_twins(mixture)
    passes = f"{mixture.passes_per_step:.2f} passes of the base per step, {mixture.moe_config.granularity} granularity"
    console.print(f"Checkpoint: [bold]{output}[/] ({passes}; {time.perf_counter() - started:.0f} s)", highlight=False)
    console.print("Next:", highlight=False)
    prompt = texts[ingredients[0].name][0].question
    for words in (["generate", "--show-routing", "--", str(output), prompt], ["serve", str(output)]):
        console.print(f"  {_command(*words)}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def generate(
    directory: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    expert: Annotated[str | None, typer.Option(help='Force one expert by name, or "base".')] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts kept per token; default the checkpoint's.")] = None,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    fold: Annotated[
        bool, typer.Option(help="Fold the mixture into the base: faster, with --expert or sequence granularity.")
    ] = False,
    show_routing: Annotated[bool, typer.Option(help="Show which expert predicted which token.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer and its routing as JSON.")] = False,
    base: Annotated[str | None, typer.Option(help="Another base than the checkpoint names.")] = None,
    verbose: Verbose = False,
) -> None:
    """Answer a prompt.

    Example: [bold]dylora-moe generate runs/skills "Date: the 3rd of May 1999" --show-routing[/]
    """
    import torch

    from .session import Session

    session = Session(directory, base=base)
    if top_k is not None:
        session.set_top_k(top_k)
    torch.manual_seed(seed)
    if not (show_routing or as_json):
        text = session.complete(prompt, expert, max_new_tokens, temperature, fold)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    answer = session.answer(prompt, expert, max_new_tokens, temperature, fold)
    if as_json:
        typer.echo(json.dumps(_as_json(session, answer), ensure_ascii=False))
        return
    console.print(answer.text, markup=False, highlight=False, soft_wrap=True)
    _show_routing(session, answer)


def _show_routing(session: Session, answer: Answer) -> None:
    from .report.terminal import colour_by_expert, name_experts, routing_table

    coloured = console.color_system is not None and not console.no_color
    show = colour_by_expert if coloured else name_experts
    console.print(show(answer.tokens, answer.weights, session.model.expert_names), soft_wrap=True)
    console.print(routing_table(answer.trace))


def _as_json(session: Session, answer: Answer) -> dict:
    """The answer as plain values; the weights of a token that nothing predicted are null."""
    names = session.model.expert_names
    rows = [None if row[0] != row[0] else dict(zip(names, row, strict=True)) for row in answer.weights.tolist()]
    return {
        "text": answer.text,
        "prompt_tokens": answer.prompt_length,
        "tokens": [{"text": t, "weights": row} for t, row in zip(answer.tokens, rows, strict=True)],
        "load": answer.trace.load(),
        "entropy": answer.trace.entropy(),
    }


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    text: Annotated[str, typer.Option(help="The text to route.")] = "The capital of France is Paris.",
    base: Annotated[str | None, typer.Option(help="Another base than the checkpoint names.")] = None,
    verbose: Verbose = False,
) -> None:
    """Show the parameters, the routing of a text, and where its gradients go.

    Example: [bold]dylora-moe inspect runs/skills --text "Which films were made in 1999?"[/]
    """
    from .report.terminal import gradient_table, parameter_table
    from .reports import gradient_report
    from .session import Session

    session = Session(directory, base=base)
    console.print(parameter_table(session.model.parameter_report()))
    _show_routing(session, session.route(text))
    session.backward(text)
    console.print(gradient_table(gradient_report(session.model)))


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="The output folder of a run.")], verbose: Verbose = False
) -> None:
    """Write the report of a run again, from the files it left: report.html and figures/*.png.

    Example: [bold]dylora-moe report runs/skills[/]
    """
    from .report.page import write_report

    console.print(str(write_report(directory)), markup=False, highlight=False, soft_wrap=True)


@recipes.command("check")
def recipe_check(
    recipe: Annotated[Path, typer.Argument(help="A recipe.")], overrides: Overrides = None, verbose: Verbose = False
) -> None:
    """Validate a recipe and its data; print it with its defaults, and what it would train.

    Every key of a recipe's own is there, and every field of SFTConfig that a run uses with another value than TRL's
    default. Further fields of SFTConfig (in train) and of MoELoraConfig (in mixture) keep their defaults.

    The resolved recipe goes to standard output and can be kept as a file; the plan goes to standard error.

    Example: [bold]dylora-moe recipe check recipes/skills.yaml > resolved.yaml[/]
    """
    from .training.recipe.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from .report.terminal import plan_tables
    from .training.run.plan import plan

    planned = plan(loaded)
    typer.echo(planned.recipe, nl=False)  # to the byte; a console would wrap it, and expand tabs
    errors.print(f"Base: {planned.base}", markup=False, highlight=False)
    for table in plan_tables(planned):
        errors.print(table)


def main() -> None:
    """Entry point: errors that a user can mend are one message, not a traceback."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=errors, show_path=False)]
    )
    _quiet_libraries()
    with one_message(errors):
        app()


def _quiet_libraries() -> None:
    """Their progress bars and deprecation notes would drown ours; nothing here is for the user to act on."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
