"""MappedPatch: does a mapped state act inside the model as the real state does?

1. Into tuned: base's state replaces tuned's at one site, raw or under the map. KL(P_tuned ‖ P_patched) says how much of tuned's next-token
   distribution is lost; a map that carries base's states to tuned's loses little.
2. Into base: tuned's real state, and beside it the map of base's OWN state. Agreement = 1 − ΣKL(P_real ‖ P_mapped) / ΣKL(P_real ‖ P_base).
   The effects of the two on the log-odds of refusing openings are correlated within classes of prompts.
3. ``last`` patches the final token before the answer, ``all`` every aligned position after the template's fixed beginning, which is left alone in
   every arm: no map is fitted there.
4. Distributions are renormalised over the tokens that both models have. The model's own state put back through the same path (``self``) is the
   noise floor.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechdiff.callbacks.base import CausalEvaluation, Item
from mechdiff.callbacks.patcher import Openings, Patcher, Side
from mechdiff.data.prompts import Prompt
from mechdiff.errors import PromptError
from mechdiff.functional.metrics import kl_divergence
from mechdiff.interventions.sites import POSITIONS, Site
from mechdiff.interventions.suffix import SuffixEngine
from mechdiff.modules.base import DiffModule
from mechdiff.pairs.alignment import align, common_template, encode, template_tokens
from mechdiff.pairs.fairness import filter_shared
from mechdiff.pairs.loading import LoadedModel, LoadedPair
from mechdiff.results import Record

Values = dict[tuple[str, str], dict[str, Tensor]]  # positions and site → arm → nats by prompt


class MappedPatch(CausalEvaluation):
    """Patches base's states into tuned and back, raw and mapped.

    Args:
        max_prompts: Use at most this many evaluation prompts, evenly over languages and classes; None takes all.
        effect_prompts: The same for the refusal log-odds, the costliest part; 0 leaves it out.
        tokens_per_batch: Tokens run at once when all positions are patched.
    """

    def __init__(
        self, max_prompts: int | None = None, effect_prompts: int | None = 80, tokens_per_batch: int = 1024
    ) -> None:
        super().__init__()
        self.max_prompts, self.effect_prompts, self.tokens_per_batch = (
            max_prompts,
            effect_prompts,
            tokens_per_batch,
        )

    def evaluate(self, module: DiffModule, pair: LoadedPair, prompts: Sequence[Prompt]) -> Iterable[Record]:
        """Patch every site of a map; see the module's docstring."""
        module.to(pair.device)
        kept = self._kept(pair, prompts)
        sites = sorted({Site.parse(name) for name in (*module.sites, *module.sources)})
        base, tuned = (
            _side(pair.base, pair.shared.base_ids, kept),
            _side(pair.tuned, pair.shared.tuned_ids, kept),
        )
        (prefix_b, suffix_b), (prefix_t, suffix_t) = (
            template_tokens(m.tokenizer) for m in (pair.base, pair.tuned)
        )
        common = common_template(prefix_t, prefix_b, suffix_t, suffix_b)
        into_tuned = [align(t, b, *common) for t, b in zip(tuned.encoded, base.encoded, strict=True)]
        into_base = [align(b, t, *common) for t, b in zip(tuned.encoded, base.encoded, strict=True)]
        for side in (base, tuned):
            side.read(sites)
        yield from self._lost_mass(kept, base, tuned)
        yield from self._into_tuned(
            kept, Patcher(module, tuned, base, into_tuned, "into_tuned", self.tokens_per_batch)
        )
        patcher = Patcher(module, base, tuned, into_base, "into_base", self.tokens_per_batch)
        yield from self._into_base(kept, patcher)
        if pair.spec.openings and self.effect_prompts != 0:
            yield from self._effects(kept, patcher, read_openings(Path(pair.spec.openings)))

    def _kept(self, pair: LoadedPair, prompts: Sequence[Prompt]) -> list[Prompt]:
        required = pair.spec.tokenizer_policy == "shared_vocab_required"
        least = pair.spec.min_shared_coverage if required else 0.0
        kept, self.fairness = filter_shared(
            list(prompts), pair.base.tokenizer, pair.tuned.tokenizer, pair.shared, least
        )
        return spread(kept, self.max_prompts)

    def _lost_mass(self, prompts: Sequence[Prompt], base: Side, tuned: Side) -> Iterator[Record]:
        for role, side in (("base", base), ("tuned", tuned)):
            for lang in sorted({p.lang for p in prompts}):
                lost = torch.tensor([x for x, p in zip(side.lost, prompts, strict=True) if p.lang == lang])
                about = {
                    "question": "rq2",
                    "model": role,
                    "positions": "last",
                    "split": "eval",
                    "unit": "fraction",
                }
                yield self.mean(lost, "new_token_mass", **about, params={"lang": lang})

    def _into_tuned(self, prompts: Sequence[Prompt], patcher: Patcher) -> Iterator[Record]:
        values, noise = self._measure(prompts, patcher, reference=None)
        for (positions, site), arms in values.items():
            for arm, column in arms.items():
                name, control = (
                    ("kl_raw", "none") if arm == "raw" else ("kl_mapped", "none" if arm == "mapped" else arm)
                )
                about = _about(patcher, site, positions, control)
                yield self.mean(column, name, unit="nats", **about)
                if arm not in ("raw", "self"):
                    yield self.ratio(
                        column, arms["raw"], noise[positions, site], "kl_reduction", unit="fraction", **about
                    )

    def _into_base(self, prompts: Sequence[Prompt], patcher: Patcher) -> Iterator[Record]:
        values, noise = self._measure(prompts, patcher, reference="real")
        for (positions, site), arms in values.items():
            for arm, column in arms.items():
                if arm not in ("real", "self"):
                    about = _about(patcher, site, positions, "none" if arm == "mapped" else arm)
                    yield self.ratio(
                        column,
                        arms["self"],
                        noise[positions, site],
                        "patch_agreement",
                        unit="fraction",
                        **about,
                    )

    def _measure(
        self, prompts: Sequence[Prompt], patcher: Patcher, reference: str | None
    ) -> tuple[Values, dict[tuple[str, str], float]]:
        """Return KL(reference ‖ arm) by positions and site, arm and prompt, and the noise floor of each positions and site.

        Args:
            prompts: What the patcher's sides have read.
            patcher: Runs the arms.
            reference: An arm, or None for the recipient's clean distribution.
        """
        columns: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0] * len(prompts))
        noise: dict[tuple[str, str], list[float]] = defaultdict(list)

        def keep(positions: str, index: int, site: Site, arms: dict[str, Tensor]) -> None:
            clean = patcher.recipient.log_p[index]
            noise[positions, str(site)].append(kl_divergence(clean, arms["self"]).item())
            for arm, log_p in arms.items():
                value = kl_divergence(clean if reference is None else arms[reference], log_p).item()
                columns[positions, str(site), arm][index] = value
                self.items.append(
                    Item(prompts[index].id, "kl", str(site), positions, patcher.direction, arm, value)
                )

        for index in range(len(prompts)):
            for site, arms in patcher.last(index):
                keep("last", index, site, arms)
        if set(POSITIONS) <= set(patcher.module.positions):
            for index, site, arms in patcher.everywhere():
                keep("all", index, site, arms)
        values: Values = defaultdict(dict)
        for (positions, name, arm), column in columns.items():
            values[positions, name][arm] = torch.tensor(column, dtype=torch.float64)
        return values, {key: sum(column) / len(column) for key, column in noise.items()}

    def _effects(
        self, prompts: Sequence[Prompt], patcher: Patcher, openings: dict[str, Openings]
    ) -> Iterator[Record]:
        chosen = spread([p for p in prompts if p.lang in openings], self.effect_prompts)
        effects: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for prompt in chosen:
            for site, odds in patcher.refusal_logodds(prompts.index(prompt), openings[prompt.lang]):
                changes = {arm: odds[arm] - odds["self"] for arm in ("real", "mapped")}
                effects[str(site)].append((changes["real"], changes["mapped"]))
                for arm, change in changes.items():
                    self.items.append(
                        Item(
                            prompt.id,
                            "refusal_logodds_change",
                            str(site),
                            "last",
                            patcher.direction,
                            arm,
                            change,
                        )
                    )
        classes = [f"{p.lang}/{p.label}" for p in chosen]
        for name, pairs in effects.items():
            real, mapped = torch.tensor(pairs, dtype=torch.float64).unbind(1)
            about = _about(patcher, name, "last", "none")
            yield self.correlation(real, mapped, classes, "effect_correlation", unit="fraction", **about)


