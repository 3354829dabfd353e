from pathlib import Path

import numpy as np
import pytest
from fleetfed_testing.model_vectors import STEPS, TOLERANCE, digest, distance, inputs

from fleetfed.cloud_coordinator import zoo
from fleetfed.shared.errors import ConfigError, LocalProtocolError
from fleetfed.shared.model.interpreter import Adam, Model, Sgd
from fleetfed.shared.model.table import read_weights, write_weights

VECTORS = Path(__file__).parents[2] / "vectors"
RULES = {"sgd": Sgd(lr=0.05, momentum=0.9), "adam": Adam(lr=0.002), "prox": Sgd(lr=0.05, proximal=0.5)}
IN_ORDER = np.arange


@pytest.fixture(scope="module")
def digits() -> zoo.ZooModel:
    return zoo.load("digits")


def fresh(made: zoo.ZooModel) -> Model:
    return Model(made.data, made.card)


def data(made: zoo.ZooModel, n: int, seed: int = 7):
    rng = np.random.default_rng(seed)
    x = rng.random((n, *made.card.input_shape), dtype=np.float32)
    return x, rng.integers(0, made.card.classes, n)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_loss_gradients_and_scores_are_tensorflows(name):
    expected = np.load(VECTORS / f"model_{name}.npz")
    made = zoo.load(name)
    model = fresh(made)
    x, y, w = inputs(made.card, 1)
    loss, gradients = model.gradients(x, y, w)
    assert loss == pytest.approx(float(expected["loss"]), rel=TOLERANCE)
    assert distance(digest(made.card.table, gradients), expected["gradients"]) < TOLERANCE
    assert np.abs(model.infer(x) - expected["scores"]).max() < 1e-5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_training_steps_are_tensorflows(name, rule):
    expected = np.load(VECTORS / f"model_{name}.npz")
    made = zoo.load(name)
    model = fresh(made)
    start = model.get_weights()
    for step in range(STEPS):
        x, y, _ = inputs(made.card, 10 + step)
        loss = model.train_epoch(x, y, optimizer=RULES[rule], order=IN_ORDER(len(x)))
        assert loss == pytest.approx(float(expected[f"{rule}_losses"][step]), rel=TOLERANCE)
    moved = model.get_weights() - start
    # Adam divides by the root of tiny squares: where a gradient is all but zero, float32 noise decides a step's sign.
    assert distance(digest(made.card.table, moved), expected[f"{rule}_moved"]) < (1e-2 if rule == "adam" else 1e-3)


def test_the_vectors_can_fail(digits):
    expected = np.load(VECTORS / "model_digits.npz")
    x, y, w = inputs(digits.card, 1)
    _, gradients = fresh(digits).gradients(x, y, w)
    for part in digits.card.table.splits():
        wrong = gradients.copy()
        noise = np.random.default_rng(1).normal(size=wrong[part].size)
        wrong[part] += 5e-4 * np.linalg.norm(wrong[part]) * noise / np.linalg.norm(noise)
        assert distance(digest(digits.card.table, wrong), expected["gradients"]) > TOLERANCE


def test_weights_come_from_the_files_bytes(digits):
    flat = np.random.default_rng(3).normal(size=digits.card.parameters).astype(np.float32)
    patched = bytearray(digits.data)
    write_weights(patched, digits.card.table, flat)
    model = Model(bytes(patched), digits.card)
    assert model.get_weights().tobytes() == flat.tobytes()
    assert fresh(digits).get_weights().tobytes() == read_weights(digits.data, digits.card.table).tobytes()


@pytest.mark.parametrize("rule", [Sgd(lr=0.1, momentum=0.9, proximal=0.3), Adam(proximal=0.3)])
def test_training_from_a_patched_file_equals_training_from_set_weights(digits, rule, tmp_path):
    flat = 0.1 * np.random.default_rng(4).normal(size=digits.card.parameters).astype(np.float32)
    x, y = data(digits, 40)
    order = np.random.default_rng(5).permutation(40)
    patched = bytearray(digits.data)
    write_weights(patched, digits.card.table, flat)
    path = tmp_path / "patched.tflite"
    path.write_bytes(patched)
    from_file = Model(path, digits.card)
    used = fresh(digits)
    used.train_epoch(x, y, optimizer=Adam(lr=0.05), order=order)  # leaves slots and an anchor behind
    used.set_weights(flat)
    for model in (from_file, used):
        model.train_epoch(x, y, optimizer=rule, order=order)
    assert used.get_weights().tobytes() == from_file.get_weights().tobytes()
    assert not np.array_equal(used.get_weights(), flat)
    assert path.read_bytes() == patched, "training never writes to the file"


