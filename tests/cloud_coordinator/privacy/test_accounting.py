"""Epsilon: the specification's tables to three digits, the traps of the library, and monotony."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.cloud_coordinator.privacy import accounting
from fleetfed.cloud_coordinator.privacy.accounting import Account, Segment, calibrate, epsilon
from fleetfed.cloud_coordinator.privacy.matrix import prefix_rmse
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.privacy import cost as worth
from fleetfed.shared.privacy.clipping import rounded_norm
from fleetfed.shared.privacy.cost import column_square
from fleetfed.shared.wire.privacy import Mechanism, Privacy

dpa = pytest.importorskip("dp_accounting")
import mpmath  # noqa: E402
from dp_accounting import pld, rdp  # noqa: E402

ROOT = Path(__file__).parents[3]
DELTA = 1e-6
RELATION = dpa.NeighboringRelation.REPLACE_SPECIAL


def segment(mechanism: Mechanism = Mechanism.CENTRAL, *, z: float = 5.0, times: int = 50, **given: Any) -> Segment:
    defaults: dict[str, Any] = {
        # So many levels that a discrete Gaussian is a continuous one to every digit shown.
        "clip": 1e6,
        "min_separation": 1,
        "honest": 0,
        "band": 1,
        "flag_noise": 0.0,
        "dimension": 2**20,
    }
    return Segment(
        mechanism=mechanism,
        noise_multiplier=z,
        max_participations=times,
        **(defaults | given),
    ).over(times)


def cost(*segments: Segment) -> float:
    return epsilon(segments, DELTA)


# --- The specification's numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "expected"), [(1, 0.834), (4, 1.77), (16, 3.80), (50, 7.29), (200, 16.9)])
def test_a_device_pays_for_its_own_participations(times: int, expected: float) -> None:
    assert cost(segment(times=times)) == pytest.approx(expected, rel=4e-3)


def test_the_noise_that_a_budget_needs() -> None:
    assert calibrate(segment(times=200), 8.0, DELTA) == pytest.approx(9.234, abs=5e-4)
    assert dpa.get_sigma_gaussian(8, DELTA) * math.sqrt(200) == pytest.approx(9.2339, abs=1e-4)


@pytest.mark.parametrize(
    ("n", "times", "z", "lane", "inflation", "gaussian", "published", "skellam"),
    [
        (200, 50, 5, 12, 5.11, 7.29, 62.5, 64.63),
        (200, 50, 5, 14, 1.60, 7.29, 13.6, 13.66),
        (200, 50, 5, 16, 1.048, 7.29, 8.20, 8.250),
        (200, 50, 5, 21, 1.0001, 7.29, 7.77, 7.829),
        (200, 100, 10, 16, 1.18, 4.89, 6.30, 6.310),
        (200, 100, 10, 21, 1.0002, 4.89, 5.22, 5.224),
        (800, 50, 5, 16, 1.049, 7.29, 8.21, 8.259),
    ],
)
def test_skellam_against_the_table_of_lane_widths(
    n: int, times: int, z: float, lane: int, inflation: float, gaussian: float, published: float, skellam: float
) -> None:
    """The table's own numbers take orders in between, for which the theorem is not stated."""
    dimension = 2**20
    # The clip in levels that fits the lane with four standard deviations to spare.
    norm = math.sqrt(((2**lane / 8) ** 2 - n / 4) / (n**2 / dimension + z**2))
    clip = rounded_norm(norm, dimension)
    assert clip / norm == pytest.approx(inflation, rel=4e-3)
    assert cost(segment(z=z, times=times)) == pytest.approx(gaussian, rel=2e-3)
    noisy = segment(Mechanism.SKELLAM, z=z * norm / clip, times=times, clip=clip, honest=n)
    assert cost(noisy) == pytest.approx(skellam, rel=1e-3)
    assert published * (1 - 1e-3) <= cost(noisy) < published * 1.04


