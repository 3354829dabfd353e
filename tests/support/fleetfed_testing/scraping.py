"""Reads a role's monitoring port as Prometheus does."""

from __future__ import annotations

import urllib.error
import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Scrape:
    """One answer of ``/metrics``.

    Attributes:
        kinds: of every metric, by its name in the catalog.
        helps: the same of its help.
        samples: by name and labels.
    """

    kinds: dict[str, str]
    helps: dict[str, str]
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]

    def value(self, name: str, **labels: str) -> float | None:
        """One series; None where there is none."""
        return self.samples.get((name, frozenset(labels.items())))

    def labelled(self, name: str, label: str) -> set[str]:
        """The values of a label."""
        return {dict(labels)[label] for found, labels in self.samples if found == name}


def parsed(text: str) -> Scrape:
    """What a Prometheus understands.

    Raises:
        AssertionError: a series is there twice.
    """
    scrape = Scrape({}, {}, {})
    for family in text_string_to_metric_families(text):
        # The parser takes ``_total`` away.
        name = f"{family.name}_total" if family.type == "counter" else family.name
        scrape.kinds[name], scrape.helps[name] = family.type, family.documentation
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in scrape.samples, key
            scrape.samples[key] = sample.value
    return scrape


def get(port: int, path: str = "/metrics") -> tuple[int, str]:
    """Status and body."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def scrape(port: int) -> Scrape:
    """``/metrics`` of a role that is there."""
    status, body = get(port)
    assert status == 200, body
    return parsed(body)
