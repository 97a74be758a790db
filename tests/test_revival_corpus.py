"""The fixed corpus: the same list gives the same tokens, packed or not, and what is not on the list is refused."""

import hashlib
import importlib
import json
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from normfree.config import DataConfig
from normfree.data.packing import prepare
from normfree.errors import EXIT_DATA, EXIT_OK, UserError

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
LICENCE = "  # MIT"
OPTION = "--only-binary :all:"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, imported as its own folder would have it."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("revival_corpus")


def source(number: int, lines: int = 30) -> str:
    """A Python file no line of which is in another."""
    return "".join(
        f"value_{number}_{line} = compute_the_next({number * 7919 + line * 104729})\n" for line in range(lines)
    )


def write_wheels(folder: Path) -> list[str]:
    """Four small wheels, with a duplicate, a generated file and one in another encoding; their lines of the list."""
    folder.mkdir()
    lines = []
    for package, name in enumerate(("alpha", "beta-two", "gamma", "delta")):
        wheel = folder / f"{name.replace('-', '_')}-1.{package}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for number in range(12):
                archive.writestr(f"{name}/part{number}.py", source(package * 100 + number) + "# é 日本\n")
            archive.writestr(f"{name}/copied.py", source(0))
            archive.writestr(f"{name}/generated.py", "# Do not edit.\n" + source(package * 100 + 50))
            archive.writestr(f"{name}/latin.py", b"# caf\xe9\n" + source(package * 100 + 51).encode())
            archive.writestr(f"{name}/read.me", source(package * 100 + 52))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        lines.append(f"{name}==1.{package} --hash=sha256:{digest}{LICENCE}")
    return lines


@pytest.fixture
def made(command: ModuleType, tmp_path: Path) -> SimpleNamespace:
    """The corpus of those wheels: built, described and packed in `tmp_path`."""
    lists = tmp_path / "lists"
    lists.mkdir()
    lines = write_wheels(tmp_path / "wheels")
    (lists / "packages.txt").write_text("\n".join(["# wheels", OPTION, *lines]) + "\n")
    here = SimpleNamespace(tmp=tmp_path, lists=lists, file=tmp_path / "corpus.pack", out=tmp_path / "built")

    def call(out: str, *arguments: str) -> int:
        own = ["--out", str(tmp_path / out), "--cache-dir", str(tmp_path / f"cache-of-{out}")]
        return command.main([*own, "--lists", str(lists), "--downloads", str(tmp_path / "wheels"), *arguments])

    here.call = call
    assert call("built", "--renew", "--pack", str(here.file)) == EXIT_OK
    here.record = json.loads((lists / "corpus.json").read_text())
    return here


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Name -> (content, time of change) of every file below a folder."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def test_build_and_unpack_give_the_same_corpus(made: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert made.call("again") == EXIT_OK
    assert "Tokenised train" in capsys.readouterr().out
    assert made.call("unpacked", "--unpack", str(made.file)) == EXIT_OK
    said = capsys.readouterr().out
    assert "Tokenised" not in said, "the tokens were in the file"
    assert f"data.fingerprint={made.record['fingerprint']}" in said
    assert files(made.tmp / "again") == files(made.out) == files(made.tmp / "unpacked")
    tokens = {
        out: {path.name: path.read_bytes() for path in (made.tmp / f"cache-of-{out}").rglob("*.bin")}
        for out in ("built", "again", "unpacked")
    }
    assert tokens["built"] == tokens["again"] == tokens["unpacked"]
    assert len(tokens["built"]) == 3


def test_a_run_finds_the_unpacked_tokens_and_their_bytes(made: SimpleNamespace) -> None:
    assert made.call("unpacked", "--unpack", str(made.file)) == EXIT_OK
    data = DataConfig(
        source="files",
        path=str(made.tmp / "unpacked"),
        tokenizer=str(made.lists / "code32k.json"),
        fingerprint=made.record["fingerprint"],
        cache_dir=str(made.tmp / "cache-of-unpacked"),
    )
    said: list[str] = []
    corpus = prepare(data, said.append)
    assert said == ["data.tokenizer=" + data.tokenizer + " is lossless, as far as a few hard strings show."]
    for name, counts in made.record["splits"].items():
        text = corpus.tokenizer.decode(corpus.tokens(name)).replace("<|endoftext|>", "")
        assert len(text.encode()) == counts["bytes"]
        assert corpus.bytes_per_token(name) == counts["bytes"] / counts["tokens"]
    assert len(corpus.manifest["held_out_packages"]) == 1


