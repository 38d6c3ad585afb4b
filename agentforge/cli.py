"""The command line: the package's verbs as commands, with no logic of their own.

Nothing here loads torch before the names that a command was given are looked at: a mistyped one is told at once.
"""

from __future__ import annotations

import io
import json
import math
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer import Argument, Option

from .errors import AgentForgeError, BadInput
from .escaping import printable
from .names import MODELS, check_names, find_report

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich cuts the names of options in a narrow terminal
    epilog="Exit codes: 0 done; 1 a check says no; 2 bad input, or no disk space or memory left; 70 a bug of agentforge; "
    "130 interrupted (Ctrl-C); 143 terminated (SIGTERM); 129 hung up (SIGHUP).",
    help="Compress a language model, load it back from disk, and prove what was measured.",
)
about_handoffs = "Write and check what one phase leaves for the next."
handoff_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=about_handoffs)
app.add_typer(handoff_app, name="handoff")
out = Console(soft_wrap=True)
LEAST = 12  # characters that a column needs, on average

Model = Annotated[str, Argument(help="A name, a Hugging Face folder, a hub id or a GGUF file.")]
ArtifactDir = Annotated[Path, Argument(metavar="DIR", help="An artifact.")]
Scheduler = Annotated[
    str | None, Option(help="Address of a Dask scheduler, such as tcp://host:8786, whose workers encode; same bytes.")
]
Overwrite = Annotated[bool, Option(help="Replace what was made with other settings.")]
Threads = Annotated[int | None, Option(help="Threads (default: one per core); same bytes.")]
Device = Annotated[str, Option(help="cpu or cuda.")]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object instead of tables.")]
TextName = Annotated[str | None, Option("--text", help="wikitext2, selftext or a text file (default: the first available).")]
RegistryURI = Annotated[
    str | None,
    Option("--registry", help="URI of MLflow's registry (default: AGENTFORGE_REGISTRY, or a file in the cache)."),
]

FromPhase = Annotated[int, Option("--from", help="The phase that hands over.")]
ToPhase = Annotated[str, Option("--to", help="The phase that receives, or deployment.")]


def _checked_out(path: Path | None) -> Path | None:
    """A folder to be written, as the option --out has it.  Raises BadInput, before any work, if none can be made."""
    if path is None:
        return None
    path = path.expanduser()
    if path.name in ("", ".."):  # "." has no name that another folder could lie beside
        path = path.resolve()
    # An artifact is made beside its place and renamed; what exists is replaced, or written into.
    for where in {path if path.exists() and path.suffix != ".gguf" else path.parent, path.parent}:
        nearest = next(folder for folder in (where, *where.absolute().parents) if folder.exists())
        try:
            with tempfile.TemporaryDirectory(prefix=".agentforge-", dir=nearest):
                pass
        except OSError as error:
            reason = error.strerror if nearest.is_dir() else "is not a folder"
            raise BadInput(f"--out {path}: {nearest} cannot be written ({reason}); choose another --out") from None
    return path


def _out(what: str) -> Any:
    """The option --out, to a folder that can be written."""
    return Option("--out", help=what, callback=_checked_out)


OutDir = Annotated[Path, _out("The artifact's folder.")]
CalibrationText = Annotated[str, Option(help="Text for input statistics: selftext, wikitext2 or a text file.")]
CalibrationTokens = Annotated[int, Option(min=1, help="How many tokens of the calibration text to read.")]


def _check(device: str | None = None, **given: Any) -> None:
    """Raise BadInput for a device that is not here, and for names, by the option, that can mean nothing."""
    check_names(device=device)
    if device not in (None, "cpu"):
        from .models import device_named

        device_named(device)
    check_names(**given)


