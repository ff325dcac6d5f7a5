"""Programs in processes of their own, forked from one that has torch imported already: that takes seconds each time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

SERVER = """
import architectures
architectures.let_torchvision_import()
import json, os, sys, traceback, types
import sparseout, torch._dynamo

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(job["folder"])
        for number, name in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        status = 1
        try:
            exec(compile(job["program"], "<program>", "exec"), main.__dict__)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Done(NamedTuple):
    """A program that has ended."""

    returncode: int
    stdout: str
    stderr: str


class Forks:
    """A process that forks for every program that it is given. Warnings are errors there."""

    def __init__(self, environment):
        command = [sys.executable, "-W", "error", "-c", SERVER]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, program: str, folder: Path) -> Done:
        """Run a program in `folder`."""
        out, err = (folder.parent / f"{folder.name}.{name}" for name in ("out", "err"))
        job = {"program": program, "folder": str(folder), "out": str(out), "err": str(err)}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return Done(int(self._server.stdout.readline()), out.read_text(), err.read_text())

    def close(self):
        self._server.communicate()
