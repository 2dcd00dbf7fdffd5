"""`fastokd watch`, by raw sockets: what it serves, what it refuses, and that it follows the runs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastokd.cli import run_command
from fastokd.errors import UserError
from fastokd.overview import pages, server, watch
from fastokd.overview.server import Server
from fastokd.overview.watch import Site, key_of
from fastokd.run.lock import FolderLock
from tests.overview.test_listing import ROOT, write_run
from tests.test_wrong_input import left_in

SECRET = b"nobody must read this"
OWN = b"Host: localhost\r\n"


class Served:
    """A server on a free port, in this process."""

    def __init__(self, top: Path, host: str = "127.0.0.1") -> None:
        self.top = top
        self.site = Site([top / "runs"])
        self.server = Server(host, 0, self.site.answer)
        self.at = self.server.server_address[:2]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        self.site.pages.close()

    def connect(self) -> socket.socket:
        connection = socket.create_connection(self.at)
        connection.settimeout(60)
        return connection

    def raw(self, request: bytes) -> bytes:
        """The whole answer to these bytes; empty if the connection was only closed."""
        with self.connect() as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(request)
            return everything(connection)

    def get(self, path: bytes, more: bytes = OWN, verb: bytes = b"GET") -> tuple[int, bytes, bytes]:
        """Status, headers and body."""
        answer = self.raw(verb + b" " + path + b" HTTP/1.1\r\n" + more + b"\r\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        return (int(head.split()[1]) if head else 0), head, body


def everything(connection: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    top = tmp_path_factory.mktemp("watched")
    write_run(top / "runs/first", "baseline/resnet8/digits", epochs=3)
    write_run(top / "runs/<b>&", seed=1)
    (top / "secret.txt").write_bytes(SECRET)
    (top / "runs/first/secret.txt").write_bytes(SECRET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "_GOOD", 0.0)
        patch.setattr(watch, "_TIMES", 0.0)
        patch.setattr(pages, "_SHARE", 1.0)
        one = Served(top)
        yield one
        one.close()


def of(run: Path) -> bytes:
    return f"/run/{key_of(run)}/".encode()


def drawn(served: Served, run: Path, before: str = "") -> str:
    """The version of the run's page, once it isn't ``before``."""
    while True:
        version = json.loads(served.get(of(run) + b"state.json")[2])["version"]
        if version not in ("", before):
            return str(version)
        time.sleep(0.05)


def test_the_list_and_its_json(served: Served) -> None:
    status, head, body = served.get(b"/")
    assert status == 200
    assert b"2 runs: 2 finished" in body
    assert b"&lt;b&gt;&amp;" in body
    assert b"<b>" not in body
    rows = json.loads(served.get(b"/state.json")[2])
    assert {row["seed"]: row["top1"] for row in rows} == {0: 0.52, 1: 0.52}
    assert body.count(b"<td>0.5200</td>") == 2
    for header in (b"default-src 'none'", b"nosniff", b"no-store", b"same-origin"):
        assert header in head
    assert b"unsafe" not in head
    tag = re.search(rb'ETag: (".*")', head)
    assert tag is not None
    assert served.get(b"/", OWN + b"If-None-Match: " + tag[1] + b"\r\n")[::2] == (304, b"")
    status, again, body = served.get(b"/", verb=b"HEAD")
    assert (status, body) == (200, b"")
    assert re.search(rb"Content-Length: \d{4}", again)
    for query in (b"?sort=%ff", b"?state=x&sort=y", b"?" + b"&" * 99, b'?sort="><script>'):
        status, _, body = served.get(b"/" + query)
        assert status in (200, 400)
        assert body.count(b"<script>") <= 1


def test_sorted_and_filtered(served: Served) -> None:
    keys = {seed: of(served.top / "runs" / name) for seed, name in ((0, "first"), (1, "<b>&"))}
    for query, order in ((b"?sort=seed", [0, 1]), (b"?sort=-seed", [1, 0]), (b"?state=failed", [])):
        body = served.get(b"/" + query)[2]
        found = re.findall(rb"<a href=\"(run/[0-9a-f]+/)\"", body)
        assert [b"/" + link for link in found] == [keys[seed] for seed in order]


TRAVERSALS = [
    *(b"/../secret.txt", b"/..%2fsecret.txt", b"/%2e%2e/secret.txt", b"/%2e%2e%2fsecret.txt"),
    *(b"/%252e%252e/secret.txt", b"/..%5csecret.txt", b"/..\\secret.txt", b"/..%c0%afsecret.txt"),
    *(b"/%uff0e%uff0e/secret.txt", b"/.%00./secret.txt", b"/secret.txt%00", b"//secret.txt"),
    *(b"/run/../secret.txt", b"/run/first/secret.txt", b"/first/secret.txt", b"/runs/secret.txt"),
    *(b"secret.txt", b"../secret.txt", b"file:///etc/passwd", b"/etc/passwd", b"//etc/passwd"),
    *(b"*", b"http://localhost/../secret.txt", b"/\xff\xfe", b"/run/%2e%2e/page", b"/;/../x"),
]


def test_no_path_leads_out_of_the_runs(served: Served) -> None:
    """Nor to a file in them: URLs hold keys."""
    run = of(served.top / "runs/first")
    inside = [
        *(
            b"secret.txt",
            b"../secret.txt",
            b"%2e%2e/secret.txt",
            b"page/../secret.txt",
            b"recipe.json",
        ),
        *(b"checkpoints/", b"page%00", b"./page", b"page/", b"state.json%00.txt", b"..;/page"),
    ]
    absolute = str(served.top / "secret.txt").encode()
    wild = [*TRAVERSALS, absolute, b"/" + absolute, *(run + path for path in inside), run[:-1]]
    wild += [run.upper(), run[:-2] + b"/", b"/run/" + b"0" * 16 + b"/page", b"/run//page"]
    for path in wild:
        status, _, body = served.get(path)
        assert status in (400, 404), path
        assert SECRET not in body
        assert b"secret" not in body


def test_hosts_of_others_are_refused(served: Served) -> None:
    """A page of another site that gets its name resolved to this machine can't read ours."""
    for host in (b"evil.example", b"localhost.evil.example", b"127.0.0.1.evil.example:80", b""):
        assert served.get(b"/", b"Host: " + host + b"\r\n")[0] == 421
    assert served.get(b"/", b"")[0] == 400
    assert served.get(b"/", OWN * 2)[0] == 400
    for host in (b"localhost:1", b"127.0.0.1", b"LOCALHOST", b"[::1]:9"):
        assert served.get(b"/", b"Host: " + host + b"\r\n")[0] == 200


