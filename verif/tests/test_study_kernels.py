"""The fused kernels of the study against the golden model: what is read back, and the statistics, bit for bit."""

import numpy as np
import pytest

from golden.controller import statistics_of
from golden.fgmp import FP8_POLICY, FP16_POLICY, Policy, fgmp, to_fp16
from golden.formats import FP16, decode
from golden.vector import batch_norm_apply, sgd_step

torch = pytest.importorskip("torch")

from lnpu.study.kernels import channel_sums, momentum_update, store  # noqa: E402

ALL_FP16 = decode(FP16, np.arange(1 << 16, dtype=np.uint16)).astype(np.float32)
CORNERS = [448, 463.9, 464, 464.01, 65504, 65519.9, 65520, 1e30, 3e38, np.inf, np.nan, 0, 2**-9, 2**-10, 2**-25, 1e-45]


def inputs(seed: int) -> np.ndarray:
    """All FP16 numbers, what lies between them with its neighbours, corners, and random numbers of all sizes."""
    rng = np.random.default_rng(seed)
    corners = np.float32(CORNERS)
    finite = np.sort(ALL_FP16[np.isfinite(ALL_FP16)])
    ties = (finite[1:] + finite[:-1]) / 2
    near = [np.nextafter(ties, np.float32(end)) for end in (-np.inf, np.inf)]
    spread = (rng.standard_normal(20_000) * 2.0 ** rng.integers(-40, 40, 20_000)).astype(np.float32)
    values = np.concatenate([ALL_FP16, corners, -corners, ties, *near, spread])
    return np.concatenate([values, np.zeros(-len(values) % (64 * 37), np.float32)])


def policies(seed: int) -> list[Policy]:
    rng = np.random.default_rng(seed)
    found = [FP16_POLICY, FP8_POLICY, Policy.between(2.0**-6, 448.0, below="zero")]
    for below in ("fp16", "fp8", "zero"):
        for above in ("fp16", "fp8"):
            for scale in (0, -5, 64, -64, 111, -125, int(rng.integers(-20, 20))):
                edges = [
                    0,
                    0x5F00,
                    0x5F40,
                    0x7BFF,
                    0x7FFF,
                    *rng.integers(0, 0x8000, 4),
                    *rng.integers(0x1000, 0x6000, 8),
                ]
                lo, hi = sorted(int(value) for value in rng.choice(edges, 2))
                found.append(Policy(scale, lo, hi, below, above))
    return found


@pytest.mark.parametrize("policy", policies(0), ids=repr)
def test_store(policy):
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        x = (inputs(0).astype(np.float64) * 2.0**policy.scale).astype(np.float32)
    expected = fgmp(x, policy)
    statistics = statistics_of(to_fp16(x, policy.scale), expected.codes, expected.underflow)
    values = expected.values().view(np.uint32)
    for channels in (16, 37, 128 if len(x) % 128 == 0 else 64):
        got, stored = store(torch.from_numpy(x).reshape(-1, 1, channels), policy)
        np.testing.assert_array_equal(got.numpy().reshape(-1).view(np.uint32), values)
        assert stored.statistics() == statistics


def test_batch_norm_and_sums():
    """The formula of a pointwise group, and the sums of a batch norm, of operands that are rounded to FP16 first."""
    rng = np.random.default_rng(1)
    policy = Policy.between(2.0**-6, 2.0, below="fp8", scale=-2)
    x = rng.standard_normal((4, 6, 6, 24)).astype(np.float32)
    sums = torch.empty(2, 24, dtype=torch.float64)
    y, _ = store(torch.from_numpy(x), policy, sums=sums)
    rounded = fgmp(x, Policy(policy.scale)).values().astype(np.float64)
    np.testing.assert_allclose(sums.numpy(), [rounded.sum((0, 1, 2)), (rounded**2).sum((0, 1, 2))], rtol=1e-13)
    a, b = (rng.standard_normal(24).astype(np.float32) for _ in range(2))
    other = rng.standard_normal(x.shape).astype(np.float32)
    z, _ = store(
        y,
        policy,
        form="affine",
        vectors=(torch.from_numpy(a), torch.from_numpy(b)),
        y=torch.from_numpy(other),
        rectify=True,
    )
    order = (0, 3, 1, 2)
    expected = batch_norm_apply(y.numpy().transpose(order), a, b, shortcut=other.transpose(order), rectify=True)
    np.testing.assert_array_equal(z.numpy().transpose(order), fgmp(expected, policy).values())
    s = channel_sums(z, y).numpy()
    wide = z.numpy().astype(np.float64)
    np.testing.assert_allclose(s, [wide.sum((0, 1, 2)), (wide * y.numpy()).sum((0, 1, 2))], rtol=1e-12, atol=1e-12)


def test_update():
    rng = np.random.default_rng(2)
    w, m, g = (rng.standard_normal(1000).astype(np.float32) for _ in range(3))
    numbers = {"momentum": 0.9, "inv_loss_scale": 1 / 1024}
    expected = sgd_step(w, m, g, lr=0.05, weight_decay=5e-4, **numbers)
    tensors = [torch.from_numpy(one) for one in (w, m, g)]
    momentum_update(*tensors, rate=0.05, decay=5e-4, **numbers)
    np.testing.assert_array_equal(w, expected[0])
    np.testing.assert_array_equal(m, expected[1])
