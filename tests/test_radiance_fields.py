"""Radiance fields: sampling along rays, rendering, the recipe, published weights."""

from __future__ import annotations

import io
import json
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from paperzoo.blocks import rays as ray_block
from paperzoo.blocks import volume_rendering
from paperzoo.data.cameras import read_poses
from paperzoo.data.rendered_scenes import rendered_objects
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.papers.three_d.nerf import model as nerf
from paperzoo.tasks.radiance_fields import (
    Config,
    Pixels,
    RadianceFieldRecipe,
    RenderedViews,
    perceptual_distance,
    smaller,
)

FAST = {"samples": 4, "fine_samples": 4, "width": 8}
SMALL = Config(model="nerf_tiny", model_arguments=FAST, steps=2, batch_size=8)


def ring_of_pictures(root, count=9, size=12, centre=(5.0, -2.0, 1.0)):
    """A folder with one transforms.json; returns the poses."""
    poses, up = [], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    for k in range(count):
        angle = 2 * math.pi * k / count
        away = torch.tensor([3 * math.cos(angle), 3 * math.sin(angle), 1.0], dtype=torch.float64)
        poses.append(ray_block.looking(away, up, torch.tensor(centre, dtype=torch.float64) + away))
        pixels = np.random.default_rng(k).integers(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{k}.png")
    frames = [
        {"file_path": f"{k}.png", "transform_matrix": [*p.tolist(), [0.0, 0.0, 0.0, 1.0]]} for k, p in enumerate(poses)
    ]
    (root / "transforms.json").write_text(json.dumps({"fl_x": 10.0, "w": size, "h": size, "frames": frames}))
    return poses


# -- sampling along rays -------------------------------------------------------------------------------------------------


def test_smaller_cameras_see_the_same_field():
    camera = rendered_objects("test", 16, 1).cameras
    small = smaller(camera, 4)
    assert small.sizes.tolist() == [[4, 4]]
    corner = camera.directions(torch.tensor([0]), torch.tensor([-0.5]), torch.tensor([-0.5]))
    assert torch.allclose(small.directions(torch.tensor([0]), torch.tensor([-0.5]), torch.tensor([-0.5])), corner)


def test_stratified_depths_stay_in_their_strata():
    torch.manual_seed(0)
    near, far = torch.full((50, 1), 2.0), torch.full((50, 1), 6.0)
    even, drawn = (volume_rendering.stratified(near, far, 9, jitter) for jitter in (False, True))
    assert torch.allclose(even[0], torch.linspace(2, 6, 9))
    assert bool(((drawn - even).abs() <= 0.25 + 1e-6).all()) and drawn.std(0).min() > 0.05
    inverse = volume_rendering.stratified(near, far, 5, in_disparity=True)
    assert torch.allclose((1 / inverse).diff(dim=1), torch.full((50, 4), (1 / 6 - 1 / 2) / 4), atol=1e-6)


def test_importance_samples_go_where_the_weight_is():
    depths = torch.linspace(0, 10, 11)[None]
    weights = torch.zeros(1, 11)
    weights[0, 4] = 1.0  # between the middles 3.5 and 4.5
    found = volume_rendering.importance_samples(depths, weights, 64)
    assert ((found > 3.45) & (found < 4.55)).float().mean() > 0.95
    assert bool((found.diff(dim=1) >= 0).all())
    empty = volume_rendering.importance_samples(depths, torch.zeros(1, 11), 10)
    assert torch.allclose(empty, torch.linspace(0.5, 9.5, 10)[None], atol=1e-4)


def test_counting_and_searching_give_the_same_samples(monkeypatch):
    torch.manual_seed(0)
    edges, weights, places = torch.rand(5, 9).cumsum(1), torch.rand(5, 8), torch.rand(5, 20)
    searched = volume_rendering.invert_cdf(edges, weights, places)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.equal(volume_rendering.invert_cdf(edges, weights, places), searched)


def test_a_wall_hides_what_is_behind_it():
    density = torch.tensor([[0.0, 0.0, 1e6, 5.0]])
    weights = volume_rendering.ray_weights(density, torch.full((1, 4), 0.1))
    assert torch.allclose(weights, torch.tensor([[0.0, 0.0, 1.0, 0.0]]))
    colour, depth, opacity = volume_rendering.composite(
        weights, torch.eye(4)[None, :, :3], torch.tensor([[1.0, 2, 3, 4]])
    )
    assert colour.tolist() == [[0, 0, 1]] and depth.item() == 3 and opacity.item() == 1
    nothing = volume_rendering.ray_weights(torch.zeros(1, 4), torch.full((1, 4), 1e10))
    white, _, opacity = volume_rendering.composite(
        nothing, torch.zeros(1, 4, 3), torch.ones(1, 4), white_background=True
    )
    assert white.tolist() == [[1, 1, 1]] and opacity.item() == 0


# -- the recipe ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe():
    torch.manual_seed(0)
    return RadianceFieldRecipe(SMALL, Runtime())


def test_pixels_and_rays_belong_together():
    views = rendered_objects("train", 12, 3)
    pixels = Pixels(views, 2.0, 6.0, torch.device("cpu"))
    for share in (1.0, 0.5):
        rays, values = pixels.drawn(64, torch.Generator().manual_seed(0), share)
        for ray, value in zip(rays[:8], values.T[:8], strict=True):
            row = int((views.cameras.poses[:, :, 3] - ray[:3]).norm(dim=1).argmin())
            every = views.cameras.all_rays(row, 2.0, 6.0)
            place = int((every - ray).abs().sum(1).argmin())
            assert torch.allclose(every[place], ray, atol=1e-6)
            assert torch.equal(views.images[row].flatten(1)[:, place], value)
            line, column = divmod(place, 12)
            assert share == 1.0 or (3 <= line < 9 and 3 <= column < 9)


def test_a_batch_is_a_function_of_the_step(recipe):
    recipe.runtime.step = 3
    first, second = recipe.batch(), recipe.batch()
    assert torch.equal(first["rays"], second["rays"]) and first["rays"].shape == (8, 12)
    assert first["colours"].shape == (8, 3) and 0 <= first["colours"].min() and first["colours"].max() <= 1
    recipe.runtime.step = 4
    assert not torch.equal(recipe.batch()["rays"], first["rays"])
    recipe.runtime.step = 0


def test_the_loss_is_that_of_both_stages(recipe):
    batch = {"colours": torch.zeros(2, 3)}
    output = {"colours": torch.stack([torch.full((2, 3), 0.5), torch.full((2, 3), 0.1)])}
    assert recipe.loss(output, batch).item() == pytest.approx(0.25 + 0.01)


def test_the_learning_rate_falls_to_its_end():
    recipe = RadianceFieldRecipe(SMALL, Runtime())
    factor = recipe.scheduler.lr_lambdas[0]
    assert factor(0) == 1 and factor(1) == pytest.approx(0.1**0.5) and factor(2) == pytest.approx(0.1)


def test_rendering_in_chunks_gives_the_same(recipe):
    cameras = smaller(recipe.test_views.cameras[:2], 9)
    whole_picture = recipe.render(cameras)
    object.__setattr__(recipe, "config", Config(**{**vars(SMALL), "chunk": 7}))
    parts = recipe.render(cameras)
    recipe.config = SMALL
    assert whole_picture.images.shape == (2, 3, 9, 9) and whole_picture.images.dtype == torch.uint8
    assert torch.equal(parts.images, whole_picture.images) and torch.allclose(
        parts.opacity, whole_picture.opacity, atol=1e-6
    )


def test_metrics_are_those_of_the_pictures(recipe):
    found = recipe.evaluate()
    views = recipe.test_views
    values = []
    for i in range(len(views)):
        rendered = recipe.render(views.cameras[i : i + 1]).images.float() / 255
        values.append(-10 * math.log10(float((rendered[0] - views.picture(i, True)).square().mean())))
    assert found["psnr"] == pytest.approx(np.mean(values), abs=1e-3) and -1 <= found["ssim"] <= 1


def test_a_perfect_scene_renders_its_pictures(recipe, monkeypatch):
    """A network that casts its rays into the true objects: rays, their order and the metric fit together."""
    from paperzoo.data.rendered_scenes import look

    class Truth(torch.nn.Module):
        def forward(self, rays):
            colour, opacity, depth = look(rays[:, :3], rays[:, 3:6])
            depth = depth.nan_to_num(posinf=0.0)
            return torch.cat([colour + 1 - opacity[:, None], depth[:, None], opacity[:, None]], 1)

    monkeypatch.setattr(type(recipe), "deployed", property(lambda self: Truth()))
    assert recipe.evaluate()["psnr"] > 23  # one ray a pixel where the pictures took four
    view = recipe.render(recipe.test_views.cameras[:1])
    assert view.depth[view.opacity > 0.5].min() > 2 and view.depth[0, 0, 0] == 0


def test_predict_renders_a_file_of_cameras_a_pose_and_a_film(recipe, tmp_path):
    inputs = recipe.samples(tmp_path)
    assert [i.endswith(".json") for i in inputs] == [True] * 3 + [False]
    by_file, film = recipe.predict([inputs[0], "orbit:3"])
    assert (by_file.views, by_file.height, by_file.width) == (1, 40, 40) and film.views == 3
    pose = read_poses(tmp_path / "view_000.json")[0]
    assert torch.allclose(pose.float(), recipe.test_views.cameras.poses[0], atol=1e-6)
    by_pose = recipe.predict([pose.numpy()])[0]
    assert (by_pose.images.int() - by_file.images.int()).abs().max() <= 1
    truth = recipe.render(recipe.test_views.cameras[:1])
    assert (truth.images.int() - by_file.images.int()).abs().max() <= 1


def test_poses_are_in_the_datas_own_coordinates(tmp_path):
    poses = ring_of_pictures(tmp_path)
    recipe = RadianceFieldRecipe(Config(**{**vars(SMALL), "data": str(tmp_path)}), Runtime())
    cameras = recipe.cameras_for(poses[1].numpy())
    assert torch.allclose(cameras.poses[0], recipe.open("train").cameras.poses[0], atol=1e-5)
    samples = recipe.samples(tmp_path)
    own = recipe.cameras_for(samples[0])
    assert torch.allclose(own.intrinsics, recipe.test_views.cameras.intrinsics[:1], atol=1e-5)
    assert torch.allclose(own.poses, recipe.test_views.cameras.poses[:1], atol=1e-5)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("orbit:none", "1 to 10000"),
        ("picture.png", "neither 'orbit' nor a .json"),
        (np.zeros((2, 2)), "pose 0"),
        (np.zeros((3, 4)), "flattens"),
        (np.zeros(4), r"shape \(4,\)"),
        ("missing.json", "no such file"),
    ],
)
def test_what_cannot_be_rendered_is_told_in_a_line(recipe, value, problem):
    with pytest.raises(PaperZooError, match=problem) as caught:
        recipe.predict([value])
    assert "\n" not in str(caught.value)


