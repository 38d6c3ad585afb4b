"""Statistics of the inputs of each layer on calibration text: H = E[x x^T], its diagonal, and how many tokens were seen.

One pass over the text, block by block, serves all layers.  A window of tokens runs on one thread, and the windows' sums are
added in the windows' order: the result is the same bits whatever the number of workers.  Layers that are fed the same tensor
(q, k and v; gate and up), and the experts of one layer, share one H.  In memory are the H of one block, one set for each
worker; the others wait on the disk, 4 bytes * in^2 per distinct one: 0.4 GB for SmolLM2-135M, 22 GB for 7 B parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from threading import Event, Lock, local
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from . import digits
from .blockwise import Passes, Spill
from .errors import BadInput
from .evaluation.texts import Text, find_text
from .models import IN_PLACE, LanguageModel, check_workers, device_named
from .progress import progress_bar
from .stages.base import InputStatistics as InputStatistics
from .stages.base import Stage

TOKENS = 8192
CONTEXT = 1024
STRIPE = 192  # columns of second moments that are computed at once
CURVATURE = "curvature of "  # before a name
RECENT = 3  # distinct H in memory that were asked for last
NO_GRADIENTS = (
    "{}: has no gradients, because it changes in place what they need; choose a stage without sensitivities, such as vptq"
)
PRODUCTS = (torch.nn.functional.linear, torch.Tensor.matmul, torch.matmul, torch.bmm)  # of an input and a matrix
HEAD, LOOKUP, EXPECTED, VARIANCE = "head", "lookup", "p", "p (1 - p)"  # beside weights' names
# Added to each token's frequency, in units of the mean: other texts have other tokens than this one.  SmolLM2-135M in 50 MB
# has KL .40 on WikiText-2 without it, .25 with 0.1, .26 with 1.
UNSEEN = 0.1
OF_HEADS = re.compile(r"\.[qk]_proj\.weight$")  # weights whose outputs belong to attention heads


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
        return self.with_sensitivities() if stage.needs_sensitivity else self

    def with_sensitivities(self) -> Calibration:
        """The same, with backward passes: on a quarter of `TOKENS`, SmolLM2-135M at 3.02 bits has KL .183 on WikiText-2, on
        all of them .169."""
        return replace(self, sensitivity_tokens=self.sensitivity_tokens or min(TOKENS, self.tokens))


# What `fit` reads.  SmolLM2-135M at 2 bits and the same steps has KL .743 on WikiText-2 with 8,192 tokens, .665 with 32,768,
# .640 with 131,072 (standard error .05, nearly all of it the text's), and .443, .394, .395 on another part of selftext.
FOR_FIT = Calibration(tokens=4 * TOKENS)


class Collected(Mapping[str, InputStatistics]):
    """Statistics by the weight's name, which are read from the disk when they are asked for, the last few of them once."""

    def __init__(self) -> None:
        self._spill, self._lock = Spill(), Lock()
        self._sums: dict[str, tuple[Callable[[], torch.Tensor], int]] = {}
        self._last: dict[str, InputStatistics] = {}
        self.keys_of: dict[str, str] = {}  # of each weight, the first one that is fed the same tensor
        self.sensitivities: dict[str, torch.Tensor] = {}

    def add(self, key: str, total: torch.Tensor, count: int) -> None:
        """Add the sum of x x^T over `count` tokens."""
        if key in self._sums:
            before, more = self._sums[key]
            total, count = before() + total, more + count
        self._sums[key] = self._spill.put(total), count

    def add_ends(self, embedding: str | None, head: str | None, means: Mapping[str, torch.Tensor]) -> None:
        """Make the statistics of the token embedding and of the output head, one name if they are one matrix, of what was
        summed up under `HEAD`.  None: gets none.  means: of `EXPECTED` and `VARIANCE` up to a factor, and of `LOOKUP`."""
        total, count = self._sums.pop(HEAD)
        unseen = UNSEEN * means[EXPECTED].mean()
        share = 1 / (means[EXPECTED] + unseen).sum()  # whose sum is 1
        expected, variance = (means[EXPECTED] + unseen) * share, (means[VARIANCE] + unseen) * share
        if head:
            self._sums[head] = total, count
            self.sensitivities[head] = variance
        if embedding:
            lookup = means[LOOKUP].diag() * count
            lookup = total() + lookup / variance.sum() if embedding == head else lookup
            self._sums[embedding] = self._spill.put(lookup), count
            self.sensitivities.setdefault(embedding, expected)
        self.keys_of |= {name: name for name in (embedding, head) if name}

    def __getitem__(self, name: str) -> InputStatistics:
        key = self.keys_of[name]
        with self._lock:
            found = self._last.pop(key, None)
            if found is None:
                total, count = self._sums[key]
                mean = total().div_(count)
                found = InputStatistics(mean.add_(mean.T.clone()).div_(2), count)  # symmetric to the last bit
            self._last[key] = found  # as the last one
            if len(self._last) > RECENT:
                del self._last[next(iter(self._last))]
        if name not in self.sensitivities:
            return found
        of_heads = self._sums.get(f"{CURVATURE}{name}")
        curvature = of_heads[0]().div_(of_heads[1]) if of_heads else None
        return replace(found, sensitivity=self.sensitivities[name], curvature=curvature)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)


