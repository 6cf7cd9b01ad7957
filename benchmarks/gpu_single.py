"""One GPU: `python -m benchmarks.gpu_single --out FOLDER [--tiny] [--parts ...]`.

Two models of 8B shape with random weights, the second with a planted change of rank 4, go through the
library's own extraction, moments, suffix engine, steering edits and attribution.

1. `ceilings`: what the card and the disk can do at best.
2. `correct`: laws in float32 on the card, bfloat16 against float32, padding on either side.
3. `extract`: 16 layers, all positions, to nowhere and to the disk; two layers to the disk.
4. `planted`: the layer and the rank of the planted change, from stored states.
5. `moments`: sums for maps and CKA at the width of the model, without a store.
6. `sweep`: 6 strengths by 4 ranks, at all positions and at the last, against hooks and full forwards.
7. `attribution`: all heads on 32 prompts, with one backward pass a batch.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks import clock, results
from benchmarks.clock import Clock, timed
from benchmarks.shapes import RANK, ROOT, SHAPES, TOKENIZER, build, texts
from benchmarks.sweep import handles, sweep
from mechdiff.config import LAMBDA_GRID
from mechdiff.data.contrast import ContrastPairs
from mechdiff.data.prompts import Prompt, load_prompts
from mechdiff.data.store import ActivationStore
from mechdiff.extraction import extractor
from mechdiff.extraction.extractor import ensure_store
from mechdiff.extraction.plan import Plan, PlannedShard, encode_prompts
from mechdiff.extraction.spec import ExtractionSpec
from mechdiff.extraction.writer import ActivationWriter
from mechdiff.functional.cka import cka_from_sums, linear_cka
from mechdiff.functional.clt import ridge_path
from mechdiff.functional.moments import Moments
from mechdiff.functional.steering import orthonormal
from mechdiff.interventions.hooks import intervene, record, stop_after
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine, run_logits
from mechdiff.modules import SteeringSubspace
from mechdiff.pairs.alignment import collate, encode
from mechdiff.pairs.loading import LoadedModel, probed
from mechdiff.pairs.organisms import Truth, plant_policy
from mechdiff.pairs.tokenizers import load_tokenizer

PARTS = ("ceilings", "correct", "extract", "planted", "moments", "sweep", "attribution")
BF16 = 8 * 2.0**-8
"""Relative error of states allowed in bfloat16: two sums in each of four blocks, each kept to 8 bits."""


@dataclass(frozen=True)
class Size:
    """How much is run."""

    shape: str
    dtype: torch.dtype
    tokens: int
    to_disk: int
    longest: int
    per_batch: int
    matmul: int
    copied: int
    rows: int
    prompts: int
    length: int
    heads_on: int


FULL = Size("8b", torch.bfloat16, 400_000, 200_000, 512, 16384, 8192, 1 << 30, 8192, 8, 512, 32)
TINY = Size("tiny", torch.float32, 6_000, 4_000, 48, 512, 256, 1 << 22, 256, 2, 16, 4)


class NullWriter(ActivationWriter):
    """Waits for rows as the writer does, and lets go of them."""

    def missing(self) -> list[PlannedShard]:
        """Ask for everything."""
        return list(self.shards)

    def finish(self) -> None:
        """Leave nothing."""

    def _write(self, prediction: Any, batch: Any) -> None:
        prediction()


class Bench:
    """The pair and what is measured on it."""

    def __init__(self, out: Path, work: Path, device: torch.device, size: Size) -> None:
        self.out, self.work, self.device, self.size = out, work, device, size
        self.lines: list[dict[str, Any]] = []
        self.tokenizer = load_tokenizer(TOKENIZER)
        self.ceiling = 0.0

    @cached_property
    def pair(self) -> tuple[LoadedModel, LoadedModel, Truth]:
        """Base, tuned and what tells them apart."""
        begun = time.perf_counter()
        model = build(self.size.shape, str(self.device), self.size.dtype)
        base = probed("base", model, self.tokenizer, f"random-{self.size.shape}")
        groups: list[list[str]] = [[] for _ in range(RANK)]
        targets = [p for p in self.stored if p.label == "target"]
        topics = sorted({p.topic for p in targets})
        for prompt in targets:
            groups[topics.index(prompt.topic) % RANK].append(prompt.text)
        neutral = [p.text for p in self.stored if p.label == "neutral"]
        tuned, truth = plant_policy(base, base.depth // 2, [g[:12] for g in groups], neutral=neutral[:48])
        self.say(f"made the pair in {time.perf_counter() - begun:.1f} s")
        return base, tuned, truth

    @cached_property
    def stored(self) -> list[Prompt]:
        """Prompts in which the planted change is looked for."""
        found = [p for p in load_prompts([ROOT / "data" / "prompts_fit.jsonl"]) if p.lang == "en"]
        return found if self.size.shape == "8b" else found[::2]

    @property
    def layers(self) -> list[int]:
        """Every other layer, the last among them: 16 of 32."""
        return list(range(1, self.pair[0].depth, 2))

    def keep(self, what: str, figures: dict[str, Any], **ratios: dict[str, Any]) -> None:
        """Keep a measurement, on disk at once."""
        line = results.measurement("gpu_single", what, figures, **ratios)
        self.lines.append(line)
        results.append([line], self.out / "results.jsonl")
        self.say(f"{what}: {figures} {ratios}")

    def say(self, text: str) -> None:
        """Print with the time."""
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)

    # --- parts ---------------------------------------------------------------------------------------------

    def ceilings(self) -> None:
        """Measure what there is to be had."""
        device, size = self.device, self.size
        self.ceiling = clock.matmul_rate(device, size.dtype, size.matmul)
        figures = {
            f"{str(size.dtype).removeprefix('torch.')}_matmul_tflop_per_s": self.ceiling / 1e12,
            "float64_matmul_tflop_per_s": clock.matmul_rate(device, torch.float64, size.matmul // 2) / 1e12,
            "copy_gb_per_s": clock.copy_rate(device, size.copied) / 1e9,
            "to_host_gb_per_s": clock.to_host_rate(device, size.copied) / 1e9,
            "disk_gb_per_s": clock.disk_rate(self.work, 4 * size.copied) / 1e9,
        }
        self.keep("ceilings", figures)

    def correct(self) -> None:
        """Check laws on the card: tiny models in float32, four wide blocks in bfloat16."""
        device, laws = self.device, {}
        exact = build("tiny", str(device), torch.float32)
        SuffixEngine(exact)  # refuses to be made if resuming differs from whole runs
        ids = torch.randint(3, 1000, (3, 24), generator=torch.Generator().manual_seed(0)).to(device)
        lengths = torch.tensor([24, 17, 9], device=device)
        columns = torch.arange(24, device=device)[None]
        right, left = columns < lengths[:, None], columns >= 24 - lengths[:, None]
        site = Site(exact.config.num_hidden_layers - 1)
        alone = [_states(exact, ids[i : i + 1, :n], site)[0] for i, n in enumerate(lengths.tolist())]
        shifted = torch.zeros_like(ids)
        for i, n in enumerate(lengths.tolist()):
            shifted[i, 24 - n :] = ids[i, :n]
        positions = (left.long().cumsum(1) - 1).clamp_min(0)
        padded = {
            "right": _states(exact, ids, site, attention_mask=right.long()),
            "right_without_mask": _states(exact, ids, site),
            "left": _states(exact, shifted, site, attention_mask=left.long(), position_ids=positions),
        }
        for name, states in padded.items():
            mask = left if name == "left" else right
            laws[f"{name}_padding_against_alone"] = max(
                float((states[i][mask[i]] - alone[i]).norm() / alone[i].norm()) for i in range(3)
            )
        clean = run_logits(exact, ids)
        own = _states(exact, ids, Site(1))
        with intervene(exact, {Site(1): lambda _h, _p: own}):
            laws["self_patch"] = float((run_logits(exact, ids) - clean).abs().max())
        assert max(laws.values()) < 1e-5, laws
        wide = "tiny" if self.size.shape == "tiny" else "wide"
        single = build(wide, str(device), torch.float32)
        states = _states(single, ids, site)
        half = single.to(torch.bfloat16)
        rounded = _states(half, ids, site).float()
        laws["bfloat16_against_float32"] = float((rounded - states).norm() / states.norm())
        assert laws["bfloat16_against_float32"] < BF16, laws
        mask = torch.ones_like(ids)
        mask[1, 4:] = mask[2, 1:] = 0
        for side, kept in (("right", mask), ("left", mask.flip(1))):
            logits = half(input_ids=ids, attention_mask=kept).logits
            laws[f"not_finite_under_{side}_padding"] = int((~logits[kept.bool()].isfinite()).sum())
        assert laws["not_finite_under_right_padding"] == 0, laws
        self.keep(f"laws: float32 tiny < 1e-5, bfloat16 < {BF16:.2g}", laws)

    def extract(self) -> None:
        """Extract to nowhere and to the disk."""
        base, _, _ = self.pair
        many = [Site(layer) for layer in self.layers]
        rates = {}
        for name, sites, tokens, null in (
            ("nowhere", many, self.size.tokens, True),
            ("disk", many, self.size.to_disk, False),
            ("nowhere_2", many[-2:], self.size.tokens, True),
            ("disk_2", many[-2:], self.size.tokens, False),
        ):
            prompts = list(texts(tokens, self.tokenizer, self.size.longest))
            watch = self._extract(base, prompts, sites, name, null)
            rates[name] = watch.rate
            flops = watch.rate * _per_token(self.size.shape, self.size.longest / 2)
            bytes_each = 2 * base.width * len(sites)
            figures = {
                "tokens_per_s": watch.rate,
                "tokens": watch.tokens,
                "written_gb_per_s": 0.0 if null else watch.rate * bytes_each / 1e9,
                "peak_gib": watch.peak_gib,
            }
            ratios = {}
            if self.ceiling:
                goal = 0.6 if null else None
                ratios["share_of_matmul"] = {"value": flops / self.ceiling, "goal": goal}
            if not null:
                other = rates[name.replace("disk", "nowhere")]
                ratios["of_the_null_writer"] = {"value": watch.rate / other, "goal": 0.95}
            where = "nowhere" if null else "HDF5 on disk"
            self.keep(f"extract {len(sites)} layers, all positions, to {where}", figures, **ratios)
            shutil.rmtree(self.work / name, ignore_errors=True)

    def _extract(
        self, model: LoadedModel, prompts: Sequence[Prompt], sites: list[Site], name: str, null: bool
    ) -> Clock:
        spec = ExtractionSpec(str(self.work / name), "all", "bfloat16", self.size.per_batch, 1)
        watch, folder = Clock(2 if self.size.shape == "tiny" else 4), self.work / name / "nowhere"
        options = {"callbacks": [watch], "enable_progress_bar": False}
        if null:
            folder.mkdir(parents=True)
            encoded = encode_prompts(model.tokenizer, prompts, model.context_length)
            plan = Plan(encoded, spec.positions, spec.tokens_per_batch, spec.batches_per_shard)
            writer = NullWriter(folder, plan.shards, "null", spec.dtype)
            run = extractor.Extractor(model, sites, plan, writer, [p.id for p in prompts])
            extractor._extract(run, options, L.Trainer)
        else:
            ensure_store(model, prompts, sites, spec, trainer_kwargs=options)
        return watch

    def planted(self) -> None:
        """Find the planted change in stored states, by the library's own fit."""
        base, tuned, truth = self.pair
        sites = [Site(layer) for layer in range(base.depth)]
        spec = ExtractionSpec(str(self.work / "planted"), "last", "float32", self.size.per_batch, 4)
        quiet = {"enable_progress_bar": False}
        begun = time.perf_counter()
        source, target = (
            ensure_store(m, self.stored, sites, spec, trainer_kwargs=quiet) for m in (base, tuned)
        )
        gaps = [_gap(source, target, site) for site in sites]
        layer = next(i for i, gap in enumerate(gaps) if gap > 0)
        names = [str(Site(layer))]
        data = ContrastPairs(str(source.folder), str(target.folder), sites=names)
        module = SteeringSubspace(
            names, d_source=base.width, d_target=base.width, noise=data.noise, compare=(), k=2 * RANK
        )
        L.Trainer(
            max_epochs=1,
            accelerator=self.device.type,
            devices=1,
            logger=False,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        ).fit(module, datamodule=data)
        energy = module.energy[0].double()
        shares = energy.diff(prepend=energy.new_zeros(1))
        k = 1 + int((shares[:-1] / shares[1:].clamp_min(1e-12)).argmax())  # the largest drop
        assert truth.directions is not None
        basis = module.basis(names[0])[:RANK].cpu().double()
        cosines = torch.linalg.svdvals(basis @ orthonormal(truth.directions).double().T)
        figures = {
            "layer": layer,
            "layer_planted": truth.layers[0],
            "k": k,
            "k_planted": truth.rank,
            "largest_angle_degrees": float(cosines.min().clamp(max=1).arccos().rad2deg()),
            "energy_in_k": float(energy[k - 1]),
            "difference_below_the_layer": max(gaps[:layer], default=0.0),
            "seconds": time.perf_counter() - begun,
        }
        assert (layer, k) == (truth.layers[0], truth.rank), figures
        self.keep("planted change, from stored states", figures)
        shutil.rmtree(self.work / "planted", ignore_errors=True)

    def moments(self) -> None:
        """Stream rows of both models into sums, and solve for a map and for CKA from the sums alone."""
        base, tuned, truth = self.pair
        site = Site(truth.layers[0])
        rows = int(self.size.rows)
        ids = self._ids(max(rows // 512, 2), min(512, rows))
        x, y = (_states(m.model, ids, site).flatten(0, 1).float() for m in (base, tuned))
        width, device = base.width, self.device
        sums = {"map": Moments.zeros(width, width, device), "target": Moments.zeros(width, width, device)}
        for name, (a, b) in {"map": (x, y), "target": (y, y)}.items():
            took = timed(lambda kept=sums[name], a=a, b=b: kept.update(a, b), device, 3)
            flops = 4 * len(a) * width**2
            figures = {
                "rows_per_s": len(a) / took.seconds,
                "float64_tflop_per_s": flops / took.seconds / 1e12,
                "peak_gib": took.peak_gib,
            }
            self.keep(f"moments of {name}, d = {width}", figures)
        pair, own = sums["map"], sums["target"]
        streamed = float(cka_from_sums(pair.xy, pair.xx, own.xx))
        took = timed(lambda: linear_cka(x, y), device, 3)
        direct = float(linear_cka(x, y))
        solve = timed(lambda: ridge_path(pair, LAMBDA_GRID, shrink="identity"), device, 1)
        figures = {
            "cka_streamed_minus_direct": streamed - direct,
            "cka_rows": len(x),
            "cka_seconds": took.seconds,
            "ridge_path_seconds": solve.seconds,
            "ridge_peak_gib": solve.peak_gib,
        }
        assert abs(streamed - direct) < 1e-6, figures
        self.keep(f"CKA and maps from moments, d = {width}", figures)

    def sweep(self) -> None:
        """Run 24 cells by resuming above the site, against a full forward with hooks for each."""
        base, _, _ = self.pair
        model, device = base.model, self.device
        ids = self._ids(self.size.prompts, self.size.length)
        engine = SuffixEngine(model)
        for layer in (base.depth // 2, base.depth * 3 // 4):
            module = handles(base, layer).to(device)
            for positions in ("all", "last"):
                figures, ratios = sweep(engine, module, ids, layer, positions, device)
                self.keep(f"sweep of 24 cells after block {layer}, {positions} positions", figures, **ratios)
                limit = 1e-3 if self.size.dtype == torch.float32 else 5e-2
                assert figures["relative_difference_of_logits"] < limit

    def attribution(self) -> None:
        """Attribute a log-probability to every head of base, on prompts of the repository."""
        from mechdiff.interventions.attribution import ZERO, Batch, attribute

        base, _, _ = self.pair
        encoded = [encode(self.tokenizer, p.text) for p in self.stored[: self.size.heads_on]]
        ids, mask = (part.to(self.device) for part in collate(encoded, self.tokenizer.pad_token_id))
        batches = [
            Batch(part, kept, logits_at=kept.sum(1) - 1)
            for part, kept in zip(ids.split(8), mask.split(8), strict=True)
        ]

        def run() -> list[Tensor]:
            found = [
                attribute(base.model, b, lambda z: z.float().log_softmax(-1).amax(-1), {"zero": ZERO})
                for b in batches
            ]
            return [part.values["zero"] for part in found]

        took = timed(run, self.device, 3)
        values = torch.cat(run())
        assert values.isfinite().all()
        figures = {"heads": values[0].numel(), "prompts": len(values), "tokens": int(mask.sum())}
        figures |= {"seconds": took.seconds, "heads_x_prompts_per_s": values.numel() / took.seconds}
        figures |= {"peak_gib": took.peak_gib}
        self.keep("attribution of all heads", figures)

    def _ids(self, rows: int, length: int) -> Tensor:
        draws = torch.Generator().manual_seed(2)
        return torch.randint(3, len(self.tokenizer), (rows, length), generator=draws).to(self.device)


@torch.no_grad()
def _states(model: Any, ids: Tensor, site: Site, **more: Any) -> Tensor:
    """Return what a site holds, `(rows, T, d)`."""
    with record(model, [site]) as seen, stop_after(model, site.layer):
        model(input_ids=ids, use_cache=False, **more)
    return seen[site]


def _per_token(shape: str, context: float) -> float:
    """Count the operations of a token in all blocks: two for each weight, and attention to half a text."""
    c: dict[str, Any] = SHAPES[shape]
    d, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    width = d // heads
    attention = 2 * d * d + 2 * d * width * c["num_key_value_heads"]
    return c["num_hidden_layers"] * (2 * (attention + 3 * d * inner) + 4 * d * context / 2)


def _gap(source: ActivationStore, target: ActivationStore, site: Site) -> float:
    x, y = source.read(site), target.read(site)
    return float((y - x).norm() / x.norm())


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the parts that are asked for and return what they measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir(), "mechdiff-gpu-single"),
        help="room for stores",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, help="tokens to extract")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    given = parser.parse_args(args)
    if not given.tiny and not torch.cuda.is_available():
        parser.error("no GPU is there; --tiny runs on the CPU")
    size = TINY if given.tiny else FULL
    if given.tokens:
        size = replace(size, tokens=given.tokens)
    device = torch.device("cpu" if given.tiny else "cuda")
    given.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    bench = Bench(given.out, given.work, device, size)
    failed = results.run_parts({part: getattr(bench, part) for part in given.parts}, bench.say)
    shutil.rmtree(given.work, ignore_errors=True)
    table = results.tables(bench.lines)
    (given.out / "table.md").write_text(table, encoding="utf-8")
    print(table)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    return bench.lines


if __name__ == "__main__":
    main()
