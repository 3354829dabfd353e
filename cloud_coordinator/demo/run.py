"""One demo from beginning to end: set up, start, watch, wait for every device's model, stop, report."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from fleetfed.cloud_coordinator import zoo
from fleetfed.cloud_coordinator.control.client import ControlClient
from fleetfed.cloud_coordinator.control.errors import CommandFailedError
from fleetfed.cloud_coordinator.demo import layout, privacy, report, sources, topology
from fleetfed.cloud_coordinator.demo.fleet import Fleet, stopping
from fleetfed.cloud_coordinator.demo.layout import COORDINATOR, Folder, Settings
from fleetfed.cloud_coordinator.demo.live import Screen
from fleetfed.cloud_coordinator.demo.privacy import Privacy
from fleetfed.cloud_coordinator.demo.report import Report, RoundFacts
from fleetfed.cloud_coordinator.demo.topology import Topology
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.files import write_atomic
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.wire.messages import Status

_CATCH_UP: Final = 60.0
"""Seconds for every device to get the last model."""
_FIRST_ROUND: Final = 120.0
"""Seconds until the coordinator must have said something."""
_RESTING: Final = frozenset({"finished", "paused"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `fleetfed demo` is asked for; see its help."""

    devices: int = 10
    gateways: int = 2
    tiers: int = 1
    rounds: int = 20
    target: float = 0.0
    model: str = "digits"
    data: str = ""
    split: str = "dirichlet"
    alpha: float = 0.5
    per_device: int = 0
    fraction: float = 1.0
    bits: int = 4
    epochs: int = 0
    learning_rate: float = 0.0
    optimizer: str = ""
    seed: int = 1
    broker: str = "embedded"
    privacy: str = ""
    metrics: bool = False
    directory: Path = Path("runs/demo")


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a ready model is trained here when nothing else is asked for."""

    data: str
    optimizer: str
    learning_rate: float
    epochs: int


_RECIPES: Final = {
    "digits": _Recipe("digits", "adam", 0.003, 5),
    "fedkeeper_cnn": _Recipe("mnist.npz", "adam", 0.001, 1),
    "fedkeeper_dense": _Recipe("mnist.npz", "adam", 0.001, 1),
    "wrist": _Recipe("hmp.npz", "adam", 0.001, 3),
}
_OTHER: Final = _Recipe("digits", "sgd", 0.05, 3)


async def run_demo(options: Options, screen: Screen, show: Callable[[Report], None], *, keep: bool = False) -> None:
    """Run a demo; it leaves ``report.json`` and ``accuracy.png`` in its folder.

    Args:
        options: what to run.
        screen: where to tell what happens.
        show: called with the report.
        keep: leave the fleet running after the report, until interrupted.

    Raises:
        ConfigError: options that do not fit together, or something missing.
        CommandFailedError: a process died, or a device did not end on the coordinator's file.
    """
    began = time.monotonic()
    tree = topology.plan(devices=options.devices, gateways=options.gateways, tiers=options.tiers)
    private = privacy.choose(options.privacy, tree, fraction=options.fraction)
    recipe = _RECIPES.get(options.model, _OTHER)
    deal = sources.Deal(
        devices=options.devices,
        split=options.split,
        alpha=options.alpha,
        seed=options.seed,
        per_device=options.per_device,
    )
    split = sources.load(options.data or recipe.data, deal)
    folder = Folder(options.directory)
    folder.prepare()
    try:
        fleet = Fleet(folder, tree, broker=options.broker, helper=private.helper, metrics=options.metrics)
        async with stopping(fleet):
            screen.say(
                f"Setting up keys, access list and settings: {options.devices} devices, {len(tree.gateways)} gateways, "
                f"the coordinator; all of it is in {_relative(folder.path)}"
            )
            card, port = await _set_up(fleet, options, recipe, split, private, screen)
            await fleet.start_roles()
            count = 2 + len(tree.gateways) + len(tree.devices) + private.helper
            screen.say(f"{count} processes are running; logs in {_relative(folder.logs)}")
            if fleet.listens:
                screen.say(_where(fleet))
            rounds = await _watch(fleet, port, screen, options)
            setup = rounds[0].opened / 1000 - time.time() + time.monotonic() - began
            await _catch_up(fleet, max(each.version for each in rounds))
            screen.close()

            def finish() -> Report:
                facts = {
                    "tiers": tree.tiers,
                    "model": card.name,
                    "data": split.source,
                    "model_bytes": card.file_bytes,
                    "broker": options.broker,
                    "tls": True,
                    "auth": "client certificates, access list, signed messages",
                    "privacy": private.level.value,
                    "who_learned_what": private.who_learned_what(),
                    "seconds": time.monotonic() - began,
                    "setup_seconds": setup,
                }
                return _finish(fleet, rounds, facts, card.parameters)

            if keep:
                show(finish())
                await _keep(fleet, screen)
        if not keep:
            # After the stop: then every process has written its last counts.
            show(finish())
    finally:
        screen.close()
        folder.release()


async def _set_up(
    fleet: Fleet, options: Options, recipe: _Recipe, split: sources.Split, private: Privacy, screen: Screen
) -> tuple[ModelCard, int]:
    """Write every file and start the broker; return the model's card and the broker's port."""
    folder, tree = fleet.folder, fleet.topology
    keyring = await asyncio.to_thread(layout.make_keys, folder, tree, helper=private.helper, now=unix_ms())
    starting = asyncio.create_task(fleet.start_broker(keyring))
    # The broker starts while the rest is written, so it must get a chance to begin.
    await asyncio.sleep(0)
    card = write_model(options, folder)
    sizes = write_data(split, folder, tree)
    settings = replace(_settings(options, recipe, folder, tree, private), listens=fleet.listens)
    port = await starting
    layout.write_roles(folder, tree, settings, port=port, helper=private.helper)
    if private.note:
        screen.say(private.note)
    screen.say(
        f"{split.source}: {sum(sizes)} examples on {len(sizes)} devices ({min(sizes)} to {max(sizes)} each), "
        f"{split.how}; {len(split.validation)} for validation"
    )
    screen.say(
        f"Model {card.name}: {card.parameters:,} parameters. The {options.broker} broker listens on port {port} with "
        "TLS, client certificates and an access list"
    )
    return card, port


def _finish(fleet: Fleet, rounds: list[RoundFacts], facts: Mapping[str, Any], parameters: int) -> Report:
    folder = fleet.folder
    result = report.build(
        rounds=rounds,
        devices=fleet.statuses("devices"),
        gateways=fleet.statuses("gateways"),
        coordinator=folder.status(COORDINATOR),
        facts=facts,
        parameters=parameters,
    )
    layout.write_json(folder.path / "report.json", result.to_json())
    report.plot(result, folder.path / "accuracy.png")
    if not result.identical:
        raise CommandFailedError(_different(result))
    return result


def write_model(options: Options, folder: Folder) -> ModelCard:
    """Put the model and its card into the folder; return the card.

    Raises:
        ConfigError: there is no such model, or no card beside the file.
    """
    model, card_file = folder.path / "model.tflite", folder.path / "model.card"
    if options.model in zoo.NAMES:
        ready = zoo.load(options.model, options.seed)
        data, encoded = ready.data, ready.card.encode()
    else:
        source = Path(options.model)
        try:
            data, encoded = source.read_bytes(), source.with_suffix(".card").read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{error.filename}: {error.strerror}; --model takes {', '.join(zoo.NAMES)}, or a .tflite with its "
                ".card beside it, as `fleetfed model build` makes them"
            ) from error
    write_atomic(model, data)
    write_atomic(card_file, encoded)
    return ModelCard.decode(encoded)


def write_data(split: sources.Split, folder: Folder, tree: Topology) -> list[int]:
    """Give every device its own examples and the coordinator the validation set; return the devices' sizes."""
    for place, examples in zip(tree.devices, split.devices, strict=True):
        examples.save(folder.role(place.id) / "data.npz")
    split.validation.save(folder.role(COORDINATOR) / "validation.npz")
    return [len(examples) for examples in split.devices]


