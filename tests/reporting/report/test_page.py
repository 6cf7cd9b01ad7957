"""The page of a report: self-contained, escaped, each number with its record; what is missing is named."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mechdiff.__main__ import main
from mechdiff.reporting.report.page import write_report
from mechdiff.results import Record, Results
from tests.reporting.report.make_study import QUESTIONS, provenance, run_of, study

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """What a test looks at: anchors, links, text by tag, attributes, and whether tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "input", "img", "link"):
            self.open.append(tag)
        for name, value in attrs:
            self.attributes.append((tag, name, value or ""))
            if name == "id":
                self.ids.append(value or "")
            elif name == "href":
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a study of both pairs with its report."""
    place = study(tmp_path_factory.mktemp("study"))
    write_report([place], place, figures=False)
    return place


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_it_has_the_sections_of_the_note_filled(page: str, folder: Path) -> None:
    wanted = (
        "CultureShift vs CogShift",
        "Executive summary",
        "Objective",
        "Setup",
        *(f"RQ{n} — " for n in range(1, 5)),
        "Contrast of the pairs",
        "Robustness",
        "Limitations",
        "Reuse for practitioners",
        "Provenance",
        "References",
    )
    for text in (page, (folder / "report.md").read_text(encoding="utf-8")):
        places = [
            text.index(name, 1 if not i else text.index("Executive summary")) for i, name in enumerate(wanted)
        ]
        assert places[2:] == sorted(places[2:])
        assert "…" not in text.partition("Robustness")[0], "a blank of the note was left open"


def test_it_loads_nothing_and_allows_its_own_script_alone(page: str) -> None:
    found = Page(page)
    policy = next(v for tag, name, v in found.attributes if name == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (text,) = found.texts[tag]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not [a for a in found.attributes if a[1] == "style" or a[1].startswith("on")], (
        "the policy drops these"
    )
    loaded = [v for _, name, v in found.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert loaded
    assert all(v.startswith(("#", "data:image/png;base64,")) for v in loaded)
    assert "url(" not in page
    assert "@import" not in page


def test_every_number_links_to_a_record_with_interval_n_and_control(page: str, folder: Path) -> None:
    found = Page(page)
    assert len(set(found.ids)) == len(found.ids)
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)
    rows = re.findall(r'<tr id="(r\d+)"', page)
    assert len(rows) > 100
    assert {link for link in found.links if re.fullmatch(r"#r\d+", link)} == {f"#{row}" for row in rows}
    first = re.search(r'<tr id="r1".*?</tr>', page)
    assert first is not None
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", first[0])
    assert len(cells) == 13
    assert (folder / cells[-1]).is_file()
    hints = [v for tag, name, v in found.attributes if tag == "a" and name == "title"]
    assert all("interval" in hint and "n = " in hint for hint in hints)
    assert all("control: " in hint or "split " in hint for hint in hints)


def test_every_drawing_and_table_can_be_heard(page: str) -> None:
    found = Page(page)
    labels = [v for tag, name, v in found.attributes if tag == "svg" and name == "aria-label"]
    assert len(labels) == page.count("<svg ")
    assert all(labels)
    assert page.count("<table") == page.count("<caption>")
    assert page.count('scope="col"') > 50
    assert page.count('scope="row"') > 50
    assert {tag for tag, *_ in found.attributes} >= {"nav", "main", "section", "a"}
    assert 'aria-live="polite"' in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_text_of_a_record_stays_text(tmp_path: Path) -> None:
    results = run_of("rq3")
    results.records = [
        replace(r, params={**r.params, "template": EVIL + r.params["template"]})
        if "template" in r.params
        else r
        for r in results
    ]
    results.records += [replace(r, flags=(EVIL,)) for r in run_of("rq2")]
    results.provenance = provenance(f"{EVIL}&\"'", "cultural")
    results.write(tmp_path / "results.json")
    html, md = write_report([tmp_path], tmp_path, figures=False)
    text = html.read_text(encoding="utf-8")
    assert "&lt;script>alert(1)&lt;/script>" in md.read_text(encoding="utf-8")
    assert EVIL not in md.read_text(encoding="utf-8")
    assert "alert(1)" in text
    assert EVIL not in text
    assert text.count("<script") == 1
    Page(text)


def test_the_same_records_give_the_same_bytes(folder: Path, page: str) -> None:
    before = (folder / "report.md").read_bytes()
    html, md = write_report([folder], folder, figures=False)
    assert html.read_text(encoding="utf-8") == page
    assert md.read_bytes() == before


def test_it_tells_nothing_of_the_machine(tmp_path: Path) -> None:
    place = study(tmp_path / "runs" / "study", ("cultural_smol",))
    table = place / "cultural_smol" / "rq1" / "results.json"
    results = Results.read(table)
    results.provenance["pair"]["base"]["id"] = str(tmp_path / "models" / "own")
    results.write(table)
    for out, named in ((place, ""), (tmp_path / "pages", "../runs/study/")):
        for path in write_report([place], out, figures=False):
            text = path.read_text(encoding="utf-8")
            assert f"{named}cultural_smol/rq1/results.json" in text
            assert ">own<" in text or "| own |" in text
            assert str(tmp_path) not in text
            assert "/somewhere" not in text


def test_forms_of_a_benchmark_have_rows_of_their_own(tmp_path: Path) -> None:
    results = run_of("rq1")
    cell = {"question": "rq1", "quantity": "mc_acc", "n": 40, "unit": "fraction", "split": "eval"}
    values = {"cloze": (0.3, 0.4, 0.1), "letter": (0.5, 0.8, 0.3)}
    results.records = [r for r in results if r.quantity != "mc_acc"]
    for form, found in values.items():
        for model, value in zip(("base", "tuned", "pair"), found, strict=True):
            for masking in (False, True):
                params = {"benchmark": "mc_kk", "format": form, "masking": masking}
                about = {"model": model, "params": params, "low": value - 0.05, "high": value + 0.05}
                results.records.append(Record(**cell, value=value, **about))
    results.provenance = provenance("cultural_smol", "cultural")
    results.write(tmp_path / "results.json")
    _, md = write_report([tmp_path], tmp_path, figures=False)
    lines = md.read_text(encoding="utf-8").splitlines()
    for form, (base, tuned, change) in values.items():
        label = f"multiple choice mc kk {form}"
        row, masked = (line for line in lines if line.startswith(f"| {label} |"))
        assert all(said in row for said in (f"{base:.0%}".replace("%", " %"), f"{100 * change:+.0f} pp"))
        assert f"{tuned:.0%}".replace("%", " %") in row
        assert masked.count(f"{100 * change:+.0f} pp") == 2
        assert any("Baseline, cultural_smol" in line and label in line for line in lines)


def test_a_study_cut_in_half_names_what_is_missing(tmp_path: Path) -> None:
    study(tmp_path, questions=("rq1", "rq2"))
    for path in write_report([tmp_path], tmp_path, figures=False):
        text = path.read_text(encoding="utf-8")
        assert "Not measured yet" in text
        for name in ("cultural_smol", "cognitive_smol"):
            assert f"rq3 of {name} (how small the causal handle is)" in text.replace("&#39;", "'")
            assert f"rq4 of {name}" in text
        assert "no rq4 run was given" in text


def test_a_quick_study_says_so_on_every_page(tmp_path: Path) -> None:
    study(tmp_path, questions=("rq2",))
    html, md = write_report([tmp_path], tmp_path, figures=False)
    assert "do not quote" not in html.read_text(encoding="utf-8")
    names = {name: "" for name in ("cultural_smol", "cognitive_smol")}
    (tmp_path / "study.json").write_text(json.dumps({"pairs": names, "quick": True}))
    html, md = write_report([tmp_path], tmp_path, figures=False)
    text = html.read_text(encoding="utf-8")
    assert '<p class="everypage"' in text
    assert "position: fixed" in text
    for written in (text, md.read_text(encoding="utf-8")):
        assert "Do not quote these numbers" in written
        assert "This is a quick study" in written


def test_a_pair_of_which_nothing_has_run_is_named(tmp_path: Path) -> None:
    study(tmp_path, ("cultural_smol",), ("rq2",))
    planned = {"pairs": {"cultural_smol": "", "cognitive_smol": ""}, "quick": False}
    (tmp_path / "study.json").write_text(json.dumps(planned))
    _, md = write_report([tmp_path], tmp_path, figures=False)
    assert "rq2 of cognitive_smol" in md.read_text(encoding="utf-8")


@pytest.mark.parametrize("question", QUESTIONS)
def test_each_question_makes_a_report_alone(question: str, tmp_path: Path, capsys) -> None:
    study(tmp_path, ("cultural_smol",), (question,))
    assert main(["report", str(tmp_path / "cultural_smol" / question), "--no-figures"]) == 0
    written = capsys.readouterr().out.split()
    assert [Path(line).name for line in written] == ["report.html", "report.md"]
    text = Path(written[0]).read_text(encoding="utf-8")
    assert text.count("<svg ") >= 1
    assert "cultural_smol: what tuning changed" in text
    Page(text)


def test_a_control_within_the_interval_turns_the_takeaway(tmp_path: Path) -> None:
    results = run_of("rq2")
    results.provenance = provenance("cultural_smol", "cultural")
    results.write(tmp_path / "results.json")
    _, md = write_report([tmp_path], tmp_path, figures=False)
    assert "Takeaway: effect found" in md.read_text(encoding="utf-8")
    near = [
        replace(r, value=0.7) if (r.quantity, r.control) == ("r2_delta", "mean_shift") else r
        for r in results.records
    ]
    Results(near, results.provenance).write(tmp_path / "results.json")
    _, md = write_report([tmp_path], tmp_path, figures=False)
    text = md.read_text(encoding="utf-8")
    assert "Takeaway: no effect found" in text
    assert "covers mean shift" in text


def test_figures_of_the_runs_are_inside_the_page(tmp_path: Path) -> None:
    study(tmp_path, ("cultural_smol",), ("rq2",))
    html, _ = write_report([tmp_path], tmp_path)
    text = html.read_text(encoding="utf-8")
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(pictures) == 2
    assert all(base64.b64decode(data).startswith(b"\x89PNG") for data in pictures)


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(tmp_path / "a", ("cultural_smol",), ("rq2",))
    table = tmp_path / "a" / "cultural_smol" / "rq2" / "results.json"
    newer = tmp_path / "newer" / "results.json"
    newer.parent.mkdir()
    newer.write_text(json.dumps({**json.loads(table.read_text()), "schema": 99}))
    (tmp_path / "empty").mkdir()
    again = tmp_path / "again.json"
    again.write_bytes(table.read_bytes())
    for places, said in (
        ([newer], "has schema 99; this version reads 1"),
        ([tmp_path / "empty"], "holds no results.json"),
        ([tmp_path / "none.json"], "cannot read"),
        ([table, again], "both answer rq2 of cultural_smol"),
    ):
        assert main(["report", *map(str, places), "--no-figures"]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_a_value_that_is_missing_is_told_and_not_drawn(tmp_path: Path) -> None:
    lost = Record(
        "rq2", "r2_delta", None, 9, "fraction", site="resid_post.3", positions="last", reason="gap_too_small"
    )
    Results([lost], provenance("mine", "cultural")).write(tmp_path / "results.json")
    html, md = write_report([tmp_path], tmp_path, figures=False)
    assert "<svg" not in html.read_text(encoding="utf-8")
    assert "no claim" in md.read_text(encoding="utf-8")
    assert "gap too small" in md.read_text(encoding="utf-8")
