"""Any folder of pictures, with tags from any table or annotation, or from the names of its folders."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from protoseg.data import files
from protoseg.data.annotations import Annotations, Shape, join, read_json, read_xml
from protoseg.data.convert import read_label_file
from protoseg.data.folders import VOC_CLASSES, TaggedPictures, find_masks
from protoseg.data.images import ENDINGS
from protoseg.data.names import AmbiguousNameError, PictureIndex, list_files
from protoseg.data.tables import Tags, listed, read_numbers, read_tags
from protoseg.utils.checks import near_names

__all__ = ["PictureFolder"]

_TABLES = (".csv", ".tsv", ".tab", ".txt")
_OTHERS = (".heic", ".heif", ".eps", ".ps", ".pdf", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw", ".exr", ".ai")
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "images", "pictures", "data"}
_EMPTY = {"background", "_background_", "__background__", "bg", "none", "nothing", "nan", "null"}


class PictureFolder(TaggedPictures):
    r"""Pictures from any folder, with tags from whatever there is.

    Args:
        root: The folder; pictures of all its sub-folders count.
        tags: A table (CSV, TSV and the like, or ``cls_labels.npy``, or a list with the numbers of classes), a COCO
            ``instances*.json``, CVAT's XML, a folder of LabelMe's or VOC's files. ``None``: what of these lies in
            ``root``, else the names of the folders that the pictures lie in.
        classes: Names of the classes in the order of the masks, or a file with one a line; by default those of the
            tags, in the order of their source where it has one, else of the alphabet.
        masks: Folder of masks to score against; by default the outlines of COCO, CVAT and LabelMe, where these are the
            source of the tags.
        id_column: Header of the table's column of pictures; guessed where not given.
        tags_column: Header of the table's column of tags; guessed where not given.
        separator: What stands between the tags of a cell; guessed where not given.
        upright: Turn pictures as EXIF says, and masks alike.
        max_side: Give pictures whose longer side has more pixels smaller, with ``Sample.size``.

    Raises:
        FileNotFoundError: The folder, the tags, or every picture is missing.
        ValueError: Tags or classes cannot be read.
        UnreadableFileError: At access: a picture or mask is unreadable or of a wrong form.

    Attributes:
        ids: Paths of the pictures without ending, of those that have tags, in order.
        classes: Names of the foreground classes.
        labels: ``[N, C]`` float32.
        notes: What was understood and guessed, a sentence each.
        lost: Names that have tags and no picture.
        untagged: Pictures that the tags do not speak of; they are left out.
        ambiguous: Names in the tags that stand for more than one picture, with the reason.
        unknown: Tags that are none of the stated classes, with near ones; they are left out.
        broken: What is wrong with files of annotations that cannot be read.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 6)).save(root / "IMG 1.JPG", "JPEG")
        >>> _ = (root / "my tags.csv").write_text("Bild;Tags\nimg 1;cat, traffic light\n")
        >>> folder = PictureFolder(root)
        >>> folder.ids, folder.classes, folder[0].image.shape
        (['IMG 1'], ('cat', 'traffic light'), torch.Size([3, 6, 8]))
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        tags: str | os.PathLike[str] | None = None,
        *,
        classes: Sequence[str] | str | os.PathLike[str] | None = None,
        masks: str | os.PathLike[str] | None = None,
        id_column: str | None = None,
        tags_column: str | None = None,
        separator: str | None = None,
        upright: bool = True,
        max_side: int | None = None,
    ) -> None:
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; give the one that holds the pictures")
        if masks is not None and not Path(masks).is_dir():
            raise FileNotFoundError(f"{masks}: no such folder; give the one that holds the masks")

        # 1. The pictures; masks that lie below are none.
        paths = list_files(root, ENDINGS)
        if masks is not None and Path(masks).resolve() != root.resolve():
            inner = Path(masks).resolve()
            paths = [path for path in paths if not (root / path).resolve().is_relative_to(inner)]
        if not paths:
            raise FileNotFoundError(f"{root}: no pictures in it or below; endings that are read: {', '.join(ENDINGS)}")
        index = PictureIndex(paths)

        # 2. What the source says.
        stated, note = _stated(classes)
        columns = {"id_column": id_column, "tags_column": tags_column, "separator": separator}
        broken: list[str] = []
        found = _read(root, tags, index, stated, columns, broken)
        spelling, notes = _clean(found.tags)
        rows = {
            name: tuple(dict.fromkeys(spelling[tag] for tag in names if spelling[tag]))
            for name, names in found.tags.rows.items()
        }

        # 3. The source's names as pictures.
        present: dict[int, tuple[str, ...]] = {}
        shapes: dict[int, Sequence[Shape]] = {}
        lost: list[str] = []
        ambiguous: dict[str, str] = {}
        for name, names in rows.items():
            try:
                place = index.find(name)
            except AmbiguousNameError as error:
                ambiguous[name] = str(error)
                continue
            if place is None:
                lost.append(name)
                continue
            present[place] = tuple(dict.fromkeys((*present.get(place, ()), *names)))
            if name in found.shapes:
                shapes[place] = [each._replace(label=spelling[each.label]) for each in found.shapes[name]]
        places = sorted(present)
        if not places:
            problem = f"none of the {len(rows)} names of the tags is a picture in {root}, such as {listed([*rows])}"
            raise ValueError(f"{problem}; there is {listed(index.paths)}. Is the column of the pictures the right one?")

        # 4. Classes: those that are stated, else those that occur.
        every = {tag for names in rows.values() for tag in names}
        if stated is None:
            order = found.tags.classes or tuple(sorted(every))
            stated = tuple(name for name in order if name in every)
            if unused := [name for name in order if name not in every]:
                notes.append(f"classes of no picture, left out: {listed(unused)}")
        if not stated:
            raise ValueError(f"{root}: no picture has a tag; tag some of them")
        if len(stated) > 254:
            raise ValueError(f"{root}: {len(stated)} classes, and masks have room for 254; such as {listed(stated)}")
        unknown = {name: near_names(name, stated) for name in sorted(every - {*stated})}
        present = {place: tuple(name for name in names if name not in unknown) for place, names in present.items()}

        ids = [index.names[place] for place in places]
        mask_paths = None
        if masks is not None:
            beside = Path(masks).resolve() == root.resolve()
            mask_paths = find_masks(Path(masks), ids, pictures=[index.paths[place] for place in places], beside=beside)
        super().__init__(
            "PictureFolder",
            root,
            ids,
            [index.paths[place] for place in places],
            [present[place] for place in places],
            stated,
            mask_paths=mask_paths,
            shapes=[shapes.get(place) for place in places] if masks is None else None,
            colors=_colors(masks, stated),
            upright=upright,
            max_side=max_side,
        )
        self.lost, self.ambiguous, self.unknown, self.broken = lost, ambiguous, unknown, broken
        self.untagged = [path for place, path in enumerate(index.paths) if place not in present]
        self.notes = [*filter(None, [note]), *found.tags.notes, *notes]
        if others := Counter(Path(path).suffix.lower() for path in list_files(root, _OTHERS)):
            told = ", ".join(f"{count} {ending}" for ending, count in sorted(others.items()))
            self.notes.append(f"files that are not read: {told}; turn them into JPEG or PNG")


