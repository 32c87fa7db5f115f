"""Trained image restoration: degradations against MATLAB's rules, readers of the field's layouts, metrics, files with 16 bits and alpha, tiles."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from PIL import Image
from torch import nn

from paperzoo.data import degradations, picture_files
from paperzoo.data.degradations import Degradation, gaussian_kernel, imresize, motion_kernel
from paperzoo.data.restoration import Pictures, open_restoration, photographs
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError, UnknownName
from paperzoo.tasks.image_restoration import Config, ImageRestorationRecipe, Patches, dihedral, undo_dihedral


def sheet(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def write(path, height=24, width=30, seed=0, channels=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (sheet(height, width, channels, seed=seed) * 255).to(torch.uint8).numpy()
    Image.fromarray(pixels if channels > 1 else pixels[..., 0]).save(path)


# -- MATLAB's bicubic --------------------------------------------------------------------------------------------------


def literal_cubic(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def literal_line(values: list[float], scale: float, count: int) -> list[float]:
    """MATLAB's rule for one line, number by number."""
    result, n = [], len(values)
    shrink = min(scale, 1.0)
    for i in range(1, count + 1):
        centre = i / scale + 0.5 * (1 - 1 / scale)
        total = weights = 0.0
        for j in range(math.floor(centre - 2 / shrink) - 1, math.ceil(centre + 2 / shrink) + 2):
            k = (j - 1) % (2 * n)
            weight = literal_cubic(shrink * (centre - j))
            total, weights = total + weight * values[k if k < n else 2 * n - 1 - k], weights + weight
        result.append(total / weights)
    return result


@pytest.mark.parametrize(
    ("n", "scale"), [(12, 1 / 2), (13, 1 / 3), (16, 1 / 4), (7, 2.0), (9, 1 / 3), (5, 4.0), (11, 0.7)]
)
def test_imresize_is_matlabs_rule_number_by_number(n, scale):
    line = sheet(n).double()
    count = math.ceil(round(n * scale, 9))
    wanted = literal_line(line.tolist(), scale, count)
    found = imresize(line.expand(1, n, n), scale)[0, 0]
    assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-12)


# sin(0.5 (k + 1)) over 8 x 9 pixels in rows, k = 0 …: basicsr's imresize (utils/matlab_functions.py) of it, its first row and its sum of squares
GOLDEN = {
    1 / 2: ((4, 5), [-0.04121, 0.39439, 0.46408, 0.09283, -0.25217], 1.7005),
    1 / 3: ((3, 3), [0.05603, 0.20828, -0.03185], 0.4700),
    2.0: ((16, 18), [0.57937, 0.68682, 0.9017, 1.04257, 1.10942, 1.10632, 1.03327, 0.89921, 0.70413], 123.447),
}


@pytest.mark.parametrize("scale", GOLDEN)
def test_imresize_gives_the_numbers_of_a_published_port(scale):
    image = torch.sin(0.5 * (torch.arange(72, dtype=torch.float64) + 1)).float().reshape(1, 8, 9)
    size, row, squares = GOLDEN[scale]
    found = imresize(image, scale)
    assert found.shape == (1, *size)
    assert found[0, 0, : len(row)].tolist() == pytest.approx(row, abs=2e-5)
    assert float(found.double().square().sum()) == pytest.approx(squares, rel=1e-4)


def test_imresize_agrees_inside_with_an_antialiased_bicubic_of_another_kind():
    """Far from the border torch's filter is the same one; at the border MATLAB mirrors."""
    image = sheet(1, 3, 48, 60)
    ours = imresize(image, 0.25)
    theirs = nn.functional.interpolate(image, scale_factor=0.25, mode="bicubic", antialias=True, align_corners=False)
    assert torch.allclose(ours[..., 3:-3, 3:-3], theirs[..., 3:-3, 3:-3], atol=1e-5)
    assert not torch.allclose(ours, theirs, atol=1e-4)


