"""A report begins with the answer, pass or fail; its pictures have the SLO, what was measured, and the loads asked."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from scenarios.cli.main import status

QUICK = ["--replicates", "19", "--jobs", "1", "--set", "load.seconds=20"]
ASKED = ["--users", "1,2,5,6", "--slo", "e2e_p95=0.85", "--slo", "ttft_p95=9", "--set", "price.usd_per_hour=3.6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    assert status(["simulate", "standin", *QUICK, *ASKED, "--steps", "-o", str(out)]) == 0
    return out / "standin"


@pytest.fixture(scope="module")
def measured(folder: Path) -> Path:
    """The simulated run as if it had been measured."""
    made = folder.parent / "measured"
    shutil.copytree(folder / "run", made)
    head = (made / "run.json").read_text().replace('"kind": "simulated"', '"kind": "measured"')
    (made / "run.json").write_text(head.replace('"kind":"simulated"', '"kind":"measured"'))
    return made


def page(*sources: Path, out: Path) -> str:
    assert status(["report", *map(str, sources), "-o", str(out)]) == 0
    return out.read_text()


def words(text: str) -> str:
    plain = re.sub(r"<style>.*?</style>|<[^>]*>", " ", text, flags=re.DOTALL)
    return " ".join(plain.split())


def drawn(text: str) -> list[list[str]]:
    """What is written in each picture: matplotlib repeats its texts as comments."""
    pictures = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]*)"', text)
    return [re.findall(r"<!-- (.*?) -->", base64.b64decode(svg).decode()) for svg in pictures]


def test_a_page_begins_with_the_answer_and_pass_or_fail(folder: Path, tmp_path: Path):
    text = page(folder, out=tmp_path / "r.html")
    assert text.index('class="answer"') < text.index("<section")
    said = words(text[: text.index("<section")])
    assert (
        "Every SLO is kept at 2 users with a probability of at least 90%, broken at 5 users, crossing at about" in said
    )
    assert re.search(r"At 2 users half of the answers take up to [\d.]+ s .*requests/s", said)
    cost = r"1,000 requests cost \$[\d.]+.*, at \$3.60 an hour \(\$2,628 a month of 730 h, \$31,536 a year\)"
    assert re.search(cost, said)
    assert "in part E2E p95 ≤ 0.85 s: kept up to 2 users (probability 100%); 0% at 5" in said
    assert "pass TTFT p95 ≤ 9 s: at every load asked (probability 100% at 6 users)" in said


def test_simulate_says_the_same_three_sentences_first(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert status(["simulate", "standin", *QUICK, *ASKED]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.index("Every SLO is kept at 2 users") < out.index("E2E p50, s")
    assert out.index("a month of 730 h") < out.index("E2E p50, s")


def test_pictures_have_the_slo_the_measured_points_and_the_loads_asked(folder: Path, measured: Path, tmp_path: Path):
    alone = drawn(page(folder, out=tmp_path / "a.html"))
    (latency,) = [texts for texts in alone if "Response time, s" in texts and "users" in texts]
    assert "SLO: p95 ≤ 0.85" in latency and "p95 measured" not in latency
    assert latency[: latency.index("users")] == ["1", "2", "5", "6"]  # no 4, which nobody asked about
    both = drawn(page(folder, measured, out=tmp_path / "b.html"))
    (latency,) = [
        texts for texts in both if "Response time, s" in texts and "SLO: p95 ≤ 0.85" in texts and "users" in texts
    ]
    assert {"p95 measured", "p50 measured"} <= set(latency)
    (first,) = [texts for texts in both if "Time to first token, s" in texts]
    assert {"SLO: p95 ≤ 9", "p95 measured"} <= set(first)


def test_a_run_alone_has_an_answer_too_and_counts_have_whole_ticks(measured: Path, tmp_path: Path):
    text = page(measured, out=tmp_path / "r.html")
    said = words(text[: text.index("<section")])
    assert "Every SLO was kept up to 2 users, and not at 5 users." in said and "half of the answers took up to" in said
    assert "in part E2E p95 ≤ 0.85 s: kept up to 2 users, not at 5 users" in said
    (over_time,) = [texts for texts in drawn(text) if "Users" in texts]
    ticks = over_time[over_time.index("s since the run began") + 1 : over_time.index("Users")]
    assert ticks and all(tick.isdecimal() for tick in ticks)


def test_a_comparison_says_how_far_off_and_whether_that_passes(measured: Path, folder: Path, tmp_path: Path):
    for tolerance, verdict in ((["--tolerance", "e2e_mean=0.5"], "pass"), ([], "")):
        made = tmp_path / f"c{verdict}"
        assert status(["compare", str(measured), str(folder), *tolerance, "-o", str(made)]) in (0, 1)
        text = (made / "report.html").read_text()
        said = words(text[: text.index("<section")])
        assert re.search(r"The forecast is off by [\d.]+% in E2E mean", said)
        assert (f"{verdict} E2E mean within 50%" in said) == bool(verdict)


def test_three_warnings_are_open_and_the_rest_folds(tmp_path: Path):
    many = ["--replicates", "19", "--jobs", "1", "--set", "load.seconds=5", "--users", "1,40,200"]
    many += ["--set", "server.max_concurrent_requests=200"]  # a refused user asks again at once, which takes long
    assert status(["simulate", "llama2-70b-1500-100", *many, "-o", str(tmp_path)]) == 0
    text = page(tmp_path / "llama2-70b-1500-100", out=tmp_path / "r.html")
    box = text[text.index('<div class="warnings">') :]
    shown, folded = box[: box.index("</div>")].split("<details>")
    assert shown.count("<li>") == 3 and "extrapolated" in shown
    assert f"and {folded.count('<li>')} more" in folded and "output_attained" in folded


def test_nothing_but_tables_scrolls_at_400_pixels(folder: Path, measured: Path, tmp_path: Path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium to look at pages with")
    page(folder, measured, out=tmp_path / "r.html")
    (tmp_path / "w.html").write_text(
        "<iframe id=f src=r.html style='width:400px;height:800px'></iframe><p id=o></p><script>onload = () => {"
        "const page = document.getElementById('f').contentDocument.documentElement;"
        "document.getElementById('o').textContent = `${page.scrollWidth - page.clientWidth} beyond`; }</script>"
    )
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    options += " --disable-component-update --disable-sync --allow-file-access-from-files --dump-dom"
    command = [browser, *options.split(), f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "w.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ">0 beyond<" in done.stdout
