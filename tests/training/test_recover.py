"""Recovery: it recovers, it resumes to the bit, it stops early, and what is stored is what was trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import agentforge as af
from agentforge import artifact as artifacts
from agentforge.artifact import Artifact
from agentforge.errors import BadInput
from agentforge.evaluation import Text
from agentforge.models import LanguageModel
from agentforge.planes import Packed
from agentforge.training import recover as module
from agentforge.training.bitlinear import BitLinear
from agentforge.training.recover import Settings, recover
from agentforge.training.student import PlaneLinear, layers_of

TEXT = Text("letters", "file", "the quick brown fox jumps over the lazy dog. " * 60)
QUICK = Settings(steps=12, batch=4, context=32, lr=3e-3, evaluate=4, heldout=64)


def losses(history: list[dict[str, object]]) -> list[float]:
    return [loss for row in history for loss in row["losses"]]  # type: ignore[attr-defined]


def test_the_kl_falls_and_disk_holds_what_was_trained(tiny_llama: Path, tmp_path: Path) -> None:
    model = af.open_model(tiny_llama)
    settings = dataclasses.replace(QUICK, steps=40, evaluate=20)
    done = recover(model, tmp_path / "out", settings=settings, text=TEXT, progress=False)
    assert done.after.kl < 0.5 * done.before.kl
    # The last look, taken again on the model that is loaded back (its activations are not quantised: so nearly).
    loaded = af.load(tmp_path / "out")
    found = af.divergence(loaded, model, text=TEXT, context=32, tokens=200, progress=False)
    assert found.kl.value < 0.7 * done.before.kl
    assert done.artifact.verify()
    assert {row["stage"]["stage"] for row in done.artifact.rows if row["stage"]} == {"ternary"}
    trained = [row["name"] for row in done.artifact.rows if row.get("reason") == "trained"]
    assert len(trained) == 4 and all("layernorm" in name for name in trained)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # Asked for again, it is only read.
    again = recover(model, tmp_path / "out", settings=settings, text=TEXT, progress=False)
    assert again.history == done.history


def test_codes_on_disk_are_those_of_the_last_forward_pass(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, torch.Tensor] = {}
    result = module._Run.result

    def spy(run: module._Run) -> object:
        for name, layer in layers_of(run.student, BitLinear):
            used[f"{name}.weight"] = layer.quantized().clone()
        return result(run)

    monkeypatch.setattr(module._Run, "result", spy)
    recover(af.open_model(tiny_llama), tmp_path / "out", settings=QUICK, text=TEXT, progress=False)
    loaded = af.load(tmp_path / "out")
    assert len(used) == 14
    for name, dense in used.items():
        assert torch.equal(loaded.tensor(name), dense)


@pytest.mark.parametrize("optimizer", ["adamw", "mugrokfast"])
def test_a_killed_run_repeats_the_same_losses(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    model = af.open_model(tiny_llama)
    settings = dataclasses.replace(QUICK, optimizer=optimizer)
    whole = recover(model, tmp_path / "whole", settings=settings, text=TEXT, progress=False)
    step = module._Run._one_step

    def killed(run: module._Run) -> float:
        if run.step == 10:
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(module._Run, "_one_step", killed)
    with pytest.raises(KeyboardInterrupt):
        recover(model, tmp_path / "parts", settings=settings, text=TEXT, progress=False)
    monkeypatch.setattr(module._Run, "_one_step", step)
    assert not (tmp_path / "parts").exists()
    parts = recover(model, tmp_path / "parts", settings=settings, text=TEXT, progress=False)
    assert losses(parts.history) == losses(whole.history)
    assert [row["kl"] for row in parts.history] == [row["kl"] for row in whole.history]
    assert (tmp_path / "parts/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_another_recipe_does_not_take_up_a_checkpoint(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = af.open_model(tiny_llama)
    with monkeypatch.context() as context:
        context.setattr(module._Run, "result", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            recover(model, tmp_path / "out", settings=QUICK, text=TEXT, progress=False)
    other = dataclasses.replace(QUICK, lr=1e-3)
    with pytest.raises(BadInput, match="an unfinished run with"):
        recover(model, tmp_path / "out", settings=other, text=TEXT, progress=False)
    recover(model, tmp_path / "out", settings=other, text=TEXT, overwrite=True, progress=False)
    assert json.loads((tmp_path / "out/agentforge.json").read_text())["recipe"]["training"]["lr"] == 1e-3


def never(*_: object) -> object:
    raise AssertionError("nothing should have been trained")


def test_what_is_in_the_way_is_found_before_training(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = af.open_model(tiny_llama)
    af.compress(model, "ternary", tmp_path / "out", progress=False)
    before = (tmp_path / "out/agentforge.json").read_bytes()
    with monkeypatch.context() as context:
        context.setattr(module._Run, "_one_step", never)
        with pytest.raises(BadInput, match="pass --overwrite"):
            recover(model, tmp_path / "out", settings=QUICK, text=TEXT, progress=False)
    assert (tmp_path / "out/agentforge.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert recover(model, tmp_path / "out", settings=QUICK, text=TEXT, overwrite=True, progress=False).artifact.verify()


def test_a_run_killed_before_its_history_goes_on(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, write = af.open_model(tiny_llama), artifacts.write_json
    whole = recover(model, tmp_path / "whole", settings=QUICK, text=TEXT, progress=False)

    def killed(path: Path, data: object) -> None:
        if path.name == "history.json":
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as context:
        context.setattr(artifacts, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            recover(model, tmp_path / "out", settings=QUICK, text=TEXT, progress=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module._Run, "_one_step", never)
    done = recover(model, tmp_path / "out", settings=QUICK, text=TEXT, progress=False)
    assert [row["step"] for row in done.history] == [0, 4, 8, 12]
    assert (tmp_path / "out/model.safetensors").read_bytes() == (whole.artifact.path / "model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_damaged_checkpoint_is_not_taken_up(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is one without its best state: training begins again."""
    model = af.open_model(tiny_llama)
    whole = recover(model, tmp_path / "whole", settings=QUICK, text=TEXT, progress=False)
    for damaged in ("checkpoint", "best"):
        out = tmp_path / damaged
        with monkeypatch.context() as context:
            context.setattr(module._Run, "result", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                recover(model, out, settings=QUICK, text=TEXT, progress=False)
        file = out.with_name(f"{damaged}.partial") / "tensors" / f"{damaged}.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
        done = recover(model, out, settings=QUICK, text=TEXT, progress=False)
        assert losses(done.history) == losses(whole.history)
        assert (out / "model.safetensors").read_bytes() == (whole.artifact.path / "model.safetensors").read_bytes()


def test_what_training_starts_from_is_in_the_recipe(tiny_llama: Path, tmp_path: Path) -> None:
    """Two starts give two runs: the second does not pass for the first."""
    model, spec = af.open_model(tiny_llama), "rounding:bits=3,group=16"
    plain = af.compress(model, spec, tmp_path / "plain", progress=False)
    other = dataclasses.replace(QUICK, lr=1e-2)
    trained = recover(model, tmp_path / "trained", spec, other, text=TEXT, start=plain, progress=False).artifact
    first = recover(model, tmp_path / "out", spec, QUICK, text=TEXT, start=plain, progress=False)
    with pytest.raises(BadInput, match="pass --overwrite"):
        recover(model, tmp_path / "out", spec, QUICK, text=TEXT, start=trained, progress=False)
    second = recover(model, tmp_path / "out", spec, QUICK, text=TEXT, start=trained, overwrite=True, progress=False)
    assert second.before.kl < first.before.kl
    with pytest.raises(BadInput, match="takes no artifact to start with"):
        recover(model, tmp_path / "no", settings=QUICK, text=TEXT, start=plain)


def test_the_model_stays_as_it_was(tiny_llama: Path, tmp_path: Path) -> None:
    model = af.open_model(tiny_llama)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.model.named_parameters()}
    recover(model, tmp_path / "out", settings=QUICK, text=TEXT, progress=False)
    for name, parameter in model.model.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert not model.model.training


