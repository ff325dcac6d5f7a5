"""The configuration of a run: its options from the command line, from TOML and for the records."""

import json
import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

from pydantic import BaseModel, ValidationError, create_model

from sparseout_experiments.message import expected
from sparseout_experiments.methods import KNOBS, METHODS, Refused, Target, TargetOfQ
from sparseout_experiments.option_types import option, requirement
from sparseout_experiments.options import TASKS, Config, Data, Machine, PlacesOfP, PlacesOfQ, Training

FILE = "config.toml"  # of a run's folder
Named = Callable[[str], str]
_EXTRAS: tuple[type[BaseModel], ...] = (TargetOfQ, Target, PlacesOfP, PlacesOfQ)


def _extras(method: str) -> list[type[BaseModel]]:
    """Options of a method beside its own: values for each place, and a target to move to."""
    places: list[type[BaseModel]] = [PlacesOfQ] if method == "sparseout" else []
    places += [PlacesOfP] if "p" in METHODS[method].model_fields else []
    return [*places, *([TargetOfQ if method == "sparseout" else Target] if method in KNOBS else [])]


def _annotation(model: type[BaseModel], name: str) -> Any:
    """The type of a field, without None where that stands for a default."""
    hint = get_type_hints(model, include_extras=True)[name]
    types = [type_ for type_ in get_args(hint) if type_ is not NoneType]
    return types[0] if len(types) < len(get_args(hint)) else hint


def _combined(task: str, method: str) -> type[Config]:
    """The class of a task's and a method's options."""
    targets = [extra for extra in _extras(method) if issubclass(extra, Target)]
    places = [extra for extra in _extras(method) if extra not in targets and task == "language"]
    fields = METHODS[method].model_fields
    defaults = {
        name: (_annotation(METHODS[method], name), option(default, fields[name].description or ""))
        for name, default in TASKS[task].defaults.items()
        if name in fields
    }
    # pydantic reads the fields of the last base first, and a default may depend on what was read before
    bases = (TASKS[task], *places, METHODS[method], *targets)
    return create_model(f"{TASKS[task].__name__}_{method}", __base__=bases, **defaults)  # type: ignore[call-overload]


# A class of options for every task and method.
_CLASSES = {task: {method: _combined(task, method) for method in METHODS} for task in TASKS}


class Option(NamedTuple):
    """An option of a task, for all methods or for some."""

    type: Any  # one of `option_types`
    help: str
    group: str
    default: Any  # as people read it; None where there is nothing to say


def uses(method: str, name: str) -> bool:
    """Whether a method has a use for an option; those of the run and of the task are for all."""
    of_some = {name for model in (*METHODS.values(), *_EXTRAS) for name in model.model_fields}
    return name not in of_some or any(name in model.model_fields for model in (METHODS[method], *_extras(method)))


@cache
def options_of(task: str) -> dict[str, Option]:
    """The options of a task, whatever the method: first those of methods, then those of every run, then its own."""
    classes = [_CLASSES[task]["sparseout"], *_CLASSES[task].values(), *METHODS.values()]
    extras = _EXTRAS if task == "language" else (TargetOfQ, Target)
    groups = {name: "Method" for model in (*METHODS.values(), *extras) for name in model.model_fields}
    groups |= {name: str(model.__doc__)[:-1] for model in (Training, Data, Machine) for name in model.model_fields}
    groups |= {name: "Task" for name in TASKS[task].model_fields if name not in groups}
    options = {}
    for name, group in groups.items():
        model = next(model for model in classes if name in model.model_fields)
        field = model.model_fields[name]
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        default = extra.get("default", None if field.is_required() else field.default)
        options[name] = Option(_annotation(model, name), field.description or "", group, default)
    methods = tuple(METHODS)
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
    method = values["method"]
    if method not in tuple(METHODS):
        raise ValueError(expected(named("method"), requirement(options_of(task)["method"].type).text, repr(method)))
    try:
        return _CLASSES[task][method].model_validate(values)
    except ValidationError as error:
        name, text, got = _refused(task, method, error.errors()[0])
    raise ValueError(expected(named(name), text, got))


def _refused(task: str, method: str, error: Any) -> tuple[str, str, Any]:
    """The name of an option, what it should be, what it is."""
    if isinstance(refused := error.get("ctx", {}).get("error"), Refused):
        return refused.args
    name = error["loc"][0]
    if error["type"] == "extra_forbidden":
        return name, f"left out, as the method is {method}", repr(error["input"])
    return name, requirement(options_of(task)[name].type).text, repr(error["input"])


def task_of(config: Config) -> str:
    """The name of the task that a configuration is for."""
    return next(name for name, options in TASKS.items() if isinstance(config, options))


def read(path: Path, task: str, named: Named = lambda name: name) -> dict[str, Any]:
    """The options of a task in a TOML file. Raises ValueError."""
    try:
        options = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        reason = f"{str(path)!r} ({error.strerror})"
        raise ValueError(expected(named("config"), "a file that can be read", reason)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
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
    except (OSError, ValueError, RecursionError) as error:
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
