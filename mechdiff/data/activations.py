"""Serve the activations of two models, row by row, to whatever is fitted on them.

1. The stores of the two models are joined, and their prompts dealt to train, val and test.
2. Rows are read in contiguous blocks; a training batch mixes short runs of rows from everywhere.
3. No language model is needed, and none is imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from mechdiff.config import CLT_TOKENS, SEED, VAL_FRACTION
from mechdiff.data.join import SPLITS, Coverage, Join, join, split_components
from mechdiff.data.manifest import Example
from mechdiff.data.store import POSITIONS, ActivationStore
from mechdiff.errors import ConfigError, StoreError
from mechdiff.functional.stats import generator

RUN = 64
"""Neighbouring rows that a training batch takes together: single rows read several times slower."""
NOISE = {"float64": 1e-10, "float32": 1e-10, "float16": 1e-5, "bfloat16": 1e-4}
"""Squared relative rounding, with room for batches of other shapes.

It is 1e-6 in float32, and 1 % where a model runs in bfloat16.
"""


class ActivationPairs(L.LightningDataModule):
    """Aligned activations of two models.

    A batch is `{"source": {site: (rows, d_source)}, "target": {site: (rows, d_target)}, "prompt": (rows,),
    "group": (rows,)}`; `prompt` indexes `prompts`, `group` indexes `POSITIONS`. Under several processes each
    row of val and test is served exactly once, and every process gets equally many batches of train.

    Args:
        source: Folder of the source model's store; the command line fills in this one and the next two.
        target: Folder of the target model's store.
        sites: Sites of the target.
        source_sites: The source site for each of them; the same ones by default.
        positions: Groups of rows to serve, some of `last`, `user`, `template`.
        tokens: Aligned rows that there must be at least; None for no such demand. All rows are served.
        val_frac: Share of the groups of prompts used for validation, and again for the test.
        test_all: Serve all prompts as the test, for what is not fitted.
        batch_size: Rows of a batch.
        num_workers: Processes that read.
        seed: Seed of the split and of the order of training.
    """

    def __init__(
        self,
        source: str = "",
        target: str = "",
        sites: list[str] | tuple[str, ...] = (),
        source_sites: list[str] | None = None,
        positions: list[str] = list(POSITIONS),  # noqa: B006 - never changed; shown by --help
        tokens: int | None = CLT_TOKENS,
        val_frac: float = VAL_FRACTION,
        test_all: bool = False,
        batch_size: int = 4096,
        num_workers: int = 0,
        seed: int = SEED,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(
            logger=False
        )  # names may occur in the model's, which the logger would refuse
        self.folders = Path(source), Path(target)
        self.sites, self.source_sites = list(sites), list(source_sites or sites)
        self.positions, self.tokens, self.val_frac = list(positions), tokens, val_frac
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.test_all = test_all
        if not self.sites or len(self.source_sites) != len(self.sites):
            got = f"{len(self.source_sites)} source sites for {len(self.sites)} sites"
            raise ConfigError(f"{got}; allowed: as many as sites, at least one (key: data.source_sites)")
        unknown = [name for name in self.positions if name not in POSITIONS]
        if unknown or not self.positions:
            allowed = ", ".join(POSITIONS)
            raise ConfigError(
                f"positions are {self.positions}; allowed: some of {allowed} (key: data.positions)"
            )
        if not 0 < val_frac < 0.5:
            raise ConfigError(f"val_frac is {val_frac}; allowed: above 0 and below 0.5 (key: data.val_frac)")
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; allowed: 1 or more (key: data.batch_size)")

    stored: ClassVar[bool] = True
    """Whether there are states, which have to be extracted."""

    @cached_property
    def stores(self) -> tuple[ActivationStore, ActivationStore]:
        """The source and the target store."""
        source, target = (ActivationStore.open(folder) for folder in self.folders)
        return source, target

    @property
    def d_source(self) -> int:
        """Width of the source sites."""
        return _width(self.stores[0], self.source_sites, "data.source_sites")

    @property
    def d_target(self) -> int:
        """Width of the target sites."""
        return _width(self.stores[1], self.sites, "data.sites")

    @property
    def noise(self) -> float:
        """Share of a site's variance that a difference of two equal states can reach by rounding."""
        made = [store.identity for store in self.stores]  # the type on disk, and that of the computation
        return max(NOISE[name] for i in made for name in (i.dtype, i.model.rpartition("/")[2]))

    @property
    def prompts(self) -> list[Example]:
        """What is known of each prompt, by its index in a batch."""
        return self.stores[1].examples

    @cached_property
    def split(self) -> dict[str, list[int]]:
        """Indices of the prompts of train, val and test."""
        if self.test_all:
            return {"train": [], "val": [], "test": list(range(len(self.prompts)))}
        return split_components(self.prompts, self.val_frac, self.seed)

    @property
    def split_key(self) -> str:
        """Identify which prompts are in which split: a map must never be tested on what it was fitted to."""
        ids = {name: [self.prompts[index].id for index in self.split[name]] for name in SPLITS}
        return hashlib.sha256(json.dumps(ids, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def joined(self) -> Join:
        """The aligned rows of the wanted positions.

        Raises:
            StoreError: If they are fewer than `tokens`.
        """
        found = self._all
        wanted = torch.tensor([POSITIONS.index(name) for name in self.positions])
        kept = Join(*(column[torch.isin(found.group, wanted)] for column in found))
        if len(kept.source) < max(self.tokens or 0, 1):
            raise StoreError(
                f"the stores have {len(kept.source)} aligned rows at {', '.join(self.positions)}; wanted "
                f"{self.tokens or 1}: lower data.tokens, or add prompts of split fit (key: data.tokens)"
            )
        return kept

    @cached_property
    def coverage(self) -> list[Coverage]:
        """How many rows found a partner, by language and position, whatever positions are served."""
        sides = [
            (torch.tensor([self._langs.index(e.lang) for e in s.examples])[s.rows.example], s.groups)
            for s in self.stores
        ]
        sides.append((sides[0][0][self._all.source], self._all.group))
        return [
            Coverage(lang, name, *(int(((langs == i) & (groups == g)).sum()) for langs, groups in sides))
            for i, lang in enumerate(self._langs)
            for g, name in enumerate(POSITIONS)
        ]

    def setup(self, stage: str) -> None:
        """Join the stores, unless that is done, so that mistakes show before anything runs."""
        for split in ("test",) if self.test_all else SPLITS:
            if not len(self.rows(split)):
                raise StoreError(
                    f"split {split} has no aligned rows at {', '.join(self.positions)}; allowed: positions "
                    "that occur in every split (key: data.positions)"
                )
        assert self.d_source > 0
        assert self.d_target > 0

    def rows(self, split: str, positions: Iterable[str] | None = None) -> Tensor:
        """Return the indices, into the join, of the rows of a split, at all served positions by default."""
        groups = torch.tensor(
            [POSITIONS.index(name) for name in (self.positions if positions is None else positions)]
        )
        inside = torch.isin(self.joined.prompt, torch.tensor(self.split[split]))
        return (inside & torch.isin(self.joined.group, groups)).nonzero().flatten()

    def read(self, rows: Tensor) -> dict[str, Any]:
        """Read rows of the join as one batch."""
        return _Rows(self)[rows]

    def train_dataloader(self) -> DataLoader:
        """Serve the training rows, in a new order each epoch."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        """Serve the validation rows in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """Serve the test rows in order."""
        return self._loader("test")

    @cached_property
    def _all(self) -> Join:
        return join(*self.stores)

    @cached_property
    def _langs(self) -> list[str]:
        return sorted({example.lang for example in self.prompts})

    def _loader(self, split: str) -> DataLoader:
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        shuffle = split == "train"
        sampler = _Blocks(self.rows(split), self.batch_size, world, rank, self.seed if shuffle else None)
        return DataLoader(_Rows(self), batch_size=None, sampler=sampler, num_workers=self.num_workers)


class _Rows(Dataset):
    """A batch for each tensor of indices into the join; a file is open during a request only."""

    def __init__(self, data: ActivationPairs) -> None:
        self.stores, self.joined = data.stores, data.joined
        self.sites = dict.fromkeys(data.source_sites), dict.fromkeys(data.sites)

    def __getitem__(self, rows: Tensor) -> dict[str, Any]:
        sides = [
            store.read_sites(names, index[rows])
            for store, names, index in zip(self.stores, self.sites, self.joined[:2], strict=True)
        ]
        return {
            "source": sides[0],
            "target": sides[1],
            "prompt": self.joined.prompt[rows],
            "group": self.joined.group[rows],
        }


class _Blocks(DistributedSampler):
    """Yield the indices of one batch after the other.

    A batch of training is made of short runs of neighbouring rows, drawn from everywhere: neighbours
    alone share their length, language and topic, and a control that shuffles rows within a batch would keep
    those. Lightning replaces any sampler but a `DistributedSampler`, which it tells the epoch.
    """

    def __init__(self, rows: Tensor, size: int, world: int, rank: int, seed: int | None) -> None:
        self.rows, self.size = rows, size
        self.blocks = list(rows.split(size))
        super().__init__(self.blocks, num_replicas=world, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.shuffle_seed = seed

    def __len__(self) -> int:
        if self.shuffle_seed is not None:  # equally many for every process
            return len(self.blocks) // self.num_replicas
        return len(self.blocks[self.rank :: self.num_replicas])

    def __iter__(self) -> Iterator[Tensor]:
        if self.shuffle_seed is None:
            yield from self.blocks[self.rank :: self.num_replicas]
            return
        draws = generator(self.shuffle_seed, "train", self.epoch)
        runs = self.rows.split(RUN)
        mixed = torch.cat([runs[i] for i in torch.randperm(len(runs), generator=draws).tolist()])
        blocks = mixed.split(self.size)
        shuffled = [block[torch.randperm(len(block), generator=draws)] for block in blocks]
        yield from shuffled[self.rank :: self.num_replicas][: len(self)]


def _width(store: ActivationStore, sites: list[str], key: str) -> int:
    widths = {name: store.width(name) for name in sites}
    if len(set(widths.values())) > 1:
        raise StoreError(f"sites of one side must have one width; found {widths} (key: {key})")
    return next(iter(widths.values()))
