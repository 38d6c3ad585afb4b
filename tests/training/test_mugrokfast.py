"""MuGrokfast: the filter's gain by hand, Muon and AdamW against torch's own, and the mistakes that were made before."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from agentforge.errors import BadInput
from agentforge.training.mugrokfast import MuGrokfast, amplify_slow, parameter_groups

SHAPES = [(128, 128), (64, 128), (128, 64), (256, 192), (1, 50), (50, 1), (8, 4, 3, 3), (5, 6, 7)]


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(tensor(*shape, seed=seed))


def group(*parameters: nn.Parameter, muon: bool, **options: Any) -> dict[str, Any]:
    return {"params": list(parameters), "muon": muon, **options}


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """What a step of Muon takes from a weight of zeros, less its scale, 0.2 sqrt(max(rows, cols)) (arXiv 2502.16982)."""
    weight = nn.Parameter(torch.zeros_like(matrix))
    weight.grad = matrix
    MuGrokfast([group(weight, muon=True)], lr=1.0, momentum=0.0, weight_decay=0.0, lamb=0.0).step()
    return -weight.detach() / (0.2 * math.sqrt(max(matrix.shape)))


class TinyNet(nn.Module):
    """An embedding, two blocks, a head: every kind of parameter once."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in "ab"
        )
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def make(seed: int = 0, **options: Any) -> tuple[TinyNet, MuGrokfast, torch.optim.lr_scheduler.LambdaLR]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TinyNet()
    optimizer = MuGrokfast(parameter_groups(model), **options)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))


def train(model: TinyNet, optimizer: MuGrokfast, scheduler: torch.optim.lr_scheduler.LambdaLR, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(11, (16, 2), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens[:, 0]), tokens[:, 1]).backward()
        optimizer.step()
        scheduler.step()


class TestFilter:
    """The earlier filter was g + lambda (g - mu): 1.0 on a constant gradient and 2.98 on an alternating one."""

    def test_a_constant_gradient_comes_out_one_plus_lambda_times(self) -> None:
        gradient, ema = tensor(7), tensor(7).clone()
        for _ in range(5):
            torch.testing.assert_close(amplify_slow(gradient, ema, 0.98, 2.0), 3 * gradient)
        torch.testing.assert_close(ema, gradient)

    def test_an_alternating_gradient_is_left_alone(self) -> None:
        # mu_t = r_t (-1)^t c with r_1 = 1, r_t = 0.02 - 0.98 r_(t-1): |r| falls by 0.98 a step around its rest,
        # r = 0.02 / 1.98, so that the gain goes to 1 + 2 * 0.02 / 1.98 = 1.0202.
        one, ema = torch.ones(1), torch.ones(1)
        sign, share = 1.0, 1.0
        for step in range(1500):
            share = 0.02 + 0.98 * (share if step == 0 else -share)
            out = amplify_slow(sign * one, ema, 0.98, 2.0)
            torch.testing.assert_close(out, torch.tensor([sign * (1 + 2 * share)]), rtol=1e-4, atol=1e-6)
            sign = -sign
        assert abs(float(out)) == pytest.approx(1 + 2 * 0.02 / 1.98, rel=1e-4)

    @pytest.mark.parametrize(("frequency", "fast"), [(0.0, False), (0.001, False), (0.1, True), (0.25, True), (0.5, True)])
    def test_gain_by_frequency(self, frequency: float, fast: bool) -> None:
        """|1 + lambda (1 - alpha) / (1 - alpha e^(-i w))|, from the filter's transfer function."""
        omega = 2 * math.pi * frequency
        expected = abs(1 + 2 * 0.02 / (1 - 0.98 * complex(math.cos(omega), -math.sin(omega))))
        # cosine and sine at once: the modulus of the two is the amplitude, at every step once the start is forgotten
        steps = 1000
        signal = torch.tensor([[math.cos(omega * t), math.sin(omega * t)] for t in range(steps)], dtype=torch.float64)
        ema = signal[0].clone()
        for g in signal:
            out = amplify_slow(g, ema, 0.98, 2.0)
        assert float(out.norm()) == pytest.approx(expected, rel=1e-6)
        assert (expected < 1.05) == fast

    def test_the_optimizer_filters_every_parameter_and_leaves_the_gradient_alone(self) -> None:
        weight, vector = parameter(6, 4), parameter(4, seed=1)
        filtered = MuGrokfast([group(weight, muon=True), group(vector, muon=False)], lamb=2.0, alpha=0.9)
        plain_weight, plain_vector = copy.deepcopy(weight), copy.deepcopy(vector)
        plain = MuGrokfast([group(plain_weight, muon=True), group(plain_vector, muon=False)], lamb=0)
        means: list[torch.Tensor] = []
        for step in range(4):
            gradients = [tensor(6, 4, seed=10 + step), tensor(4, seed=20 + step)]
            means = means or [g.clone() for g in gradients]
            weight.grad, vector.grad = [g.clone() for g in gradients]
            plain_weight.grad, plain_vector.grad = [
                amplify_slow(g, m, 0.9, 2.0) for g, m in zip(gradients, means, strict=True)
            ]
            filtered.step()
            plain.step()
            assert torch.equal(weight.grad, gradients[0]) and torch.equal(vector.grad, gradients[1])
        assert torch.equal(weight, plain_weight) and torch.equal(vector, plain_vector)

    def test_no_mean_is_kept_where_the_filter_is_off(self) -> None:
        weight, vector = parameter(6, 4), parameter(4)
        for lamb, keys in ((0, False), (2.0, True)):
            optimizer = MuGrokfast([group(weight, muon=True), group(vector, muon=False)], lamb=lamb)
            weight.grad, vector.grad = tensor(6, 4), tensor(4)
            optimizer.step()
            assert all(("ema" in optimizer.state[p]) == keys for p in (weight, vector))


