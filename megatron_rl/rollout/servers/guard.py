"""Runs a command, and ends it with all its children when the process that started the guard is gone.

Run as a file, `guard.py COMMAND...`; it needs nothing of this package. Started as the leader of a process group, with
a pipe as standard input that nobody writes to: it closes when its owner ends, however that happens. Servers fork; none
of their processes may outlive a run and keep a GPU. The guard is two processes: Ray kills a worker's children when it
ends that worker, but not their children.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

GRACE_SECONDS = 5.0
"""From asking the command to end to killing what is left of it."""


def main(command: list[str]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the group gets one from us below
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which ends us in order
    if watcher := os.fork():
        os.waitpid(watcher, 0)
        os.killpg(0, signal.SIGKILL)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_owner, args=(child,), daemon=True).start()
    status = child.wait()
    print(f"the server has ended, status {status}", flush=True)
    os.killpg(0, signal.SIGKILL)


def _end_with_owner(child: subprocess.Popen[bytes]) -> None:
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGTERM)
    try:
        child.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
