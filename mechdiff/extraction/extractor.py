"""Run a frozen model over prompts and keep what its sites hold.

1. The prompts become a plan of batches and shards, the same for any number of processes.
2. `Extractor` is what Lightning's predict runs: one forward per batch, ended after the highest wanted block;
   `ActivationWriter` puts the rows on disk while the next batch is computed, so that neither waits for the
   other and memory does not grow with the number of texts. What the template begins every prompt with is run
   once.
3. `ensure_store` asks for what a store lacks and nothing else: sites are passes, committed shards are kept.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

from mechdiff.data import prompts as prompt_files
from mechdiff.data.manifest import MANIFEST, Contents, Example, Pass, StoreIdentity, passes, unwritable
from mechdiff.data.prompts import Prompt
from mechdiff.data.store import DTYPES, ActivationStore
from mechdiff.errors import ActivationError, ConfigError, UsageError
from mechdiff.extraction.lock import alone, first
from mechdiff.extraction.memory import Parts
from mechdiff.extraction.plan import Batch, Plan, PlannedBatches, PlannedShard, deal, encode_prompts
from mechdiff.extraction.spec import ExtractionSpec, check_room, width
from mechdiff.extraction.transfer import HostCopies
from mechdiff.extraction.writer import ActivationWriter, Prediction
from mechdiff.interventions.compiled import compiled
from mechdiff.interventions.hooks import record, stop_after
from mechdiff.interventions.sites import Site, check_layers
from mechdiff.interventions.suffix import prefill, run
from mechdiff.pairs.alignment import template_tokens
from mechdiff.pairs.tokenizers import tokenizer_hashes

if TYPE_CHECKING:
    from transformers import DynamicCache

    from mechdiff.pairs.loading import LoadedModel

log = logging.getLogger(__name__)
_PLANS: dict[tuple[Any, ...], Plan] = {}  # the last one


class Extractor(L.LightningModule):
    """Read sites of a frozen model.

    The model is held by a plain dataclass: as a child module it would be broadcast to every process and enter
    checkpoints.

    Args:
        source: The model.
        sites: What to read.
        plan: The batches.
        writer: Knows which shards are still missing.
        ids: Ids of the prompts, to name one in a message.
    """

    def __init__(
        self,
        source: LoadedModel,
        sites: Sequence[Site],
        plan: Plan,
        writer: ActivationWriter,
        ids: Sequence[str],
    ) -> None:
        super().__init__()
        self.source, self.sites, self.plan, self.writer, self.ids = source, sites, plan, writer, ids
        self.copies, self.parts = HostCopies(), Parts(source.role)
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a process may have nothing to do
        self.dealt: list[list[PlannedShard]] = []
        self.started = 0.0
        self._prefix: DynamicCache | None = None

    def predict_dataloader(self) -> PlannedBatches:
        """Return the batches that this process has to run; the first one says what is missing."""
        writer, trainer = self.writer, self.trainer
        found = [shard.index for shard in writer.missing()] if trainer.is_global_zero else []
        missing = set(trainer.strategy.broadcast(found))
        self.dealt = deal([s for s in self.plan.shards if s.index in missing], trainer.world_size)
        return PlannedBatches(self.plan, self.dealt[trainer.global_rank], self.source.tokenizer.pad_token_id)

    def on_predict_start(self) -> None:
        """Move the model, which Lightning does not see, to this process's device, unless it is on several."""
        model = self.source.model
        if not self.source.spread:
            model.to(self.trainer.strategy.root_device)  # type: ignore[arg-type]
        start = self.plan.encoded[0].input_ids[: self.plan.fixed]
        with suppress(UsageError):  # one that keeps more than keys and values reads every prompt whole
            self._prefix = prefill(model, torch.tensor([start], device=model.device)) if start else None
        self.started = time.perf_counter()

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move what the model needs; where the rows come from is for the writer."""
        if device.type != "cuda":
            return batch
        ids, where = (
            part.pin_memory().to(device, non_blocking=True) for part in (batch.input_ids, batch.where)
        )
        return batch._replace(input_ids=ids, where=where)

    def predict_step(self, batch: Batch) -> Prediction:
        """Run one batch.

        Padding is on the right, where no token of a text looks: without a mask the result is the same, and
        the fastest attention can be used.

        Returns:
            A function that waits for the wanted rows and returns them by site, `(rows, width)` on the CPU, in
            the type of the disk. It raises `ActivationError` if one is NaN or infinite, naming the prompt
            and the site.
        """
        rows = self.parts.run(self._rows, batch.input_ids, batch.where)
        wait = self.copies.start([*rows, *(values.isfinite().all() for values in rows)])

        def finish() -> dict[Site, Tensor]:
            copies = wait()
            found = dict(zip(self.sites, copies, strict=False))
            for (site, values), finite in zip(found.items(), copies[len(found) :], strict=True):
                if not finite:
                    raise self._not_finite(site, values, batch)
            return found

        return finish

    def _rows(self, input_ids: Tensor, where: Tensor) -> list[Tensor]:
        """Return the wanted rows of some texts, one tensor for each site."""
        model, start = self.source.model, 0 if self._prefix is None else self.plan.fixed
        dtype = DTYPES[self.writer.dtype]

        def wanted(states: Tensor) -> Tensor:
            text, token = where.to(states.device).unbind(-1)
            return states[text, token - start].flatten(1).to(dtype)

        last = max(site.layer for site in self.sites)
        with record(model, self.sites, wanted) as kept, stop_after(model, last):
            run(model, input_ids[:, start:], prefix=self._prefix)
        return [kept[site] for site in self.sites]

    def _not_finite(self, site: Site, values: Tensor, batch: Batch) -> ActivationError:
        where = int(values.isfinite().all(dim=1).int().argmin())
        prompt, position = self.ids[int(batch.rows.example[where])], int(batch.rows.position[where])
        return ActivationError(
            f"{self.source.role}: the activation of prompt {prompt!r}, token {position}, at {site} "
            f"(layer {site.layer}) is NaN or infinite; allowed: finite values (key: pair.dtype, now "
            f"{str(self.source.model.dtype).removeprefix('torch.')})"
        )

    def report(self) -> str:
        """Say how fast the batches of all processes were run, and how evenly they were dealt."""
        seconds = time.perf_counter() - self.started
        shares = [sum(shard.padded for shard in part) for part in self.dealt]
        tokens = sum(shard.tokens for part in self.dealt for shard in part)
        uneven = max(shares) * len(shares) / sum(shares) - 1
        return (
            f"{self.source.role}: {tokens} tokens in {seconds:.3f} s by {len(shares)}, "
            f"{tokens / seconds:.0f} tokens/s; the busiest had {max(uneven, 0):.2%} more than the mean"
        )


class _Progress(TQDMProgressBar):
    """Lightning's progress bar with a description of its own."""

    def __init__(self, description: str) -> None:
        super().__init__()
        self._description = description

    @property
    def predict_description(self) -> str:
        return self._description


