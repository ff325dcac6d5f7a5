"""The options of a run: one dataclass a task, from which the command line, TOML files and the records are all made."""

import dataclasses
import json
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sparseout._utils.validation import expected
from sparseout.baselines import METHODS
from sparseout_experiments.fields import choice, flag, number, option, reads, text, whole

FILE = "config.toml"  # of a run's folder
Named = Callable[[str], str]


def _scale(value: Any) -> float | str:
    return value if value in ("paper", "matched") else reads(lambda number: 0 < number < math.inf)(value)


_SCALE = "paper (beta = 1), matched (the power of Dropout's noise) or a number > 0 (the unit of x)"


def _winners(value: Any) -> float:
    count = reads(lambda count: 0 < count < 1 or (count >= 1 and count % 1 == 0))(value)
    return count if count < 1 else int(count)


_WINNERS = "a number > 0 and < 1 (the fraction of units) or a whole number >= 1 (of units)"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every task can be told."""

    method: str = choice("sparseout", "What makes activations sparser or denser.", *METHODS)
    p: float = number(0.5, "Drop probability.", below=1)
    q: float = number(1.5, "Exponent: below 2 sparser, above 2 denser, 2 is Dropout; of a penalty: 1.")
    gradient: str = choice("detached", "Slope of the noise.", "detached", "exact")
    scale: float | str = option("paper", "Strength of the noise.", _SCALE, _scale)
    target_sparsity: float | None = option(
        None,
        "Mean Hoyer of what the noise layers take in: q moves until it is met, from the q given [2.5], at the scale "
        "given [matched].",
        "a number > 0 and < 1",
        reads(lambda value: 0 < value < 1),
    )
    q_min: float | None = number(None, "How far down q may move: 1.")
    q_max: float | None = number(None, "How far up q may move: 4.")
    per_example: bool = flag(True, "Bridgeout: noise for every example, and not one for the batch.")
    c: float = number(0.01, "Shakeout: the constant, in the unit of weights.")
    strength: float = number(1e-3, "Penalty: what its L_q^q of the activations is multiplied by.")
    k: float = option(0.1, "k-winners: how many units win.", _WINNERS, _winners)
    k_eval: float | None = option(None, "k-winners: how many in evaluation: as k.", _WINNERS, _winners)
    boost: float = number(1.0, "k-winners: how much units are preferred that won seldom.")
    seed: int = whole(0, "Of weights, order, augmentation and noise.", low=0)
    epochs: int = whole(20, "Epochs of the schedule.")
    budget_minutes: float | None = option(
        None,
        "Minutes of training, evaluation included: the schedule ends with them.",
        "a finite number > 0",
        reads(lambda value: 0 < value < math.inf),
    )
    data: str = text("", "A data set: a name, a hub id, a folder or a file.")
    train_size: int | None = whole(None, "Use so many training examples (tokens) only.")
    valid_size: int | None = whole(None, "Hold out so many: a tenth of train, or what the set has for it.")
    test_size: int | None = whole(None, "Test on so many only.")
    split_seed: int = whole(0, "Of the split into training and validation.", low=0)
    batch: int = whole(64, "Examples a step and process.")
    lr: float = number(1e-3, "Learning rate at its highest.")
    weight_decay: float = number(0.0, "Weight decay.")
    clip: float = number(0.0, "Largest norm of the gradient, 0 for none.")
    device: str = choice("auto", "A GPU where there is one, if auto.", "auto", "cpu", "cuda")
    precision: str = choice("fp32", "Of matrix products and activations.", "fp32", "bf16", "fp16")
    compile: bool = flag(False, "Compile the training step.")
    checkpoint_minutes: float = number(5.0, "Save the state so often, and after every epoch.")
    track: str | None = text(None, "A tracker that Accelerate knows, such as tensorboard.", "the name of a tracker")  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Autoencoder(Config):
    """Reconstruct images through one hidden ReLU layer, with the noise on its code."""

    data: str = text("digits", "digits, mnist, cifar10, cifar100, a hub id or a folder of images.")
    units: int = whole(256, "Width of the code.")


@dataclass(frozen=True, kw_only=True)
class Image(Config):
    """Classify images with a Wide-ResNet, with the noise between the two convolutions of every block."""

    data: str = text("digits", "digits, mnist, cifar10, cifar100, a hub id or a folder of images with labels.")
    p: float = number(0.3, "Drop probability.", below=1)
    depth: int = option(16, "6 n + 4 layers.", "6 n + 4 with n >= 1", lambda value: _depth(value))
    width: int = whole(2, "Factor on the channels 16, 32, 64.")
    norm: str = choice("batch", "Normalisation.", "batch", "group", "none")
    place: str = choice(
        "post-relu",
        "Of the noise: after the second ReLU (Zagoruyko & Komodakis 2016), or between first convolution and second "
        "norm (the code published with the paper).",
        "post-relu",
        "pre-norm",
    )
    epochs: int = whole(10, "Epochs of the schedule.")
    schedule: str = choice("one-cycle", "Of the learning rate; steps: x 0.2 at 30, 60, 80%.", "one-cycle", "steps")
    batch: int = whole(128, "Images a step and process.")
    lr: float = number(0.1, "Learning rate at its highest.")
    momentum: float = number(0.9, "Nesterov momentum.", below=1)
    weight_decay: float = number(5e-4, "Weight decay.")
    augment: bool = flag(True, "Pad, crop and, as --flip says, mirror the training images.")
    flip: bool | None = flag(None, "Mirror them left to right, half of the time: coloured yes, grey no.")  # type: ignore[arg-type]
    channels_last: bool = flag(False, "Memory format of the network.")


@dataclass(frozen=True, kw_only=True)
class Language(Config):
    """Predict the next word with LSTM layers, with the noise on the input and on every layer's output."""

    data: str = text(
        "topics",
        "topics (Python's help texts), wikitext-2, a hub id, a folder or a file of text; Penn Treebank: a folder.",
    )
    model: str = choice("lstm", "A plain LSTM, or AWD-LSTM (Merity, Keskar & Socher 2017).", "lstm", "awd")
    embedding: int | None = whole(None, "Width of embedding and last layer: 200, awd 400.")
    units: int | None = whole(None, "Width of the other layers: 200, awd 1150.")
    layers: int | None = whole(None, "Number of layers: 2, awd 3.")
    words: int | None = whole(None, "Size of the vocabulary: every word of the training text.", low=3)
    bptt: int | None = whole(None, "Words a window: 35, awd 70 (its lengths vary).", low=2)
    batch: int = whole(20, "Columns of text side by side, of each process.")
    epochs: int = whole(10, "Epochs of the schedule.")
    lr: float | None = number(None, "Learning rate at its highest: 0.002 (Adam, down to 0), awd 30 (NT-ASGD).")  # type: ignore[assignment]
    clip: float = number(0.25, "Largest norm of the gradient, 0 for none.")
    weight_decay: float | None = number(None, "Weight decay: 0, awd 1.2e-6.")  # type: ignore[assignment]
    p_input: float | None = number(None, "p on the embedding: as p.", below=1)
    q_input: float | None = number(None, "q on the embedding: as q.")
    p_between: float | None = number(None, "p between layers: as p.", below=1)
    q_between: float | None = number(None, "q between layers: as q.")
    p_output: float | None = number(None, "p on the last layer: as p.", below=1)
    q_output: float | None = number(None, "q on the last layer: as q.")
    locked: bool | None = flag(None, "One mask for all times of a window: no, awd yes.")  # type: ignore[arg-type]
    weight_drop: float | None = number(None, "Drop of recurrent weights: 0, awd 0.5.", below=1)
    embedding_drop: float | None = number(None, "Drop of whole words: 0, awd 0.1.", below=1)
    activation_penalty: float | None = number(None, "On the squares of the last layer, after noise: 0, awd 2.")
    temporal_penalty: float | None = number(None, "On the squares of its changes in time: 0, awd 1.")


