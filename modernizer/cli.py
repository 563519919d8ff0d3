"""The command line: arguments in, exit code out."""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from modernizer import __version__
from modernizer.rule import Effect, Option, Options

if TYPE_CHECKING:
    from modernizer.report import Report
    from modernizer.rule import Rule
    from modernizer.weights.keeping import Outcome

T = TypeVar("T")

FINISH = "finish"  # the rule that `apply --finish` means
LARGE = 1 << 30  # bytes; of files that large it is shown how much is written
COLOURS = {"done": "green", "planned": "cyan", "legacy": "yellow", "refused": "magenta", "modern": "blue"}
PATHS = click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=click.Path(path_type=Path))
FORMAT = click.option(
    "--format",
    "style",
    type=click.Choice(["text", "json"]),
    default="text",
    help="Lines for people or one JSON object.",
)


class CommandWithRuleOptions(click.Command):
    """A command that also takes the options which the rules declare, such as `--keep-hidden`."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from modernizer.registry import all_options

        return [*super().get_params(ctx), *map(_as_click, _or_exit(all_options))]


def _as_click(option: Option) -> click.Option:
    names = [f"--{option.name.replace('_', '-')}", f"option_{option.name}"]
    if isinstance(option.default, bool):
        return click.Option(names, is_flag=True, default=option.default, help=option.help)
    kind = click.Choice(option.choices) if option.choices else type(option.default)
    return click.Option(names, type=kind, default=option.default, show_default=bool(option.default), help=option.help)


class Modernize(click.Group):
    """The group of all commands; what none of them expected ends with a line and exit code 2, as the others do."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:
            if ctx.params.get("traceback"):
                traceback.print_exc()
            click.echo(f"error: {type(error).__name__}: {error} (this is ours to fix; --traceback says more)", err=True)
            raise SystemExit(2) from error


