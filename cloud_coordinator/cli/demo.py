"""`fleetfed demo`: a whole fleet on this machine."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click

from fleetfed.cloud_coordinator.cli import output
from fleetfed.cloud_coordinator.demo.privacy import Level
from fleetfed.cloud_coordinator.demo.report import Report


@click.command(
    epilog=output.example(
        "fleetfed demo",
        "fleetfed demo --devices 20 --gateways 4 --tiers 2",
        "fleetfed demo --privacy helper",
        "fleetfed demo --metrics --keep",
        "fleetfed demo --model fedkeeper_cnn --data mnist.npz --split shards --rounds 10",
        "fleetfed demo --model wrist --data hmp.npz --devices 12",
    )
)
@click.option("--devices", type=click.IntRange(1, 500), default=10, show_default=True, help="Device processes.")
@click.option("--gateways", type=click.IntRange(1, 100), default=2, show_default=True, help="Gateways with devices.")
@click.option("--tiers", type=click.IntRange(1, 8), default=1, show_default=True, help="Levels of gateways.")
@click.option("--rounds", type=click.IntRange(1, 10_000), default=20, show_default=True)
@click.option("--target", type=click.FloatRange(0, 1), default=0.0, help="Stop at this accuracy.")
@click.option(
    "--model",
    default="digits",
    show_default=True,
    help="digits, fedkeeper_cnn, fedkeeper_dense, wrist, or the path of a .tflite with its .card beside it.",
)
@click.option("--data", default="", help="digits, or the path of mnist.npz or hmp.npz.  [default: what fits the model]")
@click.option(
    "--split",
    type=click.Choice(["dirichlet", "shards", "uniform"]),
    default="dirichlet",
    show_default=True,
    help="How examples are dealt; hmp.npz always gives one volunteer to each device.",
)
@click.option("--alpha", type=click.FloatRange(0, min_open=True), default=0.5, show_default=True, help="Of Dirichlet.")
@click.option("--per-device", type=click.IntRange(0), default=0, help="Most examples of a device; 0: the data's own.")
@click.option("--fraction", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--bits", type=click.IntRange(2, 8), default=4, show_default=True, help="Of a coordinate, up and down.")
@click.option("--epochs", type=click.IntRange(0, 1000), default=0, help="On each device and round; 0: the model's own.")
@click.option("--lr", "learning_rate", type=click.FloatRange(0), default=0.0, help="0: the model's own.")
@click.option("--optimizer", type=click.Choice(["sgd", "adam"]), help="Of the devices.  [default: the model's own]")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=1, show_default=True)
@click.option("--broker", type=click.Choice(["embedded", "mosquitto"]), default="embedded", show_default=True)
@click.option(
    "--privacy",
    type=click.Choice([level.value for level in Level]),
    help="plain: gateways read updates; split: neither they nor the coordinator can; helper: not even both together.  "
    "[default: split where every gateway has two devices]",
)
@click.option("--metrics", is_flag=True, help="Open a port for Prometheus on everybody but the devices, and say which.")
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/demo"),
    show_default=True,
    help="Everything goes here; an earlier demo's files are replaced.",
)
@click.option("--keep", is_flag=True, help="Leave the fleet running until Ctrl-C, to try other commands on it.")
@output.json_option
def demo(
    devices: int,
    gateways: int,
    tiers: int,
    rounds: int,
    target: float,
    model: str,
    data: str,
    split: str,
    alpha: float,
    per_device: int,
    fraction: float,
    bits: int,
    epochs: int,
    learning_rate: float,
    optimizer: str | None,
    seed: int,
    broker: str,
    privacy: str | None,
    metrics: bool,
    directory: Path,
    keep: bool,
    as_json: bool,
) -> int:
    """Run a whole fleet on this machine and watch it learn.

    Starts a broker with TLS, client certificates and an access list, the coordinator, gateways and devices, each a
    process with its own keys; trains on data that differs from device to device; ends with a report and a plot.
    """
    from fleetfed.cloud_coordinator.demo.live import screen
    from fleetfed.cloud_coordinator.demo.run import Options, run_demo

    options = Options(
        devices=devices,
        gateways=gateways,
        tiers=tiers,
        rounds=rounds,
        target=target,
        model=model,
        data=data,
        split=split,
        alpha=alpha,
        per_device=per_device,
        fraction=fraction,
        bits=bits,
        epochs=epochs,
        learning_rate=learning_rate,
        optimizer=optimizer or "",
        seed=seed,
        broker=broker,
        privacy=privacy or "",
        metrics=metrics,
        directory=directory,
    )

    def show(report: Report) -> None:
        if as_json:
            output.print_json(report.to_json())
        else:
            print("\n".join(summary(report, directory)), flush=True)

    try:
        asyncio.run(run_demo(options, screen(sys.stderr if as_json else sys.stdout), show, keep=keep))
    except (asyncio.CancelledError, KeyboardInterrupt):
        print(f"interrupted; everything is stopped, logs are in {directory / 'logs'}", file=sys.stderr)
        return output.EXIT_INTERRUPTED
    return 0


def summary(report: Report, directory: Path) -> list[str]:
    """The end of a demo in words."""
    accuracy = "-" if report.final_accuracy is None else f"{report.final_accuracy:.4f}"
    float32 = 4 * report.parameters
    lines = [
        "",
        f"Accuracy {accuracy} after {report.rounds} rounds; {report.seconds:.1f} s in all, "
        f"{report.seconds_per_round_median:.2f} s per round, of which {report.overhead_seconds_per_round_median:.2f} s "
        "were not training.",
        f"All {report.devices} devices hold the coordinator's exact file {report.model_sha256[:16]}.",
        report.who_learned_what,
        "",
        f"  {'':<28}{'FleetFed':>12}{'float32':>12}{'ratio':>8}",
        _compared("an update", report.update_bytes_mean, float32),
        _compared("a new model on its way down", report.patch_bytes_mean, float32),
        _compared("all devices, up, on the wire", report.wire_bytes_up, report.float32_bytes_up),
        _compared("all devices, down", report.wire_bytes_down, report.float32_bytes_down),
        "",
        f"Largest device process: {report.device_rss_mb_max:.0f} MB.",
        f"Report: {directory / 'report.json'}   plot: {directory / 'accuracy.png'}   logs: {directory / 'logs'}",
        "",
        "Next: fleetfed demo --keep                       and talk to the running fleet",
        "      fleetfed demo --devices 20 --tiers 2       a taller tree",
        "      fleetfed demo --alpha 0.1 --fraction 0.5   harder data, half of the devices per round",
        "      fleetfed keys init --fleet NAME            a fleet of your own",
    ]
    if report.rejected:
        counts = ", ".join(f"{reason} {count}" for reason, count in sorted(report.rejected.items()))
        lines.insert(3, f"Refused messages: {counts}.")
    return lines


def _compared(name: str, ours: float, theirs: float) -> str:
    ratio = f"{theirs / ours:.1f}x" if ours else "-"
    return f"  {name:<28}{output.size(ours):>12}{output.size(theirs):>12}{ratio:>8}"