def test_only_get_and_head_without_a_body(served: Served) -> None:
    for verb in (
        b"POST",
        b"PUT",
        b"DELETE",
        b"OPTIONS",
        b"TRACE",
        b"CONNECT",
        b"handle",
        b"__init__",
    ):
        status, head, _ = served.get(b"/", verb=verb)
        assert status == 405
        assert b"Allow: GET, HEAD" in head
    for length in (
        b"Content-Length: 5\r\n",
        b"Content-Length: -1\r\n",
        b"Transfer-Encoding: x\r\n",
    ):
        assert served.get(b"/", OWN + length)[0] == 413


def test_junk_and_huge_requests(served: Served) -> None:
    assert served.get(b"/", OWN + b"X: " + b"a" * 100_000 + b"\r\n")[0] in (0, 431)
    assert served.get(b"/" + b"a" * 1_000_000)[0] in (0, 431)
    assert served.get(b"/", OWN + b"X: y\r\n" * 200)[0] == 431
    for junk in (
        b"GET /\r\n\r\n",
        b"\r\n\r\n",
        b"\0\n\n",
        b"\x16\x03\x01\x02\0\n\n",
        b"GET\n\n",
        b"a b c d\n\n",
    ):
        answer = served.raw(junk)
        assert b"2 runs" not in answer
        assert b"Traceback" not in answer
    for version in (b"HTTP/9.9", b"HTTP/x", b"HTTP/1.1 x"):
        assert b"2 runs" not in served.raw(b"GET / " + version + b"\r\n" + OWN + b"\r\n")
    two = b"GET /state.json HTTP/1.1\r\n" + OWN + b"\r\n"
    assert served.raw(two * 2).count(b"HTTP/1.0 200") == 1, "one request a connection"
    assert served.get(b"/")[0] == 200