def ensure_store(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    sites: Iterable[Site | str],
    spec: ExtractionSpec,
    *,
    trainer_kwargs: dict[str, Any] | None = None,
    trainer_factory: Callable[..., L.Trainer] = L.Trainer,
) -> ActivationStore:
    """Open the store of a model on some prompts, after extracting the sites that it lacks.

    Every process of a distributed run calls this; one of them takes the lock and writes manifests.

    Args:
        model: The frozen model.
        prompts: The texts.
        sites: What to read; sites that the store holds already are not computed again.
        spec: Where and how.
        trainer_kwargs: Options of the trainer (devices, strategy, ...); one device, the model's, by default.
        trainer_factory: What makes the trainer.

    Returns:
        The store, all of its files checked.

    Raises:
        ConfigError: If the spec is out of range.
        SiteError: If the model lacks a site.
        PromptError: If a prompt does not fit into the model.
        ActivationError: If an activation is not finite.
        StoreError: If the folder cannot be written, has too little room, or another process is busy with it.
    """
    wanted = sorted({Site.parse(site) for site in sites})
    check_layers(wanted, model.depth)
    if spec.compile and model.spread:
        raise ConfigError(
            "compile is true for a model over several cards; allowed: false (key: extraction.compile)"
        )
    prefix, suffix = template_tokens(model.tokenizer)
    identity = store_identity(model, prompts, spec.check(), prefix, suffix)
    folder = Path(os.path.abspath(spec.root)) / identity.key
    examples = [Example(p.id, p.lang, p.label, p.topic, p.template) for p in prompts]
    contents = Contents(identity, examples, prefix, suffix)
    described = (folder / MANIFEST).exists() and Contents.read(folder) == contents
    if not described or _todo(folder, identity.key, wanted):
        with alone(folder), compiled(model.model) if spec.compile else nullcontext():
            if first():  # a new topic or label of an old text is no reason to extract again
                contents.write(folder)
            todo = _todo(folder, identity.key, wanted)
            for extractor in _extractors(model, prompts, todo, spec, folder, identity) if todo else ():
                _extract(extractor, trainer_kwargs or {}, trainer_factory)
    return ActivationStore.open(folder, identity)