class TestMuon:
    @pytest.mark.parametrize("shape", SHAPES[:6])
    def test_is_torchs_muon_without_the_filter(self, shape: tuple[int, int]) -> None:
        ours, theirs = parameter(*shape), parameter(*shape)
        options = {"lr": 0.02, "weight_decay": 0.3, "momentum": 0.9}
        optimizer = MuGrokfast([group(ours, muon=True)], lamb=0, **options)
        reference = torch.optim.Muon([theirs], nesterov=True, adjust_lr_fn="match_rms_adamw", **options)
        for step in range(4):
            ours.grad = tensor(*shape, seed=step + 1)
            theirs.grad = ours.grad.clone()
            optimizer.step()
            reference.step()
        assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_every_shape_takes_a_step_of_the_right_size(self, shape: tuple[int, ...]) -> None:
        """The earlier code raised RuntimeError for 64x128, 128x64 and three dimensions."""
        weight = parameter(*shape)
        before = weight.detach().clone()
        optimizer = MuGrokfast([group(weight, muon=True)], lr=0.1, weight_decay=0.0)
        weight.grad = tensor(*shape, seed=1)
        optimizer.step()
        step = (before - weight.detach()).flatten(1)
        # r = min(rows, cols) singular values, 0.68 to 1.14 each, times 0.2 sqrt(max): a root mean square of
        # 0.2 sqrt(max r / (rows cols)) = 0.2 times theirs
        assert 0.66 < float(step.square().mean().sqrt()) / (0.1 * 0.2) < 1.16
        assert float((step * weight.grad.flatten(1)).sum()) > 0  # downhill

    @pytest.mark.parametrize("shape", [(5, 6, 7), (8, 4, 3, 3)])
    def test_more_dimensions_are_one_matrix(self, shape: tuple[int, ...]) -> None:
        weight = parameter(*shape)
        flat = nn.Parameter(weight.detach().flatten(1).clone())
        optimizer = MuGrokfast([group(weight, flat, muon=True)])
        for step in range(3):
            weight.grad = tensor(*shape, seed=step)
            flat.grad = weight.grad.flatten(1).clone()
            optimizer.step()
        assert torch.equal(weight.flatten(1), flat)

    @pytest.mark.parametrize("shape", [(96, 96), (64, 128), (128, 64), (16, 300), (1, 40)])
    def test_singular_values_end_near_one(self, shape: tuple[int, int]) -> None:
        matrix = tensor(*shape)
        result = newton_schulz(matrix)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        # all of them start above 0.002 of the Frobenius norm, but for the least of a square matrix
        started = s / matrix.norm() > 0.002
        ended = (u.T @ result @ vh.T).diagonal()
        assert started.sum() >= min(shape) - 3
        assert ended[started].min() > 0.6 and ended.max() < 1.25
        aligned = (u.T @ result @ vh.T) - ended.diag()
        assert aligned.abs().max() < 0.1  # the singular vectors stay

    def test_the_polynomial(self) -> None:
        """Orthogonal columns keep their directions: a diagonal matrix goes through a s + b s^3 + c s^5 alone."""
        a, b, c = 3.4445, -4.7750, 2.0315
        s = torch.tensor([0.9, 0.4, 0.1, 0.01])
        expected = (s / s.norm()).double()
        for _ in range(5):
            expected = a * expected + b * expected**3 + c * expected**5
        torch.testing.assert_close(newton_schulz(s.diag()).diagonal().double(), expected, rtol=0.03, atol=0.0)

    def test_zero_and_scale(self) -> None:
        matrix = tensor(20, 30)
        assert torch.equal(newton_schulz(torch.zeros(20, 30)), torch.zeros(20, 30))
        assert torch.equal(newton_schulz(matrix), newton_schulz(matrix * 2**20))
        assert torch.equal(newton_schulz(matrix), newton_schulz(matrix * 2**-12))
        before = matrix.clone()
        newton_schulz(matrix)
        assert torch.equal(matrix, before)

    def test_only_matrices(self) -> None:
        with pytest.raises(BadInput, match=r"parameter 0 of its group is float32\[3\]; Muon takes two dimensions"):
            MuGrokfast([group(parameter(3), muon=True)])


