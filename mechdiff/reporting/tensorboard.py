"""Log a run to TensorBoard, as a place to work in.

1. Each record is a scalar ``site/quantity/positions``, followed by its control and by the parameters that
   tell it apart, so that scalars are grouped by site. What belongs to no site stands under ``model``.
2. Records that differ in their layer or their k alone are curves over it, which the custom scalars show with
   intervals and with their controls: `mechdiff.reporting.curves`.
3. The numbers that the report speaks of stand beside the hyperparameters, under the same names in every run:
   `mechdiff.reporting.hyperparameters`.
4. The projector shows states of both models by the class of their prompt: `mechdiff.reporting.projector`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers.logger import DummyLogger

from mechdiff.data.store import ActivationStore
from mechdiff.reporting.curves import log_curves, told_apart
from mechdiff.reporting.hyperparameters import log_hyperparameters
from mechdiff.reporting.projector import log_states
from mechdiff.results import Record, Results

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


def log_results(
    logger: SummaryWriter | Logger | None,
    results: Results,
    figures: Mapping[str, Figure],
    stores: Mapping[str, ActivationStore] | None = None,
    step: int = 0,
) -> None:
    """Log records, curves, figures, hyperparameters and states.

    A logger of another kind than TensorBoard's receives the scalars alone. Lightning writes hyperparameters
    before there is any result, and TensorBoard shows the first that it finds: make the logger with
    ``default_hp_metric=False``.

    Args:
        logger: A TensorBoard writer, a Lightning logger, or None to log nothing.
        results: Table of a run.
        figures: What was drawn from it, by name.
        stores: States of ``source`` and ``target``, for the projector.
        step: Global step of the scalars and figures.
    """
    if logger is None or isinstance(logger, DummyLogger):
        return
    scalars = {tag: r.value for tag, r in tagged(results).items() if r.value is not None}
    writer: Any = getattr(logger, "experiment", logger)
    if not hasattr(writer, "add_scalar"):
        logger.log_metrics(scalars, step)  # type: ignore[union-attr]
        return
    for tag, value in scalars.items():
        writer.add_scalar(tag, value, step)
    log_curves(writer, results)
    log_hyperparameters(logger, writer, results, step)
    for name, figure in figures.items():
        writer.add_figure(f"figures/{name}", figure, step)
    log_states(writer, results, stores or {})
    writer.flush()


def tagged(results: Results) -> dict[str, Record]:
    """Give each record a tag of its own, such as ``resid_post.12/r2_delta/last/mean_shift``."""
    names = told_apart(list(results), lambda r: r.site)
    tags = {f"{r.site or 'model'}/{name}": r for r, (name, _) in zip(results, names, strict=True)}
    assert len(tags) == len(results), "two records share a tag"
    return tags
