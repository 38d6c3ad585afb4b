"""Run Python that a model wrote, and check whether it passes its tests, without trusting it.

Three processes besides the caller.  This file, run as a script, confines itself and starts the judge; the judge starts
the candidate.  The tests run in the judge and reach the candidate's function through a pipe, as text of Python
literals; the candidate's process never holds the tests or the pipe for the verdict.  So an early exit, a patched
module or a value that equals everything passes nothing: only right answers do.

What the kernel enforces (Linux: namespaces and resource limits):
    network     none, not even the loopback
    files       Python and the system's libraries, read-only; an empty folder of 16 MB; nothing else is visible
    processes   the candidate can start none, and sees none but its own two; whatever is left dies with the judge
    identity    no environment variables, no capabilities, no new privileges; nobody if the caller is root
    resources   wall and CPU time, address space, size of a file; what is printed goes nowhere
If the kernel refuses one of these, nothing runs.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import io
import json
import math
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

SECONDS, MEMORY = 10.0, 512 << 20
REPLY = 1 << 20  # bytes that an answer may have
FILE = 1 << 20  # bytes that a file may have
GRACE = 5.0  # seconds for what is not the candidate's: starting Python, reading the verdict
NOBODY = 65534
# Where the new root is put together: it is there on every Linux, and nothing below it is needed any more.
ROOT = "/proc"
SYSTEM = ("/usr", "/lib", "/lib64", "/nix", sys.base_prefix, sys.base_exec_prefix)
# From linux/sched.h, linux/mount.h, linux/prctl.h and linux/capability.h.
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_READ_ONLY_NO_SUID_NO_DEVICES = 442, -100, 0x8000, 7
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, CAPABILITY_VERSION_3 = 1, 4, 38, 0x20080522


class Verdict(NamedTuple):
    """What came of a candidate.

    passed: all its tests did.  status: passed, failed, timeout or refused (nothing ran).  detail: why, in a line.
    """

    passed: bool
    status: str
    detail: str


def check(
    solution: str, entry_point: str, tests: str, prelude: str = "", *, seconds: float = SECONDS, memory: int = MEMORY
) -> Verdict:
    """Run `solution`, Python source that defines the function `entry_point`, against `tests`, source that defines
    check(candidate) and raises if a test fails.

    prelude: source that the tests may use.  seconds: of wall and of CPU time.  memory: address space in bytes, of
    judge and candidate each.  Arguments and results must be Python literals (numbers, strings, lists, tuples, dicts,
    sets, None).
    """
    job = {"seconds": seconds, "memory": memory, "entry_point": entry_point, "solution": solution}
    message = f"{json.dumps(job)}\n{json.dumps([prelude, tests])}\n".encode()
    with subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__).absolute())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
        start_new_session=True,
    ) as process:
        try:
            answer = process.communicate(message, timeout=seconds + GRACE)[0]
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # judge and candidate go with it
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return Verdict(False, "timeout", f"still running after {seconds:g} s")
    try:
        status, detail = json.loads(answer)
    except ValueError:
        return Verdict(False, "failed", "ended without a verdict")
    return Verdict(status == "passed", status, detail)


def _inside() -> None:
    """The script: read the candidate, confine this process, and leave the rest to the judge."""
    job = _receive()
    unenforced = []
    try:
        _isolate()
    except (OSError, AttributeError) as error:  # no such system call, or no such function in this libc
        unenforced.append(f"no network, no files, no other processes ({error})")
    cpu = math.ceil(job["seconds"]) + 1
    limits = {"AS": job["memory"], "CPU": cpu, "FSIZE": FILE, "CORE": 0, "NOFILE": 64}
    unenforced += [f"RLIMIT_{name}" for name, value in limits.items() if not _limit(name, value)]
    if unenforced:
        _write(1, json.dumps(["refused", f"this system does not enforce: {'; '.join(unenforced)}"]))
    elif judge := os.fork():
        os.waitpid(judge, 0)
    else:
        with contextlib.suppress(OSError, AttributeError):
            _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        _judge(job)


def _isolate() -> None:
    """Leave the network, the processes and all files but Python's behind.  Raises OSError if the kernel refuses."""
    root, uid, gid = os.geteuid() == 0, os.geteuid(), os.getegid()
    _call("unshare", NEWNS | NEWIPC | NEWPID | NEWNET | (0 if root else NEWUSER))
    if not root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            Path("/proc/self", name).write_text(text)
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", ROOT, "tmpfs", 0, "size=1m,mode=755")
    bound: list[str] = []
    for folder in SYSTEM:
        if folder in ("/lib", "/lib64") and os.path.islink(folder):
            os.symlink(os.readlink(folder), ROOT + folder)
        elif os.path.isdir(folder) and not any(f"{folder}/".startswith(f"{other}/") for other in bound):
            os.makedirs(ROOT + folder)
            _mount(folder, ROOT + folder, None, MS_BIND | MS_REC)
            bound.append(folder)
    os.mkdir(f"{ROOT}/tmp")
    attributes = struct.pack("=QQQQ", ATTR_READ_ONLY_NO_SUID_NO_DEVICES, 0, 0, 0)
    _call("syscall", MOUNT_SETATTR, AT_FDCWD, ROOT.encode(), AT_RECURSIVE, attributes, len(attributes))
    _mount("tmpfs", f"{ROOT}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=16m,nr_inodes=1k,mode=1777")
    os.chroot(ROOT)
    os.chdir("/tmp")
    if root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _call("capset", struct.pack("=Ii", CAPABILITY_VERSION_3, 0), bytes(24))
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # so that nobody attaches to the judge or reads its memory


