"""Runs of chains in a workspace: started, paused, resumed and aborted; everything known about them is read from disk.

    WORKSPACE/NAME/run.json      model, chain, when and as which process it was started, what was asked of it since
                   chain.yaml    the chain as it was then
                   log.txt       what its processes said on stderr
                   result.json   what the last of them printed when it came to its end
                   out/          the chain's own: journal.json, step-N, artifact
                   alive         locked by the process for as long as it lives
                   changing      locked by whoever starts, pauses or aborts the run

A process is not found by its number, which the system gives to others in time: it inherits the lock on `alive` when it is
started, and the kernel lifts that when it ends, however it ends.  So a run can be started once only, by whatever number of
dashboards, and is found again by the next one.

To pause is to interrupt (SIGINT): what is being encoded is finished, the process ends, and uses neither memory nor a core;
the same command continues from what is finished.  (SIGSTOP would keep the memory, and end with the next restart.)

A workspace may come from anywhere: names lead nowhere else, symbolic links are refused, and what files say is checked.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from ..artifact import Artifact
from ..chain import Chain, Decision, read_chain
from ..errors import BadInput
from ..evaluation import Measurement
from ..evaluation.texts import CHECKOUT, SPLITS
from ..folders import locked, remove
from ..names import MODELS
from ..tensorfiles import plain_file, problem_of, read_json, write_atomic, write_json

Status = Literal["running", "pausing", "paused", "aborting", "aborted", "finished", "stopped", "failed"]
ACTIVE = ("running", "pausing", "aborting")
GRACE = 5.0  # seconds that an aborted run has to end by itself
PATIENCE = 2.0  # seconds in which somebody else's look at a lock is over
LARGEST = 32 << 20  # bytes of a journal, a log's end or a chain that are read at most
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class _Data(BaseModel):
    """What a file says; what it says beside that does not matter here."""

    model_config = ConfigDict(extra="ignore", frozen=True)


_Kind = TypeVar("_Kind", bound=_Data)


class Record(_Data):
    """run.json.  began: when each of its processes was started, in seconds since 1970.  pid: of the last one."""

    model: str
    chain: str
    began: tuple[Annotated[float, Field(ge=0, le=1e11)], ...] = ()
    pid: int | None = Field(default=None, gt=1)
    asked: Literal["pause", "abort"] | None = None


class Attempt(_Data):
    """A try of a step, as a journal has it."""

    step: int = Field(ge=1)
    name: str
    attempt: int = Field(ge=1)
    setting: dict[str, Any]
    gates: dict[str, Decision] = {}
    measured: dict[str, Measurement] = {}

    @property
    def stage(self) -> str:
        """The setting that is tried."""
        return str(self.setting.get("stage", ""))


class Done(Attempt):
    """A try that was decided."""

    decision: Literal["accepted", "rejected"]
    reason: str = ""
    seconds: float = 0.0


class Now(Attempt):
    """A try that is under way; gates and measured: what is known so far, if more text is asked for.  tokens: of that."""

    doing: Literal["encoding", "measuring"]
    since: float
    tokens: int | None = None


class Original(_Data):
    """What is compressed.  tensors: parameters of each, in the order in which they are encoded; none is known before the
    process has opened the model."""

    name: str
    tensors: dict[str, int]


class Journal(_Data):
    """The chain's journal, or what stands for it as long as there is none."""

    original: Original
    attempts: tuple[Done, ...] = ()
    now: Now | None = None


class Run(NamedTuple):
    """A run as it stands on the disk.  reason: why it failed, if it did."""

    name: str
    folder: Path
    record: Record
    chain: Chain
    journal: Journal
    status: Status
    reason: str = ""

    @property
    def out(self) -> Path:
        """The folder of the chain."""
        return self.folder / "out"

    @property
    def accepted(self) -> list[Done]:
        """The tries that were accepted, in order."""
        return [row for row in self.journal.attempts if row.decision == "accepted"]

    @property
    def command(self) -> list[str]:
        """What does the same in a terminal."""
        return ["agentforge", *_arguments(self.folder, self.record)]


