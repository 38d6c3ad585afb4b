"""Layers that decode as they compute: every stage's planes stay planes, and results are the dense runtime's."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import agentforge as af
from agentforge.errors import BadArtifact
from agentforge.runtime import PackedEmbedding, PackedLinear

STAGES = [
    "rounding:bits=4,group=32",
    "rounding:bits=3 | entropy",
    "seedlm:bits=4",
    "vptq:v=4,k=16",
    "vptq:v=4,k=16,shared=true",
    "vptq:v=4,k=16,shared=true | entropy",
    "trajectory",
    "curves",
    "ecsq",
    "tcq",
]


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(40).reshape(2, 20)
    with torch.inference_mode():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_results_are_those_of_the_dense_runtime(stage: str, embeddings: bool, tiny_llama: Path, tmp_path: Path) -> None:
    path = af.compress(tiny_llama, stage, tmp_path / "a", embeddings=embeddings, progress=False).path
    dense, packed = af.load(path).model, af.load(path, "packed").model
    assert torch.equal(logits(packed), logits(dense))
    assert isinstance(packed.model.layers[0].mlp.up_proj, PackedLinear)
    assert isinstance(packed.get_input_embeddings(), PackedEmbedding) is embeddings


def test_the_state_dictionary_holds_what_is_on_disk(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = af.compress(tiny_llama, STAGES[5], tmp_path / "a", embeddings=True, progress=False).path
    state, disk = af.load(path, "packed").model.state_dict(), load_file(path / "model.safetensors")
    planes = [name for name, tensor in disk.items() if not name.endswith("norm.weight")]
    assert planes and all(torch.equal(state[name], disk[name]) for name in planes)


def test_a_cast_leaves_planes_alone(tiny_llama: Path, tmp_path: Path) -> None:
    path = af.compress(tiny_llama, STAGES[0], tmp_path / "a", progress=False).path
    model = af.load(path, "packed").model
    before = {name: tensor.clone() for name, tensor in model.named_buffers() if "_proj.weight." in name}
    cast = copy.deepcopy(model).to(torch.bfloat16)
    assert before and all(torch.equal(cast.get_buffer(name), tensor) for name, tensor in before.items())
    assert logits(cast).dtype == torch.bfloat16
    expected = logits(af.load(path).model)  # the packed head keeps its 16 bits, so that the two casts differ a little
    assert ((logits(cast) - expected).norm() / expected.norm()) < 5e-2


def test_planes_that_no_stage_writes_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    path = af.compress(tiny_llama, "rounding:bits=3 | entropy", tmp_path / "a", progress=False).path
    model = af.load(path, "packed").model
    model.model.layers[1].mlp.up_proj.weight.codes.fill_(255)
    with pytest.raises(BadArtifact, match="plane codes"):
        logits(model)


def test_a_classifier_stays_packed_too(digits: af.models.LanguageModel, tmp_path: Path) -> None:
    path = af.compress(digits, "vptq:v=4,k=16", tmp_path / "a", progress=False).path
    assert af.accuracy(af.load(path, "packed")).value == af.accuracy(af.load(path)).value