def _settings(options: Options, recipe: _Recipe, folder: Folder, tree: Topology, private: Privacy) -> Settings:
    return Settings(
        model=folder.path / "model.tflite",
        validation=folder.role(COORDINATOR) / "validation.npz",
        data={place.id: {"path": "data.npz", "holdout": 0.1, "seed": options.seed} for place in tree.devices},
        rounds={
            "rounds": options.rounds,
            "target_accuracy": options.target,
            "start_when": len(tree.devices),
            "fraction": options.fraction,
            "quorum_minimum": max(1, math.floor(options.fraction * len(tree.devices) / 2)),
            "deadline": 240.0,
            "expires": 300.0,
            "training": {
                "epochs": options.epochs or recipe.epochs,
                "optimizer": options.optimizer or recipe.optimizer,
                "learning_rate": options.learning_rate or recipe.learning_rate,
            },
            **private.rounds(tree),
        },
        tables={
            "clips": {"bits": options.bits, "first_bits": max(8, options.bits)},
            "patch": {"bits": options.bits},
        },
        device={"run": {"seed": options.seed}},
    )


async def _watch(fleet: Fleet, port: int, screen: Screen, options: Options) -> list[RoundFacts]:
    """Follow the rounds until no more are to come; return them."""
    rounds: list[RoundFacts] = []
    last = 0
    async with ControlClient(fleet.operator(layout.WATCHER, port)) as client:
        statuses = client.watch()
        while True:
            try:
                async with asyncio.timeout(None if rounds else _FIRST_ROUND):
                    status = await anext(statuses)
            except TimeoutError:
                raise CommandFailedError(
                    f"no round in {_FIRST_ROUND:g} s; look into {_relative(fleet.folder.logs / 'coordinator.log')}"
                ) from None
            for entry in status.history:
                if int(entry["round"]) > last:
                    last = int(entry["round"])
                    up, down = _wire(fleet)
                    rounds.append(report.facts(entry, wire_up=up, wire_down=down))
                    screen.round(rounds[-1])
            screen.progress(_doing(status, options))
            if status.state in _RESTING and rounds:
                return rounds