class Progress(NamedTuple):
    """How far the encoding of a try is.  last: the tensor finished last.  rate: tensors per second.  left: seconds."""

    done: int
    total: int
    last: str | None
    rate: float | None
    left: float | None


class Size(NamedTuple):
    """Bytes that the model has once `tensors` tensors were encoded, all tries counted; what: what made the last step."""

    tensors: int
    bytes: int
    what: str


# ---- the workspace


def open_workspace(path: str | Path) -> Path:
    """The folder in which all runs live, made if it is not there yet.  Raises BadInput if it cannot be one."""
    path = Path(path).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        return path.resolve(strict=True)
    except OSError as error:
        raise BadInput(f"{path}: cannot be a workspace ({error.strerror}); choose another --workspace") from None


def names(workspace: Path) -> list[str]:
    """The runs, the last one started first."""
    files = [folder / "run.json" for folder in _entries(workspace) if _NAME.fullmatch(folder.name)]
    files = [file for file in files if file.is_file()]
    return [file.parent.name for file in sorted(files, key=lambda file: (-_modified(file), file.parent.name))]


def active(workspace: Path) -> list[str]:
    """The runs whose processes live."""
    return [name for name in names(workspace) if _alive(workspace / name)]


def models(workspace: Path) -> list[str]:
    """What may be compressed: the models that have names, and the model folders in the workspace."""
    folders = (folder.name for folder in _entries(workspace) if (folder / "config.json").is_file())
    return [*MODELS, *(name for name in folders if name not in MODELS)]


def chains(workspace: Path) -> dict[str, Path]:
    """The chains by what they are called here: those that come with agentforge, and the YAML files in the workspace."""
    own = {f"{file.name} (workspace)": file for file in _entries(workspace) if file.suffix in (".yaml", ".yml")}
    return {file.name: file for file in sorted((CHECKOUT / "chains").glob("*.yaml"))} | own


def chain_named(workspace: Path, name: str) -> Chain:
    """A chain by what it is called here, the text that it measures on being in the workspace or one with a name.

    Raises BadInput for any other, and for a file that is not a chain.
    """
    if name not in (known := chains(workspace)):
        raise BadInput(f"chain {name!r} is none of agentforge's and no .yaml file in the workspace; choose one of the list")
    file = known[name]
    if file.is_symlink() or not file.is_file() or file.stat().st_size > LARGEST:
        raise BadInput(f"chain {name!r} is not an ordinary file of at most {LARGEST:,} bytes; put a copy into the workspace")
    return _with_text(workspace, read_chain(file))


def _with_text(workspace: Path, chain: Chain) -> Chain:
    """The chain with the whole path of its text.  Raises BadInput if that is a file outside of the workspace."""
    if chain.text is None or chain.text in SPLITS:
        return chain
    text = (workspace / chain.text).resolve()
    if not text.is_relative_to(workspace):
        raise BadInput(f"chain {chain.name!r}: its text {chain.text!r} is not in the workspace; put a copy there")
    return chain.model_copy(update={"text": str(text)})


def _model_named(workspace: Path, name: str) -> str:
    """What `open_model` gets for a model by what it is called here."""
    if name not in models(workspace):
        raise BadInput(f"model {name!r} is neither a known name nor a folder in the workspace; choose one of the list")
    if name in MODELS:
        return name
    folder = plain_file(workspace, name)
    _refuse_links(folder)
    return str(folder)


def _folder(workspace: Path, name: str) -> Path:
    """The folder that a run of this name has.  Raises BadInput if the name could lead anywhere else."""
    if not _NAME.fullmatch(name):
        raise BadInput(f"run name {name[:80]!r}: expected at most 64 letters, digits, '.', '_' and '-', no sign first")
    folder = workspace / name
    if folder.is_symlink():
        raise BadInput(f"run {name!r} is a symbolic link, which may lead out of the workspace; remove it")
    return folder


