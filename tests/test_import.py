"""`import sparseout` imports torch and nothing optional."""

import json
import re
import subprocess
import sys

import pytest

# One process, as each takes seconds to import torch.
PROBE = """
import json, sys
import torch
ours = set(sys.modules) | set(sys.stdlib_module_names)
found = {}

def note(name):
    new = {module.partition(".")[0] for module in set(sys.modules) - ours}
    found[name] = sorted(new - set(sys.stdlib_module_names) - {"torch", "sparseout"})

import sparseout
from sparseout._utils.torch_internals import compiler_loaded
note("alone")
found["compiler"] = [compiler_loaded()]
torch.compile(lambda x: x, backend="eager")(torch.ones(1))
found["compiler"].append(compiler_loaded())
import torch.testing
ours |= set(sys.modules)  # what torch itself imports lazily
model = torch.nn.Sequential(torch.nn.ReLU())
with sparseout.SparsityMonitor(model) as monitor:
    model(torch.randn(3, 4))
str(monitor.report())
found["report"] = sorted({"pandas", "matplotlib"} & set(sys.modules))
found["device"] = torch.cuda.is_initialized()
import sparseout.integrations
note("integrations")
for framework in ("lightning", "transformers"):
    sys.modules[framework] = None
    try:
        __import__(f"sparseout.integrations.{framework}")
    except ImportError as error:
        found[framework] = str(error)
    del sys.modules[framework]
for optional in ("rich", "scipy", "sparseout_experiments"):
    __import__(optional)
    note(optional)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def probed():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_nothing_optional_is_imported_and_no_device_touched(probed):
    assert (probed["alone"], probed["integrations"], probed["device"]) == ([], [], False)


def test_the_compiler_is_loaded_when_something_is_compiled(probed):
    assert probed["compiler"] == [False, True]


def test_a_report_needs_nothing_optional(probed):
    assert probed["report"] == []


@pytest.mark.parametrize("framework", ["lightning", "transformers"])
def test_a_missing_framework_is_said(framework, probed):
    sentence = rf'sparseout.integrations.{framework} needs \w+: pip install "sparseout\[{framework}\]"'
    assert re.fullmatch(sentence, probed[framework])


@pytest.mark.parametrize("optional", ["rich", "scipy", "sparseout_experiments"])
def test_that_test_can_fail(optional, probed):
    assert optional in probed[optional]


def test_a_star_import_leaves_the_module_its_name():
    names: dict = {}
    exec("import sparseout; from sparseout import *", names)
    assert names["sparseout"] is sys.modules["sparseout"]
    assert names["sparseout"].sparseout is sys.modules["sparseout.functional"].sparseout
    assert set(names) >= {"Sparseout", "convert_dropout_", "SparsityMonitor"}