def store_identity(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    spec: ExtractionSpec,
    prefix: list[bytes],
    suffix: list[bytes],
) -> StoreIdentity:
    """Say what a store would be made from, without making it."""
    tokenizer, template = tokenizer_hashes(model.tokenizer, prefix, suffix)
    how = "+compiled" if spec.compile else ""
    return StoreIdentity(
        model=f"{model.fingerprint}{how}/{str(model.model.dtype).removeprefix('torch.')}",
        tokenizer=tokenizer,
        template=template,
        prompts=prompt_files.digest(prompts),
        positions=spec.positions,
        dtype=spec.dtype,
    )


def _todo(folder: Path, key: str, wanted: list[Site]) -> list[list[Site]]:
    """List the passes to run: those with a broken shard, again, then the sites that no pass has."""
    found = passes(folder, key)
    todo = []
    for part in found:
        broken = [shard.file for shard in part.shards if not shard.intact(part.folder)]
        if broken:
            log.warning("%s is missing or damaged; extracting it again", part.folder / broken[0])
            todo.append(sorted(part.widths))
    missing = [site for site in wanted if not any(site in part.widths for part in found)]
    return [*todo, missing] if missing else todo


def _plan(
    model: LoadedModel, prompts: Sequence[Prompt], spec: ExtractionSpec, identity: StoreIdentity
) -> Plan:
    """Return the batches; models of a pair that read the same tokens share them."""
    texts = (identity.prompts, identity.tokenizer, identity.template, model.context_length)
    key = (*texts, spec.positions, spec.tokens_per_batch, spec.batches_per_shard)
    if key not in _PLANS:
        _PLANS.clear()
        encoded = encode_prompts(model.tokenizer, prompts, model.context_length)
        _PLANS[key] = Plan(encoded, spec.positions, spec.tokens_per_batch, spec.batches_per_shard)
    return _PLANS[key]


def _extractors(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    todo: Sequence[Sequence[Site]],
    spec: ExtractionSpec,
    folder: Path,
    identity: StoreIdentity,
) -> list[Extractor]:
    """Plan the passes, and see to it that the disk has room for what is missing of them."""
    plan, key = _plan(model, prompts, spec, identity), identity.key
    writers = [ActivationWriter(folder / Pass.name(part), plan.shards, key, spec.dtype) for part in todo]
    widths = [sum(width(model, site) for site in part) for part in todo]
    if first():
        check_room(folder, zip(widths, (w.missing() for w in writers), strict=True), spec.dtype)
    ids = [prompt.id for prompt in prompts]
    return [Extractor(model, part, plan, writer, ids) for part, writer in zip(todo, writers, strict=True)]


def placed_on(device: torch.device) -> dict[str, Any]:
    """Return the options of a trainer that runs where a model is."""
    return {"accelerator": device.type, "devices": 1 if device.index is None else [device.index]}


def _extract(
    extractor: Extractor, trainer_kwargs: dict[str, Any], trainer_factory: Callable[..., L.Trainer]
) -> None:
    """Run one pass."""
    model, writer, sites = extractor.source, extractor.writer, extractor.sites
    try:
        writer.folder.mkdir(parents=True, exist_ok=True)  # whichever process comes first
    except OSError as error:
        raise unwritable(writer.folder, error) from error
    options: dict[str, Any] = {
        **placed_on(model.device),
        "enable_model_summary": False,
        **trainer_kwargs,
    }
    callbacks = [writer, *(options.pop("callbacks", None) or [])]
    if options.get("enable_progress_bar", True):
        plural = "site" if len(sites) == 1 else "sites"
        callbacks.append(_Progress(f"extracting {model.role}, {len(sites)} {plural}"))
    # What correctness rests on is not the user's to set. Buffers made in inference mode have no gradients.
    options |= {
        "logger": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
        "inference_mode": False,
        "precision": "32-true",
        "limit_predict_batches": None,
        "fast_dev_run": False,
    }
    with tempfile.TemporaryDirectory(prefix="mechdiff-") as scratch, warnings.catch_warnings():
        # What Lightning saves before a cluster takes the machine away would be resumed by whatever runs next.
        trainer = trainer_factory(callbacks=callbacks, **options | {"default_root_dir": scratch})
        warnings.filterwarnings("ignore", "Couldn't infer the batch indices")  # rows say where they come from
        warnings.filterwarnings("ignore", "Total length of")  # a process may have nothing to do
        trainer.predict(extractor, return_predictions=False)
    trainer.strategy.barrier("shards")
    if trainer.is_global_zero:
        if extractor.started:  # an interrupted run may have left nothing but the manifest to write
            log.info(extractor.report())
        writer.finish()
    trainer.strategy.barrier("manifest")
