"""fastroute: kernels that turn the FLOPs saved by dynamic-routing super-resolution into time saved."""

import os
import sys
from typing import TYPE_CHECKING

__version__ = "0.1.0"


def _is_command_line() -> bool:
    """Whether this process is `fastroute` or ``python -m fastroute``."""
    program = (sys.argv or [""])[0]
    # What Python calls the program while it looks for the module to run.
    if program == "-m":
        return "fastroute" in sys.orig_argv and sys.orig_argv[sys.orig_argv.index("fastroute") - 1] == "-m"
    return os.path.splitext(os.path.basename(program))[0] == "fastroute"


# The command line shows its help without waiting for torch; there a command imports the names when it begins.
if TYPE_CHECKING or not _is_command_line():
    from fastroute._api import *  # noqa: F403
    from fastroute._api import __all__  # noqa: F401
