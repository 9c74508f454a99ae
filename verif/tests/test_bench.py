"""The speed benchmark: cycles of the small set against the baseline, metrics, resumption, what its users get wrong."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import golden
from lnpu.bench import operation, runs
from lnpu.bench.baseline import BASELINE, compare, read_baseline, write_baseline
from lnpu.bench.cases import MASKS, PHASES, PROGRAMS, SETS, ZEROS, Case, Shape, cases_of, select
from lnpu.bench.metrics import measure
from lnpu.bench.operation import Result
from lnpu.bench.plots import has_layers, has_sparsities
from lnpu.bench.report import render_report
from lnpu.bench.rewrite import RewritingDevice, in_lockstep, resident
from lnpu.bench.runs import COUNTERS, Results, read_results, source_hash
from lnpu.bench.targets import balance, lines, memory_bound, speed_ups
from lnpu.cli import main
from lnpu.config import PAPER, TINY
from lnpu.ctrl.commands import Command, Opcode, Target
from lnpu.sim import build as build_module

LAYER = Shape(batch=2, channels=16, image=8, outputs=32, kernel=3, stride=2, padding=1)


def counters(**changes: int) -> dict[str, int]:
    return dict.fromkeys(COUNTERS, 0) | {"cycles": 100, "core_busy": 100} | changes


def fake_results(config=TINY, set_name="small", cases=None, wrong=0) -> Results:
    """Results as of a chip that reaches 80% of its peak."""
    found = {}
    for case in cases or cases_of(set_name, config):
        cycles = max(1, int(case.peak_cycles(config) / 0.8))
        products = int(case.shape.macs * (1 - case.sparsity))
        numbers = counters(
            cycles=cycles, core_busy=int(0.9 * cycles * config.cores), read_beats=cycles // 3, write_beats=cycles // 9
        )
        numbers["mac16" if case.streamed == "fp16" else "mac8"] = products
        found[case.name] = Result(case=case, counters=numbers, elements=100, mismatches=wrong, seconds=0.1)
    return Results(config=config, set=set_name, sources="0" * 16, found=found)


@pytest.fixture
def few(tmp_path):
    """Arguments of a run of two small cases."""
    paths = ["--json", str(tmp_path / "results.json"), "--report", str(tmp_path / "report.html")]
    return ["bench", "--set", "small", "--only", "^tiny/linear", *paths]


class Page(HTMLParser):
    """Headings and images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images, self.tags = 0, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.images += tag == "img"
        if tag not in ("meta", "img"):
            self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.tags.pop() == tag


def test_small_set(tmp_path, capsys):
    """Every case is bit-exact, and none takes 2% more cycles than in the baseline, which has them all."""
    paths = ["--json", str(tmp_path / "results.json"), "--report", str(tmp_path / "page" / "report.html")]
    status = main(["bench", "--set", "small", *paths])
    out = capsys.readouterr().out
    results = read_results(tmp_path / "results.json")
    comparison = compare(read_baseline(BASELINE, results), results)
    assert [str(change) for change in comparison.regressions] == []
    assert comparison.missing == [] and len(comparison.changes) == len(cases_of("small", TINY))
    assert status == 0 and "0 with mismatches" in out
    assert len(read_baseline(BASELINE, results)) == len(results.found)
    for result in results.found.values():
        metrics, case = results.metrics(result), result.case
        assert result.mismatches == 0 and result.elements > 0
        assert 0 < metrics.ideal <= metrics.bound <= metrics.cycles
        assert metrics.utilisation <= metrics.cores <= 1 and metrics.utilisation <= metrics.of_roofline
        assert 0 < metrics.bus_read < 1 and (0 < metrics.bus_write < 1 or case.program == "resident")
        assert metrics.products <= metrics.macs
        assert (result.counters["mac8"] == 0) == (case.streamed == "fp16")
        assert (result.counters["mac16"] == 0) == (case.streamed == "fp8")
        if case.shape.linear:  # neither zeros nor padding
            assert metrics.products == metrics.macs
        assert re.search(rf"^{re.escape(case.name)} .* {metrics.cycles:,} ", out, re.MULTILINE)
    assert len(memory_bound(results)) == 1 and len(balance(results)) == len(ZEROS) - 1
    gemm = "gemm/linear-24-24/ff/fp16/b24"
    whole, products = (results.found[name].counters for name in (gemm, f"{gemm}/resident"))
    assert whole["mac16"] == products["mac16"] and products["cycles"] < whole["cycles"]
    for name in ("load_busy", "load_dense_busy", "store_busy", "drain_busy"):  # all fits the buffers
        assert products[name] == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert Page(page).images == 3
    for text in (page, (tmp_path / "results.json").read_text()):
        assert str(tmp_path) not in text and str(Path(__file__).parent.parent.parent) not in text


