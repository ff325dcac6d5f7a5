"""What is published: one address and one version everywhere, and a library that needs torch alone."""

import email
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = {name: tomllib.loads((ROOT / name / "pyproject.toml").read_text()) for name in (".", "experiments")}
ADDRESS = PROJECT["."]["project"]["urls"]["Repository"]
VERSION = PROJECT["."]["project"]["version"]
NAME_IT = (
    *("README.md", "docs/index.md", "mkdocs.yml", "CITATION.cff", "CHANGELOG.md", "SECURITY.md"),
    *("experiments/README.md", "experiments/pyproject.toml", ".github/ISSUE_TEMPLATE/config.yml"),
)


@pytest.mark.parametrize("name", NAME_IT)
def test_every_place_has_the_address_of_the_repository(name):
    found = re.findall(r"https://github\.com/[\w-]+/sparseout(?=[^\w-])", (ROOT / name).read_text(encoding="utf-8"))
    assert set(found) == {ADDRESS}


def test_every_place_has_the_version():
    changes = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changes[:2] == ["Unreleased", VERSION]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
    assert PROJECT["experiments"]["project"]["version"] == VERSION
    assert f"sparseout=={VERSION}" in PROJECT["experiments"]["project"]["dependencies"]


def test_the_checks_run_the_oldest_torch_that_is_allowed_and_the_one_that_is_pinned():
    jobs = yaml.safe_load((ROOT / ".github/workflows/checks.yml").read_text())["jobs"]
    (oldest,) = re.findall(r"torch>=([\d.]+)", " ".join(PROJECT["."]["project"]["dependencies"]))
    (pinned,) = re.findall(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert [job["torch"] for job in jobs["tests"]["strategy"]["matrix"]["include"]] == [f"{oldest}.0", pinned]


def workflow_commands():
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            yield from (step["run"] for step in job["steps"] if "run" in step)


def test_what_the_workflows_make_can_be_made():
    targets = {target for command in workflow_commands() for target in re.findall(r"\bmake (\w[\w-]*)", command)}
    assert targets >= {"types", "docs", "dist", "test-slow"}
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        metadata = email.message_from_bytes(content.read(f"sparseout-{VERSION}.dist-info/METADATA"))
    assert {name.split("/")[0] for name in names} == {"sparseout", f"sparseout-{VERSION}.dist-info"}
    assert "sparseout/layers.py" in names
    assert not [name for name in names if "experiments" in name or "test" in name]
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == PROJECT["."]["project"]["dependencies"]
    links = re.findall(r"\]\(([^)]+)\)", metadata.get_payload())
    assert len(links) > 10
    assert all(link.startswith("https://") for link in links)
    assert f"![Hoyer sparsity falls as q rises; the price in reconstruction error]({ADDRESS}/raw/" in str(metadata)


def needed(name, seen):
    """The distributions that `name` needs, itself included."""
    if name in seen:
        return
    distribution = importlib.metadata.distribution(name)
    seen[name] = distribution
    for line in distribution.requires or []:
        other = re.match(r"[\w.-]+", line)[0].lower().replace("_", "-")
        if "extra ==" not in line and "win32" not in line:
            try:
                needed(other, seen)
            except importlib.metadata.PackageNotFoundError:
                continue  # for another platform


USE = """
import warnings; warnings.filterwarnings("ignore", "Failed to initialize NumPy")
import torch, sparseout
from torch import nn
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))
print(sparseout.convert_dropout_(model, q=1.5))
controller = sparseout.SparsityController(model, target=0.5)
with sparseout.SparsityMonitor(model) as monitor:
    model(torch.rand(8, 4)).sum().backward()
controller.step()
print(monitor.report(), sparseout.backend(), sparseout.theory.GAUSSIAN, sparseout.baselines.make("kwinners", k=0.5))
"""


@pytest.mark.slow
def test_with_torch_alone_the_wheel_works(wheel, tmp_path):
    """In an environment that holds what torch needs, by links, and the wheel, as pip installs it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env/lib").glob("python3*/site-packages")
    seen = {}
    needed("torch", seen)
    assert "scipy" not in seen
    for distribution in seen.values():
        for top in {Path(file).parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    python = tmp_path / "env/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--quiet", str(wheel)]
    subprocess.run(pip, check=True)
    done = subprocess.run(
        [python, "-I", "-c", USE],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert "changed  2  Dropout(p=0.5" in done.stdout
