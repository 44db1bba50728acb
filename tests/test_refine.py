"""Pixel-adaptive refinement against a loop over pixels, and the plug for others."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from protoseg.functional import load_refiner, pixel_adaptive_refine


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def refine_by_loop(maps: Tensor, image: Tensor, iterations: int, dilations: list[int], sharpness: float) -> Tensor:
    """One picture, one pixel at a time, in double precision, from the docstring's equation."""
    channels, height, width = maps.shape
    pixels, current = image.double().tolist(), maps.double().tolist()
    largest = max(abs(value) for color in pixels for row in color for value in row)
    weights: dict[tuple[int, int], list[tuple[int, int, float]]] = {}
    for y in range(height):
        for x in range(width):
            around = [
                (min(max(y + dy * d, 0), height - 1), min(max(x + dx * d, 0), width - 1))
                for d in dilations
                for dy in (-1, 0, 1)
                for dx in (-1, 0, 1)
                if (dy, dx) != (0, 0)
            ]
            logits = [0.0] * len(around)
            for color in pixels:
                values = [color[v][u] for v, u in around]
                mean = sum(values) / len(values)
                deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
                deviation = max(deviation, 1e-4 * max(largest, 1e-8))
                for index, value in enumerate(values):
                    logits[index] -= sharpness / 3 * abs(color[y][x] - value) / deviation
            exponentials = [math.exp(logit - max(logits)) for logit in logits]
            weights[y, x] = [
                (v, u, each / sum(exponentials)) for (v, u), each in zip(around, exponentials, strict=True)
            ]
    for _ in range(iterations):
        current = [
            [
                [sum(weight * current[c][v][u] for v, u, weight in weights[y, x]) for x in range(width)]
                for y in range(height)
            ]
            for c in range(channels)
        ]
    return torch.tensor(current)


@pytest.mark.parametrize(
    ("size", "iterations", "dilations", "sharpness"),
    [
        ((5, 6), 1, [1], 10.0),
        ((5, 6), 3, [1, 2], 2.0),
        ((4, 5), 2, [2, 1, 4], 10.0),
        ((3, 4), 2, [1, 8], 5.0),  # a dilation larger than the picture: all of its neighbors are the edge
        ((1, 7), 2, [1, 3], 10.0),
        ((1, 1), 2, [1, 2], 10.0),
    ],
)
def test_it_is_the_loop_s(size: tuple[int, int], iterations: int, dilations: list[int], sharpness: float) -> None:
    maps, images = torch.rand(2, 3, *size), torch.rand(2, 3, *size)
    images[1] *= 200  # the pictures' ranges do not matter to each other
    out = pixel_adaptive_refine(maps, images, iterations=iterations, dilations=dilations, sharpness=sharpness)
    for index in range(2):
        want = refine_by_loop(maps[index], images[index], iterations, dilations, sharpness)
        torch.testing.assert_close(out[index], want.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0, 90, 255])
def test_in_a_constant_picture_all_neighbors_weigh_the_same(value: int) -> None:
    maps = torch.rand(1, 1, 6, 6)
    images = torch.full((1, 3, 6, 6), value, dtype=torch.uint8)
    out = pixel_adaptive_refine(maps, images, iterations=1, dilations=(1,))
    around = [(y, x) for y in (1, 2, 3) for x in (2, 3, 4) if (y, x) != (2, 3)]
    assert float(out[0, 0, 2, 3]) == pytest.approx(sum(float(maps[0, 0, y, x]) for y, x in around) / 8, abs=1e-6)


def test_one_pixel_stays() -> None:
    maps = torch.tensor([0.3, 0.7]).view(1, 2, 1, 1)
    torch.testing.assert_close(pixel_adaptive_refine(maps, torch.zeros(1, 3, 1, 1)), maps)


def test_no_round_changes_nothing() -> None:
    maps = torch.rand(1, 2, 4, 4)
    assert torch.equal(pixel_adaptive_refine(maps, torch.rand(1, 3, 4, 4), iterations=0), maps)


def test_range_and_sum_over_channels_are_kept() -> None:
    maps = torch.rand(2, 4, 17, 23).softmax(1)
    images = torch.randint(0, 256, (2, 3, 17, 23), dtype=torch.uint8)
    out = pixel_adaptive_refine(maps, images)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.sum(1), torch.ones(2, 17, 23))
    for before, after in zip(maps.transpose(0, 1), out.transpose(0, 1), strict=True):
        assert before.min() - 1e-5 <= after.min() <= after.max() <= before.max() + 1e-5


def test_a_map_grows_to_the_edge_of_its_color_and_not_over_it() -> None:
    images = torch.zeros(1, 3, 16, 16)
    images[..., 8:] = 255
    images += torch.rand(1, 3, 16, 16) * 20
    maps = torch.zeros(1, 1, 16, 16)
    maps[..., 4:12, :4] = 1
    out = pixel_adaptive_refine(maps, images)[0, 0]
    assert out[:, 4:8].mean() > 5 * out[:, 8:].mean()
    assert out[:, 4:8].mean() > 0.1