@pytest.mark.parametrize("config", [TINY, PAPER])
@pytest.mark.parametrize("name", SETS)
def test_sets(name, config):
    cases = cases_of(name, config)
    assert len({case.name for case in cases}) == len(cases)
    costs = [case.peak_cycles(config) for case in cases]
    assert costs == sorted(costs)
    layers = [case for case in cases if case.group == "layer"]
    assert {case.phase for case in layers} == set(PHASES)
    assert {case.streamed for case in layers} == {"fp16", "fp8"}
    assert {case.sparsity for case in layers} == {0.0, 0.5, 0.75, 0.9}
    assert {case.shape.stride for case in layers} == {1, 2} and {case.shape.kernel for case in layers} == {1, 3}
    assert {case.group for case in cases} == {"layer", "gemm", "memory", "balance", "mask", "tiny"}
    assert {case.zeros for case in cases} == set(ZEROS) and {case.program for case in cases} == set(PROGRAMS)
    uneven = [case for case in cases if case.zeros != "random"]
    for case in uneven:  # what they are compared with is there
        assert {replace(case, zeros="random"), replace(case, program="lockstep")} <= set(cases)
    changed = cases_of(name, config, batch=3)
    assert {case.shape.batch for case in changed if case.group == "layer"} == {3}
    assert [case for case in changed if case.group != "layer"] == [case for case in cases if case.group != "layer"]


def test_full_set_on_paper():
    """ResNet-18's layers are all there, each at most 200,000 cycles at peak."""
    cases = cases_of("full", PAPER)
    dense = [case for case in cases if case.group == "layer" and not case.sparsity]
    shapes = {case.shape for case in dense}
    assert len(shapes) == 12 and len(dense) == (12 * 3 - 1) * 2  # no BP of the stem
    stem = Shape(batch=32, channels=3, image=32, outputs=64, kernel=3, padding=1)
    down = Shape(batch=32, channels=256, image=8, outputs=512, kernel=1, stride=2)
    last = Shape(batch=4, channels=512, image=4, outputs=512, kernel=3, padding=1)
    assert {stem, down, last, Shape(batch=32, channels=512, outputs=10)} <= shapes
    assert all(case.peak_cycles(PAPER) <= 200_000 for case in cases)
    on_tiny = {case.shape for case in cases_of("full", TINY)}
    assert replace(last, batch=1) in on_tiny and last not in on_tiny


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("shape", [LAYER, Shape(batch=3, channels=5, outputs=7)], ids=["conv", "linear"])
def test_operation(phase, shape):
    """Operands have the sparsity that was asked for, and the result the right shape."""
    case = Case(group="layer", phase=phase, shape=shape, streamed="fp8", resident="fp16", sparsity=0.5)
    function, (streamed, resident), options = operation.operation(case)
    assert 0.2 < np.mean(streamed == 0) < 0.8 and np.all(resident != 0)
    assert [value for name, value in options.items() if name.endswith("_format")] == ["fp8", "fp16"]
    result = getattr(golden, function)(streamed, resident, **options)
    expected = {"ff": shape.dy, "bp": shape.x, "wg": shape.w}[phase]
    assert result.shape == (expected[:2] if shape.linear else expected)
    again = operation.operation(case)[1]
    assert all(np.array_equal(a, b) for a, b in zip(again, (streamed, resident), strict=True))
    other = operation.operation(replace(case, seed=1))[1]
    assert not np.array_equal(other[0], streamed)
    dense = operation.operation(replace(case, sparsity=0.0))[1][0]
    assert np.all(golden.fgmp(dense, "fp8").codes == golden.CODE_FP8)


