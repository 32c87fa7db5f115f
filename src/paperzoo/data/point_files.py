"""Files of points and meshes: OFF, PLY (text, binary of both byte orders), XYZ/TXT/CSV/PTS columns, NPY.

    read_cloud("chair.ply")              the points with whatever stands beside them: normals, colours, labels
    read_cloud("chair.off", 2048)        a mesh: points drawn evenly from its surface, with the faces' normals

All readers work on whole arrays. A file that is broken, cut short or empty raises a `DataError` of one line that names it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from paperzoo.data.arrays import cached_arrays
from paperzoo.errors import DataError

TEXT = (".xyz", ".txt", ".csv", ".pts", ".asc")
SUFFIXES = (".off", ".ply", ".npy", *TEXT)
SURFACE_POINTS = 10_000  # drawn from a mesh where no number is asked for, as the resampled ModelNet40 has

# PLY's names of types, old and new, as numpy knows them
TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
LABELS = ("label", "class", "classification", "scalar_label", "scalar_classification", "segment")


@dataclass(frozen=True)
class Cloud:
    """Points float32 (N, 3); beside them, or None: unit normals float32 (N, 3), colours float32 (N, 3) in [0, 1], labels int64 (N,)."""

    points: Tensor
    normals: Tensor | None = None
    colours: Tensor | None = None
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.points)

    def take(self, rows: Tensor) -> Cloud:
        """Some of the points."""
        return Cloud(*(None if v is None else v[rows] for v in (getattr(self, f.name) for f in fields(self))))


@dataclass(frozen=True)
class Mesh:
    """Vertices float64 (V, 3) and triangles int64 (F, 3); faces with more corners have been cut into triangles."""

    vertices: np.ndarray
    triangles: np.ndarray


def read_cloud(path: str | Path, count: int | None = None, columns: str | None = None) -> Cloud:
    """The points of a file, by its suffix.

    Args:
        count: how many points to draw from a mesh (default 10,000), by a rule that depends on the file's name alone; they are
            kept in the cache. Files of points are read whole.
        columns: what stands in each column of a file without names, for example "xyznnnl": x, y, z, n normal, c colour (0 to 1, or
            0 to 255), l label, . to skip. None: told from their number and values, see `meaning`.

    Raises:
        DataError: for what is missing, broken or empty, and for suffixes that are not known.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(path, f"not a file of points; {', '.join(SUFFIXES)} are known")
    if not path.is_file():
        raise DataError(path, "no such file" if not path.exists() else "this is a folder; a file of points is needed")
    if suffix == ".off":
        return from_mesh(path, count, read_off)
    if suffix == ".ply":
        found = read_ply(path)
        return from_mesh(path, count, lambda _: found) if isinstance(found, Mesh) else found
    return to_cloud(read_npy(path) if suffix == ".npy" else read_columns(path), path, columns)


# -- columns -------------------------------------------------------------------------------------------------------------


def numbers(text: str, path: Path, what: str) -> np.ndarray:
    """All numbers of a text, float64; separated by blanks, commas or semicolons."""
    words = text.replace(",", " ").replace(";", " ").split()
    try:
        return np.array(words, dtype=np.float64)
    except ValueError as error:
        raise DataError(path, f"{what}: not a number ({str(error)[:80]})") from None


def read_columns(path: Path) -> np.ndarray:
    """A text of numbers, a point a line: float64 (N, columns). Lines that begin with # or // and one line of names are passed over."""
    lines = [
        line for line in read_text(path).splitlines() if line.strip() and not line.lstrip().startswith(("#", "//"))
    ]
    if lines and re.search(r"[a-df-zA-DF-Z]", lines[0]):  # letters but e, as in 1e-3
        lines = lines[1:]
    if (
        len(lines) > 1 and len(lines[0].split()) == 1 and lines[0].strip().isdigit()
    ):  # .pts files may say how many follow
        lines = lines[1:]
    if not lines:
        raise DataError(path, "holds no points")
    try:
        return np.loadtxt([line.replace(",", " ").replace(";", " ") for line in lines], comments=None, ndmin=2)
    except ValueError as error:
        raise DataError(path, f"not a table of numbers, or cut short: {str(error)[:120]}") from None


