"""What a training left behind: its event files, hooks, states."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(folder):
    """{tag: {step: value}} of the event files below a folder."""
    found = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return found


def hooks(model):
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


def plain(state):
    """A state with lists for tensors, that == can compare."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, torch.Tensor) else state


def run(command, **options):
    """Run a command whose Python finds what tests share."""
    path = os.pathsep.join(filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False, **options)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def failed():
    raise RuntimeError("stopped")


def stop(interrupted, how, folder, **options):
    """Run a module's `interrupted(folder, how)` to its end: by an exception, or in a process of its own by a kill."""
    if how == "a kill":
        name = interrupted.__module__
        code = "import sys, pathlib, architectures; architectures.let_torchvision_import(); "
        code += f"import tracked, {name}; {name}.interrupted(pathlib.Path(sys.argv[1]), tracked.killed)"
        done = run([sys.executable, "-c", code, str(folder)])
        assert done.returncode == -signal.SIGKILL, done.stderr
    else:
        with pytest.raises(RuntimeError, match="stopped"):
            interrupted(folder, failed, **options)


def on_two_processes(code, folder):
    """What two processes printed after "result", run by torch's launcher, which gives them `folder`."""
    script = folder / "script.py"
    begin = "import os, pathlib, sys\nimport architectures\narchitectures.let_torchvision_import()\n"
    begin += "sys.stdout = open(f'{sys.argv[1]}/printed-{os.environ[\"RANK\"]}', 'w')\n"  # in one pipe they would mix
    script.write_text(begin + code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*launch, script, folder])
    assert done.returncode == 0, done.stderr
    return [re.findall(r"result (.*)", (folder / f"printed-{rank}").read_text())[0] for rank in (0, 1)]
