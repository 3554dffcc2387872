"""How the program starts and how an error leaves it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from edgepeft import __version__, paths
from edgepeft.cli import main
from edgepeft.errors import DoesNotFit, ExitCode


def _run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["edgepeft", *arguments])
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert _run(capsys, monkeypatch, "--version") == (0, f"edgepeft {__version__}\n", "")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = _run(capsys, monkeypatch)
    assert code == 0
    for command in (
        *("ui", "demo", "where", "methods", "profiles", "doctor", "config", "cache", "models", "data", "plan", "fits"),
        *("train", "runs", "chat", "eval", "adapters"),
    ):
        assert f"\n  {command} " in out


@pytest.mark.parametrize("arguments", [["nonsense"], ["where", "--nonsense"], ["models", "nonsense"], ["plan"]])
def test_a_wrong_command_line_is_one_clear_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = _run(capsys, monkeypatch, *arguments)
    assert code == ExitCode.USAGE
    assert out == ""
    assert err.startswith("edgepeft: ")
    assert len(err.splitlines()) == 1


def test_our_errors_leave_as_one_line_with_their_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object) -> int:
        raise DoesNotFit("too [large]", where="plan", hint="Take\na smaller model")

    monkeypatch.setattr(paths, "measure_size", refuse)
    code, _, err = _run(capsys, monkeypatch, "where")
    assert code == ExitCode.DOES_NOT_FIT
    assert err == "edgepeft: plan: too [large]. Take a smaller model.\n"


def test_a_bug_says_so_and_shows_its_traceback_only_when_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: object) -> int:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(paths, "measure_size", fail)
    code, _, err = _run(capsys, monkeypatch, "where")
    assert code == ExitCode.BUG
    assert "internal error: ZeroDivisionError: oops" in err
    assert "Traceback" not in err
    monkeypatch.setenv("EDGEPEFT_DEBUG", "1")
    _, _, err = _run(capsys, monkeypatch, "where")
    assert "Traceback" in err


def test_where_names_the_folders_of_this_home(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, edgepeft_home: object
) -> None:
    code, out, _ = _run(capsys, monkeypatch, "where", "--json")
    assert code == 0
    places = json.loads(out)
    assert places["runs"] == {"path": f"{edgepeft_home}/runs", "bytes": None}
    assert places["shipped profiles"]["bytes"] > 0


def test_methods_are_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, out, _ = _run(capsys, monkeypatch, "methods", "list", "--json")
    assert json.loads(out)[0] == {
        "id": "lora",
        "paper": "arXiv 2106.09685",
        "peft": "LORA",
        "adds": "a low-rank product beside each linear layer",
        "merges": True,
    }
    code, out, _ = _run(capsys, monkeypatch, "methods", "show", "lora")
    assert code == 0
    assert "Hu et al. 2021" in out


def test_config_is_set_shown_and_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert _run(capsys, monkeypatch, "config", "set", "budget", "20GiB")[0] == 0
    assert json.loads(_run(capsys, monkeypatch, "config", "show", "--json")[1])["budget"] == "20GiB"
    assert _run(capsys, monkeypatch, "config", "set", "nonsense", "1")[0] == ExitCode.USAGE


@pytest.mark.parametrize(("tokens", "told"), [(0, False), (50, True)])
def test_no_speed_of_answers_is_told_when_none_were_given(
    tokens: int, told: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    from edgepeft.chat.evaluation import Evaluation
    from edgepeft.cli.evaluate import show

    result = Evaluation(
        records=2,
        loss=1.5,
        trained_tokens=10,
        scores=None,
        rows=(),
        notes=(),
        seconds=3.0,
        answer_tokens=tokens,
        answer_tokens_per_second=tokens / 2,
    )
    show("the base alone", "tiny in bf16", "text.jsonl", result)
    assert ("tokens/s" in capfd.readouterr().err) is told


@pytest.mark.parametrize("arguments", [["profiles", "list", "gpus"], ["profiles", "list", "gpus", "--json"]])
def test_a_closed_pipe_is_no_failure(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "edgepeft", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    assert (process.wait(30), told) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["config", "set", "budget", "3GiB"], {"budget": "3GiB"}),
        (["config", "show"], None),
        (["cache", "show"], None),
        (["cache", "clear"], None),
        (["methods", "list"], None),
        (["methods", "show", "lora"], None),
        (["where"], None),
        (["runs", "list"], []),
    ],
)
def test_json_is_all_there_is_on_stdout(
    arguments: list[str], told: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = _run(capsys, monkeypatch, *arguments, "--json")
    assert code == 0
    assert told is None or json.loads(out) == told
    assert json.loads(out) is not None
