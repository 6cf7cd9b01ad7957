"""The report in a real browser without a screen: it renders, its script runs, the console stays silent."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mechdiff.reporting.report.page import write_report
from mechdiff.results import Results
from tests.reporting.report.make_study import study

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> str:
    """Return a browser that needs no screen."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no headless browser; apt-get install chromium-headless-shell")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report of a study of both pairs."""
    folder = study(tmp_path_factory.mktemp("study"))
    return write_report([folder], folder, figures=False)[0]


def look(browser: str, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page with a profile of its own."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    command += [
        f"--user-data-dir={page.parent / 'profile'}",
        "--enable-logging=stderr",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_it_renders_and_its_script_runs_without_a_complaint(browser: str, page: Path) -> None:
    done = look(browser, page, "--dump-dom")
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints
    assert done.stdout.count("<svg ") >= 14
    assert 'aria-valuetext="' in done.stdout, "the slider's script sets it"
    assert "Content-Security-Policy" in done.stdout


def test_a_complaint_would_be_seen(browser: str, page: Path) -> None:
    broken = page.with_name("broken.html")
    text = page.read_text(encoding="utf-8")
    broken.write_text(text.replace("</body>", "<script>alert(2)</script></body>"), encoding="utf-8")
    done = look(browser, broken, "--dump-dom")
    assert "Content Security Policy" in "".join(
        line for line in done.stderr.splitlines() if "CONSOLE" in line
    )


MARK = '"><img src=x onerror="document.title=1"><script>document.title=2</script>'


def marked(value: object) -> object:
    """Return what a run says of its pair with markup in every text."""
    if isinstance(value, dict):
        return {key: marked(v) if key != "domain" else v for key, v in value.items()}
    return f"{value}{MARK}" if isinstance(value, str) else value


def test_markup_of_a_prompt_or_model_stays_text(browser: str, tmp_path: Path) -> None:
    folder = study(tmp_path / "study", ("cultural_smol",))
    for table in folder.rglob("results.json"):
        results = Results.read(table)
        results.provenance = {key: marked(value) for key, value in results.provenance.items()}
        more = [
            replace(r, params={**r.params, "template": MARK}, flags=(MARK,), split=MARK)
            for r in list(results)[:3]
        ]
        results.records += more
        results.write(table)
    (page, _) = write_report([folder], folder, figures=False)
    assert MARK not in page.read_text(encoding="utf-8")
    done = look(browser, page, "--dump-dom")
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert done.stdout.count("<script") == 1
    assert "<img" not in done.stdout
    assert "&lt;script&gt;document.title=2&lt;/script&gt;" in done.stdout
    assert not re.search("<title>[12]</title>", done.stdout)


DRIVEN = """
<script>
const map = document.querySelector(".headmap");
for (const key of ["ArrowRight", "ArrowRight", "ArrowDown"])
  map.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const knob = document.querySelector(".slider input");
knob.value = "0";
knob.dispatchEvent(new Event("input"));
</script></body>"""


def test_the_map_answers_to_arrow_keys_and_the_slider_to_its_knob(browser: str, page: Path) -> None:
    driven = page.with_name("driven.html")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    driven.write_text(text.replace("</body>", DRIVEN), encoding="utf-8")
    shown = look(browser, driven, "--dump-dom").stdout
    said = re.search(r'<output aria-live="polite">([^<]*)</output>', shown)
    assert said is not None
    assert said[1].startswith("layer 1, head 1: "), "the first key lands on the first cell"
    assert re.search(r"n = \d+$", said[1])
    figure = shown[shown.index('class="slider"') - 40_000 : shown.index('class="slider"') + 600]
    groups = dict(re.findall(r'class="c5( off)?" data-group="([\d.]+)"', figure))
    assert 'aria-valuetext="0.1"' in figure
    assert groups.pop("", None) == "0.1", "one curve is shown"
    assert groups, "the others are not"


def test_it_prints_on_two_to_four_pages(browser: str, page: Path) -> None:
    target = page.with_suffix(".pdf")
    look(browser, page, f"--print-to-pdf={target}", "--no-pdf-header-footer")
    pages = target.read_bytes().count(b"/Type /Page\n") or target.read_bytes().count(b"/Type /Page")
    assert 2 <= pages <= 4


@pytest.mark.parametrize("scheme", [0, 1])  # dark, light
def test_figures_are_painted_in_both_schemes(browser: str, page: Path, scheme: int) -> None:
    import matplotlib.image as image

    target = page.with_name(f"scheme{scheme}.png")
    options = [f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1000,3000"]
    look(browser, page, f"--screenshot={target}", *options)
    pixels = image.imread(target)[..., :3]
    background = pixels[5, 5].mean()
    assert (background < 0.3) == (scheme == 0)
    blue = pixels[..., 2] - pixels[..., 0]
    assert (blue > 0.3).sum() > 500, "lines and bands of the charts"
