"""The command line: parse, call one function, print.

Results go to stdout, the last line as JSON; progress goes to stderr.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from stillroom import __version__
from stillroom.errors import StillroomError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Distil a large language model into a small one that you run, and know that it does the job.\n\n"
    "Start with `stillroom plan RECIPE`, then `stillroom distill RECIPE`.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at training data before anything is spent on it.")
app.add_typer(data_app, name="data")
checkpoint_app = typer.Typer(no_args_is_help=True, help="Look at checkpoints, check them, turn them into other files.")
app.add_typer(checkpoint_app, name="checkpoint")

RecipePath = Annotated[Path, typer.Argument(help="A recipe, such as recipes/quickstart.yaml.", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one setting, as in --set training.epochs=3. Repeatable."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run [default: runs/<name of the recipe>].")]


@app.command()
def distill(recipe: RecipePath, set_: Overrides = None, out: Out = None) -> None:
    """Do everything: prepare the data, label it, train the student, measure it, write the report.

    Interrupted anywhere, the same command goes on and does only what is missing. Change one setting, and exactly
    what depends on it is done again.
    """
    from stillroom import pipeline

    loaded = _load(recipe, set_)
    summary = pipeline.distill(loaded, _out(out, loaded.name), command=_command())
    print(summary.pop("headline"))
    print(json.dumps(summary))


@app.command()
def plan(
    recipe: RecipePath,
    set_: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Ask whether it fits this GPU, such as l4, a100-80gb or h200.")
    ] = None,
) -> None:
    """Say what a recipe will do and take, before anything is spent: records, calls, money, memory, time, licences."""
    from stillroom import pipeline

    found = pipeline.plan(_load(recipe, set_), gpu=gpu)
    print(found.text)
    print(json.dumps(found.figures))


@app.command()
def settings(
    section: Annotated[str, typer.Argument(help="Only these, such as training or teacher.model.")] = "",
) -> None:
    """List every setting of a recipe with its type, its default and what it does."""
    from stillroom.pipeline.settings import page
    from stillroom.pipeline.settings import settings as settings_of

    print(page(section))
    print(json.dumps([asdict(setting) for setting in settings_of(section)]))


@app.command()
def record(
    recipe: RecipePath,
    to: Annotated[Path, typer.Option("--to", help="Folder that the teacher's answers are written to, as logs.")],
    set_: Overrides = None,
    out: Out = None,
) -> None:
    """Ask a recipe's teacher everything that the recipe needs, and write its answers as invocation logs.

    The logs refer to prompts by digest and hold the answers only. `teacher: {engine: recorded, path: ...}` then
    replays them, so that others can run the recipe without the teacher.
    """
    from stillroom import pipeline

    loaded = _load(recipe, set_)
    print(json.dumps(pipeline.record(loaded, _out(out, loaded.name), to)))


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(help="A student's folder, a GGUF file, a hub id, or an http(s) URL ending in /v1.")
    ],
    data: Annotated[
        Path,
        typer.Argument(
            help="Labelled records, a file or folder in any format that `data check` reads; or the folder of a "
            "finished run (runs/NAME): its held-out items, by its rules."
        ),
    ],
    task: Annotated[
        str | None, typer.Option(help="function_calling, classification or text [default: the run's, or the first].")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="transformers, llama.cpp or openai [default: by the model].")
    ] = None,
    model_id: Annotated[str | None, typer.Option("--model-id", help="The model's id at a URL.")] = None,
    limit: Annotated[int | None, typer.Option(help="Measure only this many items, chosen by content.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Cap on one answer, in tokens [default: the run's, or 256].")
    ] = None,
    chat_template: Annotated[str | None, typer.Option(help="Template used in place of the model's own.")] = None,
    input_price: Annotated[float, typer.Option(help="USD per million input tokens.")] = 0.0,
    output_price: Annotated[float, typer.Option(help="USD per million output tokens.")] = 0.0,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write every item's verdict to this JSON file.")
    ] = None,
) -> None:
    """Measure one model on labelled records: accuracy with intervals, failure kinds, latency."""
    from stillroom import pipeline
    from stillroom.engines import Price

    price = Price(input_per_million=input_price, output_per_million=output_price)
    found = pipeline.evaluate_model(
        model, data, task=task, engine=engine, model_id=model_id, limit=limit, max_tokens=max_tokens,
        chat_template=chat_template, price=price, out=out,
    )  # fmt: skip
    print(found.pop("text"))
    print(json.dumps(found))


@app.command()
def spectrum(
    model: Annotated[str, typer.Argument(help="A model's folder, a GGUF file or a hub id.", metavar="MODEL")],
    top: Annotated[float, typer.Option(help="Percent of the matrices of each kind to choose.", min=0.1, max=100)] = 25,
    out: Annotated[Path, typer.Option("--out", help="Folder for the scores and the picture.")] = Path("runs/spectrum"),
) -> None:
    """Rank a model's weight matrices by their signal-to-noise ratio: what `training.spectrum` would train.

    Matrices are read one at a time, so the model may be larger than the memory. Scores are kept by the digest of the
    weights, so another --top costs nothing.
    """
    from stillroom import models

    found = models.write_spectrum(model, top, out)
    print(found.pop("table"))
    print(json.dumps(found))


@app.command()
def lineage(
    path: Annotated[Path, typer.Argument(help="Anything inside a run's folder, such as runs/x/student.")],
) -> None:
    """Show what made a thing: its step, settings and inputs, back to the sources."""
    from stillroom import artifacts

    tree = artifacts.lineage(path)
    print(_draw(tree))
    print(json.dumps(tree))


@data_app.command("check")
def data_check(
    path: Annotated[Path, typer.Argument(help="A file, or a folder that is searched.")],
    format: Annotated[str, typer.Option(help="auto, bedrock, openai, invocation_logs or bfcl.")] = "auto",
    where: Annotated[
        str | None, typer.Option(help='Metadata filter of invocation logs, as JSON: {"equals": {"project": "x"}}.')
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for report.html and rejected.jsonl.")] = None,
    minimum: Annotated[int, typer.Option(help="Accepted records that are enough: a recipe's `data.minimum`.")] = 100,
) -> None:
    """The prompt-insights report: how many records are usable, and for each that is not, where, why, what to change.

    Exit status: 0 when at least --minimum records are accepted, whatever else is rejected; 1 when fewer are, or PATH
    cannot be read.
    """
    from stillroom import data

    insights = data.check(path, format=format, where=_json_option("--where", where), minimum=minimum, out=out)
    print(insights.to_text())
    print(json.dumps(insights.to_json()))
    raise typer.Exit(0 if insights.enough else 1)


Root = Annotated[
    str,
    typer.Argument(help="Folder of checkpoints, such as runs/x/checkpoints, or s3://BUCKET/PREFIX.", metavar="ROOT"),
]


@checkpoint_app.command("ls")
def checkpoint_ls(root: Root) -> None:
    """List the committed checkpoints under ROOT with their sizes and metrics."""
    from stillroom.checkpoint import Checkpointer

    found = [
        {"step": info.step, "path": str(info.path), "bytes": info.size_bytes, "metrics": dict(info.metrics)}
        for info in Checkpointer(root).committed()
    ]
    for entry in found:
        print(f"{entry['step']:>10}  {entry['bytes']:>16,} bytes  {entry['metrics'] or ''}".rstrip())
    print(json.dumps({"root": root, "checkpoints": found}))


@checkpoint_app.command("verify")
def checkpoint_verify(
    root: Root,
    step: Annotated[int | None, typer.Option(help="Only this one [default: all].")] = None,
) -> None:
    """Read every byte of the committed checkpoints under ROOT; exit 1 if any does not match its checksum."""
    from stillroom.checkpoint import Checkpointer

    checkpointer = Checkpointer(root)
    steps = checkpointer.steps() if step is None else [step]
    damaged = {step: lines for step in steps if (lines := checkpointer.verify(step))}
    for number, lines in damaged.items():
        print("\n".join(f"step {number}: {line}" for line in lines))
    print(json.dumps({"root": root, "checked": steps, "damaged": damaged}))
    raise typer.Exit(1 if damaged else 0)


@checkpoint_app.command("export")
def checkpoint_export(
    root: Root,
    out: Annotated[Path, typer.Argument(help="Folder to make for safetensors; a file for torch.", metavar="OUT")],
    step: Annotated[int | None, typer.Option(help="Which checkpoint [default: the newest].")] = None,
    format: Annotated[str, typer.Option(help="safetensors or torch.")] = "safetensors",
    prefix: Annotated[str, typer.Option(help="Only this branch of the state, such as weights.")] = "",
) -> None:
    """Turn a checkpoint into safetensors, sharded as Transformers loads them, or into one file of torch.save."""
    from stillroom.checkpoint import Checkpointer, exporting

    if format not in ("safetensors", "torch"):
        raise typer.BadParameter(f"--format is safetensors or torch, not {format}")
    path = Checkpointer(root).path_of(step)
    export = exporting.export_safetensors if format == "safetensors" else exporting.export_torch
    print(json.dumps(export(path, out, prefix)))


def main() -> None:
    """Entry point: an error of ours is a message and exit code 1, Ctrl-C is 130; a bug keeps its traceback."""
    try:
        app(standalone_mode=True)
    except StillroomError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (KeyboardInterrupt, SystemExit) as end:
        # The framework turns Ctrl-C into an exit of its own, without a word.
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:
            raise
        print("\nInterrupted. What is done is kept: run the same command to go on.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _load(recipe: Path, overrides: list[str] | None) -> Any:
    from stillroom.config import load_config
    from stillroom.pipeline import Recipe

    return load_config(Recipe, recipe, overrides or [])


def _out(out: Path | None, name: str) -> Path:
    return out or Path("runs") / name


def _command() -> str:
    import shlex

    return shlex.join(["stillroom", *sys.argv[1:]])


def _json_option(option: str, text: str | None) -> Any:
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option} is not JSON: {error}") from None


def _draw(tree: dict[str, Any], role: str = "", depth: int = 0) -> str:
    name = f"{role}: {tree['step']}" if role else tree["step"]
    lines = [f"{'   ' * depth}{name} {tree['key']}  {tree['created']}  {tree['seconds']:.1f} s"]
    for name, parent in tree["parents"].items():
        if isinstance(parent, dict):
            lines.append(_draw(parent, name, depth + 1))
        else:
            lines.append(f"{'   ' * (depth + 1)}{name}: {parent}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
