"""Divergence: where the states of two models differ, layer by layer; nothing is fitted.

1. The rows served as the test split are kept, by default one per prompt: the last before the answer.
2. Divergence is 1 − CKA of a site with the same site of the other model: biased, debiased, and both again
   within classes of prompts (language and label), because what tells languages apart is alike in any model.
   Intervals come from a jackknife over prompts.
3. The two layers with the largest debiased divergence are proposed; whether they are causal is for a patch to
   say. On request, the debiased CKA of any two layers, and PWCCA beside that of shuffled prompts.
4. Inside a model it does the simplest thing: the donor's state replaces the recipient's.

Source: Kornblith et al. 2019 (arXiv:1905.00414), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mechdiff.config import SEED
from mechdiff.errors import FitError
from mechdiff.functional.pwcca import BLOCKS, pwcca_jackknife
from mechdiff.functional.selection import PROPOSED, largest
from mechdiff.functional.stats import generator
from mechdiff.interventions.sites import POSITIONS, Site
from mechdiff.modules.base import UNTOUCHED, DiffModule, estimated, missing, similarity
from mechdiff.results import Question, Record

if TYPE_CHECKING:
    from mechdiff.interventions.hooks import Edit

CLASSES = "class+lang"
"""How records say that states were compared within languages and labels."""

Batch = Mapping[str, Any]


class Divergence(DiffModule):
    """Compares the states of two models site by site.

    Args:
        sites: Sites of tuned.
        source_sites: Sites of base; the same sites by default.
        positions: Groups of positions, each compared by itself.
        d_source: Width of base, read from its store.
        d_target: Width of tuned, read from its store.
        noise: Share of a site's variance below which a difference is rounding of the stored states.
        matrix: Also compare every site of base with every site of tuned.
        pwcca: Also measure PWCCA; it needs more prompts than directions.
        seed: Seed of the run.

    Raises:
        FitError: If the positions or the number of source sites are not allowed.
    """

    question: ClassVar[Question] = "rq1"
    needs_fit = False
    solver_name = "none"

    def __init__(
        self,
        sites: Sequence[str] = (),
        source_sites: Sequence[str] | None = None,
        positions: Sequence[str] = ("last",),
        d_source: int = 1,
        d_target: int = 1,
        noise: float = 0.0,
        matrix: bool = False,
        pwcca: bool = False,
        seed: int = SEED,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.sites, self.sources = list(sites), list(source_sites or sites)
        self.positions = [name for name in POSITIONS if name in positions]
        if set(positions) - set(POSITIONS) or not self.positions:
            raise FitError(f"model.positions is {list(positions)}; allowed: some of {', '.join(POSITIONS)}")
        if len(self.sources) != len(self.sites):
            counts = f"{len(self.sources)} entries for {len(self.sites)} sites"
            raise FitError(f"model.source_sites has {counts}; allowed: as many as sites")
        self.noise, self.matrix, self.pwcca, self.seed = noise, matrix, pwcca, seed
        self._test: list[Batch] = []
        self._classes: list[str] = []
        self._split = "test"
        self._records: list[Record] | None = None

    @property
    def fitted(self) -> bool:
        """Whether there is anything to test: always, as nothing is fitted."""
        return True

    def forward(self, source: Tensor) -> Tensor:
        """Return source states as they are."""
        return source

    def edits(self, donor: Mapping[Site, Tensor] | None, where: Tensor, **cell: Any) -> Mapping[Site, Edit]:
        """Return the replacement of one site's states by the donor's.

        Args:
            donor: ``{site: (batch, position, d)}`` in the recipient's rows.
            where: Index into ``POSITIONS``, ``(batch, position)``; ``UNTOUCHED`` keeps what is there.
            **cell: ``site``, and ``kind``: ``raw``, or ``self`` for no edit.
        """
        site, kind = cell["site"], cell["kind"]
        assert kind in ("raw", "self"), kind
        if kind == "self":
            return {}
        assert donor is not None
        states = donor[site]

        def edit(activation: Tensor, _positions: Tensor) -> Tensor:
            return torch.where((where != UNTOUCHED)[..., None], states.to(activation), activation)

        return {site: edit}

    def configure_optimizers(self) -> None:
        """Have no optimizer: nothing is fitted."""

    def on_test_start(self) -> None:
        """Forget an earlier test, and read the classes of the prompts."""
        self._test.clear()
        self._records = None
        prompts = getattr(self.trainer, "datamodule", None)
        self._classes = [f"{p.lang}/{p.label}" for p in getattr(prompts, "prompts", ())]
        self._split = "all" if getattr(prompts, "test_all", False) else "test"

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the rows: there is one per prompt, or a few."""
        sides = {
            side: {name: rows.cpu() for name, rows in batch[side].items()} for side in ("source", "target")
        }
        self._test.append({**sides, "prompt": batch["prompt"].cpu(), "group": batch["group"].cpu()})

    def ranking(self) -> dict[str, float]:
        """Return the debiased divergence of each site at the first group of positions, after a test."""
        found = self.records() if self._test else ()
        return {str(r.site): 1 - r.value for r in found if self._ranks(r) and r.value is not None}

    def records(self) -> Iterator[Record]:
        """Return CKA site by site, the matrix if asked for, and the layers proposed."""
        if self._records is None:
            assert self._test, "records are there after a test"
            curve = [r for group in range(len(self.positions)) for r in self._curve(group)]
            groups = range(len(self.positions))
            more = [r for group in groups if self.matrix for r in self._cross(group)]
            more += [r for group in groups if self.pwcca for r in self._correlated(group)]
            self._records = [*curve, *more, *self._chosen(curve)]
        yield from self._records

    def _curve(self, group: int) -> Iterator[Record]:
        """Compare each site with its own source."""
        for source, target in zip(self.sources, self.sites, strict=True):
            x, y, prompt = self._rows(source, target, group)
            about = self._about(target, group, source, prompt)
            classes = [self._classes[p] for p in prompt.tolist()] if self._classes else None
            for within in (None, classes) if classes else (None,):
                params = about["params"] | ({"centred": CLASSES} if within else {})
                for quantity in ("cka", "cka_debiased"):
                    yield similarity(quantity, x, y, prompt, {**about, "params": params}, within)

    def _cross(self, group: int) -> Iterator[Record]:
        """Compare every site of base with every site of tuned."""
        for source in self.sources:
            for target in self.sites:
                x, y, prompt = self._rows(source, target, group)
                about = self._about(target, group, source, prompt)
                about["params"]["matrix"] = True
                yield similarity("cka_debiased", x, y, prompt, about)

    def _correlated(self, group: int) -> Iterator[Record]:
        """Measure PWCCA of each site with its own source, and with the source's prompts shuffled."""
        for source, target in zip(self.sources, self.sites, strict=True):
            x, y, prompt = self._rows(source, target, group)
            about = self._about(target, group, source, prompt)
            draws = generator(self.seed, "pwcca", target, self.positions[group])
            names = prompt.unique()
            order = names[torch.randperm(len(names), generator=draws)]
            blocks = [
                torch.isin(prompt, part).nonzero()[:, 0].tolist() for part in order.tensor_split(BLOCKS)
            ]
            mixed = torch.randperm(len(y), generator=draws)
            for control, rows in (("none", y), ("shuffled", y[mixed])):
                about["control"] = control
                try:
                    found = pwcca_jackknife(x, rows, blocks)
                except FitError:
                    yield missing("pwcca", "too_few_prompts", about)
                else:
                    yield estimated("pwcca", found._replace(n=len(names)), about)

    def _chosen(self, curve: Sequence[Record]) -> Iterator[Record]:
        """Propose layers by the first group of positions."""
        known = [(r, 1 - r.value) for r in curve if self._ranks(r) and r.value is not None]
        for rank, index in enumerate(largest([divergence for _, divergence in known], PROPOSED), 1):
            r, divergence = known[index]
            flags: tuple[str, ...] = ("gap_too_small",) if divergence <= self.noise else ()
            if r.split == "all":  # those that are reported on among them
                flags = (*flags, "chosen_on_eval")
            yield Record(
                "rq1",
                "chosen_layer",
                Site.parse(str(r.site)).layer,
                r.n,
                "layer",
                site=r.site,
                split=r.split,
                positions=r.positions,
                params={"by": "cka_debiased", "rank": rank, "divergence": divergence},
                flags=flags,
            )

    def _ranks(self, r: Record) -> bool:
        """Whether a record is one of those that layers are chosen by."""
        plain = not {"centred", "matrix"} & set(r.params)
        return r.quantity == "cka_debiased" and plain and r.positions == self.positions[0]

    def _rows(self, source: str, target: str, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows of a source and a target site at a group of positions, and their prompt."""
        parts = [(b, b["group"] == POSITIONS.index(self.positions[group])) for b in self._test]
        x = torch.cat([b["source"][source][rows] for b, rows in parts])
        y = torch.cat([b["target"][target][rows] for b, rows in parts])
        return x, y, torch.cat([b["prompt"][rows] for b, rows in parts])

    def _about(self, site: str, group: int, source: str, prompt: Tensor) -> dict[str, Any]:
        return {
            "question": self.question,
            "site": site,
            "positions": self.positions[group],
            "split": self._split,
            "unit": "fraction",
            "n": len(prompt.unique()),
            "rows": len(prompt),
            "params": {"source_site": source},
        }
