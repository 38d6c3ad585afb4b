from __future__ import annotations

import hashlib
import json
import lzma
import socket
from pathlib import Path

import pytest

from agentforge.errors import BadInput
from agentforge.evaluation import Text, find_text, texts

PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No data folder beside the checkout, none in AGENTFORGE_DATA, and no network.  Returns a folder to put data in."""

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionRefusedError("no network in this test")

    monkeypatch.setattr(texts, "CHECKOUT", tmp_path / "elsewhere" / "main")
    monkeypatch.delenv("AGENTFORGE_DATA", raising=False)
    for name in (*PROXIES, "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    data = tmp_path / "data"
    data.mkdir()
    return data


def as_wikitext(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Make `text` the one whose hash is the official one."""
    monkeypatch.setitem(texts.WIKITEXT2_SHA256, "test", hashlib.sha256(text.encode()).hexdigest())


def test_the_chain_falls_back_to_selftext_and_says_what_it_skipped(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTFORGE_DATA", str(nowhere))
    found = find_text()
    assert (found.name, found.split) == ("selftext", "heldout")
    assert len(found.skipped) == 1
    assert found.skipped[0].startswith(
        "wikitext2: not in AGENTFORGE_DATA, not in ../shared/data, not from the hub (ConnectionRefusedError)"
    )
    assert find_text("selftext").skipped == ()


def test_without_wikitext_its_name_is_refused(nowhere: Path) -> None:
    with pytest.raises(BadInput, match=r"wikitext2: not in \.\./shared/data, not from the hub .*set AGENTFORGE_DATA"):
        find_text("wikitext2")


@pytest.mark.parametrize("inner", ["", "wikitext-2-raw"])
def test_wikitext_from_agentforge_data(nowhere: Path, monkeypatch: pytest.MonkeyPatch, inner: str) -> None:
    text = " = A title = \n \n Some text , as WikiText has it . é \n"
    as_wikitext(monkeypatch, text)
    (nowhere / inner).mkdir(exist_ok=True)
    (nowhere / inner / "wiki.test.raw").write_bytes(text.encode())
    monkeypatch.setenv("AGENTFORGE_DATA", str(nowhere))
    found = find_text()
    assert (found.name, found.split, found.text, found.skipped) == ("wikitext2", "test", text, ())
    assert found.origin.startswith("AGENTFORGE_DATA")
    assert found.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_wikitext_from_the_folder_beside_the_checkout(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_wikitext(monkeypatch, "beside")
    folder = texts.CHECKOUT.parent / "shared" / "data" / "wikitext-2-raw"
    folder.mkdir(parents=True)
    (folder / "wiki.test.raw").write_text("beside", encoding="utf-8")
    assert find_text("wikitext2").origin == "../shared/data/wiki.test.raw"


@pytest.mark.parametrize("content", [b"not the official text", b"\xff\xfe no UTF-8"])
def test_a_wikitext_that_is_not_the_official_one_is_refused(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    (nowhere / "wiki.test.raw").write_bytes(content)
    monkeypatch.setenv("AGENTFORGE_DATA", str(nowhere))
    with pytest.raises(BadInput, match=r"wiki\.test\.raw"):
        find_text("wikitext2")
    found = find_text()
    assert found.name == "selftext"
    assert "wiki.test.raw" in found.skipped[0]


def test_a_text_from_the_hub_is_held_against_the_hash_too(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_wikitext2_from_hub", lambda split: "something else")
    with pytest.raises(BadInput):
        find_text("wikitext2")


def test_the_hub_gives_the_official_text(wikitext2: Text, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's rows are the file's lines, but for blank ones (" \\n"), which its script made empty."""
    import datasets

    rows = [line if line.strip() else "" for line in wikitext2.text.splitlines(keepends=True)]
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: socket.socket())
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"text": rows})
    assert find_text("wikitext2").sha256 == texts.WIKITEXT2_SHA256["test"]


def test_the_official_text(wikitext2: Text) -> None:
    assert wikitext2.sha256 == texts.WIKITEXT2_SHA256["test"]
    assert find_text("wikitext2", "validation").sha256 == texts.WIKITEXT2_SHA256["validation"]


def test_selftext_splits() -> None:
    calibration, heldout = texts.selftexts("calibration"), texts.selftexts("heldout")
    assert (len(calibration), len(heldout)) == (7249, 381)
    assert not set(calibration) & set(heldout)
    assert all(text.strip() for text in calibration + heldout)
    assert find_text("selftext").text == "\n\n".join(heldout)
    assert find_text("selftext", "calibration").text == "\n\n".join(calibration)
    assert find_text("selftext", "calibration").sha256 != find_text("selftext").sha256


def test_selftext_is_every_twentieth_of_the_whole() -> None:
    whole = Path(__file__).parents[3] / "shared" / "data" / "selftext" / "selftext.jsonl.xz"
    if not whole.is_file():
        pytest.skip("../shared/data has no selftext")
    with lzma.open(whole, "rt", encoding="utf-8") as file:
        everything = [json.loads(line)["text"] for line in file]
    assert texts.selftexts("heldout") == everything[10::20]
    assert texts.selftexts("calibration") == [text for i, text in enumerate(everything) if i % 20 != 10]


@pytest.mark.parametrize(("name", "split"), [("selftext", "test"), ("selftext", "train"), ("wikitext2", "train")])
def test_unknown_split(name: str, split: str) -> None:
    with pytest.raises(BadInput, match=rf"text {name} has no split '{split}'; it has {', '.join(texts.SPLITS[name])}"):
        find_text(name, split)


def test_unknown_split_of_selftexts() -> None:
    with pytest.raises(BadInput, match="no split 'test'; it has heldout, calibration"):
        texts.selftexts("test")


def test_a_split_that_no_text_of_the_chain_has(nowhere: Path) -> None:
    with pytest.raises(BadInput, match="nonsense"):
        find_text(None, "nonsense")


def test_calibration_text_is_never_test_text(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_wikitext(monkeypatch, "test text")
    (nowhere / "wiki.test.raw").write_text("test text", encoding="utf-8")
    monkeypatch.setenv("AGENTFORGE_DATA", str(nowhere))
    assert find_text(None, "calibration").split == "calibration"


@pytest.mark.parametrize(
    "name", ["no-such-text", "", ".", "wikitext-2", "a\0b", "word " * 2000], ids=lambda name: repr(name[:12])
)
def test_unknown_text(name: str) -> None:
    with pytest.raises(BadInput, match=r"does not exist; expected a text file or one of wikitext2, selftext"):
        find_text(name)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("ein Text, größer", encoding="utf-8")
    found = find_text(str(path))
    assert (found.name, found.split, found.text) == ("mine.txt", "file", "ein Text, größer")
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert find_text(found) is found


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("größer".encode("latin-1"))
    with pytest.raises(BadInput, match=r"latin\.txt: cannot be read as UTF-8 text"):
        find_text(str(path))


def test_the_network_is_not_asked_for_a_local_text(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(split: str) -> str:
        raise AssertionError(f"asked the hub for {split}")

    monkeypatch.setattr(texts, "_wikitext2_from_hub", fail)
    assert find_text("selftext").name == "selftext"
