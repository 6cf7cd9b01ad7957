"""Transfer: does a handle fitted on one language work on another, and on prompts that are wrapped otherwise?

1. From the stored training rows of each language alone, and of all together, a subspace (uncentred SVD of
   tuned − base on target prompts) and a ridge map from base to tuned are fitted in closed form.
2. Base is edited at the last position of evaluation targets of every language, of further prompt files and
   under other wrappings, towards tuned's own state (`interchange`) or the mapped one (`mapped`), with the
   rank and the strength that the run has chosen for that kind of edit.
3. Effects are recovery, `1 − KL(tuned ‖ edited) / KL(tuned ‖ base)` over shared tokens, and the share of the
   gap in graded behaviour, with shared-vocabulary masking and without. Where tuned does not differ from base
   in a language, the record says so. Beside recovery stands the range of random subspaces of the same rank,
   drawn isotropically, in edits as long, prompt by prompt, as those of the same kind by the handle fitted on
   all languages.

Distributions are always compared over shared tokens: where base lacks a token no finite divergence exists.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechdiff.callbacks.base import Item, readable
from mechdiff.callbacks.graded import Openings, grades, read_openings
from mechdiff.callbacks.handle_evaluation import (
    ENOUGH,
    LAST,
    Handle,
    HandleEvaluation,
    residuals,
    same_end,
    two_engines,
    two_sides,
)
from mechdiff.callbacks.patcher import Side
from mechdiff.callbacks.reading import Reading
from mechdiff.callbacks.transfer_fit import ALL, Fit, fit_languages
from mechdiff.config import LAMBDA_GRID
from mechdiff.data.prompts import Prompt, load_prompts, spread
from mechdiff.errors import ConfigError, PromptError
from mechdiff.functional.clt import map_states
from mechdiff.functional.handles import random_basis
from mechdiff.functional.metrics import kl_divergence, kl_from_logits
from mechdiff.functional.stats import generator
from mechdiff.functional.steering import interchange
from mechdiff.interventions.sites import Site
from mechdiff.modules.base import DiffModule, missing
from mechdiff.pairs.loading import LoadedPair
from mechdiff.pairs.spec import FilePath
from mechdiff.pairs.voice import Voice, voices
from mechdiff.results import Record

PLAIN = "{text}"
TEMPLATES = (PLAIN, '"{text}"', "1) {text}", "# {text}\n\n---")
"""Wrappings in no language of their own."""
EDITS = ("interchange", "mapped")
_OWN, _RANDOM = ("", "none"), "random"
MASKINGS = (False, True)
DRAWS = 20
"""Fewest random subspaces that have a 95th percentile; from `ENOUGH` on an effect may be claimed."""

Arm = tuple[str, str]  # what the handle was fitted on, edit


class Transfer(HandleEvaluation):
    """Tests handles across languages and wrappings of the prompt, at every residual site of a module.

    Args:
        languages: Languages to fit on, each alone.
        k: Number of directions; by default those that the run chose, else 4.
        alpha: Strength; by default the one that the run chose, else 1, the whole edit.
        edits: Some of `interchange` and `mapped`.
        extra_prompts: Prompt files beside those of the pair; their prompts of split eval are tested.
        templates: Wrappings, each with ``{text}``; ``{text}`` alone is always tested.
        max_prompts: Target prompts of each language as they are; None takes all.
        template_prompts: The same for every other wrapping.
        graded_prompts: The same for graded behaviour, the costliest part; 0 leaves it out.
        lambdas: Ridge strengths to choose from.
        draws: Random subspaces.

    Raises:
        ConfigError: If an edit or a template is not allowed, or a number out of range.
    """

    def __init__(
        self,
        languages: Sequence[str] = ("kk", "en"),
        k: int | None = None,
        alpha: float | None = None,
        edits: Sequence[str] = EDITS,
        extra_prompts: Sequence[FilePath] = (),
        templates: Sequence[str] = TEMPLATES,
        max_prompts: int | None = 24,
        template_prompts: int = 8,
        graded_prompts: int = 6,
        lambdas: Sequence[float] = LAMBDA_GRID,
        draws: int = ENOUGH,
    ) -> None:
        super().__init__()
        if unknown := sorted(set(edits) - set(EDITS)):
            raise ConfigError(f"edits has {unknown[0]!r}; allowed: {', '.join(EDITS)} (key: edits)")
        if bad := [t for t in templates if PLAIN not in t]:
            raise ConfigError(
                f"template {bad[0]!r} has no place for the message; allowed: with {{text}} (key: templates)"
            )
        if k is not None and k < 1:
            raise ConfigError(f"k is {k}; allowed: 1 or more (key: k)")
        if draws < DRAWS:
            raise ConfigError(f"draws is {draws}; allowed: {DRAWS} or more (key: draws)")
        self.languages, self.k, self.alpha, self.edits = tuple(languages), k, alpha, tuple(edits)
        self.extra_prompts = [Path(path) for path in extra_prompts]
        self.templates = tuple(dict.fromkeys((PLAIN, *templates)))
        self.max_prompts, self.template_prompts = max_prompts, template_prompts
        self.graded_prompts, self.lambdas = graded_prompts, tuple(lambdas)
        self.draws = draws
        self.drawn: dict[Site, Tensor] = {}
        self.handles: dict[str, Handle] = {}
        self.not_chosen: dict[str, str | None] = {}
        self.voices: dict[str, Voice] = {}

    def evaluate(self, module: DiffModule, pair: LoadedPair, prompts: Sequence[Prompt]) -> Iterable[Record]:
        """Fit on each language, test on all; see the module's docstring."""
        if self.data is None:
            raise ConfigError("Transfer needs the activations of a fit (key: data.class_path)")
        for edit in self.edits:
            self.handles[edit] = self.handle(module, edit, self.k, self.alpha)
            self.not_chosen[edit] = self.unchosen
        most = max(handle.k for handle in self.handles.values())
        fits: dict[Site, dict[str, Fit]] = {}
        for site in residuals(module):
            fits[site] = fit_languages(self.data, str(site), self.languages, most, self.lambdas)
            source = generator(self.seed, "transfer", site)
            bases = [random_basis(most, pair.base.width, source) for _ in range(self.draws)]
            self.drawn[site] = torch.stack(bases).float()
            for name in (n for n in (*self.languages, ALL) if n not in fits[site]):
                where, none = {"lang": ALL, "template": PLAIN}, {name: Fit(self.drawn[site][0], None, 0)}
                yield from self._nothing({site: none}, where, "too_few_prompts")
        openings = read_openings(Path(pair.spec.openings)) if pair.spec.openings else {}
        self.voices, self.engines = voices(pair), two_engines(pair)
        extra = [p for p in load_prompts(self.extra_prompts) if p.split == "eval"]
        targets = [p for p in (*prompts, *extra) if p.label == "target"]
        for lang in sorted({p.lang for p in targets}):
            own = [p for p in targets if p.lang == lang]
            for template in self.templates:
                plain = template == PLAIN
                few = spread(own, self.max_prompts if plain else self.template_prompts)
                wrapped = [replace(p, text=template.replace(PLAIN, p.text)) for p in few]
                where = {"lang": lang, "template": template}
                yield from self._group(pair, wrapped, fits, where, openings if plain else {})

    def _group(
        self,
        pair: LoadedPair,
        prompts: Sequence[Prompt],
        fits: Mapping[Site, Mapping[str, Fit]],
        where: Mapping[str, str],
        openings: Mapping[str, Openings],
    ) -> Iterator[Record]:
        """Test every handle on the prompts of one language and wrapping."""
        try:
            kept = readable(pair, prompts)[0]
        except PromptError:
            yield from self._nothing(fits, where, "not_shared")
            return
        base, tuned = two_sides(pair, kept, self.engines)
        able = [i for i, same in enumerate(same_end(base, tuned)) if same]
        if not able:
            yield from self._nothing(fits, where, "not_aligned")
            return
        for side in (base, tuned):
            side.read(list(fits))
        columns: dict[Site, dict[Arm, list[float]]] = {site: defaultdict(list) for site in fits}
        random: dict[tuple[Site, str], list[Tensor]] = defaultdict(list)
        for index in self.track(able, f"transfer to {where['lang']}"):
            for site, arms in fits.items():
                states = self._edited(base, tuned, index, site, arms)
                for arm, kl in self._next_token(base, tuned, index, site, states).items():
                    columns[site][arm].append(kl)
                for edit in self.edits if arms else ():
                    name = ALL if ALL in arms else next(iter(arms))
                    length = (states[name, edit] - states[_OWN]).norm()
                    random[site, edit].append(self._random(base, tuned, index, site, edit, length))
        gap = torch.stack([kl_divergence(tuned.log_p[i], base.log_p[i]) for i in able])
        flags = ("unaligned_prompts",) if len(able) < len(kept) else ()
        for site, nats_of in columns.items():
            floor = sum(nats_of.pop(_OWN)) / len(able)
            for arm, nats in nats_of.items():
                about = self._about(site, arm, where, fits[site], metric="recovery", masking=True)
                column = torch.tensor(nats, dtype=torch.float64)
                about["flags"] += flags if self.draws >= ENOUGH else (*flags, "no_random_control")
                yield self.ratio(column, gap, floor, "transfer_effect", **about)
                self._keep(site, arm, where, [kept[i].id for i in able], "transfer_kl", nats)
            for edit in self.edits if fits[site] else ():
                drawn = torch.stack(random[site, edit])
                yield self._range(site, edit, drawn, gap, floor, where, flags)
        few = set(spread([kept[i] for i in able if grades(kept[i], openings)], self.graded_prompts))
        yield from self._behaviour({"base": base, "tuned": tuned}, kept, few, fits, where, openings)

    def _random(self, base: Side, tuned: Side, index: int, site: Site, edit: str, length: Tensor) -> Tensor:
        """Return KL(tuned ‖ edited base) in nats for random subspaces, in edits of one length, `(draws,)`."""
        own = base.states[index][site][-1]
        donor = tuned.states[index][site][-1].to(own)
        bases = self.drawn[site][:, : self.handles[edit].k].to(own.device)
        change = torch.stack([interchange(own, donor, basis, 1.0) - own for basis in bases])
        hidden = own + length * torch.nn.functional.normalize(change, dim=-1)
        log_p = self._log_p(base, index, site, hidden)
        return kl_from_logits(tuned.log_p[index].to(log_p.device), log_p).cpu()

    def _range(
        self,
        site: Site,
        edit: str,
        nats: Tensor,
        gap: Tensor,
        floor: float,
        where: Mapping[str, str],
        flags: tuple[str, ...],
    ) -> Record:
        """Return the range of random subspaces, of nats `(prompts, draws)`."""
        none, arm = {_RANDOM: Fit(self.drawn[site][0], None, 0)}, (_RANDOM, edit)
        about = self._about(site, arm, where, none, metric="recovery", masking=True, draws=self.draws)
        about["flags"] = (*about["flags"], *flags, *(("few_draws",) if self.draws < ENOUGH else ()))
        if not self.gap(gap, floor, about):
            return missing("transfer_effect", "gap_too_small", {**about, "n": len(gap)})
        recovery = 1 - nats.mean(0) / gap.mean()
        low, middle, high = recovery.quantile(torch.tensor([0.05, 0.5, 0.95]).double()).tolist()
        about |= {"low": low, "high": high, "n": len(gap)}
        return Record(quantity="transfer_effect", value=middle, **about)

    def _next_token(
        self, base: Side, tuned: Side, index: int, site: Site, states: Mapping[Arm, Tensor]
    ) -> dict[Arm, float]:
        """Return KL(tuned ‖ edited base) in nats by arm; the first is base's own divergence from itself."""
        log_p = self._log_p(base, index, site, torch.stack(list(states.values())))
        nats = kl_divergence(tuned.log_p[index].to(log_p.device).expand_as(log_p), log_p).tolist()
        found: dict[Arm, float] = dict(zip(states, nats, strict=True))
        found[_OWN] = kl_divergence(base.log_p[index], log_p[0]).item()
        return found

    def _log_p(self, base: Side, index: int, site: Site, states: Tensor) -> Tensor:
        """Return base's log-probabilities with each of some states `(states, d)`."""
        ids = base.ids(index)[:, -1:].expand(len(states), -1)
        logits = base.engine.resume(site.layer, states[:, None], ids, prefix=base.prefixes[index])
        return base.restricted(logits)

    def _edited(
        self, base: Side, tuned: Side, index: int, site: Site, fits: Mapping[str, Fit]
    ) -> dict[Arm, Tensor]:
        own = base.states[index][site][-1]
        donor = tuned.states[index][site][-1].to(own)
        states = {_OWN: own}
        for name, (basis, affine, _) in fits.items():
            assert affine is not None
            for edit in self.edits:
                other = donor if edit == "interchange" else map_states(own, affine)
                handle = self.handles[edit]
                inside = basis[: handle.k].to(own.device)
                states[name, edit] = interchange(own, other.to(own), inside, handle.alpha)
        return states

    def _behaviour(
        self,
        sides: Mapping[str, Side],
        prompts: Sequence[Prompt],
        few: set[Prompt],
        fits: Mapping[Site, Mapping[str, Fit]],
        where: Mapping[str, str],
        openings: Mapping[str, Openings],
    ) -> Iterator[Record]:
        """Yield the share of the gap in graded behaviour that an edit of the last position closes."""
        base, tuned = sides["base"], sides["tuned"]
        rows: dict[tuple[str, bool, Site, Arm], list[tuple[str, float, float, float, float]]] = defaultdict(
            list
        )
        for index, prompt in enumerate(prompts):
            for graded in grades(prompt, openings) if prompt in few else ():
                whole = Reading(self.voices["tuned"], tuned, index, graded, (), MASKINGS)
                own = Reading(self.voices["base"], base, index, graded, fits, MASKINGS)
                for site, arms in fits.items():
                    read = own.edited(site, self._edited(base, tuned, index, site, arms))
                    for masking in (masking for masking in read if masking in whole.clean):
                        end, values = whole.clean[masking], read[masking]
                        start = values.pop(_OWN)
                        for arm, value in values.items():
                            cell = (prompt.id, end, start, value, abs(start - own.clean[masking]))
                            rows[graded.metric, masking, site, arm].append(cell)
        for (metric, masking, site, arm), cells in rows.items():
            names, *columns = zip(*cells, strict=True)
            end, start, value, noise = torch.tensor(columns, dtype=torch.float64)
            about = self._about(site, arm, where, fits[site], metric=metric, masking=masking)
            sign = 1.0 if (end - start).mean() >= 0 else -1.0  # a gap that points down is one too
            floor = float(noise.mean())
            yield self.ratio(sign * (end - value), sign * (end - start), floor, "transfer_effect", **about)
            if not masking:
                self._keep(site, arm, where, names, f"transfer_{metric}", value.tolist())

    def _nothing(
        self, fits: Mapping[Site, Mapping[str, Fit]], where: Mapping[str, str], reason: str
    ) -> Iterator[Record]:
        for site, names in fits.items():
            for arm in ((name, edit) for name in names for edit in self.edits):
                about = self._about(site, arm, where, names, metric="recovery", masking=True)
                yield missing("transfer_effect", reason, {**about, "n": 0})

    def _about(
        self, site: Site, arm: Arm, where: Mapping[str, str], fits: Mapping[str, Fit], **more: Any
    ) -> dict[str, Any]:
        fitted, edit = arm
        cell = {
            "fitted_on": fitted,
            "edit": edit,
            "k": self.handles[edit].k,
            "alpha": self.handles[edit].alpha,
            **where,
            "acts_on": LAST,
            **more,
        }
        return {
            "question": "rq3",
            "site": str(site),
            "split": "eval",
            "positions": "last",
            "unit": "fraction",
            "control": "random" if fitted == _RANDOM else "none",
            "params": {**cell, "solver": "paired_svd", "fit_prompts": fits[fitted].prompts},
            "flags": () if self.not_chosen[edit] is None else ("not_chosen",),
        }

    def _keep(
        self,
        site: Site,
        arm: Arm,
        where: Mapping[str, str],
        names: Sequence[str],
        quantity: str,
        values: Sequence[float],
    ) -> None:
        said = f"{'/'.join(arm)}/{self.templates.index(where['template'])}"
        self.items += [
            Item(name, quantity, str(site), "last", "into_base", said, x)
            for name, x in zip(names, values, strict=True)
        ]
