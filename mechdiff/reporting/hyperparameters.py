"""Show the numbers that a report speaks of beside the hyperparameters of their runs.

TensorBoard takes the columns of its table from one run, whichever it finds first. So every run names the same
hyperparameters and metrics, those of all questions, and has values for its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import (
    DataType,
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
    Status,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from mechdiff.reporting.cells import pair_name
from mechdiff.reporting.report import handle, heads, maps, where
from mechdiff.reporting.report.content import Citations
from mechdiff.reporting.report.runs import Pair, Run
from mechdiff.reporting.report.view import View
from mechdiff.results import Record, Results

COLUMNS: dict[str, Callable[[Any], Any]] = {
    "pair": str,
    "question": str,
    "sites": str,
    "solver": str,
    "prompts": float,
}
"""Hyperparameters shown from the start; TensorBoard shows five."""
MORE: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("rank", "k", "seed", "shrinkage", "learning_rate", "weight_decay"), float),
    **dict.fromkeys(("positions", "shrink", "contrast", "layers_from", "dtype", "device"), str),
    **dict.fromkeys(("mechdiff", "commit"), str),
}
"""Hyperparameters that can be ticked."""


def _at_first_site(view: View) -> Record | None:
    """Return what the patch recovers at the first of the layers handed on, which no recovery has chosen."""
    site = next((r.site for r in where.proposed(view) if r.params.get("rank") == 1), None)
    return None if site is None else where.recovery(view, site)


def _map(view: View, quantity: str) -> Record | None:
    site = maps.site_of(view)
    return None if site is None else maps.cell(view, quantity, site)


HEADLINES: dict[str, tuple[str, str, Callable[[View], Record | None]]] = {
    "layer": (
        "rq1",
        "layer where states differ most",
        lambda view: view.pair.one("rq1", quantity="chosen_layer", by="cka_debiased", rank=1),
    ),
    "patch_recovery": ("rq1", "recovery by a patch at the first layer proposed", _at_first_site),
    "r2_delta": ("rq2", "R² of the difference", lambda view: _map(view, "r2_delta")),
    "kl_reduction": ("rq2", "KL that the map saves a patch", lambda view: _map(view, "kl_reduction")),
    "handle_k": ("rq3", "k of the chosen handle", handle.chosen_handle),
    "handle_recovery": ("rq3", "recovery by it", lambda view: handle.best(view)[0]),
    "churn": ("rq4", "churn of heads", lambda view: heads.churn(view)[0]),
    "cpr": ("rq4", "area under the cumulative curve", lambda view: view.pair.one("rq4", quantity="cpr")),
}
"""Metrics: the question that they answer, what they are, and which record of a run it is."""


def headlines(results: Results) -> dict[str, Record]:
    """Return the numbers of a run that its report speaks of, by name; those without a value are left out.

    Args:
        results: Table of a run.
    """
    run = Run(Path(), results, "")
    name = pair_name(results)
    view = View(Pair(name, {run.question: run}), Citations())
    picked = {key: pick(view) for key, (question, _, pick) in HEADLINES.items() if view.has(question)}
    return {key: r for key, r in picked.items() if r is not None and r.value is not None}


def log_hyperparameters(logger: Any, writer: Any, results: Results, step: int) -> None:
    """Log hyperparameters and metrics, and the interval of each metric beside it.

    Args:
        logger: A Lightning logger, which knows the hyperparameters of the module, or a TensorBoard writer.
        writer: The TensorBoard writer.
        results: Table of a run.
        step: Global step of the metrics.
    """
    found = headlines(results)
    for name, r in found.items():
        for end, value in (("", r.value), ("/low", r.low), ("/high", r.high)):
            if value is not None:
                writer.add_scalar(f"headline/{name}{end}", value, step)
    known = getattr(logger, "hparams", None)
    own = hyperparameters(results, found.values(), known if isinstance(known, Mapping) else {})
    events = writer._get_file_writer()  # what add_hparams and Lightning do: a run has no other way in
    types = COLUMNS | MORE
    columns = [
        HParamInfo(
            name=name,
            type=DataType.DATA_TYPE_STRING if kind is str else DataType.DATA_TYPE_FLOAT64,
            differs=name in COLUMNS,  # such columns come first
        )
        for name, kind in types.items()
    ]
    metrics = [
        MetricInfo(name=MetricName(tag=f"headline/{name}"), display_name=name, description=about)
        for name, (_, about, _) in HEADLINES.items()
    ]
    described = HParamsPluginData(experiment=Experiment(hparam_infos=columns, metric_infos=metrics))
    started = HParamsPluginData()
    for name, value in own.items():
        if value is not None:
            kind = "string_value" if types[name] is str else "number_value"
            setattr(started.session_start_info.hparams[name], kind, types[name](value))
    ended = HParamsPluginData()
    ended.session_end_info.status = Status.STATUS_SUCCESS
    for tag, data in (
        (metadata.EXPERIMENT_TAG, described),
        (metadata.SESSION_START_INFO_TAG, started),
        (metadata.SESSION_END_INFO_TAG, ended),
    ):
        about = metadata.create_summary_metadata(data)
        events.add_summary(
            Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)])
        )


def hyperparameters(results: Results, found: Iterable[Record], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a run by the names of the columns; None where it has none.

    Args:
        results: Table of a run.
        found: Its headlines, of which the most prompts are counted.
        known: What the logger knows of the module.
    """
    origin = results.provenance
    own: dict[str, Any] = {name: known.get(name, origin.get(name)) for name in COLUMNS | MORE}
    solvers = [r.params["solver"] for r in results if r.params.get("solver")]
    layers = origin.get("layers")
    own |= {
        "pair": pair_name(results) or None,
        "question": Run(Path(), results, "").question,
        "prompts": max((r.n for r in found), default=None),
        "solver": own["solver"] or next(iter(solvers), None),
        "layers_from": layers.get("by", layers.get("from")) if isinstance(layers, dict) else None,
    }
    joined = {k: ", ".join(map(str, v)) for k, v in own.items() if isinstance(v, list | tuple)}
    return own | joined
