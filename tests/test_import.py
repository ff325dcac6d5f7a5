"""`import sparseout` imports torch and nothing optional."""

import re
import subprocess
import sys

import pytest

PROBE = """
import sys
import torch
import torch._dynamo, torch.testing  # imported lazily by torch itself
before = set(sys.modules)
import sparseout
{extra}
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(new - set(sys.stdlib_module_names) - {{"torch", "sparseout"}}))
print(*sorted(name for name in sys.modules if name.startswith("sparseout_experiments")))
"""


def imported_besides_torch(extra=""):
    done = subprocess.run([sys.executable, "-c", PROBE.format(extra=extra)], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_nothing_optional():
    assert imported_besides_torch() == []


def test_nothing_optional_for_integrations():
    assert imported_besides_torch("import sparseout.integrations") == []


@pytest.mark.parametrize("framework", ["lightning", "transformers"])
def test_a_missing_framework_is_said(framework):
    code = f"import sys; sys.modules['{framework}'] = None; import sparseout.integrations.{framework}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    sentence = rf'ImportError: sparseout.integrations.{framework} needs \w+: pip install "sparseout\[{framework}\]"'
    assert re.fullmatch(sentence, done.stderr.strip().split("\n")[-1])


@pytest.mark.parametrize("optional", ["rich", "scipy", "sparseout_experiments"])
def test_that_test_can_fail(optional):
    assert optional in imported_besides_torch(f"import {optional}")


def test_no_device_is_touched():
    code = "import sparseout, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_star_import_leaves_the_module_its_name():
    names: dict = {}
    exec("import sparseout; from sparseout import *", names)
    assert names["sparseout"] is sys.modules["sparseout"]
    assert names["sparseout"].sparseout is sys.modules["sparseout.functional"].sparseout
    assert set(names) >= {"Sparseout", "convert_dropout_", "SparsityMonitor"}
