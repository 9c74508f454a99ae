"""The report of the study: figures from invented results, published data that draw the same page."""

import json

import numpy as np
import pytest

from golden.fgmp import Policy, fgmp
from golden.memory import TensorLayout
from lnpu.cli import main
from lnpu.study.compact import compact_gradients, compact_training, read_compact, write_compact
from lnpu.study.findings import accuracies, accuracy_findings, ema_saving, gradient_findings, removed
from lnpu.study.names import COUNTS, STUDY_NAMES
from lnpu.study.report import render_report, study_of, write_pictures

EPOCHS = 3
ACCURACY = {"fp32": 0.703, "fp16": 0.70, "fp8": 0.60, "fgmp": 0.69, "dynamic": 0.699}
TENSORS = {
    f"{prefix}{layer}": kind
    for prefix, kind in (
        ("", "preactivation"),
        ("r.", "activation"),
        ("d.", "error"),
        ("w.", "weight"),
        ("g.", "gradient"),
    )
    for layer in ("c1", "c2")
}


def fake_run(name: str, seed: int) -> dict:
    """A result as of `lnpu.study.runs.train`."""
    rng = np.random.default_rng(seed)
    epochs = []
    for epoch in range(EPOCHS):
        tensors = {}
        for tensor, kind in TENSORS.items():
            fp16, zero = int(rng.integers(50, 100)), int(rng.integers(0, 300))
            counts = {"zero": zero, "fp8": 640 - fp16 - zero, "fp16": fp16, "blocks": 10, "masked": 9, "mixed": 10}
            counts |= {"precision": 80, "payload": 640 - zero + fp16}
            tensors[tensor] = {"kind": kind, "counts": [counts.get(count, 0) for count in COUNTS] + [1000] * 5}
            if name == "dynamic":
                tensors[tensor]["state"] = [-epoch, 0x2400, 0x5400 + 0x100 * epoch]
        record = {"epoch": epoch + 1, "rate": 0.1, "train_loss": 2.0 - epoch / 4 + seed / 50, "test_loss": None}
        record |= {"test_accuracy": ACCURACY[name] - (EPOCHS - 1 - epoch) / 10 + seed / 500, "loss_scale": 10}
        epochs.append(record | {"skipped": 0, "seconds": 3.21, "tensors": tensors})
    settings = {"width": 8, "image": 8, "epochs": EPOCHS, "batch": 64, "rate": 0.1, "momentum": 0.9, "decay": 5e-4}
    return {"version": 1, "run": {"format": name, "seed": seed, "data": "abc", **settings}, "epochs": epochs}


def fake_gradients(seed: int) -> dict:
    """A result as of `lnpu.study.gradient_error.measure`: activations lose, weights do not."""
    cases = [{"kind": name, "share": None, "flush": 0.0} for name in STUDY_NAMES[1:]]
    for kind in ("activation", "weight", "error", "all"):
        for flush in (0.0, 0.3) if kind == "error" else (0.0,):
            cases += [{"kind": kind, "share": share, "flush": flush} for share in (0.0, 0.05, 0.2, 1.0)]
    for case in cases:
        size = {"weight": 1e-5, "error": 3e-3}.get(case["kind"], 4e-2)
        distance = size * (1 - (case["share"] or 0)) ** 4 * (1 + 0.01 * seed) + (0.02 if case["flush"] else 1e-7)
        case |= {"distance": [distance, 2 * distance], "error": [distance**0.5] * 2}
    epochs = [{"epoch": epoch, "noise": [0.8, 0.9], "cases": cases} for epoch in (1, 3)]
    run = {"training": {"format": "fp32", "seed": seed}, "epochs": [1, 3], "batches": 2}
    return {"version": 1, "run": run, "layers": ["c1", "c2"], "epochs": epochs}


@pytest.fixture(scope="module")
def study() -> dict:
    results = [fake_run(name, seed) for seed in range(3) for name in STUDY_NAMES]
    return study_of([*results, *(fake_gradients(seed) for seed in range(2))])