def read_npy(path: Path) -> np.ndarray:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(path, f"not a readable .npy file ({str(error)[:100]})") from None
    if values.ndim != 2 or values.dtype.kind not in "fiu" or not len(values):
        raise DataError(path, f"an array of points is (N, 3 or more) numbers, not {values.shape} of {values.dtype}")
    return values


def meaning(values: np.ndarray) -> str:
    """What the columns of unnamed points are: 3 xyz, 4 xyz and label, 6 xyz and normals or colours, 7 with a label, 9 both, 10 all.

    Three columns are normals where they have length 1, colours where not.
    """
    width = values.shape[1]
    if width == 5 or width == 8 or width > 10:
        return "xyz" + "." * (width - 3)
    label = "l" if width in (4, 7, 10) else ""
    if width in (6, 7):
        unit = np.abs(np.linalg.norm(values[:, 3:6].astype(np.float64), axis=1) - 1) < 0.02
        return ("xyznnn" if unit.mean() > 0.9 else "xyzccc") + label
    return {3: "xyz", 4: "xyz", 9: "xyznnnccc", 10: "xyznnnccc"}.get(width, "xyz") + label


def to_cloud(values: np.ndarray, path: Path, columns: str | None) -> Cloud:
    if values.shape[1] < 3:
        raise DataError(path, f"has {values.shape[1]} columns; at least x, y and z are needed")
    columns = columns or meaning(values)
    if len(columns) != values.shape[1]:
        raise DataError(path, f"has {values.shape[1]} columns; {len(columns)} were expected ({columns})")
    found = {letter: values[:, [i for i, c in enumerate(columns) if c == letter]] for letter in set(columns)}
    points = np.concatenate([found[axis] for axis in "xyz"], 1)
    labels = found["l"][:, 0] if "l" in found else None
    return checked(path, points, found.get("n"), found.get("c"), labels)


def checked(path: Path, points, normals=None, colours=None, labels=None) -> Cloud:
    """A cloud from arrays.

    Raises:
        DataError: if there are no points, some are not finite, or labels are not whole numbers.
    """
    if not len(points):
        raise DataError(path, "holds no points")
    bad = ~np.isfinite(points).all(1)
    if bad.any():
        raise DataError(
            path, f"point {int(bad.argmax()) + 1} is not finite ({int(bad.sum())} of {len(points)} are not)"
        )
    if labels is not None and not (np.isfinite(labels).all() and (labels == np.round(labels)).all()):
        raise DataError(path, "its labels are not whole numbers")
    if colours is not None and np.asarray(colours).max() > 1:
        colours = np.asarray(colours, np.float32) / 255
    tensors = [
        None if v is None else torch.from_numpy(np.ascontiguousarray(v, np.float32)) for v in (points, normals, colours)
    ]
    return Cloud(*tensors, None if labels is None else torch.from_numpy(np.ascontiguousarray(labels, np.int64)))


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="strict")
    except UnicodeDecodeError:
        raise DataError(path, "is not a text file, as its suffix says") from None
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})") from None


# -- meshes --------------------------------------------------------------------------------------------------------------


def read_off(path: Path) -> Mesh | Cloud:
    """An OFF file: header, counts, vertices, faces. A file without faces is a cloud.

    Some files of ModelNet40 have header and counts in one line, "OFF490 518 0". COFF and NOFF files have more columns.
    """
    lines = [line for line in read_text(path).splitlines() if line.strip() and not line.lstrip().startswith("#")]
    header = re.match(r"\s*(ST)?C?N?4?n?OFF", lines[0] if lines else "")
    if not header:
        raise DataError(path, "does not begin with OFF")
    rest = lines[0][header.end() :].split("#")[0].strip()
    lines = ([rest] if rest else []) + lines[1:]
    counts = lines[0].split()[:2] if lines else []
    if len(counts) < 2 or not all(word.isdigit() for word in counts):
        raise DataError(path, "has no line with the numbers of vertices and faces after OFF")
    vertex_count, face_count = map(int, counts)
    if not vertex_count:
        raise DataError(path, "holds no points: its header says 0 vertices")
    if len(lines) < 1 + vertex_count + face_count:
        said = f"{vertex_count} vertices and {face_count} faces"
        raise DataError(path, f"is cut short: its header says {said}, {len(lines) - 1} lines follow")
    vertices = numbers("\n".join(lines[1 : 1 + vertex_count]), path, "a vertex")
    if len(vertices) % vertex_count or len(vertices) < 3 * vertex_count:
        raise DataError(path, "its vertices have not three coordinates each")
    vertices = vertices.reshape(vertex_count, -1)[:, :3]
    if not face_count:
        return checked(path, vertices)
    return Mesh(vertices, face_lines(lines[1 + vertex_count : 1 + vertex_count + face_count], path, vertex_count))


