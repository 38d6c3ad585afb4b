"""MuGrokfast: Grokfast's filter on every gradient, then Muon for the hidden matrices and AdamW for everything else.

Grokfast (arXiv 2405.20233, "Grokfast-EMA") adds the slow part of the gradient, a running mean, once more:

    mu_1 = g_1        mu_t = alpha mu_(t-1) + (1 - alpha) g_t        g'_t = g_t + lambda mu_t

A gradient that stays comes out (1 + lambda) times as large, one that changes its sign with every step all but unchanged:
what is amplified is slow.  (g + lambda (g - mu), one sign away, is the opposite filter.)

Muon (Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024) takes momentum with Nesterov's step
ahead, and replaces the result U S V^T by nearly U V^T, with five Newton-Schulz iterations:

    m <- beta m + (1 - beta) g'        u = (1 - beta) g' + beta m
    W <- (1 - lr wd) W - lr 0.2 sqrt(max(rows, cols)) NS(u)

with the scale of "Muon is Scalable for LLM Training" (arXiv 2502.16982, section 2.2, equation 4), which gives the step the
size an AdamW step has, so that one learning rate and one weight decay serve both.  That paper writes m <- beta m + g; a
positive factor makes no difference to NS.  The steps are those of torch.optim.Muon(adjust_lr_fn="match_rms_adamw") and of
torch.optim.AdamW (arXiv 1711.05101, algorithm 2).

Neither paper says in what order to clip and to filter: clip before `step()`, and so before the filter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..errors import BadInput


class MuGrokfast(torch.optim.Optimizer):
    """Grokfast's filter, then Muon or AdamW; which one, each group says with its key "muon".

    params: groups, as `parameter_groups` makes them; any group may have options of its own.  lr, weight_decay
    (decoupled): of both.  momentum: Muon's.  betas, eps: AdamW's.  alpha, lamb: the filter's; lamb=0 switches it off, and
    then there is no running mean to store.  Gradients are left as they are.  Clipping is the caller's business, before
    `step()`.  Momentum and means are kept in the dtype of their parameter: train float32 weights.

    Raises BadInput if a value is out of range, or if a gradient is sparse.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        alpha: float = 0.98,
        lamb: float = 2.0,
    ) -> None:
        muon, adamw = {"momentum": momentum, "weight_decay": weight_decay}, {"betas": betas, "eps": eps}
        super().__init__(params, {"lr": lr, **muon, **adamw, "alpha": alpha, "lamb": lamb})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: {"params": [...], "muon": bool, options...}."""
        if not isinstance(param_group, dict) or not isinstance(param_group.get("muon"), bool):
            raise BadInput('MuGrokfast: each group needs a key "muon", True or False; parameter_groups(model) makes them')
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for i, parameter in enumerate(group["params"]):
            what = f"MuGrokfast: {_name(group, i)} is {str(parameter.dtype).removeprefix('torch.')}{list(parameter.shape)}"
            if not parameter.is_floating_point():
                raise BadInput(f"{what}; expected floating point")
            if group["muon"] and parameter.dim() < 2:
                raise BadInput(f"{what}; Muon takes two dimensions or more, put it into a group with muon=False")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step.  closure: computes the loss and the gradients again; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            twins: dict[nn.Parameter, dict[str, Any]] = {}  # in the memory of the parameters, with the filtered gradients
            copies = []  # of those whose memory has another order
            for i, parameter in enumerate(group["params"]):
                gradient = parameter.grad
                if gradient is None:
                    continue
                if gradient.layout != torch.strided:
                    raise BadInput(f"MuGrokfast: the gradient of {_name(group, i)} is sparse; use a dense one")
                state = self.state[parameter]
                if group["lamb"]:
                    if "ema" not in state:
                        state["ema"] = gradient.clone()
                    gradient = amplify_slow(gradient, state["ema"], group["alpha"], group["lamb"])
                shape = (len(parameter), -1) if group["muon"] else parameter.shape
                twin = nn.Parameter(parameter.detach().reshape(shape))
                twin.grad = gradient.reshape(twin.shape)
                twins[twin] = state
                if twin.data_ptr() != parameter.data_ptr():
                    copies.append((parameter, twin))
            if twins:
                _step(group, twins)
            for parameter, twin in copies:
                parameter.copy_(twin.view_as(parameter))
        return loss


def _step(group: dict[str, Any], twins: dict[nn.Parameter, dict[str, Any]]) -> None:
    """One step of torch's Muon or AdamW: parameters, each with its state."""
    options: dict[str, Any] = {"lr": float(group["lr"]), "weight_decay": group["weight_decay"]}
    if group["muon"]:
        options |= {"momentum": group["momentum"], "adjust_lr_fn": "match_rms_adamw"}
        torchs: torch.optim.Optimizer = torch.optim.Muon(list(twins), **options)
    else:
        torchs = torch.optim.AdamW(list(twins), betas=group["betas"], eps=group["eps"], **options)
    for twin, state in twins.items():
        torchs.state[twin] = {key: value for key, value in state.items() if key != "ema"}
    torchs.step()
    for twin, state in twins.items():
        state.update(torchs.state[twin])


