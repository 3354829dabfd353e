"""``fleetfed-device check``: what this device would contribute, without a broker and without sending anything."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from fleetfed.device import update
from fleetfed.device.config import DeviceConfig
from fleetfed.device.status import privacy, privacy_line
from fleetfed.device.store import Store
from fleetfed.device.trainer import Task, Trained, TrainingDeclinedError, make_trainer
from fleetfed.shared import dataset
from fleetfed.shared.aggregate.lanes import choose_lane_bits
from fleetfed.shared.aggregate.scheme import scheme_of
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.mqtt.tls import client_context
from fleetfed.shared.secure.split import body_size
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.wire.messages import Eligibility, Plan, Quantization, Training

_BITS = 4


def check(settings: DeviceConfig, identity: Identity) -> Iterator[str]:
    """Try everything that a round needs; yield a line for each part that works.

    Raises:
        ConfigError: the first part that does not, and what to do.
        StorageError: the state folder is damaged.
    """
    certificate = identity.certificate
    now = unix_ms()
    days = (certificate.not_after - now) / 86_400_000
    if not certificate.not_before - 300_000 <= now <= certificate.not_after:
        raise ConfigError(f"the certificate of {certificate.id} is not valid now ({days:.0f} days left): renew it")
    yield f"identity   {certificate.id} of site {certificate.site}, fleet {certificate.fleet}; {days:.0f} days left"
    connection = settings.broker.connection(client_id=certificate.id, identity=settings.identity)
    if connection.tls is not None:
        client_context(connection.tls)
    yield f"broker     {connection.host}:{connection.port}, {'TLS files load' if connection.tls else 'no TLS'}"
    trainer = make_trainer(settings)
    store = Store(settings.state)
    try:
        yield f"privacy    {privacy_line(privacy(store.account(certificate.fleet)))}"
        models = store.facts().models
        if not models:
            yield _without_model(settings)
            return
        model = models[0]
        card = store.card(model)
        yield f"model      {card.name} version {model.version}, {card.parameters} parameters, {card.file_bytes} bytes"
        yield f"data       {trainer.prepare(card)}"
        task = Task(
            training=Training(max_steps=1),
            eligibility=Eligibility(),
            card=card,
            model=store.model_path(model),
            rng=np.random.default_rng(),
            cancelled=lambda: False,
        )
        try:
            trained = trainer.train(task)
        except TrainingDeclinedError as error:
            raise ConfigError(f"one training step failed: {error}") from error
        yield f"training   {trained.steps} step on {trained.seen} examples, loss {trained.training_loss:.4f}"
        if trained.holdout_examples:
            share = trained.holdout_correct / trained.holdout_examples
            yield f"holdout    {share:.1%} of {trained.holdout_examples} right, loss {trained.holdout_loss:.4f}"
        yield _contribution(trained, card, model.version, model.sha256)
    finally:
        store.close()


def _without_model(settings: DeviceConfig) -> str:
    if settings.trainer:
        return "model      none yet; it comes with the first connection"
    data = dataset.load(settings.data)
    training, holdout = dataset.split(data, holdout=settings.data.holdout, seed=settings.data.seed)
    return (
        f"data       {len(training)} training and {len(holdout)} holdout examples of shape "
        f"{tuple(data.x.shape[1:])}, labels {data.y.min()} to {data.y.max()}\n"
        "model      none yet; it comes with the first connection"
    )


def _contribution(trained: Trained, card: ModelCard, version: int, sha256: bytes) -> str:
    """What the update of this one step would be, on a scale that fits it."""
    at, clips = 0, []
    for slot in card.tensors:
        part = trained.delta[at : at + slot.size]
        clips.append(max(4 * float(np.sqrt(np.mean(np.square(part)))), 1e-9))
        at += slot.size
    plan = Plan(
        round=1,
        model_version=version,
        model_sha256=sha256,
        dimension=card.parameters,
        quantization=Quantization(
            bits=_BITS,
            lane_bits=choose_lane_bits(_BITS, 1000),
            clips=tuple(clips),
            weight_cap=max(trained.examples, 1),
            error_feedback=False,
        ),
        opened=0,
        deadline=0,
        expires=0,
        nonce=bytes(16),
    )
    prepared = update.prepare(trained, plan, card, rng=np.random.default_rng(), residual=None)
    masked = body_size(scheme_of(plan, tuple(slot.size for slot in card.tensors)).ring.layout.n_words)
    norm = math.sqrt(float(np.dot(trained.delta, trained.delta)))
    return (
        f"update     {len(prepared.body)} bytes at {_BITS} bits ({4 * card.parameters} as float32), "
        f"weight {prepared.weight}, norm {norm:.4g}\n"
        f"masked     {masked} bytes in split mode, whatever was learned"
    )