TASKS: dict[str, type[Config]] = {"autoencoder": Autoencoder, "image": Image, "language": Language}

# What "not given" amounts to, for each kind of language model.
_BY_MODEL = {
    "lstm": {
        "embedding": 200, "units": 200, "layers": 2, "bptt": 35, "lr": 2e-3, "weight_decay": 0.0, "locked": False,
        "weight_drop": 0.0, "embedding_drop": 0.0, "activation_penalty": 0.0, "temporal_penalty": 0.0,
    },
    "awd": {
        "embedding": 400, "units": 1150, "layers": 3, "bptt": 70, "lr": 30.0, "weight_decay": 1.2e-6, "locked": True,
        "weight_drop": 0.5, "embedding_drop": 0.1, "activation_penalty": 2.0, "temporal_penalty": 1.0,
    },
}  # fmt: skip
_SITES = ("input", "between", "output")
# What `baselines.make` is told for each method.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "dropout": ("p",),
    "sparseout": ("p", "q", "gradient", "scale"),
    "bridgeout": ("p", "q", "per_example"),
    "shakeout": ("p", "c"),
    "gaussian": ("p",),
    "penalty": ("q", "strength"),
    "kwinners": ("k", "k_eval", "boost"),
}
_STEERED = ("target_sparsity", "q_min", "q_max")
_BY_METHOD = {"penalty": {"q": 1.0}}  # defaults that are not those of all


def _used(method: str) -> set[str]:
    """The options that are for some methods, of those this one has a use for."""
    of_sites = {"p": "p" in ARGUMENTS[method], "q": method == "sparseout"}
    sites = {f"{name}_{site}" for name, used in of_sites.items() if used for site in _SITES}
    return {*ARGUMENTS[method], *sites, *(_STEERED if method == "sparseout" else ())}


