from __future__ import annotations

import importlib.util
import io
import json
import pickle
import sys
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from protoseg.data import Broken, Pair, ScenePairs, Scenes, ShardPairs, UnreadableFileError, write_shards

needs_webdataset = pytest.mark.skipif(
    importlib.util.find_spec("webdataset") is None, reason="the extra pairs is not installed"
)
workers_warn = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:This DataLoader will create")


def made(count: int) -> list[Pair]:
    """Pairs whose picture and caption say the number of their key."""
    return [Pair(f"{n:02d}", torch.full((3, 8, 8), n, dtype=torch.uint8), f"number {n}") for n in range(count)]


def name(pair: Pair) -> str:
    """The key of a pair whose three parts belong together."""
    assert (pair.image == int(pair.key)).all()
    assert pair.caption == f"number {int(pair.key)}"
    return pair.key


def place(pair: Pair) -> tuple[str, int, int]:
    return name(pair), *pair.place


def listing(items: list[Any]) -> list[Any]:
    return items


def load(stream: ShardPairs[Any], workers: int, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(stream, batch_size, num_workers=workers, collate_fn=listing, **options)


def flat(batches: Iterator[list[Any]] | DataLoader[Any]) -> list[Any]:
    return [item for batch in batches for item in batch]


def png(shade: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade,) * 3).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for member, content in files.items() if isinstance(files, dict) else files:
            entry = tarfile.TarInfo(member)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


ALL = [f"{n:02d}" for n in range(60)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """60 pairs in 6 shards; not to be changed."""
    return write_shards(made(60), tmp_path_factory.mktemp("shards"), 10)


@needs_webdataset
def test_pairs_come_back_as_they_were_written(shards: list[Path], tmp_path: Path) -> None:
    pattern = str(shards[0].parent / "pairs-{000000..000005}.tar")
    assert ShardPairs(pattern).shards == ShardPairs(shards[::-1]).shards == shards
    pairs = list(ShardPairs(pattern, shuffle=0))
    assert [name(pair) for pair in pairs] == ALL
    assert pairs[7].image.dtype == torch.uint8
    assert pairs[7].image.is_contiguous()
    (photo,) = write_shards(ScenePairs(Scenes(1, size=32)), tmp_path, ending="jpg")
    (back,) = ShardPairs(photo)
    original = ScenePairs(Scenes(1, size=32))[0]
    assert (back.key, back.caption) == (original.key, original.caption)
    assert 0 < (back.image.float() - original.image.float()).abs().mean() < 20


@needs_webdataset
@workers_warn
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2), (4, 2), (1, 8)])
def test_an_exact_epoch_has_every_sample_once(shards: list[Path], world: int, workers: int) -> None:
    streams = [ShardPairs(shards, transform=name, rank=rank, world=world, shuffle=7) for rank in range(world)]
    seen = [flat(load(stream, workers)) for stream in streams]
    assert sorted(key for each in seen for key in each) == ALL
    assert max(map(len, seen)) - min(map(len, seen)) <= 10  # as even as whole shards can be


@needs_webdataset
@workers_warn
def test_the_order_is_another_each_epoch_and_the_same_in_a_second_run(shards: list[Path]) -> None:
    runs = []
    for _ in range(2):
        stream = ShardPairs(shards, transform=name, shuffle=20, seed=3)
        loader = load(stream, 2, persistent_workers=True)  # which have to hear of the next epoch
        runs.append([])
        for epoch in range(2):
            stream.set_epoch(epoch)
            runs[-1].append(flat(loader))
    assert runs[0] == runs[1]
    assert sorted(runs[0][0]) == sorted(runs[0][1]) == ALL
    assert runs[0][0] != runs[0][1]
    plain, other = (list(ShardPairs(shards, transform=name, shuffle=20, seed=seed)) for seed in (3, 4))
    assert plain != other
    # Both levels shuffle: the order of the shards, and of the samples within and across them.
    in_shards = list(ShardPairs(shards, transform=name, shuffle=1, seed=3))
    assert [key for key in in_shards if key < "10"] == ALL[:10]
    assert in_shards != ALL
    assert [key for key in plain if key < "10"] != ALL[:10]


