"""A site with a broker of its own, whose way to the cloud is cut in the middle of a round."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from fleetfed_testing.local_fleet import LocalFleet, prepared
from fleetfed_testing.proxies import Proxy

from fleetfed.cloud_coordinator.demo import layout
from fleetfed.cloud_coordinator.demo.layout import BROKER, HOST, toml

SITE_BROKER = "broker-north"


def change(path: Path, **tables: Any) -> None:
    """Put tables in the place of those of the same name in a settings file."""
    path.write_text(toml({**tomllib.loads(path.read_text()), **tables}))


def give_the_site_its_own_broker(fleet: LocalFleet, uplink: int) -> int:
    """Settings for a second broker that north's members use; only the gateway knows the way up, at port ``uplink``."""
    port = layout.free_port()
    cloud = fleet.folder.config(BROKER)
    place = fleet.folder.role(SITE_BROKER)
    place.mkdir()
    (place / "acl").write_bytes((cloud.parent / "acl").read_bytes())
    (place / "broker.toml").write_bytes(cloud.read_bytes())
    change(place / "broker.toml", port=port)
    site = {"host": HOST, "port": port, "reconnect_cap": 0.5}
    up = {"site": "_", "broker": {"host": HOST, "port": uplink, "reconnect_cap": 0.5}}
    change(fleet.folder.config("g-north"), broker=site, upstream=up)
    for name in fleet.devices:
        change(fleet.folder.config(name), broker=site)
    return port


async def test_a_site_that_is_cut_off_goes_on_and_delivers_afterwards(tmp_path: Path) -> None:
    async with prepared(tmp_path, devices=2) as fleet:
        fleet.lay_out()
        with Proxy(fleet.port) as uplink:
            give_the_site_its_own_broker(fleet, uplink.port)
            await fleet.start_broker()
            await fleet.start_broker(SITE_BROKER)
            for name in ("coordinator", "g-north", *fleet.devices):
                await fleet.fleet.start_role(name)
            await fleet.connect()
            fleet.hold()
            await fleet.begin()
            for name in fleet.devices:
                await fleet.training(name)

            uplink.target = layout.free_port()  # nobody listens there: the way is cut
            uplink.cut()
            fleet.release()
            for name in fleet.devices:
                await fleet.has_a_receipt(name)  # the site takes updates while the cloud is away
            assert all(not status.history for status in fleet.statuses)

            uplink.target = fleet.port
            fact = await fleet.finished()
            assert (fact["outcome"], fact["contributors"]) == ("committed", 2)
            await fleet.held_by_all(2)
