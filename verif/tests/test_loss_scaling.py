"""The loss scale: down at an overflow, up after clean steps, between its limits."""

import pytest

from lnpu.loss_scaling import LossScaler, LossScaling


def test_overflow_halves_and_skips():
    scaler = LossScaler(LossScaling(start=3, interval=4, least=1))
    assert scaler.scale == 8
    assert [scaler.step(True) for _ in range(3)] == [False] * 3
    assert (scaler.scale, scaler.skipped) == (2, 3)  # not below 2^least


def test_clean_steps_double():
    scaler = LossScaler(LossScaling(start=5, interval=3, most=6))
    scales = []
    for overflow in (False, False, True, False, False, False, False, False, False):
        assert scaler.step(overflow) is not overflow
        scales.append(scaler.exponent)
    # An overflow starts the count anew; 2^most is the end.
    assert scales == [5, 5, 4, 4, 4, 5, 5, 5, 6]
    assert all(scaler.step(False) for _ in range(6)) and scaler.exponent == 6


def test_never_doubles():
    scaler = LossScaler(LossScaling(start=5, interval=0))
    assert all(scaler.step(False) for _ in range(5000)) and scaler.exponent == 5


def test_restored_state_goes_on_alike():
    one, other = (LossScaler(LossScaling(start=8, interval=3)) for _ in range(2))
    for overflow in (False, True, False, False):
        one.step(overflow)
    other.restore(one.state())
    for overflow in (False, False, True, False, False, False):
        one.step(overflow), other.step(overflow)
        assert one.state() == other.state()
    with pytest.raises(KeyError):
        other.restore({"exponent": 3})


@pytest.mark.parametrize("numbers", [{"start": -1}, {"start": 25}, {"interval": -1}, {"least": 3, "start": 2}])
def test_limits(numbers):
    with pytest.raises(ValueError):
        LossScaling(**numbers)
