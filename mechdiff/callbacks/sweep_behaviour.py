"""What tested edits do to behaviour: graded without generating, and in the answers themselves.

1. Graded: the log-odds of refusing, or log P(correct), with the edit on the last token of the prompt.
2. Generated: whether the answer is of the tuned kind (`mechdiff.callbacks.side_effects.turned`), and right
   where the prompt says what is, with the edit on that token and on every token of the answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mechdiff.callbacks.edited_answers import answer_edited
from mechdiff.callbacks.graded import grades, read_openings
from mechdiff.callbacks.handle_evaluation import Handle
from mechdiff.callbacks.reading import Reading
from mechdiff.callbacks.side_effects import answer_reach, turned
from mechdiff.callbacks.sweep_effects import Targets, direction
from mechdiff.data.prompts import Prompt, spread
from mechdiff.functional.answers import same_answer
from mechdiff.interventions.generation import stop_tokens
from mechdiff.modules.base import DiffModule
from mechdiff.pairs.loading import LoadedPair
from mechdiff.pairs.voice import voices

GENERATED, NUMBER_ONLY, EXACT = "generated", "number_only", "exact_match"
"""What is read in answers: that they decline; that they are a number and nothing else; that they
are the right number and nothing else."""


class Moved(NamedTuple):
    """A number of every prompt with an edit, and in both models as they are.

    Attributes:
        prompts: Their ids.
        end: In the model that the edit imitates, `(prompts,)`, float64.
        start: In the one that is edited, as it is.
        value: With the edit.
        noise: How far the edited model is from itself between two runs.
    """

    prompts: list[str]
    end: Tensor
    start: Tensor
    value: Tensor
    noise: float


def graded(
    module: DiffModule, pair: LoadedPair, targets: Targets, cells: Sequence[Handle], most: int
) -> Iterator[tuple[str, Handle, Moved]]:
    """Yield graded behaviour by metric and edit.

    Args:
        module: The fitted subspaces.
        pair: The models.
        targets: The prompts.
        cells: The edits, all of one site.
        most: Prompts that are read, evenly over languages.
    """
    openings = read_openings(Path(pair.spec.openings)) if pair.spec.openings else {}
    few = set(spread([p for p in targets.prompts if grades(p, openings)], most))
    said, sites = voices(pair), {cell.site for cell in cells}
    rows: dict[tuple[str, Handle], list[tuple[str, float, float, float, float]]] = defaultdict(list)
    for index, prompt in enumerate(targets.prompts):
        for found in grades(prompt, openings) if prompt in few else ():
            base, tuned = (
                Reading(said[side.loaded.role], side, index, found, sites)
                for side in (targets.base, targets.tuned)
            )
            if not (base.clean and tuned.clean):
                continue
            clean = base.clean[False], tuned.clean[False]
            for where in sorted({direction(cell.kind) for cell in cells}):
                reading, (start, end) = (base, clean) if where == "into_base" else (tuned, clean[::-1])
                here = [cell for cell in cells if direction(cell.kind) == where]
                own, donor = targets.states(index, here[0].site, where)
                states: dict[Handle | None, Tensor] = {c: c.change(module, own, donor)[0] for c in here}
                values = reading.edited(here[0].site, {None: own[0], **states})[False]
                again = values.pop(None)
                for cell, value in values.items():
                    assert cell is not None
                    rows[found.metric, cell].append((prompt.id, end, start, value, abs(again - start)))
    for (metric, cell), found_rows in rows.items():
        yield metric, cell, _moved(found_rows)


def generated(
    module: DiffModule,
    pair: LoadedPair,
    targets: Targets,
    cells: Sequence[Handle],
    translate: Mapping[str, Tensor],
    most: int,
    chars: int,
) -> Iterator[tuple[str, Handle, Moved, int]]:
    """Yield by edit whether answers are of the tuned kind or right, and how many of them were cut.

    Args:
        module: The fitted subspaces.
        pair: The models.
        targets: The prompts.
        cells: The edits, all of one site.
        translate: The other model's id of each token of the edited one, by direction.
        most: Prompts that are answered, evenly over languages.
        chars: Longest answer, in characters.
    """
    few = set(spread(targets.prompts, most))
    indices = [i for i, prompt in enumerate(targets.prompts) if prompt in few]
    plain = Handle(cells[0].site, "none", 1, 0.0)
    answers: dict[tuple[str, Handle, int], str] = {}
    cut: dict[Handle, int] = defaultdict(int)
    for where in ("into_base", "into_tuned"):
        mine, other = targets.sides(where)
        each = [(cell, i) for cell in (plain, *_of(cells, where)) for i in indices]
        stops = stop_tokens(mine.loaded.model, mine.loaded.tokenizer.eos_token_id)
        said = answer_edited(
            module,
            mine,
            other,
            [i for _, i in each],
            [cell for cell, _ in each],
            translate[where],
            answer_reach(mine.loaded, chars),
            stops,
        )
        for (cell, i), answer in zip(each, said, strict=True):
            text = mine.loaded.tokenizer.decode(answer.ids, skip_special_tokens=True)
            answers[where, cell, i] = str(text).strip()
            cut[cell] += answer.cut
    for cell in cells:
        where = direction(cell.kind)
        away = "into_tuned" if where == "into_base" else "into_base"
        keys = (away, plain), (where, plain), (where, cell)
        for metric, reads in _readings(pair.spec.domain).items():
            found: list[tuple[str, float, float, float, float]] = []
            for i in indices:
                prompt = targets.prompts[i]
                end, start, value = (reads(prompt, answers[*key, i]) for key in keys)
                if end is not None and start is not None and value is not None:
                    found.append((prompt.id, float(end), float(start), float(value), 0.0))
            if found:
                yield metric, cell, _moved(found), cut[cell]


def _of(cells: Sequence[Handle], where: str) -> list[Handle]:
    return [cell for cell in cells if direction(cell.kind) == where]


def _readings(domain: str) -> dict[str, Callable[[Prompt, str], bool | None]]:
    """Return what is read in an answer, None where a prompt does not allow it."""
    if domain == "cultural":
        return {GENERATED: lambda _, text: turned(text, domain)}
    return {
        NUMBER_ONLY: lambda _, text: turned(text, domain),
        EXACT: lambda p, text: None if p.answer is None else same_answer(p.answer, text, "value"),
    }


def translations(pair: LoadedPair) -> dict[str, Tensor]:
    """Return, by direction, the other model's id of each token of the edited one, −1 where it has none."""
    ids = {"into_base": (pair.shared.base_ids, pair.shared.tuned_ids)}
    ids["into_tuned"] = ids["into_base"][::-1]
    models = {"into_base": pair.base, "into_tuned": pair.tuned}
    found = {}
    for where, (mine, theirs) in ids.items():
        size = models[where].model.get_output_embeddings().weight.shape[0]
        found[where] = torch.full((size,), -1, device=models[where].device)
        found[where][mine.to(models[where].device)] = theirs.to(models[where].device)
    return found


def _moved(rows: Sequence[tuple[str, float, float, float, float]]) -> Moved:
    names, *columns = zip(*rows, strict=True)
    end, start, value, noise = torch.tensor(columns, dtype=torch.float64)
    return Moved(list(names), end, start, value, float(noise.mean()))