@pytest.mark.parametrize(
    ("rounds", "band", "times", "independent", "banded"),
    [
        (128, 8, 16, 32.1, 14.4),
        (256, 16, 16, 45.3, 15.4),
        (256, 32, 8, 32.1, 9.0),
        (512, 32, 16, 64.1, 16.5),
        (512, 64, 8, 45.3, 9.6),
    ],
)
def test_the_matrix_beats_independent_noise_as_the_table_says(
    rounds: int, band: int, times: int, independent: float, banded: float
) -> None:
    assert prefix_rmse(rounds, 1) * math.sqrt(times) == pytest.approx(independent, rel=2e-3)
    assert prefix_rmse(rounds, band) * math.sqrt(times * column_square(band)) == pytest.approx(banded, rel=5e-3)
    noisy = segment(Mechanism.MATRIX, z=40.0, times=times, band=band, min_separation=band)
    alone = dpa.get_epsilon_gaussian(40.0 / math.sqrt(times * column_square(band)), DELTA)
    # Rounding what is taken back to the grid of the noise costs half a percent, here where the noise is very wide.
    assert alone <= cost(noisy.full()) == pytest.approx(alone, rel=5e-3)


# --- Against the library ----------------------------------------------------------------------------------------------


def test_three_accountants_agree_on_a_gaussian_as_they_should() -> None:
    event = dpa.SelfComposedDpEvent(dpa.GaussianDpEvent(5.0), 50)
    exact = pld.PLDAccountant(neighboring_relation=RELATION).compose(event).get_epsilon(DELTA)
    renyi = rdp.RdpAccountant(neighboring_relation=RELATION).compose(event).get_epsilon(DELTA)
    assert cost(segment()) == pytest.approx(exact, rel=1e-3)
    assert renyi == pytest.approx(7.766, abs=1e-3)
    assert cost(segment()) < renyi


def test_the_renyi_accountant_ignores_the_relation_and_the_other_does_not() -> None:
    """Why the relation is fixed in one place, and accountants are never mixed."""

    def of(accountant: Any, relation: Any) -> float:
        return float(accountant(neighboring_relation=relation).compose(dpa.GaussianDpEvent(2.0)).get_epsilon(DELTA))

    relations = dpa.NeighboringRelation
    assert of(rdp.RdpAccountant, relations.REPLACE_ONE) == of(rdp.RdpAccountant, RELATION)
    assert of(rdp.RdpAccountant, RELATION) == pytest.approx(2.419, abs=1e-3)
    assert of(pld.PLDAccountant, RELATION) == pytest.approx(2.254, abs=1e-3)
    assert of(pld.PLDAccountant, relations.REPLACE_ONE) == pytest.approx(4.887, abs=1e-3)


def test_only_one_accountant_knows_what_skellam_noise_needs() -> None:
    event = dpa.ZCDpEvent(rho=0.01, xi=0.0)
    assert rdp.RdpAccountant(neighboring_relation=RELATION).supports(event)
    assert not pld.PLDAccountant(neighboring_relation=RELATION).supports(event)
    assert not rdp.RdpAccountant(neighboring_relation=RELATION).supports(dpa.PoissonSampledDpEvent(0.1, event))


def test_an_event_that_the_library_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "_skellam", lambda *_: (dpa.UnsupportedDpEvent(), dpa.UnsupportedDpEvent()))
    with pytest.raises(ConfigError, match="cannot account"):
        cost(segment(Mechanism.SKELLAM))


def test_without_the_library_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(accounting.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"fleetfed\[privacy\]"):
        cost(segment())
    assert epsilon((), DELTA) == 0.0


