import dataclasses
import json
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DistributedSampler

from mechdiff.data.activations import ActivationPairs
from mechdiff.data.join import Coverage, join, split_components
from mechdiff.data.manifest import Example
from mechdiff.data.store import POSITIONS, ActivationStore
from mechdiff.errors import ConfigError, StoreError
from mechdiff.extraction.extractor import ensure_store
from mechdiff.extraction.spec import ExtractionSpec
from mechdiff.pairs.alignment import align, common_template, encode, template_tokens
from tests.toys import OTHER_END, PLAIN, SYSTEM, loaded, prompts

QUIET = {"enable_progress_bar": False}
SITES = ["resid_post.1", "resid_post.2"]
KINDS = {
    "base": {},
    "twin": {"seed": 1},
    "tuned": {"size": 360, "template": SYSTEM, "seed": 1},
    "other_end": {"size": 360, "template": OTHER_END, "seed": 1},
    "raw": {"size": 360, "template": None, "seed": 1},
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, ActivationStore]:
    root = str(tmp_path_factory.mktemp("stores"))
    found = {}
    for number, (name, options) in enumerate(KINDS.items()):
        spec = ExtractionSpec(root, tokens_per_batch=200 + 50 * number, batches_per_shard=2 + number)
        found[name] = ensure_store(loaded(**options), prompts(), SITES, spec, trainer_kwargs=QUIET)
    return found


def pairs(stores, target="tuned", **options) -> ActivationPairs:
    settings = {"sites": ["resid_post.2"], "tokens": None, "batch_size": 50, **options}
    return ActivationPairs(str(stores["base"].folder), str(stores[target].folder), **settings)


@pytest.mark.parametrize("target", ["twin", "tuned", "other_end", "raw"])
def test_join_is_the_alignment_of_every_prompt(stores, target):
    a, b = stores["base"], stores[target]
    tokenizers = [loaded(**KINDS[name]).tokenizer for name in ("base", target)]
    (prefix_a, suffix_a), (prefix_b, suffix_b) = (template_tokens(t) for t in tokenizers)
    n_suffix = common_template(prefix_a, prefix_b, suffix_a, suffix_b)[1]
    expected = set()
    for index, prompt in enumerate(prompts()):
        both = [encode(t, prompt.text) for t in tokenizers]
        found = align(*both, 0, n_suffix)
        for i, j in zip(found.positions_a.tolist(), found.positions_b.tolist(), strict=True):
            if i and j:  # the first token is a sink
                expected.add((index, i, j))
    joined = join(a, b)
    places = zip(
        joined.prompt.tolist(),
        a.rows.position[joined.source].tolist(),
        b.rows.position[joined.target].tolist(),
        strict=True,
    )
    found = list(places)
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert torch.equal(a.rows.example[joined.source], b.rows.example[joined.target])
    assert joined.source.tolist() == sorted(joined.source.tolist())


def test_equal_tokenizers_align_everywhere(stores):
    for row in pairs(stores, "twin").coverage:
        assert row.source == row.target == row.aligned > 0


def test_coverage_counts_what_has_no_partner(stores):
    rows = pairs(stores, "other_end", positions=["user"]).coverage
    assert [(r.lang, r.position) for r in rows] == [(lang, p) for lang in ("en", "kk") for p in POSITIONS]
    assert isinstance(rows[0], Coverage)
    for row in rows:
        assert row.aligned <= min(row.source, row.target)
    assert sum(r.source for r in rows) == len(stores["base"])
    assert sum(r.target for r in rows) == len(stores["other_end"])
    template = [r for r in rows if r.position == "template"]
    assert all(
        r.aligned == 0 < r.target for r in template
    )  # the last token agrees, the one before it does not
    assert all(r.aligned == r.source == 24 for r in rows if r.position == "last")


def test_a_batch_holds_both_sides_of_its_rows(stores):
    data = pairs(stores, source_sites=["resid_post.1"])
    data.setup("fit")
    rows = data.rows("test")
    seen = 0
    for batch in data.test_dataloader():
        index = rows[seen : seen + len(batch["prompt"])]
        seen += len(index)
        assert list(batch["source"]) == ["resid_post.1"]
        assert list(batch["target"]) == ["resid_post.2"]
        source, target = stores["base"], stores["tuned"]
        expected = source.read("resid_post.1", data.joined.source[index])
        assert torch.equal(batch["source"]["resid_post.1"], expected)
        expected = target.read("resid_post.2", data.joined.target[index])
        assert torch.equal(batch["target"]["resid_post.2"], expected)
        assert torch.equal(batch["prompt"], source.rows.example[data.joined.source[index]])
        assert torch.equal(batch["group"], data.joined.group[index])
        assert torch.equal(data.read(index)["prompt"], batch["prompt"])
    assert seen == len(rows) > 0
    assert (data.d_source, data.d_target) == (32, 32)
    assert [p.id for p in data.prompts] == [p.id for p in prompts()]


