"""Objects in a bucket behind the folder: what a lost disk loses, and what a bucket that fails does."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest

from fleetfed.cloud_coordinator.storage.blobstore import BlobStore
from fleetfed.cloud_coordinator.storage.objectstore import ObjectStore, open_blobs
from fleetfed.shared.errors import ConfigError, StorageError
from fleetfed.shared.wire.envelope import digest


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A bucket of its own."""
    return f"memory://{uuid.uuid4()}/fleet" if request.param == "memory" else f"file://{tmp_path}/bucket/fleet"


def remote(url: str) -> dict[str, bytes]:
    bucket, prefix = fsspec.core.url_to_fs(url)
    return {str(path).rpartition("/")[2]: bucket.cat_file(path) for path in bucket.find(prefix)}


def test_what_a_lost_disk_had_comes_back_from_the_bucket(url: str, tmp_path: Path) -> None:
    names = ObjectStore(tmp_path / "one", url).put(b"model", b"x" * 300_000)
    shutil.rmtree(tmp_path / "one")
    other = ObjectStore(tmp_path / "two", url)
    assert all(other.has(name) for name in names)
    assert other.get(names[0]) == b"model"
    assert other.part(names[1], 299_998, 10) == b"xx"
    assert BlobStore(tmp_path / "two").get(names[0]) == b"model", "it is on the new disk now"


def test_an_object_is_in_the_bucket_before_it_is_here(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectStore(tmp_path / "blobs", url)
    bucket = fsspec.core.url_to_fs(url)[0]

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(type(bucket), "pipe_file", refuse)
    with pytest.raises(StorageError, match="no route; see to the bucket"):
        store.put(b"new")
    assert not BlobStore(tmp_path / "blobs").has(digest(b"new"))


def test_what_was_here_before_there_was_a_bucket_is_sent(url: str, tmp_path: Path) -> None:
    BlobStore(tmp_path / "blobs").put(b"old")
    (tmp_path / "blobs" / ".new-0123").write_bytes(b"half")
    store = ObjectStore(tmp_path / "blobs", url)
    assert remote(url) == {digest(b"old").hex(): b"old"}
    store.put(b"old", b"new")
    assert sorted(remote(url).values()) == [b"new", b"old"]


def test_collecting_and_removing_reach_the_bucket(url: str, tmp_path: Path) -> None:
    store = ObjectStore(tmp_path / "blobs", url)
    keep, drop, _ = store.put(b"keep", b"drop", b"other")
    store.remove(drop)
    assert not store.has(drop)
    assert store.collect({keep}) == 1
    assert list(remote(url).values()) == [b"keep"]
    assert store.get(keep) == b"keep"
    store.remove(drop)


def test_a_damaged_object_in_the_bucket_is_not_taken(url: str, tmp_path: Path) -> None:
    (name,) = ObjectStore(tmp_path / "one", url).put(b"content")
    bucket, prefix = fsspec.core.url_to_fs(url)
    bucket.pipe_file(f"{prefix}/{name.hex()}", b"other")
    other = ObjectStore(tmp_path / "two", url)
    assert not other.has(name)
    with pytest.raises(StorageError):
        other.get(name)


def test_what_is_asked_for_and_nowhere_is_missing(url: str, tmp_path: Path) -> None:
    store = ObjectStore(tmp_path / "blobs", url)
    assert not store.has(b"x" * 32)
    with pytest.raises(StorageError):
        store.part(b"x" * 32, 0, 1)


def test_settings_that_do_not_work_are_named(tmp_path: Path) -> None:
    assert type(open_blobs(tmp_path / "blobs", "", None)) is BlobStore
    with pytest.raises(ConfigError, match=r"storage\.blobs"):
        open_blobs(tmp_path / "blobs", "nonsense://bucket", None)
    options = tmp_path / "options.json"
    for text in ("[]", "{"):
        options.write_text(text)
        with pytest.raises(ConfigError, match=r"storage\.blobs_options"):
            open_blobs(tmp_path / "blobs", "memory://x", options)
    with pytest.raises(ConfigError, match="No such file"):
        open_blobs(tmp_path / "blobs", "memory://x", tmp_path / "nowhere.json")
    options.write_text(json.dumps({"skip_instance_cache": True}))
    assert isinstance(open_blobs(tmp_path / "blobs", "memory://x", options), ObjectStore)


@pytest.mark.slow
def test_a_server_that_speaks_s3(tmp_path: Path) -> None:
    """moto's server, where it and s3fs are installed (pip install s3fs 'moto[server]')."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = tmp_path / "options.json"
        given = {"key": "k", "secret": "s", "endpoint_url": f"http://{host}:{port}"}
        options.write_text(json.dumps(given))
        fsspec.filesystem("s3", **given).mkdir("fleets")
        names = open_blobs(tmp_path / "one", "s3://fleets/demo", options).put(b"model", b"x" * 300_000)
        other = open_blobs(tmp_path / "two", "s3://fleets/demo", options)
        assert other.get(names[0]) == b"model"
        assert other.part(names[1], 299_998, 10) == b"xx"
        assert not other.has(b"y" * 32)
        other.collect({names[0]})
        assert not open_blobs(tmp_path / "three", "s3://fleets/demo", options).has(names[1])
        options.write_text(json.dumps({**given, "endpoint_url": "http://127.0.0.1:9"}))
        with pytest.raises(StorageError, match="see to the bucket"):
            open_blobs(tmp_path / "four", "s3://fleets/demo", options)
    finally:
        server.stop()