# Options that a method has no use for: given all the same, they would be ignored in silence.
_UNUSED = {method: set.union(*map(_used, METHODS)) - _used(method) for method in METHODS}
# What a task cannot have, and why.
_FUSED = "the weights after the noise are inside LSTM layers, out of its reach"
_REFUSED = {
    "language": {
        "bridgeout": _FUSED,
        "shakeout": _FUSED,
        "kwinners": "the states of an LSTM have both signs, and the largest are not the most active",
    }
}
_AFTER_RELU = {
    "bridgeout": "acts on the convolution after the noise",
    "shakeout": "acts on the convolution after the noise",
    "kwinners": "takes the largest of activations that are not negative",
}
# Where q begins, and where it may go, if it is to move to a target.
_MOVING: dict[str, Any] = {"q": 2.5, "scale": "matched", "q_min": 1.0, "q_max": 4.0}


def resolve(task: str, given: Mapping[str, Any], named: Named = lambda name: name) -> Config:
    """The configuration of a task from what was given, with every default filled in.

    Values may be texts, as a command line has them. `named` gives an option's name in errors. Raises ValueError.
    """
    if task not in TASKS:
        raise ValueError(expected("task", f"one of {', '.join(TASKS)}", repr(task)))
    known = {entry.name: entry for entry in fields(TASKS[task])}
    values = {}
    for name, value in given.items():
        if name not in known:
            close = f"an option of {task}: {', '.join(known)}"
            raise ValueError(expected(named(name), close, repr(value)))
        if value is None:
            continue
        try:
            values[name] = known[name].metadata["read"](value)
        except (ValueError, TypeError):
            raise ValueError(expected(named(name), known[name].metadata["wanted"], repr(value))) from None
    method = values.get("method", "sparseout")
    if reason := _REFUSED.get(task, {}).get(method):
        raise ValueError(expected(named("method"), f"another for {task}, as {reason}", repr(method)))
    for name in known:
        if name in _UNUSED[method] and name in values:
            raise ValueError(expected(named(name), f"left out, as the method is {method}", repr(values[name])))
    if method in _AFTER_RELU and values.get("place") == "pre-norm":
        raise ValueError(expected(named("place"), f"post-relu, as {method} {_AFTER_RELU[method]}", "'pre-norm'"))
    values = _BY_METHOD.get(method, {}) | values
    if "target_sparsity" in values:
        values = _MOVING | values
        low, q, high = (float(values[name]) for name in ("q_min", "q", "q_max"))
        if not low <= q <= high:
            raise ValueError(expected(named("q"), f"between q_min {low:g} and q_max {high:g}", q))
    elif bounds := [name for name in ("q_min", "q_max") if name in values]:
        raise ValueError(expected(named(bounds[0]), "left out, as there is no target sparsity", values[bounds[0]]))
    config = TASKS[task](**values)
    if isinstance(config, Language):
        of_sites = {f"{name}_{site}": getattr(config, name) for name in "pq" for site in _SITES}
        filled = {**_BY_MODEL[config.model], **of_sites}
        config = dataclasses.replace(config, **{k: v for k, v in filled.items() if getattr(config, k) is None})
    return config


def task_of(config: Config) -> str:
    """The name of the task that a configuration is for."""
    return next(name for name, kind in TASKS.items() if type(config) is kind)


def read(path: Path, task: str, named: Named = lambda name: name) -> dict[str, Any]:
    """The options of a task in a TOML file. Raises ValueError."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            expected(named("config"), "a file that can be read", f"{str(path)!r} ({error.strerror})")
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(expected(named("config"), "a file in TOML", f"{str(path)!r} ({error})")) from None
    if found.pop("task", task) != task:
        raise ValueError(expected(named("config"), f"a file for the task {task}", repr(str(path))))
    return found


def of_folder(folder: Path, task: str | None = None) -> tuple[str, dict[str, Any]]:
    """The task and the options of the run in a folder. Raises ValueError, also where the task is another."""
    try:
        named = tomllib.loads((folder / FILE).read_text(encoding="utf-8")).get("task")
        found = named if isinstance(named, str) else "none"
        values = read(folder / FILE, found)
        resolve(found, values)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / FILE} is not that of a run ({error}): start another folder") from None
    if task not in (None, found):
        raise ValueError(f"the run in {folder} has task = {found!r}, not {task!r}: start another folder")
    return found, values


def write(config: Config) -> str:
    """A configuration as TOML that `read` takes."""
    entries = {name: value for name, value in record(config).items() if value is not None}
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in entries.items())


def record(config: Config) -> dict[str, Any]:
    """A configuration as it is written down: its task, and None for what its method has no use for."""
    used = without_unused(asdict(config), config.method)
    return {"task": task_of(config)} | {name: used.get(name) for name in asdict(config)}


def without_unused(given: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Options without those that a method has no use for."""
    return {name: value for name, value in given.items() if name not in _UNUSED.get(method, ())}


def _depth(value: Any) -> int:
    depth = float(value)
    if depth < 10 or depth % 6 != 4:
        raise ValueError
    return int(depth)