def test_every_prompt_is_in_one_split_whole(stores):
    data = pairs(stores, "twin")
    rows = torch.cat([data.rows(split) for split in ("train", "val", "test")])
    assert sorted(rows.tolist()) == list(range(len(data.joined.prompt)))
    parts = [set(data.joined.prompt[data.rows(split)].tolist()) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(prompts())
    chosen = torch.cat([data.rows("val", [name]) for name in POSITIONS])
    assert sorted(chosen.tolist()) == data.rows("val").tolist()
    last = pairs(stores, "twin", positions=["last"])
    assert len(last.joined.prompt) == len(prompts())


def test_split_shares_no_topic_and_no_template():
    examples = [Example(p.id, p.lang, p.label, p.topic, p.template) for p in prompts(families=10)]
    split = split_components(examples, 0.2, seed=3)
    assert split == split_components(examples, 0.2, seed=3)
    assert split != split_components(examples, 0.2, seed=4)
    assert sorted(i for part in split.values() for i in part) == list(range(len(examples)))
    for name in ("topic", "template"):
        values = [{getattr(examples[i], name) for i in part} for part in split.values()]
        assert sum(map(len, values)) == len(set.union(*values))
    for part, families in (("train", 6), ("val", 2), ("test", 2)):  # in each of four strata
        kinds = [(examples[i].lang, examples[i].label) for i in split[part]]
        assert {kinds.count(kind) for kind in kinds} == {4 * families}
        assert len(set(kinds)) == 4


def test_a_shared_topic_links_what_it_touches():
    examples = [Example(str(i), "en", "neutral", f"topic{i}", f"template{i}") for i in range(9)]
    examples += [Example("link", "en", "neutral", "topic0", "template1")]
    split = split_components(examples, 0.2)
    home = [part for part in split.values() if 0 in part]
    assert {0, 1, 9} <= set(home[0])


def test_strata_too_small_are_dealt_together():
    examples = [Example(str(i), f"l{i}", "neutral", f"topic{i}", f"template{i}") for i in range(5)]
    assert [len(part) for part in split_components(examples, 0.2).values()] == [3, 1, 1]
    examples += [Example(f"en{i}", "en", "target", f"t{i}", f"s{i}") for i in range(4)]
    assert [len(part) for part in split_components(examples[3:], 0.2).values()] == [4, 1, 1]


def test_too_few_groups_of_prompts():
    examples = [Example(str(i), "en", "neutral", f"topic{i % 2}", f"template{i}") for i in range(9)]
    with pytest.raises(StoreError, match=r"form 2 groups .*allowed: 3 or more.*pair.prompts"):
        split_components(examples, 0.2)


def test_training_order_is_seeded_and_changes(stores):
    def epochs(seed: int) -> list[list[int]]:
        data = pairs(stores, seed=17)
        data.seed = seed
        loader = data.train_dataloader()
        found = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            found.append(torch.cat(list(loader.sampler)).tolist())
        assert sorted(found[0]) == sorted(found[1]) == data.rows("train").tolist()
        return found

    first = epochs(1)
    assert first[0] != first[1]
    assert first == epochs(1)
    assert first != epochs(2)


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes(stores, world):
    data = pairs(stores, batch_size=20)
    data.setup("fit")
    served: dict[str, list[list[torch.Tensor]]] = {}
    for split in ("train", "val", "test"):
        ranks = []
        for rank in range(world):
            data.trainer = type("Ranks", (), {"world_size": world, "global_rank": rank})()
            sampler = getattr(data, f"{split}_dataloader")().sampler
            assert isinstance(sampler, DistributedSampler)  # or Lightning would put its own in its place
            ranks.append(list(sampler))
            assert len(ranks[-1]) == len(sampler)
        served[split] = ranks
    data.trainer = None
    for split in ("val", "test"):
        rows = torch.cat([block for rank in served[split] for block in rank])
        assert sorted(rows.tolist()) == data.rows(split).tolist()
    assert len({len(rank) for rank in served["train"]}) == 1
    rows = [row for rank in served["train"] for block in rank for row in block.tolist()]
    assert len(rows) == len(set(rows))


def test_workers_change_nothing(stores):
    data, parallel = pairs(stores), pairs(stores, num_workers=2)
    for name in ("train_dataloader", "test_dataloader"):
        for a, b in zip(getattr(data, name)(), getattr(parallel, name)(), strict=True):
            assert torch.equal(a["source"]["resid_post.2"], b["source"]["resid_post.2"])
            assert torch.equal(a["prompt"], b["prompt"])


class Seen(L.LightningModule):
    """Keep which rows come in which epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs: dict[int, list[int]] = {}

    def training_step(self, batch):
        self.epochs.setdefault(self.current_epoch, []).extend(batch["prompt"].tolist())
        return self.weight * batch["source"]["resid_post.2"].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_tells_the_epoch(stores, tmp_path):
    module, data = Seen(), pairs(stores, "twin")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, datamodule=data)
    assert sorted(module.epochs[0]) == sorted(module.epochs[1])
    assert module.epochs[0] != module.epochs[1]
    saved = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    assert saved["datamodule_hyper_parameters"]["sites"] == ["resid_post.2"]


def test_hyperparameters_are_numbers_and_strings(stores):
    assert json.loads(json.dumps(dict(pairs(stores).hparams)))["batch_size"] == 50


def test_fewer_rows_than_asked_for(stores):
    data = pairs(stores, tokens=10**6)
    with pytest.raises(
        StoreError,
        match=r"^the stores have \d+ aligned rows at last, user, template; wanted 1000000: .*data.tokens\)$",
    ):
        data.setup("fit")


def test_positions_without_rows(stores):
    with pytest.raises(StoreError, match=r"have 0 aligned rows at template; wanted 1"):
        pairs(stores, "other_end", positions=["template"]).setup("fit")


def test_other_texts(stores, tmp_path):
    spec = ExtractionSpec(str(tmp_path))
    other = ensure_store(loaded(), prompts()[:-1], SITES, spec, trainer_kwargs=QUIET)
    data = ActivationPairs(str(stores["base"].folder), str(other.folder), SITES, tokens=None)
    with pytest.raises(StoreError, match=r"were made from other texts: .*data.source, data.target"):
        data.setup("fit")


def test_missing_site(stores):
    with pytest.raises(
        StoreError, match=r"does not hold site resid_post.3; it holds resid_post.1, resid_post.2"
    ):
        pairs(stores, sites=["resid_post.3"]).setup("fit")


def test_widths_of_one_side_must_agree(stores, monkeypatch):
    monkeypatch.setattr(ActivationStore, "width", lambda self, site: 8 if site == "resid_post.1" else 16)
    with pytest.raises(StoreError, match=r"must have one width; found .*\(key: data.sites\)"):
        pairs(stores, sites=SITES).d_target  # noqa: B018


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"positions": ["first"]},
            "positions are ['first']; allowed: some of last, user, template (key: data.positions)",
        ),
        ({"positions": []}, "positions are []; allowed: some of last, user, template (key: data.positions)"),
        ({"val_frac": 0.5}, "val_frac is 0.5; allowed: above 0 and below 0.5 (key: data.val_frac)"),
        ({"val_frac": 0.0}, "val_frac is 0.0; allowed: above 0 and below 0.5 (key: data.val_frac)"),
        ({"batch_size": 0}, "batch_size is 0; allowed: 1 or more (key: data.batch_size)"),
        (
            {"source_sites": SITES},
            "2 source sites for 1 sites; allowed: as many as sites, at least one (key: data.source_sites)",
        ),
    ],
)
def test_bad_settings(stores, change, message):
    with pytest.raises(ConfigError) as caught:
        pairs(stores, **change)
    assert str(caught.value) == message


def test_the_split_follows_the_manifest(stores, tmp_path):
    texts = [dataclasses.replace(p, topic="one", template="one") for p in prompts()]
    spec = ExtractionSpec(str(tmp_path))
    store = ensure_store(loaded(), texts, SITES, spec, trainer_kwargs=QUIET)
    data = ActivationPairs(str(store.folder), str(store.folder), SITES, tokens=None)
    with pytest.raises(StoreError, match="form 1 groups"):
        data.setup("fit")
    assert Path(store.folder).is_dir()


def test_templates_differ_where_they_should(stores):
    assert stores["base"].suffix == stores["twin"].suffix
    assert PLAIN != OTHER_END
    assert stores["raw"].suffix == []