def main() -> None:
    """Run the command line and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files that the terminal's encoding does not have
    caught = [signal.SIGINT]

    def stop(number: int, _: object) -> None:
        caught.append(signal.Signals(number))
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup's stays
            signal.signal(number, stop)
    code: Any = 130
    try:
        # Outside of standalone mode, an exit and an interrupt come back as the code that they asked for.
        code = app(standalone_mode=False)
    except AgentForgeError as error:
        _complain(str(error), 2)
    except (KeyboardInterrupt, SystemExit) as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else error.code
    except BaseException as error:  # a panic of a library in Rust is not an Exception
        # click's usage errors come through here because standalone_mode is off: they know how to show themselves.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(error.exit_code)
        if type(error).__name__ != "Abort":
            if sys.flags.dev_mode:
                raise
            _complain(*_unexpected(error))
    if code == 130:
        _complain(f"interrupted; the same command {_again(sys.argv[1:])}", 128 + caught[-1])
    sys.exit(code if isinstance(code, int) else 0)


def _unexpected(error: BaseException) -> tuple[str, int]:
    """The message for an unexpected error, and the exit code."""
    if isinstance(error, MemoryError) or re.search(_NO_MEMORY, str(error)):
        return "out of memory; free some or raise the limit (--workers 1 needs the least, if the command has it)", 2
    if "home directory" in str(error):  # of Path.expanduser
        return "a path begins with ~ and a name that is no user's here; write it in full, or as ./~name", 2
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or error}", 2
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}, line {last.lineno}"
    what = f"{type(error).__name__}: {error}"
    return f"{what:.300} ({where}); this is a bug of agentforge: report it with what PYTHONDEVMODE=1 shows", 70


# How torch, safetensors, the dynamic linker and threads say that there is none.
_NO_MEMORY = r"(?i)can(not|'t) allocate memory|out of memory|can't start new thread|failed to map segment|bad_alloc"


def _again(asked: list[str]) -> str:
    """What the same command does after an interrupt: what it keeps under --out or in the cache is not made again."""
    names = {word.partition("=")[0] for word in asked}
    goes_on = asked and asked[0] in ("compress", "fit", "pipeline", "recover", "audit") and "--fresh" not in names
    if asked and asked[0] == "fit" and "--bits" not in names:
        goes_on = False  # it tries artifacts in a folder that is gone
    return "resumes from what is finished" if goes_on else "starts again"


@app.command()
def models(
    model: Annotated[str | None, Argument(help="Show this model's tensors: which may be touched, why others stay.")] = None,
    embeddings: Annotated[bool, Option(help="Count the embeddings and output head as tensors that may be touched.")] = False,
    registered: Annotated[bool, Option("--registered", help="List the versions in the registry.")] = False,
    registry: RegistryURI = None,
    as_json: AsJson = False,
) -> None:
    """List models by name, one model's tensors, or what is registered."""
    if registered or registry:
        from .registry import registered as versions

        found = [row for row in versions(registry) if model in (None, row["name"])]
        return _show({"registered": found}, as_json, lambda: _registered_table(found))
    if model is None:
        caption = "or a Hugging Face folder, a hub id, or a GGUF file of the Llama family"
        return _show({"models": MODELS}, as_json, lambda: _table("name|what it is", MODELS.items(), caption))
    _check(model=model)
    from .opening import open_model

    opened = open_model(model)
    weights, kept = opened.weights(embeddings), opened.kept(embeddings)
    touched = sum(w.shape[0] * w.shape[1] for w in weights)
    rows = [[w.name, _shape(w.shape), "may be touched", w.module] for w in weights]
    rows += [[name, _shape(opened.entries[name].shape), "kept", why] for name, why in kept.items()]
    caption = f"{opened.parameters:,} parameters, {touched:,} in the {len(weights)} matrices that a stage may touch"
    data = {"name": opened.name, "path": str(opened.path), "parameters": opened.parameters, "touched_parameters": touched}
    data |= {"source": opened.source, "weights": {w.name: list(w.shape) for w in weights}, "kept": kept}
    _show(data, as_json, lambda: _table("tensor|shape||why", rows, caption))


@app.command()
def compress(
    model: Model,
    stage: Annotated[str, Option(help="Stage and settings, such as rounding:bits=4,group=64 or ternary.")],
    out_dir: OutDir,
    embeddings: Annotated[bool, Option(help="Encode the token embedding and output head, too.")] = False,
    seed: Annotated[int, Option(help="Seed for stages that draw random numbers.")] = 0,
    workers: Annotated[int | None, Option(help="Tensors at a time (default: by cores and memory); same bytes.")] = None,
    device: Annotated[str, Option(help="cuda searches on a GPU if the stage can; same bytes.")] = "cpu",
    overwrite: Overwrite = False,
    fallback: Annotated[
        bool, Option(help="Encode weights that the stage cannot with rounding:bits=8, or keep them; off: refuse them.")
    ] = False,
    scheduler: Scheduler = None,
    calibration: CalibrationText = "selftext",
    calibration_tokens: CalibrationTokens = 8192,
    as_json: AsJson = False,
) -> None:
    """Encode a model's weights and write the artifact. Run again after a kill, it resumes where it stopped."""
    _check(device, model=model, stage=stage, text=calibration)
    from . import execution
    from .evaluation.measurement import peak_memory
    from .opening import open_model
    from .pipeline import compress as run
    from .stages import parse
    from .statistics import Calibration

    parsed = parse(stage)
    opened = open_model(model)
    start = time.perf_counter()
    options: dict[str, Any] = {"embeddings": embeddings, "seed": seed, "workers": workers, "device": device}
    options |= {"overwrite": overwrite, "fallback": fallback, "calibration": Calibration(calibration, calibration_tokens)}
    with execution.connected(scheduler) as executor:
        artifact = run(opened, parsed, out_dir, executor=executor, progress=not as_json, **options)
    seconds, peak = time.perf_counter() - start, peak_memory()
    touched = [row for row in artifact.rows if row["stage"]]
    fallbacks = {row["name"]: f"{_stage_name(row)}: {row.get('reason')}" for row in artifact.fallbacks}
    caption = [
        f"{parsed}: {len(touched)} of {len(artifact.rows)} tensors encoded in {seconds:.1f} s, "
        f"peak memory {peak / 1e6:,.0f} MB; written to {artifact.path}",
        *(f"not as asked, {name}: {why}" for name, why in fallbacks.items()),
    ]
    about = {"stage": parsed.to_json(), "fallbacks": fallbacks, "seconds": seconds, "peak_memory_bytes": peak}
    _show_ratios(artifact, about, as_json, caption)


