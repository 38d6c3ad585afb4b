"""Task suites through lm-eval: accuracy with its 95% interval, and how much of it a compressed model keeps.

Prompts, scoring and hub data sets are lm-eval's own; the questions come from local files if there are any (see
`taskfiles`), and then no network is asked.  Few-shot examples: as many as the documentation names (mmlu 5, gsm8k 8 with
chains of thought, hellaswag 10, arc_challenge 25, winogrande 5, others 0), if the data has that many to show, else
none: local files have examples for mmlu and arc_easy only, and gsm8k brings its own.  The protocol says how many.

humaneval is scored by running what the model wrote, in `sandbox`, and only if that is allowed.  Decoding is greedy:
the documentation's temperature of 0.2 would add noise to a comparison of two models.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import logging
import math
import os
import random
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import BadInput
from ..models import LanguageModel, quiet_transformers
from ..names import check_tasks
from . import intervals, sandbox, taskfiles
from .measurement import Measurement
from .texts import reach_hub

NO_SIGNAL = "at chance: says nothing about compression"


class _Suite(NamedTuple):
    task: str  # lm-eval's name for it
    folder: str  # of lm_eval/tasks
    metric: str
    shots: int  # as documented
    hub: str
    new_tokens: int = 0  # to generate, at most
    filter: str = "none"  # lm-eval's, of what was generated


SUITES = {
    "arc_challenge": _Suite("arc_challenge", "arc", "acc_norm", 25, "allenai/ai2_arc"),
    "arc_easy": _Suite("arc_easy", "arc", "acc_norm", 0, "allenai/ai2_arc"),
    "gsm8k": _Suite("gsm8k_cot", "gsm8k", "exact_match", 8, "openai/gsm8k", 256, "flexible-extract"),
    "hellaswag": _Suite("hellaswag", "hellaswag", "acc_norm", 10, "Rowan/hellaswag"),
    "humaneval": _Suite("humaneval", "", "pass@1", 0, "openai/openai_humaneval", 512),
    "mmlu": _Suite("mmlu", "mmlu/default", "acc", 5, "cais/mmlu"),
    "truthfulqa_mc1": _Suite("truthfulqa_mc1", "truthfulqa", "acc", 0, "truthfulqa/truthful_qa"),
    "truthfulqa_mc2": _Suite("truthfulqa_mc2", "truthfulqa", "acc", 0, "truthfulqa/truthful_qa"),
    "winogrande": _Suite("winogrande", "winogrande", "acc", 5, "allenai/winogrande"),
}


class TaskResult(NamedTuple):
    """How a model did on a task.

    accuracy: share of items answered rightly (truthfulqa_mc2: mean probability of the true answers), with its exact binomial
    interval.  chance: what guessing gives, averaged over the items; 0 if answers are written freely.
    signal: False if the 95% interval of the original (without one: of the model) is not all above chance, so that the row
    says nothing about compression.  original_accuracy, retention: of the original, and accuracy over it, with the error of
    pairs; None without an original, retention also if it had nothing right.
    """

    accuracy: Measurement
    chance: float
    signal: bool
    original_accuracy: Measurement | None = None
    retention: Measurement | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields, ready for json.dump; `note` says in words if there is no signal."""
        fields = {k: v.to_json() if isinstance(v, Measurement) else v for k, v in self._asdict().items()}
        return {**fields, "note": "" if self.signal else NO_SIGNAL}


def evaluate_tasks(
    model: LanguageModel,
    names: Sequence[str],
    *,
    original: LanguageModel | None = None,
    limit: int | None = None,
    data: str | Path | None = None,
    seed: int = 0,
    shots: int | None = None,
    unsafe_code: bool = False,
    progress: bool = True,
) -> dict[str, TaskResult]:
    """Measure a model on tasks by name: any of `SUITES`.

    original: measured on the same items, for `retention`.  limit: items per task, drawn with `seed` (mmlu: evenly over its
    subjects); all by default.  data: folder of local files; by default AGENTFORGE_DATA, ../shared/data, then the hub.
    shots: examples before each question, for all tasks.  unsafe_code: run the code that the model writes for humaneval.

    Raises BadInput for unknown names, settings out of range, unavailable or damaged data, a missing lm-eval, and
    humaneval if code must not, or cannot safely, be run.
    """
    names = list(dict.fromkeys(names))
    check_tasks(names)
    if (limit is not None and limit < 2) or (shots is not None and shots < 0):
        raise BadInput(f"limit={limit}, shots={shots}; expected a limit of 2 or more, for a standard error, and shots >= 0")
    if "humaneval" in names:
        _check_code_may_run(unsafe_code)
    both = [model] if original is None else [model, original]
    context = min(each.usual_context for each in both if each.tokenizer)
    if importlib.util.find_spec("lm_eval") is None:
        raise BadInput("tasks need lm-eval, which is not installed; run pip install '.[tasks]'")
    results = {}
    with _quiet(progress):
        # Everything is checked before anything runs.
        prepared = {name: _prepared(name, data, shots, context) for name in names}
        for name, (tasks, protocol) in prepared.items():
            protocol |= _draw(tasks, limit, seed)
            runs = [_run(each, SUITES[name], tasks, context, seed) for each in both]
            results[name] = _result(SUITES[name].metric, both, runs, protocol, seed)
    return results


