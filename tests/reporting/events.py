"""Read back what a run left for TensorBoard."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from google.protobuf import text_format
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from mechdiff.reporting.projector import HEADER


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    return events.Reload()


def layout_of(events: EventAccumulator) -> Layout:
    """Return the layout of the custom scalars."""
    (event,) = events.Tensors("custom_scalars__config__")
    return Layout.FromString(event.tensor_proto.string_val[0])


def started(events: EventAccumulator) -> dict[str, str | float]:
    """Return the hyperparameters that a run has values of."""
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    found = metadata.parse_session_start_info_plugin_data(content).hparams
    return {k: getattr(v, str(v.WhichOneof("kind"))) for k, v in found.items()}


def columns(events: EventAccumulator) -> tuple[list[str], list[str]]:
    """Return the hyperparameters and the metrics that TensorBoard makes columns of."""
    content = events.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    found = metadata.parse_experiment_plugin_data(content)
    return [h.name for h in found.hparam_infos], [m.name.tag for m in found.metric_infos]


def check_layout(events: EventAccumulator) -> dict[str, list[str]]:
    """Check that every chart has something to show; return the titles by category."""
    scalars, layout = events.Tags()["scalars"], layout_of(events)
    for chart in (chart for category in layout.category for chart in category.chart):
        series = [tag for s in chart.margin.series for tag in (s.value, s.lower, s.upper)]
        assert set(series) <= set(scalars), chart.title
        for pattern in chart.multiline.tag:
            assert [tag for tag in scalars if re.match(pattern, tag)], pattern
        assert series or len(chart.multiline.tag) > 1, chart.title
    return {category.title: [chart.title for chart in category.chart] for category in layout.category}


def states_of(folder: Path) -> dict[str, tuple[torch.Tensor, list[list[str]]]]:
    """Read the projector's tables: states, and what is known of each row."""
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    found = {}
    for table in config.embeddings:
        states, known = (
            [line.split("\t") for line in (folder / path).read_text(encoding="utf-8").splitlines()]
            for path in (table.tensor_path, table.metadata_path)
        )
        assert known[0] == HEADER
        name = table.tensor_name.partition(":")[0]
        found[name] = torch.tensor([list(map(float, row)) for row in states]), known[1:]
    return found