def test_the_best_state_is_what_is_kept(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last two steps do damage, at a rate of 3."""
    monkeypatch.setattr(module, "schedule", lambda step, *_: (1.0, 1.0 if step < 4 else 300.0))
    settings = dataclasses.replace(QUICK, steps=6, lr=1e-2, warmup=0.0, evaluate=2)
    done = recover(af.open_model(tiny_llama), tmp_path / "out", settings=settings, text=TEXT, progress=False)
    assert done.after.kl == min(row["kl"] for row in done.history[1:]) < done.history[-1]["kl"]
    kept = af.divergence(
        af.load(done.artifact.path), af.open_model(tiny_llama), text=TEXT, context=32, tokens=200, progress=False
    )
    assert kept.kl.value < done.history[-1]["kl"]


def test_a_step_of_the_schedule(tiny_llama: Path, tmp_path: Path) -> None:
    """Warm-up that works: an earlier implementation set a rate that its optimizer never read."""
    settings = dataclasses.replace(QUICK, steps=10, warmup=0.5, evaluate=1)
    done = recover(af.open_model(tiny_llama), tmp_path / "out", settings=settings, text=TEXT, progress=False)
    rates = [row["lr"] / settings.lr for row in done.history[1:]]
    fall = [0.1 + 0.9 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * i / 10)).item()) for i in range(10)]
    assert rates == pytest.approx([min(1.0, (i + 1) / 5) * fall[i] for i in range(10)], rel=1e-6)
    still = dataclasses.replace(settings, lr=0.0)
    nothing = recover(af.open_model(tiny_llama), tmp_path / "still", settings=still, text=TEXT, progress=False)
    assert {row["kl"] for row in nothing.history} == {nothing.before.kl}


def test_passes_and_recomputing_change_nothing_but_memory(tiny_llama: Path, tmp_path: Path) -> None:
    model = af.open_model(tiny_llama)
    runs = {}
    for name, change in {"one": {}, "two": {"passes": 2}, "again": {"recompute": True}}.items():
        settings = dataclasses.replace(QUICK, steps=4, **change)  # type: ignore[arg-type]
        runs[name] = losses(recover(model, tmp_path / name, settings=settings, text=TEXT, progress=False).history)
    assert runs["two"] == pytest.approx(runs["one"], rel=1e-4)
    assert runs["again"] == pytest.approx(runs["one"], rel=1e-4)


def test_a_classifier_recovers_its_accuracy(digits: LanguageModel, tmp_path: Path) -> None:
    settings = Settings(steps=150, batch=128, lr=5e-3, evaluate=50)
    plain = af.compress(digits, "ternary", tmp_path / "plain", progress=False)
    done = recover(digits, tmp_path / "out", settings=settings, progress=False)
    before, after = (af.accuracy(af.load(path)).value for path in (plain.path, done.artifact.path))
    assert after > before
    assert after > 0.9


@pytest.mark.parametrize(
    "spec",
    [
        "rounding:bits=3,group=16",
        "rounding:bits=3,group=48",  # divides no width of this model
        "rounding:bits=3,group=0,symmetric=true",
        "vptq:v=2,k=16,norm=std,outliers=0.1",
        "ecsq:step=2",
        "tcq:step=1",
    ],
)
def test_float_planes_decode_as_the_stage_does_and_can_be_trained(spec: str, tiny_llama: Path, tmp_path: Path) -> None:
    model = af.open_model(tiny_llama)
    stage = af.stages.parse(spec)
    calibration = af.statistics.Calibration(TEXT, 64, 32)
    artifact = af.compress(model, spec, tmp_path / "start", calibration=calibration, progress=False)
    layers = dict(model.model.named_modules())
    rows = [row for row in artifact.rows if row["stage"]]
    assert len(rows) == 14
    for row in rows:
        packed = artifact.read(row)
        assert isinstance(packed, Packed)
        layer = PlaneLinear(layers[row["name"].removesuffix(".weight")], stage, packed)
        torch.testing.assert_close(layer.dense().detach(), stage.decode(packed), rtol=1e-6, atol=1e-7)
        assert layer.packed().sha256 == packed.sha256
    settings = dataclasses.replace(QUICK, steps=40, evaluate=20, lr=1e-2)
    done = recover(model, tmp_path / "out", stage, settings, text=TEXT, start=artifact, progress=False)
    assert done.after.kl < 0.9 * done.before.kl
    assert Artifact(tmp_path / "out").verify()
    for before, after in zip(artifact.rows, done.artifact.rows, strict=True):
        if before["stage"] and before["stage"]["stage"] == "rounding":
            a, b = artifact.read(before), done.artifact.read(after)
            assert torch.equal(a["codes"], b["codes"])  # type: ignore[index]
            assert not torch.equal(a["scale"], b["scale"])  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0; expected a whole number"),
        ({"batch": 4, "passes": 3}, "does not divide into passes=3"),
        ({"lr": -1.0}, r"lr=-1\.0; expected"),
        ({"clip": 0.0}, r"clip=0\.0"),
        ({"optimizer": "sgd"}, "optimizer='sgd'"),
    ],
)
def test_settings_out_of_range_are_refused(
    change: dict[str, object], message: str, digits: LanguageModel, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        recover(digits, tmp_path / "out", settings=dataclasses.replace(QUICK, **change), progress=False)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_trained_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = af.open_model(tiny_llama)
    with pytest.raises(
        BadInput, match="seedlm has no float planes that can be trained; choose from ternary, ecsq, rounding, tcq, vptq"
    ):
        recover(model, tmp_path / "out", "seedlm:bits=4", QUICK, text=TEXT)
    with pytest.raises(BadInput, match="expected rule=absmean"):
        recover(model, tmp_path / "out", "ternary:rule=threshold", QUICK, text=TEXT)
    with pytest.raises(BadInput, match="nothing: is not a weight of"):
        recover(model, tmp_path / "out", settings=QUICK, text=TEXT, names=["nothing"])
    with pytest.raises(BadInput, match=r"context=129: tiny-llama.* takes at most 128 tokens"):
        recover(model, tmp_path / "out", settings=dataclasses.replace(QUICK, context=129), text=TEXT)
    with pytest.raises(BadInput, match="a window takes 32"):
        recover(model, tmp_path / "out", settings=QUICK, text=Text("short", "file", "abc"))


@pytest.mark.slow
def test_two_layers_of_the_real_model_recover_in_sixty_steps(smollm2: LanguageModel, tmp_path: Path) -> None:
    """The last two blocks made ternary, trained on selftext for 60 steps of 128 tokens: held-out KL at least halved."""
    names = [weight.name for weight in smollm2.weights() if ".layers.28." in weight.name or ".layers.29." in weight.name]
    settings = Settings(steps=60, batch=1, context=128, lr=1e-3, evaluate=60, heldout=1024)
    done = recover(smollm2, tmp_path / "out", settings=settings, names=names, progress=False)
    assert len(names) == 14
    print(f"KL {done.before.kl:.3f} +- {done.before.stderr:.3f} -> {done.after.kl:.3f} +- {done.after.stderr:.3f}")
    assert done.after.kl + 2 * done.after.stderr < 0.5 * done.before.kl
    assert af.load(tmp_path / "out").artifact.verify()  # type: ignore[attr-defined]
