"""The key folder: what it issues loads, connects and can be revoked; nothing is ever overwritten."""

from __future__ import annotations

import json
import socket
import ssl
import stat
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from fleetfed.broker.acl import Access, parse_acl
from fleetfed.broker.render import Uplink, render_acl
from fleetfed.broker.tls import server_context
from fleetfed.cloud_coordinator.keys.inventory import inventory_of
from fleetfed.cloud_coordinator.keys.keyring import Keyring, MemberRole, NewMember
from fleetfed.cloud_coordinator.keys.pki import Listener
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError, RejectReason, RemoteProtocolError, StorageError
from fleetfed.shared.mqtt.tls import TlsFiles, client_context
from fleetfed.shared.mqtt.tls import TlsFiles as BrokerTls
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.verifier import Verifier
from fleetfed.shared.wire.envelope import MessageKind
from fleetfed.shared.wire.messages import Revocations


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return Keyring.create(tmp_path / "keys", "demo", now=unix_ms())


def device(name: str, site: str = "north") -> NewMember:
    return NewMember(id=name, role=MemberRole.DEVICE, site=site)


def tls_files(keyring: Keyring, member: str) -> TlsFiles:
    folder = keyring.identity_folder(member) / "tls"
    return TlsFiles(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")


def test_an_issued_identity_loads_and_its_signatures_are_believed(keyring: Keyring) -> None:
    keyring.issue([device("d-01"), NewMember(id="op", role=MemberRole.OPERATOR, owner="ward-3")], now=unix_ms())
    one = Identity.load(keyring.identity_folder("d-01"), role=Role.DEVICE)
    two = Identity.load(keyring.identity_folder("op"), role=Role.OPERATOR)
    assert (one.certificate.site, two.certificate.site, two.certificate.owner) == ("north", "_", "ward-3")
    assert one.certificate.serial != two.certificate.serial
    assert two.verifier().certificate(one.encoded_certificate, now=unix_ms()).id == "d-01"


def test_private_files_are_readable_by_their_owner_alone(keyring: Keyring) -> None:
    keyring.issue([device("d-01")], now=unix_ms())
    folder = keyring.identity_folder("d-01")
    private = [keyring.directory / "authority.key", folder / "signing.key", folder / "tls" / "key.pem"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in private] == [0o600] * 3


def test_tls_works_between_issued_broker_and_member(keyring: Keyring) -> None:
    keyring.issue([NewMember(id="broker", role=MemberRole.BROKER, hosts=("localhost",)), device("d-01")], now=unix_ms())
    assert handshake(keyring, "d-01") == "d-01"


def test_a_revoked_member_fails_the_handshake_and_the_verifier(keyring: Keyring) -> None:
    keyring.issue([device("d-01"), device("d-02")], now=unix_ms())
    keyring.revoke(["d-01"], now=unix_ms())
    keyring.issue([NewMember(id="broker", role=MemberRole.BROKER, hosts=("localhost",))], now=unix_ms())
    with pytest.raises(ssl.SSLError):
        handshake(keyring, "d-01")
    assert handshake(keyring, "d-02") == "d-02"

    encoded = keyring.revocations()
    assert encoded is not None
    verifier = Identity.load(keyring.identity_folder("d-02")).verifier()
    news, _, signer = verifier.open(encoded, Revocations, kind=MessageKind.REVOCATIONS, now=unix_ms())
    assert signer.role is Role.AUTHORITY
    assert verifier.revoke(news)
    revoked = Identity.load(keyring.identity_folder("d-01"))
    with pytest.raises(RemoteProtocolError) as caught:
        verifier.certificate(revoked.encoded_certificate, now=unix_ms())
    assert caught.value.reason is RejectReason.REVOKED


def handshake(keyring: Keyring, member: str) -> str:
    """Common name that a broker sees; raises what the client sees."""
    broker = keyring.identity_folder("broker") / "tls"
    server = server_context(BrokerTls(broker / "ca.pem", broker / "cert.pem", broker / "key.pem", broker / "crl.pem"))
    client = client_context(tls_files(keyring, member))
    ours, theirs = socket.socketpair()
    seen: list[str] = []

    def serve() -> None:
        with theirs:
            try:
                with server.wrap_socket(theirs, server_side=True) as secure:
                    subject = secure.getpeercert()["subject"]  # type: ignore[index]
                    seen.extend(value for part in subject for name, value in part if name == "commonName")
                    secure.sendall(b"!")
            except ssl.SSLError:
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with ours, client.wrap_socket(ours, server_hostname="localhost") as secure:
            assert secure.recv(1) == b"!"
    finally:
        thread.join()
    return seen[0]


def test_revocation_lists_grow_and_never_go_back(keyring: Keyring) -> None:
    keyring.issue([device(f"d-{n}") for n in range(3)], now=unix_ms())
    verifier = Identity.load(keyring.identity_folder("d-2")).verifier()
    versions = []
    for name in ("d-0", "2"):
        keyring.revoke([name], now=unix_ms())
        encoded = keyring.revocations()
        assert encoded is not None
        news, _, _ = verifier.open(encoded, Revocations, kind=MessageKind.REVOCATIONS, now=unix_ms())
        assert verifier.revoke(news)
        versions.append((news.version, news.serials))
    assert versions == [(1, (1,)), (2, (1, 2))]


def test_a_crash_between_register_and_lists_is_made_good(keyring: Keyring) -> None:
    keyring.issue([device("d-0"), device("d-1")], now=unix_ms())
    keyring.revoke(["d-0"], now=unix_ms())
    (keyring.directory / "revocations.bin").unlink()
    with pytest.raises(ConfigError, match="revoked already"):
        keyring.revoke(["d-0"], now=unix_ms())
    assert keyring.revocations() is not None


def test_a_revoked_id_may_be_issued_again_once_its_folder_is_gone(keyring: Keyring) -> None:
    keyring.issue([device("d-0")], now=unix_ms())
    keyring.revoke(["d-0"], now=unix_ms())
    with pytest.raises(ConfigError, match="move it away"):
        keyring.issue([device("d-0")], now=unix_ms())
    folder = keyring.identity_folder("d-0")
    folder.rename(folder.with_name("d-0.old"))
    keyring.issue([device("d-0")], now=unix_ms())
    keyring.revoke(["d-0"], now=unix_ms())
    assert [member.revoked > 0 for member in keyring.members] == [True, True]


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (device("D 1"), "1 to 48"),
        (device("d-1", site="_"), "needs a site"),
        (NewMember(id="op", role=MemberRole.OPERATOR, site="north"), "leave --site out"),
        (NewMember(id="b", role=MemberRole.BROKER), "--host"),
        (NewMember(id="g", role=MemberRole.GATEWAY, site="north", upstream="north"), "above itself"),
        (NewMember(id="g-2", role=MemberRole.GATEWAY, site="taken"), "served by g-1"),
        (device("g-1"), "has an identity already"),
    ],
)
def test_what_cannot_be_granted_leaves_no_trace(keyring: Keyring, wish: NewMember, words: str) -> None:
    keyring.issue([NewMember(id="g-1", role=MemberRole.GATEWAY, site="taken")], now=unix_ms())
    before = sorted(path for path in keyring.directory.rglob("*"))
    with pytest.raises(ConfigError, match=words):
        keyring.issue([device("d-9"), wish], now=unix_ms())
    assert sorted(path for path in keyring.directory.rglob("*")) == before
    assert [member.id for member in keyring.members] == ["g-1"]


