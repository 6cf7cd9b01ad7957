"""Set the churn of one pair against that of another, from the prompts that an earlier run kept.

1. Each pair's heads are judged against what labels swapped at random reach in that pair, so that a larger
   scale of the numbers is not taken for more churn.
2. The two answer prompts of their own, which are resampled apart; so are their heads.
3. One tuned sibling per kind of tuning bounds what may be concluded: the difference is one of these two
   siblings, not of the kinds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from mechdiff.callbacks.head_records import HeadRecords, with_params
from mechdiff.callbacks.head_tables import ROLES
from mechdiff.errors import ConfigError
from mechdiff.functional.churn import churn_contrast, paired
from mechdiff.functional.permutation import FEWEST, swap_floor
from mechdiff.modules.base import estimated, missing
from mechdiff.results import Record, Results


def check_run(folder: str) -> Path:
    """Return the folder of an earlier run on heads.

    Raises:
        ConfigError: If it has no table or no values per prompt.
    """
    for name in ("results.json", "items.parquet"):
        if not (Path(folder) / name).is_file():
            got = f"contrast is {folder}, which has no {name}"
            raise ConfigError(f"{got}; allowed: the folder of an rq4 run (key: contrast)")
    return Path(folder)


def contrasted(records: HeadRecords, name: str, folder: Path) -> Iterator[Record]:
    """Yield the churn of this pair minus that of an earlier run.

    Args:
        records: Makes the records.
        name: Name of this pair.
        folder: The earlier run.
    """
    main, tables = records.cases.counterfactual, records.tables
    mine = paired(*(tables.attribution[role, main] for role in ROLES))
    theirs, said = _earlier(folder)
    other = Results.read(folder / "results.json").provenance.get("pair", {}).get("name", folder.name)
    about: dict[str, Any] = {**records.about("attribution_patching", main), "unit": "fraction"}
    about = with_params(about, pairs=[other, name], rule="bound", floor_from="label_swap", against=said)
    about["flags"] = (*about["flags"], "one_sibling_per_class")
    if min(len(mine), len(theirs)) < FEWEST:
        yield missing("churn_difference", "too_few_prompts", {**about, "n": len(mine) + len(theirs)})
        return
    floors = [swap_floor(d, generator=records.draws("contrast", i)) for i, d in enumerate((theirs, mine))]
    about = with_params(about, floors=floors)
    found = churn_contrast(theirs, mine, (floors[0], floors[1]), generator=records.draws("contrast"))
    yield estimated("churn_difference", found, about)


def _earlier(folder: Path) -> tuple[Tensor, str]:
    """Return tuned − base of an earlier run, `(prompts, heads)`, and the number and baseline behind it."""
    items = [i for i in pq.read_table(folder / "items.parquet").to_pylist() if i["direction"] in ROLES]
    items = [i for i in items if i["quantity"] == "head_attribution"]
    prompts, heads = ({i[key]: 0 for i in items} for key in ("prompt", "arm"))
    if len(items) != len(prompts) * len(heads) * 2 or not items:
        raise ConfigError(
            f"contrast is {folder}, whose models have different heads or none; allowed: an rq4 run of a pair "
            "with the same heads (key: contrast)"
        )
    place = {p: n for n, p in enumerate(prompts)}, {h: n for n, h in enumerate(heads)}
    sides = torch.zeros(2, len(prompts), len(heads), dtype=torch.float64)
    for i in items:
        sides[ROLES.index(i["direction"]), place[0][i["prompt"]], place[1][i["arm"]]] = i["value"]
    return sides[1] - sides[0], items[0]["arm"].rpartition("/")[0]
