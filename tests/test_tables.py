"""Tables and annotations as people have them: what they mean, and what is said of those that mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from protoseg.data import PictureFolder
from protoseg.data.annotations import Shape, decode_rle, draw, encode_rle, parse_xml, read_json, read_xml
from protoseg.data.names import AmbiguousNameError, PictureIndex, list_files
from protoseg.data.tables import Tags, read_numbers, read_tags, split_cell

PATHS = ["IMG 1.JPG", "dogs/äpfel (2).tif", "cats/äpfel (2).tif", "0042.png", "a.b.c.webp"]


def read(tmp_path: Path, content: str | bytes, **options: object) -> Tags:
    path = tmp_path / "tags.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_tags(path, PictureIndex(PATHS).knows, **options)  # type: ignore[arg-type]


class TestNames:
    @pytest.mark.parametrize(
        ("name", "place"),
        [
            ("IMG 1.JPG", 0),
            ("IMG 1", 0),
            ("img 1.jpeg", 0),
            (r"C:\My Photos\IMG 1.JPG", 0),
            ("./IMG 1.png", 0),
            ('"IMG 1.JPG"', 0),
            ("file:///home/me/IMG 1.JPG", 0),
            ("dogs/äpfel (2)", 1),
            ("x/cats/a\u0308pfel (2).tif", 2),
            (r"cats\ÄPFEL (2).TIF", 2),
            ("42", 3),
            ("0042", 3),
            ("a.b.c", 4),
            ("a.b", None),
            ("", None),
            ("nowhere", None),
        ],
    )
    def test_what_people_write(self, name: str, place: int | None) -> None:
        assert PictureIndex(PATHS).find(name) == place

    def test_a_name_of_two_pictures(self) -> None:
        index = PictureIndex(PATHS)
        with pytest.raises(AmbiguousNameError, match=r"'äpfel \(2\)' stands for more than one picture: dogs/.*cats/"):
            index.find("äpfel (2)")
        assert index.knows("äpfel (2)")
        assert PictureIndex(["a.jpg", "a.png", "b.jpg"]).names == ["a.jpg", "a.png", "b"]
        assert PictureIndex(["a.jpg", "a.png"]).find("a.png") == 1

    def test_hidden_folders_and_what_archives_leave_hold_no_pictures(self, tmp_path: Path) -> None:
        for name in ("a.jpg", ".thumbs/a.jpg", "__MACOSX/._a.jpg", "sub/._b.jpg", "sub/b.JPG", "c.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        assert list_files(tmp_path, (".jpg",)) == ["a.jpg", "sub/b.JPG"]


class TestTables:
    RIGHT = {"IMG 1.JPG": ("dog", "boat"), "0042.png": ("cat",)}  # noqa: RUF012

    @pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
    def test_dialects(self, delimiter: str, encoding: str, tmp_path: Path) -> None:
        between = "," if delimiter == ";" else ";"
        text = f"Bild{delimiter}Größe{delimiter}Klassen\r\nIMG 1.JPG{delimiter}9{delimiter}dog{between} boat\r\n"
        text += f"0042.png{delimiter}8{delimiter}cat\r\n"
        found = read(tmp_path, text.encode(encoding))
        assert found.rows == self.RIGHT
        assert repr(delimiter) in found.notes[0]
        assert "'Größe'" in found.notes[1]

    @pytest.mark.parametrize(
        "text",
        [
            'id,labels\nIMG 1.JPG,"dog, boat"\n0042.png,cat\n',
            "ID,Labels\nIMG 1.JPG,dog;boat\n0042.png,cat\n",
            "id,labels\nIMG 1.JPG,dog boat\n0042.png,cat\n",
            "IMG 1.JPG,dog\n0042.png,cat\nIMG 1.JPG,boat\n",
            "sep=;\nid;labels\nIMG 1.JPG;dog,boat\n0042.png;cat\n",
            "who,what,where\nme,dog|boat,IMG 1.JPG\nyou,cat,0042.png\n".replace("what", "tags"),
            "image_id,boat,cat,dog\nIMG 1.JPG,1,0,1\n0042.png,0,1,0\n",
            "image_id,boat,cat,dog\nIMG 1.JPG,x,,x\n0042.png,,x,\n",
            "path,boat,cat,dog\nIMG 1.JPG,True,False,True\n0042.png,False,True,False\n",
            "path,boat,cat,dog,cow\nIMG 1.JPG,1,-1,1,0\n0042.png,-1,1,-1,0\n",
            "filename,class,xmin\nIMG 1.JPG,dog,3\nIMG 1.JPG,boat,4\n0042.png,cat,5\n",
            "image,labels\nIMG 1.JPG,\"['dog', 'boat']\"\n0042.png,['cat']\n",
            'image,labels\nIMG 1.JPG,"[""dog"", ""boat""]"\n0042.png,"[""cat""]"\n',
            "id,labels\n\nIMG 1.JPG,dog;boat\n,\n0042.png,cat\n\n",
        ],
    )
    def test_shapes(self, text: str, tmp_path: Path) -> None:
        found = read(tmp_path, text).rows
        assert {name: sorted(tags) for name, tags in found.items()} == {
            name: sorted(tags) for name, tags in self.RIGHT.items()
        }

    def test_a_name_of_two_words_stays_one(self, tmp_path: Path) -> None:
        rows = "".join(
            f"{name},{tag}\n" for name, tag in (("0042", "traffic light"), ("IMG 1", "car"), ("a.b.c", "car"))
        )
        assert read(tmp_path, "image,tag\n" + rows).rows["0042"] == ("traffic light",)
        known = ("car", "light", "traffic light")
        text = "id,labels\n0042,traffic light car\nIMG 1,car\n"
        assert read(tmp_path, text, classes=known).rows["0042"] == ("traffic light", "car")
        assert read(tmp_path, "image,tag\n0042,dog boat\nIMG 1,dog\na.b.c,boat\n").rows["0042"] == ("dog", "boat")
        assert split_cell("a, b", ",", ["a, b"]) == ["a, b"]

    def test_columns_and_separator_can_be_said(self, tmp_path: Path) -> None:
        text = "one,two,three\n0042,IMG 1,dog/boat\n"
        found = read(tmp_path, text, id_column="TWO", tags_column="three", separator="/")
        assert found.rows == {"IMG 1": ("dog", "boat")}
        with pytest.raises(ValueError, match=r"no column 'four' as --id-column says; the columns are 'one', 'two'"):
            read(tmp_path, text, id_column="four")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "the table is empty"),
            ("id,labels,tags\n0042,a,b\n", "'labels', 'tags' may all hold the tags; say --tags-column"),
            (
                "id,height,weight\n0042,9,7\n",
                "no column for the tags could be told among 'id', 'height'.*--tags-column",
            ),
            ("first,second\nx,y\n", "no column names the pictures; the columns are 'first', 'second'; say --id-column"),
            ("id\n0042\n", "one column only, 'id'"),
            ("id,labels\n0042,dog,boat\n", r"line 2: 3 cells where the header has 2: .* into quotes"),
            ('id,labels\n0042,"dog\n', "broken CSV"),
            (b"PK\x03\x04rest", "a spreadsheet or archive, expected text; export it as CSV"),
            (b"id,labels\n\x00\x01\x02\x03\x81,\xff\n", "not a text file of UTF-8, UTF-16 or cp1252"),
        ],
    )
    def test_what_cannot_be_told(self, text: str | bytes, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=rf"tags\.csv.*{message}"):
            read(tmp_path, text)

    def test_lists_with_numbers(self, tmp_path: Path) -> None:
        path = tmp_path / "train_cls.txt"
        path.write_text("2007_000032.jpg 0 14\n2007_000039.jpg 19\n")
        names = [f"c{place}" for place in range(20)]
        found = read_numbers(path, names)
        assert found is not None
        assert found.rows == {"2007_000032.jpg": ("c0", "c14"), "2007_000039.jpg": ("c19",)}
        with pytest.raises(ValueError, match="class number 14 in '2007_000032"):
            read_numbers(path, names[:5])
        path.write_text("image\tdog\n")
        assert read_numbers(path, None) is None


class TestAnnotations:
    def test_runs_of_coco(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(50):
            inside = rng.random(tuple(rng.integers(1, 70, 2))) < rng.random()
            runs = decode_rle(encode_rle(inside))
            shape = Shape("a", (), (runs, (0, 0, inside.shape[1], inside.shape[0], True)))
            assert np.array_equal(draw([shape], ["a"], inside.shape) == 1, inside)
        # pycocotools gives this text for a square of 2 in a picture of 4 x 5.
        square = np.zeros((4, 5), bool)
        square[1:3, 1:3] = True
        assert encode_rle(square) == "52207"

    def test_runs_that_do_not_fit_are_refused(self) -> None:
        for window in ((0, 0, 3, 3, True), (0, 0, 10**6, 10**6, True)):
            with pytest.raises(ValueError, match="do not fit"):
                draw([Shape("a", (), ((0, 10), window))], ["a"], (3, 3))

    def test_a_small_object_lies_on_a_large_one(self) -> None:
        small, large = Shape("a", ((2, 2, 4, 2, 4, 4, 2, 4),)), Shape("b", ((0, 0, 9, 0, 9, 9, 0, 9),))
        for order in ([small, large], [large, small]):
            mask = draw(order, ["a", "b"], (12, 12))
            assert mask[3, 3] == 1
            assert mask[7, 7] == 2
            assert mask[11, 11] == 0
        assert draw([small], ["b"], (12, 12))[3, 3] == 255

    def test_coco_has_numbers_with_gaps_and_boxes_are_no_masks(self, tmp_path: Path) -> None:
        path = tmp_path / "instances.json"
        content = {
            "images": [{"id": 9, "file_name": "a.jpg"}, {"id": 42}, {"id": 7, "file_name": "c.jpg"}],
            "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
            "annotations": [
                {"image_id": 9, "category_id": 90, "segmentation": [[0, 0, 4, 0, 4, 4]]},
                {"image_id": 42, "category_id": 1, "bbox": [0, 0, 2, 2]},
                {"image_id": 5, "category_id": 1},
            ],
        }
        path.write_text(json.dumps(content))
        found = read_json(path)
        assert found is not None
        assert found.tags.rows == {"a.jpg": ("toothbrush",), "42": ("person",), "c.jpg": ()}
        assert found.tags.classes == ("person", "toothbrush")
        assert set(found.shapes) == {"a.jpg", "c.jpg"}
        assert "1 annotations of pictures that it does not list" in found.tags.notes[1]

    def test_cvat(self, tmp_path: Path) -> None:
        path = tmp_path / "annotations.xml"
        path.write_text(
            "<annotations><meta><task><labels><label><name>dog</name></label><label><name>cat</name></label></labels>"
            '</task></meta><image name="sub/a.png"><polygon label="cat" points="1,1;5,1;5,5"/>'
            '<mask label="dog" rle="1,3" left="2" top="1" width="2" height="2"/></image>'
            '<image name="b.png"><box label="dog" xtl="0" ytl="0" xbr="1" ybr="1"/><tag label="cat"/></image>'
            "</annotations>"
        )
        found = read_xml(path)
        assert found is not None
        assert found.tags.rows == {"sub/a.png": ("cat", "dog"), "b.png": ("dog", "cat")}
        assert found.tags.classes == ("dog", "cat")
        assert set(found.shapes) == {"sub/a.png"}
        mask = draw([found.shapes["sub/a.png"][1]], ("dog",), (4, 5))
        assert mask.tolist() == [[0] * 5, [0, 0, 0, 1, 0], [0, 0, 1, 1, 0], [0] * 5]

    def test_labelme(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        shapes = [{"label": "cat", "points": [[0, 0], [3, 0], [3, 3]], "shape_type": "polygon"}]
        path.write_text(
            json.dumps({"imagePath": "..\\old\\a.JPG", "flags": {"night": True, "day": False}, "shapes": shapes})
        )
        found = read_json(path)
        assert found is not None
        assert found.tags.rows == {"a.JPG": ("night", "cat")}

    @pytest.mark.parametrize(
        "text",
        [
            '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation><object><name>&b;</name></object></annotation>',
            '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>',
            "<!DOCTYPE annotation SYSTEM 'http://example.org/a.dtd'><annotation/>",
        ],
    )
    def test_entities_are_refused(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "a.xml"
        for encoding in ("utf-8", "utf-16"):
            path.write_bytes(text.encode(encoding))
            with pytest.raises(ValueError, match=r"a\.xml: it declares a document type"):
                parse_xml(path)

    @pytest.mark.parametrize("text", ['{"images": [{}]}', '{"images": [', "[" * 100_000, '{"shapes": [{}]}'])
    def test_broken_json_is_named(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"a\.json: (broken JSON|a field is missing)"):
            read_json(path)


class TestPictureFolder:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for name in ("a.JPG", "b.png", "sub/c d.bmp"):
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 6)).save(tmp_path / "in" / name)
        return tmp_path / "in"

    def test_spellings_empty_words_and_what_is_left(self, root: Path) -> None:
        (root / "t.csv").write_text("id;labels\na;Dog\nb;dog,Katze\nc d;background\ngone;dog\n")
        folder = PictureFolder(root)
        assert folder.classes == ("Katze", "dog") or folder.classes == ("Katze", "Dog")
        assert folder.labels.sum(1).tolist() == [1, 2, 0]
        assert folder.lost == ["gone"]
        assert any("spelled in two ways, taken as one" in note for note in folder.notes)
        assert any("taken as no tag: 'background'" in note for note in folder.notes)

    def test_stated_classes_keep_their_order_and_unknown_tags_are_told(self, root: Path) -> None:
        (root / "t.csv").write_text("id;labels\na;dog\nb;dgo\n")
        folder = PictureFolder(root, classes=["zebra", "dog"])
        assert folder.classes == ("zebra", "dog")
        assert folder.unknown == {"dgo": "dog"}
        assert folder.untagged == ["sub/c d.bmp"]

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda root: None, "no table, no annotations, and pictures outside of folders"),
            (
                lambda root: [(root / name).write_text("id,labels\na,b\n") for name in ("s.csv", "t.csv")],
                "several tables",
            ),
            (
                lambda root: (root / "t.csv").write_text("id,labels\nx,b\n"),
                "none of the 1 names of the tags is a picture",
            ),
            (lambda root: (root / "t.csv").write_text("id,labels\na,\n"), "no picture has a tag"),
        ],
    )
    def test_what_cannot_be_used(self, make: object, message: str, root: Path) -> None:
        make(root)  # type: ignore[operator]
        with pytest.raises(ValueError, match=message):
            PictureFolder(root)

    def test_missing_folders(self, tmp_path: Path, root: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match=r"no pictures in it or below; endings that are read: \.avif"):
            PictureFolder(tmp_path / "empty")
        with pytest.raises(FileNotFoundError, match="nowhere: no such folder; give the one that holds the pictures"):
            PictureFolder(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"tags\.csv: no such file or folder of tags"):
            PictureFolder(root, tmp_path / "tags.csv")

    def test_a_broken_file_among_annotations_is_collected(self, root: Path) -> None:
        shape = {"label": "dog", "points": [[0, 0], [1, 1]], "shape_type": "rectangle"}
        (root / "a.json").write_text(json.dumps({"imagePath": "a.JPG", "shapes": [shape]}))
        (root / "b.json").write_text("{")
        folder = PictureFolder(root)
        assert folder.ids == ["a"]
        assert len(folder.broken) == 1
        assert "b.json: broken JSON" in folder.broken[0]
