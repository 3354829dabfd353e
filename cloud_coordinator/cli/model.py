"""`fleetfed model`: build, publish, list, export and roll back models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click

from fleetfed.cloud_coordinator.cli import output
from fleetfed.cloud_coordinator.cli.control import ask, control_options
from fleetfed.cloud_coordinator.control.errors import CommandFailedError
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.wire.messages import Command

_PUBLISH_TIMEOUT = 120.0
_METRICS = ("accuracy", "loss")


@click.group(epilog=output.example("fleetfed model build cnn.keras --out models", "fleetfed model list"))
def model() -> None:
    """Build, publish and roll back models."""


@model.command(
    epilog=output.example(
        "fleetfed model build cnn.keras --out models",
        "fleetfed model build mypackage.nets:wrist --batch 32 --out models",
        "fleetfed model build digits --seed 7 --out models",
    )
)
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("models"), show_default=True)
@click.option("--batch", type=click.IntRange(1, 4096), help="Examples in one training step.  [default: 16]")
@click.option("--name", default="", help="Instead of the Keras model's own name.")
@click.option("--class-name", "class_names", multiple=True, help="Once for each class, in order.")
@click.option("--seed", type=click.IntRange(0), default=0, help="First weights of a ready model.")
@output.json_option
def build(
    source: str, out: Path, batch: int | None, name: str, class_names: tuple[str, ...], seed: int, as_json: bool
) -> None:
    """Build a trainable .tflite and its card.

    SOURCE is a .keras file, module:function, or the name of a ready model (digits, fedkeeper_cnn, fedkeeper_dense,
    wrist), which needs no TensorFlow.
    """
    from fleetfed.cloud_coordinator import zoo
    from fleetfed.shared.files import write_atomic
    from fleetfed.shared.model.card import ModelCard

    if source in zoo.NAMES:
        if batch is not None or name or class_names:
            raise click.UsageError(f"{source} is a ready model: it has its batch size, name and classes")
        ready = zoo.load(source, seed)
        model_file, card_file = out / f"{source}.tflite", out / f"{source}.card"
        write_atomic(model_file, ready.data)
        write_atomic(card_file, ready.card.encode())
    else:
        if importlib.util.find_spec("tensorflow") is None:
            raise ConfigError("building a model needs TensorFlow: pip install 'fleetfed[model]'")
        from fleetfed.cloud_coordinator import builder

        if not as_json:
            click.echo(f"Building {source}; TensorFlow takes a while to start …", err=True)
        paths = builder.build_to_directory(
            source,
            out,
            **({} if batch is None else {"batch": batch}),
            name=name,
            class_names=class_names,
        )
        model_file, card_file = paths.model, paths.card
    card = ModelCard.decode(card_file.read_bytes())
    facts: dict[str, Any] = {
        "model": model_file,
        "card": card_file,
        "name": card.name,
        "bytes": model_file.stat().st_size,
        "parameters": card.parameters,
        "input_shape": list(card.input_shape),
        "classes": card.classes,
        "batch": card.batch,
    }
    if as_json:
        output.print_json(facts)
    else:
        output.pairs(facts)


@model.command(epilog=output.example("fleetfed model publish models/cnn.tflite"))
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--card", type=click.Path(path_type=Path, dir_okay=False), help="Instead of FILE with .card at its end.")
@control_options
@output.json_option
def publish(file: Path, card: Path | None, config: Path, timeout: float, as_json: bool) -> None:
    """Make a model file the next version.

    FILE is read by the coordinator, so it must be a path on its machine.
    """
    arguments: dict[str, Any] = {"file": str(file.absolute())}
    if card is not None:
        arguments["card"] = str(card.absolute())
    _show(ask(config, Command.MODEL_PUBLISH, arguments, timeout=max(timeout, _PUBLISH_TIMEOUT)), as_json)


@model.command(name="list", epilog=output.example("fleetfed model list", "fleetfed model list --limit 5 --json"))
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="Newest first.")
@control_options
@output.json_option
def list_(limit: int, config: Path, timeout: float, as_json: bool) -> None:
    """List the versions of the model."""
    result = ask(config, Command.MODEL_LIST, {"limit": limit}, timeout=timeout)
    if as_json:
        output.print_json(result)
        return
    output.table(
        ("version>", "parent>", "name", "sha256", "devices>", *(f"{name}>" for name in _METRICS), "created"),
        (
            (
                row.get("version"),
                row.get("parent"),
                row.get("name"),
                _short(row.get("sha256")),
                row.get("contributors"),
                *(row.get("metrics", {}).get(name) for name in _METRICS),
                output.when(row.get("created", 0)),
            )
            for row in result.get("versions", [])
        ),
        empty="no version yet; publish one with `fleetfed model publish`",
    )


@model.command(epilog=output.example("fleetfed model show", "fleetfed model show 12"))
@click.argument("version", type=click.IntRange(1), required=False)
@control_options
@output.json_option
def show(version: int | None, config: Path, timeout: float, as_json: bool) -> None:
    """Show one version; without a number, the current one."""
    arguments = {} if version is None else {"version": version}
    _show(ask(config, Command.MODEL_SHOW, arguments, timeout=timeout), as_json)


@model.command(epilog=output.example("fleetfed model rollback 12"))
@click.argument("version", type=click.IntRange(1))
@control_options
@output.json_option
def rollback(version: int, config: Path, timeout: float, as_json: bool) -> None:
    """Publish an older version's file again, as a new version."""
    _show(ask(config, Command.MODEL_ROLLBACK, {"version": version}, timeout=max(timeout, _PUBLISH_TIMEOUT)), as_json)


@model.command(epilog=output.example("fleetfed model export --out model.tflite"))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="A new file.")
@click.option("--card/--no-card", default=True, help="Also write the card beside it.  [default: yes]")
@control_options
@output.json_option
def export(out: Path, card: bool, config: Path, timeout: float, as_json: bool) -> None:
    """Fetch the current model from the broker, check it, and write it to a file.

    The file infers under any TFLite runtime. Nothing but the broker has to be up.
    """
    import asyncio

    from fleetfed.cloud_coordinator.control.client import OperatorConfig
    from fleetfed.cloud_coordinator.control.model_client import fetch_model

    card_file = out.with_suffix(".card")
    for path in (out, card_file) if card else (out,):
        if path.exists():
            raise CommandFailedError(f"{path} exists; choose another name")
    got = asyncio.run(fetch_model(OperatorConfig.load(config), timeout=max(timeout, _PUBLISH_TIMEOUT)))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(got.data)
    if card:
        card_file.write_bytes(got.card)
    manifest = got.manifest
    facts = {
        "file": out,
        "card": card_file if card else None,
        "version": manifest.version,
        "name": manifest.name,
        "bytes": len(got.data),
        "sha256": manifest.sha256,
        "metrics": manifest.metrics,
    }
    if as_json:
        output.print_json(facts)
    else:
        output.pairs(facts)


def _short(value: object) -> str:
    return value.hex()[:12] if isinstance(value, bytes) else str(value or "-")[:12]


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.print_json(result)
    else:
        output.pairs(result, first=("version", "name", "sha256", "origin", "parent", "created", "metrics"))
