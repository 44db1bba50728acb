"""Tags from the tables that people have: what is guessed is noted, and can be said instead."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from protoseg.utils.checks import near_names

__all__ = ["Tags", "listed", "merge", "read_numbers", "read_tags", "read_text", "split_cell"]

_IDS = {
    *("id", "image", "imageid", "imagename", "imagepath", "img", "imgid", "filename", "file", "filepath", "name"),
    *("path", "picture", "photo", "foto", "bild", "datei", "dateiname", "key", "uri", "url", "fname"),
}
_TAGS = {
    *("labels", "label", "tags", "tag", "classes", "class", "classname", "categories", "category", "keywords"),
    *("keyword", "objects", "object", "klasse", "klassen", "kategorie", "kategorien", "schlagworte", "species"),
}
_DELIMITERS = (",", ";", "\t", "|")
_WITHIN = (";", "|", ",", "\t")  # what may stand between the tags of a cell
_YES, _NO = {"1", "1.0", "true", "yes", "x", "ja", "y"}, {"0", "0.0", "-1", "-1.0", "", "false", "no", "nein", "n"}
_SHOWN = 5  # names in a message before "and n more"


class Tags(NamedTuple):
    """What a source says of pictures.

    Attributes:
        rows: Names of the classes by the picture's name as the source writes it.
        classes: The order of the classes, where the source has one.
        notes: What was understood or guessed, a sentence each.
    """

    rows: dict[str, tuple[str, ...]]
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def merge(rows: dict[str, tuple[str, ...]], name: str, tags: Sequence[str]) -> None:
    """Add tags to a picture's, none twice."""
    rows[name] = tuple(dict.fromkeys((*rows.get(name, ()), *tags)))


def read_text(path: Path) -> tuple[str, str]:
    """Read a text file of UTF-8, UTF-16 or cp1252, and name the encoding.

    Raises:
        ValueError: It is no text.
    """
    content = path.read_bytes()
    if content[:4] == b"PK\x03\x04":
        raise ValueError(f"{path}: a spreadsheet or archive, expected text; export it as CSV")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encodings = ["utf-16"]
    elif b"\0" in content:  # UTF-16 without its mark: every other byte of plain letters is zero
        shares = {"utf-16-be": content[0:400:2], "utf-16-le": content[1:400:2]}
        encodings = [encoding for encoding, half in shares.items() if half.count(0) > len(half) / 2]
    else:
        encodings = ["utf-8-sig", "cp1252"]
    for encoding in encodings:
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return unicodedata.normalize("NFC", text), encoding.removesuffix("-sig")
    raise ValueError(f"{path}: not a text file of UTF-8, UTF-16 or cp1252; save it as UTF-8")


