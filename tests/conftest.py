"""One thread, offline, and nothing left behind by one test for the next."""

import os
from collections.abc import Generator, Iterator
from typing import TypeVar

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and datasets are imported, which read it once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

PLANNED = "planned:"
"""How the reason of a skip begins that is meant to happen in continuous integration as well."""


@pytest.fixture(autouse=True)
def isolate() -> Iterator[None]:
    """Run with one thread, and restore what a test may have set for the whole process."""
    torch.set_num_threads(1)
    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def _fail_unplanned(report: Report) -> Report:
    """Turn a skip into a failure under ``CI=true``, unless its reason begins with ``planned:``."""
    if os.environ.get("CI") != "true" or not report.skipped or hasattr(report, "wasxfail"):
        return report
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith(PLANNED):
        report.outcome = "failed"
        report.longrepr = (
            f"unplanned skip: {reason}\n(with CI=true the reason of a skip must begin with {PLANNED!r})"
        )
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Judge skips of tests."""
    return _fail_unplanned((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Judge skips of whole modules."""
    return _fail_unplanned((yield))
