"""The bytes of every stage, by their hashes.

A change of these hashes is a change of the file format or of the encoding: name it in the CHANGELOG.  They are the same for
any number of threads and for torch's default, AVX2 and AVX-512 code: codes and half floats leave no room for the last bits
of float sums, with a weight this small.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agentforge import stages
from agentforge.statistics import InputStatistics

HASHES = {
    "curves:degree=3,segment=50,sort=tensor": "3a7c7da1ed75779dfbae5cbaf98fc3c9be36bcbb4fd77d6c38c282c0f7e64a6c",
    "ecsq:step=0.5,gains=True": "78a0a0f0a7cb259233ac22c3bd67f23c577546d04df4e707ac8dd008daccb07c",
    "ggml:type=iq4_nl": "827b10c35565ae97f57119fc767cab38d6f9c88837db75c294c83e556bfd4f6d",
    "rounding:bits=3,group=32,clip=mse": "7ee337080f4fb84781ec58499cc1da77ff574631f701dfaae521b4b47e19cc7c",
    "rounding:bits=3,group=32 | entropy": "5dedb1faa5d57b2890062dfc14fbda612eaa8f93fe80c33b3f1b4e8734b53a8c",
    "seedlm:K=9,C=12,P=4,refine=True,weighted=True": "f0f05c10e5093a9528d333f53eccf32d1579b8059f72c5cb25535124fcbbeea5",
    "tcq:step=0.3,states=32,gains=True": "8466e613459e8580828f6949b62907fac61516a2d8f05c7d8ec8e722e6026111",
    "ternary:rule=calibrated": "4b55761461d32184e415e9a7f404248322e1425990b701bf721cc554b80a0c8f",
    "trajectory:U=225,M=2": "7127d2229865cd9e1aa6418f8016a07af717a5e61a0fc961d3b4c0c15c933693",
    "vptq:v=4,k=16,residual=8": "33c7a4cc47751bd725335d1280228a8a5866a5869a5f00397e1f92f9949958d7",
}


def test_every_registered_stage_has_a_hash() -> None:
    assert {text.partition(":")[0] for text in HASHES} == set(stages.names())


@pytest.mark.parametrize(("text", "expected"), HASHES.items())
def test_bytes_are_those_of_before(text: str, expected: str) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((48, 128), np.float32))
    hessian, sensitivity = torch.tensor([1.0, 4.0]).repeat(64).diag(), torch.tensor([1.0, 2.0, 4.0]).repeat(16)
    assert stages.parse(text).encode(weight, InputStatistics(hessian, 1000, sensitivity)).sha256 == expected
