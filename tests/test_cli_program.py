"""One command with everything, and texts that name commands as the user calls them."""

import argparse
import re
import subprocess
import sys

import pytest

import nas.cli.tools
from compofa.cli import tools
from compofa.cli.main import COMMANDS, main
from compofa.cli.program import as_called

TEXT = "python train_ofa_net.py --task teacher; eval_sampled_config.py; python -m nas devices"
TORCHRUN = "torchrun --nproc-per-node 4 train_ofa_net.py --seed 1"


@pytest.mark.parametrize(
    ("started", "wanted"),
    [
        ("run_NAS.py", TEXT),
        ("/usr/bin/pytest", TEXT),
        ("/x/bin/compofa", "compofa train --task teacher; compofa eval; compofa devices"),
        ("compofa.exe", "compofa train --task teacher; compofa eval; compofa devices"),
        ("/x/compofa-eval", "compofa-train --task teacher; compofa-eval; compofa devices"),
        (
            "/x/compofa/__main__.py",
            "python -m compofa train --task teacher; python -m compofa eval; "
            "python -m compofa devices",
        ),
    ],
)
def test_commands_are_spelled_as_the_process_was_called(monkeypatch, started, wanted):
    monkeypatch.setattr(sys, "argv", [started])
    assert as_called(TEXT) == wanted
    module = "" if wanted == TEXT else "-m compofa train --seed 1"
    assert as_called(TORCHRUN).endswith(module or TORCHRUN)
    assert as_called("/data/run_NAS.py: not a table") == "/data/run_NAS.py: not a table"


def commands_of(parser: argparse.ArgumentParser) -> set[str]:
    (group,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return set(group.choices)


def test_every_command_is_listed():
    listed = commands_of(tools.parser()) | commands_of(nas.cli.tools.parser()) - {"predict"}
    assert listed == {name for name, command in COMMANDS.items() if command.shared}
    assert {"train", "eval", "search"} <= set(COMMANDS)


def test_it_runs_the_commands_of_both_packages(capsys):
    assert main(["zoo", "--like", "note10_lat@8ms"]) == 0
    assert main(["devices"]) == 0
    shown = capsys.readouterr().out
    assert "note10_lat@8ms" in shown and "rtx2080ti" in shown


def test_usage_and_errors_name_the_installed_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/x/bin/compofa"])
    for words, said in (["train", "--epochs", "x"], "--epochs"), (["tran"], "search"), ([], "COMM"):
        with pytest.raises(SystemExit):
            main(words)
        error = capsys.readouterr().err
        assert error.startswith("compofa") and said in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: compofa search") and "run_NAS.py" not in shown


@pytest.mark.parametrize("started", ["train_ofa_net.py", "compofa", "/x/compofa/__main__.py"])
def test_help_fits_a_terminal_and_states_each_default_once(monkeypatch, capsys, started):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [started])
    for command in (None, *COMMANDS):
        with pytest.raises(SystemExit):
            main([command, "--help"] if command else ["--help"])
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 80, command
        for option in re.split(r"\n  -|\n\n", shown):
            assert option.count("(default") <= 1, (command, option)
        words = {word.strip(",()") for word in shown.split()}
        if command in ("train", "export", "sample"):  # not broken at its hyphens
            assert "ofa-proxyless-small" in words
        if started == "compofa":
            assert not {"train_ofa_net.py", "eval_sampled_config.py", "run_NAS.py"} & words


def test_a_system_without_posix_is_refused_in_one_line():
    code = "import os; os.name = 'nt'; import compofa"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode and "ImportError" in done.stderr.splitlines()[-1]
    assert "WSL" in done.stderr.splitlines()[-1]