def _wire(fleet: Fleet) -> tuple[int, int]:
    wires: list[Mapping[str, int]] = [status.get("wire", {}) for status in fleet.statuses("devices").values()]
    return sum(wire.get("sent", 0) for wire in wires), sum(wire.get("received", 0) for wire in wires)


def _doing(status: Status, options: Options) -> str:
    if status.state == "collecting":
        return f"round {status.round} of {options.rounds}: {status.accepted} of {status.expected} devices"
    return f"round {status.round} of {options.rounds}: {status.state}"


async def _catch_up(fleet: Fleet, version: int) -> None:
    """Wait until every device has written that it holds the last version, and it is the coordinator's file."""
    deadline = time.monotonic() + _CATCH_UP
    while time.monotonic() < deadline:
        ours = fleet.folder.status(COORDINATOR)
        held = [status.get("model_sha256") for status in fleet.statuses("devices").values()]
        if ours.get("model_version") == version and all(digest == ours["model_sha256"] for digest in held):
            return
        # Processes tell each other through files here: there is no event to wait for.
        await asyncio.sleep(0.05)


def _where(fleet: Fleet) -> str:
    """Where the metrics are, for people; a file says it to Prometheus."""
    path = layout.write_targets(fleet.folder, fleet.topology, fleet.listens)
    pages = "\n".join(f"  {name:<14} http://{listen}/metrics" for name, listen in fleet.listens.items())
    return f"Metrics, and for Prometheus' file_sd_configs in {_relative(path)}:\n{pages}"


async def _keep(fleet: Fleet, screen: Screen) -> None:
    config = _relative(fleet.folder.path / "operator.toml")
    screen.say(
        f"The fleet goes on running. In another terminal: fleetfed fleet list --config {config}\n"
        f"  fleetfed round start --rounds 5 --config {config}\n"
        "Ctrl-C stops it."
    )
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Here Ctrl-C is the proper end: the report is still to come.
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    await stopped.wait()


def _different(result: Report) -> str:
    wrong = sorted(name for name, digest in result.device_model_sha256.items() if digest != result.model_sha256)
    return (
        f"{len(wrong)} of {result.devices} devices do not hold the coordinator's model {result.model_sha256[:12]}: "
        f"{', '.join(wrong[:10])}; their logs say why"
    )


def _relative(path: Path) -> Path:
    with contextlib.suppress(ValueError):
        return path.relative_to(Path.cwd())
    return path
