"""MechdiffCLI: one LightningCLI whose verb the script fixes.

1. Parse; make paths absolute; check the pair; settle which sites are meant.
2. Extract what the activation stores lack. Widths are read from the stores when classes are built.
3. Build, fit, test; callbacks measure on the frozen pair.
4. Write one table, figures and TensorBoard; print a summary.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console

from mechdiff.callbacks import CausalEvaluation
from mechdiff.config import SEED, fallback_layers
from mechdiff.data.activations import ActivationPairs
from mechdiff.data.prompts import Prompt, load_prompts, select
from mechdiff.errors import CheckpointError, ConfigError, UsageError
from mechdiff.extraction.extractor import ExtractionSpec, ensure_store
from mechdiff.interventions.sites import Site, check_layers
from mechdiff.modules import DiffModule
from mechdiff.pairs.loading import LoadedPair, load_pair
from mechdiff.pairs.spec import ModelSpec, PairSpec
from mechdiff.provenance import provenance
from mechdiff.reporting.run import write_run
from mechdiff.results import Record, Results

NESTED_UNION = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Given value type:",
    "Given value:",
)
"""How jsonargparse words that a value fits none of several types; the other lines say what is wrong with it."""
FAST_FAMILIES = 8
"""Groups of prompts (one language, class and topic) that ``fast_dev_run`` keeps."""


class OneLineParser(LightningArgumentParser):
    """Says what is wrong in one line instead of a usage page."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Print the message and exit with code 2."""
        lines = [line.strip(" -\t") for line in message.splitlines()]
        lines = [line for line in lines if line and not line.startswith(NESTED_UNION)]
        print(f"mechdiff: {'; '.join(lines)}", file=sys.stderr)
        raise SystemExit(2)


