"""Statistics of the inputs of each layer on calibration text: H = E[x x^T], its diagonal, and how many tokens were seen.

One pass over the text serves all layers.  A window of tokens runs through the model on one thread, and the windows' sums
are added in the windows' order: the result is the same bits whatever the number of workers.  Layers that are fed the
same tensor (q, k and v; gate and up), and the experts of one layer, share one H.  All H are in memory at once, as float32:
4 bytes * in^2 per distinct one, 0.4 GB for SmolLM2-135M, plus as much for each worker.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from threading import local
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from . import digits
from .errors import BadInput
from .evaluation.texts import Text, find_text
from .models import IN_PLACE, LanguageModel, check_workers, device_named
from .stages.base import InputStatistics as InputStatistics
from .stages.base import Stage

TOKENS = 8192
CONTEXT = 1024
NO_GRADIENTS = (
    "{}: has no gradients, because it changes in place what they need; choose a stage without sensitivities, such as vptq"
)
PRODUCTS = (torch.nn.functional.linear, torch.Tensor.matmul, torch.matmul, torch.bmm)  # of an input and a matrix
SENSITIVITY_TOKENS = 2048  # a backward pass takes three times as long as a forward pass, and a diagonal needs less text


@dataclass(frozen=True)
class Calibration:
    """Which text to calibrate on.  text: a name, a path or a Text (default: selftext's calibration split, as everybody
    has it).  tokens: how many of its tokens.  context: tokens per window.  sensitivity_tokens: on how many of them backward
    passes are made, too, for `InputStatistics.sensitivity`.  device: where the model runs; sums are rounded differently on
    each, so that a recipe names it if it is not the CPU."""

    text: str | Text = "selftext"
    tokens: int = TOKENS
    context: int = CONTEXT
    sensitivity_tokens: int = 0
    device: str = "cpu"

    def find(self) -> Text:
        """The text; of a named one the split that is not for measuring on."""
        if isinstance(self.text, Text):
            return self.text
        return find_text(self.text, {"selftext": "calibration", "wikitext2": "validation"}.get(self.text))

    def to_json(self) -> dict[str, Any]:
        """What the statistics depend on, for a recipe."""
        found = self.find()
        name = f"{found.name}/{found.split}"
        about = {"text": name, "sha256": found.sha256, "tokens": self.tokens, "context": self.context}
        if self.sensitivity_tokens:
            about["sensitivity_tokens"] = self.sensitivity_tokens
        return about if self.device == "cpu" else about | {"device": self.device}

    def for_model(self, model: LanguageModel) -> Calibration:
        """The same, with windows of at most as many tokens as the model takes at once."""
        return replace(self, context=min(self.context, model.context or self.context))

    def for_stage(self, stage: Stage) -> Calibration:
        """The same, with the backward passes that `stage` needs, at least."""
        if stage.needs_sensitivity and not self.sensitivity_tokens:
            return replace(self, sensitivity_tokens=min(SENSITIVITY_TOKENS, self.tokens))
        return self


def collect(
    model: LanguageModel, calibration: Calibration | None = None, workers: int | None = None, progress: bool = True
) -> dict[str, InputStatistics]:
    """The statistics of every weight that a stage may touch inside the decoder's blocks, by the weight's name.

    The experts of a layer share one H, of the tokens that the router sends to any of them; sensitivities are of each one.

    workers: threads, each with one window in memory (default: one per core, at most 4; on a GPU one).  The model's module
    is moved to `calibration.device`; what comes back is on the CPU.  Raises BadInput for a text that is too short, and for
    settings out of range.
    """
    calibration = (calibration or Calibration()).for_model(model)
    check_workers(workers)
    if calibration.sensitivity_tokens and model.config.get("model_type") in IN_PLACE:
        raise BadInput(NO_GRADIENTS.format(model.name))
    device = device_named(calibration.device)
    windows = [window.to(device) for window in _windows(model, calibration)]
    module = model.on(calibration.device).model
    most = min(workers or os.cpu_count() or 1, 4) if device.type == "cpu" else 1
    body = module if model.is_classifier else getattr(module, "base_model", module)
    layers, weights = dict(module.named_modules()), model.weights()
    experts = [weight.name for weight in weights if weight.experts]
    owners = {weight.name: layers[weight.name.rpartition(".")[0]] for weight in weights if not weight.experts}
    same = _same_input(body, windows[0], owners) | {name: name for name in experts}
    mine = local()

    def add(key: str, values: torch.Tensor) -> None:
        x = values.detach().reshape(-1, values.shape[-1]).to(torch.float32)
        product = x.T @ x
        total, n = mine.found.get(key, (None, 0))
        mine.found[key] = (product if total is None else total + product, n + len(x))

    def of_expert(name: str, _: int, values: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        add(name, values)
        return output

    def run(window: torch.Tensor) -> dict[str, tuple[torch.Tensor, int]]:
        mine.found = {}
        with torch.no_grad(), watched:
            body(window)
        found, mine.found = mine.found, {}
        return found  # type: ignore[no-any-return]

    sums: dict[str, torch.Tensor] = {}
    seen: Counter[str] = Counter()
    running: deque[Future[dict[str, tuple[torch.Tensor, int]]]] = deque()
    with ExitStack() as stack:
        for key in set(same.values()) & owners.keys():
            stack.enter_context(owners[key].register_forward_pre_hook(lambda _, args, key=key: add(key, args[0])))
        watched = stack.enter_context(_expert_by_expert(module, experts, of_expert))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # a product's bits depend on how many threads share it
        pool = stack.enter_context(ThreadPoolExecutor(most))
        waiting = iter(windows)
        for _ in _bar(windows, f"statistics: {model.name}", progress):
            # No more windows than threads are under way, whose sums are in memory.
            running += [pool.submit(run, window) for window in islice(waiting, most - len(running))]
            for key, (product, n) in running.popleft().result().items():
                sums[key] = sums[key].add_(product) if key in sums else product
                seen[key] += n
    means = {}
    for key, total in sums.items():
        mean = total.cpu() / seen[key]
        means[key] = InputStatistics((mean + mean.T) / 2, seen[key])  # symmetric to the last bit
    found = {name: means[key] for name, key in same.items() if key in means}
    if not calibration.sensitivity_tokens:
        return found
    rows = {weight.name: weight.shape[0] for weight in weights if weight.name in found}
    curvatures = _sensitivities(model, calibration, rows, owners, windows, progress)
    return {name: replace(about, sensitivity=curvatures.get(name)) for name, about in found.items()}


def _sensitivities(
    model: LanguageModel,
    calibration: Calibration,
    rows: dict[str, int],
    owners: dict[str, Any],
    windows: list[torch.Tensor],
    progress: bool,
) -> dict[str, torch.Tensor]:
    """`InputStatistics.sensitivity` of each weight: float32[out]; none of one whose module gives more than its output.

    rows: of each weight, which is of experts if it has no owner.

    For each window, log p(y) is differentiated for one token y per position, drawn from the model's own prediction: scores
    of different positions are uncorrelated, so that the squared gradient of their sum is an unbiased estimate of the sum of
    their squares.  Tokens are drawn on the CPU, so that every device sees the same ones.
    """
    module = model.model
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    sums: dict[str, torch.Tensor] = {}
    seen = 0

    def noted(name: str, output: Any, first: int = 0) -> Any:
        """The output, whose gradients are added to the sums of a weight's rows from `first` on."""
        if not isinstance(output, torch.Tensor):  # of a router that gives several, which one the weight made is unknown
            return output

        def add(gradient: torch.Tensor) -> None:
            squares = gradient.detach().reshape(-1, gradient.shape[-1]).double().square().sum(0)
            if name not in sums:
                sums[name] = squares.new_zeros(rows[name])
            sums[name][first : first + len(squares)] += squares

        output = output if output.requires_grad else output.detach().requires_grad_()
        output.register_hook(add)
        return output

    def of_expert(name: str, expert: int, _: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return noted(name, output, expert * output.shape[-1])  # type: ignore[no-any-return]

    with ExitStack() as stack:
        for name in rows.keys() & owners.keys():
            stack.enter_context(owners[name].register_forward_hook(lambda _, __, output, name=name: noted(name, output)))
        stack.enter_context(stack.enter_context(_expert_by_expert(module, rows.keys() - owners.keys(), of_expert)))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        for parameter in wanted:
            stack.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)  # gradients of activations are all that is asked for
        generator = torch.Generator().manual_seed(0)
        for window in _bar(windows, f"sensitivity: {model.name}", progress):
            if seen >= calibration.sensitivity_tokens and not model.is_classifier:
                break
            output = module(window)
            logits = getattr(output, "logits", output)
            model.check_finite(logits.amax(-1))  # masked tokens may be at -inf
            scores = logits.reshape(-1, logits.shape[-1]).to(torch.float32).log_softmax(-1)
            drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator).to(scores.device)
            try:
                scores.gather(1, drawn).sum().backward()
            except RuntimeError as error:
                if "inplace operation" not in str(error):
                    raise
                raise BadInput(NO_GRADIENTS.format(model.name)) from None
            seen += len(scores)
    return {name: (total / seen).to("cpu", torch.float32) for name, total in sums.items()}