def test_set_weights_recovers_from_divergence(digits):
    model = fresh(digits)
    x, y = data(digits, 32)
    for _ in range(3):
        loss = model.train_epoch(x, y, optimizer=Sgd(lr=1e30, momentum=0.9, proximal=1.0), order=IN_ORDER(32))
    assert not np.isfinite(loss)
    flat = read_weights(digits.data, digits.card.table)
    model.set_weights(flat)
    clean = fresh(digits)
    for each in (model, clean):
        each.train_epoch(x, y, optimizer=Adam(proximal=0.1), order=IN_ORDER(32))
    assert model.get_weights().tobytes() == clean.get_weights().tobytes()


def test_examples_of_weight_zero_change_nothing(digits):
    batch = digits.card.batch
    x, y = data(digits, batch)
    short = fresh(digits)
    short_loss = short.train_epoch(x, y, optimizer=Sgd(lr=0.1), order=IN_ORDER(5))
    w = np.zeros(batch, dtype=np.float32)
    w[:5] = 1
    loss, gradients = fresh(digits).gradients(x, y, w)
    assert short_loss == pytest.approx(loss, rel=1e-6)
    start = read_weights(digits.data, digits.card.table)
    assert np.allclose(short.get_weights(), start - np.float32(0.1) * gradients, atol=1e-6)
    # Five examples three times over have the same mean as once, and so the same gradient.
    thrice = np.concatenate([np.tile(np.arange(5), 3), [0]])
    w = np.ones(batch, dtype=np.float32)
    w[15] = 0
    again, repeated = fresh(digits).gradients(x[thrice], y[thrice], w)
    assert again == pytest.approx(loss, rel=1e-5)
    assert np.allclose(repeated, gradients, rtol=1e-4, atol=1e-6)
    loss, gradients = fresh(digits).gradients(x, y, np.zeros(batch, dtype=np.float32))
    assert loss == 0
    assert not gradients.any()


def test_the_epochs_loss_is_the_mean_over_examples(digits):
    x, y = data(digits, 21)
    order = np.random.default_rng(0).permutation(21)
    loss = fresh(digits).train_epoch(x, y, optimizer=Sgd(lr=0.0), order=order)
    assert loss == pytest.approx(fresh(digits).evaluate(x, y).loss_sum / 21, rel=1e-5)


def test_evaluate_counts_every_example_once_whatever_the_chunk(digits):
    model = fresh(digits)
    x, y = data(digits, 37)
    scores = model.infer(x)
    assert scores.shape == (37, 10)
    assert np.allclose(scores.sum(axis=1), 1, atol=1e-5)
    expected_loss = -np.log(scores[np.arange(37), y]).sum()
    for chunk in (0, 1, 8, 37, 100):
        result = model.evaluate(x, y, chunk=chunk)
        assert result.examples == 37
        assert result.correct == int((scores.argmax(axis=1) == y).sum())
        assert result.loss_sum == pytest.approx(expected_loss, rel=1e-4)


def test_the_loss_is_stable_for_huge_scores(digits):
    model = fresh(digits)
    model.set_weights(model.get_weights() * np.float32(100))
    x, y = data(digits, 16)
    loss, gradients = model.gradients(x, y, np.ones(16, dtype=np.float32))
    assert np.isfinite(loss)
    assert np.isfinite(gradients).all()


def test_a_small_model_learns_real_digits(digits):
    sklearn = pytest.importorskip("sklearn.datasets")
    bunch = sklearn.load_digits()
    x = (bunch.images[..., None] / 16).astype(np.float32)
    y = bunch.target
    order = np.random.default_rng(1).permutation(len(x))
    train, test = order[:1437], order[1437:]
    model = fresh(digits)
    first = model.evaluate(x[test], y[test])
    rng = np.random.default_rng(2)
    for _ in range(8):
        model.train_epoch(x, y, optimizer=Adam(lr=0.003), order=rng.permutation(train))
    last = model.evaluate(x[test], y[test])
    assert first.correct / first.examples < 0.3
    assert last.correct / last.examples > 0.96


