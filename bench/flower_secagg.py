"""One SecAgg+ round by Flower's own code in one process: no network, no training, no serialisation beyond its own.

Run by `secure_aggregation.py` with an interpreter that has flwr 1.42 (this project does not depend on it). The clients
are Flower's `secaggplus_mod`, the server its `SecAggPlusWorkflow`; between them stands a grid that hands messages over.
Prints one line of JSON: processor seconds of the whole round, of one client's part, and of the server's part.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from importlib.metadata import version
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod.secure_aggregation.secaggplus_mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
from flwr.compat.common import recorddict_compat as compat
from flwr.server.client_proxy import ClientProxy
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import SecAggPlusWorkflow
from flwr.supercore.task_identity import TaskIdentity


class Proxy(ClientProxy):  # type: ignore[misc]
    """A name; everything else goes through the grid."""

    def __init__(self, node_id: int) -> None:
        super().__init__(str(node_id))
        self.node_id = node_id

    def _never(self, *arguments: Any, **more: Any) -> Any:
        raise NotImplementedError

    get_properties = get_parameters = fit = evaluate = reconnect = _never


class Clients:
    """All clients, and the grid between them and the server."""

    def __init__(self, count: int, parameters: int) -> None:
        rng = np.random.default_rng(0)
        self.vectors = {i: [rng.normal(0, 0.05, parameters).astype(np.float32)] for i in range(1, count + 1)}
        self.contexts = {
            i: Context(run_id=1, node_id=i, node_config={}, state=RecordDict(), run_config={}) for i in self.vectors
        }
        self.seconds = 0.0
        self.bytes_up = 0

    def _train(self, message: Message, context: Context) -> Message:
        result = FitRes(
            status=Status(Code.OK, ""),
            parameters=ndarrays_to_parameters(self.vectors[context.node_id]),
            num_examples=10,
            metrics={},
        )
        return Message(compat.fitres_to_recorddict(result, False), reply_to=message)

    def send_and_receive(self, messages: Any, **_: Any) -> list[Message]:
        """Hand messages over and return the answers."""
        began = time.process_time()
        replies = []
        for message in messages:
            # The server gives all clients one object, which each of them changes.
            content = RecordDict(dict(message.content))
            content.config_records[RECORD_KEY_CONFIGS] = ConfigRecord(
                dict(message.content.config_records[RECORD_KEY_CONFIGS])
            )
            message.content = content
            replies.append(secaggplus_mod(message, self.contexts[message.metadata.dst_node_id], self._train))
        self.seconds += time.process_time() - began
        for reply in replies:
            for value in reply.content.config_records[RECORD_KEY_CONFIGS].values():
                if isinstance(value, bytes):
                    self.bytes_up += len(value)
                elif isinstance(value, list):
                    self.bytes_up += sum(len(each) for each in value if isinstance(each, bytes))
        return replies


class Strategy:
    """Takes everybody; keeps the result."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self.result: Any = None

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> list[Any]:
        """All clients."""
        return [(Proxy(i), FitIns(parameters, {})) for i in self._clients.vectors]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> tuple[Any, dict[str, Any]]:
        """What secure aggregation made is in each result."""
        assert not failures
        self.result = parameters_to_ndarrays(results[0][1].parameters)
        return results[0][1].parameters, {}


class Manager:
    """Counts."""

    def num_available(self) -> int:
        """Everybody."""
        return 0


def round_of(count: int, parameters: int, shares: int, threshold: int) -> dict[str, float]:
    clients = Clients(count, parameters)
    strategy = Strategy(clients)
    base = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    context = LegacyContext(base, strategy=strategy, client_manager=Manager())
    zeros = ndarrays_to_parameters([np.zeros(parameters, dtype=np.float32)])
    context.state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(zeros, True)
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
    workflow = SecAggPlusWorkflow(shares, threshold)
    began = time.process_time()
    workflow(clients, context)
    seconds = time.process_time() - began
    assert strategy.result is not None, "the round did not complete"
    mean = np.mean([vectors[0] for vectors in clients.vectors.values()], axis=0)
    assert np.abs(strategy.result[0] - mean).max() < 1e-3, "the sum is wrong"
    return {
        "round_s": seconds,
        "client_s": clients.seconds / count,
        "server_s": seconds - clients.seconds,
        "bytes_up": clients.bytes_up / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--parameters", type=int, default=1 << 20)
    parser.add_argument("--shares", type=int, default=3, help="as in Flower's own example")
    parser.add_argument("--threshold", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    runs = [
        round_of(options.clients, options.parameters, options.shares, options.threshold) for _ in range(options.repeat)
    ]
    found = min(runs, key=lambda run: run["round_s"])
    print(json.dumps({"version": version("flwr"), "shares": options.shares, **found}))


if __name__ == "__main__":
    main()