def test_integer_images_are_rounded_after_each_axis():
    image = (sheet(1, 12, 12) * 255).to(torch.uint8)
    once = imresize(image.double(), size=(6, 12)).clamp(0, 255).add(0.5).floor()
    wanted = imresize(once, size=(6, 6)).clamp(0, 255).add(0.5).floor()
    found = imresize(image, 0.5)
    assert found.dtype == torch.uint8 and torch.equal(found.double(), wanted)


def test_large_pictures_are_resized_in_parts(monkeypatch):
    image = sheet(1, 20, 40)
    whole = imresize(image, 3.0)
    monkeypatch.setattr(degradations, "CHUNK", 7)
    degradations.resize_weights.cache_clear()
    assert torch.allclose(imresize(image, 3.0), whole, atol=1e-6)
    degradations.resize_weights.cache_clear()


# -- blur, noise, JPEG ---------------------------------------------------------------------------------------------------


def test_a_straight_motion_is_a_row_or_a_column():
    assert torch.allclose(motion_kernel(9, 0), torch.full((1, 9), 1 / 9, dtype=torch.float64))
    upright = motion_kernel(7, 90)
    assert torch.allclose(upright[:, upright.shape[1] // 2], torch.full((7,), 1 / 7, dtype=torch.float64), atol=1e-9)
    slanted = motion_kernel(9, 30)
    assert torch.allclose(slanted, slanted.rot90(2)) and float(slanted.sum()) == pytest.approx(1)
    assert slanted[0].argmax() > slanted[-1].argmax()  # counter-clockwise: up to the right


def test_gaussian_kernel_is_its_formula():
    kernel = gaussian_kernel(1.6)
    assert kernel.shape == (11, 11) and float(kernel.sum()) == pytest.approx(1)
    assert float(kernel[5, 6] / kernel[5, 5]) == pytest.approx(math.exp(-1 / (2 * 1.6**2)))


def test_noise_has_its_level_and_is_neither_clipped_nor_repeated():
    rng = torch.Generator().manual_seed(1)
    clean = torch.ones(1, 100, 100)
    noisy = Degradation(sigma=25.0)(clean, rng)
    assert float((noisy - clean).std() * 255) == pytest.approx(25, rel=0.03) and noisy.max() > 1
    assert not torch.equal(noisy, Degradation(sigma=25.0)(clean, rng))
    again = Degradation(sigma=25.0)(clean, torch.Generator().manual_seed(1))
    assert torch.equal(noisy, again)


def test_a_range_of_noise_is_drawn_from_it():
    levels = [
        float(Degradation(sigma=(0.0, 55.0))(torch.zeros(1, 64, 64), torch.Generator().manual_seed(s)).std() * 255)
        for s in range(30)
    ]
    assert min(levels) < 12 and 43 < max(levels) < 60


def test_jpeg_of_less_quality_is_further_away():
    clean = photographs("test")[0][1][:, :64, :64].float() / 255
    errors = [float((Degradation("jpeg", quality=q)(clean) - clean).square().mean()) for q in (10, 40, 90)]
    assert errors[0] > errors[1] > errors[2] > 0
    assert Degradation("jpeg", quality=40)(clean[:1]).shape == (1, 64, 64)


# -- patches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "degradation",
    [
        Degradation("super_resolution", factor=2),
        Degradation("super_resolution", factor=3),
        Degradation("super_resolution", factor=4, enlarge=True),
        Degradation("deblur", blur=1.2),
    ],
    ids=["x2", "x3", "x4 enlarged", "blur"],
)
def test_a_patch_is_part_of_the_degraded_whole(degradation):
    clean = (sheet(3, 120, 96) * 255).to(torch.uint8)
    whole = degradation(clean.float() / 255)
    data = Patches(Pictures([clean]), [[degradation]], 9, flip=False)
    for seed in range(6):
        torch.manual_seed(seed)
        low, high = data[0]
        assert low.shape == (3, 9, 9) and high.shape == (3, 9 * degradation.scale, 9 * degradation.scale)
        windows = whole.unfold(1, 9, 1).unfold(2, 9, 1)
        distance = (windows - low[:, None, None]).abs().amax((0, 3, 4))
        y, x = divmod(int(distance.argmin()), distance.shape[1])
        assert distance.min() < 1e-6
        s, n = degradation.scale, 9 * degradation.scale
        assert torch.allclose(high, clean[:, y * s : y * s + n, x * s : x * s + n].float() / 255)


def test_pairs_are_cut_and_turned_together():
    clean = (sheet(3, 40, 44) * 255).to(torch.uint8)
    low = clean[:, ::2, ::2].contiguous()
    data = Patches(Pictures([clean], [low], scale=2), [[Degradation("super_resolution", factor=2)]], 8)
    for seed in range(8):
        torch.manual_seed(seed)
        a, b = data[0]
        found = [torch.allclose(undo_dihedral(b, k)[:, ::2, ::2], undo_dihedral(a, k)) for k in range(8)]
        assert any(found)


def test_small_pictures_are_mirrored_up_to_a_patch():
    torch.manual_seed(0)
    clean = (sheet(3, 10, 12) * 255).to(torch.uint8)
    low, high = Patches(Pictures([clean]), [[Degradation("super_resolution", factor=2)]], 16)[0]
    assert low.shape == (3, 16, 16) and high.shape == (3, 32, 32)


def test_eight_turns_differ_and_are_undone():
    image = sheet(3, 4, 5)
    turned = [dihedral(image, k) for k in range(8)]
    assert all(torch.equal(undo_dihedral(t, k), image) for k, t in enumerate(turned))
    assert len({tuple(t.flatten().tolist()) + tuple(t.shape) for t in turned}) == 8


# -- data sets -----------------------------------------------------------------------------------------------------------


def test_embedded_photographs_share_nothing():
    train, test = photographs("train"), photographs("test")
    assert len(train) == 9 and len(test) == 6 and not {n.split("_")[0] for n in test.names} & set(train.names)
    assert all(test[i][1].shape == (3, 192, 192) for i in range(6))


def test_div2k_layout(tmp_path):
    for split, k in (("train", 1), ("valid", 801)):
        write(tmp_path / f"DIV2K_{split}_HR" / f"{k:04d}.png", 24, 36)
        for s in (2, 4):
            write(tmp_path / f"DIV2K_{split}_LR_bicubic" / f"X{s}" / f"{k:04d}x{s}.png", 24 // s, 36 // s)
    for s in (2, 4):
        train, test = (open_restoration(tmp_path, split, s) for split in ("train", "test"))
        assert train.names == ["DIV2K_train_HR/0001"] and test.names == ["DIV2K_valid_HR/0801"]
        low, high = train[0]
        assert low.shape == (3, 24 // s, 36 // s) and high.shape == (3, 24, 36)


@pytest.mark.parametrize(
    ("clean", "degraded", "scale"),
    [
        ("HR/baby.png", "LR_bicubic/X2/babyx2.png", 2),
        ("GTmod12/baby.png", "LRbicx2/baby.png", 2),
        ("image_SRF_2/img_001_SRF_2_HR.png", "image_SRF_2/img_001_SRF_2_LR.png", 2),
        ("test/GOPR0372/sharp/000047.png", "test/GOPR0372/blur/000047.png", 1),
        ("val/gt_crops/0001_s001.png", "val/input_crops/0001_s001.png", 1),
        ("0001_001_S6/GT_SRGB_010.png", "0001_001_S6/NOISY_SRGB_010.png", 1),
        ("groundtruth/box3.png", "rainy/box3.png", 1),
    ],
)
def test_layouts_of_pairs(tmp_path, clean, degraded, scale):
    write(tmp_path / clean, 24, 24)
    write(tmp_path / degraded, 24 // scale, 24 // scale)
    data = open_restoration(tmp_path, "all", scale)
    assert data.paired and len(data) == 1
    low, high = data[0]
    assert low.shape[1] * scale == high.shape[1]


def test_two_folders(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "one" / f"{name}.png")
        write(tmp_path / "two" / f"{name}.png")
    data = open_restoration(tmp_path / "one", "all", degraded=str(tmp_path / "two"))
    assert data.paired and len(data) == 2


def test_a_folder_of_clean_pictures_holds_out_one_in_five(tmp_path):
    for k in range(10):
        write(tmp_path / "deep" / f"{k}.png")
    train, test = (open_restoration(tmp_path, split) for split in ("train", "test"))
    assert len(train) == 8 and len(test) == 2 and not set(train.names) & set(test.names) and not train.paired


def test_one_picture_is_both_splits(tmp_path):
    write(tmp_path / "x.png")
    assert len(open_restoration(tmp_path / "x.png", "train")) == len(open_restoration(tmp_path / "x.png", "test")) == 1


def test_clean_pictures_a_little_larger_are_cropped_and_others_refused(tmp_path):
    write(tmp_path / "HR" / "a.png", 25, 26)
    write(tmp_path / "LR" / "a.png", 8, 8)
    low, high = open_restoration(tmp_path, "all", 3)[0]
    assert low.shape == (3, 8, 8) and high.shape == (3, 24, 24)
    with pytest.raises(DataError, match="26x25"):
        open_restoration(tmp_path, "all", 2)[0]


def test_missing_partners_and_places_are_named(tmp_path):
    write(tmp_path / "gt" / "a.png")
    write(tmp_path / "gt" / "b.png")
    write(tmp_path / "noisy" / "a.png")
    with pytest.raises(DataError, match=r"b\.png"):
        open_restoration(tmp_path, "all")
    with pytest.raises(UnknownName, match="photographs"):
        open_restoration("photograps")
    with pytest.raises(DataError, match="no such"):
        open_restoration(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        open_restoration(tmp_path / "empty")


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(DataError, match=r"x\.png"):
        open_restoration(tmp_path, "all")[0]


# -- files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bits_come_back(tmp_path, channels, kind):
    pixels = torch.from_numpy((sheet(channels, 9, 7) * 65535).numpy().astype(numpy.uint16))
    picture_files.save_pixels(tmp_path / f"x.{kind}", pixels)
    again = picture_files.read_pixels(tmp_path / f"x.{kind}")
    assert again.dtype == torch.uint16 and torch.equal(again.int(), pixels.int())


def test_other_programs_read_our_sixteen_bits(tmp_path):
    import skimage.io

    pixels = torch.from_numpy((sheet(1, 9, 7) * 65535).numpy().astype(numpy.uint16))
    picture_files.save_pixels(tmp_path / "x.png", pixels)
    assert numpy.array_equal(skimage.io.imread(tmp_path / "x.png"), pixels[0].numpy())
    with pytest.raises(PaperZooError, match="8 bits"):
        picture_files.save_pixels(tmp_path / "x.jpg", pixels)


def test_orientation_is_respected(tmp_path):
    image = Image.fromarray((sheet(6, 9, 3) * 255).to(torch.uint8).numpy())
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        image.save(tmp_path / "x.png", exif=exif)
        from PIL import ImageOps

        with Image.open(tmp_path / "x.png") as opened:
            wanted = numpy.asarray(ImageOps.exif_transpose(opened))
        found = picture_files.read_pixels(tmp_path / "x.png").permute(1, 2, 0).numpy()
        assert numpy.array_equal(found, wanted), orientation


def test_palettes_and_odd_arrays():
    grey = Image.fromarray((sheet(5, 6) * 255).to(torch.uint8).numpy())
    assert picture_files.to_pixels(grey.convert("P")).shape == (3, 5, 6)
    assert picture_files.to_pixels(grey.convert("LA")).shape == (2, 5, 6)
    assert picture_files.to_pixels(numpy.zeros((5, 6, 4), numpy.uint8)).shape == (4, 5, 6)
    assert picture_files.to_pixels(torch.rand(3, 5, 6)).dtype == torch.uint16
    with pytest.raises(PaperZooError, match=r"\[0, 1\]"):
        picture_files.to_pixels(torch.full((3, 5, 6), 7.0))
    with pytest.raises(PaperZooError, match="shape"):
        picture_files.to_pixels(numpy.zeros((5, 6, 7), numpy.uint8))


# -- the recipe ----------------------------------------------------------------------------------------------------------


class Nearest(nn.Module):
    """Enlarges by repeating, and smooths with a 3 x 3 kernel whose sum is 1: a network whose answers are known."""

    receptive_radius = 2

    def __init__(self, scale: int, channels: int) -> None:
        super().__init__()
        self.scale = scale
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="replicate", groups=channels, bias=False)
        nn.init.zeros_(self.smooth.weight)
        nn.init.ones_(self.smooth.weight[:, :, 1, 1])

    def forward(self, x):
        x = self.smooth(x)
        return x.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)


class Known(ImageRestorationRecipe):
    def build(self):
        scale = self.config.factor if self.config.model == "enlarging" else 1
        return Nearest(scale, self.config.channels)


def recipe(**changes) -> Known:
    return Known(Config(**{"model": "enlarging", "steps": 4} | changes), Runtime())


def test_psnr_is_that_of_8_bit_luminance_without_the_border():
    known = recipe(task="super_resolution", factor=2)
    clean, restored = sheet(1, 3, 40, 40), sheet(1, 3, 40, 40, seed=1)
    found = known.measure(restored, clean[..., ::2, ::2], clean)["psnr"]
    a, b = ((x[0, :, 2:-2, 2:-2].permute(1, 2, 0).double() * 255).numpy() for x in (restored, clean))
    a = numpy.rint(a)
    weights = numpy.array([65.481, 128.553, 24.966]) / 255
    error = ((a @ weights - b @ weights) ** 2).mean()
    assert found == pytest.approx(10 * math.log10(255**2 / error), abs=1e-3)


def test_psnr_of_denoising_is_over_all_channels():
    known = recipe(task="denoise")
    clean = (sheet(1, 3, 20, 20) * 255).round() / 255
    found = known.measure(clean + 10 / 255 * (clean < 0.5), clean, clean)
    share = float((clean < 0.5).float().mean())
    assert found["psnr"] == pytest.approx(10 * math.log10(255**2 / (100 * share)), abs=1e-3)


def test_evaluating_averages_pictures_and_repeats_its_noise(tmp_path):
    for k in range(3):
        write(tmp_path / f"{k}.png", 20 + 4 * k, 24, seed=k)
    known = recipe(task="denoise", test_data=str(tmp_path), sigma=10.0)
    first, second = known.evaluate(), known.evaluate()
    assert first == second and first["psnr_before"] == pytest.approx(28.13, abs=0.3)  # 20 log10(255 / 10)
    assert first["psnr_gain"] == pytest.approx(first["psnr"] - first["psnr_before"])


def test_tiles_give_the_whole_picture():
    known = recipe(task="super_resolution", factor=2, tile=32)
    known.model.smooth.weight.data.uniform_(0, 0.2)
    image = sheet(1, 3, 75, 90)
    with torch.inference_mode():
        assert torch.allclose(known.restore(image), known.model(image), atol=1e-5)
    narrow = sheet(1, 3, 9, 90)
    with torch.inference_mode():
        assert torch.allclose(known.restore(narrow), known.model(narrow), atol=1e-5)


def test_unknown_receptive_fields_are_blended():
    known = recipe(task="denoise", tile=32)
    known.model.receptive_radius = None
    image = torch.full((1, 3, 70, 50), 0.25)
    assert torch.allclose(known.restore(image), image, atol=1e-5)


def test_self_ensemble_is_the_mean_of_eight():
    known = recipe(task="super_resolution", factor=2, self_ensemble=True)
    known.model.smooth.weight.data.uniform_(0, 0.2)
    image = sheet(1, 3, 11, 8)
    with torch.inference_mode():
        wanted = 0
        for turns in range(4):
            for mirror in (False, True):
                seen = image.flip(3) if mirror else image
                found = known.model(seen.rot90(turns, (2, 3)).contiguous()).rot90(-turns, (2, 3))
                wanted = wanted + (found.flip(3) if mirror else found) / 8
        assert torch.allclose(known.restore(image), wanted, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_predictions_keep_mode_and_alpha(mode, channels):
    known = recipe(task="super_resolution", factor=2, channels=channels)
    pixels = (sheet(6, 7, len(mode)) * 255).to(torch.uint8).numpy()
    result = known.predict([Image.fromarray(pixels if len(mode) > 1 else pixels[..., 0])])[0]
    assert result.image.mode == mode and result.image.size == (14, 12) and result.bits == 8
    found = numpy.asarray(result.image).reshape(12, 14, -1)
    colours = len(mode) - (mode in ("LA", "RGBA"))
    assert numpy.array_equal(found[::2, ::2, :colours], pixels[..., :colours])
    if colours < len(mode):
        alpha = imresize(torch.from_numpy(pixels[..., -1]).double() / 255, size=(12, 14)).clamp(0, 1).mul(255).round()
        assert numpy.abs(found[..., -1] - alpha.numpy()).max() <= 1


def test_predictions_keep_sixteen_bits_in_files(tmp_path):
    known = recipe(task="denoise")
    pixels = torch.from_numpy((sheet(3, 8, 9) * 65535).numpy().astype(numpy.uint16))
    picture_files.save_pixels(tmp_path / "x.png", pixels)
    result = known.predict([str(tmp_path / "x.png")])[0]
    assert result.bits == 16 and torch.equal(result.pixels.int(), pixels.int())
    known.draw(None, result).save(str(tmp_path / "y.png"))
    assert torch.equal(picture_files.read_pixels(tmp_path / "y.png").int(), pixels.int())


def test_networks_that_keep_the_size_get_the_enlarged_picture():
    known = recipe(model="keeping", task="super_resolution", factor=3)
    result = known.predict([numpy.full((8, 9, 3), 77, numpy.uint8)])[0]
    assert result.pixels.shape == (3, 24, 27) and set(result.pixels.unique().tolist()) == {77}
    low, clean = known.test_pair(0, known.test_degradations()[0])
    assert low.shape == clean.shape


def test_a_network_of_another_scale_is_refused():
    with pytest.raises(PaperZooError, match="factor"):
        recipe(task="super_resolution", factor=1)

    class Wrong(Known):
        def build(self):
            return Nearest(4, 3)

    with pytest.raises(PaperZooError, match="enlarges 4 times"):
        Wrong(Config(task="super_resolution", factor=2), Runtime())


def test_losses_by_hand():
    clean, restored = torch.zeros(2, 1, 1, 2), torch.tensor([[[[0.1, 0.3]]], [[[0.0, 0.2]]]])
    wanted = {
        "l1": 0.15,
        "mse": 0.035,
        "charbonnier": (sum(math.sqrt(x * x + 1e-6) for x in (0.1, 0.3, 0.0, 0.2))) / 4,
        "psnr": (10 * math.log10(0.05 + 1e-8) + 10 * math.log10(0.02 + 1e-8)) / 2,
    }
    for name, value in wanted.items():
        assert float(recipe(task="denoise", loss=name).loss(restored, clean)) == pytest.approx(value, rel=1e-5)


def test_general_restoration_measures_each_kind():
    known = recipe(
        model="keeping",
        task="general",
        channels=1,
        sigma=(0.0, 55.0),
        test_sigma=25.0,
        quality=(5, 99),
        test_quality=40,
    )
    kinds = known.test_degradations()
    assert [(k.task, k.sigma, k.factor, k.quality) for k in kinds] == [
        ("denoise", 25.0, 1, 40),
        ("super_resolution", 25.0, 3, 40),
        ("jpeg", 25.0, 1, 40),
    ]
    assert [len(group) for group in known.degradations()] == [1, 3, 1]


# -- papers on it --------------------------------------------------------------------------------------------------------


def test_mdsr_draws_a_scale_for_each_batch():
    from paperzoo.papers.restoration.edsr.recipe import Config as EDSRConfig
    from paperzoo.papers.restoration.edsr.recipe import EDSRRecipe

    config = EDSRConfig(
        model="mdsr_baseline", task="super_resolution", factor=3, factors=(2, 3, 4), patch_size=8, batch_size=2, steps=9
    )
    learner, seen = EDSRRecipe(config, Runtime()), set()
    for step in range(9):
        learner.runtime.step = step
        low, high = learner.batch()
        assert low.shape == (2, 3, 8, 8)
        seen.add(high.shape[-1] // 8)
    assert seen == {2, 3, 4}
    assert learner.step((low, high))["loss"].isfinite() and learner.model.scale == 3


def test_edsr_starts_from_another_scale(tmp_path):
    from safetensors.torch import save_file

    from paperzoo.papers.restoration.edsr.model import edsr_slim
    from paperzoo.papers.restoration.edsr.recipe import PRESETS, EDSRRecipe, like

    small = edsr_slim(2)
    save_file(small.state_dict(), str(tmp_path / "x2.safetensors"))
    start = {"factor": 4, "pretrained": str(tmp_path / "x2.safetensors")}
    started = EDSRRecipe(like(PRESETS["embedded"], **start), Runtime())
    assert torch.equal(started.model.body[0].body[0].weight, small.body[0].body[0].weight)
    with pytest.raises(PaperZooError, match="does not fit"):
        EDSRRecipe(like(PRESETS["embedded"], **start | {"model": "edsr_baseline"}), Runtime())


def test_released_dncnn_files_load(tmp_path):
    import paperzoo

    state, places = {}, iter(range(0, 34, 2))
    for k, place in enumerate(places):
        shape = (1 if k == 16 else 64, 1 if k == 0 else 64, 3, 3)
        state |= {f"model.{place}.weight": torch.randn(shape) * 0.05, f"model.{place}.bias": torch.zeros(shape[0])}
    torch.save(state, tmp_path / "dncnn_25.pth")
    network = paperzoo.create("dncnn_s", weights=str(tmp_path / "dncnn_25.pth")).eval()
    x = sheet(1, 1, 12, 12)
    y = x
    for k in range(17):
        y = nn.functional.conv2d(y, state[f"model.{2 * k}.weight"], state[f"model.{2 * k}.bias"], padding=1)
        y = y.relu() if k < 16 else y
    with torch.inference_mode():
        assert torch.allclose(network(x), x - y, atol=1e-5)


# -- learning without clean pictures -----------------------------------------------------------------------------------


def test_noise2noise_gives_out_two_copies_with_noise_of_their_own():
    from paperzoo.papers.restoration.noise2noise.recipe import PRESETS, Noise2Noise

    first, second = Noise2Noise(PRESETS["embedded"], Runtime()).batch()
    # were one of them clean, or the noise the same, it would be 25 or 0
    assert float((first - second).std() * 255) == pytest.approx(25 * 2**0.5, rel=0.05)


def test_noise2noise_learns_from_two_recorded_copies(tmp_path):
    from paperzoo.papers.restoration.noise2noise.recipe import PRESETS, Noise2Noise, like

    for k in range(5):
        write(tmp_path / "one" / f"{k}.png", 48, 48, seed=k)
        write(tmp_path / "two" / f"{k}.png", 48, 48, seed=k + 9)
    config = like(
        PRESETS["embedded"], data=str(tmp_path / "one"), degraded=str(tmp_path / "two"), batch_size=2, flip=False
    )
    first, second = Noise2Noise(config, Runtime()).batch()
    assert first.shape == second.shape == (2, 1, 40, 40) and not torch.equal(first, second)


def test_noise2self_has_one_noisy_copy_of_each_picture():
    from paperzoo.papers.restoration.noise2self.recipe import PRESETS, Noise2Self

    learner = Noise2Self(PRESETS["embedded"], Runtime())
    data = learner.training_data()
    assert torch.equal(data.noisy(0), learner.training_data().noisy(0))
    clean = picture_files.with_channels(picture_files.as_float(learner.train_set[0][1]), 1)
    assert float((data.noisy(0) - clean).std() * 255) == pytest.approx(25, rel=0.02)


def test_noise2self_answers_a_pixel_without_it():
    from paperzoo.papers.restoration.noise2self.recipe import invariant

    torch.manual_seed(0)
    network = torch.nn.Conv2d(1, 1, 3, padding=1)
    images = torch.rand(1, 1, 9, 8, requires_grad=True)
    answer = invariant(network, images, 3)
    (gradient,) = torch.autograd.grad(answer[0, 0, 4, 5], images)
    assert gradient[0, 0, 4, 5] == 0 and gradient.abs().sum() > 0
