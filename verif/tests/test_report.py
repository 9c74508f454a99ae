"""The report page: complete, self-contained, readable figures."""

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lnpu.report import PHASES, render_report, write_report


def fake_report(layers: int = 12, steps: int = 4) -> dict:
    """A report as of a small residual network."""
    rng = np.random.default_rng(5)
    ops = []
    names = ["conv1", *(f"stage{1 + i // 4}.block{i // 2 % 2}.conv{1 + i % 2}" for i in range(layers - 2)), "fc"]
    for phase in ("ff", "bp", "wg", "update"):
        for name in names if phase in ("ff", "update") else reversed(names):
            if (name, phase) == ("conv1", "bp"):
                continue
            op = {"layer": name, "phase": phase, "mismatches": 0, "elements": int(rng.integers(1000, 50_000))}
            if phase == "update":
                op |= {"cycles": int(rng.integers(2000, 9000))}
            else:
                dense = int(rng.integers(1, 9)) * 100_000 if name != "fc" else 10_000
                mac8, mac16 = (int(dense * share) for share in rng.uniform(0.1, 0.35, 2))
                op |= {
                    "macs_dense": dense,
                    "macs_issued": mac8 + mac16,
                    "mac8": mac8,
                    "mac16": mac16,
                    "skipped_zero": int(0.9 * (dense - mac8 - mac16) / 8),
                    "skipped_padding": int(0.1 * (dense - mac8 - mac16) / 8),
                    "cycles": int((mac8 / 2 + mac16) / 16 / rng.uniform(0.5, 0.95)),
                    "utilization": float(rng.uniform(0.4, 0.95)),
                }
            ops.append(op)
    for name in names[1:]:
        ops.append({"layer": f"{name}.norm", "phase": "vector", "elements": 4096, "cycles": 9000})
    kinds = ("program", "activation", "error", "weight", "gradient", "optimizer", "norm", "other")
    ema = {}
    for kind in kinds:
        plain = rng.integers(1, 60, 2) * 1_000_000
        factor = 0.6 if kind in ("activation", "error", "weight") else 1.0
        ema[kind] = {
            "read": int(plain[0] * factor),
            "write": int(plain[1] * factor),
            "plain_read": int(plain[0]),
            "plain_write": int(plain[1]),
        }
    return {
        "network": "resnet-18",
        "config": "tiny",
        "mismatches": 0,
        "elements": sum(op["elements"] for op in ops),
        "cycles": sum(op["cycles"] for op in ops),
        "ema_bits": {
            "fgmp": sum(entry["read"] + entry["write"] for entry in ema.values()),
            "fp16": sum(entry["plain_read"] + entry["plain_write"] for entry in ema.values()),
        },
        "ops": ops,
        "ema_by_kind": ema,
        "precision": {
            "activation": {"zero": 52_000, "underflow": 3_000, "fp8": 38_000, "fp16": 9_000},
            "error": {"zero": 1_000, "underflow": 31_000, "fp8": 60_000, "fp16": 8_000},
            "weight": {"zero": 20, "underflow": 100, "fp8": 55_000, "fp16": 45_000},
            "gradient": {"zero": 0, "underflow": 0, "fp8": 0, "fp16": 90_000},
        },
        "steps": [{"loss": 2.31 * 0.85**i, "cycles": 100_000 + i, "accuracy": 0.1 + 0.05 * i} for i in range(steps)],
        "settings": {"width": 8, "image": 8, "batch": 4, "seed": 0, "data": "digits", "policy": [0.1, 2]},
    }


class Page(HTMLParser):
    """Collects images, table rows, text; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict] = []
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("img", "meta"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self._open and self._open[-1] in ("h1", "h2"):
            self.headings.append(data)


def test_structure(tmp_path):
    report = fake_report()
    path = write_report(tmp_path / "out", report)
    assert path == tmp_path / "out" / "index.html"
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    page = Page(path.read_text())
    assert page.headings == [
        "Training step of resnet-18 on LNPU, configuration tiny", "Cycles", "Utilisation of the array",
        "Zero skipping", "Precision", "External memory access", "Steps", "Operations", "Settings",
    ]  # fmt: skip
    assert len(page.images) == 6
    for image in page.images:
        kind, data = image["src"].split(",", 1)
        assert kind == "data:image/svg+xml;base64" and image["alt"]
        assert base64.b64decode(data).startswith(b"<?xml")
    for op in report["ops"]:
        assert any(row[:2] == [op["layer"], op["phase"]] for row in page.rows)
    total = next(row for row in page.rows if row[0] == "total" and len(row) == 12)
    assert total[2:5] == ["0", f"{report['elements']:,}", f"{report['cycles']:,}"]
    assert "bit-exact" in path.read_text()
    change = 100 * (report["ema_bits"]["fgmp"] / report["ema_bits"]["fp16"] - 1)
    assert f"{change:+.1f}%" in path.read_text()


def test_self_contained():
    page = render_report(fake_report())
    outside = re.sub(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|//|<script|<link|@import|url\(", outside)
    for image in Page(page).images:
        figure = base64.b64decode(image["src"].split(",", 1)[1]).decode()
        assert not re.findall(r'(?:href|src)="(?!#)', figure)


def test_reproducible():
    assert render_report(fake_report()) == render_report(fake_report())


def test_mismatches_stand_out():
    report = fake_report()
    report["mismatches"] = report["ops"][3]["mismatches"] = 7
    page = render_report(report)
    assert "7 mismatches" in page and "bit-exact" not in page
    assert page.count('<tr class="bad">') == 1


def test_minimal():
    report = {key: value for key, value in fake_report().items() if key not in (
        "ema_by_kind", "precision", "steps", "settings")}  # fmt: skip
    assert len(Page(render_report(report)).images) == 3
    report |= {"ops": [], "ema_bits": {"fgmp": 0, "fp16": 0}, "cycles": 0, "elements": 0}
    page = render_report(report)
    assert Page(page).images == []
    assert "bit-exact" not in page  # nothing was compared


def test_numpy_values_and_escaping(tmp_path):
    report = fake_report()
    report["network"] = "<b>&"
    report["cycles"] = np.int64(5)
    report["settings"] = {"array": np.arange(3), "path": tmp_path, "none": None, "flag": True}
    page = write_report(tmp_path, report).read_text()
    assert "<b>&" not in page and "&lt;b&gt;&amp;" in page
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["cycles"] == 5 and stored["settings"]["array"] == [0, 1, 2]


@pytest.mark.parametrize("change, message", [
    ({"cycles": None}, "lacks cycles"),
    ({"ema_bits": {"fgmp": 1}}, "ema_bits must have fgmp and fp16, but lacks fp16"),
    ({"ops": [{"layer": "a", "phase": "forward"}]}, f"phase of {', '.join(PHASES)}"),
])  # fmt: skip
def test_bad_reports(tmp_path, change, message):
    report = {key: value for key, value in {**fake_report(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path, report)
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":  # write an example page to a folder
    write_report(Path(sys.argv[1]), fake_report(layers=20))
