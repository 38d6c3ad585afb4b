from __future__ import annotations

import bz2
import gzip
import json
import math
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import agentforge
from agentforge import audit, cli
from agentforge.audit import probes
from agentforge.audit import workshop as audit_workshop
from agentforge.errors import BadInput
from agentforge.evaluation import evaluate_tasks, sandbox, taskfiles, tasks, texts
from agentforge.evaluation.tasks import NO_SIGNAL, _result, _Run
from agentforge.models import LanguageModel
from reports.phase8_compression import suites

WORDS = ("red", "green", "blue", "a dog", "the cat", "nothing", "seven", "a tree", "rain", "snow", "bread", "iron")
ENDINGS = [[f"{WORDS[(i + j) % 12]} {'!' * (j % 2)}x" for j in range(4)] for i in range(12)]
# Such that the tiny models get some right and some wrong.
RIGHT = (0, 3, 3, 0, 1, 0, 2, 3, 0, 1, 2, 2)
HELLASWAG = [(f"I saw {WORDS[i]} and then", RIGHT[i], ENDINGS[i]) for i in range(12)]
ARC = [
    {
        "id": str(i),
        "question": f"What is {WORDS[i]}?",
        "choices": {"text": list(WORDS[i % 7 : i % 7 + 3 + i % 2]), "label": ["A", "B", "C", "D"][: 3 + i % 2]},
        "answerKey": "ABC"[i % 3],
    }
    for i in range(10)
]
GSM8K = [{"question": f"What is {i} and 1?", "answer": f"It is <<{i}+1>> so.\n#### {i + 1:,}"} for i in (1, 1232, 7)]
WINOGRANDE = [
    {"sentence": f"The {a} saw the {b} because the _ was near.", "option1": a, "option2": b, "answer": "12"[i % 2]}
    for i, (a, b) in enumerate([("dog", "cat"), ("man", "tree"), ("king", "queen"), ("sun", "moon")])
]
TRUTHFULQA = [
    {
        "question": f"Is {word} true?",
        "mc1_targets": {"No": 0, f"{word} is": 1, "Maybe": 0},
        "mc2_targets": {"No": 0, f"{word} is": 1, "Yes": 1, "Maybe so": 0, "Never": 0},
    }
    for word in WORDS[:3]
]
HUMANEVAL = [
    {
        "task_id": f"Test/{i}",
        "prompt": f'def {name}(x):\n    """{name}"""\n',
        "entry_point": name,
        "test": f"def check(candidate):\n    assert candidate(3) == {value}\n",
    }
    for i, (name, value) in enumerate([("add_one", 4), ("double", 6), ("square", 9)])
]
CODE = {"add_one": "    return x + 1\n", "double": "    import sys; sys.exit(0)\n", "square": "    return x + x\n"}


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of every task, in the forms in which they are given out."""
    root = tmp_path_factory.mktemp("data")
    sixes = "".join(f"{context}\n{label}\n" + "\n".join(endings) + "\n" for context, label, endings in HELLASWAG)
    mmlu = 'What is {i}{topic}?,one,two,"three, or 3",four,{letter}\n'
    files: dict[str, bytes] = {
        "hellaswag/hellaswag_val_full.txt.bz2": bz2.compress(sixes.encode()),
        "arc/arc_easy_test.json": json.dumps(ARC).encode(),
        "arc/arc_easy_validation.json": json.dumps(ARC[:2]).encode(),
        "arc/arc_challenge_test.jsonl": lines(ARC).encode(),
        "gsm8k/test.jsonl": lines(GSM8K).encode(),
        "winogrande/dev.jsonl": lines(WINOGRANDE).encode(),
        "truthfulqa/mc_task.json": json.dumps(TRUTHFULQA).encode(),
        "humaneval/HumanEval.jsonl.gz": gzip.compress(lines(HUMANEVAL).encode()),
        **{
            f"mmlu/{split}/{topic}_{split}.csv": "".join(
                mmlu.format(i=i, topic=topic[:2], letter="ABCD"[i % 4]) for i in range(count)
            ).encode()
            for topic in ("anatomy", "virology", "astronomy")
            for split, count in (("test", 4), ("dev", 5))
        },
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> LanguageModel:
    return agentforge.open_model(tiny_llama)


@pytest.fixture(scope="module")
def other(tiny_llama_other: Path) -> LanguageModel:
    return agentforge.open_model(tiny_llama_other)


def log_likelihood(model: LanguageModel, context: str, continuation: str) -> float:
    """Of the continuation, after as much of the context as the model takes."""
    ids, more = (model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, continuation))
    window = torch.tensor([(ids + more)[-(model.usual_context + 1) :]])
    with torch.no_grad():
        logits = model.model(window[:, :-1]).logits[0].double()
    return float(logits.log_softmax(-1).gather(1, window[0, 1:, None])[-len(more) :].sum())


class Item(NamedTuple):
    requests: list[tuple[str, str]]
    right: int
    lengths: list[int]  # 1 each for plain accuracy


def normed(context: str, choices: list[str], right: int) -> Item:
    return Item([(context, f" {choice}") for choice in choices], right, [len(choice) for choice in choices])


def arc_items() -> list[Item]:
    return [
        normed(f"Question: {r['question']}\nAnswer:", r["choices"]["text"], r["choices"]["label"].index(r["answerKey"]))
        for r in ARC
    ]


def winogrande_items() -> list[Item]:
    items = []
    for row in WINOGRANDE:
        before, after = row["sentence"].split("_")
        requests = [(before + row[option], " " + after.strip()) for option in ("option1", "option2")]
        items.append(Item(requests, int(row["answer"]) - 1, [1, 1]))
    return items


def hits_of(model: LanguageModel, items: list[Item]) -> np.ndarray:
    scores = [[log_likelihood(model, *request) for request in item.requests] for item in items]
    return np.array(
        [np.argmax(np.array(score) / item.lengths) == item.right for score, item in zip(scores, items, strict=True)]
    ).astype(float)


@pytest.mark.parametrize("name", ["hellaswag", "arc_easy", "arc_challenge", "winogrande"])
def test_accuracy_and_retention_are_those_of_our_own_log_likelihoods(
    name: str, tiny: LanguageModel, other: LanguageModel, folder: Path
) -> None:
    items = {
        "hellaswag": [normed(context, endings, label) for context, label, endings in HELLASWAG],
        "winogrande": winogrande_items(),
    }.get(name, arc_items())
    found = evaluate_tasks(tiny, [name], original=other, data=folder, progress=False)[name]
    mine, theirs, n = hits_of(tiny, items), hits_of(other, items), len(items)
    assert found.accuracy.n == n and found.accuracy.value == pytest.approx(mine.mean())
    assert found.accuracy.stderr == pytest.approx(math.sqrt(mine.mean() * (1 - mine.mean()) / n))
    assert found.original_accuracy is not None and found.original_accuracy.value == pytest.approx(theirs.mean())
    assert found.accuracy.minus(found.original_accuracy) == pytest.approx(mine.mean() - theirs.mean())
    assert found.chance == pytest.approx(np.mean([1 / len(item.requests) for item in items]))
    assert found.accuracy.inputs == {"model": tiny.fingerprint}
    assert theirs.mean() > 0 and found.retention is not None
    ratio = mine.mean() / theirs.mean()
    assert found.retention.value == pytest.approx(ratio)
    # The delta method for a ratio, written with variances and the covariance.
    variance = mine.var(ddof=1) + ratio**2 * theirs.var(ddof=1) - 2 * ratio * np.cov(mine, theirs)[0, 1]
    assert found.retention.stderr == pytest.approx(math.sqrt(variance / n) / theirs.mean(), abs=1e-9)


@pytest.mark.parametrize("name", ["arc_easy", "gsm8k"])
def test_a_token_that_the_model_does_not_have_is_refused(tiny_llama: Path, folder: Path, name: str) -> None:
    model = agentforge.open_model(tiny_llama)
    model.tokenizer.add_tokens(["What", "Question"])
    with pytest.raises(BadInput, match=r"gives the id 25\d, its model knows 258 tokens; use its own tokenizer"):
        evaluate_tasks(model, [name], data=folder, progress=False)


def test_truthfulqa_counts_first_choices_and_probabilities(tiny: LanguageModel, folder: Path) -> None:
    found = evaluate_tasks(tiny, ["truthfulqa_mc1", "truthfulqa_mc2"], data=folder, progress=False)
    first, mass = [], []
    for row in TRUTHFULQA:
        context = f"{SHOWN}\n\nQ: {row['question']}\nA:"
        assert len(context) > 128
        one = {choice: log_likelihood(tiny, context, f" {choice}") for choice in row["mc1_targets"]}
        first.append(row["mc1_targets"][max(one, key=one.__getitem__)])
        many = {choice: math.exp(log_likelihood(tiny, context, f" {choice}")) for choice in row["mc2_targets"]}
        mass.append(sum(many[choice] for choice, true in row["mc2_targets"].items() if true) / sum(many.values()))
    one_of, some_of = found["truthfulqa_mc1"], found["truthfulqa_mc2"]
    assert (one_of.accuracy.value, one_of.chance) == (pytest.approx(np.mean(first)), pytest.approx(1 / 3))
    assert (some_of.accuracy.value, some_of.chance) == (pytest.approx(np.mean(mass), rel=1e-4), pytest.approx(2 / 5))
    assert some_of.accuracy.stderr == pytest.approx(np.std(mass, ddof=1) / math.sqrt(3), rel=1e-3)  # no yes and no
    assert some_of.accuracy.protocol["truncated_items"] == 3 and some_of.accuracy.protocol["shots"] == 0


# The end of the six questions that lm-eval shows before each; no more fits into the tiny model's context.
SHOWN = (
    "A: Telescopes use lenses or mirrors to focus light and make objects appear closer.\n\n"
    "Q: Where were the 1992 Olympics held?\nA: The 1992 Olympics were held in Barcelona, Spain."
)


def test_the_standard_error_of_pairs_is_a_bootstraps() -> None:
    draw = np.random.default_rng(0)
    theirs = (draw.random(600) < 0.6).astype(float)
    mine = np.where(draw.random(600) < 0.8, theirs, draw.random(600) < 0.4).astype(float)
    both = [_Model("small"), _Model("original")]
    runs = [_Run(torch.tensor(hits), "", 0, 0.25) for hits in (mine, theirs)]
    found = _result("acc", both, runs, {}, 0).retention  # type: ignore[arg-type]
    assert found is not None and found.stderr is not None
    again = draw.integers(0, 600, (4000, 600))
    assert found.stderr == pytest.approx((mine[again].mean(1) / theirs[again].mean(1)).std(), rel=0.06)
    alone = math.sqrt(mine.var() / 600) / theirs.mean()
    assert found.stderr < 0.8 * math.hypot(alone, found.value * math.sqrt(theirs.var() / 600) / theirs.mean())


class _Model(NamedTuple):
    fingerprint: str


@pytest.mark.parametrize(
    ("right", "n", "chance", "signal"),
    [
        (25, 100, 0.25, False),
        (33, 100, 0.25, False),  # the exact interval starts at 0.239
        (36, 100, 0.25, True),
        (10, 100, 0.25, False),  # worse than guessing is no signal
        (0, 100, 0.25, False),
        (0, 100, 0.0, False),
        (1, 100, 0.0, True),  # an answer that cannot be guessed
        (2, 2, 0.5, False),  # all right, but guessing gets that every fourth time
        (100, 100, 0.25, True),
    ],
)
def test_rows_at_chance_carry_no_signal(right: int, n: int, chance: float, signal: bool) -> None:
    hits = torch.tensor([1.0] * right + [0.0] * (n - right), dtype=torch.float64)
    perfect = torch.ones(n, dtype=torch.float64)
    alone = _result("acc", [_Model("m")], [_Run(hits, "", 0, chance)], {}, 0)  # type: ignore[list-item]
    assert alone.signal is signal and alone.to_json()["note"] == ("" if signal else NO_SIGNAL)
    # With an original it is the original that must be above chance, not the model.
    runs = [_Run(perfect, "", 0, chance), _Run(hits, "", 0, chance)]
    beside = _result("acc", [_Model("m"), _Model("o")], runs, {}, 0)  # type: ignore[list-item]
    assert beside.signal is signal
    assert (beside.retention is None) == (right == 0)
    json.loads(json.dumps(beside.to_json(), allow_nan=False))


def test_mmlu_is_drawn_evenly_from_its_subjects(tiny: LanguageModel, folder: Path) -> None:
    found = evaluate_tasks(tiny, ["mmlu"], data=folder, limit=4, shots=0, progress=False)["mmlu"].accuracy
    assert (found.n, found.protocol["items"], found.protocol["of"]) == (4, 4, 12)
    assert (found.protocol["shots"], found.protocol["metric"], found.seed) == (0, "acc", 0)
    prepared, protocol = tasks._prepared("mmlu", folder, None, 128)
    assert (sorted(prepared), protocol["shots"]) == (["mmlu_anatomy", "mmlu_astronomy", "mmlu_virology"], 5)
    tasks._draw(prepared, 4, 0)
    assert sorted(len(task.eval_docs) for task in prepared.values()) == [1, 1, 2]
    doc = tasks._prepared("mmlu", folder, None, 128)[0]["mmlu_anatomy"].eval_docs[0]
    prompt = prepared["mmlu_anatomy"].fewshot_context(doc, 5)
    assert prompt.startswith(
        "The following are multiple choice questions (with answers) about anatomy.\n\nWhat is 0an?\nA. one"
    )
    assert prompt.count("\nC. three, or 3\n") == 6 and prompt.endswith("\nAnswer:")


def test_limit_draws_by_seed_and_not_the_first(folder: Path) -> None:
    def drawn(limit: int | None, seed: int) -> list[str]:
        prepared, _ = tasks._prepared("hellaswag", folder, None, 128)
        tasks._draw(prepared, limit, seed)
        return [doc["query"] for doc in prepared["hellaswag"].eval_docs]

    everything = [context for context, _, _ in HELLASWAG]
    assert drawn(None, 0) == drawn(100, 0) == everything
    assert drawn(5, 0) == drawn(5, 0) and len(set(drawn(5, 0))) == 5
    assert drawn(5, 0) != drawn(5, 1)
    assert drawn(5, 0) != everything[:5]


def test_the_same_examples_are_shown_to_both_models(tiny: LanguageModel, folder: Path) -> None:
    """Examples are drawn anew from the same seed for each; else the second model would be asked something else."""
    found = evaluate_tasks(tiny, ["arc_easy"], original=tiny, data=folder, shots=1, progress=False)["arc_easy"]
    assert found.original_accuracy is not None
    assert found.retention is None or (found.retention.value, found.retention.stderr) == (1.0, 0.0)
    assert found.accuracy.protocol == found.original_accuracy.protocol
    none = evaluate_tasks(tiny, ["arc_easy"], data=folder, progress=False)["arc_easy"]
    assert none.accuracy.protocol["items_sha256"] != found.accuracy.protocol["items_sha256"]
    assert found.accuracy.protocol["data"] == f"{folder}/arc"


def canned(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[str, dict[str, Any]]]:
    """lm-eval's model says what `answer` makes of a prompt; the requests are kept."""
    from lm_eval.models.huggingface import HFLM

    asked: list[tuple[str, dict[str, Any]]] = []

    def generate(self: Any, requests: Any, disable_tqdm: bool = False) -> list[str]:
        asked.extend(request.args for request in requests)
        return [answer(request.args[0]) for request in requests]

    monkeypatch.setattr(HFLM, "generate_until", generate)
    return asked


