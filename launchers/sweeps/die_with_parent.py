"""A command that ends with its parent, on some of the cores: `python die_with_parent.py PARENT CORE,CORE… COMMAND…`.

It is a process of its own before the command, because little is safe between a fork and an exec. It imports only the
standard library.
"""

import ctypes
import os
import signal
import sys

SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux' prctl; it survives an exec


def main() -> None:
    """Ties this process to its parent, then replaces it by the command."""
    parent, cores, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call above
            raise SystemExit(1)
        if cores:
            os.sched_setaffinity(0, map(int, cores.split(",")))
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # a scheduler's warning is for the parent, which passes it on
    os.execv(command[0], command)  # noqa: S606 (a list of our own making)


if __name__ == "__main__":
    main()
