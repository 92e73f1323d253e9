"""`python -m` in a fork of this process, in which torch and all else is imported already: seconds less than in a new one."""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

LONGEST = 600  # seconds, after which a fork is killed
PACKAGES = ("stage1_vae", "stage2_prior", "pipelines", "tests")


def forked(module: str, *arguments: str, cwd: Path, anew: bool = False) -> subprocess.CompletedProcess:
    """What `python -m module` leaves. anew: with this repository's packages imported anew, from `cwd` if it holds a copy."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = os.fork()
        if process == 0:
            code: Any = 1
            signal.alarm(LONGEST)
            try:
                os.chdir(cwd)
                os.dup2(output.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
                sys.argv = [module, *arguments]
                if anew:
                    sys.path.insert(0, str(cwd))
                    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
                        del sys.modules[name]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 1)
        returncode = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(arguments, returncode, output.read(), errors.read())