def test_nothing_claims_amplification() -> None:
    """No event of sampling, of any kind, is named in the sources: membership is public here."""
    forbidden = ("Sampled", "sampled", "amplif")
    for path in (*(ROOT / "cloud_coordinator").rglob("*.py"), *(ROOT / "shared").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [getattr(node, "attr", ""), getattr(node, "id", "")]
            if isinstance(node, ast.ImportFrom | ast.Import):
                names += [alias.name for alias in node.names]
            for name in names:
                assert not ("DpEvent" in name and any(word in name for word in forbidden)), (path, name)


def test_skellam_noise_is_paid_for_at_whole_orders_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agarwal et al. 2021, theorem 3.5, is stated for integers; the library's own orders begin at 1.1."""
    asked: list[Any] = []
    real = rdp.RdpAccountant

    def accountant(orders: Any, relation: Any) -> Any:
        asked.extend(orders)
        return real(orders, relation)

    monkeypatch.setattr(rdp, "RdpAccountant", accountant)
    cost(segment(Mechanism.SKELLAM))
    assert asked
    assert all(isinstance(order, int) and order >= 2 for order in asked)


@pytest.mark.parametrize("variance", [16, 256])
@pytest.mark.parametrize("shift", [1, 3])
def test_the_theorem_on_skellam_noise_bounds_the_exact_divergence(variance: int, shift: int) -> None:
    """In one dimension, where the divergence can be summed up term by term."""
    reach = 40 * math.isqrt(variance) + 100
    with mpmath.workdps(40):
        chances = [mpmath.besseli(abs(k), variance) for k in range(-reach, reach + 1)]
        total = mpmath.fsum(chances)
        for order in (2, 3, 8, 20):
            terms = (a**order * b ** (1 - order) for a, b in zip(chances[:-shift], chances[shift:], strict=True))
            exact = float(mpmath.log(mpmath.fsum(terms) / total) / (order - 1))
            for event in accounting._skellam(float(shift), 1, float(variance)):
                assert exact <= event.rho * order + event.xi


@given(
    z=st.floats(0.3, 50),
    times=st.integers(1, 300),
    clip=st.floats(20, 1e5),
    flags=st.sampled_from([0.0, 4.0, 40.0]),
    delta=st.sampled_from([1e-5, 1e-6, 1e-10]),
    mechanism=st.sampled_from(Mechanism),
)
@settings(max_examples=60, deadline=None)
def test_devices_believe_what_the_accountant_says_and_nothing_better(
    z: float, times: int, clip: float, flags: float, delta: float, mechanism: Mechanism
) -> None:
    """They have no accountant; `cost.check_promise` must come to the same numbers."""
    found = segment(mechanism, z=z, times=times, clip=clip, dimension=1000, flag_noise=flags, band=3, min_separation=3)
    said = epsilon((found.full(),), delta)
    private = Privacy(
        mechanism=mechanism,
        clip=clip,
        noise_multiplier=z,
        max_participations=times,
        min_separation=3,
        honest=8,
        band=3,
        flag_noise=flags,
        epsilon=said,
        delta=delta,
    )
    worth.check_promise(private, 1000)
    if said < 5000:
        with pytest.raises(ValueError, match="does not earn"):
            worth.check_promise(replace(private, epsilon=said * 0.995 - 1e-5 if said > 1e-2 else 0.0), 1000)


def test_devices_add_up_as_the_accountant_does() -> None:
    parts = [
        segment(Mechanism.CENTRAL, z=9.0, times=7, clip=50.0, flag_noise=5.0, dimension=1000),
        segment(Mechanism.SKELLAM, z=11.0, times=20, clip=80.0, flag_noise=9.0, dimension=1000),
        segment(Mechanism.MATRIX, z=14.0, times=3, clip=80.0, band=4, min_separation=4, dimension=1000).full(),
    ]
    for some in (parts, parts[:1], parts[1:2], parts[::2]):
        spent: worth.Cost = ()
        for each in some:
            for _ in range(each.participations):
                spent = worth.together(spent, worth.participation(each, each.dimension))  # type: ignore[arg-type]
        said = epsilon(tuple(some), DELTA)
        assert worth.within(spent, said, DELTA)
        assert not worth.within(spent, said * 0.995, DELTA)


# --- What a discrete Gaussian is worth --------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "k"), [(4, 0), (4, 5), (50, 12)])
def test_a_discrete_gaussian_is_a_rounded_continuous_one(sigma: int, k: int) -> None:
    """The lemma behind `cost.continuous`, computed to 60 digits.

    Round ``y ~ N(0, sigma**2 - r**2)`` to ``k`` with probability ``exp(-(k - y)**2 / (2 r**2)) / theta(y)``: what comes
    out has the probabilities of the discrete Gaussian but for a factor within 2**-170 of 1.
    """
    with mpmath.workdps(60):
        r = mpmath.mpf(worth._ROUNDING)
        s = mpmath.sqrt(sigma**2 - r**2)

        def theta(y: Any) -> Any:
            near = int(mpmath.nint(y))
            return mpmath.fsum(mpmath.exp(-((j - y) ** 2) / (2 * r**2)) for j in range(near - 45, near + 46))

        def term(y: Any) -> Any:
            return mpmath.npdf(y, 0, s) * mpmath.exp(-((k - y) ** 2) / (2 * r**2)) / theta(y)

        # The integrand is a Gaussian bump around ``peak`` times a function of period one, nearly constant: the
        # trapezoidal rule is exact to more digits than are looked at.
        peak, width, step = k * s**2 / sigma**2, s * r / sigma, mpmath.mpf(1) / 2
        reach = int(20 * width / step)
        found = step * mpmath.fsum(term(peak + step * i) for i in range(-reach, reach + 1))
        total = 1 + 2 * mpmath.fsum(mpmath.exp(-mpmath.mpf(j * j) / (2 * sigma**2)) for j in range(1, 20 * sigma))
        due = mpmath.exp(-mpmath.mpf(k * k) / (2 * sigma**2)) / total
        assert abs(found / due - 1) < mpmath.mpf(2) ** -170


@pytest.mark.parametrize(("sigma", "sensitivity", "times"), [(4.0, 4, 1), (8.0, 8, 4), (30.0, 6, 10)])
def test_what_is_claimed_covers_the_exact_loss_of_discrete_noise(sigma: float, sensitivity: int, times: int) -> None:
    """Against the library's privacy loss distribution of the discrete noise itself, on one coordinate."""
    loss = pld.privacy_loss_distribution.from_discrete_gaussian_mechanism(
        sigma, sensitivity=sensitivity, value_discretization_interval=1e-4, pessimistic_estimate=False
    )
    exact = loss.self_compose(times).get_epsilon_for_delta(DELTA)
    claimed = cost(segment(z=sigma / sensitivity, clip=float(sensitivity), times=times))
    assert exact * (1 - 1e-3) <= claimed
    assert claimed < 1.35 * exact


# --- Properties -------------------------------------------------------------------------------------------------------


@given(z=st.floats(0.5, 50), times=st.integers(1, 300), clip=st.floats(20, 1e5), mechanism=st.sampled_from(Mechanism))
@settings(max_examples=40, deadline=None)
def test_more_noise_costs_less_and_more_rounds_cost_more(
    z: float, times: int, clip: float, mechanism: Mechanism
) -> None:
    one = segment(mechanism, z=z, times=times, clip=clip, dimension=1000)
    assert cost(replace(one, noise_multiplier=1.2 * z)) < cost(one)
    assert cost(replace(one, max_participations=times + 1).over(times + 1)) > cost(one)
    if mechanism is not Mechanism.MATRIX:
        # No discrete noise is cheaper than the continuous noise of its deviation.
        assert cost(one) >= dpa.get_epsilon_gaussian(z / math.sqrt(times), DELTA) * (1 - 1e-9)


@given(budget=st.floats(0.5, 20), times=st.integers(1, 100), mechanism=st.sampled_from(Mechanism))
@settings(max_examples=20, deadline=None)
def test_calibration_meets_the_budget_from_below(budget: float, times: int, mechanism: Mechanism) -> None:
    one = segment(mechanism, times=times, clip=600.0, dimension=4000)
    z = calibrate(one, budget, DELTA)
    assert cost(replace(one, noise_multiplier=z)) <= budget
    assert cost(replace(one, noise_multiplier=z * 0.995)) > budget


def test_what_devices_say_of_their_clips_is_paid_for() -> None:
    plain, asking = segment(z=5.0), segment(z=5.0, flag_noise=10.0)
    # Andrew et al. 2021, theorem 1: 1 / z**2 = 1 / z_values**2 + 1 / (2 flag_noise)**2.
    together = 1 / math.sqrt(1 / 25 + 1 / (20**2 - 6.25))
    assert cost(plain) < cost(asking) == pytest.approx(dpa.get_epsilon_gaussian(together / math.sqrt(50), DELTA))
    z = calibrate(asking, 8.0, DELTA)
    assert z > calibrate(plain, 8.0, DELTA)
    with pytest.raises(ConfigError, match="flag_noise"):
        calibrate(segment(flag_noise=2.0, times=500), 1.0, DELTA)
    shared = segment(Mechanism.SKELLAM, z=5.0, flag_noise=10.0)
    assert cost(shared) > cost(segment(Mechanism.SKELLAM, z=5.0))


# --- The account of a run ---------------------------------------------------------------------------------------------


def test_rounds_cost_until_every_device_is_spent() -> None:
    one = segment(times=10)
    account, costs = Account(), []
    for number in range(1, 16):
        account = account.after(one, number)
        costs.append(account.epsilon(DELTA))
    assert len(account.segments) == 1
    assert costs[:10] == sorted(set(costs[:10]))
    # No device takes part an eleventh time.
    assert set(costs[10:]) == {costs[9]} == {cost(one.full())}


def test_a_separation_lets_rounds_pass_for_nothing() -> None:
    apart = segment(times=10, min_separation=4)
    account = Account()
    spent = []
    for number in range(1, 10):
        account = account.after(apart, number)
        spent.append(account.segments[0].participations)
    assert spent == [1, 1, 1, 1, 2, 2, 2, 2, 3]
    # Rounds without privacy in between let time pass as well.
    assert account.after(apart, 40).segments[0].participations == 10


def test_what_is_promised_at_most_counts_what_other_settings_cost_before() -> None:
    first, second = segment(z=5.0, times=50), segment(z=4.0, times=50)
    private = Privacy(
        mechanism=Mechanism.CENTRAL,
        clip=second.clip,
        noise_multiplier=4.0,
        max_participations=50,
        epsilon=cost(second),
        delta=DELTA,
    )
    account = Account()
    for number in range(1, 41):
        account = account.after(first, number)
    for number in range(41, 92):
        account = account.after(second, number)
        said = accounting.statement(private, account)
        assert said["epsilon"] <= said["epsilon_at_most"] * (1 + 1e-9)
    assert said["epsilon"] == pytest.approx(said["epsilon_at_most"])
    assert said["epsilon_at_most"] > private.epsilon


def test_another_key_does_not_inherit_the_separation() -> None:
    """A device that believes the old key no more has forgotten when it last took part, so it may do so at once."""
    old, new = (replace(segment(times=5, min_separation=4), signer=key) for key in (b"old", b"new"))
    account = Account().after(old, 1).after(old, 2).after(new, 3).after(new, 4)
    assert len(account.segments) == 1
    assert account.segments[0].participations == 2
    # With one key, the same rounds let a device in once.
    assert Account().after(old, 1).after(old, 2).after(old, 3).after(old, 4).segments[0].participations == 1
    # Its participations it has not forgotten.
    for number in range(5, 40):
        account = account.after(new, number)
    assert account.segments[0].participations == 5
    assert account.epsilon(DELTA) == cost(old.full())


def test_no_device_is_in_more_rounds_than_there_were() -> None:
    account = Account()
    for number in (1, 100, 200):
        account = account.after(segment(times=10, min_separation=4), number)
    assert account.segments[0].participations == 3


def test_changed_settings_close_a_mechanism_and_their_costs_add_up() -> None:
    first, second = segment(z=5.0), segment(z=4.0)
    account = Account().after(first, 1).after(first, 2).after(second, 3).after(first, 4)
    assert [each.rounds for each in account.segments] == [2, 1, 1]
    precision = 3 / 25 + 1 / 16
    assert account.epsilon(DELTA) == pytest.approx(dpa.get_epsilon_gaussian(1 / math.sqrt(precision), DELTA))
    mixed = Account().after(first, 1).after(segment(Mechanism.SKELLAM), 2)
    assert mixed.epsilon(DELTA) > Account().after(segment(Mechanism.SKELLAM), 2).epsilon(DELTA)