@click.group(cls=Modernize, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--traceback", is_flag=True, help="Show where errors of ours come from.")
@click.version_option(__version__, prog_name="modernize")
def main(traceback: bool) -> None:
    """Upgrades legacy PyTorch transformer code, and proves what each rewrite did.

    Exit codes: 0 nothing left to do or all done; 1 findings or refusals remain; 2 wrong usage or an internal error.
    """
    # The value graph lives until the command ends: looking for garbage in it again and again took a tenth of the time.
    gc.set_threshold(200_000, 20, 20)


@main.command(cls=CommandWithRuleOptions)
@PATHS
@click.option("--rule", "-r", "names", multiple=True, help="Rules to apply, a comma between them.")
@click.option(
    "--finish", is_flag=True, help="Take out what --keep-weights wrote for a bridge; `export` the weights then."
)
@click.option("--diff", is_flag=True, help="Show the changes and write nothing.")
@click.option("--vendor", is_flag=True, help="Write the needed components beside the code instead of importing them.")
@click.option("--verify", is_flag=True, help="Run the model before and after; write nothing unless all promises hold.")
@click.option("--model", help="With --verify: an expression that builds the model.")
@click.option("--input", "inputs", help="With --verify: an expression for what the model is called with.")
@click.option("--call", help="With --verify: an expression of `model` and `inputs`, where calling is not enough.")
@FORMAT
def apply(
    paths: Sequence[Path],
    names: Sequence[str],
    finish: bool,
    diff: bool,
    vendor: bool,
    verify: bool,
    model: str | None,
    inputs: str | None,
    call: str | None,
    style: str,
    **given: Any,
) -> None:
    """Rewrite files and folders in place, or say why not."""
    from modernizer import pipeline
    from modernizer.vendoring import vendor as use_vendored

    names = [*names, *([FINISH] if finish else [])]
    if not names:
        raise click.UsageError("Missing option '--rule' / '-r'.")
    rules = _selected(names)
    options = _rule_options(rules, given)
    steps: list[pipeline.Step] = [use_vendored] if vendor else []
    if verify:
        steps.append(_proof(paths, model, inputs, call, options))
    elif model or inputs or call:
        raise click.UsageError("--model, --input and --call say how to --verify")
    report = pipeline.upgrade(paths, rules, options, write=not diff, steps=steps)
    _print_report(report, style, with_diff=diff)


@main.command(cls=CommandWithRuleOptions)
@PATHS
@click.option(
    "--rule", "-r", "names", multiple=True, help="Rules to look for, a comma between them; by default all that upgrade."
)
@FORMAT
def check(paths: Sequence[Path], names: Sequence[str], style: str, **given: Any) -> None:
    """Show what is legacy in files and folders, where, and what can be done about it."""
    from modernizer import pipeline

    rules = _selected(names)
    _print_report(pipeline.check(paths, rules, _rule_options(rules, given)), style, with_diff=False)


@main.command(name="map")
@PATHS
def show_map(paths: Sequence[Path]) -> None:
    """Show which class is attention, feed-forward, norm, block, stack and so on, and why."""
    from modernizer.reading import read
    from modernizer.report import Report, role_lines

    report = Report("map")
    state = read(paths, report.problems, report.remarks)
    for depth, text in role_lines(state.model.roles if state else ()):
        click.echo("    " * depth + (click.style(text, bold=True) if depth < 2 else text))
    _print_trouble(report)
    if state and not state.model.roles:
        click.echo("no part of a transformer is recognised here", err=True)
    raise SystemExit(report.exit_code)


@main.command()
@click.option("--before", required=True, type=click.Path(path_type=Path), help="A file, or a folder to import from.")
@click.option("--after", required=True, type=click.Path(path_type=Path), help="The same, rewritten.")
@click.option("--model", required=True, help="An expression that builds the model; in a folder, 'module:expression'.")
@click.option("--input", "inputs", required=True, help="An expression for a tensor, a tuple or a dict of them.")
@click.option("--call", help="An expression of `model` and `inputs`, where calling the model is not enough.")
@click.option("--rule", "-r", "names", multiple=True, help="Rules that were applied: checks their own properties too.")
@click.option("--effect", type=click.Choice([effect.value for effect in Effect]), help="What is promised.")
@click.option("--map", "maps", multiple=True, type=click.Path(path_type=Path), help="A weight map; several in order.")
@click.option("--timeout", default=120.0, show_default=True, help="Seconds for each of the two runs.")
@click.option("--memory", default=4096, show_default=True, help="MiB for each of the two runs.")
@FORMAT
def verify(
    before: Path,
    after: Path,
    model: str,
    inputs: str,
    call: str | None,
    names: Sequence[str],
    effect: str | None,
    maps: Sequence[Path],
    timeout: float,
    memory: int,
    style: str,
) -> None:
    """Run a model before and after a rewrite, and show what changed and what did not.

    What is checked follows from the effect: the one given, else that of the rules given, else that of all rules that
    find less to do afterwards. With --map, as `apply` has left one, the old weights are carried over by it.
    """
    from modernizer.proving import weakest
    from modernizer.verify import VerifyError
    from modernizer.verify import verify as run_both
    from modernizer.weights import MapError
    from modernizer.weights.recorded import load_maps

    rules = _selected(names) if names else []
    promised = Effect(effect) if effect else weakest(rule.effect for rule in rules or _settled_rules(before, after))
    try:
        report = run_both(
            before,
            after,
            model,
            inputs,
            effect=promised,
            call=call,
            rules=[rule.name for rule in rules],
            timeout=timeout,
            memory_mb=memory,
            weights=load_maps(maps) if maps else None,
        )
    except (VerifyError, MapError) as error:
        raise click.UsageError(str(error)) from error
    if style == "json":
        click.echo(json.dumps({"effect": promised.value, **report.to_json()}, indent=2))
    else:
        click.echo(f"effect {promised.value}: {promised.promise}\n{report}")
    raise SystemExit(0 if report.passed else 1)


@main.command()
@click.argument("source", metavar="OLD", type=click.Path(path_type=Path))
@click.option("--output", "-o", "target", required=True, type=click.Path(path_type=Path), help="The file to write.")
@click.option("--map", "maps", multiple=True, type=click.Path(path_type=Path), help="A weight map; several in order.")
@click.option("--reverse", is_flag=True, help="Go back: from a checkpoint of the new model to one of the old.")
@click.option(
    "--like", type=click.Path(path_type=Path), help="Any checkpoint such as shall come out: names, sizes, order."
)
@click.option(
    "--optimizer-names", type=click.Path(path_type=Path), help="The optimizer's parameters in order: a JSON list."
)
@click.option("--drop-optimizer", is_flag=True, help="Leave the state of optimizers out.")
def migrate(
    source: Path, target: Path, maps: Sequence[Path], reverse: bool, like: Path | None,
    optimizer_names: Path | None, drop_optimizer: bool,
) -> None:  # fmt: skip
    """Carry trained weights over: the checkpoint OLD becomes one that the rewritten model loads.

    Takes .pt files (a state dict, or a larger checkpoint that holds one), .safetensors, and the .index.json of a
    checkpoint in several files. Without --map, the maps are used that `apply` has recorded in the working folder or the
    nearest folder above that has any.

    The state of Adam, AdamW and SGD in a larger checkpoint moves with its parameters, which it holds in the order of
    model.parameters(); where that is not so, --optimizer-names gives the names of the old ones in its order.

    Layers of several lengths that became one do not tell where to cut it: the way back asks for --like, any checkpoint
    of an old model of the same sizes. Going forward --like is one of the new model, and checks what comes out.
    """
    from modernizer.report import shown
    from modernizer.weights import MapError
    from modernizer.weights.recorded import FOLDER, load_maps, recorded

    used = list(maps) or recorded(Path.cwd())
    if not used:
        raise click.UsageError(f"no weight map: none is recorded in {FOLDER} here or above, so name one with --map")
    names = _parameter_names(optimizer_names) if optimizer_names is not None else None
    try:
        from modernizer.weights.checkpoint import CheckpointError
        from modernizer.weights.migrate import migrate as carry_over
    except ImportError as error:
        raise click.UsageError('migrate needs PyTorch: pip install "modernizer[torch]"') from error
    try:
        with _writing() as progress:
            done = carry_over(
                source, target, load_maps(used), reverse=reverse, like=like, optimizer_names=names,
                drop_optimizer=drop_optimizer, progress=progress,
            )  # fmt: skip
    except (MapError, CheckpointError) as error:
        click.echo(click.style(f"error: {error}; nothing was written", fg="red"), err=True)
        click.echo(f"    with {', '.join(map(shown, used))}{' backwards' if reverse else ''}", err=True)
        raise SystemExit(2) from error
    carried = done.carried
    kept = len(carried.state) - len(carried.made)
    click.echo(f"{shown(target)}: {len(carried.gone)} tensors became {len(carried.made)}, {kept} are as they were")
    click.echo(f"    with {', '.join(map(shown, used))}{' backwards' if reverse else ''}")
    if done.optimizers:
        click.echo(f"    note: moved with its parameters: {', '.join(done.optimizers)}")
    if done.dropped:
        click.echo(f"    note: left out: {', '.join(done.dropped)}")
    others = [name for name in done.checkpoint.others if name not in done.optimizers]
    if others:
        click.echo(f"    note: kept as it was: {', '.join(others)}")


def _parameter_names(path: Path) -> list[str]:
    """The names in a JSON list."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{path}: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise click.UsageError(f"{path}: is no JSON list of names")
    return names


@contextmanager
def _writing() -> Iterator[Callable[[int, int], None] | None]:
    """Shows on a terminal how much of a large file is written."""
    if not sys.stderr.isatty():
        yield None
        return
    bars: list[Any] = []

    def tell(done: int, total: int) -> None:
        if not bars and total >= LARGE:
            bars.append(click.progressbar(length=total, label="writing", file=sys.stderr))
            bars[0].__enter__()
        for bar in bars:
            bar.update(done - bar.pos)

    try:
        yield tell
    finally:
        for bar in bars:
            bar.__exit__(None, None, None)


@main.command(cls=CommandWithRuleOptions)
@click.option("--before", required=True, type=click.Path(path_type=Path), help="The old program: a file or a folder.")
@click.option("--after", required=True, type=click.Path(path_type=Path), help="The same, upgraded with --keep-weights.")
@click.option("--model", required=True, help="An expression that builds the model; 'module:expression' if need be.")
@click.option("--checkpoint", required=True, type=click.Path(path_type=Path), help="The trained weights.")
@click.option("--data", required=True, help="Tokens or rows: .npy, .npz, .pt, a dataset's folder, or an expression.")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="The file to write.")
@click.option("--rule", "-r", "names", multiple=True, help="The rules that were applied; by default what is seen.")
@click.option("--call", help="An expression of `model` and `batch`, where calling the model is not enough.")
@click.option("--loss", help="An expression of `output` and `batch`: what to measure instead.")
@click.option("--length", default=256, show_default=True, help="Tokens in a row, where the data is one line of them.")
@click.option("--tokens", default=65_536, show_default=True, help="How many to calibrate on.")
@click.option("--held-out", default=32_768, show_default=True, help="How many others to measure with, at most.")
@click.option("--device", help="Where to compute: cpu, cuda, cuda:1; by default a GPU if there is one.")
@FORMAT
def calibrate(names: Sequence[str], style: str, **given: Any) -> None:
    """Keep what was trained: the checkpoint of the old model becomes one of the upgraded model, fitted on data.

    Builds and runs both models. Says for each rule whether it was exact, calibrated, or needs training, and what it
    cost on data that was held out. An interrupted run goes on where it was.
    """
    try:
        from modernizer.weights.keeping import Request, Unfit, keep_trained
    except ImportError as error:
        raise click.UsageError('calibrate needs PyTorch: pip install "modernizer[torch]"') from error
    own = {name: given.pop(name) for name in [name for name in given if not name.startswith("option_")]}
    for side in ("before", "after"):
        if not own[side].exists():
            raise click.UsageError(f"--{side}: {own[side]} is not there")
    rules = _selected(names) if names else _settled_rules(own["before"], own["after"])
    options = {**_rule_options(rules, given), "keep_weights": True}
    try:
        with _progress(style) as told:
            outcome = keep_trained(Request(**own, rules=rules, options=options), told)
    except Unfit as error:
        click.echo(click.style(f"error: {error}; nothing was written", fg="red"), err=True)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        click.echo("interrupted: nothing was written; the same command goes on from there", err=True)
        raise SystemExit(1) from error
    _print_outcome(outcome, own["output"], style)


@contextmanager
def _progress(style: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error, where somebody looks at it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=style == "json" or not console.is_terminal) as bar:
        task = bar.add_task("calibrating", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what or "measuring")


def _print_outcome(outcome: Outcome, output: Path, style: str) -> None:
    from dataclasses import asdict

    from modernizer.report import shown

    steps = [asdict(step) for step in outcome.steps]
    if style == "json":
        measured = {"measured": outcome.objective.name, "unit": outcome.objective.unit}
        losses = {"before": outcome.before, "after": outcome.after}
        counts = {"tokens": outcome.tokens, "held_out": outcome.held_out, "notes": outcome.notes}
        click.echo(json.dumps({**measured, **losses, **counts, "rules": steps, "written": str(output)}, indent=2))
        return
    for step in outcome.steps:
        said = f"largest difference {step.difference:.1e} in float64" if step.kind == "exact" else f"{step.change:+.4f}"
        click.echo(f"{step.rule:10}  {step.kind:14}  {said}")
        for note in step.notes:
            click.echo(f"    note: {note}")
    for note in outcome.notes:
        click.echo(f"note: {note}")
    change = f"{outcome.before:.4f} -> {outcome.after:.4f} ({outcome.after - outcome.before:+.4f})"
    click.echo(f"{outcome.objective.name}: {change} {outcome.objective.unit}, on {outcome.held_out:,} held-out tokens")
    click.echo(f"written: {shown(output)}")


@main.command()
@click.option("--checkpoint", "source", required=True, type=click.Path(path_type=Path), help="The tuned weights.")
@click.option("--output", "-o", "target", required=True, type=click.Path(path_type=Path), help="The file to write.")
def export(source: Path, target: Path) -> None:
    """Make tuned weights those of the plain modern model, after `apply --finish`.

    What existed only for the bridge goes into the weights, by the map that `apply --finish` recorded.
    """
    from modernizer.report import shown
    from modernizer.weights import MapError
    from modernizer.weights.recorded import FOLDER, load_maps, recorded

    used = [path for path in recorded(Path.cwd()) if FINISH in path.stem.partition("-")[2].split("+")]
    if not used:
        raise click.UsageError(
            f"nothing to fold is recorded in {FOLDER} here or above: `modernize apply --finish` first"
        )
    try:
        from modernizer.weights.checkpoint import CheckpointError
        from modernizer.weights.migrate import migrate as carry_over
    except ImportError as error:
        raise click.UsageError('export needs PyTorch: pip install "modernizer[torch]"') from error
    try:
        carry_over(source, target, load_maps(used[-1:]), drop_optimizer=True)  # of what is folded it knows nothing
    except (MapError, CheckpointError) as error:
        click.echo(click.style(f"error: {error}; nothing was written", fg="red"), err=True)
        raise SystemExit(2) from error
    click.echo(f"{shown(target)}: a plain model's weights, with {shown(used[-1])}")


@main.command(name="rules")
def list_rules() -> None:
    """List the rules, with what each promises."""
    from modernizer.registry import all_rules

    rules = _or_exit(all_rules)
    width = max(map(len, rules), default=0)
    for rule in rules.values():
        said = f"{rule.summary} (only where it is named)" if rule.on_request else rule.summary
        click.echo(f"{rule.name:{width}}  {rule.effect.value:10}  {said}")


@main.command()
@click.argument("rule")
def explain(rule: str) -> None:
    """Show what RULE does, what it promises and when it refuses."""
    from modernizer.registry import page

    (found,) = _selected([rule])
    click.echo(f"{found.name}: {found.summary}\n")
    click.echo(f"effect: {found.effect.value} ({found.effect.promise})")
    for option in found.options:
        choices = f" ({', '.join(option.choices)})" if option.choices else ""
        click.echo(f"option: --{option.name.replace('_', '-')}{choices} {option.help}")
    if found.on_request:
        click.echo("looked for only where it is named")
    if found.after:
        click.echo(f"runs after: {', '.join(found.after)}")
    text = page(found)
    if not text:
        return
    click.echo()
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(text))
    else:
        click.echo(text)


def _selected(names: Iterable[str]) -> list[Rule]:
    from modernizer.registry import select

    asked = [part.strip() for name in names for part in name.split(",")]
    if "" in asked:
        raise click.UsageError("--rule wants names with a comma between them")
    return _or_exit(lambda: select(asked))


def _settled_rules(before: Path, after: Path) -> list[Rule]:
    """The rules that were applied, as far as can be told: they find less to do in one program than in the other.

    Where nothing was legacy, there is more that such a rule would do itself.
    """
    from modernizer.pipeline import check as look
    from modernizer.registry import all_rules
    from modernizer.report import Status

    def findings(path: Path, rule: Rule, status: Status) -> int:
        return sum(site.status is status for site in look([path], [rule], {}).sites)

    def is_settled(rule: Rule) -> bool:
        if rule.on_request:
            return findings(before, rule, Status.MODERN) < findings(after, rule, Status.MODERN)
        return findings(before, rule, Status.LEGACY) > findings(after, rule, Status.LEGACY)

    return [rule for rule in _or_exit(all_rules).values() if is_settled(rule)]


def _proof(
    paths: Sequence[Path], model: str | None, inputs: str | None, call: str | None, options: Options
) -> Callable[[Report], None]:
    from modernizer.proving import Experiment, prove
    from modernizer.verify import VerifyError

    if not model or not inputs:
        raise click.UsageError("--verify needs --model and --input: expressions that build the model and its input")
    experiment = Experiment(model, inputs, call)

    def step(report: Report) -> None:
        try:
            prove(report, paths, experiment, options)
        except VerifyError as error:
            raise click.UsageError(str(error)) from error

    return step


def _rule_options(rules: Sequence[Rule], given: Mapping[str, Any]) -> Options:
    options = {name.removeprefix("option_"): value for name, value in given.items()}
    for objection in filter(None, (rule.objection(options) for rule in rules)):
        raise click.UsageError(objection)
    return options


def _or_exit(load: Callable[[], T]) -> T:
    from modernizer.registry import RegistryError

    try:
        return load()
    except RegistryError as error:
        raise click.UsageError(str(error)) from error


def _print_report(report: Report, style: str, *, with_diff: bool = False) -> NoReturn:
    """Prints the report and ends the process with its exit code. With a diff, the diff alone is on stdout."""
    from modernizer.report import as_json, diff_lines

    patch = [line for change in report.changes for line in diff_lines(change)] if with_diff else []
    if style == "json":
        click.echo(json.dumps({**as_json(report), "diff": "".join(patch) if with_diff else None}, indent=2))
    else:
        for line in patch:
            click.echo(_coloured_diff(line), nl=False)
        _print_lines(report, to_stderr=with_diff)
    raise SystemExit(report.exit_code)


def _print_lines(report: Report, *, to_stderr: bool) -> None:
    from modernizer.report import Status, shown, site_lines, summary_line

    for site in report.sites:
        if report.command == "check" and site.status is Status.MODERN:
            continue  # not a finding; the summary counts it
        for line in site_lines(site):
            click.echo(_coloured_site(line), err=to_stderr)
    if report.verification and report.verification.passed:
        click.echo(str(report.verification), err=to_stderr)
    _print_trouble(report)
    if report.weight_map:
        click.echo(f"weights: {shown(report.weight_map)} (modernize migrate OLD -o NEW carries checkpoints over by it)")
    click.echo(summary_line(report), err=to_stderr)


def _print_trouble(report: Report) -> None:
    from modernizer.report import problem_line

    for remark in report.remarks:
        click.echo(remark, err=True)
    for problem in report.problems:
        click.echo(click.style(problem_line(problem), fg="red"), err=True)
        if problem.trace and click.get_current_context().find_root().params.get("traceback"):
            click.echo(problem.trace, err=True)


def _coloured_site(line: str) -> str:
    word, colon, rest = line.partition(":")
    return click.style(word, fg=COLOURS[word], bold=True) + colon + rest if word in COLOURS else line


def _coloured_diff(line: str) -> str:
    colour = {"+": "green", "-": "red", "@": "cyan"}.get(line[0])
    return click.style(line, fg=colour, bold=line.startswith(("+++", "---")))