def _check_code_may_run(allowed: bool) -> None:
    if not allowed:
        raise BadInput(
            "humaneval runs code that the model wrote; allow that with --allow-generated-code (unsafe_code=True), and it "
            "runs in a sandbox"
        )
    trial = sandbox.check("def f(x):\n    return x\n", "f", "def check(candidate):\n    assert candidate(1) == 1\n")
    if not trial.passed:
        raise BadInput(f"humaneval: code cannot be confined here: {trial.detail}; use a Linux that has user namespaces")


def _prepared(name: str, data: str | Path | None, shots: int | None, context: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """lm-eval's tasks of a suite by their names, ready to be asked, and what the protocol says of them."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    suite = SUITES[name]
    folder = Path(lm_eval.__file__).parent / "tasks" / suite.folder
    manager = TaskManager(include_path=folder if suite.folder else None, include_defaults=False)
    parts = [task for task in manager.all_subtasks if task.startswith("mmlu_")] if name == "mmlu" else [suite.task]
    found = taskfiles.find(name, data)
    if found is None:
        configs = [{**_HUMANEVAL, "task": part} if name == "humaneval" else {"task": part} for part in parts]
    else:
        configs = [_config(suite.task + part, splits) for part, splits in found.splits.items()]
        if unknown := {str(config["task"]) for config in configs} - set(parts):
            raise BadInput(f"{found.origin}: {', '.join(sorted(unknown))} is not among the {len(parts)} subjects of mmlu")
    try:
        if found is None:
            reach_hub()
        # A group may change lm-eval's own tasks; humaneval is all our own.
        tasks = manager.load(configs if name == "humaneval" else {"group": name, "task": configs})["tasks"]
    except Exception as error:  # datasets raises what its many back ends raise
        if found is not None:
            raise
        raise BadInput(
            f"{name}: {taskfiles.looked_for(name)} is neither in AGENTFORGE_DATA nor in ../shared/data, and {suite.hub} is "
            f"not available from the hub ({type(error).__name__}); name a folder that has the file with --data"
        ) from None
    shown = min(_examples(task) for task in tasks.values())
    if shots is not None and shots > shown:
        raise BadInput(f"{name}: {shots} examples were asked for, and its data has {shown} to show; ask for no more")
    used = (suite.shots if shown >= suite.shots else 0) if shots is None else shots
    new_tokens = min(suite.new_tokens, context // 2)
    for task in tasks.values():
        task.set_config("num_fewshot", used)
        if new_tokens:
            task.set_config("generation_kwargs", {"max_gen_toks": new_tokens}, update=True)
    generated = {"filter": suite.filter, "decoding": f"greedy, {new_tokens} tokens"} if new_tokens else {}
    if name == "humaneval":
        generated |= {"sandbox": f"{sandbox.SECONDS:g} s, {sandbox.MEMORY >> 20} MB"}
    return tasks, {
        "task": name,
        "data": f"hub:{suite.hub}" if found is None else found.origin,
        "shots": used,
        "context": context,
        "lm_eval": metadata.version("lm-eval"),
        **generated,
    }


def _config(task: str, splits: dict[str, taskfiles.Rows]) -> dict[str, Any]:
    """lm-eval's own task with our rows in place of the hub's data set."""
    from datasets import Dataset

    sets = {split: Dataset.from_list(rows) for split, rows in splits.items()}
    return {
        **(_HUMANEVAL if task == "humaneval" else {}),
        "task": task,
        "custom_dataset": lambda **_: sets,
        "test_split": "test",
        "validation_split": None,
        "training_split": None,
        "fewshot_split": "dev" if "dev" in splits else None,
        "process_docs": None,  # of the hub's columns; our rows have those that come of it
    }


def _examples(task: Any) -> int:
    """How many examples a task has to show; those that are asked are not among them."""
    config = task.fewshot_cfg
    return len(task.fewshot_docs()) if config.split or config.samples or task.has_training_docs() else 0


def _draw(tasks: dict[str, Any], limit: int | None, seed: int) -> dict[str, Any]:
    """Keep `limit` items of all tasks, drawn evenly from them; gives what the protocol says of that.

    Not the first ones, as lm-eval's own limit has it: HellaSwag's first 200 all come from one of its two sources.
    """
    sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
    total = sum(sizes.values())
    if limit is None:
        return {"items": total, "of": total}
    draw = random.Random(seed)
    for i, name in enumerate(draw.sample(sorted(tasks), len(tasks))):
        share = min(sizes[name], limit // len(tasks) + (i < limit % len(tasks)))
        if not share:
            del tasks[name]
            continue
        task = tasks[name]
        split = task.config.test_split or task.config.validation_split
        task.dataset[split] = task.dataset[split].select(sorted(draw.sample(range(sizes[name]), share)))
    return {"items": sum(len(task.eval_docs) for task in tasks.values()), "of": total, "drawn_with_seed": seed}


class _Run(NamedTuple):
    hits: torch.Tensor  # float64[n], in the items' order
    sha256: str  # of all that was asked
    truncated: int  # items that did not fit into the context and lost their beginning
    chance: float


def _run(
    model: LanguageModel,
    suite: _Suite,
    tasks: dict[str, Any],
    context: int,
    seed: int,
) -> _Run:
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    # A copy: lm-eval gives the tokenizer a padding token.
    tokenizer = copy.deepcopy(model.tokenizer)
    lm = HFLM(pretrained=model.model, tokenizer=tokenizer, max_length=context, batch_size=1)
    encode = lm.tok_encode
    lm.tok_encode = lambda *args, **about: model.known(encode(*args, **about))
    for task in tasks.values():
        task.set_fewshot_seed(seed)
    try:
        found = evaluate(lm, {"tasks": tasks}, bootstrap_iters=0, log_samples=True)
    except AssertionError:  # what it finds in an answer that fits into no window
        raise BadInput(
            f"{suite.task}: an answer has no tokens, or more than {context}; {model.name} takes no more"
        ) from None
    hits, chances, truncated, digest = [], [], 0, hashlib.sha256()
    for name, task in tasks.items():
        allowed = context - task.config.generation_kwargs["max_gen_toks"] if suite.new_tokens else context + 1
        for sample in found["samples"][name]:
            if sample["filter"] != suite.filter:
                continue
            hits.append(float(sample[suite.metric]))
            chances.append(_chance(task, sample["doc"]))
            texts = ["".join(text for text in request if isinstance(text, str)) for request in sample["arguments"]]
            truncated += any(len(lm.tok_encode(text)) > allowed for text in texts)
            digest.update(json.dumps([sample["arguments"], sample["target"]], sort_keys=True).encode())
    return _Run(torch.tensor(hits, dtype=torch.float64), digest.hexdigest(), truncated, sum(chances) / len(chances))


def _chance(task: Any, doc: dict[str, Any]) -> float:
    """What guessing gets on an item: truthfulqa_mc2 counts the probability of all true answers."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    if task.config.task == "truthfulqa_mc2":
        labels: list[int] = doc["mc2_targets"]["labels"]
        return sum(labels) / len(labels)
    return 1 / len(task.doc_to_choice(doc))


def _result(metric: str, both: list[LanguageModel], runs: list[_Run], protocol: dict[str, Any], seed: int) -> TaskResult:
    accuracies = []
    for model, run in zip(both, runs, strict=True):
        binary = bool(((run.hits == 0) | (run.hits == 1)).all())
        about = {**protocol, "metric": metric, "items_sha256": run.sha256, "truncated_items": run.truncated}
        found = intervals.share(run.hits) if binary else intervals.mean(run.hits, error=f"{len(run.hits)} items")
        accuracies.append(intervals.measured(found, "accuracy", about, model, seed=seed))
    last, chance = accuracies[-1], runs[-1].chance
    signal = last.within(-math.inf, chance) == "outside"
    if len(both) == 1:
        return TaskResult(accuracies[0], chance, signal)
    kept = None
    if last.value > 0:
        about = {**last.protocol, "metric": f"{metric} / original {metric}"}
        kept = intervals.measured(intervals.pairs(runs[0].hits, runs[1].hits), "share", about, both[0], both[1])
    return TaskResult(accuracies[0], chance, signal, last, kept)


def _pass_at_1(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    verdict = sandbox.check(doc["prompt"] + answers[0], doc["entry_point"], doc["test"], doc["prompt"])
    if verdict.status == "refused":
        raise BadInput(f"humaneval: {verdict.detail}")
    return {"pass@1": float(verdict.passed)}


# lm-eval's own task of that name scores by a metric that is fetched from the hub, and runs the code without a sandbox.
_HUMANEVAL = {
    "dataset_path": "openai/openai_humaneval",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "prompt",
    "doc_to_target": "entry_point",
    "generation_kwargs": {"until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "do_sample": False},
    "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
    "process_results": _pass_at_1,
}


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """No advice from lm-eval and transformers, and no progress bars unless asked for (they go to standard error)."""
    logger = logging.getLogger("lm_eval")
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        if not progress:
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        yield