def _existing(workspace: Path, name: str) -> Path:
    folder = _folder(workspace, name)
    if not (folder / "run.json").is_file():
        raise BadInput(f"run {name!r} does not exist; start it, or choose another one")
    _refuse_links(folder)
    return folder


def _refuse_links(folder: Path) -> None:
    """Raise BadInput if a symbolic link in the folder, at any depth, could lead out of the workspace."""
    if folder.is_symlink():
        raise BadInput(f"{folder.name} is a symbolic link, which may lead out of the workspace; put a copy there")
    for root, folders, files in os.walk(folder):
        if links := [name for name in (*folders, *files) if os.path.islink(os.path.join(root, name))]:
            raise BadInput(
                f"{folder.name} holds the symbolic link {links[0]}, which may lead out of the workspace; remove it"
            )


# ---- what is done to a run


def start(workspace: Path, name: str, model: str, chain: str) -> None:
    """Start a run.  model, chain: as `models` and `chains` call them.

    Raises BadInput if there is a run of that name, or the name, the model or the chain cannot be used.
    """
    folder = _folder(workspace, name)
    record = Record(model=_model_named(workspace, model), chain=chain)
    spec = chain_named(workspace, chain).model_dump(mode="json", by_alias=True)
    taken = f"{name!r} is there already; choose another name, or resume that run"
    if folder.exists():
        raise BadInput(taken)
    made = Path(tempfile.mkdtemp(dir=workspace, prefix="."))
    try:
        write_atomic(made / "chain.yaml", [yaml.safe_dump(spec, sort_keys=False, allow_unicode=True).encode()])
        write_json(made / "run.json", record.model_dump())
        made.rename(folder)  # one of several dashboards that start this name has a folder to move it to
    except OSError:
        shutil.rmtree(made)
        raise BadInput(taken) from None
    _launch(folder, name)


def resume(workspace: Path, name: str) -> None:
    """Start a run again, which continues from what is finished.  Raises BadInput if it is running, or came to its end."""
    folder = _existing(workspace, name)
    run = read(workspace, name)
    if run.status not in ("paused", "failed"):
        raise BadInput(f"run {name!r} is {run.status}; only one that is paused or has failed goes on")
    _with_text(workspace, run.chain)
    _launch(folder, name)


def pause(workspace: Path, name: str) -> None:
    """Interrupt a run: it ends when what it is at is finished.  Raises BadInput if it is not running."""
    folder = _existing(workspace, name)
    with _changing(folder):
        if not _alive(folder):
            raise BadInput(f"run {name!r} is not running, so that there is nothing to pause")
        _ask(folder, "pause")
        _signal(folder, signal.SIGINT)


def abort(workspace: Path, name: str, grace: float = GRACE) -> None:
    """End a run for good: interrupted, killed after `grace` seconds, and what is half-written removed.  What was accepted
    stays.  Raises BadInput if it came to its end before."""
    folder = _existing(workspace, name)
    with _changing(folder):
        status = read(workspace, name).status
        if status in ("finished", "stopped", "aborted"):
            raise BadInput(f"run {name!r} is {status}, so that there is nothing to abort")
        _ask(folder, "abort")
        for number, patience in ((signal.SIGINT, grace), (signal.SIGKILL, PATIENCE)):
            if _alive(folder):
                _signal(folder, number)
                end = time.monotonic() + patience
                while _alive(folder) and time.monotonic() < end:
                    time.sleep(0.02)
        if _alive(folder):
            raise BadInput(f"run {name!r}: its process does not end; see what it is waiting for, then abort it again")
        for partial in (folder / "out").glob("*.partial"):
            remove(partial)


def _ask(folder: Path, what: Literal["pause", "abort"]) -> None:
    write_json(folder / "run.json", _record(folder).model_copy(update={"asked": what}).model_dump())
    _say(folder, f"asked to {what}")


def _signal(folder: Path, number: signal.Signals) -> None:
    """To the process that holds the lock, and whatever it has started: it is the first of its group."""
    if (pid := _record(folder).pid) is not None:
        with contextlib.suppress(ProcessLookupError):  # it has ended just now
            os.killpg(pid, number)


