"""MechdiffCLI: one LightningCLI whose verb the script fixes.

1. Parse; make paths absolute; check the pair; settle which sites are meant.
2. Extract what the activation stores lack. Widths are read from the stores when classes are built.
3. Build, fit, test; callbacks measure on the frozen pair.
4. Write one table, figures and TensorBoard; print a summary.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from rich.console import Console

from mechdiff import checkpoints, costs, prepare, rehearsal
from mechdiff.callbacks import CausalEvaluation, CausalLoss
from mechdiff.callbacks.graded import read_openings
from mechdiff.config import SEED
from mechdiff.data.activations import ActivationPairs
from mechdiff.errors import CheckpointError, UsageError, in_one_line
from mechdiff.extraction.spec import ExtractionSpec, width
from mechdiff.interventions.sites import Site, check_layers
from mechdiff.modules import DiffModule
from mechdiff.pairs.loading import load_pair
from mechdiff.pairs.spec import MAY_READ, PairSpec
from mechdiff.parser import OneLineParser, ends_when_told, quiet, replace_whole_pairs
from mechdiff.provenance import provenance
from mechdiff.reporting.run import write_run
from mechdiff.results import Record, Results

USAGE = "%(prog)s --config FILE [--pair FILE] [--layers LIST] [--KEY=VALUE ...]"
ABOUT = "Compare a language model with its tuned sibling. Every key of a configuration is an option."


class SaveRun(SaveConfigCallback):
    """Saves the configuration without the stores found for it, so that it runs again where they are not."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        config = config.clone()
        for role in {"source", "target"} & set(config.data.init_args.keys()):
            config.data.init_args[role] = ""
        super().__init__(parser, config, **kwargs)


class StoreKeys(Callback):
    """Keeps in every checkpoint which stores, and which split of their prompts, it was fitted to."""

    state_key = checkpoints.STORES

    def __init__(self, keys: Mapping[str, str]) -> None:
        self.keys = dict(keys)

    def state_dict(self) -> dict[str, str]:
        """Return the keys by role."""
        return self.keys