def collect(
    model: LanguageModel,
    calibration: Calibration | None = None,
    workers: int | None = None,
    progress: bool = True,
    ends: bool = False,
) -> Collected:
    """The statistics of every weight that a stage may touch inside the decoder's blocks, by the weight's name.

    The experts of a layer share one H, of the tokens that the router sends to any of them; sensitivities are of each one.
    A module that gives more than its output has none: which of them the weight made is unknown.

    For sensitivities, log p(y) of a window is differentiated for one token y per position, drawn from the model's own
    prediction: scores of different positions are uncorrelated, so that the squared gradient of their sum is an unbiased
    estimate of the sum of their squares.  Tokens are drawn on the CPU, so that every device sees the same ones.

    ends: of the output head and the token embedding, too, which takes sensitivities.  The head makes logits of probabilities
    p, in which the curvature is known: E[p_i (1 - p_i)] on its diagonal.  A row of the embedding is what its token adds to
    the residual stream: H is the diagonal of the curvature there, and a row counts for as often as the model expects its
    token, E[p_i].  Both get a little more, `UNSEEN`, because other texts have other tokens.  If one matrix is both, its H is
    the sum, as if these two factors were in proportion.  A model without one of them has neither.

    workers: windows that run at once (default: one per core, at most 4; on a GPU one).  On a GPU the model's module is built
    there; what comes back is on the CPU.  Raises BadInput for a text that is too short, and for settings out of range.
    """
    calibration = (calibration or Calibration()).for_model(model)
    check_workers(workers)
    if calibration.sensitivity_tokens and model.config.get("model_type") in IN_PLACE:
        raise BadInput(NO_GRADIENTS.format(model.name))
    device = device_named(calibration.device)
    windows = [window.to(device) for window in _windows(model, calibration)]
    backward = -(-calibration.sensitivity_tokens // calibration.context)  # so many of the windows go back, too
    passes = Passes(model.on(calibration.device))
    module, found, mine = passes.module, Collected(), local()
    both: list[Any] = [getattr(module, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    embedding, head = both
    ends = ends and None not in both
    body = module if model.is_classifier or ends else getattr(module, "base_model", module)
    quiet = {} if model.is_classifier else {"use_cache": False}  # nobody asks for keys and values again
    layers, weights = dict(module.named_modules()), {weight.name: weight for weight in model.weights()}
    heads = {name: getattr(layers[name.rsplit(".", 2)[0]], "head_dim", 0) for name in weights if OF_HEADS.search(name)}
    sums: dict[str, tuple[torch.Tensor, int]] = {}  # of the open block
    generator, drawn = torch.Generator().manual_seed(0), [Event() for _ in range(backward)]

    def add(key: str, values: torch.Tensor) -> None:
        x = values.detach().reshape(-1, values.shape[-1]).to(torch.float32)
        _add_to(mine.sums, key, _moments(x), len(x))

    def see(name: str, values: torch.Tensor) -> None:
        if passes.recomputing:
            return
        same = next((key for key, other in mine.inputs if other is values), name)
        found.keys_of[name] = same
        if same == name:
            mine.inputs.append((name, values))  # keeping it keeps its identity from being given to another
            add(name, values)

    def note(name: str, output: Any, first: int = 0) -> Any:
        """The output, whose gradients are added to the sums of a weight's rows from `first` on."""
        if not isinstance(output, torch.Tensor) or not torch.is_grad_enabled():
            return output

        def square(gradient: torch.Tensor) -> None:
            squares = gradient.detach().reshape(-1, gradient.shape[-1]).double().square().sum(0)
            if name not in mine.squares:
                mine.squares[name] = squares.new_zeros(weights[name].shape[0] if name in weights else len(squares))
            mine.squares[name][first : first + len(squares)] += squares
            if (size := heads.get(name)) and len(squares) % size == 0:
                g = gradient.detach().to(torch.float32).reshape(-1, len(squares) // size, size).transpose(0, 1)
                _add_to(mine.sums, f"{CURVATURE}{name}", g.mT @ g, g.shape[1])

        watched = output if output.requires_grad else output.detach().requires_grad_()
        watched.register_hook(square)
        return watched if output.requires_grad else watched.clone()  # a model may change it in place

    def of_expert(name: str, expert: int, values: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if passes.recomputing:
            return note(name, output, expert * output.shape[-1])  # type: ignore[no-any-return]
        found.keys_of[name] = name
        add(name, values)
        return output

    def expect(output: torch.Tensor) -> None:
        for logits in output.detach().flatten(0, -2).split(STRIPE):  # never all probabilities at once
            p = logits.to(torch.float32).softmax(-1)
            for key, values in ((EXPECTED, p), (VARIANCE, p - p.square())):
                mine.squares[key] = mine.squares.get(key, 0) + values.sum(0).double().cpu()

    def run(_: Any, numbered: tuple[int, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
        index, window = numbered
        mine.inputs, mine.sums, mine.squares = [], {}, {}
        if index >= backward:
            with torch.no_grad():
                body(window, **quiet)
            return mine.squares, 0
        try:
            logits = module(window, **quiet)
            logits = getattr(logits, "logits", logits).flatten(0, -2)
            if index:
                drawn[index - 1].wait()  # it is ahead: windows pass each unit in their order
            score = [_score_of_drawn(model, logits, generator)]
        finally:
            drawn[index].set()
        count, start = len(logits), _Start.apply(logits, score)  # type: ignore[no-untyped-call]
        del logits
        _go_back(model, start)
        return mine.squares, count

    def passed(_: Any) -> None:
        for key, (product, n) in mine.sums.items():
            _add_to(sums, key, product, n)
        mine.inputs, mine.sums = [], {}

    def closed(_: Any) -> None:
        while sums:
            key, (total, n) = sums.popitem()
            found.add(key, total.cpu(), n)

    title = f"statistics: {model.name}" if progress else None
    with ExitStack() as stack:
        for name, weight in weights.items():
            if not weight.experts:
                owner = layers[name.rpartition(".")[0]]
                stack.enter_context(owner.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0])))
                stack.enter_context(owner.register_forward_hook(lambda _, __, output, name=name: note(name, output)))
        if ends:
            stack.enter_context(head.register_forward_pre_hook(lambda _, args: see(HEAD, args[0])))
            stack.enter_context(head.register_forward_hook(lambda _, __, output: expect(output)))
            stack.enter_context(embedding.register_forward_hook(lambda _, __, output: note(LOOKUP, output)))
        experts = [name for name, weight in weights.items() if weight.experts]
        watched = stack.enter_context(_expert_by_expert(module, experts, of_expert))
        for parameter in module.parameters() if backward else ():
            if parameter.requires_grad:
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)  # gradients of activations are all that is asked for
        bar = stack.enter_context(progress_bar(title, passes.steps * (2 if backward else 1), "block"))
        how: dict[str, Any] = {"passed": passed, "closed": closed, "backward": backward > 0, "within": watched}
        parts = list(passes.map(run, list(enumerate(windows)), bar, workers, **how))
    found.keys_of = {name: found.keys_of[name] for name in weights if name in found.keys_of}
    seen = sum(count for _, count in parts)
    squares = {name: [part[name] for part, _ in parts if name in part] for name in (*found, EXPECTED, VARIANCE, LOOKUP)}
    means = {n: (sum(of[1:], of[0]) / seen).to("cpu", torch.float32) for n, of in squares.items() if of}
    found.sensitivities = {name: mean for name, mean in means.items() if name in found}
    if ends:
        first, last = (f"{next(path for path, layer in layers.items() if layer is end)}.weight" for end in both)
        if not {first, last} <= model.entries.keys():  # tied: stored once
            first = last = first if first in model.entries else last
        touched = {weight.name for weight in model.weights(embeddings=True)}
        found.add_ends(first if first in touched else None, last if last in touched else None, means)
    return found


@torch.no_grad()
def _score_of_drawn(model: LanguageModel, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The gradient of sum log p(y) in the logits, one y drawn per position: float32[tokens, vocabulary]."""
    model.check_finite(logits.amax(-1))  # masked tokens may be at -inf
    gradient = logits.to(torch.float32).softmax(-1)
    y = torch.multinomial(gradient.cpu(), 1, generator=generator).to(logits.device)
    return gradient.neg_().scatter_add_(1, y, torch.ones_like(y, dtype=torch.float32))


class _Start(torch.autograd.Function):
    """Where a way back begins: neither the logits nor their gradient, the largest tensors of all, stay in memory for it."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, score: list[torch.Tensor]) -> torch.Tensor:
        """Nothing.  score: the gradient, which is taken out of the list when it is asked for."""
        ctx.score, ctx.dtype = score, logits.dtype
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        """The gradient of the logits."""
        return ctx.score.pop().to(ctx.dtype), None


def _go_back(model: LanguageModel, start: torch.Tensor) -> None:
    try:
        start.backward()
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise BadInput(NO_GRADIENTS.format(model.name)) from None


def _moments(x: torch.Tensor) -> torch.Tensor:
    """x^T x, float32[in, in], of x, float32[tokens, in]: the part on and above the diagonal is computed, in blocks."""
    rows, product = x.T.contiguous(), x.new_empty(x.shape[1], x.shape[1])
    for first in range(0, x.shape[1], STRIPE):
        part = rows[first : first + STRIPE] @ rows[first:].T
        product[first : first + STRIPE, first:] = part
        product[first:, first : first + STRIPE] = part.T
    return product


def _add_to(sums: dict[str, tuple[torch.Tensor, int]], key: str, product: torch.Tensor, n: int) -> None:
    if key in sums:
        sums[key] = sums[key][0].add_(product), sums[key][1] + n
    else:
        sums[key] = product, n


class _Experts(TorchFunctionMode):
    """Calls `note(name, expert, input, output)` for the product of each expert's matrix, and takes its output from there.

    names: of the parameters of which experts are slices; a product is an expert's if its matrix lies in one of them.  If it
    is of all experts at once, each one's input is what is not zero: the router sent the other tokens elsewhere.
    """

    def __init__(
        self, module: Any, names: Collection[str], note: Callable[[str, int, torch.Tensor, torch.Tensor], Any]
    ) -> None:
        super().__init__()
        self.parameters = {name: module.get_parameter(name) for name in names}
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func not in PRODUCTS:
            return output
        x, matrix = args[:2]
        where = matrix.untyped_storage().data_ptr()
        # A parameter has another storage at each turn of its block.
        name = next((n for n, p in self.parameters.items() if p.untyped_storage().data_ptr() == where), None)
        if name is None:
            return output
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