def amplify_slow(gradient: torch.Tensor, ema: torch.Tensor, alpha: float, lamb: float) -> torch.Tensor:
    """Grokfast's filter (arXiv 2405.20233, "Grokfast-EMA"): moves `ema` towards the gradient in place, and returns
    gradient + lamb * ema.  ema: at first the first gradient."""
    ema.lerp_(gradient, 1 - alpha)
    return gradient.add(ema, alpha=lamb)


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups for MuGrokfast, with names: the hidden matrices with muon=True, all else with muon=False.

    Hidden matrices are parameters of two dimensions or more called "weight" or "..._weight" inside a block, a block being
    a member of an nn.ModuleList, or a member of an nn.Sequential that has parts of its own.  Embeddings (nn.Embedding, and
    what the model's get_input_embeddings gives), the output head (get_output_embeddings) and all that is tied to them never
    count, wherever they are; norms and biases have too few dimensions.  Frozen parameters are in neither group.
    Raises BadInput if there is no block: then the structure does not tell which matrices are hidden.
    """
    blocks: list[nn.Module] = []
    for container in module.modules():
        if isinstance(container, nn.ModuleList):
            blocks.extend(container)
        elif isinstance(container, nn.Sequential):
            blocks.extend(member for member in container if next(member.children(), None) is not None)
    inside = {id(part) for block in blocks for part in block.modules()}
    kept = {id(parameter) for outer in _ends(module) for parameter in outer.parameters(recurse=False)}
    groups: list[dict[str, Any]] = [{"params": [], "param_names": [], "muon": muon} for muon in (True, False)]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            owner, _, leaf = name.rpartition(".")
            matrix = parameter.dim() >= 2 and (leaf == "weight" or leaf.endswith("_weight")) and id(parameter) not in kept
            group = groups[0 if matrix and id(module.get_submodule(owner)) in inside else 1]
            group["params"].append((name, parameter))
    if not inside:
        raise BadInput(
            f"parameter_groups: {type(module).__name__} has no blocks (an nn.ModuleList, or an nn.Sequential of larger "
            'parts); write the groups yourself: [{"params": [...], "muon": True}, {"params": [...], "muon": False}]'
        )
    return groups


def _ends(module: nn.Module) -> Iterator[nn.Module]:
    """The embeddings and the output head."""
    for part in module.modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            yield part
    for method in ("get_input_embeddings", "get_output_embeddings"):
        end = getattr(module, method)() if hasattr(module, method) else None
        if isinstance(end, nn.Module):
            yield end


def _name(group: dict[str, Any], i: int) -> str:
    names = group.get("param_names")
    return f"parameter {names[i]}" if names else f"parameter {i} of its group"


def _check(options: dict[str, Any]) -> None:
    """Raise BadInput if an option is out of range."""
    betas = options["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise BadInput(f"MuGrokfast: betas={betas!r}; expected two numbers")
    ranges = [(name, options[name], math.inf) for name in ("lr", "weight_decay", "eps", "lamb")]
    ranges += [(name, options[name], 1.0) for name in ("momentum", "alpha")]
    for name, value, end in [*ranges, ("betas[0]", betas[0], 1.0), ("betas[1]", betas[1], 1.0)]:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < end:
            raise BadInput(f"MuGrokfast: {name}={value!r}; expected {'0 <= ' + name + ' < 1' if end == 1 else '0 or more'}")
