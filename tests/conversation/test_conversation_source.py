"""Where media come from: paths, URLs of every kind, bytes; and addresses that are up to no good."""

from __future__ import annotations

import base64
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conversation_files import picture
from PIL import Image

from lowvram.conversation import download, source
from lowvram.conversation.image import load_image
from lowvram.conversation.source import locate
from lowvram.errors import MediaError

ARRAY = picture(20, 30)


def png() -> bytes:
    out = io.BytesIO()
    Image.fromarray(ARRAY).save(out, "PNG")
    return out.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """A small web with a picture, some traps, and a count of visits."""

    visits: list[str]

    def do_GET(self) -> None:
        self.visits.append(self.path)
        where = {
            "/to-file": "file:///etc/hostname",
            "/to-ftp": "ftp://127.0.0.1/x",
            "/to-picture": "/picture.png",
            "/loop": "/loop",
        }.get(self.path)
        if where:
            self.send_response(302)
            self.send_header("Location", where)
            self.end_headers()
        elif self.path.startswith("/picture.png"):
            self.reply(png())
        elif self.path == "/promise":
            self.reply(png(), promised=1 << 40)
        elif self.path == "/short":
            self.reply(png(), promised=10_000)
        elif self.path == "/endless":
            self.reply(b"x" * 200_000, promised=None)
        else:
            self.send_error(404)

    def reply(self, body: bytes, promised: int | None = -1) -> None:
        self.send_response(200)
        if promised is not None:
            self.send_header("Content-Length", str(len(body) if promised < 0 else promised))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Handler.visits = []
    download._opener.cache_clear()
    download._shelf.cache_clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    download._shelf.cache_clear()


def pixels(value: object) -> np.ndarray:
    return np.asarray(load_image(value)[1])


def test_every_way_to_name_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a picture %20.png"
    path.write_bytes(png())
    encoded = base64.b64encode(png()).decode()
    for value in (
        str(path),
        path,
        path.as_uri(),
        png(),
        bytearray(png()),
        f"data:image/png;base64,{encoded}",
        f"data:;base64,{encoded[:20]}\n{encoded[20:]}",
    ):
        np.testing.assert_array_equal(pixels(value), ARRAY)


def test_a_file_from_the_web_is_fetched_once(web: str) -> None:
    for _ in range(3):
        np.testing.assert_array_equal(pixels(f"{web}/picture.png"), ARRAY)
    assert Handler.visits == ["/picture.png"]
    np.testing.assert_array_equal(pixels(f"{web}/to-picture"), ARRAY)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/none", "says 404"),
        ("/to-file", "says 302 .*not allowed"),
        ("/to-ftp", "unknown url type: ftp"),
        ("/loop", "says 302 .*infinite loop"),
        ("/promise", "larger than the 1024 MiB"),
        ("/short", "cannot be fetched|bytes came"),
    ],
)
def test_a_fetch_that_fails_is_one_clear_line(path: str, said: str, web: str) -> None:
    with pytest.raises(MediaError, match=said) as caught:
        locate(f"{web}{path}#secret")
    assert path in str(caught.value) and "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_reply_without_length_is_cut_off_at_the_bound(
    web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_BYTES", 100_000)
    with pytest.raises(MediaError, match="larger than"):
        locate(f"{web}/endless")
    assert not list(download._shelf()._folder.iterdir())


def test_a_slow_reply_is_given_up(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TOTAL_SECONDS", -1.0)
    with pytest.raises(MediaError, match="took over"):
        locate(f"{web}/picture.png")


def test_fetched_files_make_room_for_others(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "KEPT_BYTES", int(len(png()) * 2.5))
    for i in (1, 2, 3):
        locate(f"{web}/picture.png?{i}")
    assert len(list(download._shelf()._folder.iterdir())) == 2
    locate(f"{web}/picture.png?1")
    assert Handler.visits == [f"/picture.png?{i}" for i in (1, 2, 3, 1)]


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(MediaError, match="cannot be fetched"):
        locate("http://127.0.0.1:9/x.png")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("ftp://host/x.png", "ftp is not read"),
        ("file://elsewhere/x.png", "names the machine 'elsewhere'"),
        ("file:///no/such", "no such file"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,@@@@", "not base64"),
        ("data:image/png;base64,", "empty"),
        ("/no/such/file.png", "no such file"),
        ("/dev/zero", "not a regular file"),
        ("/", "a folder"),
        ("nul\0byte", "cannot be read"),
        ("two\nlines.png", "two?lines.png: no such file"),
        (None, "given as NoneType"),
    ],
)
def test_what_leads_nowhere_is_one_clear_line(value: object, said: str) -> None:
    with pytest.raises(MediaError) as caught:
        locate(value)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_data_url_beyond_the_bound_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_BYTES", 1000)
    with pytest.raises(MediaError, match="larger than"):
        locate("data:;base64," + "A" * 2000)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "locked.png"
    path.write_bytes(png())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    with pytest.raises(MediaError, match=r"locked.png: cannot be read \(Permission denied\)"):
        locate(path)


def test_passwords_and_queries_are_not_shown() -> None:
    shown = download.shown_url("https://me:secret@host/a.png?token=secret#secret")
    assert shown == "https://host/a.png"
