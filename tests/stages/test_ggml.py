"""ggml's blocks: bytes that the `gguf` package reads as we do, chosen with less damage than its own rounding does."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conformance import correlated, gaussian

import agentforge as af
from agentforge import open_model, stages
from agentforge.artifact import Artifact
from agentforge.errors import BadInput
from agentforge.exports import export
from agentforge.planes import Packed
from agentforge.stages import ggml
from agentforge.stages.base import damage
from agentforge.statistics import InputStatistics

TYPES = list(ggml.FORMS)
CODED_BY_GGUF = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "tq1_0", "tq2_0"]  # the types that the package encodes, too


def rows_of_unequal_size(rows: int, columns: int) -> torch.Tensor:
    return 0.05 * gaussian((rows, columns), 3) * torch.linspace(0.2, 3, rows)[:, None]


def statistics(columns: int) -> InputStatistics:
    return InputStatistics(correlated(columns), 4 * columns)


def by_itself(kind: str, data: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """What a file with these bytes says, by gguf's decoder of one block after the other."""
    of_type = gguf.GGMLQuantizationType[kind.upper()]
    flat = gguf.dequantize(np.ascontiguousarray(data).reshape(-1, gguf.GGML_QUANT_SIZES[of_type][1]), of_type)
    return flat.reshape(rows, -1)[:, :columns]


@pytest.mark.parametrize("kind", TYPES)
def test_bytes_stand_for_the_values_that_were_chosen(kind: str) -> None:
    """The encoder's own scales times levels, less minima, are what gguf's decoder makes of the bytes."""
    weight, stats = rows_of_unequal_size(40, 512), statistics(512)
    stage = stages.get("ggml", type=kind)
    packed = stage.encode(weight, stats)
    plan = ggml._plan(stage.form, 512, stats, stage.damping)
    found = ggml._quantise(weight.numpy(), plan, stage.form)
    of_parts = found.levels.reshape(*found.scales.shape[:2], -1, 40)
    meant = of_parts * found.scales[:, :, None] - found.minima[:, :, None]
    data = packed["blocks"].numpy()
    columns, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    assert data.shape == (40, 512 // columns * size)
    np.testing.assert_allclose(by_itself(kind, data, 40, 512), meant.reshape(-1, 40).T, rtol=0, atol=1e-7)
    assert torch.equal(stage.decode(packed), torch.from_numpy(by_itself(kind, data, 40, 512)))
    assert len(np.unique(found.levels)) > len(stage.form.levels) // 2


@pytest.mark.parametrize("kind", TYPES)
def test_feedback_of_errors_does_less_damage_than_columns_by_themselves(kind: str) -> None:
    weight, stats = rows_of_unequal_size(48, 512), statistics(512)
    stage = stages.get("ggml", type=kind)
    alone = stage.encode(weight, InputStatistics(torch.diag(stats.diagonal), stats.n))  # as an importance matrix sees it
    lost = damage(weight, stage.decode(stage.encode(weight, stats)), stats)
    assert lost < 0.75 * damage(weight, stage.decode(alone), stats)


@pytest.mark.parametrize("kind", CODED_BY_GGUF)
def test_less_damage_than_what_gguf_itself_encodes(kind: str) -> None:
    weight, stats = rows_of_unequal_size(48, 256), statistics(256)
    of_type = gguf.GGMLQuantizationType[kind.upper()]
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), of_type), of_type))
    stage = stages.get("ggml", type=kind)
    assert damage(weight, stage.decode(stage.encode(weight, stats)), stats) < 0.6 * damage(weight, theirs, stats)
    # Without statistics the squared error is what counts.
    assert float((stage.decode(stage.encode(weight)) - weight).square().sum()) <= float((theirs - weight).square().sum())