def test_a_picture_does_not_change_another_one_s_maps() -> None:
    maps, images = torch.rand(2, 1, 5, 5), torch.rand(2, 3, 5, 5)
    images[0] *= 1e-3
    images[1] *= 1e5
    both = pixel_adaptive_refine(maps, images, dilations=(1,))
    alone = pixel_adaptive_refine(maps[:1], images[:1], dilations=(1,))
    torch.testing.assert_close(both[:1], alone)


def test_brightness_scale_does_not_matter() -> None:
    maps, images = torch.rand(1, 1, 6, 6), torch.rand(1, 3, 6, 6)
    torch.testing.assert_close(pixel_adaptive_refine(maps, images), pixel_adaptive_refine(maps, images * 255))


def test_no_gradient_and_inputs_untouched() -> None:
    maps, images = torch.rand(1, 1, 4, 4, requires_grad=True), torch.rand(1, 3, 4, 4)
    before = maps.detach().clone(), images.clone()
    assert not pixel_adaptive_refine(maps, images).requires_grad
    assert torch.equal(maps, before[0])
    assert torch.equal(images, before[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": -1}, r"iterations must be at least 0 .* got -1"),
        ({"dilations": ()}, r"dilations numbers of at least 1, got 10 and \(\)"),
        ({"dilations": (1, 0)}, r"dilations numbers of at least 1, got 10 and \(1, 0\)"),
        ({"sharpness": 0.0}, r"sharpness must be above 0, got 0.0"),
    ],
)
def test_options_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"pixel_adaptive_refine: .*{message}"):
        pixel_adaptive_refine(torch.rand(1, 1, 4, 4), torch.rand(1, 3, 4, 4), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (2, 3, 4, 4), (1, 1, 4, 4), (3, 4, 4)])
def test_maps_and_pictures_must_have_one_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must have shape \(1, 3, 4, 4\), got .*; resize the maps"):
        pixel_adaptive_refine(torch.rand(1, 2, 4, 4), torch.rand(shape))


def test_maps_must_have_four_axes() -> None:
    with pytest.raises(ValueError, match=r"maps must have shape \(B, C, H, W\), got \(2, 4, 4\)"):
        pixel_adaptive_refine(torch.rand(2, 4, 4), torch.rand(1, 3, 4, 4))


# load_refiner


def test_the_names_that_are_known() -> None:
    assert load_refiner("pamr") is pixel_adaptive_refine
    assert load_refiner("none") is None


def test_one_of_the_user_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_refiner.py").write_text("SHARPNESS = 3\ndef halve(maps, images):\n    return maps / 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_refiner", raising=False)
    refiner = load_refiner("own_refiner:halve")
    assert refiner is not None
    assert refiner(torch.ones(1), torch.ones(1)).item() == 0.5
    with pytest.raises(ValueError, match="'own_refiner:SHARPNESS' must be callable, got int"):
        load_refiner("own_refiner:SHARPNESS")
    with pytest.raises(ValueError, match=r"'own_refiner:double' cannot be imported; .*no attribute 'double'"):
        load_refiner("own_refiner:double")


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(
        ValueError, match="cannot be imported; No module named 'no_such_crf'; is its folder on PYTHONPATH"
    ):
        load_refiner("no_such_crf:refine")


@pytest.mark.parametrize("name", ["crf", "", ":", "module:", ":function"])
def test_names_of_another_form(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'package.module:function', got '{name}'"):
        load_refiner(name)


@pytest.mark.parametrize("size", [(150, 211), (64, 300), (301, 97)])
@pytest.mark.parametrize("tile", [70, 101])
def test_tiles_give_the_same_to_the_last_bit(size: tuple[int, int], tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.rand(2, 3, *size)
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    images[:, :, :40, :40] = 7  # of one color, where the deviation has its floor
    whole = pixel_adaptive_refine(maps, images, iterations=3, dilations=(1, 2, 4))
    monkeypatch.setattr("protoseg.functional.refinement._TILE", tile)
    assert torch.equal(pixel_adaptive_refine(maps, images, iterations=3, dilations=(1, 2, 4)), whole)


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory in other units")
def test_memory_does_not_grow_with_the_picture() -> None:
    """Above pictures and maps; in a process of its own, as the most that this one held is known only."""
    code = (
        "import resource, sys, torch\n"
        "from protoseg.functional import pixel_adaptive_refine\n"
        "maps, images = torch.rand(1, 2, 1500, 2000), torch.randint(0, 256, (1, 3, 1500, 2000), dtype=torch.uint8)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10\n"
        "before = peak()\n"
        "result = pixel_adaptive_refine(maps, images, iterations=1)\n"
        "print(peak() - before - result.nbytes / 2**20)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 300