def read_tags(
    path: Path,
    knows: Callable[[str], bool],
    *,
    classes: Sequence[str] | None = None,
    id_column: str | None = None,
    tags_column: str | None = None,
    separator: str | None = None,
) -> Tags:
    r"""Read a table: several tags in a cell, a row for each tag, or a column for each class.

    Args:
        path: CSV, TSV or the like, in UTF-8, UTF-16 or cp1252.
        knows: Whether a cell names a picture; tells columns and headers apart.
        classes: Names that are known; a name with spaces among them is one tag.
        id_column: Header of the pictures' names; guessed where not given.
        tags_column: Header of the tags; guessed where not given.
        separator: What stands between the tags of a cell; guessed where not given.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is empty, broken, or its columns cannot be told.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "tags.csv"
        >>> _ = path.write_text("Bild;Tags\na.JPG;dog, boat\nb.JPG;cat\n")
        >>> read_tags(path, lambda name: True).rows
        {'a.JPG': ('dog', 'boat'), 'b.JPG': ('cat',)}
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a table of tags")
    text, encoding = read_text(path)
    rows, delimiter, lines = _rows(path, text)
    header = [cell.strip() for cell in rows[0]]
    names = [re.sub(r"[^a-z]", "", cell.casefold()) for cell in header]

    # A first line that names a picture is no header; neither is one that no other line resembles.
    headless = id_column is None and tags_column is None and any(knows(cell) for cell in header if cell)
    headless = headless and not {*names} & (_IDS | _TAGS)
    if headless:
        header, names = [f"column {place}" for place in range(1, len(header) + 1)], [""] * len(header)
    body, lines = (rows, lines) if headless else (rows[1:], lines[1:])
    width = len(header)
    for row, line in zip(body, lines, strict=True):
        # A delimiter at the end of a line is no cell; anything more is a comma that nobody quoted.
        if len(row) > width and any(cell.strip() for cell in row[width:]):
            raise ValueError(
                f"{path}, line {line}: {len(row)} cells where the header has {width}: {row}; put a cell with "
                f"{delimiter!r} in it into quotes"
            )

    ids = _id_column(path, header, names, body, knows, id_column)
    columns = [place for place in range(width) if place != ids]
    label = _tags_column(path, header, names, columns, tags_column)
    hot = [] if label is not None else _hot_columns(body, columns)
    if label is None and not hot:
        label = _only_column(path, header, body, columns)

    found: dict[str, tuple[str, ...]] = {}
    notes = [f"{path.name}: {encoding}, {delimiter!r} between cells, pictures in {header[ids]!r}"]
    cells = [(_cell(row, ids), row) for row in body]
    cells = [(name, row) for name, row in cells if name]
    doubles = len(cells) - len({name for name, _ in cells})
    if label is None:
        for name, row in cells:
            merge(found, name, [header[place] for place in hot if _cell(row, place).lower() in _YES])
        notes[0] += f", a column for each of {len(hot)} classes ({listed([header[place] for place in hot])})"
        order: tuple[str, ...] | None = tuple(header[place] for place in hot)
    else:
        between = _separator([_cell(row, label) for _, row in cells], classes, separator, header)
        for name, row in cells:
            merge(found, name, split_cell(_cell(row, label), between, classes))
        notes[0] += f", tags in {header[label]!r}"
        if between != "":
            notes[0] += f" with {between!r} between them"
        order = None
        if left := [header[place] for place in columns if place != label and header[place]]:
            notes.append(f"{path.name}: columns that were not read: {listed(left)}")
    if doubles:
        notes.append(f"{path.name}: {doubles} further rows of pictures that have one already; their tags are joined")
    return Tags(found, order, tuple(notes))


def _rows(path: Path, text: str) -> tuple[list[list[str]], str, list[int]]:
    """Rows of a table that are not empty, what stands between their cells, and the lines that they end in."""
    first, _, rest = text.partition("\n")
    stated = re.fullmatch(r"sep=(.)\s*", first.strip(), re.IGNORECASE)  # as Excel writes it
    if stated:
        text = rest
    head = text[:100_000]
    best = (0.0, 0, "")
    for place, delimiter in enumerate(_DELIMITERS):
        try:
            sample = [row for row in csv.reader(io.StringIO(head), delimiter=delimiter) if any(map(str.strip, row))]
        except csv.Error:
            continue
        if len(head) < len(text):
            sample = sample[:-1]
        if sample and len(sample[0]) > 1:
            even = sum(len(row) == len(sample[0]) for row in sample) / len(sample)
            best = max(best, (even, -place, delimiter))
    delimiter = stated[1] if stated else best[2] or ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, lines = [], []
    try:
        for row in reader:
            if any(map(str.strip, row)):
                rows.append(row)
                lines.append(reader.line_num + bool(stated))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: broken CSV ({error}); write the file again") from error
    if not rows:
        raise ValueError(f"{path}: the table is empty; write a header such as id,labels and a line for each picture")
    return rows, delimiter, lines


def _cell(row: Sequence[str], place: int) -> str:
    return row[place].strip() if place < len(row) else ""


def _named(path: Path, header: list[str], name: str, flag: str) -> int:
    if name in header:
        return header.index(name)
    folded = [cell.casefold() for cell in header]
    if name.casefold() in folded:
        return folded.index(name.casefold())
    near = near_names(name, header) or listed(header)
    raise ValueError(f"{path}: no column {name!r} as {flag} says; the columns are {near}")


def _id_column(
    path: Path,
    header: list[str],
    names: list[str],
    body: list[list[str]],
    knows: Callable[[str], bool],
    given: str | None,
) -> int:
    if given is not None:
        return _named(path, header, given, "--id-column")
    # Where there are pictures, they tell; the name of the column decides between equals, then the order.
    sample = body[:: max(1, len(body) // 200)]
    hits = [sum(knows(_cell(row, place)) for row in sample) for place in range(len(header))]
    # A tag can be called as a picture is, but not where its column is called so.
    likely = [place for place in range(len(header)) if names[place] not in _TAGS] or [*range(len(header))]
    ranked = max(likely, key=lambda place: (hits[place], names[place] in _IDS, -place))
    if hits[ranked] or names[ranked] in _IDS or not body:
        return ranked
    raise ValueError(
        f"{path}: no column names the pictures; the columns are {listed(header)}; say --id-column NAME, and see that "
        "its cells are names of files"
    )


def _tags_column(path: Path, header: list[str], names: list[str], columns: list[int], given: str | None) -> int | None:
    if given is not None:
        return _named(path, header, given, "--tags-column")
    likely = [place for place in columns if names[place] in _TAGS]
    if len(likely) > 1:
        raise ValueError(
            f"{path}: {listed([header[place] for place in likely])} may all hold the tags; say --tags-column NAME"
        )
    return likely[0] if likely else None


def _hot_columns(body: list[list[str]], columns: list[int]) -> list[int]:
    """Columns of nothing but yes and no; empty where no cell says yes."""
    values = {place: {_cell(row, place).lower() for row in body} for place in columns}
    hot = [place for place in columns if values[place] <= _YES | _NO and values[place] != {""}]
    return hot if any(values[place] & _YES for place in hot) else []


def _only_column(path: Path, header: list[str], body: list[list[str]], columns: list[int]) -> int:
    full = [place for place in columns if any(_cell(row, place) for row in body)]
    if len(full) == 1 or (len(columns) == 1 and not full):
        return (full or columns)[0]
    raise ValueError(
        f"{path}: no column for the tags could be told among {listed(header)}; say --tags-column NAME"
        if columns
        else f"{path}: one column only, {header[0]!r}; expected one for the pictures and one for the tags"
    )


def _separator(
    cells: list[str],
    classes: Sequence[str] | None,
    given: str | None,
    header: list[str],
) -> str:
    """What stands between the tags of a cell: one of a few signs, spaces, or nothing."""
    if given is not None:
        return given
    cells = [cell for cell in cells if cell]
    for sign in _WITHIN:
        if any(sign in cell for cell in cells if cell not in (classes or ())):
            return sign
    spaced = [cell for cell in cells if " " in cell and cell not in (classes or ())]
    if not spaced:
        return ""
    if classes is not None or header == ["id", "labels"]:
        return " "
    # "traffic light" or "dog boat"? Words that are put together freely are fewer than what is made of them.
    words = {word for cell in cells for word in cell.split()}
    return " " if len(words) < len({*cells}) else ""


def split_cell(cell: str, separator: str, classes: Sequence[str] | None = None) -> list[str]:
    """Names in a cell.

    Args:
        cell: Such as ``"dog; boat"``, or a list as Python or JSON writes it.
        separator: What stands between names: a sign, ``" "`` for spaces, or ``""`` where a cell is one name.
        classes: Known names; of words with spaces between them the longest known name is taken.

    Example:
        >>> split_cell("traffic light car", " ", ["car", "traffic light"])
        ['traffic light', 'car']
        >>> split_cell("['dog', 'boat']", ",")
        ['dog', 'boat']
    """
    cell = cell.strip()
    if classes is not None and cell in classes:
        return [cell]
    if cell[:1] + cell[-1:] in ("[]", "()", "{}"):
        try:
            listed = json.loads(cell)
        except ValueError:
            listed = None
        if isinstance(listed, list):
            return [str(each).strip() for each in listed if str(each).strip()]
        cell = cell[1:-1]
    if separator == "":
        return [cell] if cell else []
    if separator != " ":
        parts = [part.strip().strip("\"'").strip() for part in cell.split(separator)]
        return [part for part in parts if part]

    words = cell.split()
    found = []
    while words:
        length = next(
            (size for size in range(len(words), 1, -1) if " ".join(words[:size]) in (classes or ())),
            1,
        )
        found.append(" ".join(words[:length]))
        words = words[length:]
    return found


def read_numbers(path: Path, classes: Sequence[str] | None) -> Tags | None:
    """Read a list of names with the numbers of their classes, such as ``2007_000032.jpg 0 14``; ``None`` if it is none.

    Args:
        path: A text file.
        classes: Names of the classes by number, from 0.

    Raises:
        ValueError: A number stands for no class.
    """
    text, encoding = read_text(path)
    rows: dict[str, tuple[str, ...]] = {}
    highest = 0
    for line in filter(None, map(str.strip, text.splitlines())):
        matched = re.fullmatch(r"(.*?\S)((?:\s+\d{1,3})+)", line)
        if matched is None:
            return None
        numbers = [int(each) for each in matched[2].split()]
        highest = max(highest, *numbers)
        if classes is not None and highest >= len(classes):
            raise ValueError(f"{path}: class number {highest} in {line!r}, and there are {len(classes)} classes from 0")
        merge(rows, matched[1], [str(each) if classes is None else classes[each] for each in numbers])
    if not rows:
        return None
    order = tuple(map(str, range(highest + 1))) if classes is None else tuple(classes)
    return Tags(rows, order, (f"{path.name}: {encoding}, names with the numbers of their classes, from 0",))


def listed(names: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