def face_lines(lines: list[str], path: Path, vertices: int) -> np.ndarray:
    """Lines "n i_1 … i_n", perhaps with colours after, as triangles (F, 3)."""
    values = numbers("\n".join(lines), path, "a face")
    if len(values) == 4 * len(lines) and (values[::4] == 3).all():  # all of them triangles
        return within(values.reshape(-1, 4)[:, 1:].astype(np.int64), path, vertices)
    rows = [line.split() for line in lines]
    corners = np.array([int(float(row[0])) for row in rows])
    short = np.array([len(row) - 1 for row in rows]) < corners
    if short.any() or (corners < 1).any():
        raise DataError(path, f"face {int((short | (corners < 1)).argmax()) + 1} has fewer corners than it says")
    polygons = [np.array([rows[i][1 : n + 1] for i in np.flatnonzero(corners == n)], float) for n in np.unique(corners)]
    return fans(polygons, path, vertices)


def fans(polygons: list[np.ndarray], path: Path, vertices: int) -> np.ndarray:
    """Polygons, grouped by their number of corners (F, n), cut into triangles around their first corners; edges are left out."""
    triangles = [
        np.stack([np.broadcast_to(p[:, :1], p[:, 2:].shape), p[:, 1:-1], p[:, 2:]], 2).reshape(-1, 3).astype(np.int64)
        for p in polygons
        if p.shape[1] > 2
    ]
    if not triangles:
        raise DataError(path, "has no face with three corners")
    return within(np.concatenate(triangles), path, vertices)


def within(triangles: np.ndarray, path: Path, vertices: int) -> np.ndarray:
    if triangles.size and (triangles.min() < 0 or triangles.max() >= vertices):
        raise DataError(path, f"a face names vertex {int(triangles.max())}; there are {vertices}, counted from 0")
    return triangles


def sample_surface(mesh: Mesh, count: int, seed: int, path: object = "mesh") -> tuple[np.ndarray, np.ndarray]:
    """Points drawn evenly from a surface, and the normals of their faces: float32 (count, 3) each.

    A triangle is drawn by its area, a place on it by two uniform numbers, folded into it by a square root.

    Raises:
        DataError: if the surface has no area or a vertex is not finite.
    """
    corners = mesh.vertices[mesh.triangles]
    across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(across, axis=1)
    if not np.isfinite(area).all():
        raise DataError(path, "a vertex is not finite")
    if area.sum() <= 0:
        raise DataError(path, "its surface has no area")
    rng = np.random.default_rng(seed)
    face = np.searchsorted(np.cumsum(area) / area.sum(), rng.random(count), side="right").clip(max=len(area) - 1)
    root, share = np.sqrt(rng.random((count, 1))), rng.random((count, 1))
    a, b, c = (corners[face, k] for k in range(3))
    points = (1 - root) * a + root * (1 - share) * b + root * share * c
    normals = across[face] / np.maximum(area[face], 1e-300)[:, None]
    return points.astype(np.float32), normals.astype(np.float32)


def from_mesh(path: Path, count: int | None, read: Callable[[Path], Mesh | Cloud]) -> Cloud:
    """The surface of a mesh as points, from the cache where they were drawn before."""
    count, status = count or SURFACE_POINTS, path.stat()
    key = hashlib.blake2b(f"{path.resolve()}/{status.st_mtime_ns}/{status.st_size}/{count}".encode(), digest_size=12)
    seed = int.from_bytes(hashlib.blake2b(path.name.encode(), digest_size=6).digest(), "little")

    def make() -> dict[str, np.ndarray]:
        found = read(path)
        if isinstance(found, Cloud):
            return {"points": found.points.numpy()}
        points, normals = sample_surface(found, count, seed, path)
        return {"points": points, "normals": normals}

    stored = cached_arrays(f"clouds/{key.hexdigest()}", make)
    return checked(path, stored["points"], stored.get("normals"))


