from __future__ import annotations

import math

import numpy as np
import pytest

from fleetfed.cloud_coordinator.training.optimizers import OptimizerConfig, OptimizerName, make_optimizer
from fleetfed.shared.errors import ConfigError, StorageError

ALL = list(OptimizerName)


def config(name: OptimizerName, **settings: float) -> OptimizerConfig:
    return OptimizerConfig(name=name, **settings)


def means(rounds: int = 6, dimension: int = 5) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal(dimension) * 0.01 for _ in range(rounds)]


def by_hand(name: OptimizerName, lr: float, b1: float, b2: float, tau: float, deltas: list[float]) -> list[float]:
    """One coordinate in plain Python, written from algorithm 2 of the paper."""
    m, v, steps = 0.0, tau**2, []
    for d in deltas:
        if name is OptimizerName.FEDAVG:
            steps.append(lr * d)
            continue
        if name is OptimizerName.MOMENTUM:
            m = b1 * m + d
            steps.append(lr * m)
            continue
        m = b1 * m + (1 - b1) * d
        if name is OptimizerName.ADAM:
            v = b2 * v + (1 - b2) * d**2
        elif v > d**2:
            v = v - (1 - b2) * d**2
        elif v < d**2:
            v = v + (1 - b2) * d**2
        steps.append(lr * m / (math.sqrt(v) + tau))
    return steps


@pytest.mark.parametrize("name", ALL)
def test_steps_follow_the_papers_algorithms(name: OptimizerName) -> None:
    settings = config(name, learning_rate=0.3, beta1=0.8, beta2=0.95, tau=0.005)
    optimizer = make_optimizer(settings, 5)
    got = np.array([optimizer.step(mean) for mean in means()])
    for i in range(5):
        wanted = by_hand(name, 0.3, 0.8, 0.95, 0.005, [float(mean[i]) for mean in means()])
        assert got[:, i] == pytest.approx(wanted, rel=1e-12)


def test_fedavg_at_rate_one_is_the_mean_itself() -> None:
    mean = means()[0]
    assert make_optimizer(OptimizerConfig(), 5).step(mean).tobytes() == mean.tobytes()


@pytest.mark.parametrize("name", ALL)
def test_a_restored_optimizer_continues_bit_for_bit(name: OptimizerName) -> None:
    first, second = make_optimizer(config(name), 5), make_optimizer(config(name), 5)
    for mean in means()[:3]:
        first.step(mean)
    second.restore(first.state())
    assert second.state() == first.state()
    for mean in means()[3:]:
        assert first.step(mean).tobytes() == second.step(mean).tobytes()


@pytest.mark.parametrize("name", ALL)
def test_a_foreign_or_damaged_state_is_refused_and_changes_nothing(name: OptimizerName) -> None:
    optimizer = make_optimizer(config(name), 5)
    optimizer.step(means()[0])
    before = optimizer.state()
    other = make_optimizer(config(next(n for n in ALL if n is not name)), 5)
    other.step(means()[0])
    bad = [b"", before[:-1], before + b"\0", make_optimizer(config(name), 6).state(), other.state(), b"X" + before[1:]]
    if name is not OptimizerName.FEDAVG:
        bad.append(before[:-8] + np.array([np.nan]).tobytes())
    for state in bad:
        with pytest.raises(StorageError):
            optimizer.restore(state)
        assert optimizer.state() == before


@pytest.mark.parametrize("name", ALL)
def test_a_bad_mean_is_refused_and_changes_nothing(name: OptimizerName) -> None:
    optimizer = make_optimizer(config(name), 5)
    optimizer.step(means()[0])
    before = optimizer.state()
    for bad in (np.zeros(4), np.zeros(5, dtype=np.float32), np.array([0, 0, np.nan, 0, 0]), np.full(5, np.inf)):
        with pytest.raises(ValueError):
            optimizer.step(bad)
        assert optimizer.state() == before


@pytest.mark.parametrize("name", ALL)
def test_the_mean_is_not_changed_and_the_step_is_the_callers(name: OptimizerName) -> None:
    optimizer, mean = make_optimizer(config(name), 5), means()[0]
    copy = mean.copy()
    step = optimizer.step(mean)
    state = optimizer.state()
    step += 1
    assert mean.tobytes() == copy.tobytes()
    assert optimizer.state() == state


@pytest.mark.parametrize("name", ALL)
def test_every_optimizer_descends_a_badly_scaled_bowl(name: OptimizerName) -> None:
    rate = {OptimizerName.FEDAVG: 1.0, OptimizerName.MOMENTUM: 0.1}.get(name, 0.05)
    optimizer = make_optimizer(config(name, learning_rate=rate), 3)
    curvature, x = np.array([1.0, 0.3, 0.1]), np.array([3.0, -2.0, 1.0])
    start = float((curvature * x * x).sum())
    for _ in range(200):
        x = x + optimizer.step(-0.5 * curvature * x)
    assert float((curvature * x * x).sum()) < 0.01 * start


@pytest.mark.parametrize(
    "bad",
    [
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"tau": 0.0},
        {"tau": math.inf},
    ],
)
def test_a_wrong_setting_is_a_configuration_error(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        OptimizerConfig(**bad)  # type: ignore[arg-type]
