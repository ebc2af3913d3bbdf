"""The report of a run: its page parsed as a browser would, against the files it was made from."""

from __future__ import annotations

import base64
import json
import math
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from dylora_moe.cli import app
from dylora_moe.report.figures import FIGURES
from dylora_moe.report.page import write_report
from fakerun import RECIPE, write_run

SECTIONS = ("results", "routing", "curves", "parameters", "time", "environment", "recipe")


class Page(HTMLParser):
    """Text per section, cells per section, and every attribute and tag of a page."""

    def __init__(self, file: Path):
        super().__init__(convert_charrefs=True)
        self.text = dict.fromkeys(SECTIONS, "")
        self.rows: dict[str, list[list[str]]] = {name: [] for name in SECTIONS}
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.classes: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.sources: list[dict[str, str | None]] = []
        self.section = self.cell = None
        self.feed(file.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.classes += (attributes.get("class") or "").split()
        if tag == "section":
            self.section = attributes["id"]
        elif tag == "tr" and self.section:
            self.rows[self.section].append([])
        elif tag in ("td", "th") and self.section:
            self.rows[self.section][-1].append("")
            self.cell = tag
        elif tag == "source":
            self.sources.append(attributes)
        elif tag == "img":
            self.images.append(attributes)

    def handle_endtag(self, tag):
        if tag == "section":
            self.section = None
        elif tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        if self.section:
            self.text[self.section] += data
            if self.cell:
                self.rows[self.section][-1][-1] += " ".join(data.split()) + " "


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "skills"
    results = write_run(folder, stages=(("joint", 60),))
    return folder, results, Page(write_report(folder))


def only_results(folder: Path, **changes) -> Page:
    """The page of a run without history and routing, whose results are changed; their table is what is judged."""
    results = write_run(folder) | {"load": {}, "routing": {}} | changes
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "history.json").unlink()
    return Page(write_report(folder))


def test_every_section_is_there_and_reached_by_a_link(run):
    page = run[2]
    assert [value for tag, name, value in page.attributes if tag == "section" and name == "id"] == list(SECTIONS)
    assert [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")] == [
        f"#{s}" for s in SECTIONS
    ]


def test_the_page_needs_no_other_file_and_no_network(run):
    folder, _, page = run
    for tag, name, value in page.attributes:
        if name in ("src", "srcset", "href", "action", "data", "poster"):
            assert value.startswith(("data:image/png;base64,", "#")), f"<{tag} {name}={value[:60]}>"
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    text = (folder / "report.html").read_text()
    assert "url(" not in text
    assert "@import" not in text
    assert str(folder) not in text


def test_the_headline_table_has_the_numbers_of_results_json(run):
    _, results, page = run
    header, *rows, mean = page.rows["results"]
    assert [cell.strip() for cell in header] == ["domain", "base", "one LoRA", "mixture (dense)", "top-1", "top-2"]
    keys = ["base", "single", "mixture", "top1", "top2"]
    assert [row[0].strip() for row in rows] == list(results["base"])
    for row in rows:
        domain = row[0].strip()
        for key, cell in zip(keys, row[1:], strict=True):
            value, *change = cell.split()
            assert value == f"{results[key][domain]:.1%}"
            points = 100 * (results[key][domain] - results["base"][domain])
            assert change == ([] if key == "base" else [f"{points:+.1f}", "(better)"])
    assert mean[0].strip() == "mean"
    for key, cell in zip(keys, mean[1:], strict=True):
        assert cell.split()[0] == f"{sum(results[key].values()) / 4:.1%}"


