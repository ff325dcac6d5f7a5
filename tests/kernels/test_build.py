"""How the native kernel is compiled, what happens without a compiler, and that it touches no memory but its own."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from sparseout.kernels import cpu

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")


@pytest.fixture(scope="module")
def build():
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("build_kernel", ROOT / "tools/build_kernel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/no/such/compiler -O2", "there is no /no/such/compiler"),
        ("false", "false failed: "),
    ],
)
def test_a_compiler_that_does_not_compile_leaves_nothing_behind(build, monkeypatch, tmp_path, compiler, reason):
    monkeypatch.setenv("CC", compiler)
    target = tmp_path / "_native.so"
    target.write_text("an older one")
    assert build.compile_kernel(target).startswith(reason)
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_it_compiles_without_a_warning_wherever_there_are_headers_of_c_alone(build, tmp_path):
    flags = ["-O0", *build.FLAGS[1:], "-Wall", "-Wextra", "-Werror", "-DONE_TARGET", "-fsyntax-only"]
    command = [COMPILER, *flags, "-I", str(build.SOURCE.parent), str(build.SOURCE)]
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""
    text = "".join(path.read_text() for path in build.PARTS)
    headers = [line.split()[1] for line in text.splitlines() if line.startswith("#include")]
    assert set(headers) == {"<math.h>", "<stdint.h>", "<string.h>", *(f'"{path.name}"' for path in build.PARTS)}


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [pytest.param(COMPILER, marks=needs_compiler), "/no/such/compiler"])
def test_a_wheel_is_of_this_platform_if_something_was_compiled_and_of_all_otherwise(tmp_path, compiler):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    made = cpu.LIBRARY.stat().st_mtime_ns if cpu.LIBRARY.exists() else None
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | {"CC": compiler})
    (path,) = tmp_path.glob("*.whl")
    compiled = compiler == COMPILER
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_") if compiled else "any"
    assert path.name.endswith(f"-py3-none-{platform}.whl")
    with zipfile.ZipFile(path) as wheel:
        assert ("sparseout/kernels/_native.so" in wheel.namelist()) == compiled
        assert {f"sparseout/kernels/{path.name}" for path in cpu.SOURCES} <= set(wheel.namelist())
    assert made == (cpu.LIBRARY.stat().st_mtime_ns if cpu.LIBRARY.exists() else None)  # the tree's own is left alone


WORK = """
import itertools, math, sys, torch
from pathlib import Path
from sparseout.kernels import cpu
cpu.LIBRARY = Path(sys.argv[1])
assert not cpu.obstacle(), cpu.obstacle()
seed = 2**63 - 1
shapes = [((), ()), ((1,), ()), ((1023,), ()), ((40_001,), ()), ((5, 700, 3), (2,)), ((9, 5, 100), (1,)),
          ((2, 3000), (1,)), ((3, 2, 5, 3, 7, 2), (0, 2, 4)), ((3, 2, 5, 3, 7, 2), (1, 3, 5)), ((7, 0), (1,))]
dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
for dtype, (shape, dims), p in itertools.product(dtypes, shapes, (0.3, 1e-9)):
    x, info = torch.randn(shape).to(dtype), torch.finfo(dtype)
    if x.numel() > 20:
        x.view(-1)[:9] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, info.max, info.tiny, -info.eps, 1.0])
    qs, units = (0.0, 0.1, 0.5, 1.0, 1.3, 1.5, 2.0, 2.5, 3.0, 4.0, 7.0, 1e300), (1.0, 1e-30, 1e30)
    for q, unit in itertools.product(qs, units):
        params = (q, unit, 1.5)
        cpu.run(cpu.VALUE, None, x, seed, p, params, dims)
        if dtype in dtypes[:2]:
            cpu.run(cpu.SLOPE, None, x, seed, p, params, dims)
        for exact in (False, True):
            cpu.run(cpu.GRADIENT, x, x, seed, p, params, dims, exact)
        cpu.matched(x, q)
for dtype, rows, ins, outs in itertools.product(dtypes, (1, 3), (1, 9, 1024, 2500), (1, 17, 1025)):
    w, b, info = torch.randn(ins, outs).to(dtype), torch.randn(outs).to(dtype), torch.finfo(dtype)
    for density in (0, 0.1, 1):
        x = (torch.randn(rows, ins) * (torch.rand(rows, ins) < density)).to(dtype)
        x[0, 0] = math.nan if density else 0.0
        cpu.linear(x, w, b, x.numel())
        cpu.linear(x, w, None, 0)
print("done")
"""


@pytest.mark.slow
@needs_compiler
def test_it_touches_no_memory_but_its_own_and_does_nothing_undefined(build, monkeypatch, tmp_path):
    runtime = subprocess.run([COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler has no AddressSanitizer")
    monkeypatch.setenv("CC", COMPILER)
    checks = ["-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-DONE_TARGET"]
    target = tmp_path / "_native.so"
    assert build.compile_kernel(target, ["-O1", *build.FLAGS[1:], *checks]) == ""
    own = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WORK, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]