def test_keys_are_never_overwritten(keyring: Keyring) -> None:
    before = (keyring.directory / "authority.key").read_bytes()
    with pytest.raises(ConfigError, match="never overwritten"):
        Keyring.create(keyring.directory, "demo", now=unix_ms())
    assert (keyring.directory / "authority.key").read_bytes() == before


def test_damage_is_named(keyring: Keyring, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keys init"):
        Keyring.load(tmp_path / "elsewhere")
    path = keyring.directory / "members.json"
    path.write_text('{"members": [{"id": "d-1"}]}')
    with pytest.raises(StorageError, match="restore it"):
        Keyring.load(keyring.directory).issue([device("d-1")], now=unix_ms())
    path.write_text(json.dumps({"members": []}))
    (keyring.directory / "fleet.toml").write_text("fleet = 1")
    with pytest.raises(StorageError):
        Keyring.load(keyring.directory)


def test_the_register_survives_a_reload(keyring: Keyring) -> None:
    issued = keyring.issue([device("d-1"), device("d-2")], now=unix_ms())
    again = Keyring.load(keyring.directory)
    assert [asdict(member) for member in again.members] == [asdict(member) for member in issued]


def test_the_access_list_follows_the_register(keyring: Keyring) -> None:
    keyring.issue(
        [
            NewMember(id="c", role=MemberRole.COORDINATOR),
            NewMember(id="op", role=MemberRole.OPERATOR),
            NewMember(id="g-area", role=MemberRole.GATEWAY, site="area"),
            NewMember(id="g-north", role=MemberRole.GATEWAY, site="north", upstream="area"),
            device("d-1"),
            device("d-2"),
        ],
        now=unix_ms(),
    )
    keyring.revoke(["d-2"], now=unix_ms())
    inventory = inventory_of(keyring)
    assert inventory.sites == {"_": "c", "area": "g-area", "north": "g-north"}
    assert {name: member.site for name, member in inventory.members.items()} == {
        "g-area": "_",
        "g-north": "area",
        "d-1": "north",
    }
    acl = parse_acl(render_acl(inventory))

    def may(who: str, access: Access, topic: str) -> bool:
        return acl.allows(access, topic, username=who, client_id=who)

    assert may("d-1", Access.WRITE, "ff1/demo/north/d/d-1/up/update")
    assert not may("d-2", Access.WRITE, "ff1/demo/north/d/d-2/up/update")
    assert may("g-north", Access.WRITE, "ff1/demo/area/g/g-north/up/propose")
    assert not may("g-north", Access.WRITE, "ff1/demo/_/g/g-north/up/propose")
    only = inventory_of(keyring, sites={"north"})
    assert only.sites == {"north": "g-north"}
    assert only.operators == ()
    with pytest.raises(ConfigError, match="served by nobody"):
        inventory_of(keyring, sites={"west"})


def test_what_an_enrolment_service_revoked_stays_on_the_authoritys_list(tmp_path: Path) -> None:
    keyring = Keyring.create(tmp_path / "keys", "demo", now=unix_ms())
    keyring.issue([NewMember(id="d-1", role=MemberRole.DEVICE, site="north")], now=unix_ms())
    theirs = 5 << 32 | 7
    keyring.revoke((), now=unix_ms(), in_force=Revocations(version=8, serials=(theirs,)))
    assert listed(keyring) == Revocations(version=9, serials=(theirs,))
    keyring.revoke((), now=unix_ms(), in_force=Revocations(version=9, serials=(theirs,)))
    assert listed(keyring).version == 9
    keyring.revoke(["d-1"], now=unix_ms(), in_force=Revocations(version=11, serials=(theirs, theirs + 1)))
    (member,) = keyring.members
    assert listed(keyring).serials == (member.serial, theirs, theirs + 1)
    assert listed(keyring).version > 11


def test_an_enroller_has_a_server_certificate_and_its_key_is_pinned_in_what_is_issued_later(tmp_path: Path) -> None:
    keyring = Keyring.create(tmp_path / "keys", "demo", now=unix_ms())
    with pytest.raises(ConfigError, match="--host"):
        keyring.issue([NewMember(id="enroller", role=MemberRole.ENROLLER)], now=unix_ms())
    keyring.issue([NewMember(id="enroller", role=MemberRole.ENROLLER, hosts=("localhost",))], now=unix_ms())
    keyring.issue([NewMember(id="g", role=MemberRole.GATEWAY, site="north")], now=unix_ms())
    enroller = Identity.load(keyring.identity_folder("enroller"), role=Role.ENROLLER)
    assert Identity.load(keyring.identity_folder("g")).enrollers == (enroller.key.public,)
    assert [(each.public_key, each.roles) for each in keyring.authorities()] == [
        (keyring.authority_key, frozenset(Role)),
        (enroller.key.public, frozenset({Role.DEVICE})),
    ]
    keyring.revoke(["enroller"], now=unix_ms())
    assert len(keyring.authorities()) == 1


def test_a_helper_is_a_member_of_the_clouds_site(keyring: Keyring) -> None:
    members = [NewMember(id="c", role=MemberRole.COORDINATOR), NewMember(id="h-two", role=MemberRole.HELPER)]
    keyring.issue(members, now=unix_ms())
    certificate = Identity.load(keyring.identity_folder("h-two"), role=Role.HELPER).certificate
    assert (certificate.role, certificate.site) == (Role.HELPER, "_")
    acl = parse_acl(render_acl(inventory_of(keyring)))
    assert acl.allows(Access.WRITE, "ff1/demo/_/h/h-two/up/key", username="h-two", client_id="h-two")
    keyring.revoke(["h-two"], now=unix_ms())
    assert "h-two" not in inventory_of(keyring).members


def listed(keyring: Keyring) -> Revocations:
    message = keyring.revocations()
    assert message is not None
    verifier = Verifier("demo", keyring.authority_key)
    return verifier.open(message, Revocations, kind=MessageKind.REVOCATIONS, now=unix_ms())[0]


def bridged(keyring: Keyring) -> None:
    keyring.issue(
        [
            NewMember(id="c-main", role=MemberRole.COORDINATOR),
            NewMember(id="g-north", role=MemberRole.GATEWAY, site="north"),
            NewMember(id="g-south", role=MemberRole.GATEWAY, site="south"),
            NewMember(id="b-north", role=MemberRole.BRIDGE, site="north"),
        ],
        now=unix_ms(),
    )


def test_a_bridge_has_a_tls_certificate_for_the_cloud_and_signs_nothing(keyring: Keyring) -> None:
    bridged(keyring)
    folder = keyring.identity_folder("b-north")
    assert [path.name for path in folder.iterdir()] == ["tls"]
    cloud = NewMember(id="broker", role=MemberRole.BROKER, hosts=("localhost",), listener=Listener.CLOUD)
    keyring.issue([cloud], now=unix_ms())
    assert handshake(keyring, "b-north") == "b-north"


def test_a_bridge_is_listed_at_both_of_its_ends(keyring: Keyring) -> None:
    bridged(keyring)
    above, below = inventory_of(keyring, sites={"_"}), inventory_of(keyring, sites={"north"})
    assert (above.bridges, above.uplinks) == ({"b-north": "g-north"}, {})
    assert (below.bridges, below.uplinks) == ({}, {"b-north": Uplink("g-north", "_")})
    for whole in (inventory_of(keyring), inventory_of(keyring, sites={"south"})):
        assert not whole.bridges
        assert not whole.uplinks
    keyring.revoke(["b-north"], now=unix_ms())
    assert not inventory_of(keyring, sites={"_"}).bridges
    assert keyring.revocations() is not None


def test_a_site_has_one_bridge(keyring: Keyring) -> None:
    bridged(keyring)
    with pytest.raises(ConfigError, match="site north has the bridge b-north already"):
        keyring.issue([NewMember(id="b-2", role=MemberRole.BRIDGE, site="north")], now=unix_ms())
    with pytest.raises(ConfigError, match="a bridge needs a site"):
        keyring.issue([NewMember(id="b-2", role=MemberRole.BRIDGE)], now=unix_ms())
