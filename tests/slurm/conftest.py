"""The Slurm cluster of the tests in this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import SlurmCluster, missing

_reason = missing()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Make it visible that the tests were skipped because there is no cluster."""
    skipped = terminalreporter.stats.get("skipped", [])
    if _reason and any(_reason in str(report.longrepr) for report in skipped):
        terminalreporter.section("SLURM WAS NOT TESTED", sep="!", red=True, bold=True)
        terminalreporter.line(f"There is no Slurm cluster: {_reason}")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Three nodes: two for most jobs, and one for a job that takes long."""
    if _reason:
        pytest.skip(_reason)
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster
