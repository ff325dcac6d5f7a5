"""Compiles the native kernel: `python tools/build_kernel.py` in a working tree, by itself whenever pip builds or installs.

Without a compiler there is no kernel, the wheel is one for every platform, and plain torch serves.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path(__file__).resolve().parents[1] / "src" / "sparseout" / "kernels"
# IEEE arithmetic, to the bit the same on every machine; without the flag for errno no root would be a vector's.
FLAGS = "-O3 -std=c11 -fPIC -shared -fno-math-errno -fno-trapping-math -ffp-contract=off".split()


def compilers() -> list[list[str]]:
    """The commands to try: `CC` alone where it is set, else the compiler of this platform and of this Python."""
    if os.environ.get("CC"):
        return [shlex.split(os.environ["CC"])]
    named = ["cc", "gcc", "clang", *shlex.split(sysconfig.get_config_var("CC") or "")[:1]]
    return [[name] for name in dict.fromkeys(named)]


def compile_kernel(source: Path, target: Path, flags: list[str] = FLAGS) -> str:
    """Compile `source` into the library `target`; return why that failed, or nothing."""
    fingerprint = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    target.unlink(missing_ok=True)
    if sys.platform == "win32":
        return "Windows is not supported"
    reasons = []
    for compiler in compilers():
        if not shutil.which(compiler[0]):
            reasons.append(f"there is no {compiler[0]}")
            continue
        built = target.with_suffix(f".{os.getpid()}")  # what a running program has loaded is replaced, not changed
        command = [*compiler, *flags, f'-DSOURCE="{fingerprint}"', "-o", str(built), str(source), "-lm"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except (OSError, subprocess.TimeoutExpired) as error:
            reasons.append(f"{compiler[0]} cannot be run: {error}")
            continue
        if result.returncode == 0:
            built.replace(target)
            return ""
        reasons.append(f"{compiler[0]} failed: {result.stderr.strip()[-500:]}")
    return "; ".join(reasons)


class KernelBuildHook(BuildHookInterface):
    """Called by hatchling for wheels and editable installs."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and make it a platform's wheel; or say why not, and leave the wheel one for all platforms."""
        reason = compile_kernel(KERNELS / "native.c", KERNELS / "_native.so")
        if reason:
            self.app.display_warning(f"sparseout is installed without its native kernel: {reason}")
            return
        build_data["artifacts"].append("src/sparseout/kernels/_native.so")
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"  # no part of Python's interface is used


if __name__ == "__main__":
    sys.exit(compile_kernel(KERNELS / "native.c", KERNELS / "_native.so") or 0)
