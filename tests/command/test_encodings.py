"""Consoles and locales with few characters: arguments and files are UTF-8, and printing never fails."""

import io
import os
import subprocess
import sys

import pytest

from experiments.__main__ import main

LOCALE_OF_ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_arguments_are_utf_8_in_every_locale():
    command = [sys.executable, "-c", "from experiments.__main__ import main; main()", "étude"]
    done = subprocess.run(command, env=os.environ | LOCALE_OF_ASCII, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.decode().startswith("error: no such command: 'étude'")


def test_an_argument_that_is_no_text_is_one_line(capsys):
    with pytest.raises(SystemExit) as left:
        main(["generate", "--prompt", b"caf\xe9".decode("utf-8", "surrogateescape")])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: argument 'caf\\udce9' is not utf-8")


def test_a_character_that_the_console_lacks_is_printed_as_its_escape(monkeypatch):
    console = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(console, encoding="ascii"))
    main(["--help"])
    print("学習", flush=True)
    assert console.getvalue().endswith(b"\\u5b66\\u7fd2\n")
