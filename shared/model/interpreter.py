"""Train, evaluate and infer with a FleetFed .tflite, on whichever TFLite runtime is installed.

`ai_edge_litert` is taken where it is installed, else `tflite_runtime`; neither is imported before the first `Model`.
TensorFlow is never needed.

Example::

    model = Model(Path("digits.tflite"), card)
    loss = model.train_epoch(x, y, optimizer=Adam(), order=rng.permutation(len(x)))
    flat = model.get_weights()
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.errors import ConfigError, LocalProtocolError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.model.table import split_weights

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sgd:
    """Stochastic gradient descent, Keras's rule: ``v = momentum * v - lr * g; w += v``.

    Attributes:
        lr: learning rate.
        momentum: 0 is plain descent.
        proximal: FedProx's mu: adds ``mu * (w - anchor)`` to the gradient.
    """

    lr: float = 0.01
    momentum: float = 0.0
    proximal: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam:
    """Adam, Keras's rule and defaults (bias-corrected, epsilon outside the root).

    Attributes:
        lr: learning rate.
        beta1: decay of the mean.
        beta2: decay of the mean square.
        epsilon: added to the root of the mean square.
        proximal: FedProx's mu: adds ``mu * (w - anchor)`` to the gradient.
    """

    lr: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-7
    proximal: float = 0.0


Optimizer = Sgd | Adam


class Evaluation(NamedTuple):
    """Sums over the examples, so that they can be added to others'.

    Attributes:
        loss_sum: of the cross-entropies.
        correct: number of examples whose highest score is their label's.
        examples: number of examples.
    """

    loss_sum: float
    correct: int
    examples: int


class Model:
    """One model file in one interpreter: weights, anchor and optimiser slots live in it.

    The anchor (see `Sgd.proximal`) and the start are the weights in the file, or the last that `set_weights` set. Not
    for use by two threads at once.

    Args:
        source: path of the .tflite (mapped, not read), or its bytes.
        card: its card.
        num_threads: of the runtime; more than one rarely helps models of this size.
        delegate: whether the runtime may use XNNPACK: faster, for some more memory.

    Raises:
        ConfigError: no runtime is installed, or the file is not the card's.
    """

    def __init__(self, source: Path | bytes, card: ModelCard, *, num_threads: int = 1, delegate: bool = True) -> None:
        if num_threads < 1:
            raise ConfigError(f"num_threads {num_threads} must be at least 1")
        self.card = card
        self._table = card.table
        if isinstance(source, Path):
            try:
                size = source.stat().st_size
                with source.open("rb") as file:
                    head = file.read(8)
            except OSError as error:
                raise ConfigError(f"model file {source} cannot be read: {error}") from error
            arguments: dict[str, Any] = {"model_path": str(source)}
        else:
            size, head = len(source), source[:8]
            arguments = {"model_content": source}
        card.check_file(head, size)
        try:
            with _silent_stderr():
                self._interpreter: Any = _make_interpreter(num_threads, delegate, arguments)
                missing = set(card.signatures) - set(self._interpreter.get_signature_list())
        # Both runtimes raise bare ValueError or RuntimeError for a file that they cannot load.
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"model {card.name}: the TFLite runtime refuses the file: {error}") from error
        if missing:
            raise ConfigError(f"model {card.name}: the file lacks the signatures {sorted(missing)}")
        self._runners: dict[str, Any] = {}
        self._invoked: set[str] = set()

    def train_epoch(
        self, x: Floats, y: NDArray[np.integer[Any]], *, optimizer: Optimizer, order: NDArray[np.integer[Any]]
    ) -> float:
        """Take one training step per batch.

        Args:
            x: float32 [n, *input_shape].
            y: integer labels [n].
            optimizer: rule and settings; keep to one rule between two `set_weights`, the slots are shared.
            order: indices into ``x`` in the order of training, usually a permutation; may leave some out. The last
                batch may be short: it is filled up with examples of weight 0, which change nothing.

        Returns:
            Mean cross-entropy over ``order``, each example's taken before the step that it was part of. Not finite
            where training diverged.

        Raises:
            ConfigError: shapes, dtypes or labels do not fit the card; nothing was trained then.
        """
        labels = self._check(x, y)
        if order.ndim != 1 or not len(order) or not np.issubdtype(order.dtype, np.integer):
            raise ConfigError("order must be a vector of at least one index")
        if order.min() < 0 or order.max() >= len(x):
            raise ConfigError(f"order holds indices outside 0..{len(x) - 1}")
        name, settings = _settings(optimizer)
        total = 0.0
        for batch in self._batches(x, labels, order, self.card.batch):
            loss = self._run(name, x=batch.x, y=batch.y, w=batch.w, **settings)["loss"]
            total += float(loss) * batch.examples
        return total / len(order)

    def evaluate(self, x: Floats, y: NDArray[np.integer[Any]], *, chunk: int = 0) -> Evaluation:
        """Score every example.

        Args:
            x: float32 [n, *input_shape].
            y: integer labels [n].
            chunk: examples at a time, which bounds the memory; the training batch where 0.

        Raises:
            ConfigError: shapes, dtypes or labels do not fit the card.
        """
        labels = self._check(x, y)
        loss_sum, correct = 0.0, 0
        for batch in self._batches(x, labels, np.arange(len(x)), chunk or self.card.batch):
            result = self._run("evaluate", x=batch.x, y=batch.y, w=batch.w)
            loss_sum += float(result["loss"])
            correct += round(float(result["correct"]))
        return Evaluation(loss_sum=loss_sum, correct=correct, examples=len(x))

    def infer(self, x: Floats, *, chunk: int = 0) -> Floats:
        """Scores of every example: probabilities where the card says softmax, else logits.

        Args:
            x: float32 [n, *input_shape].
            chunk: examples at a time; the training batch where 0.

        Returns:
            float32 [n, classes].

        Raises:
            ConfigError: the shape or dtype does not fit the card.
        """
        self._check_examples(x)
        scores = np.empty((len(x), self.card.classes), dtype=np.float32)
        size = chunk or self.card.batch
        for start in range(0, len(x), size):
            part = np.ascontiguousarray(x[start : start + size])
            scores[start : start + size] = self._run("infer", x=part)["scores"]
        return scores

    def gradients(self, x: Floats, y: NDArray[np.integer[Any]], w: Floats) -> tuple[float, Floats]:
        """Loss and gradient of exactly one training batch; moves nothing.

        Args:
            x: float32 [batch, *input_shape].
            y: integer labels [batch].
            w: float32 [batch], the examples' weights.

        Returns:
            Weighted mean cross-entropy, and its gradient as a flat vector.

        Raises:
            ConfigError: shapes, dtypes or labels do not fit the card.
        """
        labels = self._check(x, y)
        if len(x) != self.card.batch or w.shape != (len(x),) or w.dtype != np.float32:
            raise ConfigError(f"gradients needs exactly {self.card.batch} examples and as many float32 weights")
        result = self._run("gradients", x=np.ascontiguousarray(x), y=labels, w=w)
        flat = np.concatenate([result[f"g{i:03}"].reshape(-1) for i in range(len(self._table.tensors))])
        return float(result["loss"]), flat

    def get_weights(self) -> Floats:
        """The present weights as a flat float32 vector in table order."""
        flat = np.empty(self._table.parameters, dtype=np.float32)
        parts = {f"w{i:03}": part for i, part in enumerate(self._table.splits())}
        runner = self._runner("get_weights")
        try:
            # The public call copies all outputs before it returns; one by one is one model's size less.
            wrapper, subgraph = runner._interpreter_wrapper, runner._subgraph_index
            outputs = dict(runner._outputs)
        except AttributeError:
            result = self._run("get_weights")
            for name, part in parts.items():
                flat[part] = result.pop(name).reshape(-1)
            return flat
        with self._quiet_at_first("get_weights"):
            wrapper.AllocateTensors(subgraph)
            wrapper.Invoke(subgraph)
        for name, part in parts.items():
            flat[part] = wrapper.GetTensor(outputs[name], subgraph).reshape(-1)
        return flat

    def set_weights(self, flat: Floats) -> None:
        """Start anew from other weights: they become the anchor too, and the optimiser forgets.

        Args:
            flat: float32 [parameters] in table order.

        Raises:
            ConfigError: ``flat`` has another shape or dtype.
        """
        parts = split_weights(np.ascontiguousarray(flat), self._table)
        self._run("set_weights", **{f"w{i:03}": part for i, part in enumerate(parts)})

    def close(self) -> None:
        """Give the memory back; the model cannot be used afterwards.

        Each of training and evaluation keeps working memory of its own once used. A device that is short of memory
        closes the model between them and opens it again.
        """
        self._runners.clear()
        self._interpreter = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _runner(self, signature: str) -> Any:
        if self._interpreter is None:
            raise LocalProtocolError(f"model {self.card.name} is closed")
        if signature not in self._runners:
            self._runners[signature] = self._interpreter.get_signature_runner(signature)
        return self._runners[signature]

    @contextlib.contextmanager
    def _quiet_at_first(self, signature: str) -> Iterator[None]:
        # The first call allocates, and the delegate introduces itself.
        with contextlib.nullcontext() if signature in self._invoked else _silent_stderr():
            yield
        self._invoked.add(signature)

    def _run(self, signature: str, **inputs: Any) -> dict[str, Any]:
        with self._quiet_at_first(signature):
            result: dict[str, Any] = self._runner(signature)(**inputs)
        return result

    def _check_examples(self, x: Floats) -> None:
        if x.ndim < 1 or x.shape[1:] != self.card.input_shape or x.dtype != np.float32:
            raise ConfigError(
                f"model {self.card.name} takes float32 examples of shape {self.card.input_shape}, "
                f"got {x.dtype} of shape {x.shape[1:]}"
            )
        if not len(x):
            raise ConfigError("no examples")

    def _check(self, x: Floats, y: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
        self._check_examples(x)
        if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
            raise ConfigError(f"expected {len(x)} integer labels, got {y.dtype} of shape {y.shape}")
        # A label outside the classes would count as an example without a class: loss 0, a wrong gradient.
        if y.min() < 0 or y.max() >= self.card.classes:
            raise ConfigError(f"labels {y.min()}..{y.max()} are outside 0..{self.card.classes - 1}")
        return y.astype(np.int32, copy=False)

    def _batches(self, x: Floats, y: NDArray[np.int32], order: NDArray[np.integer[Any]], size: int) -> Iterator[_Batch]:
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            count = len(chosen)
            if count < size:
                chosen = np.concatenate([chosen, np.repeat(chosen[:1], size - count)])
            weights = np.zeros(size, dtype=np.float32)
            weights[:count] = 1.0
            yield _Batch(x[chosen], y[chosen], weights, count)


class _Batch(NamedTuple):
    x: Floats
    y: NDArray[np.int32]
    w: Floats
    examples: int


def _settings(optimizer: Optimizer) -> tuple[str, dict[str, Any]]:
    match optimizer:
        case Sgd():
            name = "train_sgd"
            values = {"lr": optimizer.lr, "momentum": optimizer.momentum, "mu": optimizer.proximal}
        case Adam():
            name = "train_adam"
            values = {
                "lr": optimizer.lr,
                "beta1": optimizer.beta1,
                "beta2": optimizer.beta2,
                "eps": optimizer.epsilon,
                "mu": optimizer.proximal,
            }
    return name, {key: np.array(value, dtype=np.float32) for key, value in values.items()}


def _make_interpreter(num_threads: int, delegate: bool, arguments: dict[str, Any]) -> Any:
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError:
        try:
            from tflite_runtime.interpreter import Interpreter, OpResolverType
        except ImportError as error:
            raise ConfigError(
                "no TFLite runtime is installed: pip install ai-edge-litert (or tflite-runtime on 32-bit ARM)"
            ) from error
    kind = OpResolverType.AUTO if delegate else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    return Interpreter(num_threads=num_threads, experimental_op_resolver_type=kind, **arguments)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep the runtime's start-up notes off stderr.

    The runtimes write them from C++ to the file descriptor and offer no switch. Set FLEETFED_RUNTIME_LOG to see them.
    """
    if os.environ.get("FLEETFED_RUNTIME_LOG"):
        yield
        return
    try:
        kept = os.dup(2)
    except OSError:  # a daemon may run without stderr
        yield
        return
    try:
        sink = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(sink, 2)
        finally:
            os.close(sink)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