def test_gsm8k_takes_the_last_number(tiny: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"1 and": "1 and 1 make 2. The answer is 2.", "1232": "So it is $1,233", "7 and": "The answer is 8, or 9"}
    asked = canned(monkeypatch, lambda prompt: next(a for q, a in answers.items() if q in prompt.rsplit("Q:", 1)[1]))
    found = evaluate_tasks(tiny, ["gsm8k"], data=folder, progress=False)["gsm8k"]
    assert (found.accuracy.value, found.accuracy.n, found.chance) == (pytest.approx(2 / 3), 3, 0.0)
    assert (found.accuracy.protocol["shots"], found.accuracy.protocol["decoding"]) == (8, "greedy, 64 tokens")
    assert all(prompt.count("The answer is") == 8 and settings["do_sample"] is False for prompt, settings in asked)


@pytest.mark.skipif(not sandbox.check("f = abs", "f", "def check(c): pass").passed, reason="nothing can be confined here")
def test_humaneval_runs_the_code(tiny: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = canned(monkeypatch, lambda prompt: next(code for name, code in CODE.items() if name in prompt))
    found = evaluate_tasks(tiny, ["humaneval"], data=folder, unsafe_code=True, progress=False)["humaneval"]
    assert found.accuracy.value == pytest.approx(1 / 3)  # square is wrong, and an early exit passes nothing
    assert [prompt for prompt, _ in asked] == [row["prompt"] for row in HUMANEVAL]
    assert "temperature" not in asked[0][1] and asked[0][1]["do_sample"] is False


def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No local data beside the checkout."""
    monkeypatch.delenv("AGENTFORGE_DATA", raising=False)
    monkeypatch.setattr(texts, "CHECKOUT", tmp_path / "no" / "checkout")


def test_generated_code_is_refused_by_default(tiny: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="humaneval runs code that the model wrote; allow that with --allow-generated-code"):
        evaluate_tasks(tiny, ["hellaswag", "humaneval"], data=folder)
    refused = sandbox.Verdict(False, "refused", "this system does not enforce: x")
    monkeypatch.setattr(sandbox, "check", lambda *_: refused)
    with pytest.raises(BadInput, match="code cannot be confined here: this system does not enforce: x"):
        evaluate_tasks(tiny, ["humaneval"], data=folder, unsafe_code=True)


def test_local_files_need_no_network(tiny: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("AGENTFORGE_DATA", str(folder))
    found = evaluate_tasks(tiny, ["winogrande"], limit=2, progress=False)["winogrande"]
    assert found.accuracy.protocol["data"] == "AGENTFORGE_DATA/winogrande"


HUB: dict[str, dict[str, list[dict[str, Any]]]] = {
    "Rowan/hellaswag": {
        split: [
            {
                "activity_label": "Cooking",
                "ctx_a": f"Somebody {split}s {word}.",
                "ctx_b": "then she",
                "endings": list(WORDS[:4]),
                "label": str(i % 4),
            }
            for i, word in enumerate(WORDS)
        ]
        for split in ("train", "validation")
    },
    "cais/mmlu": {
        split: [{"question": f"{split} {i}?", "choices": list(WORDS[:4]), "answer": i % 4} for i in range(count)]
        for split, count in (("test", 2), ("dev", 5))
    },
    "openai/openai_humaneval": {"test": HUMANEVAL},
}


def test_hub_data_are_asked_as_lm_eval_asks_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's rows, given in its stead: lm-eval's own splits, examples and prompts, as many examples as documented."""
    import datasets

    wanted: list[tuple[str, str | None]] = []

    def load(path: str, name: str | None = None, **_: object) -> dict[str, Any]:
        wanted.append((path, name))
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in HUB[path].items()})

    nowhere(monkeypatch, tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    found, protocol = tasks._prepared("hellaswag", None, None, 128)
    assert (protocol["data"], protocol["shots"], wanted) == ("hub:Rowan/hellaswag", 10, [("Rowan/hellaswag", None)])
    task = found["hellaswag"]
    assert tasks._draw(found, 5, 0) == {"items": 5, "of": 12, "drawn_with_seed": 0}
    prompt = task.fewshot_context(task.eval_docs[0], 10)
    *examples, question = prompt.split("\n\n")
    assert len(examples) == 10 and all(text.startswith("Cooking: Somebody trains ") for text in examples)
    assert question.startswith("Cooking: Somebody validations ") and question.endswith(". Then she")

    found, protocol = tasks._prepared("mmlu", None, None, 128)
    assert (len(found), protocol["shots"]) == (57, 5)
    assert wanted[1:] == [("cais/mmlu", name.removeprefix("mmlu_")) for name in found]
    tasks._draw(found, 60, 0)
    assert sorted(len(task.eval_docs) for task in found.values()) == [1] * 54 + [2] * 3

    found, protocol = tasks._prepared("humaneval", None, None, 128)
    assert (protocol["data"], [doc["prompt"] for doc in found["humaneval"].eval_docs]) == (
        "hub:openai/openai_humaneval",
        [row["prompt"] for row in HUMANEVAL],
    )


@pytest.mark.parametrize("name", sorted(tasks.SUITES))
def test_data_that_is_nowhere(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nowhere(monkeypatch, tmp_path)
    looked_for = taskfiles.looked_for(name)
    with pytest.raises(
        BadInput, match=rf"{name}: .* is neither in AGENTFORGE_DATA nor .* the hub \(\w+\); name a folder"
    ) as e:
        tasks._prepared(name, None, None, 128)
    assert looked_for in str(e.value) and tasks.SUITES[name].hub in str(e.value)
    with pytest.raises(BadInput, match="name a folder that has it") as e:
        taskfiles.find(name, tmp_path)
    assert looked_for in str(e.value) and str(tmp_path) in str(e.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": []}, "no task named at all; expected some of arc_challenge, arc_easy, gsm8k, hellaswag, humaneval, mmlu"),
        ({"names": ["hellaswag", "imagenet"]}, "no task named imagenet; expected some of"),
        ({"limit": 1}, "limit=1, shots=None; expected a limit of 2 or more"),
        ({"shots": -1}, "expected a limit of 2 or more, for a standard error, and shots >= 0"),
        ({"shots": 1}, "hellaswag: 1 examples were asked for, and its data has 0 to show"),
        ({"names": ["truthfulqa_mc1"], "shots": 2}, "truthfulqa_mc1: 2 examples were asked for, and its data has 0"),
        ({"names": ["gsm8k"], "shots": 9}, "gsm8k: 9 examples were asked for, and its data has 8 to show"),
        ({"names": ["mmlu"], "shots": 6}, "mmlu: 6 examples were asked for, and its data has 5 to show"),
    ],
)
def test_settings_that_are_refused(tiny: LanguageModel, folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as error:
        evaluate_tasks(tiny, **{"names": ["hellaswag"], "data": folder, "progress": False, **settings})
    assert message in str(error.value)


def test_models_that_are_refused(digits: LanguageModel, tiny: LanguageModel, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="digits-mlp is a classifier of pictures"):
        evaluate_tasks(digits, ["hellaswag"], data=folder)
    (tmp_path / "arc").mkdir()
    long = {**ARC[0], "choices": {"text": ["x" * 200, "y", "z"], "label": ["A", "B", "C"]}}
    (tmp_path / "arc" / "arc_easy_test.jsonl").write_text(lines([long, ARC[1]]))
    with pytest.raises(BadInput, match="arc_easy: an answer has no tokens, or more than 128; tiny-llama takes no more"):
        evaluate_tasks(tiny, ["arc_easy"], data=tmp_path, progress=False)


def test_a_missing_lm_eval(tiny: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"tasks need lm-eval, which is not installed; run pip install '\.\[tasks\]'"):
        evaluate_tasks(tiny, ["hellaswag"], data=folder)


ARC_ROW = json.dumps(ARC[0])
BAD_FILES = [
    ("arc_easy", "arc/arc_easy_test.jsonl", f"{ARC_ROW}\n\n{{", "line 3: is not JSON"),
    ("arc_easy", "arc/arc_easy_test.jsonl", f"{ARC_ROW}\n[]", "line 2: list indices must be integers"),
    ("arc_easy", "arc/arc_easy_test.jsonl", f"{ARC_ROW}\n{{}}", "line 2: 'choices' is missing; fix the file"),
    ("arc_easy", "arc/arc_easy_test.json", "[1, 2", "is not a JSON array"),
    ("arc_easy", "arc/arc_easy_test.json", "[" * 100_000, "is not a JSON array"),
    ("arc_easy", "arc/arc_easy_test.json", f"[{ARC_ROW}, 3]", "item 2: 'int' object is not subscriptable"),
    ("arc_easy", "arc/arc_easy_test.json", "[]", "is empty; expected questions of arc_easy"),
    (
        "arc_easy",
        "arc/arc_easy_test.json",
        ARC_ROW.replace('"answerKey": "A"', '"answerKey": "Z"'),
        "line 1: expected an answer among ['A', 'B', 'C'], found 'Z'",
    ),
    ("arc_easy", "arc/arc_easy_test.json", ARC_ROW.replace('["A", "B", "C"]', '["A", "B"]'), "3 choices with 2 labels"),
    ("arc_easy", "arc/arc_easy_test.json", ARC_ROW.replace("What is", "x" * 60_000), "a text of at most 50000 characters"),
    ("arc_easy", "arc/arc_easy_test.json", b"\xff\xfe", "cannot be read as UTF-8 text"),
    ("arc_easy", "arc/arc_easy_test.json.gz", b"no gzip", "cannot be read as UTF-8 text"),
    ("arc_easy", "arc/arc_easy_test.json.gz", gzip.compress(b"x" * 100)[:20], "cannot be read as UTF-8 text"),
    ("arc_easy", "arc/arc_easy_test.json.gz", gzip.compress(b" " * (65 << 20)), "holds more than 64 MB"),
    ("hellaswag", "hellaswag/hellaswag_val_full.txt.bz2", bz2.compress(b" " * (65 << 20)), "holds more than 64 MB"),
    (
        "hellaswag",
        "hellaswag/hellaswag_val_full.txt",
        "c\n0\n" + "a\nb\nc\nd\nc\n1\na\nb\n",
        "line 7: expected six lines per item, found 4",
    ),
    (
        "hellaswag",
        "hellaswag/hellaswag_val_full.txt",
        "c\n4\na\nb\nc\nd\n",
        "line 1: expected an answer among ['0', '1', '2', '3'], found '4'",
    ),
    ("hellaswag", "hellaswag/hellaswag_val_full.txt", "c\n0\na\n\nc\nd\n", "line 1: expected a text of at most"),
    ("hellaswag", "hellaswag/hellaswag_val_full.txt", "", "is empty"),
    (
        "gsm8k",
        "gsm8k/test.jsonl",
        lines([GSM8K[0], {"question": "q", "answer": "5"}]),
        "line 2: expected an answer that ends in ####",
    ),
    (
        "mmlu",
        "mmlu/test/anatomy_test.csv",
        "q,1,2,3,4,A\nq,1,2,3,A\n",
        "line 2: expected six fields (question, four choices, letter), found 5",
    ),
    ("mmlu", "mmlu/test/anatomy_test.csv", 'q,1,2,3,4,A\n"q', "line 2: is not CSV"),
    ("mmlu", "mmlu/test/anatomy_test.csv", "q,1,2,3,4,E\n", "expected an answer among ['A', 'B', 'C', 'D'], found 'E'"),
    ("mmlu", "mmlu/test/alchemy_test.csv", "q,1,2,3,4,A\n", "mmlu_alchemy is not among the 57 subjects of mmlu"),
    (
        "humaneval",
        "humaneval/HumanEval.jsonl",
        lines([{**HUMANEVAL[0], "entry_point": "f(); g"}]),
        "line 1: expected the name of a function",
    ),
    (
        "winogrande",
        "winogrande/dev.jsonl",
        lines([{**WINOGRANDE[0], "sentence": "no gap"}]),
        "expected one _ in the sentence",
    ),
    (
        "winogrande",
        "winogrande/dev.jsonl",
        lines([{**WINOGRANDE[0], "answer": ""}]),
        "expected an answer among ['1', '2'], found ''",
    ),
    (
        "truthfulqa_mc1",
        "truthfulqa/mc_task.json",
        lines([{**TRUTHFULQA[0], "mc1_targets": {"a": 1, "b": 1, "c": 0}}]),
        "mc1_targets has 2 right choices of 3",
    ),
    (
        "truthfulqa_mc2",
        "truthfulqa/mc_task.json",
        lines([{**TRUTHFULQA[0], "mc2_targets": {"a": 1}}]),
        "mc2_targets has 1 right choices of 1",
    ),
    (
        "truthfulqa_mc2",
        "truthfulqa/mc_task.json",
        lines([{**TRUTHFULQA[0], "mc2_targets": []}]),
        "'list' object has no attribute 'items'",
    ),
]


@pytest.mark.parametrize(("name", "file", "content", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_files_are_refused_with_their_place(
    name: str, file: str, content: str | bytes, message: str, tmp_path: Path, bounded: None
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput) as error:
        tasks._prepared(name, tmp_path, None, 128)
    assert message in str(error.value)
    assert str(path if "alchemy" not in file else tmp_path) in str(error.value)


def test_the_model_is_left_as_it_was(tiny: LanguageModel, folder: Path) -> None:
    """lm-eval gives tokenizers a padding token: a perplexity from after that must still compare with one from before."""
    text = texts.Text("letters", "test", "some letters to score")
    before = agentforge.perplexity(tiny, text, context=16)
    evaluate_tasks(tiny, ["winogrande"], data=folder, limit=2, progress=False)
    assert agentforge.perplexity(tiny, text, context=16).minus(before) == 0.0
    assert tiny.tokenizer.pad_token is None


def test_lm_eval_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, agentforge.evaluation; print({'lm_eval', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> tuple[Any, str, str]:
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.setattr(sys, "argv", ["agentforge", "evaluate", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_the_command(
    tiny_llama: Path,
    tiny_llama_other: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = (tiny_llama, "--against", tiny_llama_other, "--tasks", "winogrande, arc_easy", "--limit", 3, "--data", folder)
    code, out, err = command(monkeypatch, capsys, *asked, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)["tasks"]
    assert list(found) == ["winogrande", "arc_easy"]
    assert found["winogrande"]["accuracy"]["n"] == 3 and found["winogrande"]["original_accuracy"]["value"] >= 0
    code, table, _ = command(monkeypatch, capsys, *asked)
    assert code == 0
    row = next(line for line in table.splitlines() if "winogrande" in line and "acc, 0 shots" in line)
    accuracy = found["winogrande"]["accuracy"]
    assert f"{accuracy['value']:.3f} ± {accuracy['stderr']:.3f}" in row
    assert (NO_SIGNAL in row) == (not found["winogrande"]["signal"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--tasks", "humaneval"), "allow that with --allow-generated-code"),
        (("--tasks", "imagenet"), "no task named imagenet"),
        (("--tasks", ""), "no task named at all"),
        (("--limit", 5), "--limit, --data and --allow-generated-code are for tasks; name some with --tasks"),
    ],
)
def test_the_command_refuses(
    args: tuple[object, ...],
    message: str,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = command(monkeypatch, capsys, tiny_llama, *args)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.slow
def test_the_real_model_on_real_questions(smollm2: LanguageModel) -> None:
    """Against our own log-likelihoods, item by item, and against guessing."""
    if not (taskfiles.find("hellaswag") and taskfiles.find("arc_easy")):
        pytest.skip("HellaSwag and ARC are neither in AGENTFORGE_DATA nor in ../shared/data")
    result = evaluate_tasks(smollm2, ["hellaswag", "arc_easy"], limit=16, progress=False)
    prepared, _ = tasks._prepared("arc_easy", None, None, 2048)
    tasks._draw(prepared, 16, 0)
    items = [
        normed(
            f"Question: {doc['question']}\nAnswer:", doc["choices"]["text"], doc["choices"]["label"].index(doc["answerKey"])
        )
        for doc in prepared["arc_easy"].eval_docs
    ]
    assert result["arc_easy"].accuracy.value == pytest.approx(hits_of(smollm2, items).mean())
    assert [result[name].accuracy.n for name in result] == [16, 16]
    # It gets 0.5 of ARC-Easy and 0.45 of HellaSwag right, on 200 items: far from nothing, and from everything.
    assert all(0.1 < result[name].accuracy.value < 0.9 for name in result)


def shop(model: LanguageModel, place: Path, subject: LanguageModel | None = None) -> audit.Workshop:
    text = texts.find_text("selftext")
    return audit.Workshop(model, place, text, 127, 128, audit_workshop.EFFORTS["smoke"], subject=subject)


def test_the_audit_says_which_suites_measure(
    tiny: LanguageModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTFORGE_DATA", str(folder))
    found = suites.suites_that_measure(shop(tiny, tmp_path), ["hellaswag", "arc_easy", "humaneval"])
    assert (found.value, found.n) == (pytest.approx(2 / 3), 3)
    assert found.protocol["lacking"] == {} and "--allow-generated-code" in found.protocol["untried"]["humaneval"]
    assert found.bounds == (pytest.approx(2 / 3), pytest.approx(1.0))  # nobody knows of the one that was not tried
    monkeypatch.setenv("AGENTFORGE_DATA", str(tmp_path))
    with pytest.raises(audit.Unmeasured, match="is neither in AGENTFORGE_DATA"):
        suites.suites_that_measure(shop(tiny, tmp_path), ["winogrande", "humaneval"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(audit.Unmeasured, match="lm-eval"):
        suites.suites_that_measure(shop(tiny, tmp_path), ["hellaswag"])


def test_the_audit_measures_a_subject_on_a_suite(
    tiny: LanguageModel, other: LanguageModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTFORGE_DATA", str(folder))
    expected = evaluate_tasks(other, ["hellaswag"], original=tiny, data=folder, progress=False)["hellaswag"]
    workshop = shop(tiny, tmp_path, other)
    assert probes.run(workshop, "task_accuracy", {"task": "hellaswag"}).value == expected.accuracy.value
    if expected.signal:
        kept = probes.run(workshop, "task_accuracy_kept", {"task": "hellaswag"})
        assert expected.retention is not None and kept.value == expected.retention.value
    else:
        with pytest.raises(audit.Unmeasured, match="above chance"):
            probes.run(workshop, "task_accuracy_kept", {"task": "hellaswag"})
    monkeypatch.setenv("AGENTFORGE_DATA", str(tmp_path))
    monkeypatch.setattr(texts, "CHECKOUT", tmp_path)
    with pytest.raises(audit.Unmeasured, match="neither in AGENTFORGE_DATA"):
        probes.run(workshop, "task_accuracy", {"task": "winogrande"})
