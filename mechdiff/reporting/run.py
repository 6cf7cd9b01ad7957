"""Leave what a run found where every reader looks for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from mechdiff.reporting.plotting import plot_clt_bars, plot_patch_bars
from mechdiff.reporting.table import summary
from mechdiff.reporting.tensorboard import log_results
from mechdiff.results import Results

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

FIGURES = {"clt_r2.png": (plot_clt_bars, "r2_delta"), "patch_kl.png": (plot_patch_bars, "kl_raw")}


def write_run(
    results: Results,
    items: Sequence[dict[str, Any]],
    folder: str | Path | None,
    logger: Logger | None,
    console: Console,
) -> None:
    """Write the table, the values per prompt, figures and TensorBoard, and print a summary with their paths.

    Args:
        results: The records of the run.
        items: One row per prompt and arm.
        folder: Folder of the run; None prints the summary and writes nothing.
        logger: Logger of the run.
        console: Where to print.
    """
    console.print(summary(results))
    if folder is None:
        return
    folder = Path(folder)
    paths = {"results": results.write(folder / "results.json")}
    if items:
        pq.write_table(pa.Table.from_pylist(list(items)), folder / "items.parquet")
        paths["per prompt"] = folder / "items.parquet"
    held = {record.quantity for record in results}
    for name, (plot, needed) in FIGURES.items():
        if needed in held:
            (folder / "figures").mkdir(exist_ok=True)
            plot(results, folder / "figures" / name)
            paths["figure" if "figure" not in paths else f"figure {len(paths) - 1}"] = (
                folder / "figures" / name
            )
    log_results(logger, results)
    paths["TensorBoard"] = folder.parent
    for what, path in paths.items():
        console.print(f"{what:>12}  {path}", soft_wrap=True, highlight=False)
