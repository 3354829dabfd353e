"""Another gateway that says that it serves the same site."""

from __future__ import annotations

import logging

import pytest

from fleetfed.gateway.rivals import Rivals
from fleetfed.shared.wire.messages import Life, Presence

OWN, OTHER = 5, 6


def said(serial: int, *, session: int = 1, life: Life = Life.READY) -> Presence:
    return Presence(life=life, session=session, since=1, serial=serial)


@pytest.fixture
def revoked() -> set[int]:
    return set()


@pytest.fixture
def rivals(revoked: set[int]) -> Rivals:
    return Rivals("north", OWN, revoked.__contains__)


@pytest.mark.parametrize("serial", [OWN, 0])
def test_our_own_word_and_one_of_nobody_tell_nothing(rivals: Rivals, serial: int) -> None:
    assert not rivals.heard(said(serial, session=9), live=True)
    assert rivals.describe() == ""


def test_each_life_of_another_is_answered_once(rivals: Rivals) -> None:
    assert rivals.heard(said(OTHER), live=True)
    assert not rivals.heard(said(OTHER), live=True)
    assert rivals.heard(said(OTHER, session=2), live=True)
    assert rivals.serials == (OTHER,)


def test_what_the_broker_kept_is_told_and_nothing_else(rivals: Rivals, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not rivals.heard(said(OTHER), live=False)
    assert "certificate 6" in caplog.text
    assert rivals.serials == ()


@pytest.mark.parametrize("life", [Life.LOST, Life.DISCONNECTED])
def test_it_is_gone_with_its_own_last_word_and_not_with_an_older_ones(rivals: Rivals, life: Life) -> None:
    rivals.heard(said(OTHER, session=2), live=True)
    rivals.heard(said(OTHER, session=1, life=life), live=True)
    assert rivals.serials == (OTHER,)
    rivals.heard(said(OTHER, session=2, life=life), live=True)
    assert rivals.serials == ()


def test_a_revoked_one_is_none_before_and_after(
    rivals: Rivals, revoked: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    rivals.heard(said(OTHER), live=True)
    revoked.add(OTHER)
    assert rivals.describe() == ""
    with caplog.at_level(logging.WARNING):
        assert not rivals.heard(said(OTHER, session=2), live=True)
    assert "whose certificate 6 was revoked" in caplog.text


def test_only_so_many_are_remembered(rivals: Rivals) -> None:
    for serial in range(100, 200):
        rivals.heard(said(serial), live=True)
    assert len(rivals.serials) == 16
