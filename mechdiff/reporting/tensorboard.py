"""Log the records of a run to TensorBoard.

1. Each record is a scalar ``question/site/quantity/positions``, followed by its control and by the parameters
   that tell it apart.
2. The same numbers stand as curves over layers, with intervals, in the custom scalars: the step is the layer.
3. Hyperparameters are logged with the headline numbers, so that runs can be sorted by them.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from mechdiff.reporting.cells import component, layer
from mechdiff.reporting.figures import drawable
from mechdiff.results import Record, Results

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from torch.utils.tensorboard import SummaryWriter

HEADLINES = frozenset({"r2_delta", "kl_reduction", "chosen_layer", "patch_onset", "churn_bh", "cpr"})
"""Quantities shown beside the hyperparameters of a run."""

NO_CURVE = frozenset({"chosen_layer", "patch_onset", "weight_change", "weight_share", "weight_rank"})
"""Quantities with a site that are no curve over layers."""


def log_results(logger: SummaryWriter | Logger | None, results: Results, step: int = 0) -> None:
    """Log records, curves over layers, figures and hyperparameters.

    A logger of another kind than TensorBoard's receives the scalars alone. Lightning writes hyperparameters
    before there is any result, and TensorBoard shows the first that it finds: make the logger with
    ``default_hp_metric=False``.

    Args:
        logger: A TensorBoard writer, a Lightning logger, or None to log nothing.
        results: Table of a run.
        step: Global step of the scalars and figures.
    """
    if logger is None:
        return
    records = {tag: record for tag, record in tagged(results).items() if record.value is not None}
    scalars = {tag: record.value for tag, record in records.items() if record.value is not None}
    writer: Any = getattr(logger, "experiment", logger)
    if not hasattr(writer, "add_scalar"):
        logger.log_metrics(scalars, step)  # type: ignore[union-attr]
        return
    numbers = {
        tag: scalars[tag] for tag, r in records.items() if r.quantity in HEADLINES and r.control == "none"
    }
    if numbers:
        _log_hyperparameters(logger, results, numbers, step)
    for tag in scalars.keys() - numbers.keys():  # the others were logged with the hyperparameters
        writer.add_scalar(tag, scalars[tag], step)
    _log_curves(writer, records)
    for name, _, plot in drawable(results):
        writer.add_figure(f"figures/{name}", plot(results), step)
    writer.flush()


def tagged(results: Results) -> dict[str, Record]:
    """Give each record a tag of its own, such as ``rq2/resid_post.12/r2_delta/last/mean_shift``."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in results:
        parts = [record.question, record.site or "model", record.quantity, record.positions]
        parts += [
            record.model if record.model != "pair" else None,
            record.control if record.control != "none" else None,
        ]
        groups["/".join(part for part in parts if part)].append(record)
    tags: dict[str, Record] = {}
    for tag, records in groups.items():
        cells = [{"split": r.split, **r.params} for r in records]
        values = {k: {repr(cell.get(k)) for cell in cells} for k in {k for cell in cells for k in cell}}
        for record, own in zip(records, cells, strict=True):
            differing = [k for k in own if len(values[k]) > 1]
            tags["/".join([tag, *(f"{k}={own[k]}" for k in differing)])] = record
    assert len(tags) == len(results), "two records share a tag"
    return tags


def _log_hyperparameters(logger: Any, results: Results, numbers: dict[str, float], step: int) -> None:
    flat = dict(_leaves(results.provenance))
    if hasattr(logger, "log_hyperparams"):
        known = getattr(logger, "hparams", None)  # of the module and the data, where the logger keeps them
        logger.log_hyperparams({**(known if isinstance(known, dict) else {}), **flat}, numbers, step)
    else:
        logger.add_hparams(flat, numbers, run_name=".", global_step=step)


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, bool | int | float | str]]:
    found: list[tuple[str, bool | int | float | str]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += _leaves(value, f"{prefix}{key}/")
        elif isinstance(value, bool | int | float | str):
            found.append((f"{prefix}{key}", value))
    return found


def _log_curves(writer: Any, records: dict[str, Record]) -> None:
    """Write values and ends of intervals with the layer as step, and the page that shows them."""
    charts: dict[str, dict[str, list[str | list[str]]]] = defaultdict(dict)
    shown = [
        (tag, str(r.site), r)
        for tag, r in records.items()
        if r.site and r.control == "none" and r.quantity not in NO_CURVE and "head" not in r.params
    ]
    for tag, site, record in sorted(shown, key=lambda item: layer(item[1])):
        name = tag.replace(site, component(site)).removeprefix(f"{record.question}/")
        page = f"{record.question}_by_layer"
        ends = {"value": record.value, "low": record.low, "high": record.high}
        for end, value in ends.items():
            writer.add_scalar(f"{page}/{name}/{end}", record.value if value is None else value, layer(site))
        charts[page][name] = ["Margin", [f"{page}/{name}/{end}" for end in ends]]
    if charts:
        writer.add_custom_scalars(charts)