def test_adamw_is_torchs_without_the_filter() -> None:
    """The earlier "AdamW fallback" was plain SGD."""
    shapes = [(30, 8), (8,), (3, 4, 5)]
    ours, theirs = ([parameter(*s, seed=i) for i, s in enumerate(shapes)] for _ in "ab")
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.2, "betas": (0.8, 0.97), "eps": 1e-7}
    optimizer = MuGrokfast([group(*ours, muon=False)], lamb=0, **options)
    reference = torch.optim.AdamW(theirs, **options)
    for step in range(5):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = tensor(*a.shape, seed=100 * step + i)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class TestSchedules:
    """The earlier warm-up set group["lr"], which nobody read: the weights moved at a learning rate of 0."""

    @pytest.mark.parametrize("lamb", [0.0, 2.0])
    def test_nothing_moves_at_lr_0(self, lamb: float) -> None:
        model, optimizer, scheduler = make(lamb=lamb, weight_decay=1.0)
        before = copy.deepcopy(model.state_dict())
        assert [g["lr"] for g in optimizer.param_groups] == [0.0, 0.0]
        train(model, optimizer, scheduler, range(1))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        train(model, optimizer, scheduler, range(1, 2))
        assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())

    def test_the_step_is_in_proportion_to_lr(self) -> None:
        weight, vector = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(4))
        sizes = []
        for lr in (0.1, 0.05):
            weight.data.zero_(), vector.data.zero_()
            optimizer = MuGrokfast([group(weight, muon=True), group(vector, muon=False)], lr=1.0)
            for g in optimizer.param_groups:
                g["lr"] = lr
            weight.grad, vector.grad = tensor(6, 4), tensor(4)
            optimizer.step()
            sizes.append((float(weight.detach().norm()), float(vector.detach().norm())))
        assert sizes[0] == pytest.approx((2 * sizes[1][0], 2 * sizes[1][1]), rel=1e-6)

    def test_groups_have_their_own_options(self) -> None:
        fast, slow = parameter(4), parameter(4)
        optimizer = MuGrokfast([group(fast, muon=False, lr=0.1), group(slow, muon=False)], lr=0.0)
        fast.grad, slow.grad = tensor(4), tensor(4)
        optimizer.step()
        assert not torch.equal(fast, parameter(4)) and torch.equal(slow, parameter(4))