# -- PLY -----------------------------------------------------------------------------------------------------------------


@dataclass
class Element:
    """One element of a PLY header: its properties as (name, type, type of the length if it is a list, else None)."""

    name: str
    count: int
    properties: list[tuple[str, str, str | None]]


def read_ply(path: Path) -> Mesh | Cloud:
    """A PLY file: a mesh where it has faces, else a cloud with normals, colours and labels where it has them.

    Text, and binary in both byte orders; elements in any order, lists of any length.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})") from None
    form, elements, start = ply_header(data, path)
    if form == "ascii":
        tables = ply_text(data[start:].decode("utf-8", "replace"), elements, path)
    else:
        tables = ply_binary(data[start:], elements, "<" if form == "binary_little_endian" else ">", path)
    vertex = {name.lower(): values for name, values in tables.get("vertex", {}).items()}
    if not all(axis in vertex for axis in "xyz"):
        raise DataError(path, "has no vertices with x, y and z")
    points = columns_of(vertex, "x", "y", "z")
    faces = next((v for k, v in tables.get("face", {}).items() if k in ("vertex_indices", "vertex_index")), None)
    if faces:
        return Mesh(points.astype(np.float64), fans(faces, path, len(points)))
    colours = columns_of(vertex, "red", "green", "blue")
    if colours is not None and colours.dtype.kind in "iu":
        colours = colours.astype(np.float32) / np.iinfo(colours.dtype).max
    labels = next((vertex[name] for name in LABELS if name in vertex), None)
    return checked(path, points, columns_of(vertex, "nx", "ny", "nz"), colours, labels)


def columns_of(table: dict[str, np.ndarray], *names: str) -> np.ndarray | None:
    return np.stack([table[n] for n in names], 1) if all(n in table for n in names) else None


def ply_header(data: bytes, path: Path) -> tuple[str, list[Element], int]:
    end = re.search(rb"\nend_header[ \t]*\r?\n", data[:65536])
    if not data.startswith(b"ply") or not end:
        raise DataError(path, "is no PLY file: it does not begin with ply, or has no end_header")
    form, elements = "", []
    for line in data[: end.start()].decode("latin-1").splitlines()[1:]:
        words = line.split()
        try:
            if words[:1] == ["format"]:
                form = words[1]
            elif words[:1] == ["element"]:
                elements.append(Element(words[1], int(words[2]), []))
            elif words[:2] == ["property", "list"]:
                elements[-1].properties.append((words[4], TYPES[words[3]], TYPES[words[2]]))
            elif words[:1] == ["property"]:
                elements[-1].properties.append((words[2], TYPES[words[1]], None))
        except (IndexError, KeyError, ValueError):
            raise DataError(path, f"its header has a line that is not understood: {line.strip()[:80]}") from None
    if form not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise DataError(path, f"its format is '{form}'; ascii, binary_little_endian or binary_big_endian is needed")
    return form, elements, end.end()


def ply_text(text: str, elements: list[Element], path: Path) -> dict:
    lines, tables, at = [line for line in text.splitlines() if line.strip()], {}, 0
    for element in elements:
        rows = lines[at : at + element.count]
        at += element.count
        if len(rows) < element.count:
            raise DataError(
                path, f"is cut short: {element.count} x {element.name} are announced, {len(rows)} are there"
            )
        if any(length for _, _, length in element.properties):
            tables[element.name] = listed_text([row.split() for row in rows], element, path)
            continue
        values = numbers("\n".join(rows), path, f"a {element.name}")
        if len(values) != element.count * len(element.properties):
            raise DataError(path, f"its rows of {element.name} have not {len(element.properties)} numbers each")
        values = values.reshape(element.count, -1)
        tables[element.name] = {n: values[:, i].astype(t) for i, (n, t, _) in enumerate(element.properties)}
    return tables


def listed_text(rows: list[list[str]], element: Element, path: Path) -> dict[str, list[np.ndarray]]:
    """An element with lists, as text: for each list the rows grouped by length, [(rows, n), …]; other properties are passed over."""
    found: dict[str, list[np.ndarray]] = {}
    at = np.zeros(len(rows), int)
    try:
        for name, kind, length in element.properties:
            if length is None:
                at = at + 1
                continue
            sizes = np.array([int(row[i]) for row, i in zip(rows, at, strict=True)], int)
            groups = []
            for n in np.unique(sizes):
                chosen = np.flatnonzero(sizes == n)
                groups.append(np.array([rows[i][at[i] + 1 : at[i] + 1 + n] for i in chosen], float).astype(kind))
            found[name] = groups
            at = at + 1 + sizes
    except (IndexError, ValueError):
        raise DataError(path, f"a row of {element.name} is not as its header says") from None
    return found


def ply_binary(data: bytes, elements: list[Element], order: str, path: Path) -> dict:
    tables, at = {}, 0
    try:
        for element in elements:
            if not any(length for _, _, length in element.properties):
                kind = np.dtype([(n, order + t) for n, t, _ in element.properties])
                values = np.frombuffer(data, kind, element.count, at) if element.count else np.empty(0, kind)
                tables[element.name] = {n: values[n].astype(t) for n, t, _ in element.properties}
                at += kind.itemsize * element.count
            else:
                tables[element.name], at = listed_binary(data, element, order, at)
    except (ValueError, IndexError):
        raise DataError(path, f"is cut short: {element.count} x {element.name} are announced") from None
    return tables


def listed_binary(data: bytes, element: Element, order: str, at: int) -> tuple[dict[str, list[np.ndarray]], int]:
    """An element with lists, in binary. Almost always all lists have one length, and the rows are one array; else row by row."""
    if not element.count:
        return {}, at
    kind = np.dtype(row_type(data, element, order, at))
    if at + kind.itemsize * element.count <= len(data):
        values = np.frombuffer(data, kind, element.count, at)
        lists = [n for n, _, length in element.properties if length]
        if all((values[f"length of {n}"] == values[n].shape[1]).all() for n in lists):
            return {
                n: [values[n].astype(values[n].dtype.newbyteorder("="))] for n in lists
            }, at + kind.itemsize * element.count
    rows: dict[tuple[str, int], list[np.ndarray]] = {}
    for _ in range(element.count):
        kind = np.dtype(row_type(data, element, order, at))
        row = np.frombuffer(data, kind, 1, at)[0]
        at += kind.itemsize
        for n, t, length in element.properties:
            if length:
                rows.setdefault((n, len(row[n])), []).append(row[n].astype(t))
    found: dict[str, list[np.ndarray]] = {}
    for (name, _), group in rows.items():
        found.setdefault(name, []).append(np.stack(group))
    return found, at


def row_type(data: bytes, element: Element, order: str, at: int) -> list[tuple]:
    """The fields of the row that begins at a byte; the lengths of its lists are read from it."""
    parts: list[tuple] = []
    for name, kind, length in element.properties:
        if length is None:
            parts.append((name, order + kind))
            continue
        here = at + np.dtype(parts).itemsize if parts else at
        size = int(np.frombuffer(data, order + length, 1, here)[0])
        parts += [(f"length of {name}", order + length), (name, order + kind, (size,))]
    return parts


def write_ply(path: Path, cloud: Cloud) -> None:
    """A cloud as a binary PLY file, with what it has of normals, colours and labels."""
    names = ["x", "y", "z"]
    parts = [cloud.points.numpy()]
    if cloud.normals is not None:
        names, parts = [*names, "nx", "ny", "nz"], [*parts, cloud.normals.numpy()]
    kinds = [(n, "<f4") for n in names]
    if cloud.colours is not None:
        kinds += [(n, "u1") for n in ("red", "green", "blue")]
        parts.append((cloud.colours.numpy() * 255).round())
    if cloud.labels is not None:
        kinds.append(("label", "<i4"))
        parts.append(cloud.labels.numpy()[:, None])
    table = np.concatenate(parts, 1)
    rows = np.empty(len(table), kinds)
    words = {"<f4": "float", "u1": "uchar", "<i4": "int"}
    for i, (name, _) in enumerate(kinds):
        rows[name] = table[:, i]
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}"]
    lines += [f"property {words[kind]} {name}" for name, kind in kinds]
    path.write_bytes("\n".join([*lines, "end_header", ""]).encode() + rows.tobytes())
