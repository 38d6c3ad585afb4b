from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from agentforge.errors import Incomparable
from agentforge.evaluation import Measurement


def measured(value: float = 19.92, stderr: float | None = 0.31, unit: str = "perplexity", **protocol: Any) -> Measurement:
    return Measurement(value, unit, stderr, 20470, {"text": "wikitext2", "context": 2048, **protocol}, seed=0)


def test_the_difference_of_two() -> None:
    assert measured(20.0).minus(measured(19.5)) == 0.5


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        (measured(context=1024), "context"),
        (measured(text="selftext", context=1024), "context, text"),
        (measured(stride=512), "stride"),
        (measured(unit="nats/token"), "unit"),
    ],
)
def test_what_differs_is_named(other: Measurement, differing: str) -> None:
    for a, b in ((measured(), other), (other, measured())):
        with pytest.raises(Incomparable, match=f"differ in {differing};"):
            a.minus(b)


def test_seed_and_inputs_may_differ() -> None:
    other = dataclasses.replace(measured(18.92), seed=1, inputs={"model": "another"})
    assert measured().minus(other) == pytest.approx(1.0)


def test_it_reads_well() -> None:
    assert str(measured()) == "19.92 ± 0.31 perplexity (n = 20,470)"
    assert str(measured(stderr=None, unit="bytes")) == "19.92 bytes (n = 20,470)"


def test_json_has_every_field() -> None:
    data = json.loads(json.dumps(measured().to_json()))
    assert data.keys() == {f.name for f in dataclasses.fields(Measurement)}
    assert Measurement(**data) == measured()
    assert not math.isnan(data["stderr"])


def test_the_environment_is_recorded() -> None:
    import transformers

    environment = measured().environment
    assert environment["threads"] == torch.get_num_threads()
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert environment["packages"]["transformers"] == transformers.__version__
    assert environment["cpu"]
    assert environment["python"].startswith("3.")


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        measured().value = 1.0  # type: ignore[misc]
