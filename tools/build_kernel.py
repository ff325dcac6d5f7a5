"""Compiles the native kernel when pip builds or installs; by hand, in a working tree: `python tools/build_kernel.py`.

Without a compiler there is no kernel, the wheel is one for every platform, and plain torch serves.
"""

import hashlib
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path(__file__).resolve().parents[1] / "src" / "sparseout" / "kernels"
SOURCE, LIBRARY = KERNELS / "cpu.c", KERNELS / "_native.so"
PARTS = sorted(KERNELS.glob("*.c"))  # of which SOURCE includes the others

# IEEE arithmetic but for fused products and sums. The first two -fno let the compiler use vectors where it would
# otherwise care for errno and for flags that nobody reads.
FLAGS = ["-O3", "-std=c11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


def compilers() -> list[list[str]]:
    """The commands to try: `CC` alone where it is set, else the compiler of the platform and that of Python."""
    if os.environ.get("CC"):
        return [shlex.split(os.environ["CC"])]
    names = ["cc", "gcc", "clang", *shlex.split(sysconfig.get_config_var("CC") or "")[:1]]
    return [[name] for name in dict.fromkeys(names)]


def compile_kernel(target: Path = LIBRARY, flags: Sequence[str] = FLAGS) -> str:
    """Compile the kernel into `target`; return why that failed, or nothing."""
    target.unlink(missing_ok=True)
    if sys.platform == "win32":
        return "it has not been ported to Windows"
    fingerprint = hashlib.sha256(b"".join(path.read_bytes() for path in PARTS)).hexdigest()[:16]
    reasons = []
    for compiler, targets in itertools.product(compilers(), ([], ["-DONE_TARGET"])):  # not all compilers know clones
        if not shutil.which(compiler[0]):
            reasons.append(f"there is no {compiler[0]}")
            continue
        built = target.with_suffix(f".{os.getpid()}")
        command = [*compiler, *flags, *targets, f'-DSOURCE="{fingerprint}"', "-o", str(built), str(SOURCE), "-lm"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=1200)  # seconds, on a busy machine
        except (OSError, subprocess.TimeoutExpired) as error:
            reasons.append(f"{compiler[0]} cannot be run: {error}")
            continue
        if result.returncode == 0:
            built.replace(target)  # as a whole, for whoever imports it meanwhile
            return ""
        built.unlink(missing_ok=True)
        reasons.append(f"{compiler[0]} failed: {result.stderr.strip()[-500:]}")
    return "; ".join(dict.fromkeys(reasons))


class KernelBuildHook(BuildHookInterface):
    """Called by hatchling before it makes a wheel, or the one that an editable install is."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and make the wheel one for this platform; or say why not, and leave it one for all."""
        if version == "editable":
            target = LIBRARY
        else:
            self.folder = tempfile.TemporaryDirectory()
            target = Path(self.folder.name) / LIBRARY.name
            build_data["force_include"][str(target)] = f"sparseout/kernels/{LIBRARY.name}"
        reason = compile_kernel(target)
        if reason:
            build_data["force_include"].pop(str(target), None)
            self.app.display_warning(f"sparseout is built without its native kernel: {reason}")
            return
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"  # nothing in it depends on a version of Python

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled for a wheel."""
        if version != "editable":
            self.folder.cleanup()


if __name__ == "__main__":
    sys.exit(compile_kernel() or 0)