class MechdiffCLI(LightningCLI):
    """LightningCLI for modules that compare two models.

    ``sys.argv`` is left as typed: Lightning's launcher re-executes it for every other process.

    Args:
        verb: ``fit``, ``test`` or ``predict``.
        args: Command line without the script; ``sys.argv[1:]`` by default.
    """

    def __init__(self, verb: str, args: Sequence[str] | None = None) -> None:
        self.verb = verb
        self._stored: dict[str, Any] | None = None
        super().__init__(
            DiffModule,
            LightningDataModule,
            save_config_callback=SaveRun,
            save_config_kwargs={"overwrite": True},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=SEED,
            parser_class=OneLineParser,
            parser_kwargs={verb: {"description": ABOUT, "usage": USAGE}},
            args=args,  # type: ignore[arg-type]
        )

    # --- parsing ----------------------------------------------------------------------------------------

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Offer the fixed verb alone."""
        return {self.verb: LightningCLI.subcommands()[self.verb]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what belongs to a run rather than to one class."""
        pair_help = "The two models: a YAML file, or --pair.tuned.id and so on."
        parser.add_argument("--pair", type=PairSpec, help=pair_help)
        replace_whole_pairs(parser)
        read_help = "Folder outside its own that a pair file may name; on the command line only."
        parser.add_argument(MAY_READ, type=str | None, default=None, help=read_help)
        layers_help = "Layers or sites; fallback, stride, from_rq1; or the results.json of an rq1 run."
        parser.add_argument("--layers", type=list[int | str] | str, default="fallback", help=layers_help)
        parser.add_argument(
            "--max_prompts", type=int | None, help="Prompts of each split, language and class"
        )
        parser.add_argument("--dry-run", action="store_true", help=costs.ABOUT)
        parser.add_class_arguments(ExtractionSpec, "extraction")
        for name in ("d_source", "d_target", "noise"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse with the verb put first; make paths absolute; read what the checkpoint says of itself."""
        OneLineParser.typed = list(sys.argv[1:] if args is None else args)
        self.config = parser.parse_args([self.verb, *OneLineParser.typed])
        rehearsal.keep_safe(self.cfg, OneLineParser.typed)
        prepare.make_absolute(self.cfg)
        path = self.cfg.get("ckpt_path")
        if path == "last":
            path = self.cfg.ckpt_path = checkpoints.newest(self.cfg.trainer.logger, "last.ckpt")
        if path:
            self._stored = checkpoints.read(path)
            checkpoints.check_class(path, self._stored, self.cfg.model)
            defaults = parser.get_defaults().get(f"{self.verb}.model.init_args") or {}
            self._warn_of_overridden(path, defaults)
        elif self.verb == "test" and prepare.needs_fit(self.cfg.model):
            newest = checkpoints.newest(self.cfg.trainer.logger)
            hint = f"the newest of this configuration is {newest}" if newest else "run train.py with it first"
            raise CheckpointError(f"a test needs a fit; pass --ckpt_path; {hint} (key: ckpt_path)")

    def _parse_ckpt_path(self) -> None:
        """Let the settings of the checkpoint count."""
        with checkpoints.parsed(self.cfg.get("ckpt_path")):
            super()._parse_ckpt_path()

    # --- before anything is built -----------------------------------------------------------------------

    @property
    def cfg(self) -> Namespace:
        """The configuration of the verb."""
        return self.config[self.verb]

    @property
    def fast(self) -> bool:
        """Whether this is a trial of the plumbing, which leaves nothing behind."""
        return bool(self.cfg.trainer.fast_dev_run)

    @property
    def keeps(self) -> bool:
        """Whether the run leaves anything: it needs a logger's folder or one of its own."""
        trainer = self.cfg.trainer
        return not self.fast and (
            trainer.logger not in (False, []) or trainer.default_root_dir != self._scratch.name
        )

    def before_instantiate_classes(self) -> None:
        """Settle the pair, the prompts and the sites, and fill the stores."""
        cfg, trainer = self.cfg, self.cfg.trainer
        self._scratch = tempfile.TemporaryDirectory(prefix="mechdiff-")
        if self.fast:  # one process is trial enough
            trainer.devices = trainer.devices[:1] if isinstance(trainer.devices, list) else 1
            trainer.strategy = "auto"
        # On a cluster Lightning resumes what lies there, whoever has left it.
        elsewhere = trainer.logger in (False, []) or SLURMEnvironment.detect()
        if self.fast or (elsewhere and trainer.default_root_dir is None):
            trainer.default_root_dir = self._scratch.name
        self._settle_seed()
        spec = prepare.pair_spec(cfg.get("pair"), OneLineParser.typed)
        self.prompts = prepare.prompts_of(spec, cfg.max_prompts, self.fast)
        if spec.openings:
            read_openings(Path(spec.openings))  # a mistake in them would show after the fit only
        data, model = cfg.data.init_args, cfg.model.init_args
        sources = prepare.parse_layers(data.get("source_sites") or "fallback")
        extraction = ExtractionSpec(**cfg.extraction.as_dict()).check()
        if self.fast:
            extraction = replace(extraction, root=self._scratch.name)
            data.tokens = None
        asked = prepare.parse_layers(cfg.layers)  # mistakes show before a model is loaded
        self.check_run(rehearsal.rehearse(cfg, spec, self.prompts, asked, sources))
        self.pair = load_pair(spec, prepare.device(trainer))
        self.given, self.prompts = len(self.prompts), prepare.fitting(self.prompts, self.pair)
        if cfg.layers == prepare.FROM_RQ1:
            cfg.layers = prepare.from_rq1(trainer.logger, self.pair)
            asked = prepare.parse_layers(cfg.layers)
        depths, stride = (self.pair.base.depth, self.pair.tuned.depth), cfg.layers == prepare.STRIDE
        sites = prepare.settle_sites(asked, *depths, stride=stride)
        sources = sites if sources is None else sources
        check_layers(sources, self.pair.base.depth, "data.source_sites")
        data.sites = model.sites = [str(site) for site in sites]
        if data.get("source_sites"):
            model.source_sites = data.source_sites = [str(site) for site in sources]
        if self._stored:
            checkpoints.check_sites(cfg.ckpt_path, self._stored, sites, sources)
        self._try_out(sources, sites)
        given = {role: data.get(role) or "" for role in ("source", "target")}
        roles = {"source": sources, "target": sites}
        options = self.extraction_trainer()
        if cfg.dry_run:
            costs.tell(self.pair, self.prompts, roles, extraction, cfg)
        self.stores = (
            prepare.fill_stores(self.pair, self.prompts, roles, extraction, given, options)
            if prepare.needs_states(cfg.data)
            else {}
        )
        if self._stored and not self.fast:
            checkpoints.check_stores(cfg.ckpt_path, self._stored, self.stores)
        for role, store in self.stores.items():
            data[role] = str(store.folder)

    def check_run(self, module: DiffModule) -> None:
        """Refuse a verb, or processes, that the module has no use for."""
        rehearsal.check_run(self.verb, module, self.cfg.trainer)

    def extraction_trainer(self) -> dict[str, Any]:
        """Return options of the trainer that extracts: one device when extraction is only a step of a fit."""
        shown = self.cfg.trainer.enable_progress_bar
        return {"enable_progress_bar": shown is not False, "devices": 1}

    def _settle_seed(self) -> None:
        """Let one seed rule a run: classes whose own was not set follow it."""
        seed = self.cfg.seed_everything
        for part in (self.cfg.data.init_args, self.cfg.model.init_args):
            if part.get("seed") == SEED:
                part.seed = seed

    def _try_out(self, sources: Sequence[Site], sites: Sequence[Site]) -> None:
        rehearsal.try_out(self.cfg.data)
        widths = {
            "d_source": {width(self.pair.base, site) for site in sources},
            "d_target": {width(self.pair.tuned, site) for site in sites},
        }
        if all(len(found) == 1 for found in widths.values()):  # else the data say what is wrong
            rehearsal.try_out(self.cfg.model, **{name: next(iter(found)) for name, found in widths.items()})

    def _warn_of_overridden(self, path: str, defaults: Mapping[str, Any]) -> None:
        assert self._stored is not None
        for what in checkpoints.overridden(self._stored, self.cfg.model, defaults):
            print(f"mechdiff: warning: {what} ({path})", file=sys.stderr)

    # --- running ----------------------------------------------------------------------------------------

    def after_instantiate_classes(self) -> None:
        """Connect the evaluations; find mistakes in the data before anything is written."""
        seed = self.cfg.seed_everything
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, CausalEvaluation | CausalLoss):
                callback.connect(lambda: self.pair, self.prompts, seed)
        self.datamodule.setup(self.verb)
        keys = {role: store.identity.key for role, store in self.stores.items()}
        if isinstance(self.datamodule, ActivationPairs):
            keys["split"] = self.datamodule.split_key
        if self._stored is not None and not self.fast:
            checkpoints.check_split(self.cfg.ckpt_path, self._stored, keys.get("split"))
        self.trainer.callbacks.append(StoreKeys(keys))  # type: ignore[attr-defined]
        self.trainer.strategy.checkpoint_io = checkpoints.WholeFiles()

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb; a mistake found on the way leaves no half-written run behind."""
        try:
            super()._run_subcommand(subcommand)
        except (UsageError, OSError):
            folder = getattr(
                self.trainer.logger, "log_dir", None
            )  # the trainer's would wait for all processes
            if self.keeps and folder and not (Path(folder) / "checkpoints").exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self._scratch.cleanup()

    def after_fit(self) -> None:
        """Test what was fitted, in one process; several are told how."""
        checkpoint, folder = self._checkpoint(), self.trainer.log_dir  # every process has to ask
        if self.trainer.world_size == 1:
            self.trainer.test(
                self.model, datamodule=self.datamodule, ckpt_path=checkpoint, weights_only=True, verbose=False
            )
            self.after_test()
        elif self.trainer.is_global_zero:
            again = f"--config {folder}/config.yaml --trainer.devices 1 --trainer.strategy auto"
            print(f"Fitted by {self.trainer.world_size} processes. Test with one:")
            print(f"python evaluate.py {again} --ckpt_path {checkpoint}")

    def after_test(self) -> None:
        """Write and print the results."""
        evaluations = [c for c in self.trainer.callbacks if isinstance(c, CausalEvaluation)]  # type: ignore[attr-defined]
        records = [*self.model.records(), *self._coverage(), *(r for e in evaluations for r in e.results)]
        stores = {role: store.identity.key for role, store in self.stores.items()}
        origin = provenance(self.pair, self.cfg.seed_everything, stores)
        origin["layers"] = prepare.source_of_layers(self.cfg.layers)
        for evaluation in evaluations:
            origin |= evaluation.origin
        results = Results(records, origin)
        items = [asdict(item) for e in evaluations for item in e.items]
        folder = self.trainer.log_dir if self.keeps else None
        write_run(results, items, folder, self.trainer.logger, Console(), self.stores)

    def _coverage(self) -> Iterator[Record]:
        """Yield the share of the target's rows with a partner in the source, by language and positions.

        Where prompts were too long, that of the prompts that were not stands before it.
        """
        about: dict[str, Any]
        if self.given > len(self.prompts):
            share, params = len(self.prompts) / self.given, {"of": "prompts", "within": "context"}
            about = {"split": "all", "unit": "fraction", "params": params}
            yield Record(self.model.question, "coverage", share, self.given, **about)
        if not isinstance(self.datamodule, ActivationPairs):
            return
        for count in self.datamodule.coverage:
            prompts = sum(p.lang == count.lang for p in self.datamodule.prompts)
            about = {
                "positions": count.position,
                "split": "all",
                "unit": "fraction",
                "rows": count.aligned,
                "params": {"lang": count.lang, "source_rows": count.source, "target_rows": count.target},
            }
            share = count.aligned / count.target if count.target else 0.0
            yield Record(self.model.question, "coverage", share, prompts, **about)

    def _checkpoint(self) -> str | None:
        """Return the best checkpoint of the fit; a closed form, which takes no step, is saved here."""
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if best or not self.keeps:
            return best or None
        path = Path(self.trainer.log_dir or "") / "checkpoints" / "fitted.ckpt"
        self.trainer.save_checkpoint(path)
        return str(path)


@in_one_line
def main(verb: str, args: Sequence[str] | None = None, cli: type[MechdiffCLI] = MechdiffCLI) -> int:
    """Run a verb; a user's mistake is one line on the error stream and exit code 2, Ctrl-C ends it with 130.

    Args:
        verb: ``fit`` or ``test``.
        args: Command line without the script; ``sys.argv[1:]`` by default.
        cli: What parses and runs.
    """
    quiet()
    with ends_when_told():
        cli(verb, args)
    return 0