def test_changes_are_signed_and_judged_by_the_metric(tmp_path):
    columns = {"base": {"a": 2.0, "b": 1.0, "c": 1.0}, "top1": {"a": 1.5, "b": 1.25, "c": 1.0}}
    no_others = {"mixture": {}, "top2": {}, "single": {}}
    page = only_results(tmp_path, metric="loss", **columns, **no_others)
    assert [row[2].strip() for row in page.rows["results"][1:4]] == [
        "1.500 −0.500 (better)",
        "1.250 +0.250 (worse)",
        "1.000 ±0.000 (same)",
    ]
    assert page.classes.count("better") == 2  # a, and the mean
    assert page.classes.count("worse") == 1
    page = only_results(tmp_path, **{k: {d: v / 4 for d, v in c.items()} for k, c in columns.items()}, **no_others)
    assert [row[2].strip() for row in page.rows["results"][1:3]] == ["37.5% −12.5 (worse)", "31.2% +6.2 (better)"]


def test_the_mean_is_over_the_domains_that_every_column_has(tmp_path):
    page = only_results(
        tmp_path, base={"a": 0.1, "b": 0.2, "c": 0.3}, mixture={"a": 0.9, "b": 0.8}, single={}, top1={}, top2={}
    )
    assert [cell.strip() for cell in page.rows["results"][3]] == ["c", "30.0%", "–"]
    assert [cell.split()[0] for cell in page.rows["results"][4]] == ["mean", "15.0%", "85.0%"]
    assert "mean of 2 domains" in page.text["results"]


def test_the_other_tables_have_their_numbers_too(run):
    _, results, page = run
    parameters = {row[0].strip(): row[1].strip() for row in page.rows["parameters"][1:]}
    assert parameters["sql"] == "1,220,608"
    assert parameters["added in all"] == f"{4 * 1220608 + 37120:,}"
    routing = {row[0].strip(): row for row in page.rows["routing"][1:5]}
    assert routing["date"][2].strip() == f"{results['routing']['date']['entropy']:.3f}"
    load = {row[0].strip(): row[1:] for row in page.rows["routing"][6:]}
    assert [cell.strip() for cell in load["sql"]] == [f"{share:.1%}" for share in results["load"]["sql"].values()]
    assert "5 min 13 s" in page.text["time"]
    assert ["torch", "2.13.0"] in [[cell.strip() for cell in row] for row in page.rows["environment"]]
    assert RECIPE.strip() in page.text["recipe"]


def test_figures_are_pngs_beside_the_page_and_in_it_in_two_themes(run):
    folder, _, page = run
    files = {file.stem: file.read_bytes() for file in (folder / "figures").iterdir()}
    assert set(files) == set(FIGURES)
    assert len(page.images) == len(FIGURES)
    dark = [source["srcset"] for source in page.sources if source["media"] == "(prefers-color-scheme: dark)"]
    for image, other in zip(page.images, dark, strict=True):
        content = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        assert content in files.values()
        light, night = (
            Image.open(BytesIO(png))
            for png in (content, base64.b64decode(other.removeprefix("data:image/png;base64,")))
        )
        assert light.size == night.size
        assert 800 < light.width < 2000
        assert 200 < light.height < 2500
        assert len(light.convert("RGB").getcolors(1 << 24)) > 10  # something is drawn
        assert light.convert("L").getpixel((1, 1)) > 240
        assert night.convert("L").getpixel((1, 1)) < 40
        assert len(image["alt"]) > 30


def test_on_a_narrow_screen_the_maps_of_coactivation_stand_below_each_other(run):
    _, _, page = run
    narrow = [source for source in page.sources if "max-width" in source["media"]]
    assert [source["media"] for source in narrow] == [
        "(max-width: 48rem) and (prefers-color-scheme: dark)",
        "(max-width: 48rem)",
    ]
    drawn = [Image.open(BytesIO(base64.b64decode(source["srcset"].split(",")[1]))) for source in narrow]
    assert drawn[0].size == drawn[1].size
    assert drawn[0].width == 5.8 * 160 < drawn[0].height  # as wide as the figures that fill a phone
    assert "scrolls" not in page.classes  # nothing is cut


