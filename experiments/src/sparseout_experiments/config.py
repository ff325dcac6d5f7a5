"""The configuration of a run: its options from the command line, from TOML and for the records."""

import json
import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_type_hints

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, create_model

from sparseout_experiments.message import expected
from sparseout_experiments.option_types import option, wanted
from sparseout_experiments.options import (
    KNOBS,
    METHODS,
    TASKS,
    Config,
    Data,
    Machine,
    PlacesOfP,
    PlacesOfQ,
    Refused,
    Target,
    TargetOfQ,
    Training,
)

FILE = "config.toml"  # of a run's folder
Named = Callable[[str], str]
_MORE: tuple[type[BaseModel], ...] = (TargetOfQ, Target, PlacesOfP, PlacesOfQ)


def _more(method: str) -> list[type[BaseModel]]:
    """What a method has beside its own options: a target to move to, and values for each place."""
    places: list[type[BaseModel]] = [PlacesOfP] if "p" in METHODS[method].model_fields else []
    if method == "sparseout":
        return [PlacesOfQ, *places, TargetOfQ]
    return [*places, Target] if method in KNOBS else places


def _kind(made: type[BaseModel], name: str) -> Any:
    hint = get_type_hints(made, include_extras=True)[name]
    return next((kind for kind in get_args(hint) if kind is not NoneType), hint) if NoneType in get_args(hint) else hint


def _combined(task: str, method: str) -> type[Config]:
    """The class of a task's and a method's options."""
    more = [kind for kind in _more(method) if task == "language" or issubclass(kind, Target)]
    # pydantic reads the fields of the last base first, and a default may depend on what was read before
    targets = [kind for kind in more if issubclass(kind, Target)]
    bases = (TASKS[task], *(kind for kind in more if kind not in targets), METHODS[method], *targets)
    fields = METHODS[method].model_fields
    changed = {
        name: (_kind(METHODS[method], name), option(default, fields[name].description or ""))
        for name, default in TASKS[task].defaults.items()
        if name in fields
    }
    made: type[Config] = create_model(f"{TASKS[task].__name__}_{method}", __base__=bases, **changed)  # type: ignore[call-overload]
    return made


# A class of options for every task and method.
_CLASSES = {task: {method: _combined(task, method) for method in METHODS} for task in TASKS}


# The classes of a task differ in their field `method`, by which pydantic chooses.
_READERS: dict[str, TypeAdapter[Any]] = {
    task: TypeAdapter(Annotated[Union[tuple(classes.values())], Field(discriminator="method")])  # type: ignore[arg-type]  # noqa: UP007
    for task, classes in _CLASSES.items()
}


class Option(NamedTuple):
    """An option of a task, for all methods or for some."""

    kind: Any  # one of `fields`
    help: str
    group: str
    default: Any  # as people read it; None where there is nothing to say


def uses(method: str, name: str) -> bool:
    """Whether a method has a use for an option; those of the run and of the task are for all."""
    of_some = {name for kind in (*METHODS.values(), *_MORE) for name in kind.model_fields}
    return name not in of_some or any(name in kind.model_fields for kind in (METHODS[method], *_more(method)))


@cache
def options_of(task: str) -> dict[str, Option]:
    """The options of a task, whatever the method: first those of methods, then those of every run, then its own."""
    own, classes = TASKS[task], [_CLASSES[task]["sparseout"], *_CLASSES[task].values(), *METHODS.values()]
    more = _MORE if task == "language" else (TargetOfQ, Target)
    groups = {name: "Method" for kind in (*METHODS.values(), *more) for name in kind.model_fields}
    groups |= {name: str(kind.__doc__)[:-1] for kind in (Training, Data, Machine) for name in kind.model_fields}
    groups |= {name: "Task" for name in own.model_fields if name not in groups}
    options = {}
    for name, group in groups.items():
        made = next(kind for kind in classes if name in kind.model_fields)
        field = made.model_fields[name]
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        default = extra.get("default", None if field.is_required() else field.default)
        options[name] = Option(_kind(made, name), field.description or "", group, default)
    methods = tuple(_CLASSES[task])
    help = f"What makes activations sparser or denser: {', '.join(methods)}."
    options["method"] = Option(Literal[methods], help, "Method", "sparseout")
    return options


def resolve(task: str, given: Mapping[str, Any], named: Named = lambda name: name) -> Config:
    """The configuration of a task from what was given, with every default filled in.

    Values may be texts, as a command line has them. `named` gives an option's name in errors. Raises ValueError.
    """
    if task not in TASKS:
        raise ValueError(expected("task", f"one of {', '.join(TASKS)}", repr(task)))
    for name, value in given.items():
        if name not in options_of(task):
            raise ValueError(expected(named(name), f"an option of {task}: {', '.join(options_of(task))}", repr(value)))
    values = {"method": "sparseout"} | {name: value for name, value in given.items() if value is not None}
    try:
        config: Config = _READERS[task].validate_python(values)
        return config
    except ValidationError as error:
        name, text, got = _refused(task, values["method"], error.errors()[0])
    raise ValueError(expected(named(name), text, got))


def _refused(task: str, method: Any, error: Any) -> tuple[str, str, Any]:
    """The name of an option, what it should be, what it is."""
    if error["type"] == "union_tag_invalid":
        names = tuple(METHODS)
        return "method", f"{', '.join(names[:-1])} or {names[-1]}", repr(method)
    if isinstance(refused := error.get("ctx", {}).get("error"), Refused):
        name, text, got = refused.args
        return name, text, got
    name = error["loc"][1]
    if error["type"] == "extra_forbidden":
        return name, f"left out, as the method is {method}", repr(error["input"])
    return name, wanted(options_of(task)[name].kind).text, repr(error["input"])


def task_of(config: Config) -> str:
    """The name of the task that a configuration is for."""
    return next(name for name, kind in TASKS.items() if isinstance(config, kind))


def read(path: Path, task: str, named: Named = lambda name: name) -> dict[str, Any]:
    """The options of a task in a TOML file. Raises ValueError."""
    try:
        options = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(
            expected(named("config"), "a file that can be read", f"{str(path)!r} ({error.strerror})")
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(expected(named("config"), "a file in TOML", f"{str(path)!r} ({error})")) from None
    if options.pop("task", task) != task:
        raise ValueError(expected(named("config"), f"a file for the task {task}", repr(str(path))))
    return options


def of_folder(folder: Path, task: str | None = None) -> tuple[str, dict[str, Any]]:
    """The task and the options of the run in a folder. Raises ValueError, also where the task is another."""
    try:
        saved_task = tomllib.loads((folder / FILE).read_text(encoding="utf-8")).get("task")
        values = read(folder / FILE, str(saved_task))
        resolve(str(saved_task), values)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / FILE} is not that of a run ({error}): start another folder") from None
    if task not in (None, saved_task):
        raise ValueError(f"the run in {folder} has task = {saved_task!r}, not {task!r}: start another folder")
    return str(saved_task), values


def write(config: Config) -> str:
    """A configuration as TOML that `read` takes."""
    entries = {name: value for name, value in record(config).items() if value is not None}
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in entries.items())


def record(config: Config) -> dict[str, Any]:
    """A configuration as it is written down: its task, and None for what its method has no use for."""
    task = task_of(config)
    return {"task": task} | {name: getattr(config, name, None) for name in options_of(task)}


def without_unused(given: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Options without those that a method has no use for; with a method that is none, all."""
    return {name: value for name, value in given.items() if method not in METHODS or uses(method, name)}