def test_what_lies_on_a_grid_already_stays_as_it_is() -> None:
    """Weights of a Q4_1 file, encoded as Q4_1 again: the default model's own file loses nothing."""
    of_type = gguf.GGMLQuantizationType.Q4_1
    weight = torch.from_numpy(gguf.dequantize(gguf.quantize(rows_of_unequal_size(40, 96).numpy(), of_type), of_type))
    stage = stages.get("ggml", type="q4_1")
    assert torch.equal(stage.decode(stage.encode(weight, statistics(96))), weight)


# Of tq1_0 and tq2_0: which digit of which byte a weight is, as in ggml-quants.c.
DIGITS = {
    "tq1_0": [
        (first + m, k)
        for first, bytes_, digits in ((0, 32, 5), (32, 16, 5), (48, 4, 4))
        for k in range(digits)
        for m in range(bytes_)
    ],
    "tq2_0": [(32 * half + m, k) for half in range(2) for k in range(4) for m in range(32)],
}


@pytest.mark.parametrize("kind", DIGITS)
def test_ternary_blocks_digit_by_digit(kind: str) -> None:
    """Five base-3 digits in a byte, times 256 / 243 and rounded up, the first one highest; or four of 2 bits."""
    weight, stats = rows_of_unequal_size(6, 512), statistics(512)
    stage = stages.get("ggml", type=kind)
    packed = stage.encode(weight, stats)
    back = np.zeros((6, 512), np.float32)
    for row, data in enumerate(packed["blocks"].numpy().reshape(6, 2, -1)):
        for block, own in enumerate(data):
            d = float(own[-2:].view(np.float16)[0])
            for i, (byte, digit) in enumerate(DIGITS[kind]):
                code = int(own[byte]) * 3**digit % 256 * 3 >> 8 if kind == "tq1_0" else int(own[byte]) >> 2 * digit & 3
                back[row, 256 * block + i] = d * (code - 1)
    assert np.array_equal(stage.decode(packed).numpy(), back)
    of_type = gguf.GGMLQuantizationType[kind.upper()]
    assert np.array_equal(gguf.quantize(back, of_type), packed["blocks"].numpy())


@pytest.mark.parametrize("kind", ["q4_k", "iq4_nl", "q2_k", "tq1_0"])
def test_a_price_is_about_what_encoding_costs(kind: str) -> None:
    weight = rows_of_unequal_size(600, 256)
    sensitivity = gaussian((1, 600), 9)[0].exp()
    stats = InputStatistics(correlated(256), 1024, sensitivity)
    stage = stages.get("ggml", type=kind)
    size, lost, counted = stage.price(weight, stats, "w", {})
    packed = stage.encode(weight, stats)
    assert counted and size == packed["blocks"].numel()
    assert lost == pytest.approx(damage(weight, stage.decode(packed), stats), rel=0.1)


def test_rows_that_are_no_whole_blocks_are_refused_by_the_file(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = af.compress(tiny_llama, "ggml:type=q4_k", tmp_path / "a", progress=False)
    with pytest.raises(BadInput, match=r"^tensor model.layers.0.* as q4_k in rows of \d+; .* multiples of 256 .*type$"):
        export(artifact, "gguf")
    assert stages.get("ggml", type="q4_k").price(torch.ones(4, 64), statistics(64), "w", {})[1] == float("inf")


def test_an_artifact_becomes_a_file_of_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = af.compress(tiny_llama, "ggml:type=iq4_nl", tmp_path / "a", progress=False)
    found = export(artifact, "gguf", tmp_path / "a.gguf")
    assert found.kinds["IQ4_NL"] == 14 and not found.rounded
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(found.path).tensors}
    down = next(row for row in Artifact(artifact.path).rows if row["name"].endswith("layers.1.mlp.down_proj.weight"))
    held = artifact.read(down)
    assert isinstance(held, Packed)
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight"].data, held["blocks"].numpy())
    opened = open_model(found.path)
    assert torch.equal(opened.tensor(down["name"]), artifact.decode(down))