class _Experts(TorchFunctionMode):
    """Calls `note(name, expert, input, output)` for the product of each expert's matrix, and takes its output from there.

    names: of the parameters of which experts are slices; a product is an expert's if its matrix lies in one of them.  If it
    is of all experts at once, each one's input is what is not zero: the router sent the other tokens elsewhere.
    """

    def __init__(
        self, module: Any, names: Collection[str], note: Callable[[str, int, torch.Tensor, torch.Tensor], Any]
    ) -> None:
        super().__init__()
        self.names = {module.get_parameter(name).untyped_storage().data_ptr(): name for name in names}
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func not in PRODUCTS or not (name := self.names.get(args[1].untyped_storage().data_ptr())):
            return output
        x, matrix = args[:2]
        if matrix.dim() == 2:
            return self.note(name, matrix.storage_offset() // matrix.numel(), x, output)
        output = output.clone()
        for expert, (own, fed) in enumerate(zip(x, x.any(-1), strict=True)):
            output[expert, fed] = self.note(name, expert, own[fed], output[expert, fed])
        return output


@contextmanager
def _expert_by_expert(
    module: Any, names: Collection[str], note: Callable[..., Any]
) -> Iterator[AbstractContextManager[Any]]:
    """While this is open, transformers multiplies one expert after the other, not all by one kernel.  Gives `_Experts`, to
    be entered by each thread that runs the module; without names nothing happens."""
    if not names:
        yield nullcontext()
        return
    before = module.get_experts_implementation()
    module.set_experts_implementation("eager")
    try:
        yield _Experts(module, names, note)
    finally:
        module.set_experts_implementation(before)


def _windows(model: LanguageModel, calibration: Calibration) -> list[torch.Tensor]:
    """The model's inputs, one window each: int[1, context] of tokens, or all training pictures for a classifier."""
    if model.is_classifier:
        return [digits.data()[0]]
    if calibration.tokens < 1 or calibration.context < 2:
        raise BadInput(f"calibration: tokens={calibration.tokens}, context={calibration.context}; expected 1 and 2 or more")
    text = calibration.find()
    ids = first_tokens(model, text.text, calibration.tokens)
    if len(ids) < calibration.tokens:
        raise BadInput(f"text {text.name}/{text.split} has {len(ids)} tokens; {calibration.tokens} were asked for")
    first = model.first_ids
    step = calibration.context - len(first)
    return [torch.tensor([first + ids[i : i + step]]) for i in range(0, len(ids), step)]


def first_tokens(model: LanguageModel, text: str, count: int, special: bool = False) -> list[int]:
    """At most `count` token ids from the text's beginning; special: with those that the tokenizer puts around a text.

    Tokenising megabytes for a few thousand tokens takes longer than it should: no more is read than needed.
    """
    ids: list[int] = []
    characters = 10 * count + 1000
    while len(ids) < count:
        ids = model.encode(text[:characters], special)
        if characters >= len(text):
            break
        characters *= 2
    return ids[:count]


def _same_input(body: Any, window: torch.Tensor, owners: dict[str, Any]) -> dict[str, str]:
    """For each weight the first one that is fed the same tensor, found by running a few tokens."""
    inputs: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            inputs[name] = args[0]  # keeping it keeps its identity from being given to another

        return hook

    with torch.no_grad(), ExitStack() as stack:
        for name, owner in owners.items():
            stack.enter_context(owner.register_forward_pre_hook(note(name)))
        body(window[:, :4] if window.dtype == torch.int64 else window)
    first: dict[int, str] = {}
    return {name: first.setdefault(id(inputs[name]), name) if name in inputs else name for name in owners}


def _bar(windows: list[torch.Tensor], what: str, progress: bool) -> Any:
    return tqdm(windows, desc=what, unit="window", leave=False, disable=None if progress else True)