class MechdiffCLI(LightningCLI):
    """LightningCLI for modules that compare two models.

    ``sys.argv`` is left as typed: Lightning's launcher re-executes it for every other process.

    Args:
        verb: ``fit``, ``test`` or ``predict``.
        args: Command line without the script; ``sys.argv[1:]`` by default.
    """

    def __init__(self, verb: str, args: Sequence[str] | None = None) -> None:
        self.verb = verb
        super().__init__(
            DiffModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=SEED,
            parser_class=OneLineParser,
            parser_kwargs={verb: {"description": __doc__}},
            args=args,  # type: ignore[arg-type]
        )

    # --- parsing -----------------------------------------------------------------------------------------------------

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Offer the fixed verb alone."""
        return {self.verb: LightningCLI.subcommands()[self.verb]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse with the verb put first."""
        self.config = parser.parse_args([self.verb, *(sys.argv[1:] if args is None else args)])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what belongs to a run rather than to one class."""
        parser.add_argument(
            "--pair", type=PairSpec, help="The two models: a YAML file, or --pair.tuned.id and so on."
        )
        _replace_whole_pairs(parser)
        layers_help = (
            "Layers or site names to look at, or fallback (the default layers scaled to the model's depth)."
        )
        parser.add_argument("--layers", type=list[int | str] | str, default="fallback", help=layers_help)
        parser.add_class_arguments(ExtractionSpec, "extraction")
        for name in ("d_source", "d_target", "noise"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    # --- before anything is built --------------------------------------------------------------------------------------

    @property
    def cfg(self) -> Namespace:
        """The configuration of the verb."""
        return self.config[self.verb]

    @property
    def fast(self) -> bool:
        """Whether this is a trial of the plumbing, which leaves nothing behind."""
        return bool(self.cfg.trainer.fast_dev_run)

    def before_instantiate_classes(self) -> None:
        """Settle the pair, the prompts and the sites, and fill the stores."""
        self.pair = self._pair()
        self.prompts = load_prompts(self.pair.spec.prompts)
        if self.fast:
            self.prompts = _few(self.prompts)
        self._check_checkpoint()
        sites = self._sites(self.pair.base.depth, self.pair.tuned.depth)
        spec = ExtractionSpec(**self.cfg.extraction.as_dict())
        if self.fast:
            self._scratch = tempfile.TemporaryDirectory(prefix="mechdiff-")
            spec = ExtractionSpec(**{**asdict(spec), "root": self._scratch.name})
        fit, sources = (
            select(self.prompts, "fit"),
            [Site.parse(s) for s in self.cfg.data.init_args.get("source_sites") or sites],
        )
        self.stores = {
            "source": ensure_store(
                self.pair.base, fit, sources, spec, trainer_kwargs=self.extraction_trainer()
            ),
            "target": ensure_store(
                self.pair.tuned, fit, sites, spec, trainer_kwargs=self.extraction_trainer()
            ),
        }
        data, model = self.cfg.data.init_args, self.cfg.model.init_args
        for role, store in self.stores.items():
            data[role] = str(store.folder)
        data.sites = model.sites = [str(site) for site in sites]
        if data.get("source_sites"):
            model.source_sites = data.source_sites
        if self.fast:
            data.tokens = None

    def extraction_trainer(self) -> dict[str, Any] | None:
        """Options of the trainer that extracts: one device when extraction is only a step of a fit."""
        return None

    def _pair(self) -> LoadedPair:
        given = self.cfg.get("pair")
        if given is None:
            raise ConfigError("no pair is given; pass --pair configs/pairs/cultural_smol.yaml (key: pair)")
        given.pop("__path__", None)  # the configuration is saved with the pair in full
        values = given.as_dict()
        values |= {role: ModelSpec(**values[role]) for role in ("base", "tuned", "reference") if values.get(role)}
        spec = PairSpec(**values).check()
        return load_pair(spec, self._device())

    def _device(self) -> Any:
        trainer = self.cfg.trainer
        devices = trainer.devices if isinstance(trainer.devices, list) else 1
        return Trainer(accelerator=trainer.accelerator, devices=devices, barebones=True).strategy.root_device

    def _sites(self, depth_base: int, depth_tuned: int) -> list[Site]:
        layers = self.cfg.layers
        if isinstance(layers, str) and layers != "fallback":
            layers = [layers]
        chosen = fallback_layers(depth_tuned) if layers == "fallback" else layers
        sites = [Site(int(item)) if str(item).lstrip("-").isdigit() else Site.parse(str(item)) for item in chosen]
        if not sites or len(set(sites)) != len(sites):
            raise ConfigError(
                f"layers is {layers}; allowed: at least one layer or site, each once (key: layers)"
            )
        check_layers(sites, min(depth_base, depth_tuned))
        return sites

    def _check_checkpoint(self) -> None:
        path = self.cfg.get("ckpt_path")
        if path and path not in ("best", "last") and not Path(path).is_file():
            raise CheckpointError(
                f"{path} is not a file; give a checkpoint written by a fit (key: ckpt_path)"
            )
        if self.verb == "test" and not path:
            newest = _newest_checkpoint(self.cfg.trainer.logger)
            hint = (
                f"the newest of this configuration is {newest}"
                if newest
                else "run train.py with this configuration first"
            )
            raise CheckpointError(f"a test needs a fit; pass --ckpt_path; {hint} (key: ckpt_path)")

    # --- running -------------------------------------------------------------------------------------------------------

    def after_instantiate_classes(self) -> None:
        """Give the evaluations the pair and the prompts."""
        seed = self.cfg.seed_everything
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, CausalEvaluation):
                callback.connect(lambda: self.pair, self.prompts, seed)

    def after_fit(self) -> None:
        """Test what was fitted, in one process; several are told how."""
        checkpoint = self._checkpoint()
        if self.trainer.world_size > 1:
            if self.trainer.is_global_zero:
                print(
                    f"Fitted on {self.trainer.world_size} processes. Test on one: python evaluate.py --config ... --ckpt_path {checkpoint}"
                )
            return
        self.trainer.test(
            self.model, datamodule=self.datamodule, ckpt_path=checkpoint, weights_only=True, verbose=False
        )
        self.after_test()

    def after_test(self) -> None:
        """Write and print the results."""
        evaluations = [c for c in self.trainer.callbacks if isinstance(c, CausalEvaluation)]  # type: ignore[attr-defined]
        records = [*self.model.records(), *self._coverage(), *(r for e in evaluations for r in e.results)]
        stores = {role: store.identity.key for role, store in self.stores.items()}
        results = Results(records, provenance(self.pair, self.cfg.seed_everything, stores))
        items = [asdict(item) for e in evaluations for item in e.items]
        write_run(results, items, self.trainer.log_dir, self.trainer.logger, Console())
        if self.fast:
            self._scratch.cleanup()

    def _coverage(self) -> Iterator[Record]:
        """Yield, for each language and group of positions, the share of the target's rows that have a partner in the source."""
        if not isinstance(self.datamodule, ActivationPairs):
            return
        for count in self.datamodule.coverage:
            prompts = sum(p.lang == count.lang for p in self.datamodule.prompts)
            params = {"lang": count.lang, "source_rows": count.source, "target_rows": count.target}
            share = count.aligned / count.target if count.target else 0.0
            about: dict[str, Any] = {
                "positions": count.position,
                "split": "all",
                "unit": "fraction",
                "rows": count.aligned,
                "params": params,
            }
            yield Record("rq2", "coverage", share, prompts, **about)

    def _checkpoint(self) -> str | None:
        """Return the best checkpoint of the fit; a closed form takes no optimizer step, so it is saved here."""
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if best or self.fast or self.trainer.log_dir is None:
            return best or None
        path = Path(self.trainer.log_dir) / "checkpoints" / "fitted.ckpt"
        self.trainer.save_checkpoint(path)
        return str(path)