def test_what_does_not_fit_the_card_is_refused_before_training(digits):
    model = fresh(digits)
    start = model.get_weights()
    x, y = data(digits, 16)
    sgd, order = Sgd(), IN_ORDER(16)
    bad_label = y.copy()
    bad_label[3] = 10
    for arguments, message in (
        ((x[:, :7], y), "takes float32 examples of shape"),
        ((x.astype(np.float64), y), "float64"),
        ((x[:0], y[:0]), "no examples"),
        ((x, y[:15]), "expected 16 integer labels"),
        ((x, y.astype(np.float32)), "integer labels"),
        ((x, bad_label), "outside 0..9"),
        ((x, bad_label - 11), "outside 0..9"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.train_epoch(*arguments, optimizer=sgd, order=order)
        with pytest.raises(ConfigError, match=message):
            model.evaluate(*arguments)
    for bad_order in (np.array([16]), np.array([-1]), np.array([], dtype=np.int64), np.array([0.5])):
        with pytest.raises(ConfigError, match="order"):
            model.train_epoch(x, y, optimizer=sgd, order=bad_order)
    with pytest.raises(ConfigError, match="float32 weights of shape"):
        model.set_weights(start[:-1])
    with pytest.raises(ConfigError, match="exactly 16 examples"):
        model.gradients(x[:4], y[:4], np.ones(4, dtype=np.float32))
    assert model.get_weights().tobytes() == start.tobytes()


def test_a_file_that_is_not_the_cards_is_refused(digits, tmp_path):
    with pytest.raises(ConfigError, match="its card says"):
        Model(digits.data[:-1], digits.card)
    with pytest.raises(ConfigError, match=r"not a \.tflite"):
        Model(bytes(len(digits.data)), digits.card)
    with pytest.raises(ConfigError, match="cannot be read"):
        Model(tmp_path / "missing.tflite", digits.card)
    with pytest.raises(ConfigError, match="num_threads"):
        Model(digits.data, digits.card, num_threads=0)
    damaged = digits.data[:8] + bytes(len(digits.data) - 8)
    with pytest.raises(ConfigError, match="refuses the file"):
        Model(damaged, digits.card)


def test_the_runtime_writes_nothing_to_stderr(digits, capfd):
    x, y = data(digits, 16)
    for first_call in (
        lambda model: model.get_weights(),
        lambda model: model.infer(x),
        lambda model: model.evaluate(x, y),
        lambda model: model.train_epoch(x, y, optimizer=Sgd(), order=IN_ORDER(16)),
    ):
        first_call(fresh(digits))
    assert capfd.readouterr().err == ""


def test_a_closed_model_cannot_be_used(digits):
    with fresh(digits) as model:
        model.get_weights()
    with pytest.raises(LocalProtocolError, match="closed"):
        model.get_weights()
    with pytest.raises(LocalProtocolError, match="closed"):
        model.infer(data(digits, 1)[0])


def test_weights_are_read_through_the_public_interface_too(digits, monkeypatch):
    model = fresh(digits)
    expected = model.get_weights()

    class Plain:
        """A runner with nothing but its public call."""

        def __init__(self, runner):
            self._real = runner

        def __call__(self, **inputs):
            return self._real(**inputs)

    original = Model._runner
    monkeypatch.setattr(Model, "_runner", lambda self, signature: Plain(original(self, signature)))
    assert fresh(digits).get_weights().tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["digits", "wrist"])
@pytest.mark.parametrize("options", [{"delegate": False}, {"num_threads": 3}, {"delegate": False, "num_threads": 3}])
def test_training_does_not_depend_on_how_the_runtime_runs_it(name, options):
    # With more threads the runtimes take other convolution kernels, some of which keep a copy of their filter.
    made = zoo.load(name)
    x, y = data(made, 64)
    model = Model(made.data, made.card, **options)
    reference = fresh(made)
    for each in (model, reference):
        each.train_epoch(x, y, optimizer=Sgd(lr=0.1, momentum=0.9), order=IN_ORDER(64))
    start = read_weights(made.data, made.card.table)
    moved, expected = model.get_weights() - start, reference.get_weights() - start
    assert np.linalg.norm(moved - expected) < 1e-4 * np.linalg.norm(expected)
    assert model.evaluate(x, y).loss_sum == pytest.approx(reference.evaluate(x, y).loss_sum, rel=1e-4)