def _launch(folder: Path, name: str) -> None:
    """Start the process of a run, which inherits the lock that says so."""
    with _changing(folder):
        alive = os.open(folder / "alive", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            _lock(alive, name)
            record = _record(folder)
            record = record.model_copy(update={"began": (*record.began, time.time()), "pid": None, "asked": None})
            write_json(folder / "run.json", record.model_dump())  # no number stands there that is another's
            worker = [sys.executable, "-P", "-m", f"{__package__}.worker"]  # -P: no module comes from where it is started
            with open(folder / "log.txt", "ab") as log, open(folder / "result.json", "wb") as result:
                process = subprocess.Popen(
                    [*worker, *_arguments(folder, record)],
                    stdin=subprocess.DEVNULL,
                    stdout=result,
                    stderr=log,
                    pass_fds=(alive,),
                    start_new_session=True,  # Ctrl-C ends the dashboard alone
                )
            write_json(folder / "run.json", record.model_copy(update={"pid": process.pid}).model_dump())
            _say(folder, f"process {process.pid} begins" if len(record.began) == 1 else f"process {process.pid} goes on")
        finally:
            os.close(alive)
    threading.Thread(target=process.wait, daemon=True).start()  # the system keeps the number of a child until it is asked


def _arguments(folder: Path, record: Record) -> list[str]:
    """Of `agentforge`, for a run."""
    return ["pipeline", record.model, str(folder / "chain.yaml"), "--out", str(folder / "out"), "--json"]


def _lock(descriptor: int, name: str) -> None:
    """Take the lock of a run that is not running.  Somebody who looks whether it is holds it for a moment, too."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise BadInput(f"run {name!r} is running already; another dashboard has started it") from None
            time.sleep(0.01)


def _alive(folder: Path) -> bool:
    """Whether a process of the run lives."""
    try:
        descriptor = os.open(folder / "alive", os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # not there, or a link, which no process of ours has locked
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _changing(folder: Path) -> contextlib.AbstractContextManager[None]:
    """One at a time starts, pauses or aborts a run; the others wait."""
    return locked(folder / "changing", folder, wait=True)


def _say(folder: Path, what: str) -> None:
    """A line of the dashboard's own in the log."""
    with open(folder / "log.txt", "ab") as log:
        log.write(f"{time.strftime('%H:%M:%S')} dashboard: {what}\n".encode())


# ---- what a run is at


def read(workspace: Path, name: str) -> Run:
    """A run as it stands on the disk.  Raises BadInput if its files are not those of a run."""
    folder = _existing(workspace, name)
    record, chain = _record(folder), read_chain(folder / "chain.yaml")
    file, reason = folder / "out" / "journal.json", ""
    journal = _checked(Journal, file) if file.is_file() else Journal(original=Original(name="", tensors={}))
    if _alive(folder):
        status: Status = "running" if record.asked is None else "pausing" if record.asked == "pause" else "aborting"
    elif (finished := _finished(folder / "result.json")) is not None:
        status = "finished" if finished else "stopped"
    elif record.asked is not None:
        status = "paused" if record.asked == "pause" else "aborted"
    else:
        said = [line for line in log_tail(folder, 60).splitlines() if line.startswith("agentforge: ")]
        killed = "its process was killed, or the machine was"
        status, reason = "failed", said[-1].removeprefix("agentforge: ") if said else killed
    return Run(name, folder, record, chain, journal, status, reason)


def _record(folder: Path) -> Record:
    return _checked(Record, folder / "run.json")


def _checked(kind: type[_Kind], file: Path) -> _Kind:
    try:
        return kind.model_validate(read_json(file, LARGEST))
    except pydantic.ValidationError as error:
        raise BadInput(f"{file}: {problem_of(error)}; this is not a run's") from None


def _finished(result: Path) -> bool | None:
    """Whether every step was accepted, as the process printed when it came to its end; None if it did not."""
    try:
        found = read_json(result, LARGEST).get("finished")
    except BadInput:  # not there, empty, or cut off when the process was killed
        return None
    return found if isinstance(found, bool) else None


def shown(measured: Measurement) -> str:
    """A measurement as it stands on the page, with its standard error if it has one."""
    value = f"{measured.value:,.0f}" if measured.unit == "bytes" else f"{measured.value:.4g}"
    return value if measured.stderr is None else f"{value} ± {measured.stderr:.2g}"


def log_tail(folder: Path, lines: int) -> str:
    """The last lines of a run's log, without what a terminal would take for commands."""
    try:
        with open(folder / "log.txt", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (64 << 10)))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    clean = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return "\n".join("".join(c for c in line if c.isprintable()) for line in clean.splitlines()[-lines:])