class TestResume:
    """The earlier state was keyed by id(parameter), which another process does not share."""

    @pytest.mark.parametrize("lamb", [0.0, 2.0])
    def test_goes_on_bit_for_bit(self, lamb: float, tmp_path: Path) -> None:
        model, optimizer, scheduler = make(lamb=lamb)
        train(model, optimizer, scheduler, range(5))
        torch.save([part.state_dict() for part in (model, optimizer, scheduler)], tmp_path / "half.pt")
        train(model, optimizer, scheduler, range(5, 10))
        other = make(seed=1, lamb=0.5, lr=9.0)
        for part, state in zip(other, torch.load(tmp_path / "half.pt", weights_only=True), strict=True):
            part.load_state_dict(state)
        train(*other, range(5, 10))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other[0].parameters(), strict=True))

    def test_goes_on_in_another_process(self, tmp_path: Path) -> None:
        whole = make()
        train(*whole, range(6))
        program = (
            "import sys, torch; sys.path.insert(0, sys.argv[1]); import test_mugrokfast as t\n"
            "torch.set_num_threads(int(sys.argv[5]))\n"
            "run = t.make()\n"
            "if sys.argv[2] == '3':\n"
            "    [p.load_state_dict(s) for p, s in zip(run, torch.load(sys.argv[4]))]\n"
            "t.train(*run, range(int(sys.argv[2]), int(sys.argv[3])))\n"
            "torch.save([p.state_dict() for p in run], sys.argv[4])\n"
        )
        file, threads = str(tmp_path / "state.pt"), str(torch.get_num_threads())
        for start, end in (("0", "3"), ("3", "6")):
            command = [sys.executable, "-c", program, str(Path(__file__).parent), start, end, file, threads]
            subprocess.run(command, check=True, capture_output=True)
        for name, value in torch.load(file)[0].items():
            assert torch.equal(value, whole[0].state_dict()[name]), name

    def test_a_copy_goes_on(self) -> None:
        model, optimizer, scheduler = make()
        train(model, optimizer, scheduler, range(3))
        twin = copy.deepcopy((model, optimizer, scheduler))
        train(model, optimizer, scheduler, range(3, 6))
        train(*twin, range(3, 6))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin[0].parameters(), strict=True))


class TestStep:
    def test_closure(self) -> None:
        weight = nn.Parameter(torch.full((2, 2), 3.0))
        optimizer = MuGrokfast([group(weight, muon=True)], lr=0.1)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = weight.square().sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == 36.0
        assert optimizer.step(closure).item() < 36.0
        assert optimizer.step() is None

    def test_no_gradient_no_step(self) -> None:
        weight, other, vector = parameter(4, 4), parameter(4, 4), parameter(4)
        optimizer = MuGrokfast([group(weight, other, muon=True), group(vector, muon=False)], weight_decay=1.0)
        optimizer.step()
        other.grad = tensor(4, 4)
        optimizer.step()
        assert torch.equal(weight, parameter(4, 4)) and torch.equal(vector, parameter(4))
        assert not torch.equal(other, parameter(4, 4))
        assert set(optimizer.state) == {other}
        optimizer.zero_grad()
        assert other.grad is None

    def test_weight_decay_is_decoupled(self) -> None:
        weight, vector = parameter(4, 4), parameter(4)
        optimizer = MuGrokfast([group(weight, muon=True), group(vector, muon=False)], lr=0.1, weight_decay=0.5)
        weight.grad, vector.grad = torch.zeros(4, 4), torch.zeros(4)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), 0.95 * tensor(4, 4))
        torch.testing.assert_close(vector.detach(), 0.95 * tensor(4))

    def test_sparse_gradients_are_refused_by_name(self) -> None:
        model = TinyNet()
        model.embedding.sparse = True
        optimizer = MuGrokfast(parameter_groups(model))
        model(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(BadInput, match=r"gradient of parameter embedding\.weight is sparse"):
            optimizer.step()

    def test_learns(self) -> None:
        model, _, _ = make()
        optimizer = MuGrokfast(parameter_groups(model), lr=0.02)
        tokens = torch.arange(11)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens), (tokens * 3) % 11)
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        assert losses[0] > 2 and losses[-1] < 0.1


