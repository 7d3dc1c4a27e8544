"""report.html: one file that shows one run, or several side by side, in any browser, without a network.

`run_data` and `tokens` read; `curves`, `compare`, `token_figures`, `responses` and `differences` make what is drawn;
`page` writes.
"""

from .page import write_report

__all__ = ["write_report"]