@pytest.mark.parametrize("zeros", ZEROS)
def test_zeros(zeros):
    """Half of the elements are zeros, in whole images or pairs of lines but for the random ones."""
    shape = Shape(batch=4, channels=3, image=6, outputs=4, kernel=3, padding=1)
    for phase in PHASES:
        case = Case(group="balance", phase=phase, shape=shape, sparsity=0.5, zeros=zeros)
        streamed, resident_ = operation.operation(case)[1]
        assert np.all(resident_ != 0)
        pairs = (streamed != 0).reshape(4, -1, 3, 2, 6).transpose(0, 2, 1, 3, 4).reshape(12, -1)
        if zeros == "random":
            assert np.all(pairs.any(1) & ~pairs.all(1)) and 0.4 < pairs.mean() < 0.6
            continue
        whole = pairs.all(1)
        assert np.array_equal(whole, pairs.any(1)) and whole.sum() == 6
        images = whole.reshape(4, 3)
        assert np.array_equal(images.all(1), images.any(1)) == (zeros == "images")
        assert np.array_equal(whole, np.arange(12) % 2 == 1) == (zeros == "bands")


def multiply(cores: int, page: int = 0, **fields: int) -> Command:
    return Command(Opcode.MULTIPLY, cores=cores, sparse_page=page, dense_page=page, **fields)


def load(cores: int, page: int = 0, **fields: int) -> Command:
    return Command(Opcode.LOAD, cores=cores, page=page, **fields)


END, DRAIN = Command(Opcode.END), Command(Opcode.DRAIN)


def test_resident():
    """LOADs of fresh pages come first, up to the first of their unit that has to wait; the rest keeps its order."""
    dense, sparse = load(3, target=1), load(1)
    again, fresh, other = load(1), load(2, page=1), load(3, page=1, target=1)
    first, second, last = multiply(1), multiply(2, 1), multiply(3, 1)
    vector = load(0, target=2)
    program = [dense, sparse, first, again, fresh, other, second, DRAIN, last, DRAIN, END]
    assert resident(program) == (
        [dense, sparse, other, END],
        [first, again, fresh, second, DRAIN, last, END],
        [DRAIN, END],
    )
    program = [dense, vector, sparse, first, END]
    assert resident(program) == ([dense, END], [vector, sparse, first, END], [END])
    late = load(1, target=Target.DENSE_LOAD.value)  # to a page that a product has used
    early = load(1, page=1, target=Target.DENSE_LOAD.value)
    program = [early, dense, sparse, first, late, second, END]
    assert resident(program) == ([early, dense, sparse, END], [first, late, second, END], [END])


def test_lockstep():
    """A MULTIPLY of a core that has had one waits for all; what it waited for before it still does."""
    program = [multiply(1), multiply(2), load(1), multiply(3, wait_units=1), multiply(4), DRAIN, multiply(4), END]
    found = in_lockstep(program, 3)
    assert [command.opcode for command in found] == [command.opcode for command in program]
    assert [command.fields.get("wait_cores", 0) for command in found] == [0, 0, 0, 7, 0, 0, 7, 0]
    assert found[3].fields["wait_units"] == 1
    assert all(
        a.fields | {"wait_cores": 0} == b.fields | {"wait_cores": 0} for a, b in zip(found, program, strict=True)
    )