def test_text_from_the_files_is_escaped(tmp_path):
    hostile = '<img src=x onerror="alert(1)">$\\frac{'
    write_run(tmp_path, experts=[hostile, "sql"], stages=(("<script>", 4), ("b&b", 4)))
    (tmp_path / "recipe.yaml").write_text("</code></pre><script>alert(2)</script>{{ 7 * 7 }}")
    environment = {"versions": {"<b>torch": '"><script>'}, "platform": "<i>"}
    (tmp_path / "environment.json").write_text(json.dumps(environment))
    page = Page(write_report(tmp_path))
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert not [value for _, name, value in page.attributes if name.startswith("on")]
    assert all(image["src"].startswith("data:") for image in page.images)
    assert hostile in page.text["results"]
    assert "</code></pre><script>alert(2)</script>{{ 7 * 7 }}" in page.text["recipe"]
    assert any(hostile in image["alt"] for image in page.images)


def test_rows_and_versions_of_another_shape_are_left_out(tmp_path):
    (tmp_path / "results.json").write_text('{"base": {"date": null}, "metric": "loss"}')
    (tmp_path / "history.json").write_text('[{"step": null, "loss": 1}, {"step": 1, "loss": 2}, {"step": "2"}, 3]')
    (tmp_path / "environment.json").write_text('{"versions": 3}')
    assert "no mapping of versions" in Page(write_report(tmp_path)).text["environment"]


def test_each_missing_part_is_a_sentence(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    page = Page(write_report(tmp_path))
    for section, words in {
        "results": "Nothing was measured",
        "routing": "was not measured",
        "curves": "no history.json",
        "parameters": "no counts",
        "time": "no times",
        "environment": "no environment.json",
        "recipe": "no recipe.yaml",
    }.items():
        assert words in page.text[section]
    assert page.images == []


def test_damaged_optional_files_are_sentences_too(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "history.json").write_text('[{"loss": ')
    (tmp_path / "environment.json").write_text("[1]")
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe")
    page = Page(write_report(tmp_path))
    assert "history.json cannot be read" in page.text["curves"]
    assert "environment.json holds no" in page.text["environment"]
    assert "recipe.yaml cannot be read" in page.text["recipe"]


def test_without_test_data_the_curves_remain(tmp_path):
    nothing = {key: {} for key in ("base", "mixture", "top1", "top2", "load")}
    results = write_run(tmp_path, stages=(("joint", 2),)) | nothing
    del results["routing"], results["single"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = Page(write_report(tmp_path))
    assert "Nothing was measured" in page.text["results"]
    assert "was not measured" in page.text["routing"]
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == {"loss", "load", "router", "schedule"}


def test_not_a_number_is_a_dash(tmp_path):
    page = only_results(tmp_path, base={"a": math.nan}, mixture={"a": 0.5}, top1={}, top2={}, single={})
    assert [cell.strip() for cell in page.rows["results"][1]] == ["a", "–", "50.0%"]


def test_a_checkpoint_that_answers_differently_is_an_alarm(tmp_path):
    assert "alarm" in only_results(tmp_path, reloaded_identical=False).classes
    assert "alarm" not in only_results(tmp_path, reloaded_identical=True).classes


@pytest.mark.slow
def test_a_second_report_replaces_the_first_and_its_figures(tmp_path):
    write_run(tmp_path, experts=["one"], stages=(("joint", 4),))
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first
    (tmp_path / "figures" / "mine.png").write_bytes(b"kept")
    (tmp_path / "history.json").unlink()
    assert write_report(tmp_path).read_bytes() != first
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {"results.png", "load_by_domain.png", "mine.png"}
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("{}")
    old = write_report(tmp_path).read_bytes()
    (tmp_path / "recipe.yaml").write_text("base: new")

    def fail(self, content):
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == old
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_command_writes_and_prints_the_path(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    result = CliRunner().invoke(app, ["report", str(tmp_path)], catch_exceptions=False)
    assert result.output.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").is_file()
    assert "Example" in CliRunner().invoke(app, ["report", "--help"]).output


def test_a_missing_template_engine_is_named(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pip install 'dylora-moe\[plot\]'"):
        write_report(tmp_path)
