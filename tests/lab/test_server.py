"""The learner's JupyterLab: its command, its environment, and how it reads our files."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qcourse.lab import server


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that `serve` would have become."""
    command: list[str] = []

    def run(arguments: list[str], **_: object) -> subprocess.CompletedProcess:
        command.extend(arguments)
        return subprocess.CompletedProcess(arguments, 0)

    # this one returns, so that `run` is next
    monkeypatch.setattr(os, "execve", lambda *_: None, raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    return command


def test_the_command_names_the_folder_and_the_first_lesson(
    tmp_path: Path, started: list[str]
) -> None:
    server.serve(tmp_path, port=0, browser=False, more=("--IdentityProvider.token=x",))
    assert started[:4] == [sys.executable, "-m", "jupyterlab", str(tmp_path)]
    assert f"--LabApp.default_url=/lab/tree/{server.FIRST_LESSON}" in started
    assert "--no-browser" in started
    assert not any("port" in option for option in started)
    assert started[-1] == "--IdentityProvider.token=x"


def test_a_given_port_is_used_or_the_start_fails() -> None:
    command = server.lab_command(Path("course"), port=9999)
    assert "--ServerApp.port=9999" in command
    assert "--ServerApp.port_retries=0" in command


@pytest.mark.parametrize(("user", "allowed"), [(0, True), (1000, False)])
def test_root_is_allowed(monkeypatch: pytest.MonkeyPatch, user: int, allowed: bool) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user, raising=False)
    assert ("--allow-root" in server.lab_command(Path("course"))) == allowed


def test_a_browser_is_opened_where_it_is_seen(
    monkeypatch: pytest.MonkeyPatch, started: list[str]
) -> None:
    monkeypatch.setattr(server, "has_display", lambda: True)
    server.serve(Path("course"))
    assert "--no-browser" not in started


def test_a_busy_port_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"^Port {port} is in use"):
            server.serve(Path("course"), port=port)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match=f"^port={port} must be from 1 to 65535"):
        server.serve(Path("course"), port=port)


def test_the_terminals_of_jupyterlab_find_our_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "elsewhere")
    monkeypatch.delenv("JUPYTER_CONFIG_PATH", raising=False)
    env = server.lab_environment()
    assert env["PATH"] == os.pathsep.join([str(Path(sys.executable).parent), "elsewhere"])
    assert env["JUPYTER_CONFIG_PATH"] == str(server.SETTINGS)


def test_jupyterlab_reads_our_files(tmp_path: Path) -> None:
    command = server.lab_command(tmp_path, more=("--show-config-json", "--ip=0.0.0.0"))
    env = {**server.lab_environment(), "JUPYTER_CONFIG_DIR": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    shown = json.loads(done.stdout)
    assert shown["LabApp"]["extension_manager"] == "readonly"
    assert shown["LabApp"]["news_url"] is None
    # an option of the reader overrides our file
    assert shown["ServerApp"]["ip"] == "0.0.0.0"