@app.command()
def fit(
    model: Model,
    out_dir: OutDir,
    target: Annotated[str | None, Option(help="Ratio of the whole model against 16 bits per parameter, such as 4x.")] = None,
    bits: Annotated[
        float | None, Option(help="Bits per weight on disk, of embedding and head, too (not with --embeddings, --recover).")
    ] = None,
    size: Annotated[str | None, Option("--bytes", help="All weight files, such as 60MB (1 MB = 1,000,000 bytes).")] = None,
    max_kl: Annotated[float | None, Option(help="Largest KL(original || compressed), in nats per token.")] = None,
    embeddings: Annotated[
        str | None,
        Option(help="Stage for the embedding and output head, or keep (default: chosen like those of all other layers)."),
    ] = None,
    text: TextName = None,
    tokens: Annotated[int, Option(min=2, help="How many tokens of the text to score, spread evenly.")] = 6132,
    recover: Annotated[int | None, Option(min=1, help="Train gains and norms: steps of 4,096 tokens, same bits.")] = None,
    sequential: Annotated[
        bool, Option("--sequential", help="Layer by layer, to make up for what earlier layers lost; twice the time.")
    ] = False,
    program: Annotated[
        str | None,
        Option(
            "--for", help="gguf (llama.cpp) or compressed-tensors (vLLM): of at most --bytes, in the format's own types."
        ),
    ] = None,
    calibration: CalibrationText = "selftext",
    calibration_tokens: CalibrationTokens = 32768,
    workers: Threads = None,
    device: Annotated[str, Option(help="cpu or cuda, for statistics, searches, training and measuring.")] = "cpu",
    scheduler: Scheduler = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Meet a budget with the least damage, and measure the result. Each weight gets settings of its own."""
    names = {"stage": embeddings if embeddings != "keep" else None, "--for": program}
    _check(device, model=model, text=text, train_on=calibration, **names)
    from . import execution
    from .allocation import Budget, budget_bytes
    from .allocation import fit as run
    from .fit_for import Fitted, fit_for
    from .opening import open_model
    from .statistics import Calibration
    from .training.recover import Settings

    opened = open_model(model)
    most = budget_bytes(size, target, opened.parameters)
    start = time.perf_counter()
    options: dict[str, Any] = {"text": text, "tokens": tokens, "workers": workers, "device": device, "progress": not as_json}
    options["calibration"] = Calibration(calibration, calibration_tokens)
    call: Callable[..., Any]
    if program is None:
        options |= {"embeddings": embeddings, "sequential": sequential}
        options["recovery"] = Settings.of_codes(recover, device) if recover else None
        call = partial(run, opened, out_dir, Budget(most, bits, max_kl), overwrite=overwrite, **options)
    elif most is None or sequential or any(one is not None for one in (bits, max_kl, embeddings, recover)):
        rest = "and no other limit, stage, order or training"
        raise BadInput(f"--for {program} takes --bytes (or --target) of the whole file, {rest}")
    else:
        call = partial(fit_for, opened, program, out_dir, most, overwrite=overwrite, **options)
    with execution.connected(scheduler) as executor:
        found = call(executor=executor)
    seconds, measured = time.perf_counter() - start, found.measured
    said = f"KL {measured.kl}, predicted {found.predicted:.3g}; perplexity {measured.perplexity} "
    said += f"(original {measured.original_perplexity.value:.2f}); {seconds:.0f} s"
    about = {"predicted_kl": found.predicted, "measured": {k: v.to_json() for k, v in measured._asdict().items()}}
    about["seconds"] = seconds
    if isinstance(found, Fitted):
        return _show(found.file.to_json() | about, as_json, lambda: _say(*found.file.lines(), said))
    caption = f"{found.bits:.3f} bits per weight of {found.counted}; {said}; written to {found.artifact.path}"
    if found.outside:
        caption += (
            f"\n{len(found.outside)} weights have no statistics, such as {found.outside[0]}: they are kept as they are, and "
            "the bits do not count them"
        )
    about = {"outside": found.outside, "bits_per_weight": found.bits, "counted": found.counted} | about
    _show_ratios(found.artifact, about, as_json, [caption])


@app.command()
def inspect(artifact_dir: ArtifactDir, as_json: AsJson = False) -> None:
    """Show an artifact's tensors, bits, errors, bytes and ratios. All of it comes from its manifest."""
    _check(artifact=artifact_dir)
    from .artifact import Artifact

    artifact = Artifact(artifact_dir)
    recipe, original = artifact.manifest["recipe"], artifact.manifest["original"]
    rows = []
    for row in artifact.rows:
        bits = row["bits"] / max(1, math.prod(row["shape"]))
        cells = [f"{bits:.4f}", f"{row['relative_error']:.5f}", f"{row['bytes']:,}"]
        rows.append([row["name"], _shape(row["shape"]), _stage_name(row), *cells])
    stage = {key: value for key, value in recipe["stage"].items() if key != "weights"}
    about = {"recipe": recipe, "original": original, "tensors": artifact.rows}
    _show_ratios(artifact, about, as_json, [f"made from {original['name']} with {stage}"], rows)


@app.command()
def verify(artifact_dir: ArtifactDir, as_json: AsJson = False) -> None:
    """Check an artifact's hashes, shapes, planes, and decode it all. The exit code is 1 if something is wrong."""
    _check(artifact=artifact_dir)
    from .artifact import Artifact

    try:
        checks = Artifact(artifact_dir).verify()
    except BadInput as error:  # a shard's fault is BadInput, the manifest's BadArtifact
        if as_json:
            _show({"path": str(artifact_dir), "ok": False, "error": str(error)}, True, None, passed=False)
        _complain(str(error), 1)
    said = [f"sound: {artifact_dir}", *(f"  {check}" for check in checks)]
    _show({"path": str(artifact_dir), "ok": True, "checked": checks}, as_json, lambda: _say(*said))


@app.command()
def export(
    artifact_dir: ArtifactDir,
    to: Annotated[str, Option(help="gguf, compressed-tensors, mlx, gptq, bitnet or vptq.")],
    out_dir: Annotated[
        Path | None, _out("The file (gguf) or folder to write (default: beside the artifact, under its name).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write an artifact for llama.cpp, vLLM, transformers or MLX. What is written is decoded again and compared."""
    _check(artifact=artifact_dir, format=to)
    from .exports import export as run

    found = run(artifact_dir, to, out_dir)
    _show(found.to_json(), as_json, lambda: _say(*found.lines()))


@app.command()
def register(
    artifact_dir: ArtifactDir,
    name: Annotated[str | None, Option(help="Name of the registered model (default: the base model's).")] = None,
    record: Annotated[Path | None, Option(help="Measurements: an audit's record, or what evaluate --json printed.")] = None,
    alias: Annotated[list[str] | None, Option(help="Alias for this version, such as champion.")] = None,
    handed: Annotated[Path | None, Option("--handoff", help="Folder of its hand-off, to be checked and recorded.")] = None,
    registry: RegistryURI = None,
    as_json: AsJson = False,
) -> None:
    """Check an artifact and register it with its lineage. It is registered packed and dequantised, and only once."""
    _check(artifact=artifact_dir)
    from .registry import register as run

    found = run(artifact_dir, name=name, uri=registry, record=record, aliases=tuple(alias or ()), handed=handed)
    what = f"{artifact_dir} {'registered as' if found.new else 'is already there:'} {found.name}"
    said = f"{what}, version {found.packed}, packed and dequantised"
    _show(found._asdict(), as_json, lambda: _say(said))


def _registered_table(found: list[dict[str, Any]]) -> None:
    rows = []
    for row in found:
        tags, metrics = row["tags"], ", ".join(f"{name} {m['value']:.4g}" for name, m in row["metrics"].items())
        cells = [
            row["name"],
            str(row["version"]),
            tags["manifest_sha256"][:12],
            f"{int(tags['bytes']):,}",
            tags.get("parent_version", "-"),
            metrics or "-",
        ]
        rows.append([*cells, ", ".join(row["aliases"]) or "-", tags["handoff"]])
    _table("name|>version|manifest|>bytes|made from|measured|aliases|hand-off", rows)


@handoff_app.command("write")
def handoff_write(
    folder: Annotated[Path, Argument(metavar="DIR", help="Folder with models as subfolders; from phase 8 on, a chain's.")],
    phase: FromPhase,
    to: ToPhase,
    text: TextName = None,
    tokens: Annotated[int, Option(min=2, help="How many tokens to measure quality on.")] = 6132,
    as_json: AsJson = False,
) -> None:
    """Measure the models of a folder, and write its handoff.json."""
    from . import handoff as handoffs

    handoffs.contract(phase, to)
    path = handoffs.measure_and_write(folder, phase, text, tokens, progress=not as_json)
    _show({"path": str(path)}, as_json, lambda: _say(f"written: {path}"))


@handoff_app.command("check")
def handoff_check(
    folder: Annotated[Path, Argument(metavar="DIR", help="Folder that the previous phase left.")],
    phase: FromPhase,
    to: ToPhase,
    text: TextName = None,
    as_json: AsJson = False,
) -> None:
    """Check a hand-off: count, hash and measure it again; anything that differs is refused (exit code 2)."""
    from . import handoff as handoffs

    checks = handoffs.check_handoff(folder, phase, text, progress=not as_json, to=to)
    said = [f"accepted: {folder}", *(f"  {check}" for check in checks)]
    _show({"path": str(folder), "checked": checks}, as_json, lambda: _say(*said))


@app.command()
def evaluate(
    model: Annotated[str, Argument(help="An artifact, or any model.")],
    against: Annotated[str | None, Option(help="The original: adds KL divergence and top-1 agreement.")] = None,
    text: TextName = None,
    tokens: Annotated[int | None, Option(help="Tokens to score, in windows spread evenly (default: all).")] = None,
    context: Annotated[
        int | None,
        Option(help="Tokens per window (default: 2048, or the model's limit); for a sample, 512 gives a better error."),
    ] = None,
    stride: Annotated[int | None, Option(help="Distance between windows (default: the context).")] = None,
    bos: Annotated[
        str | None,
        Option(help="BOS token: none, text (one) or window (one each; the default if the tokenizer adds one)."),
    ] = None,
    runtime: Annotated[str, Option(help="For artifacts: dense, or packed (weights stay packed).")] = "dense",
    device: Device = "cpu",
    tasks: Annotated[str | None, Option(help="Tasks instead of a text: hellaswag,arc_easy,mmlu,gsm8k,...")] = None,
    limit: Annotated[int | None, Option(help="Items per task, drawn at random (default: all).")] = None,
    data: Annotated[Path | None, Option(help="Tasks' folder (default: AGENTFORGE_DATA, ../shared/data, the hub).")] = None,
    allow_generated_code: Annotated[
        bool, Option("--allow-generated-code", help="Run the code that the model writes for humaneval, in a sandbox.")
    ] = False,
    phase5: Annotated[bool, Option("--phase5", help="Phase 5 checks instead of a text: edge of chaos, Eudaimonia.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model as it is loaded back from disk. Perplexity, tasks, Phase 5 checks; accuracy for digits-mlp."""
    if tasks is None and (limit is not None or data is not None or allow_generated_code):
        raise BadInput("--limit, --data and --allow-generated-code are for tasks; name some with --tasks")
    if phase5 and (tasks is not None or text is not None or tokens is not None):
        raise BadInput("--phase5 asks its own questions; leave out --tasks, --text and --tokens")
    asked = None if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]
    _check(device, model=model, against=against, text=text, runtime=runtime, tasks=asked)
    from . import evaluation
    from .opening import load, open_model

    opened = (open_model(model) if runtime == "dense" else load(model, runtime)).on(device)
    original = open_model(against).on(device) if against else None
    progress = not as_json
    if phase5:
        edge = evaluation.edge_of_chaos(opened, original, progress=progress)
        rules = evaluation.eudaimonia(opened, original, progress=progress)
        found = {"model": opened.name, "edge_of_chaos": edge.to_json(), "eudaimonia": rules.to_json()}
        return _show(found, as_json, lambda: _measure_table({**edge.named(), **rules.named()}, edge.summary))
    if asked is not None:
        options: dict[str, Any] = {"limit": limit, "data": data, "unsafe_code": allow_generated_code, "progress": progress}
        results = evaluation.evaluate_tasks(opened, asked, original=original, **options)
        found = {"model": opened.name, "tasks": {name: result.to_json() for name, result in results.items()}}
        return _show(found, as_json, lambda: _task_table(results))
    if opened.is_classifier:
        measured = {"accuracy": evaluation.accuracy(opened)}
        if original:
            measured["accuracy of the original"] = evaluation.accuracy(original)
    else:
        about: dict[str, Any] = {"text": text, "context": context, "stride": stride, "tokens": tokens, "bos": bos}
        about["progress"] = progress
        if original:
            result = evaluation.divergence(opened, original, **about)
            measured = {"perplexity": result.perplexity, "perplexity of the original": result.original_perplexity}
            measured |= {"KL(original || model)": result.kl, "top-1 agreement": result.top1}
        else:
            measured = {"perplexity": evaluation.perplexity(opened, **about)}
        for one, name in ((original, "perplexity of the original"), (opened, "perplexity")):
            if one:
                one.check_finite(measured[name].value)
    protocol = {key: value for m in measured.values() for key, value in m.protocol.items()}
    caption = ", ".join(f"{k}={v}" for k, v in protocol.items() if v and k not in ("metric", "text_sha256", "tokenizer"))
    found = {"model": opened.name, "measurements": {k: m.to_json() for k, m in measured.items()}}
    _show(found, as_json, lambda: _measure_table(measured, caption))


def _measure_table(measured: dict[str, Any], caption: str) -> None:
    rows = []
    for name, m in measured.items():
        interval = "-" if m.stderr is None else "{:.5g} to {:.5g}".format(*m.bounds)
        rows.append([name, f"{m.value:.5g}", interval, m.unit, f"{m.n:,}", m.error])
    _table("measure|>value|>95% interval|unit|>n|error from", rows, caption)


def _task_table(results: dict[str, Any]) -> None:
    from .evaluation.tasks import NO_SIGNAL

    rows = []
    for name, result in results.items():
        protocol, kept = result.accuracy.protocol, result.retention
        values = [result.accuracy, result.original_accuracy, kept]
        cells = ["-" if m is None else _with_error(m.value, m.stderr) for m in values]
        interval = "-" if kept is None else "{:.3f} to {:.3f}".format(*kept.bounds)
        notes = [] if result.signal else [NO_SIGNAL]
        if truncated := protocol["truncated_items"]:
            notes.append(f"{truncated} items did not fit into the context")
        what = f"{protocol['metric']}, {protocol['shots']} shots"
        rows.append([name, what, f"{result.accuracy.n:,}", *cells, interval, f"{result.chance:.3f}", "; ".join(notes)])
    origins = ", ".join(dict.fromkeys(result.accuracy.protocol["data"] for result in results.values()))
    caption = f"± standard error; of retention for pairs of the same items. Questions: {origins}"
    _table("task|metric|>n|>accuracy|>original|>retention|>95% interval|>chance|", rows, caption)


@app.command()
def recover(
    model: Model,
    out_dir: Annotated[Path, _out("Folder for both outputs, the hand-off and the metrics; the same folder resumes.")],
    steps: Annotated[int, Option(help="Training steps, if training is needed.")] = 1000,
    batch: Annotated[int, Option(help="Windows per step.")] = 8,
    window: Annotated[int, Option(help="Training tokens per window.")] = 512,
    lr: Annotated[float, Option(help="Peak learning rate.")] = 1e-3,
    optimizer: Annotated[str, Option(help="adamw or mugrokfast.")] = "adamw",
    train_on: Annotated[str, Option(help="Text to train on: selftext, wikitext2 or a text file.")] = "selftext",
    always: Annotated[bool, Option(help="Train even if perplexity rose by less than 5%.")] = False,
    packing: Annotated[str, Option(help="trits (1.6 bits per weight) or 2bit.")] = "trits",
    text: TextName = None,
    tokens: Annotated[int, Option(help="How many tokens to measure quality on.")] = 6132,
    device: Annotated[str | None, Option(help="Train and measure on cpu or cuda (default: cuda if available).")] = None,
    overwrite: Annotated[bool, Option(help="Discard the output of other settings.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a model ternary and train it back by distillation. Two outputs are handed over; exit code 1: a gate failed."""
    _check(device, model=model, optimizer=optimizer, text=text, train_on=train_on)
    from .training.phase import phase
    from .training.recover import Settings

    settings = Settings(steps=steps, batch=batch, context=window, lr=lr, optimizer=optimizer)  # type: ignore[arg-type]
    options: dict[str, Any] = {"text": text, "training_text": train_on, "tokens": tokens, "always_train": always}
    options |= {"stage": f"ternary:packing={packing}", "device": device, "overwrite": overwrite}
    result = phase(model, out_dir, settings, progress=not as_json, **options)
    data = {"path": str(result.path), "trained": result.trained, "metrics": result.metrics}
    data |= {"gates": [gate.to_json() for gate in result.gates], "passed": result.passed}
    rows = [[k, f"{v:.5g}"] for k, v in result.metrics.items()]
    _show(data, as_json, lambda: _table("metric|>value", rows, *map(str, result.gates)), result.passed)


@app.command()
def pipeline(
    model: Model,
    chain: Annotated[Path, Argument(help="A YAML file of steps, settings to try, and gates.")],
    out_dir: Annotated[Path, _out("Folder for the artifact and the journal; the same folder resumes.")],
    workers: Threads = None,
    device: Annotated[str, Option(help="cpu or cuda, for measuring, and for searches if the stage can.")] = "cpu",
    overwrite: Annotated[bool, Option(help="Discard the output of another chain.")] = False,
    track: Annotated[Path | None, Option(help="Folder for every attempt's metrics, and an offline W&B run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a model through a chain of stages with gates. A step that fails its gates is rolled back (exit code 1)."""
    _check(device, model=model)
    from .chain import run_chain

    options: dict[str, Any] = {"workers": workers, "device": device, "overwrite": overwrite, "track": track}
    result = run_chain(model, chain, out_dir, progress=not as_json, **options)
    path = str(result.artifact.path) if result.artifact else None
    caption = [f"{row['name']}, try {row['attempt']}: {row['reason']}" for row in result.attempts if row["reason"]]
    caption.append(f"accepted: {path or 'nothing; the original stands'}")
    columns = "step|setting|>ratio|>of this step|>touched tensors|>of this step|>error|>retention|>in total|decision"
    rows = [_attempt_cells(row) for row in result.attempts]
    data = {"path": path, "finished": result.finished, "attempts": result.attempts}
    _show(data, as_json, lambda: _table(columns, rows, *caption), result.finished)


def _attempt_cells(row: dict[str, Any]) -> list[str]:
    found = row.get("measured", {})
    cells = []
    for name in ("ratio", "step_ratio", "touched_ratio", "touched_step_ratio", "error", "retention", "total_retention"):
        measured = found.get(name, {"value": math.nan, "stderr": None})
        cells.append(_with_error(measured["value"], measured["stderr"]))
    return [row["name"], row["setting"]["stage"], *cells, row["decision"]]


@app.command()
def cache(
    name: Annotated[str | None, Argument(metavar="NAME", help="Only what lies there under this name.")] = None,
    clear: Annotated[bool, Option("--clear", help="Remove it, unless it is in use or not agentforge's.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what lies in the cache, or clear it. What was cleared is made again when it is needed."""
    from .cache import cached
    from .models import cache_dir

    found = cached(name, clear)
    gone = [entry for entry in found if clear and not entry["kept"]]
    if clear and name is not None and not gone:
        raise BadInput(f"{name}: is not cleared; {found[0]['kept']}")
    said = "cleared" if clear else ""
    rows = [[e["name"], e["what"], f"{e['bytes'] / 1e6:,.1f}", f"stays: {e['kept']}" if e["kept"] else said] for e in found]
    total = sum(entry["bytes"] for entry in (gone if clear else found)) / 1e6
    caption = f"{cache_dir()}: {total:,.1f} MB{' cleared' if clear else '; agentforge cache --clear removes what can be'}"
    data = {"path": str(cache_dir()), "entries": found, "cleared": [entry["name"] for entry in gone]}
    _show(data, as_json, lambda: _table("name|what it is|>MB|", rows, caption))


@app.command()
def dashboard(
    workspace: Annotated[Path, Option(help="Folder of all runs; the page reads and writes nothing outside it.")] = Path(
        "agentforge-runs"
    ),
    port: Annotated[int, Option(min=1, max=65535, help="Port on this machine only (127.0.0.1).")] = 8501,
) -> None:
    """Show runs of chains on a page in the browser. There they are started, paused, resumed, aborted and compared."""
    from .dashboard import runs, server

    server.check(port)
    folder = runs.open_workspace(workspace)
    _say(f"http://{server.ADDRESS}:{port}: workspace {folder}; Ctrl-C ends the dashboard, its runs go on")
    server.serve(folder, port)
    alive = ", ".join(runs.active(folder))
    _say(f"the dashboard has ended; {f'going on: {alive}' if alive else 'no run goes on'}")


@app.command()
def audit(
    reports: Annotated[list[str] | None, Argument(help="Which reports (default: all).", metavar="[REPORT]...")] = None,
    claims: Annotated[
        Path | None, Option(help="A YAML file of your own claims, or a folder with one, whose probes and template are run.")
    ] = None,
    model: Annotated[str | None, Option(help="Measure on this model (default: the claims' own).")] = None,
    against: Annotated[str | None, Option(help="The original of that model, for claims that compare.")] = None,
    text: TextName = None,
    tokens: Annotated[int | None, Option(help="Tokens to score for likelihoods (default: set by the budget).")] = None,
    budget: Annotated[
        str | None,
        Option(help="smoke, quick, standard or full: how large samples are (default: quick; --only: standard)."),
    ] = None,
    device: Device = "cpu",
    out_dir: Annotated[
        Path | None,
        Option("--out", help="Folder for reports (default: build/reports; with the full budget, reports)."),
    ] = None,
    only: Annotated[list[str] | None, Option(help="A claim's id: measure this one and write no report.")] = None,
    fresh: Annotated[bool, Option(help="Measure everything again; off: only claims whose inputs changed.")] = False,
    keep: Annotated[bool, Option(help="Keep what the report has measured; measure only new or changed claims.")] = False,
    check: Annotated[bool, Option(help="Measure nothing; check that each report matches its record.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the claims of reports, and write each report. It comes as notebook, HTML, Markdown, SARIF and JSON.

    The exit code is 1 if a probe failed, which is not a verdict on its claim, and 2 if the claims file is not in order."""
    if claims is not None and reports:
        raise BadInput(f"reports {', '.join(reports)} and --claims {claims} were asked for; expected one of the two")
    for name in reports or filter(None, [claims]):
        find_report(name)
    _check(device, model=model, against=against, text=text, budget=budget)
    from .audit import report as audits
    from .tensorfiles import read_json

    names: list[str | Path] = [claims] if claims is not None else [*(reports or audits.NAMES)]
    if check:
        return _check_reports(names, out_dir, as_json)
    budget = budget or ("standard" if only else "quick")
    out_dir = _checked_out(out_dir)
    settings: dict[str, Any] = {"model": model, "against": against, "text": text, "tokens": tokens, "budget": budget}
    settings |= {"device": device, "fresh": fresh}
    if only:
        if len(names) != 1:
            raise BadInput("--only asks for claims of one report; name the report, too")
        rows = audits.only(names[0], only, settings)
        return _show({"claims": rows}, as_json, lambda: _claims(rows), all(row["verdict"] != "error" for row in rows))
    if not as_json:
        out.print(audits.foreseen(names, budget), markup=False)
    made = [audits.run(name, out=out_dir, keep=keep, progress=not as_json, **settings) for name in names]
    records: list[Any] = [(folder, read_json(folder / f"{folder.name}.json")) for folder in made]
    found = [{"path": str(folder), "summary": said["summary"], "seconds": said["seconds"]} for folder, said in records]
    _show({"reports": found}, as_json, lambda: _made(found), not any(one["summary"]["error"] for one in found))


def _made(found: list[dict[str, Any]]) -> None:
    """How many rows of each report got which verdict, and the pages to open."""
    paths = [Path(one["path"]).resolve() for one in found]
    rows = [[verdict, *(str(one["summary"][verdict]) for one in found)] for verdict in found[0]["summary"]]
    rows = [row for row in rows if {*row[1:]} != {"0"}]
    rows.append(["minutes", *(f"{one['seconds'] / 60:.1f}" for one in found)])
    _table("".join(f"|>{path.name.replace('_', ' ')}" for path in paths), rows)
    out.print("\n".join(f"open {(path / f'{path.name}.html').as_uri()}" for path in paths), markup=False)


def _check_reports(names: list[str | Path], out_dir: Path | None, as_json: bool) -> None:
    from .audit import report as audits
    from .audit.claims import read_claims

    folder = out_dir or audits.reports_folder()
    problems: dict[str, str] = {}
    for name in names:
        claims = read_claims(name)
        try:
            audits.check(folder / claims.report, claims)
        except BadInput as error:
            problems[claims.report] = str(error)
    said = problems.values() or ["every report is what its record gives"]
    _show({"ok": not problems, "problems": problems}, as_json, lambda: _say(*said), not problems)


def _claims(rows: list[dict[str, Any]]) -> None:
    from .audit.drawing import measured_text, verdict_text

    cells = [[row["id"], verdict_text(row), measured_text(row).replace("**", "")] for row in rows]
    _table("claim|verdict|measured", cells)


def _show(data: dict[str, Any], as_json: bool, tables: Any, passed: bool = True) -> None:
    """Print what a command found, and exit with 1 if it did not pass."""
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2) + "\n")  # in ASCII: nothing that would steer a terminal
    else:
        tables()
    if not passed:
        raise typer.Exit(1)


def _say(*lines: str) -> None:
    """Print lines; what stands in them may come from files of others, and steers no terminal."""
    for line in lines:
        out.print(printable(line), markup=False)


def _table(columns: str | list[str], rows: Iterable[Iterable[str]], *caption: str) -> None:
    """Print a table.  columns: heads, separated by |; after > a column's cells stand on its right."""
    console, heads = Console(), columns.split("|") if isinstance(columns, str) else columns
    rows = [*rows]
    about = "\n".join(map(_cell, caption))
    if LEAST * len(heads) > console.width:  # columns would break words: a table for each row
        for first, *rest in rows:
            _table([heads[0], first], zip([head.lstrip(">") for head in heads[1:]], rest, strict=True))
        return console.print(about) if about else None
    for between in (" ", "\n"):  # of a number's head, the words below each other if all do not fit side by side
        table = Table(caption=about or None, caption_justify="left")
        for head in heads:
            right = head.startswith(">")
            text = _cell(head[1:]).replace(" ", between) if right else _cell(head)
            table.add_column(text, justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(_cell, row))
        if console.measure(table, options=console.options.update(max_width=1000)).maximum <= console.width:
            break
    console.print(table)


def _cell(text: str) -> str:
    return escape(printable(text))


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _with_error(value: float, stderr: float | None) -> str:
    return f"{value:.3f}{'' if stderr is None else f' ± {stderr:.3f}'}"


def _stage_name(row: dict[str, Any]) -> str:
    return row["stage"]["stage"] if row["stage"] else f"kept ({row['dtype']})"


def _show_ratios(
    artifact: Any, about: dict[str, Any], as_json: bool, caption: list[str], tensors: list[list[str]] | None = None
) -> None:
    """An artifact's path and ratios, with what there is to say about it.  tensors: rows of a table of them."""
    rows = [[r.what, f"{r.bytes:,}", r.denominator, f"{r.denominator_bytes:,}", f"{r.ratio:.3f}x"] for r in artifact.ratios]

    def tables() -> None:
        if tensors is not None:
            _table("tensor|shape|stage|>bits per weight|>relative error|>bytes", tensors)
        _table("what|>bytes on disk|against|>bytes|>ratio", rows, *caption)

    _show({"path": str(artifact.path), **about, "ratios": [r.to_json() for r in artifact.ratios]}, as_json, tables)


def _complain(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"agentforge: {printable(' '.join(message.split()))}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