def _judge(job: dict[str, Any]) -> NoReturn:
    """Start the candidate, run the tests against it and say what came of it."""
    requests, replies = os.pipe(), os.pipe()
    candidate = os.fork()
    if not candidate:
        _candidate(job, requests[0], replies[1])
    os.close(requests[0])
    os.close(replies[1])
    deadline, unread = time.monotonic() + job["seconds"], bytearray()

    def answer() -> Any:
        while (end := unread.find(b"\n")) < 0:
            if len(unread) > REPLY:
                raise ValueError(f"an answer of more than {REPLY} bytes")
            if not select.select([replies[0]], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"still running after {job['seconds']:g} s")
            if not (chunk := os.read(replies[0], 1 << 16)):
                raise EOFError("the candidate's process ended")
            unread.extend(chunk)
        line = bytes(unread[:end])
        del unread[: end + 1]
        right, value = ast.literal_eval(line.decode())
        if right is not True:
            raise RuntimeError(str(value))
        return value

    def call(*args: Any, **kwargs: Any) -> Any:
        _write(requests[1], repr((args, kwargs)))
        return answer()

    status, detail = "failed", ""
    try:
        answer()  # the candidate's source has run
        prelude, tests = _receive()
        names: dict[str, Any] = {"__name__": "tests"}
        exec(compile(prelude, "prelude", "exec"), names)
        names[job["entry_point"]] = call
        exec(compile(tests, "tests", "exec"), names)
        names["check"](call)
        status = "passed"
    except TimeoutError as error:
        status, detail = "timeout", str(error)
    except BaseException as error:  # tests and candidate may raise anything, SystemExit too
        detail = f"{type(error).__name__}: {error}"[:300]
    os.kill(candidate, signal.SIGKILL)
    os.waitpid(candidate, 0)
    _write(1, json.dumps([status, detail]))
    os._exit(0)


def _candidate(job: dict[str, Any], requests: int, replies: int) -> NoReturn:
    """Run the candidate's source, then answer calls of its function, until killed."""
    os.setsid()
    for standard in (0, 1):
        os.dup2(2, standard)  # the null device
    for other in {*range(3, 64)} - {requests, replies}:
        with contextlib.suppress(OSError):
            os.close(other)
    with contextlib.suppress(OSError, AttributeError):
        _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    _limit("NPROC", 0)
    names: dict[str, Any] = {"__name__": "candidate"}

    def reply(what: Callable[[], Any]) -> None:
        try:
            text = repr((True, what()))
        except BaseException as error:  # whatever it raises is its answer
            text = repr((False, f"{type(error).__name__}: {error}"[:200]))
        _write(replies, text)

    reply(lambda: exec(compile(job["solution"], "candidate", "exec"), names))
    for line in os.fdopen(requests):
        args, kwargs = ast.literal_eval(line)
        reply(partial(names.get(job["entry_point"], _missing), *args, **kwargs))
    os._exit(0)


def _missing(*_: Any, **__: Any) -> NoReturn:
    raise NameError("the function that was asked for is not defined")


def _receive() -> Any:
    """The next line of standard input, as JSON, and not a byte more: the candidate must not hold what comes after."""
    return json.loads(io.FileIO(0, closefd=False).readline())  # without a buffer


def _write(end: int, line: str) -> None:
    data = line.encode(errors="replace") + b"\n"
    while data:
        data = data[os.write(end, data) :]


def _limit(name: str, value: int) -> bool:
    try:
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    except (AttributeError, OSError, ValueError):
        return False
    return True


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])


def _call(function: str, *args: Any) -> None:
    """A function of the C library.  Raises OSError if it fails, AttributeError if there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*(ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{function}: {os.strerror(code)}")


if __name__ == "__main__":
    _inside()
