"""Multipart forms, in memory: fields and files, bounded in number; file names are not looked at."""

from __future__ import annotations

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from paperzoo.serve.limits import MOST_INPUTS, Refused

MOST_PARTS = 2 * MOST_INPUTS


class Form:
    """The parts of one form as they are read."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, bool, bytes]] = []  # name, whether it is a file, content
        self.complete = False
        self.begin()

    def finish(self) -> None:
        self.complete = True

    def begin(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.field, self.value, self.content = b"", b"", bytearray()

    def header_done(self) -> None:
        self.headers[self.field.lower()] = self.value
        self.field = self.value = b""

    def end(self) -> None:
        _, options = parse_options_header(self.headers.get(b"content-disposition", b""))
        if b"name" not in options:
            raise Refused("a part of the form has no name", 400)
        if len(self.parts) == MOST_PARTS:
            raise Refused(f"the form has more than {MOST_PARTS} parts", 413)
        name = options[b"name"].decode("utf-8", "replace")
        self.parts.append((name, b"filename" in options or b"filename*" in options, bytes(self.content)))

    def add_field(self, data: bytes, start: int, end: int) -> None:
        self.field += data[start:end]

    def add_value(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]

    def add_content(self, data: bytes, start: int, end: int) -> None:
        self.content += data[start:end]


def read_form(content: bytes, content_type: str) -> tuple[dict[str, list[bytes]], list[bytes]]:
    """Fields by name, and the files, which are all named "file".

    Raises:
        Refused: for a form that is broken, or has too many parts.
    """
    _, options = parse_options_header(content_type.encode("latin-1", "replace"))
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 200:
        raise Refused("the form's content type has no boundary", 400)
    form = Form()
    callbacks = {
        "on_part_begin": form.begin,
        "on_part_data": form.add_content,
        "on_part_end": form.end,
        "on_header_field": form.add_field,
        "on_header_value": form.add_value,
        "on_header_end": form.header_done,
        "on_end": form.finish,
    }
    try:
        parser = MultipartParser(boundary, callbacks)
        parser.write(content)
        parser.finalize()
    except FormParserError as error:
        raise Refused(f"not a readable form ({str(error)[:120]})", 400) from None
    if not form.complete:
        raise Refused("the form is cut short", 400)
    fields: dict[str, list[bytes]] = {}
    files = []
    for name, is_file, part in form.parts:
        if is_file and name != "file":
            raise Refused(f"a file is named '{name[:40]}' in the form; files are named file")
        if is_file:
            files.append(part)
        else:
            fields.setdefault(name, []).append(part)
    return fields, files