def progress(run: Run) -> Progress | None:
    """How far the try under way is: the tensors that are finished on disk.  None if nothing is under way."""
    if (now := run.journal.now) is None:
        return None
    tensors, pieces = list(run.journal.original.tensors), _pieces(run)
    if not pieces:
        written = now.doing == "measuring" or (run.out / f"step-{now.step}").exists()
        return Progress(len(tensors) if written else 0, len(tensors), None, None, None)
    times = {index: _modified(piece) for index, piece in pieces.items()}
    last = max(times, key=lambda index: times[index])
    mine = sorted(at for at in times.values() if at >= now.since)  # those before it are an earlier process's
    rate = (len(mine) - 1) / (mine[-1] - mine[0]) if len(mine) > 1 and mine[-1] > mine[0] else None
    left = None if rate is None or run.status != "running" else (len(tensors) - len(pieces)) / rate
    return Progress(len(pieces), len(tensors), tensors[last] if last < len(tensors) else None, rate, left)


def sizes(run: Run) -> list[Size]:
    """The bytes of the model, falling: from `bits` a parameter; try by try as measured on disk, back to the last accepted
    one if a try was rejected; tensor by tensor in the try that is under way."""
    counts = list(run.journal.original.tensors.values())
    if not counts:
        return []
    size = sum(counts) * run.chain.bits // 8
    found, done = [Size(0, size, f"original, {run.chain.bits} bits per parameter")], 0
    accepted: int | None = None
    for row in run.journal.attempts:
        measured = row.measured.get("bytes")
        if measured is None or not math.isfinite(measured.value):  # it could not be encoded
            continue
        done += len(counts)
        found.append(Size(done, int(measured.value), f"{row.name}, try {row.attempt}"))
        if row.decision == "accepted":
            size, accepted = int(measured.value), row.step
        else:
            found.append(Size(done, size, f"{row.name}, try {row.attempt}: rolled back"))
    if (now := run.journal.now) is not None and now.doing == "encoding":
        before = [count * run.chain.bits // 8 for count in counts]
        if accepted is not None:
            before = [row["bytes"] for row in Artifact(run.out / f"step-{accepted}").rows]
        for index, piece in sorted(_pieces(run).items()):
            if index < len(before):
                done, size = done + 1, size - before[index] + _data_bytes(piece)
                found.append(Size(done, size, f"{now.name}, try {now.attempt}: under way"))
    return found


def _pieces(run: Run) -> dict[int, Path]:
    """The finished tensors of the try that is under way, by their number."""
    if run.journal.now is None:
        return {}
    folder = run.out / f"step-{run.journal.now.step}.partial" / "tensors"
    return {int(piece.stem): piece for piece in _entries(folder) if piece.suffix == ".safetensors" and piece.stem.isdigit()}


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, by name; nothing if it has gone, as a run may move it at any time."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _data_bytes(piece: Path) -> int:
    """Bytes of the tensors in a safetensors file: all but eight, which say how long the header is, and the header."""
    try:
        with open(piece, "rb") as file:
            return max(0, piece.stat().st_size - 8 - int.from_bytes(file.read(8), "little"))
    except FileNotFoundError:  # the try has just come to its end
        return 0


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0
