"""Leave what a run found where every reader looks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from mechdiff.data.store import ActivationStore
from mechdiff.files import whole
from mechdiff.reporting.figures import drawable
from mechdiff.reporting.table import tables
from mechdiff.reporting.tensorboard import log_results
from mechdiff.results import Results

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


def write_run(
    results: Results,
    items: Sequence[dict[str, Any]],
    folder: str | Path | None,
    logger: Logger | None,
    console: Console,
    stores: Mapping[str, ActivationStore] | None = None,
) -> None:
    """Write the table, the values per prompt, figures and TensorBoard, and print a summary with their paths.

    Args:
        results: The records of the run.
        items: One row per prompt and arm.
        folder: Folder of the run; None prints the summary and writes nothing.
        logger: Logger of the run.
        console: Where to print.
        stores: States of ``source`` and ``target``, for TensorBoard's projector.
    """
    for table in tables(results):
        console.print(table)
    if folder is None:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"results": folder / "results.json"}
    if items:  # where there is a table, they are there as well
        paths["per prompt"] = folder / "items.parquet"
        with whole(paths["per prompt"]) as part:
            pq.write_table(pa.Table.from_pylist(list(items)), part)
    results.write(paths["results"])
    figures = {}
    for number, (name, file, plot) in enumerate(drawable(results)):
        path = folder / "figures" / file
        figures[name] = plot(results, path)
        paths[f"figure {number}" if number else "figure"] = path
    log_results(logger, results, figures, stores)
    paths["TensorBoard"] = folder.parent
    for what, path in paths.items():
        console.print(f"{what:>12}  {path}", soft_wrap=True, highlight=False)
