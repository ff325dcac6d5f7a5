"""At most a dozen parts, each of which imports only those below it, without a circle: read in the source."""

import ast
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseout

PACKAGE = Path(sparseout.__file__).parent
# From the top down. Parts of one line do not know each other.
LAYERS = [
    ["integrations"],
    ["monitor", "control", "inference", "theory"],
    ["baselines", "convert"],
    ["layers"],
    ["functional"],
    ["kernels", "measures"],
    ["_utils"],
]
LAYER = {part: layer for layer, parts in enumerate(LAYERS) for part in parts}


def entries(package: Path) -> set[str]:
    return {path.name for path in package.iterdir()} - {"__init__.py", "py.typed", "__pycache__"}


def imports(package: Path) -> dict[str, set[str]]:
    """What each module imports of the library, wherever in it, by the names of modules; the package itself is ""."""
    files = {path: path.relative_to(package).with_suffix("").parts for path in package.rglob("*.py")}
    modules = {".".join(part for part in parts if part != "__init__"): path for path, parts in files.items()}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} imports relatively"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                first, _, rest = name.partition(".")
                if first == "sparseout":
                    while rest and rest not in modules:  # a name in a module
                        rest = rest.rpartition(".")[0]
                    found[module].add(rest)
    return found


def faults(package: Path) -> list[str]:
    found = []
    if len(parts := entries(package)) > 12:
        found.append(f"{len(parts)} entries: {', '.join(sorted(parts))}")
    graph = imports(package)
    for module, others in graph.items():
        for other in others:
            own, its = module.partition(".")[0], other.partition(".")[0]
            if module and own != its and (not its or LAYER.get(own, 99) >= LAYER.get(its, -1)):
                found.append(f"{module} imports {other or 'the package'}, which is not below it")
    return found + circles(graph)


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves through others."""
    found, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


def test_parts_arrows_and_circles():
    assert faults(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("_utils/validation.py", "from sparseout.layers import Sparseout", "not below it"),
        ("measures/_functions.py", "from sparseout.kernels import ops", "not below it"),
        ("convert/_report.py", "import sparseout", "not below it"),
        ("layers.py", "def late():\n    from sparseout.baselines import KWinners", "not below it"),
        ("convert/_report.py", "from sparseout.convert import _dropout", " -> "),
        ("_utils/validation.py", "import sparseout._utils.modules", " -> "),
    ],
)
def test_what_is_planted_is_found(tmp_path, file, line, fault):
    package = tmp_path / "sparseout"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    with (package / file).open("a", encoding="utf-8") as source:
        source.write(f"\n{line}\n")
    assert any(fault in sentence for sentence in faults(package))


def test_a_thirteenth_part_is_found(tmp_path):
    package = tmp_path / "sparseout"
    for number in range(13):
        (package / f"part{number}").mkdir(parents=True)
    assert "13 entries" in faults(package)[0]


# Of torch's objects that the library meets; methods that it overrides call those of their base class.
TORCH = (nn.Conv2d(1, 1, 1), nn.LSTM(1, 1), nn.Parameter(torch.ones(1)), torch, torch.jit, nn, torch.autograd)
PRIVATE = {name for thing in TORCH for name in dir(thing) if name.startswith("_") and not name.endswith("__")}


def private_names(source: str) -> list[str]:
    """The private names of torch that are read, on anything but `self` and `super()`, or imported."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in PRIVATE:
            names += [ast.unparse(node)] if ast.unparse(node.value) not in ("self", "super()") else []
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "torch":
            path = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            names += [ast.unparse(node)] if any(part.startswith("_") for part in path) else []
    return names


def test_private_names_of_torch_stand_in_one_file():
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    found = {name: names for name, source in files.items() if (names := private_names(source))}
    assert list(found) == ["_utils/torch_internals.py"]


@pytest.mark.parametrize(
    "line", ["x = module._modules", "from torch import _dynamo", "from torch.utils._pytree import tree_map", "torch._C"]
)
def test_a_planted_private_name_is_found(line):
    assert private_names(line)
    assert not private_names("self._modules; super()._apply(f)")


def test_each_function_of_torch_internals_has_a_test_by_its_name():
    tests = (Path(__file__).parent / "test_torch_internals.py").read_text(encoding="utf-8")
    named = " ".join(line for line in tests.splitlines() if line.startswith("def test_"))
    source = ast.parse((PACKAGE / "_utils/torch_internals.py").read_text(encoding="utf-8"))
    functions = [node.name for node in source.body if isinstance(node, ast.FunctionDef)]
    assert len(functions) > 30
    assert [name for name in functions if name not in named] == []
