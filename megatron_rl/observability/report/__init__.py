"""report.html: one file that shows one run, or several side by side, in any browser without a network.

`run_data` and `tokens` read the run's files. `curves`, `compare`, `token_figures`, `responses` and `configuration`
prepare the content. `page` writes the file.
"""

from .page import write_report

__all__ = ["write_report"]
