"""Runs a command, and ends it with all its children once the process that started the guard has ended.

The guard runs as a file, `guard.py COMMAND...`, and needs nothing else of this package. It is started as the leader of
a process group, with a pipe as standard input to which nothing is written: the pipe closes when the owner ends, however
that happens. Servers fork, and none of their processes may outlive a run and keep a GPU. The guard consists of two
processes, since Ray kills the children of a worker that it ends, but not their children.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

GRACE_SECONDS = 5.0
"""Time between the request to end and killing what is left."""


def main(command: list[str]) -> None:
    # The guard sends SIGTERM to its own group below. A signal that is ignored stays ignored in the command, which could
    # then not end in order; a handler does not outlive the start of another program.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which ends the guard in order
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
