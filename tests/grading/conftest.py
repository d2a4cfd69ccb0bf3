"""What the tests of the grader share: gradebooks on both databases, and folders of submissions."""

import getpass
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from standins import free_port

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
# PostgreSQL refuses to run as root.
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real PostgreSQL server on loopback, without a database's name."""
    if not POSTGRES:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    as_user = NOBODY if os.getuid() == 0 else []
    if as_user and shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL does not run as root, and setpriv (util-linux) is not here")
    # pytest's own folders are closed to other users.
    folder = Path("/tmp") / f"qcourse-postgres-{os.getpid()}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    data = folder / "data"
    port = free_port()
    user = "nobody" if as_user else getpass.getuser()

    def run(name: str, *arguments: str) -> None:
        command = [*as_user, str(POSTGRES[-1] / name), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)

    try:
        new = ["--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8"]
        run("initdb", "-D", str(data), "-U", user, *new)
        options = f"-c listen_addresses=127.0.0.1 -c port={port}"
        options += " -c unix_socket_directories='' -c fsync=off"
        run("pg_ctl", "-D", str(data), "-o", options, "-l", str(folder / "log"), "-w", "start")
        yield f"postgresql+psycopg2://{user}:a-password@127.0.0.1:{port}"
        run("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def postgres(postgres_server: str, request: pytest.FixtureRequest) -> str:
    """The address of an empty database."""
    import psycopg2

    name = f"grades_{abs(hash(request.node.nodeid))}"
    connection = psycopg2.connect(f"{postgres_server.replace('+psycopg2', '')}/postgres")
    connection.autocommit = True
    connection.cursor().execute(f"CREATE DATABASE {name}")
    connection.close()
    return f"{postgres_server}/{name}"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty gradebook, on one database and then on the other."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/gradebook.db"
    return request.getfixturevalue("postgres")


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests have their own settings of Jupyter and nbgrader, and no $QCOURSE_DB."""
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path_factory.mktemp("jupyter")))
    monkeypatch.delenv("QCOURSE_DB", raising=False)