def test_views_are_written_as_pictures_and_films(recipe, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 3, 16, 16), generator=generator, dtype=torch.uint8)
    depth = 2 + torch.rand(3, 16, 16, generator=generator)
    result = RenderedViews(images, depth, torch.ones(3, 16, 16), 3, 16, 16)
    for name, frames in (("one.png", 1), ("film.gif", 3)):
        with Image.open(result.save(tmp_path / name)) as file:
            assert file.size == (16, 16) and getattr(file, "n_frames", 1) == frames
    assert result.save(tmp_path / "film.mp4").stat().st_size > 200
    assert result.save(tmp_path / "depth.gif", depth=True).exists()
    with pytest.raises(PaperZooError, match=".png, .gif or .mp4"):
        result.save(tmp_path / "film.txt")
    drawn = recipe.draw("orbit:3", result)
    assert drawn.n_frames == 3 and drawn.width > drawn.height


def test_a_forward_facing_scene_has_depth_in_its_own_units():
    recipe = RadianceFieldRecipe(Config(**{**vars(SMALL), "data": "rendered_room"}), Runtime())
    assert recipe.facts["ndc"] and recipe.step(recipe.batch())["loss"].isfinite()
    seen = recipe.render(smaller(recipe.test_views.cameras[:1], 12))
    known = seen.depth[seen.opacity > 0.5]
    assert len(known) and bool((known >= 1).all())


