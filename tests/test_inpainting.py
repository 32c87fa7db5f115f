"""Inpainting: masks, folders, what a user marks, and that the known is never changed."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from paperzoo.catalog.cards import papers
from paperzoo.data.holes import Holes, free_form, open_pictures, read_mask, rectangle, resized_mask, to_marked
from paperzoo.data.picture_files import read_pixels, save_pixels
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError


def seeded(number=0):
    return torch.Generator().manual_seed(number)


@pytest.fixture(scope="module")
def recipe():
    made = papers()["partial_conv_inpainting"].module("recipe")
    torch.manual_seed(0)
    config = dataclasses.replace(made.PRESETS["embedded"], image_size=32, steps=2, fine_tune_share=0.5, batch_size=2)
    return made.RECIPE(config, Runtime())


@pytest.mark.parametrize("share", [(0.05, 0.15), (0.2, 0.3), (0.4, 0.6)])
def test_holes_have_the_share_that_is_asked_for(share):
    holes = Holes("free_form", (48, 64), share)
    for i in range(10):
        known = holes(seeded(i))
        assert known.shape == (48, 64) and share[0] <= 1 - known.float().mean() <= share[1]


def test_strokes_follow_from_the_generator_alone():
    assert torch.equal(free_form((40, 30), seeded(3)), free_form((40, 30), seeded(3)))
    assert not torch.equal(free_form((40, 30), seeded(3)), free_form((40, 30), seeded(4)))


def test_a_rectangle_is_a_quarter_to_half_of_each_side():
    hole = ~rectangle((40, 80), seeded())
    rows, columns = hole.any(1).sum(), hole.any(0).sum()
    assert 10 <= rows <= 20 and 20 <= columns <= 40 and hole.sum() == rows * columns


def test_mask_files_are_white_where_the_hole_is(tmp_path):
    array = np.zeros((8, 8), np.uint8)
    array[2:4, 1:6] = 255
    Image.fromarray(array).save(tmp_path / "m.png")
    assert torch.equal(read_mask(tmp_path / "m.png"), torch.from_numpy(array) == 0)


def test_a_mask_folder_is_drawn_from(tmp_path):
    array = np.zeros((20, 30), np.uint8)
    array[:, :10] = 255
    Image.fromarray(array).save(tmp_path / "m.png")
    holes = Holes(str(tmp_path), (16, 16), (0.1, 0.9))
    assert all(0.1 <= 1 - holes(seeded(i)).float().mean() <= 0.9 for i in range(5))


def test_masks_that_never_fit_are_named(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(DataError, match="no mask left a hole of 20% to 30%"):
        Holes(str(tmp_path), (8, 8), (0.2, 0.3))(seeded())


def test_a_folder_of_masks_that_is_not_there_says_what_would_be_right(tmp_path):
    with pytest.raises(DataError, match="'free_form' and 'rectangle' draw masks"):
        Holes(str(tmp_path / "nowhere"), (8, 8))


def test_a_share_out_of_order_is_refused():
    with pytest.raises(PaperZooError, match="smaller one first"):
        Holes("free_form", (8, 8), (0.5, 0.2))


def test_a_pixel_that_is_partly_hole_is_hole():
    known = torch.ones(4, 4, dtype=torch.bool)
    known[0, 0] = False
    assert resized_mask(known, (2, 2)).tolist() == [[False, True], [True, True]]


def test_a_divided_folder_is_used_as_it_is_divided(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        (tmp_path / split / "a").mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((6, 5, 3), i, np.uint8)).save(tmp_path / split / "a" / f"{i}.png")
    assert [len(open_pictures(str(tmp_path), s)) for s in ("train", "test")] == [3, 2]
    assert open_pictures(str(tmp_path), "test")[1].shape == (3, 6, 5)


def test_of_a_plain_folder_every_tenth_is_for_testing(tmp_path):
    for i in range(11):
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path / f"{i:02d}.png")
    train, test = (open_pictures(str(tmp_path), s) for s in ("train", "test"))
    assert [int(p[0, 0, 0]) for p in test] == [0, 10] and len(train) == 9


def test_a_folder_without_pictures_is_named(tmp_path):
    with pytest.raises(DataError, match="no picture files in it"):
        open_pictures(str(tmp_path), "train")


def test_embedded_pictures_of_the_splits_differ():
    train, test = (open_pictures("photograph_parts", s) for s in ("train", "test"))
    assert train[0].shape == (3, 48, 48) and train[0].dtype == torch.uint8
    assert not (test.pictures[:, None, :, ::9, ::9] == train.pictures[None, :, :, ::9, ::9]).flatten(2).all(2).any()


def test_transparent_pixels_are_holes():
    array = np.full((5, 6, 4), 255, np.uint8)
    array[1:3, 2:4, 3] = 0
    pixels, known = to_marked(Image.fromarray(array))
    assert pixels.shape == (3, 5, 6) and (~known).sum() == 4 and not known[1, 2]


def test_a_mask_beside_a_picture_is_found(tmp_path):
    Image.fromarray(np.full((5, 6, 3), 9, np.uint8)).save(tmp_path / "cat.png")
    mask = np.zeros((5, 6), np.uint8)
    mask[0, 0] = 255
    Image.fromarray(mask).save(tmp_path / "cat_mask.png")
    assert not to_marked(tmp_path / "cat.png")[1][0, 0]


@pytest.mark.parametrize(
    ("mask", "words"),
    [(None, "nothing says what is to be filled"), ((4, 6), "its mask 4x6"), ((5, 6), "is all hole")],
)
def test_pictures_that_cannot_be_filled_are_named(mask, words):
    picture = Image.fromarray(np.zeros((5, 6, 3), np.uint8))
    value = picture if mask is None else (picture, Image.fromarray(np.full(mask, 255, np.uint8)))
    with pytest.raises(DataError, match=words):
        to_marked(value)


def test_known_pixels_and_16_bits_are_kept(recipe, tmp_path):
    pixels = torch.randint(0, 65536, (3, 21, 30), generator=seeded()).to(torch.uint16)
    save_pixels(tmp_path / "deep.png", pixels)
    mask = np.zeros((21, 30), np.uint8)
    mask[4:9, 5:20] = 255
    result = recipe.predict([(tmp_path / "deep.png", mask)])[0]
    known = torch.from_numpy(mask == 0)
    assert result.pixels.dtype == torch.uint16 and torch.equal(result.pixels.int()[:, known], pixels.int()[:, known])
    assert result.hole == pytest.approx(75 / 630)


def test_a_grey_picture_stays_grey(recipe):
    grey = np.random.default_rng(0).integers(0, 256, (16, 17), dtype=np.uint8)
    mask = np.zeros_like(grey)
    mask[:3] = 255
    assert recipe.predict([(grey, mask)])[0].image.mode == "L"


def test_what_lies_in_the_hole_is_never_read(recipe):
    rng = np.random.default_rng(0)
    picture, mask = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), np.zeros((32, 32), np.uint8)
    mask[8:20, 8:20] = 255
    other = np.where(mask[..., None] > 0, 255 - picture, picture)
    first, second = recipe.predict([(picture, mask), (other, mask)])
    assert torch.equal(first.pixels, second.pixels)


def test_every_evaluation_has_the_same_holes(recipe):
    data = recipe.prepared("test")
    assert torch.equal(data[5][1], data[5][1]) and not torch.equal(data[5][1], data[6][1])


def test_the_mean_difference_is_in_percent(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "answers", lambda split: iter([(torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.6), torch.ones(1, 1, 16, 16))]))  # fmt: skip
    metrics = recipe.evaluate()
    assert metrics["l1"] == pytest.approx(10, rel=1e-5) and metrics["psnr"] == pytest.approx(20, rel=1e-5)


def test_samples_have_their_holes_in_the_alpha(recipe, tmp_path):
    path = recipe.samples(tmp_path)[0]
    assert len(read_pixels(path)) == 4 and recipe.predict([path])[0].hole > 0.05


def test_the_second_phase_keeps_the_encoders_batch_norm(recipe):
    recipe.runtime.step = 1
    recipe.runtime.begin()
    norm = recipe.model.encoder.enc2.bn
    before = norm.running_mean.clone()
    recipe.step(recipe.batch())
    recipe.runtime.step = 0
    assert torch.equal(norm.running_mean, before) and recipe.scheduler.lr_lambdas[1](1) == 0


def test_the_feature_losses_ask_for_their_file():
    made = papers()["partial_conv_inpainting"].module("recipe")
    config = dataclasses.replace(made.PRESETS["embedded"], features="vgg16")
    with pytest.raises(PaperZooError, match="feature_weights names no file"):
        made.RECIPE(config, Runtime()).look()


def test_the_service_asks_for_transparent_holes(recipe):
    from paperzoo.serve.kinds import kind_for
    from paperzoo.serve.limits import Limits
    from paperzoo.serve.pictures import Pixels

    kind = kind_for(recipe, Limits())
    given = [kind.warm_up(), kind.from_json(kind.example(), Pixels(Limits().pixels))]
    assert kind.name == "picture with transparent holes"
    assert all(0 < found.hole < 0.2 for found in recipe.predict(given))