def test_slow_clients_hold_up_nobody_and_are_ended(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as open_:
        slow = [open_.enter_context(served.connect()) for _ in range(50)]
        for connection in slow:
            connection.sendall(b"GET / HTTP/1.1\r\nX")
        assert served.get(b"/")[0] == 200
        for connection in slow:
            connection.sendall(b"y")
        assert served.get(of(served.top / "runs/first"))[0] == 200
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
    with served.connect() as connection:
        ended = threading.Event()

        def drip() -> None:  # each byte within the limit, all of them not
            with contextlib.suppress(OSError):
                while not ended.wait(0.05):
                    connection.sendall(b"a")

        dripping = threading.Thread(target=drip)
        dripping.start()
        answer = everything(connection)
        assert answer == b"" or answer.startswith(b"HTTP/1.0 408")
        ended.set()
        dripping.join()


def test_a_limit_on_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTIONS", 2)
    monkeypatch.setattr(server, "HEAD_SECONDS", 600.0)  # nobody is sent away on a slow machine
    write_run(tmp_path / "runs/run")
    few = Served(tmp_path)
    try:
        with few.connect() as first, few.connect() as second:
            for held in (first, second):
                held.sendall(b"GET ")
            while few.server._free._value:
                time.sleep(0.01)
            with few.connect() as third:
                assert everything(third) == b""
        while not few.server._free._value:
            time.sleep(0.01)
        assert few.get(b"/")[0] == 200
    finally:
        few.close()


def test_runs_come_change_and_go(served: Served) -> None:
    """The page of a run is drawn again when the run has changed; nothing is written into it."""
    first = served.top / "runs/first"
    before = left_in(served.top)
    assert served.get(of(first))[0] == 200
    version = drawn(served, first)
    status, head, page = served.get(of(first) + b"page")
    assert status == 200
    assert b"baseline/resnet8/digits" in page
    assert b"frame-ancestors 'self'" in head
    assert version.encode() in head
    assert version.encode() in served.get(of(first))[2]
    assert left_in(served.top) == before
    new = write_run(served.top / "runs/new", seed=7, epochs=1).folder
    assert b'"seed": 7' in served.get(b"/state.json")[2]
    lock = FolderLock(new)
    lock.take()
    assert b"1 running" in served.get(b"/")[2]
    lock.release()
    (new / "outside.safetensors").symlink_to(served.top / "secret.txt")
    drawn(served, new)
    assert b"symbolic link" in served.get(of(new) + b"page")[2]
    shutil.rmtree(new)
    for path in (b"", b"page", b"state.json"):
        assert served.get(of(new) + path)[0] == 404
    shutil.copytree(first, served.top / "elsewhere")
    (served.top / "runs/link").symlink_to(served.top / "elsewhere")
    assert served.get(of(served.top / "elsewhere"))[0] == 404
    (served.top / "runs/link").unlink()
    (first / "metrics.jsonl").write_text('{"half": ')
    drawn(served, first, version)
    assert b"no measured epoch" in served.get(of(first) + b"page")[2]


def test_a_run_is_read_while_it_is_written(served: Served) -> None:
    run = write_run(served.top / "runs/growing", epochs=1)
    lines = run.folder / "metrics.jsonl"
    line = lines.read_text()
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            row = line.replace('"epoch": 0', f'"epoch": {number}')
            for part in (row[:40], row[40:]):
                with open(lines, "a") as file:
                    file.write(part)
            if number % 10 == 0:
                os.replace(lines, run.folder / "away")
                (run.folder / "away").replace(lines)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(40):
            (row,) = [
                r for r in json.loads(served.get(b"/state.json")[2]) if r["run"].endswith("growing")
            ]
            assert row["reason"] is None
            assert served.get(of(run.folder) + b"state.json")[0] == 200
    finally:
        stop.set()
        writer.join()
        shutil.rmtree(run.folder)


@pytest.mark.proof
def test_a_drawing_process_that_is_killed_is_begun_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run").folder
    drawer = pages._Drawer()
    assert b"<html" in (drawer.draw(run)[0] or b"")
    assert drawer._process is not None
    drawer._process.kill()
    assert b"<html" in (drawer.draw(run)[0] or b"")
    drawer.close()
    assert drawer.draw(run)[0] is None


def test_other_addresses_only_when_asked(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/run")
    taken = Served(tmp_path, "localhost")
    try:
        with pytest.raises(
            UserError, match=r"can't listen on 127.0.0.1:\d+ .*choose another --port"
        ):
            Server("127.0.0.1", taken.at[1], taken.site.answer)
        with pytest.raises(UserError, match=r"can't listen on 192\.0\.2\.1:0"):
            Server("192.0.2.1", 0, taken.site.answer)
    finally:
        taken.close()
    public = Served(tmp_path, "0.0.0.0")
    try:
        assert not public.server.loopback
        assert public.get(b"/", b"Host: my.machine:80\r\n")[0] == 200
    finally:
        public.close()
    assert run_command(["watch", str(tmp_path / "nowhere")]) == 2
    assert run_command(["watch", str(tmp_path), "--port", "70000"]) == 2


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly(how: signal.Signals, tmp_path: Path) -> None:
    write_run(tmp_path / "runs/run")
    command = [sys.executable, "-m", "fastokd", "watch", "runs", "--host", "127.0.0.1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    child = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with child:
        assert child.stdout is not None
        line = child.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:(\d+)/ shows the runs in runs; \^C ends it\n", line)
        assert found is not None
        if how == signal.SIGINT:  # while a page is drawn
            with socket.create_connection(("127.0.0.1", int(found[1]))) as connection:
                path = of(tmp_path / "runs/run") + b"page"
                connection.sendall(b"GET " + path + b" HTTP/1.0\r\n" + OWN + b"\r\n")
                page = everything(connection)
        child.send_signal(how)
        assert child.communicate() == ("ended\n", "")
    assert child.returncode == 0
    if how == signal.SIGINT:  # not before the child has ended, which a failure would wait for
        assert b"is being drawn" in page
        assert b'<meta http-equiv="refresh"' in page
    assert not list(tmp_path.glob("fastokd-watch-*"))