def test_near_must_be_before_far():
    with pytest.raises(PaperZooError, match="near is 7"):
        RadianceFieldRecipe(Config(**{**vars(SMALL), "near": 7.0}), Runtime())


def test_lpips_takes_the_published_files_names(tmp_path):
    from torchmetrics.functional.image.lpips import _LPIPS

    torch.manual_seed(0)
    state = _LPIPS(pretrained=False, net="vgg", pnet_rand=True, eval_mode=True).state_dict()
    assert {"net.slice1.0.weight", "lin0.model.1.weight"} <= state.keys()
    torch.save(state, tmp_path / "lpips.pth")
    distance = perceptual_distance(str(tmp_path / "lpips.pth"), torch.device("cpu"))
    x = torch.rand(1, 3, 32, 32)
    assert float(distance(x, x)) == pytest.approx(0, abs=1e-6) and abs(float(distance(x, 1 - x))) > 1e-4
    torch.save({"a": x}, tmp_path / "other.pth")
    with pytest.raises(PaperZooError, match="not the weights of LPIPS"):
        perceptual_distance(str(tmp_path / "other.pth"), torch.device("cpu"))


# -- published weights ---------------------------------------------------------------------------------------------------


def keras_arrays(seed):
    generator = np.random.default_rng(seed)
    sizes = [(63, 256), *[(256, 256)] * 4, (319, 256), *[(256, 256)] * 2, (256, 256), (283, 128), (128, 3), (256, 1)]
    return [generator.normal(size=s).astype(np.float32) for pair in sizes for s in (pair, pair[1:])]


