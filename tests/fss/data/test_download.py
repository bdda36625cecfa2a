from __future__ import annotations

import hashlib
import re
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fss.data.prepare import download
from fss.data.prepare.download import Archive, check, fetch

CONTENT = bytes(range(256)) * 5000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT; `cut` breaks off each answer after so many bytes, `ranges` honours Range."""

    def __init__(self, settings: dict, *args) -> None:
        self.settings = settings
        super().__init__(*args)

    def do_GET(self) -> None:
        settings = self.settings
        settings["requests"].append(self.headers.get("Range"))
        if settings["status"]:
            self.send_error(settings["status"].pop())
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked and settings["ranges"] else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : start + settings["cut"]])

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "_WAIT", 0.0)
    settings = {"requests": [], "status": [], "ranges": True, "cut": len(CONTENT)}
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, settings))
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    settings["url"] = f"http://127.0.0.1:{http.server_port}/data.tar"
    yield settings
    http.shutdown()
    http.server_close()
    thread.join()


def test_downloads_once(server, tmp_path):
    archive = Archive(server["url"], MD5)
    path = fetch(archive, tmp_path / "downloads")
    assert path == tmp_path / "downloads/data.tar" and path.read_bytes() == CONTENT
    assert fetch(archive, tmp_path / "downloads") == path
    assert server["requests"] == [None]
    assert list(path.parent.iterdir()) == [path]


def test_goes_on_where_the_connection_broke(server, tmp_path):
    server["cut"] = 300_000
    path = fetch(Archive(server["url"], MD5), tmp_path)
    assert path.read_bytes() == CONTENT
    assert server["requests"] == [None, *(f"bytes={300_000 * k}-" for k in range(1, 5))]


def test_goes_on_after_an_earlier_run(server, tmp_path):
    (tmp_path / "data.tar.part").write_bytes(CONTENT[:1000])
    fetch(Archive(server["url"], MD5), tmp_path)
    assert server["requests"] == ["bytes=1000-"]
    (tmp_path / "data.tar").rename(tmp_path / "data.tar.part")  # complete but not yet checked
    assert fetch(Archive(server["url"], MD5), tmp_path).read_bytes() == CONTENT


def test_server_without_ranges_starts_over(server, tmp_path):
    server["ranges"] = False
    (tmp_path / "data.tar.part").write_bytes(b"old" * 1000)
    assert fetch(Archive(server["url"], MD5), tmp_path).read_bytes() == CONTENT


def test_gives_up_and_keeps_what_came(server, tmp_path):
    server["cut"] = 100
    with pytest.raises(ConnectionError, match=r"5 tries, 500 bytes are kept in .*data\.tar\.part"):
        fetch(Archive(server["url"], MD5), tmp_path)
    server["cut"] = len(CONTENT)
    fetch(Archive(server["url"], MD5), tmp_path)
    assert server["requests"][-1] == "bytes=500-"


def test_wrong_checksum(server, tmp_path):
    with pytest.raises(ValueError, match=f"expected the MD5 checksum 0123, got {MD5}"):
        fetch(Archive(server["url"], "0123"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_error_of_the_server(server, tmp_path):
    server["status"] = [404]
    with pytest.raises(ConnectionError, match="404 Not Found; .*--archives"):
        fetch(Archive(server["url"], MD5), tmp_path)
    assert len(server["requests"]) == 1
    server["status"] = [503, 500]
    assert fetch(Archive(server["url"], MD5), tmp_path).read_bytes() == CONTENT


def test_no_server(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_WAIT", 0.0)
    with pytest.raises(ConnectionError, match="refused.*5 tries, 0 bytes"):
        fetch(Archive("http://127.0.0.1:9/data.tar", MD5), tmp_path)


def test_full_disk_is_no_network_error(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "_continue", full)
    with pytest.raises(OSError, match="No space left"):
        fetch(Archive(server["url"], MD5), tmp_path)


def test_check(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(CONTENT)
    check(path, Archive("x/a", MD5))
    with pytest.raises(ValueError, match="download it again"):
        check(path, Archive("x/a", "1"))
