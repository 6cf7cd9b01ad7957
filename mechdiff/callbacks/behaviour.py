"""Behaviour: what the models of a pair do, side by side.

1. Users' messages of the pair are answered, and scored: refusals, style, bits per byte, new tokens.
2. Benchmarks are run by kind of item: multiple choice, problems, bias, free answers, toxicity.
3. Each number is given with shared-vocabulary masking and without, for each model, and as the difference of
   two models on the same prompts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path

from mechdiff.callbacks.base import CausalEvaluation, Item
from mechdiff.callbacks.choices import UNPARSED, chosen, solved
from mechdiff.callbacks.graded import Openings, read_openings
from mechdiff.callbacks.observations import Observation, records
from mechdiff.callbacks.refusal import TOO_LONG, answered, opened, read
from mechdiff.data.benchmarks.items import Item as Question
from mechdiff.data.benchmarks.items import permute_options
from mechdiff.data.benchmarks.registry import load_benchmarks
from mechdiff.data.prompts import Prompt, evenly
from mechdiff.errors import ConfigError
from mechdiff.modules.base import DiffModule
from mechdiff.pairs.loading import LoadedPair
from mechdiff.pairs.voice import Voice, voices
from mechdiff.results import Record

Scorer = Callable[[Sequence[str]], Sequence[float]]
NOT_MEASURED = "not_measured"
SAID = {
    TOO_LONG: "prompts do not fit the context and are skipped",
    UNPARSED: "answers cannot be read and count as wrong",
}
log = logging.getLogger(__name__)


class Behaviour(CausalEvaluation):
    """Measures what base, tuned and reference do.

    Args:
        max_prompts: Messages of each language and class; None takes all.
        max_graded: The same for the log-odds of refusing, the costliest part.
        max_items: Items of each benchmark; None takes all.
        answer_tokens: Longest answer to a message.
        solution_tokens: Longest solution of a problem.
        permute: Put the options of multiple choice in a drawn order.
        toxicity: Function from texts to scores between 0 and 1, or where to import it from, as
            ``package.module:function``. Without one toxicity is reported as not measured.
    """

    def __init__(
        self,
        max_prompts: int | None = 16,
        max_graded: int | None = 10,
        max_items: int | None = 40,
        answer_tokens: int = 40,
        solution_tokens: int = 64,
        permute: bool = False,
        toxicity: str | Scorer | None = None,
    ) -> None:
        super().__init__()
        most = {"max_prompts": max_prompts, "max_graded": max_graded, "max_items": max_items}
        for name, value in most.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; allowed: 1 or more, or null for all (key: {name})")
        for name, value in (("answer_tokens", answer_tokens), ("solution_tokens", solution_tokens)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; allowed: 1 or more (key: {name})")
        self.max_prompts, self.max_graded, self.max_items = max_prompts, max_graded, max_items
        self.permute = permute
        self.answer_tokens, self.solution_tokens = answer_tokens, solution_tokens
        self.toxicity = load_scorer(toxicity) if isinstance(toxicity, str) else toxicity

    def evaluate(self, module: DiffModule, pair: LoadedPair, prompts: Sequence[Prompt]) -> Iterable[Record]:
        """Measure every model; see the module's docstring."""
        benchmarks = self._benchmarks(pair)
        openings = read_openings(Path(pair.spec.openings)) if pair.spec.openings else {}
        kept, report = self.kept(pair, prompts)
        if report.kept < report.total:
            log.warning(
                "kept %d of %d prompts: the others have too few shared tokens", report.kept, report.total
            )
        kept = evenly(kept, self.max_prompts)
        observed = {}
        for role, voice in voices(pair).items():
            observed[role] = list(self._observe(voice, kept, openings, benchmarks))
            self.items += [
                _item(o, role) for o in observed[role] if o.control == "none" and o.value is not None
            ]
            for reason, said in SAID.items():
                lost = sorted({o.prompt for o in observed[role] if o.reason == reason})
                if lost:
                    log.warning("%s: %d %s: %s", role, len(lost), said, ", ".join(lost))
        contrasts = [("tuned", "base")]
        if "reference" in observed:
            contrasts += [("tuned", "reference"), ("base", "reference")]
        yield from records(observed, contrasts, self.seed)

    def _observe(
        self,
        voice: Voice,
        prompts: Sequence[Prompt],
        openings: dict[str, Openings],
        benchmarks: dict[str, list[Question]],
    ) -> Iterator[Observation]:
        cells = [{"lang": p.lang, "label": p.label} for p in prompts]
        graded = evenly([p for p in prompts if p.lang in openings], self.max_graded)
        parts = {
            "answers": answered(
                voice, [p.id for p in prompts], [p.text for p in prompts], cells, self.answer_tokens
            ),
            "openings": opened(voice, graded, openings),
            "neutral texts": read(voice, [p for p in prompts if p.label == "neutral"]),
            **{name: self._benchmark(voice, name, items) for name, items in benchmarks.items()},
        }
        for name, observations in parts.items():
            start = time.perf_counter()
            yield from observations
            log.info("%s: %s in %.1f s", voice.loaded.role, name, time.perf_counter() - start)

    def _benchmark(self, voice: Voice, name: str, items: Sequence[Question]) -> Iterator[Observation]:
        kind = items[0].kind
        if kind in ("mc", "bias"):
            yield from chosen(voice, items, name)
        elif kind in ("exact", "math"):
            yield from solved(voice, items, name, self.solution_tokens, self.seed)
        elif kind == "freeform":
            messages = ["\n\n".join(filter(None, [item.context, item.question])) for item in items]
            cells = [{"benchmark": name, "lang": item.lang} for item in items]
            yield from answered(voice, [item.id for item in items], messages, cells, self.answer_tokens)
        else:
            yield from self._toxicity(voice, name, items)

    def _toxicity(self, voice: Voice, name: str, items: Sequence[Question]) -> Iterator[Observation]:
        texts = [item.question for item in items]
        nothing: list[str | None] = [None] * len(texts)
        measured = self.toxicity is not None
        both = voice.continue_texts(texts, self.answer_tokens) if measured else (nothing, nothing)
        for masking, continuations in enumerate(both):
            cell = {"benchmark": name, "masking": bool(masking)}
            said = [text for text in continuations if text is not None]
            scores = iter(self.toxicity(said) if self.toxicity else ())
            for item, text in zip(items, continuations, strict=True):
                value = None if text is None else float(next(scores))
                reason = None if text is not None else TOO_LONG if measured else NOT_MEASURED
                yield Observation("toxicity", item.id, value, "fraction", cell, reason=reason)

    def _benchmarks(self, pair: LoadedPair) -> dict[str, list[Question]]:
        sources = pair.spec.benchmarks
        limits = dict.fromkeys(sources, self.max_items) if self.max_items else None
        found = load_benchmarks(sources, limits=limits, seed=self.seed)
        self.origin["benchmarks"] = {
            name: {"source": data.source, "revision": data.revision, "digest": data.digest}
            for name, data in found.items()
        }
        return {
            name: [permute_options(i, self.seed) if self.permute and i.options else i for i in data.items]
            for name, data in found.items()
        }


def load_scorer(place: str) -> Scorer:
    """Import a scorer of toxicity that is installed; nothing is fetched.

    Args:
        place: ``package.module:function``; the function takes texts and returns scores between 0 and 1.

    Raises:
        ConfigError: If there is no such function.
    """
    module, _, name = place.partition(":")
    try:
        scorer: Scorer = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"toxicity is {place!r}; allowed: an installed package.module:function, or null ({reason})"
        ) from error
    return scorer


def _item(observation: Observation, role: str) -> Item:
    cell = ",".join(f"{key}={value}" for key, value in sorted(observation.params.items()))
    value = observation.value
    assert value is not None
    return Item(observation.prompt, observation.quantity, "", observation.positions or "", role, cell, value)