def read_openings(path: Path) -> dict[str, Openings]:
    """Read refusing and complying openings by language.

    Raises:
        PromptError: If the file is missing or malformed, or a language lacks one of the two kinds.
    """
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"refuse": [], "comply": []})
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                row = json.loads(line)
                found[row["lang"]][row["kind"]].append(row["text"])
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error.strerror} (key: pair.openings)") from error
    except (ValueError, KeyError, TypeError) as error:
        raise PromptError(
            f"{path}:{number}: expected lang, kind (refuse or comply) and text: {error} (key: pair.openings)"
        ) from error
    for lang, kinds in found.items():
        if not all(kinds.values()):
            raise PromptError(
                f"{path} needs openings of both kinds, refuse and comply, for {lang!r} (key: pair.openings)"
            )
    return {lang: (kinds["refuse"], kinds["comply"]) for lang, kinds in found.items()}


def spread(prompts: Sequence[Prompt], most: int | None) -> list[Prompt]:
    """Take prompts in turn from each language and class until there are enough; file order within each.

    Args:
        prompts: What there is.
        most: How many; None takes all.
    """
    classes: dict[tuple[str, str], list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        classes[prompt.lang, prompt.label].append(prompt)
    turns = [p for turn in zip_longest(*classes.values()) for p in turn if p is not None][:most]
    return [p for p in prompts if p in set(turns)]


def _side(loaded: LoadedModel, shared: Tensor, prompts: Sequence[Prompt]) -> Side:
    encoded = [encode(loaded.tokenizer, p.text) for p in prompts]
    return Side(loaded, SuffixEngine(loaded.model), shared.to(loaded.device), encoded)


def _about(patcher: Patcher, site: str, positions: str, control: str) -> dict[str, Any]:
    source = patcher.module.sources[patcher.module.sites.index(site)]
    params = {"direction": patcher.direction, "source_site": source, "solver": patcher.module.solver_name}
    return {
        "question": "rq2",
        "site": site,
        "positions": positions,
        "split": "eval",
        "control": control,
        "params": params,
    }
