from __future__ import annotations

from fleetfed.shared.mqtt import versions
from fleetfed.shared.mqtt.config import ConnectionConfig, Protocol
from fleetfed.shared.mqtt.versions import UNSUPPORTED_VERSION, VersionChoice


def choice(*, port: int = 1883, protocol: Protocol = Protocol.AUTO) -> VersionChoice:
    return VersionChoice(ConnectionConfig(host="localhost", port=port, client_id="d-1", protocol=protocol))


def test_explicit_refusal_is_remembered_for_this_broker_by_all() -> None:
    first = choice()
    assert first.version5()
    assert first.refused(UNSUPPORTED_VERSION)
    assert not first.version5()
    assert not choice().version5()
    assert choice(port=1884).version5()
    versions.forget()
    assert choice().version5()


def test_closing_counts_for_one_attempt() -> None:
    one = choice()
    assert one.closed()
    assert not one.version5()
    assert not one.closed()
    assert one.version5()
    assert one.closed()
    one.connected()
    assert one.version5()


def test_refusal_for_another_reason_changes_nothing() -> None:
    one = choice()
    assert not one.refused(0x87)
    assert one.version5()


def test_refused_twice_is_not_tried_at_once_again() -> None:
    one = choice()
    assert one.refused(UNSUPPORTED_VERSION)
    assert not one.refused(UNSUPPORTED_VERSION)


def test_unreachable_broker_is_asked_for_5_again() -> None:
    one = choice()
    one.closed()
    one.unreachable()
    assert one.version5()


def test_setting_decides() -> None:
    assert not choice(protocol=Protocol.V311).version5()
    five = choice(protocol=Protocol.V5)
    assert not five.closed()
    assert not five.refused(UNSUPPORTED_VERSION)
    assert five.version5()
