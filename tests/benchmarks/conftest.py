"""What tests of several studies share."""

import sys

import pytest


@pytest.fixture
def run_study(monkeypatch, capsys):
    """Run a study in this process, which has imported all that takes long; return what it printed."""

    def run(study, *arguments):
        monkeypatch.setattr(sys, "argv", [study.__name__, *map(str, arguments)])
        capsys.readouterr()
        study.main()
        return capsys.readouterr().out

    return run