def _stated(classes: Sequence[str] | str | os.PathLike[str] | None) -> tuple[tuple[str, ...] | None, str]:
    """Names of the classes as they were given."""
    if classes is None:
        return None, ""
    if isinstance(classes, str | os.PathLike):
        return files.read_classes(Path(classes))
    return tuple(classes), ""


def _colors(masks: str | os.PathLike[str] | None, classes: Sequence[str]) -> Mapping[tuple[int, int, int], int] | None:
    """The table of colors that lies with the masks."""
    if masks is None:
        return None
    places = [folder / name for folder in (Path(masks), Path(masks).parent) for name in ("colors.txt", "labelmap.txt")]
    table = next((path for path in places if path.is_file()), None)
    return None if table is None else files.read_colors(table, classes)


def _read(
    root: Path,
    source: str | os.PathLike[str] | None,
    index: PictureIndex,
    classes: tuple[str, ...] | None,
    columns: Mapping[str, str | None],
    broken: list[str],
) -> Annotations:
    """Tags and outlines of a source, or of what there is."""
    if source is None:
        return _guess(root, index, classes, columns, broken)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder of tags")
    if path.is_dir():
        found = _read_many(path, list_files(path, (".json", ".xml")), broken)
        if found is None:
            raise ValueError(f"{path}: no annotations of LabelMe, VOC, CVAT or COCO in it; give the table of the tags")
        return found

    ending = path.suffix.lower()
    if ending in (".json", ".xml"):
        annotations = read_json(path) if ending == ".json" else read_xml(path)
        if annotations is None:
            raise ValueError(f"{path}: neither COCO nor LabelMe nor CVAT nor VOC; give one of these, or a table")
        return annotations
    if ending == ".npy":
        return Annotations(_pickled(path, classes), {})
    if ending == ".txt":
        numbered = read_numbers(path, classes or _voc_names(index))
        if numbered is not None:
            return Annotations(numbered, {})
    return Annotations(_table(path, index, classes, columns), {})


