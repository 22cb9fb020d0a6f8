"""Become a program that dies with its parent: `python -I -S child_exec.py PARENT_PID SIGNAL USER COMMAND…`.

A program of its own instead of `preexec_fn`, which may deadlock when the parent has threads. Imports nothing of Delta.
Linux forgets the wish when the user id changes, so the user is changed first.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import sys

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def main() -> None:
    """Change to USER (`-`: stay), ask for SIGNAL when the parent ends, and run COMMAND in place of this program."""
    parent, death_signal, user, *command = sys.argv[1:]
    if user != "-":
        account = pwd.getpwnam(user)
        os.setgroups([])
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)
        os.environ["HOME"] = "/"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != int(parent):
        sys.exit("the parent ended before the program started")
    os.execvp(command[0], command)  # noqa: S606 -- no shell is wanted


if __name__ == "__main__":
    main()
