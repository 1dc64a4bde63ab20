"""Every form of a report: table, JSON, CSV, pandas, pictures, page; and how they are written."""

import csv
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from random_weights import gaussian

from tbfast.analyzer import analyze
from tbfast.html import render
from tbfast.report import LayerSpectrum, Report

FIELDS = [
    "name",
    "shape",
    "n_eigs",
    "alpha",
    "alpha_error",
    "xmin",
    "n_tail",
    "ks",
    "spectral_norm",
    "frobenius_norm",
    "stable_rank",
    "log_spectral_norm",
    "alpha_weighted",
    "method",
    "reason",
]


@pytest.fixture
def report():
    broken = gaussian(60, 60)
    broken[0, 0] = math.inf
    return analyze(
        {
            "embed_tokens.weight": gaussian(80, 60, seed=1),
            "layers.0.<b>&\x1b[31m,\n": gaussian(60, 60, seed=2),
            "layers.1.w": gaussian(60, 120, seed=3),
            "broken": broken,
            "tiny": gaussian(3, 3),
        }
    )


def test_the_fields_of_a_record_begin_with_those_that_are_promised():
    assert list(LayerSpectrum.__dataclass_fields__)[: len(FIELDS)] == FIELDS


def test_a_report_is_a_sequence(report):
    assert len(report) == 5
    assert report[-1].name == "tiny"
    assert [x.name for x in report[2:4]] == ["layers.1.w", "broken"]
    assert isinstance(report[2:4], Report)
    assert report[1] in report
    assert repr(report) == "Report(5 layers of 'mapping', fit='median')"


def test_the_summary_is_that_of_the_finite_alphas(report):
    alphas = [x.alpha for x in report][:3]
    weighted = [x.alpha * x.log_spectral_norm for x in report][:3]
    assert report.summary() == {
        "layers": 5,
        "fitted": 3,
        "mean_alpha": pytest.approx(np.mean(alphas)),
        "median_alpha": pytest.approx(np.median(alphas)),
        "min_alpha": min(alphas),
        "max_alpha": max(alphas),
        "mean_alpha_weighted": pytest.approx(np.mean(weighted)),
    }


def test_json_is_strict_and_says_null_where_there_is_no_number(report, tmp_path):
    text = report.to_json(tmp_path / "r.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert content == json.loads(text)
    assert content["fit"] == "median"
    assert [layer["name"] for layer in content["layers"]] == [x.name for x in report]
    assert content["layers"][0]["alpha"] == report[0].alpha
    assert content["layers"][0]["shape"] == [80, 60]
    assert content["layers"][3]["alpha"] is None
    assert content["layers"][4]["reason"] == "too few eigenvalues"
    assert math.isnan(report.to_dict()["layers"][3]["alpha"])


def test_csv_has_a_row_per_layer_that_reads_back(report, tmp_path):
    report.to_csv(tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0])[: len(FIELDS)] == FIELDS
    assert [row["name"] for row in rows] == [x.name for x in report]
    assert float(rows[0]["alpha"]) == report[0].alpha
    assert rows[0]["shape"] == "80x60"
    assert rows[3]["alpha"] == rows[0]["reason"] == ""


def test_pandas_gets_a_row_per_layer(report, monkeypatch):
    frame = report.to_pandas()
    assert list(frame.columns)[: len(FIELDS)] == FIELDS
    assert list(frame["name"]) == [x.name for x in report]
    assert frame["alpha"].isna().tolist() == [False, False, False, True, True]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(RuntimeError, match="pip install pandas"):
        report.to_pandas()


def test_the_text_is_an_aligned_table_without_control_characters(report):
    lines = str(report).split("\n")
    assert len(lines) == 2 + 5 + 2
    assert lines[0].startswith("layer ")
    assert set(lines[1]) == {"-"}
    end = lines[0].index("alpha") + len("alpha")
    assert lines[2][:end].endswith(f"{report[0].alpha:.3f}")
    assert lines[4][:end].endswith(f"{report[2].alpha:.3f}")
    assert lines[2].endswith("embedding")
    assert r"\x1b[31m,\n" in lines[3]
    assert "\x1b" not in str(report)
    assert "not finite" in lines[5]
    assert lines[-1].startswith("5 layers, 3 with an alpha (median fit): mean ")


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")]
)
def test_a_picture_is_drawn_in_the_format_of_its_suffix(report, tmp_path, suffix, magic):
    report.plot(tmp_path / f"r{suffix}")
    assert (tmp_path / f"r{suffix}").read_bytes().startswith(magic)


@pytest.mark.parametrize("blocks", [1, 30])
def test_a_picture_names_the_types_and_the_layers_or_their_blocks(tmp_path, blocks):
    kinds = ("attention.query", "attention.key", "mlp")
    weights = {
        f"h.{i}.{kind}.weight": gaussian(60, 60, seed=i) for i in range(blocks) for kind in kinds
    }
    weights |= {"embed_tokens.weight": gaussian(60, 60), "h.0.more": gaussian(60, 60)}
    analyze(weights).plot(tmp_path / "r.svg")
    # matplotlib keeps each text of an SVG as a comment beside its outlines
    texts = set(re.findall(r"<!-- (.*?) -->", (tmp_path / "r.svg").read_text()))
    if blocks == 1:
        assert {"h.0.attention.query", "h.0.mlp", "embed_tokens"} <= texts
    else:
        assert {"query", "key", "mlp", "embed_tokens", "h.0", "h.2", "h.28"} <= texts


def test_a_report_without_an_alpha_can_be_shown_in_every_form(tmp_path):
    report = analyze({"tiny": gaussian(3, 3)})
    assert "1 layers, 0 with an alpha" in str(report)
    report.plot(tmp_path / "r.png")
    assert "No layer has an alpha" in render(report)
    assert json.loads(report.to_json())["summary"]["mean_alpha"] is None


def test_a_picture_of_another_kind_or_without_matplotlib_is_refused(report, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"\.png"):
        report.plot(tmp_path / "r.gif")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match="pip install matplotlib"):
        report.plot(tmp_path / "r.png")
    assert list(tmp_path.iterdir()) == []


def test_the_html_page_escapes_names_and_asks_nothing_of_the_network(report):
    page = render(report)
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;" in page
    assert "\x1b" not in page
    for word in ("<script", "src=", "@import", "url("):
        assert word not in page
    assert page.count("http") == page.count("http-equiv") + page.count("http://www.w3.org/2000/svg")
    assert page.count("<circle") == 3
    assert page.index("embed_tokens") < page.index("layers.1.w") < page.index("broken")


# --- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["to_json", "to_csv", "plot"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(report, tmp_path, monkeypatch, form):
    path = tmp_path / "r.png"
    path.write_text("old")

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        getattr(report, form)(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.png"]


@pytest.mark.skipif(os.name == "nt", reason="no such device on Windows")
def test_a_link_is_written_through_and_a_device_is_not_replaced(report, tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    report.to_json(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["fit"] == "median"
    report.to_json("/dev/null")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize(("place", "words"), [("absent/r.csv", "no folder"), (".", "is a folder")])
def test_an_impossible_output_is_refused_with_the_remedy(report, tmp_path, place, words):
    with pytest.raises(OSError, match=words):
        report.to_csv(tmp_path / place)