def _table(path: Path, index: PictureIndex, classes: tuple[str, ...] | None, columns: Mapping[str, str | None]) -> Tags:
    return read_tags(path, index.knows, classes=classes, **columns)


def _voc_names(index: PictureIndex) -> tuple[str, ...] | None:
    """VOC's classes where the pictures are VOC's by their names."""
    own = sum(re.fullmatch(r"\d{4}_\d{6}", Path(name).name) is not None for name in index.names)
    return VOC_CLASSES if own * 2 > len(index) else None


def _guess(
    root: Path,
    index: PictureIndex,
    classes: tuple[str, ...] | None,
    columns: Mapping[str, str | None],
    broken: list[str],
) -> Annotations:
    """What lies in the folder: a table, annotations, or folders that are named as the classes."""
    own = [path for path in list_files(root, (*_TABLES, ".npy")) if "/" not in path]
    tables = [path for path in own if Path(path).suffix.lower() != ".txt" and Path(path).stem != "classes"]
    if len(tables) > 1:
        raise ValueError(f"{root}: several tables, {listed(tables)}; say which one has the tags by --tags")
    if tables:
        return _read(root, root / tables[0], index, classes, columns, broken)

    annotated = _read_many(root, list_files(root, (".json", ".xml")), broken)
    if annotated is not None:
        return annotated

    below = [path.split("/")[:-1] for path in index.paths]
    if all(below):
        # As torchvision's ImageFolder has it; folders of splits before those of the classes are no classes.
        depth = 0
        while all(len(parts) > depth + 1 and parts[depth].casefold() in _SPLITS for parts in below):
            depth += 1
        tags: dict[str, tuple[str, ...]] = {
            path: (parts[depth],) for path, parts in zip(index.paths, below, strict=True)
        }
        names = {name for names in tags.values() for name in names}
        return Annotations(Tags(tags, None, (f"tags from the names of {len(names)} folders",)), {})
    raise ValueError(
        f"{root}: no table, no annotations, and pictures outside of folders that could be named as their classes; give "
        "the tags: a table with the columns id,labels, or COCO, LabelMe, CVAT or VOC files"
    )


def _read_many(root: Path, paths: Sequence[str], broken: list[str]) -> Annotations | None:
    """Annotations of all files that are some, ``None`` where there are none; what cannot be read is added to a list."""
    found = []
    for path in paths:
        read = read_json if path.lower().endswith(".json") else read_xml
        try:
            annotations = read(root / path)
        except ValueError as error:
            broken.append(str(error))
            continue
        if annotations is not None:
            found.append(annotations)
    if not any(each.tags.rows for each in found):
        return None
    joined = join(found)
    note = f"tags from {len(found)} files of annotations"
    return joined._replace(tags=joined.tags._replace(notes=(note, *joined.tags.notes)))


def _pickled(path: Path, classes: tuple[str, ...] | None) -> Tags:
    """Tags of ``cls_labels.npy``; nothing in it is executed."""
    labels = read_label_file(path)
    width = len(next(iter(labels.values()), ()))
    note = f"{path.name}: {len(labels)} pictures, {width} classes"
    if classes is None:
        classes = VOC_CLASSES if width == len(VOC_CLASSES) else tuple(f"class {place}" for place in range(1, width + 1))
        note += ", named as VOC's" if width == len(VOC_CLASSES) else ", without names; give them by --classes"
    if len(classes) != width:
        raise ValueError(f"{path}: {width} classes, and {len(classes)} are named")
    rows = {name: tuple(tag for tag, here in zip(classes, row, strict=True) if here) for name, row in labels.items()}
    return Tags(rows, classes, (note,))


def _clean(tags: Tags) -> tuple[dict[str, str], list[str]]:
    """One spelling of every tag, empty for words that say that there is nothing; and what was done."""
    times = Counter(tag for names in tags.rows.values() for tag in names)
    common: dict[str, str] = {}
    for tag, _ in sorted(times.items(), key=lambda each: (-each[1], each[0])):
        common.setdefault(tag.casefold(), tag)
    spelling = {tag: "" if tag.casefold() in _EMPTY else common[tag.casefold()] for tag in times}

    notes: list[str] = []
    if other := sorted(f"{tag} = {kept}" for tag, kept in spelling.items() if kept not in ("", tag)):
        notes.append(f"spelled in two ways, taken as one: {listed(other)}")
    if empty := sorted(tag for tag, kept in spelling.items() if not kept):
        notes.append(f"taken as no tag: {listed(empty)}")
    return spelling, notes
