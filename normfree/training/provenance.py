"""What a result has to say of its making: versions, command and commit."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import normfree

COMMAND_VARIABLE = "NORMFREE_COMMAND"  # the command as typed, also for the workers of a parallel sweep


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "normfree": normfree.__version__,
    }


def provenance() -> dict[str, str | None]:
    """What was typed, and the commit of this code (`+` where files differ from it); null outside a checkout."""
    command = os.environ.get(COMMAND_VARIABLE) or shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    here = Path(normfree.__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout: installed from elsewhere
        return {"command": command, "commit": None}
    return {"command": command, "commit": commit}
