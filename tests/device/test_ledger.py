"""The privacy ledger's file: whole or not there, never fewer than were made, never quietly new."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from fleetfed_testing.device_driver import hash_of, plan
from fleetfed_testing.fragile_disk import FragileDisk, PowerCutError
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.device.disk import Disk
from fleetfed.device.ledger import Account, Ledger
from fleetfed.device.store import Store
from fleetfed.shared.errors import LocalProtocolError, StorageError
from fleetfed.shared.privacy.cost import participation, together, within
from fleetfed.shared.trust.policy import PrivacyFloor
from fleetfed.shared.wire.messages import DeclineReason
from fleetfed.shared.wire.privacy import Mechanism, Privacy


def noisy(most: int, apart: int = 1) -> Privacy:
    return Privacy(
        mechanism=Mechanism.SKELLAM,
        clip=10.0,
        noise_multiplier=1.0,
        max_participations=most,
        min_separation=apart,
        epsilon=1.0,
        delta=1e-6,
    )


def take_part(store: Store, round_: int, fleet: str = "demo") -> None:
    made = plan(round_, privacy=noisy(100))
    store.debit(fleet, store.account(fleet).debited(made, hash_of(round_), None))


def test_what_is_spent_is_there_after_a_restart_and_per_fleet(tmp_path: Path) -> None:
    store = Store(tmp_path)
    take_part(store, 3)
    take_part(store, 5)
    take_part(store, 4, "other")
    store.close()
    again = Store(tmp_path)
    once = participation(noisy(100), plan(3).dimension)
    assert again.account("demo") == Account(
        participations=2, rounds={"": 5}, last_plan=hash_of(5), most=100, cost=together(once, once)
    )
    assert again.account("other").participations == 1
    assert again.account("third") == Account()
    again.close()
    assert stat.S_IMODE((tmp_path / "ledger").stat().st_mode) == 0o600


@pytest.mark.parametrize("how", ["flipped", "cut", "empty"])
def test_a_damaged_ledger_stops_the_device_and_is_not_replaced(tmp_path: Path, how: str) -> None:
    store = Store(tmp_path)
    take_part(store, 1)
    store.close()
    path = tmp_path / "ledger"
    raw = path.read_bytes()
    path.write_bytes({"flipped": raw[:9] + bytes([raw[9] ^ 1]) + raw[10:], "cut": raw[:-1], "empty": b""}[how])
    before = path.read_bytes()
    with pytest.raises(StorageError, match=r"privacy ledger is damaged.*new identity"):
        Store(tmp_path)
    assert path.read_bytes() == before
    path.write_bytes(raw)
    Store(tmp_path).close()


def test_a_ledger_that_is_gone_or_older_stops_the_device(tmp_path: Path) -> None:
    store = Store(tmp_path)
    take_part(store, 1)
    older = (tmp_path / "ledger").read_bytes()
    take_part(store, 2)
    store.close()
    (tmp_path / "ledger").unlink()
    with pytest.raises(StorageError, match=r"with 0 participations where 2 were made.*new identity"):
        Store(tmp_path)
    assert not (tmp_path / "ledger").exists()
    (tmp_path / "ledger").write_bytes(older)
    with pytest.raises(StorageError, match="with 1 participations where 2 were made"):
        Store(tmp_path)


def test_a_folder_that_never_spent_anything_begins_with_an_empty_ledger(tmp_path: Path) -> None:
    """Also one of a program that knew no ledger."""
    store = Store(tmp_path)
    store.raise_floor(7)
    store.close()
    again = Store(tmp_path)
    assert again.account("demo") == Account()
    assert not (tmp_path / "ledger").exists()
    again.close()


def test_what_is_spent_is_never_given_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", disk=Disk(), spent=0)
    ledger.keep("demo", Account(participations=2, rounds={"": 5}))
    for less in (Account(participations=1, rounds={"": 6}), Account(participations=2, rounds={"": 4})):
        with pytest.raises(LocalProtocolError):
            ledger.keep("demo", less)
    assert ledger.account("demo").participations == 2


@pytest.mark.parametrize("lossy", [False, True])
def test_a_power_cut_at_every_step_of_a_debit(tmp_path: Path, lossy: bool) -> None:
    """Before or after; and whatever was there before the cut is there again."""
    steps = FragileDisk(lossy=lossy)
    whole = Store(tmp_path / "whole", disk=steps)
    take_part(whole, 1)
    first = steps.steps
    take_part(whole, 2)
    whole.close()
    seen = set()
    for cut in range(first, steps.steps):
        directory = tmp_path / str(cut)
        store = Store(directory, disk=FragileDisk(cut, lossy=lossy))
        take_part(store, 1)
        with pytest.raises(PowerCutError):
            take_part(store, 2)
        store.close()
        again = Store(directory)
        account = again.account("demo")
        seen.add(account.participations)
        if account.participations == 1:
            take_part(again, 2)
        assert again.account("demo").participations == 2
        assert again.account("demo").last_plan == hash_of(2)
        again.close()
        assert not list(directory.glob("*.new"))
    assert seen == {1, 2}


def test_rounds_of_a_coordinator_that_is_believed_no_more_stay_spent_but_keep_nobody_out(tmp_path: Path) -> None:
    """A thief numbers its round as high as numbers go; the separation from the rounds before it still holds."""
    honest, thief = b"h" * 16, b"t" * 16
    far = plan(2**62, privacy=noisy(100))
    store = Store(tmp_path)
    account = store.account("demo").debited(plan(5, privacy=noisy(100)), hash_of(5), None, honest)
    store.debit("demo", account)
    store.debit("demo", account.debited(far, b"f" * 32, None, thief))
    near, later = plan(7, privacy=noisy(100, 3)), plan(8, privacy=noisy(100, 3))
    stuck = store.account("demo").refusal(later, hash_of(8), None)
    assert stuck is not None
    assert stuck[0] is DeclineReason.TOO_SOON
    assert store.forget(lambda key: key == honest)
    assert not store.forget(lambda key: key == honest)
    store.close()
    again = Store(tmp_path)
    account = again.account("demo")
    assert account.participations == 2
    assert account.refusal(later, hash_of(8), None) is None
    assert account.refusal(near, hash_of(7), None) == (
        DeclineReason.TOO_SOON,
        "2 rounds after round 5, 3 are due",
    )
    again.close()


@settings(max_examples=200, deadline=None)
@given(
    asks=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 5), st.integers(1, 5)), max_size=40),
    floor=st.none() | st.builds(PrivacyFloor, max_participations=st.integers(1, 5), min_separation=st.integers(1, 5)),
)
def test_an_account_never_goes_beyond_what_any_plan_and_the_policy_allow(
    asks: list[tuple[int, int, int]], floor: PrivacyFloor | None
) -> None:
    account, rounds = Account(), []
    for round_, most, apart in asks:
        asked = plan(round_, privacy=noisy(most, apart))
        if account.refusal(asked, hash_of(round_), floor) is not None:
            continue
        again = account.last_plan == hash_of(round_)
        account = account.debited(asked, hash_of(round_), floor)
        if again:
            continue
        if floor is not None:
            most, apart = min(most, floor.max_participations), max(apart, floor.min_separation)
        assert account.participations == len(rounds) + 1 <= most
        assert not rounds or round_ - rounds[-1] >= apart
        rounds.append(round_)


@settings(max_examples=50, deadline=None)
@given(
    asks=st.lists(
        st.tuples(
            st.floats(0.5, 30),
            st.integers(1, 60),
            st.sampled_from(Mechanism),
            st.sampled_from([0.0, 5.0]),
            st.booleans(),
        ),
        max_size=30,
    )
)
def test_what_all_plans_cost_together_stays_within_the_policy(
    asks: list[tuple[float, int, Mechanism, float, bool]],
) -> None:
    """A coordinator may change noise and mechanism from plan to plan, each of which is honest about itself alone."""
    floor = PrivacyFloor(max_epsilon=4.0, max_delta=1e-6)
    account, costs = Account(), []
    for round_, (noise, most, mechanism, flags, wide) in enumerate(asks, 1):
        privacy = Privacy(
            mechanism=mechanism,
            clip=5000.0 if wide else 100.0,
            noise_multiplier=noise,
            max_participations=most,
            flag_noise=flags,
            epsilon=4.0,
            delta=1e-6,
        )
        asked = plan(round_, privacy=privacy)
        then = [*costs, participation(privacy, asked.dimension)]
        refused = account.refusal(asked, hash_of(round_), floor)
        if refused is None:
            costs = then
            account = account.debited(asked, hash_of(round_), floor)
        elif len(costs) < most:
            assert refused[0] is DeclineReason.PRIVACY_BUDGET
            assert not within(together(*then), 4.0, 1e-6)
        assert within(together(*costs), 4.0, 1e-6)
        assert account.participations == len(costs)


def test_the_hedge_secret_is_made_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "a")
    secret = store.hedge()
    assert len(secret) == 32
    assert store.hedge() == secret
    store.close()
    again = Store(tmp_path / "a")
    assert again.hedge() == secret
    path = tmp_path / "a" / "hedge"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(secret[:-1])
    with pytest.raises(StorageError, match="delete it"):
        again.hedge()
    again.close()
    other = Store(tmp_path / "b")
    assert other.hedge() != secret
    other.close()