def test_bad_program():
    with pytest.raises(ValueError, match="program must be resident or lockstep, not 'compiled'"):
        RewritingDevice(None, TINY, "compiled")


def test_targets():
    """Figures, the worst of several cases, what is met and what has not run."""
    results = fake_results(PAPER, "full")
    found = {(line.title, line.measure): line for line in lines(results)}
    assert len(found) == len(lines(results))

    def one(title, part):
        (line,) = (line for (a, b), line in found.items() if a == title and part in b)
        return line

    gemm = one("GEMM 192x192x192, dense FP16", "from operands on the chip")
    assert gemm.cases == ("gemm/linear-192-192/ff/fp16/b192/resident",)
    assert gemm.measured == pytest.approx(0.8, rel=0.01) and gemm.status == "missed"
    fewer = one("FP8, 50% zeros, FF", "cycles of the cores")
    assert fewer.measured == pytest.approx(2.0, rel=0.01) and len(fewer.cases) == 2
    worst = fewer.cases[-1]
    results.found[worst].counters["core_busy"] = round(1.05 * results.found[worst].counters["core_busy"])
    changed = next(line for line in lines(results) if (line.title, line.measure) == (fewer.title, fewer.measure))
    assert (
        changed.cases[0] == worst
        and changed.status == "target met"
        and "1.90x (target 1.80x, goal 3.50x)" in str(changed)
    )
    assert dict(speed_ups(results, "ff", 0.5, "core_busy"))[worst] == changed.measured
    skipping = one("FP16, 90% zeros, WG", "cycles of the cores")
    for name in skipping.cases:
        metrics = results.metrics(results.found[name])
        assert metrics.cores >= skipping.measured
    assert one("FP16, 90% zeros, WG", "with loads and stores").status == ""
    layers = one("3x3 layers, dense FP16, BP", "bound by products")
    assert layers.cases and all(name.startswith("layer/3x3-") and "/bp/fp16/" in name for name in layers.cases)
    assert not any("s2-" in name or "-3-" in name for name in layers.cases)
    small = one("shapes smaller than the array", "")
    assert (small.measured, small.status) == (0, "goal met")
    results.found[small.cases[0]] = replace(results.found[small.cases[0]], mismatches=3)
    wrong = next(line for line in lines(results) if line.title == small.title)
    assert (wrong.measured, wrong.status, wrong.cases[0]) == (3, "missed", small.cases[0])
    nothing = lines(Results(config=TINY, set="small", sources="0"))
    assert len(nothing) == len(found) and {line.status for line in nothing} == {"not run"}
    page = render_report(results)
    assert "missed" in page and "goal met" in page and "Zeros not evenly spread" in page and "Small shapes" in page
    assert "not run" in render_report(
        Results(config=TINY, set="small", sources="0", found=dict([next(iter(results.found.items()))]))
    )


def test_memory_bound():
    """Only what the bus bounds counts, with the share of its busier channel."""
    case = Case(group="memory", phase="ff", shape=Shape(channels=64, outputs=64))
    results = fake_results(TINY, "small", [case])
    assert memory_bound(results) == []
    results.found[case.name].counters.update(cycles=1000, write_beats=910, read_beats=905)
    assert memory_bound(results) == [(case.name, 0.91)]
    assert results.metrics(results.found[case.name]).bound_by == "writes"
    (line,) = (line for line in lines(results) if line.measured == 0.91)
    assert line.status == "target met"
    assert "91.0%" in render_report(results)