def test_the_record_says_what_came_out(made: SimpleNamespace) -> None:
    record = made.record
    assert record["packages"] == {"alpha": "1.0", "beta-two": "1.1", "delta": "1.3", "gamma": "1.2"}
    assert record["files"] == 48, "the copies repeat a part, and only the parts are left"
    assert set(record["bytes_left_out"]) == {"generated", "not UTF-8", "repeats"}
    assert record["pack"]["sha256"] == hashlib.sha256(made.file.read_bytes()).hexdigest()
    assert {name: counts["window_overlap"] for name, counts in record["splits"].items() if name != "train"} == {
        "val": 0.0,
        "val_package": 0.0,
    }


def test_a_changed_file_is_refused(made: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray(made.file.read_bytes())
    content[len(content) // 2] ^= 1
    made.file.write_bytes(content)
    capsys.readouterr()
    assert made.call("unpacked", "--unpack", str(made.file)) == EXIT_DATA
    assert "is not the packed corpus that corpus.json describes" in capsys.readouterr().err
    assert not (made.tmp / "unpacked").exists()
    assert not (made.tmp / "cache-of-unpacked").exists()


def test_a_changed_text_is_refused(made: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    path = made.out / "alpha" / "python.jsonl"
    path.write_text(path.read_text().replace("value_3_", "value_x_"))
    assert made.call("built") == EXIT_DATA
    assert made.record["fingerprint"] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["alpha==1.0"], "line 2 is not"),
        (["alpha>=1.0 --hash=sha256:" + "0" * 64 + LICENCE], "line 2 is not"),
        (["alpha==1.0 --hash=sha256:" + "0" * 63 + LICENCE], "line 2 is not"),
        (["alpha==1.0 --hash=sha256:" + "0" * 64], "line 2 is not"),  # no licence
        (["-r other.txt"], "line 2 is not"),
        (["alpha==1.0 --hash=sha256:" + "0" * 64 + LICENCE] * 2, "line 3 names alpha a second time"),
        ([], "has no package"),
    ],
)
def test_errors_of_the_list(command: ModuleType, tmp_path: Path, lines: list[str], said: str) -> None:
    path = tmp_path / "packages.txt"
    path.write_text("\n".join([OPTION, *lines]) + "\n")
    with pytest.raises(UserError, match=said):
        command.packages.read_list(path)


def test_the_committed_list_is_in_order(command: ModuleType) -> None:
    path = EXPERIMENTS / "corpus" / "packages.txt"
    listed = command.packages.read_list(path)
    names = [line.split("==")[0] for line in path.read_text().splitlines() if "==" in line]
    assert names == [package.name for package in listed]
    record = command.read_record(path.parent)
    assert record["packages"] == {package.name: package.version for package in listed}
    assert record["pack"]["bytes"] <= command.carry.MOST


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (source(1).encode(), None),
        (b"x = 1\n", "small"),
        (source(1, 9000).encode(), "large"),
        (b"# AUTOGENERATED by a tool\n" + source(1).encode(), "generated"),
        (source(1).encode() + b"long = '" + b"a" * 1000 + b"'\n", "long lines"),
        (b"table = [\n" + b"    0.123, 4.567, 8.901,\n" * 40 + b"]\n", "data"),
        (b"# \xff\n" + source(1).encode(), "not UTF-8"),
    ],
)
def test_what_is_left_out_of_a_package(command: ModuleType, content: bytes, reason: str | None) -> None:
    assert command.text.left_out(content) == reason


def test_no_package_is_more_than_its_share(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheels(tmp_path / "wheels")
    wheel = tmp_path / "wheels" / "alpha-1.0-py3-none-any.whl"
    everything, _ = command.text.read_wheel(wheel)
    monkeypatch.setattr(command.text, "PER_PACKAGE", 10_000)
    rows, dropped = command.text.read_wheel(wheel)
    size = sum(len(row.text.encode()) for row in rows)
    assert 8000 < size <= 10_000
    assert set(rows) < set(everything)
    assert dropped["over the package's share"] == sum(len(row.text.encode()) for row in everything) - size
    assert [row.path for row in rows] == sorted(row.path for row in rows)