class TestGroups:
    @staticmethod
    def names(model: nn.Module) -> tuple[set[str], set[str]]:
        hidden, rest = ({name for name, _ in g["params"]} for g in parameter_groups(model))
        assert hidden | rest == {name for name, p in model.named_parameters() if p.requires_grad} and not hidden & rest
        return hidden, rest

    @pytest.mark.parametrize("tied", [True, False])
    def test_llama(self, tied: bool) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
        hidden, rest = self.names(LlamaForCausalLM(config))
        kinds = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
        assert hidden == {f"model.layers.{i}.{kind}_proj.weight" for i in (0, 1) for kind in kinds}
        assert "model.embed_tokens.weight" in rest and ("lm_head.weight" in rest) == (not tied)

    def test_gpt2(self) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2))
        hidden, rest = self.names(model)
        kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        assert hidden == {f"transformer.h.{i}.{kind}.weight" for i in (0, 1) for kind in kinds}
        assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.attn.c_attn.bias"} < rest
        optimizer = MuGrokfast(parameter_groups(model), lr=1e-3)
        tokens = torch.tensor([[1, 2, 3]])
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        assert all(("momentum_buffer" in optimizer.state[p]) == (name in hidden) for name, p in model.named_parameters())

    def test_torchs_own_transformer(self) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        hidden, _ = self.names(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
        kinds = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
        assert hidden == {f"layers.0.{kind}" for kind in kinds}

    def test_a_sequence_of_blocks(self) -> None:
        def block() -> nn.Module:
            return nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        model = nn.Sequential(nn.Embedding(5, 4), block(), block(), nn.Linear(4, 5))
        assert self.names(model)[0] == {"1.0.weight", "2.0.weight"}

    def test_an_embedding_in_a_block_and_a_frozen_weight(self) -> None:
        model = TinyNet()
        model.blocks[0].append(nn.Embedding(3, 8))
        model.blocks[1][1].weight.requires_grad = False
        hidden, rest = self.names(model)
        assert hidden == {"blocks.0.1.weight", "blocks.0.3.weight", "blocks.1.3.weight"} and "blocks.0.4.weight" in rest

    def test_all_of_the_blocks_frozen(self) -> None:
        model = TinyNet()
        model.blocks.requires_grad_(False)
        optimizer = MuGrokfast(parameter_groups(model))
        assert [len(g["params"]) for g in optimizer.param_groups] == [0, 2]

    def test_no_blocks(self) -> None:
        with pytest.raises(BadInput, match="Linear has no blocks"):
            parameter_groups(nn.Linear(3, 4))


class TestBadInput:
    @pytest.mark.parametrize("name", ["lr", "weight_decay", "eps", "lamb", "momentum", "alpha"])
    @pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "1e-3", None, True])
    def test_out_of_range(self, name: str, value: Any) -> None:
        with pytest.raises(BadInput, match=f"{name}={value!r}; expected"):
            MuGrokfast([group(parameter(3), muon=False)], **{name: value})
        with pytest.raises(BadInput, match=f"{name}={value!r}; expected"):
            MuGrokfast([group(parameter(3), muon=False, **{name: value})])

    @pytest.mark.parametrize(
        ("name", "value"), [("momentum", 1.0), ("alpha", 1), ("betas", (0.9, 1.0)), ("betas", (-1, 0.9))]
    )
    def test_decays_below_one(self, name: str, value: Any) -> None:
        with pytest.raises(BadInput, match=r"expected 0 <= \S+ < 1"):
            MuGrokfast([group(parameter(3), muon=False)], **{name: value})

    @pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.95, 0.99), None])
    def test_two_betas(self, betas: Any) -> None:
        with pytest.raises(BadInput, match="expected two numbers"):
            MuGrokfast([group(parameter(3), muon=False)], betas=betas)

    @pytest.mark.parametrize(
        "groups", [[parameter(3)], [{"params": [parameter(3)]}], [{"params": [parameter(3)], "muon": 1}]]
    )
    def test_each_group_says_which(self, groups: Any) -> None:
        with pytest.raises(BadInput, match='needs a key "muon"'):
            MuGrokfast(groups)

    def test_floating_point_only(self) -> None:
        with pytest.raises(BadInput, match=r"is complex64\[3\]; expected floating point"):
            MuGrokfast([group(nn.Parameter(torch.ones(3, dtype=torch.complex64)), muon=False)])


def test_a_parameter_steps_alike_however_it_lies_in_memory() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    found = []
    for order in (torch.contiguous_format, torch.channels_last):
        parameter = torch.nn.Parameter(start.clone(memory_format=order))
        optimizer = MuGrokfast([{"params": [parameter], "muon": True}], lr=0.01)
        for _ in range(3):
            parameter.grad = gradient.clone(memory_format=order)
            optimizer.step()
        assert parameter.is_contiguous(memory_format=order)
        found.append(parameter.detach().clone(memory_format=torch.contiguous_format))
    assert torch.equal(*found)
    assert not torch.equal(found[0], start)