def test_balance():
    """Against evenly spread zeros by products a cycle, against lockstep by cycles; both must have run."""
    shape = Shape(batch=2, channels=16, image=8, outputs=16, kernel=3, padding=1)
    even = Case(group="balance", phase="ff", shape=shape, sparsity=0.5)
    bands = replace(even, zeros="bands")
    lockstep = replace(bands, program="lockstep")
    results = fake_results(TINY, "small", [even, bands])
    assert balance(results) == []
    results = fake_results(TINY, "small", [even, bands, lockstep])
    for case, cycles in ((even, 1000), (bands, 1200), (lockstep, 1600)):
        results.found[case.name].counters.update(cycles=cycles)
    results.found[bands.name].counters["mac16"] = int(0.9 * results.found[even.name].counters["mac16"])
    assert balance(results) == [(bands.name, pytest.approx(0.75, rel=1e-4), 0.75)]
    figures = {line.measure.split()[2]: line for line in lines(results) if line.title == "zeros not evenly spread"}
    assert figures["speed"].status == "missed" and figures["cycles"].status == ""


def test_masks():
    """How many products come to lanes at rest, and what rows that are masked as a whole save."""
    by_mask = {case.mask: case for case in cases_of("small", TINY) if case.group == "mask"}
    cases = [by_mask[mask] for mask in MASKS]
    results = fake_results(TINY, "small", cases)
    plain, random, whole = (results.found[case.name].counters for case in cases)
    random["gated"] = round(0.45 * random["mac16"])
    whole["core_busy"] = round(0.55 * plain["core_busy"])
    found = {line.measure.split()[2]: line.measured for line in lines(results) if "mask of a ReLU" in line.title}
    assert found == {"products": pytest.approx(0.45, abs=1e-3), "cycles": pytest.approx(0.55, abs=1e-3)}
    masks = [operation.operation(case)[2].get("mask") for case in cases]
    assert masks[0] is None and 0.4 < (masks[1] > 0).mean() < 0.6
    assert (masks[2].any((0, 1, 3)) == [True, False] * (cases[0].shape.image // 2)).all()


def test_shapes():
    assert LAYER.dy == (2, 32, 4, 4) and LAYER.macs == 2 * 32 * 4 * 4 * 16 * 9
    assert LAYER.name == "3x3s2-16-32-8px"
    assert Case(group="layer", phase="wg", shape=LAYER, streamed="fp8", sparsity=0.75).name == (
        "layer/3x3s2-16-32-8px/wg/fp8xfp16/z75/b2"
    )
    assert Shape(batch=9, channels=3, outputs=4).linear and not LAYER.linear


def test_metrics():
    """`tiny`: 2 cores of 8 lanes, 8 bytes a word."""
    metrics = measure(TINY, 4000, counters(mac16=800, mac8=480, core_busy=160, read_beats=40, write_beats=10))
    assert metrics.products == 1280 and metrics.macs == 4000
    assert metrics.ideal == 65 and metrics.utilisation == 0.65
    assert metrics.cores == 65 / 80
    assert (metrics.bus_read, metrics.bus_write, metrics.bus) == (0.4, 0.1, 0.5)
    assert metrics.intensity == 1280 / 400
    assert metrics.bound == 65 and metrics.bound_by == "products" and metrics.of_roofline == 0.65
    for name in ("read_beats", "write_beats"):
        bound = measure(TINY, 4000, counters(mac16=160, **{name: 90}))
        assert (
            bound.bound == 90
            and bound.bound_by == name.replace("_beats", "s")
            and bound.of_roofline == 0.9
            and bound.utilisation == 0.1
        )
    nothing = measure(TINY, 0, counters(cycles=0, core_busy=0))
    assert (nothing.utilisation, nothing.cores, nothing.intensity, nothing.of_roofline) == (0, 0, 0, 0)


def test_comparison():
    """2% more is allowed, a cycle beyond is not; everything that changed is named."""
    results = fake_results()
    names = list(results.found)
    baseline = dict.fromkeys(names[:-1], 1000) | {"gone": 5}
    for name, cycles in zip(names, (1020, 1021, 999, *[1000] * len(names)), strict=False):
        results.found[name].counters["cycles"] = cycles
    comparison = compare(baseline, results)
    assert [change.name for change in comparison.regressions] == [names[1]]
    assert [change.name for change in comparison.improvements] == [names[2]]
    assert comparison.missing == [names[-1]]
    lines = comparison.lines()
    assert f"{len(names) - 4} equal, 1 faster, 1 slower within 2%, 1 slower by more" in lines[0]
    assert f"SLOWER  {names[1]}: 1,000 -> 1,021 cycles (+2.1%)" in lines
    assert f"not in the baseline  {names[-1]}" in lines
    page = render_report(results, comparison)
    targets = page[: page.index("<h2>Roofline")]
    assert page.count('class="bad"') - targets.count('class="bad"') == 1 and "+2.1%" in page


def test_write_baseline(tmp_path):
    """Cases that did not run keep their cycles, those no longer in the set go."""
    path, results = tmp_path / "new" / "baseline.json", fake_results()
    names = list(results.found)
    write_baseline(path, results.chosen(names[:3]), names)
    assert read_baseline(path, results) == {name: results.found[name].counters["cycles"] for name in names[:3]}
    results.found[names[2]].counters["cycles"] = 77
    write_baseline(path, results.chosen(names[2:4]), names[1:])
    baseline = read_baseline(path, results)
    assert list(baseline) == names[1:4] and baseline[names[2]] == 77


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[]",
        '{"set": "small"}',
        '{"set": "full", "config": "tiny", "cycles": {}}',
        '{"set": "small", "config": "paper", "cycles": {}}',
        '{"set": "small", "config": "tiny", "cycles": {"a": 0}}',
        '{"set": "small", "config": "tiny", "cycles": {"a": "b"}}',
    ],
)
def test_bad_baseline(content, few, tmp_path, capsys):
    """Said before anything is run."""
    path = tmp_path / "baseline.json"
    if content is not None:
        path.write_text(content)
    assert main([*few, "--baseline", str(path)]) == 2
    assert f"{path} is " in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def test_command(few, tmp_path, capsys, monkeypatch):
    """Run, resume, more cases, other sources, a regression, an update, the report alone."""
    ran = []
    real = operation.run_case

    def spy(chip, case):
        ran.append(case.name)
        return real(chip, case)

    monkeypatch.setattr(operation, "run_case", spy)
    first, second = (case.name for case in cases_of("small", TINY) if case.name.startswith("tiny/linear"))
    path = tmp_path / "baseline.json"
    few += ["--baseline", str(path)]
    assert main([*few, "--only", first, "--update-baseline"]) == 0
    assert main(few) == 0
    assert ran == [first, second] and f"not in the baseline  {second}" in capsys.readouterr().out
    assert main([*few, "--update-baseline"]) == 0
    assert list(json.loads(path.read_text())["cycles"]) == [first, second]
    assert main(few) == 0
    assert ran == [first, second] and "2 equal" in capsys.readouterr().out

    monkeypatch.setattr(runs, "source_hash", lambda: "f" * 16)
    assert main([*few, "--only", first]) == 0
    assert ran == [first, second, first]
    assert list(read_results(tmp_path / "results.json").found) == [first]
    assert main(few) == 0 and len(ran) == 4

    baseline = json.loads(path.read_text())
    baseline["cycles"][second] = int(baseline["cycles"][second] / 1.03)
    baseline["cycles"][first] += 1
    path.write_text(json.dumps(baseline))
    capsys.readouterr()
    assert main(few) == 1
    out = capsys.readouterr().out
    assert f"SLOWER  {second}" in out and f"faster  {first}" in out and "--update-baseline" in out
    assert main([*few, "--update-baseline"]) == 0
    assert main([*few, "--report-only"]) == 0
    assert "2 equal" in capsys.readouterr().out
    assert len(ran) == 4


