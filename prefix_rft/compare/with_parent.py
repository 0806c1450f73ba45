"""Becomes the command in its arguments, which gets SIGTERM should the process above it be killed.

A comparison that is killed outright thus leaves no runs behind: they save and end. On Linux; other
systems have no such signal, and a run goes on to its end there.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # it has died before the line above
            sys.exit(1)
    os.execvp(command[0], command)
