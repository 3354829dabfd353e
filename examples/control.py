"""Asks the coordinator for its status from a program of one's own: what `fleetfed round status` does, step by step.

    python examples/control.py runs/demo/keys/identities/operator 127.0.0.1 8883

It uses the fleet's wire and trust modules and paho-mqtt. `docs/control.md` tells the same for other languages.
"""

import json
import os
import queue
import ssl
import sys
import time
from pathlib import Path

import paho.mqtt.client as paho

from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.wire.envelope import MessageKind
from fleetfed.shared.wire.messages import Command, Request, Response
from fleetfed.shared.wire.topics import CLOUD_SITE, Kind, SiteTopics, Verb


def main(folder: str, host: str, port: int) -> int:
    # Who I am: a key, the authority's certificate of it, and the authority that I trust.
    identity = Identity.load(Path(folder), role=Role.OPERATOR)
    me = identity.certificate.id
    topics = SiteTopics(identity.certificate.fleet, CLOUD_SITE)
    # Any number that grows with every message of this identity will do, over restarts too.
    signer = identity.signer(sequence=time.time_ns, randomness=os.urandom)
    verifier = identity.verifier()

    # The broker knows me by my TLS certificate; client id, user name and common name are one.
    tls = Path(folder) / "tls"
    context = ssl.create_default_context(cafile=tls / "ca.pem")
    context.load_cert_chain(tls / "cert.pem", tls / "key.pem")
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=me, protocol=paho.MQTTv5)
    client.tls_set_context(context)
    subscribed: queue.SimpleQueue[bool] = queue.SimpleQueue()
    answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    client.on_subscribe = lambda *_: subscribed.put(True)
    client.on_message = lambda _client, _data, message: answers.put(message.payload)
    client.connect(host, port)
    client.loop_start()
    client.subscribe(topics.all_down(Kind.OPERATOR, me), qos=1)
    subscribed.get(timeout=10)

    # A command is a signed message with an expiry. To try again, send the same bytes: they are carried out once.
    now = time.time_ns() // 1_000_000
    request = signer.sign(MessageKind.REQUEST, Request(command=Command.ROUND_STATUS), now=now, lifetime=60_000)
    client.publish(topics.up(Kind.OPERATOR, me, Verb.REQUEST), request.encode(), qos=1)

    # The answer names the request, and only a coordinator's signature makes it one.
    while True:
        payload = answers.get(timeout=10)
        response, _, _ = verifier.open(payload, Response, kind=MessageKind.RESPONSE, now=time.time_ns() // 1_000_000)
        if response.request == request.id:
            break
    client.disconnect()
    client.loop_stop()
    if response.error:
        print(f"{response.error}: {response.detail}", file=sys.stderr)
        return 5
    print(json.dumps(response.result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
