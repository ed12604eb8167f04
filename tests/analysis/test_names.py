"""Names that mean something to matplotlib, LaTeX, HTML, Markdown, rich or a terminal are shown."""

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from analysis.cli import app
from analysis.records.campaign import load_campaign
from analysis.records.names import printable, shown
from analysis.records.provenance import joined, split
from analysis.tables.render import markdown_text
from support.launch import ROOT
from support.records import write_record

# A name -> how it is shown.
NAMES = {
    "my data": "my data",
    "cost in $": "cost in $",
    "$x$ and $y": "$x$ and $y",
    "$\\frac{$": "$\\frac{$",
    "50 % & more_of #1 {a} ~b ^c \\d": "50 % & more_of #1 {a} ~b ^c \\d",
    "<script>alert(1)<script>": "<script>alert(1)<script>",
    "[bold]loud[/bold]": "[bold]loud[/bold]",
    "[/bold]": "[/bold]",
    ":smile:": ":smile:",
    "a|b `c`": "a|b `c`",
    "two\nlines\tand\x1b[31m": "two\\nlines\\tand\\x1b[31m",
    "half\ud83d": "half\\ud83d",
    "\u4e2d\u6587\u6570\u636e": "\u4e2d\u6587\u6570\u636e",
    "'quoted' \"twice\"": "'quoted' \"twice\"",
    "_hidden": "_hidden",
    "100%": "100%",
}


def named_records(folder: Path, name: str) -> None:
    """Three runs whose data set, run ids, labels and a setting hold the name."""
    for method, lr in (("lora", 0.001), ("lora", 0.01), ("fedara", 0.001)):
        run = write_record(folder, method, 0, lr=lr, dataset={"name": f"file:/data/{name}"})
        facts = json.loads((run / "run.json").read_text())
        facts["run_id"] = f"{name}-{run.name}"
        facts["config"]["adapter"]["targets"] = f"{name} {lr}"
        (run / "run.json").write_text(json.dumps(facts))
        client = {"client_id": 0, "label_counts": {name: 3, f"{name} too": 4}}
        (run / "partition.json").write_text(json.dumps([client]))


def report(folder: Path, out: Path) -> Result:
    return CliRunner().invoke(app, [str(folder), "--out", str(out)])


class Page(HTMLParser):
    """The tags of report.html, the ids in it, and its text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for key, value in attrs if key == "id" and value is not None]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a report over runs with all the names, and what it printed."""
    folder = tmp_path_factory.mktemp("names")
    for number, name in enumerate(NAMES):
        named_records(folder / "records" / str(number), name)
    result = report(folder / "records", folder / "out")
    assert result.exit_code == 0, result.exception
    return folder / "out", result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES.values())
def test_a_name_is_shown_as_it_is(name: str, reported: tuple[Path, str]) -> None:
    out, printed = reported
    assert name in printed
    assert f"{name}-synthetic-lora" in Page(out / "report.html").text
    assert markdown_text(name) in (out / "summary.md").read_text()


@pytest.mark.slow
def test_no_name_breaks_the_page_or_a_table(reported: tuple[Path, str]) -> None:
    out, _ = reported
    page = Page(out / "report.html")
    assert page.tags.count("script") == 1
    run_ids = {run_id for run_id in page.ids if run_id.startswith("run-")}
    assert len(run_ids) == 3 * len(NAMES)
    rows = (out / "accuracy.md").read_text().split("\n\n")[1].splitlines()
    assert len(rows) == 2 + 3 * len(NAMES)
    assert {row.replace(r"\|", "").count("|") for row in rows} == {12}


@pytest.mark.slow
def test_letters_of_latex_are_escaped(reported: tuple[Path, str]) -> None:
    text = (reported[0] / "accuracy.tex").read_text()
    escaped = (
        r"50 \% \& more\_of \#1 \{a\} \textasciitilde{}b \textasciicircum{}c \textbackslash{}d"
    )
    assert escaped in text
    assert r"\$x\$ and \$y" in text


def test_run_ids_with_blanks_come_back() -> None:
    ids = ["plain-id.0", "my data", "it's", "a\\nb", "\u4e2d", '"']
    assert split(joined(ids)) == sorted(ids)
    assert joined(["b-seed0-0.1", "a"]) == "a b-seed0-0.1"


def test_long_names_are_cut_and_stay_two(tmp_path: Path) -> None:
    one, other = "x" * 5000 + "1", "x" * 5000 + "2"
    assert len(shown(one)) == 300
    assert shown(one) != shown(other)
    assert shown("x" * 300) == "x" * 300
    for name in (one, other):
        write_record(tmp_path / name[-1], "lora", 0, dataset={"name": name})
    for place in (tmp_path / "2").glob("*/run.json"):
        place.write_text(place.read_text().replace("synthetic-lora", "synthetic-two"))
    campaign = load_campaign(tmp_path)
    assert campaign.runs["dataset"].str.len().tolist() == [60, 60]
    assert campaign.runs["dataset"].nunique() == 2
    assert report(tmp_path, tmp_path / "out").exit_code == 0


def test_names_that_differ_by_case_are_two(tmp_path: Path) -> None:
    for name in ("Data", "data"):
        named_records(tmp_path / "records" / name, name)
    assert report(tmp_path / "records", tmp_path / "out").exit_code == 0
    rows = (tmp_path / "out" / "accuracy.csv").read_text().splitlines()
    assert sum(row.startswith("Data,") for row in rows) == 3
    assert sum(row.startswith("data,") for row in rows) == 3


@pytest.mark.slow
def test_letters_without_a_glyph_are_one_line(reported: tuple[Path, str]) -> None:
    letters = "\u4e2d\u636e\u6570\u6587"
    assert f"warning: the figures' font lacks these letters: {letters}\n" in reported[1]


def test_printable_leaves_what_can_be_printed() -> None:
    assert printable("caf\u00e9 \u4e2d\u3000\U0001f600") == "caf\u00e9 \u4e2d\u3000\U0001f600"
    assert printable("a\u2028b\x85\r\x00\udcff") == "a\\u2028b\\x85\\r\\x00\\udcff"


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        {"MPLBACKEND": "rubbish"},
        {"MPLBACKEND": "TkAgg", "DISPLAY": ""},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
    ],
)
def test_the_surroundings_do_not_stop_a_report(settings: dict[str, str], tmp_path: Path) -> None:
    named_records(tmp_path / "records", "\u6570\u636e")
    words = [sys.executable, "-m", "analysis", tmp_path / "records", "--out", tmp_path / "out"]
    env = {**os.environ, **settings}
    result = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "report.html").exists()


def test_a_damaged_matplotlibrc_is_named(tmp_path: Path) -> None:
    write_record(tmp_path / "records", "lora", 0)
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe\x00")
    env = {**os.environ, "MATPLOTLIBRC": str(tmp_path)}
    words = [sys.executable, "-m", "analysis", tmp_path / "records"]
    result = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, check=False, text=True)
    assert result.returncode == 2
    assert "matplotlib does not start" in result.stderr.splitlines()[-1]