@needs_webdataset
@workers_warn
def test_resampled_streams_differ_by_rank_worker_and_epoch_and_repeat(shards: list[Path]) -> None:
    def stream(rank: int, epoch: int = 0, length: int | None = 31) -> ShardPairs[str]:
        return ShardPairs(
            shards, transform=place, resampled=True, length=length, shuffle=5, rank=rank, world=2, epoch=epoch
        )

    first = flat(load(stream(0), 2))
    assert flat(load(stream(0), 2)) == first
    others = [flat(load(stream(1), 2)), flat(load(stream(0, epoch=1), 2))]
    assert all(len(each) == 31 for each in (first, *others))
    assert all(other != first for other in others)
    by_worker = [[key for key, worker, _ in first if worker == each] for each in (0, 1)]
    assert [len(each) for each in by_worker] == [16, 15]
    assert by_worker[0][:15] != by_worker[1]
    assert len(stream(0)) == 31
    endless = [key for key, *_ in islice(stream(0, length=None), 200)]
    assert len(endless) == 200
    assert len(set(endless)) > 30
    with pytest.raises(TypeError, match="nobody knows the length"):
        len(ShardPairs(shards))


@needs_webdataset
def test_ranks_are_asked_of_torch_distributed_and_travel_to_workers(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = ShardPairs(shards, transform=name)
    expected = list(ShardPairs(shards, transform=name, rank=1, world=4))
    assert len(expected) == 20
    with monkeypatch.context() as group:
        group.setattr(torch.distributed, "is_initialized", lambda: True)
        group.setattr(torch.distributed, "get_rank", lambda: 1)
        group.setattr(torch.distributed, "get_world_size", lambda: 4)
        assert list(stream) == expected
        copy = pickle.dumps(stream)
    assert list(pickle.loads(copy)) == expected  # where no process group is, as in a worker that is spawned
    assert len(list(stream)) == 60


def cut(shard: Path, key: str, ending: str, *, header: int | None = None, data: int | None = None) -> None:
    """Cut a shard so many bytes into the header or the data of a file."""
    with tarfile.open(shard) as tar:
        member = tar.getmember(f"{key}.{ending}")
    size = member.offset + header if header is not None else member.offset_data + (data or 0)
    shard.write_bytes(shard.read_bytes()[:size])


def damage(shard: Path, key: str) -> None:
    with tarfile.open(shard) as tar:
        at = tar.getmember(f"{key}.png").offset
    content = bytearray(shard.read_bytes())
    content[at : at + 100] = b"\xff" * 100
    shard.write_bytes(content)


@needs_webdataset
@workers_warn
@pytest.mark.parametrize("where", ["in data", "in the caption", "between samples", "in a header", "header"])
def test_a_damaged_shard_is_named_and_its_readable_part_used(tmp_path: Path, where: str) -> None:
    shards = write_shards(made(60), tmp_path / "data", 10)
    if where == "header":
        damage(shards[2], "24")
    else:
        options: dict[str, Any] = {
            "in data": {"ending": "png", "data": 20},
            "in the caption": {"ending": "txt", "data": 3},
            "between samples": {"ending": "png", "header": 0},
            "in a header": {"ending": "txt", "header": 100},
        }[where]
        cut(shards[2], "24", **options)
    seen = flat(load(ShardPairs(shards, transform=name, report=tmp_path / "report", shuffle=7), 2))
    assert sorted(seen) == [key for key in ALL if not "24" <= key <= "29"]
    broken = Broken.read(tmp_path / "report")
    assert broken.counts == {"damaged shard": 1}
    last = "24.png" if where in ("in the caption", "in a header") else "23.txt"
    assert broken.names == {"damaged shard": [f"{shards[2]}: behind {last}"]}
    with pytest.raises(UnreadableFileError, match=rf"^{shards[2]}: behind {last}: damaged shard .*report=FOLDER"):
        list(ShardPairs(shards))


@needs_webdataset
def test_a_cut_sample_is_not_joined_to_one_of_the_next_shard(tmp_path: Path) -> None:
    for folder, shade in (("a", 1), ("b", 2)):
        write_tar(tmp_path / f"{folder}.tar", {"x.png": png(shade), "x.txt": folder.encode()})
    cut(tmp_path / "a.tar", "x", "txt", header=0)
    seen = list(ShardPairs(str(tmp_path / "{a,b}.tar"), report=tmp_path, shuffle=0))
    assert [(pair.caption, int(pair.image[0, 0, 0])) for pair in seen] == [("b", 2)]


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('unpickled')",)


@needs_webdataset
@workers_warn
def test_broken_samples_are_counted_by_reason_and_named(tmp_path: Path) -> None:
    photo = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(photo, "JPEG")
    harmful = pickle.dumps(Harmful())
    members = [
        *[("good.png", png()), ("good.txt", b" caf\xc3\xa9\n"), ("good.pyd", harmful), ("good.pickle", harmful)],
        *[("cut.jpg", photo.getvalue()[:-200]), ("cut.txt", b"cut")],
        *[("gif.png", b"GIF89a"), ("gif.txt", b"a GIF")],
        *[("latin.png", png()), ("latin.txt", "caf\u00e9".encode("latin-1"))],
        *[("half.png", png()), ("half.json", b'{"caption": "\\ud800"}')],
        *[("mute.png", png()), ("blank.png", png()), ("blank.txt", b" \n"), ("blind.txt", b"no picture")],
        *[("list.png", png()), ("list.json", b'["caption"]'), ("torn.png", png()), ("torn.json", b'{"cap')],
        *[("json.JPEG", photo.getvalue()), ("json.json", json.dumps({"caption": "from JSON", "n": 1}).encode())],
        *[("twice.png", png(1)), ("twice.png", png(2)), ("twice.txt", b"twice")],
        *[("dot.a.png", png()), ("dot.a.txt", b"the key is 'dot'")],
    ]
    shard = write_tar(tmp_path / "mixed.tar", members)
    empty = tmp_path / "empty.tar"
    empty.touch()
    stream = ShardPairs([shard, empty], report=tmp_path / "report", shuffle=3)
    for epoch in range(2):  # what is met twice counts once
        stream.set_epoch(epoch)
        seen = {pair.key: pair for pair in flat(load(stream, 2))}
        assert {key: pair.caption for key, pair in seen.items()} == {
            "good": "caf\u00e9",
            "json": "from JSON",
            "twice": "twice",
        }
        assert (seen["twice"].image == 1).all()
    broken = Broken.read(tmp_path / "report", most=2)
    assert broken.counts == {
        "broken picture": 2,
        "caption not UTF-8": 2,
        "no caption": 4,
        "no picture": 2,
        "double name": 1,
        "damaged shard": 1,
    }
    assert set(broken.names["broken picture"]) == {f"{shard}: cut", f"{shard}: gif"}
    assert broken.names["double name"] == [f"{shard}: twice.png"]
    assert len(broken.names["no caption"]) == 2
    assert str(broken).startswith("12 broken: ")
    with (tmp_path / "report" / "broken-0-0.jsonl").open("a") as file:
        file.write('{"reason": "bro')
    assert Broken.read(tmp_path / "report").counts["torn line of the report"] == 1


@needs_webdataset
@workers_warn
@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_goes_on_with_exactly_the_rest(tmp_path: Path, workers: int, resampled: bool) -> None:
    shards = write_shards(made(60), tmp_path / "data", 10)
    cut(shards[1], "14", "png", data=20)  # broken samples must not shift the count
    shards.append(write_tar(tmp_path / "bad.tar", {"90.png": b"", "90.txt": b"", "91.png": png(91)}))

    def stream(start: int | list[int], epoch: int = 5) -> ShardPairs[tuple[str, int, int]]:
        length = 50 if resampled else None
        options: dict[str, Any] = {"resampled": resampled, "length": length, "report": tmp_path / "report"}
        return ShardPairs(shards, transform=place, shuffle=7, epoch=epoch, start=start, **options)

    whole = flat(load(stream(0), workers))
    start = [0] * max(1, workers)
    seen = flat(islice(load(stream(0), workers), 5))
    assert len(seen) == 20
    for _, worker, number in seen:
        start[worker] = number
    rest = stream(start)
    after = flat(load(rest, workers))
    assert sorted(seen + after) == sorted(whole)
    for worker in range(max(1, workers)):
        assert [each for each in seen + after if each[1] == worker] == [each for each in whole if each[1] == worker]
    rest.set_epoch(6)  # start is for the first epoch only
    assert flat(load(rest, workers)) == flat(load(stream(0, epoch=6), workers))


@needs_webdataset
def test_what_is_wrong_is_said_at_construction(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pairs-000006\.tar, \S+pairs-000007\.tar: no such shard"):
        ShardPairs(str(shards[0].parent / "pairs-{000004..000007}.tar"))
    with pytest.raises(ValueError, match="expected at least one shard, got none"):
        ShardPairs([])
    with pytest.raises(ValueError, match=r"every shard may occur once, .*000000\.tar"):
        ShardPairs([*shards, shards[0]])
    with pytest.raises(ValueError, match=r"length=5 needs resampled=True"):
        ShardPairs(shards, length=5)
    for options in ({"rank": 2, "world": 2}, {"rank": 0}, {"world": 1}):
        with pytest.raises(ValueError, match=r"rank must be in 0\.\.world-1"):
            ShardPairs(shards, **options)
    for argument in ("shuffle", "seed", "epoch", "start"):
        with pytest.raises(ValueError, match=f"{argument} must be at least 0, got -1"):
            ShardPairs(shards, **{argument: -1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start has 2 entries, but the loader has 1 workers; go on with as many"):
        next(iter(ShardPairs(shards, start=[1, 1])))
    with pytest.raises(TypeError, match="seed must be an int, got float"):
        ShardPairs(shards, seed=1.0)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; give the one that ShardPairs got as report"):
        Broken.read(tmp_path / "nowhere")


@needs_webdataset
def test_a_resampled_stream_of_nothing_ends(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "bad.tar", {"a.png": b"", "a.txt": b"a"})
    with pytest.raises(RuntimeError, match="shards held nothing whole"):
        next(iter(ShardPairs(shard, resampled=True, report=tmp_path, shuffle=2)))


def test_without_webdataset_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r'reading shards needs webdataset; run pip install "protoseg\[pairs\]"'):
        ShardPairs("a.tar")


def test_writing_stops_without_half_a_shard(tmp_path: Path) -> None:
    def source() -> Iterator[Pair]:
        yield from made(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(source(), tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs-000000.tar"]
    with pytest.raises(FileExistsError, match=r"pairs-000000\.tar: a shard of this name exists"):
        write_shards(made(2), tmp_path)
    assert [path.name for path in write_shards(made(2), tmp_path, name="val")] == ["val-000000.tar"]


GREY = torch.zeros(3, 2, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([Pair("a.b", GREY, "a")], ValueError, r"a key must be new in its shard, .* got 'a\.b'"),
        ([Pair("a", GREY, "a")] * 2, ValueError, "a key must be new in its shard"),
        ([Pair("__a__/b", GREY, "a")], ValueError, "no __ in front"),
        ([Pair("a", GREY, " ")], ValueError, "a has no caption"),
        ([Pair("a", GREY.float(), "a")], TypeError, "the image of a must be uint8, got torch.float32"),
        ([Pair("a", GREY[:1], "a")], ValueError, r"must have shape \(3, H, W\), got \(1, 2, 2\)"),
        (["a"], TypeError, "expected a Pair, got str"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path: Path, pairs: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        write_shards(pairs, tmp_path)
    assert not list(tmp_path.iterdir())


def test_pairs_without_transform_can_be_batched_by_torch() -> None:
    batch = next(iter(DataLoader(ScenePairs(Scenes(2, size=32)), batch_size=2)))
    images: Tensor = batch.image
    assert images.shape == (2, 3, 32, 32)
    assert len(batch.caption) == 2