def test_published_data_draw_the_same_page(study, tmp_path):
    write_compact(tmp_path, study)
    again = read_compact(tmp_path)
    assert again == json.loads(json.dumps(study))
    page = render_report(again, {"activation": 1e9, "master": 1e8})
    assert page == render_report(study, {"activation": 1e9, "master": 1e8})
    for text in (
        "Final accuracy",
        "worse, beyond the spread",
        "within the spread",
        "The controller",
        "Where FP8 alone",
    ):
        assert text in page
    assert page.count("<img") == 9
    pictures = write_pictures(tmp_path / "pictures", study)
    assert [path.name for path in pictures] == ["accuracy.png", "bits.png", "shares.png", "gradients.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert read_compact(tmp_path / "pictures") is None


def test_parts_may_be_missing(study):
    assert "Final accuracy" not in render_report({"training": None, "gradients": study["gradients"]})
    one = compact_training([fake_run("fp8", 0)])
    page = render_report({"training": one, "gradients": None})
    assert "Final accuracy" in page and "nan" not in page
    pair = compact_training([fake_run("fp8", 0), fake_run("fp16", 0)])
    assert "the spread is unknown" in render_report({"training": pair, "gradients": None})


def test_accuracies(study):
    found = {one.format: one for one in accuracies(study["training"])}
    assert list(found) == list(STUDY_NAMES)
    assert found["fp16"].mean == pytest.approx(70.2) and found["fp16"].spread == pytest.approx(0.2)
    assert found["fp8"].difference == pytest.approx(-10) and found["fp8"].uncertainty == pytest.approx(0.08**0.5)
    assert found["fp8"].verdict == "worse, beyond the spread" and found["dynamic"].verdict == "within the spread"
    assert found["fp32"].verdict == "better, beyond the spread" and found["fp16"].verdict == ""


def test_no_difference():
    """Formats that the spread does not tell apart are said not to differ."""
    same = [fake_run("fp16", seed) for seed in range(3)]
    same += [result | {"run": result["run"] | {"format": "fp8"}} for result in same]
    assert next(accuracy_findings(compact_training(same))).startswith("No format differs from FP16")
    other = [fake_run(name, seed) for name in ("fp16", "fp8") for seed in range(3)]
    assert "worse, beyond the spread" in next(accuracy_findings(compact_training(other)))


def test_bits_and_shares_are_those_of_the_encoder():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((6, 5, 24)) * (rng.random((6, 5, 24)) < 0.6)).astype(np.float32)

    codes = fgmp(x, Policy.between(2.0**-3, 1.0, below="zero")).codes
    layout = TensorLayout(6, 5, 24)
    lengths = layout.lengths(codes)
    blocks = layout.to_blocks(codes)
    n16, n8 = (blocks == 3).sum(1), (blocks == 2).sum(1)
    counts = {"zero": int((codes == 0).sum()), "fp8": int(n8.sum()), "fp16": int(n16.sum()), "blocks": layout.blocks}
    counts |= {"masked": int(((n8 + n16) > 0).sum()), "payload": int((n8 + 2 * n16).sum())}
    mixed = (n8 > 0) & (n16 > 0)
    counts |= {"mixed": int(mixed.sum()), "precision": int((-(-(n8 + n16) // 8))[mixed].sum())}
    result = fake_run("fgmp", 0)
    for record in result["epochs"]:
        record["tensors"] = {"c": {"kind": "activation", "counts": [counts.get(name, 0) for name in COUNTS] + [0] * 5}}
    training = compact_training([result])
    size = int(lengths.sum(dtype=np.int64)) + layout.blocks  # and the length table
    assert training["kinds"]["fgmp"]["activation"]["bits"] == [pytest.approx(8 * size / x.size, abs=1e-3)] * EPOCHS
    shares = [np.mean(codes == 0), 0, np.mean(codes == 2), np.mean(codes == 3)]
    np.testing.assert_allclose(training["layers"]["fgmp"]["c"]["shares"], shares, atol=1e-4)


def test_ema_saving():
    bits = {"activation": [8.0, 4.0], "error": [16.0, 12.0]}
    assert ema_saving(bits, {"activation": 60, "error": 20, "master": 20}) == pytest.approx([0.3, 0.5])
    for plain in ({}, {"master": 5.0}, {"activation": 0}):
        with pytest.raises(ValueError):
            ema_saving(bits, plain)


def test_gradient_findings(study):
    gradients = study["gradients"]
    part, error = removed(gradients, "activation", 0.05)
    assert part == pytest.approx(1 - 0.95**4, abs=1e-2) and error < 1e-2
    text = " ".join(gradient_findings(gradients))
    assert "activations 0.06" in text and "Half of it takes 20% in FP16" in text
    assert "Weights: FP8 alone costs hardly anything" in text
    assert "what is lost by flushing, FP16 elements do not bring back" in text


def test_results_of_one_study_only():
    other = fake_run("fp16", 1)
    other["run"]["width"] = 16
    with pytest.raises(ValueError, match="width"):
        compact_training([fake_run("fp16", 0), other])
    with pytest.raises(ValueError, match="twice"):
        compact_training([fake_run("fp16", 0), fake_run("fp16", 0)])
    other = fake_gradients(1)
    other["run"]["batches"] = 3
    with pytest.raises(ValueError):
        compact_gradients([fake_gradients(0), other])
    for function in (compact_training, compact_gradients):
        with pytest.raises(ValueError):
            function([])


def test_command(study, tmp_path, capsys):
    write_compact(tmp_path / "data", {"training": study["training"]})
    words = ["fgmp-study", "--report-only", "--results", str(tmp_path / "data"), "-o", str(tmp_path / "report")]
    assert main([*words, "--data-out", str(tmp_path / "out")]) == 0
    assert "-10.00 points against FP16: worse, beyond the spread" in capsys.readouterr().out
    assert (tmp_path / "report" / "index.html").exists()
    assert (tmp_path / "out" / "training.json").read_text() == (tmp_path / "data" / "training.json").read_text()
    (tmp_path / "bad.json").write_text("[1]")
    assert main([*words, "--ema", str(tmp_path / "bad.json")]) == 2
    assert "--ema must be" in capsys.readouterr().err
    assert main(["fgmp-study", "--report-only", "--results", str(tmp_path / "nothing")]) == 2


def test_measured_gradients(tmp_path):
    """A whole measurement of a small network: FP16 is close, FP8 less so; results of older code are left out."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("distributed")
    from lnpu.results import write_json
    from lnpu.study.cluster import run_study
    from lnpu.study.data import load_data
    from lnpu.study.gradient_error import GradientRun, cases, policy_by_share
    from lnpu.study.kernels import store
    from lnpu.study.report import read_study
    from lnpu.study.runs import Run

    x = torch.randn(40, 8, 16, generator=torch.Generator().manual_seed(0)) * 3
    x[x < -3] = 0
    for share, flush in ((0.0, 0.0), (0.05, 0.0), (0.2, 0.3), (1.0, 0.0)):
        stored = store(x, policy_by_share(x, share, flush))[1]
        nonzero = stored.underflow + stored.fp8 + stored.fp16
        kept = nonzero - stored.underflow
        assert flush * nonzero - 5 <= stored.underflow <= flush * nonzero + 5
        assert share * kept - 5 <= stored.fp16 <= share * kept and stored.fp8 + stored.fp16 == kept
        assert stored.top in (22, 23)
    assert policy_by_share(torch.zeros(4, 4), 0.1) is not None

    data = load_data(image=8)
    training = Run(
        format="fp32", seed=0, data=data.digest, width=4, image=8, batch=64, epochs=1, flip=False, padding=1, rate=0.05
    )
    run = GradientRun(training=training, epochs=(1,), batches=2)
    (result,) = run_study([run], data, tmp_path, workers=1)
    write_json(tmp_path / "gradients-0-of-older-code.json", result)
    study = read_study(tmp_path)
    assert study["gradients"] == json.loads(json.dumps(compact_gradients([result])))
    (epoch,) = result["epochs"]
    assert len(epoch["cases"]) == len(cases()) and len(epoch["noise"]) == len(result["layers"]) == 21
    mean = {(case["kind"], case["share"], case["flush"]): np.mean(case["distance"]) for case in epoch["cases"]}
    assert mean["fp16", None, 0.0] < 0.02 < mean["fp8", None, 0.0] < np.mean(epoch["noise"])
    for kind in ("activation", "preactivation", "weight", "error", "gradient", "all"):
        assert mean[kind, 1.0, 0.0] < 0.3 * mean[kind, 0.0, 0.0], kind
    assert mean["error", 0.0, 0.3] > mean["error", 0.0, 0.0]
    assert mean["gradient", 0.0, 0.0] < mean["activation", 0.0, 0.0]
    assert "Half of it" in render_report(study)
