"""Products from packed bits: the kernels against float64, and parts of a weight against the whole."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import agentforge as af
from agentforge import stages
from agentforge.bits import pack_uint
from agentforge.errors import BadArtifact
from agentforge.runtime import PackedEmbedding, PackedLinear, PackedWeight, SharedPlanes, forms, packed_cpu, resident_bytes
from agentforge.runtime.forms import PART
from agentforge.stages.base import Layer

TOLERANCE = 1e-6  # of |x| |W|^T: what packed_cpu promises
FUSED = [
    "rounding:bits=4,group=64",
    "rounding:bits=2,group=64",
    "rounding:bits=3,group=32,symmetric=true",
    "rounding:bits=8,group=0",
    "rounding:bits=5,group=64 | entropy",
    "ecsq:step=0.1",
    "ecsq:gains=true",
    "tcq:step=0.1",
    "tcq:gains=true",
    "vptq:v=4,k=64",
    "vptq:v=6,k=32,residual=16,norm=std",
    "vptq:v=3,k=30,shared=true",
    "vptq:v=4,k=16 | entropy",
    "trajectory",
    "trajectory:K=1,U=40,M=1,l=0",
]
OTHERS = ["seedlm:K=6,C=8,P=3", "curves", "ternary:packing=trits", "vptq:v=4,k=16,outliers=0.1", "vptq:v=4,k=16,parts=2"]


def weight_of(text: str, rows: int, columns: int) -> tuple[PackedWeight, torch.Tensor]:
    """A packed weight, and what its stage decodes all of it to."""
    stage = stages.parse(text)
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.03
    shared = stage.fit_shared([Layer("weight", lambda: dense, None)]) if stage.shared_layout() else None
    packed = stage.encode(dense, shared=shared)
    planes = None if shared is None else SharedPlanes(stage, {plane.name: plane.stored() for plane in shared})
    weight = PackedWeight(stage, packed.shape, {plane.name: plane.stored() for plane in packed}, planes)
    return weight, stage.decode(packed)


def assert_near(found: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> None:
    error = (found - x.double() @ dense.double().T).abs()
    assert (error <= TOLERANCE * (x.double().abs() @ dense.double().abs().T)).all()


@pytest.mark.parametrize("text", FUSED)
def test_products_are_those_of_the_decoded_weight(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows, columns in [(70, 192), (26, 384)]:
        weight, dense = weight_of(text, rows, columns)
        for tokens in (1, 3):
            x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
            found = forms.product(weight.ready, x)
            assert found is not None
            assert_near(found, x, dense)
            assert torch.equal(weight.product(x[None])[0], found)
            assert torch.equal(weight.product(x.bfloat16()), forms.product(weight.ready, x.bfloat16().float()).bfloat16())  # type: ignore[union-attr]
        monkeypatch.setattr("agentforge.runtime.ternary_cpu.WORTH_THREADS", 1)
        assert torch.equal(forms.product(weight.ready, x), found)  # type: ignore[arg-type]
        monkeypatch.undo()
        many = torch.randn((forms.FEW if weight.ready.grid is None else forms.GRID_FEW) + 1, columns)
        assert forms.product(weight.ready, many) is None
        assert_near(weight.product(many), many, dense)
        assert torch.equal(weight.dense(), dense)


@pytest.mark.parametrize("width", packed_cpu.WIDTHS)
@pytest.mark.parametrize("columns", [3, 64, 199, 576])
def test_codes_of_every_width_and_large_ones_beside_them(width: int, columns: int) -> None:
    generator, rows = torch.Generator().manual_seed(columns), 37
    zigzag = torch.randint(0, 1 << width, (rows, columns), generator=generator)
    large = torch.rand(rows, columns, generator=generator) < 0.004
    zigzag[large] = torch.randint(0, 1 << 16, (int(large.sum()),), generator=generator)
    zigzag[-1, -1], zigzag[0, 0] = (1 << 16) - 1, (1 << 16) - 2
    codes = torch.where(zigzag % 2 == 0, zigzag // 2, -(zigzag + 1) // 2).float()
    of_rows, of_columns, gains = (torch.rand(n, generator=generator) + 0.5 for n in (rows, columns, rows))
    dense = codes * of_rows[:, None] * of_columns * gains[:, None]
    grid = packed_cpu.narrow(zigzag.to(torch.uint16), of_rows, of_columns, gains)
    assert grid is not None and (columns < 64 or grid.width == width)
    assert torch.equal(packed_cpu.decode(grid, 0, rows), dense)
    assert torch.equal(packed_cpu.decode(grid, 5, 6), dense[5:6])
    x = torch.randn(6, columns, generator=generator)
    assert_near(packed_cpu.grid(x, grid), x, dense)
    assert torch.equal(packed_cpu.grid(x[5:], grid)[0], packed_cpu.grid(x, grid)[5])
    assert torch.equal(packed_cpu.grid(x[:1], grid)[0], packed_cpu.grid(x, grid)[0])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group", "columns"), [(16, 128), (32, 96), (64, 576), (128, 384), (192, 576), (576, 576), (512, 1536)]
)
def test_groups_of_every_size(bits: int, group: int, columns: int) -> None:
    for more in ("", ",symmetric=true"):
        weight, dense = weight_of(f"rounding:bits={bits},group={group}{more}", 22, columns)
        x = torch.randn(5, columns, generator=torch.Generator().manual_seed(2))
        words, of_row = (count * (1 << (bits - 1).bit_length()) / 32 for count in (group, columns))
        assert (weight.ready.grid is not None) == ((words % 8 == 0 or 8 % words == 0) and of_row % 4 == 0)
        assert_near(weight.product(x), x, dense)
        assert torch.equal(weight.dense(), dense)


@pytest.mark.parametrize(("width", "count"), [(2, 7), (13, 64), (20, 64)])
def test_indices_of_every_width_and_no_further(width: int, count: int) -> None:
    lines, v = 5, 3
    book = torch.randn(min(1 << width, 3000), v)
    indices = torch.randint(0, len(book), (lines, count))
    stored = pack_uint(indices, width)
    x = torch.randn(2, count)
    assert_near(packed_cpu.vectors(x, stored, width, lines, count, book, False), x, book[indices].mT.reshape(-1, count))
    x = torch.randn(2, count * v)
    assert_near(packed_cpu.vectors(x, stored, width, lines, count, book, True), x, book[indices].reshape(lines, -1))
    top = packed_cpu.vectors(x, torch.full_like(stored, 255), width, lines, count, book[:2], True)  # beyond: the last one
    assert_near(top, x, book[1].repeat(lines, count))


def test_what_no_kernel_computes_is_decoded() -> None:
    for text, shape in [("rounding:bits=4,group=48", (8, 96)), ("rounding:bits=4", (3, 64)), ("trajectory", (8, 65))]:
        weight, dense = weight_of(text, *shape)
        x = torch.randn(1, shape[1])
        assert forms.product(weight.ready, x) is None
        assert_near(weight.product(x), x, dense)
    weight, dense = weight_of("rounding:bits=4,group=64", 8, 64)
    huge = PackedWeight(weight.stage, (8, 64), {name: t.clone() for name, t in weight.named_buffers()})
    huge.exponent.fill_(28)  # type: ignore[operator, union-attr]
    assert forms.product(huge.ready, torch.randn(1, 64)) is None
    assert torch.equal(huge.product(torch.eye(64)[:1]), huge.dense()[:, 0][None])


@pytest.mark.parametrize("text", FUSED + OTHERS)
def test_parts_are_those_of_the_whole(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentforge.runtime.forms.PART", 1)
    for rows, columns in [(250, 36), (41, 35)]:
        weight, dense = weight_of(text, rows, columns)
        parts = weight.ready.parts()
        whole = text == "curves" or "outliers" in text or "parts" in text
        assert (len(parts) == 1) or not whole
        assert torch.equal(torch.cat([weight.ready.rows(*part) for part in parts]), dense)
        ids = torch.tensor([[rows - 1, 0], [0, 3]])
        assert torch.equal(PackedEmbedding(weight)(ids), dense[ids])
        assert_near(weight.product(torch.eye(columns)), torch.eye(columns), dense)
    assert PART >= 1 << 16


def test_planes_are_checked_once_and_after_loading() -> None:
    weight, _ = weight_of("vptq:v=4,k=16,residual=3", 64, 64)
    x = torch.randn(1, 64)
    before = weight.product(x)
    state = {name: tensor.clone() for name, tensor in weight.state_dict().items()}
    state["residual_indices"].fill_(255)
    weight.load_state_dict(state)
    with pytest.raises(BadArtifact, match="residual_indices: holds 3"):
        weight.product(x)
    moved = copy.deepcopy(weight_of("vptq:v=4,k=16,residual=3", 64, 64)[0])
    assert torch.equal(moved.to(torch.bfloat16).product(x), before)


@pytest.mark.parametrize("text", ["rounding:bits=4,group=64", "tcq:step=0.1", "vptq:v=4,k=16"])
def test_a_copy_reads_its_own_planes(text: str) -> None:
    weight, _ = weight_of(text, 64, 64)
    x = torch.randn(1, 64)
    expected = weight.product(x)
    copies = copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))
    for buffer in weight.buffers():
        buffer.zero_()
    del weight
    assert all(torch.equal(one.product(x), expected) for one in copies)


def test_what_is_in_memory() -> None:
    weight, _ = weight_of("rounding:bits=4,group=64", 64, 128)
    layer = PackedLinear(weight, torch.zeros(64))
    layer(torch.randn(1, 128))
    planes, factors = 64 * 128 // 2 + 2 * 2 * 64 * 2 + 1, 4 * 64
    assert resident_bytes(layer) == planes + factors + 4 * 64
    coded, _ = weight_of("rounding:bits=4,group=64 | entropy", 64, 128)
    stored = sum(buffer.nbytes for buffer in coded.buffers())
    assert resident_bytes(coded) == stored
    coded.product(torch.randn(1, 128))
    assert resident_bytes(coded) == stored + planes + factors  # the codes once more, plain


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "text", ["rounding", "vptq:v=6,k=32,residual=16", "vptq:v=3,k=16,shared=true", "seedlm:K=6,C=8,P=3"]
)
def test_decoding_on_a_gpu_is_that_of_the_cpu(text: str) -> None:
    weight, dense = weight_of(text, 70, 33)
    on_gpu: Any = torch.nn.ModuleList([weight, *filter(None, weight._shared)]).to("cuda")
    assert torch.equal(on_gpu[0].dense().cpu(), dense)


def test_a_model_generates_as_the_dense_one_does(tiny_llama: Path, tmp_path: Path) -> None:
    path = af.compress(tiny_llama, "rounding:bits=4,group=64", tmp_path / "a", embeddings=True, progress=False).path
    dense, packed = af.load(path).model, af.load(path, "packed").model
    ids = torch.arange(2, 12)[None]
    with torch.inference_mode():
        found = packed(ids).logits, dense(ids).logits
        assert ((found[0] - found[1]).norm() / found[1].norm()) < 1e-5
        options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(packed.generate(ids, **options), dense.generate(ids, **options))


def test_the_benchmark_takes_a_row_and_does_not_take_it_again(
    load_benchmark: Callable[[str], ModuleType], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = load_benchmark("runtime")
    monkeypatch.setattr(benchmark.bench, "read_bandwidth", lambda clock: 1e10)
    monkeypatch.setattr(benchmark, "PROMPTS", (20,))
    monkeypatch.setattr(benchmark.bench, "apart", lambda *_: {"peak_bytes": 3 << 20, "load_s": 0.5})
    out, threads = tmp_path / "out", torch.get_num_threads()
    command = ["runtime.py", "--model", tiny_llama, "--runs", "rounding:bits=4,group=64 | entropy", "--llama", "--rounds", 2]
    command += ["--tokens", 2, "--threads", 1, "--work", tmp_path / "made", "--out", out]
    monkeypatch.setattr("sys.argv", [str(word) for word in command])
    try:
        benchmark.main()
        first = (out / "runtime.json").read_text()
        monkeypatch.setattr(benchmark, "measured", lambda *_: pytest.fail("measured again"))
        benchmark.main()
    finally:
        torch.set_num_threads(threads)
    record = json.loads(first)
    row = record["rows"]["rounding:bits=4,group=64 | entropy"]
    assert row["held"] > row["read"] > 0 and row["held"] < record["dense"]["held"]
    assert row["generation"]["dense"]["ratio"]["value"] == 1 and row["20"]["bfloat16"]["n"] == 2
    assert "| `rounding:bits=4,group=64 \\| entropy` |" in (out / "runtime.md").read_text()
