"""The coordinator's settings, as ``coordinator.toml`` gives them.

Example::

    identity = "identity"
    state = "state"
    autostart = true

    [broker]
    host = "broker.example.org"

    [model]
    file = "digits.tflite"

    [validation]
    path = "validation.npz"

    [rounds]
    rounds = 20
    target_accuracy = 0.95
    fraction = 0.5
    deadline = 120.0
    expires = 180.0

    [rounds.training]
    epochs = 2
    learning_rate = 0.05

    [optimizer]
    name = "fedavg"
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fleetfed.cloud_coordinator.privacy.settings import PrivacySettings
from fleetfed.cloud_coordinator.quarantine import QuarantineConfig
from fleetfed.cloud_coordinator.training.clips import ClipConfig
from fleetfed.cloud_coordinator.training.optimizers import OptimizerConfig
from fleetfed.cloud_coordinator.training.robust import Robust
from fleetfed.shared import config
from fleetfed.shared.aggregate.lanes import choose_lane_bits
from fleetfed.shared.datasource import DataConfig
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.model.patch import DEFAULT_CLIP
from fleetfed.shared.monitoring.config import CoordinatorMonitoringConfig
from fleetfed.shared.mqtt.config import ConnectionConfig
from fleetfed.shared.mqtt.endpoint import Endpoint
from fleetfed.shared.telemetry import LogFormat
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.codec import Length, Range
from fleetfed.shared.wire.defence import Defence
from fleetfed.shared.wire.fields import Fraction
from fleetfed.shared.wire.masking import KEY_SIZES, SEALED_BOX
from fleetfed.shared.wire.messages import Mode, Training, Weighting
from fleetfed.shared.wire.privacy import Mechanism

Seconds = Annotated[float, Range(0.0, 30 * 86400.0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSettings:
    """How rounds run; `fleetfed round start` may change any of them for what it starts.

    Attributes:
        rounds: versions to make, then finish; 0 for no limit.
        target_accuracy: finish when a version reaches it, on the validation set if there is one, else over the
            devices' held-out examples; 0 for none.
        interval: seconds between the end of a round and the next.
        start_when: devices that must be ready or asleep before a round opens; those that are revoked afterwards are
            no longer asked for.
        fraction, labels, minimum_examples: which devices take part (`messages.Eligibility`).
        quorum_fraction, quorum_minimum, cohort_cap: when a round closes and counts (`messages.Quorum`).
        deadline: seconds from opening until leaf gateways close.
        expires: seconds from opening until the coordinator closes.
        weighting: what an update weighs.
        weight_cap: examples beyond which a device weighs no more.
        error_feedback: whether devices carry over what quantization lost.
        training: what devices do with their data.
        mode: ``plain``, or ``split``: masked updates, which neither gateway nor coordinator can read (docs/privacy.md).
        minimum_cohort: in split mode, fewest contributors to any sum that is revealed.
        minimum_owners: in split mode, fewest distinct owners among a site's contributors.
        bucket: in split mode, contributors to each of several sums per site, so that a garbage update costs its bucket
            alone; 0 reveals one sum.
        seed_holders: in split mode, 2 seals a second mask seed to the helper, without which rounds then wait.
        suite: in split mode, how keys are sealed: 1 with X25519; 3 with ML-KEM-768 beside it, so that recorded traffic
            stays closed to a quantum computer: every device then needs `cryptography` (the extra ``hybrid``).
        robust: how the means of buckets become one step: ``none`` adds everything, ``trimmed_mean``,
            ``geometric_median``.
        trim: for ``trimmed_mean``, the part of the buckets to leave out at either end.
        iterations: for ``geometric_median``.
        update_bytes: most bytes of a masked update's body: devices train the largest layers within a subspace, new in
            every round, of which so much fits (docs/adr/0010); 0 sends every value. Fewer bits in ``[clips]`` and a
            smaller cohort_cap leave room for more.
        privacy: differential privacy (``[rounds.privacy]``); none without it.
        defence: in plain mode, how gateways meet updates that do not look like the others (``[rounds.defence]``); none
            without it.
        quarantine: when a device that is an outlier again and again is set aside (``[rounds.quarantine]``).
    """

    rounds: Annotated[int, Range(0, 1_000_000)] = 0
    target_accuracy: Fraction = 0.0
    interval: Seconds = 0.0
    start_when: Annotated[int, Range(1, limits.MAX_COHORT)] = 1
    fraction: Fraction = 1.0
    labels: Annotated[dict[str, str], Length(0, 32)] = field(default_factory=dict)
    minimum_examples: Annotated[int, Range(1, 1e12)] = 1
    quorum_fraction: Fraction = 1.0
    quorum_minimum: Annotated[int, Range(1, limits.MAX_COHORT)] = 1
    cohort_cap: Annotated[int, Range(1, limits.MAX_COHORT)] = 1000
    deadline: Annotated[float, Range(0.05, 30 * 86400.0)] = 600.0
    expires: Annotated[float, Range(0.1, 30 * 86400.0)] = 900.0
    weighting: Weighting = Weighting.EXAMPLES
    weight_cap: Annotated[int, Range(1, 2**31 - 1)] = 1000
    error_feedback: bool = False
    training: Training = field(default_factory=Training)
    mode: Mode = Mode.PLAIN
    minimum_cohort: Annotated[int, Range(2, limits.MAX_COHORT)] = 5
    minimum_owners: Annotated[int, Range(1, limits.MAX_COHORT)] = 1
    bucket: Annotated[int, Range(0, limits.MAX_COHORT)] = 0
    seed_holders: Annotated[int, Range(1, 2)] = 1
    suite: Annotated[int, Range(1, 255)] = SEALED_BOX
    robust: Robust = Robust.NONE
    trim: Annotated[float, Range(0.0, 0.5)] = 0.2
    iterations: Annotated[int, Range(1, 1000)] = 50
    update_bytes: Annotated[int, Range(0, limits.MAX_UPDATE)] = 0
    privacy: PrivacySettings | None = None
    defence: Defence | None = None
    quarantine: QuarantineConfig = field(default_factory=QuarantineConfig)

    def __post_init__(self) -> None:
        if self.expires <= self.deadline:
            raise ConfigError(
                f"expires ({self.expires:g} s) must be later than deadline ({self.deadline:g} s): "
                "partial sums travel in between"
            )
        if self.quorum_minimum > self.cohort_cap:
            raise ConfigError(f"quorum_minimum {self.quorum_minimum} is more than cohort_cap {self.cohort_cap}")
        if self.mode is Mode.SPLIT:
            self._check_split()
        else:
            for name, given, none in (
                ("bucket", self.bucket > 0, "0"),
                ("seed_holders", self.seed_holders > 1, "1"),
                ("suite", self.suite != SEALED_BOX, "1"),
                ("robust", self.robust is not Robust.NONE, "'none'"),
            ):
                if given:
                    raise ConfigError(f"{name} is for split mode: set {name} = {none}, or mode = 'split'")

        if self.update_bytes and (self.error_feedback or self.privacy is not None):
            raise ConfigError(
                "update_bytes goes neither with error_feedback nor with privacy: leave it out, or set update_bytes = 0"
            )
        if self.defence is not None and self.mode is Mode.SPLIT:
            raise ConfigError(
                "defence looks at single updates, which split mode hides: set bucket and robust, or mode = 'plain'"
            )
        if self.privacy is not None:
            self._check_privacy(self.privacy)

    def _check_privacy(self, privacy: PrivacySettings) -> None:
        if self.defence is not None:
            raise ConfigError("privacy does not go with defence: no noise covers who is left out because of others")
        if self.weighting is not Weighting.UNIFORM:
            raise ConfigError("privacy needs weighting = 'uniform': a weight says how much data a device has")
        if self.error_feedback:
            raise ConfigError("privacy does not go with error_feedback: what a clip cut off would come back")
        if privacy.mechanism in (Mechanism.SKELLAM, Mechanism.SPLIT_CENTRAL) and self.mode is not Mode.SPLIT:
            raise ConfigError(f"the mechanism {privacy.mechanism} is for split mode: set mode = 'split'")
        if privacy.mechanism is Mechanism.SKELLAM:
            if privacy.honest > self.minimum_cohort:
                raise ConfigError(
                    f"privacy.honest {privacy.honest} is more than minimum_cohort {self.minimum_cohort}: a sum of so "
                    "few would have less noise than is promised; raise minimum_cohort"
                )
        elif self.robust is not Robust.NONE:
            raise ConfigError(
                f"robust = '{self.robust}' does not go with the mechanism {privacy.mechanism}: the coordinator's noise "
                "is measured for a sum; leave robust out, or let devices add the noise (skellam)"
            )

    def _check_split(self) -> None:
        if self.suite not in KEY_SIZES:
            raise ConfigError(f"suite {self.suite} is unknown: set 1 (X25519), or 3 (ML-KEM-768 beside it)")
        if self.minimum_cohort > self.cohort_cap:
            raise ConfigError(
                f"minimum_cohort {self.minimum_cohort} is more than cohort_cap {self.cohort_cap}: no sum could ever be "
                "revealed; raise cohort_cap"
            )
        if self.minimum_owners > self.minimum_cohort:
            raise ConfigError(
                f"minimum_owners {self.minimum_owners} is more than minimum_cohort {self.minimum_cohort}: a cohort "
                "cannot have more owners than members; raise minimum_cohort"
            )
        if 0 < self.bucket < self.minimum_cohort:
            raise ConfigError(
                f"bucket {self.bucket} is less than minimum_cohort {self.minimum_cohort}: every bucket is a sum that "
                "is revealed; raise bucket, or set 0 for one sum"
            )
        if self.bucket > self.cohort_cap:
            raise ConfigError(f"bucket {self.bucket} is more than cohort_cap {self.cohort_cap}; lower bucket")
        if self.robust is not Robust.NONE and not self.bucket:
            raise ConfigError(
                f"robust = '{self.robust}' compares the sums of buckets, and there are none: set bucket, to at least "
                f"{self.minimum_cohort}"
            )

    @property
    def needs_helper(self) -> bool:
        """Whether a round waits for the helper's key."""
        return self.mode is Mode.SPLIT and self.seed_holders == 2

    @property
    def plan_weight_cap(self) -> int:
        """The plan's weight_cap: 1 where every device weighs the same."""
        return 1 if self.weighting is Weighting.UNIFORM else self.weight_cap


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model to begin with, published as version 1 where there is none yet.

    Attributes:
        file: the .tflite.
        card: its card; by default the file with the suffix ``.card``.
    """

    file: Path
    card: Path | None = None

    @property
    def card_file(self) -> Path:
        """Where the card is."""
        return self.card if self.card is not None else self.file.with_suffix(".card")


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchConfig:
    """How finely the model's steps are sent down.

    Attributes:
        bits: of one weight's difference; what is lost goes into the next patch.
        clip: largest difference in units of the tensor's rms.
        level: zstd level; 0 for the settings that fit quantized differences best.
    """

    bits: Annotated[int, Range(2, 16)] = 4
    clip: Annotated[float, Range(0.5, 1000.0)] = DEFAULT_CLIP
    level: Annotated[int, Range(0, 19)] = 0

    def __post_init__(self) -> None:
        if 8 < self.bits < 16:
            raise ConfigError(f"bits must be 2 to 8 or 16, not {self.bits}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageConfig:
    """Where durable state is and how much of it is kept.

    Attributes:
        database: an SQLAlchemy URL; by default SQLite in the state folder.
        blobs: a bucket that keeps what ``state/blobs`` has, too, such as ``s3://bucket/fleet``; for this fleet alone.
        blobs_options: a JSON file of what fsspec needs for it, such as ``{"key": …, "secret": …}``.
        keep_versions: model files kept for rollback, newest first.
        keep_rounds: rounds whose messages are kept.
        full_every: versions between two whole files on the broker; a patch is published every version.
    """

    database: Annotated[str, Length(0, 1000)] = ""
    blobs: Annotated[str, Length(0, 1000)] = ""
    blobs_options: Path | None = None
    keep_versions: Annotated[int, Range(2, 100_000)] = 50
    keep_rounds: Annotated[int, Range(1, 100_000)] = 100
    full_every: Annotated[int, Range(1, limits.MAX_PATCH_CHAIN)] = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorConfig:
    """All settings of the coordinator.

    Attributes:
        identity: the identity folder.
        state: the folder of all durable state.
        broker: the connection.
        model: what to publish first.
        validation: what every version is evaluated on, all of it (``holdout`` and ``seed`` do not matter); none relies
            on the devices' held-out examples.
        rounds: how rounds run.
        optimizer: the server optimizer.
        clips: the scale of updates.
        patch: the scale of patches.
        storage: the database and retention.
        monitoring: where Prometheus finds it, and how many sites it sees.
        autostart: run rounds from the first start on, without `fleetfed round start`.
        log_level: of the standard logging module.
        log_format: of stderr: ``text``, or ``json`` with one object per line.
    """

    identity: Path
    state: Path
    broker: Endpoint
    model: ModelConfig | None = None
    validation: DataConfig | None = None
    rounds: RoundSettings = field(default_factory=RoundSettings)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    clips: ClipConfig = field(default_factory=ClipConfig)
    patch: PatchConfig = field(default_factory=PatchConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    monitoring: CoordinatorMonitoringConfig = field(default_factory=CoordinatorMonitoringConfig)
    autostart: bool = False
    log_level: Annotated[str, Length(1, 20)] = "INFO"
    log_format: LogFormat = LogFormat.TEXT

    def __post_init__(self) -> None:
        for bits in (self.clips.bits, self.clips.first_bits):
            try:
                choose_lane_bits(bits, self.rounds.cohort_cap)
            except ValueError as error:
                raise ConfigError(f"clips and rounds.cohort_cap: {error}") from error

    @classmethod
    def load(cls, path: Path) -> CoordinatorConfig:
        """Read ``coordinator.toml``; relative paths begin at its folder.

        Raises:
            ConfigError: with the file, the key and what to do.
        """
        return config.load(cls, path)

    @property
    def database_url(self) -> str:
        """The database."""
        return self.storage.database or f"sqlite:///{self.state / 'coordinator.db'}"

    def connection(self, client_id: str) -> ConnectionConfig:
        """How to reach the broker as ``client_id``."""
        return self.broker.connection(client_id=client_id, identity=self.identity)