def save_arrays(path, arrays):
    held = np.empty(len(arrays), dtype=object)
    held[:] = arrays
    np.save(path, held, allow_pickle=True)


def test_the_authors_files_are_read_without_running_code(tmp_path):
    from paperzoo.engine.models import create

    coarse, fine = keras_arrays(0), keras_arrays(1)
    save_arrays(tmp_path / "model_200000.npy", coarse)
    save_arrays(tmp_path / "model_fine_200000.npy", fine)
    model = create("nerf", weights=str(tmp_path / "model_200000.npy"))
    assert torch.equal(model.coarse.pts_linears[5].weight, torch.from_numpy(coarse[10].T))
    assert torch.equal(model.fine.alpha_linear.weight, torch.from_numpy(fine[22].T))

    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    (tmp_path / "model_1.npy").write_bytes(buffer.getvalue() + pickle.dumps([Evil()]))
    with pytest.raises(PaperZooError, match=r"builtins\.print"):
        create("nerf", weights=str(tmp_path / "model_1.npy"))
    save_arrays(tmp_path / "model_2.npy", coarse[:7])
    with pytest.raises(PaperZooError, match="holds 7 arrays"):
        create("nerf", weights=str(tmp_path / "model_2.npy"))


def test_the_ports_checkpoints_load(tmp_path):
    from paperzoo.engine.models import create

    torch.manual_seed(0)
    model = nerf.nerf()
    optimizer = torch.optim.Adam(model.parameters())
    torch.save(
        {
            "global_step": 200000,
            "network_fn_state_dict": model.coarse.state_dict(),
            "network_fine_state_dict": model.fine.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
        },
        tmp_path / "200000.tar",
    )
    loaded = create("nerf", weights=str(tmp_path / "200000.tar"))
    assert torch.equal(loaded.fine.rgb_linear.weight, model.fine.rgb_linear.weight)
    assert torch.equal(loaded.coarse.views_linears[0].bias, model.coarse.views_linears[0].bias)
