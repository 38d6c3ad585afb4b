"""What generated code must not be able to do, tried."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

from agentforge.evaluation import sandbox
from agentforge.evaluation.sandbox import Verdict, check

TESTS = "def check(candidate):\n    assert candidate(2) == 3\n    assert candidate(-1) == 0\n"
TRIAL = check("def f(x):\n    return x + 1\n", "f", TESTS)
confined = pytest.mark.skipif(TRIAL.status == "refused", reason=f"nothing can be confined here: {TRIAL.detail}")


def ran(body: str, **settings: float) -> Verdict:
    """The verdict on f(x), which asserts what `body` gives: told back in the detail of the failing test."""
    tests = "def check(candidate):\n    assert False, repr(candidate(0))\n"
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    return check(f"import os, sys, socket\ndef f(x):\n{indented}\n", "f", tests, **settings)  # type: ignore[arg-type]


def told(body: str) -> str:
    verdict = ran(body)
    assert verdict.status == "failed" and verdict.detail.startswith("AssertionError: "), verdict
    return verdict.detail.removeprefix("AssertionError: ")


@confined
def test_right_answers_pass_and_wrong_ones_do_not() -> None:
    assert Verdict(True, "passed", "") == TRIAL
    wrong = check("def f(x):\n    return x + 2\n", "f", TESTS)
    assert (wrong.passed, wrong.status, wrong.detail) == (False, "failed", "AssertionError: ")
    late = check("def f(x):\n    return 3\n", "f", TESTS)  # the first test alone is passed
    assert not late.passed


@confined
def test_arguments_and_results_of_every_kind_come_through() -> None:
    tests = (
        "def check(candidate):\n"
        "    for value in (1, -2.5, 'a\\nb', b'\\n', None, True, (1,), [1, [2]], {'k': (1, 2)}, {1, 2}, set(), 1e300, 2j):\n"
        "        back = candidate(value, also=value)\n"
        "        assert back == [value, value] and type(back[0]) is type(value)\n"
    )
    verdict = check("def f(x, also):\n    return [x, also]\n", "f", tests)
    assert verdict.passed, verdict


@confined
@pytest.mark.parametrize(
    "source",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def f(x):\n    raise SystemExit(0)",
        "def f(x):\n    import os; os._exit(0)",
        "import os; os.kill(os.getppid(), 9)\ndef f(x): return 0",
        "import os; os.killpg(0, 9)\ndef f(x): return 0",
        # Something that equals everything does not come through the pipe as a literal.
        "class Any:\n    def __eq__(self, other): return True\ndef f(x): return Any()",
        "class Any(int):\n    def __eq__(self, other): return True\n    def __repr__(self): return '3'\n"
        "def f(x): return Any()",
        # Nor are the tests to be found in its process: patched built-ins judge nothing.
        "import builtins; builtins.AssertionError = type('Never', (BaseException,), {})\n"
        "def check(c): pass\ndef f(x): return 0",
        # A verdict of its own, on every descriptor there is.
        'import os\nfor end in range(64):\n    try: os.write(end, b\'["passed", "", "", []]\\n\')\n'
        "    except OSError: pass\n"
        "def f(x): return 0",
        "def f(x):\n    class E(Exception):\n        def __str__(self): raise SystemExit\n    raise E",
        "g = 1",
        "this is no Python",
        "",
    ],
)
def test_nothing_but_right_answers_passes(source: str) -> None:
    verdict = check(source, "f", TESTS)
    assert (verdict.passed, verdict.status) == (False, "failed"), verdict


@confined
def test_the_tests_are_nowhere_in_the_candidates_process() -> None:
    """Everything that its interpreter holds is searched for a word that only the tests have."""
    search = (
        "import gc, sys\n"
        "def f(x):\n"
        "    found, frame = 0, sys._getframe()\n"
        "    while frame:\n"
        "        found += ''.join(['only', 'here']) in repr(frame.f_locals) + repr(frame.f_globals)\n"
        "        frame = frame.f_back\n"
        "    for thing in gc.get_objects():\n"
        "        if isinstance(thing, (dict, list, tuple)): found += ''.join(['only', 'here']) in repr(thing)\n"
        "    return found\n"
    )
    verdict = check(search, "f", "def check(candidate):\n    assert candidate(0) == 0, 'onlyhere'\n")
    assert verdict.passed, verdict
    found = check(f"word = ['onlyhere']\n{search}", "f", "def check(candidate):\n    assert candidate(0) > 0\n")
    assert found.passed, found  # the search does find


@confined
@pytest.mark.parametrize("source", ["while True: pass", "def f(x):\n    while True: pass", "import time; time.sleep(60)"])
def test_an_endless_loop_is_ended(source: str) -> None:
    start = time.monotonic()
    verdict = check(source, "f", TESTS, seconds=0.5)
    assert (verdict.passed, verdict.status) == (False, "timeout")
    assert time.monotonic() - start < 0.5 + sandbox.GRACE + 2


@confined
def test_tests_that_never_end_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "GRACE", 1.0)
    verdict = check("def f(x): return x", "f", "def check(candidate):\n    while True: pass\n", seconds=0.5)
    assert (verdict.passed, verdict.status) == (False, "timeout")


@confined
def test_no_process_can_be_started() -> None:
    bomb = (
        "count = 0\ntry:\n    for _ in range(50):\n        if not os.fork(): os._exit(0)\n        count += 1\n"
        "except OSError: pass\nreturn count"
    )
    assert told(bomb) == "0"
    thread = "import threading\ntry: threading.Thread(target=print).start()\nexcept RuntimeError: return 'none'"
    assert told(thread) == "'none'"


@confined
def test_memory_is_bounded() -> None:
    hog = "try: return len(bytearray(400 << 20))\nexcept MemoryError: return 'none'"
    assert told(hog) == str(400 << 20)  # there is that much by default
    assert "none" in ran(hog, memory=256 << 20).detail


@confined
def test_no_file_is_written_outside_of_an_empty_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    victim = tmp_path / "victim"
    victim.write_text("before")
    victim.chmod(0o666)
    for folder in tmp_path.parents:  # so that nothing but the sandbox is in the way
        if folder.stat().st_uid == os.geteuid() and folder.name.startswith("pytest"):
            folder.chmod(0o755)
    attack = (
        "done = []\n"
        f"for path in ({str(victim)!r}, {str(tmp_path / 'new')!r}, '/new', '/usr/new', '/etc/new', '/dev/shm/new'):\n"
        "    try:\n        open(path, 'w').write('after'); done.append(path)\n    except OSError: pass\n"
        "return done"
    )
    assert told(attack) == "[]"
    assert victim.read_text() == "before" and [file.name for file in tmp_path.iterdir()] == ["victim"]
    assert told("open('a', 'w').write('x' * 1000); return os.getcwd(), os.listdir(), os.listdir('/tmp')") == (
        "('/tmp', ['a'], ['a'])"
    )
    assert told("try:\n    open('a', 'w').write('x' * (2 << 20))\nexcept OSError: return os.path.getsize('a')") == str(
        1 << 20
    )


@confined
def test_no_file_but_pythons_is_seen() -> None:
    assert told(f"return os.path.exists({__file__!r}), os.path.exists('/etc/passwd'), os.listdir('/tmp')") == (
        "(False, False, [])"
    )
    mounts = "[bool(os.statvfs(path).f_flag & os.ST_RDONLY) for path in ('/', '/usr', sys.base_prefix, '/tmp')]"
    assert told(f"return {mounts}") == "[True, True, True, False]"
    assert told("import decimal, json, hashlib, zlib; return hashlib.md5(b'').hexdigest()[:4]") == "'d41d'"


@confined
def test_there_is_no_network() -> None:
    arrived = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def accept() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return
                arrived.set()

        threading.Thread(target=accept, daemon=True).start()
        attack = (
            f"try:\n    socket.create_connection(('127.0.0.1', {port}), timeout=2); return 'through'\n"
            "except OSError: return 'none'"
        )
        assert told(attack) == "'none'"
        assert not arrived.is_set()
        socket.create_connection(("127.0.0.1", port), timeout=2).close()  # the door was open, for us
        assert arrived.wait(5)
        server.shutdown(socket.SHUT_RDWR)


@confined
def test_environment_and_parents_are_out_of_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTFORGE_SECRET", "xyzzy")
    assert told("return [name for name in os.environ if name != 'LC_CTYPE']") == "[]"  # Python sets that one by itself
    environ = "try: return open(f'/proc/{x}/environ').read()\nexcept OSError: return 'none'"
    assert told(environ.replace("{x}", str(os.getpid()))) == "'none'"
    kill = f"try: os.kill({os.getpid()}, 9); return 'killed'\nexcept OSError: return 'none'"
    assert told(kill) == "'none'"
    assert told("return os.getpid(), os.getppid()") == "(2, 1)"  # judge and candidate are alone
    assert told("return os.getuid() != 0 or os.geteuid() != 0") == "True"


@confined
def test_privileges_do_not_come_back() -> None:
    call = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nreturn "
    assert told(f"{call}[libc.unshare(flag) for flag in (0x10000000, 0x20000, 0x40000000)]") == "[-1, -1, -1]"
    assert told(f"{call}libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None), libc.umount(b'/tmp'), libc.chroot(b'/tmp')") == (
        "(-1, -1, -1)"
    )
    assert told(f"{call}libc.ptrace(16, 1, 0, 0)") == "-1"  # PTRACE_ATTACH to the judge


@confined
def test_what_is_printed_goes_nowhere_and_answers_are_bounded() -> None:
    verdict = check("print('hello')\ndef f(x):\n    print('x' * 10_000_000)\n    return x + 1\n", "f", TESTS)
    assert verdict.passed
    assert told("return sys.stdin.read(), os.read(0, 9), os.write(1, b'[]'), os.write(2, b'[]')") == "('', b'', 2, 2)"
    long = check("def f(x):\n    return 'x' * 10_000_000\n", "f", TESTS)
    assert (long.status, long.detail) == ("failed", f"ValueError: an answer of more than {sandbox.REPLY} bytes")


@confined
def test_another_user_is_confined_in_the_same_way(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Root is confined without a user namespace, everybody else in one: as root, both are tried."""
    if os.geteuid():
        pytest.skip("only root can become somebody else")
    source = """
import ctypes, os
libc = ctypes.CDLL(None)
def f(x):
    seen = [name for name in ("etc", "proc", "tmp", "usr") if os.path.exists("/" + name)]
    attached = libc.ptrace(16, 1, 0, 0)  # PTRACE_ATTACH to the judge
    return seen, attached, libc.fork(), libc.umount(b"/tmp"), libc.chroot(b"/tmp")
"""
    tests = "def check(candidate):\n    assert candidate(0) == (['tmp', 'usr'], -1, -1, -1, -1)\n"
    script = (
        "import importlib.util, os\n"
        f"spec = importlib.util.spec_from_file_location('sandbox', {sandbox.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\n"
        f"print(os.geteuid(), module.check({source!r}, 'f', {tests!r})[:2])\n"
    )
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            done = subprocess.run(
                [python, "-c", script], user=65534, group=65534, extra_groups=[], capture_output=True, text=True, check=False
            )
        except OSError:  # nobody may not run this one
            continue
        if "PermissionError" in done.stderr:
            continue
        assert done.stdout == "65534 (True, 'passed')\n", done.stdout + done.stderr
        return
    pytest.skip("there is no Python that nobody may run")


@pytest.fixture
def on_another_kernel(tmp_path: Path) -> ModuleType:
    """The sandbox on a kernel that does not know its namespaces: with a flag that none knows."""
    source = Path(sandbox.__file__).read_text()
    assert source.count("NEWNET = 0x20000, ") == 1
    file = tmp_path / "sandbox.py"
    file.write_text(source.replace("NEWNET = 0x20000, ", "NEWNET = 0x1, "))
    spec = importlib.util.spec_from_file_location("sandbox_on_another_kernel", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_runs_where_the_kernel_refuses(on_another_kernel: ModuleType, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    source = f"open({str(mark)!r}, 'w')\ndef f(x):\n    return x + 1\n"
    verdict = on_another_kernel.check(source, "f", TESTS)
    assert (verdict.passed, verdict.status) == (False, "refused")
    assert verdict.detail.startswith("this system does not enforce: no network, no files, no other processes ([Errno 22]")
    assert not mark.exists()
