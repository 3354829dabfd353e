from __future__ import annotations

from pathlib import Path

import pytest

from fleetfed.broker.config import Bridge, BrokerConfig, Limits, load_config
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.mqtt.tls import TlsFiles


def write(folder: Path, text: str) -> Path:
    path = folder / "broker.toml"
    path.write_text(text)
    return path


def test_the_documented_example_is_read(tmp_path: Path) -> None:
    import fleetfed.broker.config as module

    assert module.__doc__ is not None
    example = "\n".join(line[4:] for line in module.__doc__.splitlines() if line.startswith("    ") or not line)
    assert load_config(write(tmp_path, example)) == BrokerConfig(
        host="0.0.0.0",
        port=8883,
        tls=TlsFiles(tmp_path / "ca.pem", tmp_path / "broker.pem", tmp_path / "broker.key", tmp_path / "crl.pem"),
        acl_file=tmp_path / "acl",
        persistence_dir=tmp_path / "state",
        limits=Limits(max_connections=2000),
        bridge=Bridge(
            host="mqtt.example.org",
            tls=TlsFiles(tmp_path / "bridge/ca.pem", tmp_path / "bridge/cert.pem", tmp_path / "bridge/key.pem"),
        ),
    )


def test_everything_has_a_default(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == BrokerConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "prot: no such setting"),
        ("port = '1883'", "port: expected int, found str"),
        ("port = true", "port: expected int, found bool"),
        ("port = 70000", "0 to 65535"),
        ("host = 7", "host: expected str, found int"),
        ("tls = 1", "tls: expected a table"),
        ("[tls]\nca = 'a'\ncert = 'b'", "tls.key: is missing"),
        ("[tls]\nca = 'a'\ncert = 'b'\nkey = 'c'\npassword = 'd'", "tls.password: no such setting"),
        ("[limits]\nmax_packets = 1", "limits.max_packets: no such setting"),
        ("[limits]\nmax_packet = 0", "positive number"),
        ("[limits]\nmax_packet = 10", "1024 bytes"),
        ("[limits]\nmax_inflight = 70000", "at most 65535"),
        ("host = '0.0.0.0'", r"needs \[tls\]"),
        ("host = 'broker.example'", r"needs \[tls\]"),
        ("plain_port = 0", "plain already"),
        ("port =", "broker.toml"),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path, text))
    assert "broker.toml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none"):
        load_config(tmp_path / "none")
