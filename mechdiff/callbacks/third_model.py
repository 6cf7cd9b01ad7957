"""A third model beside a pair: another sibling of tuned, not its parent.

1. Its states are compared with those of both, by CKA on the same prompts.
2. Difference in differences: how much further tuned is from base than the third model is,
   CKA(reference, base) - CKA(tuned, base); and how much more of the way to the pair's other model than to the
   third a patch goes, the difference of two recoveries of one recipient on the same prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechdiff.callbacks.patcher import Side
from mechdiff.data.prompts import Prompt
from mechdiff.errors import FewPromptsError, FitError
from mechdiff.functional.cka import cka_contrast
from mechdiff.functional.stats import bootstrap_sums
from mechdiff.interventions.sites import Site
from mechdiff.modules.base import MIN_PROMPTS, estimated, missing, similarity
from mechdiff.results import Record

CONTRASTS = (("tuned", "reference"), ("base", "reference"), ("tuned", "base"))
FURTHER = "reference-base minus tuned-base"
"""Name of the difference of two likenesses to base: above 0 where tuned is the one further away."""


def similarities(
    prompts: Sequence[Prompt], sides: Mapping[str, Side], chosen: Sequence[int], sites: Sequence[Site]
) -> Iterator[Record]:
    """Yield the CKA of any two of three models at the last position, and the difference in differences.

    Args:
        prompts: What the sides have read.
        sides: The models by role.
        chosen: Prompts that hold all states, by index.
        sites: Where to compare.
    """
    classes, rows = [f"{prompts[i].lang}/{prompts[i].label}" for i in chosen], torch.arange(len(chosen))
    for site in sites:
        states = {role: torch.stack([s.states[i][site][-1] for i in chosen]) for role, s in sides.items()}
        about: dict[str, Any] = {"question": "rq1", "site": str(site), "positions": "last"}
        about |= {"split": prompts[0].split, "unit": "fraction", "model": "reference", "n": len(chosen)}
        for within in (None, classes):
            centred = {"centred": "class+lang"} if within else {}
            for quantity in ("cka", "cka_debiased"):
                for a, b in CONTRASTS:
                    params = {"contrast": f"{a}-{b}", **centred}
                    yield similarity(
                        quantity, states[b], states[a], rows, {**about, "params": params}, within
                    )
                params = {"contrast": FURTHER, **centred}
                yield _further(quantity, states, {**about, "params": params}, within)


def nearer(
    to_other: Tensor, to_reference: Tensor, about: Mapping[str, Any], generator: torch.Generator
) -> Record:
    """Make the record of the difference of two recoveries of one recipient.

    Args:
        to_other: Divergence from the pair's other model with the patch and without, nats, ``(prompts, 2)``.
        to_reference: The same for the third model.
        about: The other attributes of the record.
        generator: Source of the resamples.
    """

    def difference(sums: Tensor) -> Tensor:
        return sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1]

    columns = torch.cat([to_other, to_reference], 1).double()
    return estimated("patch_recovery", bootstrap_sums(columns, difference, generator=generator), about)


def _further(
    quantity: str, states: Mapping[str, Tensor], about: Mapping[str, Any], within: Sequence[str] | None
) -> Record:
    if about["n"] < MIN_PROMPTS:
        return missing(quantity, "too_few_prompts", about)
    debiased = quantity == "cka_debiased"
    try:
        found = cka_contrast(
            states["reference"], states["tuned"], states["base"], debiased=debiased, within=within
        )
    except FewPromptsError:  # in any class
        return missing(quantity, "too_few_prompts", about)
    except FitError:  # one of them does not vary
        return missing(quantity, "no_variance", about)
    return estimated(quantity, found, about)