def main(verb: str, args: Sequence[str] | None = None) -> int:
    """Run a verb; a user's mistake is one line on the error stream and exit code 2.

    Args:
        verb: ``fit`` or ``test``.
        args: Command line without the script; ``sys.argv[1:]`` by default.
    """
    quiet()
    try:
        MechdiffCLI(verb, args)
    except UsageError as error:
        print(f"mechdiff: {error}", file=sys.stderr)
        return 2
    return 0


def quiet() -> None:
    """Keep notices that a user of this library cannot act on off the screen."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*will run with no optimizer.*",
        ".*srun.*",
        ".*GPU available but not used.*",
        ".*treespec.*",
    ):
        warnings.filterwarnings("ignore", message=text)


def _replace_whole_pairs(parser: LightningArgumentParser) -> None:
    """Let a pair file replace the pair before it; jsonargparse would keep what the new file leaves out, such as the old pair's adapter."""
    action: Any = next(a for a in parser._actions if a.dest == "pair")
    load = action._load_config

    def load_whole(value: Any, parser: Any) -> Namespace:
        loaded = load(value, parser)
        if isinstance(value, str):
            given = set(loaded.keys())
            for key, default in Namespace(_nested(asdict(PairSpec()))).items():
                if key not in given:
                    loaded[key] = default
        return loaded

    action._load_config = load_whole


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    return {k: Namespace(v) if k in ("base", "tuned") else v for k, v in values.items()}


def _few(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Keep a handful of every split, language and class: enough for every split of the fit to have some."""
    taken: dict[tuple[str, ...], list[Prompt]] = {}
    for prompt in prompts:
        family = (prompt.template,) if prompt.split == "fit" else (prompt.id,)
        kind = (prompt.split, prompt.lang, prompt.label)
        most = FAST_FAMILIES if prompt.split == "fit" else 1
        families = [key for key in taken if key[: len(kind)] == kind]
        if (*kind, *family) in taken or len(families) < most:
            taken.setdefault((*kind, *family), []).append(prompt)
    kept = {p.id for group in taken.values() for p in group[:1]}
    return [p for p in prompts if p.id in kept]


def _newest_checkpoint(logger: Any) -> str | None:
    init = logger.get("init_args") if isinstance(logger, Namespace) else None
    if not init or not init.get("save_dir"):
        return None
    folder = Path(init.save_dir) / str(init.get("name") or "lightning_logs")
    found = sorted(folder.glob("version_*/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
    return str(found[-1]) if found else None
