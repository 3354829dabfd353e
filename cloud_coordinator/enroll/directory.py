"""The service's word in the fleet's trust metadata: the head of its log, and which revocation list is the newest.

It is the ``devices`` delegation of TUF, signed by the service's key, and ends after a week: a member that is kept from
it notices. The coordinator takes it with the owners' part and signs both as current.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from fleetfed.cloud_coordinator.enroll.enroller import DAY, Enroller
from fleetfed.cloud_coordinator.keys import authoring
from fleetfed.shared.errors import ConfigError, RemoteProtocolError
from fleetfed.shared.trust import files, tuf
from fleetfed.shared.trust.tuf import Targets
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.trust import MAX_BUNDLE, TrustBundle

DAYS: Final = 7


def sign_directory(enroller: Enroller, owners: Path, *, now: int, days: int = DAYS) -> bytes:
    """The owners' part of a bundle, as `fleetfed-enroll import` copied it, with the service's word in it.

    Args:
        enroller: signs.
        owners: the file.
        now: unix milliseconds.
        days: validity.

    Raises:
        ConfigError: the fleet has no metadata, or its owners do not list this service.
    """
    try:
        data = owners.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{owners}: the fleet has no trust metadata, or `fleetfed-enroll import` is due") from None
    except OSError as error:
        raise ConfigError(f"{owners}: {error.strerror}") from error
    try:
        bundle = codec.decode(TrustBundle, data, limit=MAX_BUNDLE)
        listed = tuf.keys_of(tuf.parse(Targets, bundle.targets).signed, tuf.DEVICES)
    except RemoteProtocolError as error:
        raise ConfigError(f"{owners}: {error}; run `fleetfed-enroll import` again") from error
    if enroller.identity.key.id not in listed:
        raise ConfigError("the owners do not list this service yet: they sign with `fleetfed keys sign`, then import")
    metadata, directory = authoring.devices(enroller.next_directory(), now + days * DAY, enroller.directory())
    tuf.sign(metadata, enroller.identity.key)
    named = {**bundle.files, files.DIRECTORY: directory}
    return codec.encode(replace(bundle, devices=metadata.to_bytes(), files=named))
