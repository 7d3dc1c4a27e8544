"""`megatron-rl`, except that weights may go through mapped memory without a GPU: in memory of the host."""

from __future__ import annotations

import sys

from megatron_rl.cli import main
from megatron_rl.config import checks

if __name__ == "__main__":
    checks._cuda_ipc = lambda config: iter(())
    sys.exit(main(sys.argv[1:]))