def test_mismatch(few, tmp_path, capsys, monkeypatch):
    """A wrong bit fails the benchmark, and such results do not become the baseline."""
    real = golden.linear

    def wrong(*operands, **options):
        result = real(*operands, **options)
        result.view(np.uint16)[0, 0] ^= 1
        return result

    monkeypatch.setattr(golden, "linear", wrong)
    path = tmp_path / "baseline.json"
    assert main([*few, "--baseline", str(path), "--update-baseline"]) == 1
    out = capsys.readouterr().out
    assert "1 MISMATCHES" in out and "mismatches in tiny/linear-1-16/ff" in out
    assert not path.exists()
    assert "1 mismatches" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "no case has 'nothing' in its name, names are like tiny/"),
        (["--only", "("], "--only must be a regular expression"),
        (["--config", "huge"], "configuration must be one of tiny, edge, paper, not 'huge'"),
        (["--batch", "0"], "batch must be at least 1, not 0"),
        (["--batch", "3", "--update-baseline"], "--update-baseline needs"),
        (["--config", "edge", "--update-baseline"], "--update-baseline needs"),
        (["--report-only"], "is no file of benchmark results"),
        (
            ["--only", "linear-64-10/wg", "--batch", "100000"],
            "layer/linear-64-10/wg/fp16/b100000: dw (weight gradient)",
        ),
    ],
)
def test_bad_arguments(arguments, message, few, capsys):
    assert main([*few, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_unknown_set(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--set", "all"])
    assert "--set" in capsys.readouterr().err
    with pytest.raises(ValueError, match="set must be one of small, full, not 'all'"):
        cases_of("all", TINY)


def test_select():
    assert select(["a1", "b1", "b2"], "^b") == ["b1", "b2"] and select([], None) == []
    with pytest.raises(ValueError, match="no case"):
        select([], "a")


def test_results_file(few, tmp_path, capsys):
    """Written and read back; one of something else is refused, not overwritten."""
    path = tmp_path / "results.json"
    results = fake_results(PAPER, "full")
    results.write(path)
    before = path.read_text()
    assert read_results(path) == results
    assert not list(tmp_path.glob("*.part"))
    assert main(few) == 2
    assert "has results of set full on paper, not of small on tiny" in capsys.readouterr().err
    assert path.read_text() == before
    for text in ("", "[]", '{"version": 0}', before.replace('"ff"', "1", 1).replace('"shape"', '"form"', 1)):
        path.write_text(text)
        with pytest.raises(ValueError, match="no file of benchmark results"):
            read_results(path)


def test_source_hash(monkeypatch):
    """Of the RTL's, the compiler's and the golden model's sources, wherever they are."""
    seen = {
        path.name
        for path in build_module.imported_sources("lnpu.bench.operation") | build_module.imported_sources("golden")
    }
    assert {"chip.py", "load.py", "pe.py", "weight_grad.py", "driver.py", "conv.py", "exact.py"} <= seen
    before = source_hash()
    assert before == source_hash() and re.fullmatch("[0-9a-f]{16}", before)
    monkeypatch.setattr(build_module, "imported_sources", lambda module: frozenset())
    assert source_hash() != before


def test_report_of_the_full_set():
    """All plots, with every case in the table."""
    results = fake_results(PAPER, "full")
    page = render_report(results)
    assert Page(page).images == 3 and "bit-exact" in page
    assert all(name in page for name in results.found)
    assert "80.0%" in page


def test_report_of_a_part():
    """Plots that have nothing to show are left out."""
    cases = [case for case in cases_of("full", PAPER) if case.group == "gemm"]
    results = fake_results(PAPER, "full", cases, wrong=2)
    assert not has_layers(results) and not has_sparsities(results)
    page = render_report(results)
    assert Page(page).images == 1 and "18 mismatches" in page
    dense = [case for case in cases_of("full", PAPER) if case.group == "layer" and not case.sparsity]
    assert not has_sparsities(fake_results(PAPER, "full", dense))
    assert Page(render_report(Results(config=TINY, set="small", sources="0"))).images == 0
